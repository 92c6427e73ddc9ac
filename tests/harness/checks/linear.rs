//! LINEAR: what was acknowledged is seen by whoever asks next.

use super::{Verdict, start};
use crate::histories::{OPERATIONS, Outcome, history};
use cluster::{Builder, Cluster};
use futures::future::try_join_all;

/// Histories of so many concurrent clients, each with a session of its own, on a cluster in which nothing fails. To show
/// that a history is not linearizable, all orders of its operations are tried: of two clients that takes moments, of more
/// it may take too long to wait for.
///
/// # Errors
/// The first history that is not linearizable; an operation whose outcome is not known.
///
/// # Panics
/// When there is no cluster to begin with.
pub async fn histories(builder: Builder, seed: u64, clients: u64, count: u64) -> Verdict {
    let cluster: Cluster = start(builder.file_servers(3).memory(true).seed(seed)).await;
    let sessions = try_join_all((0..clients).map(|_| cluster.client())).await.expect("clients");
    let mut outcome = Outcome::default();
    for number in 0..count {
        let of = history(&sessions, &format!("/history-{number}"), seed ^ (number << 16)).await;
        outcome.add(&of.map_err(|why| format!("seed {seed}, history {number}: {why}"))?);
    }
    if outcome.unknown > 0 || outcome.known != count * clients * OPERATIONS {
        return Err(format!("without faults every outcome is known: {outcome:?}"));
    }
    cluster.shutdown().await.expect("a clean end");
    Ok(())
}
