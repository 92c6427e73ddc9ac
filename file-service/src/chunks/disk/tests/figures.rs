//! Figures of a store on the machine's disk. Run by hand:
//! `cargo test --release -p file-service --lib figures -- --ignored --nocapture`.

use super::*;
use std::time::Instant;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "measures; run by hand"]
async fn figures() {
    let dir = tempfile::tempdir().unwrap();
    let disk = ::disk::RealDisk::open(dir.path()).unwrap();
    let config = DiskConfig { reserve_bytes: 0, ..DiskConfig::new("figures") };
    let open = || DiskChunkStore::open(disk.clone(), DIR, config.clone());
    let (store, _) = open().await.unwrap();
    let small = pattern(1, 4096);
    for (grant, tasks, each) in [(1, 1u32, 200u32), (2, 16, 200), (3, 64, 200), (4, 64, 1500)] {
        let start = Instant::now();
        let mut set = tokio::task::JoinSet::new();
        for task in 0..tasks {
            let (store, small) = (store.clone(), small.clone());
            set.spawn(async move {
                for index in 0..each {
                    let chunk = ChunkId::new(grant, task * each + index);
                    put(&store, chunk, &small).await.unwrap();
                }
            });
        }
        while let Some(done) = set.join_next().await {
            done.unwrap();
        }
        let rate = f64::from(tasks * each) / start.elapsed().as_secs_f64();
        println!("4 KiB puts, {tasks} tasks: {rate:.0} a second");
    }
    let data = pattern(1, 8 << 20);
    for tasks in [1u32, 4] {
        let start = Instant::now();
        let mut set = tokio::task::JoinSet::new();
        for task in 0..tasks {
            let (store, data) = (store.clone(), data.clone());
            set.spawn(async move {
                for index in 0..16 / tasks {
                    let chunk = ChunkId::new(1000 + u64::from(tasks), task * 100 + index);
                    write(&store, chunk, &data, 1 << 20).await.unwrap();
                }
            });
        }
        while let Some(done) = set.join_next().await {
            done.unwrap();
        }
        let rate = (16.0 * 8.0) / start.elapsed().as_secs_f64();
        println!("8 MiB seals, {tasks} tasks: {rate:.0} MiB a second");
    }
    let start = Instant::now();
    for index in 0..16 {
        read_all(&store, ChunkId::new(1001, index)).await.unwrap();
    }
    println!("8 MiB reads: {:.0} MiB a second", 128.0 / start.elapsed().as_secs_f64());
    let chunks = store.usage().chunks;
    store.close().await.unwrap();
    drop(store);
    for lose_snapshot in [false, true] {
        if lose_snapshot {
            disk.remove_file(&Path::new(DIR).join("index")).await.unwrap();
        }
        let start = Instant::now();
        let (store, report) = open().await.unwrap();
        let ms = start.elapsed().as_millis();
        println!("open with {chunks} chunks, snapshot {}: {ms} ms", report.used_snapshot);
        assert_eq!((report.chunks, report.used_snapshot), (chunks, !lose_snapshot));
        store.close().await.unwrap();
    }
}
