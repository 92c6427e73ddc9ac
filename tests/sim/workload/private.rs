//! A client alone in a folder: every kind of change, one after the other, and it knows what must be there.

use super::{
    Shared,
    ledger::{Item, Ledger, names},
};
use client_lib::{Client, Error, Reason};
use parking_lot::Mutex;
use rand::{Rng as _, RngCore as _, SeedableRng as _, rngs::SmallRng, seq::IndexedRandom as _};
use std::sync::Arc;

/// Names that it works with at a time.
const NAMES_MAX: usize = 30;
/// Longest file: several chunks.
const FILE_BYTES_MAX: usize = 70_000;

enum Operation {
    Write(String, Vec<u8>),
    Append(String, Vec<u8>),
    Overwrite(String, usize, Vec<u8>),
    Truncate(String, usize),
    Rename(String, String),
    Delete(String),
    MakeFolder(String),
    Read(String),
    List,
}

/// Works until the host ends.
pub async fn run(client: Client, ledger: Arc<Mutex<Ledger>>, shared: Shared, seed: u64) {
    let mut dice = SmallRng::seed_from_u64(seed);
    loop {
        shared.may_work().await;
        let Some(operation) = choose(&mut dice, &mut ledger.lock()) else { continue };
        let _busy = shared.busy();
        match perform(&client, &ledger, &shared, operation).await {
            Ok(None) => shared.acknowledged(),
            Ok(Some(problem)) => shared.violation(problem),
            Err(error) => {
                let mut ledger = ledger.lock();
                let what = ledger.pending.as_ref().map_or("a read".to_owned(), |entry| entry.what.clone());
                shared.failed(&what, &error);
                match error.reason {
                    // Nobody else works here, and it holds no lock across two operations: only a lock of its own former
                    // self can stand in the way.
                    Reason::LockHeld => ledger.declined(),
                    _ => ledger.doubtful(&error.to_string()),
                }
                if !shared.is_honest(&error) {
                    shared.violation(format!("{}: {what}: {:?}: {error}", ledger.folder, error.reason));
                }
            }
        }
        drop(_busy);
        shared.breathe(&mut dice).await;
    }
}

fn bytes(dice: &mut SmallRng, most: usize) -> Vec<u8> {
    let length = match dice.random_range(0..10) {
        0 => 0,
        1..=6 => dice.random_range(1..6_000.min(most)),
        _ => dice.random_range(1..most),
    };
    let mut bytes = vec![0; length];
    dice.fill_bytes(&mut bytes);
    bytes
}

fn choose(dice: &mut SmallRng, ledger: &mut Ledger) -> Option<Operation> {
    let files: Vec<String> = ledger
        .known
        .iter()
        .filter(|(_, item)| matches!(item, Item::File(_)))
        .map(|(name, _)| name.clone())
        .collect();
    let any = |dice: &mut SmallRng| files.choose(dice).cloned();
    let length = |name: &str| match &ledger.known[name] {
        Item::File(bytes) => bytes.len(),
        Item::Folder => 0,
    };
    let is_full = ledger.names() >= NAMES_MAX;
    Some(match dice.random_range(0..100) {
        0..=19 if !is_full => Operation::Write(ledger.fresh_name(), bytes(dice, FILE_BYTES_MAX)),
        0..=26 => Operation::Write(any(dice)?, bytes(dice, FILE_BYTES_MAX)),
        27..=36 => Operation::Append(any(dice)?, bytes(dice, 9_000)),
        37..=46 => {
            let name = any(dice)?;
            let at = dice.random_range(0..=length(&name));
            Operation::Overwrite(name, at, bytes(dice, 5_000))
        }
        47..=49 => {
            let name = any(dice)?;
            let to = dice.random_range(0..=length(&name) + 100);
            Operation::Truncate(name, to)
        }
        50..=57 => Operation::Rename(any(dice)?, ledger.fresh_name()),
        58..=60 => {
            let (from, to) = (any(dice)?, any(dice)?);
            if from == to {
                return None;
            }
            Operation::Rename(from, to)
        }
        61..=63 if !is_full => Operation::MakeFolder(ledger.fresh_name()),
        64..=75 => {
            let all: Vec<&String> = ledger.known.keys().collect();
            Operation::Delete((*all.choose(dice)?).clone())
        }
        76..=93 => Operation::Read(any(dice)?),
        _ => Operation::List,
    })
}

/// `None` when all is well, or what cannot be true.
async fn perform(
    client: &Client,
    ledger: &Mutex<Ledger>,
    shared: &Shared,
    operation: Operation,
) -> Result<Option<String>, Error> {
    let path = |name: &str| ledger.lock().path(name);
    let content = |name: &str| match ledger.lock().known.get(name) {
        Some(Item::File(bytes)) => bytes.to_vec(),
        _ => Vec::new(),
    };
    let begin = |what: String, after: Vec<(String, Option<Item>)>| ledger.lock().begin(what, after);
    let file = |bytes: Vec<u8>| Some(Item::File(Arc::new(bytes)));
    match operation {
        Operation::Write(name, bytes) => {
            begin(format!("write {} to {name}", bytes.len()), vec![(name.clone(), file(bytes.clone()))]);
            client.write(&path(&name), bytes).await?;
        }
        Operation::Append(name, bytes) => {
            let after = [content(&name), bytes.clone()].concat();
            begin(format!("append {} to {name}", bytes.len()), vec![(name.clone(), file(after))]);
            client.append(&path(&name), bytes).await?;
        }
        Operation::Overwrite(name, at, bytes) => {
            let mut after = content(&name);
            after.resize(after.len().max(at + bytes.len()), 0);
            after[at..at + bytes.len()].copy_from_slice(&bytes);
            begin(format!("overwrite {} at {at} of {name}", bytes.len()), vec![(name.clone(), file(after))]);
            let mut handle = client.open_options().read(true).write(true).open(&path(&name)).await?;
            handle.write_at(at as u64, bytes).await?;
            handle.close().await?;
        }
        Operation::Truncate(name, to) => {
            let mut after = content(&name);
            after.resize(to, 0);
            begin(format!("truncate {name} to {to}"), vec![(name.clone(), file(after))]);
            client.truncate(&path(&name), to as u64).await?;
        }
        Operation::Rename(from, to) => {
            let moved = ledger.lock().known.get(&from).cloned();
            begin(format!("rename {from} to {to}"), vec![(from.clone(), None), (to.clone(), moved)]);
            client.rename(&path(&from), &path(&to)).await?;
        }
        Operation::Delete(name) => {
            begin(format!("delete {name}"), vec![(name.clone(), None)]);
            client.delete(&path(&name)).await?;
        }
        Operation::MakeFolder(name) => {
            begin(format!("make {name}"), vec![(name.clone(), Some(Item::Folder))]);
            client.mkdir(&path(&name)).await?;
        }
        Operation::Read(name) => {
            let wanted = content(&name);
            let found = client.read(&path(&name)).await?;
            if found[..] != wanted[..] {
                let (found, wanted) = (found.len(), wanted.len());
                return Ok(Some(format!("{} was read as {found} other bytes, not {wanted}", path(&name))));
            }
        }
        Operation::List => {
            let folder = ledger.lock().folder.clone();
            let found = names(client, &folder).await?;
            return Ok(ledger.lock().listed(&found));
        }
    }
    match shared.is_void() {
        true => ledger.lock().doubtful("the store was lost meanwhile"),
        false => ledger.lock().acknowledged(),
    }
    Ok(None)
}
