//! What every engine must do, run by each of them.

use super::*;
use cairn_proto::{
    checksum::{block_checksums, crc64, digest_term},
    limits::{BLOCK_BYTES, CHUNK_BYTES_MAX, DATA_BYTES_MAX},
};
use std::sync::Arc;

/// Bytes that differ by chunk and position.
pub(super) fn pattern(seed: u64, len: usize) -> Bytes {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..len).map(next).collect()
}

/// Sends a chunk in parts of `part` bytes.
pub(super) async fn write(
    store: &dyn ChunkStore,
    chunk: ChunkId,
    data: &Bytes,
    part: usize,
) -> Result<ChunkInfo> {
    let mut writer = store.begin(chunk, GroupId(chunk.grant.0 % 7), Some(data.len() as u64)).await?;
    append_all(&mut *writer, chunk, data, part).await?;
    writer.seal(data.len() as u64, crc64(data), false).await
}

pub(super) async fn append_all(
    writer: &mut dyn ChunkWriter,
    chunk: ChunkId,
    data: &Bytes,
    part: usize,
) -> Result<()> {
    for at in (0..data.len()).step_by(part) {
        let bytes = data.slice(at..data.len().min(at + part));
        let blocks = block_checksums(chunk, (at / BLOCK_BYTES) as u32, &bytes);
        writer.append(bytes, blocks).await?;
    }
    Ok(())
}

pub(super) async fn put(store: &dyn ChunkStore, chunk: ChunkId, data: &Bytes) -> Result<ChunkInfo> {
    let blocks = block_checksums(chunk, 0, data);
    store.put(chunk, GroupId(chunk.grant.0 % 7), data.clone(), blocks, crc64(data), true).await
}

/// Reads a chunk wholly and checks what comes with the bytes.
pub(super) async fn read_all(store: &dyn ChunkStore, chunk: ChunkId) -> Result<Bytes> {
    let mut bytes = Vec::new();
    loop {
        let part = store.read(chunk, bytes.len() as u64, DATA_BYTES_MAX).await?;
        assert_eq!(part.offset, bytes.len() as u64);
        let first = (part.offset / BLOCK_BYTES as u64) as u32;
        assert_eq!(part.blocks, block_checksums(chunk, first, &part.data));
        bytes.extend_from_slice(&part.data);
        if bytes.len() as u64 >= part.info.length {
            assert_eq!(bytes.len() as u64, part.info.length);
            assert_eq!(crc64(&bytes), part.info.checksum);
            return Ok(bytes.into());
        }
    }
}

const ALL: RangeInclusive<GrantId> = GrantId(0)..=GrantId(u64::MAX);

/// Runs the whole suite on an empty store with room for some 300 MiB.
pub(super) async fn run(store: Arc<dyn ChunkStore>) {
    chunks_come_back(&*store).await;
    sealing_again_answers_the_same(&*store).await;
    what_does_not_match_is_refused(&*store).await;
    unsealed_chunks_are_not_seen(&*store).await;
    the_newer_writer_wins(&*store).await;
    ranges_are_widened_to_blocks(&*store).await;
    inventories_are_in_order(&*store).await;
    removed_chunks_are_gone(&*store).await;
    a_report_is_checked(&*store).await;
    many_at_once(store.clone()).await;
    let left: Vec<ChunkId> = store.list(None, ALL, usize::MAX).into_iter().map(|info| info.chunk).collect();
    store.remove(&left).await.unwrap();
    assert_eq!((store.usage().chunks, store.usage().used_bytes), (0, 0));
    store.close().await.unwrap();
    let chunk = ChunkId::new(9, 9);
    let error = put(&*store, chunk, &pattern(1, 10)).await.unwrap_err();
    assert_eq!(error.reason, Reason::Unavailable);
}

async fn chunks_come_back(store: &dyn ChunkStore) {
    let before = store.usage();
    let mut total = 0;
    let sizes = [1, 4095, 4096, 4097, 65_535, 65_536, 65_537, 1 << 20, (5 << 20) + 77];
    for (index, size) in sizes.into_iter().enumerate() {
        let chunk = ChunkId::new(1, index as u32);
        let data = pattern(index as u64, size);
        let info = write(store, chunk, &data, 128 << 10).await.unwrap();
        assert_eq!((info.chunk, info.group, info.length), (chunk, GroupId(1), size as u64));
        assert_eq!((info.checksum, info.corrupt, info.computed_here), (crc64(&data), false, false));
        assert_eq!(store.info(chunk).unwrap().checksum, info.checksum);
        assert_eq!(read_all(store, chunk).await.unwrap(), data, "{size}");
        assert!(store.verify(chunk).await.unwrap());
        assert!(store.info(chunk).unwrap().verified_at.is_some());
        total += size as u64;
    }
    let after = store.usage();
    assert_eq!(after.chunks - before.chunks, sizes.len() as u64);
    assert_eq!(after.used_bytes - before.used_bytes, total);
    let chunk = ChunkId::new(1, 100);
    let data = pattern(3, 5000);
    assert!(put(store, chunk, &data).await.unwrap().computed_here);
    assert_eq!(read_all(store, chunk).await.unwrap(), data);
    // Without a hint, and with a wrong one.
    for (index, hint) in [(101, None), (102, Some(10)), (103, Some(3 << 20))] {
        let chunk = ChunkId::new(1, index);
        let data = pattern(4, 200_000);
        let mut writer = store.begin(chunk, GroupId(1), hint).await.unwrap();
        append_all(&mut *writer, chunk, &data, 40_960).await.unwrap();
        writer.seal(200_000, crc64(&data), false).await.unwrap();
        assert_eq!(read_all(store, chunk).await.unwrap(), data);
    }
}

async fn sealing_again_answers_the_same(store: &dyn ChunkStore) {
    for (index, size) in [(0, 9000), (1, 90_000)] {
        let chunk = ChunkId::new(2, index);
        let data = pattern(1, size);
        let info = write(store, chunk, &data, 8192).await.unwrap();
        let again = write(store, chunk, &data, 4096).await.unwrap();
        assert_eq!((again.length, again.checksum), (info.length, info.checksum));
        assert_eq!(put(store, chunk, &data).await.unwrap().checksum, info.checksum);
        let used = store.usage();
        for other in [pattern(2, size), pattern(1, size - 1), pattern(1, 70_000), pattern(1, 10)] {
            assert_eq!(put(store, chunk, &other).await.unwrap_err().reason, Reason::ChunkExists);
            assert_eq!(write(store, chunk, &other, 4096).await.unwrap_err().reason, Reason::ChunkExists);
        }
        assert_eq!(read_all(store, chunk).await.unwrap(), data);
        assert_eq!((store.usage().chunks, store.usage().used_bytes), (used.chunks, used.used_bytes));
    }
}

async fn what_does_not_match_is_refused(store: &dyn ChunkStore) {
    let before = store.usage();
    for size in [8192, 100 << 10] {
        let chunk = ChunkId::new(3, size as u32);
        let data = pattern(1, size);
        let blocks = block_checksums(chunk, 0, &data);
        let sum = crc64(&data);
        let reason = |result: Result<ChunkInfo>| result.unwrap_err().reason;
        let group = GroupId(3);
        let put = |blocks: &[u64], sum| store.put(chunk, group, data.clone(), blocks.to_vec(), sum, false);
        assert_eq!(reason(put(&blocks, sum ^ 1).await), Reason::ChecksumMismatch);
        assert_eq!(reason(put(&blocks[1..], sum).await), Reason::ChecksumMismatch);
        assert_eq!(reason(put(&[], sum).await), Reason::ChecksumMismatch);
        let mut wrong = blocks.clone();
        wrong[1] ^= 1 << 40;
        assert_eq!(reason(put(&wrong, sum).await), Reason::ChecksumMismatch);
        // Another length, a gap inside a block, an empty chunk.
        let mut writer = store.begin(chunk, group, None).await.unwrap();
        writer.append(data.clone(), blocks.clone()).await.unwrap();
        assert_eq!(reason(writer.seal(size as u64 + 1, sum, false).await), Reason::ChecksumMismatch);
        let mut writer = store.begin(chunk, group, None).await.unwrap();
        let short = data.slice(..100);
        let short_blocks = block_checksums(chunk, 0, &short);
        writer.append(short.clone(), short_blocks.clone()).await.unwrap();
        assert_eq!(writer.append(short, short_blocks).await.unwrap_err().reason, Reason::InvalidArgument);
        drop(writer);
        let writer = store.begin(chunk, group, Some(size as u64)).await.unwrap();
        assert_eq!(reason(writer.seal(0, 0, false).await), Reason::InvalidArgument);
        assert!(store.info(chunk).is_none());
    }
    let chunk = ChunkId::new(3, 0);
    let long = store.begin(chunk, GroupId(3), Some(CHUNK_BYTES_MAX + 1)).await;
    assert_eq!(long.unwrap_err().reason, Reason::LimitExceeded);
    let data = pattern(1, DATA_BYTES_MAX + 4096);
    let mut writer = store.begin(chunk, GroupId(3), None).await.unwrap();
    let blocks = block_checksums(chunk, 0, &data);
    assert_eq!(writer.append(data, blocks).await.unwrap_err().reason, Reason::InvalidArgument);
    drop(writer);
    let mut writer = store.begin(chunk, GroupId(3), None).await.unwrap();
    let data = Bytes::from(vec![0; DATA_BYTES_MAX]);
    let per_part = (DATA_BYTES_MAX / BLOCK_BYTES) as u32;
    for part in 0..(CHUNK_BYTES_MAX / DATA_BYTES_MAX as u64) as u32 {
        let blocks = block_checksums(chunk, part * per_part, &data);
        writer.append(data.clone(), blocks).await.unwrap();
    }
    let error = writer.append(data.slice(..1), vec![0]).await.unwrap_err();
    assert_eq!(error.reason, Reason::LimitExceeded);
    drop(writer);
    assert_eq!((store.usage().chunks, store.usage().used_bytes), (before.chunks, before.used_bytes));
}

async fn unsealed_chunks_are_not_seen(store: &dyn ChunkStore) {
    for (grant, size) in [(4, 4096), (40, 1 << 20)] {
        let before = store.usage();
        let chunk = ChunkId::new(grant, 0);
        let data = pattern(1, size);
        let mut writer = store.begin(chunk, GroupId(4), Some(size as u64)).await.unwrap();
        append_all(&mut *writer, chunk, &data, 64 << 10).await.unwrap();
        assert!(store.info(chunk).is_none());
        assert_eq!(store.read(chunk, 0, 1).await.unwrap_err().reason, Reason::ChunkNotFound);
        assert_eq!(store.verify(chunk).await.unwrap_err().reason, Reason::ChunkNotFound);
        assert!(store.list(None, GrantId(grant)..=GrantId(grant), 10).is_empty());
        assert!(store.digests(GrantId(grant)..=GrantId(grant), 10).is_empty());
        assert_eq!(store.remove(&[chunk]).await.unwrap(), Removed::default());
        assert_eq!((store.usage().chunks, store.usage().used_bytes), (before.chunks, before.used_bytes));
        drop(writer);
        assert!(store.info(chunk).is_none());
        write(store, chunk, &data, 4096).await.unwrap();
        assert_eq!(read_all(store, chunk).await.unwrap(), data);
    }
}

async fn the_newer_writer_wins(store: &dyn ChunkStore) {
    for size in [4096, 1 << 20] {
        let chunk = ChunkId::new(5, size as u32);
        let (old, new) = (pattern(1, size), pattern(2, size));
        let mut first = store.begin(chunk, GroupId(5), Some(size as u64)).await.unwrap();
        append_all(&mut *first, chunk, &old, 64 << 10).await.unwrap();
        let mut second = store.begin(chunk, GroupId(5), Some(size as u64)).await.unwrap();
        let error = first.seal(size as u64, crc64(&old), false).await.unwrap_err();
        assert_eq!(error.reason, Reason::Conflict);
        assert!(store.info(chunk).is_none());
        append_all(&mut *second, chunk, &new, 64 << 10).await.unwrap();
        second.seal(size as u64, crc64(&new), false).await.unwrap();
        assert_eq!(read_all(store, chunk).await.unwrap(), new);
    }
}

async fn ranges_are_widened_to_blocks(store: &dyn ChunkStore) {
    for size in [10_000, 300_000] {
        let chunk = ChunkId::new(6, size as u32);
        let data = pattern(6, size);
        write(store, chunk, &data, 64 << 10).await.unwrap();
        let part = store.read(chunk, 4096, 1).await.unwrap();
        assert_eq!(part.data, data.slice(4096..8192));
        assert_eq!(part.blocks.len(), 1);
        assert_eq!(part.info.length, size as u64);
        let last = size / 4096 * 4096;
        let part = store.read(chunk, last as u64, usize::MAX / 2).await.unwrap();
        assert_eq!(part.data, data.slice(last..));
        for (offset, len) in [(1, 10), (size as u64, 10), (1 << 40, 10), (0, 0)] {
            let error = store.read(chunk, offset, len).await.unwrap_err();
            assert_eq!(error.reason, Reason::InvalidArgument, "{offset}");
        }
    }
    let chunk = ChunkId::new(6, 1);
    write(store, chunk, &pattern(1, 3 << 20), DATA_BYTES_MAX).await.unwrap();
    assert_eq!(store.read(chunk, 1 << 20, 2 << 20).await.unwrap().data.len(), DATA_BYTES_MAX);
    assert_eq!(store.read(ChunkId::new(6, 2), 0, 1).await.unwrap_err().reason, Reason::ChunkNotFound);
}

async fn inventories_are_in_order(store: &dyn ChunkStore) {
    let mut expected = Vec::new();
    for grant in [70, 72, 75] {
        for index in [3, 0, 7, 1] {
            let chunk = ChunkId::new(grant, index);
            let info = put(store, chunk, &pattern(grant + u64::from(index), 50)).await.unwrap();
            expected.push((chunk, info.length, info.checksum));
        }
    }
    expected.sort();
    let range = GrantId(70)..=GrantId(75);
    let ids = |infos: Vec<ChunkInfo>| infos.iter().map(|info| info.chunk).collect::<Vec<_>>();
    let all: Vec<ChunkId> = expected.iter().map(|(chunk, ..)| *chunk).collect();
    assert_eq!(ids(store.list(None, range.clone(), 100)), all);
    let (mut paged, mut after) = (Vec::new(), None);
    loop {
        let page = ids(store.list(after, range.clone(), 5));
        let Some(last) = page.last() else { break };
        after = Some(*last);
        paged.extend(page);
    }
    assert_eq!(paged, all);
    assert_eq!(ids(store.list(Some(ChunkId::new(1, 0)), range.clone(), 3)), all[..3]);
    assert_eq!(ids(store.list(Some(ChunkId::new(72, u32::MAX)), range.clone(), 3)), all[8..11]);
    assert!(store.list(Some(ChunkId::new(75, u32::MAX)), range.clone(), 3).is_empty());
    assert!(store.list(None, GrantId(73)..=GrantId(74), 3).is_empty());
    #[allow(clippy::reversed_empty_ranges)]
    let backwards = GrantId(75)..=GrantId(70);
    assert!(store.list(None, backwards.clone(), 3).is_empty());
    assert!(store.digests(backwards, 3).is_empty());
    let digests = store.digests(range.clone(), 100);
    assert_eq!(digests.len(), 3);
    assert_eq!(store.digests(range.clone(), 2), digests[..2]);
    for digest in &digests {
        let terms = expected.iter().filter(|(chunk, ..)| chunk.grant.0 == digest.grant_id);
        let sum = terms.map(|&(chunk, len, sum)| digest_term(chunk, len, sum)).fold(0, u64::wrapping_add);
        assert_eq!((digest.chunk_count, digest.digest), (4, sum));
    }
    store.mark_corrupt(ChunkId::new(72, 3));
    assert!(store.info(ChunkId::new(72, 3)).unwrap().corrupt);
    assert_eq!(store.list(None, range.clone(), 100).len(), 12, "corrupt copies stay listed");
    assert_eq!(store.digests(range, 100)[1].chunk_count, 3);
    store.mark_corrupt(ChunkId::new(72, 99));
}

async fn removed_chunks_are_gone(store: &dyn ChunkStore) {
    let before = store.usage();
    let chunks: Vec<ChunkId> = (0..20).map(|index| ChunkId::new(8, index)).collect();
    for chunk in &chunks {
        let size = if chunk.index < 18 { 3000 } else { 300_000 };
        put(store, *chunk, &pattern(u64::from(chunk.index), size)).await.unwrap();
    }
    let mut gone: Vec<ChunkId> = chunks[5..].to_vec();
    gone.push(ChunkId::new(8, 999));
    gone.push(chunks[7]);
    let removed = store.remove(&gone).await.unwrap();
    assert_eq!(removed, Removed { chunks: 15, bytes: 13 * 3000 + 2 * 300_000 });
    assert_eq!(store.remove(&gone).await.unwrap(), Removed::default());
    for chunk in &gone {
        assert!(store.info(*chunk).is_none());
        assert_eq!(store.read(*chunk, 0, 1).await.unwrap_err().reason, Reason::ChunkNotFound);
    }
    assert_eq!(store.usage().chunks - before.chunks, 5);
    assert_eq!(store.usage().used_bytes - before.used_bytes, 5 * 3000);
    while store.maintain().await.unwrap() {}
    for chunk in &chunks[..5] {
        assert_eq!(read_all(store, *chunk).await.unwrap(), pattern(u64::from(chunk.index), 3000));
    }
    // A copy may come back to a server that lost it.
    for chunk in [chunks[6], chunks[19]] {
        let data = pattern(77, chunk.index as usize * 6000);
        put(store, chunk, &data).await.unwrap();
        assert_eq!(read_all(store, chunk).await.unwrap(), data);
    }
}

async fn a_report_is_checked(store: &dyn ChunkStore) {
    for size in [6000, 200_000] {
        let chunk = ChunkId::new(10, size as u32);
        let data = pattern(1, size);
        put(store, chunk, &data).await.unwrap();
        store.mark_corrupt(chunk);
        assert!(store.info(chunk).unwrap().corrupt);
        assert_eq!(read_all(store, chunk).await.unwrap(), data, "good blocks are served");
        assert!(store.verify(chunk).await.unwrap());
        assert!(!store.info(chunk).unwrap().corrupt);
        // A corrupt copy is replaced by a good one of the same content, and by nothing else.
        store.mark_corrupt(chunk);
        let other = put(store, chunk, &pattern(2, size)).await.unwrap_err();
        assert_eq!(other.reason, Reason::ChunkExists);
        let used = store.usage();
        assert!(!put(store, chunk, &data).await.unwrap().corrupt);
        assert!(!store.info(chunk).unwrap().corrupt);
        assert_eq!((store.usage().chunks, store.usage().used_bytes), (used.chunks, used.used_bytes));
        assert_eq!(read_all(store, chunk).await.unwrap(), data);
    }
}

async fn many_at_once(store: Arc<dyn ChunkStore>) {
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..16u32 {
        let store = store.clone();
        tasks.spawn(async move {
            for round in 0..12u32 {
                // Two tasks write each chunk, with the same bytes.
                let chunk = ChunkId::new(20, task / 2 * 100 + round);
                let size = if round % 4 == 3 { 150_000 } else { 100 + round as usize * 977 };
                let data = pattern(u64::from(chunk.index), size);
                let done = loop {
                    match put(&*store, chunk, &data).await {
                        Err(error) if error.reason == Reason::Conflict => tokio::task::yield_now().await,
                        done => break done,
                    }
                };
                assert_eq!(done.unwrap().length, size as u64);
                assert_eq!(read_all(&*store, chunk).await.unwrap(), data);
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    assert_eq!(store.list(None, GrantId(20)..=GrantId(20), 1000).len(), 8 * 12);
}

#[tokio::test]
async fn memory_keeps_the_contract() {
    run(Arc::new(MemoryChunkStore::new(300 << 20))).await;
}

#[tokio::test]
async fn memory_notices_rot() {
    let store = MemoryChunkStore::new(1 << 20);
    let chunk = ChunkId::new(1, 1);
    let data = pattern(1, 10_000);
    put(&store, chunk, &data).await.unwrap();
    assert!(store.flip_bit(chunk, 5000, 3));
    assert!(store.read(chunk, 0, 4096).await.is_ok());
    assert_eq!(store.read(chunk, 4096, 4096).await.unwrap_err().reason, Reason::ChecksumMismatch);
    assert!(store.info(chunk).unwrap().corrupt);
    assert!(!store.verify(chunk).await.unwrap());
    put(&store, chunk, &data).await.unwrap();
    assert_eq!(read_all(&store, chunk).await.unwrap(), data);
    let error = put(&store, ChunkId::new(1, 2), &pattern(1, (1 << 20) - 5000)).await.unwrap_err();
    assert_eq!(error.reason, Reason::NoSpace);
}

/// A configuration that meets the ends of segments often.
fn small_config() -> DiskConfig {
    DiskConfig {
        segment_bytes: 256 << 10,
        reserve_bytes: 0,
        snapshot_after_bytes: 512 << 10,
        ..DiskConfig::new("test data")
    }
}

#[tokio::test]
async fn a_simulated_disk_keeps_the_contract() {
    let disk = ::disk::SimDisk::new(1, 600 << 20);
    let (store, report) = DiskChunkStore::open(Arc::new(disk), "chunks", small_config()).await.unwrap();
    assert_eq!((report.chunks, report.damage), (0, vec![]));
    run(Arc::new(store)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_disk_keeps_the_contract() {
    let dir = tempfile::tempdir().unwrap();
    let disk = ::disk::RealDisk::open(dir.path()).unwrap();
    let (store, _) = DiskChunkStore::open(disk, "chunks", small_config()).await.unwrap();
    run(Arc::new(store)).await;
}
