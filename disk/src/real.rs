//! The disk of the operating system.
//!
//! Blocking calls run on tokio's blocking threads, except where the page cache answers at once: a hop to
//! another thread costs more than the copy. Reads try `preadv2(RWF_NOWAIT)` first, which never waits for the
//! device; small writes only dirty the page cache. A sync always waits, so it always hops.

use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use bytes::{Buf, Bytes};
use rustix::fs::{FallocateFlags, FlockOperation};
use rustix::io::{Errno, ReadWriteFlags};

use crate::{DirEntry, Disk, DiskFile, Open, Space, at_path, check_name, check_path, poisoned};

mod pool;

use pool::{Buffer, Pool};

/// Writes up to this size go to the page cache on the calling thread.
const INLINE_WRITE_BYTES_MAX: usize = 64 * 1024;
/// Reads up to this size are first tried on the calling thread; a longer copy would hold it too long.
const INLINE_READ_BYTES_MAX: usize = 1024 * 1024;
/// Linux takes at most this many slices in one call.
const SLICES_MAX: usize = 1024;
/// Zeros are written in pieces of this size where the file system cannot allocate or punch.
const ZERO_PIECE_BYTES: u64 = 1024 * 1024;
/// The file that holds the lock on a data directory.
const LOCK_NAME: &str = "LOCK";

/// A directory of the operating system's file system, held exclusively.
#[derive(Debug)]
pub struct RealDisk {
    root: PathBuf,
    pool: Arc<Pool>,
    /// Holds the lock on the data directory until the disk is dropped or the process ends.
    _lock: File,
}

impl RealDisk {
    /// Opens `root` as a disk, creating the directory if need be, and takes an exclusive lock on it.
    /// [`io::ErrorKind::ResourceBusy`] if another process, or another disk in this one, has it. Blocks.
    pub fn open(root: impl Into<PathBuf>) -> io::Result<Arc<Self>> {
        let root = root.into();
        create_dirs_durable(&root)?;
        let path = root.join(LOCK_NAME);
        let lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|error| at_path(error, "open", &path))?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Arc::new(Self { root, pool: Arc::default(), _lock: lock })),
            Err(Errno::WOULDBLOCK) => {
                let why = format!("data directory {} is in use by another process", root.display());
                Err(io::Error::new(io::ErrorKind::ResourceBusy, why))
            }
            Err(errno) => Err(at_path(errno.into(), "lock", &path)),
        }
    }

    /// The directory that this disk is.
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn resolve_name(&self, path: &Path) -> io::Result<PathBuf> {
        check_name(path)?;
        Ok(self.root.join(path))
    }

    fn resolve(&self, path: &Path) -> io::Result<PathBuf> {
        check_path(path)?;
        // Joining an empty path would add a slash, which names a file's directory, not the root.
        Ok(if path.as_os_str().is_empty() { self.root.clone() } else { self.root.join(path) })
    }
}

#[async_trait]
impl Disk for RealDisk {
    async fn open(&self, path: &Path, how: Open) -> io::Result<Arc<dyn DiskFile>> {
        let path = self.resolve_name(path)?;
        let pool = self.pool.clone();
        blocking(move || {
            let mut options = OpenOptions::new();
            options.read(true).write(how != Open::Read);
            match how {
                Open::Read | Open::ReadWrite => {}
                Open::Create => drop(options.create(true).truncate(false)),
                Open::CreateNew => drop(options.create_new(true)),
            }
            let file = options.open(&path).map_err(|error| at_path(error, "open", &path))?;
            if file.metadata().map_err(|error| at_path(error, "stat", &path))?.is_dir() {
                return Err(at_path(Errno::ISDIR.into(), "open", &path));
            }
            let inner = Inner { file, path, poisoned: AtomicBool::new(false) };
            Ok(Arc::new(RealFile { inner: Arc::new(inner), pool }) as Arc<dyn DiskFile>)
        })
        .await
    }

    async fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let (from, to) = (self.resolve_name(from)?, self.resolve_name(to)?);
        blocking(move || fs::rename(&from, &to).map_err(|error| at_path(error, "rename", &from))).await
    }

    async fn remove_file(&self, path: &Path) -> io::Result<()> {
        let path = self.resolve_name(path)?;
        blocking(move || fs::remove_file(&path).map_err(|error| at_path(error, "remove", &path))).await
    }

    async fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        check_path(path)?;
        let (mut above, path) = (self.root.clone(), path.to_owned());
        blocking(move || {
            for part in path.components() {
                let dir = above.join(part);
                create_dir(&dir)?;
                // Also for one that exists: whoever created it may have died before this.
                sync_dir_blocking(&above)?;
                above = dir;
            }
            Ok(())
        })
        .await
    }

    async fn remove_dir(&self, path: &Path) -> io::Result<()> {
        let path = self.resolve_name(path)?;
        blocking(move || fs::remove_dir(&path).map_err(|error| at_path(error, "remove directory", &path)))
            .await
    }

    async fn list(&self, dir: &Path) -> io::Result<Vec<DirEntry>> {
        let dir = self.resolve(dir)?;
        blocking(move || list_blocking(&dir).map_err(|error| at_path(error, "list", &dir))).await
    }

    async fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let dir = self.resolve(dir)?;
        blocking(move || sync_dir_blocking(&dir)).await
    }

    async fn space(&self, path: &Path) -> io::Result<Space> {
        let path = self.resolve(path)?;
        blocking(move || {
            let stat = rustix::fs::statvfs(&path).map_err(|errno| at_path(errno.into(), "statvfs", &path))?;
            Ok(Space {
                total_bytes: stat.f_blocks.saturating_mul(stat.f_frsize),
                free_bytes: stat.f_bavail.saturating_mul(stat.f_frsize),
            })
        })
        .await
    }

    fn real_path(&self, path: &Path) -> Option<PathBuf> {
        self.resolve(path).ok()
    }
}

#[derive(Debug)]
struct RealFile {
    /// Shared with calls on blocking threads, which may outlive a dropped future.
    inner: Arc<Inner>,
    /// Of the whole disk.
    pool: Arc<Pool>,
}

#[derive(Debug)]
struct Inner {
    file: File,
    path: PathBuf,
    /// Set by a failed sync, never cleared.
    poisoned: AtomicBool,
}

/// What is read into.
#[derive(Debug)]
enum Room {
    Pooled(Buffer),
    Own(Vec<u8>),
}

impl Room {
    fn space(&mut self) -> &mut [u8] {
        match self {
            Self::Pooled(buffer) => buffer.space(),
            Self::Own(buffer) => buffer,
        }
    }

    fn filled(self, got: usize) -> Bytes {
        match self {
            Self::Pooled(buffer) => buffer.filled(got),
            Self::Own(mut buffer) => {
                buffer.truncate(got);
                buffer.into()
            }
        }
    }
}

impl RealFile {
    async fn run<T, F>(&self, what: &'static str, call: F) -> io::Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Inner) -> io::Result<T> + Send + 'static,
    {
        let inner = self.inner.clone();
        blocking(move || call(&inner).map_err(|error| at_path(error, what, &inner.path))).await
    }
}

#[async_trait]
impl DiskFile for RealFile {
    async fn read_at(&self, offset: u64, len: usize) -> io::Result<Bytes> {
        if len == 0 {
            return Ok(Bytes::new());
        }
        if len > INLINE_READ_BYTES_MAX {
            return self.run("read", move |inner| inner.read(offset, len)).await;
        }
        let mut buffer = match self.pool.take(len) {
            Some(buffer) => Room::Pooled(buffer),
            None => Room::Own(vec![0; len]),
        };
        let flags = ReadWriteFlags::NOWAIT;
        let slices = &mut [IoSliceMut::new(buffer.space())];
        // Any refusal (not in the cache, not supported here) only means that the blocking read decides.
        let got = rustix::io::preadv2(&self.inner.file, slices, offset, flags).unwrap_or(0);
        if got == len {
            return Ok(buffer.filled(got));
        }
        // A short read is either the end of the file or the end of what is cached: fstat does not wait.
        if offset.saturating_add(got as u64) >= self.inner.len()? {
            return Ok(buffer.filled(got));
        }
        self.run("read", move |inner| {
            let got = inner.fill(offset, buffer.space(), got)?;
            Ok(buffer.filled(got))
        })
        .await
    }

    async fn write_at(&self, offset: u64, data: Vec<Bytes>) -> io::Result<()> {
        let len: usize = data.iter().map(Bytes::len).sum();
        if len <= INLINE_WRITE_BYTES_MAX {
            let written = self.inner.write(offset, data);
            return written.map_err(|error| at_path(error, "write", &self.inner.path));
        }
        self.run("write", move |inner| inner.write(offset, data)).await
    }

    async fn write_back(&self, offset: u64, len: u64) -> io::Result<()> {
        self.run("write back", move |inner| {
            let (offset, len) = (to_signed(offset)?, to_signed(len)?);
            // SAFETY: the descriptor is open for as long as `inner` lives; no memory is passed.
            let code = unsafe {
                libc::sync_file_range(inner.file.as_raw_fd(), offset, len, libc::SYNC_FILE_RANGE_WRITE)
            };
            if code == 0 {
                return Ok(());
            }
            match io::Error::last_os_error() {
                error if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EINVAL | libc::ESPIPE)) => {
                    Ok(())
                }
                error => Err(error),
            }
        })
        .await
    }

    async fn sync(&self) -> io::Result<()> {
        self.run("sync", |inner| {
            inner.check()?;
            let synced = retry(|| rustix::fs::fdatasync(&inner.file));
            if synced.is_err() {
                inner.poisoned.store(true, Ordering::SeqCst);
            }
            synced
        })
        .await
    }

    async fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        self.run("allocate", move |inner| {
            inner.check()?;
            match retry(|| rustix::fs::fallocate(&inner.file, FallocateFlags::empty(), offset, len)) {
                Err(error) if unsupported(&error) => {
                    // Only the part behind the end: bytes that are there must stay.
                    let from = inner.len()?.max(offset);
                    inner.write_zeros(from, offset.saturating_add(len).saturating_sub(from))
                }
                done => done,
            }
        })
        .await
    }

    async fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.run("punch", move |inner| {
            inner.check()?;
            if len == 0 {
                return Ok(());
            }
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            match retry(|| rustix::fs::fallocate(&inner.file, flags, offset, len)) {
                Err(error) if unsupported(&error) => {
                    let end = offset.saturating_add(len).min(inner.len()?);
                    inner.write_zeros(offset, end.saturating_sub(offset))
                }
                done => done,
            }
        })
        .await
    }

    async fn set_len(&self, len: u64) -> io::Result<()> {
        self.run("set length of", move |inner| {
            inner.check()?;
            retry(|| rustix::fs::ftruncate(&inner.file, len))
        })
        .await
    }

    async fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn raw_fd(&self) -> Option<RawFd> {
        Some(self.inner.file.as_raw_fd())
    }
}

impl Inner {
    fn check(&self) -> io::Result<()> {
        if self.poisoned.load(Ordering::SeqCst) { Err(poisoned(&self.path)) } else { Ok(()) }
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    /// Reads `len` bytes, or to the end of the file.
    fn read(&self, offset: u64, len: usize) -> io::Result<Bytes> {
        let left = usize::try_from(self.len()?.saturating_sub(offset)).unwrap_or(usize::MAX);
        let mut buffer = vec![0; len.min(left)];
        let got = self.fill(offset, &mut buffer, 0)?;
        buffer.truncate(got);
        Ok(buffer.into())
    }

    /// Fills `buffer`, which holds the first `done` bytes already, as far as the file goes. Answers how many there are.
    fn fill(&self, offset: u64, buffer: &mut [u8], mut done: usize) -> io::Result<usize> {
        while done < buffer.len() {
            let at = offset + done as u64;
            match rustix::io::pread(&self.file, &mut buffer[done..], at) {
                Ok(0) => break,
                Ok(got) => done += got,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(done)
    }

    fn write(&self, mut offset: u64, data: Vec<Bytes>) -> io::Result<()> {
        self.check()?;
        let mut left: Vec<Bytes> = data.into_iter().filter(|part| !part.is_empty()).collect();
        let mut first = 0;
        while first < left.len() {
            let last = left.len().min(first + SLICES_MAX);
            let slices: Vec<IoSlice<'_>> = left[first..last].iter().map(|part| IoSlice::new(part)).collect();
            let mut wrote = match rustix::io::pwritev(&self.file, &slices, offset) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(wrote) => wrote,
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(errno.into()),
            };
            offset += wrote as u64;
            while first < last && wrote >= left[first].len() {
                wrote -= left[first].len();
                first += 1;
            }
            if wrote > 0 {
                left[first].advance(wrote);
            }
        }
        Ok(())
    }

    fn write_zeros(&self, mut offset: u64, mut len: u64) -> io::Result<()> {
        let zeros = Bytes::from(vec![0; len.min(ZERO_PIECE_BYTES) as usize]);
        while len > 0 {
            let piece = len.min(ZERO_PIECE_BYTES);
            self.write(offset, vec![zeros.slice(..piece as usize)])?;
            offset += piece;
            len -= piece;
        }
        Ok(())
    }
}

fn unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS))
}

fn to_signed(value: u64) -> io::Result<i64> {
    i64::try_from(value).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn retry(mut call: impl FnMut() -> rustix::io::Result<()>) -> io::Result<()> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            done => return done.map_err(io::Error::from),
        }
    }
}

async fn blocking<T: Send + 'static>(call: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    match tokio::task::spawn_blocking(call).await {
        Ok(done) => done,
        Err(error) => Err(io::Error::other(format!("disk call ended early: {error}"))),
    }
}

fn create_dirs_durable(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    let above = match path.parent() {
        Some(above) if !above.as_os_str().is_empty() => above,
        _ => Path::new("."),
    };
    create_dirs_durable(above)?;
    create_dir(path)?;
    sync_dir_blocking(above)
}

fn create_dir(path: &Path) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists || !path.is_dir() => {
            Err(at_path(error, "create directory", path))
        }
        _ => Ok(()),
    }
}

fn sync_dir_blocking(dir: &Path) -> io::Result<()> {
    let opened = File::open(dir).map_err(|error| at_path(error, "open", dir))?;
    opened.sync_all().map_err(|error| at_path(error, "sync directory", dir))
}

fn list_blocking(dir: &Path) -> io::Result<Vec<DirEntry>> {
    let mut entries = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let meta = match entry.metadata() {
            // Removed between the listing and the look: as if listed a little later.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            meta => meta?,
        };
        // No code of ours makes such a name, so it is none of ours.
        let Ok(name) = entry.file_name().into_string() else { continue };
        let is_dir = meta.is_dir();
        entries.push(DirEntry { name, is_dir, len: if is_dir { 0 } else { meta.len() } });
    }
    entries.sort_by(|one, two| one.name.cmp(&two.name));
    Ok(entries)
}
