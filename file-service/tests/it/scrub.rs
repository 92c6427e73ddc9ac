//! CHECKED: the pass that re-reads every copy goes on where it was when its server starts again.

use crate::harness::*;
use file_service::Timing;
use std::time::Duration;
use tokio::time::Instant;

/// A pass takes half of it.
const PERIOD_MS: u64 = 240_000;
const PASS: Duration = Duration::from_millis(PERIOD_MS / 2);
const CHUNKS: u32 = 24;
const CHUNK_BYTES: usize = 100_000;

#[derive(Debug)]
struct Progress {
    passes: u64,
    done: u64,
    total: u64,
}

fn progress(cluster: &Cluster) -> Progress {
    let progress = cluster.node(2).scrub.progress(PERIOD_MS);
    Progress { passes: progress.passes, done: progress.bytes_done, total: progress.bytes_total }
}

async fn until(cluster: &Cluster, what: &str, holds: impl Fn(&Progress) -> bool) {
    let deadline = Instant::now() + 3 * PASS;
    while !holds(&progress(cluster)) {
        assert!(Instant::now() < deadline, "within three passes: {what}, {:?}", progress(cluster));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// A server in the middle of a pass over chunks that were all there at its beginning.
async fn half_way() -> (Cluster, Instant) {
    let timing = Timing { scrub_period_ms: PERIOD_MS, drain_ms: 1_000, ..Timing::default() };
    let cluster = Cluster::start_with(timing).await;
    for index in 0..CHUNKS {
        cluster.write_to_all(chunk(index), &bytes(CHUNK_BYTES)).await;
    }
    let ended = progress(&cluster).passes;
    until(&cluster, "the pass that began without them ends", |progress| progress.passes > ended).await;
    let began = Instant::now();
    until(&cluster, "half of the next is done", |progress| progress.done * 2 > progress.total).await;
    let now = progress(&cluster);
    assert_eq!(now.total, u64::from(CHUNKS) * CHUNK_BYTES as u64);
    assert!(now.done < now.total);
    (cluster, began)
}

#[tokio::test(start_paused = true)]
async fn a_scrub_goes_on_where_it_was_after_a_restart() {
    let (mut cluster, began) = half_way().await;
    let (before, ran) = (progress(&cluster), began.elapsed());
    cluster.stop(2).await;
    // Time in which the server does not run is no time of the pass.
    tokio::time::sleep(10 * PASS).await;
    cluster.restart(2).await;
    let restarted = Instant::now();
    let after = progress(&cluster);
    assert_eq!((after.passes, after.total), (before.passes, before.total));
    assert!(after.done >= before.done, "{} of {} bytes were done before", after.done, before.done);
    until(&cluster, "the pass ends", |progress| progress.passes > before.passes).await;
    let took = ran + restarted.elapsed();
    assert!(took < PASS + PASS / 10, "the pass took {took:?} of running time instead of {PASS:?}");
}

#[tokio::test(start_paused = true)]
async fn a_scrub_goes_on_near_where_it_was_after_a_crash() {
    let (mut cluster, _) = half_way().await;
    let before = progress(&cluster);
    cluster.kill(2).await;
    cluster.restart(2).await;
    let after = progress(&cluster);
    assert_eq!((after.passes, after.total), (before.passes, before.total));
    // What was read since the position was kept last, 30 s ago at most, is read again.
    let lost = before.total / 4 + 2 * CHUNK_BYTES as u64;
    assert!(
        after.done > 0 && after.done + lost >= before.done,
        "{} bytes are done, {} were",
        after.done,
        before.done
    );
    let restarted = Instant::now();
    until(&cluster, "the pass ends", |progress| progress.passes > before.passes).await;
    assert!(restarted.elapsed() < PASS * 9 / 10, "it began anew: {:?}", restarted.elapsed());
}
