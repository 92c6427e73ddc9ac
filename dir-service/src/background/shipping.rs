//! Copies of the journal on file servers, so that the directory's whole store can be lost (promise REBUILT).
//!
//! Each carrier has a task that sends what is durable here as soon as it is, or a checkpoint where the carrier is too
//! far behind. A change counts as shipped once a majority of the carriers hold it durably; while the carriers
//! themselves change, a majority of those before and of those after the change. Who they are is a record, and why
//! that is enough for a rebuild to find the newest stands with the rule: [`cairn_core::cluster::carriers`].

use crate::{
    claim,
    cluster::{Behind, Cluster, change::Change},
    directory::Directory,
    store::{Checkpoint, JournalSlice, JournaledStore},
};
use cairn_core::cluster::carriers::Carriers;
use cairn_proto::{
    Error, Reason, Result,
    id::{Revision, ServerId},
    limits::{DATA_BYTES_MAX, JOURNAL_BATCH_BYTES_MAX},
    v1,
};
use futures::StreamExt as _;
use parking_lot::Mutex;
use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};
use tokio::{
    sync::{Notify, mpsc},
    time::Instant,
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::AbortOnDropHandle;

/// Between two looks at the lag and the carriers.
const LOOK: Duration = Duration::from_millis(20);
/// First and longest pause after a carrier failed.
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_LONGEST: Duration = Duration::from_millis(1_000);
/// A carrier's copy gets a new checkpoint after so many bytes of records, so that it stays small.
const CHECKPOINT_AFTER_BYTES: u64 = 256 * 1024 * 1024;
/// The same in revisions, for a carrier whose bytes are not known.
const CHECKPOINT_AFTER_REVISIONS: u64 = 1_000_000;
/// Between two batches to a carrier that takes all there is: what is committed meanwhile goes together. Each batch is synced
/// there, on the disk that the next write of the same client waits for; a batch for each commit of a lone client would
/// double what its writes take. Far below the lag that slows commits down, and the first change after a pause goes at once.
const PACE: Duration = Duration::from_millis(20);
/// A batch of this size did not take all there is.
const FULL_BATCH_BYTES: u64 = JOURNAL_BATCH_BYTES_MAX as u64 / 2;
/// While there is nothing to ship, a carrier is asked this often whether its copy is still good.
const PROBE: Duration = Duration::from_secs(2);
/// Longest that a checkpoint takes.
const CHECKPOINT_TIMEOUT: Duration = Duration::from_secs(600);

/// How far each carrier is.
#[derive(Debug, Default)]
struct Progress {
    durable: Mutex<BTreeMap<u64, Revision>>,
    moved: Notify,
}

/// Ships until stopped.
pub async fn run(directory: Arc<Directory>, journal: Arc<JournaledStore>) {
    let cluster = &directory.cluster;
    let progress = Arc::new(Progress::default());
    let mut tasks: BTreeMap<ServerId, AbortOnDropHandle<()>> = BTreeMap::new();
    let mut unshipped: VecDeque<(Revision, Instant)> = VecDeque::new();
    let mut durable = journal.watch_durable();
    loop {
        let now = Instant::now();
        let last = *durable.borrow_and_update();
        if unshipped.back().is_none_or(|(revision, _)| *revision < last) {
            unshipped.push_back((last, now));
        }
        let (carriers, released, reachable) = {
            let state = cluster.state.lock();
            let carriers = state.carriers();
            let all = carriers.all().into_iter();
            let reachable = all.filter(|carrier| state.is_reachable(ServerId(*carrier))).collect();
            (carriers, state.released(), reachable)
        };
        let shipped = carriers.carried(&progress.durable.lock(), &released);
        while unshipped.front().is_some_and(|(revision, _)| *revision <= shipped) {
            unshipped.pop_front();
        }
        let lag = unshipped.front().map_or(Duration::ZERO, |(_, since)| now - *since);
        cluster.shipped.revision.store(shipped.0, Ordering::Relaxed);
        cluster.shipped.lag_ms.store(lag.as_millis() as u64, Ordering::Relaxed);
        cluster.shipped.able.store(carriers.is_carried(&reachable, &released), Ordering::Relaxed);
        if let Err(error) = choose(cluster, &carriers, shipped).await {
            tracing::debug!(%error, "the carriers could not be chosen, trying again");
        }
        tasks.retain(|carrier, _| carriers.names(carrier.0));
        progress.durable.lock().retain(|carrier, _| carriers.names(*carrier));
        for carrier in carriers.all().into_iter().map(ServerId) {
            tasks.entry(carrier).or_insert_with(|| {
                let work = carry(directory.clone(), journal.clone(), carrier, progress.clone());
                AbortOnDropHandle::new(tokio::spawn(work))
            });
        }
        tokio::select! {
            () = progress.moved.notified() => {}
            () = tokio::time::sleep(LOOK) => {}
        }
    }
}

/// Names other carriers where the rule says so.
async fn choose(cluster: &Cluster, carriers: &Carriers, shipped: Revision) -> Result<()> {
    let next = {
        let state = cluster.state.lock();
        // The record was written again where other settings changed: waiting for that is waiting for more.
        let changed = state.settings_revision.is_none_or(|changed| changed <= shipped);
        carriers.next(&state.carrying(), changed)
    };
    let Some(next) = next else { return Ok(()) };
    let _changing = cluster.changing.lock().await;
    tracing::info!(carriers = ?next.now, before = ?next.before, "the journal's carriers change");
    let mut settings = cluster.state.lock().settings.clone();
    next.name_in(&mut settings);
    cluster.apply(Change { settings: Some(settings), ..Change::default() }).await.map(|_| ())
}

/// Keeps one carrier up to date.
async fn carry(
    directory: Arc<Directory>,
    journal: Arc<JournaledStore>,
    carrier: ServerId,
    progress: Arc<Progress>,
) {
    let mut retry = RETRY_FIRST;
    loop {
        let Err(error) = follow(&directory, &journal, carrier, &progress, &mut retry).await;
        if error.reason == Reason::StaleEpoch {
            directory.cluster.give_way(Behind {
                reason: format!("the journal is not carried any more: {error}"),
                cluster_id: directory.cluster_id.clone(),
                rebuild: false,
            });
        }
        tracing::debug!(carrier = carrier.0, %error, "the journal is not carried, trying again");
        tokio::time::sleep(retry).await;
        retry = (retry * 2).min(RETRY_LONGEST);
    }
}

/// Sends until something fails.
async fn follow(
    directory: &Directory,
    journal: &JournaledStore,
    carrier: ServerId,
    progress: &Progress,
    retry: &mut Duration,
) -> Result<std::convert::Infallible> {
    let cluster = &directory.cluster;
    let mut durable = journal.watch_durable();
    // It may have become a carrier only now: from here on it keeps to this directory.
    claim::introduce(cluster, &reachable(cluster, carrier)?).await?;
    let (mut at, mut bytes) = (known(cluster, carrier), 0u64);
    let mut next_batch = Instant::now();
    loop {
        let server = reachable(cluster, carrier)?;
        let Some(from) = at.filter(|_| bytes < CHECKPOINT_AFTER_BYTES) else {
            at = Some(install(cluster, journal, &server).await?);
            bytes = 0;
            note(progress, carrier, at);
            continue;
        };
        note(progress, carrier, at);
        tokio::time::sleep_until(next_batch).await;
        durable.borrow_and_update();
        let records = match journal.journal_since(from, JOURNAL_BATCH_BYTES_MAX).await? {
            JournalSlice::Records(records) => records,
            JournalSlice::Compacted => {
                at = None;
                continue;
            }
        };
        // When the time is up, nothing is sent, only to hear whether the copy is still there: it may have been damaged,
        // or the carrier started again without it, while there was nothing to ship.
        if records.is_empty()
            && let Ok(changed) = tokio::time::timeout(PROBE, durable.changed()).await
        {
            changed.map_err(|_| Error::unavailable("the store is closed"))?;
            continue;
        }
        let batch_bytes = records.iter().map(|(_, plan)| plan.len() as u64).sum::<u64>();
        bytes += batch_bytes;
        if batch_bytes < FULL_BATCH_BYTES {
            next_batch = Instant::now() + PACE;
        }
        let reached = records.last().map_or(from, |(revision, _)| *revision);
        let request = v1::AppendJournalRequest {
            cluster_id: cluster.cluster_id.clone(),
            generation: cluster.generation.0,
            previous_revision: from.0,
            records: records
                .into_iter()
                .map(|(revision, plan)| v1::JournalRecord { revision: revision.0, plan })
                .collect(),
            carrier_ids: carriers_at(cluster, reached),
        };
        let answer = cluster
            .peers
            .replica(&server, |mut client| async move { client.append_journal(request).await })
            .await;
        match answer {
            Ok(answer) => {
                at = Some(Revision(answer.durable_revision));
                *retry = RETRY_FIRST;
            }
            Err(error) if error.reason == Reason::RevisionCompacted => at = None,
            Err(error) => return Err(error),
        }
    }
}

/// The carriers from now on, for a copy that holds the record which names them. One that names later ones than it holds would be
/// believed with too few others: what the carriers before acknowledged could be missing.
fn carriers_at(cluster: &Cluster, reached: Revision) -> Vec<u64> {
    let state = cluster.state.lock();
    match state.settings_revision {
        Some(since) if since > reached => Vec::new(),
        _ => state.settings.carriers.clone(),
    }
}

fn note(progress: &Progress, carrier: ServerId, at: Option<Revision>) {
    if let Some(at) = at {
        progress.durable.lock().insert(carrier.0, at);
        progress.moved.notify_one();
    }
}

/// What a carrier said that it holds of this life of the store.
fn known(cluster: &Cluster, carrier: ServerId) -> Option<Revision> {
    let state = cluster.state.lock();
    let member = state.servers.get(&carrier)?;
    member
        .journals
        .iter()
        .find(|copy| copy.cluster_id == cluster.cluster_id && copy.generation == cluster.generation.0)
        .filter(|copy| {
            copy.durable_revision - copy.checkpoint_revision.min(copy.durable_revision)
                < CHECKPOINT_AFTER_REVISIONS
        })
        .filter(|copy| copy.durable_revision <= cluster.durable_revision())
        .map(|copy| Revision(copy.durable_revision))
}

fn reachable(cluster: &Cluster, carrier: ServerId) -> Result<v1::Server> {
    let state = cluster.state.lock();
    let heard = state.servers.get(&carrier).is_some_and(|member| member.standing.was_heard());
    if !heard || !state.is_reachable(carrier) {
        return Err(Error::unavailable(format!("server {carrier} is silent")));
    }
    state.server(carrier).ok_or_else(|| Error::unavailable(format!("server {carrier} is not known")))
}

/// Sends everything at the current revision.
async fn install(cluster: &Cluster, journal: &JournaledStore, server: &v1::Server) -> Result<Revision> {
    let checkpoint = journal.checkpoint()?;
    let revision = checkpoint.revision;
    tracing::info!(carrier = server.id, revision = revision.0, "sending a checkpoint");
    let first = v1::InstallCheckpointRequest {
        cluster_id: cluster.cluster_id.clone(),
        generation: cluster.generation.0,
        revision: revision.0,
        entries: Vec::new(),
        entry_count: None,
        carrier_ids: carriers_at(cluster, revision),
    };
    let (send, messages) = mpsc::channel(4);
    let call = cluster.peers.replica_within(CHECKPOINT_TIMEOUT, server, |mut client| async move {
        client.install_checkpoint(ReceiverStream::new(messages)).await
    });
    // An error in the middle ends the stream without its last message: nothing is installed then.
    let (answer, sent) = tokio::join!(call, send_entries(checkpoint, first, send));
    sent?;
    Ok(Revision(answer?.durable_revision))
}

/// Sends all entries, in messages of about [`DATA_BYTES_MAX`], the last with their number.
async fn send_entries(
    mut checkpoint: Checkpoint,
    first: v1::InstallCheckpointRequest,
    send: mpsc::Sender<v1::InstallCheckpointRequest>,
) -> Result<()> {
    let (mut message, mut bytes, mut count) = (first, 0, 0);
    while let Some(entry) = checkpoint.entries.next().await {
        let (key, value) = entry?;
        bytes += key.len() + value.value.len() + 32;
        count += 1;
        message.entries.push(v1::CheckpointEntry { key, value: value.value, revision: value.revision.0 });
        if bytes >= DATA_BYTES_MAX {
            bytes = 0;
            // A receiver that went away tells why in its answer.
            if send.send(std::mem::take(&mut message)).await.is_err() {
                return Ok(());
            }
        }
    }
    message.entry_count = Some(count);
    let _ = send.send(message).await;
    Ok(())
}
