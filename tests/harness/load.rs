//! Clients at work: each changes files in a folder of its own, one operation after the other, and keeps a record.

use crate::record::{Content, Piece, Record, State};
use client_lib::{Client, Error};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::{
    sync::{Mutex, MutexGuard},
    task::JoinHandle,
};

/// Names that a client works with at a time.
const NAMES_MAX: usize = 40;
/// Windows in which the rate of a load is looked at, and how many at most.
const RATE_WINDOW: Duration = Duration::from_secs(3);
const RATE_ATTEMPTS: usize = 20;

/// What a load has done so far.
#[derive(Debug, Default)]
pub struct Tally {
    /// Operations that were acknowledged.
    pub acknowledged: AtomicU64,
    /// Operations whose outcome is not known.
    pub unknown: AtomicU64,
    problems: std::sync::Mutex<Vec<String>>,
    unknown_reasons: std::sync::Mutex<Vec<String>>,
}

impl Tally {
    /// Answers that cannot be true.
    pub fn problems(&self) -> Vec<String> {
        self.problems.lock().unwrap().clone()
    }

    /// What the operations of unknown outcome said, some of them.
    pub fn unknown_reasons(&self) -> Vec<String> {
        self.unknown_reasons.lock().unwrap().clone()
    }
}

/// Clients at work. Dropping it stops them.
#[derive(Debug)]
pub struct Load {
    /// What was done.
    pub tally: Arc<Tally>,
    records: Vec<Arc<Mutex<Record>>>,
    tasks: Vec<JoinHandle<()>>,
}

impl Load {
    /// Starts `workers` clients, each with a session of its own, in folders of their own.
    pub async fn start(directory_uri: &str, workers: usize, seed: u64) -> Self {
        let tally = Arc::new(Tally::default());
        let (mut records, mut tasks) = (Vec::new(), Vec::new());
        for number in 0..workers {
            let client = Client::builder()
                .directory(directory_uri)
                .owner(format!("worker-{number}"))
                .deadline(Duration::from_secs(60))
                .build()
                .unwrap();
            let folder = format!("/worker-{number}");
            client.mkdir(&folder).await.unwrap();
            let record = Arc::new(Mutex::new(Record::new(&folder)));
            records.push(record.clone());
            let worker = Worker {
                client,
                record,
                random: StdRng::seed_from_u64(seed.wrapping_add(number as u64)),
                made: 0,
                tally: tally.clone(),
            };
            tasks.push(tokio::spawn(worker.run()));
        }
        Self { tally, records, tasks }
    }

    /// Acknowledged operations a second while nothing is broken: of the first window in which they are `enough`, or of
    /// the best. A machine that is busy with something else for a moment says nothing about a run.
    pub async fn baseline(&self, enough: f64) -> f64 {
        let mut best: f64 = 0.0;
        for _ in 0..RATE_ATTEMPTS {
            let (before, began) = (self.acknowledged(), Instant::now());
            tokio::time::sleep(RATE_WINDOW).await;
            best = best.max((self.acknowledged() - before) as f64 / began.elapsed().as_secs_f64());
            if best >= enough {
                break;
            }
        }
        best
    }

    /// Acknowledged operations.
    pub fn acknowledged(&self) -> u64 {
        self.tally.acknowledged.load(Ordering::Relaxed)
    }

    /// Waits until so many more operations were acknowledged.
    ///
    /// # Panics
    /// After `limit`.
    pub async fn progress(&self, operations: u64, limit: Duration) {
        let goal = self.acknowledged() + operations;
        let deadline = Instant::now() + limit;
        while self.acknowledged() < goal {
            assert!(
                Instant::now() < deadline,
                "{} of {operations} operations missing after {limit:?}; {:?}",
                goal - self.acknowledged(),
                self.tally.unknown_reasons()
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The record of one client, which stops between two operations for as long as this is held.
    pub async fn record(&self, worker: usize) -> MutexGuard<'_, Record> {
        self.records[worker].lock().await
    }

    /// Stops the clients between two operations for as long as the answer is held.
    pub async fn pause(&self) -> Vec<MutexGuard<'_, Record>> {
        futures::future::join_all(self.records.iter().map(|record| record.lock())).await
    }

    /// Ends the clients, each after the operation that it has under way.
    pub async fn stop(&mut self) {
        let tasks: Vec<JoinHandle<()>> = self.tasks.drain(..).collect();
        let held = self.pause().await;
        for task in tasks {
            task.abort();
        }
        drop(held);
    }

    /// Stops the clients between two operations, compares everything with what they were told, and lets them go on.
    /// Answers all that is wrong, and how many names were compared.
    pub async fn verify(&self, directory_uri: &str) -> (Vec<String>, usize) {
        let records = self.pause().await;
        // A client of its own, with nothing remembered.
        let client = Client::connect(&[directory_uri]).await.unwrap();
        let names = records.iter().map(|record| record.known.len() + record.doubts.len()).sum();
        let found = futures::future::join_all(records.into_iter().map(|mut record| {
            let client = client.clone();
            async move { record.verify(&client).await }
        }))
        .await;
        let mut problems: Vec<String> = found.into_iter().flatten().collect();
        problems.extend(self.tally.problems());
        (problems, names)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

struct Worker {
    client: Client,
    record: Arc<Mutex<Record>>,
    random: StdRng,
    made: u64,
    tally: Arc<Tally>,
}

enum Operation {
    Write { name: String, piece: Piece },
    Append { name: String, piece: Piece },
    Rename { from: String, to: String },
    Delete { name: String },
    MakeFolder { name: String },
}

impl Worker {
    async fn run(mut self) {
        loop {
            // Held during the operation, so that whoever has it sees no operation under way.
            let record = self.record.clone();
            let mut record = record.lock().await;
            let Some(operation) = self.choose(&record) else { continue };
            let (what, after) = operation.describe(&record);
            match self.apply(&record, &operation).await {
                Ok(()) => {
                    record.done(after);
                    self.tally.acknowledged.fetch_add(1, Ordering::Relaxed);
                }
                Err(error) => {
                    self.tally.unknown.fetch_add(1, Ordering::Relaxed);
                    let mut reasons = self.tally.unknown_reasons.lock().unwrap();
                    if reasons.len() < 20 {
                        reasons.push(format!("{what}: {:?}: {error}", error.reason));
                    }
                    drop(reasons);
                    if let Err(problem) = record.failed(&what, after, &error) {
                        self.tally.problems.lock().unwrap().push(problem);
                    }
                }
            }
            drop(record);
            // So that one who waits for the record gets it.
            tokio::task::yield_now().await;
        }
    }

    fn choose(&mut self, record: &Record) -> Option<Operation> {
        let files: Vec<&String> = record
            .known
            .iter()
            .filter(|(_, it)| matches!(it, Content::File(_)))
            .map(|(name, _)| name)
            .collect();
        let any = |random: &mut StdRng| files.choose(random).map(|name| (*name).clone());
        let full = record.known.len() + record.doubts.len() >= NAMES_MAX;
        let dice = self.random.random_range(0..100);
        Some(match dice {
            0..=34 if !full => Operation::Write { name: self.name("file"), piece: self.piece() },
            0..=44 => Operation::Write { name: any(&mut self.random)?, piece: self.piece() },
            45..=59 => {
                let piece = Piece { seed: self.random.random(), length: self.random.random_range(1..10_000) };
                Operation::Append { name: any(&mut self.random)?, piece }
            }
            60..=69 => Operation::Rename { from: any(&mut self.random)?, to: self.name("moved") },
            70..=74 => {
                let (from, to) = (any(&mut self.random)?, any(&mut self.random)?);
                if from == to {
                    return None;
                }
                Operation::Rename { from, to }
            }
            75..=79 if !full => Operation::MakeFolder { name: self.name("folder") },
            _ => {
                let names: Vec<&String> = record.known.keys().collect();
                Operation::Delete { name: (*names.choose(&mut self.random)?).clone() }
            }
        })
    }

    /// Names are never used twice, so that an operation that comes late can't hide behind a later one.
    fn name(&mut self, kind: &str) -> String {
        self.made += 1;
        format!("{kind} {}", self.made)
    }

    /// Mostly small, some empty, now and then of several chunks.
    fn piece(&mut self) -> Piece {
        let length = match self.random.random_range(0..1_000) {
            0..=29 => 0,
            30..=499 => self.random.random_range(1..4_097),
            500..=959 => self.random.random_range(4_097..65_537),
            960..=995 => self.random.random_range(65_537..1_048_577),
            _ => self.random.random_range(8 << 20..18 << 20),
        };
        Piece { seed: self.random.random(), length }
    }

    async fn apply(&self, record: &Record, operation: &Operation) -> Result<(), Error> {
        let client = &self.client;
        match operation {
            Operation::Write { name, piece } => {
                client.write(&record.path(name), piece.bytes()).await.map(|_| ())
            }
            Operation::Append { name, piece } => {
                client.append(&record.path(name), piece.bytes()).await.map(|_| ())
            }
            Operation::Rename { from, to } => {
                client.rename(&record.path(from), &record.path(to)).await.map(|_| ())
            }
            Operation::Delete { name } => client.delete(&record.path(name)).await,
            Operation::MakeFolder { name } => client.mkdir(&record.path(name)).await.map(|_| ()),
        }
    }
}

impl Operation {
    /// In words, and what it leaves.
    fn describe(&self, record: &Record) -> (String, State) {
        match self {
            Self::Write { name, piece } => (
                format!("write {} bytes to {}", piece.length, record.path(name)),
                State::from([(name.clone(), Some(Content::File(vec![*piece])))]),
            ),
            Self::Append { name, piece } => {
                let mut pieces = match record.at(name) {
                    Some(Content::File(pieces)) => pieces,
                    _ => Vec::new(),
                };
                pieces.push(*piece);
                (
                    format!("append {} bytes to {}", piece.length, record.path(name)),
                    State::from([(name.clone(), Some(Content::File(pieces)))]),
                )
            }
            Self::Rename { from, to } => (
                format!("rename {} to {to}", record.path(from)),
                State::from([(from.clone(), None), (to.clone(), record.at(from))]),
            ),
            Self::Delete { name } => {
                (format!("delete {}", record.path(name)), State::from([(name.clone(), None)]))
            }
            Self::MakeFolder { name } => {
                (format!("make {}", record.path(name)), State::from([(name.clone(), Some(Content::Folder))]))
            }
        }
    }
}
