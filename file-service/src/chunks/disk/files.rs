//! Large chunks: a file each. The layout is drawn in [`super`].

use super::format::{
    ChunkHeader, Decoded, HEADER_BYTES, block_count, decode_table, encode_table, file_bytes, table_bytes,
    table_checksum,
};
use bytes::{Bytes, BytesMut};
use cairn_proto::{checksum::verify_blocks, id::ChunkId, limits::BLOCK_BYTES, limits::DATA_BYTES_MAX};
use disk::{Disk, DiskFile, Open};
use parking_lot::Mutex;
use std::{
    collections::{HashMap, HashSet},
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
};

/// Directories that the files are spread over. Chunks of one grant share one, so that concurrent seals of one writer
/// share the sync of its directory.
const SHARDS: u64 = 256;
/// Open handles; beyond it the one that was used least recently is closed.
const HANDLES_MAX: usize = 256;
/// Bytes after which the device is told to start writing, so that the seal's sync has little left to do.
const WRITE_BACK_BYTES: u64 = 2 << 20;

const SEALED_SUFFIX: &str = ".chunk";
const UNSEALED_SUFFIX: &str = ".part";

/// The directory of large chunks.
#[derive(Debug)]
pub(super) struct Files {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    shards: Vec<Shard>,
    handles: Mutex<Handles>,
    next_part: AtomicU64,
    next_number: AtomicU32,
}

#[derive(Debug, Default)]
struct Shard {
    made: AtomicBool,
    /// Changes of names that ask to become durable.
    asked: AtomicU64,
    /// Those that are.
    done: tokio::sync::Mutex<u64>,
}

#[derive(Debug, Default)]
struct Handles {
    open: HashMap<(ChunkId, u32), (Arc<dyn DiskFile>, u64)>,
    clock: u64,
}

/// A sealed file as found by its name.
#[derive(Debug)]
pub(super) struct FoundFile {
    pub(super) chunk: ChunkId,
    pub(super) len: u64,
}

impl Files {
    pub(super) fn new(disk: Arc<dyn Disk>, dir: PathBuf) -> Self {
        let shards = (0..SHARDS).map(|_| Shard::default()).collect();
        let (next_part, next_number) = (AtomicU64::new(1), AtomicU32::new(1));
        Self { disk, dir, shards, handles: Mutex::default(), next_part, next_number }
    }

    /// A number that tells a file from all others that this process knows under the same name.
    pub(super) fn next_number(&self) -> u32 {
        self.next_number.fetch_add(1, Ordering::Relaxed)
    }

    fn shard(chunk: ChunkId) -> usize {
        (chunk.grant.0 % SHARDS) as usize
    }

    fn shard_dir(&self, shard: usize) -> PathBuf {
        self.dir.join(format!("{shard:02x}"))
    }

    fn path(&self, chunk: ChunkId) -> PathBuf {
        let name = format!("{:016x}-{:08x}{SEALED_SUFFIX}", chunk.grant.0, chunk.index);
        self.shard_dir(Self::shard(chunk)).join(name)
    }

    /// Finds all sealed files and removes the unsealed ones. Names of shards, and of a shard's files before they are
    /// told, become durable: a process that died may have left some that a power loss could still take.
    pub(super) async fn find(&self) -> io::Result<Vec<FoundFile>> {
        self.disk.create_dir_all(&self.dir).await?;
        self.disk.sync_dir(&self.dir).await?;
        let mut found = Vec::new();
        for entry in self.disk.list(&self.dir).await? {
            let Ok(shard) = usize::from_str_radix(&entry.name, 16) else { continue };
            if !entry.is_dir || shard >= self.shards.len() || entry.name.len() != 2 {
                continue;
            }
            self.shards[shard].made.store(true, Ordering::Relaxed);
            let dir = self.shard_dir(shard);
            for entry in self.disk.list(&dir).await? {
                if entry.is_dir {
                    continue;
                }
                if entry.name.ends_with(UNSEALED_SUFFIX) {
                    self.disk.remove_file(&dir.join(&entry.name)).await?;
                } else if let Some(chunk) = parse_name(&entry.name).filter(|id| Self::shard(*id) == shard) {
                    found.push(FoundFile { chunk, len: entry.len });
                } else {
                    let path = dir.join(&entry.name);
                    tracing::warn!(path = %path.display(), "a file that is no chunk is left alone");
                }
            }
            self.disk.sync_dir(&dir).await?;
        }
        Ok(found)
    }

    /// Begins a file for a chunk, with room for `reserve` bytes of data.
    pub(super) async fn create(
        self: &Arc<Self>,
        chunk: ChunkId,
        reserve: Option<u32>,
    ) -> io::Result<PartFile> {
        let shard = Self::shard(chunk);
        let dir = self.shard_dir(shard);
        if !self.shards[shard].made.load(Ordering::Acquire) {
            self.disk.create_dir_all(&dir).await?;
            self.shards[shard].made.store(true, Ordering::Release);
        }
        let number = self.next_part.fetch_add(1, Ordering::Relaxed);
        let name = format!("{:016x}-{:08x}.{number}{UNSEALED_SUFFIX}", chunk.grant.0, chunk.index);
        let path = dir.join(name);
        let file = self.disk.open(&path, Open::Create).await?;
        let reserved = reserve.map_or(0, file_bytes);
        // From here on dropping it removes it.
        let part =
            PartFile { files: self.clone(), chunk, file, path, reserved, written: 0, started: 0, left: true };
        if reserved > 0 {
            part.file.allocate(0, reserved).await?;
        }
        Ok(part)
    }

    /// Makes all changes of names in a chunk's directory durable. Calls at the same time share the work.
    async fn sync_names(&self, chunk: ChunkId) -> io::Result<()> {
        let number = Self::shard(chunk);
        let shard = &self.shards[number];
        let mine = shard.asked.fetch_add(1, Ordering::AcqRel) + 1;
        let mut done = shard.done.lock().await;
        if *done >= mine {
            return Ok(());
        }
        // Everything that was asked for until now was changed before the sync begins.
        let covered = shard.asked.load(Ordering::Acquire);
        self.disk.sync_dir(&self.shard_dir(number)).await?;
        *done = covered;
        Ok(())
    }

    /// Removes files, durably. Missing ones are fine.
    pub(super) async fn remove(&self, chunks: &[ChunkId]) -> io::Result<()> {
        let mut touched = HashMap::new();
        for chunk in chunks {
            match self.disk.remove_file(&self.path(*chunk)).await {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            touched.insert(Self::shard(*chunk), *chunk);
        }
        if !chunks.is_empty() {
            // An open handle would keep the bytes on the disk.
            let gone: HashSet<ChunkId> = chunks.iter().copied().collect();
            self.handles.lock().open.retain(|(chunk, _), _| !gone.contains(chunk));
        }
        for chunk in touched.into_values() {
            match self.sync_names(chunk).await {
                // No directory, no files.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                synced => synced?,
            }
        }
        Ok(())
    }

    async fn handle(&self, chunk: ChunkId, number: u32) -> io::Result<Arc<dyn DiskFile>> {
        {
            let mut handles = self.handles.lock();
            handles.clock += 1;
            let clock = handles.clock;
            if let Some((file, used)) = handles.open.get_mut(&(chunk, number)) {
                *used = clock;
                return Ok(file.clone());
            }
        }
        let file = self.disk.open(&self.path(chunk), Open::Read).await?;
        let mut handles = self.handles.lock();
        if handles.open.len() >= HANDLES_MAX {
            let oldest = handles.open.iter().min_by_key(|(_, (_, used))| *used).map(|(key, _)| *key);
            oldest.map(|key| handles.open.remove(&key));
        }
        let clock = handles.clock;
        handles.open.insert((chunk, number), (file.clone(), clock));
        Ok(file)
    }

    /// Bytes and block checksums of a range of whole blocks, unchecked. Fewer bytes if the file is too short.
    pub(super) async fn read(
        &self,
        chunk: ChunkId,
        number: u32,
        length: u32,
        offset: u64,
        len: usize,
    ) -> io::Result<(Bytes, Vec<u64>)> {
        let file = self.handle(chunk, number).await?;
        let data = file.read_at(offset, len).await?;
        let table_at = u64::from(length) + offset / BLOCK_BYTES as u64 * 8;
        let table = file.read_at(table_at, len.div_ceil(BLOCK_BYTES) * 8).await?;
        Ok((data, decode_table(&table)))
    }

    /// What the end of a file says about it; `None` if it is damaged.
    pub(super) async fn header(&self, chunk: ChunkId) -> io::Result<Option<ChunkHeader>> {
        let file = self.disk.open(&self.path(chunk), Open::Read).await?;
        self.header_of(&*file, chunk).await
    }

    async fn header_of(&self, file: &dyn DiskFile, chunk: ChunkId) -> io::Result<Option<ChunkHeader>> {
        let len = file.len().await?;
        let Some(at) = len.checked_sub(HEADER_BYTES as u64) else { return Ok(None) };
        match ChunkHeader::decode(&file.read_at(at, HEADER_BYTES).await?) {
            Decoded::Header(header) => {
                let fits = header.chunk == chunk && file_bytes(header.length) == len;
                Ok(fits.then_some(header))
            }
            Decoded::Newer(version) => Err(newer(&self.path(chunk), version)),
            Decoded::Bad => Ok(None),
        }
    }

    /// Reads a whole file and compares everything in it; its header if all is well.
    pub(super) async fn verify(&self, chunk: ChunkId, number: u32) -> io::Result<Option<ChunkHeader>> {
        let file = self.handle(chunk, number).await?;
        let Some(header) = self.header_of(&*file, chunk).await? else { return Ok(None) };
        let table = file.read_at(u64::from(header.length), table_bytes(header.length)).await?;
        let blocks = decode_table(&table);
        if blocks.len() != block_count(header.length) || table_checksum(&blocks) != header.table_checksum {
            return Ok(None);
        }
        let mut sum = cairn_proto::checksum::ChunkChecksum::default();
        let mut at = 0;
        while at < u64::from(header.length) {
            let len = (u64::from(header.length) - at).min(DATA_BYTES_MAX as u64) as usize;
            let data = file.read_at(at, len).await?;
            let first = (at / BLOCK_BYTES as u64) as usize;
            let of_data = &blocks[first..first + len.div_ceil(BLOCK_BYTES)];
            if data.len() < len || verify_blocks(chunk, first as u32, &data, of_data).is_some() {
                return Ok(None);
            }
            sum.update(&data);
            at += len as u64;
        }
        Ok((sum.value() == header.checksum).then_some(header))
    }
}

pub(super) fn newer(path: &Path, version: u16) -> io::Error {
    let why = format!("{}: chunk format version {version} is not known to this program", path.display());
    io::Error::new(io::ErrorKind::Unsupported, why)
}

fn parse_name(name: &str) -> Option<ChunkId> {
    let (grant, index) = name.strip_suffix(SEALED_SUFFIX)?.split_once('-')?;
    if grant.len() != 16 || index.len() != 8 {
        return None;
    }
    Some(ChunkId::new(u64::from_str_radix(grant, 16).ok()?, u32::from_str_radix(index, 16).ok()?))
}

/// A file that is being written. Dropping it removes it.
#[derive(Debug)]
pub(super) struct PartFile {
    files: Arc<Files>,
    chunk: ChunkId,
    file: Arc<dyn DiskFile>,
    path: PathBuf,
    /// Length that the file was given in advance.
    reserved: u64,
    written: u64,
    /// Bytes that the device was told to write.
    started: u64,
    /// The file has its unsealed name still.
    left: bool,
}

impl PartFile {
    pub(super) async fn append(&mut self, data: Vec<Bytes>) -> io::Result<()> {
        let len: usize = data.iter().map(Bytes::len).sum();
        self.file.write_at(self.written, data).await?;
        self.written += len as u64;
        if self.written - self.started >= WRITE_BACK_BYTES {
            self.file.write_back(self.started, self.written - self.started).await?;
            self.started = self.written;
        }
        Ok(())
    }

    /// What was written, for a chunk that turned out small.
    pub(super) async fn read_back(&self) -> io::Result<Bytes> {
        self.file.read_at(0, self.written as usize).await
    }

    /// Makes the file complete and durable and gives it its name. An error before that leaves nothing; a failed sync
    /// of the name leaves a file that the next start may find.
    pub(super) async fn seal(mut self, header: &ChunkHeader, blocks: &[u64]) -> io::Result<()> {
        let mut end = BytesMut::with_capacity(blocks.len() * 8 + HEADER_BYTES);
        encode_table(blocks, &mut end);
        header.encode(&mut end);
        self.file.write_at(self.written, vec![end.freeze()]).await?;
        let len = file_bytes(header.length);
        if self.reserved > len {
            self.file.set_len(len).await?;
        }
        // The name comes last: a file with a chunk's name is complete, whenever the power fails.
        self.file.sync().await?;
        self.files.disk.rename(&self.path, &self.files.path(self.chunk)).await?;
        self.left = false;
        self.files.sync_names(self.chunk).await
    }
}

impl Drop for PartFile {
    fn drop(&mut self) {
        if !self.left {
            return;
        }
        // Without a runtime nobody would drive it; the next start removes the file then.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let (files, path) = (self.files.clone(), std::mem::take(&mut self.path));
        runtime.spawn(async move {
            if let Err(error) = files.disk.remove_file(&path).await {
                tracing::warn!(%error, "an unsealed chunk is left until the next start");
            }
        });
    }
}
