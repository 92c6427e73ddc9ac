//! A segmented, checksummed, group-committed append log.
//!
//! # Files
//!
//! One directory holds one log:
//!
//! ```text
//! 00000001.seg      a segment: number in hex; numbers grow by one and are never used for other records
//! spare-00000001.seg  a file that was a segment, kept for a next life
//! prepare-....tmp   a segment that is being made ready; deleted at open
//! ```
//!
//! A segment file has its full size, and all blocks written, before its first record: a sync of blocks that
//! are there costs half of one that must also journal a growing file, and a full disk is met before anything
//! is acknowledged. The next segment is made ready in the background when the current one is half full. With
//! [`LogConfig::recycle`], removed files get a new *life* instead of being deleted. A life number is never
//! given twice in a log, and seeds the checksum of every record, so that bytes of an earlier life are no
//! records in a later one.
//!
//! # Segment header
//!
//! 4096 bytes, of which two copies of 64 bytes, at 0 and at 2048, count. All numbers are little-endian. The
//! header is durable before the file gets its segment's name and is never written again.
//!
//! ```text
//!  0         8          12         16          32      40               48      56
//!  +---------+----------+----------+-----------+-------+----------------+-------+---------------------+
//!  | CAIRNLOG| version  | segment  | log id    | life  | segment bytes  | zero  | crc64 of bytes 0-55 |
//!  | u64     | u32 (1)  | u32      | u128      | u64   | u64            | u64   | u64                 |
//!  +---------+----------+----------+-----------+-------+----------------+-------+---------------------+
//! ```
//!
//! # Record
//!
//! Begins at a multiple of 8; never crosses the end of a segment.
//!
//! ```text
//!  0       4        8     9       10    12       16     24      28             32              36
//!  +-------+--------+-----+-------+-----+--------+------+-------+--------------+---------------+------+
//!  | CRec  | length | kind| flags | zero| segment| life | offset| synced offset| synced segment| zero |
//!  | u32   | u32    | u8  | u8    | u16 | u32    | u64  | u32   | u32          | u32           | u32  |
//!  +-------+--------+-----+-------+-----+--------+------+-------+--------------+---------------+------+
//!  40      48              56             64           72
//!  +-------+---------------+--------------+------------+---------------------+-----------------+
//!  | tag   | payload crc64 | header crc64 | state word | payload             | zeros to a      |
//!  | u64   | u64           | u64          | u64        | (length bytes)      | multiple of 8   |
//!  +-------+---------------+--------------+------------+---------------------+-----------------+
//! ```
//!
//! * *Payload crc*: CRC-64/NVME of log id, segment, life, offset, payload and padding.
//! * *Header crc*: CRC-64/NVME of log id and bytes 0-55. It is apart from the payload's, so that a header can
//!   be trusted without its payload: to skip it, and when it was given away.
//! * *Synced*: everything in the log before this position was durable when the record was written. The first
//!   record of a segment thereby names the exact end of the segment before.
//! * *State word*: 0 for a living record; for a dead one `(header crc ^ mask) | 1`.
//! * *Flags*: bit 0 marks the log's own records. They have no payload and only prove what lies before them:
//!   one begins each opening of the log, one ends it, and one follows when a log has been quiet for
//!   [`LogConfig::proof_after`].
//!
//! # Torn or damaged
//!
//! A power loss can keep any part of what was written since the last sync, also a later record without an
//! earlier one of the same group. So bytes that are no intact record are *torn*, which is normal, exactly if
//! they lie at or behind the last position that any intact later header proves synced. What follows them was
//! in the same unsynced write, was never acknowledged, and is left out. Everything else is [`Damage`]. An
//! intact record behind bad bytes is a proof only by what it says was synced: to take its mere presence for
//! one would make damage of a plain power loss, since it may be of the same write.
//!
//! After damage the scan goes on at the next intact header of the same life. Whoever finds damage decides:
//! see [`LogConfig::accept_damage`].
//!
//! After recovery appends begin in a fresh segment. Its first record proves the recovered end, so the old
//! bytes behind it can never become records, and what was recovered can never again pass as torn.
//!
//! # Dead records
//!
//! [`Log::punch`] frees the payload of a record that nobody needs. The state word, whose 8 aligned bytes lie
//! in one sector and therefore cannot tear, is changed first and synced; only then is the payload punched. So
//! a scan after a crash in between sees: a living record, whole; or a dead one, whose payload it does not
//! look at. A payload of zeros under a living state word is damage. Rewriting the sector in place relies on
//! a sector write leaving either its old or its new bytes, as the whole log does. The kind, length and tag
//! of a dead record stay readable.
//!
//! # Failure
//!
//! After a failed write or sync nobody knows what is on the disk: the log is *failed*, every queued and later
//! append gets the error, and only opening it anew finds out. A full disk is different: it is met while a
//! segment is made ready, before anything of the refused record is written; appends work again when there is
//! room.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};

use crate::{Disk, DiskFile};

mod commit;
mod format;
mod open;
mod read;
mod scan;
mod segments;
#[cfg(test)]
mod tests;
mod types;

pub use open::Scan;
pub use types::*;

use commit::{Batch, Command, Committer};
use format::{RECORD_HEADER_BYTES, encoded_len};
use segments::Shared;

/// A log that is open for appending. Clones are the same log. Close it, or drop all clones and their pending
/// appends, before its directory is opened again.
#[derive(Clone, Debug)]
pub struct Log {
    shared: Arc<Shared>,
    queue: mpsc::Sender<Command>,
    /// Bytes that may still be queued.
    room: Arc<Semaphore>,
    /// Passed in the order of submission; held while waiting for room, so that nobody overtakes.
    door: Arc<tokio::sync::Mutex<()>>,
}

/// Records that are queued; resolves when they are durable. Dropping it does not take them back.
#[derive(Debug)]
pub struct Pending {
    answer: oneshot::Receiver<io::Result<Vec<Position>>>,
    shared: Arc<Shared>,
}

impl Pending {
    /// The records' positions, once all of them are durable. An error says that they may or may not be, if
    /// [`Log::is_failed`], else that none was written.
    pub async fn durable(self) -> io::Result<Vec<Position>> {
        match self.answer.await {
            Ok(answer) => answer,
            Err(_) => Err(self.shared.check().err().unwrap_or_else(|| closed(&self.shared))),
        }
    }
}

impl Log {
    /// Reads a log without changing anything and tells the visitor its records in order, then starts it.
    /// A directory that is empty or missing is an empty log. Shorthand for [`Log::scan`] and [`Scan::start`];
    /// with damage it starts only if [`LogConfig::accept_damage`], else it names it in an error of kind
    /// [`io::ErrorKind::InvalidData`] and leaves everything as it is.
    pub async fn open(
        disk: Arc<dyn Disk>,
        dir: &Path,
        config: LogConfig,
        visitor: &mut (dyn FnMut(Scanned) -> io::Result<()> + Send),
    ) -> io::Result<(Self, Recovery)> {
        let accept_damage = config.accept_damage;
        let scan = Self::scan(disk, dir, config, visitor).await?;
        let damage = &scan.recovery().damage;
        if let Some(first) = damage.first()
            && !accept_damage
        {
            let why = format!("log {} is damaged in {} places, first {first}", dir.display(), damage.len());
            return Err(io::Error::new(io::ErrorKind::InvalidData, why));
        }
        scan.start().await
    }

    /// Reads a log without changing anything, and tells the visitor its records in order. An error of the
    /// visitor ends the scan. [`io::ErrorKind::Unsupported`] if a segment has an unknown format version,
    /// [`io::ErrorKind::InvalidData`] if one belongs to another log.
    pub async fn scan(
        disk: Arc<dyn Disk>,
        dir: &Path,
        config: LogConfig,
        visitor: &mut (dyn FnMut(Scanned) -> io::Result<()> + Send),
    ) -> io::Result<Scan> {
        Scan::run(disk, dir, config, visitor).await
    }

    fn spawn(shared: Arc<Shared>, committer: Committer) -> Self {
        let (queue, commands) = mpsc::channel(shared.config.queue_batches_max);
        let room = Arc::new(Semaphore::new(shared.config.queue_bytes_max as usize));
        tokio::spawn(committer.run(commands));
        Self { shared, queue, room, door: Arc::default() }
    }

    /// Appends a record; resolves with its position when it is durable. Records become part of the log in the
    /// order in which these calls were first polled. Waits while the queue is full. A dropped call has either
    /// queued its whole record or nothing.
    pub async fn append(&self, kind: u8, tag: u64, payload: Vec<Bytes>) -> io::Result<Position> {
        let positions = self.append_batch(vec![Record { kind, tag, payload }]).await?;
        positions.first().copied().ok_or_else(|| closed(&self.shared))
    }

    /// Appends records one directly behind the other, in one segment. After a crash before the answer, the
    /// first few of them may be there without the others.
    pub async fn append_batch(&self, records: Vec<Record>) -> io::Result<Vec<Position>> {
        self.submit(records).await?.durable().await
    }

    /// Queues records as [`Log::append_batch`] does, and returns as soon as their place in the order is
    /// settled.
    pub async fn submit(&self, records: Vec<Record>) -> io::Result<Pending> {
        let encoded_bytes = self.check_records(&records)?;
        let _door = self.door.lock().await;
        self.shared.check()?;
        let share = encoded_bytes.min(self.shared.config.queue_bytes_max);
        let permit = self.room.clone().acquire_many_owned(share).await.map_err(|_| closed(&self.shared))?;
        let (sender, answer) = oneshot::channel();
        let batch = Batch { records, encoded_bytes, answer: sender, permit };
        self.queue.send(Command::Append(batch)).await.map_err(|_| closed(&self.shared))?;
        Ok(Pending { answer, shared: self.shared.clone() })
    }

    fn check_records(&self, records: &[Record]) -> io::Result<u32> {
        let invalid = |why: String| io::Error::new(io::ErrorKind::InvalidInput, why);
        let (one_max, all_max) = (self.shared.config.payload_bytes_max, self.shared.config.batch_bytes_max());
        let mut bytes = 0;
        for record in records {
            let len: u64 = record.payload.iter().map(|part| part.len() as u64).sum();
            if len > u64::from(one_max) {
                return Err(invalid(format!("a record of {len} bytes is longer than {one_max}")));
            }
            bytes += u64::from(encoded_len(record.len()));
        }
        if records.is_empty() || bytes > u64::from(all_max) {
            return Err(invalid(format!("a batch of {bytes} bytes is empty or longer than {all_max}")));
        }
        Ok(bytes as u32)
    }

    /// Writes what is queued and a record that proves it, and ends the log's task. Later appends fail.
    pub async fn close(&self) -> io::Result<()> {
        let (sender, answer) = oneshot::channel();
        let _door = self.door.lock().await;
        if self.queue.send(Command::Close(sender)).await.is_err() {
            return self.shared.check();
        }
        answer.await.unwrap_or_else(|_| self.shared.check())
    }

    /// Whether a write or sync failed: nothing can be appended any more, and what is durable of the last
    /// appends is found out only by opening the log anew.
    pub fn is_failed(&self) -> bool {
        self.shared.failed.lock().is_some()
    }

    /// Where the next record will go, if it fits there.
    pub fn end(&self) -> Position {
        self.shared.table.lock().end
    }

    /// Everything before this position is durable.
    pub fn synced(&self) -> Position {
        self.shared.synced()
    }

    /// Follows [`Log::synced`].
    pub fn watch_synced(&self) -> watch::Receiver<Position> {
        self.shared.synced.subscribe()
    }

    /// The tag of the last durable record.
    pub fn last_tag(&self) -> Option<u64> {
        self.shared.table.lock().last_tag
    }

    /// All segments, by number.
    pub fn segments(&self) -> Vec<SegmentInfo> {
        let table = self.shared.table.lock();
        let info = |(&number, segment): (&u32, &segments::Segment)| SegmentInfo {
            number,
            life: segment.life,
            bytes_used: segment.end,
            is_active: table.active == Some(number),
        };
        table.segments.iter().map(info).collect()
    }

    /// Removes all segments before the one that holds `position`; the one being filled stays. Durable, oldest
    /// first, so that a crash in between leaves no gap; an error ends it for the same reason, and the next call
    /// goes on from there. Returns how many.
    pub async fn remove_segments_before(&self, position: Position) -> io::Result<usize> {
        let active = self.shared.table.lock().active;
        let old = |segment: &SegmentInfo| segment.number < position.segment && Some(segment.number) != active;
        let numbers: Vec<u32> =
            self.segments().into_iter().filter(old).map(|segment| segment.number).collect();
        for number in &numbers {
            self.remove_segment(*number).await?;
        }
        Ok(numbers.len())
    }

    /// Removes one segment, durably; [`io::ErrorKind::ResourceBusy`] for the one being filled. Removing from
    /// the middle needs [`LogConfig::allow_gaps`], or the next open reports the gap as damage. After another
    /// error it stays in the list of segments, to be removed again.
    pub async fn remove_segment(&self, number: u32) -> io::Result<()> {
        let _housekeeping = self.shared.housekeeping.lock().await;
        let segment = {
            let table = self.shared.table.lock();
            if table.active == Some(number) {
                let why = format!("segment {number} of log {} is being filled", self.shared.dir.display());
                return Err(io::Error::new(io::ErrorKind::ResourceBusy, why));
            }
            table.segments.get(&number).cloned()
        };
        let Some(segment) = segment else { return Ok(()) };
        self.shared.cut_before(number).await?;
        self.shared.table.lock().segments.remove(&number);
        let retired = self.shared.retire(number, segment.whole).await;
        if retired.is_err() {
            // Still there, as far as anybody knows.
            self.shared.table.lock().segments.insert(number, segment);
        }
        retired
    }
}

fn closed(shared: &Shared) -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, format!("log {} is closed", shared.dir.display()))
}
