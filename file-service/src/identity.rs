//! Who this server is, kept durably on its disk, so that a disk never serves a cluster that it does not belong to; and
//! which directory it follows, so that it never takes orders of one that was superseded.

use crate::record_file::{self, Kind};
use cairn_core::cluster::follow;
use cairn_proto::{
    Error, Reason, Result,
    id::{Generation, ServerId},
    v1::{DirectoryLife, FollowOutcome},
};
use disk::Disk;
use parking_lot::Mutex;
use rand::{RngCore, SeedableRng, rngs::StdRng};
use std::{path::Path, sync::Arc};
use tokio::time::Instant;
use uuid::Uuid;

const FILE: Kind = Kind { path: "identity", magic: b"CAIRNidn", version: 1, payload_bytes_max: 4_096 };

/// What other parts of a server leave on its disk: with one of them and no identity, the disk is not blank.
const TRACES: [&str; 3] = ["topology", "chunks", "journal"];

/// The record on disk.
#[derive(Clone, PartialEq, prost::Message)]
struct Record {
    /// Made when the disk was first used, a UUID.
    #[prost(string, tag = "1")]
    disk_id: String,
    /// The cluster; empty for a blank disk.
    #[prost(string, tag = "2")]
    cluster_id: String,
    /// Given by the directory; 0 for a blank disk.
    #[prost(uint64, tag = "3")]
    server_id: u64,
    /// Highest generation of the directory's store that was seen.
    #[prost(uint64, tag = "4")]
    generation: u64,
    /// How often the server was started on this disk.
    #[prost(uint64, tag = "5")]
    starts: u64,
    /// The directory that this server follows, as far as is known.
    #[prost(message, optional, tag = "6")]
    follows: Option<DirectoryLife>,
}

impl Record {
    /// Whom this server follows; of a generation that was only heard of, that alone is known.
    fn life(&self) -> DirectoryLife {
        match &self.follows {
            Some(life) if life.generation >= self.generation => life.clone(),
            _ => DirectoryLife { generation: self.generation, ..Default::default() },
        }
    }
}

/// A server's identity.
#[derive(Debug)]
pub struct Identity {
    disk: Arc<dyn Disk>,
    incarnation: String,
    record: Mutex<Record>,
    /// When the directory that this server follows was last heard.
    heard: Mutex<Option<Instant>>,
    /// Held while the file is written.
    writing: tokio::sync::Mutex<()>,
}

impl Identity {
    /// Reads the identity, or makes one for a blank disk; counts the start. Durable on return.
    ///
    /// All chance comes from `seed`: two blank disks given the same seed would claim to be the same disk.
    ///
    /// # Errors
    /// `IO` when the record is damaged, of another version, or missing although the disk is in use.
    pub async fn open(disk: Arc<dyn Disk>, seed: u64) -> Result<Self> {
        let mut record = match record_file::read::<Record>(disk.as_ref(), FILE).await? {
            Some(record) => record,
            None => {
                refuse_used(disk.as_ref()).await?;
                let disk_id = random_uuid(&mut StdRng::seed_from_u64(seed)).to_string();
                Record { disk_id, ..Record::default() }
            }
        };
        record.starts = record.starts.saturating_add(1);
        record_file::write(disk.as_ref(), FILE, &record).await?;
        // The same seed at the next start must not give the same life: the count of starts is part of it.
        let mut life = [0; 32];
        life[..8].copy_from_slice(&seed.to_le_bytes());
        life[8..16].copy_from_slice(&record.starts.to_le_bytes());
        life[16..24].copy_from_slice(&cairn_proto::checksum::crc64(record.disk_id.as_bytes()).to_le_bytes());
        let incarnation = random_uuid(&mut StdRng::from_seed(life)).to_string();
        let (record, heard) = (Mutex::new(record), Mutex::new(None));
        Ok(Self { disk, incarnation, record, heard, writing: tokio::sync::Mutex::new(()) })
    }

    /// The identity of the disk, a UUID.
    pub fn disk_id(&self) -> String {
        self.record.lock().disk_id.clone()
    }

    /// The life of this process, a UUID.
    pub fn incarnation(&self) -> &str {
        &self.incarnation
    }

    /// The cluster; empty while the disk is blank.
    pub fn cluster_id(&self) -> String {
        self.record.lock().cluster_id.clone()
    }

    /// The server's id; 0 while the disk is blank.
    pub fn server_id(&self) -> ServerId {
        ServerId(self.record.lock().server_id)
    }

    /// Whether the disk belongs to a cluster.
    pub fn is_member(&self) -> bool {
        let record = self.record.lock();
        !record.cluster_id.is_empty() && record.server_id != 0
    }

    /// The highest generation of the directory's store that is known.
    pub fn generation(&self) -> Generation {
        Generation(self.record.lock().generation)
    }

    /// How often a server was started on this disk.
    pub fn starts(&self) -> u64 {
        self.record.lock().starts
    }

    /// The directory that this server follows.
    pub fn life(&self) -> DirectoryLife {
        self.record.lock().life()
    }

    /// Milliseconds since that directory was heard; `None` when it was not since the start.
    pub fn heard_ago_ms(&self) -> Option<u64> {
        self.heard.lock().map(|heard| heard.elapsed().as_millis() as u64)
    }

    /// What a directory that asks to be followed is answered.
    pub fn would_follow(&self, asks: &DirectoryLife) -> FollowOutcome {
        follow::follow(&self.life(), self.heard_ago_ms(), asks, false)
    }

    /// Follows a directory that asks for it, if that is right; durable on return. `serves`: enough others do already.
    ///
    /// # Errors
    /// `NO_SPACE` or `IO`, with nothing changed.
    pub async fn follow(&self, asks: &DirectoryLife, serves: bool) -> Result<FollowOutcome> {
        let mut outcome = FollowOutcome::Unspecified;
        self.change(|record| {
            outcome = follow::follow(&record.life(), self.heard_ago_ms(), asks, serves);
            if outcome == FollowOutcome::Followed {
                record.follows = Some(asks.clone());
                record.generation = asks.generation;
            }
            Ok(())
        })
        .await?;
        if outcome == FollowOutcome::Followed {
            *self.heard.lock() = Some(Instant::now());
        }
        Ok(outcome)
    }

    /// Notes that a serving directory answered, and follows it; durable on return.
    ///
    /// # Errors
    /// `STALE_EPOCH` when it was superseded; `NO_SPACE`, `IO`.
    pub async fn hear_from(&self, life: &DirectoryLife) -> Result<()> {
        self.check_directory(Generation(life.generation), life.term)?;
        self.follow(life, true).await.map(drop)
    }

    /// Refuses what comes from a directory that was superseded. Answers whether it is newer than the known one.
    ///
    /// # Errors
    /// `STALE_EPOCH`.
    pub fn check_directory(&self, generation: Generation, term: u64) -> Result<bool> {
        let record = self.record.lock();
        let known = record.life();
        if (generation.0, term) < (known.generation, known.term) {
            return Err(Error::new(
                Reason::StaleEpoch,
                format!(
                    "this server follows the directory of generation {} and term {}, the one of generation {generation} \
                     and term {term} was superseded",
                    known.generation, known.term
                ),
            )
            .on(record.server_id.to_string()));
        }
        Ok((generation.0, term) > (known.generation, known.term))
    }

    /// Notes that a directory was heard, and follows it if it is newer than the known one: only one that enough
    /// carriers follow sends orders. Durable on return.
    ///
    /// # Errors
    /// `STALE_EPOCH` when it was superseded; `NO_SPACE`, `IO`.
    pub async fn hear(&self, generation: Generation, term: u64) -> Result<()> {
        if self.check_directory(generation, term)? {
            self.change(|record| {
                let known = record.life();
                if (generation.0, term) > (known.generation, known.term) {
                    let same = known.generation == generation.0;
                    let store_id = if same { known.store_id } else { String::new() };
                    let life =
                        DirectoryLife { generation: generation.0, store_id, term, ..Default::default() };
                    record.follows = Some(life);
                    record.generation = generation.0;
                }
                Ok(())
            })
            .await?;
        }
        *self.heard.lock() = Some(Instant::now());
        Ok(())
    }

    /// Becomes, or stays, the given server of the given cluster; durable on return.
    ///
    /// # Errors
    /// `WRONG_CLUSTER` when the disk belongs to another cluster or server: nothing changes.
    pub async fn join(&self, cluster_id: &str, server_id: ServerId, generation: Generation) -> Result<()> {
        if cluster_id.is_empty() || server_id.0 == 0 {
            return Err(Error::internal("the directory answered a registration without a cluster or an id"));
        }
        self.change(|record| {
            let blank = record.cluster_id.is_empty() && record.server_id == 0;
            if !blank && (record.cluster_id != cluster_id || record.server_id != server_id.0) {
                return Err(Error::new(
                    Reason::WrongCluster,
                    format!(
                        "this disk is server {} of cluster {}, the directory says server {server_id} of cluster \
                         {cluster_id}: give this server the disk or the directory it belongs to",
                        record.server_id, record.cluster_id
                    ),
                ));
            }
            record.cluster_id = cluster_id.to_owned();
            record.server_id = server_id.0;
            record.generation = record.generation.max(generation.0);
            Ok(())
        })
        .await
    }

    /// Remembers a generation if it is higher than the known one; durable on return.
    ///
    /// # Errors
    /// `NO_SPACE` or `IO`.
    pub async fn learn(&self, generation: Generation) -> Result<()> {
        if generation <= self.generation() {
            return Ok(());
        }
        self.change(|record| {
            record.generation = record.generation.max(generation.0);
            Ok(())
        })
        .await
    }

    /// Refuses what is not for this server's cluster, or comes from an older life of the directory's store.
    ///
    /// # Errors
    /// `WRONG_CLUSTER` or `STALE_EPOCH`.
    pub fn check(&self, cluster_id: &str, generation: Generation) -> Result<()> {
        let record = self.record.lock();
        if record.cluster_id.is_empty() || record.cluster_id != cluster_id {
            return Err(Error::new(
                Reason::WrongCluster,
                format!(
                    "this server belongs to cluster '{}', the order is for '{cluster_id}'",
                    record.cluster_id
                ),
            )
            .on(record.server_id.to_string()));
        }
        if generation.0 < record.generation {
            return Err(Error::new(
                Reason::StaleEpoch,
                format!(
                    "the order is of generation {generation}, this server knows generation {}",
                    record.generation
                ),
            )
            .on(record.server_id.to_string()));
        }
        Ok(())
    }

    /// Refuses a call that is meant for another server, as far as the caller says for whom.
    ///
    /// # Errors
    /// `WRONG_CLUSTER`.
    pub fn check_meant(&self, cluster_id: Option<&str>, server_id: Option<&str>) -> Result<()> {
        let record = self.record.lock();
        let is_meant = cluster_id.is_none_or(|id| id == record.cluster_id)
            && server_id.is_none_or(|id| id.parse() == Ok(record.server_id));
        if is_meant {
            return Ok(());
        }
        let why = format!(
            "this is server {} of cluster '{}', the call is for server {} of cluster '{}': its address leads here by \
             mistake",
            record.server_id,
            record.cluster_id,
            server_id.unwrap_or("any"),
            cluster_id.unwrap_or("any")
        );
        Err(Error::new(Reason::WrongCluster, why).on(record.server_id.to_string()))
    }

    async fn change(&self, change: impl FnOnce(&mut Record) -> Result<()> + Send) -> Result<()> {
        let _writing = self.writing.lock().await;
        let mut record = self.record.lock().clone();
        change(&mut record)?;
        if record != *self.record.lock() {
            record_file::write(self.disk.as_ref(), FILE, &record).await?;
            *self.record.lock() = record;
        }
        Ok(())
    }
}

async fn refuse_used(disk: &dyn Disk) -> Result<()> {
    let names = disk.list(Path::new("")).await?;
    match names.iter().find(|entry| TRACES.contains(&entry.name.as_str())) {
        None => Ok(()),
        Some(entry) => Err(Error::new(
            Reason::Io,
            format!(
                "the disk has '{}' but no file '{}' that says whose it is: restore that file, or start with a blank disk",
                entry.name, FILE.path
            ),
        )),
    }
}

fn random_uuid(rng: &mut StdRng) -> Uuid {
    let mut bytes = [0; 16];
    rng.fill_bytes(&mut bytes);
    uuid::Builder::from_random_bytes(bytes).into_uuid()
}

#[cfg(test)]
mod tests {
    use super::*;
    use disk::{CrashKeep, SimDisk};

    #[tokio::test]
    async fn it_survives_a_restart_and_a_crash() {
        let disk = SimDisk::new(1, 1 << 20);
        let identity = Identity::open(Arc::new(disk.clone()), 5).await.unwrap();
        assert!(!identity.is_member());
        identity.join("c", ServerId(3), Generation(2)).await.unwrap();
        identity.learn(Generation(4)).await.unwrap();
        identity.learn(Generation(3)).await.unwrap();
        disk.crash(CrashKeep::Nothing);
        let again = Identity::open(Arc::new(disk.clone()), 5).await.unwrap();
        assert_eq!((again.cluster_id().as_str(), again.server_id()), ("c", ServerId(3)));
        assert_eq!(again.generation(), Generation(4));
        assert_eq!(again.disk_id(), identity.disk_id());
        assert_ne!(again.incarnation(), identity.incarnation(), "each start is another life");
    }

    #[tokio::test]
    async fn a_foreign_cluster_changes_nothing() {
        let identity = Identity::open(Arc::new(SimDisk::new(1, 1 << 20)), 5).await.unwrap();
        identity.join("c", ServerId(3), Generation(2)).await.unwrap();
        let error = identity.join("d", ServerId(3), Generation(9)).await.unwrap_err();
        assert_eq!(error.reason, Reason::WrongCluster);
        assert_eq!(
            identity.join("c", ServerId(4), Generation(2)).await.unwrap_err().reason,
            Reason::WrongCluster
        );
        assert_eq!((identity.cluster_id().as_str(), identity.generation()), ("c", Generation(2)));
        assert_eq!(identity.check("d", Generation(2)).unwrap_err().reason, Reason::WrongCluster);
        assert_eq!(identity.check("c", Generation(1)).unwrap_err().reason, Reason::StaleEpoch);
        assert!(identity.check("c", Generation(3)).is_ok());
        for (cluster, server, is_meant) in [
            (None, None, true),
            (Some("c"), Some("3"), true),
            (Some("d"), Some("3"), false),
            (Some("c"), Some("4"), false),
            (None, Some("?"), false),
        ] {
            assert_eq!(identity.check_meant(cluster, server).is_ok(), is_meant, "{cluster:?} {server:?}");
        }
    }

    #[tokio::test]
    async fn it_follows_one_directory_across_restarts_and_refuses_the_one_before() {
        let disk = SimDisk::new(1, 1 << 20);
        let identity = Identity::open(Arc::new(disk.clone()), 5).await.unwrap();
        identity.join("c", ServerId(3), Generation(2)).await.unwrap();
        let life = |term, process: &str, address: &str| DirectoryLife {
            generation: 2,
            store_id: "s".into(),
            term,
            incarnation: process.into(),
            addresses: vec![address.into()],
        };
        let first = life(1, "p", "http://a");
        assert_eq!(identity.follow(&first, false).await.unwrap(), FollowOutcome::Followed);
        assert_eq!(identity.follow(&life(2, "q", "http://b"), false).await.unwrap(), FollowOutcome::Held);
        disk.crash(CrashKeep::Nothing);
        let again = Identity::open(Arc::new(disk), 5).await.unwrap();
        assert_eq!((again.life(), again.heard_ago_ms()), (first, None));
        assert!(!again.check_directory(Generation(2), 1).unwrap());
        assert_eq!(again.follow(&life(2, "q", "http://b"), false).await.unwrap(), FollowOutcome::Followed);
        assert_eq!(again.hear(Generation(2), 1).await.unwrap_err().reason, Reason::StaleEpoch);
        again.hear(Generation(2), 5).await.unwrap();
        assert_eq!((again.life().term, again.life().store_id.as_str()), (5, "s"));
        again.learn(Generation(4)).await.unwrap();
        assert_eq!(again.life(), DirectoryLife { generation: 4, ..Default::default() });
    }

    #[tokio::test]
    async fn a_used_disk_without_identity_is_refused() {
        let disk = SimDisk::new(1, 1 << 20);
        disk.create_dir_all(Path::new("chunks")).await.unwrap();
        let error = Identity::open(Arc::new(disk), 5).await.unwrap_err();
        assert!(error.message().contains("chunks"), "{error}");
    }
}
