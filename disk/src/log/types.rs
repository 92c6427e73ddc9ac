//! What goes into a log and what comes out of it.

use std::fmt;

use super::commit::PROOF_AFTER;
use super::format::SEGMENT_HEADER_BYTES;
use super::*;

/// A place in a log: that of a record, or of an end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    /// Number of the segment; the first is 1.
    pub segment: u32,
    /// Bytes from the segment's start.
    pub offset: u32,
}

impl Position {
    /// One number that orders as positions do.
    pub fn to_u64(self) -> u64 {
        u64::from(self.segment) << 32 | u64::from(self.offset)
    }

    /// The reverse of [`Position::to_u64`].
    pub fn from_u64(packed: u64) -> Self {
        Self { segment: (packed >> 32) as u32, offset: packed as u32 }
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.segment, self.offset)
    }
}

/// A record to be appended.
#[derive(Clone, Debug, Default)]
pub struct Record {
    /// The caller's own mark.
    pub kind: u8,
    /// The caller's own number, such as a revision.
    pub tag: u64,
    /// The payload, in parts that are written one behind the other.
    pub payload: Vec<Bytes>,
}

impl Record {
    /// Bytes of payload. Saturates: the limits lie far below.
    pub(super) fn len(&self) -> u32 {
        let len: usize = self.payload.iter().map(Bytes::len).sum();
        u32::try_from(len).unwrap_or(u32::MAX)
    }
}

/// A record that was read back and checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredRecord {
    /// Where it is.
    pub position: Position,
    /// As appended.
    pub kind: u8,
    /// As appended.
    pub tag: u64,
    /// As appended, in one piece.
    pub payload: Bytes,
}

/// A record as the scan at open meets it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scanned {
    /// Where it is.
    pub position: Position,
    /// As appended.
    pub kind: u8,
    /// As appended.
    pub tag: u64,
    /// Bytes of payload.
    pub len: u32,
    /// Whether [`Log::punch`] has given the payload away. A crash may have left its room in use: punching it
    /// again is cheap and harmless.
    pub dead: bool,
    /// The payload; `None` for a dead record and with [`LogConfig::headers_only`].
    pub payload: Option<Bytes>,
}

/// Something in the log that is wrong and that no crash explains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Damage {
    /// Where it begins.
    pub position: Position,
    /// Bytes that are affected.
    pub len: u64,
    /// What is wrong.
    pub what: DamageKind,
}

/// Kinds of [`Damage`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DamageKind {
    /// Durable bytes that are no intact record: one or several records are lost.
    Record,
    /// The device cannot read a block.
    Unreadable,
    /// A segment's header is bad; none of its records was read.
    SegmentHeader,
    /// One of the two copies of a segment's header is bad; nothing is lost.
    HeaderCopy,
    /// Segments are missing between others.
    MissingSegment,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.what {
            DamageKind::Record => "bad record",
            DamageKind::Unreadable => "unreadable block",
            DamageKind::SegmentHeader => "bad segment header",
            DamageKind::HeaderCopy => "bad copy of a segment header",
            DamageKind::MissingSegment => "missing segment",
        };
        write!(f, "{what} at {} ({} bytes)", self.position, self.len)
    }
}

/// What a scan found.
#[derive(Clone, Debug, Default)]
pub struct Recovery {
    /// Where the log ends; zero if it is empty.
    pub end: Position,
    /// Records of the caller, in the segments that were read.
    pub records: u64,
    /// The tag of the last of them.
    pub last_tag: Option<u64>,
    /// Bytes of intact records that were never acknowledged and lie behind a torn one.
    pub dropped_bytes: u64,
    /// What is wrong, by position. Empty after mere crashes.
    pub damage: Vec<Damage>,
}

/// A segment of an open log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentInfo {
    /// Its number.
    pub number: u32,
    /// Its file's life.
    pub life: u64,
    /// Bytes from its start to the end of its durable records.
    pub bytes_used: u32,
    /// Whether it is being filled.
    pub is_active: bool,
}

/// How a log is kept.
#[derive(Clone, Debug)]
pub struct LogConfig {
    /// Names the log, for good: a segment with another id is refused.
    pub log_id: u128,
    /// Size of new segments in bytes, a multiple of 4096. 64 MiB by default.
    pub segment_bytes: u32,
    /// Longest payload in bytes; longer ones are refused. 16 MiB by default; must fit into a segment.
    pub payload_bytes_max: u32,
    /// A group is written when it has this many bytes, even if more is queued. 4 MiB by default.
    pub group_bytes_max: usize,
    /// Bytes that wait in the queue; more wait at its door. 16 MiB by default.
    pub queue_bytes_max: u32,
    /// Batches that wait in the queue. 4096 by default.
    pub queue_batches_max: usize,
    /// Whether removed segment files are used again (the default). Not for a log whose files are read by
    /// others through [`Log::place`], who would see another record's bytes.
    pub recycle: bool,
    /// Whether segments may be missing in the middle, because [`Log::remove_segment`] takes them from there.
    pub allow_gaps: bool,
    /// Whether [`Log::open`] starts a damaged log.
    pub accept_damage: bool,
    /// Records before this position are not delivered, and segments before its are not read.
    pub start_at: Position,
    /// Deliver no payloads, and check only those that may be torn.
    pub headers_only: bool,
    /// After this time without appends the last ones are proven by a record behind them, so that rot in them
    /// cannot pass as torn; `None` for never. 1 s by default.
    pub proof_after: Option<Duration>,
}

impl LogConfig {
    /// The defaults, for the log with this id.
    pub fn new(log_id: u128) -> Self {
        Self {
            log_id,
            segment_bytes: 64 << 20,
            payload_bytes_max: 16 << 20,
            group_bytes_max: 4 << 20,
            queue_bytes_max: 16 << 20,
            queue_batches_max: 4096,
            recycle: true,
            allow_gaps: false,
            accept_damage: false,
            start_at: Position::default(),
            headers_only: false,
            proof_after: Some(PROOF_AFTER),
        }
    }

    /// Bytes, with headers, that one batch may take.
    pub(super) fn batch_bytes_max(&self) -> u32 {
        self.segment_bytes - SEGMENT_HEADER_BYTES - RECORD_HEADER_BYTES
    }

    pub(super) fn check(&self) -> io::Result<()> {
        let sizes = self.segment_bytes.is_multiple_of(4096)
            && self.segment_bytes <= 1 << 30
            && self.segment_bytes >= 2 * SEGMENT_HEADER_BYTES
            && self.payload_bytes_max < self.segment_bytes
            && encoded_len(self.payload_bytes_max) <= self.batch_bytes_max();
        let queue = self.queue_bytes_max > 0 && self.queue_batches_max > 0 && self.group_bytes_max > 0;
        if sizes && queue {
            return Ok(());
        }
        Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("sizes of a log do not fit together: {self:?}"),
        ))
    }
}
