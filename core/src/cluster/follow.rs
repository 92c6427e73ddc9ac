//! Which directory the file servers follow, so that at most one is.
//!
//! A directory's process over a store is a *life*: generation and id of the store, a term that grows with every start,
//! the process, its addresses. Before it serves, it asks the carriers of its journal to follow it, and serves once a
//! quorum of them does and knows of nothing newer:
//!
//! ```text
//!   ask the carriers --> quorum would follow, knows nothing newer -> have them follow, durably -> serve
//!        ^   |   |   \-> somebody knows something newer ----------> rebuild from that
//!        |   |   \-----> somebody knows this term or a higher one -> a higher term, ask again
//!        \---+---------- too few answer, or they hear another ----> wait, saying for whom
//! ```
//!
//! * Two quorums have a server in common, and it follows one life at a time: of two directories on copies of one store
//!   one serves at most.
//! * Every majority that holds an acknowledged and shipped change has a server in common with a quorum: an older copy
//!   of the store finds out before it answers anybody. While the carriers change, that takes a quorum of those before and of
//!   those that follow ([`super::carriers`]).
//! * A generation is bound to the id of the store that was made with it, so a number that was given twice (its first
//!   bearer was lost before a quorum knew it) belongs to one of them only.
//! * Nobody follows before a quorum was asked: a directory that finds out that it is behind has changed nothing.
//! * Whoever follows a life refuses the orders of lower (generation, term).

use super::carriers::Carriers;
use cairn_proto::v1::{DirectoryLife, FollowOutcome, FollowResponse, JournalCopy};
use std::collections::{BTreeMap, BTreeSet};

/// A file server keeps to the directory that it heard so lately, unless the one that asks has taken its address.
pub const HELD_MS: u64 = 5_000;

/// Whether a file server that follows `current`, and heard from it so long ago, follows the one that asks. One that
/// `serves` already has its quorum: only a later one is above it.
pub fn follow(
    current: &DirectoryLife,
    heard_ago_ms: Option<u64>,
    asks: &DirectoryLife,
    serves: bool,
) -> FollowOutcome {
    let (known, asked) = ((current.generation, current.term), (asks.generation, asks.term));
    if serves {
        return if asked < known { FollowOutcome::Newer } else { FollowOutcome::Followed };
    }
    if known == asked && current.incarnation == asks.incarnation && current.store_id == asks.store_id {
        return FollowOutcome::Followed;
    }
    let elsewhere = !current.addresses.is_empty()
        && !asks.addresses.is_empty()
        && !current.addresses.iter().any(|address| asks.addresses.contains(address));
    let other = current.incarnation != asks.incarnation;
    if other && elsewhere && heard_ago_ms.is_some_and(|ago_ms| ago_ms < HELD_MS) {
        return FollowOutcome::Held;
    }
    let same_generation = current.generation == asks.generation;
    if same_generation && !current.store_id.is_empty() && current.store_id != asks.store_id {
        return FollowOutcome::OtherStore;
    }
    if asked <= known { FollowOutcome::Newer } else { FollowOutcome::Followed }
}

/// What a directory does with the answers so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It may answer.
    Serve,
    /// Another start on this store had that term: ask again with a higher one than this.
    Raise(u64),
    /// File servers know a later state than its store has, or another store of its generation.
    Behind(String),
    /// Not yet.
    Wait(String),
}

/// Whether these carriers decide: more than half of them, the first one counting more in a tie.
pub fn is_quorum(carriers: &[u64], of: &BTreeSet<u64>) -> bool {
    let there = carriers.iter().filter(|carrier| of.contains(carrier)).count();
    2 * there > carriers.len()
        || (2 * there == carriers.len() && carriers.first().is_none_or(|first| of.contains(first)))
}

/// The newest (generation, revision) of the directory's store that an answer tells of.
pub fn newest(answer: &FollowResponse) -> (u64, u64) {
    let journals = answer.journals.iter().map(|copy| (copy.generation, copy.durable_revision));
    let current = answer.current.as_ref().map_or(0, |life| life.generation);
    journals
        .chain([(answer.topology_generation, answer.topology_revision), (current, 0)])
        .max()
        .unwrap_or_default()
}

/// Decides for a directory whose store is at `revision`. `answers` are those of `carriers` by server, and reports of
/// other servers without an outcome. `base` is the (generation, revision) that a rebuilt store which never served was made
/// from: the directory before may have lived on meanwhile.
pub fn verdict(
    life: &DirectoryLife,
    revision: u64,
    base: Option<(u64, u64)>,
    carriers: &Carriers,
    answers: &BTreeMap<u64, FollowResponse>,
) -> Verdict {
    for (server, answer) in answers {
        // Who hears another directory may know more than this store because that one is alive.
        if answer.outcome() == FollowOutcome::Held {
            continue;
        }
        if answer.outcome() == FollowOutcome::OtherStore {
            return Verdict::Behind(format!(
                "server {server} follows another store of generation {}",
                life.generation
            ));
        }
        let (generation, known) = newest(answer);
        if (generation, known) > (life.generation, revision) {
            return Verdict::Behind(format!(
                "server {server} knows generation {generation} up to revision {known}, this store is of generation {} \
                 at revision {revision}",
                life.generation
            ));
        }
        let before = |copy: &&JournalCopy| copy.generation < life.generation;
        let before =
            answer.journals.iter().filter(before).map(|copy| (copy.generation, copy.durable_revision)).max();
        if let (Some(base), Some(before)) = (base, before)
            && before > base
        {
            return Verdict::Behind(format!(
                "server {server} carries generation {} up to revision {}, this store was made from generation {} at \
                 revision {} and has not served yet",
                before.0, before.1, base.0, base.1
            ));
        }
    }
    let term = |answer: &FollowResponse| answer.current.as_ref().map_or(0, |current| current.term);
    let newer = answers.values().filter(|answer| answer.outcome() == FollowOutcome::Newer).map(term).max();
    if let Some(term) = newer {
        return Verdict::Raise(term);
    }
    // A copy that cannot be read may have held something newer.
    let unreadable = |answer: &FollowResponse| {
        answer.journals.iter().any(|copy| copy.durable_revision == 0 && copy.generation >= life.generation)
    };
    let follow: BTreeSet<u64> = answers
        .iter()
        .filter(|(_, answer)| answer.outcome() == FollowOutcome::Followed && !unreadable(answer))
        .map(|(server, _)| *server)
        .collect();
    if carriers.is_quorum(&follow) {
        return Verdict::Serve;
    }
    let held = answers.iter().find(|(_, answer)| answer.outcome() == FollowOutcome::Held);
    if let Some((server, answer)) = held {
        let addresses = answer.current.as_ref().map_or_else(String::new, |life| life.addresses.join(", "));
        return Verdict::Wait(format!(
            "server {server} heard another directory of this cluster at {addresses} {} ms ago: two directories must \
             not run on copies of one store; stop one of them",
            answer.heard_ago_ms
        ));
    }
    let all = carriers.all();
    let missing: Vec<String> = all.difference(&follow).map(u64::to_string).collect();
    let of = if carriers.is_changing() { " of those before their change and of those after it" } else { "" };
    Verdict::Wait(format!(
        "{} of the {} carriers of the journal have said that they know nothing newer than this store, more than half\
         {of} are needed; waiting for server {} (ForceRebuild goes on without)",
        follow.len(),
        all.len(),
        missing.join(" or ")
    ))
}

#[cfg(test)]
#[path = "follow_tests.rs"]
mod tests;
