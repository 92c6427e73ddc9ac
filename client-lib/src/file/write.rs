//! The writing side of a handle: a chunk being filled, chunks under way, and the commit.

use crate::{
    client::Core,
    file::{body::Body, overlay::Overlay},
    lock::Hold,
    options::WriteOptions,
    read::{PIECE_BYTES_MAX, plan},
    segments::Segments,
    task::Task,
    write::{chunk::Sealed, grants::Placement, rows::Rows, store::Stored},
};
use bytes::{Bytes, BytesMut};
use cairn_proto::{
    Error, Reason, Result,
    id::FencingToken,
    limits,
    v1::{self, Attributes},
};
use std::sync::Arc;
use tokio::sync::OwnedSemaphorePermit;

/// Chunks of one handle that are sealed and not yet durable.
const CHUNKS_IN_FLIGHT: usize = 4;
/// After so many chunks in one version the next are twice as long, so that a commit takes them all.
const CHUNKS_BEFORE_DOUBLING: usize = limits::COMMIT_RECEIPTS_MAX / 4;
/// After so many chunks in one version the next take ids in rows, so that the directory needs few records for them.
const CHUNKS_BEFORE_ROWS: usize = 8;
/// Times that chunks are copied because their grant was closed before the commit.
const REWRITES_MAX: usize = 3;

/// One chunk of the version in the making.
#[derive(Debug)]
enum Chunk {
    /// The one being filled; its bytes are in `WriteSide::open`.
    Open,
    /// On its way; its bytes stay until there is a receipt.
    Sent(Sealed, Task<Result<Stored>>),
    /// Durable.
    Stored(Box<Stored>),
    /// Not to be had.
    Failed,
}

/// What a handle needs to write.
#[derive(Debug)]
pub(crate) struct WriteSide {
    pub token: FencingToken,
    pub overlay: Overlay,
    pub exists: bool,
    pub append: bool,
    pub commit_on_flush: bool,
    /// A lock that the handle took itself.
    hold: Option<Hold>,
    placement: Placement,
    rows: Arc<Rows>,
    options: WriteOptions,
    chunk_bytes: usize,
    chunks: Vec<Chunk>,
    open: BytesMut,
    failure: Option<Error>,
    closed: bool,
}

impl WriteSide {
    pub fn new(
        core: &Core,
        token: FencingToken,
        hold: Option<Hold>,
        placement: Placement,
        overlay: Overlay,
        options: WriteOptions,
    ) -> Self {
        Self {
            token,
            overlay,
            exists: true,
            append: false,
            commit_on_flush: false,
            hold,
            placement,
            rows: Arc::default(),
            options,
            chunk_bytes: core.chunk_bytes,
            chunks: Vec::new(),
            open: BytesMut::new(),
            failure: None,
            closed: false,
        }
    }

    /// Notes which chunks are durable by now.
    pub fn reap(&mut self) {
        for chunk in &mut self.chunks {
            if let Chunk::Sent(_, task) = chunk
                && task.is_finished()
                && let Some(result) = futures::FutureExt::now_or_never(task)
            {
                settle(chunk, result, &mut self.failure);
            }
        }
    }

    fn under_way(&self) -> usize {
        self.chunks.iter().filter(|chunk| matches!(chunk, Chunk::Sent(..))).count()
    }

    /// Waits for the oldest chunk under way.
    async fn settle_one(&mut self) {
        for chunk in &mut self.chunks {
            if let Chunk::Sent(_, task) = chunk {
                let result = task.await;
                settle(chunk, result, &mut self.failure);
                return;
            }
        }
    }

    /// # Errors
    /// The first failure of a chunk: no version can be made any more.
    fn check(&self) -> Result<()> {
        match &self.failure {
            Some(error) => Err(error.clone()),
            None => Ok(()),
        }
    }

    fn next_chunk_bytes(&self) -> usize {
        let doublings = (self.chunks.len() / CHUNKS_BEFORE_DOUBLING).min(16);
        (self.chunk_bytes << doublings).min(limits::CHUNK_BYTES_MAX as usize)
    }

    /// Room in the chunk being filled.
    fn room(&self) -> usize {
        let open = matches!(self.chunks.last(), Some(Chunk::Open));
        match open {
            // Its number decides how long it may be, not that of the next.
            true => {
                let doublings = ((self.chunks.len() - 1) / CHUNKS_BEFORE_DOUBLING).min(16);
                let full = (self.chunk_bytes << doublings).min(limits::CHUNK_BYTES_MAX as usize);
                full.saturating_sub(self.open.len())
            }
            false => self.next_chunk_bytes(),
        }
    }

    fn check_limits(&self, path: &str) -> Result<()> {
        if self.overlay.ranges() + 4 > limits::COMMIT_EDITS_MAX
            || self.chunks.len() + 1 > limits::COMMIT_RECEIPTS_MAX
        {
            return Err(Error::limit(format!(
                "the changes of {path} are too many pieces for one version: commit in between"
            ))
            .at(path));
        }
        Ok(())
    }

    /// Copies `bytes` into the chunk being filled, which has room.
    fn put(&mut self, offset: u64, bytes: &[u8]) {
        let last = self.chunks.len().wrapping_sub(1);
        // Bytes that are still being filled in may be changed in place.
        if let Some((number, at)) = self.overlay.find(offset, bytes.len() as u64)
            && number == last
            && matches!(self.chunks.last(), Some(Chunk::Open))
        {
            self.open[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
            return;
        }
        if !matches!(self.chunks.last(), Some(Chunk::Open)) {
            self.chunks.push(Chunk::Open);
        }
        let at = self.open.len() as u64;
        self.open.extend_from_slice(bytes);
        self.overlay.write(
            offset,
            bytes.len() as u64,
            super::overlay::Source::Chunk(self.chunks.len() - 1, at),
        );
    }

    /// Sends the chunk being filled, once there is a place for it among those under way.
    async fn seal(&mut self, core: &Arc<Core>) -> Result<()> {
        if !matches!(self.chunks.last(), Some(Chunk::Open)) {
            return Ok(());
        }
        let place = self.make_place(core, self.open.len()).await?;
        let bytes = std::mem::take(&mut self.open).freeze();
        self.chunks.pop();
        self.send(core, bytes, place);
        Ok(())
    }

    /// Waits for a place for one more chunk, among those of the handle and those of the client.
    async fn make_place(&mut self, core: &Arc<Core>, length: usize) -> Result<OwnedSemaphorePermit> {
        self.reap();
        while self.under_way() >= CHUNKS_IN_FLIGHT {
            self.settle_one().await;
        }
        self.check()?;
        core.place_in_flight(length).await
    }

    /// Begins to send a chunk. Nothing is awaited here: a write that is cancelled must not lose bytes.
    fn send(&mut self, core: &Arc<Core>, bytes: Bytes, place: OwnedSemaphorePermit) {
        let sealed = Sealed::new(bytes);
        let (core, placement, sent) = (core.clone(), self.placement.clone(), sealed.clone());
        let rows = self.rows();
        let task = Task::spawn(async move {
            let _place = place;
            core.store(&sent, &placement, rows.as_deref()).await
        });
        self.chunks.push(Chunk::Sent(sealed, task));
    }

    /// Where a long version takes its ids from; none for a short one, which would waste them.
    fn rows(&self) -> Option<Arc<Rows>> {
        (self.chunks.len() >= CHUNKS_BEFORE_ROWS).then(|| self.rows.clone())
    }

    /// Bytes of one of the handle's own chunks.
    ///
    /// # Errors
    /// As reading does; the failure of the chunk.
    pub async fn read(&self, core: &Arc<Core>, number: usize, at: u64, count: u64) -> Result<Segments> {
        let mut segments = Segments::default();
        let range = at as usize..(at + count) as usize;
        match self.chunks.get(number) {
            Some(Chunk::Open) => segments.push(Bytes::copy_from_slice(&self.open[range])),
            Some(Chunk::Sent(sealed, _)) => segments.push(sealed.data().slice(range)),
            Some(Chunk::Stored(stored)) => return read_stored(core, stored, at, count).await,
            Some(Chunk::Failed) | None => self.check()?,
        }
        Ok(segments)
    }

    /// Waits until all chunks are durable.
    async fn flush(&mut self, core: &Arc<Core>) -> Result<()> {
        self.check()?;
        self.seal(core).await?;
        while self.under_way() > 0 {
            self.settle_one().await;
        }
        self.check()
    }

    fn is_dirty(&self) -> bool {
        !self.exists || !self.overlay.is_clean()
    }

    /// Copies chunks whose grant was closed before the commit under a new one.
    async fn rewrite(&mut self, core: &Arc<Core>) -> Result<()> {
        let rows = self.rows();
        for chunk in &mut self.chunks {
            let Chunk::Stored(stored) = chunk else { continue };
            stored.grant.spoil();
            let bytes = read_stored(core, stored, 0, stored.receipt.length).await?.into_bytes();
            **stored = core.store(&Sealed::new(bytes), &self.placement, rows.as_deref()).await?;
        }
        Ok(())
    }
}

async fn read_stored(core: &Arc<Core>, stored: &Stored, at: u64, count: u64) -> Result<Segments> {
    let mut parts = Vec::new();
    plan::cut(&stored.chunk_ref(), at, count, PIECE_BYTES_MAX, &mut parts)?;
    core.parts(parts).all().await
}

fn settle(chunk: &mut Chunk, result: Result<Result<Stored>>, failure: &mut Option<Error>) {
    match result.and_then(|result| result) {
        Ok(stored) => *chunk = Chunk::Stored(Box::new(stored)),
        Err(error) => {
            failure.get_or_insert(error);
            *chunk = Chunk::Failed;
        }
    }
}

impl Body {
    /// The writing side.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` when it was not opened to write, or is closed.
    pub fn writer(&mut self) -> Result<&mut WriteSide> {
        match &mut self.write {
            Some(side) if !side.closed => Ok(side),
            Some(_) => Err(Error::invalid(format!("{} is closed", self.path)).at(self.path.as_str())),
            None => {
                Err(Error::invalid(format!("{} was not opened to write", self.path)).at(self.path.as_str()))
            }
        }
    }

    /// How long the next chunk should be.
    pub fn next_chunk_bytes(&self) -> usize {
        self.write.as_ref().map_or(self.core.chunk_bytes, WriteSide::next_chunk_bytes)
    }

    /// Copies as much as there is room for without waiting, at the position; nothing when there is none.
    ///
    /// # Errors
    /// As [`Body::writer`]; an earlier failure of a chunk; `LIMIT_EXCEEDED`.
    pub fn try_write(&mut self, bytes: &[u8]) -> Result<Option<usize>> {
        let position = self.position;
        let path = self.path.clone();
        let side = self.writer()?;
        side.check()?;
        let offset = if side.append { side.overlay.size() } else { position };
        let count = side.room().min(bytes.len());
        if count == 0 && !bytes.is_empty() {
            return Ok(None);
        }
        check_end(offset, count as u64, &path)?;
        side.check_limits(&path)?;
        side.put(offset, &bytes[..count]);
        self.position = offset + count as u64;
        self.changed();
        Ok(Some(count))
    }

    /// Sends the chunk being filled, so that there is room again.
    ///
    /// # Errors
    /// An earlier failure of a chunk.
    pub async fn make_room(&mut self) -> Result<()> {
        let core = self.core.clone();
        self.writer()?.seal(&core).await
    }

    /// Writes all of `bytes` at `offset`, or at the end of a file opened to append.
    ///
    /// # Errors
    /// As [`Body::try_write`].
    pub async fn write_at(&mut self, offset: u64, mut bytes: &[u8]) -> Result<()> {
        let core = self.core.clone();
        let path = self.path.clone();
        self.changed();
        let side = self.writer()?;
        side.check()?;
        let mut offset = if side.append { side.overlay.size() } else { offset };
        check_end(offset, bytes.len() as u64, &path)?;
        while !bytes.is_empty() {
            let count = side.room().min(bytes.len());
            if count == 0 {
                side.seal(&core).await?;
                continue;
            }
            side.check_limits(&path)?;
            side.put(offset, &bytes[..count]);
            bytes = &bytes[count..];
            offset += count as u64;
        }
        if side.room() == 0 {
            side.seal(&core).await?;
        }
        Ok(())
    }

    /// Adds a whole chunk at the end without copying it.
    ///
    /// # Errors
    /// As [`Body::try_write`].
    pub async fn append_chunk(&mut self, bytes: Bytes) -> Result<()> {
        let core = self.core.clone();
        let path = self.path.clone();
        self.changed();
        let side = self.writer()?;
        side.seal(&core).await?;
        let place = side.make_place(&core, bytes.len()).await?;
        side.check_limits(&path)?;
        let (offset, length) = (side.overlay.size(), bytes.len() as u64);
        check_end(offset, length, &path)?;
        if length > 0 {
            side.send(&core, bytes, place);
            let number = side.chunks.len() - 1;
            side.overlay.write(offset, length, super::overlay::Source::Chunk(number, 0));
        }
        Ok(())
    }

    /// Makes all that was written durable; commits when the handle does so at flush.
    ///
    /// # Errors
    /// The first failure of a chunk; as [`Body::commit`].
    pub async fn flush(&mut self) -> Result<()> {
        let core = self.core.clone();
        let Some(side) = self.write.as_mut().filter(|side| !side.closed) else { return Ok(()) };
        if side.commit_on_flush {
            self.commit(false).await?;
            return Ok(());
        }
        side.flush(&core).await.map_err(|error| error.at(self.path.as_str()))
    }

    /// Makes all changes the next version.
    ///
    /// # Errors
    /// As `DirectoryService.Commit`; the first failure of a chunk.
    pub async fn commit(&mut self, unlock: bool) -> Result<Attributes> {
        let core = self.core.clone();
        let path = self.path.clone();
        let base = self.base.clone();
        let side = self.writer()?;
        if !side.is_dirty() {
            return Ok(base.attributes.clone());
        }
        side.flush(&core).await.map_err(|error| error.at(path.as_str()))?;
        let (used, edits) = side.overlay.edits();
        let unlock = unlock && side.hold.is_some();
        let mut rewrites = 0;
        let answer = loop {
            let receipts = used.iter().filter_map(|number| match &side.chunks[*number] {
                Chunk::Stored(stored) => Some(stored.receipt.clone()),
                _ => None,
            });
            let (path, inode) = match side.exists {
                true => (String::new(), base.attributes.inode),
                false => (path.clone(), 0),
            };
            let message = v1::CommitRequest {
                path,
                inode,
                token: Some(side.token.into()),
                base_version: if side.exists { base.attributes.version } else { 0 },
                edits: edits.clone(),
                receipts: receipts.collect(),
                condition: side.options.wire_condition(),
                unlock,
                mode: side.options.mode,
                mtime_ns: side.options.mtime_ns,
                xattrs: if side.exists { Vec::new() } else { side.options.xattrs.clone() },
                ..Default::default()
            };
            match core.commit(message).await {
                Err(error) if error.reason == Reason::GrantClosed && rewrites < REWRITES_MAX => {
                    rewrites += 1;
                    side.rewrite(&core).await?;
                }
                answer => break answer,
            }
        };
        let answer = answer.map_err(|error| error.at(path.as_str()))?;
        if unlock && let Some(hold) = &side.hold {
            hold.forget();
        }
        let attributes = answer.attributes.unwrap_or_default();
        side.exists = true;
        side.options.condition = None;
        side.options.mtime_ns = 0;
        side.chunks.clear();
        side.overlay = Overlay::new(attributes.size);
        if unlock {
            side.closed = true;
        }
        // What was committed is what is read from now on; its extents are looked up when they are needed.
        let layout = plan::Layout {
            attributes: attributes.clone(),
            extents: Vec::new(),
            revision: answer.revision,
            layout_revision: answer.revision,
        };
        self.rebase(Arc::new(layout));
        self.without_extents = attributes.size > 0;
        Ok(attributes)
    }

    /// Commits if there are changes, and gives the lock back.
    ///
    /// # Errors
    /// As [`Body::commit`]; the changes are given up then.
    pub async fn close(&mut self) -> Result<Attributes> {
        if self.write.as_ref().is_none_or(|side| side.closed) {
            return Ok(self.base.attributes.clone());
        }
        let committed = self.commit(true).await;
        if let Some(side) = &mut self.write {
            side.closed = true;
            side.overlay = Overlay::new(self.base.size());
            side.chunks.clear();
            match (&committed, side.hold.take()) {
                (_, None) => {}
                (Ok(_), Some(hold)) => {
                    hold.release().await?;
                }
                // The directory was waited for long enough: dropping gives the lock back in the background.
                (Err(error), Some(_)) if error.reason.is_transient() => {}
                (Err(_), Some(hold)) => {
                    if let Err(error) = hold.release().await {
                        tracing::debug!(path = self.path, %error, "a lock was not given back");
                    }
                }
            }
        }
        committed
    }

    /// Gives the changes up and the lock back.
    pub async fn abort(&mut self) {
        if let Some(mut side) = self.write.take()
            && let Some(hold) = side.hold.take()
            && let Err(error) = hold.release().await
        {
            tracing::debug!(path = self.path, %error, "a lock was not given back, it ends with its session");
        }
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        if let Some(side) = self.write.as_ref().filter(|side| !side.closed && side.is_dirty()) {
            let bytes = side.overlay.size();
            tracing::warn!(
                path = self.path,
                bytes,
                "a file was dropped without close, its changes are given up"
            );
        }
    }
}

fn check_end(offset: u64, length: u64, path: &str) -> Result<()> {
    if offset.saturating_add(length) > limits::FILE_BYTES_MAX {
        return Err(Error::limit(format!("a file has at most {} bytes", limits::FILE_BYTES_MAX)).at(path));
    }
    Ok(())
}
