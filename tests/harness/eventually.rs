//! Waits for a condition with a deadline, never for a time.

use std::{fmt::Debug, future::Future, time::Duration};
use tokio::time::{Instant, sleep};

/// Calls `probe` until it answers `Ok`, at most for `limit`.
///
/// # Panics
/// When the deadline passes, with the last reason.
pub async fn eventually<T, E: Debug, F: Future<Output = Result<T, E>>>(
    what: &str,
    limit: Duration,
    mut probe: impl FnMut() -> F,
) -> T {
    let deadline = Instant::now() + limit;
    loop {
        match probe().await {
            Ok(value) => return value,
            Err(reason) if Instant::now() >= deadline => {
                panic!("{what}: not within {limit:?}, last: {reason:?}")
            }
            Err(_) => sleep(Duration::from_millis(20)).await,
        }
    }
}
