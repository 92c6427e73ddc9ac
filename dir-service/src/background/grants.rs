//! Forgets grants that nothing refers to any more, so that their records do not pile up.
//!
//! ```text
//!   closed ---- grant_keep_ms, carried by the journal's carriers ----> old enough
//!      no run of chunks, none waits for collection,
//!      and every server that may hold chunks of it says that it has none ----> forgotten
//! ```
//!
//! A commit is refused for a grant that is closed and for one that is not there alike. What arrives under a forgotten
//! grant (a writer that was stopped for longer than the record is kept) is of an unknown grant: it is listed and kept,
//! and never becomes part of a file. A server that is away keeps the grants of its groups until it is back, or gone:
//! what it holds must be known as garbage when it comes.

use super::compare::digests;
use crate::{directory::Directory, ops::view::View, sessions::History, store::CommitError};
use cairn_core::{
    key,
    plan::{Key, Plan, Precondition},
    record::{Grant, Record},
};
use cairn_proto::{
    Result,
    id::{GrantId, GroupId, Revision, ServerId},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};
use tokio::time::Instant;

/// Grants looked at together; no more than one plan can remove.
const PAGE: usize = 64;
/// Parts of the time that a record is kept between two looks.
const PARTS: u32 = 16;
/// A pass is followed by a pause of so many times its length, so that many grants cost little.
const IDLE_SHARE: u32 = 20;
/// Bounds of that pause.
const PAUSE_MIN: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_secs(120);

/// Forgets until stopped.
pub async fn run(directory: Arc<Directory>) {
    let keep = Duration::from_millis(directory.config.timing.grant_keep_ms);
    let mut history = History::new(keep);
    loop {
        if let Ok(revision) = directory.store.revision().await {
            history.note(revision);
        }
        let begun = Instant::now();
        if directory.leads()
            && let Some(then) = history.then()
            && let Err(error) = pass(&directory, then.min(directory.cluster.carried())).await
        {
            tracing::debug!(%error, "closed grants could not be looked at, trying again");
        }
        let pause = (keep / PARTS).clamp(PAUSE_MIN, PAUSE_MAX);
        tokio::time::sleep(pause.max(begun.elapsed() * IDLE_SHARE)).await;
    }
}

/// A closed grant without chunks.
struct Empty {
    key: Key,
    revision: Revision,
    holders: BTreeSet<ServerId>,
}

/// One pass over all grants, those that were closed at or before a revision.
async fn pass(directory: &Directory, then: Revision) -> Result<()> {
    let mut after: Option<Key> = None;
    loop {
        let view = View::new(directory.store.clone());
        let page = view.scan(&key::grants(), after.as_ref(), PAGE).await?;
        let mut empty: BTreeMap<GrantId, Empty> = BTreeMap::new();
        for (key, value) in &page.entries {
            let Some(id) = key::last_u64(key).map(GrantId) else { continue };
            let grant = Grant::from_bytes(&value.value)?;
            if !grant.closed || value.revision > then || !is_unused(&view, id).await? {
                continue;
            }
            if let Some(holders) = holders(directory, GroupId(grant.group)) {
                empty.insert(id, Empty { key: key.clone(), revision: value.revision, holders });
            }
        }
        forget(directory, empty).await?;
        after = page.entries.last().map(|(key, _)| key.clone());
        if !page.more || after.is_none() {
            return Ok(());
        }
    }
}

/// Whether no record is about chunks of the grant.
async fn is_unused(view: &View, grant: GrantId) -> Result<bool> {
    for prefix in [key::chunk_runs_of(grant), key::dropped_in(grant)] {
        if !view.scan(&prefix, None, 1).await?.entries.is_empty() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Who may hold chunks of a group; `None` while one of them cannot be asked.
fn holders(directory: &Directory, group: GroupId) -> Option<BTreeSet<ServerId>> {
    let state = directory.cluster.state.lock();
    let holders: BTreeSet<ServerId> = state
        .holders(group)
        .into_iter()
        .filter(|server| state.servers.get(server).is_some_and(|member| !member.standing.is_gone()))
        .collect();
    (!holders.is_empty() && holders.iter().all(|server| state.is_reachable(*server))).then_some(holders)
}

/// Removes the records of those of which no server holds anything.
async fn forget(directory: &Directory, mut empty: BTreeMap<GrantId, Empty>) -> Result<()> {
    let (Some(first), Some(last)) = (empty.keys().next().copied(), empty.keys().next_back().copied()) else {
        return Ok(());
    };
    let servers: BTreeSet<ServerId> =
        empty.values().flat_map(|grant| grant.holders.iter().copied()).collect();
    for server in servers {
        let held = digests(directory, server, first..=last).await?;
        empty.retain(|id, grant| !grant.holders.contains(&server) || !held.contains_key(&id.0));
    }
    let mut plan = Plan::new();
    for grant in empty.values() {
        plan.require(Precondition::Unchanged(grant.key.clone(), Some(grant.revision)));
        plan.delete(grant.key.clone());
    }
    if plan.mutations.is_empty() {
        return Ok(());
    }
    tracing::debug!(grants = empty.len(), "closed grants are forgotten");
    match directory.store.commit(plan).await {
        Ok(_) | Err(CommitError::Conflict) => Ok(()),
        Err(CommitError::Unknown(error) | CommitError::Refused(error)) => Err(error),
    }
}
