//! Sessions of one of several directories on a store: those whose home it is, and those that are about to be its own
//! ([`cairn_core::cluster::directories`]).

use super::{Ending, Living, Reads, Sessions, Table};
use cairn_core::cluster::directories::Floor;
use cairn_proto::id::{Revision, SessionId};
use parking_lot::Mutex;
use std::time::Duration;
use tokio::time::Instant;

/// What a renewal found here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// It is renewed, once the directory's floor covers what it reads at, if anything.
    Renewed {
        /// Its TTL.
        ttl_ms: u64,
        /// The oldest revision it reads at; 0 where that is not known.
        mark: Option<Revision>,
    },
    /// It has ended.
    Ended,
    /// Its home is not here, as far as is known: its record tells.
    Elsewhere,
}

impl Reads {
    fn mark(self) -> Option<Revision> {
        match self {
            Self::Unknown => Some(Revision(0)),
            Self::Nothing => None,
            Self::At(revision) => Some(revision),
        }
    }
}

impl Sessions {
    /// For one of several directories on a store.
    pub fn shared() -> Self {
        let table = Table { shared: Some(Floor::default()), ..Table::default() };
        Self { table: Mutex::new(table), ..Self::default() }
    }

    /// Renews a session whose home is here; `oldest` as in [`Sessions::renew`].
    pub fn renew_here(&self, id: SessionId, oldest: Option<Revision>) -> Kept {
        let mut table = self.table.lock();
        if table.ending.contains_key(&id) {
            return Kept::Ended;
        }
        let Some(living) = table.living.get_mut(&id).filter(|living| living.here) else {
            return Kept::Elsewhere;
        };
        let now = Instant::now();
        if now >= living.deadline {
            return Kept::Ended;
        }
        living.deadline = living.deadline.max(now + living.ttl);
        living.reads = living.reads.renewed(oldest);
        Kept::Renewed { ttl_ms: living.ttl.as_millis() as u64, mark: living.reads.mark() }
    }

    /// A plan is about to make this the home of a session: what it reads at is counted from now on. Answers that, or
    /// `None` for a session that reads nothing; to be followed by [`Sessions::arrived`] or [`Sessions::stayed_away`].
    pub fn arriving(&self, id: SessionId, ttl_ms: u64, oldest: Option<Revision>) -> Option<Revision> {
        let ttl = Duration::from_millis(ttl_ms);
        let mut table = self.table.lock();
        let living = table.living.entry(id).or_insert_with(|| {
            let unknown = Living::uncounted(ttl, Instant::now() + ttl, Reads::Unknown);
            Living { here: false, ..unknown }
        });
        living.arriving += 1;
        living.reads = living.reads.renewed(oldest);
        living.reads.mark()
    }

    /// This is the home of a session now, which has so long without renewal.
    pub fn arrived(&self, id: SessionId, first_ttl_ms: u64) {
        let until = Instant::now() + Duration::from_millis(first_ttl_ms);
        let mut table = self.table.lock();
        if let Some(living) = table.living.get_mut(&id) {
            living.arriving = living.arriving.saturating_sub(1);
            living.deadline = living.deadline.max(until);
            living.here = true;
        }
        drop(table);
        self.changed.notify_waiters();
    }

    /// A session's home did not come here. Where that is not known, it counts until its time is over, and then its
    /// record tells.
    pub fn stayed_away(&self, id: SessionId, known: bool) {
        let mut table = self.table.lock();
        if let Some(living) = table.living.get_mut(&id) {
            living.arriving = living.arriving.saturating_sub(1);
            if known && !living.here && living.arriving == 0 {
                table.living.remove(&id);
            }
        }
        drop(table);
        self.changed.notify_waiters();
    }

    /// This is the home of a session that has ended and whose answers are still kept.
    pub fn arrived_ended(&self, id: SessionId, ttl_ms: u64) {
        let ending = Ending { ttl: Duration::from_millis(ttl_ms), forgotten_at: None };
        self.table.lock().ending.entry(id).or_insert(ending);
        self.changed.notify_waiters();
    }

    /// A session's home is elsewhere.
    pub fn left(&self, id: SessionId) {
        let mut table = self.table.lock();
        // Where it is about to come back it still counts.
        match table.living.get_mut(&id) {
            Some(living) if living.arriving > 0 => living.here = false,
            _ => drop(table.living.remove(&id)),
        }
        table.ending.remove(&id);
        drop(table);
        self.changed.notify_waiters();
    }

    /// Whether a session is known here as one of this directory's own, or as one that may be.
    pub fn knows(&self, id: SessionId) -> bool {
        let table = self.table.lock();
        table.living.contains_key(&id) || table.ending.contains_key(&id)
    }

    /// This directory was declared dead: others have its sessions.
    pub fn forget_all(&self) {
        let mut table = self.table.lock();
        // What is about to arrive arrives, if at all, at the directory that this one becomes.
        table.living.retain(|_, living| {
            living.here = false;
            living.arriving > 0
        });
        table.ending.clear();
        table.shared = Some(Floor::default());
        drop(table);
        self.changed.notify_waiters();
    }

    /// The floor of a beat that is about to be sent, where the store has reached a revision, and the number of sessions.
    pub fn begin_beat(&self, reached: Revision) -> (Revision, usize) {
        let mut table = self.table.lock();
        let oldest = table.living.values().filter_map(|living| living.reads.mark()).min();
        let number = table.living.len() + table.ending.len();
        let floor = table.shared.get_or_insert_default().send(oldest, reached);
        (floor, number)
    }

    /// A beat with this floor is in the store.
    pub fn beat_stands(&self, floor: Revision) {
        if let Some(shared) = &mut self.table.lock().shared {
            shared.stands(floor);
        }
    }

    /// Whether others know of a reader at this revision.
    pub fn covers(&self, mark: Revision) -> bool {
        self.table.lock().shared.is_none_or(|floor| floor.covers(mark))
    }

    /// How many sessions have their home elsewhere.
    pub fn note_elsewhere(&self, number: u64) {
        self.table.lock().elsewhere = usize::try_from(number).unwrap_or(usize::MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: SessionId = SessionId(5);

    #[tokio::test(start_paused = true)]
    async fn a_session_counts_from_before_it_arrives_until_it_has_left() {
        let sessions = Sessions::shared();
        assert_eq!(sessions.renew_here(ID, None), Kept::Elsewhere);
        assert_eq!(sessions.arriving(ID, 10_000, Some(Revision(40))), Some(Revision(40)));
        assert_eq!(sessions.begin_beat(Revision(90)).0, Revision(40));
        assert_eq!(sessions.renew_here(ID, None), Kept::Elsewhere, "not yet");
        sessions.arrived(ID, 15_000);
        let kept = Kept::Renewed { ttl_ms: 10_000, mark: Some(Revision(40)) };
        assert_eq!(sessions.renew_here(ID, None), kept);
        assert_eq!(sessions.expires_in_ms(ID), 15_000, "the home before may have confirmed a renewal since");
        sessions.left(ID);
        assert_eq!(sessions.begin_beat(Revision(90)).0, Revision(90));
        assert_eq!(sessions.renew_here(ID, None), Kept::Elsewhere);
    }

    #[tokio::test(start_paused = true)]
    async fn two_renewals_that_bring_one_session_do_not_undo_each_other() {
        let sessions = Sessions::shared();
        sessions.arriving(ID, 10_000, Some(Revision(40)));
        sessions.arriving(ID, 10_000, None);
        sessions.stayed_away(ID, true);
        assert_eq!(sessions.begin_beat(Revision(90)).0, Revision(40), "the other is still under way");
        sessions.arrived(ID, 10_000);
        assert!(matches!(sessions.renew_here(ID, None), Kept::Renewed { .. }));
        sessions.forget_all();
        assert_eq!(sessions.renew_here(ID, None), Kept::Elsewhere);
        sessions.arriving(ID, 10_000, Some(Revision(0)));
        sessions.stayed_away(ID, true);
        assert!(!sessions.knows(ID));
    }

    #[tokio::test(start_paused = true)]
    async fn a_session_that_may_have_come_counts_for_its_ttl() {
        let sessions = Sessions::shared();
        sessions.arriving(ID, 10_000, Some(Revision(7)));
        sessions.stayed_away(ID, false);
        assert_eq!(sessions.begin_beat(Revision(90)).0, Revision(7));
        assert_eq!(sessions.renew_here(ID, None), Kept::Elsewhere);
        tokio::time::advance(Duration::from_millis(10_000)).await;
        assert_eq!(sessions.due(), [ID], "its record tells then");
    }
}
