//! Merges the extents of files that many small writes left in crumbs ([`cairn_core::compaction`]).
//!
//! ```text
//!   look      extents of a file, some thousand at a time; the rule says which ranges to merge
//!   compose   the primary of a group puts a range's bytes into a chunk of a grant of the directory's own
//!   relayout  one plan swaps the chunk in; whoever wrote the range meanwhile wins
//! ```
//!
//! The bytes never pass the directory: the primary reads what it holds itself (mostly all of it, since the group that
//! has most of the bytes is taken) and stores the new chunk on all members like one that a client sends. A directory
//! or file server that dies in the middle leaves a chunk that no version refers to; its grant is closed at the
//! directory's next start, and the chunk is collected.

use crate::{
    cluster::Placed,
    directory::Directory,
    ops::{extents::load_pages, lock::place_of, view::View},
    store::CommitError,
};
use cairn_core::{
    cluster::placement,
    commit,
    compaction::{self, Merge, Relayout, extent_count, merges, relayout},
    key,
    layout::{self, Pages, Stop},
    plan::{Key, Mutation, Plan, Precondition},
    record::{Extent, Grant, Group, Inode, Layout, Record},
    session,
};
use cairn_proto::{
    Error, Reason, Result,
    id::{ChunkId, GrantId, GroupId, InodeId, ServerId, SessionId},
    v1,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};
use tokio::time::Instant;

/// Extents looked at together.
const LOOK_EXTENTS: usize = compaction::EXTENTS_MAX;
/// Files of one step of a walk.
const WALK_PAGE: usize = 256;
/// Ids of a grant of the directory's own.
const GRANT_IDS: u32 = 256;
/// Grants closed in one plan.
const CLOSE_STEP: usize = 48;
/// Times that a plan is made anew because somebody changed another part of the file.
const ATTEMPTS_MAX: u32 = 4;
/// Longest that a chunk may take to be put together.
const COMPOSE_TIMEOUT: Duration = Duration::from_secs(60);
/// Owner of the grants: no session has this id.
const NOBODY: SessionId = SessionId(0);

/// Merges until stopped. A rate of 0 switches it off.
pub async fn run(directory: Arc<Directory>) {
    let effort = directory.config.effort;
    if effort.merge_bytes_per_second == 0 {
        return;
    }
    let pause = Duration::from_millis(directory.config.timing.background_interval_ms.max(1));
    loop {
        directory.leading().await;
        lead(&directory, pause).await;
    }
}

/// Merges for as long as this directory does the background work.
async fn lead(directory: &Directory, pause: Duration) {
    let effort = directory.config.effort;
    let mut merger = Merger { directory, grants: BTreeMap::new() };
    if let Err(error) = merger.close_leftovers().await {
        tracing::debug!(%error, "grants of an earlier start are left to their age");
    }
    let mut walk = Walk { after: None, next: Instant::now() + Duration::from_millis(effort.merge_delay_ms) };
    while directory.leads() {
        if let Err(error) = walk.step(directory).await {
            tracing::debug!(%error, "files could not be walked, trying again");
        }
        let Some((inode, failures)) = directory.fragments.take() else {
            directory.fragments.wait(pause).await;
            continue;
        };
        match merger.file(inode).await {
            Ok(true) => {}
            Ok(false) => {
                directory.fragments.again(inode, failures, Duration::from_millis(effort.merge_delay_ms))
            }
            Err(error) => {
                tracing::debug!(inode = inode.0, %error, "extents could not be merged, trying again later");
                directory.fragments.again(inode, failures, Duration::from_millis(effort.merge_delay_ms));
            }
        }
    }
}

/// Notes a file that any directory wrote, so that it is known to whichever leads.
pub(super) fn note(directory: &Directory, change: &Mutation) {
    let Mutation::Put(key, value) = change else { return };
    if let (Some(id), Ok(inode)) = (key::last_u64(key), Inode::from_bytes(value)) {
        let delay = Duration::from_millis(directory.config.effort.merge_delay_ms);
        directory.fragments.note(InodeId(id), inode.layout.as_ref(), delay);
    }
}

/// A walk over all files, for those that nobody noted since the start.
struct Walk {
    after: Option<Key>,
    next: Instant,
}

impl Walk {
    /// Looks at some more files, when it is time.
    async fn step(&mut self, directory: &Directory) -> Result<()> {
        if Instant::now() < self.next {
            return Ok(());
        }
        let timing = &directory.config.timing;
        self.next = Instant::now() + Duration::from_millis(timing.background_interval_ms.max(1));
        let view = View::new(directory.store.clone());
        let page = view.scan(&key::inodes(), self.after.as_ref(), WALK_PAGE).await?;
        for (key, value) in &page.entries {
            let Some(id) = key::last_u64(key) else { continue };
            let inode = Inode::from_bytes(&value.value)?;
            directory.fragments.note(InodeId(id), inode.layout.as_ref(), Duration::ZERO);
        }
        self.after = page.entries.last().map(|(key, _)| key.clone()).filter(|_| page.more);
        if self.after.is_none() {
            self.next =
                Instant::now() + Duration::from_millis(directory.config.effort.merge_walk_interval_ms);
        }
        Ok(())
    }
}

/// A grant of the directory's own.
struct Own {
    id: GrantId,
    next: u32,
    made: Instant,
}

struct Merger<'a> {
    directory: &'a Directory,
    grants: BTreeMap<GroupId, Own>,
}

impl Merger<'_> {
    /// Merges what is worth it in a file. `false`: something was given up.
    async fn file(&mut self, id: InodeId) -> Result<bool> {
        let effort = self.directory.config.effort;
        let (mut at, mut complete) = (0, true);
        loop {
            let view = View::new(self.directory.store.clone());
            let Some(inode) = view.record::<Inode>(&key::inode(id)).await? else { return Ok(true) };
            let Some(layout) = inode.record.layout.filter(|_| inode.record.kind == v1::Kind::File as i32)
            else {
                return Ok(true);
            };
            let (extents, next) = look(&view, id, &layout, at).await?;
            for merge in merges(&extents) {
                let begun = Instant::now();
                complete &= self.merge(id, &merge).await?;
                // What users wait for comes first: so much a second, and no more.
                let share = merge.length() as f64 / effort.merge_bytes_per_second as f64;
                tokio::time::sleep_until(begun + Duration::from_secs_f64(share)).await;
            }
            match next {
                Some(next) => at = next,
                None => break,
            }
        }
        let view = View::new(self.directory.store.clone());
        if let Some(inode) = view.record::<Inode>(&key::inode(id)).await? {
            let left = inode.record.layout.as_ref().map_or(0, extent_count);
            self.directory.fragments.looked(id, left);
        }
        Ok(complete)
    }

    /// Merges one range. `false`: it was given up.
    async fn merge(&mut self, id: InodeId, merge: &Merge) -> Result<bool> {
        let cluster = &self.directory.cluster;
        let (group_id, group) = self.group(merge).await?;
        let chunk = self.chunk(group_id).await?;
        cluster.pace().await;
        let primary = cluster.state.lock().server(ServerId(group.primary));
        let primary = primary.ok_or_else(|| Error::unavailable("the primary is not known any more"))?;
        let request = v1::ComposeRequest {
            cluster_id: cluster.cluster_id.clone(),
            generation: cluster.generation.0,
            chunk: Some(chunk.into()),
            group_id: group_id.0,
            epoch: group.epoch,
            parts: merge.extents.iter().map(part).collect(),
        };
        let composed =
            cluster
                .peers
                .replica_within(COMPOSE_TIMEOUT, &primary, |mut client| async move {
                    client.compose(request).await
                })
                .await?;
        let receipts: Vec<v1::Receipt> = composed.receipt.into_iter().collect();
        let receipt = commit::receipts(&receipts)?
            .pop()
            .filter(|receipt| receipt.chunk.id == chunk && receipt.chunk.group == group_id)
            .ok_or_else(|| Error::internal(format!("server {} answered for another chunk", primary.id)))?;
        let swapped = self.swap(id, merge, &receipt).await;
        if swapped.as_ref().is_err_and(|error| error.reason == Reason::GrantClosed) {
            self.grants.remove(&group_id);
        }
        if swapped? {
            tracing::debug!(inode = id.0, extents = merge.extents.len(), bytes = merge.length(), %chunk, "merged");
            self.directory.fragments.merged(merge.extents.len() as u64, merge.length());
            cluster.committed(vec![Placed {
                chunk: v1::ChunkRef {
                    chunk: Some(chunk.into()),
                    length: receipt.chunk.length,
                    checksum: receipt.chunk.checksum,
                    group_id: group_id.0,
                },
                holders: receipt.holders.iter().copied().collect(),
            }]);
            return Ok(true);
        }
        tracing::debug!(inode = id.0, offset = merge.offset(), "a writer was faster than a merge");
        Ok(false)
    }

    /// Makes the chunk part of the file. `false`: the range was written meanwhile.
    async fn swap(&self, id: InodeId, merge: &Merge, receipt: &commit::Receipt) -> Result<bool> {
        let directory = self.directory;
        let (grant_id, group_id) = (receipt.chunk.id.grant, receipt.chunk.group);
        let trash_id = directory.ids.next().await?;
        for _ in 0..ATTEMPTS_MAX {
            let view = View::new(directory.store.clone());
            let Some(inode) = view.record::<Inode>(&key::inode(id)).await? else { return Ok(false) };
            let place = place_of(&view, Some(id), None).await?;
            let grant = view.record::<Grant>(&key::grant(grant_id)).await?;
            let grant = grant
                .ok_or_else(|| Error::new(Reason::GrantClosed, format!("grant {grant_id} is forgotten")))?;
            let group = view.record::<Group>(&key::group(group_id)).await?;
            let mut group = group.ok_or_else(|| Error::internal(format!("group {group_id} is gone")))?;
            // As in a commit: who has not acknowledged a seat does not count.
            for seat in group.record.seats.iter_mut().filter(|seat| **seat != 0) {
                if !directory.cluster.counts(group_id, group.revision, ServerId(*seat)) {
                    *seat = 0;
                }
            }
            let mut pages = Pages::new();
            let plan = loop {
                let decided = relayout(&Relayout {
                    id,
                    inode: &inode.record,
                    revision: inode.revision,
                    place: &place,
                    merge,
                    receipt,
                    grant: (&grant.record, grant.revision),
                    group: (&group.record, group.revision),
                    pages: &pages,
                    trash_id,
                });
                match decided {
                    Ok(plan) => break plan,
                    Err(Stop::Failed(error)) => return Err(error),
                    Err(Stop::NeedPages(numbers)) => load_pages(&view, id, &numbers, &mut pages).await?,
                }
            };
            let Some(plan) = plan else { return Ok(false) };
            match directory.store.commit(plan).await {
                Ok(_) => return Ok(true),
                // Another part of the file, perhaps: the next look tells.
                Err(CommitError::Conflict) => {}
                Err(CommitError::Unknown(error) | CommitError::Refused(error)) => return Err(error),
            }
        }
        Ok(false)
    }

    /// The group that takes the chunk: no fewer copies than any source has, the one with most of the bytes where it
    /// can take them.
    async fn group(&self, merge: &Merge) -> Result<(GroupId, Group)> {
        let cluster = &self.directory.cluster;
        let (candidates, placed) = cluster.view();
        let mut bytes: BTreeMap<GroupId, u64> = BTreeMap::new();
        for extent in &merge.extents {
            *bytes.entry(GroupId(extent.group)).or_default() += extent.length;
        }
        let sources: BTreeSet<GroupId> = bytes.keys().copied().collect();
        let of_sources = || placed.iter().filter(|(id, _)| sources.contains(id));
        let replicas = of_sources().map(|(_, group)| group.replicas).max().unwrap_or_default();
        let best =
            of_sources().filter(|(_, group)| group.replicas == replicas).max_by_key(|(id, _)| bytes[id]);
        if let Some(best) = best
            && placement::elect(&candidates, std::slice::from_ref(best), replicas, &[], 0).is_some()
        {
            return Ok(best.clone());
        }
        cluster.elect(replicas, &[]).await
    }

    /// The next chunk id in a group.
    async fn chunk(&mut self, group: GroupId) -> Result<ChunkId> {
        let age = Duration::from_millis(self.directory.config.timing.grant_age_ms_max / 2);
        if let Some(own) = self.grants.get(&group)
            && (own.next >= GRANT_IDS || own.made.elapsed() >= age)
        {
            let spent = own.id;
            self.grants.remove(&group);
            self.close(&[spent]).await?;
        }
        if let Some(own) = self.grants.get_mut(&group) {
            own.next += 1;
            return Ok(ChunkId { grant: own.id, index: own.next - 1 });
        }
        let id = GrantId(self.directory.ids.next().await?);
        let grant = Grant { group: group.0, session: NOBODY.0, count: GRANT_IDS, ..Grant::default() };
        let mut plan = Plan::new();
        session::give(&mut plan, id, &grant);
        self.commit(plan).await?;
        self.grants.insert(group, Own { id, next: 1, made: Instant::now() });
        Ok(ChunkId { grant: id, index: 0 })
    }

    /// Closes grants of an earlier start: nobody will commit their chunks any more.
    async fn close_leftovers(&self) -> Result<()> {
        loop {
            let view = View::new(self.directory.store.clone());
            let page = view.scan(&key::session_grants(NOBODY), None, CLOSE_STEP).await?;
            let ids: Vec<GrantId> =
                page.entries.iter().filter_map(|(key, _)| key::last_u64(key).map(GrantId)).collect();
            if ids.is_empty() {
                return Ok(());
            }
            self.close(&ids).await?;
        }
    }

    async fn close(&self, ids: &[GrantId]) -> Result<()> {
        let view = View::new(self.directory.store.clone());
        let mut plan = Plan::new();
        for id in ids {
            match view.record::<Grant>(&key::grant(*id)).await? {
                Some(grant) => session::close_grant(&mut plan, *id, &grant.record, grant.revision),
                None => {
                    plan.require(Precondition::Absent(key::grant(*id)));
                    plan.delete(key::session_grant(NOBODY, *id));
                }
            }
        }
        self.commit(plan).await
    }

    async fn commit(&self, plan: Plan) -> Result<()> {
        match self.directory.store.commit(plan).await {
            Ok(_) => Ok(()),
            Err(CommitError::Conflict) => Err(Error::unavailable("a grant changed meanwhile: try again")),
            Err(CommitError::Unknown(error) | CommitError::Refused(error)) => Err(error),
        }
    }
}

/// Some extents from a position on, and where to go on.
async fn look(view: &View, id: InodeId, layout: &Layout, at: u64) -> Result<(Vec<Extent>, Option<u64>)> {
    let mut pages = Pages::new();
    loop {
        match layout::extents_in(layout, at, u64::MAX, LOOK_EXTENTS, &pages) {
            Ok(page) => return Ok((page.extents, page.next)),
            Err(Stop::NeedPages(numbers)) => load_pages(view, id, &numbers, &mut pages).await?,
            Err(Stop::Failed(error)) => return Err(error),
        }
    }
}

fn part(extent: &Extent) -> v1::ComposePart {
    v1::ComposePart {
        chunk: Some(v1::ChunkRef {
            chunk: Some(extent.chunk().into()),
            length: extent.chunk_length,
            checksum: extent.chunk_checksum,
            group_id: extent.group,
        }),
        offset: extent.chunk_offset,
        length: extent.length,
    }
}
