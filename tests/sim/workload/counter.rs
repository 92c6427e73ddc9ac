//! Clients that count in one file under its exclusive lock, and others that look at it under a shared one.
//!
//! Checked: tokens only grow, no increment that was acknowledged is lost or made twice, nobody else is granted the lock
//! while its holder may believe in it, a token that was given back is refused.

use super::Shared;
use crate::nature;
use client_lib::{Client, Error, FencingToken, Lock, LockOptions, Reason, WriteOptions};
use parking_lot::Mutex;
use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};
use std::{collections::BTreeMap, sync::Arc, time::Duration};

/// What all clients of a counter were told.
#[derive(Debug, Default)]
pub struct Counter {
    path: String,
    /// Largest token that was granted, and its kind does not matter: all come from one sequence.
    token: u64,
    /// Acknowledged increments: the number, under which token, when.
    acknowledged: BTreeMap<u64, (u64, u64)>,
    /// When the last exclusive grant was answered.
    granted_ms: u64,
    /// Increments acknowledged.
    pub count: u64,
}

impl Counter {
    /// One in a file that does not exist yet.
    pub fn new(path: &str) -> Self {
        Self { path: path.to_owned(), ..Self::default() }
    }

    /// What was acknowledged since may be undone: the directory's store was lost.
    pub fn rebuilt(&mut self, certain_ms: u64) {
        self.acknowledged.retain(|_, (_, at)| *at < certain_ms);
    }

    /// The largest number that must be there.
    fn floor(&self) -> u64 {
        self.acknowledged.last_key_value().map_or(0, |(number, _)| *number)
    }

    fn granted(&mut self, floor: u64, token: u64) -> Option<String> {
        let problem =
            (token <= floor).then(|| format!("{}: token {token} was granted after token {floor}", self.path));
        self.token = self.token.max(token);
        problem
    }

    fn incremented(&mut self, number: u64, token: u64) -> Option<String> {
        self.count += 1;
        let before = self.acknowledged.insert(number, (token, nature::now_ms()))?;
        Some(format!("{}: {number} was written under token {} and under token {token}", self.path, before.0))
    }

    /// Whether what is there now can be.
    ///
    /// # Errors
    /// When it could not be read.
    pub async fn verify(this: &Mutex<Self>, client: &Client) -> Result<Option<String>, String> {
        let (path, floor) = {
            let this = this.lock();
            (this.path.clone(), this.floor())
        };
        let number = match client.read(&path).await {
            Ok(bytes) => parse(&bytes)?.0,
            Err(error) if error.reason == Reason::NotFound => 0,
            Err(error) => return Err(error.to_string()),
        };
        Ok((number < floor).then(|| format!("{path} is at {number}, though {floor} was acknowledged")))
    }
}

/// Tokens as one number that grows as they do: generation, then revision.
fn order(token: FencingToken) -> u64 {
    token.generation.0 << 40 | token.revision.0
}

fn content(number: u64, token: u64) -> Vec<u8> {
    [number.to_le_bytes(), token.to_le_bytes()].concat().repeat(1 + (number % 700) as usize)
}

fn parse(bytes: &[u8]) -> Result<(u64, u64), String> {
    let word = |at: usize| bytes.get(at..at + 8).and_then(|it| it.try_into().ok()).map(u64::from_le_bytes);
    let (Some(number), Some(token)) = (word(0), word(8)) else {
        return Err(format!("{} bytes", bytes.len()));
    };
    if bytes == content(number, token) {
        Ok((number, token))
    } else {
        Err(format!("a mix with {number} in it"))
    }
}

/// Works until the host ends.
pub async fn run(client: Client, counter: Arc<Mutex<Counter>>, shared: Shared, seed: u64) {
    let mut dice = SmallRng::seed_from_u64(seed);
    loop {
        shared.may_work().await;
        let busy = shared.busy();
        let done = if dice.random_bool(0.75) {
            increment(&client, &counter, &shared, &mut dice).await
        } else {
            look(&client, &counter, &shared, &mut dice).await
        };
        match done {
            Ok(()) => shared.acknowledged(),
            Err(error) => {
                shared.failed("count", &error);
                if !shared.is_honest(&error) {
                    shared.violation(format!("{}: {:?}: {error}", counter.lock().path, error.reason));
                }
            }
        }
        drop(busy);
        shared.breathe(&mut dice).await;
    }
}

async fn current(client: &Client, path: &str) -> Result<(u64, u64), Error> {
    match client.read(path).await {
        Ok(bytes) => parse(&bytes).map_err(|what| Error::internal(format!("{path} holds {what}"))),
        Err(error) if error.reason == Reason::NotFound => Ok((0, 0)),
        Err(error) => Err(error),
    }
}

async fn increment(
    client: &Client,
    counter: &Mutex<Counter>,
    shared: &Shared,
    dice: &mut SmallRng,
) -> Result<(), Error> {
    let (path, token_floor) = {
        let counter = counter.lock();
        (counter.path.clone(), counter.token)
    };
    let wait = Duration::from_millis(dice.random_range(0..3_000));
    let lock = client.lock(&path, LockOptions::new().wait(wait)).await?;
    let token = order(lock.token());
    let granted_ms = nature::now_ms();
    let problem = {
        let mut counter = counter.lock();
        counter.granted_ms = granted_ms;
        counter.granted(token_floor, token)
    };
    problem.into_iter().for_each(|it| shared.violation(it));

    let floor = counter.lock().floor();
    let (number, written_under) = current(client, &path).await?;
    if !lock.is_lost() {
        if number < floor {
            shared.violation(format!(
                "{path} is at {number}, though {floor} was acknowledged before it was asked"
            ));
        }
        if written_under > token && counter.lock().granted_ms == granted_ms {
            shared.violation(format!("{path} was written under token {written_under} while {token} held it"));
        }
    }
    // Long enough, now and then, for others to want it, and for the lease to end when its keeper is stopped.
    let pause = if dice.random_bool(0.05) { dice.random_range(0..4_000) } else { dice.random_range(0..30) };
    tokio::time::sleep(Duration::from_millis(pause)).await;

    let options = WriteOptions::new().token(&lock);
    let written = client.write_with(&path, content(number + 1, token), options).await;
    if written.is_ok() && !shared.is_void() {
        let problem = counter.lock().incremented(number + 1, token);
        problem.into_iter().for_each(|it| shared.violation(it));
    }
    exclusive(&lock, counter, shared);
    written?;
    let stale = lock.token();
    lock.unlock().await?;
    if dice.random_bool(0.1) {
        let options = WriteOptions::new().token(stale);
        if client.write_with(&path, "written under a token that was given back", options).await.is_ok() {
            shared.violation(format!("{path} was written under token {} that was given back", order(stale)));
        }
    }
    Ok(())
}

/// Nobody else was granted the lock since (an older grant may be heard of late), as long as its holder may believe in it.
fn exclusive(lock: &Lock, counter: &Mutex<Counter>, shared: &Shared) {
    let counter = counter.lock();
    if !lock.is_lost() && counter.token > order(lock.token()) {
        shared.violation(format!(
            "{}: token {} was granted at {} ms while the holder of {} still believed in it",
            counter.path,
            counter.token,
            counter.granted_ms,
            order(lock.token())
        ));
    }
}

async fn look(
    client: &Client,
    counter: &Mutex<Counter>,
    shared: &Shared,
    dice: &mut SmallRng,
) -> Result<(), Error> {
    let path = counter.lock().path.clone();
    let wait = Duration::from_millis(dice.random_range(0..2_000));
    let lock = client.lock(&path, LockOptions::new().shared().wait(wait)).await?;
    let floor = counter.lock().floor();
    let first = current(client, &path).await?;
    tokio::time::sleep(Duration::from_millis(dice.random_range(0..60))).await;
    let second = current(client, &path).await?;
    if !lock.is_lost() {
        if first != second {
            shared.violation(format!("{path} went from {first:?} to {second:?} under a shared lock"));
        }
        if first.0 < floor {
            shared.violation(format!(
                "{path} is at {}, though {floor} was acknowledged before it was asked",
                first.0
            ));
        }
    }
    lock.unlock().await
}
