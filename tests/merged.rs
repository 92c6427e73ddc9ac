//! WHOLE and HEALED: a file that many small writes left in crumbs is merged beside its writer and its readers. Bytes and
//! versions are as the writer made them at every moment, and the crumbs leave the disks.

use cairn_tests::{copies::Copies, eventually::eventually, healthy, seed};
use client_lib::Client;
use cluster::Cluster;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

const PATH: &str = "/fragmented";
/// What one write changes, and a part of the file is.
const BLOCK: usize = 4_096;
const BLOCKS: usize = 128;
/// Small writes, each a version.
const WRITES: u64 = 200;
const LIMIT: Duration = Duration::from_secs(120);

/// Which blocks each write changed, in order: the first wrote all of them.
struct Script(Vec<BTreeSet<usize>>);

impl Script {
    fn new(seed: u64) -> Self {
        let mut dice = StdRng::seed_from_u64(seed);
        let mut writes = vec![(0..BLOCKS).collect()];
        for _ in 0..WRITES {
            let first = dice.random_range(0..BLOCKS);
            let count = if dice.random_bool(0.1) { dice.random_range(2..6) } else { 1 };
            writes.push((first..(first + count).min(BLOCKS)).collect());
        }
        Self(writes)
    }

    /// The bytes of a block that a write made.
    fn block(block: usize, write: u64) -> Vec<u8> {
        let mut bytes = vec![(write as u8).wrapping_mul(31).wrapping_add(block as u8); BLOCK];
        bytes[..8].copy_from_slice(&write.to_le_bytes());
        bytes
    }

    /// The whole file after a write.
    fn after(&self, write: u64) -> Vec<u8> {
        let mut last = vec![0; BLOCKS];
        for (number, blocks) in self.0.iter().enumerate().take(write as usize + 1) {
            blocks.iter().for_each(|block| last[*block] = number as u64);
        }
        last.into_iter().enumerate().flat_map(|(block, write)| Self::block(block, write)).collect()
    }

    /// The write after which the file is as it was read; every write left its number.
    fn version_of(&self, read: &[u8]) -> u64 {
        assert_eq!(read.len(), BLOCKS * BLOCK);
        let stamp = |block: &[u8]| u64::from_le_bytes(block[..8].try_into().unwrap());
        let last = read.chunks(BLOCK).map(stamp).max().unwrap();
        assert!(read == self.after(last), "not the version of write {last}, nor any other");
        last
    }
}

/// Makes all writes, some of them through a handle that goes on to the next. Amid them it waits once for a merge: one that
/// meets a write on its way is given up, and a quick writer leaves no time for another.
async fn write_all(client: Client, script: Arc<Script>, written: Arc<AtomicU64>) {
    let mut write = 1;
    let mut waited = false;
    while write <= WRITES {
        let mut file = client.open_options().read(true).write(true).open(PATH).await.unwrap();
        for _ in 0..(1 + write % 7) {
            if write > WRITES {
                break;
            }
            for block in &script.0[write as usize] {
                file.write_at((block * BLOCK) as u64, Script::block(*block, write)).await.unwrap();
            }
            file.commit().await.unwrap();
            written.store(write, Ordering::SeqCst);
            write += 1;
        }
        file.close().await.unwrap();
        if !waited && write > WRITES / 2 {
            waited = true;
            eventually("a merge between two writes", LIMIT, || async {
                let extents = client.status().await.unwrap().extents.unwrap_or_default();
                if extents.merges > 0 { Ok(()) } else { Err(format!("{extents:?}")) }
            })
            .await;
        }
    }
}

/// Reads the newest version again and again; answers how often.
async fn read_newest(
    client: Client,
    script: Arc<Script>,
    written: Arc<AtomicU64>,
    done: Arc<AtomicBool>,
) -> u64 {
    let (mut reads, mut last) = (0, 0);
    while !done.load(Ordering::SeqCst) {
        let acknowledged = written.load(Ordering::SeqCst);
        let read = script.version_of(&client.read(PATH).await.unwrap());
        assert!(read >= acknowledged.max(last), "write {read} was read after write {acknowledged} or {last}");
        last = read;
        reads += 1;
    }
    reads
}

/// Opens a version and reads it in pieces for longer than a merge takes; answers how many versions.
async fn read_opened(client: Client, script: Arc<Script>, done: Arc<AtomicBool>, seed: u64) -> u64 {
    let (mut dice, mut versions) = (StdRng::seed_from_u64(seed), 0);
    while !done.load(Ordering::SeqCst) {
        let mut file = client.open(PATH).await.unwrap();
        let opened = file.read_at(0, BLOCKS * BLOCK).await.unwrap();
        script.version_of(&opened);
        for _ in 0..50 {
            let at = dice.random_range(0..opened.len());
            let length = dice.random_range(1..3 * BLOCK).min(opened.len() - at);
            let piece = file.read_at(at as u64, length).await.unwrap();
            assert!(piece == opened[at..at + length], "{length} bytes at {at} of an opened version changed");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        file.close().await.unwrap();
        versions += 1;
    }
    versions
}

/// Chunks that a file is made of.
async fn chunks_of(client: &Client) -> u64 {
    let explained = client.explain(PATH).await.unwrap();
    let chunks = explained.chunks.iter().filter_map(|chunk| chunk.extent?.chunk?.chunk);
    chunks.map(|chunk| (chunk.grant_id, chunk.index)).collect::<BTreeSet<_>>().len() as u64
}

#[tokio::test(flavor = "multi_thread")]
async fn whole_versions_of_a_file_that_is_merged_beside_its_writer_and_readers() {
    let seed = seed("MERGE_SEED");
    let cluster = Cluster::builder()
        .file_servers(3)
        .memory(true)
        .seed(seed)
        .directory_config(|config| {
            config.timing.grace_ms = 500;
            config.timing.compare_interval_ms = 1_000;
            config.timing.background_interval_ms = 50;
            // What a merge that was given up left is garbage once its grant is closed.
            config.timing.grant_age_ms_max = 4_000;
            config.effort.merge_delay_ms = 50;
        })
        .build_and_start()
        .await
        .unwrap();
    let client = cluster.client().await.unwrap();
    let script = Arc::new(Script::new(seed));
    client.write(PATH, script.after(0)).await.unwrap();

    let (written, done) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let writer = tokio::spawn(write_all(client.clone(), script.clone(), written.clone()));
    let newest = tokio::spawn(read_newest(
        cluster.client().await.unwrap(),
        script.clone(),
        written.clone(),
        done.clone(),
    ));
    let opened =
        tokio::spawn(read_opened(cluster.client().await.unwrap(), script.clone(), done.clone(), seed));
    writer.await.unwrap();
    let beside = cluster.status().await.unwrap().extents.unwrap_or_default();
    assert!(beside.merges > 0, "merged while it was written: {beside:?}");
    // The last crumbs are merged while it is only read.
    eventually("the file is in few pieces", LIMIT, || async {
        let chunks = chunks_of(&client).await;
        if chunks < BLOCKS as u64 / 4 { Ok(()) } else { Err(format!("{chunks} chunks")) }
    })
    .await;
    done.store(true, Ordering::SeqCst);
    let (reads, versions) = (newest.await.unwrap(), opened.await.unwrap());
    let after = cluster.status().await.unwrap().extents.unwrap_or_default();
    println!(
        "{} merges of {} extents beside {WRITES} writes, {} in all, {} given up; {reads} reads of the newest version, \
         {versions} opened ones read in pieces",
        beside.merges, beside.extents_merged, after.merges, after.given_up
    );
    assert!(reads > 5 && versions > 0, "readers that read nothing show nothing: {reads}, {versions}");
    assert_eq!(script.version_of(&client.read(PATH).await.unwrap()), WRITES);

    // Each server is rid of what the file is no longer made of.
    healthy(&cluster, LIMIT).await;
    for server in 0..cluster.file_servers() {
        let copies = Copies::at(&cluster.file_server_uri(server));
        eventually("the crumbs are collected", LIMIT, || async {
            let (held, made_of) = (copies.list().await?.len() as u64, chunks_of(&client).await);
            if held == made_of { Ok(()) } else { Err(format!("{held} chunks held, {made_of} are the file")) }
        })
        .await;
    }
    assert_eq!(script.version_of(&client.read(PATH).await.unwrap()), WRITES);
    cluster.shutdown().await.unwrap();
}
