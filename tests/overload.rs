//! BOUNDED: many clients, and single ones that send or ask without limit, meet real processes. Memory stays under a
//! stated bound, what is refused says when to come back, and others make progress meanwhile.
//!
//! `CAIRN_OVERLOAD_CONNECTIONS=10000` is the number of connections (2,000 if not said): each needs a descriptor here
//! and one in the directory.

use bytes::{BufMut as _, Bytes, BytesMut};
use cairn_proto::{
    Error, Reason, limits,
    net::{self, Connect, SystemNetwork, Traffic, channel},
    v1::{self, directory_service_client::DirectoryServiceClient},
};
use cairn_tests::services::Services;
use client_lib::{Client, LockOptions};
use futures::{StreamExt as _, stream};
use prost::Message;
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::net::TcpStream;

/// Memory of a service that does nothing, with its caches and what its runtime and allocator keep.
const BASE_BYTES: u64 = 192 << 20;
/// Memory of one connection that is open, with a small call on it.
const CONNECTION_BYTES: u64 = 96 << 10;

fn connections() -> usize {
    std::env::var("CAIRN_OVERLOAD_CONNECTIONS").ok().map_or(2_000, |text| text.parse().unwrap())
}

/// Somebody who only wants to work: writes and reads small files, one after the other.
struct Bystander {
    done: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<Duration>,
}

impl Bystander {
    fn start(client: Client) -> Self {
        let (done, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (count, stopped) = (done.clone(), stop.clone());
        let task = tokio::spawn(async move {
            let mut longest = Duration::ZERO;
            while !stopped.load(Ordering::Relaxed) {
                let began = Instant::now();
                let number = count.load(Ordering::Relaxed);
                let path = format!("/bystander-{}", number % 50);
                client.write(&path, format!("content {number}")).await.unwrap();
                assert_eq!(client.read(&path).await.unwrap(), format!("content {number}"));
                longest = longest.max(began.elapsed());
                count.fetch_add(1, Ordering::Relaxed);
            }
            longest
        });
        Self { done, stop, task }
    }

    fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Waits until it has done so many more.
    async fn more(&self, count: u64) {
        let wanted = self.done() + count;
        let deadline = Instant::now() + Duration::from_secs(120);
        while self.done() < wanted {
            assert!(Instant::now() < deadline, "a bystander does not get on: {} of {wanted}", self.done());
            assert!(!self.task.is_finished(), "a bystander failed");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Operations, and the longest that one pair took.
    async fn end(self) -> (u64, Duration) {
        self.stop.store(true, Ordering::Relaxed);
        let longest = self.task.await.expect("the bystander never fails");
        (self.done.load(Ordering::Relaxed), longest)
    }
}

fn assert_bound(name: &str, peak: u64, bound: u64) {
    println!("{name}: {} MiB at most, {} MiB allowed", peak >> 20, bound >> 20);
    assert!(peak <= bound, "{name} took {peak} bytes, {bound} are allowed");
}

/// Ten thousand clients, each with a connection; then all of them want a lock that is held.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bounded_many_connections_and_more_calls_than_places() {
    let count = connections();
    let mut services = Services::start(3).await;
    let client = Client::connect(&[services.directory_uri()]).await.unwrap();
    let network: Arc<dyn Connect> = Arc::new(SystemNetwork);
    let before = services.directory.memory_peak_bytes();
    let bystander = Bystander::start(client.clone());

    let uri = services.directory_uri().to_owned();
    let began = Instant::now();
    let clients: Vec<DirectoryServiceClient<_>> = stream::iter(0..count)
        .map(|_| {
            let channel = channel(&network, &uri, Traffic::Small).unwrap();
            async move {
                let mut client = DirectoryServiceClient::new(channel);
                // A connection that is not made within a second counts as failed; a busy machine needs some of them.
                let deadline = Instant::now() + Duration::from_secs(120);
                let request = v1::LookupRequest { path: "/".into(), ..Default::default() };
                while let Err(status) = client.lookup(request.clone()).await {
                    assert!(Instant::now() < deadline, "{status:?}");
                }
                client
            }
        })
        .buffer_unordered(32)
        .collect()
        .await;
    let peak = services.directory.memory_peak_bytes();
    println!(
        "{count} connections in {:.1} s, {} KiB of the directory each",
        began.elapsed().as_secs_f64(),
        peak.saturating_sub(before) / 1024 / count as u64
    );
    bystander.more(5).await;

    // Locks that are held, and more waiters than the directory takes.
    let mut held = Vec::new();
    for number in 0..8 {
        held.push(client.lock(&format!("/held-{number}"), LockOptions::new()).await.unwrap());
    }
    let wanted = 2 * limits::LOCK_REQUESTS_MAX;
    let refused = Arc::new(AtomicU64::new(0));
    let waiting: Vec<_> = (0..wanted)
        .map(|number| {
            let mut client = clients[number % count].clone();
            let refused = refused.clone();
            tokio::spawn(async move {
                let request = v1::LockRequest {
                    path: format!("/held-{}", number % 8),
                    mode: v1::LockMode::Exclusive.into(),
                    wait_ms: 20_000,
                    ..Default::default()
                };
                match client.lock(request).await {
                    Ok(_) => panic!("a held lock was given to another"),
                    Err(status) => {
                        let error = Error::from(status);
                        if error.reason == Reason::Overloaded {
                            assert!(
                                error.detail.retry_after_ms > 0 || error.message().contains("others wait"),
                                "{error}"
                            );
                            refused.fetch_add(1, Ordering::Relaxed);
                        } else {
                            let waited = [Reason::LockHeld, Reason::DeadlineExceeded];
                            assert!(waited.contains(&error.reason), "{error:?}");
                        }
                    }
                }
            })
        })
        .collect();
    // Meanwhile others get on, also with locks of their own.
    bystander.more(10).await;
    for waiting in waiting {
        waiting.await.unwrap();
    }
    let refused = refused.load(Ordering::Relaxed);
    println!("{refused} of {wanted} calls for locks were refused with a time");
    assert!(refused > 0, "there were places for all");
    for lock in held {
        lock.unlock().await.unwrap();
    }
    client.lock("/held-0", LockOptions::new()).await.unwrap().unlock().await.unwrap();

    drop(clients);
    bystander.more(5).await;
    let (done, longest) = bystander.end().await;
    println!("a bystander wrote and read {done} files meanwhile, {longest:?} at most for one");
    let bound = BASE_BYTES + count as u64 * CONNECTION_BYTES + limits::REQUEST_BYTES_MAX as u64;
    assert_bound("directory", services.directory.memory_peak_bytes(), bound);
    services.ready().await;
}

/// One connection with HTTP/2 in the caller's hand.
async fn raw(uri: &str, window: u32) -> (h2::client::SendRequest<Bytes>, tokio::task::JoinHandle<()>) {
    let stream = TcpStream::connect(net::authority(uri).unwrap()).await.unwrap();
    let mut builder = h2::client::Builder::new();
    builder.initial_window_size(window).initial_connection_window_size(window).max_send_buffer_size(64 << 20);
    let (client, connection) = builder.handshake(stream).await.unwrap();
    let driver = tokio::spawn(async move {
        let _ = connection.await;
    });
    (client, driver)
}

fn call(uri: &str, path: &str) -> http::Request<()> {
    http::Request::post(format!("{uri}{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .unwrap()
}

fn framed(message: &impl Message) -> Bytes {
    let mut bytes = BytesMut::new();
    bytes.put_u8(0);
    bytes.put_u32(message.encoded_len() as u32);
    message.encode(&mut bytes).unwrap();
    bytes.freeze()
}

/// A reader that asks for everything and takes nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bounded_readers_that_do_not_read() {
    let mut services = Services::start(3).await;
    let client = Client::connect(&[services.directory_uri()]).await.unwrap();
    let bytes = vec![7; limits::CHUNK_BYTES_DEFAULT as usize];
    client.write("/large", bytes.clone()).await.unwrap();
    services.healthy(Duration::from_secs(60)).await;
    let explained = client.explain("/large").await.unwrap();
    let chunk = explained.chunks[0].extent.unwrap().chunk.unwrap().chunk;
    let request = framed(&v1::ReadRequest { chunk, ..Default::default() });

    // On all servers, so that there is no other copy to go to: many times what may be on its way.
    let per_server = 4 * limits::READ_BYTES_MAX / (1 << 20);
    let mut readers = Vec::new();
    let mut streams = Vec::new();
    for server in 0..3 {
        let uri = services.file_uri(server).to_owned();
        let (mut reader, driver) = raw(&uri, 1_000).await;
        for _ in 0..per_server.min(limits::STREAMS_PER_CONNECTION_MAX as usize - 8) {
            reader = reader.ready().await.unwrap();
            let (response, mut body) =
                reader.send_request(call(&uri, "/cairn.v1.FileService/Read"), false).unwrap();
            body.send_data(request.clone(), true).unwrap();
            streams.push(response);
        }
        readers.push((reader, driver));
    }
    // Some of the answers have begun: the servers are at it.
    let mut begun = 0;
    for response in &mut streams {
        if let Ok(Ok(_)) = tokio::time::timeout(Duration::from_millis(20), response).await {
            begun += 1;
        }
        if begun >= 50 {
            break;
        }
    }
    assert!(begun > 0, "no reader was answered");
    let began = Instant::now();
    assert_eq!(client.read("/large").await.unwrap(), bytes);
    println!("{begun} stalled readers were answered, another read 8 MiB within {:?}", began.elapsed());
    client.write("/other", bytes.clone()).await.unwrap();
    assert_eq!(client.read("/other").await.unwrap(), bytes);
    drop((readers, streams));
    let bound = BASE_BYTES + limits::READ_BYTES_MAX as u64 + 64 * (8 << 20);
    for file in &mut services.files {
        let name = file.name.clone();
        assert_bound(&name, file.memory_peak_bytes(), bound);
    }
    services.ready().await;
}

/// A writer that begins messages without end and ends none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bounded_senders_without_an_end() {
    const STREAMS: usize = 1_000;
    const PART_BYTES: usize = 900 << 10;
    let mut services = Services::start(3).await;
    let client = Client::connect(&[services.directory_uri()]).await.unwrap();
    client.write("/file", "content").await.unwrap();
    let mut senders = Vec::new();
    let mut answers = Vec::new();
    let targets = [
        (services.file_uri(0).to_owned(), "/cairn.v1.FileService/Write"),
        (services.directory_uri().to_owned(), "/cairn.v1.DirectoryService/Commit"),
    ];
    // The beginning of a message of 1 MiB; and half of it never comes.
    let mut part = BytesMut::new();
    part.put_u8(0);
    part.put_u32(1 << 20);
    part.put_bytes(10, PART_BYTES);
    let part = part.freeze();
    for (uri, path) in &targets {
        let (mut sender, driver) = raw(uri, 1 << 20).await;
        for _ in 0..STREAMS {
            sender = sender.ready().await.unwrap();
            let Ok((response, mut body)) = sender.send_request(call(uri, path), false) else { break };
            // Refused streams take no more.
            let _ = body.send_data(part.clone(), false);
            answers.push((response, body));
        }
        senders.push((sender, driver));
    }
    let bystander = Bystander::start(client);
    let mut refused = 0;
    let mut others = Vec::new();
    let deadline = Instant::now() + Duration::from_secs(60);
    for (response, _body) in &mut answers {
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        let Ok(Ok(response)) = tokio::time::timeout(left, response).await else { continue };
        let trailers = match response.headers().contains_key("grpc-status") {
            true => Some(response.headers().clone()),
            false => {
                let mut body = response.into_body();
                let trailers = tokio::time::timeout(Duration::from_secs(15), body.trailers()).await;
                trailers.ok().and_then(Result::ok).flatten()
            }
        };
        let Some(status) = trailers.as_ref().and_then(tonic::Status::from_header_map) else { continue };
        let error = Error::from(status);
        if error.reason == Reason::Overloaded {
            assert!(error.detail.retry_after_ms > 0, "{error:?}");
            refused += 1;
        } else {
            others.push(error.reason);
        }
    }
    println!("{refused} senders were refused with a time, {} ended otherwise", others.len());
    assert!(refused > 0, "there was room for all");
    bystander.more(5).await;
    let (done, longest) = bystander.end().await;
    println!("a bystander wrote and read {done} files meanwhile, {longest:?} at most for one");
    drop((senders, answers));
    // What arrives, and what a connection may have in flight beside it.
    let bound =
        BASE_BYTES + 2 * limits::REQUEST_BYTES_MAX as u64 + u64::from(net::BULK_CONNECTION_WINDOW_BYTES);
    assert_bound("directory", services.directory.memory_peak_bytes(), bound);
    for file in &mut services.files {
        let name = file.name.clone();
        assert_bound(&name, file.memory_peak_bytes(), bound);
    }
    services.ready().await;
}
