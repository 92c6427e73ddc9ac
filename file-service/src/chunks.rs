//! Where a file server keeps its chunks: the trait, what it answers, and its engines.
//!
//! A chunk is an immutable run of bytes. It arrives part by part, each block with its salted checksum
//! ([`cairn_proto::checksum`]), and is *sealed* by its length and its whole checksum; only then does it exist.
//! Every engine keeps these rules, and `contract` holds it to them:
//!
//! * Nothing of an unsealed chunk is seen or counted. Dropping its writer drops its bytes.
//! * A block that does not match its checksum is refused on arrival, so a damaged copy is never stored.
//! * What [`ChunkWriter::seal`] and [`ChunkStore::put`] answered is durable.
//! * A sealed chunk never changes. Sealing it again with the same length and checksum answers as the first time;
//!   with another, `CHUNK_EXISTS`. A copy that was found corrupt is replaced by a good one of the same length and
//!   checksum.
//! * Every byte that [`ChunkStore::read`] returns was compared with its block's checksum.
//! * A removed chunk never comes back by itself. It may be stored again: a server can lose a seat in a group, drop
//!   its surplus copy, and get the seat back.

use async_trait::async_trait;
use bytes::Bytes;
use cairn_proto::{
    Error, Result,
    error::Reason,
    id::{ChunkId, GrantId, GroupId},
    v1,
};
use std::{fmt::Debug, ops::RangeInclusive};
use tokio::time::Instant;

#[cfg(test)]
mod contract;
pub mod disk;
mod intake;
pub mod memory;

pub use disk::{DiskChunkStore, DiskConfig};
pub use memory::MemoryChunkStore;

/// What is known of one sealed chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkInfo {
    /// The chunk.
    pub chunk: ChunkId,
    /// The placement group that it was written to.
    pub group: GroupId,
    /// Its length in bytes, 1 to [`cairn_proto::limits::CHUNK_BYTES_MAX`].
    pub length: u64,
    /// CRC-64/NVME of all its bytes.
    pub checksum: u64,
    /// This copy failed a check; a good one may replace it.
    pub corrupt: bool,
    /// When all its bytes were last compared with their checksums, since the store was opened.
    pub verified_at: Option<Instant>,
    /// The checksums were computed by a server, because the writer sent none.
    pub computed_here: bool,
}

/// A verified run of whole blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Position in the chunk, a multiple of [`cairn_proto::limits::BLOCK_BYTES`].
    pub offset: u64,
    /// The bytes: whole blocks, but for the last of the chunk.
    pub data: Bytes,
    /// One salted checksum for each block.
    pub blocks: Vec<u64>,
    /// The chunk.
    pub info: ChunkInfo,
}

/// What a removal took away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Chunks that were held and are gone; ids that were not held do not count.
    pub chunks: u64,
    /// The sum of their lengths.
    pub bytes: u64,
}

/// How full a store is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreUsage {
    /// Sealed chunks, corrupt ones included.
    pub chunks: u64,
    /// The sum of their lengths.
    pub used_bytes: u64,
    /// Bytes that are taken on the disk but hold no chunk any more, until they are compacted.
    pub reclaimable_bytes: u64,
    /// The size of the disk.
    pub total_bytes: u64,
    /// What may still be written.
    pub free_bytes: u64,
}

/// Keeps sealed chunks. See the module's page for the rules that every engine keeps.
///
/// Ids, lengths and data that break a limit are refused with `INVALID_ARGUMENT` or `LIMIT_EXCEEDED`. A disk that
/// is full answers `NO_SPACE`, one that fails `IO`; both name the data directory, and neither loses what was
/// acknowledged.
#[async_trait]
pub trait ChunkStore: Debug + Send + Sync + 'static {
    /// Begins to receive a chunk. With `length_hint` the room is reserved at once. A second `begin` of a chunk that
    /// is not sealed makes the first writer's `seal` fail with `CONFLICT`.
    async fn begin(
        &self,
        chunk: ChunkId,
        group: GroupId,
        length_hint: Option<u64>,
    ) -> Result<Box<dyn ChunkWriter>>;

    /// Stores a chunk of at most [`cairn_proto::limits::DATA_BYTES_MAX`] in one go.
    async fn put(
        &self,
        chunk: ChunkId,
        group: GroupId,
        data: Bytes,
        blocks: Vec<u64>,
        checksum: u64,
        computed_here: bool,
    ) -> Result<ChunkInfo> {
        let length = data.len() as u64;
        let mut writer = self.begin(chunk, group, Some(length)).await?;
        writer.append(data, blocks).await?;
        writer.seal(length, checksum, computed_here).await
    }

    /// A sealed chunk, also when it is corrupt.
    fn info(&self, chunk: ChunkId) -> Option<ChunkInfo>;

    /// Reads at most `len` bytes (rounded up to whole blocks, and cut to
    /// [`cairn_proto::limits::DATA_BYTES_MAX`]) from `offset`, a multiple of the block size inside the chunk.
    /// `CHUNK_NOT_FOUND`; `CHECKSUM_MISMATCH` when a block of the range is bad, which marks the copy corrupt. Good
    /// blocks of a corrupt copy are still served: they may be the last ones.
    async fn read(&self, chunk: ChunkId, offset: u64, len: usize) -> Result<Part>;

    /// Removes chunks; those that are not held are passed over. Durable on return, and the bytes have left the
    /// disk. After an error any of them may be gone; safe to repeat.
    async fn remove(&self, chunks: &[ChunkId]) -> Result<Removed>;

    /// One digest for each grant of the range that has chunks here, in order of grants, at most `limit`. Corrupt
    /// copies are not part of it, so that a comparison notices them; a grant of which nothing else is left has a
    /// count of 0.
    fn digests(&self, grants: RangeInclusive<GrantId>, limit: usize) -> Vec<v1::GrantDigest>;

    /// Chunks of the range behind `after`, in order of ids, at most `limit`.
    fn list(&self, after: Option<ChunkId>, grants: RangeInclusive<GrantId>, limit: usize) -> Vec<ChunkInfo>;

    /// Marks a copy corrupt, because a reader said so. [`ChunkStore::verify`] has the last word.
    fn mark_corrupt(&self, chunk: ChunkId);

    /// Reads a chunk wholly and compares all its checksums; marks it good or corrupt and says which.
    /// `CHUNK_NOT_FOUND`.
    async fn verify(&self, chunk: ChunkId) -> Result<bool>;

    /// How full the store is. The figures of the disk may be some seconds old.
    fn usage(&self) -> StoreUsage;

    /// One step of housekeeping: gives the room of removed chunks back, and keeps the next start short. Called from
    /// time to time by a background task; says whether there is more to do at once.
    async fn maintain(&self) -> Result<bool> {
        Ok(false)
    }

    /// Ends the store cleanly. Later writes fail with `UNAVAILABLE`.
    async fn close(&self) -> Result<()>;
}

/// Receives one chunk. Dropping it drops what arrived.
#[async_trait]
pub trait ChunkWriter: Debug + Send {
    /// Takes the next bytes: whole blocks, but for the last of the chunk, at most
    /// [`cairn_proto::limits::DATA_BYTES_MAX`], with one salted checksum for each. `CHECKSUM_MISMATCH` if they do
    /// not match, `LIMIT_EXCEEDED` beyond the largest chunk. After an error the writer is of no more use.
    async fn append(&mut self, data: Bytes, blocks: Vec<u64>) -> Result<()>;

    /// Makes the chunk exist, durably. `CHECKSUM_MISMATCH` if what arrived has another length or checksum,
    /// `CHUNK_EXISTS` if it is sealed already with other content, `CONFLICT` if somebody else is writing it. After
    /// an error nothing of it stays, unless it was there before.
    async fn seal(self: Box<Self>, length: u64, checksum: u64, computed_here: bool) -> Result<ChunkInfo>;
}

/// `CHUNK_NOT_FOUND`.
fn not_found(chunk: ChunkId) -> Error {
    Error::new(Reason::ChunkNotFound, format!("chunk {chunk} is not held here"))
}

/// `CHUNK_EXISTS`, or the held copy's info if it is the same content.
fn existing(held: ChunkInfo, length: u64, checksum: u64) -> Result<ChunkInfo> {
    if (held.length, held.checksum) == (length, checksum) {
        return Ok(held);
    }
    let why = format!("chunk {} is sealed already with other content; write under a new id", held.chunk);
    Err(Error::new(Reason::ChunkExists, why))
}

/// `CONFLICT` of a writer that was overtaken.
fn overtaken(chunk: ChunkId) -> Error {
    let why = format!("chunk {chunk} is being written by somebody else; send it again if that was not you");
    Error::new(Reason::Conflict, why)
}
