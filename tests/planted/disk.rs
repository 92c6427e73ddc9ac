//! Disks that do not do what they were asked to: a sync of content or of names that did nothing, and logs that end at
//! their first bad record.

use crate::plant::Plant;
use async_trait::async_trait;
use bytes::Bytes;
use cluster::Role;
use disk::{DirEntry, Disk, DiskFile, Open, Space};
use parking_lot::Mutex;
use std::{
    collections::{BTreeMap, HashMap},
    fmt, io,
    path::{Path, PathBuf},
    sync::Arc,
};

type Chosen = Arc<dyn Fn(&Path) -> bool + Send + Sync>;
/// Where an open file is now.
type Place = Arc<Mutex<PathBuf>>;

/// Syncs of some files, or of some directories, that answer and do nothing.
#[derive(Clone)]
pub struct Unsynced {
    inner: Arc<dyn Disk>,
    plant: Arc<Plant>,
    files: Chosen,
    directories: Chosen,
    open: Arc<Mutex<Vec<Place>>>,
}

impl fmt::Debug for Unsynced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Unsynced").field("inner", &self.inner).finish_non_exhaustive()
    }
}

impl Unsynced {
    /// A disk that does all it should.
    pub fn over(inner: Arc<dyn Disk>, plant: Arc<Plant>) -> Self {
        let none: Chosen = Arc::new(|_| false);
        Self { inner, plant, files: none.clone(), directories: none, open: Arc::default() }
    }

    /// Skips the syncs of these files, by their path at that moment.
    pub fn files(self, chosen: impl Fn(&Path) -> bool + Send + Sync + 'static) -> Self {
        Self { files: Arc::new(chosen), ..self }
    }

    /// Skips the syncs of these directories.
    pub fn directories(self, chosen: impl Fn(&Path) -> bool + Send + Sync + 'static) -> Self {
        Self { directories: Arc::new(chosen), ..self }
    }

    /// The disk.
    pub fn wrap(self) -> Arc<dyn Disk> {
        Arc::new(self)
    }

    fn skips(&self, chosen: impl FnOnce() -> bool) -> bool {
        let skips = self.plant.is_armed() && chosen();
        if skips {
            self.plant.strike();
        }
        skips
    }
}

#[async_trait]
impl Disk for Unsynced {
    async fn open(&self, path: &Path, how: Open) -> io::Result<Arc<dyn DiskFile>> {
        let inner = self.inner.open(path, how).await?;
        let path = Place::new(Mutex::new(path.to_owned()));
        let mut open = self.open.lock();
        open.retain(|place| Arc::strong_count(place) > 1);
        open.push(path.clone());
        Ok(Arc::new(UnsyncedFile { inner, disk: self.clone(), path }))
    }

    async fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.inner.rename(from, to).await?;
        for place in &*self.open.lock() {
            let mut place = place.lock();
            if *place == from {
                to.clone_into(&mut place);
            }
        }
        Ok(())
    }

    async fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        if self.skips(|| (self.directories)(dir)) { Ok(()) } else { self.inner.sync_dir(dir).await }
    }

    async fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.inner.remove_file(path).await
    }

    async fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        self.inner.create_dir_all(path).await
    }

    async fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.inner.remove_dir(path).await
    }

    async fn list(&self, dir: &Path) -> io::Result<Vec<DirEntry>> {
        self.inner.list(dir).await
    }

    async fn space(&self, path: &Path) -> io::Result<Space> {
        self.inner.space(path).await
    }
}

#[derive(Debug)]
struct UnsyncedFile {
    inner: Arc<dyn DiskFile>,
    disk: Unsynced,
    path: Place,
}

#[async_trait]
impl DiskFile for UnsyncedFile {
    async fn read_at(&self, offset: u64, len: usize) -> io::Result<Bytes> {
        self.inner.read_at(offset, len).await
    }

    async fn write_at(&self, offset: u64, data: Vec<Bytes>) -> io::Result<()> {
        self.inner.write_at(offset, data).await
    }

    async fn sync(&self) -> io::Result<()> {
        let skips = self.disk.skips(|| (self.disk.files)(&self.path.lock()));
        if skips { Ok(()) } else { self.inner.sync().await }
    }

    async fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.inner.punch(offset, len).await
    }

    async fn set_len(&self, len: u64) -> io::Result<()> {
        self.inner.set_len(len).await
    }

    async fn write_back(&self, offset: u64, len: u64) -> io::Result<()> {
        self.inner.write_back(offset, len).await
    }

    async fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        self.inner.allocate(offset, len).await
    }

    async fn len(&self) -> io::Result<u64> {
        self.inner.len().await
    }
}

const PAGE: u64 = 4_096;

/// What was written to a file, and from where on it is cut.
#[derive(Debug, Default)]
struct Log {
    pages: BTreeMap<u64, Vec<u8>>,
    cut: Option<u64>,
}

impl Log {
    fn write(&mut self, mut offset: u64, mut data: &[u8]) {
        while !data.is_empty() {
            let (page, within) = (offset / PAGE, (offset % PAGE) as usize);
            let count = data.len().min(PAGE as usize - within);
            let kept = self.pages.entry(page).or_insert_with(|| vec![0; PAGE as usize]);
            kept[within..within + count].copy_from_slice(&data[..count]);
            offset += count as u64;
            data = &data[count..];
        }
    }

    /// The first byte that is not what was written.
    fn damage(&self, offset: u64, data: &[u8]) -> Option<u64> {
        let end = offset + data.len() as u64;
        for (page, kept) in self.pages.range(offset / PAGE..=end / PAGE) {
            let start = page * PAGE;
            let (from, to) = (start.max(offset), (start + PAGE).min(end));
            if from >= to {
                continue;
            }
            let read = &data[(from - offset) as usize..(to - offset) as usize];
            let wanted = &kept[(from - start) as usize..(to - start) as usize];
            if read != wanted {
                return read.iter().zip(wanted).position(|(a, b)| a != b).map(|at| from + at as u64);
            }
        }
        None
    }
}

/// By disk and place on it.
type Logs = HashMap<(Role, PathBuf), Arc<Mutex<Log>>>;

/// Logs on all disks of a cluster, across the lives of their servers.
#[derive(Clone, Debug, Default)]
pub struct CutLogs {
    logs: Arc<Mutex<Logs>>,
}

impl CutLogs {
    /// A disk on which the chosen files read as zeros from their first damaged byte on, as if a log ended there.
    pub fn wrap(
        &self,
        role: Role,
        inner: Arc<dyn Disk>,
        plant: Arc<Plant>,
        chosen: impl Fn(&Path) -> bool + Send + Sync + 'static,
    ) -> Arc<dyn Disk> {
        Arc::new(CutDisk { inner, plant, role, all: self.clone(), chosen: Arc::new(chosen) })
    }
}

struct CutDisk {
    inner: Arc<dyn Disk>,
    plant: Arc<Plant>,
    role: Role,
    all: CutLogs,
    chosen: Chosen,
}

impl fmt::Debug for CutDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CutDisk").field("inner", &self.inner).finish_non_exhaustive()
    }
}

#[async_trait]
impl Disk for CutDisk {
    async fn open(&self, path: &Path, how: Open) -> io::Result<Arc<dyn DiskFile>> {
        let inner = self.inner.open(path, how).await?;
        if !self.plant.is_armed() || !(self.chosen)(path) {
            return Ok(inner);
        }
        let log = self.all.logs.lock().entry((self.role, path.to_owned())).or_default().clone();
        Ok(Arc::new(CutFile { inner, log, plant: self.plant.clone() }))
    }

    async fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.inner.rename(from, to).await?;
        let mut logs = self.all.logs.lock();
        if let Some(log) = logs.remove(&(self.role, from.to_owned())) {
            logs.insert((self.role, to.to_owned()), log);
        }
        Ok(())
    }

    async fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.inner.sync_dir(dir).await
    }

    async fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.inner.remove_file(path).await
    }

    async fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        self.inner.create_dir_all(path).await
    }

    async fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.inner.remove_dir(path).await
    }

    async fn list(&self, dir: &Path) -> io::Result<Vec<DirEntry>> {
        self.inner.list(dir).await
    }

    async fn space(&self, path: &Path) -> io::Result<Space> {
        self.inner.space(path).await
    }
}

#[derive(Debug)]
struct CutFile {
    inner: Arc<dyn DiskFile>,
    log: Arc<Mutex<Log>>,
    plant: Arc<Plant>,
}

#[async_trait]
impl DiskFile for CutFile {
    async fn read_at(&self, offset: u64, len: usize) -> io::Result<Bytes> {
        let read = self.inner.read_at(offset, len).await?;
        let mut log = self.log.lock();
        if let Some(damage) = log.damage(offset, &read)
            && log.cut.is_none_or(|cut| damage < cut)
        {
            log.cut = Some(damage);
            self.plant.strike();
        }
        let Some(cut) = log.cut.filter(|cut| *cut < offset + read.len() as u64) else { return Ok(read) };
        let mut shown = read.to_vec();
        shown[cut.saturating_sub(offset) as usize..].fill(0);
        Ok(shown.into())
    }

    async fn write_at(&self, offset: u64, data: Vec<Bytes>) -> io::Result<()> {
        {
            let mut log = self.log.lock();
            let mut at = offset;
            for part in &data {
                log.write(at, part);
                at += part.len() as u64;
            }
        }
        self.inner.write_at(offset, data).await
    }

    async fn sync(&self) -> io::Result<()> {
        self.inner.sync().await
    }

    async fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.log.lock().write(offset, &vec![0; len as usize]);
        self.inner.punch(offset, len).await
    }

    async fn set_len(&self, len: u64) -> io::Result<()> {
        // Only ever to empty a file, or to cut off what was never a record.
        self.log.lock().pages.retain(|page, _| (page + 1) * PAGE <= len);
        self.inner.set_len(len).await
    }

    async fn write_back(&self, offset: u64, len: u64) -> io::Result<()> {
        self.inner.write_back(offset, len).await
    }

    async fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        self.inner.allocate(offset, len).await
    }

    async fn len(&self) -> io::Result<u64> {
        self.inner.len().await
    }
}
