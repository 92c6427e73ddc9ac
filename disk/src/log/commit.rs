//! The task that writes: takes all that waits, writes it behind one another, syncs once, answers all.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio::task::JoinHandle;

use super::format::*;
use super::segments::{Prepared, Segment, Shared, is_full};
use super::{Position, Record};
use crate::DiskFile;

/// Payload parts up to this size are copied behind their header; longer ones are written from where they are.
const COPY_BYTES_MAX: usize = 8 * 1024;

pub(super) enum Command {
    Append(Batch),
    Close(oneshot::Sender<io::Result<()>>),
}

/// Records of one caller; they go into one segment.
pub(super) struct Batch {
    pub(super) records: Vec<Record>,
    pub(super) encoded_bytes: u32,
    pub(super) answer: oneshot::Sender<io::Result<Vec<Position>>>,
    /// Its share of the queue's bytes, given back when it is answered.
    pub(super) permit: OwnedSemaphorePermit,
}

/// A batch that was laid out and waits for its sync.
struct Placed {
    answer: oneshot::Sender<io::Result<Vec<Position>>>,
    positions: Vec<Position>,
    _permit: OwnedSemaphorePermit,
}

/// The segment that is being filled.
struct Active {
    id: SegmentId,
    file: Arc<dyn DiskFile>,
    /// Where the next record goes, counting what is laid out.
    at: u32,
    /// Where the next write begins.
    written: u32,
}

pub(super) struct Committer {
    shared: Arc<Shared>,
    active: Option<Active>,
    /// The next segment, made ready while this one is filled.
    preparing: Option<JoinHandle<io::Result<Prepared>>>,
    /// The end of all that is proven durable; goes into every record.
    synced: Position,
    layout: Layout,
    placed: Vec<Placed>,
    last_tag: Option<u64>,
    /// Records were acknowledged that no later record proves synced.
    unproven: bool,
}

/// Bytes for one write, in order.
#[derive(Default)]
struct Layout {
    parts: Vec<Bytes>,
    small: BytesMut,
    bytes: usize,
}

impl Layout {
    fn push(&mut self, part: &Bytes) {
        if part.len() <= COPY_BYTES_MAX {
            self.small.extend_from_slice(part);
        } else {
            self.cut();
            self.parts.push(part.clone());
        }
    }

    fn cut(&mut self) {
        if !self.small.is_empty() {
            self.parts.push(self.small.split().freeze());
        }
    }

    fn take(&mut self) -> Vec<Bytes> {
        self.cut();
        self.bytes = 0;
        std::mem::take(&mut self.parts)
    }
}

impl Committer {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        let synced = shared.synced();
        let layout = Layout::default();
        Self {
            shared,
            active: None,
            preparing: None,
            synced,
            layout,
            placed: Vec::new(),
            last_tag: None,
            unproven: false,
        }
    }

    /// Opens a fresh segment and writes the record that proves what was recovered.
    pub(super) async fn begin(&mut self) -> io::Result<()> {
        self.roll().await?;
        self.lay_proof();
        self.flush(true).await
    }

    pub(super) async fn run(mut self, mut queue: mpsc::Receiver<Command>) {
        let proof_after = self.shared.config.proof_after;
        loop {
            let command = match proof_after {
                Some(after) if self.unproven => match tokio::time::timeout(after, queue.recv()).await {
                    Ok(command) => command,
                    Err(_) => {
                        self.prove(false).await;
                        continue;
                    }
                },
                _ => queue.recv().await,
            };
            let Some(command) = command else { break };
            // Those who were answered last are just about to send their next: let them into this group.
            tokio::task::yield_now().await;
            let mut group = VecDeque::new();
            let mut close = None;
            let mut next = Some(command);
            let mut bytes = 0;
            while let Some(command) = next.take() {
                match command {
                    Command::Append(batch) => {
                        bytes += batch.encoded_bytes as usize;
                        group.push_back(batch);
                    }
                    Command::Close(answer) => close = Some(answer),
                }
                if close.is_none() && bytes < self.shared.config.group_bytes_max {
                    next = queue.try_recv().ok();
                }
            }
            if let Err(error) = self.commit(group).await {
                // What was sent after a refused record must not overtake it.
                while let Ok(command) = queue.try_recv() {
                    match command {
                        Command::Append(batch) => refuse(batch, &error),
                        Command::Close(answer) => close = Some(answer),
                    }
                }
            }
            if let Some(answer) = close {
                queue.close();
                self.prove(true).await;
                self.finish().await;
                let _ = answer.send(self.shared.check());
                // Dropping the queue answers the rest: their answers' senders are dropped with it.
                return;
            }
        }
        self.finish().await;
    }

    /// A preparation that outlives the log could change its files under the next owner.
    async fn finish(&mut self) {
        if let Some(preparing) = self.preparing.take() {
            let _ = preparing.await;
        }
    }

    /// Writes a group. An error says that its rest was refused, and everybody was told.
    async fn commit(&mut self, mut group: VecDeque<Batch>) -> io::Result<()> {
        let done = self.lay_group(&mut group).await;
        if let Err(error) = &done {
            for batch in group {
                refuse(batch, error);
            }
        }
        done
    }

    async fn lay_group(&mut self, group: &mut VecDeque<Batch>) -> io::Result<()> {
        self.shared.check()?;
        while let Some(batch) = group.front() {
            let bytes = batch.encoded_bytes;
            if !self.fits(bytes) {
                // The old segment is done with before the new one begins: the new one's first record says where.
                self.flush(true).await?;
                if let Err(error) = self.roll().await {
                    // Nothing of this batch was written anywhere, so a full disk may recover.
                    if !is_full(&error) {
                        self.shared.fail(&error);
                    }
                    return Err(error);
                }
            }
            if let Some(batch) = group.pop_front() {
                self.lay(batch);
            }
        }
        self.flush(true).await
    }

    /// Whether records of this size, and the proof that a close writes behind them, fit into the segment.
    fn fits(&self, bytes: u32) -> bool {
        let Some(active) = &self.active else { return false };
        let end = u64::from(active.at) + u64::from(bytes) + u64::from(RECORD_HEADER_BYTES);
        end <= u64::from(self.shared.config.segment_bytes)
    }

    fn lay(&mut self, batch: Batch) {
        let mut positions = Vec::with_capacity(batch.records.len());
        for record in &batch.records {
            positions.extend(self.lay_record(record, 0));
            self.last_tag = Some(record.tag);
        }
        self.placed.push(Placed { answer: batch.answer, positions, _permit: batch.permit });
    }

    fn lay_record(&mut self, record: &Record, flags: u8) -> Option<Position> {
        let active = self.active.as_mut()?;
        let len = record.len();
        let padding = &[0; ALIGN_BYTES as usize][..(len.next_multiple_of(ALIGN_BYTES) - len) as usize];
        let parts = record.payload.iter().map(|part| &part[..]).chain([padding]);
        let header = RecordHeader {
            len,
            kind: record.kind,
            flags,
            offset: active.at,
            synced: self.synced,
            tag: record.tag,
            payload_crc: payload_crc(active.id, active.at, parts),
            state: State::Alive,
        };
        header.encode(active.id, &mut self.layout.small);
        for part in &record.payload {
            self.layout.push(part);
        }
        self.layout.small.extend_from_slice(padding);
        self.layout.bytes += encoded_len(len) as usize;
        active.at = header.next();
        Some(Position { segment: active.id.number, offset: header.offset })
    }

    fn lay_proof(&mut self) {
        let tag = self.last_tag.unwrap_or(0);
        self.lay_record(&Record { kind: 0, tag, payload: Vec::new() }, FLAG_INTERNAL);
    }

    /// Writes a record that proves all others synced. Without a sync of its own it is a mere hint: it only
    /// helps to tell rot from a torn end, should it survive.
    async fn prove(&mut self, sync: bool) {
        self.unproven = false;
        if self.shared.check().is_ok() && self.active.is_some() && (sync || self.fits(RECORD_HEADER_BYTES)) {
            self.lay_proof();
            // An error has marked the log as failed, where the next caller meets it.
            let _ = self.flush(sync).await;
        }
    }

    /// Writes what is laid out, syncs, and answers. An error poisons the log: what was written may or may not
    /// be durable, and nobody may ever be told that it is.
    async fn flush(&mut self, sync: bool) -> io::Result<()> {
        let Some(active) = self.active.as_mut().filter(|_| self.layout.bytes > 0) else { return Ok(()) };
        let parts = self.layout.take();
        let written = async {
            active.file.write_at(u64::from(active.written), parts).await?;
            if sync { active.file.sync().await } else { Ok(()) }
        };
        let placed = std::mem::take(&mut self.placed);
        if let Err(error) = written.await {
            self.shared.fail(&error);
            for batch in placed {
                let _ = batch.answer.send(self.shared.check().map(|()| Vec::new()));
            }
            return self.shared.check();
        }
        active.written = active.at;
        let end = Position { segment: active.id.number, offset: active.at };
        {
            let mut table = self.shared.table.lock();
            table.end = end;
            if sync {
                table.last_tag = self.last_tag.or(table.last_tag);
                if let Some(segment) = table.segments.get_mut(&active.id.number) {
                    segment.end = end.offset;
                }
            }
        }
        if sync {
            self.synced = end;
            self.shared.synced.send_replace(end);
            self.unproven |= !placed.is_empty();
        }
        for batch in placed {
            let _ = batch.answer.send(Ok(batch.positions));
        }
        self.prepare_ahead();
        Ok(())
    }

    fn prepare_ahead(&mut self) {
        let Some(active) = &self.active else { return };
        // Not earlier, so that a log that is hardly used takes one segment, not two.
        if self.preparing.is_none() && active.at > self.shared.config.segment_bytes / 2 {
            let (shared, number) = (self.shared.clone(), active.id.number);
            self.preparing = Some(tokio::spawn(async move { shared.prepare(after(&shared, number)?).await }));
        }
    }

    /// Goes on to the next segment.
    async fn roll(&mut self) -> io::Result<()> {
        let ahead = match self.preparing.take() {
            Some(preparing) => preparing.await.map_err(io::Error::other).and_then(|done| done),
            None => Err(io::ErrorKind::StorageFull.into()),
        };
        let Prepared { id, file } = match ahead {
            Ok(prepared) => prepared,
            // There may be room by now.
            Err(error) if is_full(&error) => {
                let number = match &self.active {
                    Some(active) => after(&self.shared, active.id.number)?,
                    None => self.shared.table.lock().number_next,
                };
                self.shared.prepare(number).await?
            }
            Err(error) => return Err(error),
        };
        let mut table = self.shared.table.lock();
        let (number, life) = (id.number, id.life);
        table.segments.insert(
            number,
            Segment { life, end: SEGMENT_HEADER_BYTES, loose: true, whole: true, file: Some(file.clone()) },
        );
        table.number_next = number.saturating_add(1);
        table.active = Some(number);
        self.active = Some(Active { id, file, at: SEGMENT_HEADER_BYTES, written: SEGMENT_HEADER_BYTES });
        Ok(())
    }
}

fn after(shared: &Shared, number: u32) -> io::Result<u32> {
    let why = || io::Error::other(format!("log {} has used all segment numbers", shared.dir.display()));
    number.checked_add(1).ok_or_else(why)
}

fn refuse(batch: Batch, error: &io::Error) {
    let _ = batch.answer.send(Err(io::Error::new(error.kind(), error.to_string())));
}

/// How long the committer waits, by default, before it proves the last records of a quiet log.
pub(super) const PROOF_AFTER: Duration = Duration::from_secs(1);
