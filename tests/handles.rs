//! File handles against a model: whatever a program does with a handle, the file is what a vector of bytes would be.

use cairn_tests::seed;
use client_lib::{Client, File};
use cluster::Cluster;
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::io::SeekFrom;
use tokio::io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt};

const CHUNK: u64 = 16 * 1024;

/// Holes and all, as the handle must see it.
struct Model {
    bytes: Vec<u8>,
}

impl Model {
    fn write(&mut self, at: usize, bytes: &[u8]) {
        if self.bytes.len() < at + bytes.len() {
            self.bytes.resize(at + bytes.len(), 0);
        }
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }
}

async fn step(dice: &mut StdRng, file: &mut File, model: &mut Model) {
    let size = model.bytes.len();
    match dice.random_range(0..9) {
        0..=3 => {
            let at = dice.random_range(0..=size + 5_000);
            let bytes: Vec<u8> = (0..dice.random_range(1..40_000)).map(|_| dice.random()).collect();
            file.write_at(at as u64, bytes.clone()).await.unwrap();
            model.write(at, &bytes);
        }
        4 => {
            let bytes: Vec<u8> = (0..dice.random_range(1..20_000)).map(|_| dice.random()).collect();
            file.append(bytes.clone()).await.unwrap();
            model.bytes.extend(bytes);
        }
        5 => {
            let length = dice.random_range(0..=size + 10_000);
            file.set_len(length as u64).await.unwrap();
            model.bytes.resize(length, 0);
        }
        6 => {
            let at = dice.random_range(0..=size);
            let length = dice.random_range(0..=size - at);
            file.punch(at as u64, length as u64).await.unwrap();
            model.bytes[at..at + length].fill(0);
        }
        _ => {
            let at = dice.random_range(0..=size);
            let length = dice.random_range(0..=(size - at).min(50_000));
            let read = file.read_at(at as u64, length).await.unwrap();
            assert!(read[..] == model.bytes[at..at + length], "read of {length} at {at}");
        }
    }
}

async fn open(client: &Client) -> File {
    client.open_options().read(true).write(true).create(true).open("/file").await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn handles_do_what_a_vector_would() {
    let seed = seed("HANDLES_SEED");
    let mut dice = StdRng::seed_from_u64(seed);
    let cluster = Cluster::builder().file_servers(2).memory(true).build_and_start().await.unwrap();
    let client = cluster.client_builder().chunk_bytes(CHUNK).build().unwrap();
    let reader = cluster.client().await.unwrap();
    let mut model = Model { bytes: Vec::new() };
    let mut version = 0;
    for round in 0..25 {
        let mut file = open(&client).await;
        // At least one change a round: a handle that only read makes no version.
        let byte = [dice.random()];
        file.write_at(0, byte.to_vec()).await.unwrap();
        model.write(0, &byte);
        for _ in 0..dice.random_range(0..20) {
            step(&mut dice, &mut file, &mut model).await;
            assert_eq!(file.size().await.unwrap(), model.bytes.len() as u64);
        }
        let committed = file.close().await.unwrap();
        assert!(committed.version > version, "round {round}: one new version a close");
        version = committed.version;
        assert_eq!(committed.size, model.bytes.len() as u64);
        assert!(reader.read("/file").await.unwrap() == model.bytes, "round {round}, seed {seed}");
        let at = dice.random_range(0..=model.bytes.len());
        let length = dice.random_range(0..=model.bytes.len() - at);
        let part = reader.read_range("/file", at as u64, length as u64).await.unwrap();
        if length > 0 {
            assert!(part == model.bytes[at..at + length]);
        }
    }
    cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn handles_are_async_read_write_and_seek() {
    let cluster = Cluster::builder().file_servers(2).memory(true).build_and_start().await.unwrap();
    let client = cluster.client_builder().chunk_bytes(CHUNK).build().unwrap();
    let content: Vec<u8> = (0..200_000u32).map(|number| (number / 7) as u8).collect();
    let mut file = open(&client).await;
    file.write_all(&content).await.unwrap();
    file.seek(SeekFrom::Start(100)).await.unwrap();
    file.write_all(b"in the middle").await.unwrap();
    assert!(!client.exists("/file").await.unwrap() || client.stat("/file").await.unwrap().size == 0);
    file.close().await.unwrap();

    let mut expected = content;
    expected[100..113].copy_from_slice(b"in the middle");
    let mut file = client.open("/file").await.unwrap();
    let mut read = Vec::new();
    file.read_to_end(&mut read).await.unwrap();
    assert!(read == expected);
    file.seek(SeekFrom::End(-10)).await.unwrap();
    let mut tail = [0; 10];
    file.read_exact(&mut tail).await.unwrap();
    assert_eq!(tail, expected[expected.len() - 10..]);
    assert_eq!(file.read(&mut tail).await.unwrap(), 0, "the end");
    cluster.shutdown().await.unwrap();
}

#[test]
fn handles_work_without_a_runtime() {
    use std::io::{Read, Seek, Write};
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let cluster =
        runtime.block_on(Cluster::builder().file_servers(1).memory(true).build_and_start()).unwrap();
    let client = client_lib::blocking::Client::build(cluster.client_builder()).unwrap();
    client.write("/file", "hello").unwrap();
    assert_eq!(&client.read("/file").unwrap()[..], b"hello");
    let mut file = client.create_file("/large").unwrap();
    file.write_all(&vec![3; 100_000]).unwrap();
    file.close().unwrap();
    let mut file = client.open("/large").unwrap();
    file.seek(SeekFrom::Start(99_990)).unwrap();
    let mut tail = Vec::new();
    file.read_to_end(&mut tail).unwrap();
    assert_eq!(tail, [3; 10]);
    let names: Vec<String> = client.list("/").map(|entry| entry.unwrap().name).collect();
    assert_eq!(names, ["file", "large"]);
    client.close().unwrap();
    runtime.block_on(cluster.shutdown()).unwrap();
}
