//! Opening a store: the snapshot, what follows in the log, the files; then what is left over goes.

use super::files::{Files, FoundFile};
use super::format::{
    ChunkHeader, Decoded, HEADER_BYTES, KIND_CHUNK, KIND_REMOVED, SMALL_PAYLOAD_BYTES_MAX, decode_removed,
    file_bytes, payload_bytes,
};
use super::index::{Held, Index, Place, RECORD_OVERHEAD_BYTES};
use super::read::check_payload;
use super::shared::SnapshotState;
use super::snapshot::{self, SNAPSHOT_BYTES_MAX, SNAPSHOT_NAME, Snapshot};
use super::*;
use disk::{
    durable::read_file,
    log::{Damage, DamageKind, Log, LogConfig, Position, Recovery, Scan, Scanned},
};
use futures::{StreamExt, TryStreamExt, stream};
use std::{
    collections::{BTreeSet, HashMap},
    io,
    path::Path,
};

/// Files whose headers are read at a time.
const HEADERS_AT_ONCE: usize = 32;
/// Segments' share of a batch and of what one record may be.
const SEGMENT_BYTES_MIN: u32 = 256 << 10;
const ALL: RangeInclusive<GrantId> = GrantId(0)..=GrantId(u64::MAX);

/// What was found when a store was opened.
#[derive(Clone, Debug, Default)]
pub struct OpenReport {
    /// Chunks that are held, corrupt ones included.
    pub chunks: u64,
    /// Chunks that are listed as corrupt.
    pub corrupt: u64,
    /// The snapshot of the index was good, so only what follows it was read.
    pub used_snapshot: bool,
    /// Records that were read.
    pub records_read: u64,
    /// What is wrong in the segments that were read. Empty after mere crashes.
    pub damage: Vec<Damage>,
}

/// The index as it is put together.
#[derive(Default)]
struct Replay {
    index: Index,
    /// The newest change of each chunk in what was read.
    newest: HashMap<ChunkId, u64>,
    /// Living records that are not needed.
    undead: Vec<Position>,
    next_sequence: u64,
}

pub(super) async fn open(
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    config: DiskConfig,
) -> Result<(Arc<Shared>, OpenReport)> {
    let name = config.name.clone();
    let opened = open_io(disk, dir, config).await.map_err(|error| {
        let reason = match error.kind() {
            io::ErrorKind::Unsupported => Reason::NotSupported,
            _ => Error::from(io::Error::from(error.kind())).reason,
        };
        Error::new(reason, format!("the chunk store in {name} cannot be opened: {error}"))
    })?;
    let (_, report) = &opened;
    for damage in &report.damage {
        tracing::error!(store = %name, %damage, "the chunk store is damaged; everything else is served");
    }
    tracing::info!(
        store = %name,
        chunks = report.chunks,
        corrupt = report.corrupt,
        records_read = report.records_read,
        used_snapshot = report.used_snapshot,
        "opened the chunk store"
    );
    Ok(opened)
}

async fn open_io(
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    config: DiskConfig,
) -> io::Result<(Arc<Shared>, OpenReport)> {
    if config.segment_bytes < SEGMENT_BYTES_MIN {
        let why =
            format!("segments of {} bytes, at least {SEGMENT_BYTES_MIN} are needed", config.segment_bytes);
        return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    }
    disk.create_dir_all(&dir).await?;
    let snapshot = read_snapshot(&*disk, &dir.join(SNAPSHOT_NAME)).await?;
    let (mut replay, scan, settled) = read_log(&disk, &dir, &config, snapshot).await?;
    let (log, recovery) = scan.start().await?;
    let mut report = OpenReport {
        used_snapshot: settled.is_some(),
        records_read: recovery.records,
        damage: recovery.damage.clone(),
        ..OpenReport::default()
    };
    salvage(&log, &recovery, &mut replay).await?;
    distrust_missing_segments(&log, &mut replay.index);
    let files = Arc::new(Files::new(disk.clone(), dir.join("files")));
    add_files(&log, &files, &mut replay.index).await?;
    report.chunks = replay.index.chunks();
    report.corrupt = replay.index.range(None, ALL).filter(|held| held.corrupt).count() as u64;
    let space = disk.space(&dir).await?;
    let Replay { index, undead, next_sequence, .. } = replay;
    let state = SnapshotState { settled, ..SnapshotState::default() };
    let shared = Shared::new(disk, dir, config, log, files, index, state, next_sequence, space);
    let shared = Arc::new(shared);
    // Removals and replacements that were durable but not finished.
    let floor = shared.floor_at(settled.unwrap_or_default());
    shared.bury(undead, floor).await;
    Ok((shared, report))
}

/// The snapshot, if there is a good one.
async fn read_snapshot(disk: &dyn Disk, path: &Path) -> io::Result<Option<Snapshot>> {
    let bytes = match read_file(disk, path, SNAPSHOT_BYTES_MAX).await {
        Ok(Some(bytes)) => bytes,
        Ok(None) => return Ok(None),
        // It is only a shortcut: an unreadable one is as good as none.
        Err(error) => {
            tracing::warn!(%error, "the snapshot of the index cannot be read; reading the whole log");
            return Ok(None);
        }
    };
    match snapshot::decode(&bytes) {
        snapshot::Decoded::Snapshot(snapshot) => Ok(Some(snapshot)),
        snapshot::Decoded::Newer(version) => {
            let why = format!("{}: index version {version} is not known to this program", path.display());
            Err(io::Error::new(io::ErrorKind::Unsupported, why))
        }
        snapshot::Decoded::Bad => {
            tracing::warn!(path = %path.display(), "the snapshot of the index is damaged; reading the whole log");
            Ok(None)
        }
    }
}

/// Reads what the snapshot does not cover; the settled position is `None` if it was of no use.
async fn read_log(
    disk: &Arc<dyn Disk>,
    dir: &Path,
    config: &DiskConfig,
    snapshot: Option<Snapshot>,
) -> io::Result<(Replay, Scan, Option<Position>)> {
    let dir = dir.join("segments");
    let mut log_config = LogConfig::new(config.store_id);
    log_config.segment_bytes = config.segment_bytes;
    log_config.payload_bytes_max = SMALL_PAYLOAD_BYTES_MAX as u32;
    log_config.allow_gaps = true;
    log_config.accept_damage = true;
    if let Some(Snapshot { settled, next_sequence, chunks }) = snapshot {
        let mut replay = Replay { next_sequence, ..Replay::default() };
        for held in chunks {
            replay.index.insert(held);
        }
        log_config.start_at = settled;
        let scan =
            Log::scan(disk.clone(), &dir, log_config.clone(), &mut |record| replay.take(record)).await?;
        // A log that ends before it is not the one that the snapshot was made of, or lost its end.
        if scan.recovery().end >= settled {
            return Ok((replay, scan, Some(settled)));
        }
        tracing::warn!(dir = %dir.display(), "the log ends before its snapshot; reading the whole log");
        log_config.start_at = Position::default();
    }
    let mut replay = Replay { next_sequence: 1, ..Replay::default() };
    let scan = Log::scan(disk.clone(), &dir, log_config, &mut |record| replay.take(record)).await?;
    Ok((replay, scan, None))
}

impl Replay {
    fn take(&mut self, record: Scanned) -> io::Result<()> {
        self.next_sequence = self.next_sequence.max(record.tag.saturating_add(1));
        let Some(payload) = &record.payload else { return Ok(()) };
        match record.kind {
            KIND_CHUNK => self.take_chunk(record.position, record.tag, payload),
            KIND_REMOVED => {
                for chunk in decode_removed(payload) {
                    self.take_removal(chunk, record.tag);
                }
                Ok(())
            }
            kind => {
                let why =
                    format!("a record of kind {kind} at {} is not known to this program", record.position);
                Err(io::Error::new(io::ErrorKind::Unsupported, why))
            }
        }
    }

    /// Whether a change is older than another of the same chunk. Order in the log does not tell: compaction copies
    /// old records to its end.
    fn is_old(&mut self, chunk: ChunkId, sequence: u64) -> bool {
        let newest = self.newest.entry(chunk).or_insert(sequence);
        let old = *newest > sequence;
        *newest = sequence.max(*newest);
        old
    }

    fn take_chunk(&mut self, position: Position, sequence: u64, payload: &[u8]) -> io::Result<()> {
        let header = match ChunkHeader::decode(payload) {
            Decoded::Header(header) if payload.len() == payload_bytes(header.length) => header,
            Decoded::Newer(version) => {
                let why =
                    format!("chunk format version {version} at {position} is not known to this program");
                return Err(io::Error::new(io::ErrorKind::Unsupported, why));
            }
            _ => {
                tracing::error!(%position, "an intact record holds no chunk; it is left alone");
                return Ok(());
            }
        };
        if self.is_old(header.chunk, sequence) {
            self.undead.push(position);
            return Ok(());
        }
        let replaced = self.index.insert(held(&header, Place::Record(position), false));
        if let Some(Place::Record(other)) = replaced.map(|held| held.place)
            && other != position
        {
            self.undead.push(other);
        }
        Ok(())
    }

    fn take_removal(&mut self, chunk: ChunkId, sequence: u64) {
        if self.is_old(chunk, sequence) {
            return;
        }
        // Files say by being there that they were not removed.
        if let Some(Place::Record(position)) = self.index.get(chunk).map(|held| held.place) {
            self.index.remove(chunk);
            self.undead.push(position);
        }
    }
}

fn held(header: &ChunkHeader, place: Place, corrupt: bool) -> Held {
    Held {
        chunk: header.chunk,
        group: header.group,
        length: header.length,
        checksum: header.checksum,
        corrupt,
        computed_here: header.computed_here,
        verified: 0,
        place,
    }
}

/// Lists chunks in damaged parts of the log whose headers can still be read as corrupt, so that they are healed.
async fn salvage(log: &Log, recovery: &Recovery, replay: &mut Replay) -> io::Result<()> {
    for damage in recovery.damage.iter().filter(|damage| damage.what == DamageKind::Record) {
        let Ok((file, at)) = log.place(damage.position).await else { continue };
        let Ok(written_len) = log.written_len(damage.position).await else { continue };
        let damaged = damage.len.saturating_sub(RECORD_OVERHEAD_BYTES) as usize;
        // Where the record's own header is intact, it says where the only chunk is. The bytes behind that chunk's header
        // are a user's, who may well have stored some that look like another chunk's.
        let len = written_len.map_or(damaged, |_| HEADER_BYTES);
        let Ok(bytes) = file.read_at(at, len).await else { continue };
        let fits = |header: &ChunkHeader, from: usize| match written_len {
            Some(written) => payload_bytes(header.length) == written as usize,
            None => {
                header.length as usize <= SMALL_BYTES_MAX && from + payload_bytes(header.length) <= damaged
            }
        };
        let mut from = 0;
        while from + HEADER_BYTES <= bytes.len() {
            let header = match ChunkHeader::decode(&bytes[from..]) {
                Decoded::Header(header) if fits(&header, from) => header,
                _ => {
                    from += 8;
                    continue;
                }
            };
            if replay.index.get(header.chunk).is_none() && !replay.newest.contains_key(&header.chunk) {
                let offset = damage.position.offset + from as u32;
                let position = Position { segment: damage.position.segment, offset };
                replay.index.insert(held(&header, Place::Record(position), true));
            }
            from += payload_bytes(header.length).next_multiple_of(8);
        }
    }
    Ok(())
}

/// Chunks of the snapshot whose segment is not there any more are lost: listed as corrupt, so that they are healed.
fn distrust_missing_segments(log: &Log, index: &mut Index) {
    let there: BTreeSet<u32> = log.segments().iter().map(|segment| segment.number).collect();
    if index.live().keys().all(|segment| there.contains(segment)) {
        return;
    }
    let missing = |held: &Held| matches!(held.place, Place::Record(at) if !there.contains(&at.segment));
    let lost: Vec<Held> = index.range(None, ALL).filter(missing).collect();
    tracing::error!(chunks = lost.len(), "segments of the chunk store are missing");
    for held in lost {
        index.judge(held.chunk, held.place, true, None);
    }
}

/// Whether a record can be read and holds this chunk whole.
async fn is_whole(log: &Log, position: Position, chunk: ChunkId) -> bool {
    let Ok(record) = log.read_record(position).await else { return false };
    check_payload(&record.payload).is_some_and(|header| header.chunk == chunk)
}

/// Brings the index in line with the files that are there.
async fn add_files(log: &Log, files: &Arc<Files>, index: &mut Index) -> io::Result<()> {
    let mut unknown = Vec::new();
    for found in files.find().await? {
        match index.get(found.chunk) {
            Some(held) if held.place == Place::File(0) && file_bytes(held.length) == found.len => {
                index.insert(Held { place: Place::File(files.next_number()), ..held });
            }
            _ => unknown.push(found),
        }
    }
    let headers = stream::iter(unknown).map(|found: FoundFile| async move {
        match files.header(found.chunk).await {
            // The device cannot read it.
            Err(error) if disk::os_error(&error).is_some() && error.kind() != io::ErrorKind::NotFound => {
                tracing::error!(chunk = %found.chunk, %error, "the end of a chunk's file cannot be read");
                Ok((found.chunk, None))
            }
            header => Ok::<_, io::Error>((found.chunk, header?)),
        }
    });
    let headers: Vec<_> = headers.buffer_unordered(HEADERS_AT_ONCE).try_collect().await?;
    let mut needless = Vec::new();
    for (chunk, header) in headers {
        let known = index.get(chunk);
        if let Some(Place::Record(position)) = known.map(|held| held.place) {
            // Seldom: one has replaced the other, which was bad, or a damaged part of the log only seems to hold the
            // chunk. So the record is read before a file goes for its sake.
            if is_whole(log, position, chunk).await {
                needless.push(chunk);
                continue;
            }
            if header.is_none() {
                // Neither is whole. The record tells more about the chunk until it is healed.
                continue;
            }
        }
        let place = Place::File(files.next_number());
        let held = match header {
            Some(header) => held(&header, place, false),
            None => {
                tracing::error!(%chunk, "the end of a chunk's file is damaged");
                let nothing = Held {
                    chunk,
                    group: GroupId(0),
                    length: 0,
                    checksum: 0,
                    corrupt: true,
                    computed_here: false,
                    verified: 0,
                    place,
                };
                known.map_or(nothing, |held| Held { corrupt: true, place, ..held })
            }
        };
        index.insert(held);
    }
    files.remove(&needless).await?;
    // Of the snapshot, and removed since.
    let gone: Vec<ChunkId> =
        index.range(None, ALL).filter(|held| held.place == Place::File(0)).map(|held| held.chunk).collect();
    for chunk in gone {
        index.remove(chunk);
    }
    Ok(())
}
