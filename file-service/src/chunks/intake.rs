//! Checks what arrives of a chunk, the same way for every engine.

use bytes::Bytes;
use cairn_proto::{
    Error, Result,
    checksum::{OfBlocks, verify_blocks_of},
    error::Reason,
    id::ChunkId,
    limits::{BLOCK_BYTES, CHUNK_BYTES_MAX, DATA_BYTES_MAX},
};

/// The checksums and length of a chunk that is arriving.
#[derive(Clone, Debug)]
pub(super) struct Intake {
    chunk: ChunkId,
    length: u64,
    checksum: OfBlocks,
    /// Salted checksums of all blocks so far.
    blocks: Vec<u64>,
}

impl Intake {
    pub(super) fn new(chunk: ChunkId, length_hint: Option<u64>) -> Result<Self> {
        let hint = length_hint.unwrap_or(0);
        if hint > CHUNK_BYTES_MAX {
            return Err(too_long(chunk));
        }
        let blocks = Vec::with_capacity((hint as usize).div_ceil(BLOCK_BYTES));
        Ok(Self { chunk, length: 0, checksum: OfBlocks::default(), blocks })
    }

    pub(super) fn chunk(&self) -> ChunkId {
        self.chunk
    }

    pub(super) fn length(&self) -> u64 {
        self.length
    }

    pub(super) fn blocks(&self) -> &[u64] {
        &self.blocks
    }

    /// Takes the next bytes in, or says what is wrong with them.
    pub(super) fn take(&mut self, data: &Bytes, blocks: &[u64]) -> Result<()> {
        let chunk = self.chunk;
        if data.is_empty() || data.len() > DATA_BYTES_MAX {
            let why = format!("a part of chunk {chunk} has {} bytes, not 1 to {DATA_BYTES_MAX}", data.len());
            return Err(Error::invalid(why));
        }
        if !self.length.is_multiple_of(BLOCK_BYTES as u64) {
            let why = format!(
                "chunk {chunk} goes on after a part of a block at {}; only its last block may be short",
                self.length
            );
            return Err(Error::invalid(why));
        }
        if self.length + data.len() as u64 > CHUNK_BYTES_MAX {
            return Err(too_long(chunk));
        }
        let first = (self.length / BLOCK_BYTES as u64) as u32;
        if let Some(bad) = verify_blocks_of(&mut self.checksum, chunk, first, data, blocks) {
            let why = format!("block {bad} of chunk {chunk} does not match its checksum; send it again");
            return Err(Error::new(Reason::ChecksumMismatch, why));
        }
        self.length += data.len() as u64;
        self.blocks.extend_from_slice(blocks);
        Ok(())
    }

    /// Compares what arrived with what its writer says.
    pub(super) fn finish(&self, length: u64, checksum: u64) -> Result<()> {
        if length == 0 {
            return Err(Error::invalid(format!("chunk {} has no bytes", self.chunk)));
        }
        if self.length != length {
            let why =
                format!("{} bytes of chunk {} arrived, its seal says {length}", self.length, self.chunk);
            return Err(Error::new(Reason::ChecksumMismatch, why));
        }
        if self.checksum.value() != checksum {
            let why = format!("the bytes of chunk {} do not match the checksum of its seal", self.chunk);
            return Err(Error::new(Reason::ChecksumMismatch, why));
        }
        Ok(())
    }
}

/// The blocks and bytes of a read: (offset, length, first block), widened to whole blocks and cut to a part and to
/// the chunk.
pub(super) fn read_range(chunk: ChunkId, length: u64, offset: u64, len: usize) -> Result<(u64, usize, u32)> {
    if !offset.is_multiple_of(BLOCK_BYTES as u64) || offset >= length || len == 0 {
        let why = format!(
            "{len} bytes from {offset} of chunk {chunk} ({length} bytes) are not a run of its blocks"
        );
        return Err(Error::invalid(why));
    }
    let len = len.min(DATA_BYTES_MAX).next_multiple_of(BLOCK_BYTES) as u64;
    Ok((offset, len.min(length - offset) as usize, (offset / BLOCK_BYTES as u64) as u32))
}

/// `CHECKSUM_MISMATCH` of a stored copy.
pub(super) fn bad_copy(chunk: ChunkId, what: &str) -> Error {
    let why = format!("the copy of chunk {chunk} here is corrupt ({what}); read another replica");
    Error::new(Reason::ChecksumMismatch, why)
}

fn too_long(chunk: ChunkId) -> Error {
    Error::limit(format!("chunk {chunk} is longer than {CHUNK_BYTES_MAX} bytes"))
}
