//! Numbers that are never given twice: inodes, grants, sessions, groups, servers, trash.
//!
//! One counter serves all. It is reserved in blocks by a plan, so that an id costs no commit of its own; what is left
//! of a block when the directory stops is never used.

use crate::store::{CommitError, MetaStore};
use cairn_core::{
    key,
    plan::Plan,
    record::{Counter, Record},
};
use cairn_proto::{Error, Result};
use std::sync::Arc;
use tokio::sync::Mutex;

/// Name of the counter of all ids.
pub(crate) const COUNTER: &str = "id";
/// Ids of one reservation.
const BLOCK: u64 = 4_096;
/// The first id: below are the root inode and room for other fixed ones.
const FIRST: u64 = 1_024;
/// Conflicts with other directories before an allocation gives up.
const ATTEMPTS_MAX: u32 = 16;

/// Hands out ids.
#[derive(Debug)]
pub struct Ids {
    store: Arc<dyn MetaStore>,
    block: Mutex<std::ops::Range<u64>>,
}

impl Ids {
    /// Over a store.
    pub fn new(store: Arc<dyn MetaStore>) -> Self {
        Self { store, block: Mutex::new(0..0) }
    }

    /// An id that nobody has and nobody will get again.
    ///
    /// # Errors
    /// As the store's when a new block cannot be reserved.
    pub async fn next(&self) -> Result<u64> {
        let mut block = self.block.lock().await;
        if block.is_empty() {
            *block = self.reserve().await?;
        }
        let id = block.start;
        block.start += 1;
        Ok(id)
    }

    async fn reserve(&self) -> Result<std::ops::Range<u64>> {
        for _ in 0..ATTEMPTS_MAX {
            let counter = key::counter(COUNTER);
            let (_, mut values) = self.store.get(std::slice::from_ref(&counter), None).await?;
            let read = values.pop().flatten();
            let first = match &read {
                Some(versioned) => Counter::from_bytes(&versioned.value)?.next,
                None => FIRST,
            };
            let mut plan = Plan::new();
            plan.require_unchanged(counter.clone(), read.as_ref());
            plan.put(counter, Counter { next: first + BLOCK }.to_bytes());
            match self.store.commit(plan).await {
                Ok(_) => return Ok(first..first + BLOCK),
                // Unknown: the block may be reserved; taking the next one wastes ids but never gives one twice.
                Err(CommitError::Conflict | CommitError::Unknown(_)) => {}
                Err(CommitError::Refused(error)) => return Err(error),
            }
        }
        Err(Error::unavailable("the id counter could not be advanced: try again"))
    }
}
