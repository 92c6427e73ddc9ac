//! What the parts of an open store share: the index, who is changing what, and how far the log is settled.

use super::files::Files;
use super::index::{Held, Index, Place};
use super::*;
use disk::{Space, log::Log, log::Position};
use parking_lot::Mutex;
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Duration,
};
use tokio::{sync::Notify, time::Instant};

/// Unit of [`Held::verified`].
const VERIFIED_UNIT: Duration = Duration::from_millis(100);

/// An open store.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) disk: Arc<dyn Disk>,
    pub(super) dir: PathBuf,
    pub(super) config: DiskConfig,
    pub(super) log: Log,
    pub(super) files: Arc<Files>,
    pub(super) state: Mutex<State>,
    /// Somebody gave a claim back.
    released: Notify,
    /// What the snapshot on disk covers; held while snapshots are written and segments removed.
    pub(super) snapshot: tokio::sync::Mutex<SnapshotState>,
    next_sequence: AtomicU64,
    /// As last asked for.
    pub(super) space: Mutex<Space>,
    closed: AtomicBool,
    opened: Instant,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) index: Index,
    /// Chunks that are being sealed or removed: one change of a chunk at a time.
    busy: HashSet<ChunkId>,
    /// The newest writer of each chunk that is arriving.
    writers: HashMap<ChunkId, u64>,
    next_writer: u64,
    /// Where in the log each unfinished change began at the earliest.
    floors: BTreeMap<u64, Position>,
    next_floor: u64,
    /// Records that are no longer needed, but could not be marked dead yet.
    pub(super) undead: Vec<(Vec<Position>, Floor)>,
    /// Chunks whose write failed in a way that the next start may find them.
    pub(super) uncertain: HashSet<ChunkId>,
}

/// What lies on the disk as snapshot.
#[derive(Clone, Debug, Default)]
pub(super) struct SnapshotState {
    /// Its settled position; `None` if there is no snapshot, so that the next start reads all.
    pub(super) settled: Option<Position>,
    /// Segments that could not be emptied because of damage, and what lived in them then.
    pub(super) stuck: BTreeMap<u32, u64>,
}

/// Keeps the settled position from passing a change that is not finished.
#[derive(Debug)]
pub(super) struct Floor {
    shared: std::sync::Weak<Shared>,
    number: u64,
}

impl Drop for Floor {
    fn drop(&mut self) {
        if let Some(shared) = self.shared.upgrade() {
            shared.state.lock().floors.remove(&self.number);
        }
    }
}

/// The right to change one chunk.
#[derive(Debug)]
pub(super) struct Claim {
    shared: Arc<Shared>,
    chunk: ChunkId,
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.shared.state.lock().busy.remove(&self.chunk);
        self.shared.released.notify_waiters();
    }
}

/// The newest writer of a chunk, unless another came.
#[derive(Debug)]
pub(super) struct Ticket {
    shared: Arc<Shared>,
    chunk: ChunkId,
    number: u64,
}

impl Ticket {
    pub(super) fn is_current(&self, state: &State) -> bool {
        state.writers.get(&self.chunk) == Some(&self.number)
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut state = self.shared.state.lock();
        if self.is_current(&state) {
            state.writers.remove(&self.chunk);
        }
    }
}

impl Shared {
    #[allow(clippy::too_many_arguments)] // one caller, which has just gathered them
    pub(super) fn new(
        disk: Arc<dyn Disk>,
        dir: PathBuf,
        config: DiskConfig,
        log: Log,
        files: Arc<Files>,
        index: Index,
        snapshot: SnapshotState,
        next_sequence: u64,
        space: Space,
    ) -> Self {
        Self {
            disk,
            dir,
            config,
            log,
            files,
            state: Mutex::new(State { index, ..State::default() }),
            released: Notify::new(),
            snapshot: tokio::sync::Mutex::new(snapshot),
            next_sequence: AtomicU64::new(next_sequence),
            space: Mutex::new(space),
            closed: AtomicBool::new(false),
            opened: Instant::now(),
        }
    }

    pub(super) fn check_open(&self) -> Result<()> {
        if self.closed.load(Ordering::Acquire) { Err(self.closed_error()) } else { Ok(()) }
    }

    /// Refuses changes from now on; false if that was so already.
    pub(super) fn set_closed(&self) -> bool {
        !self.closed.swap(true, Ordering::AcqRel)
    }

    fn closed_error(&self) -> Error {
        Error::unavailable(format!("the chunk store in {} is closed", self.config.name))
    }

    /// The number of the next change. Only asked for while the chunk is claimed, so that numbers order its changes.
    pub(super) fn sequence(&self) -> u64 {
        self.next_sequence.fetch_add(1, Ordering::Relaxed)
    }

    pub(super) fn sequence_now(&self) -> u64 {
        self.next_sequence.load(Ordering::Relaxed)
    }

    /// Waits for the right to change a chunk. Who claims several does so in order of ids.
    pub(super) async fn claim(self: &Arc<Self>, chunk: ChunkId) -> Claim {
        loop {
            let released = self.released.notified();
            tokio::pin!(released);
            // Before looking, so that no release is missed.
            released.as_mut().enable();
            if self.state.lock().busy.insert(chunk) {
                return Claim { shared: self.clone(), chunk };
            }
            released.await;
        }
    }

    pub(super) fn ticket(self: &Arc<Self>, chunk: ChunkId) -> Ticket {
        let mut state = self.state.lock();
        state.next_writer += 1;
        let number = state.next_writer;
        state.writers.insert(chunk, number);
        Ticket { shared: self.clone(), chunk, number }
    }

    /// Holds the settled position back; taken before the first write of a change.
    pub(super) fn floor(self: &Arc<Self>) -> Floor {
        let mut state = self.state.lock();
        // Under the lock, so that the settled position cannot pass between the look and the note.
        let at = self.log.end();
        self.note_floor(&mut state, at)
    }

    /// The same for a change that began before this start.
    pub(super) fn floor_at(self: &Arc<Self>, at: Position) -> Floor {
        self.note_floor(&mut self.state.lock(), at)
    }

    fn note_floor(self: &Arc<Self>, state: &mut State, at: Position) -> Floor {
        state.next_floor += 1;
        let number = state.next_floor;
        state.floors.insert(number, at);
        Floor { shared: Arc::downgrade(self), number }
    }

    /// Everything before this position is in the index, and finished.
    pub(super) fn settled(&self) -> Position {
        let state = self.state.lock();
        let synced = self.log.synced();
        state.floors.values().copied().min().map_or(synced, |floor| floor.min(synced))
    }

    /// A chunk as the trait tells it.
    pub(super) fn info(&self, held: &Held) -> ChunkInfo {
        let verified = held.verified.checked_sub(1).map(|units| self.opened + VERIFIED_UNIT * units);
        ChunkInfo {
            chunk: held.chunk,
            group: held.group,
            length: u64::from(held.length),
            checksum: held.checksum,
            corrupt: held.corrupt,
            verified_at: verified,
            computed_here: held.computed_here,
        }
    }

    /// Now, as [`Held::verified`].
    pub(super) fn verified_now(&self) -> u32 {
        let units = self.opened.elapsed().as_millis() / VERIFIED_UNIT.as_millis();
        u32::try_from(units).unwrap_or(u32::MAX).saturating_add(1)
    }

    /// An error of the disk, for a caller.
    pub(super) fn disk_error(&self, error: io::Error) -> Error {
        let name = &self.config.name;
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => self.no_space(&error.to_string()),
            _ if self.closed.load(Ordering::Acquire) => self.closed_error(),
            io::ErrorKind::Unsupported => Error::new(Reason::NotSupported, format!("{name}: {error}")),
            _ => Error::new(Reason::Io, format!("{name}: {error}")),
        }
    }

    pub(super) fn no_space(&self, why: &str) -> Error {
        let name = &self.config.name;
        let why = format!("no room in {name} ({why}); free space on it or add a file server");
        Error::new(Reason::NoSpace, why)
    }

    /// Asks the disk how much room there is, and keeps the answer for [`Shared::usage`].
    pub(super) async fn refresh_space(&self) -> io::Result<Space> {
        let space = self.disk.space(&self.dir).await?;
        *self.space.lock() = space;
        Ok(space)
    }

    pub(super) fn usage(&self) -> StoreUsage {
        let space = *self.space.lock();
        let segments = self.log.segments();
        let state = self.state.lock();
        let dead = |segment: &disk::log::SegmentInfo| {
            let live = state.index.live_bytes(segment.number);
            u64::from(segment.bytes_used).saturating_sub(live)
        };
        StoreUsage {
            chunks: state.index.chunks(),
            used_bytes: state.index.bytes(),
            reclaimable_bytes: segments.iter().filter(|segment| !segment.is_active).map(dead).sum(),
            total_bytes: space.total_bytes,
            free_bytes: space.free_bytes.saturating_sub(self.config.reserve_bytes),
        }
    }

    /// The held copy, if it makes a write of this content unnecessary; an error if it forbids it.
    pub(super) fn settled_copy(
        &self,
        state: &State,
        chunk: ChunkId,
        length: u64,
        checksum: u64,
    ) -> Result<Option<ChunkInfo>> {
        let Some(held) = state.index.get(chunk) else { return Ok(None) };
        if held.length == 0 {
            // Only its id is known, so any content is as good as it gets.
            return Ok(None);
        }
        let info = existing(self.info(&held), length, checksum)?;
        Ok(Some(info).filter(|info| !info.corrupt))
    }

    /// Puts a sealed chunk into the index; returns the copy that it replaces.
    pub(super) fn publish(&self, header: &format::ChunkHeader, place: Place) -> (ChunkInfo, Option<Held>) {
        let held = Held {
            chunk: header.chunk,
            group: header.group,
            length: header.length,
            checksum: header.checksum,
            corrupt: false,
            computed_here: header.computed_here,
            verified: self.verified_now(),
            place,
        };
        let replaced = self.state.lock().index.insert(held);
        (self.info(&held), replaced)
    }
}
