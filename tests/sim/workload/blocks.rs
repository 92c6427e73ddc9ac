//! A file of several chunks in which writers replace a few blocks at a time, and readers who must never see a mix.
//!
//! The first block lists the stamp of every block; a block repeats its own number and stamp. A version is whole when all
//! agree.

use super::Shared;
use crate::nature;
use client_lib::{Client, Error, Reason};
use parking_lot::Mutex;
use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};
use std::{sync::Arc, time::Duration};

/// Blocks of the file, the list of stamps among them.
const BLOCKS: usize = 12;
/// Length of a block; no power of two, so that blocks lie across chunks.
const BLOCK_BYTES: usize = 3_000;

/// What all clients of a file were told.
#[derive(Debug, Default)]
pub struct Blocks {
    path: String,
    stamp: u64,
    /// The largest stamp of an acknowledged commit, and the version that it made.
    acknowledged: (u64, u64),
    /// When that was.
    at_ms: u64,
}

impl Blocks {
    /// Of a file that is yet to be made by [`first`].
    pub fn new(path: &str) -> Self {
        Self { path: path.to_owned(), ..Self::default() }
    }

    /// What was acknowledged since may be undone: the directory's store was lost.
    pub fn rebuilt(&mut self, certain_ms: u64) {
        if self.at_ms >= certain_ms {
            self.acknowledged = (0, 0);
        }
    }

    fn saw(&mut self, version: u64) {
        if version > self.acknowledged.1 {
            (self.acknowledged.1, self.at_ms) = (version, nature::now_ms());
        }
    }
}

fn block(number: usize, stamp: u64, stamps: &[u64]) -> Vec<u8> {
    let mut bytes: Vec<u8> = match number {
        0 => stamps.iter().flat_map(|stamp| stamp.to_le_bytes()).collect(),
        _ => {
            [number as u64, stamp].iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>().repeat(180)
        }
    };
    bytes.resize(BLOCK_BYTES, number as u8);
    bytes
}

/// The file before anybody changed it.
pub fn first() -> Vec<u8> {
    (0..BLOCKS).flat_map(|number| block(number, 0, &[0; BLOCKS])).collect()
}

/// The stamps of a whole version, or what is wrong with it.
fn whole(bytes: &[u8]) -> Result<Vec<u64>, String> {
    if bytes.len() != BLOCKS * BLOCK_BYTES {
        return Err(format!("{} bytes", bytes.len()));
    }
    let stamps: Vec<u64> = bytes[..BLOCKS * 8]
        .chunks(8)
        .map(|word| u64::from_le_bytes(word.try_into().unwrap_or_default()))
        .collect();
    for (number, found) in bytes.chunks(BLOCK_BYTES).enumerate() {
        if found != block(number, stamps[number], &stamps) {
            return Err(format!("block {number} is not of stamp {}", stamps[number]));
        }
    }
    Ok(stamps)
}

/// Works until the host ends.
pub async fn run(client: Client, blocks: Arc<Mutex<Blocks>>, shared: Shared, seed: u64) {
    let mut dice = SmallRng::seed_from_u64(seed);
    loop {
        shared.may_work().await;
        let busy = shared.busy();
        let done = match dice.random_range(0..10) {
            0..=4 => change(&client, &blocks, &shared, &mut dice).await,
            5..=8 => look(&client, &blocks, &shared).await,
            _ => look_slowly(&client, &blocks, &shared, &mut dice).await,
        };
        match done {
            Ok(()) => shared.acknowledged(),
            Err(error) => {
                shared.failed("blocks", &error);
                if !shared.is_honest(&error) && error.reason != Reason::VersionGone {
                    shared.violation(format!("{}: {:?}: {error}", blocks.lock().path, error.reason));
                }
            }
        }
        drop(busy);
        shared.breathe(&mut dice).await;
    }
}

async fn change(
    client: &Client,
    blocks: &Mutex<Blocks>,
    shared: &Shared,
    dice: &mut SmallRng,
) -> Result<(), Error> {
    let path = blocks.lock().path.clone();
    let wait = Duration::from_millis(dice.random_range(0..3_000));
    let mut file = client.open_options().read(true).write(true).wait(wait).open(&path).await?;
    let bytes = file.read_at(0, BLOCKS * BLOCK_BYTES).await?;
    let mut stamps = match whole(&bytes) {
        Ok(stamps) => stamps,
        Err(problem) => {
            shared.violation(format!("{path} is a mix for a writer: {problem}"));
            return Ok(());
        }
    };
    let stamp = {
        let mut blocks = blocks.lock();
        blocks.stamp += 1;
        blocks.stamp
    };
    stamps[0] = stamp;
    let mut changed = vec![];
    for _ in 0..dice.random_range(1..6) {
        let number = dice.random_range(1..BLOCKS);
        stamps[number] = stamp;
        changed.push(number);
    }
    changed.push(0);
    for number in changed {
        file.write_at((number * BLOCK_BYTES) as u64, block(number, stamps[number], &stamps)).await?;
        if dice.random_bool(0.2) {
            tokio::time::sleep(Duration::from_millis(dice.random_range(0..50))).await;
        }
    }
    let attributes = file.close().await?;
    if !shared.is_void() {
        blocks.lock().saw(attributes.version);
    }
    Ok(())
}

async fn look(client: &Client, blocks: &Mutex<Blocks>, shared: &Shared) -> Result<(), Error> {
    let (path, floor) = {
        let blocks = blocks.lock();
        (blocks.path.clone(), blocks.acknowledged.1)
    };
    let version = client.stat(&path).await?.version;
    if version < floor {
        shared.violation(format!("{path} is at version {version} after {floor} was acknowledged"));
    }
    if !shared.is_void() {
        blocks.lock().saw(version);
    }
    let bytes = client.read(&path).await?;
    if let Err(problem) = whole(&bytes) {
        shared.violation(format!("{path} is a mix: {problem}"));
    }
    Ok(())
}

/// A reader who takes longer than anybody waits to collect what it reads.
async fn look_slowly(
    client: &Client,
    blocks: &Mutex<Blocks>,
    shared: &Shared,
    dice: &mut SmallRng,
) -> Result<(), Error> {
    let path = blocks.lock().path.clone();
    let mut file = client.open(&path).await?;
    let half = BLOCKS * BLOCK_BYTES / 2;
    let mut bytes = file.read_at(0, half).await?.to_vec();
    tokio::time::sleep(Duration::from_millis(dice.random_range(0..8_000))).await;
    bytes.extend_from_slice(&file.read_at(half as u64, half).await?);
    if let Err(problem) = whole(&bytes) {
        shared.violation(format!("{path} is a mix for a slow reader: {problem}"));
    }
    Ok(())
}

/// Whether what is there now is a whole version.
///
/// # Errors
/// When it could not be read.
pub async fn verify(blocks: &Mutex<Blocks>, client: &Client) -> Result<Option<String>, String> {
    let path = blocks.lock().path.clone();
    let bytes = client.read(&path).await.map_err(|error| error.to_string())?;
    Ok(whole(&bytes).err().map(|problem| format!("{path} is a mix: {problem}")))
}
