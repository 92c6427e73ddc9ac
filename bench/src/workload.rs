//! What is run against a cluster, and how: clients in turn or at once, prepared outside of the measured time.
//!
//! All files are in one folder that the bench made and removes. A run is over after [`Scale::span`], each worker ending
//! the operation that it has under way; bulk writes are as long as their bytes.

mod drive;
mod names;
mod small;
mod stream;

use crate::usage::{Sample, Unit};
use client_lib::{Client, Error, Result, WriteOptions};
use std::{collections::BTreeSet, time::Duration};

/// Bytes of a small file.
pub const SMALL_BYTES: usize = 4_096;
/// Workers that prepare files.
const PREPARERS: usize = 64;

/// How much is done.
#[derive(Clone, Debug, PartialEq)]
pub struct Scale {
    /// How long a workload runs.
    pub span: Duration,
    /// Small files that are read and looked up.
    pub small_files: u64,
    /// Bytes of a large file.
    pub large_bytes: u64,
    /// Bytes of the file in which small ranges are read and overwritten.
    pub table_bytes: u64,
    /// Entries of the directory that is listed.
    pub listed: u64,
}

impl Scale {
    /// For figures that are kept.
    pub fn full() -> Self {
        Self {
            span: Duration::from_millis(1_500),
            small_files: 4_000,
            large_bytes: 256 << 20,
            table_bytes: 1 << 30,
            listed: 100_000,
        }
    }

    /// For a look.
    pub fn quick() -> Self {
        Self {
            span: Duration::from_millis(500),
            small_files: 1_000,
            large_bytes: 64 << 20,
            table_bytes: 64 << 20,
            listed: 5_000,
        }
    }
}

/// What a workload does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    WriteSmall,
    ReadSmall,
    Lookup,
    Mkdir,
    Rename,
    LargeWrite,
    LargeRead,
    Overwrite,
    ReadRandom,
    List { attributes: bool },
}

/// One thing that is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Its name in JSON and on the command line.
    pub id: &'static str,
    /// What it is, in words.
    pub what: &'static str,
    /// What it counts.
    pub unit: Unit,
    kind: Kind,
    /// Clients, each with a session and connections of its own.
    clients: usize,
    /// Operations that each client has under way.
    tasks: usize,
    /// Copies of what is written; 0 for as many as the cluster keeps by itself.
    copies: u32,
}

const fn workload(
    id: &'static str,
    what: &'static str,
    kind: Kind,
    clients: usize,
    tasks: usize,
) -> Workload {
    let unit = match kind {
        Kind::LargeWrite | Kind::LargeRead => Unit::Mebibytes,
        Kind::List { .. } => Unit::Entries,
        _ => Unit::Operations,
    };
    Workload { id, what, unit, kind, clients, tasks, copies: 0 }
}

impl Workload {
    const fn single_copy(mut self) -> Self {
        self.copies = 1;
        self
    }
}

/// All of them, in the order in which they are run.
pub const ALL: [Workload; 22] = [
    workload("large_read", "large read", Kind::LargeRead, 1, 1),
    workload("large_write", "large durable write", Kind::LargeWrite, 1, 1),
    workload("large_write_one_copy", "large durable write, 1 copy", Kind::LargeWrite, 1, 1).single_copy(),
    workload("small_write_1", "small file durable write(path), 1 client", Kind::WriteSmall, 1, 1),
    workload("small_write_16", "the same, 16 clients", Kind::WriteSmall, 16, 1),
    workload("small_write_64", "the same, 64 clients", Kind::WriteSmall, 64, 1),
    workload("small_write_64_shared", "the same, 64 tasks of one client", Kind::WriteSmall, 1, 64),
    workload("small_write_64_one_copy", "the same, 64 clients, 1 copy", Kind::WriteSmall, 64, 1)
        .single_copy(),
    workload("small_read_1", "small file read, 1 in flight", Kind::ReadSmall, 1, 1),
    workload("small_read_16", "the same, 16 in flight", Kind::ReadSmall, 1, 16),
    workload("small_read_64", "the same, 64 in flight", Kind::ReadSmall, 1, 64),
    workload("lookup_1", "lookup, 1 in flight", Kind::Lookup, 1, 1),
    workload("lookup_64", "lookup, 64 in flight", Kind::Lookup, 1, 64),
    workload("mkdir_1", "mkdir, 1 client", Kind::Mkdir, 1, 1),
    workload("mkdir_64", "mkdir, 64 clients", Kind::Mkdir, 64, 1),
    workload("rename_1", "rename, 1 client", Kind::Rename, 1, 1),
    workload("rename_64", "rename, 64 clients", Kind::Rename, 64, 1),
    workload("overwrite_1", "overwrite of 4 KiB in a large file, 1 client", Kind::Overwrite, 1, 1),
    workload("overwrite_16", "the same, 16 clients with a file each", Kind::Overwrite, 16, 1),
    workload(
        "random_read_64",
        "4 KiB at random places of a large file, 64 in flight",
        Kind::ReadRandom,
        1,
        64,
    ),
    workload("list", "list, names and kinds", Kind::List { attributes: false }, 1, 1),
    workload("list_attributes", "list, with attributes", Kind::List { attributes: true }, 1, 1),
];

/// The workload of that name.
pub fn find(id: &str) -> Option<&'static Workload> {
    ALL.iter().find(|workload| workload.id == id)
}

/// Makes clients: each call one with connections and a session of its own.
pub type Connector<'a> = &'a (dyn Fn() -> Result<Client> + Send + Sync);

/// A folder in a cluster in which workloads are run.
#[derive(Debug)]
pub struct Bench {
    client: Client,
    folder: String,
    scale: Scale,
    servers: Vec<u32>,
    prepared: BTreeSet<String>,
    runs: u64,
}

impl Bench {
    /// Makes the folder, which must not exist. `servers` are the processes whose processor time counts as that of the
    /// servers; none when they run elsewhere.
    ///
    /// # Errors
    /// As [`Client::mkdir`].
    pub async fn new(client: Client, folder: &str, scale: Scale, servers: Vec<u32>) -> Result<Self> {
        client.mkdir(folder).await?;
        Ok(Self { client, folder: folder.to_owned(), scale, servers, prepared: BTreeSet::new(), runs: 0 })
    }

    /// Prepares a workload once and runs it, with clients made by `connect`.
    ///
    /// # Errors
    /// The first failure of any operation: a bench that does not do what it says has no figures.
    pub async fn run(&mut self, workload: &Workload, connect: Connector<'_>) -> Result<Sample> {
        self.runs += 1;
        let context = |error: Error| {
            let message = format!("{}: {}", workload.id, error.message());
            Error::new(error.reason, message)
        };
        let done = match workload.kind {
            Kind::WriteSmall => small::write(self, workload, connect).await,
            Kind::ReadSmall => small::read(self, workload, connect).await,
            Kind::Lookup => names::lookup(self, workload, connect).await,
            Kind::Mkdir => names::mkdir(self, workload, connect).await,
            Kind::Rename => names::rename(self, workload, connect).await,
            Kind::LargeWrite => stream::write(self, workload, connect).await,
            Kind::LargeRead => stream::read(self, connect).await,
            Kind::Overwrite => stream::overwrite(self, workload, connect).await,
            Kind::ReadRandom => stream::read_random(self, workload, connect).await,
            Kind::List { attributes } => names::list(self, attributes, connect).await,
        };
        done.map_err(context)
    }

    /// Removes all that was made.
    ///
    /// # Errors
    /// As [`Client::delete_recursive`].
    pub async fn clean_up(self) -> Result<()> {
        self.client.delete_recursive(&self.folder).await?;
        self.client.close().await
    }

    /// A folder below the own one, made at its first use.
    async fn folder(&mut self, name: &str, copies: u32) -> Result<String> {
        let path = format!("{}/{name}-{copies}", self.folder);
        if self.prepared.insert(path.clone()) {
            self.client.mkdir_with(&path, WriteOptions::new().replication(copies)).await?;
        }
        Ok(path)
    }

    /// Small files numbered from 0, made at the first use.
    async fn small_files(&mut self) -> Result<String> {
        let folder = self.folder("small", 0).await?;
        if self.prepared.insert("small files".to_owned()) {
            let (client, files) = (&self.client, &folder);
            drive::all(PREPARERS, self.scale.small_files, |number| async move {
                client.write(&format!("{files}/{number}"), drive::content(number, SMALL_BYTES)).await
            })
            .await?;
        }
        Ok(folder)
    }

    /// A file of pseudo-random bytes, made at the first use.
    async fn large_file(&mut self, name: &str, bytes: u64) -> Result<String> {
        let path = format!("{}/{name}", self.folder);
        if self.prepared.insert(path.clone()) {
            let mut options = self.client.open_options();
            let mut file = options.write(true).create(true).open(&path).await?;
            let part = drive::content(bytes, (8 << 20).min(bytes) as usize);
            let mut rest = bytes;
            while rest > 0 {
                let part = part.slice(..rest.min(part.len() as u64) as usize);
                rest -= part.len() as u64;
                file.append(part).await?;
            }
            file.close().await?;
        }
        Ok(path)
    }

    /// An empty file for each entry, made at the first use.
    async fn listed(&mut self) -> Result<String> {
        let folder = self.folder("listed", 0).await?;
        if self.prepared.insert("listed".to_owned()) {
            let (client, files) = (&self.client, &folder);
            drive::all(PREPARERS, self.scale.listed, |number| async move {
                client.create(&format!("{files}/entry number {number:08}")).await
            })
            .await?;
        }
        Ok(folder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_workload_is_found_by_its_own_name() {
        for workload in &ALL {
            assert_eq!(find(workload.id), Some(workload), "two are called {}", workload.id);
            assert!(workload.clients * workload.tasks <= 64);
        }
        assert_eq!(find("nothing"), None);
    }
}
