//! Reading a segment whose bytes are not trusted: which records are there, what is torn, what is damaged.

use std::collections::VecDeque;
use std::io;

use bytes::Bytes;

use super::format::*;
use super::{Damage, DamageKind, Position, Scanned};
use crate::DiskFile;

/// What later segments say about this one's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// All bytes before this offset were synced, and nothing of the log lies behind it.
    Exact(u32),
    /// Everything that was written was synced, but where it ended is not known.
    Proven,
    /// Nothing: only this segment's own records prove anything, and what they do not prove may be torn.
    Tail,
}

/// What was found in a segment.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// Where the log's records end.
    pub(super) end: u32,
    /// Records of the caller that were delivered.
    pub(super) records: u64,
    pub(super) last_tag: Option<u64>,
    /// A dead record: parts of the file may be holes.
    pub(super) dead: bool,
    /// Bytes of intact records that were written after a torn one, never acknowledged, and left out.
    pub(super) dropped_bytes: u64,
    /// Something was wrong in this segment.
    pub(super) damaged: bool,
}

pub(super) type Visitor<'a> = &'a mut (dyn FnMut(Scanned) -> io::Result<()> + Send);

/// A moving view of a file, so that a scan reads in large pieces.
pub(super) struct Window<'a> {
    file: &'a dyn DiskFile,
    len: u32,
    piece: usize,
    start: u32,
    bytes: Bytes,
    /// Blocks that the device could not read, as offsets. They read as zeros here.
    unreadable: Vec<u32>,
}

const WINDOW_BYTES: usize = 1024 * 1024;
const BLOCK_BYTES: usize = 4096;

impl<'a> Window<'a> {
    pub(super) async fn new(file: &'a dyn DiskFile, piece: usize) -> io::Result<Self> {
        let len = u32::try_from(file.len().await?).unwrap_or(u32::MAX);
        Ok(Self { file, len, piece, start: 0, bytes: Bytes::new(), unreadable: Vec::new() })
    }

    pub(super) async fn whole(file: &'a dyn DiskFile) -> io::Result<Self> {
        Self::new(file, WINDOW_BYTES).await
    }

    pub(super) fn len(&self) -> u32 {
        self.len
    }

    pub(super) fn has_unreadable(&self) -> bool {
        !self.unreadable.is_empty()
    }

    /// `len` bytes from `offset`, fewer at the end of the file. Does not allocate more than the file holds.
    pub(super) async fn get(&mut self, offset: u32, len: u32) -> io::Result<Bytes> {
        let len = len.min(self.len.saturating_sub(offset)) as usize;
        let inside = |start: u32, have: usize| {
            offset.checked_sub(start).map(|from| from as usize).filter(|from| from + len <= have)
        };
        if let Some(from) = inside(self.start, self.bytes.len()) {
            return Ok(self.bytes.slice(from..from + len));
        }
        let bytes = self.read(offset, len.max(self.piece)).await?;
        self.start = offset;
        let got = bytes.slice(..len.min(bytes.len()));
        // A large payload is the caller's; what is kept here is only the read-ahead.
        self.bytes = bytes;
        Ok(got)
    }

    async fn read(&mut self, offset: u32, len: usize) -> io::Result<Bytes> {
        match self.file.read_at(u64::from(offset), len).await {
            Err(error) if crate::os_error(&error) == Some(libc::EIO) => {}
            read => return read,
        }
        // One bad sector must not hide its neighbours.
        let len = len.min(self.len.saturating_sub(offset) as usize);
        let mut bytes = Vec::with_capacity(len);
        while bytes.len() < len {
            let at = offset + bytes.len() as u32;
            let want = (BLOCK_BYTES - at as usize % BLOCK_BYTES).min(len - bytes.len());
            match self.file.read_at(u64::from(at), want).await {
                Ok(read) if read.is_empty() => break,
                Ok(read) => bytes.extend_from_slice(&read),
                Err(error) if crate::os_error(&error) == Some(libc::EIO) => {
                    self.unreadable.push(at);
                    bytes.resize(bytes.len() + want, 0);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(bytes.into())
    }

    /// The next intact record header at or after `offset`.
    pub(super) async fn search(
        &mut self,
        id: SegmentId,
        mut offset: u32,
        limit: u32,
    ) -> io::Result<Option<RecordHeader>> {
        while offset.saturating_add(RECORD_HEADER_BYTES) <= limit {
            let bytes = self.get(offset, self.piece as u32).await?;
            // The last header's worth of a piece is looked at with the next one.
            let last = bytes.len().saturating_sub(RECORD_HEADER_BYTES as usize);
            if bytes.len() < RECORD_HEADER_BYTES as usize {
                return Ok(None);
            }
            let mut at = 0;
            while at <= last {
                if looks_like_record(&bytes[at..])
                    && let Some(header) = RecordHeader::decode(&bytes[at..], id, offset + at as u32, limit)
                {
                    return Ok(Some(header));
                }
                at += ALIGN_BYTES as usize;
            }
            offset += at as u32;
        }
        Ok(None)
    }

    pub(super) async fn header(
        &mut self,
        id: SegmentId,
        offset: u32,
        limit: u32,
    ) -> io::Result<Option<RecordHeader>> {
        let bytes = self.get(offset, RECORD_HEADER_BYTES).await?;
        Ok(RecordHeader::decode(&bytes, id, offset, limit))
    }

    /// The payload of a living record, if it is intact.
    pub(super) async fn payload(
        &mut self,
        id: SegmentId,
        header: &RecordHeader,
    ) -> io::Result<Option<Bytes>> {
        let padded = self.get(header.payload_at(), header.padded_len()).await?;
        let intact = padded.len() == header.padded_len() as usize
            && payload_crc(id, header.offset, [&padded[..]]) == header.payload_crc;
        if !intact {
            return Ok(None);
        }
        let payload = padded.slice(..header.len as usize);
        // A small slice would hold the whole piece in memory for as long as the caller keeps it.
        Ok(Some(if payload.len() < self.piece { Bytes::copy_from_slice(&payload) } else { payload }))
    }
}

/// What waits for a proof, in order.
enum Item {
    Record(Scanned, RecordHeader),
    /// Bytes that are not an intact record.
    Gap(u32, u32),
}

/// Walks one segment, tells the visitor its records, and judges everything else.
pub(super) struct SegmentScan<'a, 'b> {
    pub(super) id: SegmentId,
    pub(super) end: End,
    /// Leave payloads unread and unchecked. Not for [`End::Tail`], where a payload may be torn.
    pub(super) headers_only: bool,
    pub(super) visitor: Visitor<'b>,
    pub(super) damage: &'a mut Vec<Damage>,
}

impl SegmentScan<'_, '_> {
    pub(super) async fn run(mut self, window: &mut Window<'_>) -> io::Result<Found> {
        let known = self.damage.len();
        let limit = if let End::Exact(end) = self.end { end.min(window.len()) } else { window.len() };
        // Everything before this offset was durable when some later record was written.
        let mut proven = if self.end == End::Tail { 0 } else { u32::MAX };
        let mut found = Found { end: SEGMENT_HEADER_BYTES, ..Found::default() };
        let mut items = VecDeque::new();
        let mut at = SEGMENT_HEADER_BYTES;
        while at.saturating_add(RECORD_HEADER_BYTES) <= limit {
            let Some(header) = window.header(self.id, at, limit).await? else {
                let Some(next) = window.search(self.id, at + ALIGN_BYTES, limit).await? else { break };
                items.push_back(Item::Gap(at, next.offset));
                at = next.offset;
                continue;
            };
            // Also from a record whose payload is bad: its header is intact, and was true when written.
            if header.synced.segment == self.id.number {
                proven = proven.max(header.synced.offset);
            }
            at = header.next();
            match self.body(window, &header).await? {
                Some(record) => items.push_back(Item::Record(record, header)),
                None => items.push_back(Item::Gap(header.offset, at)),
            }
            self.settle(&mut items, proven, &mut found)?;
        }
        if let End::Exact(end) = self.end
            && at < end
        {
            items.push_back(Item::Gap(at, end));
            at = end;
        }
        self.settle(&mut items, proven, &mut found)?;
        // What is left begins with a gap that nothing proves: the torn end of the log.
        found.end = if let Some(Item::Gap(from, _)) = items.front() { *from } else { at };
        for item in items {
            if let Item::Record(record, _) = item {
                found.dropped_bytes += u64::from(encoded_len(record.len));
            }
        }
        for block in std::mem::take(&mut window.unreadable) {
            // Never taken for torn: nobody knows what was there.
            if block < limit {
                self.report(block, BLOCK_BYTES as u32, DamageKind::Unreadable);
            }
        }
        found.damaged = self.damage.len() > known;
        Ok(found)
    }

    /// The record of an intact header, if the rest of it is intact too.
    async fn body(&mut self, window: &mut Window<'_>, header: &RecordHeader) -> io::Result<Option<Scanned>> {
        let position = Position { segment: self.id.number, offset: header.offset };
        let (kind, tag, len) = (header.kind, header.tag, header.len);
        let mut record =
            Scanned { position, kind, tag, len, dead: header.state == State::Dead, payload: None };
        match header.state {
            State::Dead => {}
            State::Bad => return Ok(None),
            State::Alive if self.headers_only && self.end != End::Tail => {}
            State::Alive => match window.payload(self.id, header).await? {
                Some(_) if self.headers_only => {}
                Some(payload) => record.payload = Some(payload),
                None => return Ok(None),
            },
        }
        Ok(Some(record))
    }

    /// Delivers and reports all items up to the first gap that nothing proves.
    fn settle(&mut self, items: &mut VecDeque<Item>, proven: u32, found: &mut Found) -> io::Result<()> {
        while let Some(item) = items.pop_front() {
            match item {
                Item::Gap(from, to) if from >= proven => {
                    items.push_front(Item::Gap(from, to));
                    break;
                }
                Item::Gap(from, to) => self.report(from, to - from, DamageKind::Record),
                Item::Record(record, header) => {
                    found.dead |= record.dead;
                    if !header.is_internal() {
                        found.records += 1;
                        found.last_tag = Some(record.tag);
                        (self.visitor)(record)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn report(&mut self, offset: u32, len: u32, what: DamageKind) {
        let position = Position { segment: self.id.number, offset };
        self.damage.push(Damage { position, len: u64::from(len), what });
    }
}
