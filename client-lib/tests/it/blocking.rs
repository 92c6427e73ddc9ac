//! The facade for programs without a runtime.

use crate::fake::{Cluster, noise};
use client_lib::{LockOptions, Reason, WriteOptions, blocking};
use std::{
    io::{Read as _, Seek as _, SeekFrom, Write as _},
    sync::Arc,
};

/// The services in a runtime of their own, and a blocking client.
fn start() -> (tokio::runtime::Runtime, Arc<Cluster>, blocking::Client) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let guard = runtime.enter();
    let cluster = Cluster::start(3);
    drop(guard);
    let client = blocking::Client::build(cluster.builder()).unwrap();
    (runtime, cluster, client)
}

#[test]
fn files_are_read_written_and_sought() {
    let (_runtime, cluster, client) = start();
    client.mkdir_all("/a/b").unwrap();
    let bytes = noise(300_000, 1);
    let mut file = client.create_file("/a/b/file").unwrap();
    file.write_all(&bytes).unwrap();
    file.flush().unwrap();
    assert!(!client.exists("/a/b/file").unwrap());
    file.close().unwrap();
    let mut file = client.open("/a/b/file").unwrap();
    file.seek(SeekFrom::End(-1_000)).unwrap();
    let mut tail = Vec::new();
    file.read_to_end(&mut tail).unwrap();
    assert!(tail == bytes[299_000..]);
    assert!(client.read("/a/b/file").unwrap() == bytes);
    assert_eq!(client.list("/a").map(|entry| entry.unwrap().name).collect::<Vec<_>>(), ["b"]);
    let error = client.open("/none").unwrap_err();
    assert!(error.to_string().contains("/none"));
    let lock = client.lock("/a/b/file", LockOptions::new()).unwrap();
    assert_eq!(client.write("/a/b/file", "x").unwrap_err().reason, Reason::LockHeld);
    client.write_with("/a/b/file", "x", WriteOptions::new().token(&lock)).unwrap();
    drop(lock);
    assert!(cluster.state.lock().locks.is_empty());
    assert_eq!(client.delete_recursive("/a").unwrap().removed, 3);
    client.close().unwrap();
}

#[test]
fn calls_and_drops_inside_of_a_runtime_do_not_panic() {
    let (runtime, cluster, client) = start();
    let other = tokio::runtime::Builder::new_current_thread().build().unwrap();
    other.block_on(async {
        client.write("/file", "x").unwrap();
        let file = client.create_file("/file").unwrap();
        let lock = client.lock("/other", LockOptions::new()).unwrap();
        drop((file, lock, client));
    });
    runtime
        .block_on(crate::fake::eventually("locks are given back", || cluster.state.lock().locks.is_empty()));
}
