//! Housekeeping: snapshots of the index, and segments whose chunks are gone.

use super::change::is_full;
use super::index::{Held, Place};
use super::shared::SnapshotState;
use super::snapshot::{SNAPSHOT_NAME, Writer};
use super::*;
use disk::{
    durable::{remove_file_durable, write_file_durable},
    log::{Position, Record, SegmentInfo},
};
use std::{collections::BTreeSet, io};

/// Living bytes that one step copies at most, and segments that it looks at.
const STEP_BYTES_MAX: u64 = 8 << 20;
const STEP_SEGMENTS_MAX: usize = 64;
/// Chunks that are taken from the index under one lock.
const PAGE_CHUNKS: usize = 8192;
/// A segment is emptied when less than one part in this many of it holds chunks.
const LIVE_SHARE: u64 = 2;
const ALL: RangeInclusive<GrantId> = GrantId(0)..=GrantId(u64::MAX);

impl Shared {
    /// See [`ChunkStore::maintain`].
    pub(super) async fn maintain(self: &Arc<Self>) -> Result<bool> {
        self.check_open()?;
        self.refresh_space().await.map_err(|error| self.disk_error(error))?;
        let undead = std::mem::take(&mut self.state.lock().undead);
        for (positions, floor) in undead {
            self.bury(positions, floor).await;
        }
        let mut snapshot = self.snapshot.lock().await;
        let (victims, more) = self.victims(&snapshot);
        match self.empty(&victims, &mut snapshot).await {
            // Segments that are empty already may make room for the next step's copies.
            Err(error) if is_full(&error) && !self.log.is_failed() => {}
            emptied => emptied.map_err(|error| self.disk_error(error))?,
        }
        if !victims.is_empty() || self.is_snapshot_due(&snapshot) {
            match self.write_snapshot(&mut snapshot).await {
                // Segments can go without one, and give the room that the next needs.
                Err(error) if is_full(&error) => self.delete_snapshot(&mut snapshot).await,
                written => written,
            }
            .map_err(|error| self.disk_error(error))?;
        }
        let removed = self.drop_empty(&snapshot).await.map_err(|error| self.disk_error(error))?;
        Ok(more && removed > 0)
    }

    /// Segments worth emptying, those with the least work first; and whether there are others.
    fn victims(&self, snapshot: &SnapshotState) -> (Vec<SegmentInfo>, bool) {
        let segments = self.log.segments();
        let state = self.state.lock();
        let live = |segment: &SegmentInfo| state.index.live_bytes(segment.number);
        let worth = |segment: &SegmentInfo| {
            let stuck = snapshot.stuck.get(&segment.number) == Some(&live(segment));
            !segment.is_active && !stuck && live(segment) * LIVE_SHARE < u64::from(segment.bytes_used)
        };
        let mut worthy: Vec<SegmentInfo> = segments.into_iter().filter(worth).collect();
        worthy.sort_by_key(|segment| (live(segment), segment.number));
        let mut bytes = 0;
        let fits = |segment: &&SegmentInfo| {
            bytes += live(segment);
            bytes <= STEP_BYTES_MAX
        };
        let count = worthy.iter().take(STEP_SEGMENTS_MAX).take_while(fits).count().max(1).min(worthy.len());
        let more = count < worthy.len();
        worthy.truncate(count);
        (worthy, more)
    }

    /// Copies what still lives in these segments to the end of the log.
    async fn empty(
        self: &Arc<Self>,
        victims: &[SegmentInfo],
        snapshot: &mut SnapshotState,
    ) -> io::Result<()> {
        let numbers: BTreeSet<u32> = {
            let state = self.state.lock();
            let numbers = victims.iter().map(|segment| segment.number);
            numbers.filter(|number| state.index.live_bytes(*number) > 0).collect()
        };
        if numbers.is_empty() {
            return Ok(());
        }
        let batch_bytes_max = (self.config.segment_bytes as usize / 4).min(1 << 20);
        let (mut batch, mut records, mut bytes) = (Vec::new(), Vec::new(), 0);
        let inside = |held: &Held| matches!(held.place, Place::Record(at) if numbers.contains(&at.segment));
        let mut after = None;
        loop {
            let (page, last) = self.page(after);
            for held in page.into_iter().filter(inside) {
                let Place::Record(position) = held.place else { continue };
                match self.log.read_record(position).await {
                    Ok(record) => {
                        bytes += record.payload.len();
                        let payload = vec![record.payload];
                        records.push(Record { kind: record.kind, tag: record.tag, payload });
                        batch.push(held);
                    }
                    // Removed meanwhile, or damaged: then it stays where it is until it is healed.
                    Err(error) => {
                        let mut state = self.state.lock();
                        if error.kind() == io::ErrorKind::InvalidData {
                            state.index.judge(held.chunk, held.place, true, None);
                        }
                    }
                }
                if bytes >= batch_bytes_max {
                    self.move_batch(std::mem::take(&mut batch), std::mem::take(&mut records)).await?;
                    bytes = 0;
                }
            }
            match last {
                Some(last) => after = Some(last),
                None => break,
            }
        }
        if !batch.is_empty() {
            self.move_batch(batch, records).await?;
        }
        let state = self.state.lock();
        for number in numbers {
            let live = state.index.live_bytes(number);
            if live > 0 {
                snapshot.stuck.insert(number, live);
            }
        }
        Ok(())
    }

    async fn move_batch(self: &Arc<Self>, batch: Vec<Held>, records: Vec<Record>) -> io::Result<()> {
        let floor = self.floor();
        let positions = self.log.append_batch(records).await?;
        let mut dead = Vec::with_capacity(batch.len());
        {
            let mut state = self.state.lock();
            for (held, to) in batch.iter().zip(positions) {
                match state.index.get(held.chunk).filter(|now| now.place == held.place) {
                    Some(now) => {
                        state.index.insert(Held { place: Place::Record(to), ..now });
                        if let Place::Record(from) = held.place {
                            dead.push(from);
                        }
                    }
                    // Removed or replaced while it was copied.
                    None => dead.push(to),
                }
            }
        }
        // Also those in segments that are about to go: a chunk has one living record, whatever happens next.
        self.bury(dead, floor).await;
        Ok(())
    }

    /// Some chunks behind `after`, and where to go on.
    fn page(&self, after: Option<ChunkId>) -> (Vec<Held>, Option<ChunkId>) {
        let state = self.state.lock();
        let page: Vec<Held> = state.index.range(after, ALL).take(PAGE_CHUNKS).collect();
        let last = page.last().map(|held| held.chunk).filter(|_| page.len() == PAGE_CHUNKS);
        (page, last)
    }

    fn is_snapshot_due(&self, snapshot: &SnapshotState) -> bool {
        let from = snapshot.settled.unwrap_or_default();
        let to = self.settled();
        let segments = u64::from(to.segment.saturating_sub(from.segment));
        let grown = (segments * u64::from(self.config.segment_bytes) + u64::from(to.offset))
            .saturating_sub(u64::from(from.offset));
        let next_bytes = self.state.lock().index.chunks() * snapshot::ENTRY_BYTES as u64;
        grown >= self.config.snapshot_after_bytes.max(4 * next_bytes)
    }

    /// Replaces the snapshot on disk. The index may change while it is copied: what it gains or loses lies behind
    /// the settled position, and is replayed over the copy.
    pub(super) async fn write_snapshot(&self, snapshot: &mut SnapshotState) -> io::Result<()> {
        let settled = self.settled();
        let mut writer = Writer::new(settled, self.sequence_now(), self.state.lock().index.chunks());
        let mut after = None;
        loop {
            let (page, last) = self.page(after);
            page.iter().for_each(|held| writer.push(held));
            match last {
                Some(last) => after = Some(last),
                None => break,
            }
        }
        let bytes = writer.finish().freeze();
        write_file_durable(&*self.disk, &self.dir.join(SNAPSHOT_NAME), bytes).await?;
        snapshot.settled = Some(settled);
        Ok(())
    }

    pub(super) async fn delete_snapshot(&self, snapshot: &mut SnapshotState) -> io::Result<()> {
        remove_file_durable(&*self.disk, &self.dir.join(SNAPSHOT_NAME)).await?;
        snapshot.settled = None;
        Ok(())
    }

    /// Removes segments that hold no chunk and nothing that the next start needs; how many. One that cannot be removed
    /// now does not keep the others: it is the next step's again.
    pub(super) async fn drop_empty(&self, snapshot: &SnapshotState) -> io::Result<usize> {
        let settled: Position = snapshot.settled.unwrap_or_else(|| self.settled());
        let (mut removed, mut failed) = (0, Ok(()));
        for segment in self.log.segments() {
            if segment.is_active || segment.number >= settled.segment {
                continue;
            }
            // It cannot gain any: new records go to the end of the log, and those on their way hold `settled` back.
            if self.state.lock().index.live_bytes(segment.number) > 0 {
                continue;
            }
            match self.log.remove_segment(segment.number).await {
                Ok(()) => removed += 1,
                Err(error) => failed = failed.and(Err(error)),
            }
        }
        failed.map(|()| removed)
    }

    /// See [`ChunkStore::close`].
    pub(super) async fn close(&self) -> Result<()> {
        if !self.set_closed() {
            return Ok(());
        }
        let closed = self.log.close().await;
        let mut snapshot = self.snapshot.lock().await;
        let written = self.write_snapshot(&mut snapshot).await;
        match closed.and(written) {
            // The next start reads all; nothing is lost.
            Err(error) if is_full(&error) && !self.log.is_failed() => {
                tracing::warn!(store = %self.config.name, %error, "no room for the snapshot of the index");
                Ok(())
            }
            Err(error) => Err(Error::new(Reason::Io, format!("{}: {error}", self.config.name))),
            Ok(()) => Ok(()),
        }
    }
}
