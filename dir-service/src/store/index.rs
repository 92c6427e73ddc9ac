//! What lies under the recent plans: keys and values at one revision, which may lag behind the journal.
//!
//! An index decides nothing about durability. It may lose its newest applications at a crash; the journal is
//! replayed from the revision it still has.

use super::{KeyRange, Page};
use async_trait::async_trait;
use bytes::Bytes;
use cairn_core::plan::{Key, Mutation, Versioned};
use cairn_proto::{Result, id::Revision};
use std::{fmt, sync::Arc};

mod memory;
mod redb;

pub use self::redb::{CACHE_BYTES_DEFAULT, Opened, RedbIndex};
pub(crate) use memory::ClosedView;
pub use memory::MemoryIndex;

/// An unchanging view of an index.
pub trait IndexView: fmt::Debug + Send + Sync + 'static {
    /// The revision it shows.
    fn revision(&self) -> Revision;

    /// Values of keys, in their order.
    fn get(&self, keys: &[&Key]) -> Result<Vec<Option<Versioned>>>;

    /// At most `limit` entries of a range, in order; fewer when they exceed [`super::SCAN_BYTES_MAX`].
    fn scan(&self, range: &KeyRange, limit: usize) -> Result<Page>;
}

/// Mutations of one plan, for an index.
pub type IndexChange = (Revision, Vec<Mutation>);

/// Keys and values at one revision.
#[async_trait]
pub trait Index: fmt::Debug + Send + Sync + 'static {
    /// What [`Index::reset`] wrote into it: whose index it is. `None` when it is new.
    async fn label(&self) -> Result<Option<Bytes>>;

    /// Empties it, at revision 0, and labels it. Durable when it returns, as far as this index ever is.
    async fn reset(&self, label: Bytes) -> Result<()>;

    /// Adds entries of a checkpoint in bulk, without moving the revision. Only between [`Index::reset`] and the first
    /// [`Index::apply`].
    async fn load(&self, entries: Vec<(Key, Versioned)>) -> Result<()>;

    /// Applies plans in order and moves to `revision`, all or nothing. With `durable`, this and everything before
    /// survives a crash.
    async fn apply(&self, changes: Vec<IndexChange>, revision: Revision, durable: bool) -> Result<()>;

    /// The revision that survives a crash now: the journal is needed from here on.
    fn durable_revision(&self) -> Revision;

    /// Lets go of its files, once its views are gone. Every later call may fail.
    async fn close(&self) {}

    /// What it shows now.
    fn view(&self) -> Result<Arc<dyn IndexView>>;
}
