//! Whole contents in one call.

use crate::fake::{Cluster, noise};
use client_lib::{Condition, Reason, WriteOptions};
use std::io::Cursor;

#[tokio::test]
async fn what_is_written_is_read_at_any_size() {
    let cluster = Cluster::start(3);
    let client = cluster.client();
    for size in [0, 1, 4_095, 4_096, 65_535, 65_536, 65_537, 300_000, 3_000_000] {
        let bytes = noise(size, size as u64);
        let attributes = client.write("/file", bytes.clone()).await.unwrap();
        assert_eq!(attributes.size, size as u64);
        assert_eq!(client.read("/file").await.unwrap(), bytes, "{size} bytes");
    }
    assert_eq!(client.stat("/file").await.unwrap().version, 9, "each write is one version");
    assert!(cluster.state.lock().locks.is_empty(), "long writes gave their lock back");
}

#[tokio::test]
async fn a_short_write_takes_two_calls_with_a_grant_in_hand() {
    let cluster = Cluster::start(3);
    let client = cluster.client();
    // Grants are taken ahead of need until there are a few.
    while cluster.state.lock().grants.len() < 3 {
        client.write("/first", "x").await.unwrap();
    }
    client.write("/first", "x").await.unwrap();
    let before = cluster.state.lock().calls.len();
    for _ in 0..20 {
        client.write("/second", "y").await.unwrap();
    }
    let calls: Vec<_> = cluster.state.lock().calls[before..].iter().map(|(name, _)| *name).collect();
    assert_eq!(calls, ["Commit"; 20]);
}

#[tokio::test]
async fn ranges_cross_chunks_and_end_with_the_file() {
    let cluster = Cluster::start(3);
    let client = cluster.client();
    let bytes = noise(200_000, 1);
    client.write("/file", bytes.clone()).await.unwrap();
    for (offset, length) in
        [(0, 1), (65_000, 2_000), (4_096, 4_096), (199_999, 500), (200_000, 5), (999_999, 1), (7, 0)]
    {
        let expected = bytes.get(offset..(offset + length).min(bytes.len())).unwrap_or_default();
        let read = client.read_range("/file", offset as u64, length as u64).await.unwrap();
        assert_eq!(read, expected, "{offset}+{length}");
    }
}

#[tokio::test]
async fn appends_and_truncations_are_one_version_each() {
    let cluster = Cluster::start(3);
    let client = cluster.client();
    client.append("/log", "one,").await.unwrap();
    client.append("/log", "two,").await.unwrap();
    let long = noise(100_000, 3);
    client.append("/log", long.clone()).await.unwrap();
    assert_eq!(client.stat("/log").await.unwrap().version, 3);
    assert_eq!(client.read("/log").await.unwrap(), [b"one,two,".as_slice(), &long].concat());
    client.truncate("/log", 6).await.unwrap();
    client.truncate("/log", 8).await.unwrap();
    assert_eq!(client.read("/log").await.unwrap(), b"one,tw\0\0".as_slice());
    assert_eq!(client.truncate("/none", 1).await.unwrap_err().reason, Reason::NotFound);
}

#[tokio::test]
async fn streams_go_in_and_out_in_order() {
    let cluster = Cluster::start(3);
    let client = cluster.client();
    for size in [0, 100, 65_536, 1_234_567] {
        let bytes = noise(size, 9);
        let attributes =
            client.put_reader("/stream", Cursor::new(bytes.clone()), WriteOptions::new()).await.unwrap();
        assert_eq!(attributes.size, size as u64);
        let mut out = Vec::new();
        assert_eq!(client.get_writer("/stream", &mut out).await.unwrap().size, size as u64);
        assert!(out == bytes, "{size} bytes");
    }
}

#[tokio::test]
async fn a_stream_that_fails_changes_nothing() {
    use tokio::io::AsyncReadExt as _;
    struct Broken;
    impl tokio::io::AsyncRead for Broken {
        fn poll_read(
            self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
            _: &mut tokio::io::ReadBuf<'_>,
        ) -> std::task::Poll<std::io::Result<()>> {
            std::task::Poll::Ready(Err(std::io::Error::other("unplugged")))
        }
    }
    let cluster = Cluster::start(3);
    let client = cluster.client();
    client.write("/file", "old").await.unwrap();
    let source = Cursor::new(noise(200_000, 1)).chain(Broken);
    let error = client.put_reader("/file", source, WriteOptions::new()).await.unwrap_err();
    assert_eq!(error.reason, Reason::Io);
    assert_eq!(client.read("/file").await.unwrap(), "old");
    assert!(cluster.state.lock().locks.is_empty());
}

#[tokio::test]
async fn conditions_decide_whether_anything_is_written() {
    let cluster = Cluster::start(3);
    let client = cluster.client();
    let only = |condition| WriteOptions::new().condition(condition);
    let first = client.write_with("/file", "a", only(Condition::Absent)).await.unwrap();
    for size in [1, 100_000] {
        let error = client.write_with("/file", noise(size, 1), only(Condition::Absent)).await.unwrap_err();
        assert_eq!(error.reason, Reason::ConditionFailed, "{size}");
        assert_eq!(error.detail.path, "/file");
    }
    client.write_with("/file", "b", only(Condition::Version(first.version))).await.unwrap();
    let error = client.write_with("/file", "c", only(Condition::Etag(first.etag))).await.unwrap_err();
    assert_eq!(error.reason, Reason::ConditionFailed);
    assert_eq!(client.read("/file").await.unwrap(), "b");
    assert!(cluster.state.lock().locks.is_empty());
}

#[tokio::test]
async fn limits_are_enforced_before_anything_is_sent() {
    let cluster = Cluster::start(3);
    let client = cluster.client();
    let long = format!("/{}", "x".repeat(256));
    assert_eq!(client.write(&long, "x").await.unwrap_err().reason, Reason::LimitExceeded);
    assert_eq!(client.read("relative").await.unwrap_err().reason, Reason::InvalidArgument);
    assert_eq!(client.mkdir("/a/../b").await.unwrap_err().reason, Reason::InvalidArgument);
    let fat = WriteOptions::new().xattr("user.x", vec![0; 70_000]);
    assert_eq!(client.create_with("/file", fat).await.unwrap_err().reason, Reason::LimitExceeded);
    let many = WriteOptions::new().replication(99);
    assert_eq!(client.write_with("/file", "x", many).await.unwrap_err().reason, Reason::LimitExceeded);
    assert_eq!(client.truncate("/file", u64::MAX).await.unwrap_err().reason, Reason::LimitExceeded);
    assert!(cluster.state.lock().calls.is_empty());
}

#[tokio::test]
async fn the_replication_of_a_directory_decides_the_grants_of_its_files() {
    let cluster = Cluster::start(3);
    let client = cluster.client();
    client.mkdir_with("/two", WriteOptions::new().replication(2)).await.unwrap();
    client.mkdir("/two/deep").await.unwrap();
    client.write("/two/deep/file", "x").await.unwrap();
    client.write("/plain", "x").await.unwrap();
    let asked: Vec<_> =
        cluster.state.lock().grant_requests.iter().map(|request| request.path.clone()).collect();
    assert_eq!(asked.first().map(String::as_str), Some("/two/deep/file"));
    assert!(asked.contains(&String::new()), "{asked:?}");
    let made = client.write_with("/own", "x", WriteOptions::new().replication(1)).await.unwrap();
    assert_eq!(made.replication, 1);
}

#[tokio::test]
async fn a_file_of_many_extents_is_looked_up_in_pages_and_remembered() {
    let cluster = Cluster::start(3);
    let client = cluster.builder().chunk_bytes(4_096).build().unwrap();
    cluster.state.lock().extents_page = 400;
    let bytes = noise(4_096 * 1_100, 5);
    client.write("/many", bytes.clone()).await.unwrap();
    let before = cluster.calls("Lookup").len();
    assert!(client.read("/many").await.unwrap() == bytes);
    assert_eq!(cluster.calls("Lookup").len() - before, 3);
    assert!(client.read("/many").await.unwrap() == bytes);
    assert_eq!(cluster.calls("Lookup").len() - before, 4, "the same version needs one page");
}

#[tokio::test]
async fn a_layout_that_changes_between_two_pages_is_looked_up_again() {
    let cluster = Cluster::start(3);
    let client = cluster.builder().chunk_bytes(4_096).build().unwrap();
    cluster.state.lock().extents_page = 10;
    let bytes = noise(4_096 * 25, 5);
    client.write("/file", bytes.clone()).await.unwrap();
    cluster.state.lock().compact_between_pages = true;
    assert!(client.read("/file").await.unwrap() == bytes);
    assert!(!cluster.state.lock().compact_between_pages, "it happened");
    cluster.state.lock().compact_between_pages = true;
    let mut file = client.open("/file").await.unwrap();
    assert!(file.read_at(0, bytes.len()).await.unwrap() == bytes);
}
