//! Renewals of sessions. Kept in memory at the directory that expires them; the sessions are records.
//!
//! ```text
//!   open ---> living --deadline passed, close, unlock of its lock---> ending --one more TTL---> gone
//!               ^ |                                                     locks, grants end;
//!               +-+ renewal                                             answers are still known
//! ```
//!
//! A session that is ending is never renewed again: the step to `ending` is taken here before the plan that ends it is
//! committed, so that a confirmed renewal is never followed by an expiry that was decided before it. All times are this
//! directory's own monotonic ones; after a start every session of the store begins a full TTL anew.

use crate::store::{KeyRange, MetaStore};
use cairn_core::{
    cluster::directories::Floor,
    key,
    record::{Record, Session},
};
use cairn_proto::{
    Error, Reason, Result,
    id::{Revision, SessionId},
    limits::{GRANTS_PER_SESSION_MAX, LOCKS_PER_SESSION_MAX, SESSION_TTL_MS_DEFAULT, SESSIONS_MAX},
};
use parking_lot::Mutex;
use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};
use tokio::{sync::Notify, time::Instant};

mod homes;
mod queue;
pub use homes::Kept;
pub use queue::{Queues, Turn};

/// Entries read at a time when the sessions are loaded.
const LOAD_PAGE: usize = 1_024;
/// Locks or grants of a session that a directory which shares its store gives before it counts them again.
const COUNTED_FOR: usize = 64;
/// Parts that a span of time is divided into to remember which revisions it began at.
const HISTORY_PARTS: u32 = 64;

/// When each session was last renewed, and the oldest revision it still reads at.
#[derive(Debug, Default)]
pub struct Sessions {
    table: Mutex<Table>,
    /// Rings when a session comes, goes or begins to end: the expiry loop looks again.
    changed: Notify,
    /// Who waits for which lock.
    pub queues: Queues,
}

#[derive(Debug, Default)]
struct Table {
    living: HashMap<SessionId, Living>,
    /// Sessions whose locks and grants are being ended, and until when their answers are kept.
    ending: HashMap<SessionId, Ending>,
    /// What others on the same store are told of what is read here; `None` where this directory is the only one.
    shared: Option<Floor>,
    /// Sessions whose home is elsewhere.
    elsewhere: usize,
}

#[derive(Clone, Copy, Debug)]
struct Living {
    ttl: Duration,
    deadline: Instant,
    reads: Reads,
    /// At least as many as it has: counted again when this reaches the limit.
    locks: usize,
    grants: usize,
    /// Plans under way that make this its home.
    arriving: u32,
    /// Whether this is its home; where it is not known, its record is read first.
    here: bool,
}

impl Living {
    /// One whose locks and grants are counted when it takes one.
    fn uncounted(ttl: Duration, deadline: Instant, reads: Reads) -> Self {
        Self { ttl, deadline, reads, locks: usize::MAX, grants: usize::MAX, arriving: 0, here: true }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Reads {
    /// Not heard of since this directory started.
    Unknown,
    Nothing,
    At(Revision),
}

impl Reads {
    /// After a renewal. One that does not tell changes nothing: another call of the same client may have told, and a
    /// client that was not heard of since the start may still read what it told before.
    fn renewed(self, oldest: Option<Revision>) -> Self {
        match oldest {
            None => self,
            Some(Revision(0)) => Self::Nothing,
            Some(revision) => Self::At(revision),
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Ending {
    ttl: Duration,
    /// When its answers go; unknown until locks and grants are gone.
    forgotten_at: Option<Instant>,
}

/// What a session holds a bounded number of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Possession {
    /// Locks.
    Lock,
    /// Open grants.
    Grant,
}

impl Possession {
    /// The most of one session.
    pub fn most(self) -> usize {
        match self {
            Self::Lock => LOCKS_PER_SESSION_MAX,
            Self::Grant => GRANTS_PER_SESSION_MAX,
        }
    }

    /// What a count is taken for. On a shared store others give some out, too: it is counted again soon.
    fn counted_as(self, number: usize, shared: bool) -> usize {
        if shared { number.max(self.most().saturating_sub(COUNTED_FOR)) } else { number }
    }
}

impl Sessions {
    /// Takes all sessions of a store in; each has a full TTL from now.
    ///
    /// # Errors
    /// As the store, and for a damaged record.
    pub async fn load(&self, store: &dyn MetaStore) -> Result<()> {
        let mut range = KeyRange::prefix(key::sessions());
        loop {
            let (_, page) = store.scan(range.clone(), LOAD_PAGE, None).await?;
            let now = Instant::now();
            for (key, versioned) in &page.entries {
                let session = Session::from_bytes(&versioned.value)?;
                let Some(id) = key::last_u64(key).map(SessionId) else { continue };
                let ttl = Duration::from_millis(session.ttl_ms);
                let mut table = self.table.lock();
                if session.ended {
                    table.ending.entry(id).or_insert(Ending { ttl, forgotten_at: None });
                } else {
                    table.living.entry(id).or_insert(Living::uncounted(ttl, now + ttl, Reads::Unknown));
                }
            }
            match page.entries.last() {
                Some((last, _)) if page.more => range = range.behind(last.clone()),
                _ => break,
            }
        }
        self.changed.notify_waiters();
        Ok(())
    }

    /// Whether one more session may be opened.
    ///
    /// # Errors
    /// `LIMIT_EXCEEDED`.
    pub fn admit(&self) -> Result<()> {
        let table = self.table.lock();
        if table.living.len() + table.ending.len() + table.elsewhere >= SESSIONS_MAX {
            return Err(Error::limit(format!(
                "{SESSIONS_MAX} sessions are open, which is the most: close some"
            )));
        }
        Ok(())
    }

    /// A session was opened. Told again (a repeated answer), it changes nothing.
    pub fn opened(&self, id: SessionId, ttl_ms: u64) {
        let ttl = Duration::from_millis(ttl_ms);
        let mut table = self.table.lock();
        let shared = table.shared.is_some();
        if !table.ending.contains_key(&id) {
            table.living.entry(id).or_insert(Living {
                ttl,
                deadline: Instant::now() + ttl,
                reads: Reads::Nothing,
                locks: Possession::Lock.counted_as(0, shared),
                grants: Possession::Grant.counted_as(0, shared),
                arriving: 0,
                here: true,
            });
        }
        drop(table);
        self.changed.notify_waiters();
    }

    /// A session that was never written after all is as if it had not been opened.
    pub fn withdraw(&self, id: SessionId) {
        self.table.lock().living.remove(&id);
    }

    /// Renews a session; answers its TTL in milliseconds. `oldest` is the oldest revision it still reads at, 0 for
    /// none, `None` when the caller does not tell: then what was told last holds.
    ///
    /// # Errors
    /// `SESSION_EXPIRED`.
    pub fn renew(&self, id: SessionId, oldest: Option<Revision>) -> Result<u64> {
        let mut table = self.table.lock();
        let now = Instant::now();
        let living =
            table.living.get_mut(&id).filter(|living| now < living.deadline).ok_or_else(|| expired(id))?;
        living.deadline = now + living.ttl;
        living.reads = living.reads.renewed(oldest);
        Ok(living.ttl.as_millis() as u64)
    }

    /// Whether a session lives, as far as this directory knows: of one whose home is elsewhere its record tells.
    ///
    /// # Errors
    /// `SESSION_EXPIRED`.
    pub fn check(&self, id: SessionId) -> Result<()> {
        let table = self.table.lock();
        match table.living.get(&id) {
            Some(living) if !living.here || Instant::now() < living.deadline => Ok(()),
            // Its record tells.
            None if table.shared.is_some() && !table.ending.contains_key(&id) => Ok(()),
            _ => Err(expired(id)),
        }
    }

    /// Time until a session ends unless renewed; 0 for one that has ended. Of one whose home is elsewhere only that knows:
    /// as long as sessions live by default.
    pub fn expires_in_ms(&self, id: SessionId) -> u64 {
        let table = self.table.lock();
        match table.living.get(&id) {
            Some(living) => living.deadline.saturating_duration_since(Instant::now()).as_millis() as u64,
            None if table.shared.is_some() && !table.ending.contains_key(&id) => SESSION_TTL_MS_DEFAULT,
            None => 0,
        }
    }

    /// Number of living sessions.
    pub fn count(&self) -> usize {
        self.table.lock().living.len()
    }

    /// Notes that a session takes one more of something. `false`: it may have reached the limit; count and tell with
    /// [`Sessions::counted`].
    pub fn take(&self, id: SessionId, what: Possession) -> bool {
        let mut table = self.table.lock();
        let shared = table.shared.is_some();
        // Of one whose home is elsewhere nothing is counted here.
        let Some(living) = table.living.get_mut(&id) else { return !shared };
        let count = match what {
            Possession::Lock => &mut living.locks,
            Possession::Grant => &mut living.grants,
        };
        if *count >= what.most() {
            return false;
        }
        *count += 1;
        true
    }

    /// How many of something a session really has.
    pub fn counted(&self, id: SessionId, what: Possession, number: usize) {
        let mut table = self.table.lock();
        let number = what.counted_as(number, table.shared.is_some());
        if let Some(living) = table.living.get_mut(&id) {
            match what {
                Possession::Lock => living.locks = number,
                Possession::Grant => living.grants = number,
            }
        }
    }

    /// Begins the end of a session, whoever asked for it. From here on it is not renewed.
    pub fn begin_end(&self, id: SessionId) {
        let mut table = self.table.lock();
        if let Some(living) = table.living.remove(&id) {
            table.ending.insert(id, Ending { ttl: living.ttl, forgotten_at: None });
        }
        drop(table);
        self.changed.notify_waiters();
    }

    /// Begins the end of all sessions whose deadline passed, and answers all whose locks and grants are still to end.
    pub fn due(&self) -> Vec<SessionId> {
        let now = Instant::now();
        let mut table = self.table.lock();
        let Table { living, ending, .. } = &mut *table;
        living.retain(|id, session| {
            let lives = now < session.deadline || session.arriving > 0;
            if !lives {
                ending.insert(*id, Ending { ttl: session.ttl, forgotten_at: None });
            }
            lives
        });
        let mut due: Vec<_> =
            ending.iter().filter(|(_, ending)| ending.forgotten_at.is_none()).map(|(id, _)| *id).collect();
        due.sort_unstable();
        due
    }

    /// The locks and grants of a session are ended; its answers are kept for one more TTL.
    pub fn freed(&self, id: SessionId) {
        if let Some(ending) = self.table.lock().ending.get_mut(&id) {
            ending.forgotten_at.get_or_insert(Instant::now() + ending.ttl);
        }
    }

    /// Ended sessions whose answers are no longer kept.
    pub fn forgettable(&self) -> Vec<SessionId> {
        let now = Instant::now();
        let table = self.table.lock();
        let mut ids: Vec<_> = table
            .ending
            .iter()
            .filter(|(_, ending)| ending.forgotten_at.is_some_and(|at| at <= now))
            .map(|(id, _)| *id)
            .collect();
        ids.sort_unstable();
        ids
    }

    /// A session left no trace.
    pub fn forget(&self, id: SessionId) {
        self.table.lock().ending.remove(&id);
    }

    /// When something is next due, if anything ever is.
    pub fn next_due(&self) -> Option<Instant> {
        let table = self.table.lock();
        let living =
            table.living.values().filter(|living| living.arriving == 0).map(|living| living.deadline);
        living.chain(table.ending.values().filter_map(|ending| ending.forgotten_at)).min()
    }

    /// Resolves when a session came, went or began to end. Ask for it before looking at the state.
    pub fn changed(&self) -> tokio::sync::futures::Notified<'_> {
        self.changed.notified()
    }

    /// The oldest revision that any session still reads at: chunks dropped later stay. `None`: nobody reads an old
    /// version. Sessions that were not heard of since the start count as reading everything. The collector bounds the
    /// answer by [`History`] over `reader_hold_max`.
    pub fn oldest_read(&self) -> Option<Revision> {
        let table = self.table.lock();
        table
            .living
            .values()
            .filter_map(|living| match living.reads {
                Reads::Unknown => Some(Revision(0)),
                Reads::Nothing => None,
                Reads::At(revision) => Some(revision),
            })
            .min()
    }
}

/// `SESSION_EXPIRED`.
pub fn expired(id: SessionId) -> Error {
    Error::new(Reason::SessionExpired, format!("session {id} has ended or never was: open another"))
}

/// Which revision the store was at some time ago, by this directory's monotonic clock. Tells the age of records
/// without a time in them: what was written at or before that revision is at least as old.
#[derive(Debug)]
pub struct History {
    span: Duration,
    samples: VecDeque<(Instant, Revision)>,
}

impl History {
    /// Remembers about this long.
    pub fn new(span: Duration) -> Self {
        Self { span, samples: VecDeque::new() }
    }

    /// Notes the store's current revision.
    pub fn note(&mut self, revision: Revision) {
        let now = Instant::now();
        let dense = self.samples.back().is_some_and(|(at, _)| now - *at < self.span / HISTORY_PARTS);
        if !dense {
            self.samples.push_back((now, revision));
        }
        // The first sample is the newest that is old enough.
        while self.samples.get(1).is_some_and(|(at, _)| now - *at >= self.span) {
            self.samples.pop_front();
        }
    }

    /// The newest noted revision that is at least the span old.
    pub fn then(&self) -> Option<Revision> {
        let (at, revision) = self.samples.front()?;
        (at.elapsed() >= self.span).then_some(*revision)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: SessionId = SessionId(5);

    #[tokio::test(start_paused = true)]
    async fn a_session_lives_as_long_as_it_is_renewed() {
        let sessions = Sessions::default();
        sessions.opened(ID, 10_000);
        tokio::time::advance(Duration::from_millis(9_000)).await;
        assert_eq!(sessions.expires_in_ms(ID), 1_000);
        assert_eq!(sessions.renew(ID, None).unwrap(), 10_000);
        tokio::time::advance(Duration::from_millis(9_999)).await;
        assert!(sessions.due().is_empty());
        tokio::time::advance(Duration::from_millis(1)).await;
        assert_eq!(sessions.renew(ID, None).unwrap_err().reason, Reason::SessionExpired);
        assert_eq!(sessions.due(), [ID]);
        sessions.opened(ID, 10_000);
        assert!(sessions.check(ID).is_err(), "an old answer does not bring it back");
        sessions.freed(ID);
        assert!(sessions.due().is_empty() && sessions.forgettable().is_empty());
        tokio::time::advance(Duration::from_millis(10_000)).await;
        assert_eq!(sessions.forgettable(), [ID]);
        sessions.forget(ID);
        assert_eq!(sessions.next_due(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn the_oldest_reader_counts_and_an_unknown_one_reads_everything() {
        let store = crate::store::MemoryStore::new();
        let mut plan = cairn_core::plan::Plan::new();
        plan.put(key::session(ID), Session { ttl_ms: 10_000, ..Session::default() }.to_bytes());
        store.commit(plan).await.unwrap();
        let sessions = Sessions::default();
        sessions.load(&store).await.unwrap();
        assert_eq!(sessions.expires_in_ms(ID), 10_000);
        assert_eq!(sessions.oldest_read(), Some(Revision(0)));
        sessions.opened(SessionId(6), 10_000);
        sessions.renew(SessionId(6), Some(Revision(40))).unwrap();
        sessions.renew(ID, Some(Revision(50))).unwrap();
        assert_eq!(sessions.oldest_read(), Some(Revision(40)));
        sessions.renew(SessionId(6), Some(Revision(0))).unwrap();
        assert_eq!(sessions.oldest_read(), Some(Revision(50)));
        sessions.begin_end(ID);
        assert_eq!(sessions.oldest_read(), None);
    }

    #[test]
    fn a_renewal_that_does_not_tell_leaves_what_is_read() {
        let at = |revision| Reads::At(Revision(revision));
        for reads in [Reads::Unknown, Reads::Nothing, at(7)] {
            assert_eq!(reads.renewed(None), reads);
            assert_eq!(reads.renewed(Some(Revision(0))), Reads::Nothing);
            assert_eq!(reads.renewed(Some(Revision(9))), at(9));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn history_tells_a_revision_that_is_old_enough() {
        let mut history = History::new(Duration::from_secs(640));
        for second in 0..2_000u64 {
            history.note(Revision(second));
            if let Some(Revision(then)) = history.then() {
                assert!(second - then >= 640 && second - then <= 660, "{second} {then}");
            } else {
                assert!(second < 640);
            }
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        assert!(history.samples.len() < 80);
    }
}
