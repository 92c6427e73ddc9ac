//! CHECKED: bad bytes are never served; they are reported and healed.

use crate::harness::*;
use cairn_proto::{
    Error, Reason,
    checksum::verify_blocks,
    id::ChunkId,
    v1::{self, InventoryDetail},
};
use disk::{Disk as _, Open, SimDisk};
use file_service::Timing;
use std::path::{Path, PathBuf};
use tokio::time::Instant;

const MIB: usize = 1024 * 1024;

#[tokio::test(start_paused = true)]
async fn a_range_is_widened_to_whole_blocks() {
    let cluster = Cluster::start().await;
    let data = bytes(3 * MIB + 100);
    cluster.write_to_all(chunk(1), &data).await;
    let mut client = cluster.files(2);
    for (offset, length, first, end) in [
        (0, 0, 0, data.len()),
        (0, 1, 0, 4096),
        (4095, 2, 0, 8192),
        (4096, 4096, 4096, 8192),
        (5000, 2 * MIB as u64, 4096, 2 * MIB + 8192),
        (3 * MIB as u64 + 99, 1, 3 * MIB, data.len()),
        (3 * MIB as u64, 1 << 60, 3 * MIB, data.len()),
        (0, u64::MAX, 0, data.len()),
    ] {
        let (from, got) = read(&mut client, chunk(1), offset, length).await.unwrap();
        assert_eq!(from as usize, first, "{offset} {length}");
        assert!(got == data[first..end.min(data.len())], "{offset} {length}: {} bytes", got.len());
    }
    let behind = read(&mut client, chunk(1), data.len() as u64, 1).await.unwrap_err();
    assert_eq!(behind.reason, Reason::InvalidArgument);
    let missing = read(&mut client, chunk(2), 0, 0).await.unwrap_err();
    assert_eq!(missing.reason, Reason::ChunkNotFound);
    assert_eq!(missing.detail.server, "2");
}

/// Flips a bit behind the first place where a file of the disk has these bytes.
async fn rot(disk: &SimDisk, bytes: &[u8]) {
    let mut dirs = vec![PathBuf::from("chunks")];
    while let Some(dir) = dirs.pop() {
        for entry in disk.list(&dir).await.unwrap() {
            let path = dir.join(&entry.name);
            if entry.is_dir {
                dirs.push(path);
                continue;
            }
            if let Some(at) = find(disk, &path, bytes).await {
                return disk.flip_bit(&path, at, 3).unwrap();
            }
        }
    }
    panic!("the bytes are nowhere on the disk");
}

async fn find(disk: &SimDisk, path: &Path, bytes: &[u8]) -> Option<u64> {
    let content = disk.open(path, Open::Read).await.unwrap().read_at(0, 64 * MIB).await.unwrap();
    content.windows(bytes.len()).position(|window| window == bytes).map(|at| at as u64)
}

/// Bytes with some that occur nowhere else.
fn marked(length: usize) -> (Vec<u8>, Vec<u8>) {
    let mut data = bytes(length);
    let mark = format!("a very rare mark of {length}").into_bytes();
    data[length / 2..length / 2 + mark.len()].copy_from_slice(&mark);
    (data, mark)
}

#[tokio::test(start_paused = true)]
async fn flipped_bytes_are_not_served_but_reported_and_healed_from_a_peer() {
    let cluster = Cluster::start().await;
    for (index, length) in [(1, 3_000), (2, 2 * MIB)] {
        let id = chunk(index);
        let (data, mark) = marked(length);
        cluster.write_to_all(id, &data).await;
        rot(&cluster.server(2).disk, &mark).await;
        // Once found, the copy does not count until it is healed.
        let error = read(&mut cluster.files(2), id, 0, 0).await.map(drop).unwrap_err();
        assert_eq!(error.reason, Reason::ChecksumMismatch, "{error}");
        assert_eq!(error.detail.server, "2");
        let directory = &cluster.directory;
        let is_reported = || {
            let state = directory.0.lock();
            state.heartbeats.iter().any(|beat| beat.server_id == 2 && beat.bad_chunks.contains(&id.into()))
        };
        eventually("it is reported", is_reported).await;
        eventually("it is healed", || cluster.holders(id) == [1, 2, 3]).await;
        assert_eq!(read(&mut cluster.files(2), id, 0, 0).await.unwrap().1, data);
        assert!(cluster.node(2).store.verify(id).await.unwrap());
        let reports = || {
            let state = cluster.directory.0.lock();
            state.heartbeats.iter().filter(|beat| beat.bad_chunks.contains(&id.into())).count()
        };
        let before = reports();
        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
        assert!(reports() <= before + 1, "it is reported once, not for ever");
    }
}

#[tokio::test(start_paused = true)]
async fn rot_is_found_and_healed_although_nobody_reads() {
    let timing = Timing { scrub_period_ms: 60_000, drain_ms: 1_000, ..Timing::default() };
    let cluster = Cluster::start_with(timing).await;
    let (data, mark) = marked(2 * MIB);
    cluster.write_to_all(chunk(1), &data).await;
    rot(&cluster.server(2).disk, &mark).await;
    assert_eq!(cluster.holders(chunk(1)), [1, 2, 3], "nobody has noticed yet");
    let node = cluster.node(2);
    let deadline = Instant::now() + std::time::Duration::from_secs(200);
    while node.metrics.chunks_bad.get() == 0 {
        assert!(Instant::now() < deadline, "it is found within a few periods");
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    eventually("it is healed", || cluster.holders(chunk(1)) == [1, 2, 3]).await;
    assert_eq!(read(&mut cluster.files(2), chunk(1), 0, 0).await.unwrap().1, data);
}

#[tokio::test(start_paused = true)]
async fn short_ranges_that_are_asked_together_are_answered_each() {
    let cluster = Cluster::start().await;
    let (data, mark) = marked(MIB);
    cluster.write_to_all(chunk(1), &data).await;
    cluster.write_to_all(chunk(2), &bytes(3_000)).await;
    rot(&cluster.server(2).disk, &mark).await;
    let asked = |index: u32, offset: u64, length: u64| v1::ReadRequest {
        chunk: Some(chunk(index).into()),
        offset,
        length,
    };
    let (middle, parts) = (MIB as u64 / 2, 256 * 1024);
    let reads = vec![
        asked(1, 5_000, 10),
        asked(2, 0, 4_096),
        asked(9, 0, 1),
        asked(1, middle, 100),
        asked(1, parts - 5_000, 10_000),
        asked(2, 3_000, 1),
        v1::ReadRequest { chunk: None, offset: 0, length: 1 },
    ];
    let request = v1::ReadManyRequest { reads: reads.clone() };
    // A client that knows nothing of framed bodies.
    let mut answers = cluster.files(2).read_many(request).await.unwrap().into_inner();
    let (mut got, mut failed) = (vec![Vec::new(); reads.len()], vec![None; reads.len()]);
    while let Some(answer) = answers.message().await.unwrap() {
        let index = answer.index as usize;
        failed[index] = answer.error.map(|error| Error::from_wire(error).reason);
        let Some(part) = answer.part else { continue };
        let id = ChunkId::from(reads[index].chunk.unwrap());
        let block = (part.offset / 4096) as u32;
        assert_eq!(verify_blocks(id, block, &part.data, &part.block_checksums), None);
        got[index].push((part.offset as usize, part.data));
    }
    let bad = Some(Reason::ChecksumMismatch);
    let (missing, invalid) = (Some(Reason::ChunkNotFound), Some(Reason::InvalidArgument));
    assert_eq!(failed, [None, None, missing, bad, None, invalid, invalid]);
    let whole = |index: usize| {
        let parts: &Vec<(usize, _)> = &got[index];
        let joined: Vec<u8> = parts.iter().flat_map(|(_, data)| data.to_vec()).collect();
        (parts[0].0, joined)
    };
    assert_eq!(whole(0), (4_096, data[4_096..8_192].to_vec()));
    assert_eq!(whole(1), (0, bytes(3_000)));
    let (first, end) = ((parts as usize - 5_000) / 4_096 * 4_096, parts as usize + 8_192);
    assert_eq!(whole(4), (first, data[first..end].to_vec()));
    assert_eq!(got[4].len(), 2, "it lies across the bound of two parts");
    assert!(got[2].is_empty() && got[3].is_empty() && got[5].is_empty());

    for reads in [vec![asked(1, 0, 1); 65], vec![asked(1, 0, 64 * 1024 + 1)], vec![asked(1, 0, 0)]] {
        let refused = cluster.files(2).read_many(v1::ReadManyRequest { reads }).await.unwrap_err();
        assert_eq!(Error::from(refused).reason, Reason::LimitExceeded);
    }
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_goes_away_stops_the_reading() {
    let cluster = Cluster::start().await;
    cluster.write_to_all(chunk(1), &bytes(64 * MIB)).await;
    let before = cluster.server(2).disk.counters().bytes_read;
    let request = v1::ReadRequest { chunk: Some(chunk(1).into()), offset: 0, length: 0 };
    let mut parts = cluster.files(2).read(request).await.unwrap().into_inner();
    parts.message().await.unwrap().unwrap();
    drop(parts);
    let node = cluster.node(2);
    eventually("the call ended", || node.metrics.requests_active.get() <= 2).await;
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    let bytes_read = cluster.server(2).disk.counters().bytes_read - before;
    // What fits the connection's window, and a little ahead.
    assert!(bytes_read < 24 * MIB as u64, "{bytes_read}");
}

#[tokio::test(start_paused = true)]
async fn an_inventory_is_streamed_in_order() {
    let cluster = Cluster::start().await;
    let parts: Vec<_> = (0..300u32)
        .flat_map(|number| messages(ChunkId::new(1 + u64::from(number) / 3, number % 3), b"tiny"))
        .collect();
    write(&mut cluster.files(1), parts).await.unwrap();
    let inventory = async |detail: InventoryDetail, from, to| {
        let request = v1::InventoryRequest { detail: detail as i32, grant_id_from: from, grant_id_to: to };
        let mut pages = cluster.files(3).inventory(request).await.unwrap().into_inner();
        let (mut digests, mut chunks) = (Vec::new(), Vec::new());
        while let Some(page) = pages.message().await.unwrap() {
            digests.extend(page.digests);
            chunks.extend(page.chunks);
        }
        (digests, chunks)
    };
    let (digests, none) = inventory(InventoryDetail::Digests, 0, 0).await;
    assert!(none.is_empty());
    assert!(digests.iter().map(|digest| digest.grant_id).eq(1..=100));
    assert!(digests.iter().all(|digest| digest.chunk_count == 3));
    let (none, chunks) = inventory(InventoryDetail::Chunks, 7, 9).await;
    assert!(none.is_empty());
    let ids: Vec<ChunkId> =
        chunks.iter().map(|held| held.chunk.as_ref().unwrap().chunk.as_ref().unwrap().into()).collect();
    let expected: Vec<ChunkId> =
        (7..=9).flat_map(|grant| (0..3).map(move |index| ChunkId::new(grant, index))).collect();
    assert_eq!(ids, expected);
    assert!(chunks.iter().all(|held| held.chunk.as_ref().unwrap().group_id == GROUP && !held.corrupt));
}
