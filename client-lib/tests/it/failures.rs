//! Servers that die, fall silent, lie or refuse.

use crate::fake::{Cluster, eventually, net::Mood, noise};
use async_trait::async_trait;
use cairn_proto::net::{Connect, Io};
use client_lib::{Client, Error, Reason};
use std::{
    io,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

const SMALL: usize = 10_000;
const LARGE: usize = 1_500_000;

/// A client whose long writes are of chunks with streams of their own.
fn client(cluster: &Cluster) -> client_lib::Client {
    cluster.builder().chunk_bytes(1 << 20).build().unwrap()
}

#[tokio::test]
async fn a_bad_copy_is_never_served_and_is_reported() {
    for size in [SMALL, LARGE] {
        let cluster = Cluster::start(3);
        let client = client(&cluster);
        let bytes = noise(size, 1);
        client.write("/file", bytes.clone()).await.unwrap();
        cluster.server(1).spoil();
        cluster.server(2).spoil();
        for _ in 0..4 {
            assert!(client.read("/file").await.unwrap() == bytes);
        }
        let reads = |id: u64| cluster.server(id).reads.load(Ordering::Relaxed);
        let met: Vec<_> = [1, 2].into_iter().filter(|id| reads(*id) > 0).collect();
        eventually("each bad copy that was met is reported", || {
            let state = cluster.state.lock();
            met.iter().all(|id| state.reports.iter().any(|report| report.server_id == *id))
        })
        .await;
        cluster.server(3).spoil();
        let error = client.read("/file").await.unwrap_err();
        assert_eq!(error.reason, Reason::ChecksumMismatch);
        assert_eq!(error.detail.path, "/file");
    }
}

#[tokio::test]
async fn a_chunk_without_any_copy_is_lost_and_not_replaced() {
    let cluster = Cluster::start(3);
    let client = client(&cluster);
    client.write("/file", "lost").await.unwrap();
    for id in [1, 2, 3] {
        cluster.server(id).chunks.lock().clear();
    }
    let error = client.get_writer("/file", Vec::new()).await.unwrap_err();
    assert_eq!(error.reason, Reason::ChunkNotFound);
    let said = error.to_string();
    assert!(said.contains("/file") && said.contains("lost") && !said.contains("replaced"), "{said}");
}

#[tokio::test]
async fn a_copy_that_is_missing_is_read_elsewhere() {
    let cluster = Cluster::start(3);
    let client = client(&cluster);
    client.write("/file", "here").await.unwrap();
    for id in [1, 2] {
        cluster.server(id).chunks.lock().clear();
    }
    assert_eq!(client.read("/file").await.unwrap(), "here");
}

#[tokio::test]
async fn a_primary_that_dies_in_the_middle_of_a_write_costs_no_error() {
    for (size, mood) in
        [(SMALL, Mood::Down), (LARGE, Mood::Down), (SMALL, Mood::Silent), (LARGE, Mood::Silent)]
    {
        let cluster = Cluster::start(3);
        let client = client(&cluster);
        client.write("/warm", "up").await.unwrap();
        // Of three primaries in turn two fall over.
        for id in 1..=2 {
            *cluster.server(id).die_in_write.lock() = Some(mood);
        }
        let bytes = noise(size, 2);
        let begin = Instant::now();
        client.write("/file", bytes.clone()).await.unwrap();
        client.write("/file", bytes.clone()).await.unwrap();
        client.write("/file", bytes.clone()).await.unwrap();
        let took = begin.elapsed();
        assert!(took < Duration::from_millis(1_500), "{size} {mood:?} took {took:?}");
        let down = (1..=3).filter(|id| cluster.mood(*id) != Mood::Up).count();
        assert!(down > 0, "{size} {mood:?}");
        assert!(client.read("/file").await.unwrap() == bytes);
        let asked = cluster.state.lock().grant_requests.clone();
        assert!(asked.iter().any(|request| !request.avoid_server_ids.is_empty()), "{asked:?}");
    }
}

#[tokio::test]
async fn a_silent_replica_delays_a_read_by_less_than_half_a_second() {
    for mood in [Mood::Silent, Mood::Down] {
        for id in 1..=3 {
            let cluster = Cluster::start(3);
            let client = client(&cluster);
            let bytes = noise(LARGE, 4);
            client.write("/file", bytes.clone()).await.unwrap();
            assert!(client.read("/file").await.unwrap() == bytes, "connections are made");
            cluster.set_mood(id, mood);
            let begin = Instant::now();
            assert!(client.read("/file").await.unwrap() == bytes);
            let took = begin.elapsed();
            assert!(took < Duration::from_millis(500), "server {id} {mood:?}: {took:?}");
            for _ in 0..5 {
                let begin = Instant::now();
                assert!(client.read("/file").await.unwrap() == bytes);
                assert!(begin.elapsed() < Duration::from_millis(500));
            }
        }
    }
}

#[tokio::test]
async fn a_server_that_comes_back_is_used_again() {
    let cluster = Cluster::start(1);
    let client = client(&cluster);
    client.write("/file", "x").await.unwrap();
    cluster.set_mood(1, Mood::Down);
    let reading = tokio::spawn({
        let client = client.clone();
        async move { client.read("/file").await }
    });
    eventually("members are asked for", || !cluster.calls("Topology").is_empty()).await;
    cluster.set_mood(1, Mood::Up);
    assert_eq!(reading.await.unwrap().unwrap(), "x");
    client.write("/file", "y").await.unwrap();
}

#[tokio::test]
async fn refusals_of_a_primary_lead_to_another_grant() {
    for size in [SMALL, LARGE] {
        for reason in
            [Reason::StaleEpoch, Reason::NoSpace, Reason::ChunkExists, Reason::GrantClosed, Reason::Io]
        {
            let cluster = Cluster::start(3);
            let client = client(&cluster);
            for id in 1..=3 {
                cluster.server(id).refuse_writes.lock().push_back(Error::new(reason, "not here"));
            }
            client.write("/file", noise(size, 1)).await.unwrap();
            assert!(client.read("/file").await.unwrap() == noise(size, 1), "{reason:?}");
            let left: usize = (1..=3).map(|id| cluster.server(id).refuse_writes.lock().len()).sum();
            assert!(left < 3, "{reason:?}");
        }
    }
}

#[tokio::test]
async fn a_group_that_moved_on_is_learned() {
    let cluster = Cluster::start(2);
    let client = client(&cluster);
    client.write("/file", "x").await.unwrap();
    for group in cluster.state.lock().groups.values_mut() {
        group.epoch += 1;
        group.primary_id = 3 - group.primary_id;
    }
    client.write("/file", "y").await.unwrap();
    assert_eq!(client.read("/file").await.unwrap(), "y");
}

#[tokio::test]
async fn misplaced_chunks_are_fetched_by_members_and_committed_without_sending_them_again() {
    let cluster = Cluster::start(3);
    cluster.state.lock().min_copies = 2;
    for id in 1..=3 {
        *cluster.server(id).leave_out.lock() = (1..=3).filter(|other| *other != id).collect();
    }
    let client = client(&cluster);
    let bytes = noise(LARGE, 3);
    client.write("/file", bytes.clone()).await.unwrap();
    let sum = |count: fn(&crate::fake::files::FileServer) -> usize| {
        (1..=3).map(|id| count(cluster.server(id))).sum::<usize>()
    };
    assert_eq!(sum(|server| server.writes.load(Ordering::Relaxed)), 2, "two chunks, written once");
    assert_eq!(sum(|server| server.fetched.load(Ordering::Relaxed)), 4, "two members fetched each");
    let commits = cluster.calls("Commit");
    assert_eq!(commits.len(), 2);
    assert_ne!(commits[0], commits[1], "another attempt, not a repetition");
    assert!(client.read("/file").await.unwrap() == bytes);
}

#[tokio::test]
async fn a_grant_closed_before_the_commit_costs_no_error() {
    for size in [SMALL, LARGE] {
        let cluster = Cluster::start(3);
        let client = client(&cluster);
        let bytes = noise(size, 8);
        cluster.fault("Commit", false, Error::new(Reason::GrantClosed, "too old"));
        client.write("/file", bytes.clone()).await.unwrap();
        assert!(client.read("/file").await.unwrap() == bytes);
    }
}

#[tokio::test]
async fn a_version_collected_during_a_read_is_read_again_as_it_is_now() {
    let cluster = Cluster::start(1);
    let client = client(&cluster);
    client.write("/file", "old").await.unwrap();
    let mut file = client.open("/file").await.unwrap();
    let old = cluster.server(1).chunks.lock().clone();
    client.write("/file", "new").await.unwrap();
    cluster.server(1).chunks.lock().retain(|id, _| !old.contains_key(id));
    assert_eq!(client.read("/file").await.unwrap(), "new");
    let error = file.read_at(0, 10).await.unwrap_err();
    assert_eq!(error.reason, Reason::VersionGone);
}

#[tokio::test]
async fn a_handle_follows_its_version_to_another_layout() {
    let cluster = Cluster::start(1);
    let client = client(&cluster);
    client.write("/file", "same bytes").await.unwrap();
    let mut file = client.open("/file").await.unwrap();
    let kept = cluster.state.lock().nodes["/file"].attributes.clone();
    client.write("/copy", "same bytes").await.unwrap();
    {
        // As compaction does: other chunks, the same version.
        let mut state = cluster.state.lock();
        let content = state.nodes["/copy"].content.clone();
        let node = state.nodes.get_mut("/file").unwrap();
        let old = std::mem::replace(&mut node.content, content);
        node.attributes = kept;
        let id = old.extents[0].chunk.unwrap().chunk.unwrap().into();
        cluster.server(1).chunks.lock().remove(&id);
    }
    assert_eq!(file.read_at(0, 100).await.unwrap(), "same bytes");
}

#[tokio::test]
async fn memory_is_bounded_when_no_server_takes_anything() {
    use tokio::io::AsyncWriteExt as _;
    let cluster = Cluster::start(3);
    let chunk = 64 * 1024;
    let client = cluster.builder().chunk_bytes(chunk).build().unwrap();
    client.write("/warm", "up").await.unwrap();
    (1..=3).for_each(|id| cluster.set_mood(id, Mood::Silent));
    let mut files = Vec::new();
    for number in 0..10 {
        let open = client.open_options().write(true).create(true).open(&format!("/{number}")).await;
        files.push(open.unwrap());
    }
    let taken = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
    let writers = files.into_iter().map(|mut file| {
        let taken = taken.clone();
        async move {
            let step = vec![1; 4_096];
            while file.write_all(&step).await.is_ok() {
                taken.fetch_add(4_096, Ordering::Relaxed);
            }
        }
    });
    let all = futures::future::join_all(writers);
    assert!(tokio::time::timeout(Duration::from_secs(1), all).await.is_err(), "all wait");
    let taken = taken.load(Ordering::Relaxed);
    assert!(taken >= 10 * chunk, "each fills a chunk: {taken}");
    assert!(taken <= (8 + 10) * chunk, "8 under way, and one for each handle: {taken}");
}

#[tokio::test]
async fn an_append_is_not_made_again_when_its_answer_may_be_forgotten() {
    let cluster = Cluster::start(3);
    let client = cluster.builder().session_ttl(Duration::from_secs(1)).build().unwrap();
    client.append("/log", "one ").await.unwrap();
    // Applied, then the directory is away for longer than it keeps the answers of an ended session.
    cluster.fault("Commit", true, Error::unavailable("gone").retry_after_ms(1_200));
    let appending = tokio::spawn({
        let client = client.clone();
        async move { client.append("/log", "two ").await }
    });
    eventually("it is applied", || cluster.faults.lock().is_empty()).await;
    cluster.fault("Commit", false, Error::new(Reason::SessionExpired, "open another"));
    let error = appending.await.unwrap().unwrap_err();
    assert_eq!(error.reason, Reason::OutcomeUnknown, "{error}");
    client.append("/log", "three").await.unwrap();
    assert_eq!(client.read("/log").await.unwrap(), "one two three");
}

/// A network on which nothing is ever reached.
#[derive(Debug)]
struct Nowhere;

#[async_trait]
impl Connect for Nowhere {
    async fn connect(&self, _uri: &str) -> io::Result<Box<dyn Io>> {
        std::future::pending().await
    }
}

#[tokio::test(start_paused = true)]
async fn callers_share_the_failure_of_one_attempt_to_open_a_session() {
    let deadline = Duration::from_secs(4);
    let client = Client::builder()
        .directory("http://127.0.0.1:1")
        .network(Arc::new(Nowhere))
        .deadline(deadline)
        .build()
        .unwrap();
    let begun = tokio::time::Instant::now();
    let calls = (0..8).map(|number| {
        let client = client.clone();
        async move { client.write(&format!("/file-{number}"), "x").await.unwrap_err() }
    });
    for error in futures::future::join_all(calls).await {
        assert!(matches!(error.reason, Reason::Unavailable | Reason::DeadlineExceeded), "{error}");
    }
    let took = begun.elapsed();
    assert!(took < deadline * 4, "eight callers waited for each other: {took:?}");
}

#[tokio::test(start_paused = true)]
async fn streams_of_small_writes_are_closed_when_idle_and_opened_again() {
    let cluster = Cluster::start(1);
    let client = client(&cluster);
    let streams = || cluster.server(1).write_streams.load(Ordering::Relaxed);
    for round in 0..3 {
        client.write("/file", noise(SMALL, round)).await.unwrap();
        assert_eq!(streams(), 1, "it stays for the next one");
        client.write("/file", noise(SMALL, round)).await.unwrap();
        assert_eq!(streams(), 1, "of the same stream");
        eventually("it is closed", || streams() == 0).await;
    }
    // Also when it is closed just then: times around the moment.
    for early in 0..20 {
        client.write("/file", noise(SMALL, 1)).await.unwrap();
        tokio::time::sleep(Duration::from_millis(4_990 + early)).await;
    }
    assert_eq!(cluster.server(1).writes.load(Ordering::Relaxed), 26, "each was written once");
    drop(client);
    eventually("streams end with their client", || streams() == 0).await;
}
