//! The one door between Cairn and stable storage.
//!
//! Everything that a server keeps goes through [`Disk`] and [`DiskFile`], so that the same service code runs
//! on a real file system ([`RealDisk`]) and on a simulated one that forgets, tears, flips and fills
//! ([`SimDisk`]). Above the trait lie [`durable`] (small whole files that appear all or not at all) and
//! [`log`] (a segmented, checksummed, group-committed append log).
//!
//! What both disks promise:
//!
//! * A **path** is relative to the disk's root. An absolute path, `..`, an empty component or a name that is
//!   not UTF-8 is refused with [`io::ErrorKind::InvalidInput`].
//! * **Content** is durable after [`DiskFile::sync`]; a **name** (created, renamed, removed) is durable after
//!   [`Disk::sync_dir`] of its directory. The one does not imply the other.
//! * **A failed sync poisons the handle**: the kernel may have dropped the dirty pages and will report the
//!   next sync as good, so every later write or sync on that handle fails and says why. Nothing written
//!   through it since its last good sync may be believed.
//! * An error names the path and what was tried.

use std::fmt::Debug;
use std::io;
use std::os::fd::RawFd;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

#[cfg(test)]
mod contract;
pub mod durable;
pub mod log;
mod real;
mod sim;

pub use real::RealDisk;
pub use sim::{Counters, CrashKeep, SimDisk};

/// How a file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Open {
    /// An existing file, for reading.
    Read,
    /// An existing file, for reading and writing.
    ReadWrite,
    /// For reading and writing; created empty if it does not exist.
    Create,
    /// For reading and writing; [`io::ErrorKind::AlreadyExists`] if it exists.
    CreateNew,
}

/// One name in a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    /// The name, without its directory.
    pub name: String,
    /// Whether it is a directory.
    pub is_dir: bool,
    /// Length of a file in bytes; 0 for a directory.
    pub len: u64,
}

/// Room on the file system that holds a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// Size of the file system in bytes.
    pub total_bytes: u64,
    /// Bytes that this process may still write.
    pub free_bytes: u64,
}

/// A tree of files. See the crate's page for what every implementation promises.
#[async_trait]
pub trait Disk: Send + Sync + 'static + Debug {
    /// Opens a file. [`io::ErrorKind::NotFound`] if it, or its directory, does not exist.
    async fn open(&self, path: &Path, how: Open) -> io::Result<Arc<dyn DiskFile>>;

    /// Renames a file, replacing `to` if it exists, atomically. Durable after [`Disk::sync_dir`] of the
    /// directories of both names.
    async fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file's name. Handles that are open go on working.
    async fn remove_file(&self, path: &Path) -> io::Result<()>;

    /// Creates a directory and those above it, and makes every created name durable before it returns.
    /// Existing directories are fine.
    async fn create_dir_all(&self, path: &Path) -> io::Result<()>;

    /// Removes an empty directory.
    async fn remove_dir(&self, path: &Path) -> io::Result<()>;

    /// All names of a directory, sorted. An empty path is the root.
    async fn list(&self, dir: &Path) -> io::Result<Vec<DirEntry>>;

    /// Makes the names of a directory durable. An empty path is the root.
    async fn sync_dir(&self, dir: &Path) -> io::Result<()>;

    /// Room on the file system that holds `path`.
    async fn space(&self, path: &Path) -> io::Result<Space>;

    /// Where `path` lies in the operating system's file system, for libraries that open files themselves.
    /// `None` where there is no such place, as on a simulated disk.
    fn real_path(&self, path: &Path) -> Option<PathBuf> {
        let _ = path;
        None
    }
}

/// An open file. All offsets and lengths are in bytes. Calls may run at the same time; overlapping writes at
/// the same time leave either's bytes.
#[allow(clippy::len_without_is_empty)] // an IO call, not a property of a collection
#[async_trait]
pub trait DiskFile: Send + Sync + Debug {
    /// Reads `len` bytes from `offset`; fewer only at the end of the file, none behind it. Allocates at most
    /// what the file holds, however large `len` is.
    async fn read_at(&self, offset: u64, len: usize) -> io::Result<Bytes>;

    /// Writes all slices one behind the other from `offset`, growing the file if need be. On an error any
    /// part may have been written. [`io::ErrorKind::StorageFull`] when the disk is full.
    async fn write_at(&self, offset: u64, data: Vec<Bytes>) -> io::Result<()>;

    /// A hint to start writing the range to the device now, so that a later sync has less to do. Gives no
    /// durability and reports no lost writes.
    async fn write_back(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Makes content and length durable (`fdatasync`). After an error the handle is poisoned.
    async fn sync(&self) -> io::Result<()>;

    /// Reserves blocks for the range, growing the file; new bytes read as zero, old ones stay.
    /// [`io::ErrorKind::StorageFull`] when there is no room.
    async fn allocate(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Gives the range's blocks back. The length stays; the bytes read as zero afterwards.
    async fn punch(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Cuts or grows (with zeros) to `len` bytes.
    async fn set_len(&self, len: u64) -> io::Result<()>;

    /// The length in bytes.
    async fn len(&self) -> io::Result<u64>;

    /// The descriptor, where there is one, for passing to a reader on the same host.
    fn raw_fd(&self) -> Option<RawFd> {
        None
    }
}

/// Refuses what could leave the disk's root, for every [`Disk`] alike.
fn check_path(path: &Path) -> io::Result<()> {
    let plain = path.components().all(|part| matches!(part, Component::Normal(_)));
    if plain && path.to_str().is_some() {
        return Ok(());
    }
    let why = format!("path {} is not a plain relative UTF-8 path", path.display());
    Err(io::Error::new(io::ErrorKind::InvalidInput, why))
}

/// As [`check_path`], and not the root itself.
fn check_name(path: &Path) -> io::Result<()> {
    if path.as_os_str().is_empty() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "an empty path names no file"));
    }
    check_path(path)
}

/// The same error with what was tried and where; its kind stays.
fn at_path(error: io::Error, what: &str, path: &Path) -> io::Error {
    io::Error::new(error.kind(), PathError { what: format!("{what} {}", path.display()), source: error })
}

/// An IO error with its place. The OS error stays reachable as `source`.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
struct PathError {
    what: String,
    source: io::Error,
}

/// The OS error number of an error, also below the place that `at_path` added.
pub fn os_error(error: &io::Error) -> Option<i32> {
    error.raw_os_error().or_else(|| {
        error
            .get_ref()
            .and_then(|inner| inner.downcast_ref::<PathError>())
            .and_then(|inner| os_error(&inner.source))
    })
}

/// The error of every write or sync after a failed sync.
fn poisoned(path: &Path) -> io::Error {
    let why = format!("a sync of {} failed before; its unsynced writes may be lost", path.display());
    io::Error::other(why)
}

/// Hostile bytes may cost only so much memory: see `fuzz`.
#[cfg(test)]
#[global_allocator]
static ALLOCATOR: fuzz::memory::Counting = fuzz::memory::Counting;
