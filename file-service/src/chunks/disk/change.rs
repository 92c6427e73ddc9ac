//! Changes: storing and removing. Each runs in a task of its own, so that a caller who goes away cannot leave one
//! half done.

use super::files::PartFile;
use super::format::{
    ChunkHeader, HEADER_BYTES, KIND_CHUNK, KIND_REMOVED, REMOVED_IDS_MAX, encode_removed, encode_table,
};
use super::index::{Held, Place};
use super::shared::{Floor, Ticket};
use super::*;
use bytes::BytesMut;
use disk::log::Position;
use std::io;

/// Failed writes that are remembered. After a failure of the log hardly any more are tried.
const UNCERTAIN_MAX: usize = 100_000;

/// Runs a change to its end, whatever becomes of the caller.
async fn finish<T: Send + 'static>(change: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
    match tokio::spawn(change).await {
        Ok(done) => done,
        Err(error) => Err(Error::internal(format!("a change of the chunk store ended early: {error}"))),
    }
}

impl Shared {
    /// Stores a small chunk as a record.
    pub(super) async fn put_record(
        self: Arc<Self>,
        header: ChunkHeader,
        blocks: Vec<u64>,
        data: Vec<Bytes>,
        ticket: Option<Ticket>,
    ) -> Result<ChunkInfo> {
        finish(async move {
            let _claim = self.claim(header.chunk).await;
            if let Some(info) = self.needless(&header, ticket.as_ref())? {
                return Ok(info);
            }
            let mut start = BytesMut::with_capacity(HEADER_BYTES + blocks.len() * 8);
            header.encode(&mut start);
            encode_table(&blocks, &mut start);
            let mut payload = vec![start.freeze()];
            payload.extend(data);
            let floor = self.floor();
            let appended = self.log.append(KIND_CHUNK, self.sequence(), payload).await;
            let position = match appended {
                Ok(position) => position,
                Err(error) => {
                    // Refused for lack of room, nothing of it was written; else nobody knows.
                    if !is_full(&error) {
                        self.doubt(header.chunk);
                    }
                    return Err(self.disk_error(error));
                }
            };
            let (info, replaced) = self.publish(&header, Place::Record(position));
            self.discard(replaced, floor).await?;
            Ok(info)
        })
        .await
    }

    /// Stores a large chunk, whose data is in `file`.
    pub(super) async fn put_file(
        self: Arc<Self>,
        header: ChunkHeader,
        blocks: Vec<u64>,
        file: PartFile,
        ticket: Ticket,
    ) -> Result<ChunkInfo> {
        finish(async move {
            let _claim = self.claim(header.chunk).await;
            if let Some(info) = self.needless(&header, Some(&ticket))? {
                return Ok(info);
            }
            let floor = self.floor();
            if let Err(error) = file.seal(&header, &blocks).await {
                // It may have its name already. Where it replaced a bad copy it is good, whatever was synced.
                let is_new = self.state.lock().index.get(header.chunk).is_none();
                if is_new && self.files.remove(&[header.chunk]).await.is_err() {
                    self.doubt(header.chunk);
                }
                return Err(self.disk_error(error));
            }
            let (info, replaced) = self.publish(&header, Place::File(self.files.next_number()));
            // A file that was replaced lost its name to the new one.
            let replaced = replaced.filter(|held| matches!(held.place, Place::Record(_)));
            self.discard(replaced, floor).await?;
            Ok(info)
        })
        .await
    }

    /// Remembers a chunk that is not held but may be found by the next start.
    fn doubt(&self, chunk: ChunkId) {
        let mut state = self.state.lock();
        if state.uncertain.len() < UNCERTAIN_MAX {
            state.uncertain.insert(chunk);
        }
    }

    /// The answer if the chunk is held already; an error if its writer may not seal it.
    fn needless(&self, header: &ChunkHeader, ticket: Option<&Ticket>) -> Result<Option<ChunkInfo>> {
        let state = self.state.lock();
        let length = u64::from(header.length);
        if let Some(info) = self.settled_copy(&state, header.chunk, length, header.checksum)? {
            return Ok(Some(info));
        }
        if ticket.is_some_and(|ticket| !ticket.is_current(&state)) {
            return Err(overtaken(header.chunk));
        }
        Ok(None)
    }

    /// Gets rid of a copy that was replaced. The new one is durable and wins at the next start in any case.
    async fn discard(self: &Arc<Self>, replaced: Option<Held>, floor: Floor) -> Result<()> {
        match replaced.map(|held| (held.chunk, held.place)) {
            None => {}
            Some((_, Place::Record(position))) => self.bury(vec![position], floor).await,
            Some((chunk, Place::File(_))) => {
                self.files.remove(&[chunk]).await.map_err(|error| self.disk_error(error))?;
            }
        }
        Ok(())
    }

    /// Removes chunks.
    pub(super) async fn remove(self: Arc<Self>, mut chunks: Vec<ChunkId>) -> Result<Removed> {
        self.check_open()?;
        chunks.sort_unstable();
        chunks.dedup();
        finish(async move {
            let mut removed = Removed::default();
            for chunks in chunks.chunks(REMOVED_IDS_MAX) {
                let done = self.remove_some(chunks).await?;
                removed.chunks += done.chunks;
                removed.bytes += done.bytes;
            }
            Ok(removed)
        })
        .await
    }

    async fn remove_some(self: &Arc<Self>, chunks: &[ChunkId]) -> Result<Removed> {
        let mut claims = Vec::with_capacity(chunks.len());
        for chunk in chunks {
            claims.push(self.claim(*chunk).await);
        }
        let (mut records, mut files) = (Vec::new(), Vec::new());
        {
            let state = self.state.lock();
            let doubtful =
                |chunk: &&ChunkId| state.uncertain.contains(chunk) && state.index.get(**chunk).is_none();
            if let Some(chunk) = chunks.iter().find(doubtful) {
                let name = &self.config.name;
                let why = format!(
                    "a write of chunk {chunk} failed in {name}; what is left of it is seen at the next start"
                );
                return Err(Error::new(Reason::Io, why));
            }
            for held in chunks.iter().filter_map(|chunk| state.index.get(*chunk)) {
                match held.place {
                    Place::Record(_) => records.push(held.chunk),
                    Place::File(_) => files.push(held),
                }
            }
        }
        let mut removed = self.remove_files(files).await?;
        if !records.is_empty() {
            let of_records = self.remove_records(&records).await?;
            removed.chunks += of_records.chunks;
            removed.bytes += of_records.bytes;
        }
        Ok(removed)
    }

    async fn remove_files(&self, files: Vec<Held>) -> Result<Removed> {
        let chunks: Vec<ChunkId> = files.iter().map(|held| held.chunk).collect();
        // Readers are to learn first, lest they take a missing file for a bad one.
        self.forget(&chunks);
        if let Err(error) = self.files.remove(&chunks).await {
            // Some may still be there, so that the caller's next try must find them.
            let mut state = self.state.lock();
            for held in files {
                let place = Place::File(self.files.next_number());
                state.index.insert(Held { place, ..held });
            }
            drop(state);
            return Err(self.disk_error(error));
        }
        Ok(sum(&files))
    }

    async fn remove_records(self: &Arc<Self>, chunks: &[ChunkId]) -> Result<Removed> {
        let floor = self.floor();
        let payload = vec![encode_removed(chunks)];
        match self.log.append(KIND_REMOVED, self.sequence(), payload).await {
            Ok(_) => {
                let gone = self.forget(chunks);
                self.bury(positions(&gone), floor).await;
                Ok(sum(&gone))
            }
            Err(error) if is_full(&error) && !self.log.is_failed() => self.remove_in_place(chunks).await,
            Err(error) => Err(self.disk_error(error)),
        }
    }

    /// Removal on a full disk: without a snapshot the next start reads all records, and sees which are dead.
    async fn remove_in_place(self: &Arc<Self>, chunks: &[ChunkId]) -> Result<Removed> {
        let mut snapshot = self.snapshot.lock().await;
        self.delete_snapshot(&mut snapshot).await.map_err(|error| self.disk_error(error))?;
        let gone = self.forget(chunks);
        let (left, error) = self.kill(positions(&gone)).await;
        let Some(error) = error else { return Ok(sum(&gone)) };
        let mut state = self.state.lock();
        for held in gone {
            if matches!(held.place, Place::Record(position) if left.contains(&position)) {
                state.index.insert(held);
            }
        }
        drop(state);
        Err(self.disk_error(error))
    }

    /// Takes chunks out of the index and returns them.
    fn forget(&self, chunks: &[ChunkId]) -> Vec<Held> {
        let mut state = self.state.lock();
        chunks.iter().filter_map(|chunk| state.index.remove(*chunk)).collect()
    }

    /// Marks records dead and gives their room back. What fails is tried again by `maintain`, and until then holds
    /// the settled position back, so that the next start does it in any case.
    pub(super) async fn bury(&self, positions: Vec<Position>, floor: Floor) {
        if let (left, Some(error)) = self.kill(positions).await {
            tracing::warn!(store = %self.config.name, records = left.len(), %error, "removed records stay for now");
            self.state.lock().undead.push((left, floor));
        }
    }

    /// Marks records dead, durably, and gives their room back; what was not possible, and why.
    async fn kill(&self, positions: Vec<Position>) -> (Vec<Position>, Option<io::Error>) {
        if positions.is_empty() || self.log.punch(&positions).await.is_ok() {
            return (Vec::new(), None);
        }
        // One bad record must not keep the others.
        let (mut left, mut why) = (Vec::new(), None);
        for position in positions {
            let Err(error) = self.log.punch(&[position]).await else { continue };
            let bad = matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidData);
            if !(bad && self.erase(position).await) {
                left.push(position);
                why = Some(error);
            }
        }
        (left, why)
    }

    /// Wipes a record whose own header is damaged, so that it cannot be marked dead: the chunk's header, by which a
    /// start without a snapshot would still know it. True if there is nothing left to wipe.
    async fn erase(&self, position: Position) -> bool {
        let (file, at) = match self.log.place(position).await {
            Ok(placed) => placed,
            // The segment is gone, or nothing of it can be read.
            Err(error) => return error.kind() == io::ErrorKind::NotFound,
        };
        let wipe = async {
            file.write_at(at, vec![Bytes::from_static(&[0; HEADER_BYTES])]).await?;
            file.sync().await
        };
        wipe.await.is_ok()
    }
}

fn positions(gone: &[Held]) -> Vec<Position> {
    let records = gone.iter().filter_map(|held| match held.place {
        Place::Record(position) => Some(position),
        Place::File(_) => None,
    });
    records.collect()
}

fn sum(gone: &[Held]) -> Removed {
    let bytes = gone.iter().map(|held| u64::from(held.length)).sum();
    Removed { chunks: gone.len() as u64, bytes }
}

/// Whether an error only says that there is no room now.
pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}
