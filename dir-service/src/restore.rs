//! Makes a directory's data folder from a backup, while no directory runs on it.
//!
//! The store gets a generation of its own, far above those that rebuilds since the backup can have reached: the upper 32
//! bits count restores, the lower ones rebuilds. What file servers know of lower generations is given up; chunks that the
//! backup does not know are kept and listed (their grants are unknown, or were open), chunks that it knows and nobody
//! holds any more count as lost. The first start of a directory on it asks the carriers that the backup names to follow,
//! as any start does ([`crate::claim`]).

use crate::{
    directory::RESTORED_BIT,
    life,
    store::{JournaledConfig, Restore, StoreIdentity, open_index},
};
use bytes::Bytes;
use cairn_core::plan::Versioned;
use cairn_proto::{
    Error, Reason, Result,
    checkpoint::{self, EntrySum, FRAME_BYTES, Head, Part},
    id::{Generation, Revision},
    v1,
};
use disk::{Disk, RealDisk, durable};
use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};
use tokio::io::{AsyncReadExt as _, BufReader};

/// The file of a backup's folder.
pub const BACKUP_FILE: &str = "directory.backup";
const READ_BYTES: usize = 1024 * 1024;

/// What was restored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restored {
    /// The cluster.
    pub cluster_id: String,
    /// The generation that was backed up.
    pub backup_generation: u64,
    /// The revision that was backed up.
    pub revision: u64,
    /// Number of records.
    pub entries: u64,
    /// The generation of the new store.
    pub generation: u64,
}

/// Restores a backup (its folder or file) into a data folder that holds nothing else. The generation is above that of the
/// backup and `above`. The backup is verified as a whole before anything is written. An interrupted restore is repeated.
///
/// # Errors
/// `NOT_FOUND` without a backup, `IO` for a damaged one, `ALREADY_EXISTS` when the data folder is in use.
pub async fn restore(backup: &Path, data: &Path, above: u64) -> Result<Restored> {
    let file = if backup.is_dir() { backup.join(BACKUP_FILE) } else { backup.to_owned() };
    let (head, entries) = read(&file, |_| Ok(())).await?;
    check_empty(data)?;
    let disk: Arc<dyn Disk> = RealDisk::open(data)?;
    let generation = ((head.generation.max(above) >> RESTORED_BIT) + 1) << RESTORED_BIT;
    let dir = life::folder(&head.cluster_id)?;
    disk.create_dir_all(&dir).await?;
    let index = open_index(&disk, &dir, None).await?;
    let identity = StoreIdentity { cluster_id: head.cluster_id.clone(), generation: Generation(generation) };
    let mut restore = Restore::begin(disk.clone(), &dir, identity, Revision(head.revision), index).await?;
    let mut reader = Reader::open(&file).await?;
    while let Some(part) = reader.next().await? {
        let Part::Entries(entries) = part else { continue };
        for entry in entries {
            let value = Versioned { value: entry.value, revision: Revision(entry.revision) };
            restore.load(entry.key, value).await?;
        }
    }
    restore.finish(JournaledConfig::default()).await?.close().await?;
    durable::write_file_durable(&*disk, Path::new(life::RESTORED), Bytes::from_static(b"restored\n")).await?;
    life::name(&*disk, &dir).await?;
    Ok(Restored {
        cluster_id: head.cluster_id,
        backup_generation: head.generation,
        revision: head.revision,
        entries,
        generation,
    })
}

/// Reads a backup to its end; answers what it is of, and its number of entries.
///
/// # Errors
/// `NOT_FOUND`; `IO` when it is damaged or not whole; those of `take`.
pub async fn read(
    file: &Path,
    mut take: impl FnMut(&v1::CheckpointEntry) -> Result<()>,
) -> Result<(Head, u64)> {
    let mut reader = Reader::open(file).await?;
    let Some(Part::Head(head)) = reader.next().await? else { return Err(reader.damaged()) };
    let mut sum = EntrySum::default();
    loop {
        match reader.next().await? {
            Some(Part::Entries(entries)) => {
                for entry in &entries {
                    sum.add(entry);
                    take(entry)?;
                }
            }
            Some(Part::Tail(tail)) if sum.is_of(&tail) => return Ok((head, sum.count())),
            _ => return Err(reader.damaged()),
        }
    }
}

struct Reader {
    file: BufReader<tokio::fs::File>,
    path: PathBuf,
    offset: u64,
    ended: bool,
}

impl Reader {
    async fn open(path: &Path) -> Result<Self> {
        let opened = tokio::fs::File::open(path).await;
        let file = opened.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Error::not_found(format!("{}: no such backup", path.display())),
            _ => Error::from(error).at(path.display().to_string()),
        })?;
        let file = BufReader::with_capacity(READ_BYTES, file);
        Ok(Self { file, path: path.to_owned(), offset: 0, ended: false })
    }

    /// The next part; `None` behind the last.
    async fn next(&mut self) -> Result<Option<Part>> {
        if self.ended {
            return Ok(None);
        }
        let mut head = [0; FRAME_BYTES];
        self.exact(&mut head).await?;
        let length = checkpoint::payload_bytes(&head).ok_or_else(|| self.damaged())?;
        let mut payload = vec![0; length];
        self.exact(&mut payload).await?;
        let part = checkpoint::decode(&head, payload.into())?.ok_or_else(|| self.damaged())?;
        self.offset += (FRAME_BYTES + length) as u64;
        self.ended = matches!(part, Part::Tail(_));
        Ok(Some(part))
    }

    async fn exact(&mut self, bytes: &mut [u8]) -> Result<()> {
        match self.file.read_exact(bytes).await {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(self.damaged()),
            Err(error) => Err(Error::from(error).at(self.path.display().to_string())),
        }
    }

    fn damaged(&self) -> Error {
        let why = format!(
            "the backup {} is damaged or not whole near byte {}: use another one",
            self.path.display(),
            self.offset
        );
        Error::new(Reason::Io, why)
    }
}

/// A restore overwrites nothing but what an interrupted one left.
pub(crate) fn check_empty(data: &Path) -> Result<()> {
    let entries = match std::fs::read_dir(data) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    let names: Vec<String> = entries
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<io::Result<_>>()?;
    let in_use = names.iter().any(|name| name == life::CURRENT);
    let foreign = |name: &&String| *name != "LOCK" && *name != life::RESTORED && !name.starts_with("store-");
    let found = if in_use { Some(life::CURRENT) } else { names.iter().find(foreign).map(String::as_str) };
    match found {
        None => Ok(()),
        Some(name) => Err(Error::new(
            Reason::AlreadyExists,
            format!("{} is not empty, it has '{name}': restore into an empty folder", data.display()),
        )),
    }
}

#[cfg(test)]
#[path = "restore_tests.rs"]
mod tests;
