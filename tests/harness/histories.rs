//! Histories of concurrent clients on few paths, held against a reference that does one thing at a time.
//!
//! An operation without a known outcome may have been done or not: it stays in flight for the rest of the history, and
//! what its client does next is another thread's.

use crate::record::leaves_open;
use client_lib::{Client, Condition, Error, Reason, WriteOptions};
use parking_lot::Mutex;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use stateright::semantics::{ConsistencyTester as _, LinearizabilityTester, SequentialSpec};
use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

/// Paths of one history.
const PATHS: u8 = 2;
/// Clients of one history.
pub const CLIENTS: u64 = 4;
/// Operations of each of them.
pub const OPERATIONS: u64 = 10;
/// With more outcomes unknown, checking a history takes too long.
const UNKNOWN_MAX: u64 = 6;

#[derive(Clone, Debug, PartialEq)]
enum Op {
    Create(u8),
    WriteNew(u8, u64),
    Write(u8, u64),
    Read(u8),
    Delete(u8),
    Rename(u8, u8),
}

#[derive(Clone, Debug, PartialEq)]
enum Ret {
    Done,
    Content(Option<u64>),
    Missing,
    Exists,
}

/// The reference: names lead to contents; 0 is an empty file.
#[derive(Clone, Debug, Default, PartialEq)]
struct Names(BTreeMap<u8, u64>);

impl SequentialSpec for Names {
    type Op = Op;
    type Ret = Ret;

    fn invoke(&mut self, op: &Op) -> Ret {
        match *op {
            Op::Create(path) if self.0.contains_key(&path) => Ret::Exists,
            Op::Create(path) => {
                self.0.insert(path, 0);
                Ret::Done
            }
            Op::WriteNew(path, _) if self.0.contains_key(&path) => Ret::Exists,
            Op::WriteNew(path, value) | Op::Write(path, value) => {
                self.0.insert(path, value);
                Ret::Done
            }
            Op::Read(path) => Ret::Content(self.0.get(&path).copied()),
            Op::Delete(path) => match self.0.remove(&path) {
                Some(_) => Ret::Done,
                None => Ret::Missing,
            },
            Op::Rename(from, to) => match self.0.get(&from).copied() {
                None => Ret::Missing,
                Some(content) => {
                    if from != to {
                        self.0.remove(&from);
                        self.0.insert(to, content);
                    }
                    Ret::Done
                }
            },
        }
    }
}

async fn perform(client: &Client, folder: &str, op: &Op) -> Result<Ret, Error> {
    let path = |number: u8| format!("{folder}/{number}");
    let result = match op {
        Op::Create(at) => client.create(&path(*at)).await.map(|_| Ret::Done),
        Op::WriteNew(at, value) => {
            let options = WriteOptions::new().condition(Condition::Absent);
            client.write_with(&path(*at), value.to_le_bytes().to_vec(), options).await.map(|_| Ret::Done)
        }
        Op::Write(at, value) => {
            client.write(&path(*at), value.to_le_bytes().to_vec()).await.map(|_| Ret::Done)
        }
        Op::Read(at) => client.read(&path(*at)).await.map(|bytes| {
            let value = if bytes.is_empty() { 0 } else { u64::from_le_bytes(bytes[..].try_into().unwrap()) };
            Ret::Content(Some(value))
        }),
        Op::Delete(at) => client.delete(&path(*at)).await.map(|()| Ret::Done),
        Op::Rename(from, to) => client.rename(&path(*from), &path(*to)).await.map(|_| Ret::Done),
    };
    match result {
        Err(error) if error.reason == Reason::AlreadyExists => Ok(Ret::Exists),
        Err(error) if error.reason == Reason::NotFound => {
            Ok(if matches!(op, Op::Read(_)) { Ret::Content(None) } else { Ret::Missing })
        }
        other => other,
    }
}

fn random_op(dice: &mut StdRng, value: u64) -> Op {
    let path = dice.random_range(0..PATHS);
    match dice.random_range(0..8) {
        0 => Op::Create(path),
        1 => Op::WriteNew(path, value),
        2 | 3 => Op::Write(path, value),
        4 | 5 => Op::Read(path),
        6 => Op::Delete(path),
        _ => Op::Rename(path, dice.random_range(0..PATHS)),
    }
}

/// What histories showed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Histories that are linearizable.
    pub linearizable: u64,
    /// Histories with too many unknown outcomes to check.
    pub unchecked: u64,
    /// Operations with a known outcome.
    pub known: u64,
    /// Operations without one.
    pub unknown: u64,
}

impl Outcome {
    /// Adds another's numbers.
    pub fn add(&mut self, other: &Self) {
        self.linearizable += other.linearizable;
        self.unchecked += other.unchecked;
        self.known += other.known;
        self.unknown += other.unknown;
    }
}

/// Makes one history in a new folder, by clients of [`CLIENTS`] sessions, and checks it.
///
/// # Errors
/// The whole history, when it is not linearizable.
pub async fn history(clients: &[Client], folder: &str, seed: u64) -> Result<Outcome, String> {
    // Made once more when it is not known whether it was.
    let made = loop {
        match clients[0].mkdir_all(folder).await {
            Err(error) if error.reason == Reason::AlreadyExists => break Ok(()),
            Err(error) if leaves_open(error.reason) => {}
            other => break other.map(drop),
        }
    };
    made.map_err(|error| format!("{folder}: {error}"))?;
    let tester = Arc::new(Mutex::new(LinearizabilityTester::new(Names::default())));
    let threads = Arc::new(AtomicU64::new(0));
    let mut tasks = tokio::task::JoinSet::new();
    for (number, client) in clients.iter().enumerate() {
        let (client, tester, threads) = (client.clone(), tester.clone(), threads.clone());
        let (number, folder) = (number as u64, folder.to_owned());
        tasks.spawn(async move {
            let mut dice = StdRng::seed_from_u64(seed ^ (number << 56));
            let mut thread = threads.fetch_add(1, Ordering::Relaxed);
            let mut unknown = 0;
            for step in 0..OPERATIONS {
                let op = random_op(&mut dice, 1 + number * 1_000 + step);
                tester.lock().on_invoke(thread, op.clone()).unwrap();
                match perform(&client, &folder, &op).await {
                    Ok(ret) => {
                        tester.lock().on_return(thread, ret).unwrap();
                    }
                    Err(_) => {
                        unknown += 1;
                        thread = threads.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }
            unknown
        });
    }
    let unknown: u64 = tasks.join_all().await.into_iter().sum();
    let known = clients.len() as u64 * OPERATIONS - unknown;
    if unknown > UNKNOWN_MAX {
        return Ok(Outcome { unchecked: 1, known, unknown, ..Outcome::default() });
    }
    let tester = tester.lock().clone();
    let folder = folder.to_owned();
    let checked = tokio::task::spawn_blocking(move || {
        if tester.is_consistent() {
            Ok(())
        } else {
            Err(format!("{folder} is not linearizable: {tester:#?}"))
        }
    });
    checked.await.map_err(|error| error.to_string())??;
    Ok(Outcome { linearizable: 1, known, unknown, ..Outcome::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_read_and_a_lost_write_are_not_linearizable() {
        let of = |steps: &[(u64, Op, Ret)]| {
            let mut tester = LinearizabilityTester::new(Names::default());
            for (thread, op, ret) in steps {
                tester.on_invret(*thread, op.clone(), ret.clone()).unwrap();
            }
            tester.is_consistent()
        };
        let write = |value| (0, Op::Write(0, value), Ret::Done);
        let read = |content| (1, Op::Read(0), Ret::Content(content));
        assert!(of(&[write(1), read(Some(1)), write(2), read(Some(2))]));
        assert!(!of(&[write(1), write(2), read(Some(1))]), "a stale read");
        assert!(!of(&[write(1), read(None)]), "a lost write");
        assert!(!of(&[write(1), (0, Op::Delete(0), Ret::Done), read(Some(1))]), "what was deleted came back");
        assert!(
            !of(&[write(1), (0, Op::Rename(0, 1), Ret::Done), read(Some(1))]),
            "what was moved came back"
        );
    }
}
