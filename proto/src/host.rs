//! What a service takes from where it runs: the network, the wall clock and a seed. Monotonic time is tokio's, which
//! tests and simulation can drive; disks are handed over separately.

use crate::net::{Connect, SystemNetwork};
use std::{
    fmt,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

/// Tells the time of day. Only used to stamp files and logs; no decision ever rests on it.
pub trait WallClock: fmt::Debug + Send + Sync + 'static {
    /// Nanoseconds since 1970.
    fn unix_ns(&self) -> u64;
}

/// The clock of the machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl WallClock for SystemClock {
    fn unix_ns(&self) -> u64 {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
    }
}

/// The surroundings of a service or client.
#[derive(Clone, Debug)]
pub struct Host {
    /// Makes outgoing connections.
    pub network: Arc<dyn Connect>,
    /// Stamps files.
    pub clock: Arc<dyn WallClock>,
    /// Seeds every random choice: the same seed in the same surroundings gives the same run.
    pub seed: u64,
}

impl Host {
    /// The real network and clock, with a seed of the caller's.
    pub fn system(seed: u64) -> Self {
        Self { network: Arc::new(SystemNetwork), clock: Arc::new(SystemClock), seed }
    }
}

/// Has the C library's allocator keep two arenas instead of eight for each core, unless `MALLOC_ARENA_MAX` says
/// otherwise. Memory that tasks free on another thread than they allocated it on stays in its arena: with many, a burst
/// of work pins a multiple of what it used. Call it first in `main`, before there are threads.
pub fn few_arenas() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    if std::env::var_os("MALLOC_ARENA_MAX").is_none() {
        // SAFETY: it sets a number of the allocator; no pointer is involved.
        let set = unsafe { libc::mallopt(libc::M_ARENA_MAX, 2) };
        debug_assert_eq!(set, 1, "the allocator knows the option");
    }
}
