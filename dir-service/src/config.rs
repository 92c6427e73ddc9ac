//! What a directory can be told at its start.

use cairn_proto::limits;

/// How the directory runs. Everything has a default.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// How clients and file servers reach this directory, best first.
    pub advertise: Vec<String>,
    /// Replication factor of the cluster; `None`: 3, or as many as there are servers, raised when more come.
    pub replication: Option<u32>,
    /// Copies that must be durable before an acknowledgement; `None`: half of the factor, plus one.
    pub min_copies: Option<u32>,
    /// Memory that the store's index may keep; `None` for its default. Where the disk has no real paths, the index is
    /// in memory as a whole.
    pub index_cache_bytes: Option<usize>,
    /// All times.
    pub timing: Timing,
    /// How much background work may take from what users wait for.
    pub effort: Effort,
}

/// How much background work may take from what users wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Effort {
    /// Repair orders that a file server takes part in at a time, as the source or the target. Default 2.
    pub repair_orders_per_server: usize,
    /// Most bytes that repairs copy in a second, of the whole cluster. Default 128 MiB; 0: no limit.
    pub repair_bytes_per_second: u64,
    /// Servers whose copies differ by no more bytes are even, so that no seat moves between them. Default 64 MiB.
    pub balance_ignored_bytes: u64,
    /// Most bytes that merging extents copies in a second. Default 16 MiB; 0 switches merging off.
    pub merge_bytes_per_second: u64,
    /// Between a commit that left a file in many extents and the look at it, in milliseconds; doubled each time that
    /// a merge is given up. Default 2,000.
    pub merge_delay_ms: u64,
    /// Between two walks over all files for those that were not noted, in milliseconds. Default 6 hours.
    pub merge_walk_interval_ms: u64,
}

impl Default for Effort {
    fn default() -> Self {
        Self {
            repair_orders_per_server: 2,
            repair_bytes_per_second: 128 * 1024 * 1024,
            balance_ignored_bytes: 64 * 1024 * 1024,
            merge_bytes_per_second: 16 * 1024 * 1024,
            merge_delay_ms: 2_000,
            merge_walk_interval_ms: 6 * 3_600_000,
        }
    }
}

/// Times in milliseconds. Tests shorten them; the defaults are those of the design.
#[derive(Clone, Debug)]
pub struct Timing {
    /// Between two heartbeats of a file server.
    pub heartbeat_interval_ms: u64,
    /// Silence after which a server loses new grants and the primary role.
    pub suspect_ms: u64,
    /// Silence after which a server's seats go to others.
    pub dead_ms: u64,
    /// How long after a commit a member may get a chunk by itself that it lacked then; only then it is repaired.
    pub late_copy_ms: u64,
    /// Life of a session that does not say otherwise.
    pub session_ttl_ms: u64,
    /// Between the drop of a chunk and its collection.
    pub grace_ms: u64,
    /// Longest that a reader holds dropped chunks back.
    pub reader_hold_ms_max: u64,
    /// Between two comparisons of a file server's inventory.
    pub compare_interval_ms: u64,
    /// How long an empty directory waits for file servers that know a cluster before it forms a new one.
    pub forming_wait_ms: u64,
    /// Longest that an acknowledged change stays unshipped before commits slow down.
    pub journal_lag_ms_max: u64,
    /// Between two steps of background work that found nothing to do.
    pub background_interval_ms: u64,
    /// How long the answer to a request named by a UUID is kept.
    pub answer_uuid_ms: u64,
    /// Age at which an open grant is closed.
    pub grant_age_ms_max: u64,
    /// How long the record of a closed grant is kept at least, so that what arrives late under it is still known to be
    /// garbage.
    pub grant_keep_ms: u64,
    /// Between two signs of life of a directory that shares its store with others.
    pub directory_beat_ms: u64,
    /// Silence after which the others take the place of such a directory.
    pub directory_dead_ms: u64,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            heartbeat_interval_ms: limits::HEARTBEAT_INTERVAL_MS,
            suspect_ms: limits::SUSPECT_MS,
            dead_ms: limits::DEAD_MS,
            late_copy_ms: 5_000,
            session_ttl_ms: limits::SESSION_TTL_MS_DEFAULT,
            grace_ms: limits::GRACE_MS,
            reader_hold_ms_max: limits::READER_HOLD_MS_MAX,
            compare_interval_ms: 60_000,
            forming_wait_ms: 1_000,
            journal_lag_ms_max: limits::JOURNAL_LAG_MS_MAX,
            background_interval_ms: 500,
            answer_uuid_ms: limits::ANSWER_UUID_MS,
            grant_age_ms_max: 3_600_000,
            grant_keep_ms: 3_600_000,
            directory_beat_ms: limits::DIRECTORY_BEAT_MS,
            directory_dead_ms: limits::DIRECTORY_DEAD_MS,
        }
    }
}
