//! The segment files of a log: their names, which of them are in use, and how a new one is made ready.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::watch;

use super::format::{SegmentId, encode_segment_header};
use super::{LogConfig, Position};
use crate::{Disk, DiskFile, Open};

/// Removed files that are kept for the next segments; more are deleted.
const SPARES_MAX: usize = 2;
/// Open handles of segments; above it the oldest are closed and opened again when needed.
const HANDLES_MAX: usize = 256;
/// Zeros are written in pieces of this size.
const ZERO_PIECE_BYTES: u64 = 1024 * 1024;

pub(super) fn segment_name(number: u32) -> String {
    format!("{number:08x}.seg")
}

/// What a file in a log's directory is.
pub(super) enum FileKind {
    Segment(u32),
    Spare,
    Unfinished,
    Foreign,
}

pub(super) fn file_kind(name: &str) -> FileKind {
    if name.starts_with("prepare-") && name.ends_with(".tmp") {
        return FileKind::Unfinished;
    }
    let Some(stem) = name.strip_suffix(".seg") else { return FileKind::Foreign };
    if stem.starts_with("spare-") {
        return FileKind::Spare;
    }
    match u32::from_str_radix(stem, 16) {
        Ok(number) if segment_name(number) == name => FileKind::Segment(number),
        _ => FileKind::Foreign,
    }
}

/// A segment that holds records, or may.
#[derive(Clone, Debug)]
pub(super) struct Segment {
    pub(super) life: u64,
    /// Where its durable records end.
    pub(super) end: u32,
    /// Whether bytes may lie behind the end, none of them ever durable: they are torn, not damaged.
    pub(super) loose: bool,
    /// Whether the file is whole: of full size and without holes, so that a next life needs no new blocks.
    pub(super) whole: bool,
    pub(super) file: Option<Arc<dyn DiskFile>>,
}

/// What the log's parts share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) disk: Arc<dyn Disk>,
    pub(super) dir: PathBuf,
    pub(super) config: LogConfig,
    pub(super) table: Mutex<Table>,
    /// Held while segments are removed or punched, so that two such calls cannot cross.
    pub(super) housekeeping: tokio::sync::Mutex<()>,
    pub(super) synced: watch::Sender<Position>,
    pub(super) failed: Mutex<Option<(io::ErrorKind, String)>>,
}

#[derive(Debug)]
pub(super) struct Table {
    pub(super) segments: BTreeMap<u32, Segment>,
    /// Files for reuse.
    pub(super) spares: Vec<PathBuf>,
    /// Higher than every life that any file of the log ever had.
    pub(super) life_next: u64,
    /// Segments with this number and above were never written, or not in this life.
    pub(super) number_next: u32,
    /// The segment that is being filled; it cannot be removed.
    pub(super) active: Option<u32>,
    /// Where the next record goes.
    pub(super) end: Position,
    pub(super) last_tag: Option<u64>,
}

impl Shared {
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub(super) fn id(&self, number: u32, life: u64) -> SegmentId {
        SegmentId { log_id: self.config.log_id, number, life }
    }

    pub(super) fn synced(&self) -> Position {
        *self.synced.borrow()
    }

    /// Refuses every later append. The first reason stays.
    pub(super) fn fail(&self, error: &io::Error) {
        let mut failed = self.failed.lock();
        if failed.is_none() {
            tracing::error!(log = %self.dir.display(), %error, "log failed");
            // Room alone will not mend it, so it must not look like a full disk.
            let kind = if is_full(error) { io::ErrorKind::Other } else { error.kind() };
            *failed = Some((kind, error.to_string()));
        }
    }

    pub(super) fn check(&self) -> io::Result<()> {
        match &*self.failed.lock() {
            None => Ok(()),
            Some((kind, why)) => {
                Err(io::Error::new(*kind, format!("log {} failed: {why}", self.dir.display())))
            }
        }
    }

    /// The id, durable end and file of a segment in use.
    pub(super) async fn segment(&self, number: u32) -> io::Result<(SegmentId, u32, Arc<dyn DiskFile>)> {
        let missing = || {
            let why = format!("segment {number} of log {} is not there", self.dir.display());
            io::Error::new(io::ErrorKind::NotFound, why)
        };
        let (id, end, file) = {
            let table = self.table.lock();
            let segment = table.segments.get(&number).ok_or_else(missing)?;
            (self.id(number, segment.life), segment.end, segment.file.clone())
        };
        if let Some(file) = file {
            return Ok((id, end, file));
        }
        let file = self.disk.open(&self.path(&segment_name(number)), Open::ReadWrite).await?;
        let mut table = self.table.lock();
        let active = table.active;
        if table.segments.values().filter(|segment| segment.file.is_some()).count() >= HANDLES_MAX {
            let oldest = table
                .segments
                .iter_mut()
                .find(|(at, segment)| Some(**at) != active && segment.file.is_some());
            if let Some((_, segment)) = oldest {
                segment.file = None;
            }
        }
        // It may have been removed meanwhile; the name could already lead to another life.
        let segment =
            table.segments.get_mut(&number).filter(|segment| segment.life == id.life).ok_or_else(missing)?;
        segment.file = Some(file.clone());
        Ok((id, end, file))
    }

    /// Prepares the removal of a segment: it says where the one before ends. Torn bytes behind that end would be taken
    /// for damage without it, so they go first.
    pub(super) async fn cut_before(&self, number: u32) -> io::Result<()> {
        let before = {
            let table = self.table.lock();
            let before = table.segments.range(..number).next_back();
            before.filter(|(_, segment)| segment.loose).map(|(before, _)| *before)
        };
        let Some(before) = before else { return Ok(()) };
        let (_, end, file) = self.segment(before).await?;
        if file.len().await? > u64::from(end) {
            if let Some(segment) = self.table.lock().segments.get_mut(&before) {
                segment.whole = false;
            }
            file.set_len(u64::from(end)).await?;
        }
        // Also one that was cut before: whoever did it may have died before it was durable.
        file.sync().await?;
        if let Some(segment) = self.table.lock().segments.get_mut(&before) {
            segment.loose = false;
        }
        Ok(())
    }

    /// Makes segment `number` ready to be filled: all its blocks are allocated and written, its header and
    /// its name are durable. From here on nothing but an error of the device can stop a write to it.
    pub(super) async fn prepare(&self, number: u32) -> io::Result<Prepared> {
        let (life, spare) = {
            let mut table = self.table.lock();
            table.life_next += 1;
            (table.life_next - 1, table.spares.pop())
        };
        let id = self.id(number, life);
        let (path, file) = match spare {
            Some(path) => {
                let file = self.disk.open(&path, Open::ReadWrite).await?;
                (path, file)
            }
            None => {
                let path = self.path(&format!("prepare-{number:08x}.tmp"));
                let file = match self.fill(&path).await {
                    Err(error) if is_full(&error) => {
                        // What was allocated so far helps nobody.
                        self.disk.remove_file(&path).await?;
                        return Err(error);
                    }
                    filled => filled?,
                };
                (path, file)
            }
        };
        let header = encode_segment_header(id, self.config.segment_bytes).freeze();
        file.write_at(0, vec![header]).await?;
        // The name comes last: a file with a segment's name has a whole header, whenever the power fails.
        file.sync().await?;
        self.disk.rename(&path, &self.path(&segment_name(number))).await?;
        self.disk.sync_dir(&self.dir).await?;
        Ok(Prepared { id, file })
    }

    async fn fill(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        let file = self.disk.open(path, Open::Create).await?;
        file.set_len(0).await?;
        let len = u64::from(self.config.segment_bytes);
        // Allocating first finds out at once whether there is room; writing the zeros then makes later syncs
        // cheap, since no block changes from unwritten to written under them.
        file.allocate(0, len).await?;
        let zeros = Bytes::from(vec![0; len.min(ZERO_PIECE_BYTES) as usize]);
        let mut at = 0;
        while at < len {
            let piece = (len - at).min(ZERO_PIECE_BYTES);
            file.write_at(at, vec![zeros.slice(..piece as usize)]).await?;
            // Piece by piece: one large sync would hold the syncs of appends up on the same device.
            file.sync().await?;
            at += piece;
        }
        Ok(file)
    }

    /// Takes a segment's file out of use: kept for a next life if it may be, deleted if not. Durable when
    /// this returns. After an error it may be tried again, however far it came.
    pub(super) async fn retire(&self, number: u32, whole: bool) -> io::Result<()> {
        let path = self.path(&segment_name(number));
        let spare = self.path(&format!("spare-{number:08x}.seg"));
        let keep = whole && self.config.recycle && self.table.lock().spares.len() < SPARES_MAX;
        let moved = match keep {
            true => self.disk.rename(&path, &spare).await,
            false => self.disk.remove_file(&path).await,
        };
        let tried_before = match moved {
            // Its name is gone already, only that may not be durable yet.
            Err(error) if error.kind() == io::ErrorKind::NotFound => true,
            moved => {
                moved?;
                false
            }
        };
        // Before anything overwrites it: a crash may bring the old name back, and then with the old content.
        self.disk.sync_dir(&self.dir).await?;
        // One of that name that waits already was a segment of this number before the log was opened.
        let is_known = self.table.lock().spares.contains(&spare);
        if is_known || !(keep || tried_before) {
            return Ok(());
        }
        if tried_before {
            // The try before has renamed it, if there was a place for it then.
            let found = match keep {
                true => self.disk.open(&spare, Open::Read).await.map(drop),
                false => self.disk.remove_file(&spare).await,
            };
            match found {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                found => found?,
            }
        }
        if keep {
            self.table.lock().spares.push(spare);
        }
        Ok(())
    }
}

/// A segment that is ready to be filled.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) id: SegmentId,
    pub(super) file: Arc<dyn DiskFile>,
}

/// Whether an error only says that there is no room now.
pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}
