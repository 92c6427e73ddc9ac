//! A handle to a simulated file.

use super::content::SECTOR_BYTES;
use super::*;

#[derive(Debug)]
pub(super) struct SimFile {
    pub(super) disk: SimDisk,
    pub(super) path: PathBuf,
    pub(super) id: NodeId,
    pub(super) epoch: u64,
    pub(super) writable: bool,
    pub(super) poisoned: AtomicBool,
}

impl Drop for SimFile {
    fn drop(&mut self) {
        let mut state = self.disk.state.lock();
        if state.epoch == self.epoch {
            state.names(self.id, |tree| tree.closed(self.id));
        }
    }
}

impl SimFile {
    fn run<T>(&self, what: &str, call: impl FnOnce(&mut State) -> io::Result<T>) -> io::Result<T> {
        self.disk.run(what, &self.path, |state| {
            if state.epoch != self.epoch {
                return Err(io::Error::other("the handle is from before a crash of the simulated disk"));
            }
            call(state)
        })
    }

    fn run_change<T>(&self, what: &str, call: impl FnOnce(&mut State) -> io::Result<T>) -> io::Result<T> {
        self.run(what, |state| {
            if self.poisoned.load(Ordering::SeqCst) {
                return Err(poisoned(&self.path));
            }
            if !self.writable {
                return Err(io::Error::from_raw_os_error(libc::EBADF));
            }
            call(state)
        })
    }
}

#[async_trait]
impl DiskFile for SimFile {
    async fn read_at(&self, offset: u64, len: usize) -> io::Result<Bytes> {
        self.run("read", |state| {
            State::take(&mut state.fail_reads)?;
            let bytes = state.tree.file(self.id)?.read(offset, len);
            state.counters.reads += 1;
            state.counters.bytes_read += bytes.len() as u64;
            Ok(bytes.into())
        })
    }

    async fn write_at(&self, offset: u64, data: Vec<Bytes>) -> io::Result<()> {
        self.run_change("write", |state| {
            let data = data.concat();
            let end = check_end(offset, data.len() as u64)?;
            let mut fault = state.step().and_then(|()| State::take(&mut state.fail_writes));
            let mut len = data.len();
            if fault.is_err() {
                // To the end of a sector: what lies inside one is never written in part.
                let cut = offset + state.rng.random_range(0..=len as u64);
                len = (cut / SECTOR_BYTES * SECTOR_BYTES).saturating_sub(offset) as usize;
            }
            let room = state.free_pages();
            let file = state.tree.file(self.id)?;
            if file.pages_missing(offset, len as u64) > room {
                // As a real disk does: what fits is written.
                fault = fault.and(Err(io::ErrorKind::StorageFull.into()));
                while file.pages_missing(offset, len as u64) > room {
                    let over = (offset + len as u64 - 1) % PAGE_BYTES + 1;
                    len -= (over as usize).min(len);
                }
            }
            state.change(self.id, |file, _| file.write(offset, &data[..len]))?;
            fault?;
            debug_assert_eq!(end, offset + len as u64);
            if state.write_back_one_in > 0 && state.rng.random_ratio(1, state.write_back_one_in) {
                state.change(self.id, |file, rng| file.write_back_some(rng))?;
            }
            state.counters.writes += 1;
            state.counters.bytes_written += len as u64;
            Ok(())
        })
    }

    async fn write_back(&self, _offset: u64, _len: u64) -> io::Result<()> {
        self.run("write back", |_| Ok(()))
    }

    async fn sync(&self) -> io::Result<()> {
        self.disk.sync_time().await;
        self.run_change("sync", |state| {
            state.step()?;
            if let Err(error) = State::take(&mut state.fail_syncs) {
                self.poisoned.store(true, Ordering::SeqCst);
                state.change(self.id, |file, rng| file.fail_sync(rng))?;
                return Err(error);
            }
            state.change(self.id, |file, _| file.sync())?;
            state.counters.syncs += 1;
            Ok(())
        })
    }

    async fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        self.run_change("allocate", |state| {
            check_end(offset, len)?;
            state.step()?;
            if state.tree.file(self.id)?.pages_missing(offset, len) > state.free_pages() {
                return Err(io::ErrorKind::StorageFull.into());
            }
            state.change(self.id, |file, _| file.allocate(offset, len))
        })
    }

    async fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.run_change("punch", |state| {
            state.step()?;
            state.change(self.id, |file, _| file.punch(offset, len))
        })
    }

    async fn set_len(&self, len: u64) -> io::Result<()> {
        self.run_change("set length of", |state| {
            check_end(len, 0)?;
            state.step()?;
            state.change(self.id, |file, _| file.set_len(len))
        })
    }

    async fn len(&self) -> io::Result<u64> {
        self.run("stat", |state| Ok(state.tree.file(self.id)?.len()))
    }
}

/// The end of a range, refused where a real file system refuses it too.
fn check_end(offset: u64, len: u64) -> io::Result<u64> {
    let end = offset.checked_add(len).filter(|&end| end <= i64::MAX as u64);
    end.ok_or_else(|| io::Error::from_raw_os_error(libc::EFBIG))
}
