//! Random operations with crashes at any point, against a model.

use super::*;
use futures::future::join_all;

/// What must be true of a chunk after the next start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Truth {
    /// Acknowledged: there, bit for bit.
    Kept,
    /// Never sealed, or its removal was acknowledged: not there.
    Gone,
    /// A change failed or was cut off: there bit for bit, or not there.
    Either,
}

#[derive(Debug)]
struct Model {
    rng: SmallRng,
    truths: BTreeMap<ChunkId, Truth>,
    next_index: u32,
}

#[derive(Clone, Debug)]
enum Op {
    Store(ChunkId),
    Remove(Vec<ChunkId>),
    /// Sends a chunk but never seals it.
    Abandon(ChunkId),
    Verify(ChunkId),
    Maintain,
}

impl Model {
    fn new_chunk(&mut self) -> ChunkId {
        self.next_index += 1;
        ChunkId::new(1 + u64::from(self.next_index / 40), self.next_index)
    }

    fn some(&mut self, truths: &[Truth], count: usize) -> Vec<ChunkId> {
        let all: Vec<ChunkId> =
            self.truths.iter().filter(|(_, truth)| truths.contains(truth)).map(|(chunk, _)| *chunk).collect();
        all.choose_multiple(&mut self.rng, count).copied().collect()
    }

    /// Operations on different chunks, to run at the same time.
    fn step(&mut self) -> Vec<Op> {
        let mut ops = Vec::new();
        let mut used: HashSet<ChunkId> = HashSet::new();
        for _ in 0..self.rng.random_range(1..8) {
            let op = match self.rng.random_range(0..22) {
                0..=11 => Op::Store(self.new_chunk()),
                12 => match self.some(&[Truth::Kept, Truth::Gone, Truth::Either], 1).first() {
                    Some(chunk) => Op::Store(*chunk),
                    None => continue,
                },
                13 => Op::Abandon(self.new_chunk()),
                14 => match self.some(&[Truth::Kept], 1).first() {
                    Some(chunk) => Op::Verify(*chunk),
                    None => continue,
                },
                15..=16 => {
                    let count = self.rng.random_range(1..20);
                    Op::Remove(self.some(&[Truth::Kept, Truth::Either], count))
                }
                17..=18 => {
                    // Neighbours, so that segments become empty enough to be compacted.
                    let from = self.some(&[Truth::Kept], 1).pop().unwrap_or_default();
                    let kept = self.truths.range(from..).filter(|(_, truth)| **truth == Truth::Kept);
                    Op::Remove(
                        kept.map(|(chunk, _)| *chunk).take(40).filter(|chunk| chunk.index % 5 > 0).collect(),
                    )
                }
                _ => Op::Maintain,
            };
            let touched: Vec<ChunkId> = match &op {
                Op::Store(chunk) | Op::Abandon(chunk) | Op::Verify(chunk) => vec![*chunk],
                Op::Remove(chunks) => chunks.clone(),
                Op::Maintain => vec![],
            };
            if touched.iter().all(|chunk| !used.contains(chunk)) {
                used.extend(touched);
                ops.push(op);
            }
        }
        ops
    }

    fn learn(&mut self, op: Op, done: bool) {
        match op {
            Op::Store(chunk) => {
                let truth = self.truths.entry(chunk).or_insert(Truth::Gone);
                if done {
                    *truth = Truth::Kept;
                } else if *truth == Truth::Gone {
                    *truth = Truth::Either;
                }
            }
            Op::Remove(chunks) => {
                for chunk in chunks {
                    self.truths.insert(chunk, if done { Truth::Gone } else { Truth::Either });
                }
            }
            Op::Abandon(chunk) => drop(self.truths.insert(chunk, Truth::Gone)),
            Op::Verify(_) | Op::Maintain => {}
        }
    }

    /// Compares a store that was just opened, and settles what was open.
    async fn check(&mut self, store: &DiskChunkStore) {
        let (mut chunks, mut bytes) = (0, 0);
        for (chunk, truth) in &mut self.truths {
            let info = store.info(*chunk);
            match truth {
                Truth::Kept => assert!(info.is_some(), "chunk {chunk} was acknowledged and is lost"),
                Truth::Gone => assert!(info.is_none(), "chunk {chunk} came back"),
                Truth::Either => *truth = if info.is_some() { Truth::Kept } else { Truth::Gone },
            }
            if let Some(info) = info {
                assert!(!info.corrupt, "chunk {chunk} is corrupt after a mere crash");
                assert_eq!(read_all(store, *chunk).await.unwrap(), content(*chunk), "chunk {chunk}");
                assert!(store.verify(*chunk).await.unwrap(), "chunk {chunk}");
                chunks += 1;
                bytes += info.length;
            }
        }
        assert_eq!((store.usage().chunks, store.usage().used_bytes), (chunks, bytes));
        for info in store.list(None, ALL, usize::MAX) {
            assert!(self.truths.contains_key(&info.chunk), "chunk {} was never written", info.chunk);
        }
    }
}

async fn run(store: &DiskChunkStore, op: &Op) -> bool {
    match op {
        Op::Store(chunk) => store_content(store, *chunk).await.is_ok(),
        Op::Remove(chunks) => store.remove(chunks).await.is_ok(),
        Op::Verify(chunk) => store.verify(*chunk).await.is_ok(),
        Op::Maintain => store.maintain().await.is_ok(),
        Op::Abandon(chunk) => {
            let data = content(*chunk);
            if let Ok(mut writer) = store.begin(*chunk, GroupId(1), Some(data.len() as u64)).await {
                let _ =
                    super::super::super::contract::append_all(&mut *writer, *chunk, &data, 32 << 10).await;
            }
            true
        }
    }
}

/// What a disk goes through.
struct Course {
    lives: u32,
    /// Steps of a life, at most.
    steps: u32,
    /// Changes of the disk until the power goes, at most.
    changes: u64,
}

/// One disk through several lives.
async fn live(seed: u64, course: Course) {
    println!("seed {seed}");
    let mut model = Model { rng: SmallRng::seed_from_u64(seed), truths: BTreeMap::new(), next_index: 0 };
    let disk = SimDisk::new(seed, 256 << 20);
    disk.set_write_back_one_in([0, 2, 10][seed as usize % 3]);
    for life in 0..course.lives {
        if model.rng.random_ratio(1, 3) {
            // A lost snapshot must change nothing but the time that the start takes.
            let _ = disk.remove_file(&Path::new(DIR).join(snapshot::SNAPSHOT_NAME)).await;
            disk.sync_dir(Path::new(DIR)).await.ok();
        }
        // Sometimes the power also goes while the store is opened.
        let while_open = model.rng.random_ratio(1, 5);
        if while_open {
            disk.power_off_after(model.rng.random_range(0..30));
        }
        if let Ok((store, report)) = DiskChunkStore::open(Arc::new(disk.clone()), DIR, config()).await {
            assert_eq!(report.damage, vec![], "life {life}");
            if !disk.is_off() {
                model.check(&store).await;
                disk.power_off_after(model.rng.random_range(0..course.changes));
            }
            for _ in 0..model.rng.random_range(1..=course.steps) {
                if disk.is_off() {
                    break;
                }
                // Changes the order in which concurrent operations go on.
                let latency = model.rng.random_range(0..3);
                disk.set_sync_latency(std::time::Duration::from_millis(latency));
                let ops = model.step();
                let done = join_all(ops.iter().map(|op| run(&store, op))).await;
                for (op, done) in ops.into_iter().zip(done) {
                    model.learn(op, done);
                }
            }
            if model.rng.random_ratio(1, 3) {
                let _ = store.close().await;
            }
        } else {
            assert!(while_open, "life {life}");
        }
        settle().await;
        let keep = [CrashKeep::Nothing, CrashKeep::Random, CrashKeep::Everything];
        disk.crash(*keep.choose(&mut model.rng).unwrap());
    }
    let (store, report) = open(&disk).await;
    assert_eq!(report.damage, vec![]);
    model.check(&store).await;
}

#[tokio::test(start_paused = true)]
async fn acknowledged_chunks_survive_many_short_lives_and_removed_ones_stay_away() {
    for seed in 0..20 {
        live(seed, Course { lives: 25, steps: 8, changes: 60 }).await;
    }
}

#[tokio::test(start_paused = true)]
async fn acknowledged_chunks_survive_compaction_and_removed_ones_stay_away() {
    for seed in 100..112 {
        live(seed, Course { lives: 5, steps: 150, changes: 6000 }).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_clean_end_needs_no_scan_and_a_lost_snapshot_only_time() {
    let disk = SimDisk::new(3, 256 << 20);
    let (store, _) = open(&disk).await;
    let chunks: Vec<ChunkId> = (0..300).map(|index| ChunkId::new(1, index)).collect();
    for chunk in &chunks {
        store_content(&store, *chunk).await.unwrap();
    }
    store.close().await.unwrap();
    drop(store);
    settle().await;
    let total: u64 = chunks.iter().map(|chunk| content(*chunk).len() as u64).sum();
    for damaged in [false, true] {
        let copy = disk.clone_disk();
        if damaged {
            copy.flip_bit(&Path::new(DIR).join("index"), 50, 3).unwrap();
        }
        let before = copy.counters().bytes_read;
        let (store, report) = open(&copy).await;
        let read = copy.counters().bytes_read - before;
        assert_eq!((report.used_snapshot, report.chunks, report.damage), (!damaged, 300, vec![]));
        assert_eq!(read > total / 4, damaged, "{read} bytes read of {total}");
        for chunk in &chunks {
            assert_eq!(read_all(&store, *chunk).await.unwrap(), content(*chunk));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn emptied_segments_give_their_room_back() {
    let disk = SimDisk::new(4, 256 << 20);
    let (store, _) = open(&disk).await;
    let data = pattern(1, 4096);
    let chunks: Vec<ChunkId> = (0..2000).map(|index| ChunkId::new(1, index)).collect();
    for some in chunks.chunks(50) {
        for done in join_all(some.iter().map(|chunk| put(&store, *chunk, &data))).await {
            done.unwrap();
        }
    }
    let full = disk.used_bytes();
    assert!(full > 2000 * 4096);
    let (kept, gone): (Vec<ChunkId>, Vec<ChunkId>) = chunks.iter().partition(|chunk| chunk.index % 10 == 0);
    store.remove(&gone).await.unwrap();
    assert!(store.usage().reclaimable_bytes > 1500 * 4096);
    while store.maintain().await.unwrap() {}
    assert!(disk.used_bytes() < full / 3, "{} of {full} bytes are still used", disk.used_bytes());
    // Neither with the snapshot nor without it does anything come back or get lost.
    for lose_snapshot in [false, true] {
        let copy = disk.clone_disk();
        copy.crash(CrashKeep::Nothing);
        if lose_snapshot {
            copy.remove_file(&Path::new(DIR).join("index")).await.unwrap();
        }
        let (store, report) = open(&copy).await;
        assert_eq!((report.used_snapshot, report.damage), (!lose_snapshot, vec![]));
        let held: Vec<ChunkId> = store.list(None, ALL, usize::MAX).iter().map(|info| info.chunk).collect();
        assert_eq!(held, kept);
        for chunk in held {
            assert_eq!(read_all(&store, chunk).await.unwrap(), data);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_directory_left_by_a_process_that_died_is_durable_before_it_is_used() {
    let large = |index| (ChunkId::new(7, index), pattern(u64::from(index), SMALL_BYTES_MAX + 1));
    for changes in 0..40 {
        let disk = SimDisk::new(changes, 64 << 20);
        let (store, _) = open(&disk).await;
        // The process dies at any change of its first large chunk; what it wrote stays in the page cache.
        disk.power_off_after(changes);
        let (chunk, data) = large(1);
        let _ = write(&store, chunk, &data, 64 << 10).await;
        drop(store);
        settle().await;
        disk.crash(CrashKeep::Everything);
        let (store, _) = open(&disk).await;
        let (chunk, data) = large(2);
        write(&store, chunk, &data, 64 << 10).await.unwrap();
        drop(store);
        settle().await;
        disk.crash(CrashKeep::Nothing);
        let (store, _) = open(&disk).await;
        assert!(store.info(chunk).is_some(), "acknowledged and lost, {changes} changes");
        assert_eq!(read_all(&store, chunk).await.unwrap(), data);
    }
}

#[tokio::test(start_paused = true)]
async fn compaction_cut_off_at_any_step_loses_nothing_and_goes_on_after_the_restart() {
    let chunks: Vec<ChunkId> = (0..240).map(|index| ChunkId::new(1, index)).collect();
    let (kept, gone): (Vec<ChunkId>, Vec<ChunkId>) = chunks.iter().partition(|chunk| chunk.index % 6 == 0);
    let data = |chunk: &ChunkId| pattern(u64::from(chunk.index), 4096);
    let check = async |store: &DiskChunkStore, when: &str| {
        let held: Vec<ChunkId> = store.list(None, ALL, usize::MAX).iter().map(|info| info.chunk).collect();
        assert_eq!(held, kept, "{when}");
        for chunk in &kept {
            assert_eq!(read_all(store, *chunk).await.unwrap(), data(chunk), "{when}");
        }
    };
    let mut cuts = 0;
    loop {
        let disk = SimDisk::new(cuts, 64 << 20);
        let (store, _) = open(&disk).await;
        for some in chunks.chunks(40) {
            let puts = some.iter().map(|chunk| {
                let (store, data) = (&store, data(chunk));
                async move { put(store, *chunk, &data).await }
            });
            for done in join_all(puts).await {
                done.unwrap();
            }
        }
        store.remove(&gone).await.unwrap();
        let full = disk.used_bytes();
        disk.power_off_after(cuts);
        while let Ok(true) = store.maintain().await {}
        let was_cut = disk.is_off();
        drop(store);
        settle().await;
        disk.crash([CrashKeep::Nothing, CrashKeep::Random, CrashKeep::Everything][cuts as usize % 3]);

        let (store, report) = open(&disk).await;
        assert_eq!(report.damage, vec![], "cut at change {cuts}");
        check(&store, &format!("cut at change {cuts}")).await;
        while store.maintain().await.unwrap() {}
        assert!(disk.used_bytes() < full / 2, "cut at change {cuts}: {} of {full} left", disk.used_bytes());
        drop(store);
        settle().await;
        disk.crash(CrashKeep::Nothing);
        check(&open(&disk).await.0, &format!("finished after a cut at change {cuts}")).await;
        if !was_cut {
            break;
        }
        cuts += 1;
    }
    assert!(cuts > 10, "only {cuts} places to cut a compaction at");
}
