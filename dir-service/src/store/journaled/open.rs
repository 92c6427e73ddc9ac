//! Making and opening a store.

use super::{
    CLUSTER_ID_BYTES_MAX, JournaledConfig, JournaledStore, Shared, StoreIdentity, meta, meta::Meta,
    places::Places,
};
use crate::store::{
    codec,
    index::{CACHE_BYTES_DEFAULT, Index, MemoryIndex, Opened, RedbIndex},
    reader::Reader,
    recent::Applied,
};
use bytes::Bytes;
use cairn_proto::{Error, Reason, Result, id::Revision};
use disk::{
    Disk,
    durable::remove_file_durable,
    log::{DamageKind, Log, LogConfig, Scanned},
};
use parking_lot::Mutex;
use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// What a person does about a store that cannot be opened.
const WHAT_TO_DO: &str =
    "restore it from a backup, or move it away and rebuild the directory from the file servers";

/// What a directory holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// No store.
    Nothing,
    /// One whose making was interrupted: make it again.
    Incomplete(StoreIdentity),
    /// A store.
    Store(StoreIdentity),
}

/// The index for a store in `dir`: a redb file (`index.redb`) where the disk has real paths, else one in memory
/// (`index.snapshot`) that simulation can crash. `cache_bytes` bounds redb's memory; `None` for 64 MiB. A damaged file is
/// put aside under the same name with `.damaged` behind it, and an empty index takes its place; whether that can be
/// filled again is found out by opening the store.
///
/// # Errors
/// Those of the disk; `UNAVAILABLE` when another process has it.
pub async fn open_index(
    disk: &Arc<dyn Disk>,
    dir: &Path,
    cache_bytes: Option<usize>,
) -> Result<Arc<dyn Index>> {
    disk.create_dir_all(dir).await?;
    let name = dir.join("index.redb");
    let Some(path) = disk.real_path(&name) else {
        return Ok(Arc::new(MemoryIndex::open(disk.clone(), &dir.join("index.snapshot")).await?));
    };
    for _ in 0..2 {
        match RedbIndex::open(&path, cache_bytes.unwrap_or(CACHE_BYTES_DEFAULT)).await? {
            Opened::Index(index) => return Ok(Arc::new(index)),
            Opened::Unreadable(error) => {
                tracing::warn!(path = %path.display(), error, "the directory's index is unreadable and put aside");
                disk.rename(&name, &dir.join("index.redb.damaged")).await?;
                disk.sync_dir(dir).await?;
            }
        }
    }
    Err(Error::new(Reason::Io, format!("index {} cannot be made", path.display())))
}

impl JournaledStore {
    /// What a directory holds.
    ///
    /// # Errors
    /// Those of the disk; `IO` or `NOT_SUPPORTED` when it is a store of which that cannot be told.
    pub async fn find(disk: &Arc<dyn Disk>, dir: &Path) -> Result<Found> {
        Ok(match Meta::read(&**disk, dir).await? {
            None if has_journal(&**disk, dir).await? => {
                return Err(Error::new(
                    Reason::Io,
                    format!(
                        "{} holds a journal but no {}: {WHAT_TO_DO}",
                        dir.display(),
                        meta::path(dir).display()
                    ),
                ));
            }
            None => Found::Nothing,
            Some(meta) if meta.complete => Found::Store(meta.identity),
            Some(meta) => Found::Incomplete(meta.identity),
        })
    }

    /// Whether a directory holds a whole store.
    ///
    /// # Errors
    /// As [`JournaledStore::find`].
    pub async fn exists(disk: &Arc<dyn Disk>, dir: &Path) -> Result<bool> {
        Ok(matches!(Self::find(disk, dir).await?, Found::Store(_)))
    }

    /// Makes an empty store at revision 0 and opens it. The index is emptied.
    ///
    /// # Errors
    /// `ALREADY_EXISTS` when there is one; as [`JournaledStore::open`].
    pub async fn create(
        disk: Arc<dyn Disk>,
        dir: &Path,
        identity: StoreIdentity,
        index: Arc<dyn Index>,
        config: JournaledConfig,
    ) -> Result<Self> {
        if Self::exists(&disk, dir).await? {
            return Err(Error::new(
                Reason::AlreadyExists,
                format!("{} holds a directory's store already", dir.display()),
            ));
        }
        let mut meta = begin(&*disk, dir, identity, &*index).await?;
        meta.complete = true;
        meta.write(&*disk, dir).await?;
        Self::open(disk, dir, index, config).await
    }

    /// Opens a store: replays the journal behind what the index still has.
    ///
    /// # Errors
    /// `NOT_FOUND` when there is none; `IO` when its journal is damaged, or journal and index do not belong together,
    /// naming file and position and what to do. Nothing is changed then.
    pub async fn open(
        disk: Arc<dyn Disk>,
        dir: &Path,
        index: Arc<dyn Index>,
        config: JournaledConfig,
    ) -> Result<Self> {
        let meta = match Meta::read(&*disk, dir).await? {
            Some(meta) if meta.complete => meta,
            Some(_) => {
                let why = "was not filled to its end: make or rebuild it again";
                return Err(Error::new(Reason::Io, format!("the store {} {why}", dir.display())));
            }
            None => return Err(Error::not_found(format!("{} holds no directory's store", dir.display()))),
        };
        let label = meta.identity.label();
        let known = index.label().await?;
        if known.as_ref() != Some(&label) {
            if meta.journal_after > Revision(0) {
                let what = if known.is_some() { "is of another store" } else { "is empty or new" };
                return Err(unfit(
                    dir,
                    &format!(
                        "its index {what}, and its journal begins only behind revision {}",
                        meta.journal_after
                    ),
                ));
            }
            // The journal is whole: the index is made again from it.
            index.reset(label).await?;
        }
        let view = index.view()?;
        let indexed = view.revision();
        if indexed < meta.journal_after {
            let why = format!(
                "its index ends at revision {indexed}, its journal begins behind {}: one of them is an older copy",
                meta.journal_after
            );
            return Err(unfit(dir, &why));
        }
        let mut replay = Replay::new(&meta, indexed);
        let log_dir = journal(dir);
        let mut visitor = |record| {
            replay.take(record);
            Ok(())
        };
        let scanned =
            Log::scan(disk.clone(), &log_dir, log_config(&meta.identity, &config), &mut visitor).await;
        let scan = scanned.map_err(|error| {
            let reason = Error::from(io::Error::from(error.kind())).reason;
            Error::new(reason, format!("the journal of the directory's store cannot be read: {error}"))
        })?;
        for damage in &scan.recovery().damage {
            if damage.what == DamageKind::HeaderCopy {
                tracing::warn!(dir = %log_dir.display(), %damage, "nothing is lost");
                continue;
            }
            let file = log_dir.join(format!("{:08x}.seg", damage.position.segment));
            let at = format!("{} at byte {}", file.display(), damage.position.offset);
            return Err(unfit(dir, &format!("its journal is damaged, {damage} ({at})")));
        }
        if let Some(why) = replay.unfit {
            return Err(unfit(dir, &why));
        }
        if indexed > replay.last {
            let why = format!(
                "its index ends at revision {indexed}, its journal at {}: the journal is an older copy, or was cut",
                replay.last
            );
            return Err(unfit(dir, &why));
        }
        let (log, _) = scan.start().await?;
        let reader = Arc::new(Reader::over(view));
        tracing::info!(
            dir = %dir.display(), indexed = indexed.0, revision = replay.last.0, replayed = replay.plans.len(),
            "opened the directory's store"
        );
        reader.publish(replay.plans);
        Ok(Self::start(Shared {
            identity: meta.identity,
            disk,
            dir: dir.to_owned(),
            config,
            reader,
            index,
            log,
            places: Mutex::new(replay.places),
            failed: Mutex::new(None),
            lagging: Mutex::new(None),
            applied: Notify::new(),
            queued_bytes: 0.into(),
            commit_delay_us: 0.into(),
            stop: CancellationToken::new(),
        }))
    }
}

/// Reads the journal into recent plans.
struct Replay {
    indexed: Revision,
    places: Places,
    plans: Vec<Arc<Applied>>,
    /// The last revision of the journal.
    last: Revision,
    any: bool,
    /// What is wrong with the first record that does not fit. Not told at once: damage of the log explains it better.
    unfit: Option<String>,
}

impl Replay {
    fn new(meta: &Meta, indexed: Revision) -> Self {
        let after = meta.journal_after;
        Self { indexed, places: Places::new(after), plans: Vec::new(), last: after, any: false, unfit: None }
    }

    fn take(&mut self, record: Scanned) {
        if self.unfit.is_none() {
            self.unfit = self.check(record).err();
        }
    }

    fn check(&mut self, record: Scanned) -> Result<(), String> {
        let revision = Revision(record.tag);
        let at = record.position;
        let next = self.last.0.saturating_add(1);
        // Segments that were about to be removed may begin before the journal does.
        let fits = if self.any { revision.0 == next } else { revision.0 <= next };
        if !fits {
            return Err(format!("its journal holds revision {revision} at {at} behind {}", self.last));
        }
        self.any = true;
        self.last = revision;
        self.places.note(revision, at);
        if revision <= self.indexed {
            return Ok(());
        }
        let payload: Bytes = record.payload.ok_or_else(|| format!("its journal lacks the plan at {at}"))?;
        // Copied out of the large buffer of the scan, which it would keep alive.
        let encoded = Bytes::copy_from_slice(&payload);
        let plan = codec::decode(&encoded)
            .map_err(|error| format!("its journal cannot be read at {at}: {error}"))?;
        self.plans.push(Arc::new(Applied { revision, encoded, mutations: plan.mutations }));
        Ok(())
    }
}

/// Marks a directory as an incomplete store of this identity, and empties journal and index.
pub(super) async fn begin(
    disk: &dyn Disk,
    dir: &Path,
    identity: StoreIdentity,
    index: &dyn Index,
) -> Result<Meta> {
    if identity.cluster_id.is_empty() || identity.cluster_id.len() > CLUSTER_ID_BYTES_MAX {
        return Err(Error::invalid(format!("a cluster's id has 1 to {CLUSTER_ID_BYTES_MAX} bytes")));
    }
    let journal = journal(dir);
    disk.create_dir_all(&journal).await?;
    let meta = Meta { identity, complete: false, journal_after: Revision(0) };
    meta.write(disk, dir).await?;
    for entry in disk.list(&journal).await? {
        if !entry.is_dir {
            remove_file_durable(disk, &journal.join(entry.name)).await?;
        }
    }
    index.reset(meta.identity.label()).await?;
    Ok(meta)
}

async fn has_journal(disk: &dyn Disk, dir: &Path) -> Result<bool> {
    match disk.list(&journal(dir)).await {
        Ok(entries) => Ok(entries.iter().any(|entry| entry.name.ends_with(".seg"))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error.into()),
    }
}

pub(super) fn journal(dir: &Path) -> PathBuf {
    dir.join("journal")
}

fn log_config(identity: &StoreIdentity, config: &JournaledConfig) -> LogConfig {
    LogConfig {
        segment_bytes: config.segment_bytes,
        payload_bytes_max: codec::ENCODED_BYTES_MAX as u32,
        ..LogConfig::new(identity.log_id())
    }
}

fn unfit(dir: &Path, why: &str) -> Error {
    Error::new(
        Reason::Io,
        format!("the directory's store {} cannot be opened: {why}; {WHAT_TO_DO}", dir.display()),
    )
}
