//! What the directory knows of file servers, placement groups and copies.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`state`] | servers, groups and settings in memory, as the store has them |
//! | [`register`] | file servers introduce themselves and give signs of life |
//! | [`change`] | plans that change servers, groups and settings |
//! | [`copies`] | which copies are missing, what was verified |
//! | [`tally`] | counts that follow the store |
//! | [`peers`] | channels to file servers |
//! | [`status`] | the health of everything |
//!
//! Servers, groups and settings are records of the store. They are kept in memory as well, loaded at the start and
//! kept current through this directory's own plans. Where several directories share the store, each of them changes
//! them: then memory is read anew, all at one revision, after every plan and whenever another one's is seen
//! ([`crate::background::follow`]). So what is shown as the topology of a revision has every change up to it. Plans
//! require what they rest on unchanged, whoever may have changed it.

use crate::{config::Config, ids::Ids, membership::Membership, store::MetaStore};
use cairn_core::{
    cluster::{Candidate, min_copies, placement, seats, server::Silence},
    record,
};
use cairn_proto::{
    Error, Reason, Result,
    host::Host,
    id::{Generation, GroupId, Revision, ServerId},
    v1,
};
use parking_lot::Mutex;
use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};
use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    sync::{Notify, mpsc, watch},
    time::Instant,
};

pub mod change;
pub mod copies;
pub mod peers;
pub mod register;
pub mod state;
pub mod status;
pub mod tally;

use peers::Peers;
use state::State;
use tally::Tallies;

/// Committed chunks that wait to be told to their members. What does not fit is found by the next comparison.
const COMMITTED_QUEUE: usize = 4_096;
/// Longest that one commit is slowed down.
const PACE_MS_MAX: u64 = 250;
/// How often an election is tried again while others change the same groups.
const ELECT_ATTEMPTS: u32 = 8;

/// A chunk that was just committed, with those that hold it.
#[derive(Clone, Debug)]
pub struct Placed {
    /// Id, length, checksum, group.
    pub chunk: v1::ChunkRef,
    /// Servers that hold it durably, as the receipt says.
    pub holders: Vec<ServerId>,
}

/// Why a store must not serve any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Behind {
    /// For a person.
    pub reason: String,
    /// The cluster to rebuild: this one's later state, or an older cluster that an unused one gives way to.
    pub cluster_id: String,
    /// Whether file servers know a later state, so that it is to be rebuilt. Otherwise they follow another start of a
    /// directory on this store or a copy of it, and are to be asked again.
    pub rebuild: bool,
}

/// How far the journal's copies are.
#[derive(Debug, Default)]
pub struct Shipped {
    /// Revision that enough carriers hold.
    pub revision: AtomicU64,
    /// How long the oldest unshipped change has waited.
    pub lag_ms: AtomicU64,
    /// Enough file servers live to carry it: only then do commits wait for it.
    pub able: AtomicBool,
}

/// The cluster as the directory sees it.
#[derive(Debug)]
pub struct Cluster {
    pub(crate) store: Arc<dyn MetaStore>,
    pub(crate) ids: Arc<Ids>,
    pub(crate) config: Config,
    pub(crate) cluster_id: String,
    pub(crate) generation: Generation,
    pub(crate) peers: Peers,
    pub(crate) state: Mutex<State>,
    /// Held while servers, groups or settings are changed.
    pub(crate) changing: tokio::sync::Mutex<()>,
    /// Held while they are read from the store; the revision they were last read at.
    pub(crate) loading: tokio::sync::Mutex<Revision>,
    /// This directory among others on the store, if there may be any.
    pub(crate) membership: Option<Arc<Membership>>,
    pub(crate) tallies: Tallies,
    pub(crate) shipped: Shipped,
    /// Something changed that background work should look at: a registration, a seat, a gap.
    pub(crate) stirred: Notify,
    /// Something happened that may move seats or roles.
    pub(crate) seated: Notify,
    /// A seat changed and is to be told to all members.
    pub(crate) adopting: Notify,
    /// Why this store must not serve any more: file servers know a later one.
    pub(crate) behind: watch::Sender<Option<Behind>>,
    /// The store's durable revision, where the store can tell.
    durable: std::sync::OnceLock<watch::Receiver<Revision>>,
    disk: std::sync::OnceLock<Arc<dyn disk::Disk>>,
    /// The life that the file servers follow, once they do.
    life: std::sync::OnceLock<v1::DirectoryLife>,
    committed: mpsc::Sender<Vec<Placed>>,
    pub(crate) committed_queue: Mutex<Option<mpsc::Receiver<Vec<Placed>>>>,
    /// Commits that did not fit the queue: a comparison is due.
    pub(crate) overflowed: AtomicBool,
    started: Instant,
    random: Mutex<SmallRng>,
}

impl Cluster {
    /// Reads servers, groups and settings from the store.
    ///
    /// # Errors
    /// As the store's.
    pub async fn load(
        store: Arc<dyn MetaStore>,
        ids: Arc<Ids>,
        config: Config,
        cluster_id: String,
        generation: Generation,
        membership: Option<Arc<Membership>>,
        host: &Host,
    ) -> Result<Self> {
        let (committed, queue) = mpsc::channel(COMMITTED_QUEUE);
        let cluster = Self {
            store,
            ids,
            config,
            cluster_id,
            generation,
            peers: Peers::new(host.network.clone()),
            state: Mutex::new(State::default()),
            changing: tokio::sync::Mutex::new(()),
            loading: tokio::sync::Mutex::new(Revision(0)),
            membership,
            tallies: Tallies::default(),
            shipped: Shipped::default(),
            stirred: Notify::new(),
            seated: Notify::new(),
            adopting: Notify::new(),
            behind: watch::Sender::new(None),
            durable: std::sync::OnceLock::new(),
            disk: std::sync::OnceLock::new(),
            life: std::sync::OnceLock::new(),
            committed,
            committed_queue: Mutex::new(Some(queue)),
            overflowed: AtomicBool::new(false),
            started: Instant::now(),
            random: Mutex::new(SmallRng::seed_from_u64(host.seed ^ generation.0)),
        };
        cluster.reload().await?;
        Ok(cluster)
    }

    /// Follows the store's durable revision, so that a store which is behind what file servers carry is noticed.
    pub(crate) fn follow_durable(&self, durable: watch::Receiver<Revision>) {
        let _ = self.durable.set(durable);
    }

    /// The durable revision; the highest number where the store cannot tell.
    pub(crate) fn durable_revision(&self) -> u64 {
        self.durable.get().map_or(u64::MAX, |durable| durable.borrow().0)
    }

    /// Milliseconds since this directory began to serve.
    pub(crate) fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    pub(crate) fn silence(&self) -> Silence {
        Silence { suspect_ms: self.config.timing.suspect_ms, dead_ms: self.config.timing.dead_ms }
    }

    pub(crate) fn roll(&self) -> u64 {
        self.random.lock().random()
    }

    /// Copies that must be durable, of a factor.
    pub(crate) fn min_copies(&self, factor: u32) -> u32 {
        self.config.min_copies.map_or_else(|| min_copies(factor), |chosen| chosen.clamp(1, factor.max(1)))
    }

    /// A group for new chunks with this many copies, elected by free space, load and zone; its members are live, or
    /// at least enough of them. Its primary is not one of `avoid` where that can be had.
    ///
    /// # Errors
    /// `TOO_FEW_SERVERS` saying how many are needed and who is missing.
    pub async fn elect(&self, replication: u32, avoid: &[ServerId]) -> Result<(GroupId, record::Group)> {
        let replicas = if replication == 0 { self.replication_default() } else { replication };
        let min = self.min_copies(replicas);
        for _ in 0..ELECT_ATTEMPTS {
            let (candidates, placed) = self.view();
            if let Some(id) = placement::elect(&candidates, &placed, replicas, avoid, self.roll())
                && let Some((_, group)) = placed.iter().find(|(other, _)| *other == id)
            {
                return Ok((id, group.clone()));
            }
            if replicas == 0 || placement::wanted(&candidates, &placed, replicas, min).is_empty() {
                return Err(self.too_few(&candidates, replicas, min));
            }
            match self.make_groups(replicas).await {
                // Another directory was faster, and what it made is known now.
                Err(error) if self.membership.is_some() && error.reason == Reason::Unavailable => {
                    tracing::debug!(%error, "electing a group again");
                }
                made => made?,
            }
        }
        Err(Error::unavailable("the groups change all the time: try again").retry_after_ms(100))
    }

    fn too_few(&self, candidates: &[Candidate], replicas: u32, min: u32) -> Error {
        let up = candidates.iter().filter(|server| server.up && server.has_room()).count();
        let full: Vec<String> = candidates
            .iter()
            .filter(|server| server.up && !server.has_room())
            .map(|server| server.id.to_string())
            .collect();
        let silent: Vec<String> = candidates
            .iter()
            .filter(|server| !server.up && !server.draining)
            .map(|server| self.describe(server.id))
            .collect();
        let mut message = format!(
            "a write with {replicas} copies needs {} file servers that live and have room, {up} are there",
            min.max(1)
        );
        if !silent.is_empty() {
            message.push_str(&format!("; silent: {}", silent.join(", ")));
        }
        if !full.is_empty() {
            message.push_str(&format!("; full: server {}", full.join(", ")));
        }
        // When room is all that is missing, waiting does not help: somebody has to make some.
        let needed = min.max(1) as usize;
        if let Some(first) = full.first()
            && up < needed
            && up + full.len() >= needed
        {
            message.push_str("; free space there or add a server");
            return Error::new(Reason::NoSpace, message).on(first.clone());
        }
        Error::new(Reason::TooFewServers, message).retry_after_ms(self.config.timing.heartbeat_interval_ms)
    }

    /// A server by number and address, for messages.
    pub(crate) fn describe(&self, id: ServerId) -> String {
        let state = self.state.lock();
        let address = state.servers.get(&id).and_then(|member| member.record.endpoints.first());
        match address {
            Some(endpoint) => format!("server {id} ({})", endpoint.uri),
            None => format!("server {id}"),
        }
    }

    /// The factor for new chunks where neither file nor directory says one.
    pub fn replication_default(&self) -> u32 {
        let state = self.state.lock();
        seats::factor(&self.with_operator(&state.settings), state.servers_up())
    }

    /// Settings with what the operator said at the start.
    pub(crate) fn with_operator(&self, settings: &record::Settings) -> record::Settings {
        let mut settings = settings.clone();
        if let Some(replication) = self.config.replication {
            // Raised by an operator's word; never lowered.
            settings.replication = settings.replication.max(replication);
            settings.replication_fixed = true;
        }
        settings.min_copies = self.config.min_copies.unwrap_or(settings.min_copies);
        settings
    }

    /// A group as clients see it.
    pub fn group(&self, id: GroupId) -> Option<v1::Group> {
        self.state.lock().groups.get(&id).map(|stored| state::group_to_wire(id, &stored.record))
    }

    /// The servers of some groups, former members included, each once.
    pub fn members(&self, groups: &[v1::Group]) -> Vec<v1::Server> {
        let ids: BTreeSet<u64> = groups
            .iter()
            .flat_map(|group| group.seats.iter().map(|seat| seat.server_id).chain(group.former_ids.clone()))
            .filter(|id| *id != 0)
            .collect();
        let state = self.state.lock();
        ids.into_iter().filter_map(|id| state.server(ServerId(id))).collect()
    }

    /// Makes sure that groups are known which another directory may have made.
    ///
    /// # Errors
    /// The store's.
    pub async fn know(&self, groups: &BTreeSet<u64>) -> Result<()> {
        let unknown = |state: &State| groups.iter().any(|id| !state.groups.contains_key(&GroupId(*id)));
        if self.membership.is_some() && unknown(&self.state.lock()) {
            self.reload().await?;
        }
        Ok(())
    }

    /// Whether a member of a group counts: it is known to keep a topology durably in which it has its seat. The group is
    /// meant as it was read at a revision; where others change groups, it may be known differently here.
    pub fn counts(&self, id: GroupId, read: Revision, server: ServerId) -> bool {
        let state = self.state.lock();
        let Some(group) = state.groups.get(&id) else { return false };
        if self.membership.is_some() && group.revision != read {
            return false;
        }
        cairn_core::cluster::is_member(&group.record, server) && !state.is_newcomer(id, server)
    }

    /// Notes what was committed: its members are told, and those that miss a chunk fetch it. Never waits.
    pub fn committed(&self, placed: Vec<Placed>) {
        if placed.is_empty() {
            return;
        }
        if self.committed.try_send(placed).is_err() {
            self.overflowed.store(true, Ordering::Relaxed);
        }
    }

    /// Slows a commit down while the journal's copies lag behind too far. Returns at once otherwise.
    pub async fn pace(&self) {
        let lag_ms = self.shipped.lag_ms.load(Ordering::Relaxed);
        let over_ms = lag_ms.saturating_sub(self.config.timing.journal_lag_ms_max);
        if over_ms > 0 && self.shipped.able.load(Ordering::Relaxed) {
            tokio::time::sleep(Duration::from_millis(over_ms.min(PACE_MS_MAX))).await;
        }
    }

    /// The revision that a rebuild from the journal's copies is sure to reach. What is destroyed rests on nothing later:
    /// a rebuilt directory would believe that it is still there. Without carriers nobody can rebuild.
    pub(crate) fn carried(&self) -> Revision {
        if self.state.lock().settings.carriers.is_empty() {
            return Revision(u64::MAX);
        }
        Revision(self.shipped.revision.load(Ordering::Relaxed))
    }

    /// A client met a bad or missing copy: its record is looked up before it counts.
    ///
    /// # Errors
    /// `NOT_FOUND` for a server that is not known.
    pub fn reported_bad(&self, server: ServerId, chunk: cairn_proto::id::ChunkId) -> Result<()> {
        let mut state = self.state.lock();
        if !state.servers.contains_key(&server) {
            return Err(Error::not_found(format!("no file server {server} is known")).on(server.to_string()));
        }
        state.copies.suspect(server, chunk);
        drop(state);
        self.stirred.notify_one();
        Ok(())
    }

    /// The file servers follow this life: their calls and answers say so from now on.
    pub(crate) fn followed_as(&self, life: &v1::DirectoryLife) {
        self.state.lock().term = life.term;
        self.peers.call_as(life.generation, life.term);
        let _ = self.life.set(life.clone());
    }

    /// The directories that share the store; none where this one has it to itself.
    pub(crate) fn directories(&self) -> Vec<v1::DirectoryAddress> {
        self.membership.as_ref().map_or_else(Vec::new, |membership| membership.addresses())
    }

    /// The life that the file servers follow; none before they do.
    pub(crate) fn serving_life(&self) -> Option<v1::DirectoryLife> {
        self.life.get().cloned()
    }

    /// The disk that holds the store, for the status.
    pub(crate) fn show_disk(&self, disk: Arc<dyn disk::Disk>) {
        let _ = self.disk.set(disk);
    }

    /// Size and free bytes of the directory's disk.
    pub async fn disk_space(&self) -> Option<(u64, u64)> {
        let space = self.disk.get()?.space(std::path::Path::new("")).await.ok()?;
        Some((space.total_bytes, space.free_bytes))
    }

    /// Servers as placement sees them, and all groups.
    pub(crate) fn view(&self) -> (Vec<Candidate>, Arc<Vec<cairn_core::cluster::Placed>>) {
        let state = self.state.lock();
        (state.candidates(), state.placed.clone())
    }
}
