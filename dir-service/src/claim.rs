//! How a directory makes sure that its store is the newest, and that file servers follow it alone, before it answers.
//!
//! The rule is [`cairn_core::cluster::follow`]. The carriers of the journal that the store names are asked at the
//! addresses that the store has, or at those with which they registered meanwhile. It takes milliseconds when they
//! live. There is no time after which it serves without them: only an operator can say that what is here will do. A
//! store that names no carriers, as that of a cluster's first moments, is served at once. One on which a change of the
//! carriers was under way needs those before and those after it.

use crate::{
    cluster::{Cluster, change::Change, peers::Peers},
    directory::Directory,
    rebuild::Lobby,
};
use cairn_core::{
    cluster::{
        carriers::Carriers,
        follow::{Verdict, verdict},
    },
    record,
};
use cairn_proto::{
    Error, Reason, Result,
    id::{Revision, ServerId},
    v1,
};
use futures::{StreamExt as _, stream::FuturesUnordered};
use std::{collections::BTreeMap, time::Duration};

/// Longest that one file server may take to answer before the others are asked again.
const ASK_TIMEOUT: Duration = Duration::from_secs(1);
/// Between two rounds of questions.
const PAUSE: Duration = Duration::from_millis(50);

/// How a claim ended.
#[derive(Clone, Debug)]
pub enum Claimed {
    /// A quorum follows this life: serve.
    Serve(v1::DirectoryLife),
    /// File servers know a later state.
    Behind(String),
    /// An operator accepts what is here; the highest generation that anybody told of.
    Accepted(u64),
}

/// Claims the cluster for a directory that does not serve yet. `tell` hears what it waits for. A `restored` store is
/// never behind: what is newer is what an operator wants to be without, and too low a generation is told.
pub async fn claim(
    directory: &Directory,
    lobby: &Lobby,
    incarnation: String,
    revision: Revision,
    restored: bool,
    mut tell: impl FnMut(String),
) -> Claimed {
    let cluster = &directory.cluster;
    let settings = cluster.state.lock().settings.clone();
    let carriers = Carriers::of(&settings);
    let mut life = v1::DirectoryLife {
        generation: directory.generation.0,
        store_id: settings.store_id.clone(),
        term: 1,
        incarnation,
        addresses: directory.config.advertise.clone(),
    };
    let base = (settings.base_generation != 0).then_some((settings.base_generation, settings.base_revision));
    let peers = Peers::new(directory.host.network.clone());
    let (mut ask_only, mut told) = (true, String::new());
    loop {
        if lobby.is_forced() {
            let highest = lobby.reports(&directory.cluster_id).iter().map(|report| report.generation).max();
            return Claimed::Accepted(highest.unwrap_or_default());
        }
        let mut answers = reported(lobby, &directory.cluster_id, &carriers);
        let mut asked: FuturesUnordered<_> = named(cluster, lobby, &carriers)
            .into_iter()
            .map(|server| ask(&peers, cluster, server, life.clone(), ask_only))
            .collect();
        let decided = loop {
            let decided = verdict(&life, revision.0, base, &carriers, &answers);
            if !matches!(decided, Verdict::Wait(_)) {
                break decided;
            }
            match asked.next().await {
                None => break decided,
                Some((server, Ok(answer))) => {
                    lobby.told(&directory.cluster_id, &server, &answer);
                    answers.insert(server.id, answer);
                }
                Some((server, Err(error))) => tracing::debug!(server = server.id, %error, "has not answered"),
            }
        };
        let why = match decided {
            Verdict::Serve if ask_only => {
                ask_only = false;
                continue;
            }
            Verdict::Serve => return Claimed::Serve(life),
            Verdict::Raise(term) => {
                life.term = term + 1;
                continue;
            }
            Verdict::Behind(why) if restored => format!(
                "the store was restored from a backup with too low a generation: {why}; restore it again with \
                 --above and the generation that the server knows"
            ),
            Verdict::Behind(why) => {
                // The rebuild wants to hear all of them.
                while let Some((server, answer)) = asked.next().await {
                    if let Ok(answer) = answer {
                        lobby.told(&directory.cluster_id, &server, &answer);
                    }
                }
                return Claimed::Behind(why);
            }
            Verdict::Wait(why) => {
                // Whoever did not answer this time may have heard another directory since.
                ask_only = true;
                why
            }
        };
        if why != told {
            told.clone_from(&why);
            tell(why);
        }
        let _ = tokio::time::timeout(PAUSE, lobby.changed()).await;
    }
}

/// Reports of servers that are not asked: they may know something newer, and follow nobody on our account.
fn reported(lobby: &Lobby, cluster_id: &str, carriers: &Carriers) -> BTreeMap<u64, v1::FollowResponse> {
    let reports = lobby.reports(cluster_id).into_iter().filter(|report| !carriers.names(report.server_id));
    reports
        .map(|report| {
            let current = v1::DirectoryLife { generation: report.generation, ..Default::default() };
            let journals = report.journals.into_iter().filter(|copy| copy.cluster_id == cluster_id).collect();
            let answer = v1::FollowResponse {
                current: Some(current),
                journals,
                topology_generation: report.generation,
                topology_revision: report.topology_revision,
                ..Default::default()
            };
            (report.server_id, answer)
        })
        .collect()
}

/// The carriers, at the addresses at which they were heard last.
fn named(cluster: &Cluster, lobby: &Lobby, carriers: &Carriers) -> Vec<v1::Server> {
    let reports = lobby.reports(&cluster.cluster_id);
    let state = cluster.state.lock();
    carriers
        .all()
        .into_iter()
        .filter_map(|id| {
            let mut server = state.server(ServerId(id))?;
            if let Some(report) = reports.iter().find(|report| report.server_id == id) {
                server.endpoints.clone_from(&report.endpoints);
            }
            Some(server)
        })
        .collect()
}

async fn ask(
    peers: &Peers,
    cluster: &Cluster,
    server: v1::Server,
    life: v1::DirectoryLife,
    ask_only: bool,
) -> (v1::Server, Result<v1::FollowResponse>) {
    let request = v1::FollowRequest {
        cluster_id: cluster.cluster_id.clone(),
        life: Some(life),
        ask_only,
        serves: false,
    };
    let answer = peers
        .replica_within(ASK_TIMEOUT, &server, |mut client| async move { client.follow(request).await })
        .await;
    (server, answer)
}

/// Has a server follow the directory that serves, which it may not have been asked before.
///
/// # Errors
/// `STALE_EPOCH` when it follows another one; those of the call.
pub(crate) async fn introduce(cluster: &Cluster, server: &v1::Server) -> Result<()> {
    let Some(life) = cluster.serving_life() else { return Ok(()) };
    let request = v1::FollowRequest {
        cluster_id: cluster.cluster_id.clone(),
        life: Some(life),
        ask_only: false,
        serves: true,
    };
    let answer =
        cluster.peers.replica(server, |mut client| async move { client.follow(request).await }).await?;
    if answer.outcome() == v1::FollowOutcome::Followed {
        return Ok(());
    }
    let current = answer.current.unwrap_or_default();
    Err(Error::new(
        Reason::StaleEpoch,
        format!(
            "server {} follows another directory, of generation {} and term {} at {}",
            server.id,
            current.generation,
            current.term,
            current.addresses.join(", ")
        ),
    ))
}

impl Cluster {
    /// The store has been claimed: what it was made from does not matter any more.
    ///
    /// # Errors
    /// The store's.
    pub(crate) async fn forget_base(&self) -> Result<()> {
        self.change_settings(|settings| (settings.base_generation, settings.base_revision) = (0, 0)).await
    }

    /// The carriers that an operator went on without are no more; others are chosen.
    ///
    /// # Errors
    /// The store's.
    pub(crate) async fn forget_carriers(&self) -> Result<()> {
        self.change_settings(|settings| Carriers::default().name_in(settings)).await
    }

    async fn change_settings(&self, change: impl FnOnce(&mut record::Settings)) -> Result<()> {
        let _changing = self.changing.lock().await;
        let before = self.state.lock().settings.clone();
        let mut settings = before.clone();
        change(&mut settings);
        if settings == before {
            return Ok(());
        }
        self.apply(Change { settings: Some(settings), ..Change::default() }).await.map(|_| ())
    }
}
