//! Open files.

use crate::fake::{Cluster, eventually, noise};
use client_lib::{Client, LockOptions, Reason};
use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};
use std::io::SeekFrom;
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _, AsyncWriteExt as _};

async fn open(client: &Client, path: &str) -> client_lib::File {
    client.open_options().read(true).write(true).create(true).open(path).await.unwrap()
}

#[tokio::test]
async fn random_changes_are_as_of_a_plain_vector() {
    for seed in 0..12 {
        let cluster = Cluster::start(3);
        let client = cluster.builder().chunk_bytes(8_192).seed(seed).build().unwrap();
        let mut random = SmallRng::seed_from_u64(seed);
        let mut model = noise(random.random_range(0..60_000), seed);
        client.write("/file", model.clone()).await.unwrap();
        let mut committed = model.clone();
        let mut file = open(&client, "/file").await;
        for step in 0..60 {
            let offset = random.random_range(0..70_000usize);
            let length = match random.random_range(0..3) {
                0 => random.random_range(0..50),
                1 => random.random_range(0..5_000),
                _ => random.random_range(0..30_000),
            };
            match random.random_range(0..10) {
                0..4 => {
                    let bytes = noise(length, random.random());
                    file.write_at(offset as u64, bytes.clone()).await.unwrap();
                    if length > 0 && model.len() < offset + length {
                        model.resize(offset + length, 0);
                    }
                    if length > 0 {
                        model[offset..offset + length].copy_from_slice(&bytes);
                    }
                }
                4 => {
                    file.set_len(offset as u64).await.unwrap();
                    model.resize(offset, 0);
                }
                5 => {
                    file.punch(offset as u64, length as u64).await.unwrap();
                    let end = (offset + length).min(model.len());
                    if offset < end {
                        model[offset..end].fill(0);
                    }
                }
                6 => {
                    let bytes = noise(length, random.random());
                    file.append(bytes.clone()).await.unwrap();
                    model.extend_from_slice(&bytes);
                }
                7 => {
                    file.commit().await.unwrap();
                    committed.clone_from(&model);
                }
                8 => file.flush().await.unwrap(),
                _ => {}
            }
            let read = file.read_at(offset as u64, length).await.unwrap();
            let end = (offset + length).min(model.len());
            assert!(read == model.get(offset..end).unwrap_or_default(), "seed {seed} step {step}");
            assert_eq!(file.size().await.unwrap(), model.len() as u64, "seed {seed} step {step}");
            if step % 10 == 0 {
                assert!(client.read("/file").await.unwrap() == committed, "seed {seed} step {step}: others");
            }
        }
        file.close().await.unwrap();
        assert!(client.read("/file").await.unwrap() == model, "seed {seed}");
    }
}

#[tokio::test]
async fn a_plain_file_and_a_handle_do_the_same() {
    let directory = std::env::temp_dir().join(format!("cairn-client-{}", std::process::id()));
    let mut plain = tokio::fs::File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&directory)
        .await
        .unwrap();
    let cluster = Cluster::start(3);
    let client = cluster.builder().chunk_bytes(4_096).build().unwrap();
    let mut file = open(&client, "/file").await;
    let mut random = SmallRng::seed_from_u64(42);
    for step in 0..300 {
        match random.random_range(0..4) {
            0 => {
                let bytes = noise(random.random_range(0..9_000), step);
                plain.write_all(&bytes).await.unwrap();
                file.write_all(&bytes).await.unwrap();
            }
            1 => {
                let count = random.random_range(0..9_000u64);
                let (mut a, mut b) = (Vec::new(), Vec::new());
                plain.flush().await.unwrap();
                (&mut plain).take(count).read_to_end(&mut a).await.unwrap();
                (&mut file).take(count).read_to_end(&mut b).await.unwrap();
                assert!(a == b, "step {step}");
            }
            2 => {
                let to = match random.random_range(0..3) {
                    0 => SeekFrom::Start(random.random_range(0..40_000)),
                    1 => SeekFrom::End(random.random_range(-20_000..2_000)),
                    _ => SeekFrom::Current(random.random_range(-5_000..5_000)),
                };
                plain.flush().await.unwrap();
                let (a, b) = (plain.seek(to).await, file.seek(to).await);
                assert_eq!(a.is_ok(), b.is_ok(), "step {step} {to:?}");
                if let (Ok(a), Ok(b)) = (a, b) {
                    assert_eq!(a, b, "step {step} {to:?}");
                }
            }
            _ => {
                let length = random.random_range(0..40_000);
                plain.flush().await.unwrap();
                plain.set_len(length).await.unwrap();
                file.set_len(length).await.unwrap();
            }
        }
    }
    plain.flush().await.unwrap();
    file.shutdown().await.unwrap();
    assert!(client.read("/file").await.unwrap() == std::fs::read(&directory).unwrap());
    std::fs::remove_file(&directory).unwrap();
}

#[tokio::test]
async fn nothing_is_seen_before_the_commit_and_a_reader_keeps_its_version() {
    let cluster = Cluster::start(3);
    let client = cluster.client();
    client.write("/file", "old content").await.unwrap();
    let mut reader = client.open("/file").await.unwrap();
    let mut writer = open(&client, "/file").await;
    writer.write_all(b"NEW").await.unwrap();
    writer.flush().await.unwrap();
    assert_eq!(writer.read_at(0, 100).await.unwrap(), "NEW content", "the handle sees its own");
    assert_eq!(client.read("/file").await.unwrap(), "old content");
    let version = writer.commit().await.unwrap().version;
    assert_eq!(client.read("/file").await.unwrap(), "NEW content");
    let mut seen = String::new();
    reader.read_to_string(&mut seen).await.unwrap();
    assert_eq!(seen, "old content");
    assert_eq!(writer.commit().await.unwrap().version, version, "no change, no version");
    assert_eq!(client.write("/file", "x").await.unwrap_err().reason, Reason::LockHeld);
    assert_eq!(writer.close().await.unwrap().version, version);
    client.write("/file", "x").await.unwrap();
}

#[tokio::test]
async fn dropping_and_aborting_give_changes_and_lock_up() {
    let cluster = Cluster::start(3);
    let client = cluster.client();
    let mut file = open(&client, "/file").await;
    file.write_all(&noise(200_000, 1)).await.unwrap();
    drop(file);
    eventually("the lock is given back", || cluster.state.lock().locks.is_empty()).await;
    let mut file = open(&client, "/file").await;
    file.write_all(b"x").await.unwrap();
    file.abort().await;
    assert!(cluster.state.lock().locks.is_empty());
    assert!(!client.exists("/file").await.unwrap());
}

#[tokio::test]
async fn opening_follows_the_options() {
    let cluster = Cluster::start(3);
    let client = cluster.client();
    let options = || client.open_options();
    assert_eq!(client.open("/file").await.unwrap_err().reason, Reason::NotFound);
    assert_eq!(options().write(true).open("/file").await.unwrap_err().reason, Reason::NotFound);
    for mut wrong in [options(), options(), options()].into_iter().enumerate().map(|(number, mut options)| {
        match number {
            0 => options.create(true),
            1 => options.read(true).truncate(true),
            _ => options.append(true).truncate(true),
        };
        options
    }) {
        assert_eq!(wrong.read(false).open("/file").await.unwrap_err().reason, Reason::InvalidArgument);
    }
    options().write(true).create_new(true).open("/file").await.unwrap().close().await.unwrap();
    assert_eq!(client.stat("/file").await.unwrap().size, 0, "an empty file is made at close");
    let error = options().write(true).create_new(true).open("/file").await.unwrap_err();
    assert_eq!(error.reason, Reason::AlreadyExists);
    eventually("failed opens keep no lock", || cluster.state.lock().locks.is_empty()).await;

    let mut file = options().append(true).open("/file").await.unwrap();
    file.write_all(b"one ").await.unwrap();
    file.seek(SeekFrom::Start(0)).await.unwrap();
    file.write_all(b"two").await.unwrap();
    assert!(file.read_at(0, 1).await.is_err(), "not opened to read");
    file.close().await.unwrap();
    assert_eq!(client.read("/file").await.unwrap(), "one two");

    let mut file = client.open("/file").await.unwrap();
    assert!(file.write_all(b"x").await.is_err(), "not opened to write");
    let file = options().write(true).truncate(true).open("/file").await.unwrap();
    assert_eq!(client.read("/file").await.unwrap(), "one two");
    file.close().await.unwrap();
    assert_eq!(client.read("/file").await.unwrap(), "");

    let mut file = options().write(true).commit_on_flush(true).open("/file").await.unwrap();
    file.write_all(b"seen").await.unwrap();
    file.flush().await.unwrap();
    assert_eq!(client.read("/file").await.unwrap(), "seen");
}

#[tokio::test]
async fn a_handle_writes_under_a_lock_held_already_and_leaves_it() {
    let cluster = Cluster::start(3);
    let client = cluster.client();
    let lock = client.lock("/file", LockOptions::new()).await.unwrap();
    let mut file = client.open_options().write(true).create(true).token(&lock).open("/file").await.unwrap();
    file.write_all(b"mine").await.unwrap();
    file.close().await.unwrap();
    assert_eq!(client.read("/file").await.unwrap(), "mine");
    assert!(!lock.is_lost());
    lock.unlock().await.unwrap();
}

#[tokio::test]
async fn reading_in_order_fetches_ahead_within_a_bound() {
    let cluster = Cluster::start(3);
    let client = cluster.builder().chunk_bytes(1 << 20).build().unwrap();
    let bytes = noise(20 << 20, 6);
    client.write("/file", bytes.clone()).await.unwrap();
    let mut file = client.open("/file").await.unwrap();
    let mut begin = vec![0; 1_000];
    file.read_exact(&mut begin).await.unwrap();
    assert!(begin == bytes[..1_000]);
    let reads: usize =
        (1..=3).map(|id| cluster.server(id).reads.load(std::sync::atomic::Ordering::Relaxed)).sum();
    assert!(reads <= 3, "a first read does not fetch the whole file: {reads}");
    let mut rest = Vec::new();
    file.read_to_end(&mut rest).await.unwrap();
    assert!(rest == bytes[1_000..]);
}

#[tokio::test]
async fn long_holes_take_neither_chunks_nor_memory() {
    let cluster = Cluster::start(3);
    let client = cluster.client();
    let mut file = open(&client, "/sparse").await;
    file.set_len(1 << 40).await.unwrap();
    file.write_at((1 << 40) - 4, "tail").await.unwrap();
    file.close().await.unwrap();
    let mut file = client.open("/sparse").await.unwrap();
    assert_eq!(file.read_at((1 << 40) - 6, 10).await.unwrap(), "\0\0tail");
    let mut head = [7; 100];
    file.read_exact(&mut head).await.unwrap();
    assert_eq!(head, [0; 100]);
    assert_eq!(client.read("/sparse").await.unwrap_err().reason, Reason::LimitExceeded);
}

#[tokio::test]
async fn a_flush_that_was_given_up_does_not_pass_for_the_next() {
    let cluster = Cluster::start(3);
    let client = cluster.client();
    let mut open = client.open_options();
    open.write(true).create(true).commit_on_flush(true);
    let mut file = open.open("/file").await.unwrap();
    file.write_all(b"one ").await.unwrap();
    let mut flush = Box::pin(tokio::io::AsyncWriteExt::flush(&mut file));
    assert!(futures::poll!(&mut flush).is_pending());
    drop(flush);
    file.write_all(b"two").await.unwrap();
    tokio::io::AsyncWriteExt::flush(&mut file).await.unwrap();
    assert_eq!(client.read("/file").await.unwrap(), "one two");
    file.abort().await;
}
