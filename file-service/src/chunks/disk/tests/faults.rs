//! Rot, hostile bytes, full disks, failed syncs.

use super::*;

/// A closed store with some chunks of all kinds, and what became of them.
async fn closed_store(seed: u64) -> (SimDisk, Vec<ChunkId>, BTreeMap<ChunkId, Place>) {
    let disk = SimDisk::new(seed, 256 << 20);
    let (store, _) = open(&disk).await;
    let chunks: Vec<ChunkId> = (0..40).map(|index| ChunkId::new(1 + u64::from(index % 3), index)).collect();
    for chunk in &chunks {
        store_content(&store, *chunk).await.unwrap();
    }
    store.remove(&chunks[30..]).await.unwrap();
    let places = chunks[..30].iter().map(|chunk| {
        let held = store.shared.state.lock().index.get(*chunk).unwrap();
        (*chunk, held.place)
    });
    let places = places.collect();
    store.close().await.unwrap();
    drop(store);
    settle().await;
    (disk, chunks[..30].to_vec(), places)
}

/// Where a chunk's bytes are: a file, and the first and last byte behind it in it.
fn extent(chunk: ChunkId, place: Place) -> (PathBuf, u64, u64) {
    let bytes = format::payload_bytes(content(chunk).len() as u32) as u64;
    match place {
        Place::Record(at) => {
            let start = u64::from(at.offset) + index::RECORD_OVERHEAD_BYTES;
            (Path::new(DIR).join(format!("segments/{:08x}.seg", at.segment)), start, start + bytes)
        }
        Place::File(_) => {
            let name = format!("{:02x}/{:016x}-{:08x}.chunk", chunk.grant.0, chunk.grant.0, chunk.index);
            (Path::new(DIR).join("files").join(name), 0, bytes)
        }
    }
}

/// No damage may make a store serve anything but what was written.
async fn serves_only_the_truth(store: &DiskChunkStore, chunks: &[ChunkId], context: &str) {
    for chunk in chunks {
        let good = match store.verify(*chunk).await {
            Ok(good) => good,
            Err(error) => {
                assert_eq!(error.reason, Reason::ChunkNotFound, "{context}: {error}");
                continue;
            }
        };
        match read_all(store, *chunk).await {
            Ok(data) => assert_eq!(data, content(*chunk), "{context}: chunk {chunk}"),
            Err(error) => {
                assert!(!good, "{context}: chunk {chunk} was verified and is not readable");
                assert_eq!(error.reason, Reason::ChecksumMismatch, "{context}: {error}");
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn every_flipped_bit_of_a_chunk_is_noticed() {
    let (disk, chunks, places) = closed_store(11).await;
    let seed = 12;
    println!("seed {seed}");
    let mut rng = SmallRng::seed_from_u64(seed);
    for round in 0..80 {
        let chunk = *chunks.choose(&mut rng).unwrap();
        let (path, start, end) = extent(chunk, places[&chunk]);
        let offset = rng.random_range(start..end);
        let copy = disk.clone_disk();
        copy.flip_bit(&path, offset, rng.random_range(0..8)).unwrap();
        if round % 2 == 1 {
            copy.remove_file(&Path::new(DIR).join("index")).await.unwrap();
        }
        let (store, report) = open(&copy).await;
        let context = format!("round {round}, chunk {chunk}, byte {} of {}", offset - start, end - start);
        match store.info(chunk) {
            // Without a snapshot a record whose chunk header is bad has lost its name; it was reported.
            None => assert!(!report.damage.is_empty(), "{context}"),
            Some(_) => assert!(!store.verify(chunk).await.unwrap(), "{context}"),
        }
        serves_only_the_truth(&store, &chunks, &context).await;
        for other in chunks.iter().filter(|other| **other != chunk) {
            assert!(store.verify(*other).await.unwrap(), "{context}: {other} must not suffer");
        }
        // A good copy takes the bad one's place, for good.
        assert!(!store_content(&store, chunk).await.unwrap().corrupt, "{context}");
        assert!(store.verify(chunk).await.unwrap(), "{context}");
        drop(store);
        settle().await;
        copy.crash(CrashKeep::Nothing);
        let _ = copy.remove_file(&Path::new(DIR).join("index")).await;
        let (store, _) = open(&copy).await;
        assert!(store.verify(chunk).await.unwrap(), "{context}");
        assert_eq!(store.usage().chunks, 30, "{context}");
        // And can be removed: nothing bad stays behind that a start would find.
        store.remove(&[chunk]).await.unwrap();
        drop(store);
        settle().await;
        let (store, _) = open(&copy).await;
        assert!(store.info(chunk).is_none(), "{context}");
    }
}

#[tokio::test(start_paused = true)]
async fn no_flipped_bit_anywhere_is_served() {
    let (disk, chunks, _) = closed_store(21).await;
    let files = all_files(&disk, Path::new(DIR)).await;
    let seed = 22;
    println!("seed {seed}");
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut flips = 0;
    while flips < 120 {
        let (path, len) = files.choose(&mut rng).unwrap();
        // Most of a segment is not used yet; its start is.
        let len = if rng.random() { *len } else { (*len).min(20_000) };
        let (offset, bit) = (rng.random_range(0..len), rng.random_range(0..8));
        let copy = disk.clone_disk();
        if copy.flip_bit(path, offset, bit).is_err() {
            continue;
        }
        flips += 1;
        let (store, _) = open(&copy).await;
        serves_only_the_truth(&store, &chunks, &format!("{} at {offset}", path.display())).await;
    }
}

#[tokio::test(start_paused = true)]
async fn hostile_bytes_do_no_harm() {
    let (disk, chunks, _) = closed_store(31).await;
    let files = all_files(&disk, Path::new(DIR)).await;
    let seed = 32;
    println!("seed {seed}");
    let mut rng = SmallRng::seed_from_u64(seed);
    for round in 0..80 {
        let copy = disk.clone_disk();
        for _ in 0..rng.random_range(1..4) {
            let (path, len) = files.choose(&mut rng).unwrap();
            // It may have been removed just before.
            let Ok(file) = copy.open(path, Open::ReadWrite).await else { continue };
            let at = rng.random_range(0..*len);
            match rng.random_range(0..4) {
                0 => file.set_len(at).await.unwrap(),
                1 => copy.remove_file(path).await.unwrap_or(()),
                2 => {
                    // Bytes of one place at another: intact, but not there.
                    let (other, other_len) = files.choose(&mut rng).unwrap();
                    let Ok(other) = copy.open(other, Open::Read).await else { continue };
                    let bytes = other.read_at(rng.random_range(0..*other_len) / 8 * 8, 70_000).await.unwrap();
                    file.write_at(at / 8 * 8, vec![bytes]).await.unwrap();
                }
                _ => {
                    let noise = pattern(rng.random(), rng.random_range(1..10_000));
                    file.write_at(at, vec![noise]).await.unwrap();
                }
            }
        }
        let context = format!("round {round}");
        let (store, _) = open(&copy).await;
        serves_only_the_truth(&store, &chunks, &context).await;
        // It goes on working, also for what it lost.
        for chunk in &chunks {
            let stored = store_content(&store, *chunk).await;
            assert!(stored.is_ok(), "{context}: {stored:?}");
            assert_eq!(read_all(&store, *chunk).await.unwrap(), content(*chunk), "{context}");
        }
        while store.maintain().await.unwrap() {}
        store.close().await.unwrap();
        drop(store);
        settle().await;
        let (store, _) = open(&copy).await;
        for chunk in &chunks {
            assert_eq!(read_all(&store, *chunk).await.unwrap(), content(*chunk), "{context}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_unknown_version_refuses_to_start() {
    let disk = SimDisk::new(1, 64 << 20);
    drop(open(&disk).await);
    settle().await;
    let mut bytes = snapshot::Writer::new(::disk::log::Position::default(), 1, 0).finish().to_vec();
    let body = bytes.len() - 8;
    bytes[8] = 2;
    let sum = cairn_proto::checksum::crc64(&bytes[..body]);
    bytes[body..].copy_from_slice(&sum.to_le_bytes());
    let file = disk.open(&Path::new(DIR).join("index"), Open::Create).await.unwrap();
    file.write_at(0, vec![bytes.into()]).await.unwrap();
    let error = DiskChunkStore::open(Arc::new(disk), DIR, config()).await.unwrap_err();
    assert_eq!(error.reason, Reason::NotSupported);
    assert!(error.message().contains("test data") && error.message().contains("version 2"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_full_disk_refuses_clearly_removes_and_recovers() {
    for sizes in [[4000, 4000], [60_000, 100], [300_000, 300_000], [3000, 150_000]] {
        let disk = SimDisk::new(1, 6 << 20);
        let (mut store, _) = open(&disk).await;
        let mut kept = Vec::new();
        for round in 0..3u32 {
            let data = |chunk: ChunkId| pattern(u64::from(chunk.index), sizes[chunk.index as usize % 2]);
            let mut refused = 0;
            for index in 0..3000 {
                let chunk = ChunkId::new(u64::from(round) + 1, index);
                match put(&store, chunk, &data(chunk)).await {
                    Ok(_) => kept.push(chunk),
                    Err(error) => {
                        assert_eq!(error.reason, Reason::NoSpace, "{error}");
                        assert!(error.message().contains("test data"), "{error}");
                        refused += 1;
                        if refused > 20 {
                            break;
                        }
                    }
                }
            }
            assert!(refused > 0, "{sizes:?}");
            settle().await;
            if round == 1 {
                // A start finds no room either.
                drop(store);
                settle().await;
                disk.crash(CrashKeep::Nothing);
                store = open(&disk).await.0;
            }
            for chunk in &kept {
                assert_eq!(read_all(&store, *chunk).await.unwrap(), data(*chunk), "{sizes:?} round {round}");
            }
            // Nothing but removal makes room, and it needs none.
            disk.set_capacity(disk.used_bytes());
            let gone = kept.split_off(kept.len() / 4);
            for some in gone.chunks(100) {
                assert_eq!(store.remove(some).await.unwrap().chunks, some.len() as u64);
            }
            disk.set_capacity(6 << 20);
            for _ in 0..50 {
                store.maintain().await.unwrap();
            }
            let chunk = ChunkId::new(100, round * 2);
            let stored = put(&store, chunk, &data(chunk)).await;
            assert!(
                stored.is_ok(),
                "{sizes:?} round {round}: {stored:?} {:?} {:?} {:?} used {}",
                store.usage(),
                store.shared.log.segments(),
                store.shared.state.lock().index.live(),
                disk.used_bytes()
            );
            kept.push(chunk);
            drop(store);
            settle().await;
            disk.crash(CrashKeep::Nothing);
            store = open(&disk).await.0;
            assert_eq!(store.usage().chunks, kept.len() as u64, "{sizes:?} round {round}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_failed_sync_is_never_an_acknowledgement() {
    let disk = SimDisk::new(5, 64 << 20);
    let (store, _) = open(&disk).await;
    let [small, next, large, after] = [0, 1, 2, 3].map(|index| ChunkId::new(1, index));
    put(&store, small, &pattern(1, 5000)).await.unwrap();
    // A large chunk: only this one is lost.
    disk.fail_syncs(1);
    assert_eq!(put(&store, large, &pattern(2, 100_000)).await.unwrap_err().reason, Reason::Io);
    assert!(store.info(large).is_none());
    put(&store, large, &pattern(2, 100_000)).await.unwrap();
    // The log: nothing small is acknowledged any more, though everything is read.
    disk.fail_syncs(1);
    let error = put(&store, next, &pattern(3, 5000)).await.unwrap_err();
    assert_eq!(error.reason, Reason::Io);
    assert!(error.message().contains("test data"), "{error}");
    assert_eq!(put(&store, after, &pattern(4, 5000)).await.unwrap_err().reason, Reason::Io);
    assert!(store.remove(&[small]).await.is_err());
    assert!(store.remove(&[next]).await.is_err(), "it may be found at the next start");
    assert_eq!(read_all(&store, small).await.unwrap(), pattern(1, 5000));
    assert_eq!(read_all(&store, large).await.unwrap(), pattern(2, 100_000));
    drop(store);
    settle().await;
    disk.crash(CrashKeep::Random);
    let (store, _) = open(&disk).await;
    assert_eq!(read_all(&store, small).await.unwrap(), pattern(1, 5000));
    assert_eq!(read_all(&store, large).await.unwrap(), pattern(2, 100_000));
    put(&store, next, &pattern(3, 5000)).await.unwrap();
    assert_eq!(store.remove(&[small, next]).await.unwrap().chunks, 2);
}

#[tokio::test(start_paused = true)]
async fn concurrent_seals_share_syncs() {
    let disk = SimDisk::new(6, 64 << 20);
    disk.set_sync_latency(std::time::Duration::from_millis(2));
    let (store, _) = open(&disk).await;
    let puts = |first: u32, len: usize| {
        let store = &store;
        let one = move |index| async move {
            let chunk = ChunkId::new(7, first + index);
            put(store, chunk, &pattern(u64::from(index), len)).await.unwrap();
        };
        futures::future::join_all((0..64).map(one))
    };
    let before = disk.counters();
    puts(0, 1000).await;
    let small = disk.counters();
    assert!(small.syncs - before.syncs <= 4, "{} syncs for 64 chunks", small.syncs - before.syncs);
    puts(100, 70_000).await;
    let large = disk.counters();
    assert_eq!(large.syncs - small.syncs, 64, "a sync of its own for each file");
    assert!(large.dir_syncs - small.dir_syncs <= 8, "{} syncs of names", large.dir_syncs - small.dir_syncs);
}

#[tokio::test(start_paused = true)]
async fn bounded_one_failed_sync_does_not_end_the_giving_back_of_room() {
    let disk = SimDisk::new(7, 64 << 20);
    let (store, _) = open(&disk).await;
    let chunks: Vec<ChunkId> = (0..30).map(|index| ChunkId::new(1, index)).collect();
    for chunk in &chunks {
        put(&store, *chunk, &pattern(1, 60_000)).await.unwrap();
    }
    store.remove(&chunks).await.unwrap();
    let segments = store.shared.log.segments();
    let first = segments[0].number;
    assert!(segments.len() > 5);
    let state = shared::SnapshotState::default();
    disk.fail_syncs(1);
    store.shared.drop_empty(&state).await.unwrap_err();
    let left: Vec<u32> = store.shared.log.segments().iter().map(|segment| segment.number).collect();
    assert_eq!(left, [first, segments[segments.len() - 1].number], "the others are gone");
    while store.maintain().await.unwrap() {}
    assert_eq!(store.shared.log.segments().len(), 1);
    // Nothing is left to do, so nothing is written.
    let writes = disk.counters().writes;
    store.maintain().await.unwrap();
    assert_eq!(disk.counters().writes, writes);
}

/// The header of a chunk, as it stands in a record or a file.
fn header_of(chunk: ChunkId, length: u32) -> Vec<u8> {
    let (group, checksum, table_checksum) = (GroupId(1), 7, 9);
    let header = format::ChunkHeader { chunk, group, length, checksum, computed_here: false, table_checksum };
    let mut bytes = bytes::BytesMut::new();
    header.encode(&mut bytes);
    bytes.to_vec()
}

#[tokio::test(start_paused = true)]
async fn bytes_of_users_that_look_like_a_chunk_shadow_none() {
    let [large, small, absent] = [0, 1, 2].map(|index| ChunkId::new(1, index));
    let large_data = pattern(1, 100_000);
    let headers = [(large, 100_000), (absent, 70_000), (large, 500), (absent, 500)];
    for (at, (seeming, length)) in headers.into_iter().enumerate() {
        // The record's header, and its chunk's.
        for (is_record_bad, is_header_bad) in [(false, false), (true, false), (true, true)] {
            let context = format!("header {at}, {is_record_bad} {is_header_bad}");
            let disk = SimDisk::new(1, 64 << 20);
            let (store, _) = open(&disk).await;
            put(&store, large, &large_data).await.unwrap();
            // As somebody has who keeps a copy of a store's files in the store.
            let data = [header_of(seeming, length), vec![1; 3_000]].concat();
            put(&store, small, &data.into()).await.unwrap();
            let Place::Record(position) = store.shared.state.lock().index.get(small).unwrap().place else {
                panic!("a small chunk is a record");
            };
            store.close().await.unwrap();
            drop(store);
            settle().await;
            disk.remove_file(&Path::new(DIR).join("index")).await.unwrap();
            let path = Path::new(DIR).join(format!("segments/{:08x}.seg", position.segment));
            let record = u64::from(position.offset);
            let payload = record + index::RECORD_OVERHEAD_BYTES;
            disk.flip_bit(&path, payload + 1_000, 3).unwrap();
            if is_record_bad {
                disk.flip_bit(&path, record + 5, 3).unwrap();
            }
            if is_header_bad {
                disk.flip_bit(&path, payload + 5, 3).unwrap();
            }
            for start in 0..2 {
                let (store, report) = open(&disk).await;
                assert!(!report.damage.is_empty(), "{context}");
                assert_eq!(read_all(&store, large).await.unwrap(), large_data, "{context}, start {start}");
                assert!(!store.info(large).unwrap().corrupt, "{context}");
                assert_eq!(store.info(small).is_some(), !is_header_bad, "{context}");
                // It may be a record's that cannot be read any more.
                let is_listed = is_header_bad && length == 500;
                assert!(is_listed || store.info(absent).is_none(), "{context}");
                drop(store);
                settle().await;
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn of_a_record_and_a_file_the_whole_one_is_kept() {
    let chunk = ChunkId::new(1, 1);
    let (in_record, in_file) = (pattern(1, 5_000), pattern(2, 100_000));
    let other = SimDisk::new(1, 64 << 20);
    let (store, _) = open(&other).await;
    put(&store, chunk, &in_file).await.unwrap();
    drop(store);
    settle().await;
    let path = Path::new(DIR).join("files/01/0000000000000001-00000001.chunk");
    let file = other.open(&path, Open::Read).await.unwrap().read_at(0, 1 << 20).await.unwrap();
    for is_record_bad in [false, true] {
        for has_index in [false, true] {
            let disk = SimDisk::new(2, 64 << 20);
            let (store, _) = open(&disk).await;
            put(&store, chunk, &in_record).await.unwrap();
            let Place::Record(position) = store.shared.state.lock().index.get(chunk).unwrap().place else {
                panic!("a small chunk is a record");
            };
            store.close().await.unwrap();
            drop(store);
            settle().await;
            if !has_index {
                disk.remove_file(&Path::new(DIR).join("index")).await.unwrap();
            }
            // As a crash leaves them between the one that replaces and the removal of the one replaced.
            disk.create_dir_all(path.parent().unwrap()).await.unwrap();
            let copy = disk.open(&path, Open::Create).await.unwrap();
            copy.write_at(0, vec![file.clone()]).await.unwrap();
            if is_record_bad {
                let segment = Path::new(DIR).join(format!("segments/{:08x}.seg", position.segment));
                disk.flip_bit(&segment, u64::from(position.offset) + 1_000, 3).unwrap();
            }
            let (store, _) = open(&disk).await;
            let kept = if is_record_bad { &in_file } else { &in_record };
            assert_eq!(&read_all(&store, chunk).await.unwrap(), kept, "{is_record_bad} {has_index}");
            assert!(store.verify(chunk).await.unwrap());
            assert_eq!(disk.open(&path, Open::Read).await.is_ok(), is_record_bad);
        }
    }
}
