//! What must not overtake what: moments that random runs seldom meet, made on purpose.

use super::*;
use ::disk::log::Record;

/// Small chunks, and how many of them fill some segments.
async fn fill(store: &DiskChunkStore, grant: u64, count: u32) -> Vec<ChunkId> {
    let chunks: Vec<ChunkId> = (0..count).map(|index| ChunkId::new(grant, index)).collect();
    for chunk in &chunks {
        put(store, *chunk, &pattern(u64::from(chunk.index), 8000)).await.unwrap();
    }
    chunks
}

#[tokio::test(start_paused = true)]
async fn a_late_copy_does_not_bring_a_removed_chunk_back() {
    let disk = SimDisk::new(1, 64 << 20);
    let (store, _) = open(&disk).await;
    let chunk = ChunkId::new(1, 1);
    put(&store, chunk, &pattern(1, 8000)).await.unwrap();
    let Place::Record(position) = store.shared.state.lock().index.get(chunk).unwrap().place else {
        panic!("a small chunk is a record")
    };
    // As a compaction that read the record before the removal and writes its copy after it.
    let record = store.shared.log.read_record(position).await.unwrap();
    store.remove(&[chunk]).await.unwrap();
    let copy = Record { kind: record.kind, tag: record.tag, payload: vec![record.payload] };
    store.shared.log.append_batch(vec![copy]).await.unwrap();
    drop(store);
    settle().await;
    disk.crash(CrashKeep::Nothing);
    let (store, _) = open(&disk).await;
    assert!(store.info(chunk).is_none());
    // Once more without what told the two apart: the copy was marked dead.
    fill(&store, 2, 100).await;
    store.remove(&fill(&store, 3, 100).await).await.unwrap();
    while store.maintain().await.unwrap() {}
    drop(store);
    settle().await;
    disk.remove_file(&Path::new(DIR).join("index")).await.unwrap();
    let (store, _) = open(&disk).await;
    assert!(store.info(chunk).is_none());
    // Stored again it stays, though its removal is still in the log.
    put(&store, chunk, &pattern(1, 8000)).await.unwrap();
    drop(store);
    settle().await;
    disk.crash(CrashKeep::Nothing);
    let (store, _) = open(&disk).await;
    assert_eq!(read_all(&store, chunk).await.unwrap(), pattern(1, 8000));
}

#[tokio::test(start_paused = true)]
async fn an_unfinished_change_holds_snapshots_and_segments_back() {
    let disk = SimDisk::new(2, 64 << 20);
    let (store, _) = open(&disk).await;
    fill(&store, 1, 10).await;
    let floor = store.shared.floor();
    let held_back = store.shared.settled();
    let gone = fill(&store, 2, 200).await;
    store.remove(&gone).await.unwrap();
    assert_eq!(store.shared.settled(), held_back);
    for _ in 0..10 {
        store.maintain().await.unwrap();
    }
    let segments = |store: &DiskChunkStore| {
        let segments = store.shared.log.segments();
        segments.iter().filter(|segment| segment.number >= held_back.segment).count()
    };
    assert!(segments(&store) > 4, "segments behind the floor stay");
    // A start in between replays everything from there on.
    let copy = disk.clone_disk();
    copy.crash(CrashKeep::Nothing);
    let (other, report) = open(&copy).await;
    assert!(report.used_snapshot);
    assert_eq!(other.usage().chunks, 10);
    drop(floor);
    assert!(store.shared.settled() > held_back);
    while store.maintain().await.unwrap() {}
    assert!(segments(&store) <= 2);
}

#[tokio::test(start_paused = true)]
async fn a_removal_is_unsettled_until_its_records_are_dead() {
    let disk = SimDisk::new(3, 64 << 20);
    let (store, _) = open(&disk).await;
    let chunks = fill(&store, 1, 20).await;
    let before = store.shared.settled();
    disk.set_sync_latency(std::time::Duration::from_millis(10));
    let removal = tokio::spawn({
        let (store, chunks) = (store.clone(), chunks.clone());
        async move { store.remove(&chunks).await }
    });
    while store.info(chunks[0]).is_some() {
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    assert!(!removal.is_finished());
    assert_eq!(store.shared.settled(), before, "a snapshot now would forget who is to be marked dead");
    let mut snapshot = store.shared.snapshot.lock().await;
    store.shared.write_snapshot(&mut snapshot).await.unwrap();
    drop(snapshot);
    removal.await.unwrap().unwrap();
    assert!(store.shared.settled() > before);
}

#[tokio::test(start_paused = true)]
async fn a_caller_who_goes_away_leaves_nothing_half_done() {
    let disk = SimDisk::new(4, 64 << 20);
    let (store, _) = open(&disk).await;
    for (index, len) in [(0, 8000), (1, 200_000)] {
        disk.set_sync_latency(std::time::Duration::from_millis(10));
        let chunk = ChunkId::new(1, index);
        let data = pattern(5, len);
        let wait = std::time::Duration::from_millis(5);
        assert!(tokio::time::timeout(wait, put(&store, chunk, &data)).await.is_err());
        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
        assert_eq!(read_all(&store, chunk).await.unwrap(), data);
        assert!(tokio::time::timeout(wait, store.remove(&[chunk])).await.is_err());
        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
        assert!(store.info(chunk).is_none());
        // A writer that is dropped leaves no file.
        disk.set_sync_latency(std::time::Duration::ZERO);
        let mut writer = store.begin(chunk, GroupId(1), Some(len as u64)).await.unwrap();
        super::super::super::contract::append_all(&mut *writer, chunk, &data, 64 << 10).await.unwrap();
        drop(writer);
        settle().await;
        let files = all_files(&disk, &Path::new(DIR).join("files")).await;
        assert_eq!(files, vec![], "{len}");
    }
}
