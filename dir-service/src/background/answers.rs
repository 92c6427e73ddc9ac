//! Forgets answers to requests named by a UUID once they are old enough. Answers of sessions go with these.

use crate::{directory::Directory, ops::view::View, sessions::History, store::CommitError};
use cairn_core::{
    key,
    plan::{Plan, Precondition},
};
use cairn_proto::Result;
use std::{sync::Arc, time::Duration};
use tokio_util::sync::CancellationToken;

/// Answers removed in one step.
const STEP: usize = 100;
/// Parts of an answer's life between two looks.
const PARTS: u32 = 32;

/// Runs until it is told to stop.
pub async fn run(directory: Arc<Directory>, stop: CancellationToken) {
    let life = Duration::from_millis(directory.config.timing.answer_uuid_ms);
    let mut history = History::new(life);
    loop {
        if let Err(error) = forget_old(&directory, &mut history).await {
            tracing::warn!(%error, "old answers could not be removed, trying again");
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep((life / PARTS).max(Duration::from_millis(1))) => {}
        }
    }
}

async fn forget_old(directory: &Directory, history: &mut History) -> Result<()> {
    history.note(directory.store.revision().await?);
    let Some(then) = history.then().filter(|_| directory.leads()) else { return Ok(()) };
    let mut after = None;
    loop {
        let view = View::new(directory.store.clone());
        let page = view.scan(&key::answer_uuids(), after.as_ref(), STEP).await?;
        let mut plan = Plan::new();
        for (key, versioned) in page.entries.iter().filter(|(_, versioned)| versioned.revision <= then) {
            plan.require(Precondition::Unchanged(key.clone(), Some(versioned.revision)));
            plan.delete(key.clone());
        }
        if !plan.mutations.is_empty() {
            match directory.store.commit(plan).await {
                Ok(_) | Err(CommitError::Conflict) => {}
                Err(CommitError::Unknown(error) | CommitError::Refused(error)) => return Err(error),
            }
        }
        match page.entries.last() {
            Some((last, _)) if page.more => after = Some(last.clone()),
            _ => return Ok(()),
        }
    }
}
