//! A store of chunks that serves what it read without comparing it with its checksums.

use crate::plant::Plant;
use async_trait::async_trait;
use bytes::Bytes;
use cairn_proto::{
    Reason, Result,
    checksum::block_checksums,
    id::{ChunkId, GrantId, GroupId},
    limits::{BLOCK_BYTES, DATA_BYTES_MAX},
    v1,
};
use cluster::{Builder, Cluster};
use file_service::chunks::{ChunkInfo, ChunkStore, ChunkWriter, Part, Removed, StoreUsage};
use parking_lot::Mutex;
use std::{collections::HashMap, ops::RangeInclusive, sync::Arc};

/// Which checksums come with unverified bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sums {
    /// Those of the writer: whoever verifies them notices.
    AsStored,
    /// New ones, of the damaged bytes: only whoever knows the whole chunk's checksum notices.
    OfWhatIsServed,
}

type Kept = Arc<Mutex<HashMap<ChunkId, (Vec<u8>, Vec<u64>)>>>;

/// A builder whose file servers serve damaged copies.
pub fn unverified(plant: Arc<Plant>, sums: Sums) -> Builder {
    Cluster::builder().chunk_store_wrapper(move |_, inner| {
        Arc::new(Unverified { inner, plant: plant.clone(), sums, kept: Kept::default() })
    })
}

/// The engine beneath refuses a damaged block; what it would have served is made from what was once written, with a bit
/// flipped.
#[derive(Debug)]
struct Unverified {
    inner: Arc<dyn ChunkStore>,
    plant: Arc<Plant>,
    sums: Sums,
    kept: Kept,
}

impl Unverified {
    fn damaged(&self, chunk: ChunkId, offset: u64, len: usize) -> Option<Part> {
        let mut info = self.inner.info(chunk)?;
        info.corrupt = false;
        let kept = self.kept.lock();
        let (bytes, sums) = kept.get(&chunk)?;
        let from = offset as usize;
        let to = (from + len.min(DATA_BYTES_MAX).next_multiple_of(BLOCK_BYTES)).min(bytes.len());
        let mut data = bytes.get(from..to)?.to_vec();
        *data.first_mut()? ^= 1;
        let first = from / BLOCK_BYTES;
        let blocks = match self.sums {
            Sums::AsStored => sums.get(first..first + data.len().div_ceil(BLOCK_BYTES))?.to_vec(),
            Sums::OfWhatIsServed => block_checksums(chunk, first as u32, &data),
        };
        Some(Part { offset, data: data.into(), blocks, info })
    }
}

#[async_trait]
impl ChunkStore for Unverified {
    async fn begin(
        &self,
        chunk: ChunkId,
        group: GroupId,
        length_hint: Option<u64>,
    ) -> Result<Box<dyn ChunkWriter>> {
        let inner = self.inner.begin(chunk, group, length_hint).await?;
        Ok(Box::new(KeepingWriter {
            inner,
            chunk,
            bytes: Vec::new(),
            sums: Vec::new(),
            kept: self.kept.clone(),
        }))
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
        let (bytes, sums) = (data.to_vec(), blocks.clone());
        let info = self.inner.put(chunk, group, data, blocks, checksum, computed_here).await?;
        self.kept.lock().insert(chunk, (bytes, sums));
        Ok(info)
    }

    fn info(&self, chunk: ChunkId) -> Option<ChunkInfo> {
        self.inner.info(chunk)
    }

    async fn read(&self, chunk: ChunkId, offset: u64, len: usize) -> Result<Part> {
        match self.inner.read(chunk, offset, len).await {
            Err(error) if self.plant.is_armed() && error.reason == Reason::ChecksumMismatch => {
                self.plant.strike();
                self.damaged(chunk, offset, len).ok_or(error)
            }
            read => read,
        }
    }

    async fn remove(&self, chunks: &[ChunkId]) -> Result<Removed> {
        self.inner.remove(chunks).await
    }

    fn digests(&self, grants: RangeInclusive<GrantId>, limit: usize) -> Vec<v1::GrantDigest> {
        self.inner.digests(grants, limit)
    }

    fn list(&self, after: Option<ChunkId>, grants: RangeInclusive<GrantId>, limit: usize) -> Vec<ChunkInfo> {
        self.inner.list(after, grants, limit)
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

/// Remembers what arrives.
#[derive(Debug)]
struct KeepingWriter {
    inner: Box<dyn ChunkWriter>,
    chunk: ChunkId,
    bytes: Vec<u8>,
    sums: Vec<u64>,
    kept: Kept,
}

#[async_trait]
impl ChunkWriter for KeepingWriter {
    async fn append(&mut self, data: Bytes, blocks: Vec<u64>) -> Result<()> {
        self.bytes.extend_from_slice(&data);
        self.sums.extend_from_slice(&blocks);
        self.inner.append(data, blocks).await
    }

    async fn seal(self: Box<Self>, length: u64, checksum: u64, computed_here: bool) -> Result<ChunkInfo> {
        let info = self.inner.seal(length, checksum, computed_here).await?;
        self.kept.lock().insert(self.chunk, (self.bytes, self.sums));
        Ok(info)
    }
}
