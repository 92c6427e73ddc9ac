//! The task that moves the oldest recent plans to the index and trims the journal.

use super::{Shared, meta::Meta};
use crate::store::{index::IndexChange, recent::Applied};
use cairn_proto::{Error, Reason, Result, id::Revision};
use disk::log::Position;
use std::{sync::Arc, time::Duration};

/// Most bytes of plans in one transaction of the index.
const APPLY_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Time before an application that failed is tried again.
const RETRY_AFTER: Duration = Duration::from_millis(500);

/// What was applied since the index was last durable.
#[derive(Default)]
struct Unsettled {
    plans: u64,
    bytes: u64,
}

pub(super) async fn run(shared: Arc<Shared>) {
    let mut newest = shared.reader.subscribe();
    let mut unsettled = Unsettled::default();
    loop {
        newest.borrow_and_update();
        let due = due(&shared);
        if due.is_empty() {
            tokio::select! {
                // The sender lives in the reader that is held here.
                _ = newest.changed() => continue,
                () = shared.stop.cancelled() => return,
            }
        }
        let done = apply(&shared, &due, &mut unsettled).await;
        let failed = done.is_err();
        report(&shared, done);
        if failed {
            tokio::select! {
                () = tokio::time::sleep(RETRY_AFTER) => {}
                () = shared.stop.cancelled() => return,
            }
        } else if shared.stop.is_cancelled() {
            return;
        }
    }
}

/// Says how the last application went, to those who wait for it.
fn report(shared: &Shared, done: Result<()>) {
    let mut lagging = shared.lagging.lock();
    match done {
        Ok(()) => *lagging = None,
        Err(error) => {
            if lagging.is_none() {
                tracing::warn!(dir = %shared.dir.display(), %error, "the directory's index cannot follow");
            }
            *lagging = Some(error);
        }
    }
    drop(lagging);
    shared.applied.notify_waiters();
}

/// The oldest plans, when there are more than are kept.
fn due(shared: &Shared) -> Vec<Arc<Applied>> {
    let config = &shared.config;
    shared.reader.recent(|recent| {
        if recent.len() < config.keep_plans + config.apply_plans && recent.bytes() < config.keep_bytes {
            return Vec::new();
        }
        // Some below the bound, so that the next one is not due with the next plan.
        let mut surplus_bytes = recent.bytes().saturating_sub(config.keep_bytes / 4 * 3);
        let mut surplus_plans = recent.len().saturating_sub(config.keep_plans);
        let mut bytes = 0;
        let due = recent.since(Revision(recent.base().0 + 1)).take_while(|plan| {
            let more = (surplus_bytes > 0 || surplus_plans > 0) && bytes < APPLY_BYTES_MAX;
            bytes += plan.bytes();
            surplus_bytes = surplus_bytes.saturating_sub(plan.bytes());
            surplus_plans = surplus_plans.saturating_sub(1);
            more
        });
        due.take(config.apply_plans).cloned().collect()
    })
}

async fn apply(shared: &Shared, plans: &[Arc<Applied>], unsettled: &mut Unsettled) -> Result<()> {
    let Some(last) = plans.last() else { return Ok(()) };
    let bytes: usize = plans.iter().map(|plan| plan.bytes()).sum();
    check_space(shared, bytes).await?;
    unsettled.plans += plans.len() as u64;
    unsettled.bytes += bytes as u64;
    let config = &shared.config;
    let durable = unsettled.bytes >= config.checkpoint_bytes || unsettled.plans >= config.checkpoint_plans;
    let changes: Vec<IndexChange> =
        plans.iter().map(|plan| (plan.revision, plan.mutations.clone())).collect();
    shared.index.apply(changes, last.revision, durable).await?;
    shared.reader.rebase(shared.index.view()?);
    while shared.reader.forget_some() {
        tokio::task::yield_now().await;
    }
    if durable {
        *unsettled = Unsettled::default();
        // The index holds the plans whatever becomes of this.
        if let Err(error) = trim(shared).await {
            tracing::warn!(dir = %shared.dir.display(), %error, "the directory's journal could not be trimmed");
        }
    }
    Ok(())
}

/// An index that runs into the end of the disk may not recover without a restart; so it is not let there.
async fn check_space(shared: &Shared, bytes: usize) -> Result<()> {
    let space = shared.disk.space(&shared.dir).await?;
    // A tree that is copied on write takes several times what changes in it.
    let needed = shared.config.index_reserve_bytes + 8 * bytes as u64;
    if space.free_bytes < needed {
        return Err(Error::new(
            Reason::NoSpace,
            format!(
                "the disk of the directory's store {} has {} bytes left, {needed} are needed: make room",
                shared.dir.display(),
                space.free_bytes
            ),
        ));
    }
    Ok(())
}

/// Removes what the journal no longer needs: neither to replay, nor for checkpoints being read, nor for file servers
/// that are a little behind.
async fn trim(shared: &Shared) -> Result<()> {
    let config = &shared.config;
    let mut segments = shared.log.segments();
    segments.sort_unstable_by_key(|segment| segment.number);
    let size =
        |segments: &[disk::log::SegmentInfo]| segments.iter().map(|s| u64::from(s.bytes_used)).sum::<u64>();
    let total = size(&segments);
    let (segment, after) = {
        let places = shared.places.lock();
        let mut needed = shared.index.durable_revision();
        if let Some(held) = places.held()
            && total < config.journal_hold_bytes_max
        {
            needed = needed.min(held);
        }
        let Some((mut segment, _)) = places.segment_of(Revision(needed.0 + 1)) else { return Ok(()) };
        // Not so far that less than the kept bytes remain.
        while let Some(at) = segments.iter().position(|info| info.number == segment)
            && at > 0
            && size(&segments[at..]) < config.journal_keep_bytes
        {
            segment = segments[at - 1].number;
        }
        // The log's own segments without any plan are not known here.
        let Some(first) = places.first_of(segment) else { return Ok(()) };
        (segment, Revision(first.0 - 1))
    };
    if after <= shared.places.lock().after {
        return Ok(());
    }
    // First it is said that the journal begins later, then it does: a crash in between leaves surplus records.
    let meta = Meta { identity: shared.identity.clone(), complete: true, journal_after: after };
    meta.write(&*shared.disk, &shared.dir).await?;
    shared.places.lock().trim(segment, after);
    let removed = shared.log.remove_segments_before(Position { segment, offset: 0 }).await?;
    tracing::debug!(dir = %shared.dir.display(), after = after.0, removed, "trimmed the directory's journal");
    Ok(())
}

/// Makes durable what the index has: the next start then replays less.
pub(super) async fn settle(shared: &Shared) -> Result<()> {
    let base = shared.reader.recent(|recent| recent.base());
    if shared.index.durable_revision() < base {
        shared.index.apply(Vec::new(), base, true).await?;
    }
    Ok(())
}
