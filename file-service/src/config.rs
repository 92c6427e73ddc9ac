//! What a file server is told: whom to ask, how it is reached, and all times.

use cairn_proto::limits;

/// The settings of a file server. Disk, network, clock and listeners are handed over separately.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Addresses of directories, `http://host:port` or `unix:/path`; whichever answers is used.
    pub directory: Vec<String>,
    /// How others reach this server, best first: `http://host:port` or `unix:/path`.
    pub advertise: Vec<String>,
    /// The failure domain this server stands in; empty means none.
    pub zone: String,
    /// All times.
    pub timing: Timing,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            directory: vec!["http://127.0.0.1:7400".to_owned()],
            advertise: vec!["http://127.0.0.1:7500".to_owned()],
            zone: String::new(),
            timing: Timing::default(),
        }
    }
}

/// All times of a file server, in milliseconds unless the name says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// Longest wait before a directory that did not answer is asked again. Default 200.
    pub register_retry_ms: u64,
    /// Time between heartbeats until the directory says otherwise. Default 500.
    pub heartbeat_interval_ms: u64,
    /// Longest wait for the directory's answer to one call. Default 2,000: a directory that hangs is as good as away.
    pub directory_call_ms: u64,
    /// Silence after which a member drops out of a receipt. Default [`limits::LATE_MS`].
    pub late_ms: u64,
    /// Longest that a write waits for the members it cannot do without. Default 10,000.
    pub write_wait_ms: u64,
    /// Time between attempts to reach a member whose connection broke. Default 100.
    pub probe_interval_ms: u64,
    /// Longest wait of one such attempt. Default 500.
    pub probe_timeout_ms: u64,
    /// Longest wait of a fetch for its next bytes before another source is tried. Default 2,000.
    pub fetch_wait_ms: u64,
    /// How long requests under way may go on when the server stops. Default 5,000.
    pub drain_ms: u64,
    /// Every chunk is read and verified once in this time. Default 14 days; 0 switches it off.
    pub scrub_period_ms: u64,
    /// Most bytes that verifying may read in a second. Default 32 MiB.
    pub scrub_bytes_per_second: u64,
    /// Time between looks for space to give back. Default 10,000.
    pub compact_interval_ms: u64,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            register_retry_ms: 200,
            heartbeat_interval_ms: limits::HEARTBEAT_INTERVAL_MS,
            directory_call_ms: 2_000,
            late_ms: limits::LATE_MS,
            write_wait_ms: 10_000,
            probe_interval_ms: 100,
            probe_timeout_ms: 500,
            fetch_wait_ms: 2_000,
            drain_ms: 5_000,
            scrub_period_ms: 14 * 24 * 3_600_000,
            scrub_bytes_per_second: 32 * 1024 * 1024,
            compact_interval_ms: 10_000,
        }
    }
}
