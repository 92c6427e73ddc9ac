//! Commit, then tell: members learn what was committed, and those that miss chunks fetch them.
//!
//! ```text
//!   receipt without a member ---> told ---> holds it ----------------------------> counts
//!                                  ^  |                                              ^
//!                             ASK  |  | misses it: it arrives late, or is fetched ----+
//!                                  +--+
//!                                     | late_copy_ms after the commit ---> repaired as every missing copy
//! ```
//!
//! A member that is slow, or was cut off from its primary, gets what it misses without a repair: it is asked again for a
//! while whether that is there. Copying it at once would give a slow disk the same bytes twice.

use crate::{
    cluster::{Placed, copies::Missing, state::group_to_wire},
    directory::Directory,
};
use cairn_proto::{
    id::{ChunkId, GroupId, Revision, ServerId},
    limits::ORDER_CHUNKS_MAX,
    v1,
};
use futures::{StreamExt as _, stream::FuturesUnordered};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque, btree_map::Entry},
    sync::Arc,
    time::Duration,
};
use tokio::time::Instant;

/// Commits taken together.
const COMMITS_A_ROUND: usize = 1_024;
/// Between two questions whether it has it now.
const ASK: Duration = Duration::from_millis(500);
/// Late copies that are asked for; more are repaired at once.
const LATE_MAX: usize = 65_536;

type ByMember = BTreeMap<ServerId, Vec<v1::ChunkRef>>;

/// Copies that members were late with, and when to ask for them.
#[derive(Default)]
struct Late {
    waiting: VecDeque<(Instant, ServerId, v1::ChunkRef)>,
}

impl Late {
    /// Until when copies that are found missing now may come by themselves.
    fn until_ms(&self, directory: &Directory) -> u64 {
        let now_ms = directory.cluster.now_ms();
        match self.waiting.len() < LATE_MAX {
            true => now_ms + directory.config.timing.late_copy_ms,
            false => now_ms,
        }
    }

    fn ask_later(&mut self, server: ServerId, chunks: Vec<v1::ChunkRef>) {
        let at = Instant::now() + ASK;
        let room = LATE_MAX.saturating_sub(self.waiting.len());
        self.waiting.extend(chunks.into_iter().take(room).map(|chunk| (at, server, chunk)));
    }

    fn next(&self) -> Option<Instant> {
        self.waiting.front().map(|(at, ..)| *at)
    }

    /// Those to ask for now, of members that are still given time for them.
    fn due(&mut self, directory: &Directory) -> ByMember {
        let (now, now_ms) = (Instant::now(), directory.cluster.now_ms());
        let state = directory.cluster.state.lock();
        let mut due = ByMember::new();
        while self.next().is_some_and(|at| at <= now) {
            let Some((_, server, told)) = self.waiting.pop_front() else { break };
            let Some(chunk) = told.chunk.map(ChunkId::from) else { continue };
            if state.copies.is_late(chunk, server, now_ms) {
                due.entry(server).or_default().push(told);
            }
        }
        due
    }
}

/// Works the queue off. What does not arrive is found by the next comparison.
///
/// What members miss is noted as soon as it is committed, however long one of them takes to answer. Each is told of the
/// next commits when it has answered for the last ones, of all of them together.
pub async fn run(directory: Arc<Directory>) {
    let cluster = &directory.cluster;
    let Some(mut queue) = cluster.committed_queue.lock().take() else { return };
    let mut late = Late::default();
    let mut round = Vec::new();
    let mut waiting = ByMember::new();
    let mut telling = FuturesUnordered::new();
    let mut busy: BTreeMap<ServerId, usize> = BTreeMap::new();
    loop {
        let next = late.next().unwrap_or_else(|| Instant::now() + ASK);
        tokio::select! {
            count = queue.recv_many(&mut round, COMMITS_A_ROUND) => if count == 0 { return },
            Some((server, chunks)) = telling.next() => {
                late.ask_later(server, chunks);
                if let Entry::Occupied(mut orders) = busy.entry(server) {
                    *orders.get_mut() -= 1;
                    if *orders.get() == 0 {
                        orders.remove();
                    }
                }
            }
            () = tokio::time::sleep_until(next) => {}
        }
        let placed: Vec<Placed> = round.drain(..).flatten().collect();
        let late_until_ms = late.until_ms(&directory);
        for (server, chunks) in
            note(&directory, placed, late_until_ms).into_iter().chain(late.due(&directory))
        {
            waiting.entry(server).or_default().extend(chunks);
        }
        let free: Vec<ServerId> =
            waiting.keys().filter(|server| !busy.contains_key(server)).copied().collect();
        let told: ByMember = free.iter().filter_map(|server| waiting.remove_entry(server)).collect();
        for (server, request) in orders(&directory, told) {
            *busy.entry(ServerId(server.id)).or_default() += 1;
            telling.push(tell(&directory, server, request, late_until_ms));
        }
    }
}

/// Notes which members miss what; answers what each is to be told.
fn note(directory: &Directory, placed: Vec<Placed>, late_until_ms: u64) -> ByMember {
    let cluster = &directory.cluster;
    let now_ms = cluster.now_ms();
    let mut by_member = ByMember::new();
    let mut state = cluster.state.lock();
    let mut lacking = false;
    for placed in placed {
        let group = GroupId(placed.chunk.group_id);
        let Some(id) = placed.chunk.chunk.map(ChunkId::from) else { continue };
        let Some(stored) = state.groups.get(&group) else { continue };
        for member in cairn_core::cluster::members(&stored.record).collect::<Vec<_>>() {
            if !placed.holders.contains(&member) {
                let like = Missing {
                    group,
                    length: placed.chunk.length,
                    checksum: placed.chunk.checksum,
                    written: Revision(u64::MAX),
                    at: BTreeMap::new(),
                };
                state.copies.late(id, &like, member, now_ms, late_until_ms);
                // Written to the members of the epoch before: who held the seat then holds a copy.
                if state.copies.covers(group, member).is_some_and(|former| placed.holders.contains(&former)) {
                    state.copies.covered(id, member);
                }
                lacking = true;
            }
            by_member.entry(member).or_default().push(placed.chunk);
        }
    }
    if lacking {
        cluster.stirred.notify_one();
    }
    by_member
}

/// The orders: one or more for each member that can be reached.
fn orders(directory: &Directory, by_member: ByMember) -> Vec<(v1::Server, v1::ConfirmRequest)> {
    let cluster = &directory.cluster;
    let state = cluster.state.lock();
    let mut orders = Vec::new();
    for (member, chunks) in by_member {
        if !state.is_reachable(member) {
            continue;
        }
        let Some(server) = state.server(member) else { continue };
        for chunks in chunks.chunks(ORDER_CHUNKS_MAX) {
            let groups: BTreeSet<u64> = chunks.iter().map(|chunk| chunk.group_id).collect();
            let groups: Vec<v1::Group> = groups
                .into_iter()
                .filter_map(|id| {
                    let stored = state.groups.get(&GroupId(id))?;
                    Some(group_to_wire(GroupId(id), &stored.record))
                })
                .collect();
            let ids: BTreeSet<u64> =
                groups.iter().flat_map(|group| &group.seats).map(|seat| seat.server_id).collect();
            let servers = ids.into_iter().filter_map(|id| state.server(ServerId(id))).collect();
            let request = v1::ConfirmRequest {
                cluster_id: cluster.cluster_id.clone(),
                generation: cluster.generation.0,
                chunks: chunks.to_vec(),
                groups,
                servers,
            };
            orders.push((server.clone(), request));
        }
    }
    orders
}

/// Tells a member; answers what to ask it for again: what it misses, or all when it did not answer.
async fn tell(
    directory: &Directory,
    server: v1::Server,
    request: v1::ConfirmRequest,
    late_until_ms: u64,
) -> (ServerId, Vec<v1::ChunkRef>) {
    let cluster = &directory.cluster;
    let id = ServerId(server.id);
    let mut chunks = request.chunks.clone();
    match cluster.peers.replica(&server, |mut client| async move { client.confirm(request).await }).await {
        Ok(answer) => {
            let missing: BTreeSet<ChunkId> = answer.missing.iter().map(ChunkId::from).collect();
            let mut state = cluster.state.lock();
            let now_ms = cluster.now_ms();
            chunks.retain(|told| {
                let Some(chunk) = told.chunk.map(ChunkId::from) else { return false };
                let is_missing = missing.contains(&chunk);
                if is_missing {
                    // Also one that the receipt named as a holder.
                    let (group, length, checksum) = (GroupId(told.group_id), told.length, told.checksum);
                    let written = Revision(u64::MAX);
                    let like = Missing { group, length, checksum, written, at: BTreeMap::new() };
                    state.copies.late(chunk, &like, id, now_ms, late_until_ms);
                } else {
                    // A late member finished after the receipt was written.
                    state.copies.have(chunk, id);
                }
                is_missing
            });
        }
        Err(error) => tracing::debug!(server = server.id, %error, "could not be told what was committed"),
    }
    (id, chunks)
}
