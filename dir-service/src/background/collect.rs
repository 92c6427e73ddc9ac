//! Removes dropped chunks from every server that may hold them, also from one that was away.
//!
//! A dropped chunk goes when its drop is older than the grace time and than every revision that a session still reads
//! at, within the longest time that a reader may hold it. Its record stays until every member of its group, and every
//! former member that is not known to be rid of the group's chunks, has confirmed.

use crate::{
    cluster::Cluster,
    directory::Directory,
    membership::Team,
    ops::view::{View, stored},
    sessions::History,
    store::CommitError,
};
use cairn_core::{
    cluster::compare::chunks_of,
    key,
    plan::{Key, Plan, Versioned},
    record::{ChunkRun, Dropped, Grant, Record},
};
use cairn_proto::{
    Error, Result,
    id::{ChunkId, GrantId, GroupId, Revision, ServerId},
    limits::ORDER_CHUNKS_MAX,
    v1,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

/// Dropped chunks looked at together.
const PAGE: usize = 1_024;
/// Records changed by one plan.
const STEP: usize = 48;

impl Cluster {
    /// Orders a server to remove chunks. `groups` carry the epochs that the order rests on.
    ///
    /// # Errors
    /// As the server's; nothing may be believed to be gone then.
    pub(crate) async fn collect(
        &self,
        server: ServerId,
        chunks: &[ChunkId],
        groups: &[v1::Group],
    ) -> Result<()> {
        let target =
            self.state.lock().server(server).ok_or_else(|| Error::not_found("the server is not known"))?;
        let request = v1::CollectRequest {
            cluster_id: self.cluster_id.clone(),
            generation: self.generation.0,
            chunks: chunks.iter().copied().map(v1::ChunkId::from).collect(),
            groups: groups.to_vec(),
        };
        let answer =
            self.peers.replica(&target, |mut client| async move { client.collect(request).await }).await?;
        tracing::debug!(server = server.0, removed = answer.removed, bytes = answer.freed_bytes, "collected");
        Ok(())
    }
}

/// Collects until stopped, while this directory does the background work. Nothing is collected before every session had
/// time to say what it reads.
pub async fn run(directory: Arc<Directory>) {
    loop {
        directory.leading().await;
        lead(&directory).await;
    }
}

async fn lead(directory: &Directory) {
    let timing = &directory.config.timing;
    let pause = Duration::from_millis(timing.background_interval_ms.max(1));
    tokio::time::sleep(Duration::from_millis(timing.session_ttl_ms)).await;
    let mut grace = History::new(Duration::from_millis(timing.grace_ms));
    let mut hold = History::new(Duration::from_millis(timing.reader_hold_ms_max));
    while directory.leads() {
        if let Ok(revision) = directory.store.revision().await {
            grace.note(revision);
            hold.note(revision);
        }
        // How old the drops are comes first: who reads what is asked behind it.
        let (aged, held) = (grace.then(), hold.then());
        let oldest_read = match oldest_read(directory).await {
            Ok(oldest) => oldest,
            Err(error) => {
                tracing::debug!(%error, "it could not be read what sessions read at");
                Some(Revision(0))
            }
        };
        if let Some(before) = limit(aged, held, oldest_read)
            && let Err(error) = pass(directory, before.min(directory.cluster.carried())).await
        {
            tracing::debug!(%error, "a collection was not finished, trying again");
        }
        tokio::time::sleep(pause).await;
    }
}

/// The oldest revision that any session still reads at, of all directories on the store.
async fn oldest_read(directory: &Directory) -> Result<Option<Revision>> {
    match &directory.membership {
        Some(membership) if membership.knows_readers() => Ok(Team::read(&directory.store).await?.unread()),
        Some(_) => Ok(Some(Revision(0))),
        None => Ok(directory.sessions.oldest_read()),
    }
}

/// Drops at or before this revision may be collected.
fn limit(grace: Option<Revision>, hold: Option<Revision>, oldest_read: Option<Revision>) -> Option<Revision> {
    let grace = grace?;
    let readable = oldest_read.unwrap_or(Revision(u64::MAX)).max(hold.unwrap_or_default());
    Some(grace.min(readable))
}

struct Entry {
    key: Key,
    value: Versioned,
    chunk: ChunkId,
    record: Dropped,
    /// Servers that still have to confirm.
    left: BTreeSet<ServerId>,
}

/// One pass over all dropped chunks.
async fn pass(directory: &Directory, before: Revision) -> Result<()> {
    let mut after: Option<Key> = None;
    loop {
        let page = View::new(directory.store.clone()).scan(&key::all_dropped(), after.as_ref(), PAGE).await?;
        let mut entries = Vec::new();
        for (key, value) in &page.entries {
            let Some(chunk) = key::last_chunk(key) else { continue };
            let record = stored::<Dropped>(value)?.record;
            let dropped = if record.revision == 0 { value.revision } else { Revision(record.revision) };
            if dropped <= before {
                let left = left(&directory.cluster, &record);
                entries.push(Entry { key: key.clone(), value: value.clone(), chunk, record, left });
            }
        }
        work(directory, entries).await?;
        after = page.entries.last().map(|(key, _)| key.clone());
        if !page.more || after.is_none() {
            return Ok(());
        }
    }
}

fn left(cluster: &Cluster, record: &Dropped) -> BTreeSet<ServerId> {
    let state = cluster.state.lock();
    state
        .holders(GroupId(record.group))
        .into_iter()
        .filter(|server| !record.collected.contains(&server.0))
        .filter(|server| state.servers.get(server).is_some_and(|member| !member.standing.is_gone()))
        .collect()
}

async fn work(directory: &Directory, mut entries: Vec<Entry>) -> Result<()> {
    let cluster = &directory.cluster;
    let mut orders: BTreeMap<ServerId, Vec<ChunkId>> = BTreeMap::new();
    for entry in &entries {
        for server in &entry.left {
            orders.entry(*server).or_default().push(entry.chunk);
        }
    }
    orders.retain(|server, _| cluster.state.lock().is_reachable(*server));
    let sent = orders.into_iter().map(|(server, chunks)| async move {
        let mut gone = BTreeSet::new();
        for part in chunks.chunks(ORDER_CHUNKS_MAX) {
            match cluster.collect(server, part, &[]).await {
                Ok(()) => gone.extend(part.iter().copied()),
                Err(error) => {
                    tracing::debug!(server = server.0, %error, "did not collect");
                    break;
                }
            }
        }
        (server, gone)
    });
    for (server, gone) in futures::future::join_all(sent).await {
        for entry in entries.iter_mut().filter(|entry| gone.contains(&entry.chunk)) {
            entry.left.remove(&server);
            entry.record.collected.push(server.0);
        }
    }
    let (done, waiting): (Vec<_>, Vec<_>) = entries.into_iter().partition(|entry| entry.left.is_empty());
    let noted: Vec<Entry> = waiting
        .into_iter()
        .filter(|entry| {
            // Only what is new is written.
            Dropped::from_bytes(&entry.value.value)
                .is_ok_and(|before| before.collected != entry.record.collected)
        })
        .collect();
    for part in noted.chunks(STEP) {
        let mut plan = Plan::new();
        for entry in part {
            let mut record = entry.record.clone();
            if record.revision == 0 {
                record.revision = entry.value.revision.0;
            }
            plan.require_unchanged(entry.key.clone(), Some(&entry.value));
            plan.put(entry.key.clone(), record.to_bytes());
        }
        commit(directory, plan).await?;
    }
    let mut by_grant: BTreeMap<GrantId, Vec<Entry>> = BTreeMap::new();
    for entry in done {
        by_grant.entry(entry.chunk.grant).or_default().push(entry);
    }
    for (grant, entries) in by_grant {
        for part in entries.chunks(STEP) {
            finish(directory, grant, part).await?;
        }
    }
    Ok(())
}

/// Forgets chunks that are gone everywhere, and the runs of which nothing is left. Runs of an open grant stay: they
/// say that their ids are used up, else a commit could refer to chunks that are gone ([`forget_runs`] takes them later).
async fn finish(directory: &Directory, grant: GrantId, entries: &[Entry]) -> Result<()> {
    let mut plan = Plan::new();
    let done: BTreeSet<ChunkId> = entries.iter().map(|entry| entry.chunk).collect();
    for entry in entries {
        plan.require_unchanged(entry.key.clone(), Some(&entry.value));
        plan.delete(entry.key.clone());
    }
    let view = View::new(directory.store.clone());
    if !is_closed(&view, grant).await? {
        return commit(directory, plan).await;
    }
    let mut dropped = BTreeSet::new();
    let mut runs = Vec::new();
    for (prefix, is_run) in [(key::chunk_runs_of(grant), true), (key::dropped_in(grant), false)] {
        let mut after: Option<Key> = None;
        loop {
            let page = view.scan(&prefix, after.as_ref(), PAGE).await?;
            for (key, value) in &page.entries {
                let Some(first) = key::last_chunk(key) else { continue };
                if is_run {
                    runs.push((key.clone(), value.clone(), first));
                } else {
                    dropped.insert(first);
                }
            }
            after = page.entries.last().map(|(key, _)| key.clone());
            if !page.more || after.is_none() {
                break;
            }
        }
    }
    for (key, value, first) in runs {
        let run = ChunkRun::from_bytes(&value.value)?;
        let mut touched = false;
        let mut empty = true;
        for (chunk, known) in chunks_of(first, &run) {
            touched |= done.contains(&chunk);
            empty &= !known.live && (done.contains(&chunk) || !dropped.contains(&chunk));
        }
        if touched && empty {
            plan.require_unchanged(key.clone(), Some(&value));
            plan.delete(key);
        }
    }
    commit(directory, plan).await
}

/// Whether no commit can refer to a grant any more.
async fn is_closed(view: &View, grant: GrantId) -> Result<bool> {
    let grant = view.record::<Grant>(&key::grant(grant)).await?;
    Ok(grant.is_none_or(|grant| grant.record.closed))
}

/// Forgets runs, all of whose chunks were found dead, if their grants are closed and no chunk waits for collection.
pub(super) async fn forget_runs(directory: &Directory, runs: Vec<(Key, Versioned)>) -> Result<()> {
    for part in runs.chunks(STEP) {
        let mut plan = Plan::new();
        for (key, value) in part {
            let Some(first) = key::last_chunk(key) else { continue };
            let view = View::new(directory.store.clone());
            if !is_closed(&view, first.grant).await? {
                continue;
            }
            let run = ChunkRun::from_bytes(&value.value)?;
            let dropped: Vec<Key> = chunks_of(first, &run).map(|(chunk, _)| key::dropped(chunk)).collect();
            if view.get_many(&dropped).await?.iter().all(Option::is_none) {
                plan.require_unchanged(key.clone(), Some(value));
                plan.delete(key.clone());
            }
        }
        if !plan.mutations.is_empty() {
            commit(directory, plan).await?;
        }
    }
    Ok(())
}

async fn commit(directory: &Directory, plan: Plan) -> Result<()> {
    match directory.store.commit(plan).await {
        // A conflict: somebody changed the same run. The next pass looks again.
        Ok(_) | Err(CommitError::Conflict) => Ok(()),
        Err(CommitError::Unknown(error) | CommitError::Refused(error)) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_hold_what_was_dropped_later_and_not_for_ever() {
        let at = |revision| Some(Revision(revision));
        assert_eq!(limit(None, None, None), None, "the grace time has not passed");
        assert_eq!(limit(at(100), None, None), at(100));
        assert_eq!(limit(at(100), None, at(40)), at(40));
        assert_eq!(limit(at(100), at(60), at(40)), at(60), "the longest hold has passed");
        assert_eq!(limit(at(100), at(60), at(200)), at(100));
    }
}
