//! All records of a directory's store at one revision as a file: what file servers keep, and what a backup is.
//!
//! ```text
//! file    frame(head) frame(entries)* frame(tail)
//! frame   bytes 0..4   kind, little endian: 1 head, 2 entries, 3 tail
//!         bytes 4..8   length of the payload, little endian
//!         bytes 8..16  CRC-64/NVME of bytes 0..8 and the payload, little endian
//!         bytes 16..   payload, protobuf
//! ```
//!
//! The head says what it is, the tail how many entries there are: a file that was cut or lost a frame is found out. Bytes
//! in, parts out: reading and writing is the caller's.

use crate::{Error, Reason, Result, checksum::ChunkChecksum, limits::MESSAGE_BYTES_MAX, v1};
use bytes::Bytes;
use prost::Message;

/// The version that is written and read.
pub const VERSION: u32 = 1;
/// Length of what stands before a payload.
pub const FRAME_BYTES: usize = 16;
/// Longest payload: it holds the entries of one message, which is bounded already.
pub const PAYLOAD_BYTES_MAX: usize = 2 * MESSAGE_BYTES_MAX;

const HEAD: u32 = 1;
const ENTRIES: u32 = 2;
const TAIL: u32 = 3;

/// What a checkpoint is of.
#[derive(Clone, PartialEq, Message)]
pub struct Head {
    /// Of the layout of the file.
    #[prost(uint32, tag = "1")]
    pub version: u32,
    /// The cluster.
    #[prost(string, tag = "2")]
    pub cluster_id: String,
    /// The life of the directory's store.
    #[prost(uint64, tag = "3")]
    pub generation: u64,
    /// The revision at which all entries hold.
    #[prost(uint64, tag = "4")]
    pub revision: u64,
    /// The servers that carry the journal.
    #[prost(uint64, repeated, tag = "5")]
    pub carrier_ids: Vec<u64>,
}

#[derive(Clone, PartialEq, Message)]
struct Entries {
    #[prost(message, repeated, tag = "1")]
    entries: Vec<v1::CheckpointEntry>,
}

/// The end of a checkpoint.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Tail {
    /// Number of all entries.
    #[prost(uint64, tag = "1")]
    pub entry_count: u64,
    /// [`EntrySum::checksum`] of all entries, where the writer knew it.
    #[prost(uint64, optional, tag = "2")]
    pub checksum: Option<u64>,
}

/// A part of a checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub enum Part {
    /// The first.
    Head(Head),
    /// Entries in order of keys.
    Entries(Vec<v1::CheckpointEntry>),
    /// The last.
    Tail(Tail),
}

/// A part as bytes: what stands before the payload, and the payload.
///
/// # Errors
/// `LIMIT_EXCEEDED` for more entries than one frame holds.
pub fn encode(part: Part) -> Result<[Bytes; 2]> {
    let (kind, payload) = match part {
        Part::Head(head) => (HEAD, Head { version: VERSION, ..head }.encode_to_vec()),
        Part::Entries(entries) => (ENTRIES, Entries { entries }.encode_to_vec()),
        Part::Tail(tail) => (TAIL, tail.encode_to_vec()),
    };
    if payload.len() > PAYLOAD_BYTES_MAX {
        return Err(Error::limit(format!("a part of a checkpoint has {} bytes", payload.len())));
    }
    let mut head = Vec::with_capacity(FRAME_BYTES);
    head.extend_from_slice(&kind.to_le_bytes());
    head.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    head.extend_from_slice(&frame_checksum(&head, &payload).to_le_bytes());
    Ok([head.into(), payload.into()])
}

/// Length of the payload behind what stands before it; `None` when that cannot be.
pub fn payload_bytes(head: &[u8]) -> Option<usize> {
    let length = u32::from_le_bytes(head.get(4..8)?.try_into().ok()?) as usize;
    (head.len() == FRAME_BYTES && length <= PAYLOAD_BYTES_MAX).then_some(length)
}

/// The part that a frame holds; `None` when it is damaged.
///
/// # Errors
/// `IO` for a head of another version.
pub fn decode(head: &[u8], payload: Bytes) -> Result<Option<Part>> {
    if payload_bytes(head) != Some(payload.len())
        || frame_checksum(&head[..8], &payload).to_le_bytes() != head[8..16]
    {
        return Ok(None);
    }
    let part = match u32::from_le_bytes([head[0], head[1], head[2], head[3]]) {
        HEAD => Head::decode(payload).ok().map(Part::Head),
        ENTRIES => Entries::decode(payload).ok().map(|entries| Part::Entries(entries.entries)),
        TAIL => Tail::decode(payload).ok().map(Part::Tail),
        _ => None,
    };
    if let Some(Part::Head(head)) = &part
        && head.version != VERSION
    {
        let why = format!("a checkpoint has version {}, this program knows {VERSION}", head.version);
        return Err(Error::new(Reason::Io, why));
    }
    Ok(part)
}

fn frame_checksum(head: &[u8], payload: &[u8]) -> u64 {
    let mut sum = ChunkChecksum::default();
    sum.update(head);
    sum.update(payload);
    sum.value()
}

/// Counts entries and sums them up, in order: the same at the store that sends them and wherever they arrive.
#[derive(Debug, Default)]
pub struct EntrySum {
    count: u64,
    sum: ChunkChecksum,
}

impl EntrySum {
    /// Counts an entry in.
    pub fn add(&mut self, entry: &v1::CheckpointEntry) {
        self.count += 1;
        for bytes in [&entry.key, &entry.value] {
            self.sum.update(&(bytes.len() as u64).to_le_bytes());
            self.sum.update(bytes);
        }
        self.sum.update(&entry.revision.to_le_bytes());
    }

    /// Number of entries.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// CRC-64/NVME of all of them.
    pub fn checksum(&self) -> u64 {
        self.sum.value()
    }

    /// Whether the end of a checkpoint is that of the entries that arrived.
    pub fn is_of(&self, tail: &Tail) -> bool {
        tail.entry_count == self.count && tail.checksum.is_none_or(|checksum| checksum == self.checksum())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_part_comes_back_and_every_flipped_bit_is_found() {
        let entry = v1::CheckpointEntry { key: "k".into(), value: "v".into(), revision: 4 };
        let mut sum = EntrySum::default();
        sum.add(&entry);
        let tail = Tail { entry_count: 1, checksum: Some(sum.checksum()) };
        assert!(sum.is_of(&tail) && !EntrySum::default().is_of(&tail));
        let head = Head {
            version: VERSION,
            cluster_id: "c".into(),
            generation: 2,
            revision: 9,
            carrier_ids: vec![1],
        };
        for part in [Part::Head(head), Part::Entries(vec![entry]), Part::Tail(tail)] {
            let [head, payload] = encode(part.clone()).unwrap();
            assert_eq!(payload_bytes(&head), Some(payload.len()));
            assert_eq!(decode(&head, payload.clone()).unwrap(), Some(part));
            for bit in 0..(head.len() + payload.len()) * 8 {
                let mut bytes = [head.clone(), payload.clone()].concat();
                bytes[bit / 8] ^= 1 << (bit % 8);
                let (head, payload) = bytes.split_at(FRAME_BYTES);
                assert_eq!(decode(head, Bytes::copy_from_slice(payload)).unwrap(), None, "bit {bit}");
            }
        }
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(head in proptest::collection::vec(any::<u8>(), 0..20), payload in proptest::collection::vec(any::<u8>(), 0..60)) {
            let _ = payload_bytes(&head);
            let _ = decode(&head, payload.clone().into());
            // With a checksum that fits.
            let mut fit = [1u8, 0, 0, 0].to_vec();
            fit[0] = head.first().map_or(1, |byte| byte % 5);
            fit.extend_from_slice(&(payload.len() as u32).to_le_bytes());
            let sum = frame_checksum(&fit, &payload);
            fit.extend_from_slice(&sum.to_le_bytes());
            let _ = decode(&fit, payload.into());
        }
    }
}
