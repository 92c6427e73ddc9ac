//! What all parts of a running file server share.

use crate::{
    background::scrub::Scrub,
    chunks::ChunkStore,
    compose::Composer,
    config::Config,
    directory::Directory,
    fetch::{Fetcher, Order},
    grpc::Sending,
    identity::Identity,
    journal::Journals,
    metrics::Metrics,
    peers::Peers,
    receive::Receiving,
    replicate::Replicator,
    topology::{Adopted, Map, Topology},
};
use cairn_proto::{
    Error, Reason, Result,
    id::{ChunkId, Generation, GroupId, ServerId},
    net::Connect,
    v1,
};
use parking_lot::Mutex;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};
use tokio::sync::{Notify, watch};

/// Bad chunks in one heartbeat, and as many wait for the next ones as fit a few of them.
const BAD_CHUNKS_IN_HEARTBEAT: usize = 256;
const BAD_CHUNKS_MAX: usize = 16 * BAD_CHUNKS_IN_HEARTBEAT;

/// Whether this server serves.
#[derive(Clone, Debug, PartialEq)]
pub enum Mode {
    /// Its disk is blank and no directory has taken it in yet.
    Joining,
    /// It serves.
    Serving,
    /// The directory refuses it: another cluster, or a copied disk. It keeps everything and asks again.
    Refused(Error),
}

/// The shared parts.
#[derive(Debug)]
pub struct Node {
    /// Settings.
    pub config: Config,
    /// The chunks.
    pub store: Arc<dyn ChunkStore>,
    /// Who this server is.
    pub identity: Arc<Identity>,
    /// The cluster as it is known here.
    pub topology: Arc<Topology>,
    /// Connections to other servers.
    pub peers: Arc<Peers>,
    /// The directory.
    pub directory: Directory,
    /// Makes connections to further directories.
    pub network: Arc<dyn Connect>,
    /// The way of chunks to followers.
    pub replicator: Replicator,
    /// Copies of the directory's journal.
    pub journals: Journals,
    /// Chunks to get from others.
    pub fetcher: Fetcher,
    /// How far it is with re-reading its copies.
    pub scrub: Scrub,
    /// Lets one chunk at a time be put together from others.
    pub composer: Composer,
    /// What streams of chunks share.
    pub receiving: Arc<Receiving>,
    /// Room for chunks on their way to readers.
    pub sending: Sending,
    /// Figures.
    pub metrics: Arc<Metrics>,
    /// Whether this server serves.
    pub mode: watch::Sender<Mode>,
    /// Rung to send a heartbeat, and so hear of a new topology, at once.
    pub heartbeat_wanted: Arc<Notify>,
    /// Held to read while an order that rests on epochs is carried out, to write while epochs change.
    pub orders: tokio::sync::RwLock<()>,
    bad: Bad,
    asking: tokio::sync::Mutex<()>,
}

impl Node {
    /// Puts the parts together.
    #[allow(clippy::too_many_arguments)] // called once, by `App::build`
    pub(crate) fn new(
        config: Config,
        store: Arc<dyn ChunkStore>,
        identity: Identity,
        topology: Topology,
        peers: Peers,
        (directory, network): (Directory, Arc<dyn Connect>),
        journals: Journals,
        scrub: Scrub,
    ) -> Self {
        let (topology, peers, identity) = (Arc::new(topology), Arc::new(peers), Arc::new(identity));
        let metrics = Arc::new(Metrics::default());
        let heartbeat_wanted = Arc::new(Notify::new());
        let replicator = Replicator::new(
            peers.clone(),
            topology.clone(),
            identity.clone(),
            metrics.clone(),
            config.timing,
            heartbeat_wanted.clone(),
        );
        let mode = match identity.is_member() {
            true => Mode::Serving,
            false => Mode::Joining,
        };
        Self {
            config,
            store,
            identity,
            topology,
            peers,
            directory,
            network,
            replicator,
            journals,
            fetcher: Fetcher::default(),
            scrub,
            composer: Composer::default(),
            receiving: Arc::default(),
            sending: Sending::default(),
            metrics,
            mode: watch::Sender::new(mode),
            heartbeat_wanted,
            orders: tokio::sync::RwLock::default(),
            bad: Bad::default(),
            asking: tokio::sync::Mutex::default(),
        }
    }

    /// This server's id; 0 before it joined.
    pub fn me(&self) -> ServerId {
        self.identity.server_id()
    }

    /// Refuses orders of another cluster or an older generation, and remembers a newer one durably.
    ///
    /// # Errors
    /// `WRONG_CLUSTER`, `STALE_EPOCH`, `NO_SPACE`, `IO`.
    pub async fn check_order(&self, cluster_id: &str, generation: Generation) -> Result<()> {
        self.identity.check(cluster_id, generation)?;
        self.identity.learn(generation).await
    }

    /// Takes a topology over that came from the directory. An empty one means that nothing changed.
    ///
    /// # Errors
    /// `WRONG_CLUSTER`, `NO_SPACE`, `IO`.
    pub async fn adopt(&self, topology: &v1::TopologyResponse) -> Result<Adopted> {
        if topology.servers.is_empty() && topology.groups.is_empty() {
            return Ok(Adopted::Known);
        }
        let cluster_id = self.identity.cluster_id();
        if !topology.cluster_id.is_empty() && topology.cluster_id != cluster_id {
            return Err(Error::new(
                Reason::WrongCluster,
                format!("a topology of cluster '{}' for a server of '{cluster_id}'", topology.cluster_id),
            ));
        }
        match topology.term {
            0 => self.identity.learn(Generation(topology.generation)).await?,
            term => self.identity.hear(Generation(topology.generation), term).await?,
        }
        let changing = self.orders.write().await;
        let adopted = self.topology.adopt(topology).await?;
        drop(changing);
        if adopted == Adopted::Yes {
            let map = self.topology.map();
            self.peers.retain(&map);
            self.replicator.retain(&map);
        }
        Ok(adopted)
    }

    /// Asks the directory for the topology, once for all who want it at the same time.
    ///
    /// # Errors
    /// `UNAVAILABLE` when the directory does not answer.
    pub async fn refresh_topology(&self) -> Result<()> {
        let before = self.topology.map();
        let _asking = self.asking.lock().await;
        let now = self.topology.map();
        if (now.generation, now.revision) != (before.generation, before.revision) {
            return Ok(());
        }
        // A known revision of another generation means nothing to the directory.
        let topology = self.directory.topology(0).await?;
        self.adopt(&topology).await?;
        Ok(())
    }

    /// The group that a writer named, if this server knows it with that epoch; otherwise the directory is asked once.
    ///
    /// # Errors
    /// `STALE_EPOCH` with the group as it is known here.
    pub async fn group(&self, group: GroupId, epoch: u64) -> Result<(Arc<Map>, v1::Group)> {
        for attempt in 0..2 {
            let map = self.topology.map();
            match map.groups.get(&group) {
                Some(known) if known.epoch == epoch => return Ok((map.clone(), known.clone())),
                Some(known) if known.epoch > epoch => {
                    let why = format!(
                        "group {group} is at epoch {}, the writer knows {epoch}: take the group as it is now",
                        known.epoch
                    );
                    return Err(map.stale(group, why).on(self.me().to_string()));
                }
                _ if attempt == 0 => {
                    if let Err(error) = self.refresh_topology().await {
                        tracing::debug!(%error, group = group.0, "could not ask for an unknown group");
                    }
                }
                _ => {}
            }
        }
        let map = self.topology.map();
        let why =
            format!("server {} does not know group {group} at epoch {epoch}: ask the directory", self.me());
        Err(map.stale(group, why).on(self.me().to_string()))
    }

    /// Notes a bad copy: it is reported with the next heartbeat and fetched from another member.
    pub fn found_bad(&self, chunk: ChunkId) {
        self.store.mark_corrupt(chunk);
        let is_new = self.bad.found(chunk);
        if is_new {
            self.metrics.chunks_bad.inc();
            tracing::error!(chunk = %chunk, "a copy is bad: it is not served, and fetched from another member");
        }
        if let Some(info) = self.store.info(chunk) {
            let map = self.topology.map();
            let sources =
                map.groups.get(&info.group).map(|group| Map::members(group).collect()).unwrap_or_default();
            self.fetcher.push(Order {
                chunk,
                group: info.group,
                length: info.length,
                checksum: info.checksum,
                sources,
            });
        }
    }

    /// Bad chunks for a heartbeat to one of several directories: each learns of all.
    pub fn bad_chunks(&self, reporter: Reporter) -> Vec<ChunkId> {
        self.bad
            .untold
            .lock()
            .get(&reporter)
            .into_iter()
            .flatten()
            .take(BAD_CHUNKS_IN_HEARTBEAT)
            .copied()
            .collect()
    }

    /// That directory knows of these now.
    pub fn reported_bad(&self, reporter: Reporter, chunks: &[ChunkId]) {
        if let Some(untold) = self.bad.untold.lock().get_mut(&reporter) {
            for chunk in chunks {
                untold.remove(chunk);
            }
        }
    }

    /// These are no bad copies any more.
    pub fn forget_bad(&self, chunks: &[ChunkId]) {
        for untold in self.bad.untold.lock().values_mut() {
            for chunk in chunks {
                untold.remove(chunk);
            }
        }
    }

    /// Somebody reports to one more directory, which is told what was found bad from now on.
    pub fn begin_reporting(&self, reporter: Reporter) {
        self.bad.untold.lock().entry(reporter).or_default();
    }

    /// Nobody reports to that directory any more.
    pub fn end_reporting(&self, reporter: Reporter) {
        self.bad.untold.lock().remove(&reporter);
    }

    /// How full and busy this server is.
    pub fn usage(&self) -> v1::Usage {
        let usage = self.store.usage();
        v1::Usage {
            total_bytes: usage.total_bytes,
            free_bytes: usage.free_bytes,
            used_bytes: usage.used_bytes,
            chunks: usage.chunks,
            requests: u32::try_from(self.metrics.requests_active.get()).unwrap_or(0),
            reclaimable_bytes: usage.reclaimable_bytes,
        }
    }
}

/// To whom is reported: 0 for whichever directory answers at the given addresses, else one of several, by its id.
pub type Reporter = u64;

/// Chunks found bad that directories have not been told of yet.
#[derive(Debug)]
struct Bad {
    untold: Mutex<BTreeMap<Reporter, BTreeSet<ChunkId>>>,
}

impl Default for Bad {
    fn default() -> Self {
        Self { untold: Mutex::new(BTreeMap::from([(0, BTreeSet::new())])) }
    }
}

impl Bad {
    /// Answers whether it is news.
    fn found(&self, chunk: ChunkId) -> bool {
        let mut is_new = false;
        for untold in self.untold.lock().values_mut() {
            is_new |= untold.len() < BAD_CHUNKS_MAX && untold.insert(chunk);
        }
        is_new
    }
}
