//! The index of production: a redb file.
//!
//! It is written in large lazy transactions and decides nothing about durability, so its own threads and files are no
//! loss to simulation. A durable transaction at each checkpoint also saves redb's allocator state ("quick repair"),
//! so that opening after a crash reads none of the data, however large the file is.
//!
//! Table `entries`: key -> revision (u64 little endian), value. Table `about`: `revision` -> u64 little endian,
//! `label` -> bytes, `format` -> u8, 1.

use super::{Index, IndexChange, IndexView};
use crate::store::{KeyRange, Page, SCAN_BYTES_MAX};
use async_trait::async_trait;
use bytes::Bytes;
use cairn_core::plan::{Key, Mutation, Versioned};
use cairn_proto::{Error, Reason, Result, id::Revision};
use parking_lot::RwLock;
use redb::{
    Database, Durability, ReadOnlyTable, ReadableDatabase as _, ReadableTable as _, TableDefinition,
    WriteTransaction,
};
use std::{
    collections::BTreeMap,
    ops::Bound,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

const ENTRIES: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("entries");
const ABOUT: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("about");
const FORMAT: u8 = 1;

/// Memory for pages that were read or are to be written. More measured no faster, since the kernel caches the file too.
pub const CACHE_BYTES_DEFAULT: usize = 64 * 1024 * 1024;
/// How long a predecessor in this process may take to let go of the file.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
/// Bulk loading makes itself durable after this many bytes, to let redb forget what it tracks.
const LOAD_SYNC_BYTES: u64 = 64 * 1024 * 1024;

/// A redb file as index. Clones are the same index.
#[derive(Clone)]
pub struct RedbIndex {
    shared: Arc<Shared>,
}

struct Shared {
    /// `None` once it was closed.
    database: RwLock<Option<Arc<Database>>>,
    path: PathBuf,
    durable: AtomicU64,
    loaded_bytes: AtomicU64,
}

impl Shared {
    fn database(&self) -> Result<Arc<Database>, redb::Error> {
        self.database.read().clone().ok_or(redb::Error::DatabaseClosed)
    }
}

impl std::fmt::Debug for RedbIndex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RedbIndex").field("path", &self.shared.path).finish_non_exhaustive()
    }
}

/// What opening found.
#[derive(Debug)]
pub enum Opened {
    /// An index, perhaps new.
    Index(RedbIndex),
    /// A file that redb cannot read as a database, and why.
    Unreadable(String),
}

impl RedbIndex {
    /// Opens the file, or makes it. Waits a little for an earlier owner in this process that is just ending.
    ///
    /// # Errors
    /// `IO` when the file cannot be used, `UNAVAILABLE` when another process has it open, `NOT_SUPPORTED` when a newer
    /// program wrote it. A damaged file is no error but [`Opened::Unreadable`]: it can be made again from the journal.
    pub async fn open(path: &Path, cache_bytes: usize) -> Result<Opened> {
        let deadline = tokio::time::Instant::now() + OPEN_TIMEOUT;
        loop {
            let owned = path.to_owned();
            let opened = blocking(move || Ok(Self::open_now(&owned, cache_bytes))).await?;
            match opened {
                Ok(opened) => return opened,
                Err(redb::DatabaseError::DatabaseAlreadyOpen) if tokio::time::Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    continue;
                }
                Err(redb::DatabaseError::DatabaseAlreadyOpen) => {
                    return Err(Error::unavailable(format!(
                        "index {} is in use by another process",
                        path.display()
                    )));
                }
                Err(error) => return Err(failed(path, error)),
            }
        }
    }

    /// Opens the file in this thread. The outer error is one of redb's that a caller may wait out.
    fn open_now(path: &Path, cache_bytes: usize) -> Result<Result<Opened>, redb::DatabaseError> {
        // Of a damaged file redb may also say so by a panic.
        let opened = contained(path, || {
            let database = match Database::builder().set_cache_size(cache_bytes).create(path) {
                Ok(database) => database,
                Err(error) if is_damage(&error) => return Ok(Ok(Opened::Unreadable(error.to_string()))),
                Err(error) => return Ok(Err(error)),
            };
            Self::begin(database, path.to_owned()).map(Ok)
        });
        match opened {
            Ok(Ok(opened)) => Ok(Ok(opened)),
            Ok(Err(error)) => Err(error),
            Err(error) if error.reason == Reason::Internal => Ok(Ok(Opened::Unreadable(error.to_string()))),
            Err(error) => Ok(Err(error)),
        }
    }

    fn begin(database: Database, path: PathBuf) -> Result<Opened> {
        let at = |error: redb::Error| failed(&path, error);
        // Tables exist from here on, so that readers need not ask.
        let mut transaction = database.begin_write().map_err(|error| at(error.into()))?;
        transaction.set_quick_repair(true);
        let (format, revision) = {
            let read = |key: &str| -> Result<Option<Vec<u8>>, redb::Error> {
                Ok(transaction.open_table(ABOUT)?.get(key)?.map(|value| value.value().to_vec()))
            };
            (read("format").map_err(at)?, read("revision").map_err(at)?)
        };
        match format.as_deref() {
            None => {
                let create = || -> Result<(), redb::Error> {
                    transaction.open_table(ENTRIES)?;
                    transaction.open_table(ABOUT)?.insert("format", &[FORMAT][..])?;
                    Ok(())
                };
                create().map_err(at)?;
                transaction.commit().map_err(|error| at(error.into()))?;
            }
            Some([FORMAT]) => transaction.abort().map_err(|error| at(error.into()))?,
            Some(other) => {
                let message = format!(
                    "index {} has format {other:?}, this program knows {FORMAT}: use a newer one",
                    path.display()
                );
                return Err(Error::new(Reason::NotSupported, message));
            }
        }
        // Lazy transactions do not survive a process: what is read after opening is durable.
        let durable = AtomicU64::new(revision.as_deref().map_or(0, number));
        let database = RwLock::new(Some(Arc::new(database)));
        let shared = Shared { database, path, durable, loaded_bytes: AtomicU64::new(0) };
        Ok(Opened::Index(Self { shared: Arc::new(shared) }))
    }

    /// Runs a transaction on a blocking thread.
    async fn write(
        &self,
        durable: bool,
        work: impl FnOnce(&WriteTransaction) -> Result<(), redb::Error> + Send + 'static,
    ) -> Result<()> {
        let shared = self.shared.clone();
        blocking(move || {
            let run = || -> Result<(), redb::Error> {
                let mut transaction = shared.database()?.begin_write()?;
                if durable {
                    transaction.set_durability(Durability::Immediate)?;
                    transaction.set_quick_repair(true);
                } else {
                    transaction.set_durability(Durability::None)?;
                }
                work(&transaction)?;
                transaction.commit()?;
                Ok(())
            };
            contained(&shared.path, || run().map_err(|error| failed(&shared.path, error)))
        })
        .await
    }
}

#[async_trait]
impl Index for RedbIndex {
    async fn label(&self) -> Result<Option<Bytes>> {
        let read = || -> Result<Option<Bytes>, redb::Error> {
            let table = self.shared.database()?.begin_read()?.open_table(ABOUT)?;
            Ok(table.get("label")?.map(|label| Bytes::copy_from_slice(label.value())))
        };
        contained(&self.shared.path, || read().map_err(|error| failed(&self.shared.path, error)))
    }

    async fn reset(&self, label: Bytes) -> Result<()> {
        let write = move |transaction: &WriteTransaction| {
            transaction.delete_table(ENTRIES)?;
            transaction.open_table(ENTRIES)?;
            let mut about = transaction.open_table(ABOUT)?;
            about.insert("revision", &0u64.to_le_bytes()[..])?;
            about.insert("label", &label[..])?;
            Ok(())
        };
        self.write(true, write).await?;
        self.shared.durable.store(0, Ordering::Release);
        Ok(())
    }

    async fn load(&self, entries: Vec<(Key, Versioned)>) -> Result<()> {
        let bytes: usize = entries.iter().map(|(key, value)| key.len() + value.value.len()).sum();
        let before = self.shared.loaded_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        let durable = before / LOAD_SYNC_BYTES != (before + bytes as u64) / LOAD_SYNC_BYTES;
        let write = move |transaction: &WriteTransaction| {
            let mut table = transaction.open_table(ENTRIES)?;
            let mut stored = Vec::new();
            for (key, value) in &entries {
                encode(&mut stored, value.revision, &value.value);
                table.insert(&key[..], &stored[..])?;
            }
            Ok(())
        };
        self.write(durable, write).await
    }

    async fn apply(&self, changes: Vec<IndexChange>, revision: Revision, durable: bool) -> Result<()> {
        let write = move |transaction: &WriteTransaction| {
            // The last change of each key, in order of keys: neighbours share pages.
            let mut last = BTreeMap::new();
            for (at, mutations) in &changes {
                for mutation in mutations {
                    last.insert(mutation.key(), (*at, mutation));
                }
            }
            let mut table = transaction.open_table(ENTRIES)?;
            let mut stored = Vec::new();
            for (key, (at, mutation)) in last {
                match mutation {
                    Mutation::Put(_, value) => {
                        encode(&mut stored, at, value);
                        table.insert(&key[..], &stored[..])?;
                    }
                    Mutation::Delete(_) => drop(table.remove(&key[..])?),
                }
            }
            transaction.open_table(ABOUT)?.insert("revision", &revision.0.to_le_bytes()[..])?;
            Ok(())
        };
        self.write(durable, write).await?;
        if durable {
            self.shared.durable.store(revision.0, Ordering::Release);
        }
        Ok(())
    }

    fn durable_revision(&self) -> Revision {
        Revision(self.shared.durable.load(Ordering::Acquire))
    }

    async fn close(&self) {
        let database = self.shared.database.write().take();
        // The last owner writes what redb needs for a quick start.
        let dropped = blocking(move || {
            drop(database);
            Ok(())
        });
        if let Err(error) = dropped.await {
            tracing::warn!(path = %self.shared.path.display(), %error, "the index did not close cleanly");
        }
    }

    fn view(&self) -> Result<Arc<dyn IndexView>> {
        let read = || -> Result<RedbView, redb::Error> {
            let transaction = self.shared.database()?.begin_read()?;
            let about = transaction.open_table(ABOUT)?;
            let revision = about.get("revision")?.map_or(0, |value| number(value.value()));
            let table = transaction.open_table(ENTRIES)?;
            Ok(RedbView { table, revision: Revision(revision), shared: self.shared.clone() })
        };
        let view = contained(&self.shared.path, || read().map_err(|error| failed(&self.shared.path, error)))?;
        Ok(Arc::new(view))
    }
}

/// A read transaction; its table keeps it open.
struct RedbView {
    // Before the database, so that it is dropped first.
    table: ReadOnlyTable<&'static [u8], &'static [u8]>,
    revision: Revision,
    shared: Arc<Shared>,
}

impl std::fmt::Debug for RedbView {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RedbView").field("revision", &self.revision).finish_non_exhaustive()
    }
}

impl IndexView for RedbView {
    fn revision(&self) -> Revision {
        self.revision
    }

    fn get(&self, keys: &[&Key]) -> Result<Vec<Option<Versioned>>> {
        let read = |key: &Key| match self.table.get(&key[..]) {
            Ok(Some(stored)) => decode(stored.value()).map(Some).ok_or_else(|| self.malformed()),
            Ok(None) => Ok(None),
            Err(error) => Err(failed(&self.shared.path, error)),
        };
        contained(&self.shared.path, || keys.iter().map(|key| read(key)).collect())
    }

    fn scan(&self, range: &KeyRange, limit: usize) -> Result<Page> {
        contained(&self.shared.path, || self.scan_now(range, limit))
    }
}

impl RedbView {
    fn scan_now(&self, range: &KeyRange, limit: usize) -> Result<Page> {
        let mut page = Page::default();
        if range.is_empty() {
            return Ok(page);
        }
        let bounds: (Bound<&[u8]>, Bound<&[u8]>) =
            (range.start.as_ref().map(|key| &key[..]), range.end.as_ref().map(|key| &key[..]));
        let failed = |error| failed(&self.shared.path, error);
        let mut bytes = 0;
        for entry in self.table.range::<&[u8]>(bounds).map_err(failed)? {
            let (key, stored) = entry.map_err(failed)?;
            bytes += key.value().len() + stored.value().len();
            if page.entries.len() == limit || (bytes > SCAN_BYTES_MAX && !page.entries.is_empty()) {
                page.more = true;
                break;
            }
            let value = decode(stored.value()).ok_or_else(|| self.malformed())?;
            page.entries.push((Key::copy_from_slice(key.value()), value));
        }
        Ok(page)
    }

    fn malformed(&self) -> Error {
        Error::internal(format!("index {} holds a malformed entry", self.shared.path.display()))
    }
}

fn encode(out: &mut Vec<u8>, revision: Revision, value: &[u8]) {
    out.clear();
    out.extend_from_slice(&revision.0.to_le_bytes());
    out.extend_from_slice(value);
}

fn decode(stored: &[u8]) -> Option<Versioned> {
    let (revision, value) = stored.split_first_chunk::<8>()?;
    Some(Versioned {
        value: Bytes::copy_from_slice(value),
        revision: Revision(u64::from_le_bytes(*revision)),
    })
}

fn number(bytes: &[u8]) -> u64 {
    bytes.first_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

fn is_damage(error: &redb::DatabaseError) -> bool {
    use redb::{DatabaseError, StorageError};
    match error {
        DatabaseError::Storage(StorageError::Corrupted(_)) | DatabaseError::RepairAborted => true,
        // What redb answers for a file that is none of its own.
        DatabaseError::Storage(StorageError::Io(error)) => {
            matches!(error.kind(), std::io::ErrorKind::InvalidData | std::io::ErrorKind::UnexpectedEof)
        }
        _ => false,
    }
}

fn failed(path: &Path, error: impl Into<redb::Error>) -> Error {
    let error = error.into();
    let reason = match &error {
        redb::Error::Io(error) if error.kind() == std::io::ErrorKind::StorageFull => Reason::NoSpace,
        _ => Reason::Io,
    };
    Error::new(reason, format!("index {}: {error}", path.display()))
}

/// Runs what redb does. On a file whose pages are damaged behind its back it may panic, with its locks free or poisoned:
/// that is an error of this file, not the end of the task that met it.
fn contained<T>(path: &Path, work: impl FnOnce() -> Result<T>) -> Result<T> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_or_else(|_| {
        let what =
            "is damaged inside: stop the directory and move this file away, the journal may make it again";
        Err(Error::internal(format!("index {} {what}", path.display())))
    })
}

/// redb blocks, and it is only ever used on a real disk: this is the one place of the directory with threads.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(Error::internal(format!("work on the index ended early: {error}"))))
}

#[cfg(test)]
mod hostile;
