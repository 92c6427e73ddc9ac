//! Stores of chunks that say other than they hold, or before they hold it.

use crate::plant::Plant;
use async_trait::async_trait;
use bytes::Bytes;
use cairn_proto::{
    Result,
    id::{ChunkId, GrantId, GroupId},
    v1,
};
use cluster::{Builder, Cluster};
use file_service::chunks::{ChunkInfo, ChunkStore, ChunkWriter, Part, Removed, StoreUsage};
use std::{
    ops::RangeInclusive,
    sync::{Arc, OnceLock},
};

/// A builder whose file servers show the inventory of the first of them: what should be there, not what is.
pub fn borrowed_inventories(plant: Arc<Plant>) -> Builder {
    let first = Arc::new(OnceLock::new());
    Cluster::builder().chunk_store_wrapper(move |index, inner| {
        if index == 0 {
            let _ = first.set(inner.clone());
        }
        Arc::new(Bent { inner, plant: plant.clone(), how: How::Borrowed(first.clone()) })
    })
}

/// A builder whose file servers take every small chunk at once and store it some time later: a queue without an end.
pub fn endless_queues(plant: Arc<Plant>) -> Builder {
    Cluster::builder()
        .chunk_store_wrapper(move |_, inner| Arc::new(Bent { inner, plant: plant.clone(), how: How::Later }))
}

#[derive(Debug)]
enum How {
    /// Inventories are this store's.
    Borrowed(Arc<OnceLock<Arc<dyn ChunkStore>>>),
    /// Chunks count before they are stored.
    Later,
}

#[derive(Debug)]
struct Bent {
    inner: Arc<dyn ChunkStore>,
    plant: Arc<Plant>,
    how: How,
}

impl Bent {
    /// What another store says in the place of this one.
    fn shown<T: PartialEq>(&self, said: impl Fn(&dyn ChunkStore) -> T) -> T {
        let own = said(&*self.inner);
        match &self.how {
            How::Borrowed(first) if self.plant.is_armed() => {
                let other = first.get().map(|first| said(&**first));
                other.filter(|other| *other != own).inspect(|_| self.plant.strike()).unwrap_or(own)
            }
            _ => own,
        }
    }
}

#[async_trait]
impl ChunkStore for Bent {
    async fn begin(
        &self,
        chunk: ChunkId,
        group: GroupId,
        length_hint: Option<u64>,
    ) -> Result<Box<dyn ChunkWriter>> {
        self.inner.begin(chunk, group, length_hint).await
    }

    async fn put(
        &self,
        chunk: ChunkId,
        group: GroupId,
        data: Bytes,
        blocks: Vec<u64>,
        checksum: u64,
        computed_here: bool,
    ) -> Result<ChunkInfo> {
        if !self.plant.is_armed() || !matches!(self.how, How::Later) {
            return self.inner.put(chunk, group, data, blocks, checksum, computed_here).await;
        }
        self.plant.strike();
        let (inner, length) = (self.inner.clone(), data.len() as u64);
        tokio::spawn(async move { inner.put(chunk, group, data, blocks, checksum, computed_here).await });
        Ok(ChunkInfo { chunk, group, length, checksum, corrupt: false, verified_at: None, computed_here })
    }

    fn info(&self, chunk: ChunkId) -> Option<ChunkInfo> {
        self.inner.info(chunk)
    }

    async fn read(&self, chunk: ChunkId, offset: u64, len: usize) -> Result<Part> {
        self.inner.read(chunk, offset, len).await
    }

    async fn remove(&self, chunks: &[ChunkId]) -> Result<Removed> {
        self.inner.remove(chunks).await
    }

    fn digests(&self, grants: RangeInclusive<GrantId>, limit: usize) -> Vec<v1::GrantDigest> {
        self.shown(|store| store.digests(grants.clone(), limit))
    }

    fn list(&self, after: Option<ChunkId>, grants: RangeInclusive<GrantId>, limit: usize) -> Vec<ChunkInfo> {
        self.shown(|store| store.list(after, grants.clone(), limit))
    }

    fn mark_corrupt(&self, chunk: ChunkId) {
        self.inner.mark_corrupt(chunk);
    }

    async fn verify(&self, chunk: ChunkId) -> Result<bool> {
        self.inner.verify(chunk).await
    }

    fn usage(&self) -> StoreUsage {
        self.inner.usage()
    }

    async fn maintain(&self) -> Result<bool> {
        self.inner.maintain().await
    }

    async fn close(&self) -> Result<()> {
        self.inner.close().await
    }
}
