//! Tests of what only a store on a disk has: crashes, rot, hostile bytes, full disks, failed syncs.

use super::super::contract::{pattern, put, read_all, write};
use super::index::Place;
use super::*;
use ::disk::{CrashKeep, Disk, Open, SimDisk};
use rand::{Rng, SeedableRng, rngs::SmallRng, seq::IndexedRandom};
use std::{
    collections::{BTreeMap, HashSet},
    path::{Path, PathBuf},
};

mod crash;
mod faults;
mod figures;
mod hostile;
mod order;

const DIR: &str = "chunks";
const ALL: RangeInclusive<GrantId> = GrantId(0)..=GrantId(u64::MAX);

fn config() -> DiskConfig {
    DiskConfig {
        segment_bytes: 256 << 10,
        reserve_bytes: 0,
        snapshot_after_bytes: 100 << 10,
        ..DiskConfig::new("test data")
    }
}

async fn open(disk: &SimDisk) -> (DiskChunkStore, OpenReport) {
    DiskChunkStore::open(Arc::new(disk.clone()), DIR, config()).await.unwrap()
}

/// The one content that a chunk of this id has in these tests; one in eight is large.
fn content(chunk: ChunkId) -> Bytes {
    let seed = chunk.grant.0 * 1_000_003 + u64::from(chunk.index) * 7919 + 1;
    let mut rng = SmallRng::seed_from_u64(seed);
    let len = match rng.random_range(0..8) {
        0 => rng.random_range(SMALL_BYTES_MAX + 1..200_000),
        1 => rng.random_range(20_000..=SMALL_BYTES_MAX),
        _ => rng.random_range(1..9000),
    };
    pattern(seed, len)
}

async fn store_content(store: &DiskChunkStore, chunk: ChunkId) -> Result<ChunkInfo> {
    let data = content(chunk);
    if chunk.index.is_multiple_of(3) {
        write(store, chunk, &data, 64 << 10).await
    } else {
        put(store, chunk, &data).await
    }
}

/// Lets tasks that nobody waits for come to their end.
async fn settle() {
    for _ in 0..200 {
        tokio::task::yield_now().await;
    }
}

async fn all_files(disk: &SimDisk, dir: &Path) -> Vec<(PathBuf, u64)> {
    let mut files = Vec::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in disk.list(&dir).await.unwrap() {
            let path = dir.join(&entry.name);
            if entry.is_dir { dirs.push(path) } else { files.push((path, entry.len)) }
        }
    }
    files
}
