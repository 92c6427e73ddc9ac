//! Clients that give up: most of their calls are dropped at some await, as by a timeout or a closed tab.
//!
//! Checked: what is read is one version whole, whatever became of the writes that were given up; and in the end, while
//! these clients and their sessions still live, nothing of what they gave up holds a lock.

use super::Shared;
use client_lib::{Client, Error, LockOptions, Reason, WriteOptions};
use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};
use std::time::Duration;

/// Where all of them work.
pub const FOLDER: &str = "/impatient";
const FILES: u64 = 4;
/// Longest content, in words of 8 bytes: several chunks.
const WORDS_MAX: u64 = 7_000;
/// How long a lock may be held when all is well: the longest session of a client that died, and longer than two attempts
/// to give back what a living one gave up.
const GIVEN_BACK: Duration = Duration::from_secs(45);

fn path(number: u64) -> String {
    format!("{FOLDER}/{number}")
}

fn content(value: u64) -> Vec<u8> {
    value.to_le_bytes().repeat(1 + (value % WORDS_MAX) as usize)
}

fn check(path: &str, bytes: &[u8]) -> Option<String> {
    let value = bytes.first_chunk().map(|word| u64::from_le_bytes(*word));
    match value {
        Some(value) if bytes == content(value) => None,
        _ => Some(format!("{path} holds {} bytes that nobody wrote as a whole", bytes.len())),
    }
}

/// Works until the host ends.
pub async fn run(client: Client, shared: Shared, seed: u64) {
    let mut dice = SmallRng::seed_from_u64(seed);
    loop {
        shared.may_work().await;
        let busy = shared.busy();
        let patience = match dice.random_range(0..4) {
            0 => Duration::from_secs(60),
            1 => Duration::from_millis(dice.random_range(0..1_500)),
            _ => Duration::from_millis(dice.random_range(0..40)),
        };
        match tokio::time::timeout(patience, work(&client, &mut dice)).await {
            Ok(Ok(None)) => shared.acknowledged(),
            Ok(Ok(Some(problem))) => shared.violation(problem),
            Ok(Err(error)) => {
                shared.failed("try", &error);
                // Others remove and rename what this one works on.
                let is_usual = matches!(error.reason, Reason::NotFound | Reason::VersionGone);
                if !is_usual && !shared.is_honest(&error) {
                    shared.violation(format!("{FOLDER}: {:?}: {error}", error.reason));
                }
            }
            Err(_) => {}
        }
        drop(busy);
        shared.breathe(&mut dice).await;
    }
}

async fn work(client: &Client, dice: &mut SmallRng) -> Result<Option<String>, Error> {
    let path = path(dice.random_range(0..FILES));
    let bytes = content(dice.random());
    match dice.random_range(0..10) {
        0..3 => {
            client.write(&path, bytes).await?;
        }
        3 | 4 => {
            let wait = Duration::from_millis(dice.random_range(0..500));
            let lock = client.lock(&path, LockOptions::new().wait(wait)).await?;
            client.write_with(&path, bytes, WriteOptions::new().token(&lock)).await?;
            lock.unlock().await?;
        }
        5 | 6 => {
            let mut file = client.open_options().write(true).create(true).truncate(true).open(&path).await?;
            let (first, second) = bytes.split_at(bytes.len() / 2);
            file.write_at(0, first.to_vec()).await?;
            file.write_at(first.len() as u64, second.to_vec()).await?;
            file.close().await?;
        }
        7 | 8 => return Ok(check(&path, &client.read(&path).await?)),
        _ => match dice.random_bool(0.5) {
            true => client.delete(&path).await?,
            false => drop(client.rename(&path, &self::path(dice.random_range(0..FILES))).await?),
        },
    }
    Ok(None)
}

/// Looks at all files while nobody works.
///
/// # Errors
/// When one cannot be read or locked for another reason than that it is held.
pub async fn verify(client: &Client) -> Result<Option<String>, String> {
    for path in (0..FILES).map(path) {
        match client.read(&path).await {
            Ok(bytes) => {
                if let Some(problem) = check(&path, &bytes) {
                    return Ok(Some(problem));
                }
            }
            Err(error) if error.reason == Reason::NotFound => {}
            Err(error) => return Err(error.to_string()),
        }
        match client.lock(&path, LockOptions::new().wait(GIVEN_BACK)).await {
            Ok(lock) => drop(lock.unlock().await),
            Err(error) if error.reason == Reason::LockHeld => {
                return Ok(Some(format!("{path} is still locked by a call that was given up: {error}")));
            }
            Err(error) => return Err(error.to_string()),
        }
    }
    Ok(None)
}
