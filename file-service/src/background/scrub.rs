//! Reads every copy within a period and compares it with its checksums, so that rot is found while other copies are
//! still good.
//!
//! ```text
//!   pass:  chunks in order of ids -----------> end --> the next pass begins when half a period has passed
//!          ^ position, kept on disk
//! ```
//!
//! A pass takes half a period: any two reads of a copy are then at most a period apart, wherever in two passes they
//! come. What is left is spread over the time that is left, so that a pass which was held up catches up, at the set
//! rate at most; a disk that cannot be read in time at that rate shows in the status as a pass that ended long ago.
//! Position, time and bytes of the pass are kept on disk ([`Scrub`]): a restart goes on where it was. Only time in
//! which the server runs counts.
//!
//! A bad copy is never served, is reported to the directory, and fetched from another member. One whose file has
//! vanished is bad, too; one that the store does not know of any more is found by the directory's comparison.

use crate::{
    node::Node,
    record_file::{self, Kind},
};
use cairn_proto::{
    Reason, Result,
    host::WallClock,
    id::{ChunkId, GrantId},
    v1,
};
use disk::Disk;
use parking_lot::Mutex;
use prost::Message;
use std::{sync::Arc, time::Duration};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

const FILE: Kind = Kind { path: "scrub", magic: b"CAIRNscr", version: 1, payload_bytes_max: 4_096 };
const PAGE: usize = 1_024;
/// Longest pause between two looks at an empty or wholly verified store.
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// How often the position is written while it moves; what was read since is read again after a crash.
const KEEP_INTERVAL: Duration = Duration::from_secs(30);

/// What is kept on disk.
#[derive(Clone, Copy, PartialEq, Message)]
struct Kept {
    /// Passes that ended.
    #[prost(uint64, tag = "1")]
    passes: u64,
    /// When the last of them did, by the wall clock: shown, never decided upon.
    #[prost(uint64, tag = "2")]
    ended_unix_ms: u64,
    /// The last chunk that is behind the pass; grant 0: it begins.
    #[prost(uint64, tag = "3")]
    grant: u64,
    #[prost(uint32, tag = "4")]
    index: u32,
    /// How long the pass has run.
    #[prost(uint64, tag = "5")]
    elapsed_ms: u64,
    /// Bytes behind it.
    #[prost(uint64, tag = "6")]
    bytes_done: u64,
    /// Bytes of all copies when it began.
    #[prost(uint64, tag = "7")]
    bytes_total: u64,
    /// Bad copies that all passes found.
    #[prost(uint64, tag = "8")]
    bad_copies: u64,
}

/// How far this server is with re-reading its copies.
#[derive(Debug)]
pub struct Scrub {
    disk: Arc<dyn Disk>,
    clock: Arc<dyn WallClock>,
    state: Mutex<State>,
}

#[derive(Clone, Copy, Debug)]
struct State {
    kept: Kept,
    /// When `kept.elapsed_ms` was counted last.
    counted: Instant,
    written: Instant,
}

impl Scrub {
    /// Reads where the last life of the server was.
    ///
    /// # Errors
    /// `IO` when the record is damaged or of another version.
    pub async fn open(disk: Arc<dyn Disk>, clock: Arc<dyn WallClock>) -> Result<Self> {
        let kept = record_file::read::<Kept>(disk.as_ref(), FILE).await?.unwrap_or_default();
        let now = Instant::now();
        Ok(Self { disk, clock, state: Mutex::new(State { kept, counted: now, written: now }) })
    }

    /// For the directory's status.
    pub fn progress(&self, period_ms: u64) -> v1::ScrubProgress {
        let kept = self.state.lock().kept;
        let now_ms = self.clock.unix_ns() / 1_000_000;
        v1::ScrubProgress {
            period_ms,
            passes: kept.passes,
            last_pass_ago_ms: if kept.passes == 0 { 0 } else { now_ms.saturating_sub(kept.ended_unix_ms) },
            bytes_done: kept.bytes_done,
            bytes_total: kept.bytes_total.max(kept.bytes_done),
            bad_copies: kept.bad_copies,
        }
    }

    /// Time passed.
    fn count(&self) -> Kept {
        let mut state = self.state.lock();
        let now = Instant::now();
        state.kept.elapsed_ms += (now - state.counted).as_millis() as u64;
        state.counted = now;
        state.kept
    }

    fn change(&self, change: impl FnOnce(&mut Kept)) {
        change(&mut self.state.lock().kept);
    }

    /// Writes the position when it is time, or at once.
    async fn keep(&self, at_once: bool) {
        let kept = {
            let mut state = self.state.lock();
            if !at_once && state.written.elapsed() < KEEP_INTERVAL {
                return;
            }
            state.written = Instant::now();
            state.kept
        };
        if let Err(error) = record_file::write(self.disk.as_ref(), FILE, &kept).await {
            tracing::debug!(%error, "the position of the scrub was not written, it is tried again later");
        }
    }
}

/// Verifies chunks until `shutdown`.
pub async fn run(node: Arc<Node>, shutdown: CancellationToken) {
    let timing = node.config.timing;
    if timing.scrub_period_ms == 0 {
        return;
    }
    let pass_ms = (timing.scrub_period_ms / 2).max(1);
    loop {
        let passing = async {
            pass(&node, pass_ms).await;
            let left = pass_ms.saturating_sub(node.scrub.count().elapsed_ms);
            tokio::time::sleep(Duration::from_millis(left)).await;
            let now_ms = node.scrub.clock.unix_ns() / 1_000_000;
            node.scrub.change(|kept| {
                *kept = Kept {
                    passes: kept.passes + 1,
                    ended_unix_ms: now_ms,
                    bad_copies: kept.bad_copies,
                    ..Kept::default()
                };
            });
            node.scrub.keep(true).await;
        };
        tokio::select! {
            () = passing => {}
            () = shutdown.cancelled() => {
                node.scrub.keep(true).await;
                return;
            }
        }
    }
}

/// The rest of a pass.
async fn pass(node: &Node, pass_ms: u64) {
    loop {
        let kept = node.scrub.count();
        if kept.grant == 0 && kept.bytes_done == 0 {
            let bytes_total = node.store.usage().used_bytes;
            node.scrub.change(|kept| kept.bytes_total = bytes_total);
        }
        let after = (kept.grant != 0).then(|| ChunkId::new(kept.grant, kept.index));
        let page = node.store.list(after, GrantId(0)..=GrantId(u64::MAX), PAGE);
        if page.is_empty() {
            return;
        }
        for info in page {
            let kept = node.scrub.count();
            let began = Instant::now();
            // A reader may have compared it already since the pass began.
            let in_pass = Duration::from_millis(kept.elapsed_ms);
            let is_done = info.verified_at.is_some_and(|at| at.elapsed() <= in_pass);
            if info.corrupt {
                // Found before, and not healed yet: asks for it again.
                node.found_bad(info.chunk);
            } else if !is_done {
                verify(node, info.chunk).await;
                let pause = share(&kept, info.length, pass_ms, node.config.timing.scrub_bytes_per_second);
                tokio::time::sleep_until(began + pause.min(PAUSE_MAX)).await;
            }
            node.scrub.change(|kept| {
                (kept.grant, kept.index) = (info.chunk.grant.0, info.chunk.index);
                kept.bytes_done += info.length;
            });
            node.scrub.keep(false).await;
        }
    }
}

async fn verify(node: &Node, chunk: ChunkId) {
    match node.store.verify(chunk).await {
        Ok(true) => {}
        Ok(false) => {
            node.scrub.change(|kept| kept.bad_copies += 1);
            node.found_bad(chunk);
        }
        // Collected in the meantime.
        Err(error) if error.reason == Reason::ChunkNotFound => {}
        Err(error) => tracing::warn!(chunk = %chunk, %error, "could not verify a chunk"),
    }
}

/// The time that a chunk may take: what is left of the pass spread over the time that is left, and never more than
/// the set rate.
fn share(kept: &Kept, length: u64, pass_ms: u64, rate: u64) -> Duration {
    let fastest = Duration::from_secs_f64(length as f64 / rate.max(1) as f64);
    let left_ms = pass_ms.saturating_sub(kept.elapsed_ms);
    let left_bytes = kept.bytes_total.saturating_sub(kept.bytes_done).max(length).max(1);
    let spread = Duration::from_millis(left_ms).mul_f64(length as f64 / left_bytes as f64);
    spread.max(fastest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_spread_over_the_time_that_is_left() {
        let kept =
            |elapsed_ms, bytes_done| Kept { elapsed_ms, bytes_done, bytes_total: 1_000, ..Kept::default() };
        let share = |kept: &Kept, length| share(kept, length, 100_000, 1_000);
        assert_eq!(share(&kept(0, 0), 10), Duration::from_secs(1));
        assert_eq!(
            share(&kept(90_000, 500), 10),
            Duration::from_millis(200),
            "it was held up and catches up"
        );
        assert_eq!(share(&kept(100_000, 900), 10), Duration::from_millis(10), "at the set rate at most");
        assert_eq!(share(&kept(0, 990), 500), Duration::from_secs(100), "more came in than was there");
    }
}
