//! Several clients append to one file, without locks: each acknowledged record is there once, in an order that fits.

use super::Shared;
use crate::nature;
use client_lib::{Client, Reason};
use parking_lot::Mutex;
use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};
use std::{collections::BTreeMap, sync::Arc};

/// Bytes of a record.
const RECORD_BYTES: usize = 24;
/// Records of one file; then the next one is begun.
const RECORDS_MAX: u64 = 150;

/// What all clients of a series of files were told.
#[derive(Debug, Default)]
pub struct Appends {
    folder: String,
    made: u64,
    /// All records ever sent, by their number.
    records: BTreeMap<u64, Record>,
}

#[derive(Clone, Debug)]
struct Record {
    file: u64,
    asked_ms: u64,
    /// When it was acknowledged; nothing while it is not.
    answered_ms: Option<u64>,
}

impl Appends {
    /// Of a folder that is made already.
    pub fn new(folder: &str) -> Self {
        Self { folder: folder.to_owned(), ..Self::default() }
    }

    /// What was acknowledged since may be undone: the directory's store was lost.
    pub fn rebuilt(&mut self, certain_ms: u64) {
        for record in self.records.values_mut() {
            record.answered_ms = record.answered_ms.filter(|at| *at < certain_ms);
        }
    }

    fn begin(&mut self) -> (u64, u64) {
        self.made += 1;
        let file = self.made / RECORDS_MAX;
        self.records.insert(self.made, Record { file, asked_ms: nature::now_ms(), answered_ms: None });
        (self.made, file)
    }

    fn path(&self, file: u64) -> String {
        format!("{}/log-{file}", self.folder)
    }

    /// What cannot be true of a file's bytes, read at or after `asked_ms`.
    fn judge(&self, file: u64, bytes: &[u8], asked_ms: u64) -> Option<String> {
        let path = self.path(file);
        if !bytes.len().is_multiple_of(RECORD_BYTES) {
            return Some(format!("{path} has {} bytes, no whole records", bytes.len()));
        }
        let mut at = BTreeMap::new();
        let mut last_asked = 0;
        for (position, chunk) in bytes.chunks(RECORD_BYTES).enumerate() {
            let word = u64::from_le_bytes(chunk[..8].try_into().unwrap_or_default());
            let Some(record) =
                self.records.get(&word).filter(|it| it.file == file && chunk == bytes_of(word))
            else {
                return Some(format!("{path} has a record that nobody sent, at {position}"));
            };
            if let Some(first) = at.insert(word, position) {
                return Some(format!("{path} has record {word} twice, at {first} and {position}"));
            }
            // Whatever was answered before one asked for a record stands before it.
            if record.answered_ms.is_some_and(|answered| answered < last_asked) {
                return Some(format!(
                    "{path}: record {word} stands behind one that was asked for after it was there"
                ));
            }
            last_asked = last_asked.max(record.asked_ms);
        }
        let missing = self.records.iter().find(|(number, record)| {
            record.file == file
                && record.answered_ms.is_some_and(|at| at < asked_ms)
                && !at.contains_key(number)
        });
        missing.map(|(number, _)| format!("{path} lacks record {number}, which was acknowledged"))
    }

    /// Whether all files can be.
    ///
    /// # Errors
    /// When one could not be read.
    pub async fn verify(this: &Mutex<Self>, client: &Client) -> Result<Option<String>, String> {
        let last = this.lock().made / RECORDS_MAX;
        for file in 0..=last {
            let path = this.lock().path(file);
            let bytes = match client.read(&path).await {
                Ok(bytes) => bytes.to_vec(),
                Err(error) if error.reason == Reason::NotFound => Vec::new(),
                Err(error) => return Err(error.to_string()),
            };
            if let Some(problem) = this.lock().judge(file, &bytes, u64::MAX) {
                return Ok(Some(problem));
            }
        }
        Ok(None)
    }
}

fn bytes_of(number: u64) -> Vec<u8> {
    [number, !number, number.wrapping_mul(0x9e37_79b9_7f4a_7c15)]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect()
}

/// Works until the host ends.
pub async fn run(client: Client, appends: Arc<Mutex<Appends>>, shared: Shared, seed: u64) {
    let mut dice = SmallRng::seed_from_u64(seed);
    loop {
        shared.may_work().await;
        let busy = shared.busy();
        let done = if dice.random_bool(0.8) {
            let (number, file) = appends.lock().begin();
            let path = appends.lock().path(file);
            let done = client.append(&path, bytes_of(number)).await;
            if done.is_ok()
                && !shared.is_void()
                && let Some(record) = appends.lock().records.get_mut(&number)
            {
                record.answered_ms = Some(nature::now_ms());
            }
            done.map(|_| ())
        } else {
            let file = appends.lock().made / RECORDS_MAX;
            let path = appends.lock().path(file);
            let asked_ms = nature::now_ms();
            match client.read(&path).await {
                Ok(bytes) => {
                    let problem = appends.lock().judge(file, &bytes, asked_ms);
                    problem.into_iter().for_each(|it| shared.violation(it));
                    Ok(())
                }
                Err(error) if error.reason == Reason::NotFound => {
                    let problem = appends.lock().judge(file, &[], asked_ms);
                    problem.into_iter().for_each(|it| shared.violation(it));
                    Ok(())
                }
                Err(error) => Err(error),
            }
        };
        match done {
            Ok(()) => shared.acknowledged(),
            Err(error) => {
                shared.failed("append", &error);
                if !shared.is_honest(&error) {
                    shared.violation(format!("append: {:?}: {error}", error.reason));
                }
            }
        }
        drop(busy);
        shared.breathe(&mut dice).await;
    }
}
