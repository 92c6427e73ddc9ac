//! The promises with three directories over one store: LINEAR, FENCED and RETRY across them, and what follows when one
//! of them dies, is cut off, or wakes up late.

use cairn_proto::{
    Error, Reason,
    net::{Traffic, channel},
    v1::{
        self, directory_service_client::DirectoryServiceClient, session_service_client::SessionServiceClient,
    },
};
use cairn_tests::eventually::eventually;
use client_lib::{Client, LockOptions};
use cluster::Cluster;
use std::time::Duration;
use tokio::time::Instant;
use tonic::transport::Channel;

const LIMIT: Duration = Duration::from_secs(30);
/// Longest until another directory does the background work of one that died.
const HANDOVER: Duration = Duration::from_secs(10);

async fn three() -> Cluster {
    Cluster::builder().directories(3).memory(true).build_and_start().await.expect("a cluster")
}

/// A client that was told of one of the directories, and learns of the others.
fn client_of(cluster: &Cluster, directory: usize) -> Client {
    let uri = cluster.directory_uris()[directory].clone();
    Client::builder().directory(uri).network(cluster.network()).build().expect("a client")
}

fn to(cluster: &Cluster, directory: usize) -> Channel {
    channel(&cluster.network(), &cluster.directory_uris()[directory], Traffic::Small).expect("an address")
}

fn names(cluster: &Cluster, directory: usize) -> DirectoryServiceClient<Channel> {
    DirectoryServiceClient::new(to(cluster, directory))
}

async fn open(cluster: &Cluster, directory: usize, ttl_ms: u64) -> u64 {
    let request = v1::OpenRequest { ttl_ms, owner: "a test".into(), ..Default::default() };
    let mut sessions = SessionServiceClient::new(to(cluster, directory));
    sessions.open(request).await.expect("a session").into_inner().session_id
}

async fn lock(
    cluster: &Cluster,
    directory: usize,
    session_id: u64,
    path: &str,
) -> Result<v1::LockResponse, Error> {
    let request = v1::LockRequest {
        path: path.into(),
        mode: v1::LockMode::Exclusive as i32,
        session_id,
        owner: format!("session {session_id}"),
        ..Default::default()
    };
    names(cluster, directory).lock(request).await.map(tonic::Response::into_inner).map_err(Error::from)
}

async fn renew(cluster: &Cluster, directory: usize, session_id: u64) -> Result<u64, Error> {
    let request = v1::RenewLockRequest { session_id, oldest_revision: Some(0), ..Default::default() };
    let answer = names(cluster, directory).renew_lock(request).await.map_err(Error::from)?;
    Ok(answer.into_inner().ttl_ms)
}

/// The index of the directory that does the background work, as one that answers says.
async fn leader(cluster: &Cluster, asked: usize) -> Result<usize, String> {
    let status = cluster.status_at(asked).await.map_err(|error| error.to_string())?;
    let leads = status.sharing.iter().find(|one| one.leads).ok_or("nobody leads")?;
    let address = leads.directory.as_ref().and_then(|one| one.addresses.first()).ok_or("no address")?;
    cluster.directory_uris().iter().position(|uri| uri == address).ok_or_else(|| format!("{address}?"))
}

#[tokio::test(flavor = "multi_thread")]
async fn linear_what_one_directory_acknowledged_every_other_one_shows() {
    let cluster = three().await;
    let clients: Vec<Client> = (0..3).map(|directory| client_of(&cluster, directory)).collect();
    for round in 0..30usize {
        let (writer, path) = (&clients[round % 3], format!("/file-{}", round % 4));
        let bytes = format!("round {round}").repeat(round + 1);
        writer.write(&path, bytes.clone()).await.expect("written");
        let size = bytes.len() as u64;
        for directory in 0..3 {
            let lookup = v1::LookupRequest { path: path.clone(), with_extents: true, ..Default::default() };
            let shown = names(&cluster, directory).lookup(lookup).await.expect("found").into_inner();
            assert_eq!(shown.attributes.expect("attributes").size, size, "round {round} at {directory}");
            assert!(!shown.groups.is_empty() && !shown.servers.is_empty(), "round {round} at {directory}");
        }
        let reader = &clients[(round + 1) % 3];
        assert_eq!(reader.read(&path).await.expect("read"), bytes, "round {round}");
    }
    clients[0].mkdir("/directory").await.expect("made");
    clients[1].rename("/directory", "/renamed").await.expect("renamed");
    assert!(clients[2].exists("/renamed").await.expect("looked up"));
    clients[2].delete("/renamed").await.expect("deleted");
    assert!(!clients[0].exists("/renamed").await.expect("looked up"));
    cluster.shutdown().await.expect("a clean end");
}

#[tokio::test(flavor = "multi_thread")]
async fn fenced_a_lock_excludes_at_every_directory_and_its_tokens_grow() {
    let cluster = three().await;
    let sessions =
        [open(&cluster, 0, 10_000).await, open(&cluster, 1, 10_000).await, open(&cluster, 2, 10_000).await];
    let mut last = 0;
    for round in 0..9 {
        let (here, there) = (round % 3, (round + 1) % 3);
        let token =
            lock(&cluster, here, sessions[here], "/f").await.expect("the lock").token.expect("a token");
        assert!(token.revision > last, "{token:?} after {last}");
        last = token.revision;
        let error = lock(&cluster, there, sessions[there], "/f").await.expect_err("held");
        assert_eq!(error.reason, Reason::LockHeld, "{error}");
        // It is given back at a third one.
        let unlock = v1::UnlockRequest { path: "/f".into(), token: Some(token), ..Default::default() };
        names(&cluster, (round + 2) % 3).unlock(unlock).await.expect("unlocked");
    }
    cluster.shutdown().await.expect("a clean end");
}

#[tokio::test(flavor = "multi_thread")]
async fn fenced_who_waits_for_a_lock_gets_it_when_another_directory_frees_it() {
    let cluster = three().await;
    let (holder, waiter) = (client_of(&cluster, 0), client_of(&cluster, 1));
    let held = holder.lock("/f", LockOptions::new()).await.expect("the lock");
    let first = held.token();
    let waiting = tokio::spawn(async move {
        let lock = waiter.lock("/f", LockOptions::new().wait(LIMIT)).await?;
        let token = lock.token();
        lock.unlock().await?;
        Ok::<_, Error>(token)
    });
    eventually("the other one waits", LIMIT, || async {
        let raw = lock(&cluster, 2, 0, "/f").await.expect_err("held");
        if raw.reason == Reason::LockHeld { Ok(()) } else { Err(raw) }
    })
    .await;
    assert!(!waiting.is_finished());
    held.unlock().await.expect("unlocked");
    let second = waiting.await.expect("no panic").expect("the lock");
    assert!((second.generation, second.revision) > (first.generation, first.revision));
    cluster.shutdown().await.expect("a clean end");
}

#[tokio::test(flavor = "multi_thread")]
async fn retry_at_another_directory_gives_the_first_answer() {
    let cluster = three().await;
    let session_id = open(&cluster, 0, 10_000).await;
    for (sequence, path) in (1..).zip(["/a", "/b", "/c", "/d"]) {
        let request = v1::CreateRequest {
            request_id: Some(v1::RequestId { session_id, sequence, ..Default::default() }),
            path: path.into(),
            kind: v1::Kind::File as i32,
            ..Default::default()
        };
        let calls =
            (0..9).map(|number| {
                let (mut directory, request) = (names(&cluster, number % 3), request.clone());
                async move {
                    directory.create(request).await.map(tonic::Response::into_inner).map_err(Error::from)
                }
            });
        let answers = futures::future::join_all(calls).await;
        let first = answers[0].as_ref().expect("created");
        assert!(answers.iter().all(|answer| answer.as_ref().expect("created") == first), "{answers:?}");
    }
    cluster.shutdown().await.expect("a clean end");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_goes_on_at_another_directory_and_keeps_its_lock() {
    let cluster = three().await;
    let client = cluster.client().await.expect("a client");
    let held = client.lock("/held", LockOptions::new()).await.expect("the lock");
    // Whichever it uses: each dies once, and comes back.
    for directory in 0..3 {
        cluster.kill_directory_at(directory).await;
        for number in 0..5 {
            client.write(&format!("/f-{directory}-{number}"), "bytes").await.expect("no error is shown");
        }
        assert!(!held.is_lost());
        cluster.restart_directory_at(directory).await.expect("started");
        let at = directory;
        eventually("it serves again", LIMIT, || async {
            let status = cluster.status_at(at).await.map_err(|error| error.to_string())?;
            let mode = status.directory.map_or(String::new(), |directory| directory.mode);
            if mode == "serving" { Ok(()) } else { Err(mode) }
        })
        .await;
    }
    let error = lock(&cluster, 0, 0, "/held").await.expect_err("held");
    assert_eq!(error.reason, Reason::LockHeld, "{error}");
    assert!(!held.is_lost());
    held.unlock().await.expect("unlocked");
    cluster.shutdown().await.expect("a clean end");
}

#[tokio::test(flavor = "multi_thread")]
async fn fenced_a_lock_outlives_the_home_of_its_session_and_ends_with_its_holder() {
    let cluster = three().await;
    let home = (leader(&cluster, 0).await.expect("somebody leads") + 1) % 3;
    let (one, other) = ((home + 1) % 3, (home + 2) % 3);
    let (living, dead) = (open(&cluster, home, 3_000).await, open(&cluster, home, 3_000).await);
    let kept = lock(&cluster, home, living, "/kept").await.expect("the lock").token;
    lock(&cluster, home, dead, "/left").await.expect("the lock");
    cluster.kill_directory_at(home).await;
    let died = Instant::now();
    eventually("the lock of whoever renews no more ends", LIMIT, || async {
        // The living one is renewed at another directory all the while.
        renew(&cluster, one, living).await.map_err(|error| error.to_string())?;
        let session = lock(&cluster, other, 0, "/left").await.map_err(|error| error.to_string())?;
        Ok::<_, String>(session)
    })
    .await;
    // Its home was declared dead after 5 s, and the one that took it over gave it a full TTL.
    assert!(died.elapsed() >= Duration::from_secs(5), "{:?}", died.elapsed());
    let error = lock(&cluster, other, 0, "/kept").await.expect_err("its holder lives");
    assert_eq!(error.reason, Reason::LockHeld, "{error}");
    let commit = v1::CommitRequest { path: "/kept".into(), token: kept, unlock: true, ..Default::default() };
    names(&cluster, other).commit(commit).await.expect("the token is good");
    cluster.shutdown().await.expect("a clean end");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_background_work_is_handed_over_within_ten_seconds() {
    let cluster = three().await;
    for _ in 0..2 {
        let first = eventually("somebody leads", LIMIT, || leader(&cluster, 0)).await;
        let asked = (first + 1) % 3;
        cluster.kill_directory_at(first).await;
        let died = Instant::now();
        let next = eventually("another one leads", LIMIT, || async {
            match leader(&cluster, asked).await {
                Ok(next) if next == first => Err("still the dead one".to_owned()),
                next => next,
            }
        })
        .await;
        assert!(died.elapsed() < HANDOVER, "{:?}", died.elapsed());
        println!("{next} leads {:?} after the death of {first}", died.elapsed());
        cluster.restart_directory_at(first).await.expect("started");
        cluster.wait_ready().await.expect("all are there");
    }
    cluster.shutdown().await.expect("a clean end");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_stops_cleanly_hands_over_at_once() {
    let cluster = three().await;
    let first = eventually("somebody leads", LIMIT, || leader(&cluster, 0)).await;
    cluster.stop_directory_at(first).await.expect("a clean end");
    let stopped = Instant::now();
    let asked = (first + 1) % 3;
    eventually("another one leads", LIMIT, || async {
        match leader(&cluster, asked).await {
            Ok(next) if next == first => Err("still the first".to_owned()),
            next => next,
        }
    })
    .await;
    assert!(stopped.elapsed() < Duration::from_secs(4), "{:?}", stopped.elapsed());
    cluster.shutdown().await.expect("a clean end");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_was_stopped_for_a_while_keeps_no_session_and_does_no_harm() {
    let cluster = three().await;
    let first = eventually("somebody leads", LIMIT, || leader(&cluster, 0)).await;
    let (one, other) = ((first + 1) % 3, (first + 2) % 3);
    let session = open(&cluster, first, 20_000).await;
    lock(&cluster, first, session, "/f").await.expect("the lock");
    let client = client_of(&cluster, one);
    client.write("/g", "before").await.expect("written");
    cluster.cut_store_of(first);
    eventually("it knows that it cannot keep sessions", LIMIT, || async {
        match tokio::time::timeout(Duration::from_secs(1), renew(&cluster, first, session)).await {
            Ok(Err(error)) if error.reason == Reason::Unavailable => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    let next = eventually("another one leads", LIMIT, || async {
        match leader(&cluster, one).await {
            Ok(next) if next == first => Err("still the first".to_owned()),
            next => next,
        }
    })
    .await;
    assert!(next == one || next == other);
    renew(&cluster, other, session).await.expect("another home");
    client.write("/g", "after").await.expect("written");
    // All that it was about to do arrives now.
    cluster.heal_store_of(first);
    eventually("it has joined again", LIMIT, || async {
        let status = cluster.status_at(one).await.map_err(|error| error.to_string())?;
        let living = status.sharing.iter().filter(|one| !one.dead).count();
        if living == 3 { Ok(()) } else { Err(format!("{:?}", status.sharing)) }
    })
    .await;
    assert_eq!(leader(&cluster, one).await, Ok(next), "the lead stays where it is");
    let error = lock(&cluster, first, 0, "/f").await.expect_err("its holder lives");
    assert_eq!(error.reason, Reason::LockHeld, "{error}");
    renew(&cluster, first, session).await.expect("it keeps sessions again");
    assert_eq!(client_of(&cluster, first).read("/g").await.expect("read"), "after");
    cluster.shutdown().await.expect("a clean end");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_directory_notices_the_death_of_a_file_server() {
    let cluster =
        Cluster::builder().directories(3).file_servers(4).memory(true).build_and_start().await.unwrap();
    let gone = cluster.file_server_uri(3);
    cluster.kill(3).await;
    for directory in 0..3 {
        eventually("the file server is not live any more", LIMIT, || async {
            let status = cluster.status_at(directory).await.map_err(|error| error.to_string())?;
            let server = status
                .file_servers
                .iter()
                .filter_map(|one| one.server.as_ref())
                .find(|server| server.endpoints.iter().any(|endpoint| endpoint.uri == gone));
            match server.map(v1::Server::state) {
                Some(v1::ServerState::Live | v1::ServerState::Joining) => Err("it is live".to_owned()),
                _ => Ok(()),
            }
        })
        .await;
        // Nobody places anything there any more.
        client_of(&cluster, directory).write(&format!("/f-{directory}"), "bytes").await.expect("written");
    }
    cluster.restart(3).await.expect("started");
    cluster.wait_ready().await.expect("each directory sees it again");
    cluster.shutdown().await.expect("a clean end");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_opened_version_stays_readable_while_its_session_moves() {
    let cluster = Cluster::builder()
        .directories(3)
        .memory(true)
        .directory_config(|config| {
            config.timing.grace_ms = 500;
            config.timing.session_ttl_ms = 2_000;
            config.timing.background_interval_ms = 50;
        })
        .build_and_start()
        .await
        .expect("a cluster");
    let client = cluster.client_builder().session_ttl(Duration::from_secs(3)).build().expect("a client");
    let other = client_of(&cluster, 2);
    client.write("/f", vec![1u8; 100_000]).await.expect("written");
    let mut opened = client.open("/f").await.expect("opened");
    let revision = client.stat("/f").await.expect("there").version;
    other.write("/f", vec![2u8; 100_000]).await.expect("written");
    assert!(client.stat("/f").await.expect("there").version > revision);
    for directory in 0..3 {
        cluster.kill_directory_at(directory).await;
        eventually("another one leads", LIMIT, || async {
            match leader(&cluster, (directory + 1) % 3).await {
                Ok(next) if next == directory => Err("still the dead one".to_owned()),
                next => next,
            }
        })
        .await;
        cluster.restart_directory_at(directory).await.expect("started");
        cluster.wait_ready().await.expect("all are there");
        // A chunk that nobody reads is collected meanwhile: the collector works.
        let path = format!("/dropped-{directory}");
        other.write(&path, vec![3u8; 10_000]).await.expect("written");
        other.delete(&path).await.expect("deleted");
        assert_eq!(opened.read_at(0, 100_000).await.expect("still readable"), vec![1u8; 100_000]);
    }
    drop(opened);
    client.close().await.expect("closed");
    eventually("what nobody reads any more is collected", Duration::from_secs(60), || async {
        let status = cluster.status_at(0).await.map_err(|error| error.to_string())?;
        let chunks = status.chunks.ok_or("no chunks")?;
        if chunks.awaiting_collection == 0 { Ok(()) } else { Err(format!("{chunks:?}")) }
    })
    .await;
    cluster.shutdown().await.expect("a clean end");
}
