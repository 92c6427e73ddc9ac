//! Metadata stores that show the directory records other than they are.

use crate::plant::Plant;
use async_trait::async_trait;
use cairn_core::{
    key,
    plan::{Key, Mutation, Plan, Versioned},
    record::{Dropped, Grant, Group, Lock, LockHolder, Record},
};
use cairn_proto::{
    Error,
    id::{ROOT_INODE, Revision},
};
use cluster::{Builder, Cluster};
use dir_service::store::{Changes, CommitError, KeyRange, MetaStore, Page};
use parking_lot::Mutex;
use std::{
    collections::HashMap,
    fmt::Debug,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

/// What a forger makes of records.
trait Forge: Debug + Send + Sync + 'static {
    /// Changes a value that the directory is about to read. `fresh`: with nothing else, at no fixed revision.
    fn show(&self, key: &Key, value: &mut Versioned, fresh: bool);

    /// Changes a plan that the directory is about to commit.
    fn commit(&self, _plan: &mut Plan) {}
}

/// A store with a forger before it.
#[derive(Debug)]
struct Forged<F> {
    inner: Arc<dyn MetaStore>,
    forger: Arc<F>,
}

/// A builder of clusters whose directory sees its store through a forger, which stays the same across restarts.
fn forged(forger: impl Forge) -> Builder {
    let forger = Arc::new(forger);
    Cluster::builder().store_wrapper(move |inner| Arc::new(Forged { inner, forger: forger.clone() }))
}

#[async_trait]
impl<F: Forge> MetaStore for Forged<F> {
    async fn get(
        &self,
        keys: &[Key],
        at: Option<Revision>,
    ) -> Result<(Revision, Vec<Option<Versioned>>), Error> {
        let (revision, mut values) = self.inner.get(keys, at).await?;
        for (key, value) in keys.iter().zip(&mut values) {
            if let Some(value) = value {
                self.forger.show(key, value, at.is_none());
            }
        }
        Ok((revision, values))
    }

    async fn scan(
        &self,
        range: KeyRange,
        limit: usize,
        at: Option<Revision>,
    ) -> Result<(Revision, Page), Error> {
        let (revision, mut page) = self.inner.scan(range, limit, at).await?;
        for (key, value) in &mut page.entries {
            self.forger.show(key, value, false);
        }
        Ok((revision, page))
    }

    async fn commit(&self, mut plan: Plan) -> Result<Revision, CommitError> {
        self.forger.commit(&mut plan);
        self.inner.commit(plan).await
    }

    async fn watch(&self, prefix: Key, from: Revision) -> Result<Changes, Error> {
        self.inner.watch(prefix, from).await
    }

    async fn revision(&self) -> Result<Revision, Error> {
        self.inner.revision().await
    }
}

fn decode<R: Record>(value: &Versioned) -> R {
    R::from_bytes(&value.value).expect("a record")
}

/// Locks whose former holders are still among the holders: their tokens are as good as that of the present one.
pub fn stale_locks(plant: Arc<Plant>) -> Builder {
    forged(StaleLocks { plant, known: Mutex::default() })
}

#[derive(Debug)]
struct StaleLocks {
    plant: Arc<Plant>,
    known: Mutex<HashMap<Key, KnownLock>>,
}

#[derive(Debug, Default)]
struct KnownLock {
    all: Vec<LockHolder>,
    present: Vec<LockHolder>,
}

impl Forge for StaleLocks {
    fn show(&self, key: &Key, value: &mut Versioned, _fresh: bool) {
        if !self.plant.is_armed() || !key.starts_with(&key::locks()) {
            return;
        }
        let mut lock: Lock = decode(value);
        lock.settle(value.revision);
        let mut known = self.known.lock();
        let known = known.entry(key.clone()).or_default();
        known.present.clone_from(&lock.holders);
        for holder in &lock.holders {
            if !known.all.contains(holder) {
                known.all.push(holder.clone());
            }
        }
        for former in &known.all {
            if !lock.holders.contains(former) {
                lock.holders.push(former.clone());
                self.plant.strike();
            }
        }
        value.value = lock.to_bytes();
    }

    /// No forgery gets into the store.
    fn commit(&self, plan: &mut Plan) {
        let known = self.known.lock();
        for mutation in &mut plan.mutations {
            let Mutation::Put(key, value) = mutation else { continue };
            let Some(known) = known.get(key) else { continue };
            let mut lock = Lock::from_bytes(value).expect("a lock");
            lock.holders.retain(|holder| !known.all.contains(holder) || known.present.contains(holder));
            *mutation = match lock.holders.is_empty() {
                true => Mutation::Delete(key.clone()),
                false => Mutation::Put(key.clone(), lock.to_bytes()),
            };
        }
    }
}

/// Open grants that read as closed wherever a decision rests on the grant alone, as that of what is garbage does.
pub fn closed_grants(plant: Arc<Plant>) -> Builder {
    forged(ClosedGrants(plant))
}

#[derive(Debug)]
struct ClosedGrants(Arc<Plant>);

impl Forge for ClosedGrants {
    fn show(&self, key: &Key, value: &mut Versioned, fresh: bool) {
        if self.0.is_armed() && fresh && key.starts_with(&key::grants()) {
            let grant: Grant = decode(value);
            if !grant.closed {
                value.value = Grant { closed: true, ..grant }.to_bytes();
                self.0.strike();
            }
        }
    }
}

/// Drops that read as older than any reader: nobody's mark holds them back.
pub fn ancient_drops(plant: Arc<Plant>) -> Builder {
    forged(AncientDrops(plant))
}

#[derive(Debug)]
struct AncientDrops(Arc<Plant>);

impl Forge for AncientDrops {
    fn show(&self, key: &Key, value: &mut Versioned, _fresh: bool) {
        if self.0.is_armed() && key.starts_with(&key::all_dropped()) {
            let dropped: Dropped = decode(value);
            value.value = Dropped { revision: 1, ..dropped }.to_bytes();
            self.0.strike();
        }
    }
}

/// Changes without the answers that belong to them: a repeated request finds none.
pub fn lost_answers(plant: Arc<Plant>) -> Builder {
    forged(LostAnswers(plant))
}

#[derive(Debug)]
struct LostAnswers(Arc<Plant>);

impl Forge for LostAnswers {
    fn show(&self, _key: &Key, _value: &mut Versioned, _fresh: bool) {}

    fn commit(&self, plan: &mut Plan) {
        if self.0.is_armed() {
            let all = plan.mutations.len();
            plan.mutations.retain(|mutation| mutation.key().get(..5) != Some(&b"\0\0\0\0q"[..]));
            (plan.mutations.len()..all).for_each(|_| self.0.strike());
        }
    }
}

/// Groups whose former members still have a seat.
pub fn lasting_members(plant: Arc<Plant>) -> Builder {
    forged(LastingMembers { plant, former: Mutex::default() })
}

#[derive(Debug)]
struct LastingMembers {
    plant: Arc<Plant>,
    /// Also those that the group has forgotten since.
    former: Mutex<HashMap<Key, Vec<u64>>>,
}

impl Forge for LastingMembers {
    fn show(&self, key: &Key, value: &mut Versioned, _fresh: bool) {
        if !self.plant.is_armed() || !key.starts_with(&key::groups()) {
            return;
        }
        let mut group: Group = decode(value);
        let mut former = self.former.lock();
        let former = former.entry(key.clone()).or_default();
        for server in &group.former {
            if !former.contains(server) {
                former.push(*server);
            }
        }
        for server in former {
            if !group.seats.contains(server) {
                group.seats.push(*server);
                self.plant.strike();
            }
        }
        value.value = group.to_bytes();
    }
}

/// Lookups that now and then see the store as it was before the last changes, all at one revision.
pub fn stale_lookups(plant: Arc<Plant>) -> Builder {
    Cluster::builder().store_wrapper(move |inner| {
        Arc::new(StaleLookups { inner, plant: plant.clone(), turns: AtomicU64::new(0) })
    })
}

/// One in so many lookups is stale.
const STALE_ONE_IN: u64 = 4;
/// Plans that it does not see.
const STALE_PLANS: u64 = 2;

#[derive(Debug)]
struct StaleLookups {
    inner: Arc<dyn MetaStore>,
    plant: Arc<Plant>,
    turns: AtomicU64,
}

impl StaleLookups {
    /// What the first read of a walk from the root is shown. Changes read what they require before they walk.
    async fn stale(&self, keys: &[Key]) -> Option<(Revision, Vec<Option<Versioned>>)> {
        let is_walk = keys == [key::inode(ROOT_INODE)];
        let is_due = || self.turns.fetch_add(1, Ordering::Relaxed).is_multiple_of(STALE_ONE_IN);
        if !self.plant.is_armed() || !is_walk || !is_due() {
            return None;
        }
        let before = self.inner.revision().await.ok()?.0.checked_sub(STALE_PLANS)?;
        let (revision, values) = self.inner.get(keys, Some(Revision(before))).await.ok()?;
        values.iter().all(Option::is_some).then_some((revision, values))
    }
}

#[async_trait]
impl MetaStore for StaleLookups {
    async fn get(
        &self,
        keys: &[Key],
        at: Option<Revision>,
    ) -> Result<(Revision, Vec<Option<Versioned>>), Error> {
        if at.is_none()
            && let Some(stale) = self.stale(keys).await
        {
            self.plant.strike();
            return Ok(stale);
        }
        self.inner.get(keys, at).await
    }

    async fn scan(
        &self,
        range: KeyRange,
        limit: usize,
        at: Option<Revision>,
    ) -> Result<(Revision, Page), Error> {
        self.inner.scan(range, limit, at).await
    }

    async fn commit(&self, plan: Plan) -> Result<Revision, CommitError> {
        self.inner.commit(plan).await
    }

    async fn watch(&self, prefix: Key, from: Revision) -> Result<Changes, Error> {
        self.inner.watch(prefix, from).await
    }

    async fn revision(&self) -> Result<Revision, Error> {
        self.inner.revision().await
    }
}
