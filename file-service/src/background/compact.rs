//! Gives the room of removed chunks back.

use crate::node::Node;
use std::{sync::Arc, time::Duration};
use tokio_util::sync::CancellationToken;

/// Calls the store's housekeeping until `shutdown`.
pub async fn run(node: Arc<Node>, shutdown: CancellationToken) {
    let interval = Duration::from_millis(node.config.timing.compact_interval_ms);
    let mut pause = interval;
    loop {
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = shutdown.cancelled() => return,
        }
        pause = match node.store.maintain().await {
            // More to do: go on soon, but let calls in between have the disk.
            Ok(true) => interval.min(Duration::from_millis(10)),
            Ok(false) => interval,
            Err(error) => {
                tracing::warn!(%error, "could not give room back");
                interval
            }
        };
    }
}
