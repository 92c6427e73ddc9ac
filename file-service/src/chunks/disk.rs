//! Chunks on a disk.
//!
//! # Files
//!
//! ```text
//! segments/               chunks of up to 64 KiB, as records of a `disk::log`, and removals
//! files/a0/               larger chunks; a0 is the grant modulo 256
//!   00000000000003a0-00000007.chunk      grant and index in hex; complete since it has this name
//!   00000000000003a0-00000008.12.part    not sealed; removed at open
//! index                   a snapshot of what is held and where; a shortcut for the next start
//! ```
//!
//! All numbers are little-endian but for keys, which are big-endian so that they sort.
//!
//! # Chunk header
//!
//! ```text
//!  0      4         6       8       16      20       24      32         40              48     56
//!  +------+---------+-------+-------+-------+--------+-------+----------+---------------+------+-----------+
//!  | CChk | version | flags | grant | index | length | group | checksum | crc64 of the  | zero | crc64 of  |
//!  | u32  | u16 (1) | u16   | u64   | u32   | u32    | u64   | u64      | table, u64    | u64  | bytes 0-55|
//!  +------+---------+-------+-------+-------+--------+-------+----------+---------------+------+-----------+
//! ```
//!
//! Flag 1: the checksums were computed by a server. The *table* is one salted checksum (u64) for each block of 4,096
//! bytes.
//!
//! # A small chunk: a record of kind 1
//!
//! ```text
//!  +-----------------+-----------------------+----------------+
//!  | header, 64      | table, 8 a block      | data           |
//!  +-----------------+-----------------------+----------------+
//! ```
//!
//! Many concurrent puts share one write and one sync. The record's tag is the *sequence* of the change: all puts and
//! removals of a chunk are ordered by it. A compaction copies a record with its sequence, so a copy can never win
//! over a removal that came before it.
//!
//! # A large chunk: a file
//!
//! ```text
//!  +----------------+-----------------------+-----------------+
//!  | data           | table, 8 a block      | header, 64      |
//!  +----------------+-----------------------+-----------------+
//! ```
//!
//! Data comes first, so that it lies on page bounds and can be written while it arrives. The file is synced before it
//! gets its name, and the name before the seal is answered: a file with a chunk's name that is not intact is damaged,
//! never torn. It says all about itself and needs no record in the log: one sync less for each chunk, and a bad log
//! cannot orphan it. Removing it is removing its name.
//!
//! # Removal of small chunks: a record of kind 2
//!
//! ```text
//!  +----------------------------+----------------------------+---
//!  | grant u64 be, index u32 be | grant u64 be, index u32 be | ...
//!  +----------------------------+----------------------------+---
//! ```
//!
//! A removal is durable when this record is: one sync for thousands of chunks. Then the chunks' records are marked
//! dead in place and their bytes punched out. The removal's record may go as soon as that is durable and no snapshot
//! holds the chunks any more. On a full disk, where nothing can be appended, the snapshot is deleted instead and the
//! records are marked dead alone.
//!
//! # Snapshot
//!
//! ```text
//!  0          8         12     16        24              32
//!  +----------+---------+------+---------+---------------+-------+---
//!  | CAIRNIDX | version | zero | settled | next sequence | count | count entries of 40 bytes, crc64 of all before
//!  | u64      | u32 (1) | u32  | u64     | u64           | u64   |
//!  +----------+---------+------+---------+---------------+-------+---
//!
//!  entry 0       8       12                  16         24      32
//!  +-------+-------+-------------------+----------+-------+----------------------+
//!  | grant | index | length, flags in  | checksum | group | position in the log, |
//!  | u64   | u32   | bits 29-31, u32   | u64      | u64   | 0 for a file, u64    |
//!  +-------+-------+-------------------+----------+-------+----------------------+
//! ```
//!
//! Bit 29: in a file, 30: checksums computed by a server, 31: corrupt. *Settled* is a position in the log: everything
//! before it is in the snapshot, and finished. Every change holds it back from before its first write until its last
//! one (`Floor`). A start reads the snapshot and what follows in the log; without a good snapshot, the whole log.
//! A segment is removed when it holds no chunk and lies before the settled position of the snapshot on disk.

use super::{
    ChunkInfo, ChunkStore, ChunkWriter, Part, Removed, StoreUsage, existing,
    intake::{Intake, bad_copy, read_range},
    not_found, overtaken,
};
use async_trait::async_trait;
use bytes::Bytes;
use cairn_proto::{
    Error, Result,
    checksum::{digest_term, verify_blocks},
    error::Reason,
    id::{ChunkId, GrantId, GroupId},
    v1,
};
use disk::Disk;
use std::{ops::RangeInclusive, path::PathBuf, sync::Arc};

mod change;
mod files;
mod format;
mod index;
mod maintain;
mod open;
mod read;
mod shared;
mod snapshot;
#[cfg(test)]
mod tests;
mod writer;

pub use open::OpenReport;

use shared::Shared;

/// Chunks up to this length are records of the log; larger ones are files.
pub const SMALL_BYTES_MAX: usize = 64 * 1024;

/// How a store on a disk is kept.
#[derive(Clone, Debug)]
pub struct DiskConfig {
    /// Names the store in messages: its data directory as a person knows it.
    pub name: String,
    /// Names the store for good: segments with another id are refused.
    pub store_id: u128,
    /// Size of a segment in bytes, a multiple of 4,096 and at least 1 MiB. 16 MiB by default: an open store has one
    /// or two more than it needs.
    pub segment_bytes: u32,
    /// New chunks are refused when less than this is free on the disk, so that removals, the index and what else
    /// lives there have room. 64 MiB by default.
    pub reserve_bytes: u64,
    /// Bytes of log after which a new snapshot of the index is due. 64 MiB by default. It is also never due before
    /// four times its own size.
    pub snapshot_after_bytes: u64,
}

impl DiskConfig {
    /// The defaults, for the store that people know by this name.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            store_id: 0x6361_6972_6e2d_6368_756e_6b73_0000_0001,
            segment_bytes: 16 << 20,
            reserve_bytes: 64 << 20,
            snapshot_after_bytes: 64 << 20,
        }
    }
}

/// A [`ChunkStore`] on a disk. Clones are the same store.
///
/// After a failed write or sync of the log, small chunks are refused with `IO` until the store is opened anew: what
/// is on the disk is not known before. Reads and large chunks go on.
#[derive(Clone, Debug)]
pub struct DiskChunkStore {
    shared: Arc<Shared>,
}

impl DiskChunkStore {
    /// Opens the store in `dir`, creating it if need be, and says what was found. Damage is reported and logged, and
    /// everything else is served. `NOT_SUPPORTED` if something was written by a newer version.
    pub async fn open(
        disk: Arc<dyn Disk>,
        dir: impl Into<PathBuf>,
        config: DiskConfig,
    ) -> Result<(Self, OpenReport)> {
        let (shared, report) = open::open(disk, dir.into(), config).await?;
        Ok((Self { shared }, report))
    }
}

#[async_trait]
impl ChunkStore for DiskChunkStore {
    async fn begin(
        &self,
        chunk: ChunkId,
        group: GroupId,
        length_hint: Option<u64>,
    ) -> Result<Box<dyn ChunkWriter>> {
        Ok(Box::new(writer::DiskWriter::begin(self.shared.clone(), chunk, group, length_hint).await?))
    }

    async fn put(
        &self,
        chunk: ChunkId,
        group: GroupId,
        data: Bytes,
        blocks: Vec<u64>,
        checksum: u64,
        computed_here: bool,
    ) -> Result<ChunkInfo> {
        let length = data.len() as u64;
        if data.len() > SMALL_BYTES_MAX {
            let mut writer = self.begin(chunk, group, Some(length)).await?;
            writer.append(data, blocks).await?;
            return writer.seal(length, checksum, computed_here).await;
        }
        self.shared.check_open()?;
        let mut intake = Intake::new(chunk, None)?;
        intake.take(&data, &blocks)?;
        intake.finish(length, checksum)?;
        let header = writer::header(&intake, group, checksum, computed_here);
        self.shared.clone().put_record(header, blocks, vec![data], None).await
    }

    fn info(&self, chunk: ChunkId) -> Option<ChunkInfo> {
        let held = self.shared.state.lock().index.get(chunk)?;
        Some(self.shared.info(&held))
    }

    async fn read(&self, chunk: ChunkId, offset: u64, len: usize) -> Result<Part> {
        self.shared.read(chunk, offset, len).await
    }

    async fn remove(&self, chunks: &[ChunkId]) -> Result<Removed> {
        self.shared.clone().remove(chunks.to_vec()).await
    }

    fn digests(&self, grants: RangeInclusive<GrantId>, limit: usize) -> Vec<v1::GrantDigest> {
        let state = self.shared.state.lock();
        let mut digests: Vec<v1::GrantDigest> = Vec::new();
        for held in state.index.range(None, grants) {
            let grant_id = held.chunk.grant.0;
            if digests.last().is_none_or(|last| last.grant_id != grant_id) {
                if digests.len() == limit {
                    break;
                }
                digests.push(v1::GrantDigest { grant_id, ..Default::default() });
            }
            if let Some(last) = digests.last_mut().filter(|_| !held.corrupt) {
                last.chunk_count += 1;
                let term = digest_term(held.chunk, u64::from(held.length), held.checksum);
                last.digest = last.digest.wrapping_add(term);
            }
        }
        digests
    }

    fn list(&self, after: Option<ChunkId>, grants: RangeInclusive<GrantId>, limit: usize) -> Vec<ChunkInfo> {
        let state = self.shared.state.lock();
        state.index.range(after, grants).take(limit).map(|held| self.shared.info(&held)).collect()
    }

    fn mark_corrupt(&self, chunk: ChunkId) {
        let mut state = self.shared.state.lock();
        if let Some(held) = state.index.get(chunk) {
            state.index.judge(chunk, held.place, true, None);
        }
    }

    async fn verify(&self, chunk: ChunkId) -> Result<bool> {
        self.shared.verify(chunk).await
    }

    fn usage(&self) -> StoreUsage {
        self.shared.usage()
    }

    async fn maintain(&self) -> Result<bool> {
        self.shared.maintain().await
    }

    async fn close(&self) -> Result<()> {
        self.shared.close().await
    }
}
