//! The store that several directories share, as one life of one of them sees it: after the life's end nothing it still
//! tries reaches the store, and while it is cut off from the store nothing passes.

use crate::gate::{Gate, Life};
use async_trait::async_trait;
use cairn_core::plan::{Key, Plan, Versioned};
use cairn_proto::{Error, id::Revision};
use dir_service::store::{Changes, CommitError, KeyRange, MetaStore, Page};
use futures::StreamExt as _;
use std::sync::Arc;

/// Wraps the store for one life.
#[derive(Debug)]
pub(crate) struct LifeStore {
    inner: Arc<dyn MetaStore>,
    life: Life,
    /// Between the directory and the store.
    gate: Arc<Gate>,
}

impl LifeStore {
    pub(crate) fn new(inner: Arc<dyn MetaStore>, life: Life, gate: Arc<Gate>) -> Self {
        Self { inner, life, gate }
    }

    async fn store(&self) -> Result<&Arc<dyn MetaStore>, Error> {
        tokio::select! {
            () = self.gate.open() => {}
            () = self.life.clone().end() => {}
        }
        match self.life.lasts() {
            true => Ok(&self.inner),
            false => Err(Error::unavailable("the directory was killed")),
        }
    }
}

#[async_trait]
impl MetaStore for LifeStore {
    async fn get(
        &self,
        keys: &[Key],
        at: Option<Revision>,
    ) -> Result<(Revision, Vec<Option<Versioned>>), Error> {
        self.store().await?.get(keys, at).await
    }

    async fn scan(
        &self,
        range: KeyRange,
        limit: usize,
        at: Option<Revision>,
    ) -> Result<(Revision, Page), Error> {
        self.store().await?.scan(range, limit, at).await
    }

    async fn commit(&self, plan: Plan) -> Result<Revision, CommitError> {
        self.store().await.map_err(CommitError::Refused)?.commit(plan).await
    }

    async fn watch(&self, prefix: Key, from: Revision) -> Result<Changes, Error> {
        let changes = self.store().await?.watch(prefix, from).await?;
        let gate = self.gate.clone();
        let passed = changes.then(move |change| {
            let gate = gate.clone();
            async move {
                gate.open().await;
                change
            }
        });
        Ok(passed.boxed())
    }

    async fn revision(&self) -> Result<Revision, Error> {
        self.store().await?.revision().await
    }
}
