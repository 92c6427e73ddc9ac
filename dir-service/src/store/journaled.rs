//! The store of production: a journal that is the truth, over an index that may lag.
//!
//! ```text
//! commit --> queue --> committer: check, number, append, one sync --> recent plans --> answers
//!                                       |                                |
//!                                    journal (log)                    applier --> index
//! ```
//!
//! * The **committer** takes what waits, checks each plan against what is durable and the plans before it in the same
//!   batch, numbers those that hold, and appends them with one sync. Only then do readers see them, and only then is
//!   anybody answered. While it syncs, others queue up.
//! * **Recent plans** stay in memory with every version they wrote: reads at recent revisions, watches.
//! * The **applier** moves the oldest of them to the index in large lazy transactions. Now and then one is durable;
//!   the journal before it may then be trimmed. After a crash the index begins at the revision it still has, and the
//!   journal behind it is replayed.
//!
//! Files of a store's directory: `store.meta` (whose store, which life, where the journal begins), `journal/` (a
//! [`disk::log`] whose records are tagged with their revision and hold [`super::codec`]'s bytes), and the index's own.
//!
//! After a failed write or sync of the journal nobody knows what is durable: those in that batch are answered
//! `Unknown`, later commits are refused, reads go on with what was durable, and opening the store again finds out. A
//! full disk is different: it is met before anything is written, and commits work again when there is room.

use super::{
    Changes, CommitError, KeyRange, MetaStore, Page,
    index::{ClosedView, Index},
    reader::Reader,
};
use async_trait::async_trait;
use bytes::Bytes;
use cairn_core::plan::{Key, Plan, Versioned};
use cairn_proto::{Error, Reason, Result, id::Revision};
use disk::{Disk, log::Log};
use parking_lot::Mutex;
use std::{
    fmt,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::{
    sync::{Notify, mpsc, oneshot, watch},
    task::JoinHandle,
};
use tokio_util::sync::{CancellationToken, DropGuard};

mod applier;
mod committer;
mod config;
mod meta;
mod open;
mod places;
mod restore;
mod ship;
#[cfg(test)]
mod tests;

pub use config::JournaledConfig;
pub use meta::{CLUSTER_ID_BYTES_MAX, StoreIdentity};
pub use open::{Found, open_index};
pub use restore::Restore;
pub use ship::{Checkpoint, JournalSlice};

use committer::{Command, Queued};
use places::Places;

/// When a caller who met a full queue may come back.
const OVERLOADED_RETRY_MS: u64 = 50;

/// A store whose truth is its journal. [`JournaledStore::close`] it before its directory is opened again.
pub struct JournaledStore {
    shared: Arc<Shared>,
    queue: mpsc::Sender<Command>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
    /// Ends the applier when the store is dropped; the committer ends with the queue.
    _stop: DropGuard,
}

impl fmt::Debug for JournaledStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JournaledStore").field("dir", &self.shared.dir).finish_non_exhaustive()
    }
}

/// What the store's tasks share.
#[derive(Debug)]
struct Shared {
    identity: StoreIdentity,
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    config: JournaledConfig,
    reader: Arc<Reader>,
    index: Arc<dyn Index>,
    log: Log,
    places: Mutex<Places>,
    /// Why nothing can be committed any more.
    failed: Mutex<Option<Error>>,
    /// Why the index cannot follow just now.
    lagging: Mutex<Option<Error>>,
    /// Rung when the applier moved plans or could not.
    applied: Notify,
    queued_bytes: AtomicUsize,
    commit_delay_us: AtomicU64,
    stop: CancellationToken,
}

impl Shared {
    fn check(&self) -> Result<()> {
        self.failed.lock().clone().map_or(Ok(()), Err)
    }

    /// Refuses every later commit. The first reason stays.
    fn fail(&self, error: &dyn fmt::Display) {
        let mut failed = self.failed.lock();
        if failed.is_none() {
            tracing::error!(dir = %self.dir.display(), %error, "the directory's journal failed, commits are refused");
            *failed = Some(Error::unavailable(format!(
                "the journal of the directory's store {} failed and it takes no more changes: {error}; look after \
                 the disk and restart the directory",
                self.dir.display()
            )));
        }
    }
}

impl JournaledStore {
    /// Starts the tasks of an opened store.
    fn start(shared: Shared) -> Self {
        let shared = Arc::new(shared);
        let (queue, commands) = mpsc::channel(shared.config.queue_plans_max);
        let committer = tokio::spawn(committer::run(shared.clone(), commands));
        let applier = tokio::spawn(applier::run(shared.clone()));
        let stop = shared.stop.clone().drop_guard();
        Self { shared, queue, tasks: Mutex::new(vec![committer, applier]), _stop: stop }
    }

    /// Whose store it is, and which of its lives.
    pub fn identity(&self) -> &StoreIdentity {
        &self.shared.identity
    }

    /// The last durable revision.
    pub fn durable_revision(&self) -> Revision {
        *self.shared.reader.subscribe().borrow()
    }

    /// Follows [`JournaledStore::durable_revision`].
    pub fn watch_durable(&self) -> watch::Receiver<Revision> {
        self.shared.reader.subscribe()
    }

    /// Makes every batch wait this long before it is written, so that commits slow down; `None` for no more.
    pub fn set_commit_delay(&self, delay: Option<Duration>) {
        let micros = delay.map_or(0, |delay| u64::try_from(delay.as_micros()).unwrap_or(u64::MAX));
        self.shared.commit_delay_us.store(micros, Ordering::Relaxed);
    }

    /// Whether the journal failed: nothing can be committed until the store is opened again.
    pub fn is_failed(&self) -> bool {
        self.shared.failed.lock().is_some()
    }

    /// Ends the store: commits what is queued, refuses the rest, makes the index durable and lets go of all files.
    /// Every later call fails. Safe to repeat.
    ///
    /// # Errors
    /// Those of the journal or the index; the store is closed all the same, and nothing acknowledged is lost.
    pub async fn close(&self) -> Result<()> {
        let (answer, closed) = oneshot::channel();
        if self.queue.send(Command::Close(answer)).await.is_ok() {
            // An error means that the committer ended before: just as well.
            let _ = closed.await;
        }
        self.shared.stop.cancel();
        let tasks = std::mem::take(&mut *self.tasks.lock());
        for task in tasks {
            if let Err(error) = task.await {
                self.shared.fail(&error);
            }
        }
        let indexed = applier::settle(&self.shared).await;
        self.shared.reader.close(Arc::new(ClosedView));
        self.shared.index.close().await;
        let logged = self.shared.log.close().await;
        indexed?;
        Ok(logged?)
    }

    async fn enqueue(
        &self,
        plan: Plan,
    ) -> Result<oneshot::Receiver<Result<Revision, CommitError>>, CommitError> {
        self.shared.check().map_err(CommitError::Refused)?;
        let (queued, done) = Queued::new(plan)?;
        let bytes = queued.bytes();
        let overloaded = || {
            let message = "too many changes wait for the directory's store: try again";
            CommitError::Refused(Error::new(Reason::Overloaded, message).retry_after_ms(OVERLOADED_RETRY_MS))
        };
        if self.shared.queued_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes
            > self.shared.config.queue_bytes_max
        {
            self.shared.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
            return Err(overloaded());
        }
        self.queue.try_send(Command::Commit(queued)).map_err(|refused| {
            self.shared.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
            match refused {
                mpsc::error::TrySendError::Full(_) => overloaded(),
                mpsc::error::TrySendError::Closed(_) => CommitError::Refused(stopping()),
            }
        })?;
        Ok(done)
    }
}

fn stopping() -> Error {
    Error::unavailable("the directory's store is stopping")
}

/// What goes into a journal record.
fn payload(encoded: &Bytes) -> Vec<Bytes> {
    vec![encoded.clone()]
}

#[async_trait]
impl MetaStore for JournaledStore {
    async fn get(
        &self,
        keys: &[Key],
        at: Option<Revision>,
    ) -> Result<(Revision, Vec<Option<Versioned>>), Error> {
        self.shared.reader.get(keys, at)
    }

    async fn scan(
        &self,
        range: KeyRange,
        limit: usize,
        at: Option<Revision>,
    ) -> Result<(Revision, Page), Error> {
        self.shared.reader.scan(range, limit, at)
    }

    async fn commit(&self, plan: Plan) -> Result<Revision, CommitError> {
        let done = self.enqueue(plan).await?;
        done.await.unwrap_or_else(|_| {
            let why = "the directory's store ended while the change was under way";
            Err(CommitError::Unknown(Error::unavailable(why)))
        })
    }

    async fn watch(&self, prefix: Key, from: Revision) -> Result<Changes, Error> {
        self.shared.reader.watch(prefix, from)
    }

    async fn revision(&self) -> Result<Revision, Error> {
        self.shared.reader.last()
    }
}
