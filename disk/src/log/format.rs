//! The bytes of segment and record headers. The layout is drawn in [`crate::log`].

use std::io;

use bytes::{BufMut, BytesMut};
use crc_fast::{CrcAlgorithm, Digest};

use super::Position;

pub(super) const FORMAT_VERSION: u32 = 1;
const SEGMENT_MAGIC: u64 = u64::from_le_bytes(*b"CAIRNLOG");
const RECORD_MAGIC: u32 = u32::from_le_bytes(*b"CRec");

/// Room at the start of a segment; the first record begins behind it.
pub(super) const SEGMENT_HEADER_BYTES: u32 = 4096;
const SEGMENT_COPY_BYTES: usize = 64;
/// The header is written twice, in different sectors: one rotten bit does not cost a segment.
const SEGMENT_COPY_AT: [usize; 2] = [0, 2048];

pub(super) const RECORD_HEADER_BYTES: u32 = 72;
/// What the header's checksum covers.
const RECORD_SUMMED_BYTES: usize = 56;
/// Where a record's state word lies in its header.
pub(super) const STATE_AT: u32 = 64;
pub(super) const ALIGN_BYTES: u32 = 8;

/// The log's own record; never shown to a caller.
pub(super) const FLAG_INTERNAL: u8 = 1;

const STATE_ALIVE: u64 = 0;
/// A dead record's state word is this and its header's checksum, so that no single bad bit and no rest of an
/// older record can look like it.
const STATE_DEAD_MASK: u64 = 0xdead_5eed_0ff5_e75a;

/// Names one life of one segment of one log: what a record's checksums are seeded with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SegmentId {
    pub(super) log_id: u128,
    pub(super) number: u32,
    pub(super) life: u64,
}

/// What the bytes at the start of a segment say.
#[derive(Debug)]
pub(super) enum SegmentHeader {
    /// A header of this version. `whole` is false if one of the two copies is bad.
    Known { id: SegmentId, whole: bool },
    /// An intact header of a version that this code does not know.
    Newer(u32),
    /// No intact copy.
    Bad,
}

pub(super) fn encode_segment_header(id: SegmentId, segment_bytes: u32) -> BytesMut {
    let mut copy = BytesMut::with_capacity(SEGMENT_COPY_BYTES);
    copy.put_u64_le(SEGMENT_MAGIC);
    copy.put_u32_le(FORMAT_VERSION);
    copy.put_u32_le(id.number);
    copy.put_u128_le(id.log_id);
    copy.put_u64_le(id.life);
    copy.put_u64_le(u64::from(segment_bytes));
    copy.put_u64_le(0);
    let crc = crc(&[&copy]);
    copy.put_u64_le(crc);
    let mut out = BytesMut::zeroed(SEGMENT_HEADER_BYTES as usize);
    for at in SEGMENT_COPY_AT {
        out[at..at + SEGMENT_COPY_BYTES].copy_from_slice(&copy);
    }
    out
}

pub(super) fn decode_segment_header(bytes: &[u8]) -> SegmentHeader {
    let copies = SEGMENT_COPY_AT.map(|at| {
        let copy = bytes.get(at..at + SEGMENT_COPY_BYTES)?;
        let intact = u64_at(copy, 0) == SEGMENT_MAGIC && u64_at(copy, 56) == crc(&[&copy[..56]]);
        intact.then(|| {
            let log_id = u128::from(u64_at(copy, 16)) | u128::from(u64_at(copy, 24)) << 64;
            (u32_at(copy, 8), SegmentId { log_id, number: u32_at(copy, 12), life: u64_at(copy, 32) })
        })
    });
    let Some((version, id)) = copies[0].or(copies[1]) else { return SegmentHeader::Bad };
    if version != FORMAT_VERSION {
        return SegmentHeader::Newer(version);
    }
    SegmentHeader::Known { id, whole: copies[0] == copies[1] }
}

/// A record's header, as read or to be written.
#[derive(Clone, Copy, Debug)]
pub(super) struct RecordHeader {
    pub(super) len: u32,
    pub(super) kind: u8,
    pub(super) flags: u8,
    pub(super) offset: u32,
    pub(super) synced: Position,
    pub(super) tag: u64,
    pub(super) payload_crc: u64,
    pub(super) state: State,
}

/// Whether a record's payload still counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Alive,
    Dead,
    /// Neither: torn or damaged.
    Bad,
}

impl RecordHeader {
    /// Where the next record begins.
    pub(super) fn next(&self) -> u32 {
        self.offset + encoded_len(self.len)
    }

    pub(super) fn payload_at(&self) -> u32 {
        self.offset + RECORD_HEADER_BYTES
    }

    /// Payload and the zeros behind it, which the checksum covers too.
    pub(super) fn padded_len(&self) -> u32 {
        self.len.next_multiple_of(ALIGN_BYTES)
    }

    pub(super) fn is_internal(&self) -> bool {
        self.flags & FLAG_INTERNAL != 0
    }

    pub(super) fn encode(&self, id: SegmentId, out: &mut BytesMut) {
        let start = out.len();
        out.put_u32_le(RECORD_MAGIC);
        out.put_u32_le(self.len);
        out.put_u8(self.kind);
        out.put_u8(self.flags);
        out.put_u16_le(0);
        out.put_u32_le(id.number);
        out.put_u64_le(id.life);
        out.put_u32_le(self.offset);
        out.put_u32_le(self.synced.offset);
        out.put_u32_le(self.synced.segment);
        out.put_u32_le(0);
        out.put_u64_le(self.tag);
        out.put_u64_le(self.payload_crc);
        let crc = crc(&[&id.log_id.to_le_bytes(), &out[start..]]);
        out.put_u64_le(crc);
        out.put_u64_le(STATE_ALIVE);
    }

    /// The header at `offset` of a segment whose records end at `limit` at the latest; `None` if the bytes
    /// are not a header that was written there in this life.
    pub(super) fn decode(bytes: &[u8], id: SegmentId, offset: u32, limit: u32) -> Option<Self> {
        if bytes.len() < RECORD_HEADER_BYTES as usize || u32_at(bytes, 0) != RECORD_MAGIC {
            return None;
        }
        let at_home =
            u32_at(bytes, 12) == id.number && u64_at(bytes, 16) == id.life && u32_at(bytes, 24) == offset;
        let crc = crc(&[&id.log_id.to_le_bytes(), &bytes[..RECORD_SUMMED_BYTES]]);
        if !at_home || u64_at(bytes, 56) != crc {
            return None;
        }
        let state = match u64_at(bytes, STATE_AT as usize) {
            STATE_ALIVE => State::Alive,
            word if word == dead_word(crc) => State::Dead,
            _ => State::Bad,
        };
        let header = Self {
            len: u32_at(bytes, 4),
            kind: bytes[8],
            flags: bytes[9],
            offset,
            synced: Position { segment: u32_at(bytes, 32), offset: u32_at(bytes, 28) },
            tag: u64_at(bytes, 40),
            payload_crc: u64_at(bytes, 48),
            state,
        };
        let end = u64::from(offset) + u64::from(RECORD_HEADER_BYTES) + u64::from(header.len);
        let sane = end.next_multiple_of(u64::from(ALIGN_BYTES)) <= u64::from(limit)
            && header.synced <= Position { segment: id.number, offset };
        sane.then_some(header)
    }
}

/// The state word that makes the record with this header dead.
pub(super) fn dead_word_of(header_bytes: &[u8]) -> io::Result<u64> {
    if header_bytes.len() < RECORD_HEADER_BYTES as usize {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(dead_word(u64_at(header_bytes, 56)))
}

fn dead_word(header_crc: u64) -> u64 {
    // Never the word of a living record.
    (header_crc ^ STATE_DEAD_MASK) | 1
}

/// Bytes that a record with this payload takes in a segment.
pub(super) fn encoded_len(payload_len: u32) -> u32 {
    RECORD_HEADER_BYTES + payload_len.next_multiple_of(ALIGN_BYTES)
}

/// The checksum of a payload (with its padding) at its place.
pub(super) fn payload_crc<'a>(id: SegmentId, offset: u32, parts: impl IntoIterator<Item = &'a [u8]>) -> u64 {
    let mut seed = [0; 32];
    seed[..16].copy_from_slice(&id.log_id.to_le_bytes());
    seed[16..20].copy_from_slice(&id.number.to_le_bytes());
    seed[20..28].copy_from_slice(&id.life.to_le_bytes());
    seed[28..].copy_from_slice(&offset.to_le_bytes());
    let mut digest = Digest::new(CrcAlgorithm::Crc64Nvme);
    digest.update(&seed);
    for part in parts {
        digest.update(part);
    }
    digest.finalize()
}

/// Whether bytes at a record's alignment could begin one; cheap, before [`RecordHeader::decode`].
pub(super) fn looks_like_record(bytes: &[u8]) -> bool {
    bytes.starts_with(&RECORD_MAGIC.to_le_bytes())
}

fn crc(parts: &[&[u8]]) -> u64 {
    let mut digest = Digest::new(CrcAlgorithm::Crc64Nvme);
    for part in parts {
        digest.update(part);
    }
    digest.finalize()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}
