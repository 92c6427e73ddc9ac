//! Checksums of blocks and chunks, computed by the writing client and verified by the reading one.
//!
//! A block is 4,096 bytes, the last of a chunk may be shorter. Its checksum is CRC-64/NVME XORed with a salt of
//! (chunk id, block number), so that a block read from the wrong place or of the wrong chunk fails although its
//! bytes are intact. A chunk's checksum is the plain CRC-64/NVME of all its bytes, recorded at commit.

use crate::{id::ChunkId, limits::BLOCK_BYTES};
use crc_fast::{CrcAlgorithm, Digest, checksum, checksum_combine};
use std::sync::LazyLock;
use xxhash_rust::xxh3::xxh3_64;

/// CRC-64/NVME of `bytes`.
pub fn crc64(bytes: &[u8]) -> u64 {
    checksum(CrcAlgorithm::Crc64Nvme, bytes)
}

/// CRC-64/NVME of two runs of bytes behind each other, from those of both and the length of the second.
pub fn crc64_combine(first: u64, second: u64, second_length: u64) -> u64 {
    checksum_combine(CrcAlgorithm::Crc64Nvme, first, second, second_length)
}

/// CRC-64/NVME of bytes that arrive in parts.
#[derive(Clone, Debug)]
pub struct ChunkChecksum(Digest);

impl Default for ChunkChecksum {
    fn default() -> Self {
        Self(Digest::new(CrcAlgorithm::Crc64Nvme))
    }
}

impl ChunkChecksum {
    /// Takes the next bytes in.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The checksum of all bytes so far.
    pub fn value(&self) -> u64 {
        self.0.finalize()
    }
}

/// What a whole block behind it does to a CRC: a linear map of its 64 bits, as a table for each of its bytes.
static BEHIND_BLOCK: LazyLock<Box<[[u64; 256]; 8]>> = LazyLock::new(|| {
    let mut tables = Box::new([[0; 256]; 8]);
    for (byte, table) in tables.iter_mut().enumerate() {
        for bit in 0..8 {
            table[1 << bit] = crc64_combine(1 << (8 * byte + bit), 0, BLOCK_BYTES as u64);
        }
        for value in 1..table.len() {
            let lowest = value & value.wrapping_neg();
            table[value] = table[lowest] ^ table[value ^ lowest];
        }
    }
    tables
});

/// CRC-64/NVME of a chunk, from those of its blocks: they are computed anyway, and its bytes need not be gone through
/// twice.
#[derive(Clone, Copy, Debug, Default)]
pub struct OfBlocks(u64);

impl OfBlocks {
    /// Takes the next block in: the plain checksum of its bytes, and how many they are.
    pub fn push(&mut self, crc: u64, length: usize) {
        self.0 = match length {
            BLOCK_BYTES => {
                let before = self.0.to_le_bytes();
                before
                    .iter()
                    .zip(&**BEHIND_BLOCK)
                    .fold(crc, |sum, (&byte, table)| sum ^ table[usize::from(byte)])
            }
            // The last one.
            length => crc64_combine(self.0, crc, length as u64),
        };
    }

    /// The checksum of all bytes so far.
    pub fn value(&self) -> u64 {
        self.0
    }
}

/// What a block's checksum is XORed with.
pub fn block_salt(chunk: ChunkId, block: u32) -> u64 {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&chunk.grant.0.to_le_bytes());
    bytes[8..12].copy_from_slice(&chunk.index.to_le_bytes());
    bytes[12..].copy_from_slice(&block.to_le_bytes());
    xxh3_64(&bytes)
}

/// Salted checksums of the blocks in `data`, which begins at block `first_block` of `chunk`.
pub fn block_checksums(chunk: ChunkId, first_block: u32, data: &[u8]) -> Vec<u64> {
    (first_block..)
        .zip(data.chunks(BLOCK_BYTES))
        .map(|(block, bytes)| crc64(bytes) ^ block_salt(chunk, block))
        .collect()
}

/// The first block of `data` that does not match its checksum, or `None` when all do.
/// A wrong number of checksums is a mismatch of the first block without one.
pub fn verify_blocks(chunk: ChunkId, first_block: u32, data: &[u8], checksums: &[u64]) -> Option<u32> {
    verify_into(chunk, first_block, data, checksums, |_, _| {})
}

/// As [`verify_blocks`], and takes the blocks into the checksum of the whole, which means nothing after a mismatch.
pub fn verify_blocks_of(
    whole: &mut OfBlocks,
    chunk: ChunkId,
    first_block: u32,
    data: &[u8],
    checksums: &[u64],
) -> Option<u32> {
    verify_into(chunk, first_block, data, checksums, |crc, length| whole.push(crc, length))
}

fn verify_into(
    chunk: ChunkId,
    first_block: u32,
    data: &[u8],
    checksums: &[u64],
    mut good: impl FnMut(u64, usize),
) -> Option<u32> {
    let mut blocks = (first_block..).zip(data.chunks(BLOCK_BYTES));
    let mut sums = checksums.iter();
    for (block, bytes) in blocks.by_ref() {
        let crc = crc64(bytes);
        match sums.next() {
            Some(sum) if crc ^ block_salt(chunk, block) == *sum => good(crc, bytes.len()),
            _ => return Some(block),
        }
    }
    sums.next().map(|_| first_block + data.len().div_ceil(BLOCK_BYTES) as u32)
}

/// One chunk's share of a [`crate::v1::GrantDigest`].
pub fn digest_term(chunk: ChunkId, length: u64, checksum: u64) -> u64 {
    let mut bytes = [0; 28];
    bytes[..8].copy_from_slice(&chunk.grant.0.to_le_bytes());
    bytes[8..12].copy_from_slice(&chunk.index.to_le_bytes());
    bytes[12..20].copy_from_slice(&length.to_le_bytes());
    bytes[20..].copy_from_slice(&checksum.to_le_bytes());
    xxh3_64(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc64_is_nvme() {
        // The check value of CRC-64/NVME in the catalogue of parametrised CRC algorithms.
        assert_eq!(crc64(b"123456789"), 0xae8b_1486_0a79_9888);
        let mut parts = ChunkChecksum::default();
        parts.update(b"1234");
        parts.update(b"56789");
        assert_eq!(parts.value(), crc64(b"123456789"));
        for at in 0..=9 {
            let (first, second) = b"123456789".split_at(at);
            let combined = crc64_combine(crc64(first), crc64(second), second.len() as u64);
            assert_eq!(combined, crc64(b"123456789"), "{at}");
        }
    }

    #[test]
    fn the_checksum_of_a_chunk_is_that_of_its_blocks_together() {
        let data: Vec<u8> =
            (0..BLOCK_BYTES as u32 * 9).map(|n| (n.wrapping_mul(0x9e37_79b9) >> 24) as u8).collect();
        for length in [1, 5, 4_095, 4_096, 4_097, 8_192, 10_000, 4_096 * 7, 4_096 * 9 - 1, 4_096 * 9] {
            let mut whole = OfBlocks::default();
            for block in data[..length].chunks(BLOCK_BYTES) {
                whole.push(crc64(block), block.len());
            }
            assert_eq!(whole.value(), crc64(&data[..length]), "{length}");
            // In parts, verified.
            let chunk = ChunkId::new(7, 3);
            let (mut whole, half) = (OfBlocks::default(), length / 2 / BLOCK_BYTES * BLOCK_BYTES);
            for (begin, end) in [(0, half), (half, length)] {
                let first = (begin / BLOCK_BYTES) as u32;
                let sums = block_checksums(chunk, first, &data[begin..end]);
                assert_eq!(verify_blocks_of(&mut whole, chunk, first, &data[begin..end], &sums), None);
            }
            assert_eq!(whole.value(), crc64(&data[..length]), "{length}");
        }
        assert_eq!(OfBlocks::default().value(), crc64(b""));
    }

    #[test]
    fn a_flipped_bit_or_a_misplaced_block_fails() {
        let chunk = ChunkId::new(7, 3);
        let mut data = vec![1u8; BLOCK_BYTES * 2 + 10];
        data[BLOCK_BYTES] = 9;
        let sums = block_checksums(chunk, 5, &data);
        assert_eq!(sums.len(), 3);
        assert_eq!(verify_blocks(chunk, 5, &data, &sums), None);
        assert_eq!(verify_blocks(chunk, 6, &data, &sums), Some(6), "another place");
        assert_eq!(verify_blocks(ChunkId::new(7, 4), 5, &data, &sums), Some(5), "another chunk");
        assert_eq!(verify_blocks(chunk, 5, &data, &sums[..2]), Some(7), "too few checksums");
        data[BLOCK_BYTES + 1] ^= 0x10;
        assert_eq!(verify_blocks(chunk, 5, &data, &sums), Some(6));
    }
}
