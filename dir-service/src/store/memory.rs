//! A store in memory alone, for tests of what lies above it.

use super::{
    Changes, CommitError, KeyRange, MetaStore, Page, codec,
    index::MemoryIndex,
    reader::{Checker, Reader},
    recent::Applied,
};
use async_trait::async_trait;
use cairn_core::plan::{Key, Plan, Versioned};
use cairn_proto::{Error, Result, id::Revision};
use parking_lot::Mutex;
use std::sync::Arc;

/// Plans that stay readable at their revision.
const KEEP_PLANS: usize = 10_000;
/// Plans that are applied to the index at a time.
const APPLY_PLANS: usize = 1_000;
/// Memory above which fewer plans are kept.
const KEEP_BYTES: usize = 64 * 1024 * 1024;

/// Keeps everything in memory and loses it when dropped. Clones are the same store.
#[derive(Clone, Debug)]
pub struct MemoryStore {
    reader: Arc<Reader>,
    index: MemoryIndex,
    /// One plan at a time.
    committing: Arc<Mutex<()>>,
    keep_plans: usize,
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryStore {
    /// An empty store, at revision 0.
    pub fn new() -> Self {
        Self::keeping(KEEP_PLANS)
    }

    /// An empty store that keeps this many recent plans.
    pub(super) fn keeping(keep_plans: usize) -> Self {
        let index = MemoryIndex::volatile();
        let reader = Arc::new(Reader::over(index.view_now()));
        Self { reader, index, committing: Arc::default(), keep_plans }
    }

    /// Moves the oldest plans to the index when there are too many.
    fn compact(&self) {
        let batch = APPLY_PLANS.min(self.keep_plans.max(1));
        let moved = self.reader.recent(|recent| {
            if recent.len() < self.keep_plans + batch && recent.bytes() < KEEP_BYTES {
                return None;
            }
            let count = if recent.bytes() < KEEP_BYTES { batch } else { recent.len().div_ceil(2) };
            let plans: Vec<Arc<Applied>> =
                recent.since(Revision(recent.base().0 + 1)).take(count).cloned().collect();
            Some((plans.last()?.revision, plans))
        });
        if let Some((revision, plans)) = moved {
            self.index.apply_now(plans.iter().map(|plan| (plan.revision, plan.mutations.clone())), revision);
            self.reader.rebase(self.index.view_now());
            while self.reader.forget_some() {}
        }
    }
}

#[async_trait]
impl MetaStore for MemoryStore {
    async fn get(
        &self,
        keys: &[Key],
        at: Option<Revision>,
    ) -> Result<(Revision, Vec<Option<Versioned>>), Error> {
        self.reader.get(keys, at)
    }

    async fn scan(
        &self,
        range: KeyRange,
        limit: usize,
        at: Option<Revision>,
    ) -> Result<(Revision, Page), Error> {
        self.reader.scan(range, limit, at)
    }

    async fn commit(&self, plan: Plan) -> Result<Revision, CommitError> {
        plan.check().map_err(CommitError::Refused)?;
        let _committing = self.committing.lock();
        if !Checker::new(&self.reader).hold(&plan.preconditions).map_err(CommitError::Refused)? {
            return Err(CommitError::Conflict);
        }
        let revision = Revision(self.reader.last().map_err(CommitError::Refused)?.0 + 1);
        let encoded = codec::encode_applied(&plan);
        let mutations = plan.mutations;
        self.reader.publish([Arc::new(Applied { revision, encoded, mutations })]);
        self.compact();
        Ok(revision)
    }

    async fn watch(&self, prefix: Key, from: Revision) -> Result<Changes, Error> {
        self.reader.watch(prefix, from)
    }

    async fn revision(&self) -> Result<Revision, Error> {
        self.reader.last()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::contract;

    #[tokio::test]
    async fn keeps_the_contract() {
        contract::run(async || Arc::new(MemoryStore::new())).await;
        contract::run(async || Arc::new(MemoryStore::keeping(100))).await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn keeps_the_contract_on_threads() {
        contract::run(async || Arc::new(MemoryStore::keeping(100))).await;
    }

    #[tokio::test]
    async fn keeps_the_contract_of_compaction() {
        contract::run_compacting(20, async || Arc::new(MemoryStore::keeping(20))).await;
    }
}
