//! Services that answer with wrong sizes, wrong checksums, streams and pages without an end, and errors that say nothing
//! true. Whatever they say, a call ends in time with the right bytes or with an error that says what failed, takes little
//! memory, and does not keep the client from working once they are honest again.

use crate::fake::{
    Cluster,
    lies::{Lies, Told, lie},
    noise,
};
use cairn_proto::v1;
use client_lib::{Client, LockOptions, Result};
use futures::{StreamExt as _, stream};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tonic::{Code, Status};

const DEADLINE: Duration = Duration::from_millis(1_500);
/// Several deadlines: a call is made of steps, and the machine has other work.
const LIMIT: Duration = Duration::from_secs(20);
/// What a client and the services beside it may take for a file of [`SIZE`].
const MEMORY: usize = 64 << 20;
const SIZE: usize = 300_000;

/// Runs in a runtime of its own, so that what it allocates is counted.
fn bounded<F: Future<Output = ()>>(what: &str, run: impl FnOnce() -> F) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let peak = fuzz::memory::peak_of(|| {
        runtime.block_on(async {
            let ended = tokio::time::timeout(LIMIT, run()).await;
            assert!(ended.is_ok(), "{what}: no end within {LIMIT:?}");
        });
    });
    drop(runtime);
    assert!(peak < MEMORY, "{what}: {} KiB of memory", peak >> 10);
}

fn client(cluster: &Cluster) -> Client {
    cluster.builder().deadline(DEADLINE).build().unwrap()
}

/// An error that a person can do something with.
fn assert_says<T>(what: &str, result: Result<T>) {
    let Err(error) = result else { panic!("{what}: was believed") };
    let said = error.to_string();
    assert!(said.len() > 10, "{what}: {error:?}");
    assert!(said.len() < 10_000, "{what}: {} bytes of error", said.len());
}

/// Each lie is told by all services, to a client that knows nothing yet and wants to read.
fn reading(lies: Vec<(&'static str, Lies)>) {
    for (what, told) in lies {
        bounded(what, || async move {
            let cluster = Cluster::start(3);
            let bytes = noise(SIZE, 5);
            client(&cluster).write("/file", bytes.clone()).await.unwrap();
            let reader = client(&cluster);
            *cluster.lies.lock() = told;
            let begun = Instant::now();
            match reader.read("/file").await {
                Ok(read) => assert!(read == bytes, "{what}: other bytes were believed"),
                error => assert_says(what, error),
            }
            println!("{what}: {:?}", begun.elapsed());
            *cluster.lies.lock() = Lies::default();
            assert!(client(&cluster).read("/file").await.unwrap() == bytes, "{what}: honest again");
        });
    }
}

/// A lie in every message of a read.
fn in_messages(change: impl Fn(&mut v1::ReadResponse) + Send + Sync + 'static) -> Lies {
    let told = move |mut messages: Vec<v1::ReadResponse>| -> Told<v1::ReadResponse> {
        messages.iter_mut().for_each(&change);
        stream::iter(messages.into_iter().map(Ok)).boxed()
    };
    Lies { read: Some(Arc::new(told)), ..Lies::default() }
}

/// Another stream in the place of a read's.
fn in_stream(told: impl Fn(Vec<v1::ReadResponse>) -> Told<v1::ReadResponse> + Send + Sync + 'static) -> Lies {
    Lies { read: Some(Arc::new(told)), ..Lies::default() }
}

#[test]
fn copies_that_are_not_as_committed_are_not_believed() {
    reading(vec![
        ("a longer chunk", in_messages(|message| message.chunk_length += 1)),
        ("a chunk without an end", in_messages(|message| message.chunk_length = u64::MAX)),
        ("another checksum of the chunk", in_messages(|message| message.chunk_checksum ^= 1)),
        ("bytes of another place", in_messages(|message| message.offset += 4_096)),
        ("bytes behind all places", in_messages(|message| message.offset = u64::MAX - 3)),
        (
            "a flipped bit",
            in_messages(|message| {
                let mut bytes = message.data.to_vec();
                bytes[100] ^= 1;
                message.data = bytes.into();
            }),
        ),
        ("too few bytes", in_messages(|message| message.data.truncate(5_000))),
        ("no bytes", in_messages(|message| message.data.clear())),
        (
            "too many bytes",
            in_messages(|message| {
                message.data = [&message.data[..], &[7; 8_192]].concat().into();
            }),
        ),
        ("no checksums", in_messages(|message| message.block_checksums.clear())),
        ("too many checksums", in_messages(|message| message.block_checksums.resize(100_000, 1))),
        ("wrong checksums", in_messages(|message| message.block_checksums.fill(9))),
        ("a message beyond the limit", in_messages(|message| message.data = vec![0; 6 << 20].into())),
    ]);
}

#[test]
fn streams_without_an_end_end() {
    let again = |messages: Vec<v1::ReadResponse>| stream::repeat(messages[0].clone()).map(Ok).boxed();
    let empty = |_| stream::repeat(v1::ReadResponse::default()).map(Ok).boxed();
    let beyond = |messages: Vec<v1::ReadResponse>| {
        let more = messages[0].clone();
        stream::iter(messages).chain(stream::repeat(more)).map(Ok).boxed()
    };
    reading(vec![
        ("the same message again and again", in_stream(again)),
        ("empty messages again and again", in_stream(empty)),
        ("more after the end", in_stream(beyond)),
        ("nothing at all, for ever", in_stream(|_| stream::pending().boxed())),
        (
            "one message, then nothing",
            in_stream(|messages| {
                stream::iter(messages.into_iter().take(1).map(|mut message| {
                    message.data.truncate(4_096);
                    message.block_checksums.truncate(1);
                    Ok(message)
                }))
                .chain(stream::pending())
                .boxed()
            }),
        ),
        ("an end before the first byte", in_stream(|_| stream::empty().boxed())),
    ]);
}

/// A lie in every answer to a lookup.
fn in_lookup(change: impl Fn(&mut v1::LookupResponse) + Send + Sync + 'static) -> Lies {
    Lies { lookup: lie(change), ..Lies::default() }
}

#[test]
fn layouts_that_cannot_be_are_refused() {
    reading(vec![
        ("no attributes", in_lookup(|answer| answer.attributes = None)),
        ("a size without an end", in_lookup(|answer| answer.attributes.as_mut().unwrap().size = u64::MAX)),
        (
            "no extents of a file that is larger than memory",
            in_lookup(|answer| {
                answer.attributes.as_mut().unwrap().size = 1 << 60;
                answer.extents.clear();
            }),
        ),
        ("an extent without an end", in_lookup(|answer| answer.extents[0].length = u64::MAX)),
        (
            "an extent that begins at the end of all numbers",
            in_lookup(|answer| {
                answer.extents[0].offset = u64::MAX;
            }),
        ),
        (
            "bytes behind the end of a chunk",
            in_lookup(|answer| answer.extents[0].chunk_offset = u64::MAX - 1),
        ),
        (
            "an extent of another chunk",
            in_lookup(|answer| {
                answer.extents[0].chunk.as_mut().unwrap().chunk.as_mut().unwrap().grant_id += 1_000;
            }),
        ),
        (
            "a chunk of another length",
            in_lookup(|answer| {
                answer.extents[0].chunk.as_mut().unwrap().length = u64::MAX;
            }),
        ),
        (
            "extents that overlap",
            in_lookup(|answer| {
                let extents = answer.extents.clone();
                answer.extents.extend(extents);
            }),
        ),
        ("extents of nothing", in_lookup(|answer| answer.extents[0].length = 0)),
        ("no groups", in_lookup(|answer| answer.groups.clear())),
        (
            "groups without seats",
            in_lookup(|answer| {
                answer.groups.iter_mut().for_each(|group| group.seats.clear());
            }),
        ),
        (
            "servers without addresses",
            in_lookup(|answer| {
                answer.servers.iter_mut().for_each(|server| server.endpoints.clear());
            }),
        ),
        (
            "addresses that are none",
            in_lookup(|answer| {
                let addresses = answer.servers.iter_mut().flat_map(|server| &mut server.endpoints);
                addresses.for_each(|endpoint| endpoint.uri = "\0not an address at all".repeat(100));
            }),
        ),
    ]);
}

#[test]
fn pages_without_an_end_end() {
    let page = |answer: &mut v1::LookupResponse| answer.next_page_token = "1".into();
    reading(vec![
        ("the same page of extents again and again", in_lookup(page)),
        (
            "empty pages of extents again and again",
            in_lookup(move |answer| {
                answer.extents.clear();
                page(answer);
            }),
        ),
    ]);
    bounded("empty pages of everything", || async {
        let cluster = Cluster::start(1);
        let client = client(&cluster);
        client.write("/file", "x").await.unwrap();
        *cluster.lies.lock() = Lies {
            list: lie(|answer: &mut v1::ListResponse| {
                answer.entries.clear();
                answer.next_page_token = "1".into();
            }),
            list_locks: lie(|answer: &mut v1::ListLocksResponse| answer.next_page_token = "1".into()),
            explain: lie(|answer: &mut v1::ExplainResponse| {
                answer.chunks.clear();
                answer.next_page_token = "1".into();
            }),
            ..Lies::default()
        };
        assert_says("explain", client.explain("/file").await);
        assert_says(
            "locks",
            client.locks().collect::<Vec<_>>().await.into_iter().collect::<Result<Vec<_>>>(),
        );
        assert_says(
            "list",
            client.list("/").collect::<Vec<_>>().await.into_iter().collect::<Result<Vec<_>>>(),
        );
    });
}

#[test]
fn errors_that_say_nothing_true_are_errors_all_the_same() {
    let detail = |detail: v1::ErrorDetail, reason: i32| {
        use prost::Message as _;
        let detail = v1::ErrorDetail { reason, ..detail };
        // As the standard envelope has it: a code, a message, and details of any type.
        envelope("type.googleapis.com/cairn.v1.ErrorDetail", detail.encode_to_vec())
    };
    let refusal = |code: Code, details: Vec<u8>| Lies {
        refusal: Some(Status::with_details(code, "no", details.into())),
        ..Lies::default()
    };
    let long =
        v1::ErrorDetail { retry_after_ms: u64::MAX, message: "come back".into(), ..Default::default() };
    let overloaded = v1::ErrorReason::Overloaded as i32;
    reading(vec![
        ("details of garbage", refusal(Code::Internal, vec![0xff; 2_000])),
        ("details of another type", refusal(Code::Internal, envelope("type.example/x", vec![1; 9]))),
        ("a reason that nobody knows", refusal(Code::Internal, detail(v1::ErrorDetail::default(), 9_999))),
        ("come back at the end of all time", refusal(Code::ResourceExhausted, detail(long, overloaded))),
        ("unavailable, for ever", refusal(Code::Unavailable, Vec::new())),
        ("no error at all", refusal(Code::Ok, Vec::new())),
        (
            "a code that does not fit",
            refusal(Code::NotFound, detail(v1::ErrorDetail::default(), v1::ErrorReason::Unavailable as i32)),
        ),
    ]);
}

/// `google.rpc.Status` with one detail.
fn envelope(type_url: &str, value: Vec<u8>) -> Vec<u8> {
    #[derive(prost::Message)]
    struct Any {
        #[prost(string, tag = "1")]
        type_url: String,
        #[prost(bytes = "vec", tag = "2")]
        value: Vec<u8>,
    }
    #[derive(prost::Message)]
    struct Envelope {
        #[prost(message, repeated, tag = "3")]
        details: Vec<Any>,
    }
    prost::Message::encode_to_vec(&Envelope { details: vec![Any { type_url: type_url.into(), value }] })
}

/// Each lie is told to a client that wants to write.
fn writing(lies: Vec<(&'static str, Lies)>) {
    for (what, told) in lies {
        bounded(what, || async move {
            let cluster = Cluster::start(3);
            let bytes = noise(SIZE, 6);
            let writer = client(&cluster);
            *cluster.lies.lock() = told;
            let begun = Instant::now();
            let written = writer.write("/file", bytes.clone()).await;
            let locked = writer.lock("/other", LockOptions::new()).await;
            println!("{what}: {:?}, {:?}", begun.elapsed(), written.as_ref().err().map(ToString::to_string));
            *cluster.lies.lock() = Lies::default();
            if written.is_ok() {
                assert!(client(&cluster).read("/file").await.unwrap() == bytes, "{what}: acknowledged");
            } else {
                assert_says(what, written);
            }
            drop(locked);
            client(&cluster).write("/honest", bytes).await.unwrap();
        });
    }
}

#[test]
fn receipts_grants_and_sessions_that_cannot_be_are_not_believed() {
    let receipt = |change: fn(&mut v1::Receipt)| Lies { receipt: lie(change), ..Lies::default() };
    let grant = |change: fn(&mut v1::Grant)| Lies { grant: lie(change), ..Lies::default() };
    let open = |ttl_ms| Lies {
        open: lie(move |answer: &mut v1::OpenResponse| answer.ttl_ms = ttl_ms),
        ..Lies::default()
    };
    writing(vec![
        ("a receipt of another chunk", receipt(|receipt| receipt.chunk.as_mut().unwrap().index += 1)),
        ("a receipt of no chunk", receipt(|receipt| receipt.chunk = None)),
        ("a receipt of other bytes", receipt(|receipt| receipt.checksum ^= 1)),
        ("a receipt of more bytes", receipt(|receipt| receipt.length = u64::MAX)),
        ("a grant of nothing", grant(|grant| grant.count = 0)),
        ("a grant of everything", grant(|grant| grant.count = u32::MAX)),
        ("a grant without a group", grant(|grant| grant.group = None)),
        ("a grant whose primary is nobody", grant(|grant| grant.group.as_mut().unwrap().primary_id = 99)),
        ("a grant without members", grant(|grant| grant.members.clear())),
        (
            "a commit that says nothing",
            Lies {
                commit: lie(|answer: &mut v1::CommitResponse| *answer = v1::CommitResponse::default()),
                ..Lies::default()
            },
        ),
        ("a session that is over at once", open(0)),
        ("a session that ends all the time", open(1)),
        ("a session without an end", open(u64::MAX)),
    ]);
}
