//! Names, lists and what operators ask.

use crate::fake::{Cluster, eventually};
use client_lib::{Condition, Error, Kind, ListOptions, LockOptions, Reason, RenameOptions, SetAttributes};
use futures::StreamExt as _;

#[tokio::test]
async fn names_are_made_moved_and_removed() {
    let cluster = Cluster::start(3);
    let client = cluster.client();
    client.mkdir_all("/a/b/c").await.unwrap();
    assert_eq!(client.mkdir_all("/a/b/c").await.unwrap().kind(), Kind::Directory);
    client.create("/a/empty").await.unwrap();
    assert_eq!(client.create("/a/empty").await.unwrap_err().reason, Reason::AlreadyExists);
    assert_eq!(client.mkdir_all("/a/empty").await.unwrap_err().reason, Reason::NotADirectory);
    assert_eq!(client.read("/a/empty").await.unwrap(), "");
    assert_eq!(client.read("/a").await.unwrap_err().reason, Reason::IsADirectory);
    client.write("/a/full", "x").await.unwrap();
    let kept = RenameOptions::new().condition(Condition::Absent);
    assert_eq!(
        client.rename_with("/a/full", "/a/empty", kept).await.unwrap_err().reason,
        Reason::ConditionFailed
    );
    client.rename("/a/full", "/a/empty").await.unwrap();
    assert_eq!(client.read("/a/empty").await.unwrap(), "x");
    assert!(!client.exists("/a/full").await.unwrap());
    let changed = client.set_attributes("/a/empty", SetAttributes::new().mode(0o600)).await.unwrap();
    assert_eq!(changed.mode, 0o600);
    assert_eq!(client.delete("/a").await.unwrap_err().reason, Reason::NotEmpty);
    client.delete("/a/empty").await.unwrap();
    let error = client.delete("/a/empty").await.unwrap_err();
    assert_eq!((error.reason, error.detail.path.as_str()), (Reason::NotFound, "/a/empty"));
}

#[tokio::test]
async fn lists_stream_page_by_page() {
    let cluster = Cluster::start(3);
    let client = cluster.client();
    client.mkdir("/many").await.unwrap();
    for number in 0..25 {
        client.create(&format!("/many/{number:02}")).await.unwrap();
    }
    let mut list = client.list_with("/many", ListOptions::new().page_size(10));
    let first = list.next().await.unwrap().unwrap();
    assert_eq!(first.name, "00");
    assert!(first.attributes.is_some());
    eventually("the next page is fetched ahead", || cluster.calls("List").len() == 2).await;
    let rest: Vec<_> = list.map(|entry| entry.unwrap().name).collect().await;
    assert_eq!(rest.len(), 24);
    assert!(rest.is_sorted());
    assert_eq!(cluster.calls("List").len(), 3);
    let error = client.list("/none").next().await.unwrap().unwrap_err();
    assert_eq!(error.reason, Reason::NotFound);
}

#[tokio::test]
async fn recursive_delete_goes_in_steps_and_reports_what_stays() {
    let cluster = Cluster::start(3);
    let client = cluster.client();
    client.mkdir_all("/tree/x/y").await.unwrap();
    for number in 0..12 {
        client.create(&format!("/tree/x/y/{number}")).await.unwrap();
    }
    let lock = client.lock("/tree/x/y/3", LockOptions::new()).await.unwrap();
    let report = client.delete_recursive("/tree").await.unwrap();
    assert_eq!((report.removed, report.kept_count), (11, 1));
    assert_eq!(report.kept[0].path, "/tree/x/y/3");
    assert!(cluster.calls("Delete").len() >= 3);
    lock.unlock().await.unwrap();
    assert_eq!(client.delete_recursive("/tree").await.unwrap().removed, 4);
    assert!(!client.exists("/tree").await.unwrap());
}

#[tokio::test]
async fn a_repeated_call_carries_the_same_request_id_and_is_applied_once() {
    let cluster = Cluster::start(3);
    let client = cluster.client();
    client.write("/file", "x").await.unwrap();
    for applied in [false, true] {
        cluster.fault("Commit", applied, Error::unavailable("the answer was lost"));
        let before = cluster.calls("Commit").len();
        let version = client.append("/file", "y").await.unwrap().version;
        let calls = cluster.calls("Commit")[before..].to_vec();
        assert_eq!(calls.len(), 2);
        assert_eq!(calls[0], calls[1]);
        assert_eq!(client.stat("/file").await.unwrap().version, version);
    }
    assert_eq!(client.read("/file").await.unwrap(), "xyy");
    let sequences: Vec<_> = cluster.calls("Commit").iter().map(|id| id.sequence).collect();
    assert!(sequences.is_sorted(), "{sequences:?}");
}

#[tokio::test]
async fn an_outcome_that_cannot_be_known_is_told() {
    let cluster = Cluster::start(3);
    let client = cluster.client();
    cluster.fault("Commit", true, Error::new(Reason::OutcomeUnknown, "too long ago"));
    let error = client.write("/file", "x").await.unwrap_err();
    assert_eq!(error.reason, Reason::OutcomeUnknown);
    assert_eq!(cluster.calls("Commit").len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_directory_that_is_away_is_waited_for_until_the_deadline() {
    let cluster = Cluster::start(3);
    let client = cluster.client();
    for _ in 0..20 {
        cluster.fault("Status", false, Error::new(Reason::Rebuilding, "wait"));
    }
    assert_eq!(client.status().await.unwrap().files, 42);
    cluster.net.set(crate::fake::DIRECTORY, crate::fake::net::Mood::Down);
    let begin = tokio::time::Instant::now();
    let error = client.stat("/").await.unwrap_err();
    assert_eq!(error.reason, Reason::Unavailable);
    assert!(error.to_string().contains("directory:7400"), "{error}");
    let took = begin.elapsed().as_secs();
    assert!((25..=35).contains(&took), "{took} s");
    assert!(cluster.faults.lock().is_empty());
}

#[tokio::test]
async fn another_address_of_the_directory_is_used_when_one_does_not_answer() {
    let cluster = Cluster::start(3);
    let network: std::sync::Arc<dyn cairn_proto::net::Connect> = std::sync::Arc::new(cluster.net.clone());
    let client = client_lib::Client::builder()
        .directory("http://nobody:1")
        .directory(crate::fake::DIRECTORY)
        .network(network)
        .build()
        .unwrap();
    client.write("/file", "x").await.unwrap();
    assert_eq!(client.read("/file").await.unwrap(), "x");
}

#[tokio::test]
async fn a_watch_goes_on_after_a_break_without_gap_or_repetition() {
    let cluster = Cluster::start(3);
    let client = cluster.client();
    let changes: Vec<_> = client
        .watch("/", 1)
        .take(12)
        .map(|change| change.map(|c| (c.revision, c.name)).unwrap())
        .collect()
        .await;
    let expected: Vec<_> =
        (1..=6).flat_map(|revision| ["a", "b"].map(|name| (revision, name.to_owned()))).collect();
    assert_eq!(changes, expected);
}

#[tokio::test]
async fn explanations_are_joined_from_their_pages() {
    let cluster = Cluster::start(1);
    assert_eq!(cluster.client().explain("/x").await.unwrap().chunks.len(), 2);
    assert!(cluster.client().drain(1.into(), false).await.unwrap().drained);
}
