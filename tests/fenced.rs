//! FENCED: at most one exclusive holder, tokens only grow, a former holder's commit is refused for ever.

use cairn_tests::{
    checks::{fenced, rebuilt},
    eventually::eventually,
};
use client_lib::{LockOptions, Reason, WriteOptions};
use cluster::Cluster;
use std::time::Duration;

async fn cluster() -> Cluster {
    Cluster::builder().file_servers(3).memory(true).build_and_start().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn fenced_second_writer_is_declined_with_who_and_until_when() {
    let cluster = cluster().await;
    let (a, b) = (
        cluster.client_builder().owner("alice").build().unwrap(),
        cluster.client_builder().owner("bob").build().unwrap(),
    );
    a.write("/file", "one").await.unwrap();
    let lock = a.lock("/file", LockOptions::new()).await.unwrap();
    for error in [
        b.lock("/file", LockOptions::new()).await.map(drop).unwrap_err(),
        b.write("/file", "two").await.map(drop).unwrap_err(),
        b.delete("/file").await.unwrap_err(),
        b.rename("/file", "/other").await.map(drop).unwrap_err(),
        b.open_options().write(true).open("/file").await.map(drop).unwrap_err(),
    ] {
        assert_eq!(error.reason, Reason::LockHeld, "{error}");
        let holder = error.detail.lock.as_ref().unwrap();
        assert_eq!((holder.owner.as_str(), holder.path.as_str()), ("alice", "/file"));
        assert!((1..=10_000).contains(&holder.expires_in_ms), "{holder:?}");
    }
    assert_eq!(&b.read("/file").await.unwrap()[..], b"one", "readers are not locked out");

    let waiting = tokio::spawn({
        let b = b.clone();
        async move { b.lock("/file", LockOptions::new().wait(Duration::from_secs(20))).await.unwrap() }
    });
    a.write_with("/file", "three", WriteOptions::new().token(&lock)).await.unwrap();
    let first = lock.token();
    lock.unlock().await.unwrap();
    let second = waiting.await.unwrap();
    assert!(second.token() > first);
    cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn fenced_former_holder_never_commits() {
    assert_eq!(fenced::former_holder(Cluster::builder(), 40).await, Ok(()));
}

#[tokio::test(flavor = "multi_thread")]
async fn fenced_dead_holder_frees_its_lock_within_its_lease() {
    let cluster = cluster().await;
    let admin = cluster.client().await.unwrap();
    admin.write("/file", "content").await.unwrap();
    let token = cairn_tests::dead_holder(&cluster, "/file", Duration::from_secs(1)).await;
    assert_eq!(admin.write("/file", "too early").await.unwrap_err().reason, Reason::LockHeld);
    eventually("the lock of a dead client ends", Duration::from_secs(20), || async {
        admin.write("/file", "next").await.map(drop)
    })
    .await;
    let error = admin.write_with("/file", "late", WriteOptions::new().token(token)).await.unwrap_err();
    assert_eq!(error.reason, Reason::LockLost, "{error}");
    cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn fenced_tokens_grow_across_delete_recreate_restart_and_rebuild() {
    let cluster = cluster().await;
    let client = cluster.client().await.unwrap();
    let mut last = None;
    for round in 0..6 {
        // Also for a name that does not exist yet.
        let lock = client.lock("/file", LockOptions::new()).await.unwrap();
        let token = lock.token();
        assert!(last.is_none_or(|last| token > last), "round {round}: {token} after {last:?}");
        last = Some(token);
        client.write_with("/file", "x", WriteOptions::new().token(token)).await.unwrap();
        lock.unlock().await.unwrap();
        client.delete("/file").await.unwrap();
        if round == 2 {
            cluster.kill_directory().await;
            cluster.restart_directory().await.unwrap();
            cluster.wait_ready().await.unwrap();
        }
        if round == 4 {
            cairn_tests::shipped(&cluster).await;
            cluster.kill_directory().await;
            cluster.lose_directory_store().await.unwrap();
            cluster.restart_directory().await.unwrap();
            cluster.wait_ready().await.unwrap();
        }
    }
    cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn fenced_shared_locks_keep_writers_out_and_each_other_in() {
    let cluster = cluster().await;
    let (a, b) = (cluster.client().await.unwrap(), cluster.client().await.unwrap());
    a.write("/file", "content").await.unwrap();
    let first = a.lock("/file", LockOptions::new().shared()).await.unwrap();
    let second = b.lock("/file", LockOptions::new().shared()).await.unwrap();
    assert_ne!(first.token(), second.token());
    assert_eq!(b.write("/file", "no").await.unwrap_err().reason, Reason::LockHeld);
    assert_eq!(a.lock("/file", LockOptions::new()).await.map(drop).unwrap_err().reason, Reason::LockHeld);
    first.unlock().await.unwrap();
    assert_eq!(a.write("/file", "no").await.unwrap_err().reason, Reason::LockHeld);
    second.unlock().await.unwrap();
    a.write("/file", "yes").await.unwrap();
    cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn fenced_tokens_of_before_a_rebuild_are_refused() {
    let cluster = cluster().await;
    let (former, next) = (cluster.client().await.unwrap(), cluster.client().await.unwrap());
    former.write("/file", "before").await.unwrap();
    let held = former.lock("/file", LockOptions::new()).await.unwrap();
    // What was granted in the lost end of the journal nobody knows: all locks end.
    rebuilt::lose_and_rebuild(&cluster).await.unwrap();
    let lock = eventually("the file is free at once", Duration::from_secs(30), || async {
        next.lock("/file", LockOptions::new()).await
    })
    .await;
    assert!(lock.token() > held.token(), "{} after {}", lock.token(), held.token());
    let late = WriteOptions::new().token(held.token());
    let error = former.write_with("/file", "late", late.clone()).await.unwrap_err();
    assert_eq!(error.reason, Reason::LockLost, "{error}");
    next.write_with("/file", "next", WriteOptions::new().token(&lock)).await.unwrap();
    lock.unlock().await.unwrap();
    let error = former.write_with("/file", "late", late).await.unwrap_err();
    assert_eq!(error.reason, Reason::LockLost, "{error}");
    assert_eq!(&former.read("/file").await.unwrap()[..], b"next");
    cluster.shutdown().await.unwrap();
}
