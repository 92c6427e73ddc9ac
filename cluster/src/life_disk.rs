//! A disk as one life of a server sees it: after the life's end nothing it still tries reaches the disk.
//!
//! A killed process does nothing more. In an embedded cluster its tasks may still run for a moment, so the disk
//! beneath them is taken away first.

use crate::gate::Life;
use async_trait::async_trait;
use bytes::Bytes;
use disk::{DirEntry, Disk, DiskFile, Open, Space};
use parking_lot::Mutex;
use std::{io, os::fd::RawFd, path::Path, sync::Arc};

/// Wraps a disk for one life.
#[derive(Debug)]
pub(crate) struct LifeDisk {
    /// Taken away at the end of the life, so that a lock on the data directory is free for the next.
    inner: Mutex<Option<Arc<dyn Disk>>>,
    life: Life,
}

impl LifeDisk {
    pub(crate) fn new(inner: Arc<dyn Disk>, life: Life) -> Arc<Self> {
        Arc::new(Self { inner: Mutex::new(Some(inner)), life })
    }

    /// Lets go of the disk.
    pub(crate) fn release(&self) {
        drop(self.inner.lock().take());
    }

    fn disk(&self) -> io::Result<Arc<dyn Disk>> {
        self.inner.lock().clone().filter(|_| self.life.lasts()).ok_or_else(Life::ended)
    }
}

#[async_trait]
impl Disk for LifeDisk {
    async fn open(&self, path: &Path, how: Open) -> io::Result<Arc<dyn DiskFile>> {
        let inner = self.disk()?.open(path, how).await?;
        Ok(Arc::new(LifeFile { inner, life: self.life.clone() }))
    }

    async fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.disk()?.rename(from, to).await
    }

    async fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.disk()?.remove_file(path).await
    }

    async fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        self.disk()?.create_dir_all(path).await
    }

    async fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.disk()?.remove_dir(path).await
    }

    async fn list(&self, dir: &Path) -> io::Result<Vec<DirEntry>> {
        self.disk()?.list(dir).await
    }

    async fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.disk()?.sync_dir(dir).await
    }

    async fn space(&self, path: &Path) -> io::Result<Space> {
        self.disk()?.space(path).await
    }
}

#[derive(Debug)]
struct LifeFile {
    inner: Arc<dyn DiskFile>,
    life: Life,
}

impl LifeFile {
    fn file(&self) -> io::Result<&dyn DiskFile> {
        if self.life.lasts() { Ok(&*self.inner) } else { Err(Life::ended()) }
    }
}

#[async_trait]
impl DiskFile for LifeFile {
    async fn read_at(&self, offset: u64, len: usize) -> io::Result<Bytes> {
        self.file()?.read_at(offset, len).await
    }

    async fn write_at(&self, offset: u64, data: Vec<Bytes>) -> io::Result<()> {
        self.file()?.write_at(offset, data).await
    }

    async fn write_back(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file()?.write_back(offset, len).await
    }

    async fn sync(&self) -> io::Result<()> {
        self.file()?.sync().await
    }

    async fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file()?.allocate(offset, len).await
    }

    async fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file()?.punch(offset, len).await
    }

    async fn set_len(&self, len: u64) -> io::Result<()> {
        self.file()?.set_len(len).await
    }

    async fn len(&self) -> io::Result<u64> {
        self.file()?.len().await
    }

    fn raw_fd(&self) -> Option<RawFd> {
        self.inner.raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gate::Gate;
    use disk::SimDisk;

    #[tokio::test]
    async fn nothing_reaches_the_disk_after_the_end_of_the_life() {
        let sim = SimDisk::new(1, 1 << 20);
        let gate = Gate::new();
        let disk = LifeDisk::new(Arc::new(sim.clone()), gate.life());
        let file = disk.open(Path::new("a"), Open::Create).await.unwrap();
        file.write_at(0, vec![Bytes::from_static(b"kept")]).await.unwrap();
        gate.end_life();
        assert!(file.write_at(0, vec![Bytes::from_static(b"lost")]).await.is_err());
        assert!(file.sync().await.is_err());
        assert!(disk.open(Path::new("b"), Open::Create).await.is_err());
        let file = sim.open(Path::new("a"), Open::Read).await.unwrap();
        assert_eq!(file.read_at(0, 9).await.unwrap(), "kept");
    }
}
