//! One copy of one generation's journal: a checkpoint and the log behind it.
//!
//! ```text
//! journal/<generation, 16 hex digits>/
//!     checkpoint-<revision>      the checkpoint; none for a copy that began at revision 0
//!     checkpoint-<revision>.tmp  one that is being installed; dropped at start
//!     log-<revision>/            the log behind the checkpoint of that revision: record tag = revision
//! ```
//!
//! A checkpoint and its log are ready before the checkpoint gets its name: that rename is the moment it counts. A start
//! takes the checkpoint of the highest revision and drops the rest, so from that moment on nothing may be acknowledged
//! from the log before it.

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
    Disk, Open,
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

/// A copy that is ready on the disk but for the name of its checkpoint.
#[derive(Debug)]
pub(super) struct Ready {
    copy: Copy,
    /// Checkpoints that a start would prefer to the new one.
    newer: Vec<PathBuf>,
}

impl Install {
    pub(super) async fn begin(disk: Arc<dyn Disk>, dir: PathBuf, head: Head) -> Result<Self> {
        disk.create_dir_all(&dir).await?;
        drop_unfinished(disk.as_ref(), &dir).await?;
        let path = dir.join(format!("{}.tmp", checkpoint_name(Revision(head.revision))));
        let writer = Writer::create(disk.as_ref(), &path, head.clone()).await?;
        Ok(Self { disk, dir, head, writer })
    }

    pub(super) async fn entries(&mut self, entries: Vec<v1::CheckpointEntry>) -> Result<()> {
        self.writer.entries(entries).await
    }

    /// Which checkpoint it is.
    pub(super) fn place(&self) -> (Generation, Revision) {
        (Generation(self.head.generation), Revision(self.head.revision))
    }

    /// Makes everything ready that the checkpoint needs to count. `old` is the copy so far: what it holds behind the
    /// checkpoint is carried over. Nobody may append to it any more.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` when entries are missing; `NO_SPACE`, `IO`. `old` is as it was.
    pub(super) async fn prepare(self, entry_count: u64, old: Option<&Copy>) -> Result<Ready> {
        let (generation, revision) = self.place();
        let Self { disk, dir, head, writer } = self;
        writer.finish(entry_count).await?;
        // Before the log behind such a checkpoint goes.
        let newer = void_from(disk.as_ref(), &dir, revision).await?;
        remove_dir(disk.as_ref(), &dir.join(log_name(revision))).await?;
        let log = start_log(&disk, &dir, &head.cluster_id, generation, revision).await?;
        let last = match carry_over(&log, revision, old).await {
            Ok(last) => last,
            Err(error) => {
                // Its files are removed by the next installation, under which it must not write.
                close_quietly(&log).await;
                return Err(error);
            }
        };
        let copy = Copy {
            disk,
            dir,
            cluster_id: head.cluster_id,
            checkpoint: revision,
            is_installed: true,
            log,
            last,
            carriers: head.carrier_ids,
        };
        Ok(Ready { copy, newer })
    }

    /// Drops what arrived.
    pub(super) async fn abandon(self) {
        let path = self.dir.join(format!("{}.tmp", checkpoint_name(Revision(self.head.revision))));
        if let Err(error) = self.disk.remove_file(&path).await {
            tracing::warn!(path = %path.display(), %error, "could not remove a half installed checkpoint");
        }
    }
}

impl Ready {
    /// Whose journal it is.
    pub(super) fn cluster_id(&self) -> &str {
        self.copy.cluster_id()
    }

    /// Makes the checkpoint count. From its first moment a start may find the new copy as well as the old one, so the
    /// old one must not acknowledge anything any more, whatever this answers.
    pub(super) async fn name(self) -> Result<Copy> {
        let Self { copy, newer } = self;
        let name = checkpoint_name(copy.checkpoint);
        let named = async {
            copy.disk.rename(&copy.dir.join(format!("{name}.tmp")), &copy.dir.join(&name)).await?;
            for path in newer {
                copy.disk.remove_file(&path).await?;
            }
            copy.disk.sync_dir(&copy.dir).await
        };
        match named.await {
            Ok(()) => Ok(copy),
            Err(error) => {
                close_quietly(&copy.log).await;
                Err(error.into())
            }
        }
    }
}

/// Appends what `old` holds behind the checkpoint to the new log; the last revision of the new copy.
async fn carry_over(log: &Log, revision: Revision, old: Option<&Copy>) -> Result<Revision> {
    let mut last = revision;
    let Some(old) = old.filter(|old| old.last > revision && !old.is_failed()) else { return Ok(last) };
    // A barrier: what was queued before is durable, and so can be read, once this is.
    old.log.append_batch(vec![again(&old.carriers, old.last)]).await?;
    let (_, mut reader) = old.read().await?;
    reader.after = revision;
    loop {
        let records = reader.records().await?;
        let Some(newest) = records.last() else { return Ok(last) };
        last = Revision(newest.revision);
        let plan = |record: v1::JournalRecord| Record {
            kind: PLAN,
            tag: record.revision,
            payload: vec![record.plan],
        };
        log.append_batch(records.into_iter().map(plan).collect()).await?;
    }
}

/// Empties, durably, the checkpoints of `revision` and above: only a copy that is not offered has one. Its log may be
/// removed after that: a start would else take the checkpoint with an empty log for a copy that knows of nothing newer.
/// Answers those above.
async fn void_from(disk: &dyn Disk, dir: &Path, revision: Revision) -> Result<Vec<PathBuf>> {
    let mut newer = Vec::new();
    for entry in disk.list(dir).await? {
        let Some(number) = numbered(&entry.name, "checkpoint-").filter(|number| *number >= revision.0) else {
            continue;
        };
        let path = dir.join(&entry.name);
        let file = disk.open(&path, Open::ReadWrite).await?;
        file.set_len(0).await?;
        file.sync().await?;
        if number > revision.0 {
            newer.push(path);
        }
    }
    Ok(newer)
}

/// Removes what installations left that did not come to their end: they could fill the disk.
async fn drop_unfinished(disk: &dyn Disk, dir: &Path) -> Result<()> {
    let names: Vec<String> = disk.list(dir).await?.into_iter().map(|entry| entry.name).collect();
    for name in &names {
        let path = dir.join(name);
        if name.starts_with("checkpoint-") && name.ends_with(".tmp") {
            // Not only cut: a write of a caller that has gone may still be under way.
            disk.remove_file(&path).await?;
        }
        // The log of a copy that began without a checkpoint is that of revision 0.
        if let Some(number) = numbered(name, "log-").filter(|number| *number > 0)
            && !names.contains(&checkpoint_name(Revision(number)))
        {
            remove_dir(disk, &path).await?;
        }
    }
    Ok(())
}

/// Ends a log of which nothing is wanted any more.
async fn close_quietly(log: &Log) {
    if let Err(error) = log.close().await {
        tracing::debug!(%error, "a journal log that was given up did not close cleanly");
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
