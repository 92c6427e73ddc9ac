//! The bytes that describe a chunk on disk. The layouts are drawn in [`super`].

use super::SMALL_BYTES_MAX;
use bytes::{BufMut, Bytes, BytesMut};
use cairn_proto::{
    checksum::crc64,
    id::{ChunkId, GroupId},
    limits::{BLOCK_BYTES, CHUNK_BYTES_MAX},
};

/// Length of a [`ChunkHeader`].
pub(super) const HEADER_BYTES: usize = 64;
const MAGIC: u32 = u32::from_le_bytes(*b"CChk");
const VERSION: u16 = 1;
const FLAG_COMPUTED_HERE: u16 = 1;
const FLAGS_KNOWN: u16 = FLAG_COMPUTED_HERE;
/// What the header's own checksum covers.
const SUMMED_BYTES: usize = 56;

/// A record of the log: one small chunk.
pub(super) const KIND_CHUNK: u8 = 1;
/// A record of the log: ids that were removed.
pub(super) const KIND_REMOVED: u8 = 2;
/// Ids in one record of removals.
pub(super) const REMOVED_IDS_MAX: usize = 4096;
const KEY_BYTES: usize = 12;
/// The longest payload of a record.
pub(super) const SMALL_PAYLOAD_BYTES_MAX: usize =
    HEADER_BYTES + SMALL_BYTES_MAX / BLOCK_BYTES * 8 + SMALL_BYTES_MAX;
const _: () = assert!(REMOVED_IDS_MAX * KEY_BYTES <= SMALL_PAYLOAD_BYTES_MAX);

/// What a chunk's bytes cannot say about themselves: at the start of a small chunk's record, at the end of a large
/// one's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ChunkHeader {
    pub(super) chunk: ChunkId,
    pub(super) group: GroupId,
    pub(super) length: u32,
    pub(super) checksum: u64,
    pub(super) computed_here: bool,
    /// Checksum of the table of block checksums.
    pub(super) table_checksum: u64,
}

/// What bytes at the place of a header are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Decoded {
    Header(ChunkHeader),
    /// An intact header that this code does not understand.
    Newer(u16),
    Bad,
}

impl ChunkHeader {
    pub(super) fn encode(&self, out: &mut BytesMut) {
        let start = out.len();
        out.put_u32_le(MAGIC);
        out.put_u16_le(VERSION);
        out.put_u16_le(if self.computed_here { FLAG_COMPUTED_HERE } else { 0 });
        out.put_u64_le(self.chunk.grant.0);
        out.put_u32_le(self.chunk.index);
        out.put_u32_le(self.length);
        out.put_u64_le(self.group.0);
        out.put_u64_le(self.checksum);
        out.put_u64_le(self.table_checksum);
        out.put_u64_le(0);
        let sum = crc64(&out[start..]);
        out.put_u64_le(sum);
    }

    pub(super) fn decode(bytes: &[u8]) -> Decoded {
        if bytes.len() < HEADER_BYTES || u32_at(bytes, 0) != MAGIC {
            return Decoded::Bad;
        }
        if u64_at(bytes, SUMMED_BYTES) != crc64(&bytes[..SUMMED_BYTES]) {
            return Decoded::Bad;
        }
        let [version, flags] = [4, 6].map(|at| u16::from_le_bytes([bytes[at], bytes[at + 1]]));
        if version != VERSION || flags & !FLAGS_KNOWN != 0 {
            return Decoded::Newer(version);
        }
        let header = Self {
            chunk: ChunkId::new(u64_at(bytes, 8), u32_at(bytes, 16)),
            length: u32_at(bytes, 20),
            group: GroupId(u64_at(bytes, 24)),
            checksum: u64_at(bytes, 32),
            computed_here: flags & FLAG_COMPUTED_HERE != 0,
            table_checksum: u64_at(bytes, 40),
        };
        let sane = header.length > 0 && u64::from(header.length) <= CHUNK_BYTES_MAX;
        if sane { Decoded::Header(header) } else { Decoded::Bad }
    }
}

/// Number of blocks of a chunk.
pub(super) fn block_count(length: u32) -> usize {
    (length as usize).div_ceil(BLOCK_BYTES)
}

/// Bytes of a chunk's table of block checksums.
pub(super) fn table_bytes(length: u32) -> usize {
    block_count(length) * 8
}

/// Bytes of a small chunk's record, without what the log adds.
pub(super) fn payload_bytes(length: u32) -> usize {
    HEADER_BYTES + table_bytes(length) + length as usize
}

/// Bytes of a large chunk's file.
pub(super) fn file_bytes(length: u32) -> u64 {
    payload_bytes(length) as u64
}

pub(super) fn encode_table(blocks: &[u64], out: &mut BytesMut) {
    for block in blocks {
        out.put_u64_le(*block);
    }
}

pub(super) fn decode_table(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks_exact(8).map(|word| u64_at(word, 0)).collect()
}

/// The checksum of a table, as it is written.
pub(super) fn table_checksum(blocks: &[u64]) -> u64 {
    let mut bytes = BytesMut::with_capacity(blocks.len() * 8);
    encode_table(blocks, &mut bytes);
    crc64(&bytes)
}

pub(super) fn encode_removed(chunks: &[ChunkId]) -> Bytes {
    let mut out = BytesMut::with_capacity(chunks.len() * KEY_BYTES);
    for chunk in chunks {
        out.put_slice(&chunk.to_key());
    }
    out.freeze()
}

pub(super) fn decode_removed(bytes: &[u8]) -> impl Iterator<Item = ChunkId> + '_ {
    bytes.chunks_exact(KEY_BYTES).map(|key| {
        let (grant, index) = key.split_at(8);
        let grant = grant.iter().fold(0, |id, byte| id << 8 | u64::from(*byte));
        ChunkId::new(grant, index.iter().fold(0, |id, byte| id << 8 | u32::from(*byte)))
    })
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_come_back_and_no_flipped_bit_passes() {
        let header = ChunkHeader {
            chunk: ChunkId::new(u64::MAX - 1, 7),
            group: GroupId(12),
            length: 65_537,
            checksum: 0x0123_4567_89ab_cdef,
            computed_here: true,
            table_checksum: 99,
        };
        let mut bytes = BytesMut::new();
        header.encode(&mut bytes);
        assert_eq!(bytes.len(), HEADER_BYTES);
        assert_eq!(ChunkHeader::decode(&bytes), Decoded::Header(header));
        for bit in 0..HEADER_BYTES * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(ChunkHeader::decode(&bytes), Decoded::Bad, "bit {bit}");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
        bytes[4] = 2;
        let sum = crc64(&bytes[..SUMMED_BYTES]);
        bytes[SUMMED_BYTES..].copy_from_slice(&sum.to_le_bytes());
        assert_eq!(ChunkHeader::decode(&bytes), Decoded::Newer(2));
        assert_eq!(ChunkHeader::decode(&bytes[..63]), Decoded::Bad);
    }

    #[test]
    fn removed_ids_come_back() {
        let chunks = [ChunkId::new(1, 2), ChunkId::new(u64::MAX, u32::MAX), ChunkId::new(1 << 40, 0)];
        assert_eq!(decode_removed(&encode_removed(&chunks)).collect::<Vec<_>>(), chunks);
    }
}
