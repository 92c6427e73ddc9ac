//! Makes missing copies: asks the planner what comes next, has members fetch it, and counts what was stored.
//!
//! Two settings keep it from taking what users wait for: the orders that a server takes part in at a time, and the
//! bytes a second of the whole cluster ([`crate::Effort`]). Orders are begun at that rate; what runs, runs on.

use crate::{
    cluster::{
        copies::{Lack, Missing},
        state::State,
    },
    directory::Directory,
    ops::{explain::runs_near, view::View},
};
use cairn_core::cluster::{
    compare::chunks_of,
    is_member, members,
    repair::{Bounds, Gap, Order, plan},
};
use cairn_proto::{
    Result,
    id::{ChunkId, GroupId, Revision, ServerId},
    limits::ORDER_CHUNKS_MAX,
    v1,
};
use futures::{StreamExt as _, stream::FuturesUnordered};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};
use tokio::time::Instant;

/// Chunks of an order.
const CHUNKS_AN_ORDER: usize = 256;
/// Bytes of an order; at a low rate no more than a second's.
const BYTES_AN_ORDER: u64 = 64 * 1024 * 1024;
/// Gaps that a plan looks at: those with the fewest copies.
const GAPS_A_PLAN: usize = 4_096;
/// Longest that an order goes without storing a chunk.
const ORDER_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a refused order is shown as an obstacle.
const REFUSAL_MS: u64 = 30_000;
/// How far orders may be ahead of their rate, so that small ones are begun together.
const BURST: Duration = Duration::from_millis(100);
/// Pause after an order that stored nothing.
const FAILED_PAUSE: Duration = Duration::from_millis(300);

/// Repairs until stopped.
pub async fn run(directory: Arc<Directory>) {
    let cluster = &directory.cluster;
    let pause = Duration::from_millis(directory.config.timing.background_interval_ms.max(1));
    let rate = directory.config.effort.repair_bytes_per_second;
    let bounds = Bounds {
        orders_a_server: directory.config.effort.repair_orders_per_server.max(1),
        chunks_an_order: CHUNKS_AN_ORDER,
        bytes_an_order: if rate == 0 { BYTES_AN_ORDER } else { BYTES_AN_ORDER.min(rate) },
    };
    let mut under_way = FuturesUnordered::new();
    let mut busy: BTreeMap<ServerId, usize> = BTreeMap::new();
    let mut working: BTreeSet<(ServerId, ChunkId)> = BTreeSet::new();
    let mut turn = Turn { rate, next: Instant::now() };
    loop {
        if let Err(error) = look_at_suspects(&directory).await {
            tracing::debug!(%error, "reports of bad copies could not be looked at");
        }
        let gaps = gaps(&directory, &working);
        let orders = if directory.leads() { plan(&gaps, &busy, bounds) } else { Vec::new() };
        for order in orders {
            if !turn.take(order.gaps.iter().map(|number| gaps[*number].length).sum()) {
                break;
            }
            for server in [order.source, order.target] {
                *busy.entry(server).or_default() += 1;
            }
            let chunks: Vec<Gap> = order.gaps.iter().map(|number| gaps[*number].clone()).collect();
            working.extend(chunks.iter().map(|gap| (order.target, gap.chunk)));
            running(&directory, &chunks, true);
            let directory = &directory;
            under_way.push(async move {
                let stored = execute(directory, &order, &chunks).await;
                (order, chunks, stored)
            });
        }
        tokio::select! {
            Some((order, chunks, stored)) = under_way.next() => {
                for server in [order.source, order.target] {
                    if let Some(count) = busy.get_mut(&server) {
                        *count -= 1;
                    }
                }
                for gap in &chunks {
                    working.remove(&(order.target, gap.chunk));
                }
                running(&directory, &chunks, false);
                match stored {
                    Ok(0) => tokio::time::sleep(FAILED_PAUSE).await,
                    Ok(count) => tracing::debug!(target = order.target.0, source = order.source.0, count, "repaired"),
                    Err(error) => {
                        tracing::debug!(target = order.target.0, source = order.source.0, %error, "not repaired");
                        tokio::time::sleep(FAILED_PAUSE).await;
                    }
                }
            }
            () = cluster.stirred.notified() => {}
            () = tokio::time::sleep(pause) => {}
            () = tokio::time::sleep_until(turn.next), if turn.next > Instant::now() => {}
        }
    }
}

/// Counts copies that are being made, or no longer are.
fn running(directory: &Directory, chunks: &[Gap], begins: bool) {
    let bytes: u64 = chunks.iter().map(|gap| gap.length).sum();
    let mut state = directory.cluster.state.lock();
    let copies = &mut state.copies;
    if begins {
        copies.running += chunks.len() as u64;
        copies.running_bytes += bytes;
    } else {
        copies.running = copies.running.saturating_sub(chunks.len() as u64);
        copies.running_bytes = copies.running_bytes.saturating_sub(bytes);
    }
}

/// Lets orders begin at a rate.
struct Turn {
    /// Bytes a second; 0: no limit.
    rate: u64,
    next: Instant,
}

impl Turn {
    /// Whether an order of so many bytes may begin now.
    fn take(&mut self, bytes: u64) -> bool {
        let now = Instant::now();
        if self.rate == 0 {
            return true;
        }
        if self.next > now + BURST {
            return false;
        }
        self.next = self.next.max(now) + Duration::from_secs_f64(bytes as f64 / self.rate as f64);
        true
    }
}

/// Gaps that can be worked on, and what stands in the way of the others.
fn gaps(directory: &Directory, working: &BTreeSet<(ServerId, ChunkId)>) -> Vec<Gap> {
    let now_ms = directory.cluster.now_ms();
    let mut state = directory.cluster.state.lock();
    let mut gaps = Vec::new();
    let mut obstacles: BTreeMap<String, u64> = BTreeMap::new();
    for (chunk, missing) in most_urgent(&state, now_ms) {
        let Some(stored) = state.groups.get(&missing.group) else { continue };
        let group = &stored.record;
        let reachable = |server: &ServerId| state.is_reachable(*server);
        let mut sources: Vec<ServerId> = state
            .holders(missing.group)
            .into_iter()
            .filter(|server| {
                reachable(server)
                    && !missing.at.contains_key(server)
                    && !state.copies.is_unverified(missing.group, *server)
            })
            .collect();
        sources.sort_by_key(|server| server.0 != group.primary);
        let targets: Vec<ServerId> = members(group)
            .filter(|server| is_due(missing, *server, now_ms) && reachable(server))
            .filter(|server| !working.contains(&(*server, *chunk)))
            .collect();
        if sources.is_empty() {
            let holders: Vec<String> = state
                .holders(missing.group)
                .into_iter()
                .filter(|server| !missing.at.contains_key(server))
                .map(|server| server.to_string())
                .collect();
            let why = match holders.is_empty() {
                true => "no server is known to hold a good copy".to_owned(),
                false => {
                    format!("the only copies are on server {}, which does not answer", holders.join(", "))
                }
            };
            *obstacles.entry(why).or_default() += 1;
            continue;
        }
        if !targets.is_empty() {
            gaps.push(Gap {
                chunk: *chunk,
                length: missing.length,
                checksum: missing.checksum,
                group: missing.group,
                sources,
                targets,
            });
        }
    }
    for (_, group) in state.placed.iter() {
        for silent in members(group).filter(|server| !state.is_reachable(*server)) {
            *obstacles
                .entry(format!("server {silent} does not answer, and no spare server took its place"))
                .or_default() += 0;
        }
    }
    state.copies.refusals.retain(|_, (at_ms, _)| now_ms.saturating_sub(*at_ms) < REFUSAL_MS);
    for (server, (_, why)) in &state.copies.refusals {
        if state.copies.missing_at(*server) > 0 {
            obstacles.insert(format!("server {server} did not store what it lacks: {why}"), 0);
        }
    }
    let told = obstacles.into_iter().map(|(why, count)| match count {
        0 => why,
        count => format!("{count} chunk(s): {why}"),
    });
    state.copies.obstacles = told.take(16).collect();
    gaps
}

/// Whether a server lacks a chunk, and is not only late with it.
fn is_due(missing: &Missing, server: ServerId, now_ms: u64) -> bool {
    missing.at.get(&server).is_some_and(|lack| lack.late_until_ms <= now_ms)
}

/// The named gaps with the fewest copies, first those that can be worked on; some of the others are shown as obstacles.
fn most_urgent(state: &State, now_ms: u64) -> Vec<(&ChunkId, &Missing)> {
    // Of each group: who has copies to give, and who could take some.
    let mut able: BTreeMap<GroupId, (Vec<ServerId>, Vec<ServerId>)> = BTreeMap::new();
    let reachable = |servers: Vec<ServerId>| -> Vec<ServerId> {
        servers.into_iter().filter(|server| state.is_reachable(*server)).collect()
    };
    let mut urgent: Vec<(bool, usize, &ChunkId, &Missing)> = state
        .copies
        .gaps()
        .map(|(chunk, missing)| {
            let (sources, targets) = able.entry(missing.group).or_insert_with(|| {
                let seated = state.groups.get(&missing.group).map(|stored| members(&stored.record).collect());
                let mut sources = reachable(state.holders(missing.group));
                sources.retain(|server| !state.copies.is_unverified(missing.group, *server));
                (sources, reachable(seated.unwrap_or_default()))
            });
            let left = sources.iter().filter(|server| !missing.at.contains_key(server)).count();
            let waits = left == 0 || !targets.iter().any(|server| is_due(missing, *server, now_ms));
            (waits, left, chunk, missing)
        })
        .collect();
    if urgent.len() > GAPS_A_PLAN {
        urgent.select_nth_unstable_by_key(GAPS_A_PLAN, |(waits, left, chunk, _)| (*waits, *left, **chunk));
        urgent.truncate(GAPS_A_PLAN);
    }
    urgent.into_iter().map(|(_, _, chunk, missing)| (chunk, missing)).collect()
}

/// Whoever reports a bad copy may be wrong about what the records say: they are read before it counts.
async fn look_at_suspects(directory: &Directory) -> Result<()> {
    let suspects = directory.cluster.state.lock().copies.take_suspects();
    for (server, chunk) in suspects {
        let Some(like) = record_of(directory, chunk).await? else { continue };
        let mut state = directory.cluster.state.lock();
        let now_ms = directory.cluster.now_ms();
        let seated = state.groups.get(&like.group).is_some_and(|stored| is_member(&stored.record, server));
        if state.groups.get(&like.group).is_some_and(|stored| stored.record.former.contains(&server.0)) {
            state.copies.uncover(like.group, server);
        }
        if seated {
            tracing::warn!(server = server.0, %chunk, "a copy is bad");
            state.copies.lack(chunk, &like, server, Lack::now(now_ms, true));
        }
    }
    Ok(())
}

/// A live chunk as the records have it.
async fn record_of(directory: &Directory, chunk: ChunkId) -> Result<Option<Missing>> {
    let view = View::new(directory.store.clone());
    for (first, run, _) in runs_near(&view, chunk).await? {
        if let Some((_, known)) = chunks_of(first, &run).find(|(id, known)| *id == chunk && known.live) {
            return Ok(Some(Missing {
                group: run.group.into(),
                length: known.length,
                checksum: known.checksum,
                written: Revision(u64::MAX),
                at: BTreeMap::new(),
            }));
        }
    }
    Ok(None)
}

/// Has the target fetch; answers how many chunks it stored.
async fn execute(directory: &Directory, order: &Order, gaps: &[Gap]) -> Result<u64> {
    let cluster = &directory.cluster;
    // Some may have been dropped since they were found missing.
    let mut wanted = Vec::new();
    for gap in gaps.iter().take(ORDER_CHUNKS_MAX) {
        match record_of(directory, gap.chunk).await? {
            Some(_) => wanted.push(gap),
            None => cluster.state.lock().copies.forget(gap.chunk),
        }
    }
    if wanted.is_empty() {
        return Ok(1);
    }
    let (target, source, group) = {
        let state = cluster.state.lock();
        (
            state.server(order.target),
            state.server(order.source),
            state
                .groups
                .get(&order.group)
                .map(|stored| crate::cluster::state::group_to_wire(order.group, &stored.record)),
        )
    };
    let Some(target) = target else { return Ok(0) };
    let request = v1::FetchFromPrimaryRequest {
        cluster_id: cluster.cluster_id.clone(),
        group,
        source,
        chunks: wanted
            .iter()
            .map(|gap| v1::ChunkRef {
                chunk: Some(gap.chunk.into()),
                length: gap.length,
                checksum: gap.checksum,
                group_id: gap.group.0,
            })
            .collect(),
    };
    let mut answers = cluster
        .peers
        .file(&target, |mut client| async move { client.fetch_from_primary(request).await })
        .await?;
    let mut stored = 0;
    loop {
        let next = tokio::time::timeout(ORDER_TIMEOUT, answers.message()).await;
        let next = next.map_err(|_| cairn_proto::Error::unavailable("a fetch stopped making progress"))?;
        let Some(answer) = next.map_err(cairn_proto::Error::from)? else { return Ok(stored) };
        let Some(chunk) = answer.chunk.map(ChunkId::from) else { continue };
        if answer.stored {
            stored += 1;
            let mut state = cluster.state.lock();
            state.copies.have(chunk, order.target);
            state.copies.refusals.remove(&order.target);
            let bytes = wanted.iter().find(|gap| gap.chunk == chunk).map_or(0, |gap| gap.length);
            state.copies.made += 1;
            state.copies.made_bytes += bytes;
            state.copies.rate.note(cluster.now_ms(), bytes);
        } else {
            tracing::debug!(%chunk, target = order.target.0, error = %answer.error, "not fetched");
            let mut state = cluster.state.lock();
            let now_ms = cluster.now_ms();
            state.copies.refusals.insert(order.target, (now_ms, answer.error));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Bench;

    /// A group's members other than its primary, and the group.
    async fn followers(bench: &Bench) -> (GroupId, Vec<ServerId>) {
        let session = bench.session().await;
        let group = bench.grant(session).await.group.unwrap();
        let seats = group.seats.iter().map(|seat| seat.server_id);
        (GroupId(group.id), seats.filter(|id| *id != group.primary_id).map(ServerId).collect())
    }

    #[tokio::test]
    async fn gaps_that_nobody_can_close_now_hide_none_that_can_be_closed() {
        let bench = Bench::start().await;
        let (group, followers) = followers(&bench).await;
        let (away, here) = (followers[0], followers[1]);
        let like = Missing { group, length: 10, checksum: 3, written: Revision(1), at: BTreeMap::new() };
        {
            let mut state = bench.directory.cluster.state.lock();
            let lack = Lack::now(0, false);
            // Those that wait come first by their ids, and are more than a plan looks at.
            for index in 0..2 * GAPS_A_PLAN as u32 {
                state.copies.lack(ChunkId::new(1, index), &like, away, lack);
            }
            for index in 0..10 {
                state.copies.lack(ChunkId::new(2, index), &like, here, lack);
            }
            state.servers.get_mut(&away).unwrap().standing.leave();
            assert!(!state.is_reachable(away) && state.is_reachable(here));
        }
        let found = gaps(&bench.directory, &BTreeSet::new());
        let closed: Vec<ChunkId> =
            found.iter().filter(|gap| gap.targets == [here]).map(|gap| gap.chunk).collect();
        assert_eq!(closed, (0..10).map(|index| ChunkId::new(2, index)).collect::<Vec<_>>());
        let waiting = bench.directory.cluster.state.lock().copies.waiting();
        assert_eq!(waiting, 2 * GAPS_A_PLAN as u64 + 10, "none is forgotten");
    }
}
