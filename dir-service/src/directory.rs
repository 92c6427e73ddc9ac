//! The parts that every operation of a serving directory needs.

use crate::{
    cluster::Cluster,
    config::Config,
    fragments::Fragments,
    ids::Ids,
    membership::Membership,
    ops::{view::View, watch::WatchRoom},
    sessions::Sessions,
    store::{CommitError, JournaledStore, KeyRange, MetaStore, StoreIdentity},
};
use cairn_core::{
    attributes, key,
    lock::{ENDED_ENTRIES_MAX, Place},
    plan::{PLAN_MUTATIONS_MAX, Plan, Precondition},
    record::{self, Counter, Record},
};
use cairn_proto::{Error, Result, host::Host, id::Generation};
use rand::{RngCore as _, SeedableRng as _};
use std::sync::Arc;

/// A serving directory. While it forms or rebuilds there is none.
#[derive(Debug)]
pub struct Directory {
    /// All records.
    pub store: Arc<dyn MetaStore>,
    /// The store's life.
    pub generation: Generation,
    /// The cluster's id, a UUID.
    pub cluster_id: String,
    /// Hands out ids.
    pub ids: Arc<Ids>,
    /// What is known of file servers, groups and copies.
    pub cluster: Cluster,
    /// Renewals of sessions, kept in memory only.
    pub sessions: Sessions,
    /// This directory among others on the same store; none where it has the store to itself.
    pub membership: Option<Arc<Membership>>,
    /// Files that wait for their extents to be merged.
    pub fragments: Fragments,
    /// Times and factors.
    pub config: Config,
    /// Network, wall clock, seed.
    pub host: Host,
    /// The store as a journal with checkpoints, where it is one.
    pub journal: std::sync::OnceLock<Arc<JournaledStore>>,
    /// Backups that may begin now.
    pub(crate) backups: Arc<tokio::sync::Semaphore>,
    /// What the names of watched directories may take.
    pub(crate) watch_room: WatchRoom,
}

/// Ids passed over after a rebuild: more than the lost end of a journal can have given away.
const REBUILT_IDS: u64 = 1 << 32;
/// Epochs passed over likewise, for each generation.
const REBUILT_EPOCHS: u64 = 1_000;
/// Generations up to the next one that a restored backup may have. The number of restores is above this bit.
pub const RESTORED_BIT: u32 = 32;
/// Backups at a time: each holds a view of the index and the end of the journal.
const BACKUPS_MAX: usize = 2;
/// Times that a directory tries to make the cluster of a store that others prepare, too.
const PREPARE_ATTEMPTS: u32 = 8;
/// Records changed by one plan.
const STEP: usize = 64;

impl Directory {
    /// Over a store: prepares it for its generation if that is its first start, then loads what is kept in memory.
    ///
    /// # Errors
    /// The store's.
    pub async fn open(
        store: Arc<dyn MetaStore>,
        cluster_id: String,
        generation: Generation,
        config: Config,
        host: Host,
    ) -> Result<Self> {
        prepare(&store, generation, &host).await?;
        let ids = Arc::new(Ids::new(store.clone()));
        Self::load(store, ids, Sessions::default(), None, (cluster_id, generation), config, host).await
    }

    /// As [`Directory::open`], over a store that other directories use at the same time. The first of them makes the
    /// cluster; each later one joins.
    ///
    /// # Errors
    /// The store's; `LIMIT_EXCEEDED` when as many directories as may share it.
    pub async fn open_shared(
        store: Arc<dyn MetaStore>,
        identity: Option<StoreIdentity>,
        config: Config,
        host: Host,
    ) -> Result<Self> {
        let (cluster_id, generation) = prepare_shared(&store, identity, &host).await?;
        let ids = Arc::new(Ids::new(store.clone()));
        let sessions = Sessions::shared();
        let times = (config.timing.directory_beat_ms, config.timing.directory_dead_ms);
        let addresses = config.advertise.clone();
        let membership = Membership::join(store.clone(), ids.clone(), &sessions, addresses, times).await?;
        let membership = Some(Arc::new(membership));
        Self::load(store, ids, sessions, membership, (cluster_id, generation), config, host).await
    }

    async fn load(
        store: Arc<dyn MetaStore>,
        ids: Arc<Ids>,
        sessions: Sessions,
        membership: Option<Arc<Membership>>,
        (cluster_id, generation): (String, Generation),
        config: Config,
        host: Host,
    ) -> Result<Self> {
        let cluster = Cluster::load(
            store.clone(),
            ids.clone(),
            config.clone(),
            cluster_id.clone(),
            generation,
            membership.clone(),
            &host,
        )
        .await?;
        if membership.is_none() {
            sessions.load(&*store).await?;
        }
        let fragments = Fragments::default();
        let backups = Arc::new(tokio::sync::Semaphore::new(BACKUPS_MAX));
        let journal = std::sync::OnceLock::new();
        Ok(Self {
            store,
            generation,
            cluster_id,
            ids,
            cluster,
            sessions,
            membership,
            fragments,
            config,
            host,
            journal,
            backups,
            watch_room: WatchRoom::default(),
        })
    }

    /// Whether this directory does the background work: the only one on its store does, of several the one that leads.
    pub fn leads(&self) -> bool {
        self.membership.as_ref().is_none_or(|membership| membership.leads().is_some())
    }

    /// Waits until it does.
    pub async fn leading(&self) {
        if let Some(membership) = &self.membership {
            membership.leading().await;
        }
    }

    /// Whether nobody has made a file or directory yet.
    ///
    /// # Errors
    /// The store's.
    pub async fn is_pristine(&self) -> Result<bool> {
        let (_, page) = self.store.scan(KeyRange::prefix(key::inodes()), 2, None).await?;
        Ok(page.entries.len() < 2)
    }
}

/// Makes a store fit for its generation, in steps that may be repeated: the root directory; and after a rebuild, which
/// may miss the last changes, ids and epochs that cannot have been given away already, a mark on grants whose
/// chunks may be of a commit that was lost, and the end of all locks.
pub(crate) async fn prepare(store: &Arc<dyn MetaStore>, generation: Generation, host: &Host) -> Result<()> {
    let view = View::new(store.clone());
    let settings = view.record::<record::Settings>(&key::settings()).await?;
    let known = settings.as_ref().map_or(0, |stored| stored.record.generation);
    if known == generation.0 {
        return Ok(());
    }
    if known > generation.0 {
        return Err(Error::internal(format!(
            "the directory's store is of generation {generation} and holds records of generation {known}: restore it \
             from a backup, or move it away and rebuild it from the file servers"
        )));
    }
    let root = view.get(&key::inode(cairn_proto::id::ROOT_INODE)).await?;
    let rebuilt = root.is_some();
    if rebuilt {
        note_base(store, generation).await?;
        raise_epochs(store, epochs_passed_over(known, generation.0)).await?;
        mark_grants(store).await?;
        end_locks(store).await?;
    }
    let mut plan = Plan::new();
    if rebuilt {
        let counter = key::counter(crate::ids::COUNTER);
        let read = view.get(&counter).await?;
        let next = read
            .as_ref()
            .map(|read| Counter::from_bytes(&read.value))
            .transpose()?
            .map_or(0, |read| read.next);
        plan.require_unchanged(counter.clone(), read.as_ref());
        let next = (next + REBUILT_IDS).max(first_id(generation.0));
        plan.put(counter, Counter { next }.to_bytes());
    } else {
        let inode = attributes::root(generation, host.clock.unix_ns());
        plan.put(key::inode(cairn_proto::id::ROOT_INODE), inode.to_bytes());
    }
    let settings = view_settings(store).await?.unwrap_or_default();
    let store_id = random_id(&mut random_of(host));
    plan.put(key::settings(), record::Settings { generation: generation.0, store_id, ..settings }.to_bytes());
    commit(store, plan).await
}

/// Makes the cluster of a store that is shared, unless another directory has: whose plan comes second takes what is
/// there. Answers the cluster's id and its generation, which are those of the store's own `identity` where it has one.
async fn prepare_shared(
    store: &Arc<dyn MetaStore>,
    identity: Option<StoreIdentity>,
    host: &Host,
) -> Result<(String, Generation)> {
    for _ in 0..PREPARE_ATTEMPTS {
        if let Some(settings) = view_settings(store).await? {
            if settings.cluster_id.is_empty() || settings.generation == 0 {
                return Err(Error::internal(
                    "the shared store has settings and names no cluster: it was not filled by a migration that ended; \
                     empty it and migrate again",
                ));
            }
            if let Some(identity) = identity.as_ref().filter(|identity| {
                (&identity.cluster_id, identity.generation.0) != (&settings.cluster_id, settings.generation)
            }) {
                return Err(Error::internal(format!(
                    "the shared store is of cluster {}, generation {}, and holds records of cluster {}, generation {}: \
                     restore it from a snapshot, or empty it and migrate again",
                    identity.cluster_id, identity.generation, settings.cluster_id, settings.generation
                )));
            }
            return Ok((settings.cluster_id, Generation(settings.generation)));
        }
        let mut random = random_of(host);
        let generation = identity.as_ref().map_or(1, |identity| identity.generation.0);
        let cluster_id = identity.as_ref().map(|identity| identity.cluster_id.clone());
        let settings = record::Settings {
            generation,
            cluster_id: cluster_id.unwrap_or_else(|| random_id(&mut random)),
            store_id: random_id(&mut random),
            ..record::Settings::default()
        };
        let root = key::inode(cairn_proto::id::ROOT_INODE);
        let mut plan = Plan::new();
        plan.require(Precondition::Absent(key::settings()));
        plan.require(Precondition::Absent(root.clone()));
        plan.put(root, attributes::root(Generation(generation), host.clock.unix_ns()).to_bytes());
        plan.put(key::settings(), settings.to_bytes());
        match store.commit(plan).await {
            Ok(_) => {
                tracing::info!(cluster = settings.cluster_id, "formed a new cluster on the shared store")
            }
            Err(CommitError::Conflict | CommitError::Unknown(_)) => {}
            Err(CommitError::Refused(error)) => return Err(error),
        }
    }
    Err(Error::unavailable("the shared store could not be prepared: trying again"))
}

fn random_of(host: &Host) -> rand::rngs::StdRng {
    rand::rngs::StdRng::seed_from_u64(host.seed ^ host.clock.unix_ns())
}

fn random_id(random: &mut rand::rngs::StdRng) -> String {
    let mut bytes = [0; 16];
    random.fill_bytes(&mut bytes);
    uuid::Builder::from_random_bytes(bytes).into_uuid().to_string()
}

async fn view_settings(store: &Arc<dyn MetaStore>) -> Result<Option<record::Settings>> {
    let view = View::new(store.clone());
    Ok(view.record::<record::Settings>(&key::settings()).await?.map(|stored| stored.record))
}

/// The first id of a generation: two lives of a store that began with the same records, one lost before anybody knew of
/// what it gave away, never give the same id. 2^32 ids a generation, 2^16 generations a restore.
fn first_id(generation: u64) -> u64 {
    ((generation >> RESTORED_BIT) << 48) | ((generation & 0xffff) << 32)
}

/// Epochs that lives between may have given, which file servers may know of.
fn epochs_passed_over(known: u64, generation: u64) -> u64 {
    let restores = (generation >> RESTORED_BIT) - (known >> RESTORED_BIT);
    let rebuilds = match restores {
        0 => generation - known,
        _ => generation & u64::from(u32::MAX),
    };
    (restores << 32) + REBUILT_EPOCHS * (rebuilds + 1)
}

/// Notes from what a rebuilt store was made, as its first plan, so that nothing newer of that is passed over before it
/// serves. A restored backup is older than what file servers know: an operator wants it so.
async fn note_base(store: &Arc<dyn MetaStore>, generation: Generation) -> Result<()> {
    let view = View::new(store.clone());
    let Some(stored) = view.record::<record::Settings>(&key::settings()).await? else { return Ok(()) };
    let mut settings = stored.record;
    let restored = generation.0 >> RESTORED_BIT > settings.generation >> RESTORED_BIT;
    let revision = view.revision().unwrap_or_default().0;
    if restored || settings.base_generation != 0 && settings.base_generation >= settings.generation {
        return Ok(());
    }
    (settings.base_generation, settings.base_revision) = (settings.generation, revision);
    let mut plan = Plan::new();
    plan.put(key::settings(), settings.to_bytes());
    commit(store, plan).await
}

/// Groups may have had higher epochs than the rebuilt records know; file servers never go back.
async fn raise_epochs(store: &Arc<dyn MetaStore>, passed_over: u64) -> Result<()> {
    rewrite::<record::Group>(store, key::groups(), |group| {
        group.epoch += passed_over;
        true
    })
    .await
}

/// Chunks of open grants may be of acknowledged commits that were lost: they are kept and listed, never collected.
async fn mark_grants(store: &Arc<dyn MetaStore>) -> Result<()> {
    rewrite::<record::Grant>(store, key::grants(), |grant| {
        let marks = !grant.closed && !grant.rebuilt;
        grant.rebuilt |= marks;
        marks
    })
    .await
}

/// Locks may have ended, and others been granted, in what was lost: no token of before is good any more. Whoever still
/// holds one is told so and locks again.
async fn end_locks(store: &Arc<dyn MetaStore>) -> Result<()> {
    for prefix in [key::locks(), key::reservations()] {
        loop {
            let (_, page) = store.scan(KeyRange::prefix(prefix.clone()), STEP, None).await?;
            let mut plan = Plan::new();
            for (key, versioned) in page.entries {
                let held = (record::Lock::from_bytes(&versioned.value)?, versioned.revision);
                match Place::of_key(&key, Some(held)) {
                    Some(place) => drop(place.end(&mut plan)),
                    None => drop(plan.delete(key)),
                }
                if plan.mutations.len() + ENDED_ENTRIES_MAX + 1 > PLAN_MUTATIONS_MAX {
                    break;
                }
            }
            if plan.mutations.is_empty() {
                break;
            }
            commit(store, plan).await?;
        }
    }
    Ok(())
}

async fn rewrite<R: Record>(
    store: &Arc<dyn MetaStore>,
    prefix: cairn_core::plan::Key,
    change: impl Fn(&mut R) -> bool,
) -> Result<()> {
    let mut range = KeyRange::prefix(prefix);
    loop {
        let (_, page) = store.scan(range.clone(), STEP, None).await?;
        let mut plan = Plan::new();
        for (key, versioned) in &page.entries {
            let mut record = R::from_bytes(&versioned.value)?;
            if change(&mut record) {
                plan.require_unchanged(key.clone(), Some(versioned));
                plan.put(key.clone(), record.to_bytes());
            }
        }
        if !plan.mutations.is_empty() {
            commit(store, plan).await?;
        }
        match page.entries.last() {
            Some((last, _)) if page.more => range = range.behind(last.clone()),
            _ => return Ok(()),
        }
    }
}

async fn commit(store: &Arc<dyn MetaStore>, plan: Plan) -> Result<()> {
    match store.commit(plan).await {
        Ok(_) => Ok(()),
        Err(CommitError::Conflict) => {
            Err(Error::internal("somebody else changes a store that is being prepared"))
        }
        Err(CommitError::Unknown(error) | CommitError::Refused(error)) => Err(error),
    }
}
