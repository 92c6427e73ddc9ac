//! The task that makes plans durable.

use super::{CommitError, Shared, payload, stopping};
use crate::store::{codec, reader::Checker, recent::Applied};
use bytes::Bytes;
use cairn_core::plan::{Mutation, Plan, Precondition};
use cairn_proto::{Error, Reason, Result, id::Revision};
use disk::log::Record;
use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};
use tokio::sync::{mpsc, oneshot};

/// Most plans of a batch while commits are slowed down.
const SLOWED_BATCH_PLANS: usize = 64;

/// How full the memory for recent plans is when commits begin to slow down. The applier begins at half of it.
const SLOW_FROM: f64 = 0.75;
/// How long a batch waits just before that memory is full.
const SLOW_MOST: Duration = Duration::from_millis(200);

type Answer = oneshot::Sender<Result<Revision, CommitError>>;

pub(super) enum Command {
    Commit(Queued),
    Close(oneshot::Sender<()>),
}

/// A plan that waits to be committed.
pub(super) struct Queued {
    preconditions: Vec<Precondition>,
    mutations: Vec<Mutation>,
    encoded: Bytes,
    answer: Answer,
}

impl Queued {
    /// Checks a plan and lays it out as it will be kept.
    pub(super) fn new(
        plan: Plan,
    ) -> Result<(Self, oneshot::Receiver<Result<Revision, CommitError>>), CommitError> {
        plan.check().map_err(CommitError::Refused)?;
        let encoded = codec::encode_applied(&plan);
        // Keys and values from here on share the memory of what is written and shipped.
        let mutations = codec::decode(&encoded).map_err(CommitError::Refused)?.mutations;
        let (answer, done) = oneshot::channel();
        Ok((Self { preconditions: plan.preconditions, mutations, encoded, answer }, done))
    }

    pub(super) fn bytes(&self) -> usize {
        self.encoded.len()
            + self.preconditions.iter().map(|precondition| precondition.key().len()).sum::<usize>()
    }
}

pub(super) async fn run(shared: Arc<Shared>, mut queue: mpsc::Receiver<Command>) {
    while let Some(command) = queue.recv().await {
        let delay = Duration::from_micros(shared.commit_delay_us.load(Ordering::Relaxed));
        if delay.is_zero() {
            // Those who were just answered are about to send their next: let them into this batch.
            tokio::task::yield_now().await;
        } else {
            tokio::time::sleep(delay).await;
        }
        let plans_max = if delay.is_zero() { shared.config.batch_plans_max } else { SLOWED_BATCH_PLANS };
        let mut batch = Vec::new();
        let mut bytes = 0;
        let mut next = Some(command);
        let mut close = None;
        while let Some(command) = next.take() {
            match command {
                Command::Commit(queued) => {
                    bytes += queued.bytes();
                    batch.push(queued);
                }
                Command::Close(answer) => close = Some(answer),
            }
            if close.is_none() && batch.len() < plans_max && bytes < shared.config.batch_bytes_max {
                next = queue.try_recv().ok();
            }
        }
        shared.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
        commit(&shared, batch).await;
        if let Some(answer) = close {
            queue.close();
            while let Some(command) = queue.recv().await {
                // Others who close are answered when their sender is dropped.
                if let Command::Commit(queued) = command {
                    let _ = queued.answer.send(Err(CommitError::Refused(stopping())));
                }
            }
            let _ = answer.send(());
            return;
        }
    }
}

async fn commit(shared: &Shared, batch: Vec<Queued>) {
    if batch.is_empty() {
        return;
    }
    if let Err(error) = room(shared).await {
        for queued in batch {
            let _ = queued.answer.send(Err(CommitError::Refused(error.clone())));
        }
        return;
    }
    // Answers wait for the batch, also conflicts: one that a plan of this batch caused could otherwise be told to
    // somebody who then reads and does not see that plan.
    let mut conflicts: Vec<(Answer, CommitError)> = Vec::new();
    let mut accepted: Vec<(Answer, Arc<Applied>)> = Vec::new();
    let mut checker = Checker::new(&shared.reader);
    let mut last = *shared.reader.subscribe().borrow();
    let mut bytes = 0;
    let mut records = Vec::new();
    for queued in batch {
        match checker.hold(&queued.preconditions) {
            Ok(true) => {
                last = Revision(last.0 + 1);
                let plan = Applied { revision: last, encoded: queued.encoded, mutations: queued.mutations };
                checker.accept(&plan);
                bytes += plan.encoded.len();
                records.push(Record { kind: 0, tag: last.0, payload: payload(&plan.encoded) });
                accepted.push((queued.answer, Arc::new(plan)));
            }
            Ok(false) => conflicts.push((queued.answer, CommitError::Conflict)),
            Err(error) => conflicts.push((queued.answer, CommitError::Refused(error))),
        }
    }
    let mut done = Ok(());
    if !accepted.is_empty() {
        tracing::trace!(plans = accepted.len(), bytes, revision = last.0, "commit");
        done = append(shared, records, accepted.iter().map(|(_, plan)| plan)).await;
    }
    for (answer, plan) in accepted {
        let _ = answer.send(done.clone().map(|()| plan.revision));
    }
    for (answer, error) in conflicts {
        let _ = answer.send(Err(error));
    }
}

/// Makes plans durable and shows them to readers.
async fn append(
    shared: &Shared,
    records: Vec<Record>,
    plans: impl Iterator<Item = &Arc<Applied>> + Clone,
) -> Result<(), CommitError> {
    shared.check().map_err(CommitError::Refused)?;
    match shared.log.append_batch(records).await {
        Ok(positions) => {
            let mut places = shared.places.lock();
            for (plan, position) in plans.clone().zip(positions) {
                places.note(plan.revision, position);
            }
            drop(places);
            shared.reader.publish(plans.cloned());
            Ok(())
        }
        Err(error) if shared.log.is_failed() => {
            shared.fail(&error);
            let message = format!(
                "the change may or may not be kept: writing the journal of the directory's store failed: {error}"
            );
            Err(CommitError::Unknown(Error::unavailable(message)))
        }
        // Nothing of the batch was written.
        Err(error) => Err(CommitError::Refused(refusal(error))),
    }
}

/// A full disk says what to do about it.
fn refusal(error: std::io::Error) -> Error {
    let mut error = Error::from(error);
    if error.reason == Reason::NoSpace {
        error.detail.message = format!(
            "the directory's disk has no room for changes ({}): free some space there, changes then go on",
            error.message()
        );
    }
    error
}

/// Waits while the index is too far behind for more plans to be kept in memory. Before that, commits slow down more
/// and more: many short waits are better than a long one.
async fn room(shared: &Shared) -> Result<()> {
    let config = &shared.config;
    let (plans_max, bytes_max) = (2 * (config.keep_plans + config.apply_plans), 2 * config.keep_bytes);
    let mut slowed = false;
    loop {
        let applied = shared.applied.notified();
        let (plans, bytes) = shared.reader.recent(|recent| (recent.len(), recent.bytes()));
        let fill = (plans as f64 / plans_max as f64).max(bytes as f64 / bytes_max as f64);
        if fill < SLOW_FROM || (slowed && fill < 1.0) {
            return Ok(());
        }
        if fill < 1.0 {
            slowed = true;
            tokio::time::sleep(SLOW_MOST.mul_f64((fill - SLOW_FROM) / (1.0 - SLOW_FROM))).await;
            continue;
        }
        if let Some(error) = shared.lagging.lock().clone() {
            return Err(error);
        }
        tokio::select! {
            () = applied => {}
            () = shared.stop.cancelled() => return Err(stopping()),
        }
    }
}
