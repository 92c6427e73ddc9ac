//! What is held and where, in memory: 32 bytes a chunk and some 40 a grant.

use super::format::payload_bytes;
use cairn_proto::id::{ChunkId, GrantId, GroupId};
use disk::log::Position;
use std::collections::{BTreeMap, HashMap};
use std::ops::RangeInclusive;

/// What the log adds to a record: its header.
pub(super) const RECORD_OVERHEAD_BYTES: u64 = 72;

/// Where a chunk's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// A record of the log.
    Record(Position),
    /// A file of its own. The number tells the file from another that had its name.
    File(u32),
}

/// One chunk, unpacked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Held {
    pub(super) chunk: ChunkId,
    pub(super) group: GroupId,
    /// 0 if nothing is known but the id; then it is corrupt.
    pub(super) length: u32,
    pub(super) checksum: u64,
    pub(super) corrupt: bool,
    pub(super) computed_here: bool,
    /// When it was last verified, in the store's own units; 0 for never.
    pub(super) verified: u32,
    pub(super) place: Place,
}

/// One chunk, packed.
#[derive(Clone, Copy, Debug)]
struct Entry {
    index: u32,
    /// 27 bits of length, and flags.
    length_flags: u32,
    checksum: u64,
    /// Position in [`Index::groups`].
    group: u32,
    verified: u32,
    place: u64,
}

const CORRUPT: u32 = 1 << 31;
const COMPUTED_HERE: u32 = 1 << 30;
const IN_FILE: u32 = 1 << 29;
const LENGTH: u32 = (1 << 27) - 1;

#[derive(Debug, Default)]
pub(super) struct Index {
    /// Sorted by index. Chunks of a grant mostly come in that order, so an insertion is a push.
    grants: BTreeMap<u64, Vec<Entry>>,
    groups: Vec<u64>,
    group_numbers: HashMap<u64, u32>,
    chunks: u64,
    bytes: u64,
    /// Bytes of records that hold a chunk, by segment. A segment without any is not here.
    live: BTreeMap<u32, u64>,
}

/// Bytes that a chunk takes in a segment.
fn record_bytes(length: u32) -> u64 {
    RECORD_OVERHEAD_BYTES + (payload_bytes(length) as u64).next_multiple_of(8)
}

impl Index {
    pub(super) fn chunks(&self) -> u64 {
        self.chunks
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes of a segment that hold chunks.
    pub(super) fn live_bytes(&self, segment: u32) -> u64 {
        self.live.get(&segment).copied().unwrap_or(0)
    }

    /// The same, of all segments.
    pub(super) fn live(&self) -> &BTreeMap<u32, u64> {
        &self.live
    }

    pub(super) fn get(&self, chunk: ChunkId) -> Option<Held> {
        let entries = self.grants.get(&chunk.grant.0)?;
        let at = entries.binary_search_by_key(&chunk.index, |entry| entry.index).ok()?;
        Some(self.unpack(chunk.grant, &entries[at]))
    }

    /// Inserts or replaces a chunk; returns what it replaced.
    pub(super) fn insert(&mut self, held: Held) -> Option<Held> {
        let entry = self.pack(&held);
        let replaced = self.remove(held.chunk);
        let entries = self.grants.entry(held.chunk.grant.0).or_default();
        match entries.binary_search_by_key(&entry.index, |entry| entry.index) {
            Ok(at) => entries[at] = entry,
            Err(at) => entries.insert(at, entry),
        }
        self.chunks += 1;
        self.bytes += u64::from(held.length);
        if let Place::Record(position) = held.place {
            *self.live.entry(position.segment).or_default() += record_bytes(held.length);
        }
        replaced
    }

    pub(super) fn remove(&mut self, chunk: ChunkId) -> Option<Held> {
        let entries = self.grants.get_mut(&chunk.grant.0)?;
        let at = entries.binary_search_by_key(&chunk.index, |entry| entry.index).ok()?;
        let entry = entries.remove(at);
        if entries.is_empty() {
            self.grants.remove(&chunk.grant.0);
        }
        let held = self.unpack(chunk.grant, &entry);
        self.chunks -= 1;
        self.bytes -= u64::from(held.length);
        if let Place::Record(position) = held.place
            && let Some(live) = self.live.get_mut(&position.segment)
        {
            *live = live.saturating_sub(record_bytes(held.length));
            if *live == 0 {
                self.live.remove(&position.segment);
            }
        }
        Some(held)
    }

    /// Sets what was learnt about a copy, unless the chunk has moved since.
    pub(super) fn judge(&mut self, chunk: ChunkId, place: Place, corrupt: bool, verified: Option<u32>) {
        let Some(held) = self.get(chunk).filter(|held| held.place == place) else { return };
        let verified = verified.unwrap_or(held.verified);
        let entry = self.pack(&Held { corrupt, verified, ..held });
        if let Some(entries) = self.grants.get_mut(&chunk.grant.0)
            && let Ok(at) = entries.binary_search_by_key(&chunk.index, |entry| entry.index)
        {
            entries[at] = entry;
        }
    }

    /// Chunks of the range behind `after`, in order.
    pub(super) fn range(
        &self,
        after: Option<ChunkId>,
        grants: RangeInclusive<GrantId>,
    ) -> impl Iterator<Item = Held> + '_ {
        let (first, last) = (grants.start().0, grants.end().0);
        let first = after.map_or(first, |after| first.max(after.grant.0));
        // An empty range would make the map panic.
        let range = (first <= last).then(|| self.grants.range(first..=last));
        range.into_iter().flatten().flat_map(move |(grant, entries)| {
            let skip = match after {
                Some(after) if after.grant.0 == *grant => {
                    entries.partition_point(|entry| entry.index <= after.index)
                }
                _ => 0,
            };
            entries[skip..].iter().map(|entry| self.unpack(GrantId(*grant), entry))
        })
    }

    fn pack(&mut self, held: &Held) -> Entry {
        let next = self.groups.len() as u32;
        let group = *self.group_numbers.entry(held.group.0).or_insert(next);
        if group == next {
            self.groups.push(held.group.0);
        }
        let flag = |on: bool, flag: u32| if on { flag } else { 0 };
        let (in_file, place) = match held.place {
            Place::Record(position) => (false, position.to_u64()),
            Place::File(number) => (true, u64::from(number)),
        };
        Entry {
            index: held.chunk.index,
            length_flags: held.length & LENGTH
                | flag(held.corrupt, CORRUPT)
                | flag(held.computed_here, COMPUTED_HERE)
                | flag(in_file, IN_FILE),
            checksum: held.checksum,
            group,
            verified: held.verified,
            place,
        }
    }

    fn unpack(&self, grant: GrantId, entry: &Entry) -> Held {
        let has = |flag: u32| entry.length_flags & flag != 0;
        let place = if has(IN_FILE) {
            Place::File(entry.place as u32)
        } else {
            Place::Record(Position::from_u64(entry.place))
        };
        Held {
            chunk: ChunkId { grant, index: entry.index },
            group: GroupId(self.groups.get(entry.group as usize).copied().unwrap_or(0)),
            length: entry.length_flags & LENGTH,
            checksum: entry.checksum,
            corrupt: has(CORRUPT),
            computed_here: has(COMPUTED_HERE),
            verified: entry.verified,
            place,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_proto::limits::CHUNK_BYTES_MAX;

    fn held(grant: u64, index: u32) -> Held {
        Held {
            chunk: ChunkId::new(grant, index),
            group: GroupId(grant % 3),
            length: 100,
            checksum: grant ^ u64::from(index),
            corrupt: false,
            computed_here: index == 1,
            verified: 5,
            place: Place::Record(Position { segment: 3, offset: index * 8 }),
        }
    }

    #[test]
    fn entries_are_small_and_come_back() {
        assert_eq!(size_of::<Entry>(), 32);
        let mut index = Index::default();
        for (grant, at) in [(5, 2), (5, 0), (9, 1), (1, 7)] {
            assert_eq!(index.insert(held(grant, at)), None);
            assert_eq!(index.get(ChunkId::new(grant, at)), Some(held(grant, at)));
        }
        let longest = Held { length: CHUNK_BYTES_MAX as u32, place: Place::File(8), ..held(1, 7) };
        assert_eq!(index.insert(longest), Some(held(1, 7)));
        assert_eq!(index.get(longest.chunk), Some(longest));
        assert_eq!((index.chunks(), index.bytes()), (4, 300 + CHUNK_BYTES_MAX));
        assert_eq!(index.live_bytes(3), 3 * (72 + 64 + 8 + 104));
        let ids = |after, range: RangeInclusive<u64>| {
            let range = GrantId(*range.start())..=GrantId(*range.end());
            index.range(after, range).map(|held| held.chunk).collect::<Vec<_>>()
        };
        let all = [(1, 7), (5, 0), (5, 2), (9, 1)].map(|(grant, at)| ChunkId::new(grant, at));
        assert_eq!(ids(None, 0..=u64::MAX), all);
        assert_eq!(ids(Some(all[1]), 0..=8), all[2..3]);
        assert_eq!(ids(Some(all[3]), 0..=8), []);
        index.judge(all[1], Place::File(1), true, None);
        assert!(!index.get(all[1]).unwrap().corrupt, "it was another copy that was judged");
        index.judge(all[1], held(5, 0).place, true, Some(9));
        assert_eq!(index.get(all[1]).unwrap(), Held { corrupt: true, verified: 9, ..held(5, 0) });
        for chunk in all {
            assert!(index.remove(chunk).is_some());
            assert!(index.remove(chunk).is_none());
        }
        assert_eq!((index.chunks(), index.bytes(), index.live().len()), (0, 0, 0));
    }
}
