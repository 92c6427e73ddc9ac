//! CHECKED, BOUNDED: what does not fit is refused, and nothing of it stays.

use crate::harness::*;
use cairn_proto::{Reason, checksum::crc64, id::ChunkId, limits, v1};
use std::collections::BTreeSet;

const MIB: usize = 1024 * 1024;

/// A chunk of two messages.
fn two() -> Vec<v1::WriteRequest> {
    messages(chunk(1), &bytes(MIB + 5000))
}

#[tokio::test(start_paused = true)]
async fn refused_writes_leave_nothing_anywhere() {
    let cluster = Cluster::start().await;
    type Spoil = fn(&mut Vec<v1::WriteRequest>);
    let cases: Vec<(&str, Reason, Spoil)> = vec![
        ("a flipped bit", Reason::ChecksumMismatch, |parts| {
            let mut data = parts[1].data.to_vec();
            data[7] ^= 1;
            parts[1].data = data.into();
        }),
        ("a block of another chunk", Reason::ChecksumMismatch, |parts| {
            parts[0].chunk = Some(chunk(2).into());
        }),
        ("another whole checksum", Reason::ChecksumMismatch, |parts| {
            parts[1].finish.as_mut().unwrap().checksum = Some(1);
        }),
        ("no whole checksum", Reason::InvalidArgument, |parts| {
            parts[1].finish.as_mut().unwrap().checksum = None;
        }),
        ("another length", Reason::InvalidArgument, |parts| {
            parts[1].finish.as_mut().unwrap().length += 1;
        }),
        ("out of order", Reason::InvalidArgument, |parts| parts[1].offset = 0),
        ("misaligned", Reason::InvalidArgument, |parts| {
            let data = parts[0].data.slice(..100);
            parts[0].block_checksums = cairn_proto::checksum::block_checksums(chunk(1), 0, &data);
            parts[0].data = data;
            parts[1].offset = 100;
        }),
        ("too much in a message", Reason::LimitExceeded, |parts| {
            parts[0].data = vec![0; limits::DATA_BYTES_MAX + 4096].into();
        }),
        ("too large a message", Reason::LimitExceeded, |parts| {
            parts[0].data = vec![0; limits::MESSAGE_BYTES_MAX + 1].into();
        }),
        ("an empty chunk", Reason::LimitExceeded, |parts| {
            parts.truncate(1);
            (parts[0].data, parts[0].block_checksums) = Default::default();
            parts[0].finish = Some(v1::WriteFinish { length: 0, checksum: Some(0) });
        }),
        ("grant 0", Reason::InvalidArgument, |parts| parts[0].chunk = Some(ChunkId::new(0, 1).into())),
        ("no epoch", Reason::InvalidArgument, |parts| parts[0].epoch = 0),
        ("an older epoch's group", Reason::StaleEpoch, |parts| parts[0].group_id = 77),
    ];
    for (name, reason, spoil) in cases {
        let mut parts = two();
        spoil(&mut parts);
        let error = write(&mut cluster.files(1), parts).await.expect_err(name);
        assert_eq!(error.reason, reason, "{name}: {error}");
        for number in 1..=3 {
            let node = cluster.node(number);
            eventually("it is given up", || !node.receiving.is_arriving(chunk(1))).await;
            assert!(node.store.info(chunk(1)).is_none(), "{name}: something stayed at server {number}");
            assert!(node.store.info(chunk(2)).is_none(), "{name}: something stayed at server {number}");
        }
    }
    let receipts = write(&mut cluster.files(1), two()).await.unwrap();
    assert_eq!(receipts[0].holder_ids, [1, 2, 3], "a refused chunk harms no follower's standing");
}

#[tokio::test(start_paused = true)]
async fn a_stale_epoch_is_answered_with_the_current_group() {
    let cluster = Cluster::start().await;
    cluster.directory.change(|state| state.groups = vec![group(5, 2)]);
    cluster.know_everything().await;
    let error = cluster.write(chunk(1), b"x").await.unwrap_err();
    assert_eq!(error.reason, Reason::StaleEpoch);
    assert_eq!((error.detail.groups[0].epoch, error.detail.groups[0].primary_id), (5, 2));
    let members: BTreeSet<u64> = error.detail.servers.iter().map(|server| server.id).collect();
    assert_eq!(members, BTreeSet::from([1, 2, 3]));
    assert!(error.detail.servers.iter().all(|server| !server.endpoints.is_empty()));

    let mut parts = messages(chunk(1), b"x");
    parts[0].epoch = 5;
    let error = write(&mut cluster.files(1), parts.clone()).await.unwrap_err();
    assert_eq!((error.reason, error.detail.groups[0].primary_id), (Reason::StaleEpoch, 2), "not the primary");
    let receipt = write(&mut cluster.files(2), parts).await.unwrap().remove(0);
    assert_eq!((receipt.holder_ids, receipt.epoch), (vec![2, 1, 3], 5));
}

#[tokio::test(start_paused = true)]
async fn a_group_that_is_not_known_yet_is_asked_for_once() {
    let cluster = Cluster::start().await;
    // Heartbeats are away, the directory can still be asked.
    let calls = cluster.directory.0.lock().topology_calls;
    cluster.directory.change(|state| state.groups = vec![group(9, 1)]);
    let mut parts = messages(chunk(1), b"x");
    parts[0].epoch = 9;
    let receipt = write(&mut cluster.files(1), parts).await.unwrap().remove(0);
    assert_eq!((receipt.epoch, receipt.holder_ids.len()), (9, 3));
    assert_eq!(cluster.directory.0.lock().topology_calls, calls + 1);
}

#[tokio::test(start_paused = true)]
async fn an_error_comes_behind_the_receipts_of_earlier_chunks() {
    let cluster = Cluster::start().await;
    for server in &cluster.servers {
        server.disk.set_sync_latency(std::time::Duration::from_millis(50));
    }
    let mut parts: Vec<_> = (0..5).flat_map(|index| messages(chunk(index), &bytes(3000))).collect();
    parts[3].finish.as_mut().unwrap().checksum = Some(0);
    let (receipts, error) = write_all(&mut cluster.files(1), parts).await;
    let indexes: BTreeSet<u32> =
        receipts.iter().map(|receipt| receipt.chunk.as_ref().unwrap().index).collect();
    assert_eq!(indexes, BTreeSet::from([0, 1, 2]));
    assert_eq!(error.unwrap().reason, Reason::ChecksumMismatch);

    // Also when the failing message is the first of its chunk.
    let mut parts: Vec<_> = (10..13).flat_map(|index| messages(chunk(index), &bytes(3000))).collect();
    parts[2].group_id = 0;
    let (receipts, error) = write_all(&mut cluster.files(1), parts).await;
    assert_eq!(receipts.len(), 2);
    assert_eq!(error.unwrap().reason, Reason::InvalidArgument);
}

#[tokio::test(start_paused = true)]
async fn a_repeated_chunk_gets_its_receipt_and_another_one_is_refused() {
    let cluster = Cluster::start().await;
    for length in [10, 2 * MIB] {
        let id = chunk(length as u32 % 1000);
        let first = cluster.write(id, &bytes(length)).await.unwrap();
        assert_eq!(cluster.write(id, &bytes(length)).await.unwrap(), first);
        let error = cluster.write(id, &vec![1; length]).await.unwrap_err();
        assert_eq!(error.reason, Reason::ChunkExists);
        assert_eq!(read(&mut cluster.files(2), id, 0, 0).await.unwrap().1, bytes(length));
    }
}

#[tokio::test(start_paused = true)]
async fn checksums_that_a_writer_leaves_out_are_computed() {
    let cluster = Cluster::start().await;
    let mut parts = two();
    for part in &mut parts {
        part.block_checksums.clear();
    }
    parts[1].finish.as_mut().unwrap().checksum = None;
    let receipt = write(&mut cluster.files(1), parts).await.unwrap().remove(0);
    assert_eq!(receipt.checksum, crc64(&bytes(MIB + 5000)));
    assert_eq!(receipt.holder_ids, [1, 2, 3]);
    assert!(cluster.node(1).store.info(chunk(1)).unwrap().computed_here);
    let (_, data) = read(&mut cluster.files(3), chunk(1), 0, 0).await.unwrap();
    assert_eq!(data, bytes(MIB + 5000));
}

#[tokio::test(start_paused = true)]
async fn a_write_that_is_meant_for_another_server_leaves_nothing() {
    let cluster = Cluster::start().await;
    let parts = messages(chunk(1), b"strayed");
    for (cluster_id, server, is_meant) in [("other", 1, false), (CLUSTER, 2, false), (CLUSTER, 1, true)] {
        let stream = futures::stream::iter(parts.clone());
        let request = cairn_proto::net::meant_for(stream, cluster_id, server.into());
        let written = cluster.files(1).write(request).await;
        let receipt = match written {
            Ok(answers) => answers.into_inner().message().await,
            Err(status) => Err(status),
        };
        match receipt {
            Ok(receipt) => assert!(is_meant && receipt.is_some()),
            Err(status) => {
                assert_eq!(cairn_proto::Error::from(status).reason, Reason::WrongCluster);
                assert!(!is_meant && cluster.holders(chunk(1)).is_empty());
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn bounded_streams_that_carry_nothing_shut_nobody_out() {
    let cluster = Cluster::start().await;
    let mut idle = Vec::new();
    while idle.len() <= limits::REQUESTS_MAX {
        let mut client = cluster.files(1);
        for _ in 0..limits::STREAMS_PER_CONNECTION_MAX {
            let (messages, receiver) = tokio::sync::mpsc::channel(1);
            let stream = tokio_stream::wrappers::ReceiverStream::new(receiver);
            let answers = client.write(stream).await.unwrap().into_inner();
            idle.push((messages, answers));
        }
    }
    let data = bytes(3_000);
    cluster.write(chunk(1), &data).await.unwrap();
    assert_eq!(read(&mut cluster.files(1), chunk(1), 0, 0).await.unwrap(), (0, data.clone()));
    // Each of them may go on.
    let (sender, answers) = &mut idle[0];
    sender.send(messages(chunk(2), &data).remove(0)).await.unwrap();
    let receipt = answers.message().await.unwrap().unwrap().receipt.unwrap();
    assert_eq!(receipt.length, 3_000);
}
