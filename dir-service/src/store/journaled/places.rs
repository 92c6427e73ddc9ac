//! Where in the journal which revision lies: a sparse map in memory, filled at open and with each batch.

use cairn_proto::id::Revision;
use disk::log::Position;
use std::collections::BTreeMap;

/// Bytes between two remembered places; a reader skips at most about this much.
const STEP_BYTES: u64 = 64 * 1024;

/// Where records lie. Also knows what must not be trimmed.
#[derive(Debug)]
pub(super) struct Places {
    /// The journal holds every plan behind this revision.
    pub(super) after: Revision,
    places: BTreeMap<Revision, Position>,
    /// First revision of each segment.
    segments: BTreeMap<u32, Revision>,
    /// Checkpoints being read: how many need the journal behind which revision.
    holds: BTreeMap<Revision, usize>,
}

impl Places {
    pub(super) fn new(after: Revision) -> Self {
        Self { after, places: BTreeMap::new(), segments: BTreeMap::new(), holds: BTreeMap::new() }
    }

    /// Remembers where a record lies; in order.
    pub(super) fn note(&mut self, revision: Revision, position: Position) {
        let new_segment = !self.segments.contains_key(&position.segment);
        if new_segment {
            self.segments.insert(position.segment, revision);
        }
        let far = self
            .places
            .last_key_value()
            .is_none_or(|(_, last)| position.to_u64() - last.to_u64() >= STEP_BYTES);
        if new_segment || far {
            self.places.insert(revision, position);
        }
    }

    /// A place at or before that of a revision; `None` when that was trimmed or never was.
    pub(super) fn find(&self, revision: Revision) -> Option<Position> {
        if revision <= self.after {
            return None;
        }
        self.places.range(..=revision).next_back().map(|(_, position)| *position)
    }

    /// Holds the journal behind a revision back from being trimmed.
    pub(super) fn hold(&mut self, revision: Revision) {
        *self.holds.entry(revision).or_default() += 1;
    }

    pub(super) fn release(&mut self, revision: Revision) {
        if let Some(count) = self.holds.get_mut(&revision) {
            *count -= 1;
            if *count == 0 {
                self.holds.remove(&revision);
            }
        }
    }

    /// The oldest held revision.
    pub(super) fn held(&self) -> Option<Revision> {
        self.holds.keys().next().copied()
    }

    /// The last segment that begins at or before `needed`: those before it hold nothing from there on.
    pub(super) fn segment_of(&self, needed: Revision) -> Option<(u32, Revision)> {
        let at_or_before = self.segments.iter().rev().find(|(_, first)| **first <= needed);
        at_or_before.map(|(segment, first)| (*segment, *first))
    }

    /// The first revision of a segment.
    pub(super) fn first_of(&self, segment: u32) -> Option<Revision> {
        self.segments.get(&segment).copied()
    }

    /// Forgets what lies before a segment that begins with the plan behind `after`.
    pub(super) fn trim(&mut self, segment: u32, after: Revision) {
        self.after = self.after.max(after);
        self.segments = self.segments.split_off(&segment);
        self.places = self.places.split_off(&Revision(after.0 + 1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_at_or_before_each_kept_revision_is_found() {
        let mut places = Places::new(Revision(10));
        for revision in 11..2_000u64 {
            let at = (revision - 11) as u32;
            places.note(Revision(revision), Position { segment: 1 + at / 500, offset: at % 500 * 1_000 });
        }
        assert_eq!(places.find(Revision(10)), None);
        for revision in 11..2_000 {
            let at = (revision - 11) as u32;
            let exact = Position { segment: 1 + at / 500, offset: at % 500 * 1_000 };
            let found = places.find(Revision(revision)).unwrap();
            assert!(found <= exact && found.segment == exact.segment);
            assert!(exact.offset - found.offset <= STEP_BYTES as u32 + 1_000);
        }
        assert_eq!(places.segment_of(Revision(1_100)), Some((3, Revision(1_011))));
        places.trim(3, Revision(1_010));
        assert_eq!(places.find(Revision(1_010)), None);
        assert_eq!(places.find(Revision(1_011)), Some(Position { segment: 3, offset: 0 }));
        places.hold(Revision(7));
        places.hold(Revision(7));
        places.release(Revision(7));
        assert_eq!(places.held(), Some(Revision(7)));
        places.release(Revision(7));
        assert_eq!(places.held(), None);
    }
}
