//! Chunks in memory, for tests and simulation. Everything is gone with the process.

use super::{
    ChunkInfo, ChunkStore, ChunkWriter, Part, Removed, StoreUsage, existing,
    intake::{Intake, bad_copy, read_range},
    not_found, overtaken,
};
use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use cairn_proto::{
    Error, Result,
    checksum::{crc64, digest_term, verify_blocks},
    error::Reason,
    id::{ChunkId, GrantId, GroupId},
    limits::BLOCK_BYTES,
    v1,
};
use parking_lot::Mutex;
use std::{
    collections::{BTreeMap, HashMap},
    ops::{Bound, RangeInclusive},
    sync::Arc,
};
use tokio::time::Instant;

/// A [`ChunkStore`] in memory. Clones are the same store.
#[derive(Clone, Debug)]
pub struct MemoryChunkStore {
    state: Arc<Mutex<State>>,
    capacity_bytes: u64,
}

#[derive(Debug, Default)]
struct State {
    chunks: BTreeMap<ChunkId, Held>,
    /// The newest writer of each chunk that is arriving.
    writers: HashMap<ChunkId, u64>,
    next_writer: u64,
    used_bytes: u64,
    closed: bool,
}

#[derive(Debug)]
struct Held {
    info: ChunkInfo,
    data: Bytes,
    blocks: Vec<u64>,
}

impl MemoryChunkStore {
    /// An empty store for chunks of `capacity_bytes` together.
    pub fn new(capacity_bytes: u64) -> Self {
        Self { state: Arc::default(), capacity_bytes }
    }

    /// Flips a bit of a stored chunk, as rot does, for tests. False if there is no such byte.
    pub fn flip_bit(&self, chunk: ChunkId, offset: u64, bit: u8) -> bool {
        let mut state = self.state.lock();
        let Some(held) = state.chunks.get_mut(&chunk).filter(|held| offset < held.info.length) else {
            return false;
        };
        let mut data = BytesMut::from(held.data.as_ref());
        data[offset as usize] ^= 1 << (bit % 8);
        held.data = data.freeze();
        true
    }
}

#[async_trait]
impl ChunkStore for MemoryChunkStore {
    async fn begin(
        &self,
        chunk: ChunkId,
        group: GroupId,
        length_hint: Option<u64>,
    ) -> Result<Box<dyn ChunkWriter>> {
        let intake = Intake::new(chunk, length_hint)?;
        let mut state = self.state.lock();
        if state.closed {
            return Err(Error::unavailable("the chunk store is closed"));
        }
        state.next_writer += 1;
        let ticket = state.next_writer;
        state.writers.insert(chunk, ticket);
        let store = self.clone();
        Ok(Box::new(MemoryWriter { store, group, intake, data: BytesMut::new(), ticket }))
    }

    fn info(&self, chunk: ChunkId) -> Option<ChunkInfo> {
        self.state.lock().chunks.get(&chunk).map(|held| held.info.clone())
    }

    async fn read(&self, chunk: ChunkId, offset: u64, len: usize) -> Result<Part> {
        let mut state = self.state.lock();
        let held = state.chunks.get_mut(&chunk).ok_or_else(|| not_found(chunk))?;
        let (offset, len, first) = read_range(chunk, held.info.length, offset, len)?;
        let data = held.data.slice(offset as usize..offset as usize + len);
        let blocks = held.blocks[first as usize..first as usize + len.div_ceil(BLOCK_BYTES)].to_vec();
        if let Some(bad) = verify_blocks(chunk, first, &data, &blocks) {
            held.info.corrupt = true;
            return Err(bad_copy(chunk, &format!("block {bad}")));
        }
        Ok(Part { offset, data, blocks, info: held.info.clone() })
    }

    async fn remove(&self, chunks: &[ChunkId]) -> Result<Removed> {
        let mut state = self.state.lock();
        let mut removed = Removed::default();
        for held in chunks.iter().filter_map(|chunk| state.chunks.remove(chunk)).collect::<Vec<_>>() {
            removed.chunks += 1;
            removed.bytes += held.info.length;
        }
        state.used_bytes -= removed.bytes;
        Ok(removed)
    }

    fn digests(&self, grants: RangeInclusive<GrantId>, limit: usize) -> Vec<v1::GrantDigest> {
        let state = self.state.lock();
        let mut digests: Vec<v1::GrantDigest> = Vec::new();
        if grants.is_empty() {
            return digests;
        }
        for (chunk, held) in state.chunks.range(range_of(&grants)) {
            if digests.last().is_none_or(|last| last.grant_id != chunk.grant.0) {
                if digests.len() == limit {
                    break;
                }
                digests.push(v1::GrantDigest { grant_id: chunk.grant.0, ..Default::default() });
            }
            if let Some(last) = digests.last_mut().filter(|_| !held.info.corrupt) {
                last.chunk_count += 1;
                let term = digest_term(*chunk, held.info.length, held.info.checksum);
                last.digest = last.digest.wrapping_add(term);
            }
        }
        digests
    }

    fn list(&self, after: Option<ChunkId>, grants: RangeInclusive<GrantId>, limit: usize) -> Vec<ChunkInfo> {
        if grants.is_empty() {
            return Vec::new();
        }
        let state = self.state.lock();
        let behind = state.chunks.range(range_of(&grants)).skip_while(|(chunk, _)| Some(**chunk) <= after);
        behind.take(limit).map(|(_, held)| held.info.clone()).collect()
    }

    fn mark_corrupt(&self, chunk: ChunkId) {
        if let Some(held) = self.state.lock().chunks.get_mut(&chunk) {
            held.info.corrupt = true;
        }
    }

    async fn verify(&self, chunk: ChunkId) -> Result<bool> {
        let mut state = self.state.lock();
        let held = state.chunks.get_mut(&chunk).ok_or_else(|| not_found(chunk))?;
        let good = verify_blocks(chunk, 0, &held.data, &held.blocks).is_none()
            && crc64(&held.data) == held.info.checksum;
        held.info.corrupt = !good;
        if good {
            held.info.verified_at = Some(Instant::now());
        }
        Ok(good)
    }

    fn usage(&self) -> StoreUsage {
        let state = self.state.lock();
        StoreUsage {
            chunks: state.chunks.len() as u64,
            used_bytes: state.used_bytes,
            reclaimable_bytes: 0,
            total_bytes: self.capacity_bytes,
            free_bytes: self.capacity_bytes.saturating_sub(state.used_bytes),
        }
    }

    async fn close(&self) -> Result<()> {
        self.state.lock().closed = true;
        Ok(())
    }
}

fn range_of(grants: &RangeInclusive<GrantId>) -> (Bound<ChunkId>, Bound<ChunkId>) {
    let first = ChunkId { grant: *grants.start(), index: 0 };
    let last = ChunkId { grant: *grants.end(), index: u32::MAX };
    (Bound::Included(first), Bound::Included(last))
}

#[derive(Debug)]
struct MemoryWriter {
    store: MemoryChunkStore,
    group: GroupId,
    intake: Intake,
    data: BytesMut,
    ticket: u64,
}

#[async_trait]
impl ChunkWriter for MemoryWriter {
    async fn append(&mut self, data: Bytes, blocks: Vec<u64>) -> Result<()> {
        self.intake.take(&data, &blocks)?;
        self.data.extend_from_slice(&data);
        Ok(())
    }

    async fn seal(self: Box<Self>, length: u64, checksum: u64, computed_here: bool) -> Result<ChunkInfo> {
        self.intake.finish(length, checksum)?;
        let chunk = self.intake.chunk();
        let mut state = self.store.state.lock();
        if state.closed {
            return Err(Error::unavailable("the chunk store is closed"));
        }
        let held = state.chunks.get(&chunk).map(|held| held.info.clone());
        let replaced = held.is_some();
        if let Some(held) = held {
            let held = existing(held, length, checksum)?;
            if !held.corrupt {
                return Ok(held);
            }
        }
        if state.writers.get(&chunk) != Some(&self.ticket) {
            return Err(overtaken(chunk));
        }
        if !replaced {
            if state.used_bytes + length > self.store.capacity_bytes {
                let why = format!("no room for the {length} bytes of chunk {chunk} in memory");
                return Err(Error::new(Reason::NoSpace, why));
            }
            state.used_bytes += length;
        }
        let info = ChunkInfo {
            chunk,
            group: self.group,
            length,
            checksum,
            corrupt: false,
            verified_at: Some(Instant::now()),
            computed_here,
        };
        let data = Bytes::copy_from_slice(&self.data);
        let blocks = self.intake.blocks().to_vec();
        state.chunks.insert(chunk, Held { info: info.clone(), data, blocks });
        Ok(info)
    }
}

impl Drop for MemoryWriter {
    fn drop(&mut self) {
        let mut state = self.store.state.lock();
        let chunk = self.intake.chunk();
        if state.writers.get(&chunk) == Some(&self.ticket) {
            state.writers.remove(&chunk);
        }
    }
}
