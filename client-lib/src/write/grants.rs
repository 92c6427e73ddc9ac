//! Chunk ids in hand, so that a write need not ask for one: grants of the session, refilled before they are used up.

use crate::{client::Core, directory, write::rows::Rows};
use cairn_proto::{
    Error, Reason, Result,
    convert::required,
    id::{ChunkId, ServerId},
    limits, v1,
};
use parking_lot::Mutex;
use std::{
    collections::{BTreeMap, VecDeque},
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};
use tokio::time::Instant;

/// Grants taken in turn, so that a long file spreads over several groups.
pub(crate) const IN_TURN: usize = 3;
/// Pools of one session: one for each replication factor.
const POOLS_MAX: usize = limits::REPLICATION_MAX as usize + 1;
/// A grant is no longer used for new chunks after this time: the directory closes old ones.
const GRANT_AGE_MAX: Duration = Duration::from_secs(60);
/// The count asked for doubles with each refill up to this.
const COUNT_MAX: u32 = 8_192;

/// Which replication applies to a path, as a grant request says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Placement {
    /// The factor set on the path or above it; 0 when the cluster's applies.
    pub replication: u32,
    /// The path it was found for.
    pub path: String,
}

/// A grant in use.
#[derive(Debug)]
pub(crate) struct Held {
    pub id: u64,
    pub group: v1::Group,
    count: u32,
    next: AtomicU32,
    spoiled: AtomicBool,
    taken_at: Instant,
}

impl Held {
    fn new(grant: v1::Grant) -> Result<Self> {
        Ok(Self {
            id: grant.id,
            group: required(grant.group, "group")?,
            count: grant.count.min(limits::GRANT_COUNT_MAX),
            next: AtomicU32::new(0),
            spoiled: AtomicBool::new(false),
            taken_at: Instant::now(),
        })
    }

    pub fn primary(&self) -> ServerId {
        ServerId(self.group.primary_id)
    }

    /// Takes no further id from it.
    pub fn spoil(&self) {
        self.spoiled.store(true, Ordering::Relaxed);
    }

    fn left(&self) -> u32 {
        if self.spoiled.load(Ordering::Relaxed) || self.taken_at.elapsed() > GRANT_AGE_MAX {
            return 0;
        }
        self.count.saturating_sub(self.next.load(Ordering::Relaxed))
    }

    /// Whether ids of it may still be written under that were set aside at `age` at most.
    pub(crate) fn is_usable(&self, age: Duration) -> bool {
        !self.spoiled.load(Ordering::Relaxed) && self.taken_at.elapsed() <= age
    }

    /// Sets ids in a row aside for one writer: what shares one record of the directory.
    fn take_row(&self) -> Option<Range<u32>> {
        if self.left() == 0 {
            return None;
        }
        let row = |next: u32| {
            let from = next.checked_next_multiple_of(limits::CHUNK_RUN)?;
            (from < self.count).then(|| from..self.count.min(from.saturating_add(limits::CHUNK_RUN)))
        };
        let next = |next| row(next).map(|row| row.end);
        self.next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next).ok().and_then(row)
    }

    fn take(&self) -> Option<u32> {
        if self.left() == 0 {
            return None;
        }
        let index = self.next.fetch_add(1, Ordering::Relaxed);
        (index < self.count).then_some(index)
    }
}

/// A chunk id and where its chunk goes.
#[derive(Clone, Debug)]
pub(crate) struct Slot {
    pub chunk: ChunkId,
    pub grant: Arc<Held>,
}

/// The grants of a session, by replication factor.
#[derive(Debug, Default)]
pub(crate) struct Grants {
    pools: Mutex<BTreeMap<u32, Arc<Pool>>>,
}

#[derive(Debug, Default)]
struct Pool {
    grants: Mutex<VecDeque<Arc<Held>>>,
    asked: AtomicU32,
    /// Held by the one who asks for all; when that failed the last time, and why.
    filling: tokio::sync::Mutex<Option<(Instant, Error)>>,
    refilling: AtomicBool,
}

impl Grants {
    fn pool(&self, replication: u32) -> Arc<Pool> {
        let mut pools = self.pools.lock();
        if pools.len() >= POOLS_MAX && !pools.contains_key(&replication) {
            pools.pop_first();
        }
        pools.entry(replication).or_default().clone()
    }

    /// Whether a chunk could be written without asking for a grant.
    pub fn is_ready(&self, replication: u32) -> bool {
        self.pool(replication).grants.lock().iter().any(|grant| grant.left() > 0)
    }

    /// Takes in a grant that came with a lock.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` when the grant is without a group.
    pub fn add(&self, replication: u32, grant: v1::Grant) -> Result<()> {
        self.pool(replication).grants.lock().push_back(Arc::new(Held::new(grant)?));
        Ok(())
    }
}

impl Pool {
    /// The next id, of each grant in turn, leaving out primaries that are better avoided. With `rows`, out of ids that
    /// are set aside there.
    fn take(&self, avoided: impl Fn(ServerId) -> bool, rows: Option<&Rows>) -> Option<Slot> {
        let mut grants = self.grants.lock();
        grants.retain(|grant| grant.left() > 0);
        for _ in 0..grants.len() {
            let grant = grants.pop_front()?;
            grants.push_back(grant.clone());
            if avoided(grant.primary()) {
                continue;
            }
            if let Some(slot) = Self::take_of(&grant, rows) {
                return Some(slot);
            }
        }
        None
    }

    fn take_of(grant: &Arc<Held>, rows: Option<&Rows>) -> Option<Slot> {
        match rows {
            Some(rows) => Some(rows.add(grant.clone(), grant.take_row()?)),
            None => Some(Slot { chunk: ChunkId::new(grant.id, grant.take()?), grant: grant.clone() }),
        }
    }

    /// Whether more should be asked for before anybody has to wait.
    fn is_low(&self) -> bool {
        let grants = self.grants.lock();
        let left: u32 = grants.iter().map(|grant| grant.left()).sum();
        left < self.asked.load(Ordering::Relaxed) / 4 || (grants.len() < IN_TURN && left < COUNT_MAX)
    }
}

impl Core {
    /// An id to write a chunk under, with a primary outside of `avoid` and of the servers that are away, as far as
    /// the directory knows such a group. Chunks of one long version share `rows`.
    ///
    /// # Errors
    /// As `SessionService.Grant`.
    pub async fn slot(
        self: &Arc<Self>,
        placement: &Placement,
        avoid: &[u64],
        rows: Option<&Rows>,
    ) -> Result<Slot> {
        let session = self.sessions.get().await?;
        let pool = session.grants.pool(placement.replication);
        let avoided = |id: ServerId| avoid.contains(&id.0) || self.servers.is_avoided(id);
        if let Some(slot) = rows.and_then(|rows| rows.take(avoided)) {
            return Ok(slot);
        }
        if let Some(slot) = pool.take(avoided, rows) {
            if pool.is_low() && !pool.refilling.swap(true, Ordering::AcqRel) {
                let (core, placement) = (self.clone(), placement.clone());
                tokio::spawn(async move {
                    let asked = core.ask(&pool, session.id.0, &placement, &[]).await;
                    pool.refilling.store(false, Ordering::Release);
                    match asked {
                        Ok(grant) => pool.grants.lock().push_back(Arc::new(grant)),
                        Err(error) => tracing::debug!(%error, "no grant ahead of need"),
                    }
                });
            }
            return Ok(slot);
        }
        let asked_at = Instant::now();
        let mut failed = pool.filling.lock().await;
        if let Some(slot) = pool.take(avoided, rows) {
            return Ok(slot);
        }
        // Whoever waited for somebody else's question does not wait as long again for one of its own.
        if let Some((_, error)) = failed.as_ref().filter(|(at, _)| *at >= asked_at) {
            return Err(error.clone());
        }
        let grant = match self.ask(&pool, session.id.0, placement, avoid).await {
            Ok(grant) => Arc::new(grant),
            Err(error) => {
                if error.reason == Reason::SessionExpired {
                    session.end();
                }
                *failed = Some((Instant::now(), error.clone()));
                return Err(error);
            }
        };
        let slot = Pool::take_of(&grant, rows).ok_or_else(|| Error::internal("a grant without chunk ids"))?;
        let mut grants = pool.grants.lock();
        grants.push_back(grant);
        // Whatever was pushed out is closed by the directory in time.
        while grants.len() > 4 * IN_TURN {
            grants.pop_front();
        }
        Ok(slot)
    }

    async fn ask(&self, pool: &Pool, session_id: u64, placement: &Placement, avoid: &[u64]) -> Result<Held> {
        let asked = pool.asked.load(Ordering::Relaxed);
        let count = (asked * 2).clamp(limits::GRANT_COUNT_DEFAULT, COUNT_MAX);
        pool.asked.store(count, Ordering::Relaxed);
        let mut avoid_server_ids = self.servers.avoided();
        avoid_server_ids.extend_from_slice(avoid);
        avoid_server_ids.sort_unstable();
        avoid_server_ids.dedup();
        let path = if placement.replication == 0 { String::new() } else { placement.path.clone() };
        let message = v1::GrantRequest { session_id, path, count, avoid_server_ids };
        let answer = self
            .directory
            .call(
                message,
                |channel, request| async move { directory::sessions(channel).grant(request).await },
            )
            .await?;
        let grant = required(answer.grant, "grant")?;
        self.learn(grant.group.as_slice(), &grant.members);
        Held::new(grant)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn grant(id: u64, primary_id: u64, count: u32) -> v1::Grant {
        v1::Grant {
            id,
            count,
            group: Some(v1::Group { id, primary_id, ..Default::default() }),
            ..Default::default()
        }
    }

    #[tokio::test]
    async fn ids_come_from_all_grants_in_turn_and_none_twice() {
        let grants = Grants::default();
        assert!(!grants.is_ready(0));
        grants.add(0, grant(1, 1, 2)).unwrap();
        grants.add(0, grant(2, 2, 2)).unwrap();
        assert!(grants.is_ready(0) && !grants.is_ready(2));
        let pool = grants.pool(0);
        let mut taken: Vec<_> =
            std::iter::from_fn(|| pool.take(|_| false, None)).map(|slot| slot.chunk).collect();
        assert_eq!(taken[..2], [ChunkId::new(1, 0), ChunkId::new(2, 0)]);
        taken.dedup();
        assert_eq!(taken.len(), 4);
        assert!(!grants.is_ready(0));
    }

    #[tokio::test]
    async fn avoided_primaries_and_spoiled_grants_are_left_out() {
        let grants = Grants::default();
        grants.add(0, grant(1, 1, 9)).unwrap();
        grants.add(0, grant(2, 2, 9)).unwrap();
        let pool = grants.pool(0);
        let slot = pool.take(|id| id.0 == 1, None).unwrap();
        assert_eq!(slot.chunk.grant.0, 2);
        slot.grant.spoil();
        assert!(pool.take(|id| id.0 == 1, None).is_none());
        assert_eq!(pool.take(|_| false, None).unwrap().chunk.grant.0, 1);
    }

    #[tokio::test]
    async fn a_long_version_among_small_files_gets_its_ids_in_rows() {
        let grants = Grants::default();
        for id in 1..=3 {
            grants.add(0, grant(id, id, 1_000)).unwrap();
        }
        let pool = grants.pool(0);
        let rows = Rows::default();
        let (mut long, mut small) = (BTreeSet::new(), BTreeSet::new());
        for _ in 0..512 {
            let slot = rows.take(|_| false).or_else(|| pool.take(|_| false, Some(&rows))).unwrap();
            assert!(long.insert(slot.chunk));
            for _ in 0..3 {
                assert!(small.insert(pool.take(|_| false, None).unwrap().chunk));
            }
        }
        assert!(long.is_disjoint(&small), "no id is given twice");
        let records: BTreeSet<_> =
            long.iter().map(|chunk| (chunk.grant, chunk.index / limits::CHUNK_RUN)).collect();
        let in_row = |chunk: &&ChunkId| {
            chunk.index.is_multiple_of(limits::CHUNK_RUN)
                || long.contains(&ChunkId::new(chunk.grant.0, chunk.index - 1))
        };
        assert_eq!(long.iter().filter(in_row).count(), 512, "no gaps");
        assert!(records.len() <= 512 / 64 + IN_TURN, "{} records", records.len());
        assert!(records.iter().map(|(grant, _)| grant).collect::<BTreeSet<_>>().len() > 1, "several groups");
    }

    #[tokio::test]
    async fn rows_of_spoiled_grants_and_avoided_primaries_are_left() {
        let grants = Grants::default();
        grants.add(0, grant(1, 1, 100)).unwrap();
        grants.add(0, grant(2, 2, 100)).unwrap();
        let (pool, rows) = (grants.pool(0), Rows::default());
        let first = pool.take(|_| false, Some(&rows)).unwrap();
        assert_eq!(first.chunk, ChunkId::new(1, 0));
        assert!(rows.take(|id| id.0 == 1).is_none());
        assert_eq!(pool.take(|id| id.0 == 1, Some(&rows)).unwrap().chunk, ChunkId::new(2, 0));
        first.grant.spoil();
        assert_eq!(
            pool.take(|_| false, Some(&rows)).unwrap().chunk,
            ChunkId::new(2, 64),
            "the rest of a grant"
        );
        for _ in 0..64 + 36 - 2 {
            assert_eq!(rows.take_any(|_| false).unwrap().chunk.grant.0, 2);
        }
        assert!(rows.take_any(|_| false).is_none());
        assert!(pool.take(|_| false, Some(&rows)).is_none(), "nothing is left");
    }
}
