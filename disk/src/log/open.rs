//! Opening a log: a scan that only reads, then a start that cleans the tail and lets appends begin.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;

use super::commit::Committer;
use super::format::*;
use super::scan::{End, Found, SegmentScan, Visitor, Window};
use super::segments::{FileKind, Segment, Shared, Table, file_kind, is_full, segment_name};
use super::{Damage, DamageKind, Log, LogConfig, Position, Recovery};
use crate::{Disk, DiskFile, Open};

/// Read-ahead when only the first header of a segment is wanted.
const PEEK_BYTES: usize = 4096;
/// Bytes of one read and write of what is written again.
const WRITE_AGAIN_BYTES: u64 = 1024 * 1024;
/// What a file loses by being cut below its full size is its next life, so a nearly full one is left whole.
const CUT_SHARE: u32 = 8;

/// A log that was read and not yet changed. [`Scan::start`] makes it a [`Log`]; dropping it leaves all files
/// as they were.
#[derive(Debug)]
pub struct Scan {
    shared: Shared,
    recovery: Recovery,
    /// Segments behind the last one with any record.
    unused: Vec<u32>,
    unfinished: Vec<String>,
    /// Segments in which the visitor was shown dead records.
    with_dead: Vec<u32>,
    /// The last segment with any record, and the offset where its records end.
    tail: Option<(u32, u32)>,
}

/// A segment file as found.
struct Candidate {
    number: u32,
    len: u32,
    life: Option<u64>,
    /// The synced position of its first intact record.
    first: Option<Position>,
}

impl Scan {
    pub(super) async fn run(
        disk: Arc<dyn Disk>,
        dir: &Path,
        config: LogConfig,
        visitor: Visitor<'_>,
    ) -> io::Result<Self> {
        config.check()?;
        let entries = match disk.list(dir).await {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            listed => listed?,
        };
        let (synced, _) = watch::channel(Position::default());
        let table = Table {
            segments: BTreeMap::new(),
            spares: Vec::new(),
            life_next: 1,
            number_next: 1,
            active: None,
            end: Position::default(),
            last_tag: None,
        };
        let shared = Shared {
            disk,
            dir: dir.to_owned(),
            config,
            table: Mutex::new(table),
            housekeeping: tokio::sync::Mutex::default(),
            synced,
            failed: Mutex::default(),
        };
        let recovery = Recovery::default();
        let mut scan = Self {
            shared,
            recovery,
            unused: Vec::new(),
            unfinished: Vec::new(),
            with_dead: Vec::new(),
            tail: None,
        };
        let mut candidates = Vec::new();
        for entry in entries.into_iter().filter(|entry| !entry.is_dir) {
            match file_kind(&entry.name) {
                FileKind::Segment(number) => candidates.push(scan.look(number, &entry.name).await?),
                FileKind::Spare => scan.adopt_spare(entry.name).await?,
                FileKind::Unfinished => scan.unfinished.push(entry.name),
                FileKind::Foreign => {}
            }
        }
        scan.read(candidates, visitor).await?;
        Ok(scan)
    }

    /// Reads a segment's header and its first record's.
    async fn look(&mut self, number: u32, name: &str) -> io::Result<Candidate> {
        let path = self.shared.path(name);
        let file = self.shared.disk.open(&path, Open::Read).await?;
        let mut window = Window::new(&*file, PEEK_BYTES).await?;
        let mut candidate = Candidate { number, len: window.len(), life: None, first: None };
        let (what, len) = match self.header(&path, &mut window).await? {
            SegmentHeader::Known { id, whole } if id.number == number => {
                candidate.life = Some(id.life);
                let limit = window.len();
                // Usually the first bytes are a record; if not, a whole file may have to be searched.
                let mut first = window.header(id, SEGMENT_HEADER_BYTES, limit).await?;
                let mut readable = true;
                if first.is_none() {
                    let mut whole = Window::whole(&*file).await?;
                    first = whole.search(id, SEGMENT_HEADER_BYTES, limit).await?;
                    readable = !whole.has_unreadable();
                }
                if first.is_none() && !readable {
                    // Not the same as empty: it must neither be used again nor pass unseen.
                    candidate.life = None;
                    let position = Position { segment: number, offset: 0 };
                    let len = u64::from(candidate.len);
                    self.recovery.damage.push(Damage { position, len, what: DamageKind::Unreadable });
                }
                candidate.first = first.map(|header| header.synced);
                if whole {
                    return Ok(candidate);
                }
                (DamageKind::HeaderCopy, SEGMENT_HEADER_BYTES)
            }
            _ => (DamageKind::SegmentHeader, candidate.len),
        };
        let position = Position { segment: number, offset: 0 };
        self.recovery.damage.push(Damage { position, len: u64::from(len), what });
        Ok(candidate)
    }

    /// Reads a file's header, refusing what this code must not touch.
    async fn header(&mut self, path: &Path, window: &mut Window<'_>) -> io::Result<SegmentHeader> {
        let bytes = window.get(0, SEGMENT_HEADER_BYTES).await?;
        let header = decode_segment_header(&bytes);
        let refuse = |kind, why: String| Err(io::Error::new(kind, format!("{}: {why}", path.display())));
        match &header {
            SegmentHeader::Newer(version) => {
                let why = format!("log format version {version} is not known, only {FORMAT_VERSION}");
                return refuse(io::ErrorKind::Unsupported, why);
            }
            SegmentHeader::Known { id, .. } if id.log_id != self.shared.config.log_id => {
                let wanted = self.shared.config.log_id;
                let why = format!("belongs to log {:032x}, not to {wanted:032x}", id.log_id);
                return refuse(io::ErrorKind::InvalidData, why);
            }
            SegmentHeader::Known { id, .. } => {
                let table = self.shared.table.get_mut();
                table.life_next = table.life_next.max(id.life.saturating_add(1));
            }
            SegmentHeader::Bad => {}
        }
        Ok(header)
    }

    async fn adopt_spare(&mut self, name: String) -> io::Result<()> {
        let path = self.shared.path(&name);
        let file = self.shared.disk.open(&path, Open::Read).await?;
        let mut window = Window::new(&*file, PEEK_BYTES).await?;
        let known = matches!(self.header(&path, &mut window).await?, SegmentHeader::Known { .. });
        // Without a header its last life is unknown, and a new life could meet its own old records.
        if known && window.len() == self.shared.config.segment_bytes {
            self.shared.table.get_mut().spares.push(path);
        } else {
            self.unfinished.push(name);
        }
        Ok(())
    }

    /// Judges each segment by what the later ones say about it, and delivers its records.
    async fn read(&mut self, candidates: Vec<Candidate>, visitor: Visitor<'_>) -> io::Result<()> {
        let last = candidates.iter().rposition(|candidate| candidate.first.is_some());
        let mut ends = vec![End::Tail; candidates.len()];
        let mut later: Option<Position> = None;
        for (end, candidate) in ends.iter_mut().zip(&candidates).rev() {
            *end = match later {
                Some(synced) if synced.segment == candidate.number => End::Exact(synced.offset),
                Some(synced) if synced.segment > candidate.number => End::Proven,
                _ => End::Tail,
            };
            later = candidate.first.or(later);
        }
        let start_at = self.shared.config.start_at;
        let mut before: Option<u32> = None;
        for (index, candidate) in candidates.iter().enumerate() {
            let number = candidate.number;
            if let Some(before) = before
                && number - before > 1
                && !self.shared.config.allow_gaps
            {
                let position = Position { segment: before + 1, offset: 0 };
                let len = u64::from(number - before - 1) * u64::from(self.shared.config.segment_bytes);
                self.recovery.damage.push(Damage { position, len, what: DamageKind::MissingSegment });
            }
            before = Some(number);
            let Some(life) = candidate.life else {
                // Its bytes may still be worth something to a person: the file and its number stay taken.
                self.shared.table.get_mut().number_next = number.saturating_add(1);
                continue;
            };
            if last.is_none_or(|last| index > last) {
                self.unused.push(number);
                continue;
            }
            let found = if number < start_at.segment {
                let end = if let End::Exact(end) = ends[index] { end } else { candidate.len };
                Found { end: end.min(candidate.len), dead: true, ..Found::default() }
            } else {
                let path = self.shared.path(&segment_name(number));
                let file = self.shared.disk.open(&path, Open::Read).await?;
                let mut from_start = |record: super::Scanned| {
                    if record.position < start_at { Ok(()) } else { visitor(record) }
                };
                let scan = SegmentScan {
                    id: self.shared.id(number, life),
                    end: ends[index],
                    headers_only: self.shared.config.headers_only,
                    visitor: &mut from_start,
                    damage: &mut self.recovery.damage,
                };
                let found = scan.run(&mut Window::whole(&*file).await?).await?;
                if found.dead {
                    self.with_dead.push(number);
                }
                found
            };
            // The end of the last one is proven by the next record of the log.
            let loose = last == Some(index) || matches!(ends[index], End::Exact(_));
            self.note(candidate, life, &found, loose);
            if last == Some(index) {
                self.tail = Some((number, found.end));
            }
        }
        // A number is free again once its file is: the unused ones are retired before a new one is made.
        let table = self.shared.table.get_mut();
        let past = table.segments.keys().next_back().map_or(1, |number| number.saturating_add(1));
        table.number_next = table.number_next.max(past);
        let (segment, offset) = self.tail.unwrap_or_default();
        table.end = Position { segment, offset };
        table.last_tag = self.recovery.last_tag;
        self.shared.synced.send_replace(table.end);
        self.recovery.end = table.end;
        self.recovery.damage.sort_by_key(|damage| damage.position);
        Ok(())
    }

    fn note(&mut self, candidate: &Candidate, life: u64, found: &Found, loose: bool) {
        self.recovery.records += found.records;
        self.recovery.dropped_bytes += found.dropped_bytes;
        self.recovery.last_tag = found.last_tag.or(self.recovery.last_tag);
        let whole = candidate.len == self.shared.config.segment_bytes && !found.dead && !found.damaged;
        let segment = Segment { life, end: found.end, loose, whole, file: None };
        self.shared.table.get_mut().segments.insert(candidate.number, segment);
    }

    /// What was found.
    pub fn recovery(&self) -> &Recovery {
        &self.recovery
    }

    /// Makes what was found durable, cleans up behind it and lets appends begin. With damage, this settles
    /// that the caller accepts it: what was damaged stays reported at every open until its segment is removed.
    ///
    /// A full disk is no error here: the log can be read and trimmed, and appends fail with
    /// [`io::ErrorKind::StorageFull`] until there is room.
    pub async fn start(self) -> io::Result<(Log, Recovery)> {
        let Self { shared, recovery, unused, unfinished, with_dead, tail } = self;
        shared.disk.create_dir_all(&shared.dir).await?;
        // What a process wrote before it died is in the page cache, and was just shown to the caller: from now
        // on it must not be lost. That is the last records, and state words of dead ones.
        if let Some((number, end)) = tail {
            let (_, _, file) = shared.segment(number).await?;
            match write_again(&*file, end).await {
                Err(error) if is_full(&error) => {
                    tracing::warn!(log = %shared.dir.display(), %error, "no room to write the last records again");
                }
                written => written?,
            }
        }
        let tail_number = tail.map(|(number, _)| number).filter(|number| !with_dead.contains(number));
        for number in with_dead.into_iter().chain(tail_number) {
            let (_, _, file) = shared.segment(number).await?;
            file.sync().await?;
        }
        shared.disk.sync_dir(&shared.dir).await?;
        for name in unfinished {
            shared.disk.remove_file(&shared.path(&name)).await?;
        }
        for number in unused {
            let file = shared.disk.open(&shared.path(&segment_name(number)), Open::Read).await?;
            let whole = file.len().await? == u64::from(shared.config.segment_bytes);
            shared.retire(number, whole).await?;
        }
        let shared = Arc::new(shared);
        let mut committer = Committer::new(shared.clone());
        // The first record of a fresh segment says where the recovered one ends: old bytes behind it can never
        // be taken for records again, nor rot before it for a torn end.
        match committer.begin().await {
            Ok(()) => cut(&shared, tail).await?,
            Err(error) if is_full(&error) => {
                tracing::warn!(log = %shared.dir.display(), %error, "no room for a new segment");
            }
            Err(error) => return Err(error),
        }
        Ok((Log::spawn(shared, committer), recovery))
    }
}

/// Writes what can be read once more, so that the next sync saves it or fails. After a sync that failed the kernel takes
/// the pages for clean: their bytes are read as if they were on the disk, by the next process too, and no later sync
/// writes them.
async fn write_again(file: &dyn DiskFile, end: u32) -> io::Result<()> {
    let end = u64::from(end);
    let mut offset = 0;
    while offset < end {
        let len = (end - offset).min(WRITE_AGAIN_BYTES);
        let bytes = file.read_at(offset, len as usize).await?;
        if bytes.is_empty() {
            break;
        }
        let read = bytes.len() as u64;
        file.write_at(offset, vec![bytes]).await?;
        offset += read;
    }
    Ok(())
}

/// Gives the room behind the recovered end back, so that many restarts do not fill the disk with the unused
/// ends of segments.
async fn cut(shared: &Shared, tail: Option<(u32, u32)>) -> io::Result<()> {
    let Some((number, end)) = tail else { return Ok(()) };
    let (_, _, file) = shared.segment(number).await?;
    let len = u32::try_from(file.len().await?).unwrap_or(u32::MAX);
    if len.saturating_sub(end) < len / CUT_SHARE {
        return Ok(());
    }
    file.set_len(u64::from(end)).await?;
    if let Some(segment) = shared.table.lock().segments.get_mut(&number) {
        segment.whole = false;
    }
    Ok(())
}
