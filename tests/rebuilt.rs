//! REBUILT: the directory's store is lost; the file servers give the namespace back.

use cairn_tests::{checks::rebuilt, eventually::eventually, shipped};
use client_lib::Reason;
use cluster::Cluster;
use std::time::Duration;

#[tokio::test(flavor = "multi_thread")]
async fn rebuilt_namespace_is_the_same_and_nothing_deleted_comes_back() {
    assert_eq!(rebuilt::lost_store(Cluster::builder(), 40).await, Ok(()));
}

#[tokio::test(flavor = "multi_thread")]
async fn rebuilt_carriers_hold_what_they_said_after_a_power_loss() {
    assert_eq!(rebuilt::lost_store_and_power(Cluster::builder(), 12).await, Ok(()));
}

#[tokio::test(flavor = "multi_thread")]
async fn rebuilt_directory_answers_nothing_about_names_before_it_is_sure() {
    let cluster = Cluster::builder().file_servers(3).memory(true).build_and_start().await.unwrap();
    let client = cluster.client().await.unwrap();
    client.write("/file", "content").await.unwrap();
    shipped(&cluster).await;
    cluster.kill_all().await;
    cluster.lose_directory_store().await.unwrap();
    cluster.restart_directory().await.unwrap();
    // One of three carriers: another two might know something newer.
    cluster.restart(0).await.unwrap();
    let hasty = cluster.client_builder().deadline(Duration::from_secs(2)).build().unwrap();
    let error = hasty.stat("/file").await.unwrap_err();
    assert!(
        matches!(error.reason, Reason::Rebuilding | Reason::Unavailable | Reason::DeadlineExceeded),
        "{error}"
    );
    assert_ne!(error.reason, Reason::NotFound);
    cluster.restart(1).await.unwrap();
    cluster.restart(2).await.unwrap();
    cluster.wait_ready().await.unwrap();
    assert_eq!(&cluster.client().await.unwrap().read("/file").await.unwrap()[..], b"content");
    cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn rebuilt_sessions_and_locks_of_the_lost_directory_get_their_time_and_end() {
    let cluster = Cluster::builder().file_servers(3).memory(true).build_and_start().await.unwrap();
    cluster.client().await.unwrap().write("/file", "content").await.unwrap();
    cairn_tests::dead_holder(&cluster, "/file", Duration::from_secs(2)).await;
    rebuilt::lose_and_rebuild(&cluster).await.unwrap();
    let other = cluster.client().await.unwrap();
    eventually("the lock of a client that did not come back ends", Duration::from_secs(30), || async {
        other.write("/file", "next").await.map(drop)
    })
    .await;
    cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn rebuilt_generations_never_repeat_when_the_store_is_lost_twice_in_a_row() {
    let cluster = Cluster::builder().file_servers(3).memory(true).build_and_start().await.unwrap();
    cluster.client().await.unwrap().write("/file", "content").await.unwrap();
    let mut generation = 1;
    for away in 0..3 {
        shipped(&cluster).await;
        cluster.kill_directory().await;
        cluster.lose_directory_store().await.unwrap();
        cluster.restart_directory().await.unwrap();
        // As soon as it serves its store is lost again, and one that may be the only carrier of it is away.
        let serving = eventually("it serves", Duration::from_secs(30), || async {
            let directory =
                cluster.status().await.map_err(|error| error.to_string())?.directory.unwrap_or_default();
            if directory.mode == "serving" { Ok(directory) } else { Err(directory.reason) }
        })
        .await;
        assert!(serving.generation > generation, "{serving:?}");
        generation = serving.generation;
        cluster.kill(away).await;
        cluster.kill_directory().await;
        cluster.lose_directory_store().await.unwrap();
        cluster.restart_directory().await.unwrap();
        // Whether it can go on without that one depends on who carries what: it waits where it must.
        let waited = tokio::time::timeout(Duration::from_secs(3), cluster.wait_ready()).await;
        cluster.restart(away).await.unwrap();
        if !matches!(waited, Ok(Ok(()))) {
            println!("waited for file server {away}");
        }
        cluster.wait_ready().await.unwrap();
        let again = cluster.status().await.unwrap().directory.unwrap();
        assert!(again.generation > generation, "{} is given twice", again.generation);
        generation = again.generation;
        assert_eq!(&cluster.client().await.unwrap().read("/file").await.unwrap()[..], b"content");
    }
    cluster.shutdown().await.unwrap();
}
