//! Forgets the past, so that etcd's database does not grow without end. Every directory on the store does so; that another one was
//! faster is no error.
//!
//! The history of an etcd is one: this forgets that of other programs' keys too. Such programs compact by themselves as well.

use super::{Failure, Shared, api::CompactionRequest, client::CALL_TIMEOUT};
use std::{
    collections::VecDeque,
    sync::{Arc, atomic::Ordering},
};
use tokio::time::{Instant, sleep};

/// Compacts until the store is dropped.
pub(super) async fn run(shared: Arc<Shared>) {
    let keep = shared.options.keep;
    // Revisions and since when they are there.
    let mut noted: VecDeque<(Instant, i64)> = VecDeque::new();
    let mut aged = 0;
    loop {
        sleep(keep.look).await;
        let (now, seen) = (Instant::now(), shared.client.seen());
        noted.push_back((now, seen));
        while let Some((_, revision)) = noted.front().filter(|(since, _)| now - *since >= keep.age) {
            aged = *revision;
            noted.pop_front();
        }
        let before = |revisions: u64| seen.saturating_sub(i64::try_from(revisions).unwrap_or(i64::MAX));
        let target = aged.min(before(keep.revisions_min)).max(before(keep.revisions_max));
        if target <= shared.compacted.load(Ordering::Acquire).max(shared.layout.written) {
            continue;
        }
        match compact(&shared, target).await {
            Ok(()) | Err(Failure::Compacted) => {
                shared.compacted.fetch_max(target, Ordering::AcqRel);
            }
            Err(failure) => {
                tracing::warn!(error = %failure.into_error(), "etcd was not compacted, trying again")
            }
        }
    }
}

async fn compact(shared: &Shared, revision: i64) -> Result<(), Failure> {
    shared
        .client
        .read(|link| {
            let request = CompactionRequest { revision, physical: false };
            let (mut kv, request) = (shared.client.kv(&link), link.request(request, CALL_TIMEOUT));
            async move { kv.compact(request).await.map(drop) }
        })
        .await
}
