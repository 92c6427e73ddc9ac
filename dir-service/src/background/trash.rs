//! The reaper: works trash off, step by step. Each step is a plan; a directory that stops goes on where it was.

use crate::{
    directory::Directory,
    ops::view::View,
    store::{CommitError, KeyRange, MetaStore},
};
use cairn_core::{
    key::{self, RUN_CHUNKS},
    plan::{Key, Mutation, Plan},
    record::{ChunkRun, Extent, ExtentPage, Record, Trash},
    trash::{self, Next, Read, Runs},
};
use cairn_proto::{
    Result,
    id::{ChunkId, InodeId},
};
use std::{collections::BTreeSet, ops::Bound, sync::Arc, time::Duration};
use tokio_util::sync::CancellationToken;

/// Trash records looked at in a round.
const RECORDS_PAGE: usize = 64;
/// Chunk runs read at a time: as many as one window can hold.
const RUNS_PAGE: usize = 1_024;

/// Runs until it is told to stop.
pub async fn run(directory: Arc<Directory>, stop: CancellationToken) {
    let pause = Duration::from_millis(directory.config.timing.background_interval_ms);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = directory.leading() => {}
        }
        let mut dropped = Vec::new();
        let worked = tokio::select! {
            () = stop.cancelled() => return,
            worked = round(&directory.store, &mut dropped) => worked,
        };
        if !dropped.is_empty() {
            // Nobody wants copies of them any more, least of all where a server is away that will never come back.
            let mut state = directory.cluster.state.lock();
            dropped.into_iter().for_each(|chunk| state.copies.forget(chunk));
        }
        if let Err(error) = &worked {
            tracing::warn!(%error, "trash could not be worked off, trying again");
        }
        if !matches!(worked, Ok(1..)) {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
        }
    }
}

/// Works off the oldest trash records. Answers the number of steps; 0: there is no trash. Chunks that no version refers
/// to any more are added to `dropped`, also when it fails.
///
/// # Errors
/// As the store.
pub async fn round(store: &Arc<dyn MetaStore>, dropped: &mut Vec<ChunkId>) -> Result<u64> {
    let view = View::new(store.clone());
    let page = view.scan(&key::all_trash(), None, RECORDS_PAGE).await?;
    let mut steps = 0;
    for (key, _) in page.entries {
        while step(store, &key, dropped).await? {
            steps += 1;
            // Others come first.
            tokio::task::yield_now().await;
        }
    }
    Ok(steps)
}

/// One step of a trash record. Answers whether there was one.
async fn step(store: &Arc<dyn MetaStore>, key: &Key, dropped: &mut Vec<ChunkId>) -> Result<bool> {
    let view = View::new(store.clone());
    let (Some(versioned), Some(id)) = (view.get(key).await?, key::last_u64(key)) else { return Ok(false) };
    let record = Trash::from_bytes(&versioned.value)?;
    let read = Read { id, trash: &record, revision: versioned.revision };
    let plan = match trash::next(&record) {
        Next::Runs(extents) => account(&view, read, &extents).await?,
        Next::Pages => trash::remove_pages(read),
        Next::Leaf(number) => trash::open_leaf(read, page(&view, read, number).await?.as_ref()),
        Next::Inner(number, _) => trash::open_inner(read, page(&view, read, number).await?.as_ref()),
        Next::Nothing => trash::finish(read),
    };
    let drops = key::all_dropped();
    let dropping: Vec<ChunkId> = plan
        .mutations
        .iter()
        .filter(|mutation| matches!(mutation, Mutation::Put(..)) && mutation.key().starts_with(&drops))
        .filter_map(|mutation| key::last_chunk(mutation.key()))
        .collect();
    match store.commit(plan).await {
        Ok(_) => {
            dropped.extend(dropping);
            Ok(true)
        }
        Err(CommitError::Conflict) => Ok(true),
        Err(CommitError::Unknown(error) | CommitError::Refused(error)) => Err(error),
    }
}

async fn page(view: &View, read: Read<'_>, number: u64) -> Result<Option<ExtentPage>> {
    let inode = read.trash.inode;
    let stored = view.record::<ExtentPage>(&key::extent_page(InodeId(inode), number)).await?;
    if stored.is_none() {
        tracing::error!(inode, page = number, "a page of extents in trash is missing from the store");
    }
    Ok(stored.map(|stored| stored.record))
}

async fn account(view: &View, read: Read<'_>, extents: &[Extent]) -> Result<Plan> {
    let windows: BTreeSet<(u64, u32)> =
        extents.iter().map(|extent| (extent.grant, extent.index / RUN_CHUNKS)).collect();
    let mut runs = Runs::new();
    for (grant, window) in windows {
        let first = ChunkId::new(grant, window * RUN_CHUNKS);
        let mut range = KeyRange {
            start: Bound::Included(key::chunk_run(first)),
            end: Bound::Excluded(key::chunk_run(ChunkId::new(grant, (window + 1) * RUN_CHUNKS))),
        };
        loop {
            let page = view.scan_range(range.clone(), RUNS_PAGE).await?;
            for (key, versioned) in &page.entries {
                if let Some(first) = key::last_chunk(key) {
                    runs.insert(first, (ChunkRun::from_bytes(&versioned.value)?, versioned.revision));
                }
            }
            match page.entries.last() {
                Some((last, _)) if page.more => range = range.behind(last.clone()),
                _ => break,
            }
        }
    }
    let (plan, unknown) = trash::account(read, runs);
    for chunk in unknown {
        tracing::error!(%chunk, inode = read.trash.inode, "a chunk in trash has no record");
    }
    Ok(plan)
}
