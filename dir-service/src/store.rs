//! The directory's store: the only way to metadata.
//!
//! [`MetaStore`] is small on purpose: an engine is one file, the rules of the namespace exist once above it.
//! Every engine passes the suite in `store/contract.rs`.

use async_trait::async_trait;
use cairn_core::plan::{Key, Mutation, Plan, Versioned};
use cairn_proto::{Error, id::Revision};
use std::{fmt, ops::Bound, sync::Arc};

pub mod codec;
#[cfg(any(test, feature = "contract"))]
pub mod contract;
pub mod etcd;
#[cfg(test)]
mod hostile;
pub mod index;
mod journaled;
mod memory;
mod reader;
mod recent;

pub use etcd::{EtcdOptions, EtcdStore};
pub use journaled::{
    CLUSTER_ID_BYTES_MAX, Checkpoint, Found, JournalSlice, JournaledConfig, JournaledStore, Restore,
    StoreIdentity, open_index,
};
pub use memory::MemoryStore;

/// Most bytes of keys and values in a page of a scan; a page with one larger entry holds that entry alone.
pub const SCAN_BYTES_MAX: usize = 8 * 1024 * 1024;

/// Ordered keys from a start to an end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyRange {
    /// The first key.
    pub start: Bound<Key>,
    /// The key behind the last.
    pub end: Bound<Key>,
}

impl KeyRange {
    /// All keys.
    pub fn all() -> Self {
        Self { start: Bound::Unbounded, end: Bound::Unbounded }
    }

    /// The keys that begin with `prefix`.
    pub fn prefix(prefix: Key) -> Self {
        let last = prefix.iter().rposition(|byte| *byte != u8::MAX);
        let end = last.map_or(Bound::Unbounded, |last| {
            let mut behind = prefix[..=last].to_vec();
            behind[last] += 1;
            Bound::Excluded(Key::from(behind))
        });
        Self { start: Bound::Included(prefix), end }
    }

    /// The rest of this range behind a key.
    pub fn behind(&self, key: Key) -> Self {
        Self { start: Bound::Excluded(key), end: self.end.clone() }
    }

    /// Whether no key can lie in it; the ranges that ordered maps refuse are among these.
    pub fn is_empty(&self) -> bool {
        match (&self.start, &self.end) {
            (Bound::Unbounded, _) | (_, Bound::Unbounded) => false,
            (Bound::Included(start), Bound::Included(end)) => start > end,
            (
                Bound::Included(start) | Bound::Excluded(start),
                Bound::Included(end) | Bound::Excluded(end),
            ) => start >= end,
        }
    }
}

/// A page of a scan.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Page {
    /// Keys and values in order of keys.
    pub entries: Vec<(Key, Versioned)>,
    /// Whether the range may hold more behind the last entry.
    pub more: bool,
}

/// How a plan ended without being applied, or without being known to be.
#[derive(Clone, Debug, PartialEq)]
pub enum CommitError {
    /// A precondition did not hold: read again, decide again.
    Conflict,
    /// It may or may not have been applied.
    Unknown(Error),
    /// It was not applied and cannot be for now (a full disk, a stopping store), or the plan breaks its bounds.
    Refused(Error),
}

/// An applied plan's changes, as a watcher sees them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The plan's revision.
    pub revision: Revision,
    /// Its mutations on the watched keys.
    pub mutations: Vec<Mutation>,
}

/// A stream of changes, in order of revisions; ends with `RevisionCompacted` when the reader fell too far behind.
pub type Changes = futures::stream::BoxStream<'static, Result<Change, Error>>;

/// Ordered keys with revisions, changed by plans.
///
/// All reads are linearizable: they see every plan whose commit was acknowledged before the read began, and no plan
/// that is not durable. A read `at` a revision sees exactly the plans up to it; engines keep recent revisions
/// (at least 1 minute or 10,000 plans) and answer `RevisionCompacted` for older ones.
#[async_trait]
pub trait MetaStore: fmt::Debug + Send + Sync + 'static {
    /// The values of keys, all at one revision: `at`, or the current one, which is answered.
    async fn get(
        &self,
        keys: &[Key],
        at: Option<Revision>,
    ) -> Result<(Revision, Vec<Option<Versioned>>), Error>;

    /// Entries of a range in order, at most `limit` (at least 1), at one revision as in `get`.
    async fn scan(
        &self,
        range: KeyRange,
        limit: usize,
        at: Option<Revision>,
    ) -> Result<(Revision, Page), Error>;

    /// Applies a plan if all its preconditions hold; answers once it is durable.
    async fn commit(&self, plan: Plan) -> Result<Revision, CommitError>;

    /// Changes of keys with the prefix, from a revision on (inclusive).
    async fn watch(&self, prefix: Key, from: Revision) -> Result<Changes, Error>;

    /// The last applied and durable revision.
    async fn revision(&self) -> Result<Revision, Error>;
}

type Wrap = dyn Fn(Arc<dyn MetaStore>) -> Arc<dyn MetaStore> + Send + Sync;

/// What stands between a directory and its store: nothing, or what whoever assembles the directory puts there, such as
/// a recorder or a fault. Used for every store that the directory opens in its life.
#[derive(Clone, Default)]
pub struct StoreWrapper(Option<Arc<Wrap>>);

impl StoreWrapper {
    /// Has each store go through `wrap` before the directory works on it.
    pub fn new(wrap: impl Fn(Arc<dyn MetaStore>) -> Arc<dyn MetaStore> + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(wrap)))
    }

    /// The store as the directory sees it.
    pub fn wrap(&self, store: Arc<dyn MetaStore>) -> Arc<dyn MetaStore> {
        match &self.0 {
            Some(wrap) => wrap(store),
            None => store,
        }
    }
}

impl fmt::Debug for StoreWrapper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("StoreWrapper").field(&self.0.is_some()).finish()
    }
}
