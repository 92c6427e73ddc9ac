//! Hostile bytes on the wire: as messages of every call, and as no messages at all.

use bytes::Bytes;
use cairn_proto::{
    net::{GREETING_TIMEOUT, MESSAGE_PAUSE_MAX},
    v1,
};
use cairn_tests::{messages, seed};
use cluster::Cluster;
use fuzz::{Decoder, memory};
use prost::Message;
use rand::{Rng as _, RngCore as _, SeedableRng as _, rngs::SmallRng, seq::IndexedRandom as _};
use std::{
    collections::BTreeMap,
    sync::{
        Mutex, Once,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
};
use tonic::transport::Channel;

#[global_allocator]
static ALLOCATOR: memory::Counting = memory::Counting;

/// What decoding may make of a message's bytes at a time: an empty element of a list takes two bytes and becomes a
/// struct, and a list that grows is for a moment there twice.
const DECODED_MULTIPLE: usize = 256;

type Decode = fn(&[u8]) -> Option<Vec<u8>>;

/// Decodes, and encodes again.
fn decode<M: Message + Default>(bytes: &[u8]) -> Option<Vec<u8>> {
    M::decode(bytes).ok().map(|message| message.encode_to_vec())
}

macro_rules! contract {
    ($($name:ident)*) => { [$((concat!("cairn.v1.", stringify!($name)), decode::<v1::$name> as Decode)),*] };
}

/// Every message that stands on the wire by itself; a test compares them with the contract. A file of the corpus begins
/// with the place of its message here: new ones go to the end.
const MESSAGES: &[(&str, Decode)] = &contract!(
    AdoptRequest AdoptResponse AppendJournalRequest AppendJournalResponse BackupRequest BackupResponse
    CloseRequest CloseResponse CollectRequest CollectResponse CommitRequest CommitResponse ConfirmRequest
    ConfirmResponse CreateRequest CreateResponse DeleteRequest DeleteResponse DrainRequest DrainResponse
    ExplainRequest ExplainResponse FetchFromPrimaryRequest FetchFromPrimaryResponse FollowRequest FollowResponse
    ForceRebuildRequest ForceRebuildResponse GrantRequest GrantResponse HeartbeatRequest HeartbeatResponse
    InstallCheckpointRequest InstallCheckpointResponse InventoryRequest InventoryResponse KeepAliveRequest
    KeepAliveResponse ListLocksRequest ListLocksResponse ListRequest ListResponse LockRequest LockResponse
    LookupRequest LookupResponse OpenRequest OpenResponse ReadJournalRequest ReadJournalResponse ReadRequest
    ReadResponse RegisterRequest RegisterResponse RenameRequest RenameResponse RenewLockRequest
    RenewLockResponse ReplicateRequest ReplicateResponse ReportBadChunkRequest ReportBadChunkResponse
    SetAttributesRequest SetAttributesResponse StatusRequest StatusResponse TopologyRequest TopologyResponse
    UnlockRequest UnlockResponse WatchRequest WatchResponse WriteRequest WriteResponse
    ComposeRequest ComposeResponse ForgetRequest ForgetResponse
    LookupManyRequest LookupManyResponse ReadManyRequest ReadManyResponse
);

#[test]
fn every_message_of_the_contract_is_tried() {
    let tried: BTreeMap<&str, Decode> = MESSAGES.iter().copied().collect();
    for method in messages::methods() {
        for message in [method.input(), method.output()] {
            assert!(tried.contains_key(message.full_name()), "{} is not among them", message.full_name());
        }
    }
}

#[test]
fn hostile_messages_are_refused_or_read() {
    let pool = messages::pool();
    let mut random = SmallRng::seed_from_u64(7);
    // The first byte says which message it is.
    let mut decoder = Decoder::new("wire-messages").memory(DECODED_MULTIPLE, 4_096);
    for (number, (name, _)) in MESSAGES.iter().enumerate() {
        let descriptor = pool.get_message_by_name(name).unwrap();
        let mut bytes = messages::made_up(&descriptor, &mut random, 3).encode_to_vec();
        bytes.truncate(600);
        decoder = decoder.sample([&[number as u8][..], &bytes].concat());
    }
    decoder.run(|bytes| {
        let Some((number, bytes)) = bytes.split_first() else { return };
        let (name, decode) = MESSAGES[usize::from(*number) % MESSAGES.len()];
        // What was read is a fixed point.
        if let Some(again) = decode(bytes) {
            assert_eq!(decode(&again).as_ref(), Some(&again), "{name}");
        }
    });
}

/// The dearest messages there are: as many empty elements of one list as fit.
#[test]
fn a_message_of_empty_elements_costs_no_more_than_the_stated_multiple() {
    let pool = messages::pool();
    let mut dearest = (0, String::new());
    for (name, decode) in MESSAGES {
        for field in pool.get_message_by_name(name).unwrap().fields().filter(|field| field.is_list()) {
            // A tag of length-delimited content, and no content; for numbers, a packed list of zeros.
            let tag = field.number() << 3 | 2;
            let mut element = Vec::new();
            prost::encoding::encode_varint(u64::from(tag), &mut element);
            let bytes = if field.is_packed() {
                prost::encoding::encode_varint(1 << 18, &mut element);
                element.extend(vec![0; 1 << 18]);
                element
            } else {
                element.push(0);
                element.repeat((1 << 18) / element.len())
            };
            let mut read = None;
            let used = memory::peak_of(|| read = decode(&bytes).map(|again| again.len()));
            if read.is_none() {
                continue;
            }
            let multiple = used / bytes.len();
            assert!(multiple <= DECODED_MULTIPLE, "{name}.{}: {multiple} times its bytes", field.name());
            if multiple > dearest.0 {
                dearest = (multiple, format!("{name}.{}", field.name()));
            }
        }
    }
    println!("the dearest message is {} with {} times its bytes", dearest.1, dearest.0);
}

/// Panics of all tasks: a runtime contains them, so nobody else would notice.
static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn watch_for_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            PANICS.lock().unwrap().push(panic.to_string());
            before(panic);
        }));
    });
}

fn assert_no_panics() {
    let panics = PANICS.lock().unwrap();
    assert!(panics.is_empty(), "{}", panics.join("\n"));
}

async fn small_cluster() -> Cluster {
    watch_for_panics();
    Cluster::builder().file_servers(1).memory(true).build_and_start().await.unwrap()
}

async fn connect(uri: &str) -> Channel {
    Channel::from_shared(uri.to_owned()).unwrap().connect().await.unwrap()
}

/// A server that answers anything at all lives: what it was told may have taken its cluster from it.
async fn assert_answers(uri: &str) {
    let channel = connect(uri).await;
    let asked = cairn_tests::reflect::GenericClient::connect(uri);
    tokio::time::timeout(Duration::from_secs(30), asked).await.expect("an answer in time").unwrap();
    drop(channel);
}

/// Every call of every service gets messages that are made up, changed, or noise.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_calls_end_and_leave_the_servers_alive() {
    const AT_A_TIME: usize = 16;
    let cluster = small_cluster().await;
    let seed = seed("CAIRN_HOSTILE_SEED");
    let runs = fuzz::runs() / 10;
    let uris = [cluster.directory_uri(), cluster.file_server_uri(0)];
    let methods: Vec<_> = messages::methods()
        .into_iter()
        .map(|method| {
            let of_files = ["FileService", "ReplicaService"].contains(&method.parent_service().name());
            (usize::from(of_files), method)
        })
        .collect();
    let channels = [connect(&uris[0]).await, connect(&uris[1]).await];
    let before = memory::live_bytes();
    memory::take_peak_bytes();
    let began = Instant::now();
    let (mut calls, mut answered, mut refused) = (JoinSet::new(), 0u64, BTreeMap::new());
    for run in 0..runs {
        let mut random = SmallRng::seed_from_u64(seed ^ run.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let (server, method) = methods[run as usize % methods.len()].clone();
        let count = if method.is_client_streaming() { random.random_range(0..4) } else { 1 };
        let bodies: Vec<Bytes> = (0..count)
            .map(|_| {
                let good = messages::made_up(&method.input(), &mut random, 3).encode_to_vec();
                let body = match random.random_range(0..3) {
                    0 => good,
                    _ => fuzz::mutate(&[good], 64 * 1024, &mut random),
                };
                body.into()
            })
            .collect();
        let channel = channels[server].clone();
        calls.spawn(
            async move { messages::send(&channel, &method, bodies, Duration::from_millis(500)).await },
        );
        if calls.len() >= AT_A_TIME {
            note(calls.join_next().await.unwrap().unwrap(), &mut answered, &mut refused);
        }
    }
    while let Some(done) = calls.join_next().await {
        note(done.unwrap(), &mut answered, &mut refused);
    }
    let peak = memory::take_peak_bytes().saturating_sub(before);
    println!(
        "fuzz {:<24} {runs:>9} calls {:>7.1} s, {answered} answered, refused {refused:?}, {} MiB at most",
        "wire-calls",
        began.elapsed().as_secs_f64(),
        peak >> 20
    );
    assert_no_panics();
    for uri in &uris {
        assert_answers(uri).await;
    }
    // Sixteen calls of some hundred KiB, with their multiple, and what the servers keep.
    assert!(peak < 512 << 20, "{peak} bytes");
    assert!(answered > 0 && refused.len() > 2, "nothing was tried: {answered} answered, {refused:?}");
    drop(channels);
    let _ =
        tokio::time::timeout(Duration::from_secs(60), cluster.shutdown()).await.expect("a cluster that ends");
}

fn note(done: Result<usize, tonic::Status>, answered: &mut u64, refused: &mut BTreeMap<String, u64>) {
    match done {
        Ok(_) => *answered += 1,
        Err(status) => *refused.entry(format!("{:?}", status.code())).or_default() += 1,
    }
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// One HTTP/2 frame.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// The headers of a call, each as a literal that is not indexed.
fn headers(path: &str) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "a"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ] {
        block.push(0);
        for text in [name, value] {
            block.push(text.len() as u8);
            block.extend_from_slice(text.as_bytes());
        }
    }
    block
}

/// A connection's first bytes, as a good peer sends them, and a call that has begun.
fn begun(path: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = PREFACE.to_vec();
    bytes.extend(frame(4, 0, 0, &[]));
    bytes.extend(frame(1, 4, 1, &headers(path)));
    bytes.extend(frame(0, 0, 1, data));
    bytes
}

const CALLS: [&str; 3] =
    ["/cairn.v1.DirectoryService/Lookup", "/cairn.v1.FileService/Read", "/cairn.v1.FileService/Write"];

/// Bytes that a connection may begin with.
fn openings(random: &mut SmallRng) -> Vec<Vec<u8>> {
    let mut noise = vec![0; 3_000];
    random.fill_bytes(&mut noise);
    let mut all = vec![
        noise.clone(),
        b"GET / HTTP/1.1\r\nhost: a\r\n\r\n".to_vec(),
        PREFACE[..10].to_vec(),
        PREFACE.to_vec(),
        [PREFACE, &noise].concat(),
        [PREFACE, &frame(4, 0, 0, &[]).repeat(2_000)].concat(),
        [PREFACE, &frame(6, 0, 0, &[7; 8]).repeat(2_000)].concat(),
        // Streams that begin and are reset at once.
        (0..500u32).fold([PREFACE, &frame(4, 0, 0, &[])].concat(), |mut bytes, number| {
            let stream = 2 * number + 1;
            bytes.extend(frame(1, 4, stream, &headers(CALLS[0])));
            bytes.extend(frame(3, 0, stream, &[0, 0, 0, 8]));
            bytes
        }),
        // Headers that go on and on.
        [
            PREFACE,
            &frame(4, 0, 0, &[]),
            &frame(1, 0, 1, &headers(CALLS[0])),
            &frame(9, 0, 1, &noise).repeat(100),
        ]
        .concat(),
        // A frame longer than allowed.
        [PREFACE, &[0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1]].concat(),
    ];
    for path in CALLS {
        // A message of 4 GiB, one of 5 MiB, a compressed one, half a prefix, and one that stops in the middle.
        all.push(begun(path, &[0, 0xff, 0xff, 0xff, 0xff, 1, 2, 3]));
        all.push(begun(path, &[0, 0, 0x50, 0, 0, 1]));
        all.push(begun(path, &[1, 0, 0, 0, 4, 1, 2, 3, 4]));
        all.push(begun(path, &[0, 0]));
        all.push(begun(path, &[0, 0, 0, 0, 100, 1, 2]));
    }
    all
}

/// Sends bytes, then nothing, and reads what comes until the server ends the connection or the limit is over.
async fn held(uri: &str, bytes: &[u8], limit: Duration) -> Option<Duration> {
    let mut stream = TcpStream::connect(cairn_proto::net::authority(uri).unwrap()).await.unwrap();
    let began = Instant::now();
    // The server may have hung up already.
    let _ = stream.write_all(bytes).await;
    let mut buffer = [0; 4_096];
    let reading = async {
        loop {
            match stream.read(&mut buffer).await {
                Ok(0) | Err(_) => return began.elapsed(),
                Ok(_) => {}
            }
        }
    };
    tokio::time::timeout(limit, reading).await.ok()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_connections_harm_nobody_else() {
    let cluster = small_cluster().await;
    let client = cluster.client().await.unwrap();
    client.write("/file", "content").await.unwrap();
    let uris = [cluster.directory_uri(), cluster.file_server_uri(0)];
    let mut random = SmallRng::seed_from_u64(seed("CAIRN_HOSTILE_SEED"));
    let openings = openings(&mut random);
    let before = memory::live_bytes();
    memory::take_peak_bytes();
    let rounds = (fuzz::runs() / 100).clamp(100, 20_000);
    let mut connections = JoinSet::new();
    for round in 0..rounds as usize {
        let bytes = match openings.get(round) {
            Some(opening) => opening.clone(),
            None => fuzz::mutate(&openings, 200_000, &mut random),
        };
        let uri = uris.choose(&mut random).unwrap().clone();
        connections.spawn(async move { held(&uri, &bytes, Duration::from_millis(300)).await });
        if connections.len() >= 64 {
            connections.join_next().await;
        }
        if round.is_multiple_of(50) {
            assert_eq!(&client.read("/file").await.unwrap()[..], b"content");
        }
    }
    while connections.join_next().await.is_some() {}
    let peak = memory::take_peak_bytes().saturating_sub(before);
    println!("fuzz {:<24} {rounds:>9} connections, {} MiB at most", "wire-connections", peak >> 20);
    assert_eq!(&client.read("/file").await.unwrap()[..], b"content");
    assert!(peak < 512 << 20, "{peak} bytes");
    assert_no_panics();
    client.close().await.unwrap();
    cluster.shutdown().await.unwrap();
}

/// Who connects and then takes his time is not waited for without end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_callers_are_given_up() {
    let cluster = small_cluster().await;
    let uris = [cluster.directory_uri(), cluster.file_server_uri(0)];
    // A busy machine may be late; that it ends at all is the point.
    let slack = Duration::from_secs(20);
    let open = AtomicUsize::new(0);
    let mut waiting = Vec::new();
    for uri in &uris {
        for opening in [&[][..], &PREFACE[..1], &PREFACE[..23]] {
            let open = &open;
            waiting.push(Box::pin(async move {
                open.fetch_add(1, Ordering::Relaxed);
                let ended = held(uri, opening, GREETING_TIMEOUT + slack).await;
                let took =
                    ended.unwrap_or_else(|| panic!("{} bytes of a greeting hold {uri}", opening.len()));
                assert!(took >= GREETING_TIMEOUT - Duration::from_millis(500), "{took:?}");
            }) as std::pin::Pin<Box<dyn Future<Output = ()>>>);
        }
    }
    // A call whose message stops in the middle gets an answer, on a connection that is otherwise good.
    for (uri, path) in [(&uris[0], CALLS[0]), (&uris[1], CALLS[1]), (&uris[1], CALLS[2])] {
        waiting.push(Box::pin(async move {
            let authority = cairn_proto::net::authority(uri).unwrap();
            let mut stream = TcpStream::connect(authority).await.unwrap();
            stream.write_all(&begun(path, &[0, 0, 0, 0, 100, 1, 2])).await.unwrap();
            let answered = async {
                let mut head = [0; 9];
                loop {
                    stream.read_exact(&mut head).await.unwrap();
                    let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
                    let mut payload = vec![0; length];
                    stream.read_exact(&mut payload).await.unwrap();
                    let stream_id = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
                    match (head[3], head[4], stream_id) {
                        // Settings and pings are answered, as a peer does that wants to be kept.
                        (4, 0, _) => stream.write_all(&frame(4, 1, 0, &[])).await.unwrap(),
                        (6, 0, _) => stream.write_all(&frame(6, 1, 0, &payload)).await.unwrap(),
                        // Headers or a reset that end the call.
                        (1, flags, 1) if flags & 1 == 1 => return,
                        (3, _, 1) => return,
                        _ => {}
                    }
                }
            };
            tokio::time::timeout(MESSAGE_PAUSE_MAX + slack, answered)
                .await
                .unwrap_or_else(|_| panic!("{path} waits for the rest of its message"));
        }));
    }
    futures::future::join_all(waiting).await;
    assert_eq!(open.load(Ordering::Relaxed), 6);
    assert_no_panics();
    cluster.shutdown().await.unwrap();
}
