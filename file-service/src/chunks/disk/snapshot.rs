//! The index on disk: a shortcut for the next start, never the truth. The layout is drawn in [`super`].

use super::format::{u32_at, u64_at};
use super::index::{Held, Place};
use bytes::{BufMut, BytesMut};
use cairn_proto::{
    checksum::crc64,
    id::{ChunkId, GroupId},
    limits::CHUNK_BYTES_MAX,
};
use disk::log::Position;

/// Its file, in the store's directory.
pub(super) const SNAPSHOT_NAME: &str = "index";
/// A longer one is not read: this is room for some 100 million chunks.
pub(super) const SNAPSHOT_BYTES_MAX: usize = 4 << 30;

const MAGIC: u64 = u64::from_le_bytes(*b"CAIRNIDX");
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 40;
pub(super) const ENTRY_BYTES: usize = 40;
const SUM_BYTES: usize = 8;

const CORRUPT: u32 = 1 << 31;
const COMPUTED_HERE: u32 = 1 << 30;
const IN_FILE: u32 = 1 << 29;
const LENGTH: u32 = (1 << 27) - 1;

/// Builds a snapshot.
#[derive(Debug)]
pub(super) struct Writer {
    bytes: BytesMut,
}

/// A snapshot that was read.
#[derive(Debug)]
pub(super) struct Snapshot {
    /// Everything in the log before it is part of the snapshot.
    pub(super) settled: Position,
    /// Higher than the number of every change before.
    pub(super) next_sequence: u64,
    pub(super) chunks: Vec<Held>,
}

/// What bytes at the place of a snapshot are.
#[derive(Debug)]
pub(super) enum Decoded {
    Snapshot(Snapshot),
    Newer(u32),
    Bad,
}

impl Writer {
    pub(super) fn new(settled: Position, next_sequence: u64, chunks: u64) -> Self {
        let room = HEADER_BYTES + chunks as usize * ENTRY_BYTES + SUM_BYTES;
        let mut bytes = BytesMut::with_capacity(room);
        bytes.put_u64_le(MAGIC);
        bytes.put_u32_le(VERSION);
        bytes.put_u32_le(0);
        bytes.put_u64_le(settled.to_u64());
        bytes.put_u64_le(next_sequence);
        bytes.put_u64_le(0);
        Self { bytes }
    }

    pub(super) fn push(&mut self, held: &Held) {
        let flag = |on: bool, flag: u32| if on { flag } else { 0 };
        let (in_file, place) = match held.place {
            Place::Record(position) => (false, position.to_u64()),
            Place::File(_) => (true, 0),
        };
        self.bytes.put_u64_le(held.chunk.grant.0);
        self.bytes.put_u32_le(held.chunk.index);
        self.bytes.put_u32_le(
            held.length
                | flag(held.corrupt, CORRUPT)
                | flag(held.computed_here, COMPUTED_HERE)
                | flag(in_file, IN_FILE),
        );
        self.bytes.put_u64_le(held.checksum);
        self.bytes.put_u64_le(held.group.0);
        self.bytes.put_u64_le(place);
    }

    pub(super) fn finish(mut self) -> BytesMut {
        let count = (self.bytes.len() - HEADER_BYTES) / ENTRY_BYTES;
        self.bytes[32..40].copy_from_slice(&(count as u64).to_le_bytes());
        let sum = crc64(&self.bytes);
        self.bytes.put_u64_le(sum);
        self.bytes
    }
}

pub(super) fn decode(bytes: &[u8]) -> Decoded {
    if bytes.len() < HEADER_BYTES + SUM_BYTES || u64_at(bytes, 0) != MAGIC {
        return Decoded::Bad;
    }
    let (body, sum) = bytes.split_at(bytes.len() - SUM_BYTES);
    if crc64(body) != u64_at(sum, 0) {
        return Decoded::Bad;
    }
    let version = u32_at(body, 8);
    if version != VERSION {
        return Decoded::Newer(version);
    }
    let entries = body[HEADER_BYTES..].chunks_exact(ENTRY_BYTES);
    if entries.len() as u64 != u64_at(body, 32) || !entries.remainder().is_empty() {
        return Decoded::Bad;
    }
    let mut chunks = Vec::with_capacity(entries.len());
    for entry in entries {
        let length_flags = u32_at(entry, 12);
        let has = |flag: u32| length_flags & flag != 0;
        let held = Held {
            chunk: ChunkId::new(u64_at(entry, 0), u32_at(entry, 8)),
            group: GroupId(u64_at(entry, 24)),
            length: length_flags & LENGTH,
            checksum: u64_at(entry, 16),
            corrupt: has(CORRUPT),
            computed_here: has(COMPUTED_HERE),
            verified: 0,
            place: if has(IN_FILE) {
                Place::File(0)
            } else {
                Place::Record(Position::from_u64(u64_at(entry, 32)))
            },
        };
        if u64::from(held.length) > CHUNK_BYTES_MAX {
            return Decoded::Bad;
        }
        chunks.push(held);
    }
    let settled = Position::from_u64(u64_at(body, 16));
    Decoded::Snapshot(Snapshot { settled, next_sequence: u64_at(body, 24), chunks })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_comes_back_and_no_flipped_bit_passes() {
        let settled = Position { segment: 4, offset: 8192 };
        let chunks: Vec<Held> = (0..5)
            .map(|index| Held {
                chunk: ChunkId::new(8, index),
                group: GroupId(2),
                length: 70_000 * index,
                checksum: 3,
                corrupt: index == 0,
                computed_here: index == 1,
                verified: 0,
                place: if index == 2 { Place::File(0) } else { Place::Record(settled) },
            })
            .collect();
        let mut writer = Writer::new(settled, 77, 5);
        chunks.iter().for_each(|held| writer.push(held));
        let mut bytes = writer.finish();
        let Decoded::Snapshot(snapshot) = decode(&bytes) else { panic!("not a snapshot") };
        assert_eq!((snapshot.settled, snapshot.next_sequence), (settled, 77));
        assert_eq!(snapshot.chunks, chunks);
        for bit in 0..bytes.len() * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(matches!(decode(&bytes), Decoded::Bad), "bit {bit}");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
        for len in 0..bytes.len() {
            assert!(matches!(decode(&bytes[..len]), Decoded::Bad), "{len} bytes");
        }
    }
}
