//! HEALED: members fetch what they missed, a dead member's place is taken, deletes reach every disk, and "healthy" is
//! what the servers hold.

use cairn_proto::v1::ServerState;
use cairn_tests::{checks::healed, copies::Copies, eventually::eventually, healthy, seed};
use client_lib::Client;
use cluster::Cluster;
use futures::{StreamExt as _, stream};
use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

fn fast(config: &mut dir_service::Config) {
    let timing = &mut config.timing;
    timing.suspect_ms = 1_000;
    timing.dead_ms = 3_000;
    timing.compare_interval_ms = 1_000;
    timing.grace_ms = 500;
}

async fn cluster(file_servers: usize) -> Cluster {
    Cluster::builder()
        .file_servers(file_servers)
        .memory(true)
        .directory_config(fast)
        .build_and_start()
        .await
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn healed_member_fetches_what_it_missed() {
    let cluster = cluster(3).await;
    let client = cluster.client_builder().chunk_bytes(96 * 1024).build().unwrap();
    client.write("/before", vec![1; 500_000]).await.unwrap();
    healthy(&cluster, Duration::from_secs(30)).await;
    cluster.kill(1).await;
    for number in 0..50 {
        client.write(&format!("/missed-{number}"), vec![number; 20_000]).await.unwrap();
    }
    // What misses copies is noted right behind the acknowledgement.
    eventually("status does not lie while a server is away", Duration::from_secs(20), || async {
        let chunks = cluster.status().await.unwrap().chunks.unwrap_or_default();
        let right = chunks.under_replicated >= 50 && chunks.lost == 0;
        if right { Ok(()) } else { Err(format!("{chunks:?}")) }
    })
    .await;
    cluster.restart(1).await.unwrap();
    cluster.wait_ready().await.unwrap();
    healthy(&cluster, Duration::from_secs(60)).await;
    // The copies are really there: with the two others gone, the one that was away serves everything.
    cluster.kill(0).await;
    cluster.kill(2).await;
    let reader = cluster.client().await.unwrap();
    for number in 0..50 {
        assert_eq!(reader.read(&format!("/missed-{number}")).await.unwrap(), vec![number; 20_000]);
    }
    assert_eq!(reader.read("/before").await.unwrap(), vec![1; 500_000]);
    cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn healed_place_of_a_dead_member_is_taken_by_a_spare_server() {
    let cluster = cluster(4).await;
    let client = cluster.client_builder().chunk_bytes(96 * 1024).build().unwrap();
    for number in 0..30 {
        client.write(&format!("/file-{number}"), vec![number; 150_000]).await.unwrap();
    }
    healthy(&cluster, Duration::from_secs(30)).await;
    cluster.kill(2).await;
    let dead = cluster.file_server(2).await.unwrap().id;
    eventually("no group has a seat on the dead server", Duration::from_secs(60), || async {
        let topology = cluster.topology().await.map_err(|error| error.to_string())?;
        let held = topology.groups.iter().flat_map(|group| &group.seats).any(|seat| seat.server_id == dead);
        if held { Err("it still has one".to_owned()) } else { Ok(()) }
    })
    .await;
    eventually("every chunk has three copies again", Duration::from_secs(60), || async {
        let chunks = cluster.status().await.map_err(|error| error.to_string())?.chunks.unwrap_or_default();
        if chunks.healthy == chunks.total && chunks.total > 0 { Ok(()) } else { Err(format!("{chunks:?}")) }
    })
    .await;
    // Another one may die now.
    cluster.kill(0).await;
    let reader = cluster.client().await.unwrap();
    for number in 0..30 {
        assert_eq!(reader.read(&format!("/file-{number}")).await.unwrap(), vec![number; 150_000]);
    }
    cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn healed_disks_are_rid_of_deleted_bytes_also_where_the_server_was_away() {
    let cluster = cluster(3).await;
    let client = cluster.client_builder().chunk_bytes(96 * 1024).build().unwrap();
    for number in 0..20 {
        client.write(&format!("/file-{number}"), vec![number; 300_000]).await.unwrap();
    }
    healthy(&cluster, Duration::from_secs(30)).await;
    cluster.kill(1).await;
    for number in 0..20 {
        client.delete(&format!("/file-{number}")).await.unwrap();
    }
    client.write("/kept", vec![9; 1_000]).await.unwrap();
    cluster.restart(1).await.unwrap();
    cluster.wait_ready().await.unwrap();
    eventually("all servers hold nothing but what is left", Duration::from_secs(120), || async {
        let status = cluster.status().await.map_err(|error| error.to_string())?;
        let held: Vec<u64> = status
            .file_servers
            .iter()
            .map(|server| server.usage.as_ref().map_or(u64::MAX, |usage| usage.chunks))
            .collect();
        if held.iter().all(|chunks| *chunks == 1) { Ok(()) } else { Err(format!("{held:?}")) }
    })
    .await;
    cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn healed_writes_need_min_copies_and_say_who_is_missing() {
    let cluster = cluster(3).await;
    let client = cluster.client_builder().deadline(Duration::from_secs(3)).build().unwrap();
    client.write("/file", "three copies").await.unwrap();
    cluster.kill(0).await;
    client.write("/file", "two copies").await.unwrap();
    cluster.kill(1).await;
    let error = client.write("/file", "one copy").await.unwrap_err();
    // On a machine that stalls, the last attempt may get no answer in time; then the error still says what was told before.
    assert!(
        matches!(error.reason, client_lib::Reason::TooFewServers | client_lib::Reason::DeadlineExceeded),
        "{error:?}"
    );
    assert!(error.to_string().contains("needs 2"), "it says how many are needed: {error}");
    assert_eq!(&client.read("/file").await.unwrap()[..], b"two copies", "reads go on");
    cluster.restart(0).await.unwrap();
    eventually("writes come back", Duration::from_secs(30), || async {
        client.write("/file", "two again").await.map(drop)
    })
    .await;
    cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn healed_healthy_means_that_every_copy_is_there() {
    assert_eq!(healed::missed_while_away(Cluster::builder(), seed("HEALED_SEED")).await, Ok(()));
}

#[tokio::test(flavor = "multi_thread")]
async fn healed_lost_copies_are_seen_and_made_again() {
    assert_eq!(healed::lost_copies(Cluster::builder(), seed("HEALED_SEED")).await, Ok(()));
}

/// Writes that are under way at a time, where many files are written.
const WRITES_AT_ONCE: usize = 16;

/// Writes files of so many bytes, several at a time.
async fn write_many(client: &Client, prefix: &str, files: usize, bytes: usize) {
    stream::iter(0..files)
        .map(|number| async move {
            client.write(&format!("{prefix}-{number}"), vec![number as u8; bytes]).await.unwrap();
        })
        .buffer_unordered(WRITES_AT_ONCE)
        .collect::<Vec<()>>()
        .await;
}

/// The goal is 5 s; what is asserted leaves room for a development build on a machine that has other work.
#[tokio::test(flavor = "multi_thread")]
async fn healed_a_thousand_small_files_are_back_soon_after_the_return() {
    const FILES: usize = 1_000;
    const BYTES: usize = 4_096;
    const LIMIT: Duration = Duration::from_secs(20);
    let cluster = Cluster::builder().file_servers(3).memory(true).build_and_start().await.unwrap();
    let client = cluster.client().await.unwrap();
    client.write("/before", "all there").await.unwrap();
    healthy(&cluster, Duration::from_secs(30)).await;
    cluster.kill(1).await;
    write_many(&client, "/missed", FILES, BYTES).await;
    let chunks = cluster.status().await.unwrap().chunks.unwrap();
    assert!(chunks.under_replicated >= FILES as u64, "status does not lie: {chunks:?}");

    let returned = Instant::now();
    cluster.restart(1).await.unwrap();
    let started = returned.elapsed();
    healthy(&cluster, LIMIT).await;
    println!(
        "{FILES} files of {BYTES} bytes are back {:.2} s after the return of their server, which took {:.2} s to start",
        returned.elapsed().as_secs_f64(),
        started.as_secs_f64()
    );
    let census = Copies::at(&cluster.file_server_uri(1)).census().await.unwrap();
    assert_eq!(census.good, FILES as u64 + 1, "it holds them: {census:?}");
    cluster.shutdown().await.unwrap();
}

/// Who sits where: the members of each group.
async fn seats(cluster: &Cluster) -> BTreeMap<u64, Vec<u64>> {
    let topology = cluster.topology().await.unwrap();
    let members = |group: cairn_proto::v1::Group| {
        (group.id, group.seats.iter().map(|seat| seat.server_id).collect::<Vec<u64>>())
    };
    topology.groups.into_iter().map(members).collect()
}

/// A sync that takes longer than the silence that makes a server suspect, and a change of the cluster that every server
/// makes durable meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn healed_a_disk_that_stalls_does_not_make_its_server_silent() {
    const SILENCE_MS: u64 = 5_000;
    const WATCHED: Duration = Duration::from_millis(2 * SILENCE_MS);
    const STALL: Duration = Duration::from_millis(3 * SILENCE_MS);
    let builder = Cluster::builder().file_servers(3).memory(true);
    let builder = builder.directory_config(|config| config.timing.suspect_ms = SILENCE_MS);
    let cluster = builder.build_and_start().await.unwrap();
    let client = cluster.client().await.unwrap();
    write_many(&client, "/before", 20, 4_096).await;
    let stalled = cluster.file_server(1).await.unwrap().id;
    cluster.memory_disk(1).unwrap().set_sync_latency(STALL);
    cluster.add_file_server(None).await.unwrap();
    let begun = Instant::now();
    while begun.elapsed() < WATCHED {
        for server in cluster.status().await.unwrap().file_servers {
            let server = server.server.unwrap();
            assert!(server.id != stalled || server.state() == ServerState::Live, "{server:?}");
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    cluster.memory_disk(1).unwrap().set_sync_latency(Duration::ZERO);
    cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn healed_a_slow_disk_moves_no_seat_and_starts_no_repair() {
    const SLOW: Duration = Duration::from_millis(400);
    const WATCHED: Duration = Duration::from_secs(8);
    // A spare server stands ready, and silence would mean death within the time that is watched.
    let cluster = Cluster::builder()
        .file_servers(4)
        .memory(true)
        .directory_config(|config| config.timing.dead_ms = 5_000)
        .build_and_start()
        .await
        .unwrap();
    let client = cluster.client().await.unwrap();
    // Groups are made at the first writes.
    write_many(&client, "/before", 50, 4_096).await;
    healthy(&cluster, Duration::from_secs(30)).await;
    let slow = cluster.file_server(1).await.unwrap().id;
    let (seated, made) = (seats(&cluster).await, copies_made(&cluster).await);
    assert!(seated.values().any(|members| members.contains(&slow)));
    cluster.memory_disk(1).unwrap().set_sync_latency(SLOW);

    let (stop, written) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let writers: Vec<_> = (0..4)
        .map(|writer| {
            let (client, stop, written) = (client.clone(), stop.clone(), written.clone());
            tokio::spawn(async move {
                for number in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    client.write(&format!("/slow-{writer}-{number}"), vec![writer; 4_096]).await.unwrap();
                    written.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    let begun = Instant::now();
    while begun.elapsed() < WATCHED {
        let status = cluster.status().await.unwrap();
        for server in status.file_servers {
            let state = server.server.as_ref().unwrap().state();
            assert_eq!(state, ServerState::Live, "slow is not silent: {server:?}");
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.await.unwrap();
    }
    let written = written.load(Ordering::Relaxed);
    println!("{written} files written in {WATCHED:?} with a disk that takes {SLOW:?} for a sync");
    assert!(written >= 20, "writes go on: {written}");
    // What was late arrived by itself and is counted, before anybody compares or copies.
    healthy(&cluster, Duration::from_secs(60)).await;
    let repaired = copies_made(&cluster).await - made;
    // A machine that stands still for seconds may make a copy or two count as missing.
    assert!(repaired <= written / 20, "{repaired} copies were made again of {written} that were only late");
    assert_eq!(seats(&cluster).await, seated, "no seat moved");
    cluster.shutdown().await.unwrap();
}

async fn copies_made(cluster: &Cluster) -> u64 {
    cluster.status().await.unwrap().repairs.unwrap_or_default().copies_made
}
