//! Several directories over one store: who lives, who leads, whose sessions are whose, and what may be collected.
//!
//! Each process that serves the store is a *directory* with an id of its own that is never used again: one that was
//! declared dead and finds out joins under another id.
//!
//! ```text
//!            join                            silent dead_ms by another's clock, or it leaves
//!   (none) -------> living --beat, once a second--+ --------------------------------> dead
//!                     ^                           |                                     |
//!                     +---------------------------+     every session of it has another home
//!                                                                                       v
//!                                                                                    (none)
//! ```
//!
//! * A beat requires the directory's record as it was when it joined; to declare it dead requires its beat as it was
//!   seen. Of the two one wins: who was declared dead learns it from its next beat.
//! * No clocks are compared. The one that declares saw a beat unchanged for [`Times::dead_ms`]. The beat was sent before
//!   it was seen, so counted from there its owner relies on it for less ([`Own::is_sure`]): it stopped before.
//! * *The lead* is free when its holder is not among the living ([`claim`]). Whoever is not sure of its own standing
//!   does not lead. What a leader writes about the cluster requires the lead's record unchanged; everything else
//!   that it does is right whoever does it, however late.
//!
//! # Sessions
//!
//! A session has one home, which alone confirms its renewals and expires it, by its own clock. A renewal that reaches
//! another directory moves the home there in a plan that leaves a notice for the one before. The home reads its notices
//! after each beat. So a home that does not know that a session has left confirms renewals for less than
//! `dead_ms` from the move on, and the new home expires none before that has passed beside the TTL
//! ([`Times::moved_ttl_ms`]). From a dead home, which was not sure any more when it was declared dead, it gets its TTL.
//!
//! # What readers need
//!
//! The leader collects no chunk that was dropped behind the lowest *floor* of all beats. Each is at most the oldest
//! revision that a session of that directory reads at ([`Floor`]):
//!
//! * A renewal is confirmed when the floor that stands in the store is not above what it reads at; else a beat with a
//!   lower one is awaited first. While a beat is under way the higher of the two counts.
//! * A session moves when the floor of its new home covers it, and the home before counts it until it learns of the move.
//!   So at every revision of the store some floor covers it.
//! * The floor of a dead directory is 0 until its sessions have another home, where each counts as reading everything
//!   until it was heard or has ended.
//!
//! * Whoever leads collects nothing before it has seen that every session has a home: those of a time when there was one
//!   directory have none.
//!
//! Floors are read together, at one revision, after the age of what may go was decided. A reader that none of them covers
//! has told nobody within the grace time that it reads.

use crate::{
    key,
    plan::{Key, Plan, Precondition},
    record::{Beat, Directory, Lead, Record, Session},
};
use cairn_proto::id::{Revision, SessionId};
use std::collections::{BTreeMap, BTreeSet};

/// How long a silence means what.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// Silence after which others declare a directory dead.
    pub dead_ms: u64,
}

impl Times {
    /// How long a directory relies on a beat, from when it began to send it: less by a fifth, in which its clock
    /// may be slower than others'.
    pub fn sure_ms(self) -> u64 {
        self.dead_ms - self.dead_ms / 5
    }

    /// The time that a session has without renewal when its home has just moved while the one before may live.
    pub fn moved_ttl_ms(self, ttl_ms: u64) -> u64 {
        ttl_ms.saturating_add(self.dead_ms)
    }
}

/// A directory's own standing. Times are milliseconds of its own clock, which only goes forward.
#[derive(Clone, Copy, Debug, Default)]
pub struct Own {
    began_ms: Option<u64>,
}

impl Own {
    /// A beat that was begun then is in the store, and the notices that were there then are read.
    pub fn acknowledged(&mut self, began_ms: u64) {
        self.began_ms = self.began_ms.max(Some(began_ms));
    }

    /// It was declared dead.
    pub fn lost(&mut self) {
        self.began_ms = None;
    }

    /// Whether nobody can have declared it dead yet.
    pub fn is_sure(&self, now_ms: u64, times: Times) -> bool {
        self.began_ms.is_some_and(|began_ms| now_ms.saturating_sub(began_ms) < times.sure_ms())
    }
}

/// What a directory has seen of the beats of others.
#[derive(Clone, Debug, Default)]
pub struct Watched {
    seen: BTreeMap<u64, (Revision, u64)>,
}

impl Watched {
    /// Notes beats that were read before `now_ms`, each with the revision that wrote it; answers the directories that are
    /// to be declared dead.
    pub fn look(&mut self, beats: &BTreeMap<u64, Revision>, now_ms: u64, times: Times) -> Vec<u64> {
        self.seen.retain(|id, _| beats.contains_key(id));
        let mut silent = Vec::new();
        for (id, beat) in beats {
            let (seen, since_ms) = self.seen.entry(*id).or_insert((*beat, now_ms));
            if *seen != *beat {
                (*seen, *since_ms) = (*beat, now_ms);
            } else if now_ms.saturating_sub(*since_ms) >= times.dead_ms {
                silent.push(*id);
            }
        }
        silent
    }
}

/// Who leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// The one that asks.
    Own,
    /// Nobody that lives: it may take the lead, with this term.
    Free(u64),
    /// Another one.
    Other(u64),
}

/// Decides for directory `me` whether it may take the lead.
pub fn claim(lead: Option<&Lead>, me: u64, living: &BTreeSet<u64>) -> Claim {
    match lead {
        Some(lead) if lead.holder == me => Claim::Own,
        Some(lead) if living.contains(&lead.holder) => Claim::Other(lead.holder),
        _ => Claim::Free(lead.map_or(0, |lead| lead.term) + 1),
    }
}

/// What a directory says of the oldest revision that its sessions read at. `promised` is the highest floor that may stand
/// in the store.
#[derive(Clone, Copy, Debug, Default)]
pub struct Floor {
    promised: Revision,
}

impl Floor {
    /// The floor of the next beat: the oldest mark, and no more than a revision that the store has reached, so that who
    /// begins to read now is covered already.
    pub fn send(&mut self, oldest: Option<Revision>, reached: Revision) -> Revision {
        let floor = oldest.map_or(reached, |oldest| oldest.min(reached));
        self.promised = self.promised.max(floor);
        floor
    }

    /// A beat with this floor is in the store, and no other can come behind it.
    pub fn stands(&mut self, floor: Revision) {
        self.promised = floor;
    }

    /// Whether a reader at this revision is covered, whatever becomes of beats under way.
    pub fn covers(&self, mark: Revision) -> bool {
        mark >= self.promised
    }
}

/// Drops up to this revision are needed by no session, as all directories and their beats say at one revision of the
/// store. Without any there are no sessions either.
pub fn unread<'a>(
    directories: impl IntoIterator<Item = (&'a Directory, Option<&'a Beat>)>,
) -> Option<Revision> {
    directories
        .into_iter()
        .map(|(directory, beat)| match beat {
            Some(beat) if !directory.dead => Revision(beat.floor),
            _ => Revision(0),
        })
        .min()
}

/// What a renewal of a session at directory `me` comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Home {
    /// It is the session's home.
    Here,
    /// The home is elsewhere, or nowhere (0), and moves here.
    Elsewhere(u64),
    /// There is no such session, or it has ended.
    Ended,
}

/// Where a session is at home, as its record says.
pub fn home(session: Option<&Session>, me: u64) -> Home {
    match session {
        Some(session) if session.ended => Home::Ended,
        Some(session) if session.home == me => Home::Here,
        Some(session) => Home::Elsewhere(session.home),
        None => Home::Ended,
    }
}

/// Has a directory join in a plan.
pub fn join(plan: &mut Plan, id: u64, directory: &Directory, beat: &Beat) {
    plan.require(Precondition::Absent(key::directory(id)));
    plan.put(key::directory(id), directory.to_bytes());
    plan.put(key::beat(id), beat.to_bytes());
}

/// Requires in a plan that a directory's record, which was read or written at this revision, is as it was: of a living
/// one, that it was not declared dead.
pub fn require_living(plan: &mut Plan, id: u64, joined: Revision) {
    plan.require(Precondition::Unchanged(key::directory(id), Some(joined)));
}

/// A sign of life, in a plan, behind the last one of the same directory: one whose outcome is not known never comes
/// behind a later one.
pub fn beat(plan: &mut Plan, id: u64, joined: Revision, last: Revision, beat: &Beat) {
    require_living(plan, id, joined);
    plan.require(Precondition::Unchanged(key::beat(id), Some(last)));
    plan.put(key::beat(id), beat.to_bytes());
}

/// Declares a directory dead in a plan, whose record and beat are as they were read.
pub fn declare_dead(plan: &mut Plan, id: u64, directory: (&Directory, Revision), beat: Option<Revision>) {
    let (record, read) = directory;
    require_living(plan, id, read);
    plan.require(Precondition::Unchanged(key::beat(id), beat));
    plan.put(key::directory(id), Directory { dead: true, ..record.clone() }.to_bytes());
}

/// Takes the lead in a plan, where it is as it was read.
pub fn take_lead(plan: &mut Plan, me: u64, joined: Revision, term: u64, read: Option<Revision>) {
    require_living(plan, me, joined);
    plan.require(Precondition::Unchanged(key::lead(), read));
    plan.put(key::lead(), Lead { holder: me, term }.to_bytes());
}

/// Makes directory `me`, which joined at a revision, the home of a session in a plan; the home before is told.
pub fn move_home(plan: &mut Plan, id: SessionId, session: (&Session, Revision), me: u64, joined: Revision) {
    take_over(plan, id, session, me, joined);
    tell_home(plan, id, session.0.home, me);
}

/// Makes directory `me`, which joined at a revision, the home of a session whose home is dead or none, in a plan.
pub fn take_over(plan: &mut Plan, id: SessionId, session: (&Session, Revision), me: u64, joined: Revision) {
    let (record, read) = session;
    require_living(plan, me, joined);
    crate::session::require(plan, id, read);
    plan.put(key::session(id), Session { home: me, ..record.clone() }.to_bytes());
}

/// Forgets in a plan a directory that is dead, and has no sessions left.
pub fn forget(plan: &mut Plan, id: u64, read: Revision) {
    require_living(plan, id, read);
    plan.delete(key::directory(id));
    plan.delete(key::beat(id));
}

/// Leaves a notice in a plan for a home that is not the one that writes.
pub fn tell_home(plan: &mut Plan, id: SessionId, home: u64, me: u64) {
    if home != 0 && home != me {
        plan.put(key::notice(home, id), Key::new());
    }
}

#[cfg(test)]
#[path = "directories_tests.rs"]
mod tests;
