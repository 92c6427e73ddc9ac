//! One copy of one generation's journal: a checkpoint and the log behind it.
//!
//! ```text
//! journal/<generation, 16 hex digits>/
//!     checkpoint-<revision>      the checkpoint; none for a copy that began at revision 0
//!     checkpoint-<revision>.tmp  one that is being installed; dropped at start
//!     log-<revision>/            the log behind the checkpoint of that revision: record tag = revision
//! ```
//!
//! A checkpoint and its log are ready before the checkpoint gets its name: that rename is the moment it counts.

use super::checkpoint::{Head, Reader, Writer};
use bytes::Bytes;
use cairn_proto::{
    Error, Reason, Result,
    checksum::crc64,
    id::{Generation, Revision},
    limits::JOURNAL_BATCH_BYTES_MAX,
    v1,
};
use disk::{
    Disk,
    log::{Log, LogConfig, Position, Record},
};
use prost::Message as _;
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

/// A log record that holds a plan; its tag is the plan's revision.
const PLAN: u8 = 1;
/// A log record that holds the carriers; its tag is the revision before it.
const CARRIERS: u8 = 2;

/// The log is small: a checkpoint replaces it from time to time.
const SEGMENT_BYTES: u32 = 8 * 1024 * 1024;
const RECORD_BYTES_MAX: u32 = 4 * 1024 * 1024;

#[derive(Clone, PartialEq, prost::Message)]
struct Carriers {
    #[prost(uint64, repeated, tag = "1")]
    ids: Vec<u64>,
}

/// A copy that is open.
#[derive(Debug)]
pub(super) struct Copy {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    cluster_id: String,
    pub(super) checkpoint: Revision,
    /// Whether there is a checkpoint file.
    pub(super) is_installed: bool,
    log: Log,
    /// Last revision that was given to the log.
    last: Revision,
    pub(super) carriers: Vec<u64>,
}

/// A plan record that was handed to the log.
#[derive(Debug)]
pub(super) struct Appended {
    pending: Option<disk::log::Pending>,
    revision: Revision,
}

impl Appended {
    /// Waits until it is durable; answers the last revision.
    pub(super) async fn durable(self) -> Result<Revision> {
        if let Some(pending) = self.pending {
            pending.durable().await?;
        }
        Ok(self.revision)
    }
}

impl Copy {
    /// Begins a copy at revision 0, where the directory's store is empty.
    pub(super) async fn begin(
        disk: Arc<dyn Disk>,
        dir: PathBuf,
        cluster_id: String,
        generation: Generation,
    ) -> Result<Self> {
        disk.create_dir_all(&dir).await?;
        let log = start_log(&disk, &dir, &cluster_id, generation, Revision(0)).await?;
        Ok(Self {
            disk,
            dir,
            cluster_id,
            checkpoint: Revision(0),
            is_installed: false,
            log,
            last: Revision(0),
            carriers: Vec::new(),
        })
    }

    /// Opens what is on the disk, after dropping what was half installed. `None` when there is nothing.
    ///
    /// # Errors
    /// `IO` when the copy is damaged: it is left as it is and must not be offered.
    pub(super) async fn open(
        disk: Arc<dyn Disk>,
        dir: PathBuf,
        cluster_id: String,
        generation: Generation,
    ) -> Result<Option<Self>> {
        let names: Vec<String> = disk.list(&dir).await?.into_iter().map(|entry| entry.name).collect();
        let checkpoint = names.iter().filter_map(|name| numbered(name, "checkpoint-")).max();
        let revision = checkpoint.unwrap_or_default();
        let log_name = log_name(Revision(revision));
        if checkpoint.is_none() && !names.contains(&log_name) {
            drop_others(disk.as_ref(), &dir, Revision(0), false).await?;
            return Ok(None);
        }
        let mut carriers = Vec::new();
        if checkpoint.is_some() {
            let path = dir.join(checkpoint_name(Revision(revision)));
            let (mut reader, head) = Reader::open(disk.as_ref(), &path).await?;
            if (head.cluster_id.as_str(), head.generation, head.revision)
                != (cluster_id.as_str(), generation.0, revision)
            {
                let why = format!("the checkpoint '{}' is of another journal", path.display());
                return Err(Error::new(Reason::Io, why));
            }
            while reader.entries().await?.is_some() {}
            carriers = head.carrier_ids;
        }
        let mut last = revision;
        let mut gap = None;
        let config = log_config(&cluster_id, generation, Revision(revision));
        let (log, _) = Log::open(disk.clone(), &dir.join(log_name), config, &mut |record| {
            match (record.kind, record.payload) {
                (PLAN, Some(_)) if record.tag > last => last = record.tag,
                (CARRIERS, Some(payload)) => {
                    carriers = Carriers::decode(payload).map(|carriers| carriers.ids).unwrap_or_default();
                }
                _ => gap = gap.or(Some(record.tag)),
            }
            Ok(())
        })
        .await?;
        if let Some(tag) = gap {
            let why = format!("the journal copy '{}' has a record {tag} out of order", dir.display());
            return Err(Error::new(Reason::Io, why));
        }
        drop_others(disk.as_ref(), &dir, Revision(revision), checkpoint.is_some()).await?;
        Ok(Some(Self {
            disk,
            dir,
            cluster_id,
            checkpoint: Revision(revision),
            is_installed: checkpoint.is_some(),
            log,
            last: Revision(last),
            carriers,
        }))
    }

    /// Whose journal it is.
    pub(super) fn cluster_id(&self) -> &str {
        &self.cluster_id
    }

    /// Whether this copy is of the given cluster.
    pub(super) fn is_of(&self, cluster_id: &str) -> bool {
        self.cluster_id == cluster_id
    }

    /// Last revision that is durable, without a gap from the checkpoint.
    pub(super) fn durable(&self) -> Revision {
        self.checkpoint.max(Revision(self.log.last_tag().unwrap_or(0)))
    }

    /// Whether the log can take no more: a new checkpoint begins a new one.
    pub(super) fn is_failed(&self) -> bool {
        self.log.is_failed()
    }

    /// Queues records behind `previous`; those that are held already are passed over.
    ///
    /// # Errors
    /// `REVISION_COMPACTED` when records before them are missing here; `INVALID_ARGUMENT` when they are out of order.
    pub(super) async fn append(
        &mut self,
        previous: Revision,
        records: Vec<v1::JournalRecord>,
        carriers: Vec<u64>,
    ) -> Result<Appended> {
        let mut before = previous.0;
        for record in &records {
            if record.revision <= before {
                return Err(Error::invalid(format!(
                    "journal record {} comes behind {before}: send them in order",
                    record.revision
                )));
            }
            before = record.revision;
        }
        if previous > self.last || self.is_failed() {
            return Err(compacted(self.last));
        }
        // None named: those known so far stay.
        let carriers = if carriers.is_empty() { self.carriers.clone() } else { carriers };
        let last = self.last;
        let mut batch: Vec<Record> = records
            .into_iter()
            .filter(|record| record.revision > last.0)
            .map(|record| Record { kind: PLAN, tag: record.revision, payload: vec![record.plan] })
            .collect();
        let revision = batch.last().map_or(last, |record| Revision(record.tag));
        if carriers != self.carriers {
            let payload = Bytes::from(Carriers { ids: carriers.clone() }.encode_to_vec());
            batch.push(Record { kind: CARRIERS, tag: revision.0, payload: vec![payload] });
        }
        let pending = match batch.is_empty() {
            // What is held already may still be on its way to the disk: an empty batch cannot be waited for.
            true if self.durable() < last => Some(self.log.submit(vec![again(&self.carriers, last)]).await?),
            true => None,
            false => Some(self.log.submit(batch).await?),
        };
        (self.last, self.carriers) = (revision, carriers);
        Ok(Appended { pending, revision })
    }

    /// Ends the log, so that the files may be opened or removed.
    pub(super) async fn close(&self) -> Result<()> {
        Ok(self.log.close().await?)
    }

    /// Begins to read: the checkpoint, and the log from its beginning.
    pub(super) async fn read(&self) -> Result<(Option<Reader>, LogReader)> {
        let reader = match self.is_installed {
            true => {
                let path = self.dir.join(checkpoint_name(self.checkpoint));
                Some(Reader::open(self.disk.as_ref(), &path).await?.0)
            }
            false => None,
        };
        let first = self.log.segments().first().map_or(0, |segment| segment.number);
        let at = Position { segment: first, offset: 0 };
        Ok((reader, LogReader { log: self.log.clone(), at, after: self.checkpoint }))
    }
}

/// Reads the records behind a checkpoint.
#[derive(Debug)]
pub(super) struct LogReader {
    log: Log,
    at: Position,
    after: Revision,
}

impl LogReader {
    /// The next records in order; empty at the end.
    pub(super) async fn records(&mut self) -> Result<Vec<v1::JournalRecord>> {
        loop {
            if self.log.segments().is_empty() {
                return Ok(Vec::new());
            }
            let (records, next) = self.log.records_from(self.at, JOURNAL_BATCH_BYTES_MAX / 2).await?;
            if records.is_empty() || next == self.at {
                return Ok(Vec::new());
            }
            self.at = next;
            let after = self.after.0;
            let records: Vec<_> = records
                .into_iter()
                .filter(|record| record.kind == PLAN && record.tag > after)
                .map(|record| v1::JournalRecord { revision: record.tag, plan: record.payload })
                .collect();
            if !records.is_empty() {
                return Ok(records);
            }
        }
    }
}

/// A checkpoint that is arriving for a copy.
#[derive(Debug)]
pub(super) struct Install {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    head: Head,
    writer: Writer,
}

impl Install {
    pub(super) async fn begin(disk: Arc<dyn Disk>, dir: PathBuf, head: Head) -> Result<Self> {
        disk.create_dir_all(&dir).await?;
        let path = dir.join(format!("{}.tmp", checkpoint_name(Revision(head.revision))));
        let writer = Writer::create(disk.as_ref(), &path, head.clone()).await?;
        Ok(Self { disk, dir, head, writer })
    }

    pub(super) async fn entries(&mut self, entries: Vec<v1::CheckpointEntry>) -> Result<()> {
        self.writer.entries(entries).await
    }

    /// Makes the checkpoint count. `old` is the copy so far: what it holds behind the checkpoint is kept.
    pub(super) async fn finish(self, entry_count: u64, old: Option<&Copy>) -> Result<Copy> {
        let Self { disk, dir, head, writer } = self;
        let (generation, revision) = (Generation(head.generation), Revision(head.revision));
        writer.finish(entry_count).await?;
        // A log of this name can only be left from an installation that was not completed.
        remove_dir(disk.as_ref(), &dir.join(log_name(revision))).await?;
        let log = start_log(&disk, &dir, &head.cluster_id, generation, revision).await?;
        let mut last = revision;
        if let Some(old) = old.filter(|old| old.last > revision && !old.is_failed()) {
            // A barrier: what was queued before is durable, and so can be read, once this is.
            old.log.append_batch(vec![again(&old.carriers, old.last)]).await?;
            let (_, mut reader) = old.read().await?;
            reader.after = revision;
            loop {
                let records = reader.records().await?;
                let Some(newest) = records.last() else { break };
                last = Revision(newest.revision);
                let plan = |record: v1::JournalRecord| Record {
                    kind: PLAN,
                    tag: record.revision,
                    payload: vec![record.plan],
                };
                log.append_batch(records.into_iter().map(plan).collect()).await?;
            }
        }
        let name = dir.join(checkpoint_name(revision));
        let temporary = dir.join(format!("{}.tmp", checkpoint_name(revision)));
        disk.rename(&temporary, &name).await?;
        disk.sync_dir(&dir).await?;
        let carriers = head.carrier_ids;
        Ok(Copy {
            disk,
            dir,
            cluster_id: head.cluster_id,
            checkpoint: revision,
            is_installed: true,
            log,
            last,
            carriers,
        })
    }

    /// Drops what arrived.
    pub(super) async fn abandon(self) {
        let path = self.dir.join(format!("{}.tmp", checkpoint_name(Revision(self.head.revision))));
        if let Err(error) = self.disk.remove_file(&path).await {
            tracing::warn!(path = %path.display(), %error, "could not remove a half installed checkpoint");
        }
    }
}

/// Removes everything of a copy's directory that does not belong to the checkpoint of `revision`.
pub(super) async fn drop_others(
    disk: &dyn Disk,
    dir: &Path,
    revision: Revision,
    is_installed: bool,
) -> Result<()> {
    let (checkpoint, log) = (checkpoint_name(revision), log_name(revision));
    for entry in disk.list(dir).await? {
        let path = dir.join(&entry.name);
        if entry.is_dir && entry.name.starts_with("log-") && entry.name != log {
            remove_dir(disk, &path).await?;
        }
        let is_current = is_installed && entry.name == checkpoint;
        if !entry.is_dir && entry.name.starts_with("checkpoint-") && !is_current {
            disk.remove_file(&path).await?;
        }
    }
    Ok(disk.sync_dir(dir).await?)
}

/// Removes a directory of files.
pub(super) async fn remove_dir(disk: &dyn Disk, dir: &Path) -> Result<()> {
    let entries = match disk.list(dir).await {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        listed => listed?,
    };
    for entry in entries {
        let path = dir.join(&entry.name);
        match entry.is_dir {
            true => Box::pin(remove_dir(disk, &path)).await?,
            false => disk.remove_file(&path).await?,
        }
    }
    disk.remove_dir(dir).await?;
    Ok(disk.sync_dir(dir.parent().unwrap_or(Path::new(""))).await?)
}

/// `REVISION_COMPACTED`: a checkpoint is needed.
pub(super) fn compacted(last: Revision) -> Error {
    Error::new(
        Reason::RevisionCompacted,
        format!("this server's copy of the journal ends at revision {last}: install a checkpoint"),
    )
}

/// A record that changes nothing, for the sake of its durability.
fn again(carriers: &[u64], last: Revision) -> Record {
    let payload = Bytes::from(Carriers { ids: carriers.to_vec() }.encode_to_vec());
    Record { kind: CARRIERS, tag: last.0, payload: vec![payload] }
}

async fn start_log(
    disk: &Arc<dyn Disk>,
    dir: &Path,
    cluster_id: &str,
    generation: Generation,
    revision: Revision,
) -> Result<Log> {
    let dir = dir.join(log_name(revision));
    disk.create_dir_all(&dir).await?;
    let config = log_config(cluster_id, generation, revision);
    Ok(Log::open(disk.clone(), &dir, config, &mut |_| Ok(())).await?.0)
}

fn log_config(cluster_id: &str, generation: Generation, revision: Revision) -> LogConfig {
    let mut place = generation.0.to_le_bytes().to_vec();
    place.extend_from_slice(&revision.0.to_le_bytes());
    let log_id = u128::from(crc64(cluster_id.as_bytes())) << 64 | u128::from(crc64(&place));
    LogConfig { segment_bytes: SEGMENT_BYTES, payload_bytes_max: RECORD_BYTES_MAX, ..LogConfig::new(log_id) }
}

fn checkpoint_name(revision: Revision) -> String {
    format!("checkpoint-{:016x}", revision.0)
}

fn log_name(revision: Revision) -> String {
    format!("log-{:016x}", revision.0)
}

/// The number in a name; `None` for other names, such as temporary ones.
fn numbered(name: &str, prefix: &str) -> Option<u64> {
    let digits = name.strip_prefix(prefix).filter(|digits| digits.len() == 16)?;
    u64::from_str_radix(digits, 16).ok()
}
