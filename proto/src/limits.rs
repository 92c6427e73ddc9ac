//! Every limit of the contract, enforced on both sides. Sizes are bytes, times milliseconds.

/// Longest file name.
pub const NAME_BYTES_MAX: usize = 255;
/// Longest path, from the root.
pub const PATH_BYTES_MAX: usize = 4_096;
/// Most names in a path.
pub const PATH_DEPTH_MAX: usize = 255;
/// All extended attributes of an inode, names and values together.
pub const XATTR_BYTES_MAX: usize = 64 * 1024;
/// Longest name of an extended attribute.
pub const XATTR_NAME_BYTES_MAX: usize = 255;
/// Longest name a client gives itself.
pub const OWNER_BYTES_MAX: usize = 255;

/// Largest gRPC message that either side decodes.
pub const MESSAGE_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Most bytes of a chunk in one message.
pub const DATA_BYTES_MAX: usize = 1024 * 1024;
/// Bytes of a chunk in each message of a read: what fits the second level of a processor's cache at both ends.
pub const READ_DATA_BYTES: usize = 256 * 1024;
/// Largest chunk.
pub const CHUNK_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// Chunk size of streams, unless a client chooses another.
pub const CHUNK_BYTES_DEFAULT: u64 = 8 * 1024 * 1024;
/// What one checksum covers.
pub const BLOCK_BYTES: usize = 4_096;
/// Largest file: what fits a signed offset of other systems.
pub const FILE_BYTES_MAX: u64 = i64::MAX as u64;

/// Entries in a page of `List`, locks in a page of `ListLocks`.
pub const PAGE_ENTRIES_MAX: usize = 4_096;
/// The same when the caller does not say.
pub const PAGE_ENTRIES_DEFAULT: usize = 1_024;
/// Bytes of entries in a page of `List`: where the next one would be more, the page ends before it, whatever number was
/// asked for. Every entry fits by itself.
pub const PAGE_BYTES_MAX: usize = MESSAGE_BYTES_MAX / 2;
/// Extents in a page of `Lookup`.
pub const PAGE_EXTENTS_MAX: usize = 1_024;
/// Lookups in one call, and reads of short ranges.
pub const QUESTIONS_MAX: usize = 64;
/// Longest range that is read together with others.
pub const SHORT_READ_BYTES_MAX: u64 = 64 * 1024;
/// Chunks in one order or question between servers.
pub const ORDER_CHUNKS_MAX: usize = 4_096;
/// Receipts in one commit. At 64 MiB a chunk this is 256 GiB; larger files take several commits.
pub const COMMIT_RECEIPTS_MAX: usize = 4_096;
/// Edits in one commit.
pub const COMMIT_EDITS_MAX: usize = 8_192;
/// Bytes of records in one journal message.
pub const JOURNAL_BATCH_BYTES_MAX: usize = 3 * 1024 * 1024;

/// Chunk ids in one grant.
pub const GRANT_COUNT_MAX: u32 = 65_536;
/// The same when the caller does not say.
pub const GRANT_COUNT_DEFAULT: u32 = 256;
/// Chunks with consecutive ids, from a multiple of this on, that share one record of the directory. A commit of many
/// chunks fits one plan when most of them lie so.
pub const CHUNK_RUN: u32 = 64;
/// Open sessions of a cluster.
pub const SESSIONS_MAX: usize = 100_000;
/// Locks of one session.
pub const LOCKS_PER_SESSION_MAX: usize = 10_000;
/// Shared holders of one lock.
pub const LOCK_HOLDERS_MAX: usize = 1_024;
/// Open grants of one session.
pub const GRANTS_PER_SESSION_MAX: usize = 1_024;
/// Answers kept for repeated requests, a session.
pub const ANSWERS_PER_SESSION: u64 = 1_024;
/// How long the answer to a request named by a UUID is kept.
pub const ANSWER_UUID_MS: u64 = 10 * 60 * 1_000;
/// Concurrent HTTP/2 streams a connection.
pub const STREAMS_PER_CONNECTION_MAX: u32 = 1_024;
/// Connections a server accepts at a time.
pub const CONNECTIONS_MAX: usize = 16_384;
/// Those of them that have wide windows at a time; see `net::Room`.
pub const ROOMY_CONNECTIONS_MAX: usize = 64;
/// Requests a server works on at a time; more are answered OVERLOADED.
pub const REQUESTS_MAX: usize = 4_096;
/// Calls for locks that the directory works on at a time, most of which wait; they are apart from [`REQUESTS_MAX`].
pub const LOCK_REQUESTS_MAX: usize = 2_048;
/// Bytes of requests that are still arriving, of all connections to a server; a file server has this once for clients
/// and once for servers. More are answered OVERLOADED.
pub const REQUEST_BYTES_MAX: usize = 128 * 1024 * 1024;
/// Bytes of chunks on their way to readers, of all connections to a file server, until they are in the kernel's hands. A
/// read that finds no room is answered OVERLOADED.
pub const READ_BYTES_MAX: usize = 256 * 1024 * 1024;
/// Entries of a directory that can be watched.
pub const WATCHED_ENTRIES_MAX: usize = 1_000_000;
/// Bytes of names that a directory service holds for all watches together. Watches that find no room are answered
/// OVERLOADED.
pub const WATCHED_BYTES_MAX: usize = 256 * 1024 * 1024;
/// Longest wait for a lock in one call.
pub const LOCK_WAIT_MS_MAX: u64 = 60_000;

/// Life of a session without renewal.
pub const SESSION_TTL_MS_DEFAULT: u64 = 10_000;
/// Shortest life a client may ask for.
pub const SESSION_TTL_MS_MIN: u64 = 1_000;
/// Longest life a client may ask for.
pub const SESSION_TTL_MS_MAX: u64 = 600_000;

/// Time between heartbeats of a file server.
pub const HEARTBEAT_INTERVAL_MS: u64 = 500;
/// Silence after which a member drops out of one receipt.
pub const LATE_MS: u64 = 300;
/// Silence after which a server loses the primary role and new grants.
pub const SUSPECT_MS: u64 = 3_000;
/// Silence after which a server's seats go to others.
pub const DEAD_MS: u64 = 30_000;
/// Time between a drop and its collection.
pub const GRACE_MS: u64 = 30_000;
/// Longest between two renewals of a session by `client-lib`, whatever its life. A renewal carries the oldest revision
/// that the session reads at; several may be lost, and those of streams time out into single calls, before [`GRACE_MS`]
/// has passed.
pub const RENEWAL_INTERVAL_MS_MAX: u64 = GRACE_MS / 6;
/// Longest that a reader may hold dropped chunks back.
pub const READER_HOLD_MS_MAX: u64 = 3_600_000;
/// Longest that an acknowledged change may stay unshipped before commits slow down.
pub const JOURNAL_LAG_MS_MAX: u64 = 1_000;
/// Servers that carry the journal.
pub const JOURNAL_CARRIERS: usize = 3;
/// Copies, when nobody says otherwise and enough servers live.
pub const REPLICATION_DEFAULT: u32 = 3;
/// Most copies.
pub const REPLICATION_MAX: u32 = 16;
/// Directories on one store. Each reads the signs of life of all others once a second.
pub const DIRECTORIES_MAX: usize = 16;
/// Time between two signs of life of a directory that shares its store.
pub const DIRECTORY_BEAT_MS: u64 = 1_000;
/// Silence after which the others declare such a directory dead, and its sessions and its lead go to another.
pub const DIRECTORY_DEAD_MS: u64 = 5_000;
