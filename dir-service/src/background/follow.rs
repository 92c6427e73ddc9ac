//! Keeps what is known of servers, groups and settings current where other directories change them, too.

use crate::directory::Directory;
use cairn_core::key;
use cairn_proto::{Error, Reason, Result, id::Revision};
use futures::{FutureExt as _, StreamExt as _, stream};
use std::{sync::Arc, time::Duration};

/// Pause before changes are followed anew after an error.
const RETRY: Duration = Duration::from_millis(200);

/// Follows until stopped.
pub async fn run(directory: Arc<Directory>) {
    loop {
        if let Err(error) = follow(&directory).await
            && error.reason != Reason::RevisionCompacted
        {
            tracing::debug!(%error, "the cluster's records are followed anew");
            tokio::time::sleep(RETRY).await;
        }
    }
}

async fn follow(directory: &Directory) -> Result<()> {
    let cluster = &directory.cluster;
    // Changes from before the first read on: none is missed between.
    let from = Revision(directory.store.revision().await?.0 + 1);
    let mut watched = Vec::new();
    for prefix in [key::servers(), key::groups(), key::settings()] {
        watched.push(directory.store.watch(prefix, from).await?);
    }
    let mut changes = stream::select_all(watched);
    cluster.reload_to(Revision(from.0 - 1)).await?;
    loop {
        let ended = || Error::unavailable("the store ended a watch");
        let mut changed = changes.next().await.ok_or_else(ended)??.revision;
        // What came meanwhile is read together.
        while let Some(next) = changes.next().now_or_never() {
            changed = changed.max(next.ok_or_else(ended)??.revision);
        }
        cluster.reload_to(changed).await?;
    }
}
