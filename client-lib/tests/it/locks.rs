//! Locks and the session behind them.

use crate::fake::{Cluster, DIRECTORY, eventually, net::Mood, noise};
use client_lib::{Error, LockOptions, Reason, WriteOptions};
use futures::StreamExt as _;
use std::time::Duration;
use tokio::time::timeout;

const SOON: Duration = Duration::from_secs(20);

#[tokio::test]
async fn a_second_writer_is_declined_at_once_with_the_holder() {
    let cluster = Cluster::start(3);
    let (one, two) = (cluster.client(), cluster.client());
    let lock = one.lock("/file", LockOptions::new().owner("painter")).await.unwrap();
    assert!(lock.attributes().is_none());
    for size in [1, 100_000] {
        let error = two.write("/file", noise(size, 1)).await.unwrap_err();
        assert_eq!(error.reason, Reason::LockHeld);
        let held = error.detail.lock.as_ref().unwrap();
        assert_eq!((held.owner.as_str(), held.expires_in_ms), ("painter", 10_000));
    }
    assert_eq!(two.lock("/file", LockOptions::new()).await.unwrap_err().reason, Reason::LockHeld);
    assert_eq!(two.locks().count().await, 1);
    one.write_with("/file", "under the lock", WriteOptions::new().token(&lock)).await.unwrap();
    one.write_with("/file", noise(100_000, 2), WriteOptions::new().token(&lock)).await.unwrap();
    lock.unlock().await.unwrap();
    two.write("/file", "free").await.unwrap();
}

#[tokio::test]
async fn a_writer_that_waits_goes_on_when_the_lock_is_free() {
    let cluster = Cluster::start(3);
    let (one, two) = (cluster.client(), cluster.client());
    for size in [1, 100_000] {
        let lock = one.lock("/file", LockOptions::new()).await.unwrap();
        let waiting = tokio::spawn({
            let two = two.clone();
            async move { two.write_with("/file", noise(size, 1), WriteOptions::new().wait(SOON)).await }
        });
        let before = cluster.calls("Lock").len();
        eventually("it asks for the lock", || cluster.calls("Lock").len() > before).await;
        assert!(!waiting.is_finished());
        lock.unlock().await.unwrap();
        timeout(SOON, waiting).await.unwrap().unwrap().unwrap();
    }
    let error = {
        let _held = one.lock("/file", LockOptions::new()).await.unwrap();
        two.lock("/file", LockOptions::new().wait(Duration::from_millis(50))).await.unwrap_err()
    };
    assert_eq!(error.reason, Reason::LockHeld);
}

#[tokio::test]
async fn shared_locks_are_shared_and_keep_writers_away() {
    let cluster = Cluster::start(3);
    let client = cluster.client();
    client.write("/file", "x").await.unwrap();
    let one = client.lock("/file", LockOptions::new().shared()).await.unwrap();
    let two = client.lock("/file", LockOptions::new().shared()).await.unwrap();
    assert!(two.token() > one.token(), "tokens grow");
    assert_eq!(client.write("/file", "y").await.unwrap_err().reason, Reason::LockHeld);
    drop((one, two));
    eventually("dropped locks are given back", || cluster.state.lock().locks.is_empty()).await;
    client.write("/file", "y").await.unwrap();
}

#[tokio::test]
async fn a_wait_given_up_leaves_no_lock_behind() {
    let cluster = Cluster::start(3);
    let (one, two) = (cluster.client(), cluster.client());
    let lock = one.lock("/file", LockOptions::new()).await.unwrap();
    let waiting = two.lock("/file", LockOptions::new().wait(SOON));
    assert!(timeout(Duration::from_millis(100), waiting).await.is_err());
    lock.unlock().await.unwrap();
    eventually("the late grant is given back", || {
        cluster.calls("Unlock").len() == 2 && cluster.state.lock().locks.is_empty()
    })
    .await;
}

#[tokio::test]
async fn the_end_of_a_session_is_seen_at_its_locks_and_a_new_one_is_opened() {
    let cluster = Cluster::start(3);
    let client = cluster.builder().session_ttl(Duration::from_secs(1)).build().unwrap();
    let lock = client.lock("/file", LockOptions::new()).await.unwrap();
    let mut file = client.open_options().write(true).create(true).open("/other").await.unwrap();
    file.write_at(0, "never seen").await.unwrap();
    assert!(!lock.is_lost());
    {
        let mut state = cluster.state.lock();
        let session = *state.sessions.first().unwrap();
        state.end_session(session);
    }
    timeout(SOON, lock.lost()).await.unwrap();
    assert!(lock.is_lost());
    let error = client.write_with("/file", "x", WriteOptions::new().token(&lock)).await.unwrap_err();
    assert_eq!(error.reason, Reason::LockLost);
    assert_eq!(lock.unlock().await.unwrap_err().reason, Reason::LockLost);
    assert_eq!(file.close().await.unwrap_err().reason, Reason::LockLost, "a late commit is refused");
    assert!(!client.exists("/other").await.unwrap());
    client.write("/file", "with a new session").await.unwrap();
    assert_eq!(cluster.calls("Open").len(), 2);
}

#[tokio::test]
async fn a_lock_that_an_operator_takes_away_is_lost() {
    let cluster = Cluster::start(3);
    let (holder, operator) =
        (cluster.builder().session_ttl(Duration::from_secs(1)).build().unwrap(), cluster.client());
    let lock = holder.lock("/file", LockOptions::new()).await.unwrap();
    assert_eq!(operator.unlock_force("/file").await.unwrap(), 1);
    timeout(SOON, lock.lost()).await.unwrap();
    assert_eq!(operator.unlock_force("/file").await.unwrap_err().reason, Reason::LockLost);
}

#[tokio::test]
async fn without_confirmation_for_a_ttl_locks_count_as_lost() {
    let cluster = Cluster::start(3);
    let client = cluster.builder().session_ttl(Duration::from_secs(1)).build().unwrap();
    let lock = client.lock("/file", LockOptions::new()).await.unwrap();
    cluster.net.set(DIRECTORY, Mood::Silent);
    timeout(SOON, lock.lost()).await.unwrap();
    cluster.net.set(DIRECTORY, Mood::Down);
    cluster.net.set(DIRECTORY, Mood::Up);
    // The directory never ended the session: calls go on.
    client.write("/other", "x").await.unwrap();
    assert_eq!(cluster.calls("Open").len(), 1);
}

#[tokio::test]
async fn sessions_are_kept_by_stream_and_by_single_calls_when_streams_break() {
    let cluster = Cluster::start(3);
    let client = cluster.builder().session_ttl(Duration::from_secs(1)).build().unwrap();
    for _ in 0..1_000 {
        cluster.fault("KeepAlive", false, Error::new(Reason::NotSupported, "no streams here"));
    }
    client.write("/file", "x").await.unwrap();
    eventually("renewals arrive", || cluster.state.lock().renewals >= 3).await;
    assert!(cluster.calls("RenewLock").len() >= 3);
    cluster.faults.lock().clear();
    let single = cluster.calls("RenewLock").len();
    eventually("the stream is tried again", || {
        let calls = cluster.calls("RenewLock").len();
        cluster.state.lock().renewals >= calls + 2
    })
    .await;
    assert!(cluster.calls("RenewLock").len() <= single + 2);
}

#[tokio::test]
async fn renewals_carry_the_oldest_revision_that_a_handle_reads() {
    let cluster = Cluster::start(3);
    let client = cluster.builder().session_ttl(Duration::from_secs(1)).build().unwrap();
    client.write("/file", "x").await.unwrap();
    let file = client.open("/file").await.unwrap();
    let revision = cluster.state.lock().revision;
    client.write("/file", "y").await.unwrap();
    let later = client.open("/file").await.unwrap();
    eventually("it is told", || cluster.state.lock().oldest_revision == revision).await;
    drop(file);
    eventually("it moves on", || cluster.state.lock().oldest_revision == revision + 1).await;
    drop(later);
    eventually("none is left", || cluster.state.lock().oldest_revision == 0).await;
}

/// Longer than any test runs: no renewal of its own accord brings a mark in time.
const LONG: Duration = Duration::from_secs(600);

#[tokio::test]
async fn a_reader_is_told_at_once_and_many_of_them_together() {
    let cluster = Cluster::start(3);
    let client = cluster.builder().session_ttl(LONG).build().unwrap();
    client.write("/file", "x").await.unwrap();
    let begun = std::time::Instant::now();
    eventually("the session is kept", || cluster.state.lock().renewals == 1).await;
    let file = client.open("/file").await.unwrap();
    let revision = cluster.state.lock().revision;
    eventually("it is told", || cluster.state.lock().oldest_revision == revision).await;
    let mut others = Vec::new();
    for _ in 0..200 {
        others.push(client.open("/file").await.unwrap());
        drop(client.open("/file").await.unwrap());
    }
    let renewals = cluster.state.lock().renewals;
    // And one each few seconds, however long the session lives.
    let regular = begun.elapsed().as_millis() / u128::from(cairn_proto::limits::RENEWAL_INTERVAL_MS_MAX);
    assert!(renewals as u128 <= 3 + 2 * regular, "{renewals} renewals for 401 handles");
    drop((file, others));
    eventually("none is left", || cluster.state.lock().oldest_revision == 0).await;
}

#[tokio::test]
async fn a_reader_is_told_by_single_calls_when_streams_break() {
    let cluster = Cluster::start(3);
    let client = cluster.builder().session_ttl(LONG).build().unwrap();
    for _ in 0..1_000 {
        cluster.fault("KeepAlive", false, Error::new(Reason::NotSupported, "no streams here"));
    }
    client.write("/file", "x").await.unwrap();
    eventually("a single call renews", || cluster.calls("RenewLock").len() == 1).await;
    let file = client.open("/file").await.unwrap();
    let revision = cluster.state.lock().revision;
    eventually("it is told", || cluster.state.lock().oldest_revision == revision).await;
    drop(file);
    eventually("none is left", || cluster.state.lock().oldest_revision == 0).await;
}

#[tokio::test]
async fn closing_and_dropping_end_the_session() {
    let cluster = Cluster::start(3);
    let client = cluster.client();
    let lock = client.lock("/file", LockOptions::new()).await.unwrap();
    client.close().await.unwrap();
    assert!(lock.is_lost());
    assert!(cluster.state.lock().sessions.is_empty());
    assert_eq!(client.create("/x").await.unwrap_err().reason, Reason::InvalidArgument);
    let other = cluster.client();
    other.create("/x").await.unwrap();
    drop(other);
    eventually("the session is closed", || cluster.state.lock().sessions.is_empty()).await;
}

/// Whether nobody holds a lock on `/file`.
fn is_free(cluster: &Cluster) -> bool {
    !cluster.state.lock().locks.contains_key("/file")
}

#[tokio::test]
async fn a_write_that_is_given_up_behind_its_grant_leaves_no_lock_behind() {
    let cluster = Cluster::start(3);
    let (one, two) = (cluster.client(), cluster.client());
    let lock = one.lock("/file", LockOptions::new()).await.unwrap();
    let token = lock.token();
    let writing = tokio::spawn({
        let two = two.clone();
        async move { two.write_with("/file", "x", WriteOptions::new().wait(SOON)).await }
    });
    eventually("it asks for the lock", || cluster.calls("Lock").len() == 2).await;
    for id in 1..=3 {
        cluster.set_mood(id, Mood::Silent);
    }
    lock.unlock().await.unwrap();
    eventually("it has the lock", || {
        let state = cluster.state.lock();
        state.locks.get("/file").is_some_and(|held| held[0].token.map(Into::into) > Some(token))
    })
    .await;
    writing.abort();
    assert!(writing.await.unwrap_err().is_cancelled());
    eventually("the lock is given back", || is_free(&cluster)).await;
}

#[tokio::test]
async fn a_grant_that_nobody_takes_any_more_is_given_back() {
    let cluster = Cluster::start(3);
    let client = cluster.client();
    let mut asking = Box::pin(client.lock("/file", LockOptions::new()));
    assert!(futures::poll!(&mut asking).is_pending());
    eventually("it is granted", || !is_free(&cluster)).await;
    // The answer has come too by the time that later ones have.
    for _ in 0..20 {
        client.exists("/file").await.unwrap();
    }
    assert!(cluster.calls("Unlock").is_empty());
    drop(asking);
    eventually("the lock is given back", || is_free(&cluster)).await;
}

#[tokio::test]
async fn giving_back_that_is_cancelled_is_done_all_the_same() {
    let cluster = Cluster::start(3);
    let client = cluster.client();
    client.write("/file", "x").await.unwrap();
    for way in ["unlock", "close", "abort"] {
        let lock = match way {
            "unlock" => Ok(client.lock("/file", LockOptions::new()).await.unwrap()),
            _ => Err(client.open_options().write(true).open("/file").await.unwrap()),
        };
        cluster.net.set(DIRECTORY, Mood::Down);
        let is_pending = match lock {
            Ok(lock) => futures::poll!(Box::pin(lock.unlock())).is_pending(),
            Err(file) if way == "close" => futures::poll!(Box::pin(file.close())).is_pending(),
            Err(file) => futures::poll!(Box::pin(file.abort())).is_pending(),
        };
        assert!(is_pending, "{way}");
        assert!(!is_free(&cluster), "{way}");
        cluster.net.set(DIRECTORY, Mood::Up);
        eventually(way, || is_free(&cluster)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_lock_whose_answers_were_all_lost_is_given_back() {
    let cluster = Cluster::start(3);
    for wait in [Duration::ZERO, Duration::from_millis(300)] {
        let client = cluster.builder().deadline(Duration::from_millis(200)).build().unwrap();
        // Its session is open before answers are lost.
        client.write("/other", "x").await.unwrap();
        for _ in 0..10_000 {
            cluster.fault("Lock", true, Error::unavailable("the answer is lost"));
        }
        let error = client.lock("/file", LockOptions::new().wait(wait)).await.unwrap_err();
        assert!(error.reason.is_transient(), "{error}");
        assert!(!is_free(&cluster), "it was granted all the same");
        cluster.faults.lock().clear();
        eventually("the lock is given back", || is_free(&cluster)).await;
        // What others hold is not touched by an attempt that was declined.
        let lock = client.lock("/file", LockOptions::new()).await.unwrap();
        client.lock("/file", LockOptions::new()).await.unwrap_err();
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert!(!is_free(&cluster));
        lock.unlock().await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_lock_is_given_back_after_an_outage_longer_than_the_deadline() {
    let cluster = Cluster::start(3);
    let client = cluster.builder().deadline(Duration::from_millis(200)).build().unwrap();
    let lock = client.lock("/file", LockOptions::new()).await.unwrap();
    cluster.net.set(DIRECTORY, Mood::Down);
    assert!(lock.unlock().await.unwrap_err().reason.is_transient());
    // Longer than another attempt in the background, too.
    tokio::time::sleep(Duration::from_secs(3)).await;
    cluster.net.set(DIRECTORY, Mood::Up);
    eventually("the lock is given back", || is_free(&cluster)).await;
    assert_eq!(cluster.calls("Open").len(), 1, "by the session that held it");
}

#[tokio::test]
async fn a_lock_is_given_back_from_a_thread_without_a_runtime() {
    let cluster = Cluster::start(3);
    let client = cluster.client();
    let lock = client.lock("/file", LockOptions::new()).await.unwrap();
    std::thread::spawn(move || drop(lock)).join().unwrap();
    eventually("the lock is given back", || is_free(&cluster)).await;
}

#[test]
fn locks_that_outlive_their_runtime_are_dropped_without_a_panic() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (lock, file, client) = runtime.block_on(async {
        let cluster = Cluster::start(3);
        let client = cluster.client();
        let lock = client.lock("/file", LockOptions::new()).await.unwrap();
        let file = client.open_options().write(true).create(true).open("/other").await.unwrap();
        (lock, file, client)
    });
    drop(runtime);
    drop((lock, file, client));
}

#[tokio::test(start_paused = true)]
async fn a_task_that_waits_for_a_lock_does_not_stop_the_others() {
    let cluster = Cluster::start(3);
    let client = cluster.client();
    let lock = client.lock("/file", LockOptions::new()).await.unwrap();
    let waiting = tokio::spawn({
        let client = client.clone();
        async move { client.lock("/file", LockOptions::new().wait(SOON * 10)).await }
    });
    eventually("it asks for the lock", || cluster.calls("Lock").len() == 2).await;
    // Time goes on only while nothing else does.
    let began = tokio::time::Instant::now();
    let made = futures::stream::iter(0..2_000)
        .map(|number| {
            let client = client.clone();
            async move { client.create(&format!("/{number}")).await }
        })
        .buffer_unordered(16);
    made.for_each(|made| async move { drop(made.unwrap()) }).await;
    lock.unlock().await.unwrap();
    waiting.await.unwrap().unwrap();
    assert!(began.elapsed() < Duration::from_secs(1), "it took {:?}", began.elapsed());
    let mut asked = cluster.calls("Lock");
    asked.dedup();
    assert_eq!(asked.len(), 2, "the wait was not broken off");
}
