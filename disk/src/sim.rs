//! A disk in memory that knows what was synced, and can be crashed, filled and damaged.
//!
//! It is stricter than most real disks, so that what survives here survives there:
//!
//! * content that was not synced is lost or kept sector by sector (512 bytes), whatever the order of the
//!   writes;
//! * a name that was not made durable with `sync_dir` is lost or kept, each change on its own and whatever
//!   their order, though a rename is never half done;
//! * after a failed sync, what was dirty stays readable but no later sync saves it.
//!
//! It has no threads and takes all its chance from its seed: the same calls in the same order give the same
//! disk. Only `sync` yields, so that other tasks of a single-threaded runtime can run in between.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::{DirEntry, Disk, DiskFile, Open, Space, at_path, check_name, check_path, poisoned};

mod content;
mod tree;

use content::PAGE_BYTES;
use tree::{NodeId, Tree};

/// What a crash leaves of that which was not synced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CrashKeep {
    /// Nothing: power loss with a device that had started nothing.
    Nothing,
    /// A random part: power loss with the device in the middle of its work.
    Random,
    /// Everything, as when only the process died. It stays unsynced: a later crash may still lose it.
    Everything,
}

/// What a disk was asked to do since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Calls of [`DiskFile::sync`] that succeeded.
    pub syncs: u64,
    /// Calls of [`Disk::sync_dir`] that succeeded.
    pub dir_syncs: u64,
    /// Calls of [`DiskFile::read_at`] that succeeded.
    pub reads: u64,
    /// Bytes that they returned.
    pub bytes_read: u64,
    /// Calls of [`DiskFile::write_at`] that succeeded.
    pub writes: u64,
    /// Bytes that they wrote.
    pub bytes_written: u64,
}

/// A simulated disk. Clones are the same disk; see [`SimDisk::clone_disk`] for a copy.
#[derive(Clone)]
pub struct SimDisk {
    state: Arc<Mutex<State>>,
}

#[derive(Clone)]
struct State {
    tree: Tree,
    rng: SmallRng,
    capacity_pages: u64,
    used_pages: u64,
    /// Counts crashes: a handle from before one is dead.
    epoch: u64,
    off: bool,
    changes_left: Option<u64>,
    fail_syncs: u32,
    fail_reads: u32,
    fail_writes: u32,
    sync_latency: Duration,
    write_back_one_in: u32,
    counters: Counters,
}

impl SimDisk {
    /// An empty disk of about `capacity_bytes` (counted in pages of 4 KiB), all of whose chance comes from
    /// `seed`.
    pub fn new(seed: u64, capacity_bytes: u64) -> Self {
        let state = State {
            tree: Tree::new(),
            rng: SmallRng::seed_from_u64(seed),
            capacity_pages: capacity_bytes / PAGE_BYTES,
            used_pages: 0,
            epoch: 0,
            off: false,
            changes_left: None,
            fail_syncs: 0,
            fail_reads: 0,
            fail_writes: 0,
            sync_latency: Duration::ZERO,
            write_back_one_in: 0,
            counters: Counters::default(),
        };
        Self { state: Arc::new(Mutex::new(state)) }
    }

    /// Stops the machine and starts it again: all handles are dead, what was not synced is gone as `keep`
    /// says, pending faults are cleared.
    pub fn crash(&self, keep: CrashKeep) {
        let mut state = self.state.lock();
        let State { tree, rng, .. } = &mut *state;
        tree.crash(keep, rng);
        state.used_pages = state.tree.pages_used();
        state.epoch += 1;
        state.off = false;
        state.changes_left = None;
        (state.fail_syncs, state.fail_reads, state.fail_writes) = (0, 0, 0);
    }

    /// Lets `changes` more writes, syncs and changes of names succeed; then the disk is off, and all calls
    /// fail until [`SimDisk::crash`]. A write that meets the end is done in part.
    pub fn power_off_after(&self, changes: u64) {
        self.state.lock().changes_left = Some(changes);
    }

    /// Whether [`SimDisk::power_off_after`] has switched the disk off.
    pub fn is_off(&self) -> bool {
        self.state.lock().off
    }

    /// An independent copy with the same content, unsynced changes, faults and random state.
    pub fn clone_disk(&self) -> Self {
        let mut state = self.state.lock().clone();
        state.tree.forget_handles();
        state.used_pages = state.tree.pages_used();
        Self { state: Arc::new(Mutex::new(state)) }
    }

    /// Fails the next `count` syncs, of files and of directories, with `EIO`.
    pub fn fail_syncs(&self, count: u32) {
        self.state.lock().fail_syncs = count;
    }

    /// Fails the next `count` reads with `EIO`.
    pub fn fail_reads(&self, count: u32) {
        self.state.lock().fail_reads = count;
    }

    /// Fails the next `count` writes with `EIO`; a random first part of each is done.
    pub fn fail_writes(&self, count: u32) {
        self.state.lock().fail_writes = count;
    }

    /// Makes every sync take this long in tokio's time, which may be virtual.
    pub fn set_sync_latency(&self, latency: Duration) {
        self.state.lock().sync_latency = latency;
    }

    /// Writes back some dirty sectors at one in `writes` writes, unasked, as a kernel does; 0 for never (the
    /// default). Then [`CrashKeep::Nothing`] may leave more than what was synced.
    pub fn set_write_back_one_in(&self, writes: u32) {
        self.state.lock().write_back_one_in = writes;
    }

    /// Changes the size of the disk; a smaller one than is used leaves no room.
    pub fn set_capacity(&self, capacity_bytes: u64) {
        self.state.lock().capacity_pages = capacity_bytes / PAGE_BYTES;
    }

    /// Flips one bit (0 to 7) of a file, as rot does: seen at once, and after a crash.
    pub fn flip_bit(&self, path: &Path, offset: u64, bit: u8) -> io::Result<()> {
        let mut state = self.state.lock();
        let id = state.tree.find(path).map_err(|error| at_path(error, "flip a bit of", path))?;
        if state.tree.file(id)?.flip(offset, bit) { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    /// What was asked so far.
    pub fn counters(&self) -> Counters {
        self.state.lock().counters
    }

    /// Bytes in use, in whole pages.
    pub fn used_bytes(&self) -> u64 {
        self.state.lock().used_pages * PAGE_BYTES
    }

    fn run<T>(
        &self,
        what: &str,
        path: &Path,
        call: impl FnOnce(&mut State) -> io::Result<T>,
    ) -> io::Result<T> {
        let mut state = self.state.lock();
        let done = state.check_on().and_then(|()| call(&mut state));
        done.map_err(|error| at_path(error, what, path))
    }
}

impl fmt::Debug for SimDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimDisk").field("counters", &self.counters()).finish_non_exhaustive()
    }
}

impl State {
    fn check_on(&self) -> io::Result<()> {
        if self.off { Err(io::Error::other("the simulated disk is off")) } else { Ok(()) }
    }

    /// Counts a change towards the planned power loss.
    fn step(&mut self) -> io::Result<()> {
        match &mut self.changes_left {
            Some(0) => self.off = true,
            Some(left) => *left -= 1,
            None => {}
        }
        self.check_on()
    }

    fn take(fault: &mut u32) -> io::Result<()> {
        if *fault == 0 {
            return Ok(());
        }
        *fault -= 1;
        Err(io::Error::from_raw_os_error(libc::EIO))
    }

    fn free_pages(&self) -> u64 {
        self.capacity_pages.saturating_sub(self.used_pages)
    }

    /// Runs a change of names and counts the pages of `id`, which may lose its last name or handle.
    fn names(&mut self, id: NodeId, call: impl FnOnce(&mut Tree)) {
        let before = self.tree.pages_of(id);
        call(&mut self.tree);
        self.used_pages = (self.used_pages + self.tree.pages_of(id)).saturating_sub(before);
    }

    /// Runs a change of one file's content and counts the pages that it took or gave.
    fn change(
        &mut self,
        id: NodeId,
        call: impl FnOnce(&mut content::Content, &mut SmallRng),
    ) -> io::Result<()> {
        let file = self.tree.file(id)?;
        let before = file.pages();
        call(file, &mut self.rng);
        self.used_pages = (self.used_pages + file.pages()).saturating_sub(before);
        Ok(())
    }
}

#[async_trait]
impl Disk for SimDisk {
    async fn open(&self, path: &Path, how: Open) -> io::Result<Arc<dyn DiskFile>> {
        check_name(path)?;
        let (id, epoch) = self.run("open", path, |state| {
            let id = match state.tree.find(path) {
                Ok(_) if how == Open::CreateNew => return Err(io::ErrorKind::AlreadyExists.into()),
                Ok(id) => id,
                Err(error)
                    if error.kind() == io::ErrorKind::NotFound
                        && how != Open::Read
                        && how != Open::ReadWrite =>
                {
                    let at = state.tree.find_parent(path)?;
                    state.step()?;
                    state.tree.create(at, false)
                }
                Err(error) => return Err(error),
            };
            state.tree.file(id)?;
            state.tree.opened(id);
            Ok((id, state.epoch))
        })?;
        let writable = how != Open::Read;
        let poisoned = AtomicBool::new(false);
        Ok(Arc::new(SimFile { disk: self.clone(), path: path.to_owned(), id, epoch, writable, poisoned }))
    }

    async fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        check_name(from)?;
        check_name(to)?;
        self.run("rename", from, |state| {
            let id = state.tree.find(from)?;
            let at = state.tree.find_parent(to)?;
            // Directories stay where they are: nothing needs to move one.
            state.tree.file(id)?;
            let replaced = state.tree.find(to).ok();
            if let Some(replaced) = replaced {
                state.tree.file(replaced)?;
            }
            state.step()?;
            state.names(replaced.unwrap_or(id), |tree| tree.rename(id, at));
            Ok(())
        })
    }

    async fn remove_file(&self, path: &Path) -> io::Result<()> {
        check_name(path)?;
        self.run("remove", path, |state| {
            let id = state.tree.find(path)?;
            state.tree.file(id)?;
            state.step()?;
            state.names(id, |tree| tree.remove(id));
            Ok(())
        })
    }

    async fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        check_path(path)?;
        self.run("create directory", path, |state| {
            let mut above = PathBuf::new();
            for part in path {
                let dir = above.join(part);
                let parent = state.tree.find(&above)?;
                match state.tree.find(&dir) {
                    Ok(id) => drop(state.tree.dir(id)?),
                    Err(_) => {
                        let at = state.tree.find_parent(&dir)?;
                        state.step()?;
                        state.tree.create(at, true);
                    }
                }
                state.step()?;
                state.tree.sync_dir(parent);
                above = dir;
            }
            Ok(())
        })
    }

    async fn remove_dir(&self, path: &Path) -> io::Result<()> {
        check_name(path)?;
        self.run("remove directory", path, |state| {
            let id = state.tree.find(path)?;
            if !state.tree.dir(id)?.now.is_empty() {
                return Err(io::ErrorKind::DirectoryNotEmpty.into());
            }
            state.step()?;
            state.tree.remove(id);
            Ok(())
        })
    }

    async fn list(&self, dir: &Path) -> io::Result<Vec<DirEntry>> {
        check_path(dir)?;
        self.run("list", dir, |state| {
            let names = &state.tree.dir(state.tree.find(dir)?)?.now;
            let entry = |(name, &id): (&String, &NodeId)| {
                let len = state.tree.file_len(id);
                DirEntry { name: name.clone(), is_dir: len.is_none(), len: len.unwrap_or(0) }
            };
            Ok(names.iter().map(entry).collect())
        })
    }

    async fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        check_path(dir)?;
        let epoch = self.state.lock().epoch;
        self.sync_time().await;
        self.run("sync directory", dir, |state| {
            if state.epoch != epoch {
                return Err(io::Error::other("the simulated disk crashed meanwhile"));
            }
            let id = state.tree.find(dir)?;
            state.tree.dir(id)?;
            state.step()?;
            State::take(&mut state.fail_syncs)?;
            state.tree.sync_dir(id);
            state.counters.dir_syncs += 1;
            Ok(())
        })
    }

    async fn space(&self, path: &Path) -> io::Result<Space> {
        check_path(path)?;
        self.run("statvfs", path, |state| {
            let (total, free) = (state.capacity_pages * PAGE_BYTES, state.free_pages() * PAGE_BYTES);
            Ok(Space { total_bytes: total, free_bytes: free })
        })
    }
}

impl SimDisk {
    /// Lets the time of a sync pass, and other tasks run, before anything becomes durable.
    async fn sync_time(&self) {
        let latency = self.state.lock().sync_latency;
        if latency.is_zero() {
            tokio::task::yield_now().await;
        } else {
            tokio::time::sleep(latency).await;
        }
    }
}

mod file;
use file::SimFile;

#[cfg(test)]
mod tests;
