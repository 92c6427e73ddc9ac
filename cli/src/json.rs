//! What `--json` prints. These field names are a promise: fields are added, never renamed or removed.
//!
//! * Ids (of servers, groups, inodes, sessions) are **numbers**.
//! * Sizes are bytes, spans of time are milliseconds (`_ms`).
//! * `modified` is UTC in RFC 3339 with nanoseconds: `2026-01-31T12:00:00.000000000Z`.
//! * `checksum` is the CRC-64/NVME of the content as 16 hexadecimal digits, `null` where it is not known: `ls` knows it
//!   for files of one chunk; `stat` for all but those of which a version refers to a part of a chunk (after writes in
//!   the middle) and those of more than 262,144 chunks.
//! * A lock's `token` is text, `generation.revision`, as `--token` and `CAIRN_LOCK_TOKEN` take it.
//! * Lists are arrays, also when they are empty or have one element.

use crate::output::time;
use cairn_proto::{
    checksum::{crc64, crc64_combine},
    id::FencingToken,
    v1,
};
use serde::Serialize;

/// `cairn stat`: one object a path, several as an array; also of what `write`, `mkdir`, `set` and `mv` have made.
/// All but `stat` leave `copies` and `replication` out (`set` gives `replication`).
#[derive(Debug, Serialize)]
pub struct Stat {
    pub path: String,
    /// `file` or `directory`.
    pub kind: &'static str,
    pub size: u64,
    pub version: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replication: Option<u32>,
    pub checksum: Option<String>,
    pub modified: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub copies: Option<Vec<Copy>>,
    pub inode: u64,
    pub etag: String,
    /// Permission bits.
    pub mode: u32,
}

/// A server that holds copies of a file's chunks, with the worst state of any of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Copy {
    pub server: u64,
    pub address: String,
    /// `verified`, `reported`, `missing`, `corrupt` or `unreachable`.
    pub state: String,
}

/// `cairn status`.
#[derive(Debug, Serialize)]
pub struct Status {
    pub file_servers: Vec<FileServer>,
    pub chunks: Chunks,
    pub locks: u64,
    pub files: u64,
    pub directories: u64,
    pub bytes: u64,
    pub sessions: u64,
    /// Whether every server was compared since the directory started, so that `chunks` are facts.
    pub verified: bool,
    pub reclaimable_bytes: u64,
    pub repairs: Repairs,
    pub extents: Extents,
    pub balance: Balance,
    pub directory: Directory,
}

#[derive(Debug, Serialize)]
pub struct FileServer {
    pub id: u64,
    pub address: String,
    pub zone: String,
    /// `unheard` (nothing was heard of it since the directory started), `joining`, `live`, `suspect`, `dead`, `draining` or
    /// `gone`.
    pub state: &'static str,
    /// `null`, as the next two, when nothing was heard of it since the directory started.
    pub used_bytes: Option<u64>,
    pub free_bytes: Option<u64>,
    pub chunks: Option<u64>,
    pub missing_chunks: u64,
    pub heartbeat_ago_ms: u64,
    /// `null` when it was not compared since the directory started.
    pub verified_ago_ms: Option<u64>,
    pub drained: bool,
    /// What an operator should know of it; empty when all is well.
    pub notice: String,
    /// What a drain still waits for; empty when none is under way.
    pub drain_waits_for: String,
    pub scrub: Scrub,
}

/// `cairn backup`.
#[derive(Debug, Serialize)]
pub struct Backup {
    pub cluster_id: String,
    pub generation: u64,
    pub revision: u64,
    pub records: u64,
    pub bytes: u64,
    pub file: String,
}

/// `cairn restore`.
#[derive(Debug, Serialize)]
pub struct Restored {
    pub cluster_id: String,
    pub backup_generation: u64,
    pub revision: u64,
    pub records: u64,
    pub generation: u64,
}

/// `cairn migrate`.
#[derive(Debug, Serialize)]
pub struct Migrated {
    pub cluster_id: String,
    pub revision: u64,
    pub records: u64,
    pub from_generation: u64,
    pub generation: u64,
}

/// How far a server is with re-reading all its copies.
#[derive(Debug, Serialize)]
pub struct Scrub {
    /// Every copy is re-read once in this time; 0: never.
    pub period_ms: u64,
    /// Passes that ended, in the life of the disk.
    pub passes: u64,
    /// `null` before the first.
    pub last_pass_ago_ms: Option<u64>,
    pub bytes_done: u64,
    pub bytes_total: u64,
    pub bad_copies: u64,
}

#[derive(Debug, Serialize)]
pub struct Chunks {
    pub total: u64,
    pub healthy: u64,
    pub under_replicated: u64,
    pub lost: u64,
    pub quarantined: u64,
    pub awaiting_collection: u64,
}

#[derive(Debug, Serialize)]
pub struct Repairs {
    pub chunks_waiting: u64,
    pub copies_made: u64,
    pub bytes_copied: u64,
    pub obstacles: Vec<String>,
    pub copies_missing: u64,
    pub bytes_missing: u64,
    pub copies_running: u64,
    pub bytes_running: u64,
    pub bytes_per_second: u64,
    /// `null` when nothing is missing, or nothing moves.
    pub time_left_ms: Option<u64>,
}

/// Seats that move so that every server has its share.
#[derive(Debug, Serialize)]
pub struct Balance {
    pub seats_moved: u64,
    pub moves: Vec<SeatMove>,
}

/// A seat that is changing hands.
#[derive(Debug, Serialize)]
pub struct SeatMove {
    pub group: u64,
    pub from: u64,
    /// `null` once all members hold everything, while the copies of the server before are removed.
    pub to: Option<u64>,
    pub copies_missing: u64,
}

/// Merging of extents of fragmented files, since the directory started.
#[derive(Debug, Serialize)]
pub struct Extents {
    pub files_waiting: u64,
    pub merges: u64,
    pub extents_merged: u64,
    pub bytes_copied: u64,
    pub given_up: u64,
}

#[derive(Debug, Serialize)]
pub struct Directory {
    pub cluster_id: String,
    pub generation: u64,
    pub revision: u64,
    pub shipped_revision: u64,
    pub journal_lag_ms: u64,
    pub journal_lag_ms_max: u64,
    pub carriers: Vec<u64>,
    /// `serving`, `confirming`, `rebuilding` or `forming`.
    pub mode: String,
    pub reason: String,
    pub disk_total_bytes: u64,
    pub disk_free_bytes: u64,
}

/// `cairn locks`: an array of these.
#[derive(Debug, Serialize)]
pub struct Lock {
    pub path: String,
    /// `null` for a name that does not exist yet.
    pub inode: Option<u64>,
    /// `exclusive` or `shared`.
    pub mode: &'static str,
    pub token: String,
    pub session: u64,
    pub owner: String,
    pub expires_in_ms: u64,
}

/// `cairn unlock`.
#[derive(Debug, Serialize)]
pub struct Unlock {
    pub path: String,
    /// Holders whose lock was taken away; 0 when it was not locked.
    pub ended: u32,
}

/// `cairn up`, when it is ready.
#[derive(Debug, Serialize)]
pub struct Up {
    pub directory: String,
    pub file_servers: Vec<String>,
    pub data: String,
}

/// `cairn forget`.
#[derive(Debug, Serialize)]
pub struct Forget {
    pub server: u64,
}

/// `cairn rebuild`.
#[derive(Debug, Serialize)]
pub struct Rebuild {
    pub revision: u64,
}

/// `cairn explain`.
#[derive(Debug, Serialize)]
pub struct Explain {
    pub path: String,
    pub size: u64,
    pub version: u64,
    pub replication: u32,
    pub chunks: Vec<Chunk>,
    pub locks: Vec<Lock>,
}

/// A run of a file's bytes and where it is. A hole has no chunk and no copies.
#[derive(Debug, Serialize)]
pub struct Chunk {
    pub offset: u64,
    pub length: u64,
    /// `grant.index`, `null` for a hole.
    pub chunk: Option<String>,
    pub checksum: Option<String>,
    pub group: u64,
    pub epoch: u64,
    pub primary: u64,
    pub members: Vec<u64>,
    pub copies: Vec<ChunkCopy>,
    /// Why these servers.
    pub reason: String,
    /// What will be repaired next; empty when nothing.
    pub next_repair: String,
}

#[derive(Debug, Serialize)]
pub struct ChunkCopy {
    pub server: u64,
    pub address: String,
    pub state: String,
    pub verified_ago_ms: u64,
    pub primary: bool,
}

/// `cairn drain`.
#[derive(Debug, Serialize)]
pub struct Drain {
    pub server: u64,
    pub seats_left: u64,
    pub drained: bool,
    /// What it still waits for; empty when it is drained.
    pub waits_for: String,
}

/// `cairn health`.
#[derive(Debug, Serialize)]
pub struct Health {
    pub address: String,
    pub serving: bool,
}

/// `cairn rm`, `put` and `get`: what was done.
#[derive(Debug, Default, Serialize)]
pub struct Done {
    pub files: u64,
    pub directories: u64,
    pub bytes: u64,
    pub failed: u64,
    pub skipped: u64,
}

/// `file`, `directory` or, from a newer server, `unknown`.
pub fn kind(kind: v1::Kind) -> &'static str {
    match kind {
        v1::Kind::File => "file",
        v1::Kind::Directory => "directory",
        v1::Kind::Unspecified => "unknown",
    }
}

/// The state of a server in small letters.
pub fn state(state: v1::ServerState) -> &'static str {
    match state {
        v1::ServerState::Joining => "joining",
        v1::ServerState::Live => "live",
        v1::ServerState::Suspect => "suspect",
        v1::ServerState::Dead => "dead",
        v1::ServerState::Draining => "draining",
        v1::ServerState::Gone => "gone",
        v1::ServerState::Unspecified => "unknown",
    }
}

/// A checksum as text.
pub fn checksum(checksum: u64) -> String {
    format!("{checksum:016x}")
}

/// The best way to a server, for people.
pub fn address(server: &v1::Server) -> String {
    server.endpoints.first().map(|endpoint| endpoint.uri.clone()).unwrap_or_default()
}

/// The content's checksum: as recorded, or that of no bytes.
pub fn content_checksum(attributes: &v1::Attributes) -> Option<String> {
    if attributes.kind() != v1::Kind::File {
        return None;
    }
    attributes.checksum.map(checksum)
}

/// The checksum of a whole content from those of its chunks, where every chunk is there as a whole.
pub fn combined_checksum(size: u64, chunks: &[v1::ChunkStatus]) -> Option<String> {
    let mut extents: Vec<_> = chunks.iter().filter_map(|chunk| chunk.extent.as_ref()).collect();
    extents.sort_by_key(|extent| extent.offset);
    let (mut sum, mut at) = (crc64(&[]), 0);
    for extent in extents {
        // What no extent covers is zeros, as a hole is.
        sum = crc64_combine(sum, zeros(extent.offset.checked_sub(at)?), extent.offset - at);
        let part = match &extent.chunk {
            Some(chunk) if extent.chunk_offset == 0 && extent.length == chunk.length => chunk.checksum,
            Some(_) => return None,
            None => zeros(extent.length),
        };
        sum = crc64_combine(sum, part, extent.length);
        at = extent.offset.checked_add(extent.length)?;
    }
    let rest = size.checked_sub(at)?;
    Some(checksum(crc64_combine(sum, zeros(rest), rest)))
}

/// The checksum of so many zeros, by doubling.
fn zeros(count: u64) -> u64 {
    let (mut sum, mut length) = (crc64(&[]), 0_u64);
    for bit in (0..u64::BITS - count.leading_zeros()).rev() {
        sum = crc64_combine(sum, sum, length);
        length *= 2;
        if count >> bit & 1 == 1 {
            sum = crc64_combine(sum, crc64(&[0]), 1);
            length += 1;
        }
    }
    sum
}

impl Stat {
    /// Without what only `explain` knows.
    pub fn new(path: String, attributes: &v1::Attributes) -> Self {
        Self {
            path,
            kind: kind(attributes.kind()),
            size: attributes.size,
            version: attributes.version,
            replication: None,
            checksum: content_checksum(attributes),
            modified: time(attributes.mtime_ns),
            copies: None,
            inode: attributes.inode,
            etag: attributes.etag.clone(),
            mode: attributes.mode,
        }
    }
}

impl From<v1::LockInfo> for Lock {
    fn from(lock: v1::LockInfo) -> Self {
        Self {
            mode: if lock.mode() == v1::LockMode::Shared { "shared" } else { "exclusive" },
            token: FencingToken::from(lock.token.unwrap_or_default()).to_string(),
            inode: Some(lock.inode).filter(|inode| *inode != 0),
            path: lock.path,
            session: lock.session_id,
            owner: lock.owner,
            expires_in_ms: lock.expires_in_ms,
        }
    }
}

impl From<v1::StatusResponse> for Status {
    fn from(status: v1::StatusResponse) -> Self {
        let chunks = status.chunks.unwrap_or_default();
        let repairs = status.repairs.unwrap_or_default();
        let extents = status.extents.unwrap_or_default();
        let balance = status.balance.unwrap_or_default();
        let directory = status.directory.unwrap_or_default();
        Self {
            file_servers: status.file_servers.into_iter().map(FileServer::from).collect(),
            chunks: Chunks {
                total: chunks.total,
                healthy: chunks.healthy,
                under_replicated: chunks.under_replicated,
                lost: chunks.lost,
                quarantined: chunks.quarantined,
                awaiting_collection: chunks.awaiting_collection,
            },
            locks: status.locks,
            files: status.files,
            directories: status.directories,
            bytes: status.bytes,
            sessions: status.sessions,
            verified: status.verified,
            reclaimable_bytes: status.reclaimable_bytes,
            repairs: Repairs {
                chunks_waiting: repairs.chunks_waiting,
                copies_made: repairs.copies_made,
                bytes_copied: repairs.bytes_copied,
                obstacles: repairs.obstacles,
                copies_missing: repairs.copies_missing,
                bytes_missing: repairs.bytes_missing,
                copies_running: repairs.copies_running,
                bytes_running: repairs.bytes_running,
                bytes_per_second: repairs.bytes_per_second,
                time_left_ms: Some(repairs.time_left_ms).filter(|left_ms| *left_ms > 0),
            },
            balance: Balance {
                seats_moved: balance.seats_moved,
                moves: balance.moves.into_iter().map(SeatMove::from).collect(),
            },
            extents: Extents {
                files_waiting: extents.files_waiting,
                merges: extents.merges,
                extents_merged: extents.extents_merged,
                bytes_copied: extents.bytes_copied,
                given_up: extents.given_up,
            },
            directory: Directory {
                cluster_id: directory.cluster_id,
                generation: directory.generation,
                revision: directory.revision,
                shipped_revision: directory.shipped_revision,
                journal_lag_ms: directory.journal_lag_ms,
                journal_lag_ms_max: directory.journal_lag_ms_max,
                carriers: directory.carrier_ids,
                mode: directory.mode,
                reason: directory.reason,
                disk_total_bytes: directory.disk_total_bytes,
                disk_free_bytes: directory.disk_free_bytes,
            },
        }
    }
}

impl From<v1::ServerStatus> for FileServer {
    fn from(status: v1::ServerStatus) -> Self {
        let server = status.server.unwrap_or_default();
        let usage = status.usage;
        let scrub = status.scrub.unwrap_or_default();
        Self {
            id: server.id,
            address: address(&server),
            state: match server.state() {
                // What the directory assumes of everybody at its start is nothing that was seen.
                v1::ServerState::Joining if status.unheard => "unheard",
                seen => state(seen),
            },
            zone: server.zone,
            used_bytes: usage.map(|usage| usage.used_bytes),
            free_bytes: usage.map(|usage| usage.free_bytes),
            chunks: usage.map(|usage| usage.chunks),
            missing_chunks: status.missing_chunks,
            heartbeat_ago_ms: status.heartbeat_ago_ms,
            verified_ago_ms: status.verified.then_some(status.verified_ago_ms),
            drained: status.drained,
            notice: status.notice,
            drain_waits_for: status.drain_waits_for,
            scrub: Scrub {
                period_ms: scrub.period_ms,
                passes: scrub.passes,
                last_pass_ago_ms: (scrub.passes > 0).then_some(scrub.last_pass_ago_ms),
                bytes_done: scrub.bytes_done,
                bytes_total: scrub.bytes_total,
                bad_copies: scrub.bad_copies,
            },
        }
    }
}

impl From<v1::SeatMove> for SeatMove {
    fn from(one: v1::SeatMove) -> Self {
        Self {
            group: one.group_id,
            from: one.from_id,
            to: (one.to_id != 0).then_some(one.to_id),
            copies_missing: one.copies_missing,
        }
    }
}

impl From<v1::ChunkStatus> for Chunk {
    fn from(status: v1::ChunkStatus) -> Self {
        let extent = status.extent.unwrap_or_default();
        let group = status.group.unwrap_or_default();
        let chunk = extent.chunk.as_ref();
        Self {
            offset: extent.offset,
            length: extent.length,
            chunk: chunk
                .and_then(|chunk| chunk.chunk.as_ref())
                .map(|id| format!("{}.{}", id.grant_id, id.index)),
            checksum: chunk.map(|chunk| checksum(chunk.checksum)),
            group: group.id,
            epoch: group.epoch,
            primary: group.primary_id,
            members: group.seats.iter().map(|seat| seat.server_id).filter(|id| *id != 0).collect(),
            copies: status.copies.into_iter().map(ChunkCopy::from).collect(),
            reason: status.reason,
            next_repair: status.next_repair,
        }
    }
}

impl From<v1::CopyStatus> for ChunkCopy {
    fn from(copy: v1::CopyStatus) -> Self {
        let server = copy.server.unwrap_or_default();
        Self {
            server: server.id,
            address: address(&server),
            state: copy.state,
            verified_ago_ms: copy.verified_ago_ms,
            primary: copy.primary,
        }
    }
}

/// The servers of all chunks, each with the worst state of its copies.
pub fn copies<'a>(chunks: impl IntoIterator<Item = &'a Chunk>) -> Vec<Copy> {
    /// From good to bad.
    const ORDER: [&str; 5] = ["verified", "reported", "unreachable", "missing", "corrupt"];
    let badness = |state: &str| ORDER.iter().position(|known| *known == state).unwrap_or(ORDER.len());
    let mut copies = std::collections::BTreeMap::<u64, Copy>::new();
    for copy in chunks.into_iter().flat_map(|chunk| &chunk.copies) {
        let new = || Copy { server: copy.server, address: copy.address.clone(), state: copy.state.clone() };
        let known = copies.entry(copy.server).or_insert_with(new);
        if badness(&copy.state) > badness(&known.state) {
            known.state.clone_from(&copy.state);
        }
    }
    copies.into_values().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_promised_fields_of_stat_are_there() {
        let attributes = v1::Attributes {
            inode: 7,
            kind: v1::Kind::File as i32,
            size: 3,
            version: 2,
            checksum: Some(0xab),
            ..Default::default()
        };
        let mut stat = Stat::new("/a".to_owned(), &attributes);
        stat.replication = Some(3);
        stat.copies = Some(vec![]);
        let json = serde_json::to_value(&stat).unwrap();
        for field in ["path", "kind", "size", "version", "replication", "checksum", "modified", "copies"] {
            assert!(json.get(field).is_some(), "{field}");
        }
        assert_eq!(json["kind"], "file");
        assert_eq!(json["checksum"], "00000000000000ab");
        assert_eq!(json["modified"], "1970-01-01T00:00:00.000000000Z");
    }

    #[test]
    fn the_promised_fields_of_status_are_there() {
        let server = v1::ServerStatus {
            server: Some(v1::Server { id: 4, state: v1::ServerState::Live as i32, ..Default::default() }),
            ..Default::default()
        };
        let status = v1::StatusResponse { file_servers: vec![server], ..Default::default() };
        let json = serde_json::to_value(Status::from(status)).unwrap();
        for field in ["file_servers", "chunks", "locks", "files", "bytes"] {
            assert!(json.get(field).is_some(), "{field}");
        }
        for field in ["id", "address", "zone", "state", "used_bytes", "free_bytes", "chunks"] {
            assert!(json["file_servers"][0].get(field).is_some(), "{field}");
        }
        for field in ["total", "healthy", "under_replicated", "lost"] {
            assert!(json["chunks"].get(field).is_some(), "{field}");
        }
        assert_eq!(json["file_servers"][0]["id"], 4);
        assert_eq!(json["file_servers"][0]["state"], "live");
    }

    #[test]
    fn whole_chunks_and_holes_give_the_contents_checksum() {
        assert_eq!(zeros(0), crc64(&[]));
        assert_eq!(zeros(5_000), crc64(&[0; 5_000]));
        let content = [&b"some bytes"[..], &[0; 5_000], b"more", &[0; 77]].concat();
        let extent = |offset, chunk: Option<&[u8]>, length| {
            let chunk = chunk.map(|bytes| v1::ChunkRef {
                length: bytes.len() as u64,
                checksum: crc64(bytes),
                ..Default::default()
            });
            let extent = v1::Extent { offset, length, chunk, chunk_offset: 0 };
            v1::ChunkStatus { extent: Some(extent), ..Default::default() }
        };
        let mut chunks = vec![
            extent(5_010, Some(b"more"), 4),
            extent(0, Some(b"some bytes"), 10),
            extent(10, None, 4_000),
        ];
        let size = content.len() as u64;
        assert_eq!(combined_checksum(size, &chunks), Some(checksum(crc64(&content))));
        assert_eq!(combined_checksum(0, &[]), Some(checksum(crc64(&[]))));
        chunks[0].extent.as_mut().unwrap().length = 3;
        assert_eq!(combined_checksum(size, &chunks), None, "a part of a chunk says nothing");
    }

    #[test]
    fn a_server_is_as_bad_as_its_worst_copy() {
        let copy = |server, state: &str| v1::CopyStatus {
            server: Some(v1::Server { id: server, ..Default::default() }),
            state: state.to_owned(),
            ..Default::default()
        };
        let chunk = |copies| Chunk::from(v1::ChunkStatus { copies, ..Default::default() });
        let chunks = [
            chunk(vec![copy(2, "verified"), copy(1, "missing")]),
            chunk(vec![copy(2, "verified"), copy(1, "reported")]),
        ];
        let states: Vec<_> = copies(&chunks).into_iter().map(|copy| (copy.server, copy.state)).collect();
        assert_eq!(states, [(1, "missing".to_owned()), (2, "verified".to_owned())]);
    }
}
