//! Several clients at a few names of one folder at once: short histories, each of which must be linearizable.
//!
//! Every slot of time has a folder of its own, so that histories stay short whoever dies in them. All are judged in the
//! end.

use super::Shared;
use crate::{
    checkers::linear::{CALLS_MAX, Call, Names, Op, Ret, Verdict, check},
    nature,
};
use client_lib::{Client, Condition, Error, Reason, WriteOptions};
use parking_lot::Mutex;
use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};
use std::{collections::BTreeMap, sync::Arc, time::Duration};

/// Names of a folder.
const NAMES: u8 = 3;
/// Operations of one client in a slot.
const OPERATIONS: u64 = 8;
/// Length of a slot.
const SLOT_MS: u64 = 1_500;

/// All histories.
#[derive(Debug, Default)]
pub struct Histories {
    slots: BTreeMap<u64, Vec<Call<Op, Ret>>>,
    /// Slots that lie, in part, before this time prove nothing: the directory's store was lost.
    void_ms: u64,
}

impl Histories {
    /// What was asked until now proves nothing any more.
    pub fn rebuilt(&mut self, now_ms: u64) {
        self.void_ms = now_ms;
    }

    fn ask(&mut self, slot: u64, op: Op) -> Option<usize> {
        let calls = self.slots.entry(slot).or_default();
        if calls.len() >= CALLS_MAX {
            return None;
        }
        calls.push(Call { asked: nature::now_ms(), answered: None, op });
        Some(calls.len() - 1)
    }

    fn call(&mut self, slot: u64, call: usize) -> Option<&mut Call<Op, Ret>> {
        self.slots.get_mut(&slot)?.get_mut(call)
    }

    /// How many histories were judged, and how many of them remain undecided.
    ///
    /// # Errors
    /// The first history that is not linearizable.
    pub fn judge(&self) -> Result<(u64, u64), String> {
        let (mut judged, mut undecided) = (0, 0);
        for (slot, calls) in &self.slots {
            if slot * SLOT_MS <= self.void_ms {
                continue;
            }
            judged += 1;
            match check(Names::default(), calls) {
                Verdict::Linearizable => {}
                Verdict::Unknown => undecided += 1,
                Verdict::Violation => {
                    return Err(format!("history {slot} is not linearizable:\n{}", words(calls)));
                }
            }
        }
        Ok((judged, undecided))
    }
}

fn words(calls: &[Call<Op, Ret>]) -> String {
    let line = |call: &Call<Op, Ret>| match &call.answered {
        Some((at, ret)) => format!("  {:>6} to {at:>6}: {:?} -> {ret:?}", call.asked, call.op),
        None => format!("  {:>6} to       : {:?}", call.asked, call.op),
    };
    calls.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// Works until the host ends. `number` tells this client's contents from those of others.
pub async fn run(client: Client, number: u64, histories: Arc<Mutex<Histories>>, shared: Shared, seed: u64) {
    let mut dice = SmallRng::seed_from_u64(seed);
    let mut value = number << 32;
    loop {
        shared.may_work().await;
        let slot = nature::now_ms() / SLOT_MS;
        let folder = format!("/names/{slot}");
        {
            let _busy = shared.busy();
            if let Err(error) = client.mkdir_all(&folder).await {
                shared.failed("make a folder of histories", &error);
                continue;
            }
        }
        for _ in 0..OPERATIONS {
            shared.may_work().await;
            if nature::now_ms() / SLOT_MS != slot {
                break;
            }
            value += 1;
            let _busy = shared.busy();
            one(&client, &folder, random(&mut dice, value), slot, &histories, &shared).await;
            drop(_busy);
            shared.breathe(&mut dice).await;
        }
        let rest = (slot + 1) * SLOT_MS - nature::now_ms().min((slot + 1) * SLOT_MS);
        tokio::time::sleep(Duration::from_millis(rest)).await;
    }
}

async fn one(
    client: &Client,
    folder: &str,
    op: Op,
    slot: u64,
    histories: &Mutex<Histories>,
    shared: &Shared,
) {
    let Some(call) = histories.lock().ask(slot, op.clone()) else { return };
    match perform(client, folder, &op).await {
        Ok(ret) => {
            shared.acknowledged();
            if let Some(call) = histories.lock().call(slot, call) {
                call.answered = Some((nature::now_ms(), ret));
            }
        }
        Err(error) => {
            shared.failed(&format!("{op:?} in {folder}"), &error);
            if error.reason == Reason::LockHeld {
                if let Some(call) = histories.lock().call(slot, call) {
                    // Declined, and so never done: as a read that nobody heard of.
                    call.op = Op::Read(0);
                }
            } else if !shared.is_honest(&error) {
                shared.violation(format!("{folder}: {op:?}: {:?}: {error}", error.reason));
            }
        }
    }
}

fn random(dice: &mut SmallRng, value: u64) -> Op {
    let path = dice.random_range(0..NAMES);
    match dice.random_range(0..10) {
        0 => Op::Create(path),
        1 => Op::WriteNew(path, value),
        2..=4 => Op::Write(path, value),
        5 | 6 => Op::Read(path),
        7 => Op::Delete(path),
        8 => Op::List,
        _ => Op::Rename(path, dice.random_range(0..NAMES)),
    }
}

/// Contents are long enough to have chunks, and say one number over and over: a mix shows.
fn content(value: u64) -> Vec<u8> {
    value.to_le_bytes().repeat(1 + (value % 3_000) as usize)
}

fn value(bytes: &[u8]) -> Result<u64, String> {
    let Some((first, _)) = bytes.split_first_chunk::<8>() else { return Ok(0) };
    let value = u64::from_le_bytes(*first);
    if bytes == content(value) {
        Ok(value)
    } else {
        Err(format!("{} bytes that begin with {value}", bytes.len()))
    }
}

async fn perform(client: &Client, folder: &str, op: &Op) -> Result<Ret, Error> {
    let path = |number: u8| format!("{folder}/{number}");
    let result = match op {
        Op::Create(at) => client.create(&path(*at)).await.map(|_| Ret::Done),
        Op::WriteNew(at, value) => {
            let options = WriteOptions::new().condition(Condition::Absent);
            client.write_with(&path(*at), content(*value), options).await.map(|_| Ret::Done)
        }
        Op::Write(at, value) => client.write(&path(*at), content(*value)).await.map(|_| Ret::Done),
        Op::Read(at) => match client.read(&path(*at)).await {
            Ok(bytes) => match value(&bytes) {
                Ok(value) => Ok(Ret::Content(Some(value))),
                Err(mixed) => Err(Error::internal(format!("{} is a mix: {mixed}", path(*at)))),
            },
            Err(error) => Err(error),
        },
        Op::Delete(at) => client.delete(&path(*at)).await.map(|()| Ret::Done),
        Op::Rename(from, to) => client.rename(&path(*from), &path(*to)).await.map(|_| Ret::Done),
        Op::List => super::ledger::names(client, folder)
            .await
            .map(|names| Ret::Names(names.iter().filter_map(|name| name.parse().ok()).collect())),
    };
    match result {
        Err(error) if matches!(error.reason, Reason::AlreadyExists) => Ok(Ret::Exists),
        Err(error) if matches!(error.reason, Reason::ConditionFailed) && matches!(op, Op::WriteNew(..)) => {
            Ok(Ret::Exists)
        }
        Err(error) if error.reason == Reason::NotFound => {
            Ok(if matches!(op, Op::Read(_)) { Ret::Content(None) } else { Ret::Missing })
        }
        other => other,
    }
}
