//! Which copies are missing, by what file servers hold.
//!
//! A copy counts from the receipt on, and from then on as the last comparison of its server says. Only what is
//! missing is remembered, and only so many chunks by name ([`GAPS_MAX`]); of the rest the number is known, and the
//! next comparison names some more.

use cairn_proto::{
    id::{ChunkId, GroupId, Revision, ServerId},
    v1,
};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Chunks with missing copies that are remembered by name.
pub const GAPS_MAX: usize = 262_144;
/// Quarantined chunks that are shown.
pub const QUARANTINED_SHOWN: usize = 100;
/// Reports of bad copies that wait for a look.
const SUSPECTS_MAX: usize = 16_384;
/// How far back "of late" goes when the rate of repairs is told.
const RATE_MS: u64 = 10_000;
/// Parts of that which are counted apart.
const RATE_PARTS: u64 = 20;

/// A chunk of which copies are missing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Missing {
    /// Its group.
    pub group: GroupId,
    /// Length in bytes.
    pub length: u64,
    /// Checksum of all bytes.
    pub checksum: u64,
    /// The plan that wrote its record last, where that was looked up; else the highest number.
    pub written: Revision,
    /// Servers that should hold it and do not, with when that was noted, and whether they hold a bad copy.
    pub at: BTreeMap<ServerId, Lack>,
}

/// Why a copy does not count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lack {
    /// When it was noted.
    pub noted_ms: u64,
    /// There is a copy, and it is bad.
    pub corrupt: bool,
    /// Until then it is left to come by itself: the server takes part, and is only late with what it was sent, or fetches
    /// it of its own. Copying it again would make a slow disk slower.
    pub late_until_ms: u64,
    /// The server before it on this seat holds a copy until this one does.
    pub covered: bool,
}

impl Lack {
    /// A copy that is to be made as soon as possible.
    pub fn now(noted_ms: u64, corrupt: bool) -> Self {
        Self { noted_ms, corrupt, late_until_ms: 0, covered: false }
    }
}

/// A seat that is changing hands: until the newcomer has everything, the copies of the server before it count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cover {
    /// Who held the seat, and everything in it.
    former: ServerId,
    /// The plan that gave the seat on: what was committed later the former may lack.
    moved: Revision,
}

/// Bytes a second, of late.
#[derive(Debug, Default)]
pub struct Rate {
    /// Bytes by part of the span, oldest first.
    parts: VecDeque<(u64, u64)>,
}

impl Rate {
    /// Bytes were copied.
    pub fn note(&mut self, now_ms: u64, bytes: u64) {
        let part = now_ms / (RATE_MS / RATE_PARTS);
        match self.parts.back_mut() {
            Some((last, sum)) if *last == part => *sum += bytes,
            _ => self.parts.push_back((part, bytes)),
        }
        self.forget(now_ms);
    }

    fn forget(&mut self, now_ms: u64) {
        let oldest = (now_ms / (RATE_MS / RATE_PARTS)).saturating_sub(RATE_PARTS);
        while self.parts.front().is_some_and(|(part, _)| *part <= oldest) {
            self.parts.pop_front();
        }
    }

    /// What was copied a second.
    pub fn per_second(&self, now_ms: u64) -> u64 {
        let now = now_ms / (RATE_MS / RATE_PARTS);
        let recent = || self.parts.iter().filter(move |(part, _)| part + RATE_PARTS > now);
        let Some((first, _)) = recent().next() else { return 0 };
        // Since the first of them only, so that a repair that has just begun is not told as a slow one.
        let span_ms = (now + 1 - first) * (RATE_MS / RATE_PARTS);
        recent().map(|(_, bytes)| bytes).sum::<u64>() * 1_000 / span_ms
    }
}

/// All missing copies.
#[derive(Debug, Default)]
pub struct Copies {
    gaps: BTreeMap<ChunkId, Missing>,
    /// Number of named gaps by group and server.
    counts: BTreeMap<(GroupId, ServerId), u64>,
    /// Missing copies beyond those named, by group and server, as the last comparison counted them.
    unnamed: BTreeMap<(GroupId, ServerId), u64>,
    /// Members that took a seat and were not compared since, with when they took it.
    newcomers: BTreeMap<(GroupId, ServerId), u64>,
    /// By group and newcomer: whose copies count meanwhile.
    covers: BTreeMap<(GroupId, ServerId), Cover>,
    /// Copies that somebody found bad: the repair loop looks their records up.
    suspects: BTreeSet<(ServerId, ChunkId)>,
    /// Quarantined chunks by server: their number, and some of them.
    quarantined: BTreeMap<ServerId, (u64, Vec<v1::ChunkRef>)>,
    /// Copies made since the start.
    pub made: u64,
    /// Their bytes.
    pub made_bytes: u64,
    /// How fast.
    pub rate: Rate,
    /// Copies that are being made.
    pub running: u64,
    /// Their bytes.
    pub running_bytes: u64,
    /// What a server last said that did not store what it was to fetch, and when.
    pub refusals: BTreeMap<ServerId, (u64, String)>,
    /// Why something cannot be repaired.
    pub obstacles: Vec<String>,
}

impl Copies {
    /// Notes that a server lacks a chunk.
    pub fn lack(&mut self, chunk: ChunkId, like: &Missing, server: ServerId, lack: Lack) {
        if !self.gaps.contains_key(&chunk) && self.gaps.len() >= GAPS_MAX {
            *self.unnamed.entry((like.group, server)).or_default() += 1;
            return;
        }
        let gap = self.gaps.entry(chunk).or_insert_with(|| Missing { at: BTreeMap::new(), ..like.clone() });
        // Who was found to lack it again is covered as before.
        let covered = lack.covered || gap.at.get(&server).is_some_and(|before| before.covered);
        if gap.at.insert(server, Lack { covered, ..lack }).is_none() {
            *self.counts.entry((like.group, server)).or_default() += 1;
        }
    }

    /// Notes that a server said that it lacks a chunk, or was late with it. It is given until `late_until_ms`, counted
    /// from when that was noted first.
    pub fn late(
        &mut self,
        chunk: ChunkId,
        like: &Missing,
        server: ServerId,
        now_ms: u64,
        late_until_ms: u64,
    ) {
        let known = self.gaps.get(&chunk).and_then(|gap| gap.at.get(&server)).copied();
        let lack = match known {
            Some(known) => Lack { noted_ms: now_ms, ..known },
            None => Lack { late_until_ms, ..Lack::now(now_ms, false) },
        };
        self.lack(chunk, like, server, lack);
    }

    /// The server before it on this seat holds the chunk that a newcomer was found to lack.
    pub fn covered(&mut self, chunk: ChunkId, newcomer: ServerId) {
        if let Some(lack) = self.gaps.get_mut(&chunk).and_then(|gap| gap.at.get_mut(&newcomer)) {
            lack.covered = true;
        }
    }

    /// Whether a server is still given time for a chunk that it lacks.
    pub fn is_late(&self, chunk: ChunkId, server: ServerId, now_ms: u64) -> bool {
        let lack = self.gaps.get(&chunk).and_then(|gap| gap.at.get(&server));
        lack.is_some_and(|lack| lack.late_until_ms > now_ms)
    }

    /// A server started anew: nothing is on its way to it any more.
    pub fn started(&mut self, server: ServerId) {
        for lack in self.gaps.values_mut().filter_map(|gap| gap.at.get_mut(&server)) {
            lack.late_until_ms = 0;
        }
    }

    /// Notes that a server holds a good copy.
    pub fn have(&mut self, chunk: ChunkId, server: ServerId) {
        let Some(gap) = self.gaps.get_mut(&chunk) else { return };
        if gap.at.remove(&server).is_some() {
            let group = gap.group;
            if gap.at.is_empty() {
                self.gaps.remove(&chunk);
            }
            self.uncount(group, server);
        }
    }

    fn uncount(&mut self, group: GroupId, server: ServerId) {
        if let Some(count) = self.counts.get_mut(&(group, server)) {
            *count -= 1;
            if *count == 0 {
                self.counts.remove(&(group, server));
            }
        }
    }

    /// Forgets a chunk that no version refers to any more.
    pub fn forget(&mut self, chunk: ChunkId) {
        if let Some(gap) = self.gaps.remove(&chunk) {
            for server in gap.at.into_keys() {
                self.uncount(gap.group, server);
            }
        }
    }

    /// A server got a seat in a group that may have chunks already.
    pub fn newcomer(&mut self, group: GroupId, server: ServerId, now_ms: u64) {
        self.newcomers.insert((group, server), now_ms);
    }

    /// A newcomer's seat was held by a server that had everything when the plan of this revision gave it on.
    pub fn cover(&mut self, group: GroupId, newcomer: ServerId, former: ServerId, moved: Revision) {
        self.covers.insert((group, newcomer), Cover { former, moved });
    }

    /// Whose copies count for those that a newcomer still lacks.
    pub fn covers(&self, group: GroupId, newcomer: ServerId) -> Option<ServerId> {
        self.covers.get(&(group, newcomer)).map(|cover| cover.former)
    }

    /// The plan by which a former member gave a seat on whose copies it still covers.
    pub fn gave_on(&self, group: GroupId, former: ServerId) -> Option<Revision> {
        let of = |((of, _), cover): (&(GroupId, ServerId), &Cover)| {
            (*of == group && cover.former == former).then_some(cover.moved)
        };
        self.covers.iter().find_map(of)
    }

    /// A former member may lack something, or nobody waits for it any more: its copies cover nothing from now on.
    pub fn uncover(&mut self, group: GroupId, former: ServerId) {
        let gone: Vec<ServerId> = self
            .covers
            .iter()
            .filter(|((of, _), cover)| *of == group && cover.former == former)
            .map(|((_, newcomer), _)| *newcomer)
            .collect();
        for newcomer in gone {
            self.covers.remove(&(group, newcomer));
            for gap in self.gaps.values_mut().filter(|gap| gap.group == group) {
                if let Some(lack) = gap.at.get_mut(&newcomer) {
                    lack.covered = false;
                }
            }
        }
    }

    /// A server lost its seat in a group.
    pub fn left(&mut self, group: GroupId, server: ServerId) {
        self.newcomers.remove(&(group, server));
        self.covers.remove(&(group, server));
        self.unnamed.remove(&(group, server));
        let chunks: Vec<ChunkId> = self
            .gaps
            .iter()
            .filter(|(_, gap)| gap.group == group && gap.at.contains_key(&server))
            .map(|(chunk, _)| *chunk)
            .collect();
        for chunk in chunks {
            self.have(chunk, server);
        }
    }

    /// A comparison of a server that began at `begun_ms` ended: what it did not find missing is there. What was noted
    /// since it began stays.
    pub fn compared(
        &mut self,
        server: ServerId,
        begun_ms: u64,
        missing: &BTreeMap<ChunkId, (Missing, bool)>,
        unnamed: BTreeMap<GroupId, u64>,
    ) {
        let healed: Vec<ChunkId> = self
            .gaps
            .iter()
            .filter(|(chunk, gap)| {
                gap.at.get(&server).is_some_and(|lack| lack.noted_ms < begun_ms)
                    && !missing.contains_key(chunk)
            })
            .map(|(chunk, _)| *chunk)
            .collect();
        for chunk in healed {
            self.have(chunk, server);
        }
        self.unnamed.retain(|(_, other), _| *other != server);
        for (group, count) in unnamed {
            self.unnamed.insert((group, server), count);
        }
        for (chunk, (gap, corrupt)) in missing {
            let known = self.gaps.get(chunk).and_then(|gap| gap.at.get(&server));
            let late_until_ms = known.filter(|_| !corrupt).map_or(0, |known| known.late_until_ms);
            let cover = self.covers.get(&(gap.group, server));
            let covered = cover.is_some_and(|cover| gap.written <= cover.moved);
            let lack = Lack { noted_ms: begun_ms, corrupt: *corrupt, late_until_ms, covered };
            self.lack(*chunk, gap, server, lack);
        }
        self.newcomers.retain(|(_, other), since_ms| *other != server || *since_ms >= begun_ms);
    }

    /// Somebody found a copy bad.
    pub fn suspect(&mut self, server: ServerId, chunk: ChunkId) {
        if self.suspects.len() < SUSPECTS_MAX {
            self.suspects.insert((server, chunk));
        }
    }

    /// Takes the reports of bad copies.
    pub fn take_suspects(&mut self) -> Vec<(ServerId, ChunkId)> {
        std::mem::take(&mut self.suspects).into_iter().collect()
    }

    /// What of a server's disk no record explains.
    pub fn set_quarantined(&mut self, server: ServerId, count: u64, some: Vec<v1::ChunkRef>) {
        if count == 0 {
            self.quarantined.remove(&server);
        } else {
            self.quarantined.insert(server, (count, some));
        }
    }

    /// The number of quarantined copies, and some of them.
    pub fn quarantined(&self) -> (u64, Vec<v1::QuarantinedChunk>) {
        let count = self.quarantined.values().map(|(count, _)| count).sum();
        let some = self.quarantined.iter().flat_map(|(server, (_, some))| {
            some.iter().map(|chunk| v1::QuarantinedChunk { chunk: Some(*chunk), server_id: server.0 })
        });
        (count, some.take(QUARANTINED_SHOWN).collect())
    }

    /// Whether a member holds all it should of a group, as far as is known.
    pub fn holds(&self, group: GroupId, server: ServerId) -> bool {
        let key = (group, server);
        !self.counts.contains_key(&key)
            && !self.unnamed.contains_key(&key)
            && !self.newcomers.contains_key(&key)
    }

    /// Whether a member took a seat and was not compared since.
    pub fn is_unverified(&self, group: GroupId, server: ServerId) -> bool {
        self.newcomers.contains_key(&(group, server))
    }

    /// Copies that a server lacks.
    pub fn missing_at(&self, server: ServerId) -> u64 {
        let of = |counts: &BTreeMap<(GroupId, ServerId), u64>| {
            counts.iter().filter(|((_, other), _)| *other == server).map(|(_, count)| count).sum::<u64>()
        };
        of(&self.counts) + of(&self.unnamed)
    }

    /// Copies of a group that a server lacks.
    pub fn missing_in(&self, group: GroupId, server: ServerId) -> u64 {
        let key = (group, server);
        let of = |counts: &BTreeMap<(GroupId, ServerId), u64>| counts.get(&key).copied().unwrap_or_default();
        of(&self.counts) + of(&self.unnamed)
    }

    /// Copies that are missing of named chunks, and their bytes; and the number of those that are not named.
    pub fn missing(&self) -> (u64, u64, u64) {
        let named = self.gaps.values().map(|gap| gap.at.len() as u64).sum();
        let bytes = self.gaps.values().map(|gap| gap.at.len() as u64 * gap.length).sum();
        (named, bytes, self.unnamed.values().sum())
    }

    /// What is known to be missing of a chunk.
    pub fn gap(&self, chunk: ChunkId) -> Option<&Missing> {
        self.gaps.get(&chunk)
    }

    /// All named gaps.
    pub fn gaps(&self) -> impl Iterator<Item = (&ChunkId, &Missing)> {
        self.gaps.iter()
    }

    /// Number of chunks of a group beyond those named of which a copy is missing, at most.
    pub fn unnamed_in(&self, group: GroupId) -> u64 {
        self.unnamed
            .iter()
            .filter(|((other, _), _)| *other == group)
            .map(|(_, count)| *count)
            .max()
            .unwrap_or(0)
    }

    /// Chunks that wait for a copy.
    pub fn waiting(&self) -> u64 {
        self.gaps.len() as u64 + self.unnamed.values().sum::<u64>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn missing(group: u64) -> Missing {
        Missing { group: GroupId(group), length: 4, checksum: 9, written: Revision(5), at: BTreeMap::new() }
    }

    #[test]
    fn a_comparison_heals_what_it_does_not_find_missing_and_keeps_what_came_later() {
        let mut copies = Copies::default();
        let (one, two) = (ChunkId::new(1, 0), ChunkId::new(1, 1));
        let lack = |noted_ms| Lack::now(noted_ms, false);
        copies.lack(one, &missing(7), ServerId(1), lack(10));
        copies.lack(two, &missing(7), ServerId(1), lack(30));
        assert!(!copies.holds(GroupId(7), ServerId(1)));
        copies.compared(ServerId(1), 20, &BTreeMap::new(), BTreeMap::new());
        assert_eq!(copies.gap(one), None);
        assert!(copies.gap(two).is_some(), "noted after the comparison began");
        copies.have(two, ServerId(1));
        assert!(copies.holds(GroupId(7), ServerId(1)));
        assert_eq!(copies.waiting(), 0);
    }

    #[test]
    fn a_late_copy_has_its_time_once_and_none_after_a_start() {
        let (mut copies, chunk, server) = (Copies::default(), ChunkId::new(1, 0), ServerId(1));
        copies.late(chunk, &missing(7), server, 100, 600);
        assert!(copies.is_late(chunk, server, 599) && !copies.is_late(chunk, server, 600));
        assert!(!copies.holds(GroupId(7), server), "late is not there");
        // Asked again, and compared, it is still missing.
        copies.late(chunk, &missing(7), server, 300, 800);
        copies.compared(server, 400, &[(chunk, (missing(7), false))].into(), BTreeMap::new());
        assert!(copies.is_late(chunk, server, 599) && !copies.is_late(chunk, server, 600));
        copies.started(server);
        assert!(!copies.is_late(chunk, server, 500));
        assert_eq!(copies.waiting(), 1);
        copies.late(chunk, &missing(7), server, 500, 1_000);
        copies.compared(server, 510, &[(chunk, (missing(7), true))].into(), BTreeMap::new());
        assert!(!copies.is_late(chunk, server, 511), "a bad copy does not become good by itself");
    }

    #[test]
    fn the_rate_is_that_of_late() {
        let mut rate = Rate::default();
        assert_eq!(rate.per_second(0), 0);
        for second in 0..30 {
            rate.note(second * 1_000, 500);
        }
        let steady = rate.per_second(29_400);
        assert!((400..=600).contains(&steady), "{steady}");
        assert_eq!(rate.per_second(60_000), 0, "nothing was copied of late");
        rate.note(60_000, 700);
        assert_eq!(rate.per_second(60_100), 1_400, "it has just begun");
    }

    #[test]
    fn a_newcomer_holds_nothing_until_it_was_compared() {
        let mut copies = Copies::default();
        copies.newcomer(GroupId(7), ServerId(4), 100);
        assert!(!copies.holds(GroupId(7), ServerId(4)));
        copies.compared(ServerId(4), 90, &BTreeMap::new(), BTreeMap::new());
        assert!(!copies.holds(GroupId(7), ServerId(4)), "that comparison began before it had the seat");
        copies.compared(ServerId(4), 110, &BTreeMap::new(), [(GroupId(7), 3)].into());
        assert!(!copies.holds(GroupId(7), ServerId(4)), "three copies are missing by number");
        assert_eq!(copies.missing_at(ServerId(4)), 3);
        copies.compared(ServerId(4), 120, &BTreeMap::new(), BTreeMap::new());
        assert!(copies.holds(GroupId(7), ServerId(4)));
    }

    #[test]
    fn what_was_there_before_a_seat_moved_is_covered_until_the_former_member_is_found_to_lack_something() {
        let mut copies = Copies::default();
        let (old, new) = (ChunkId::new(1, 0), ChunkId::new(1, 1));
        copies.newcomer(GroupId(7), ServerId(4), 100);
        copies.cover(GroupId(7), ServerId(4), ServerId(1), Revision(5));
        let later = Missing { written: Revision(6), ..missing(7) };
        let found = [(old, (missing(7), false)), (new, (later, false))].into();
        copies.compared(ServerId(4), 110, &found, BTreeMap::new());
        let covered = |copies: &Copies, chunk| copies.gap(chunk).unwrap().at[&ServerId(4)].covered;
        assert!(covered(&copies, old) && !covered(&copies, new));
        copies.lack(old, &missing(7), ServerId(4), Lack::now(120, false));
        assert!(covered(&copies, old), "that it is missing was known");
        copies.uncover(GroupId(7), ServerId(1));
        assert!(!covered(&copies, old));
        assert_eq!(copies.covers(GroupId(7), ServerId(4)), None);
    }
}
