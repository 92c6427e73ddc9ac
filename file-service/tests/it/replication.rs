//! DURABLE: a receipt names who holds a chunk durably, and never waits long for who does not answer.

use crate::harness::*;
use cairn_proto::Reason;
use futures::StreamExt as _;
use std::time::Duration;
use tokio::time::Instant;

const MIB: usize = 1024 * 1024;

/// Writes until a receipt names these holders.
async fn until_holders(cluster: &Cluster, from: u32, wanted: &[u64]) {
    for index in from..from + 1_000 {
        if cluster.write(chunk(index), b"again").await.unwrap().holder_ids == wanted {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("receipts never named {wanted:?}");
}

#[tokio::test(start_paused = true)]
async fn all_three_hold_small_and_large_chunks() {
    let cluster = Cluster::start().await;
    for (index, length) in [1, 4096, 5000, 200_000, MIB, 3 * MIB + 100, 64 * MIB].into_iter().enumerate() {
        let id = chunk(index as u32);
        let data = bytes(length);
        let receipt = cluster.write(id, &data).await.unwrap();
        assert_eq!(receipt.holder_ids, [1, 2, 3]);
        assert_eq!((receipt.length, receipt.epoch, receipt.group_id), (length as u64, 1, GROUP));
        for number in 1..=3 {
            assert_eq!(read(&mut cluster.files(number), id, 0, 0).await.unwrap(), (0, data.clone()));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_killed_follower_costs_nothing_and_counts_again_after_its_restart() {
    let mut cluster = Cluster::start().await;
    cluster.write_to_all(chunk(0), b"first").await;
    cluster.kill(3).await;
    for index in 1..10 {
        let began = Instant::now();
        let receipt = cluster.write(chunk(index), &bytes(300_000)).await.unwrap();
        assert_eq!(receipt.holder_ids, [1, 2]);
        assert!(began.elapsed() < Duration::from_millis(50), "{:?}", began.elapsed());
    }
    cluster.restart(3).await;
    until_holders(&cluster, 100, &[1, 2, 3]).await;
}

#[tokio::test(start_paused = true)]
async fn a_follower_killed_in_the_middle_of_a_chunk_drops_out_of_it() {
    let mut cluster = Cluster::start().await;
    let (sender, receiver) = futures::channel::mpsc::unbounded();
    let mut client = cluster.files(1);
    let mut parts = messages(chunk(0), &bytes(3 * MIB)).into_iter();
    sender.unbounded_send(parts.next().unwrap()).unwrap();
    let mut answers = client.write(receiver).await.unwrap().into_inner();
    let follower = cluster.node(3);
    eventually("the follower receives", || follower.receiving.is_arriving(chunk(0))).await;
    drop(follower);
    cluster.kill(3).await;
    let began = Instant::now();
    parts.for_each(|part| sender.unbounded_send(part).unwrap());
    let receipt = answers.message().await.unwrap().unwrap().receipt.unwrap();
    assert_eq!(receipt.holder_ids, [1, 2]);
    assert!(began.elapsed() < Duration::from_millis(50), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_silent_follower_costs_one_write_0_3_s_and_counts_again_when_it_answers() {
    let cluster = Cluster::start().await;
    cluster.write_to_all(chunk(0), b"first").await;
    cluster.cut(3);
    let began = Instant::now();
    assert_eq!(cluster.write(chunk(1), b"second").await.unwrap().holder_ids, [1, 2]);
    let waited = began.elapsed();
    assert!(waited >= Duration::from_millis(300) && waited < Duration::from_millis(350), "{waited:?}");
    for index in 2..20 {
        let began = Instant::now();
        assert_eq!(cluster.write(chunk(index), b"more").await.unwrap().holder_ids, [1, 2]);
        assert!(began.elapsed() < Duration::from_millis(20), "{:?}", began.elapsed());
    }
    cluster.heal(3);
    until_holders(&cluster, 100, &[1, 2, 3]).await;
    // What it was late with arrived in the end.
    eventually("the late copy counts", || cluster.holders(chunk(1)) == [1, 2, 3]).await;
}

#[tokio::test(start_paused = true)]
async fn a_silent_follower_is_found_again_also_after_its_connection_was_given_up() {
    let cluster = Cluster::start().await;
    cluster.write_to_all(chunk(0), b"first").await;
    cluster.cut(3);
    for index in 1..200 {
        let began = Instant::now();
        cluster.write(chunk(index), b"more").await.unwrap();
        assert!(began.elapsed() < Duration::from_millis(350), "{:?}", began.elapsed());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    cluster.heal(3);
    until_holders(&cluster, 1_000, &[1, 2, 3]).await;
}

#[tokio::test(start_paused = true)]
async fn a_silent_follower_does_not_stop_a_large_chunk_nor_fill_the_memory() {
    let cluster = Cluster::start().await;
    cluster.cut(3);
    let began = Instant::now();
    assert_eq!(cluster.write(chunk(0), &bytes(64 * MIB)).await.unwrap().holder_ids, [1, 2]);
    assert!(began.elapsed() < Duration::from_millis(700), "{:?}", began.elapsed());
    // Late by now: it gets what fits its buffer and is not waited for.
    let began = Instant::now();
    assert_eq!(cluster.write(chunk(1), &bytes(64 * MIB)).await.unwrap().holder_ids, [1, 2]);
    assert!(began.elapsed() < Duration::from_millis(50), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn followers_that_stall_together_slow_a_writer_down_instead_of_failing_it() {
    let cluster = Cluster::start().await;
    cluster.write_to_all(chunk(0), b"first").await;
    cluster.cut(2);
    cluster.cut(3);
    let id = chunk(1);
    let mut client = cluster.files(1);
    let writing = tokio::spawn(async move { write(&mut client, messages(id, &bytes(64 * MIB))).await });
    // Longer than what makes one of them late.
    tokio::time::sleep(Duration::from_millis(900)).await;
    assert!(!writing.is_finished());
    cluster.heal(2);
    let receipt = writing.await.unwrap().unwrap().remove(0);
    assert!(receipt.holder_ids.starts_with(&[1, 2]), "{:?}", receipt.holder_ids);
}

#[tokio::test(start_paused = true)]
async fn too_few_servers_is_said_at_once_and_names_who_is_missing() {
    let mut cluster = Cluster::start().await;
    cluster.kill(2).await;
    cluster.kill(3).await;
    for index in 0..3 {
        let began = Instant::now();
        let error = cluster.write(chunk(index), b"x").await.unwrap_err();
        assert_eq!(error.reason, Reason::TooFewServers, "{error}");
        assert!(error.message().contains("server 2") && error.message().contains("server 3"), "{error}");
        assert!(began.elapsed() < Duration::from_millis(50), "{:?}", began.elapsed());
    }
    cluster.restart(2).await;
    // It is not known to be back yet, but a write that cannot do without it tries.
    let receipt = cluster.write(chunk(9), b"x").await.unwrap();
    assert_eq!(receipt.holder_ids, [1, 2]);
}

#[tokio::test(start_paused = true)]
async fn many_chunks_of_one_stream_are_taken_in_before_the_first_is_durable() {
    let cluster = Cluster::start().await;
    for server in &cluster.servers {
        server.disk.set_sync_latency(Duration::from_millis(100));
    }
    let began = Instant::now();
    let all: Vec<_> = (0..200).flat_map(|index| messages(chunk(index), &bytes(2000))).collect();
    let receipts = write(&mut cluster.files(1), all).await.unwrap();
    assert_eq!(receipts.len(), 200);
    assert!(receipts.iter().all(|receipt| receipt.holder_ids == [1, 2, 3]));
    // One after the other they would take 20 s.
    assert!(began.elapsed() < Duration::from_millis(1_500), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_large_chunk_that_stands_still_holds_no_small_one_up() {
    let cluster = Cluster::start().await;
    let (sender, receiver) = futures::channel::mpsc::unbounded();
    let mut parts = messages(chunk(0), &bytes(8 * MIB)).into_iter();
    parts.by_ref().take(4).for_each(|part| sender.unbounded_send(part).unwrap());
    let mut client = cluster.files(1);
    let mut large = client.write(receiver).await.unwrap().into_inner();
    let follower = cluster.node(2);
    eventually("the follower receives", || follower.receiving.is_arriving(chunk(0))).await;
    for index in 1..20 {
        cluster.write_to_all(chunk(index), b"small").await;
        cluster.write_to_all(chunk(100 + index), &bytes(2 * MIB)).await;
    }
    parts.for_each(|part| sender.unbounded_send(part).unwrap());
    assert_eq!(large.message().await.unwrap().unwrap().receipt.unwrap().holder_ids, [1, 2, 3]);
}

#[tokio::test(start_paused = true)]
async fn a_writer_that_goes_away_leaves_nothing() {
    let cluster = Cluster::start().await;
    let (sender, receiver) = futures::channel::mpsc::unbounded();
    sender.unbounded_send(messages(chunk(0), &bytes(2 * MIB)).remove(0)).unwrap();
    let answers = cluster.files(1).write(receiver).await.unwrap();
    let nodes = [cluster.node(1), cluster.node(2), cluster.node(3)];
    eventually("all receive", || nodes.iter().all(|node| node.receiving.is_arriving(chunk(0)))).await;
    drop((answers, sender));
    eventually("all gave up", || !nodes.iter().any(|node| node.receiving.is_arriving(chunk(0)))).await;
    assert!(cluster.holders(chunk(0)).is_empty());
    // The same chunk may be sent again, and the followers are still prompt.
    cluster.write_to_all(chunk(0), &bytes(2 * MIB)).await;
}

#[tokio::test(start_paused = true)]
async fn full_disks_drop_out_and_are_named() {
    let cluster = Cluster::start().await;
    cluster.write_to_all(chunk(0), b"room").await;
    let fill = |number: u64| cluster.server(number).disk.set_capacity(0);
    fill(3);
    assert_eq!(cluster.write(chunk(1), &bytes(MIB)).await.unwrap().holder_ids, [1, 2]);
    fill(2);
    let error = cluster.write(chunk(2), &bytes(MIB)).await.unwrap_err();
    assert_eq!((error.reason, error.detail.server.as_str()), (Reason::NoSpace, "2"), "{error}");
    fill(1);
    let error = cluster.write(chunk(3), &bytes(MIB)).await.unwrap_err();
    assert_eq!((error.reason, error.detail.server.as_str()), (Reason::NoSpace, "1"), "{error}");
    for number in 1..=3 {
        cluster.server(number).disk.set_capacity(2 << 30);
    }
    cluster.write_to_all(chunk(4), &bytes(MIB)).await;
}

#[tokio::test(start_paused = true)]
async fn what_a_receipt_says_survives_a_crash_of_all() {
    let mut cluster = Cluster::start().await;
    let written: Vec<_> =
        futures::stream::iter(0..50)
            .map(|index| {
                let cluster = &cluster;
                async move {
                    (index, cluster.write(chunk(index), &bytes(index as usize * 9_999 + 1)).await.unwrap())
                }
            })
            .buffer_unordered(10)
            .collect()
            .await;
    for number in 1..=3 {
        cluster.kill(number).await;
        cluster.server(number).disk.crash(disk::CrashKeep::Nothing);
    }
    for number in 1..=3 {
        cluster.restart(number).await;
    }
    for (index, receipt) in written {
        for holder in receipt.holder_ids {
            let (_, data) = read(&mut cluster.files(holder), chunk(index), 0, 0).await.unwrap();
            assert_eq!(data, bytes(index as usize * 9_999 + 1));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_follower_s_stream_takes_no_more_chunks_than_the_follower_reads_on_with() {
    let cluster = Cluster::start().await;
    cluster.write_to_all(chunk(0), b"first").await;
    // In time, but only just: whoever had to wait for the round of syncs before would be late.
    cluster.server(3).disk.set_sync_latency(Duration::from_millis(140));
    let began = Instant::now();
    let count = 5 * file_service::receive::CHUNKS_IN_FLIGHT_MAX as u32;
    let writing = (1..=count).map(|index| {
        let mut client = cluster.files(1);
        async move { write(&mut client, messages(chunk(index), &bytes(500))).await.unwrap().remove(0) }
    });
    let receipts = futures::future::join_all(writing).await;
    let without: Vec<_> = receipts.iter().filter(|receipt| receipt.holder_ids != [1, 2, 3]).collect();
    assert!(
        without.is_empty(),
        "{} of {count} receipts lack a follower, such as {:?}",
        without.len(),
        without[0]
    );
    assert_eq!(cluster.node(1).metrics.late_followers.get(), 0);
    assert!(began.elapsed() < Duration::from_millis(600), "{:?}", began.elapsed());
}
