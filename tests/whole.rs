//! WHOLE: a reader sees one committed version, never a mix of two and never uncommitted bytes.

use cairn_tests::checks::whole::{self, CHUNK, content};
use client_lib::WriteOptions;
use cluster::Cluster;
use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

#[tokio::test(flavor = "multi_thread")]
async fn whole_versions_while_a_writer_replaces_them() {
    let cluster = Cluster::builder().file_servers(3).memory(true).build_and_start().await.unwrap();
    let writer = cluster.client_builder().chunk_bytes(CHUNK).build().unwrap();
    writer.write("/file", content(1)).await.unwrap();
    let done = Arc::new(AtomicBool::new(false));
    let mut readers = Vec::new();
    for _ in 0..3 {
        let (client, done) = (cluster.client().await.unwrap(), done.clone());
        readers.push(tokio::spawn(async move {
            let (mut reads, mut last) = (0, 0);
            while !done.load(Ordering::Relaxed) {
                let bytes = client.read("/file").await.unwrap();
                let version = bytes[0];
                assert_eq!(bytes.len(), content(version).len(), "length of version {version}");
                assert!(bytes.iter().all(|byte| *byte == version), "a mix with version {version}");
                assert!(version >= last, "version {version} after {last}");
                last = version;
                reads += 1;
            }
            reads
        }));
    }
    for version in 2..40 {
        writer.write("/file", content(version)).await.unwrap();
    }
    done.store(true, Ordering::Relaxed);
    for reader in readers {
        assert!(reader.await.unwrap() > 5, "a reader that read nothing shows nothing");
    }
    cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn whole_version_stays_readable_by_the_handle_that_opened_it() {
    assert_eq!(whole::opened_version(Cluster::builder()).await, Ok(()));
}

#[tokio::test(flavor = "multi_thread")]
async fn whole_nothing_before_the_commit_and_all_after_it() {
    let cluster = Cluster::builder().file_servers(3).memory(true).build_and_start().await.unwrap();
    let client = cluster.client_builder().chunk_bytes(CHUNK).build().unwrap();
    let reader = cluster.client().await.unwrap();
    client.write_with("/file", content(1), WriteOptions::new()).await.unwrap();

    let mut file = client.open_options().read(true).write(true).open("/file").await.unwrap();
    file.write_at(0, vec![7; 3 * CHUNK as usize]).await.unwrap();
    file.flush().await.unwrap();
    assert_eq!(reader.read("/file").await.unwrap(), content(1), "durable on the servers, in no version");
    assert_eq!(file.read_at(0, 4).await.unwrap(), &[7u8; 4][..], "the writer sees what it wrote");
    file.close().await.unwrap();
    let bytes = reader.read("/file").await.unwrap();
    assert!(bytes[..3 * CHUNK as usize].iter().all(|byte| *byte == 7));
    assert!(bytes[3 * CHUNK as usize..].iter().all(|byte| *byte == 1));

    let mut aborted = client.open_options().read(true).write(true).open("/file").await.unwrap();
    aborted.write_at(0, vec![9; 2 * CHUNK as usize]).await.unwrap();
    aborted.abort().await;
    assert_eq!(reader.read("/file").await.unwrap(), bytes);
    cluster.shutdown().await.unwrap();
}
