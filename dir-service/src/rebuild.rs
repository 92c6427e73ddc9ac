//! Forming and rebuilding: what a directory does whose store is empty, or behind what file servers know.
//!
//! ```text
//!   file servers register here while the gate is closed
//!        |
//!        v
//!   none knows a cluster, some time passed -----------------> form a new cluster
//!   some know one --> enough carriers of its journal reported --> rebuild from the newest copy
//!                 \-> not enough: wait, saying for whom ---- an operator decides --^
//! ```
//!
//! A change is acknowledged to be carried once a majority of the carriers hold it. Of n carriers, n - majority + 1
//! reports therefore contain at least one that holds the newest such change.

use crate::{
    cluster::peers::Peers,
    config::Config,
    store::{JournaledConfig, JournaledStore, Restore, StoreIdentity, index::Index},
};
use cairn_core::plan::Versioned;
use cairn_proto::{
    Error, Reason, Result,
    host::Host,
    id::{Generation, Revision},
    v1,
};
use disk::Disk;
use parking_lot::Mutex;
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::Arc,
    time::Duration,
};
use tokio::{sync::Notify, time::Instant};

/// Disks that can report while the gate is closed.
const REPORTS_MAX: usize = 20_000;
/// A journal that stops arriving for this long is read from somebody else.
const READ_TIMEOUT: Duration = Duration::from_secs(20);

/// What to do with the reports so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Nobody knows a cluster: wait for others.
    AwaitAny(String),
    /// A cluster exists, and not all needed reports are here.
    AwaitCarriers(String),
    /// Make a new cluster.
    Form,
    /// Rebuild a cluster.
    Rebuild(Source),
}

/// From whom to rebuild.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// The cluster.
    pub cluster_id: String,
    /// The disk of the server with the newest copy.
    pub disk_id: String,
    /// Generation of the copy.
    pub generation: u64,
    /// The last revision of the copy.
    pub revision: u64,
    /// The generation of the store to make.
    pub next_generation: u64,
}

/// Decides. `expected` is the cluster whose older store is here, with its generation; `first_ms` how long ago the
/// first server reported, if any did.
pub fn decide(
    reports: &BTreeMap<String, v1::RegisterRequest>,
    first_ms: Option<u64>,
    forming_wait_ms: u64,
    expected: Option<(&str, u64)>,
    forced: bool,
) -> Decision {
    let mut clusters: BTreeSet<&str> =
        reports.values().map(|report| report.cluster_id.as_str()).filter(|id| !id.is_empty()).collect();
    if let Some((cluster_id, _)) = expected {
        clusters = BTreeSet::from([cluster_id]);
    }
    let Some(cluster_id) = clusters.first().copied() else {
        return match first_ms {
            None => Decision::AwaitAny("no file server has registered".into()),
            Some(since_ms) if since_ms < forming_wait_ms => {
                Decision::AwaitAny("waiting whether a file server knows a cluster".into())
            }
            Some(_) => Decision::Form,
        };
    };
    if clusters.len() > 1 {
        let all: Vec<_> = clusters.into_iter().collect();
        return Decision::AwaitCarriers(format!(
            "file servers of several clusters report here ({}): stop those that do not belong together",
            all.join(", ")
        ));
    }
    let of_cluster: Vec<(&String, &v1::RegisterRequest)> =
        reports.iter().filter(|(_, report)| report.cluster_id == cluster_id).collect();
    let copies = of_cluster.iter().flat_map(|(disk, report)| {
        let copies =
            report.journals.iter().filter(|copy| copy.cluster_id == cluster_id && copy.durable_revision > 0);
        copies.map(move |copy| (*disk, copy))
    });
    let best = copies.max_by_key(|(_, copy)| (copy.generation, copy.durable_revision));
    let Some((disk_id, copy)) = best else {
        return Decision::AwaitCarriers(format!(
            "no reported file server carries the journal of cluster {cluster_id}: waiting for those that do"
        ));
    };
    let highest =
        of_cluster.iter().map(|(_, report)| report.generation).chain([copy.generation]).max().unwrap_or(0);
    // A copy that cannot be read may have held something newer: its carrier says nothing.
    let unreadable = |report: &v1::RegisterRequest| {
        report.journals.iter().any(|one| {
            one.cluster_id == cluster_id && one.durable_revision == 0 && one.generation >= copy.generation
        })
    };
    let reported: BTreeSet<u64> = of_cluster
        .iter()
        .filter(|(_, report)| !unreadable(report))
        .map(|(_, report)| report.server_id)
        .collect();
    let carriers: BTreeSet<u64> = copy.carrier_ids.iter().copied().collect();
    let missing: Vec<String> = carriers.difference(&reported).map(u64::to_string).collect();
    let majority = carriers.len() / 2 + 1;
    let mut needed = (carriers.len() + 1).saturating_sub(majority);
    if highest > copy.generation {
        // Somebody saw a later life of the store: only all of its carriers could tell that no copy of that is left.
        needed = carriers.len();
    }
    let there = carriers.len() - missing.len();
    if carriers.is_empty() && !forced {
        return Decision::AwaitCarriers(format!(
            "the copy of the journal of cluster {cluster_id} that was reported is not whole: it does not say who else carries \
             it (ForceRebuild goes on with it)"
        ));
    }
    if there < needed && !forced {
        return Decision::AwaitCarriers(format!(
            "{there} of the {} carriers of the journal of cluster {cluster_id} have reported a state, {needed} are needed to be \
             sure of its newest change; waiting for server {} (ForceRebuild goes on without)",
            carriers.len(),
            missing.join(" or ")
        ));
    }
    let own = expected.map_or(0, |(_, generation)| generation);
    Decision::Rebuild(Source {
        cluster_id: cluster_id.to_owned(),
        disk_id: disk_id.clone(),
        generation: copy.generation,
        revision: copy.durable_revision,
        next_generation: highest.max(own) + 1,
    })
}

/// Where file servers report while there is no directory.
#[derive(Debug)]
pub struct Lobby {
    config: Config,
    state: Mutex<Reports>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Reports {
    by_disk: BTreeMap<String, v1::RegisterRequest>,
    first: Option<Instant>,
    expected: Option<(String, u64)>,
    forced: bool,
    /// Copies that could not be read: others are tried first.
    failed: BTreeSet<String>,
    rebuilt: Option<Result<u64>>,
}

impl Lobby {
    /// An empty one.
    pub fn new(config: Config) -> Self {
        Self { config, state: Mutex::default(), changed: Notify::new() }
    }

    /// Begins anew; with the cluster and generation of a store that is here already, only that cluster counts.
    pub fn open(&self, expected: Option<(String, u64)>) {
        *self.state.lock() = Reports { expected, ..Reports::default() };
    }

    /// A file server reports. Answers what it is told when it knows a cluster already.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` for a bad request; `UNAVAILABLE` for a blank disk, which has to wait for a cluster.
    pub fn register(&self, request: v1::RegisterRequest) -> Result<v1::RegisterResponse> {
        crate::cluster::register::check(&request)?;
        let answer = v1::RegisterResponse {
            cluster_id: request.cluster_id.clone(),
            server_id: request.server_id,
            generation: request.generation,
            heartbeat_interval_ms: self.config.timing.heartbeat_interval_ms,
            topology: None,
            rebuilding: true,
            life: None,
            directories: Vec::new(),
        };
        let blank = request.cluster_id.is_empty();
        let mut state = self.state.lock();
        if state.by_disk.len() >= REPORTS_MAX && !state.by_disk.contains_key(&request.disk_id) {
            return Err(Error::new(Reason::Overloaded, "too many file servers wait for this directory"));
        }
        state.first.get_or_insert_with(Instant::now);
        state.by_disk.insert(request.disk_id.clone(), request);
        drop(state);
        self.changed.notify_one();
        if blank {
            return Err(Error::unavailable("the directory has no cluster yet: register again")
                .retry_after_ms(self.config.timing.heartbeat_interval_ms));
        }
        Ok(answer)
    }

    /// A file server that reported lives and tells of its copies.
    ///
    /// # Errors
    /// `NOT_FOUND` when it has not reported.
    pub fn heartbeat(&self, request: v1::HeartbeatRequest) -> Result<v1::HeartbeatResponse> {
        let mut state = self.state.lock();
        let report = state.by_disk.values_mut().find(|report| {
            report.server_id == request.server_id
                && report.cluster_id == request.cluster_id
                && report.incarnation == request.incarnation
        });
        let report = report.ok_or_else(|| Error::not_found("the directory is rebuilding: register again"))?;
        let changed = report.journals != request.journals;
        report.journals = request.journals;
        let generation = report.generation;
        drop(state);
        if changed {
            self.changed.notify_one();
        }
        Ok(v1::HeartbeatResponse {
            generation,
            state: v1::ServerState::Joining as i32,
            topology: None,
            life: None,
            directories: Vec::new(),
        })
    }

    /// What file servers reported so far that know this cluster.
    pub fn reports(&self, cluster_id: &str) -> Vec<v1::RegisterRequest> {
        let state = self.state.lock();
        state.by_disk.values().filter(|report| report.cluster_id == cluster_id).cloned().collect()
    }

    /// What a file server told a directory that asked it: as good as a report of its own.
    pub fn told(&self, cluster_id: &str, server: &v1::Server, answer: &v1::FollowResponse) {
        let mut state = self.state.lock();
        let is_there = state
            .by_disk
            .values()
            .any(|report| report.server_id == server.id && report.cluster_id == cluster_id);
        if is_there {
            return;
        }
        let current = answer.current.clone().unwrap_or_default();
        let disk_id = format!("server-{}", server.id);
        let report = v1::RegisterRequest {
            cluster_id: cluster_id.to_owned(),
            server_id: server.id,
            disk_id: disk_id.clone(),
            incarnation: server.incarnation.clone(),
            endpoints: server.endpoints.clone(),
            zone: server.zone.clone(),
            generation: current.generation,
            journals: answer.journals.clone(),
            ..Default::default()
        };
        state.first.get_or_insert_with(Instant::now);
        state.by_disk.insert(disk_id, report);
    }

    /// Completes when something was reported.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Whether an operator accepted what is there.
    pub fn is_forced(&self) -> bool {
        self.state.lock().forced
    }

    /// An operator accepts the store that is here; whoever waits for file servers to confirm it waits no longer.
    pub fn accept(&self) {
        self.state.lock().forced = true;
        self.changed.notify_one();
    }

    /// An operator accepts what is there. Waits until it is rebuilt.
    ///
    /// # Errors
    /// As the rebuild's.
    pub async fn force(&self) -> Result<u64> {
        self.state.lock().forced = true;
        self.changed.notify_one();
        loop {
            if let Some(done) = self.state.lock().rebuilt.take() {
                return done;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits for a decision to act on; `tell` hears what it waits for.
    pub async fn decided(&self, mut tell: impl FnMut(Decision)) -> Decision {
        let mut told = None;
        loop {
            let changed = self.changed.notified();
            let decision = {
                let mut state = self.state.lock();
                let state = &mut *state;
                let reports: BTreeMap<_, _> = state
                    .by_disk
                    .iter()
                    .filter(|(disk, _)| !state.failed.contains(*disk))
                    .map(|(disk, report)| (disk.clone(), report.clone()))
                    .collect();
                let first_ms = state.first.map(|first| first.elapsed().as_millis() as u64);
                let expected = state.expected.as_ref().map(|(id, generation)| (id.as_str(), *generation));
                let wait_ms = self.config.timing.forming_wait_ms;
                let decision = decide(&reports, first_ms, wait_ms, expected, state.forced);
                if state.failed.is_empty() || matches!(decision, Decision::Rebuild(_)) {
                    decision
                } else {
                    // Nobody else can stand in for those whose copies could not be read. They still know a cluster:
                    // they are asked again, and never is a new one formed because of that.
                    state.failed.clear();
                    decide(&state.by_disk, first_ms, wait_ms, expected, state.forced)
                }
            };
            if matches!(decision, Decision::Form | Decision::Rebuild(_)) {
                return decision;
            }
            if told.as_ref() != Some(&decision) {
                told = Some(decision.clone());
                tell(decision);
            }
            let wait = Duration::from_millis((self.config.timing.forming_wait_ms / 20).clamp(5, 100));
            let _ = tokio::time::timeout(wait, changed).await;
        }
    }

    /// Tells whoever forced a rebuild how it went. A copy that could not be read is passed over from now on, until
    /// all others failed too.
    pub fn rebuilt(&self, source: &Source, outcome: &Result<Revision>) {
        let mut state = self.state.lock();
        if outcome.is_err() {
            state.failed.insert(source.disk_id.clone());
            if state.by_disk.keys().all(|disk| state.failed.contains(disk)) {
                state.failed.clear();
            }
        }
        if state.forced {
            state.rebuilt = Some(outcome.clone().map(|revision| revision.0));
        }
    }

    /// The server with a disk, as it reported.
    fn server(&self, disk_id: &str) -> Option<v1::Server> {
        let state = self.state.lock();
        let report = state.by_disk.get(disk_id)?;
        Some(v1::Server {
            id: report.server_id,
            incarnation: report.incarnation.clone(),
            endpoints: report.endpoints.clone(),
            zone: report.zone.clone(),
            state: v1::ServerState::Joining as i32,
        })
    }

    /// Fills a store from a carrier's copy of the journal.
    ///
    /// # Errors
    /// Those of the carrier, the copy and the disk; what was begun is incomplete and begun again.
    pub async fn rebuild(
        &self,
        source: &Source,
        host: &Host,
        disk: Arc<dyn Disk>,
        dir: &Path,
        index: Arc<dyn Index>,
        config: JournaledConfig,
    ) -> Result<JournaledStore> {
        let server = self
            .server(&source.disk_id)
            .ok_or_else(|| Error::unavailable("the carrier of the journal is gone: waiting for it"))?;
        let peers = Peers::new(host.network.clone());
        let request =
            v1::ReadJournalRequest { cluster_id: source.cluster_id.clone(), generation: source.generation };
        let mut parts =
            peers.replica(&server, |mut client| async move { client.read_journal(request).await }).await?;
        let identity = StoreIdentity {
            cluster_id: source.cluster_id.clone(),
            generation: Generation(source.next_generation),
        };
        let mut restore: Option<Restore> = None;
        let mut index = Some(index);
        loop {
            let next = tokio::time::timeout(READ_TIMEOUT, parts.message()).await;
            let next = next.map_err(|_| Error::unavailable("the journal's copy stopped arriving"))?;
            let Some(part) = next.map_err(Error::from)? else { break };
            let restore = match &mut restore {
                Some(restore) => restore,
                None => {
                    let index = index.take().ok_or_else(|| Error::internal("a rebuild begins once"))?;
                    let revision = Revision(part.checkpoint_revision);
                    restore
                        .insert(Restore::begin(disk.clone(), dir, identity.clone(), revision, index).await?)
                }
            };
            for entry in part.entries {
                let value = Versioned { value: entry.value, revision: Revision(entry.revision) };
                restore.load(entry.key, value).await?;
            }
            for record in part.records {
                restore.apply(Revision(record.revision), record.plan).await?;
            }
        }
        let restore = restore.ok_or_else(|| Error::unavailable("the journal's copy is empty"))?;
        if restore.revision().0 < source.revision {
            return Err(Error::unavailable(format!(
                "the journal's copy ends at revision {} instead of {}",
                restore.revision(),
                source.revision
            )));
        }
        restore.finish(config).await
    }
}

#[cfg(test)]
#[path = "rebuild_tests.rs"]
mod tests;
