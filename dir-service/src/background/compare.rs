//! Asks file servers what they hold and holds it against the records (promise HEALED).
//!
//! One round compares all servers that are due over a single scan of the records: digests by grant, lists where they
//! differ. A server is due at the start, when it registers, when it gets a seat, and once an interval.

use crate::{
    cluster::copies::Missing,
    directory::Directory,
    ops::view::{View, stored},
};
use cairn_core::{
    cluster::{
        compare::{Digest, GrantState, Held, Known, chunks_of, compare},
        is_member,
    },
    key,
    plan::{Key, Versioned},
    record::{self, ChunkRun, Record},
};
use cairn_proto::{
    Error, Result,
    id::{ChunkId, GrantId, GroupId, Revision, ServerId},
    limits::ORDER_CHUNKS_MAX,
    v1,
};
use futures::StreamExt as _;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::RangeInclusive,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

/// Records read at a time.
const PAGE: usize = 1_024;
/// Grants asked for in one list.
const GRANTS_A_LIST: usize = 32;
/// Lists under way at a time, a server.
const LISTS_AT_ONCE: usize = 4;
/// Longest look at what is due.
const LOOK_MS: u64 = 100;
/// When a server is asked again whose inventory did not arrive.
const RETRY_MS: u64 = 500;
/// When a server is compared again that still holds copies of groups it left.
const FORMER_MS: u64 = 1_000;
/// Chunks named missing at one server in one round; of the rest the number is kept.
const NAMED_MAX: usize = 65_536;
/// Runs without a live chunk that one round looks at.
const DEAD_RUNS_MAX: usize = 4_096;
/// Longest silence of an inventory.
const STALL: Duration = Duration::from_secs(20);

/// Compares until stopped.
pub async fn run(directory: Arc<Directory>) {
    let cluster = &directory.cluster;
    let timing = &directory.config.timing;
    let look = Duration::from_millis(timing.background_interval_ms.clamp(1, LOOK_MS));
    loop {
        let now_ms = cluster.now_ms();
        let due: Vec<ServerId> = {
            let mut state = cluster.state.lock();
            if cluster.overflowed.swap(false, Ordering::Relaxed) {
                state.servers.values_mut().for_each(|member| member.compare_ms = 0);
            }
            let due = |member: &crate::cluster::state::Member| {
                member.compare_ms <= now_ms && member.standing.is_reachable() && member.standing.was_heard()
            };
            let due: Vec<_> =
                state.servers.iter().filter(|(_, member)| due(member)).map(|(id, _)| *id).collect();
            for id in &due {
                if let Some(member) = state.servers.get_mut(id) {
                    member.compare_ms = now_ms + timing.compare_interval_ms;
                }
            }
            due
        };
        if !due.is_empty()
            && let Err(error) = round(&directory, &due, now_ms).await
        {
            tracing::debug!(%error, "a comparison was not finished");
            again(&directory, &due);
        }
        tokio::time::sleep(look).await;
    }
}

fn again(directory: &Directory, servers: &[ServerId]) {
    let mut state = directory.cluster.state.lock();
    let at_ms = directory.cluster.now_ms() + RETRY_MS.min(directory.config.timing.compare_interval_ms);
    for id in servers {
        if let Some(member) = state.servers.get_mut(id) {
            member.compare_ms = member.compare_ms.min(at_ms);
        }
    }
}

type Groups = HashMap<GroupId, record::Group>;

async fn round(directory: &Directory, due: &[ServerId], begun_ms: u64) -> Result<()> {
    let groups: Groups = directory.cluster.view().1.iter().map(|(id, group)| (*id, group.clone())).collect();
    let all = GrantId(0)..=GrantId(0);
    let asked = due.iter().map(|id| {
        let all = all.clone();
        async move { (*id, digests(directory, *id, all).await) }
    });
    let mut held: BTreeMap<ServerId, BTreeMap<u64, Digest>> = BTreeMap::new();
    for (id, digests) in futures::future::join_all(asked).await {
        match digests {
            Ok(digests) => {
                held.insert(id, digests);
            }
            Err(error) => {
                tracing::debug!(server = id.0, %error, "no inventory");
                again(directory, &[id]);
            }
        }
    }
    let Scanned { differing, revision, dead } = differing(directory, &groups, held).await?;
    for (server, grants) in differing {
        if let Err(error) = examine(directory, &groups, server, grants, begun_ms, revision).await {
            tracing::debug!(server = server.0, %error, "a comparison was not finished");
            again(directory, &[server]);
        }
    }
    match directory.leads() {
        true => super::collect::forget_runs(directory, dead).await,
        false => Ok(()),
    }
}

async fn inventory(
    directory: &Directory,
    server: ServerId,
    request: v1::InventoryRequest,
    mut take: impl FnMut(v1::InventoryResponse),
) -> Result<()> {
    let cluster = &directory.cluster;
    let server =
        cluster.state.lock().server(server).ok_or_else(|| Error::not_found("the server is not known"))?;
    let mut parts =
        cluster.peers.file(&server, |mut client| async move { client.inventory(request).await }).await?;
    loop {
        let next = tokio::time::timeout(STALL, parts.message()).await;
        let next = next.map_err(|_| Error::unavailable("an inventory stopped arriving"))?;
        match next.map_err(Error::from)? {
            Some(part) => take(part),
            None => return Ok(()),
        }
    }
}

/// What a server holds of some grants, by grant. An end of 0 means all.
pub(super) async fn digests(
    directory: &Directory,
    server: ServerId,
    grants: RangeInclusive<GrantId>,
) -> Result<BTreeMap<u64, Digest>> {
    let mut digests = BTreeMap::new();
    let request = v1::InventoryRequest {
        detail: v1::InventoryDetail::Digests as i32,
        grant_id_from: grants.start().0,
        grant_id_to: grants.end().0,
    };
    inventory(directory, server, request, |part| {
        for one in part.digests {
            digests.insert(one.grant_id, Digest { chunks: one.chunk_count, sum: one.digest });
        }
    })
    .await?;
    Ok(digests)
}

/// What a scan of all runs found.
struct Scanned {
    /// Grants of which a server holds other than it should.
    differing: BTreeMap<ServerId, Vec<GrantId>>,
    /// All runs up to this revision were compared.
    revision: Revision,
    /// Some runs of which no chunk is referred to.
    dead: Vec<(Key, Versioned)>,
}

/// Holds digests against one scan of all runs.
async fn differing(
    directory: &Directory,
    groups: &Groups,
    mut held: BTreeMap<ServerId, BTreeMap<u64, Digest>>,
) -> Result<Scanned> {
    let (mut revision, mut dead) = (None, Vec::new());
    let mut differing: BTreeMap<ServerId, Vec<GrantId>> = held.keys().map(|id| (*id, Vec::new())).collect();
    let mut current: Option<(GrantId, Digest, GroupId)> = None;
    let mut finish = |current: Option<(GrantId, Digest, GroupId)>| {
        let Some((grant, sum, group)) = current else { return };
        for (server, digests) in &mut held {
            let member = groups.get(&group).is_some_and(|group| is_member(group, *server));
            let expected = if member { sum } else { Digest::default() };
            let former = groups.get(&group).is_some_and(|group| group.former.contains(&server.0));
            // What a former member still has may count for its successor: always looked at.
            if digests.remove(&grant.0).unwrap_or_default() != expected || former {
                differing.entry(*server).or_default().push(grant);
            }
        }
    };
    let mut after: Option<Key> = None;
    loop {
        let view = View::new(directory.store.clone());
        let page = view.scan(&key::chunk_runs(), after.as_ref(), PAGE).await?;
        // Later pages show later states, too.
        revision = revision.or(view.revision());
        for (key, value) in &page.entries {
            let Some(first) = key::last_chunk(key) else { continue };
            let run = ChunkRun::from_bytes(&value.value)?;
            if dead.len() < DEAD_RUNS_MAX && run.chunks.iter().all(|chunk| chunk.live_bytes == 0) {
                dead.push((key.clone(), value.clone()));
            }
            if current.is_none_or(|(grant, ..)| grant != first.grant) {
                finish(current.replace((first.grant, Digest::default(), GroupId(run.group))));
            }
            if let Some((_, sum, _)) = &mut current {
                for (chunk, known) in chunks_of(first, &run).filter(|(_, known)| known.live) {
                    sum.add(chunk, known.length, known.checksum);
                }
            }
        }
        after = page.entries.last().map(|(key, _)| key.clone());
        if !page.more || after.is_none() {
            break;
        }
    }
    finish(current);
    for (server, digests) in held {
        let of_server = differing.entry(server).or_default();
        of_server.extend(digests.into_keys().map(GrantId));
        of_server.sort_unstable();
    }
    Ok(Scanned { differing, revision: revision.unwrap_or_default(), dead })
}

/// What a round found at one server.
#[derive(Default)]
struct Found {
    missing: BTreeMap<ChunkId, (Missing, bool)>,
    unnamed: BTreeMap<GroupId, u64>,
    garbage: Vec<ChunkId>,
    /// Groups in which a former member was found to lack something that it should still have.
    uncovered: BTreeSet<GroupId>,
    /// Good copies at a server that has no seat (any more), by group.
    surplus: BTreeMap<GroupId, Vec<ChunkId>>,
    quarantined: u64,
    quarantined_some: Vec<v1::ChunkRef>,
}

async fn examine(
    directory: &Directory,
    groups: &Groups,
    server: ServerId,
    grants: Vec<GrantId>,
    begun_ms: u64,
    scanned: Revision,
) -> Result<()> {
    let mut found = Found::default();
    {
        let lists: Vec<Vec<GrantId>> = grants.chunks(GRANTS_A_LIST).map(<[GrantId]>::to_vec).collect();
        let lists = lists.into_iter().map(|grants| list(directory, groups, server, grants));
        let mut lists = futures::stream::iter(lists).buffered(LISTS_AT_ONCE);
        while let Some(part) = lists.next().await {
            found.merge(part?);
        }
    }
    if !grants.is_empty() {
        tracing::debug!(
            server = server.0,
            grants = grants.len(),
            missing = found.missing.len(),
            garbage = found.garbage.len(),
            quarantined = found.quarantined,
            "an inventory differs"
        );
    }
    let cluster = &directory.cluster;
    {
        let now_ms = cluster.now_ms();
        let mut state = cluster.state.lock();
        state.copies.compared(server, begun_ms, &found.missing, found.unnamed);
        for group in &found.uncovered {
            state.copies.uncover(*group, server);
        }
        state.copies.set_quarantined(server, found.quarantined, found.quarantined_some);
        let former = groups.values().any(|group| group.former.contains(&server.0));
        if let Some(member) = state.servers.get_mut(&server) {
            member.standing.compare();
            member.verified_ms = Some(now_ms);
            member.verified_to = scanned;
            if former {
                member.compare_ms = member.compare_ms.min(now_ms + FORMER_MS);
            }
        }
    }
    cluster.stirred.notify_one();
    if !directory.leads() {
        // All directories compare; one acts on it.
        return Ok(());
    }
    for chunks in found.garbage.chunks(ORDER_CHUNKS_MAX) {
        cluster.collect(server, chunks, &[]).await?;
    }
    leave_groups(directory, groups, server, &found.surplus).await
}

/// Surplus copies go once all current members hold theirs; then the former member is forgotten.
async fn leave_groups(
    directory: &Directory,
    groups: &Groups,
    server: ServerId,
    surplus: &BTreeMap<GroupId, Vec<ChunkId>>,
) -> Result<()> {
    let cluster = &directory.cluster;
    let concerned: BTreeSet<GroupId> = groups
        .iter()
        .filter(|(_, group)| group.former.contains(&server.0))
        .map(|(id, _)| *id)
        .chain(surplus.keys().copied())
        .collect();
    for id in concerned {
        let now = {
            let state = cluster.state.lock();
            let group = state.groups.get(&id).map(|stored| stored.record.clone());
            group.filter(|group| !is_member(group, server) && state.is_settled(id))
        };
        // The comparison must have been made with the same seats that the copies are surplus to.
        let Some(group) = now.filter(|group| groups.get(&id).is_some_and(|seen| seen.epoch == group.epoch))
        else {
            continue;
        };
        let order = crate::cluster::state::group_to_wire(id, &group);
        for chunks in surplus.get(&id).map_or(&[][..], Vec::as_slice).chunks(ORDER_CHUNKS_MAX) {
            cluster.collect(server, chunks, std::slice::from_ref(&order)).await?;
        }
        cluster.forget_former(id, server).await?;
    }
    Ok(())
}

impl Found {
    fn merge(&mut self, other: Self) {
        for (chunk, lack) in other.missing {
            if self.missing.len() < NAMED_MAX {
                self.missing.insert(chunk, lack);
            } else {
                *self.unnamed.entry(lack.0.group).or_default() += 1;
            }
        }
        self.garbage.extend(other.garbage);
        self.uncovered.extend(other.uncovered);
        for (group, chunks) in other.surplus {
            self.surplus.entry(group).or_default().extend(chunks);
        }
        self.quarantined += other.quarantined;
        let room = crate::cluster::copies::QUARANTINED_SHOWN.saturating_sub(self.quarantined_some.len());
        self.quarantined_some.extend(other.quarantined_some.into_iter().take(room));
    }
}

/// Compares some grants by list. The order of reading is what makes the answer exact: grants, inventory, runs.
async fn list(
    directory: &Directory,
    groups: &Groups,
    server: ServerId,
    grants: Vec<GrantId>,
) -> Result<Found> {
    let (Some(from), Some(to)) = (grants.first(), grants.last()) else { return Ok(Found::default()) };
    let keys: Vec<Key> = grants.iter().map(|grant| key::grant(*grant)).collect();
    let (_, states) = directory.store.get(&keys, None).await?;
    let carried = directory.cluster.carried();
    let mut held: BTreeMap<GrantId, BTreeMap<ChunkId, Held>> = BTreeMap::new();
    let mut shown: BTreeMap<ChunkId, v1::ChunkRef> = BTreeMap::new();
    let wanted: BTreeSet<GrantId> = grants.iter().copied().collect();
    // Other grants may lie between those that differ.
    let request = v1::InventoryRequest {
        detail: v1::InventoryDetail::Chunks as i32,
        grant_id_from: from.0,
        grant_id_to: to.0,
    };
    inventory(directory, server, request, |part| {
        for one in part.chunks {
            let Some(chunk) = one.chunk else { continue };
            let Some(id) = chunk.chunk.map(ChunkId::from) else { continue };
            if wanted.contains(&id.grant) {
                let copy = Held { length: chunk.length, checksum: chunk.checksum, corrupt: one.corrupt };
                held.entry(id.grant).or_default().insert(id, copy);
                shown.insert(id, chunk);
            }
        }
    })
    .await?;
    let mut found = Found::default();
    for (grant, state) in grants.into_iter().zip(states) {
        let read = state.map(|value| stored::<record::Grant>(&value)).transpose()?;
        let is_carried = read.as_ref().is_some_and(|read| read.revision <= carried);
        let record = read.map(|read| read.record);
        let state = match &record {
            None => GrantState::Unknown,
            // Closed, but a rebuilt directory could find it open and commit its chunks.
            Some(record) if !record.closed || !is_carried => GrantState::Open,
            // What no record explains may be of a commit that was lost with the store.
            Some(record) if record.rebuilt => GrantState::Unknown,
            Some(_) => GrantState::Closed,
        };
        let Records { known, group, waiting, written } = records(directory, grant).await?;
        let group = group.or(record.map(|record| GroupId(record.group))).unwrap_or_default();
        let member = groups.get(&group).is_some_and(|group| is_member(group, server));
        let none = BTreeMap::new();
        let findings = compare(state, member, &known, held.get(&grant).unwrap_or(&none), |chunk| {
            waiting.contains(&chunk)
        });
        for (chunk, corrupt) in findings
            .missing
            .iter()
            .map(|chunk| (chunk, false))
            .chain(findings.corrupt.iter().map(|chunk| (chunk, true)))
        {
            let Some(known) = known.get(chunk).filter(|_| member) else { continue };
            let missing = Missing {
                group,
                length: known.length,
                checksum: known.checksum,
                written: written.get(chunk).copied().unwrap_or(Revision(u64::MAX)),
                at: BTreeMap::new(),
            };
            found.missing.insert(*chunk, (missing, corrupt));
        }
        if groups.get(&group).is_some_and(|group| group.former.contains(&server.0))
            && lacks_as_former(directory, group, server, (&known, &written), &findings.good)
        {
            found.uncovered.insert(group);
        }
        if !member {
            found.surplus.entry(group).or_default().extend(findings.good.iter().chain(&findings.corrupt));
        }
        found.garbage.extend(findings.garbage);
        found.quarantined += findings.quarantined.len() as u64;
        found
            .quarantined_some
            .extend(findings.quarantined.iter().filter_map(|chunk| shown.get(chunk).copied()));
    }
    found.surplus.retain(|_, chunks| !chunks.is_empty());
    Ok(found)
}

/// Whether a former member lacks something that it had when it gave its seat on.
fn lacks_as_former(
    directory: &Directory,
    group: GroupId,
    server: ServerId,
    (known, written): (&BTreeMap<ChunkId, Known>, &BTreeMap<ChunkId, Revision>),
    good: &[ChunkId],
) -> bool {
    let Some(moved) = directory.cluster.state.lock().copies.gave_on(group, server) else { return false };
    let good: BTreeSet<&ChunkId> = good.iter().collect();
    known
        .iter()
        .filter(|(chunk, known)| known.live && written.get(chunk).is_some_and(|written| *written <= moved))
        .any(|(chunk, _)| !good.contains(chunk))
}

/// All chunks of a grant that the records know.
#[derive(Default)]
struct Records {
    known: BTreeMap<ChunkId, Known>,
    group: Option<GroupId>,
    /// Those that wait for collection.
    waiting: BTreeSet<ChunkId>,
    /// The newest plan that wrote a record of each.
    written: BTreeMap<ChunkId, Revision>,
}

async fn records(directory: &Directory, grant: GrantId) -> Result<Records> {
    let view = View::new(directory.store.clone());
    let Records { mut known, mut group, mut waiting, mut written } = Records::default();
    for (prefix, is_run) in [(key::chunk_runs_of(grant), true), (key::dropped_in(grant), false)] {
        let mut after: Option<Key> = None;
        loop {
            let page = view.scan(&prefix, after.as_ref(), PAGE).await?;
            for (key, value) in &page.entries {
                let Some(chunk) = key::last_chunk(key) else { continue };
                if is_run {
                    let run = ChunkRun::from_bytes(&value.value)?;
                    group = Some(GroupId(run.group));
                    for (chunk, one) in chunks_of(chunk, &run) {
                        // Should a chunk be in two runs, it lives as long as in one of them.
                        let known = known.entry(chunk).or_insert(one);
                        let newest = written.entry(chunk).or_insert(value.revision);
                        *newest = value.revision.max(*newest);
                        if one.live {
                            *known = one;
                        }
                    }
                } else {
                    waiting.insert(chunk);
                }
            }
            after = page.entries.last().map(|(key, _)| key.clone());
            if !page.more || after.is_none() {
                break;
            }
        }
    }
    Ok(Records { known, group, waiting, written })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{store::MetaStore as _, testing::Bench};
    use cairn_core::{plan::Plan, record::RunChunk};

    #[tokio::test(start_paused = true)]
    async fn a_chunk_in_two_runs_lives_as_long_as_in_one_of_them() {
        let bench = Bench::start().await;
        let run = |inode, live: &[u64]| {
            let chunk = |live: &u64| RunChunk { length: 9, checksum: 3, live_bytes: *live, references: 0 };
            ChunkRun { inode, group: 7, chunks: live.iter().map(chunk).collect() }
        };
        let mut plan = Plan::new();
        // Whichever comes first in the order of keys.
        plan.put(key::chunk_run(ChunkId::new(5, 2)), run(8, &[0, 0, 4]).to_bytes());
        plan.put(key::chunk_run(ChunkId::new(5, 3)), run(9, &[6, 0]).to_bytes());
        bench.store.commit(plan).await.unwrap();
        let Records { known, group, waiting, .. } = records(&bench.directory, GrantId(5)).await.unwrap();
        let live: Vec<(u32, bool)> = known.iter().map(|(chunk, known)| (chunk.index, known.live)).collect();
        assert_eq!(live, [(2, false), (3, true), (4, true)]);
        assert_eq!((group, waiting.len()), (Some(GroupId(7)), 0));
        let held =
            known.keys().map(|chunk| (*chunk, Held { length: 9, checksum: 3, corrupt: false })).collect();
        let found = compare(GrantState::Closed, true, &known, &held, |_| false);
        assert_eq!(found.garbage, [ChunkId::new(5, 2)]);
    }

    #[test]
    fn what_a_round_does_not_name_is_counted_and_not_forgotten() {
        use crate::cluster::copies::{Copies, Lack};
        let (group, server) = (GroupId(7), ServerId(3));
        let like = Missing { group, length: 9, checksum: 3, written: Revision(1), at: BTreeMap::new() };
        let beyond = 100;
        let all = (NAMED_MAX + beyond) as u32;
        let chunk = |number: u32| ChunkId::new(1 + u64::from(number / 65_536), number % 65_536);
        // They were noted by name, one by one, when they were committed.
        let mut copies = Copies::default();
        for number in 0..all {
            copies.lack(chunk(number), &like, server, Lack::now(10, false));
        }
        let round = |from: u32| {
            let mut found = Found::default();
            for first in (from..all).step_by(1_000) {
                let part =
                    (first..all.min(first + 1_000)).map(|number| (chunk(number), (like.clone(), false)));
                found.merge(Found { missing: part.collect(), ..Found::default() });
            }
            found
        };
        let found = round(0);
        assert_eq!(found.missing.len(), NAMED_MAX);
        copies.compared(server, 20, &found.missing, found.unnamed);
        assert_eq!(copies.missing_at(server), u64::from(all));
        assert!(!copies.holds(group, server));
        // Those with a name are repaired; the others keep the server from counting until a round names them.
        for number in 0..NAMED_MAX as u32 {
            copies.have(chunk(number), server);
        }
        assert_eq!((copies.missing_at(server), copies.waiting()), (beyond as u64, beyond as u64));
        assert!(!copies.holds(group, server));
        let found = round(NAMED_MAX as u32);
        copies.compared(server, 30, &found.missing, found.unnamed);
        assert_eq!(copies.gaps().count(), beyond);
        assert_eq!(copies.missing_at(server), beyond as u64);
    }
}
