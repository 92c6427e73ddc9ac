//! Reading records back, and giving their payloads away.

use std::collections::BTreeMap;

use super::format::*;
use super::scan::Window;
use super::*;

/// Read in one piece when a record is asked for: most records need no second read.
const RECORD_READ_BYTES: usize = 8 * 1024;

impl Log {
    /// The record at a position, checked. [`io::ErrorKind::NotFound`] if there is none: never written, not
    /// durable yet, dead, or its segment removed. [`io::ErrorKind::InvalidData`] if it is damaged.
    pub async fn read_record(&self, position: Position) -> io::Result<StoredRecord> {
        let (id, end, file) = self.shared.segment(position.segment).await?;
        let mut window = Window::new(&*file, RECORD_READ_BYTES).await?;
        let header = self.header(&mut window, id, end, position).await?;
        let Some(payload) = window.payload(id, &header).await? else {
            // It may have been given away between the two reads.
            let mut again = Window::new(&*file, RECORD_READ_BYTES).await?;
            self.header(&mut again, id, end, position).await?;
            return Err(self.damaged(position));
        };
        Ok(StoredRecord { position, kind: header.kind, tag: header.tag, payload })
    }

    /// `len` bytes of a record's payload, `from` bytes behind its start, unchecked: for callers that have
    /// checksums of their own. The range must lie inside a payload that the caller knows to be there.
    pub async fn read(&self, position: Position, from: u32, len: u32) -> io::Result<Bytes> {
        let (file, at) = self.place(position).await?;
        let bytes = file.read_at(at + u64::from(from), len as usize).await?;
        if bytes.len() < len as usize { Err(self.damaged(position)) } else { Ok(bytes) }
    }

    /// The file of a record, and where in it the payload begins.
    pub async fn place(&self, position: Position) -> io::Result<(Arc<dyn DiskFile>, u64)> {
        let (_, end, file) = self.shared.segment(position.segment).await?;
        if position.offset >= end {
            return Err(self.missing(position));
        }
        Ok((file, u64::from(position.offset) + u64::from(RECORD_HEADER_BYTES)))
    }

    /// How long the payload of the record at a position was when it was written, whatever became of it since;
    /// `None` if not even the record's header is intact.
    pub async fn written_len(&self, position: Position) -> io::Result<Option<u32>> {
        let (id, end, file) = self.shared.segment(position.segment).await?;
        let mut window = Window::new(&*file, RECORD_HEADER_BYTES as usize).await?;
        Ok(window.header(id, position.offset, end).await?.map(|header| header.len))
    }

    /// Durable living records from a position on, about `bytes_max` bytes of payload (one record at least,
    /// however long), and the position to go on from; it stands still at the end of the log. Any position
    /// inside a segment's header means its first record, any other must be one that the log gave.
    /// [`io::ErrorKind::NotFound`] if the segment was removed, [`io::ErrorKind::InvalidData`] at damage.
    pub async fn records_from(
        &self,
        position: Position,
        bytes_max: usize,
    ) -> io::Result<(Vec<StoredRecord>, Position)> {
        let mut records = Vec::new();
        let (mut at, mut bytes) = (position, 0);
        loop {
            let synced = self.synced();
            if at >= synced {
                return Ok((records, at));
            }
            let (id, end, file) = self.shared.segment(at.segment).await?;
            let mut window = Window::whole(&*file).await?;
            at.offset = at.offset.max(SEGMENT_HEADER_BYTES);
            while at.offset < end {
                let header = window.header(id, at.offset, end).await?.ok_or_else(|| self.damaged(at))?;
                let next = Position { segment: at.segment, offset: header.next() };
                if !header.is_internal() && header.state != State::Dead {
                    if !records.is_empty() && bytes + header.len as usize > bytes_max {
                        return Ok((records, at));
                    }
                    let intact = header.state == State::Alive;
                    let payload = if intact { window.payload(id, &header).await? } else { None };
                    let payload = payload.ok_or_else(|| self.damaged(at))?;
                    bytes += payload.len();
                    records.push(StoredRecord { position: at, kind: header.kind, tag: header.tag, payload });
                }
                at = next;
            }
            // Numbers have gaps only where segments were removed.
            let next =
                self.shared.table.lock().segments.range(at.segment + 1..).next().map(|(number, _)| *number);
            let Some(segment) = next.filter(|&number| number <= synced.segment) else {
                return Ok((records, at));
            };
            at = Position { segment, offset: 0 };
        }
    }

    /// Gives the payloads of these records away: their blocks are freed and read as zeros, and a later scan
    /// shows them as dead. Durable when it returns; after an error or a crash each record is alive or dead,
    /// whole, and the call may be repeated. One sync for each segment, so many at once are cheaper.
    pub async fn punch(&self, positions: &[Position]) -> io::Result<()> {
        let _housekeeping = self.shared.housekeeping.lock().await;
        let mut by_segment: BTreeMap<u32, Vec<Position>> = BTreeMap::new();
        for position in positions {
            by_segment.entry(position.segment).or_default().push(*position);
        }
        for (number, positions) in by_segment {
            let (id, end, file) = self.shared.segment(number).await?;
            let mut payloads = Vec::with_capacity(positions.len());
            if let Some(segment) = self.shared.table.lock().segments.get_mut(&number) {
                segment.whole = false;
            }
            for position in positions {
                let mut window = Window::new(&*file, RECORD_HEADER_BYTES as usize).await?;
                let bytes = window.get(position.offset, RECORD_HEADER_BYTES).await?;
                let header = RecordHeader::decode(&bytes, id, position.offset, end);
                let header = header.ok_or_else(|| self.missing(position))?;
                if header.state != State::Dead {
                    let word = Bytes::copy_from_slice(&dead_word_of(&bytes)?.to_le_bytes());
                    file.write_at(u64::from(position.offset + STATE_AT), vec![word]).await?;
                }
                payloads.push(header);
            }
            // Before the first payload goes: zeros under a living header would be damage.
            file.sync().await?;
            for header in payloads.iter().filter(|header| header.len > 0) {
                file.punch(u64::from(header.payload_at()), u64::from(header.len)).await?;
            }
        }
        Ok(())
    }

    async fn header(
        &self,
        window: &mut Window<'_>,
        id: SegmentId,
        end: u32,
        position: Position,
    ) -> io::Result<RecordHeader> {
        if position.offset >= end {
            return Err(self.missing(position));
        }
        let header = window.header(id, position.offset, end).await?.ok_or_else(|| self.damaged(position))?;
        match header.state {
            State::Alive if !header.is_internal() => Ok(header),
            State::Bad => Err(self.damaged(position)),
            _ => Err(self.missing(position)),
        }
    }

    fn missing(&self, position: Position) -> io::Error {
        let why = format!("no record at {position} of log {}", self.shared.dir.display());
        io::Error::new(io::ErrorKind::NotFound, why)
    }

    fn damaged(&self, position: Position) -> io::Error {
        if !self.shared.table.lock().segments.contains_key(&position.segment) {
            // Removed while it was read: its file may hold another life by now.
            return self.missing(position);
        }
        let why = format!("the record at {position} of log {} is damaged", self.shared.dir.display());
        io::Error::new(io::ErrorKind::InvalidData, why)
    }
}
