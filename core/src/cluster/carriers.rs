//! Who carries the directory's journal: when a change counts as carried, and how one set of carriers follows another.
//!
//! ```text
//!   {now}  -- most of both would take it -->  {now, before}  -- most of both hold the record -->  {now}
//!                                               ^        |
//!                                               +--------+  too few of the new ones answer: others, or back
//! ```
//!
//! The carriers are a record of the store. A directory that begins on a store is confirmed by a quorum of the carriers that
//! *its* store names ([`super::follow`]), so what counts is whom an older state of the store would ask. Between two sets
//! that have too little in common both count, as in Raft's joint consensus:
//!
//! * While a change of the carriers is under way the record names the set `before` as well. What counts as carried is held
//!   by a majority of each, and whoever begins on such a store needs a quorum of each.
//! * Only when the record of the change itself is carried, the next record leaves the set before out. From then on a
//!   majority of the set before holds the change: whoever begins on a state that is older asks a quorum of that set, which
//!   contains one of the majority, and learns that the state is behind.
//! * Until then a new set may give way to another one, or to the set before, which stays the same: whatever record of the
//!   change a store has, its quorum contains one of the set before, and nothing was carried without a majority of that.
//!
//! So each two records of which one may be found while the other is in force have a set in common whose majorities meet its
//! quorums, and by induction nothing carried is passed over, however often carriers change. Any number of them may
//! change at once.
//!
//! While more than half of the carriers do not answer, they can therefore not be changed, and nothing counts as carried.
//! A carrier that an operator gave up (drained, and released as dead) is taken for one that holds everything in the set
//! before: it will not be asked any more. That is the operator's word; should it come back with others of that set, to a
//! directory that lost its store, an older state may be believed.
//!
//! The first set follows none: a store without carriers is served unasked.
//!
//! Copies name the carriers as well, so that a rebuild knows for whom to wait. They name the newer set, and may do so a
//! batch late; what they say is only a first look, as the rebuilt store is confirmed by the record that it contains.

use super::follow::is_quorum;
use crate::record;
use cairn_proto::{id::Revision, limits::JOURNAL_CARRIERS};
use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
};

/// The carriers that a store names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Carriers {
    /// Those that carry from now on.
    pub now: Vec<u64>,
    /// Those before them, while it is not sure that enough of both know of the change.
    pub before: Vec<u64>,
}

/// A file server, as the choice of carriers sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Server {
    /// It is heard, and nobody asked to empty it: it may become a carrier.
    pub able: bool,
    /// It answers.
    pub answers: bool,
    /// It is dead, or to be emptied: its place is for another.
    pub lost: bool,
    /// It is to be emptied, or gone: it leaves also when there is no other.
    pub leaves: bool,
    /// An operator gave it up: it was released.
    pub given_up: bool,
    /// Free on its disk.
    pub free_bytes: u64,
}

/// A server that is not known any more.
const UNKNOWN: Server =
    Server { able: false, answers: false, lost: true, leaves: true, given_up: false, free_bytes: 0 };

impl Carriers {
    /// Those that the settings name.
    pub fn of(settings: &record::Settings) -> Self {
        Self { now: settings.carriers.clone(), before: settings.carriers_before.clone() }
    }

    /// Names them in settings.
    pub fn name_in(self, settings: &mut record::Settings) {
        (settings.carriers, settings.carriers_before) = (self.now, self.before);
    }

    /// All that are named: the journal is sent to them, and they are asked who is followed.
    pub fn all(&self) -> BTreeSet<u64> {
        self.now.iter().chain(&self.before).copied().collect()
    }

    /// Whether a server is one of them.
    pub fn names(&self, server: u64) -> bool {
        self.now.contains(&server) || self.before.contains(&server)
    }

    /// Whether a change of them is under way.
    pub fn is_changing(&self) -> bool {
        !self.before.is_empty()
    }

    /// Whether these decide which directory is followed.
    pub fn is_quorum(&self, of: &BTreeSet<u64>) -> bool {
        is_quorum(&self.now, of) && is_quorum(&self.before, of)
    }

    /// Whether what these hold is carried.
    pub fn is_carried(&self, by: &BTreeSet<u64>, given_up: &BTreeSet<u64>) -> bool {
        is_majority(&self.now, by)
            && (self.before.is_empty() || is_majority(&self.before, &by.union(given_up).copied().collect()))
    }

    /// The newest revision that is carried, by what each carrier holds durably.
    pub fn carried(&self, durable: &BTreeMap<u64, Revision>, given_up: &BTreeSet<u64>) -> Revision {
        let is_carried = |revision: &Revision| {
            let by =
                durable.iter().filter(|(_, held)| *held >= revision).map(|(carrier, _)| *carrier).collect();
            self.is_carried(&by, given_up)
        };
        durable.values().copied().filter(is_carried).max().unwrap_or_default()
    }

    /// The carriers that should be named next, if others. `changed` says that the record which names these is carried.
    pub fn next(&self, servers: &BTreeMap<u64, Server>, changed: bool) -> Option<Self> {
        let of = |which: &dyn Fn(&Server) -> bool| -> BTreeSet<u64> {
            servers.iter().filter(|(_, server)| which(server)).map(|(id, _)| *id).collect()
        };
        let (answer, given_up) = (of(&|server| server.answers), of(&|server| server.given_up));
        if self.is_changing() && changed {
            return Some(Self { now: self.now.clone(), before: Vec::new() });
        }
        let present = if self.is_changing() { &self.before } else { &self.now };
        // What is under way goes on, unless the new ones turn out to be unable to take it.
        if self.is_changing() && is_majority(&self.now, &answer) {
            return None;
        }
        let wanted = wanted(present, servers);
        let before = if wanted == *present { Vec::new() } else { present.clone() };
        let next = Self { now: wanted, before };
        // Not begun before it can be ended: until then a directory that starts again needs a quorum of both.
        (next != *self && !next.now.is_empty() && next.is_carried(&answer, &given_up)).then_some(next)
    }
}

fn is_majority(set: &[u64], of: &BTreeSet<u64>) -> bool {
    2 * set.iter().filter(|carrier| of.contains(carrier)).count() > set.len()
}

/// The carriers that there should be instead of these. One that is lost makes place for a spare server; one that is being
/// emptied, where there is none, for nobody, as long as others carry on.
fn wanted(present: &[u64], servers: &BTreeMap<u64, Server>) -> Vec<u64> {
    let server = |id: &u64| servers.get(id).copied().unwrap_or(UNKNOWN);
    let mut spare: Vec<(u64, u64)> = servers
        .iter()
        .filter(|(id, server)| server.able && !present.contains(id))
        .map(|(id, server)| (*id, server.free_bytes))
        .collect();
    spare.sort_by_key(|(id, free_bytes)| (Reverse(*free_bytes), *id));
    let mut spare = spare.into_iter().map(|(id, _)| id);
    let mut wanted = present.to_vec();
    for place in wanted.iter_mut().filter(|id| server(id).lost) {
        let Some(newcomer) = spare.next() else { break };
        *place = newcomer;
    }
    if wanted.iter().any(|id| !server(id).lost) {
        wanted.retain(|id| !server(id).leaves);
    }
    wanted.extend(spare.take(JOURNAL_CARRIERS.saturating_sub(wanted.len())));
    wanted
}

#[cfg(test)]
#[path = "carriers_tests.rs"]
mod tests;
