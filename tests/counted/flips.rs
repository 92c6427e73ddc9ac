//! CHECKED, HEALED: bits flip anywhere on one replica's disk. Every one is found, none is served, and all are healed.

use crate::ALONE;
use cairn_tests::{
    amount,
    copies::Copies,
    damage::{self, Flip, Part},
    seed,
    services::Services,
};
use client_lib::Client;
use rand::{Rng as _, RngCore as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};
use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

/// Flips of a round, on one server.
const A_ROUND: usize = 20;
const SMALL_FILES: usize = 150;
const LARGE_FILES: usize = 30;
const CHUNK_BYTES: u64 = 256 * 1024;
const LIMIT: Duration = Duration::from_secs(120);

struct Files {
    contents: Vec<(String, Vec<u8>)>,
    client: Client,
}

/// `CAIRN_FLIPS` (default 40) says how many places, `CAIRN_SEED` which.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn checked_flipped_bits_anywhere_in_a_replica_are_found_and_healed() {
    let _alone = ALONE.lock().await;
    let wanted = usize::try_from(amount("CAIRN_FLIPS", 40)).unwrap();
    let mut dice = StdRng::seed_from_u64(seed("CAIRN_SEED"));
    let mut services = Services::start_with(3, &["--compare-ms", "1000"]).await;
    let files = Files::make(&services, &mut dice).await;
    let mut found: BTreeMap<Part, usize> = BTreeMap::new();
    let (mut flipped, mut round) = (0, 0);
    while flipped < wanted {
        services.healthy(LIMIT).await;
        let victim = round % services.files.len();
        let flips = match round % 2 {
            0 => while_it_runs(&services, victim, &files, &mut dice).await,
            _ => while_it_is_down(&mut services, victim, &mut dice).await,
        };
        flipped += flips.len();
        files.read_all(&services, round).await;
        healed(&mut services, victim, &flips).await;
        for flip in &flips {
            *found.entry(flip.region.part).or_default() += 1;
        }
        round += 1;
    }
    services.healthy(LIMIT).await;
    files.read_all(&services, round).await;
    println!("{flipped} places flipped in {round} rounds, all found and healed, none served: {found:?}");
}

impl Files {
    async fn make(services: &Services, dice: &mut StdRng) -> Self {
        let client =
            Client::builder().directory(services.directory_uri()).chunk_bytes(CHUNK_BYTES).build().unwrap();
        let mut contents = Vec::new();
        for number in 0..SMALL_FILES + LARGE_FILES {
            let length = match number < SMALL_FILES {
                true => dice.random_range(1..30_000),
                false => dice.random_range(70_000..700_000),
            };
            let mut bytes = vec![0; length];
            dice.fill_bytes(&mut bytes);
            let path = format!("/file-{number}");
            client.write(&path, bytes.clone()).await.unwrap();
            contents.push((path, bytes));
        }
        Self { contents, client }
    }

    /// Reads all files as new clients with different habits do.
    async fn read_all(&self, services: &Services, round: usize) {
        let fresh = Client::builder().directory(services.directory_uri()).seed(round as u64).build().unwrap();
        for client in [&self.client, &fresh] {
            for (path, bytes) in &self.contents {
                let read =
                    client.read(path).await.unwrap_or_else(|error| panic!("round {round}: {path}: {error}"));
                assert!(read == *bytes, "round {round}: {path}: wrong bytes were served");
            }
        }
        fresh.close().await.ok();
    }
}

/// Bits that the next read of the chunk meets.
async fn while_it_runs(services: &Services, victim: usize, files: &Files, dice: &mut StdRng) -> Vec<Flip> {
    let parts = [Part::SmallData, Part::SmallTable, Part::LargeData, Part::LargeTable];
    let regions = damage::survey(&services.data(&services.files[victim].name));
    let mut flips = Vec::new();
    for number in 0..A_ROUND {
        let Some((region, at)) = damage::choose(&regions, parts[number % parts.len()], &flips, dice) else {
            continue;
        };
        flips.push(damage::flip(region, at, dice.random_range(0..8)));
    }
    // Somebody reads just then.
    let (path, bytes) = files.contents.choose(dice).unwrap();
    assert!(files.client.read(path).await.unwrap() == *bytes);
    flips
}

/// Bits that a start meets, too: what the log, the index and the server's own records say.
async fn while_it_is_down(services: &mut Services, victim: usize, dice: &mut StdRng) -> Vec<Flip> {
    let name = services.files[victim].name.clone();
    // It writes its index when it is asked to end, and only then.
    assert!(services.files[victim].terminate().await.success());
    let regions = damage::survey(&services.data(&name));
    let mut flips = Vec::new();
    let mut hit = |part: Part, flips: &mut Vec<Flip>| {
        let (region, at) = damage::choose(&regions, part, flips, dice)?;
        flips.push(damage::flip(region, at, dice.random_range(0..8)));
        flips.last().cloned()
    };
    let record = hit(Part::Record, &mut flips).expect("its own records are there");
    let index = hit(Part::Index, &mut flips);
    let journal = hit(Part::Journal, &mut flips);
    let parts = [
        Part::SmallHeader,
        Part::RecordHeader,
        Part::LargeHeader,
        Part::SmallData,
        Part::SmallTable,
        Part::LargeData,
        Part::LargeTable,
    ];
    for number in flips.len()..A_ROUND {
        hit(parts[number % parts.len()], &mut flips);
    }

    // With a bad record of its own it does not start, and says which: nothing else could tell whose disk this is.
    let said = services.files[victim].output().len();
    services.files[victim].start();
    let ended = services.files[victim].ended().await;
    let file = record.region.path.file_name().unwrap().to_string_lossy().into_owned();
    let words = services.files[victim].output()[said..].to_owned();
    assert!(
        !ended.success() && words.contains(&format!("the file '{file}'")),
        "{record:?}: {ended}: {words}"
    );
    // What an operator does: the file comes back from somewhere else.
    record.undo();
    services.files[victim].start();
    services.ready().await;
    let words = services.files[victim].output()[said..].to_owned();
    if let Some(index) = index {
        assert!(words.contains("the snapshot of the index is damaged"), "{index:?}: {words}");
    }
    if let Some(journal) = journal {
        assert!(words.contains("a copy of the directory's journal is damaged"), "{journal:?}: {words}");
    }
    flips
}

/// Reads every copy of the server, as its scrub does, until all bad ones were replaced.
async fn healed(services: &mut Services, victim: usize, flips: &[Flip]) {
    let copies = Copies::at(services.file_uri(victim));
    let data = services.data(&services.files[victim].name);
    let deadline = Instant::now() + LIMIT;
    loop {
        let census = copies.census().await.unwrap();
        assert!(census.wrong.is_empty(), "wrong bytes were given: {census:?}");
        let left = damage::not_replaced(&data, flips);
        if left.is_empty() && census.bad.is_empty() {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "not found or not healed within {LIMIT:?}: {left:?}, bad copies {:?}, of {flips:?}",
            census.bad
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
