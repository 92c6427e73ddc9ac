//! BOUNDED: beyond every named limit there is a clear error, and nothing was changed.

use cairn_proto::{limits, net};
use cairn_tests::{checks::bounded, eventually::eventually};
use client_lib::{LockOptions, Reason, WriteOptions};
use cluster::Cluster;
use futures::StreamExt as _;
use std::time::Duration;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

async fn cluster() -> Cluster {
    Cluster::builder().file_servers(1).memory(true).build_and_start().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn bounded_names_and_paths() {
    let cluster = cluster().await;
    let client = cluster.client().await.unwrap();
    let longest = format!("/{}", "n".repeat(limits::NAME_BYTES_MAX));
    client.write(&longest, "x").await.unwrap();
    assert_eq!(&client.read(&longest).await.unwrap()[..], b"x");
    let cases = [
        (format!("/{}", "n".repeat(limits::NAME_BYTES_MAX + 1)), Reason::LimitExceeded),
        ("/a".repeat(limits::PATH_DEPTH_MAX + 1), Reason::LimitExceeded),
        (format!("/{}", "x/".repeat(2_100)), Reason::LimitExceeded),
        ("/a/../b".into(), Reason::InvalidArgument),
        ("/./b".into(), Reason::InvalidArgument),
        ("relative".into(), Reason::InvalidArgument),
        (String::new(), Reason::InvalidArgument),
        ("/nul\0".into(), Reason::InvalidArgument),
    ];
    for (path, reason) in cases {
        for error in [
            client.write(&path, "x").await.map(drop).unwrap_err(),
            client.create(&path).await.map(drop).unwrap_err(),
            client.mkdir(&path).await.map(drop).unwrap_err(),
            client.rename(&longest, &path).await.map(drop).unwrap_err(),
        ] {
            assert_eq!(error.reason, reason, "{path:.40}: {error}");
        }
    }
    let mut deep = String::new();
    for _ in 0..limits::PATH_DEPTH_MAX {
        deep.push_str("/d");
    }
    client.mkdir_all(&deep).await.unwrap();
    assert!(client.delete_recursive("/d").await.unwrap().kept.is_empty());
    assert!(!client.exists("/d").await.unwrap());
    cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn bounded_servers_refuse_what_a_client_does_not_check() {
    use cairn_tests::reflect::{CallError, GenericClient};
    use serde_json::json;
    let cluster = cluster().await;
    let directory = GenericClient::connect(&cluster.directory_uri()).await.unwrap();
    let files = GenericClient::connect(&cluster.file_server_uri(0)).await.unwrap();
    let long = format!("/{}", "n".repeat(256));
    let calls = [
        (&directory, "cairn.v1.DirectoryService/Create", json!({"path": long, "kind": "KIND_FILE"})),
        (&directory, "cairn.v1.DirectoryService/Create", json!({"path": "/a/../b", "kind": "KIND_FILE"})),
        (&directory, "cairn.v1.DirectoryService/Create", json!({"path": "/a"})),
        (&directory, "cairn.v1.DirectoryService/Lookup", json!({})),
        (&directory, "cairn.v1.DirectoryService/Lookup", json!({"path": "/", "inode": 1})),
        (&directory, "cairn.v1.DirectoryService/List", json!({"path": "/", "page_size": 5000})),
        (&directory, "cairn.v1.DirectoryService/Lock", json!({"path": "/a"})),
        (
            &directory,
            "cairn.v1.DirectoryService/Lock",
            json!({"path": "/a", "mode": "LOCK_MODE_SHARED", "ttl_ms": 1}),
        ),
        (
            &directory,
            "cairn.v1.DirectoryService/Lock",
            json!({"path": "/a", "mode": "LOCK_MODE_SHARED", "owner": "o".repeat(256)}),
        ),
        (&directory, "cairn.v1.DirectoryService/Commit", json!({"path": "/a", "edits": [{"append": {}}]})),
        (&directory, "cairn.v1.DirectoryService/Commit", json!({"path": "/a", "edits": [{}]})),
        (&directory, "cairn.v1.SessionService/Open", json!({"ttl_ms": 1})),
        (&directory, "cairn.v1.SessionService/Grant", json!({"session_id": 1, "count": 1_000_000})),
        (&files, "cairn.v1.FileService/Read", json!({})),
        (&files, "cairn.v1.FileService/Write", json!({})),
        (
            &files,
            "cairn.v1.FileService/Write",
            json!({"chunk": {"grant_id": 0}, "data": "aGk=", "finish": {"length": 2}}),
        ),
    ];
    for (client, method, request) in calls {
        let short = request.to_string();
        match client.call(method, request).await {
            Err(CallError::Status(status)) => {
                let code = status.code();
                assert!(
                    matches!(
                        code,
                        tonic::Code::InvalidArgument
                            | tonic::Code::OutOfRange
                            | tonic::Code::FailedPrecondition
                            | tonic::Code::NotFound
                            | tonic::Code::AlreadyExists
                    ),
                    "{method} {short:.80}: {status:?}"
                );
                assert!(status.message().len() > 10, "{method}: a message for a person: {status:?}");
            }
            Ok(answers) => panic!("{method} {short:.80} was accepted: {answers:?}"),
            Err(CallError::Local(error)) => panic!("{method}: {error:#}"),
        }
    }
    cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn bounded_attributes_and_shared_locks() {
    let cluster = cluster().await;
    let client = cluster.client().await.unwrap();
    let options = WriteOptions::new().xattr("user.big", vec![0; limits::XATTR_BYTES_MAX]);
    assert_eq!(client.write_with("/file", "x", options).await.unwrap_err().reason, Reason::LimitExceeded);
    assert!(!client.exists("/file").await.unwrap());
    client.write("/file", "x").await.unwrap();
    let mut held = Vec::new();
    for _ in 0..64 {
        held.push(client.lock("/file", LockOptions::new().shared()).await.unwrap());
    }
    assert_eq!(client.write("/file", "y").await.unwrap_err().reason, Reason::LockHeld);
    for lock in held {
        lock.unlock().await.unwrap();
    }
    client.write("/file", "y").await.unwrap();
    cluster.shutdown().await.unwrap();
}

/// A directory whose attributes are more than fits a message, with the number of entries that is asked for unasked.
#[tokio::test(flavor = "multi_thread")]
async fn bounded_pages_of_large_attributes_can_be_listed() {
    use cairn_tests::reflect::GenericClient;
    use serde_json::json;
    const FILES: usize = 100;
    let cluster = cluster().await;
    let client = cluster.client().await.unwrap();
    let mut names = Vec::new();
    for number in 0..FILES {
        let name = format!("{number:03}");
        let options = WriteOptions::new().xattr("user.big", vec![7; limits::XATTR_BYTES_MAX - 1_024]);
        client.write_with(&format!("/{name}"), "x", options).await.unwrap();
        names.push(name);
    }
    let listed: Vec<client_lib::v1::Entry> =
        client.list("/").map(|entry| entry.expect("a page that fits a message")).collect().await;
    assert!(
        listed.iter().all(|entry| entry.attributes.as_ref().is_some_and(|shown| shown.xattrs.len() == 1))
    );
    assert_eq!(listed.into_iter().map(|entry| entry.name).collect::<Vec<_>>(), names);

    let directory = GenericClient::connect(&cluster.directory_uri()).await.unwrap();
    let (mut token, mut listed, mut pages) = (String::new(), Vec::new(), 0);
    loop {
        let request = json!({"path": "/", "page_size": 4096, "with_attributes": true, "page_token": token});
        let page = directory.unary("cairn.v1.DirectoryService/List", request).await.unwrap();
        let entries = page["entries"].as_array().unwrap();
        listed.extend(entries.iter().map(|entry| entry["name"].as_str().unwrap().to_owned()));
        pages += 1;
        token = page["next_page_token"].as_str().unwrap_or_default().to_owned();
        if token.is_empty() {
            break;
        }
    }
    assert_eq!(listed, names);
    assert_eq!(pages, (FILES * limits::XATTR_BYTES_MAX).div_ceil(limits::PAGE_BYTES_MAX));
    cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn bounded_a_sender_is_held_back_while_disks_stall() {
    assert_eq!(bounded::stalled_disks(Cluster::builder()).await, Ok(()));
}

/// What a server says of itself on a new connection: streams at a time, window of a stream, largest frame, and window of
/// the connection.
struct Greeted {
    _connection: TcpStream,
    streams: u32,
    stream_window: u32,
    frame: u32,
    window: u32,
}

/// Greets a server in HTTP/2 by hand (RFC 9113, sections 3.4, 4.1, 6.5 and 6.9) and reads its settings.
async fn greeted(uri: &str) -> Greeted {
    const SETTINGS: u8 = 4;
    const PING: u8 = 6;
    const WINDOW_UPDATE: u8 = 8;
    let mut connection = TcpStream::connect(net::authority(uri).unwrap()).await.unwrap();
    connection.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    let (mut streams, mut stream_window, mut frame, mut window) = (u32::MAX, 65_535, 16_384, 65_535);
    let number = |bytes: &[u8]| bytes.iter().fold(0, |sum, byte| sum << 8 | u32::from(*byte));
    // The settings and the widening of the connection, where there is one, are there before two pings are answered.
    let mut pings = 0;
    while pings < 2 {
        let mut head = [0; 9];
        read(&mut connection, &mut head).await;
        let mut payload = vec![0; number(&head[..3]) as usize];
        read(&mut connection, &mut payload).await;
        match (head[3], head[4]) {
            (SETTINGS, 0) => {
                for setting in payload.chunks_exact(6) {
                    let value = number(&setting[2..]);
                    match number(&setting[..2]) {
                        3 => streams = value,
                        4 => stream_window = value,
                        5 => frame = value,
                        _ => {}
                    }
                }
            }
            (WINDOW_UPDATE, _) => window += number(&payload),
            (SETTINGS, _) | (PING, 1) => {
                pings += u32::from(head[3] == PING);
                connection.write_all(b"\0\0\x08\x06\0\0\0\0\0two.ping").await.unwrap();
            }
            _ => {}
        }
    }
    Greeted { _connection: connection, streams, stream_window, frame, window }
}

async fn read(connection: &mut TcpStream, bytes: &mut [u8]) {
    let read = connection.read_exact(bytes);
    tokio::time::timeout(Duration::from_secs(30), read).await.expect("the server greets").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn bounded_windows_are_wide_for_some_connections_and_narrow_for_all_others() {
    let cluster = cluster().await;
    for (uri, roomy) in [
        (
            cluster.directory_uri(),
            [net::SMALL_STREAM_WINDOW_BYTES, net::SMALL_FRAME_BYTES, net::SMALL_CONNECTION_WINDOW_BYTES],
        ),
        (
            cluster.file_server_uri(0),
            [net::BULK_STREAM_WINDOW_BYTES, net::BULK_FRAME_BYTES, net::BULK_CONNECTION_WINDOW_BYTES],
        ),
    ] {
        let is = |greeted: &Greeted| [greeted.stream_window, greeted.frame, greeted.window];
        let first = greeted(&uri).await;
        assert_eq!((is(&first), first.streams), (roomy, limits::STREAMS_PER_CONNECTION_MAX), "{uri}");
        let mut held = vec![first];
        for _ in 0..limits::ROOMY_CONNECTIONS_MAX {
            held.push(greeted(&uri).await);
        }
        let last = held.last().unwrap();
        let narrow = [net::NARROW_WINDOW_BYTES, net::NARROW_FRAME_BYTES, net::NARROW_WINDOW_BYTES];
        assert_eq!((is(last), last.streams), (narrow, net::NARROW_STREAMS_MAX), "{uri}");
        // Whoever comes on a narrow connection does all that others do.
        let client = cluster.client().await.unwrap();
        let content = vec![7; 3 << 20];
        client.write("/narrow", content.clone()).await.unwrap();
        assert_eq!(client.read("/narrow").await.unwrap(), content);
        let paths = (0..500).map(|number| format!("/small-{number}"));
        let client = &client;
        let mut small = futures::stream::iter(paths)
            .map(|path| async move { client.write(&path, path.clone()).await })
            .buffer_unordered(500);
        while let Some(written) = small.next().await {
            written.unwrap();
        }
        drop(held);
        eventually("places come back", Duration::from_secs(30), || async {
            let window = greeted(&uri).await.window;
            if window == roomy[2] { Ok(()) } else { Err(format!("a window of {window} bytes")) }
        })
        .await;
    }
    cluster.shutdown().await.unwrap();
}
