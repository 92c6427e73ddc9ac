//! A piece from whichever replica delivers it: the next one is asked when one fails, is bad, silent or slow.

use crate::{
    client::Core,
    directory,
    read::{
        fetch::{Progress, fetch},
        plan::Piece,
    },
    segments::Segments,
    servers::ServerLink,
};
use cairn_proto::{Error, Reason, Result, checksum::block_salt, id::ServerId, v1};
use futures::{StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use parking_lot::Mutex;
use std::{sync::Arc, time::Duration};
use tokio::time::Instant;

/// Bounds of the wait before a second replica is asked.
const HEDGE_MIN: Duration = Duration::from_millis(20);
const HEDGE_MAX: Duration = Duration::from_millis(150);
/// Silence after which the next replica is asked whatever the budget says: the first may have been stopped.
const SILENCE: Duration = Duration::from_millis(250);
/// Silence of all replicas after which all are asked again.
const SILENCE_OF_ALL: Duration = Duration::from_secs(5);
/// Hedges a read earns: one in ten.
const HEDGES_PER_READ: f64 = 0.1;
/// Hedges saved up at most.
const HEDGES_MAX: f64 = 10.0;
/// The topology is asked for at most this often.
const TOPOLOGY_INTERVAL: Duration = Duration::from_millis(200);

/// How many second questions may still be asked.
#[derive(Debug)]
pub(crate) struct HedgeBudget(Mutex<f64>);

impl Default for HedgeBudget {
    fn default() -> Self {
        Self(Mutex::new(HEDGES_MAX / 2.0))
    }
}

impl HedgeBudget {
    fn earn(&self) {
        let mut left = self.0.lock();
        *left = (*left + HEDGES_PER_READ).min(HEDGES_MAX);
    }

    fn spend(&self) -> bool {
        let mut left = self.0.lock();
        let may = *left >= 1.0;
        if may {
            *left -= 1.0;
        }
        may
    }
}

/// An attempt under way.
struct Running {
    link: Arc<ServerLink>,
    progress: Progress,
    hedge_after: Duration,
}

type Attempt<'a> = BoxFuture<'a, (Arc<ServerLink>, Result<Segments>)>;

impl Core {
    /// Reads a piece, from as many replicas as it takes.
    ///
    /// # Errors
    /// `CHUNK_NOT_FOUND` when no member of its group has it, `CHECKSUM_MISMATCH` when all copies are bad,
    /// `UNAVAILABLE` when no copy could be reached before the deadline.
    pub async fn fetch(&self, piece: &Piece) -> Result<Segments> {
        let mut attempts = self.retry.start();
        loop {
            match self.round(piece).await {
                Err(error) if error.reason.is_transient() => {
                    attempts.pause(error).await?;
                    // Members may have changed.
                    self.refresh_topology().await;
                }
                answer => return answer,
            }
        }
    }

    /// The members of the piece's group, best first; then those that were members and may still have a copy.
    fn replicas(&self, piece: &Piece) -> Vec<Arc<ServerLink>> {
        let Some(group) = self.groups.get(&piece.chunk.group_id) else { return Vec::new() };
        let members = group.seats.iter().map(|seat| seat.server_id);
        let mut links: Vec<_> = members
            .chain(group.former_ids.iter().copied())
            .filter_map(|id| self.servers.get(ServerId(id)))
            .collect();
        let fastest = links.iter().filter_map(|link| link.high_latency()).min().unwrap_or_default();
        let chunk = piece.chunk.chunk.unwrap_or_default();
        links.sort_by_cached_key(|link| {
            let slow = link.high_latency().is_some_and(|high| high > fastest * 3 + HEDGE_MIN);
            // Among equals each chunk has its own favourite, so that load and caches spread.
            let favour = block_salt(chunk.into(), link.id.0 as u32);
            let former = group.former_ids.contains(&link.id.0);
            (former, link.is_avoided(), slow, !link.is_local(), favour)
        });
        links
    }

    async fn round(&self, piece: &Piece) -> Result<Segments> {
        self.hedges.earn();
        let mut candidates = self.replicas(piece).into_iter();
        let mut running: Vec<Running> = Vec::new();
        let mut attempts: FuturesUnordered<Attempt<'_>> = FuturesUnordered::new();
        let mut failures: Vec<(ServerId, Error)> = Vec::new();
        let mut more = true;
        loop {
            if attempts.is_empty() {
                let Some(link) = candidates.next() else {
                    return Err(verdict(piece, failures));
                };
                self.launch(link, piece, &mut running, &mut attempts);
            }
            let (patience, hedges) = self.patience(&running, more);
            tokio::select! {
                biased;
                Some((link, result)) = attempts.next() => {
                    running.retain(|other| other.link.id != link.id);
                    match result {
                        Ok(segments) => {
                            self.report(piece, &failures);
                            notice_slow(&running);
                            return Ok(segments);
                        }
                        Err(error) => {
                            tracing::debug!(server = link.id.0, %error, "a replica failed, the next is asked");
                            if matches!(error.reason, Reason::Unavailable | Reason::DeadlineExceeded) {
                                link.away(&error);
                            }
                            failures.push((link.id, error));
                            if let Some(next) = candidates.next() {
                                self.launch(next, piece, &mut running, &mut attempts);
                            }
                        }
                    }
                }
                () = tokio::time::sleep_until(patience) => {
                    // Something may have arrived meanwhile.
                    if self.patience(&running, more).0 > Instant::now() {
                        continue;
                    }
                    if !more {
                        let error = Error::unavailable("no replica answers");
                        for silent in &running {
                            silent.link.away(&error);
                            failures.push((silent.link.id, error.clone()));
                        }
                        return Err(verdict(piece, failures));
                    }
                    if hedges && !self.hedges.spend() {
                        for slow in &mut running {
                            slow.hedge_after = SILENCE;
                        }
                        continue;
                    }
                    notice_slow(&running);
                    match candidates.next() {
                        Some(next) => self.launch(next, piece, &mut running, &mut attempts),
                        None => more = false,
                    }
                }
            }
        }
    }

    fn launch<'a>(
        &self,
        link: Arc<ServerLink>,
        piece: &'a Piece,
        running: &mut Vec<Running>,
        attempts: &mut FuturesUnordered<Attempt<'a>>,
    ) {
        let hedge_after =
            link.high_latency().map_or(HEDGE_MAX, |high| (high * 3).clamp(HEDGE_MIN, HEDGE_MAX));
        let progress = Progress::new();
        running.push(Running { link: link.clone(), progress: progress.clone(), hedge_after });
        attempts.push(Box::pin(async move {
            let result = fetch(&link, piece, &progress).await;
            (link, result)
        }));
    }

    /// Until when to wait for the attempts under way, and whether going on then takes from the budget.
    fn patience(&self, running: &[Running], more: bool) -> (Instant, bool) {
        let ends = running.iter().map(|attempt| {
            let (last, began) = attempt.progress.last();
            match (more, began) {
                (false, _) => (last + SILENCE_OF_ALL, false),
                (true, true) => (last + SILENCE, false),
                (true, false) => (last + attempt.hedge_after, attempt.hedge_after < SILENCE),
            }
        });
        ends.max_by_key(|(end, _)| *end).unwrap_or((Instant::now(), false))
    }

    /// Tells the directory of bad and missing copies, in the background and only a few at a time.
    fn report(&self, piece: &Piece, failures: &[(ServerId, Error)]) {
        for (server, error) in failures {
            if !matches!(error.reason, Reason::ChecksumMismatch | Reason::ChunkNotFound) {
                continue;
            }
            let chunk = piece.chunk.chunk.unwrap_or_default();
            let key = (chunk.grant_id, chunk.index, server.0);
            if self.reported.get(&key).is_some() {
                continue;
            }
            let Ok(place) = self.reporting.clone().try_acquire_owned() else { return };
            self.reported.insert(key, ());
            let message = v1::ReportBadChunkRequest {
                chunk: Some(piece.chunk),
                server_id: server.0,
                reason: error.message().to_owned(),
            };
            let directory = self.directory.clone();
            tokio::spawn(async move {
                let _place = place;
                let told = directory
                    .call(message, |channel, request| async move {
                        directory::cluster(channel).report_bad_chunk(request).await
                    })
                    .await;
                if let Err(error) = told {
                    tracing::debug!(%error, "a bad copy could not be reported");
                }
            });
        }
    }

    /// Asks for all servers and groups, when an answer said that what is known is old.
    pub async fn refresh_topology(&self) {
        let mut refreshed = self.refreshed.lock().await;
        if refreshed.is_some_and(|at: Instant| at.elapsed() < TOPOLOGY_INTERVAL) {
            return;
        }
        let message = v1::TopologyRequest::default();
        let asked = self.directory.call(message, |channel, request| async move {
            directory::cluster(channel).topology(request).await
        });
        // One that does not answer is no reason to stop trying the replicas that are known.
        match tokio::time::timeout(Duration::from_secs(1), asked).await {
            Ok(Ok(topology)) => self.learn(&topology.groups, &topology.servers),
            Ok(Err(error)) => tracing::debug!(%error, "the topology could not be refreshed"),
            Err(_) => tracing::debug!("the topology could not be refreshed in time"),
        }
        *refreshed = Some(Instant::now());
    }
}

/// Servers that were overtaken are asked whether they live, so that the next read need not wait for them.
fn notice_slow(running: &[Running]) {
    for attempt in running {
        let (began_at, began) = attempt.progress.last();
        if began || began_at.elapsed() < attempt.hedge_after {
            continue;
        }
        let link = attempt.link.clone();
        link.answered_in(began_at.elapsed());
        tokio::spawn(async move {
            if !link.probe(link.probe_patience()).await {
                link.away(&Error::unavailable(format!("file server {} does not answer", link.name())));
            }
        });
    }
}

/// What a round without success means.
fn verdict(piece: &Piece, failures: Vec<(ServerId, Error)>) -> Error {
    let chunk = piece.chunk.chunk.map(cairn_proto::id::ChunkId::from).unwrap_or_default();
    if failures.is_empty() {
        return Error::unavailable(format!("no file server is known that holds chunk {chunk}"));
    }
    let all = |reason| failures.iter().all(|(_, error)| error.reason == reason);
    let told: Vec<_> =
        failures.iter().map(|(server, error)| format!("{server}: {}", error.message())).collect();
    let reason = if all(Reason::ChunkNotFound) {
        Reason::ChunkNotFound
    } else if failures.iter().all(|(_, error)| !error.reason.is_transient()) {
        Reason::ChecksumMismatch
    } else {
        Reason::Unavailable
    };
    let mut error =
        Error::new(reason, format!("chunk {chunk} cannot be read from any replica: {}", told.join("; ")));
    error.detail.chunks.push(piece.chunk);
    error
}
