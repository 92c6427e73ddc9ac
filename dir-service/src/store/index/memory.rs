//! The index of tests and simulation: a map in memory. On a disk, it writes itself out whole when it is to be durable.
//!
//! The file, through the disk trait, so that simulation can crash it:
//!
//! ```text
//! magic      8 bytes "CAIRNIDX"
//! version    u8, 1
//! revision   u64 little endian
//! label      u32 length, bytes
//! entries    u64 count, then each: u64 revision, u32 length, key, u32 length, value
//! checksum   u64, CRC-64/NVME of everything before
//! ```

use super::{Index, IndexChange, IndexView};
use crate::store::{KeyRange, Page, SCAN_BYTES_MAX};
use async_trait::async_trait;
use bytes::{Buf, BufMut, Bytes};
use cairn_core::plan::{Key, Mutation, Versioned};
use cairn_proto::{Error, Result, checksum::crc64, id::Revision};
use disk::{Disk, durable};
use parking_lot::Mutex;
use std::{
    collections::{BTreeMap, VecDeque},
    ops::Bound,
    path::{Path, PathBuf},
    sync::Arc,
};

const MAGIC: &[u8; 8] = b"CAIRNIDX";
const VERSION: u8 = 1;
/// Largest file that is read back: an index of this kind is for what fits in memory many times.
const FILE_BYTES_MAX: usize = 1 << 31;

/// A map in memory, with the versions that its views still need. Clones are the same index.
#[derive(Clone, Debug)]
pub struct MemoryIndex {
    shared: Arc<Mutex<Map>>,
    file: Option<Arc<File>>,
}

#[derive(Debug)]
struct File {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    /// One writer at a time: they share a temporary name.
    writing: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct Map {
    label: Option<Bytes>,
    revision: Revision,
    durable: Revision,
    keys: BTreeMap<Key, Vec<(Revision, Option<Versioned>)>>,
    /// Views at each revision.
    views: BTreeMap<Revision, usize>,
    /// Keys with more than one version, or whose only one is a removal, by when that came to be.
    dirty: VecDeque<(Revision, Key)>,
}

impl MemoryIndex {
    /// In memory alone: after a crash, and after dropping all clones, the whole journal is replayed.
    pub fn volatile() -> Self {
        Self { shared: Arc::default(), file: None }
    }

    /// With a file that is written whole at each durable application. A damaged file counts as none.
    ///
    /// # Errors
    /// Those of the disk.
    pub async fn open(disk: Arc<dyn Disk>, path: &Path) -> Result<Self> {
        let map = match durable::read_file(&*disk, path, FILE_BYTES_MAX).await? {
            Some(bytes) => match Map::decode(bytes) {
                Some(map) => map,
                None => {
                    tracing::warn!(path = %path.display(), "the index is unreadable and begins anew");
                    Map::default()
                }
            },
            None => Map::default(),
        };
        let file = File { disk, path: path.to_owned(), writing: tokio::sync::Mutex::new(()) };
        Ok(Self { shared: Arc::new(Mutex::new(map)), file: Some(Arc::new(file)) })
    }

    /// The same as [`Index::apply`] without a file, for callers that do not await.
    pub(crate) fn apply_now(&self, changes: impl IntoIterator<Item = IndexChange>, revision: Revision) {
        let mut map = self.shared.lock();
        // What is repeated after a failed write is there already.
        let before = map.revision;
        for (at, mutations) in changes.into_iter().filter(|(at, _)| *at > before) {
            for mutation in mutations {
                map.change(at, mutation);
            }
        }
        map.revision = before.max(revision);
        map.prune();
    }

    /// The same as [`Index::view`], which cannot fail here.
    pub(crate) fn view_now(&self) -> Arc<dyn IndexView> {
        let mut map = self.shared.lock();
        let revision = map.revision;
        *map.views.entry(revision).or_default() += 1;
        Arc::new(MemoryView { shared: self.shared.clone(), revision })
    }

    async fn write(&self) -> Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        let _writing = file.writing.lock().await;
        let (revision, bytes) = {
            let map = self.shared.lock();
            (map.revision, map.encode())
        };
        durable::write_file_durable(&*file.disk, &file.path, bytes).await?;
        self.shared.lock().durable = revision;
        Ok(())
    }
}

#[async_trait]
impl Index for MemoryIndex {
    async fn label(&self) -> Result<Option<Bytes>> {
        Ok(self.shared.lock().label.clone())
    }

    async fn reset(&self, label: Bytes) -> Result<()> {
        {
            let mut map = self.shared.lock();
            let views = std::mem::take(&mut map.views);
            *map = Map { label: Some(label), views, ..Map::default() };
        }
        self.write().await
    }

    async fn load(&self, entries: Vec<(Key, Versioned)>) -> Result<()> {
        let mut map = self.shared.lock();
        for (key, value) in entries {
            let value = Versioned { value: Bytes::copy_from_slice(&value.value), revision: value.revision };
            map.keys.insert(Key::copy_from_slice(&key), vec![(Revision(0), Some(value))]);
        }
        Ok(())
    }

    async fn apply(&self, changes: Vec<IndexChange>, revision: Revision, durable: bool) -> Result<()> {
        self.apply_now(changes, revision);
        if durable { self.write().await } else { Ok(()) }
    }

    fn durable_revision(&self) -> Revision {
        self.shared.lock().durable
    }

    fn view(&self) -> Result<Arc<dyn IndexView>> {
        Ok(self.view_now())
    }
}

impl Map {
    fn change(&mut self, at: Revision, mutation: Mutation) {
        // Copied: what arrives may be a small part of a large buffer.
        let (key, value) = match mutation {
            Mutation::Put(key, value) => {
                (key, Some(Versioned { value: Bytes::copy_from_slice(&value), revision: at }))
            }
            Mutation::Delete(key) => (key, None),
        };
        if let Some(versions) = self.keys.get_mut(&key) {
            versions.push((at, value));
        } else if value.is_some() {
            self.keys.insert(Key::copy_from_slice(&key), vec![(at, value)]);
            return;
        } else {
            return;
        }
        self.dirty.push_back((at, Key::copy_from_slice(&key)));
    }

    /// Drops versions that no view and no later one can see.
    fn prune(&mut self) {
        let oldest = self.views.keys().next().map_or(self.revision, |view| (*view).min(self.revision));
        while self.dirty.front().is_some_and(|(at, _)| *at <= oldest) {
            let Some((_, key)) = self.dirty.pop_front() else { break };
            let Some(versions) = self.keys.get_mut(&key) else { continue };
            let seen = versions.partition_point(|(at, _)| *at <= oldest);
            versions.drain(..seen.saturating_sub(1));
            if let [(at, None)] = versions[..]
                && at <= oldest
            {
                self.keys.remove(&key);
            }
        }
    }

    fn encode(&self) -> Bytes {
        let live =
            || self.keys.iter().filter_map(|(key, versions)| Some((key, versions.last()?.1.as_ref()?)));
        let label = self.label.clone().unwrap_or_default();
        let mut out = Vec::new();
        out.put_slice(MAGIC);
        out.put_u8(VERSION);
        out.put_u64_le(self.revision.0);
        out.put_u32_le(label.len() as u32);
        out.put_slice(&label);
        out.put_u64_le(live().count() as u64);
        for (key, value) in live() {
            out.put_u64_le(value.revision.0);
            for bytes in [key, &value.value] {
                out.put_u32_le(bytes.len() as u32);
                out.put_slice(bytes);
            }
        }
        let checksum = crc64(&out);
        out.put_u64_le(checksum);
        out.into()
    }

    fn decode(bytes: Bytes) -> Option<Self> {
        let body = bytes.len().checked_sub(8)?;
        let checksum = u64::from_le_bytes(bytes[body..].try_into().ok()?);
        let mut rest = bytes.slice(..body);
        if crc64(&rest) != checksum || !rest.starts_with(MAGIC) {
            return None;
        }
        rest.advance(MAGIC.len());
        if rest.try_get_u8().ok()? != VERSION {
            return None;
        }
        let revision = Revision(rest.try_get_u64_le().ok()?);
        let label = take(&mut rest)?;
        let count = rest.try_get_u64_le().ok()?;
        let mut keys = BTreeMap::new();
        for _ in 0..count {
            let written = Revision(rest.try_get_u64_le().ok()?);
            let key = take(&mut rest)?;
            let value = take(&mut rest)?;
            keys.insert(key, vec![(Revision(0), Some(Versioned { value, revision: written }))]);
        }
        Some(Self { label: Some(label), revision, durable: revision, keys, ..Self::default() })
    }
}

fn take(rest: &mut Bytes) -> Option<Bytes> {
    let length = rest.try_get_u32_le().ok()? as usize;
    (length <= rest.len()).then(|| Bytes::copy_from_slice(&rest.split_to(length)))
}

#[derive(Debug)]
struct MemoryView {
    shared: Arc<Mutex<Map>>,
    revision: Revision,
}

impl Drop for MemoryView {
    fn drop(&mut self) {
        let mut map = self.shared.lock();
        if let Some(count) = map.views.get_mut(&self.revision) {
            *count -= 1;
            if *count == 0 {
                map.views.remove(&self.revision);
                map.prune();
            }
        }
    }
}

impl MemoryView {
    fn seen(&self, versions: &[(Revision, Option<Versioned>)]) -> Option<Versioned> {
        let seen = versions.partition_point(|(at, _)| *at <= self.revision);
        versions[..seen].last()?.1.clone()
    }
}

impl IndexView for MemoryView {
    fn revision(&self) -> Revision {
        self.revision
    }

    fn get(&self, keys: &[&Key]) -> Result<Vec<Option<Versioned>>> {
        let map = self.shared.lock();
        Ok(keys.iter().map(|key| map.keys.get(*key).and_then(|versions| self.seen(versions))).collect())
    }

    fn scan(&self, range: &KeyRange, limit: usize) -> Result<Page> {
        let mut page = Page::default();
        if range.is_empty() {
            return Ok(page);
        }
        let bounds: (Bound<&Key>, Bound<&Key>) = (range.start.as_ref(), range.end.as_ref());
        let map = self.shared.lock();
        let mut bytes = 0;
        for (key, versions) in map.keys.range::<Key, _>(bounds) {
            let Some(value) = self.seen(versions) else { continue };
            bytes += key.len() + value.value.len();
            if page.entries.len() == limit || (bytes > SCAN_BYTES_MAX && !page.entries.is_empty()) {
                page.more = true;
                break;
            }
            page.entries.push((key.clone(), value));
        }
        Ok(page)
    }
}

/// A view of nothing, for a store that was closed.
#[derive(Debug)]
pub(crate) struct ClosedView;

impl IndexView for ClosedView {
    fn revision(&self) -> Revision {
        Revision(0)
    }

    fn get(&self, _: &[&Key]) -> Result<Vec<Option<Versioned>>> {
        Err(Error::unavailable("the directory's store is closed"))
    }

    fn scan(&self, _: &KeyRange, _: usize) -> Result<Page> {
        Err(Error::unavailable("the directory's store is closed"))
    }
}
