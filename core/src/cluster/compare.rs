//! What a server's inventory tells, held against the records.
//!
//! The order of reading makes the answer exact: first whether the grant is closed, then the server's list, then the
//! records. A chunk of a closed grant that no record knows can never be committed any more. A copy is missing only
//! when the records knew the chunk before the list was made; whoever acts on a missing copy looks again first.

use crate::record;
use cairn_proto::{checksum::digest_term, id::ChunkId};
use std::collections::BTreeMap;

/// What the directory knows of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known {
    /// Length in bytes.
    pub length: u64,
    /// Checksum of all bytes.
    pub checksum: u64,
    /// A version refers to it.
    pub live: bool,
}

/// What a server says that it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// Length in bytes.
    pub length: u64,
    /// Checksum of all bytes.
    pub checksum: u64,
    /// The copy failed its checksum.
    pub corrupt: bool,
}

/// Number of chunks and their sum, as `v1::GrantDigest`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Digest {
    /// Number of chunks.
    pub chunks: u64,
    /// Wrapping sum of their terms.
    pub sum: u64,
}

impl Digest {
    /// Counts a chunk in.
    pub fn add(&mut self, chunk: ChunkId, length: u64, checksum: u64) {
        self.chunks += 1;
        self.sum = self.sum.wrapping_add(digest_term(chunk, length, checksum));
    }
}

/// What a grant is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GrantState {
    /// The directory has no record of it.
    Unknown,
    /// Chunks may still be committed.
    Open,
    /// None will be.
    Closed,
}

/// What a comparison of one grant at one server found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// Live chunks that the server should hold and does not.
    pub missing: Vec<ChunkId>,
    /// Live chunks of which it holds a copy that is bad or disagrees with the record.
    pub corrupt: Vec<ChunkId>,
    /// Live chunks that it holds.
    pub good: Vec<ChunkId>,
    /// Chunks that nothing refers to and nothing ever will: to be collected.
    pub garbage: Vec<ChunkId>,
    /// Chunks of an unknown grant: kept and listed.
    pub quarantined: Vec<ChunkId>,
}

/// Compares. `known` are the chunks that the records have of the grant; `member` tells whether the server should hold
/// them; `waiting` whether a chunk that is no longer live still waits for its collection.
pub fn compare(
    state: GrantState,
    member: bool,
    known: &BTreeMap<ChunkId, Known>,
    held: &BTreeMap<ChunkId, Held>,
    waiting: impl Fn(ChunkId) -> bool,
) -> Findings {
    let mut findings = Findings::default();
    for (chunk, known) in known.iter().filter(|(_, known)| known.live) {
        match held.get(chunk) {
            Some(held) if !held.corrupt && held.length == known.length && held.checksum == known.checksum => {
                findings.good.push(*chunk);
            }
            Some(_) => findings.corrupt.push(*chunk),
            None if member => findings.missing.push(*chunk),
            None => {}
        }
    }
    for chunk in held.keys() {
        match (state, known.get(chunk)) {
            (_, Some(known)) if known.live => {}
            (GrantState::Unknown, None) => findings.quarantined.push(*chunk),
            // The collector takes it when its time has come.
            (_, Some(_)) if waiting(*chunk) => {}
            (_, Some(_)) | (GrantState::Closed, None) => findings.garbage.push(*chunk),
            // Being written.
            (GrantState::Open, None) => {}
        }
    }
    findings
}

/// The chunks of a run, by id.
pub fn chunks_of(first: ChunkId, run: &record::ChunkRun) -> impl Iterator<Item = (ChunkId, Known)> + '_ {
    run.chunks.iter().zip(first.index..).map(move |(chunk, index)| {
        let known = Known { length: chunk.length, checksum: chunk.checksum, live: chunk.live_bytes > 0 };
        (ChunkId { grant: first.grant, index }, known)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn known(live: bool) -> Known {
        Known { length: 10, checksum: 5, live }
    }

    fn held(checksum: u64) -> Held {
        Held { length: 10, checksum, corrupt: false }
    }

    #[test]
    fn missing_corrupt_and_good_copies_are_told_apart() {
        let known: BTreeMap<_, _> = (0..4).map(|index| (ChunkId::new(1, index), known(true))).collect();
        let mut at: BTreeMap<_, _> =
            [(ChunkId::new(1, 0), held(5)), (ChunkId::new(1, 1), held(6)), (ChunkId::new(1, 2), held(5))]
                .into();
        at.get_mut(&ChunkId::new(1, 2)).unwrap().corrupt = true;
        let findings = compare(GrantState::Open, true, &known, &at, |_| false);
        assert_eq!(findings.good, [ChunkId::new(1, 0)]);
        assert_eq!(findings.corrupt, [ChunkId::new(1, 1), ChunkId::new(1, 2)]);
        assert_eq!(findings.missing, [ChunkId::new(1, 3)]);
        let elsewhere = compare(GrantState::Open, false, &known, &at, |_| false);
        assert!(elsewhere.missing.is_empty(), "a server without a seat misses nothing");
    }

    #[test]
    fn only_closed_grants_have_garbage_and_unknown_ones_are_kept() {
        let at: BTreeMap<_, _> = [(ChunkId::new(1, 0), held(5)), (ChunkId::new(1, 1), held(5))].into();
        let dropped: BTreeMap<_, _> = [(ChunkId::new(1, 0), known(false))].into();
        let open = compare(GrantState::Open, true, &dropped, &at, |_| true);
        assert_eq!(open, Findings::default());
        let closed = compare(GrantState::Closed, true, &dropped, &at, |_| true);
        assert_eq!(closed.garbage, [ChunkId::new(1, 1)]);
        let long_dropped = compare(GrantState::Closed, true, &dropped, &at, |_| false);
        assert_eq!(long_dropped.garbage.len(), 2);
        let unknown = compare(GrantState::Unknown, false, &BTreeMap::new(), &at, |_| false);
        assert_eq!((unknown.quarantined.len(), unknown.garbage.len()), (2, 0));
    }

    proptest! {
        #[test]
        fn no_live_chunk_is_ever_garbage(
            live in proptest::collection::vec(proptest::option::of(any::<bool>()), 0..30),
            there in proptest::collection::vec(any::<bool>(), 30),
            state in 0u8..3,
        ) {
            let known: BTreeMap<_, _> = live.iter().enumerate()
                .filter_map(|(index, live)| Some((ChunkId::new(1, index as u32), known((*live)?)))).collect();
            let at: BTreeMap<_, _> = there.iter().enumerate().filter(|(_, there)| **there)
                .map(|(index, _)| (ChunkId::new(1, index as u32), held(5))).collect();
            let state = [GrantState::Unknown, GrantState::Open, GrantState::Closed][state as usize];
            let findings = compare(state, true, &known, &at, |_| false);
            for chunk in findings.garbage.iter().chain(&findings.quarantined) {
                prop_assert!(known.get(chunk).is_none_or(|known| !known.live));
                prop_assert!(at.contains_key(chunk));
            }
            let live = known.values().filter(|known| known.live).count();
            prop_assert_eq!(live, findings.missing.len() + findings.corrupt.len() + findings.good.len());
        }

        #[test]
        fn the_digest_does_not_depend_on_the_order(mut indexes in proptest::collection::vec(any::<u32>(), 0..20)) {
            let digest = |indexes: &[u32]| {
                let mut digest = Digest::default();
                for index in indexes { digest.add(ChunkId::new(3, *index), u64::from(*index), 9); }
                digest
            };
            let before = digest(&indexes);
            indexes.reverse();
            prop_assert_eq!(before, digest(&indexes));
        }
    }
}
