//! Registers this server with the directory, and then says again and again that it lives.
//!
//! What the answers tell of the cluster is made durable beside the heartbeats and not between them: a disk that takes
//! seconds for a sync must not make its server silent.
//!
//! Where several directories share a store, an answer names them all, and each is told by a task of its own: so each
//! knows by itself who lives. The first, at whichever of the given addresses answers, gives a blank disk its id; the
//! others are told only then.

use crate::{
    directory::Directory,
    node::{Mode, Node, Reporter},
};
use cairn_proto::{
    Error, Reason, Result,
    id::{Generation, ServerId},
    limits::DIRECTORIES_MAX,
    v1,
};
use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};
use std::{
    collections::{BTreeMap, btree_map::Entry},
    sync::Arc,
    time::Duration,
};
use tokio::time::Instant;
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tracing::Instrument as _;

/// First wait for a directory that does not answer; doubled up to the set longest one.
const RETRY_FIRST_MS: u64 = 25;

/// Registers and sends heartbeats until `shutdown`; then a last one says that this server leaves. The same to each of
/// several directories.
pub async fn run(node: Arc<Node>, seed: u64, shutdown: CancellationToken) {
    let mut others = Others { node: node.clone(), seed, shutdown: shutdown.clone(), told: BTreeMap::new() };
    let teller = Teller { node: &node, directory: &node.directory, reporter: 0 };
    teller.run(seed, shutdown, |directories| others.tell(directories)).await;
    others.ended().await;
}

/// The directories beside the one that answers at the given addresses.
struct Others {
    node: Arc<Node>,
    seed: u64,
    shutdown: CancellationToken,
    told: BTreeMap<u64, (Vec<String>, AbortOnDropHandle<()>)>,
}

impl Others {
    /// Begins to tell those that are new, and ends with those that are gone.
    fn tell(&mut self, directories: &[v1::DirectoryAddress]) {
        let main = self.node.directory.address();
        let wanted: BTreeMap<u64, &Vec<String>> = directories
            .iter()
            .filter(|one| one.id != 0 && !one.addresses.is_empty())
            .filter(|one| !one.addresses.iter().any(|address| address == main))
            .take(DIRECTORIES_MAX)
            .map(|one| (one.id, &one.addresses))
            .collect();
        self.told.retain(|id, (addresses, _)| wanted.get(id) == Some(&&*addresses));
        for (id, addresses) in wanted {
            let Entry::Vacant(entry) = self.told.entry(id) else { continue };
            let timeout = Duration::from_millis(self.node.config.timing.directory_call_ms);
            let directory = match Directory::new(&self.node.network, addresses, timeout) {
                Ok(directory) => directory,
                Err(error) => {
                    tracing::warn!(%error, directory = id, "a directory's address is none");
                    continue;
                }
            };
            tracing::info!(
                directory = id,
                addresses = addresses.join(", "),
                "reporting to one more directory"
            );
            let (node, shutdown) = (self.node.clone(), self.shutdown.clone());
            let seed = self.seed ^ id;
            let task = async move {
                let reporting = Reporting::begin(&node, id);
                let teller = Teller { node: &node, directory: &directory, reporter: id };
                teller.run(seed, shutdown, |_| {}).await;
                drop(reporting);
            };
            let task = AbortOnDropHandle::new(tokio::spawn(task.in_current_span()));
            entry.insert((addresses.clone(), task));
        }
    }

    /// Waits until each was told that this server leaves.
    async fn ended(self) {
        for (_, task) in self.told.into_values() {
            let _ = task.await;
        }
    }
}

/// Bad chunks are kept for a directory while somebody reports to it.
struct Reporting<'a> {
    node: &'a Node,
    reporter: Reporter,
}

impl<'a> Reporting<'a> {
    fn begin(node: &'a Node, reporter: Reporter) -> Self {
        node.begin_reporting(reporter);
        Self { node, reporter }
    }
}

impl Drop for Reporting<'_> {
    fn drop(&mut self) {
        self.node.end_reporting(self.reporter);
    }
}

/// Tells one directory.
struct Teller<'a> {
    node: &'a Arc<Node>,
    directory: &'a Directory,
    reporter: Reporter,
}

impl Teller<'_> {
    /// Registers and sends heartbeats. `named` hears of the directories that share the store, if several do.
    async fn run(
        &self,
        seed: u64,
        shutdown: CancellationToken,
        mut named: impl FnMut(&[v1::DirectoryAddress]),
    ) {
        let node = self.node;
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut interval_ms = node.config.timing.heartbeat_interval_ms;
        let mut is_registered = false;
        let mut retry_ms = RETRY_FIRST_MS;
        let mut adopting = None;
        while !shutdown.is_cancelled() {
            let began = Instant::now();
            let done = tokio::select! {
                done = async {
                    match is_registered {
                        true => self.heartbeat(false, &mut adopting).await,
                        false => self.register().await.map(|(heartbeat_ms, directories)| {
                            interval_ms = heartbeat_ms;
                            directories
                        }),
                    }
                } => done,
                () = shutdown.cancelled() => break,
            };
            let wait = match done {
                Ok(directories) => {
                    named(&directories);
                    is_registered = true;
                    retry_ms = RETRY_FIRST_MS;
                    Duration::from_millis(interval_ms).saturating_sub(began.elapsed())
                }
                Err(error) if is_registered && error.reason == Reason::NotFound => {
                    tracing::info!("the directory does not know this server any more: registering again");
                    is_registered = false;
                    Duration::ZERO
                }
                Err(error) => {
                    // Another directory answers at the address: registering says what is wrong, and health shows it.
                    is_registered &= error.reason != Reason::WrongCluster;
                    tracing::debug!(%error, is_registered, "the directory was not reached");
                    let jittered = rng.random_range(retry_ms / 2..=retry_ms);
                    retry_ms = (retry_ms * 2).min(node.config.timing.register_retry_ms.max(1));
                    Duration::from_millis(jittered)
                }
            };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = node.heartbeat_wanted.notified() => {}
                () = shutdown.cancelled() => {}
            }
        }
        if is_registered {
            // Best effort: silence says the same, only later.
            if let Err(error) = self.heartbeat(true, &mut None).await {
                tracing::debug!(%error, "could not tell the directory that this server leaves");
            }
        }
    }

    /// Registers; answers the time between heartbeats, and the directories that share the store.
    async fn register(&self) -> Result<(u64, Vec<v1::DirectoryAddress>)> {
        let node = self.node;
        let identity = &node.identity;
        let request = v1::RegisterRequest {
            cluster_id: identity.cluster_id(),
            server_id: identity.server_id().0,
            disk_id: identity.disk_id(),
            incarnation: identity.incarnation().to_owned(),
            endpoints: endpoints(&node.config.advertise),
            zone: node.config.zone.clone(),
            generation: identity.generation().0,
            journals: node.journals.copies(),
            usage: Some(node.usage()),
            term: identity.life().term,
            starts: identity.starts(),
            topology_revision: topology_revision(node),
        };
        let registered = async {
            let answer = self.directory.register(request).await?;
            identity
                .join(&answer.cluster_id, ServerId(answer.server_id), Generation(answer.generation))
                .await?;
            if let Some(life) = &answer.life {
                identity.hear_from(life).await?;
            }
            Ok::<_, Error>(answer)
        };
        let answer = match registered.await {
            Ok(answer) => answer,
            Err(error) => {
                if matches!(error.reason, Reason::WrongCluster | Reason::InvalidArgument) {
                    refuse(node, &error);
                }
                return Err(error);
            }
        };
        if Generation(answer.generation) < identity.generation() {
            tracing::warn!(
                directory = answer.generation,
                known = identity.generation().0,
                "the directory is behind what this server knows: nothing of it is taken over"
            );
        }
        if let Some(topology) = &answer.topology {
            node.adopt(topology).await?;
        }
        tracing::info!(
            cluster = answer.cluster_id,
            server = answer.server_id,
            generation = answer.generation,
            rebuilding = answer.rebuilding,
            "registered with the directory"
        );
        node.mode.send_if_modified(|mode| std::mem::replace(mode, Mode::Serving) != Mode::Serving);
        let interval_ms = match answer.heartbeat_interval_ms {
            0 => node.config.timing.heartbeat_interval_ms,
            interval_ms => interval_ms,
        };
        Ok((interval_ms, answer.directories))
    }

    /// A sign of life; answers the directories that share the store.
    async fn heartbeat(
        &self,
        leaving: bool,
        adopting: &mut Option<AbortOnDropHandle<()>>,
    ) -> Result<Vec<v1::DirectoryAddress>> {
        let node = self.node;
        let bad = node.bad_chunks(self.reporter);
        let life = node.identity.life();
        let request = v1::HeartbeatRequest {
            cluster_id: node.identity.cluster_id(),
            server_id: node.me().0,
            incarnation: node.identity.incarnation().to_owned(),
            usage: Some(node.usage()),
            topology_revision: topology_revision(node),
            journals: node.journals.copies(),
            bad_chunks: bad.iter().copied().map(v1::ChunkId::from).collect(),
            leaving,
            generation: life.generation,
            term: life.term,
            scrub: Some(node.scrub.progress(node.config.timing.scrub_period_ms)),
        };
        let answer = self.directory.heartbeat(request).await?;
        node.reported_bad(self.reporter, &bad);
        if let Some(life) = &answer.life {
            node.identity.hear_from(life).await?;
        } else if Generation(answer.generation) < node.identity.generation() {
            return Ok(answer.directories);
        }
        // Revisions of different generations cannot be compared: then all of it is asked for.
        let is_behind = Generation(answer.generation) > node.topology.map().generation;
        let is_busy = adopting.as_ref().is_some_and(|task| !task.is_finished());
        if (answer.topology.is_some() || is_behind) && !is_busy && !leaving {
            // Until it is taken over, every answer brings it again.
            *adopting = Some(AbortOnDropHandle::new(tokio::spawn(adopt(node.clone(), answer.topology))));
        }
        Ok(answer.directories)
    }
}

/// Stops serving: the disk is not of this cluster. It is kept as it is.
fn refuse(node: &Node, error: &Error) {
    let refused = Mode::Refused(error.clone());
    let is_new = node.mode.send_if_modified(|mode| std::mem::replace(mode, refused.clone()) != refused);
    if is_new {
        tracing::error!(%error, "the directory refuses this server: it serves nothing, keeps everything, and asks again");
    }
}

/// Takes over a topology, or the one that the directory has by now.
async fn adopt(node: Arc<Node>, topology: Option<v1::TopologyResponse>) {
    let adopted = match &topology {
        Some(topology) => node.adopt(topology).await.map(drop),
        None => node.refresh_topology().await,
    };
    if let Err(error) = adopted {
        tracing::warn!(%error, "the directory's view of the cluster could not be taken over, trying again");
    }
}

/// The revision of the topology, if it is of the generation that this server knows.
fn topology_revision(node: &Node) -> u64 {
    let map = node.topology.map();
    if map.generation == node.identity.generation() { map.revision.0 } else { 0 }
}

fn endpoints(uris: &[String]) -> Vec<v1::Endpoint> {
    uris.iter()
        .map(|uri| {
            let scope = match uri.starts_with("unix:") {
                true => v1::EndpointScope::Host,
                false => v1::EndpointScope::Network,
            };
            v1::Endpoint { uri: uri.clone(), scope: scope as i32 }
        })
        .collect()
}
