//! Ends sessions that were not renewed, and closes grants that grew too old.

use crate::{
    directory::Directory,
    ops::{session, view::View},
    sessions::History,
    store::CommitError,
};
use cairn_core::{
    key,
    plan::{Key, Plan},
    record::{Grant, Record},
};
use cairn_proto::{
    Result,
    id::{GrantId, Revision, SessionId},
};
use std::{sync::Arc, time::Duration};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Open grants looked at in one step of closing old ones.
const GRANTS_STEP: usize = 48;
/// Parts of a grant's age between two looks for old ones.
const AGE_PARTS: u32 = 64;

/// Runs until it is told to stop. The directory's sessions were loaded before.
pub async fn run(directory: Arc<Directory>, stop: CancellationToken) {
    let pause = Duration::from_millis(directory.config.timing.background_interval_ms);
    let age = Duration::from_millis(directory.config.timing.grant_age_ms_max);
    let mut history = History::new(age);
    let mut look_for_old = Instant::now();
    loop {
        // What changes from here on wakes this loop up, also while it works.
        let changed = directory.sessions.changed();
        tokio::pin!(changed);
        changed.as_mut().enable();
        let all_done = end_due(&directory).await;
        if look_for_old <= Instant::now() {
            if let Err(error) = close_old_grants(&directory, &mut history).await {
                tracing::warn!(%error, "old grants could not be closed, trying again");
            }
            look_for_old = Instant::now() + age / AGE_PARTS;
        }
        let mut next = look_for_old;
        if let Some(due) = directory.sessions.next_due() {
            next = next.min(due);
        }
        if !all_done {
            // Something stands in the way: not at once again, although it is due.
            next = Instant::now() + pause;
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = changed => {}
            () = tokio::time::sleep_until(next) => {}
        }
    }
}

/// Ends what is due. Answers whether all of it is done.
async fn end_due(directory: &Directory) -> bool {
    let mut all_done = true;
    let mut note = |id: SessionId, what: &str, result: Result<()>| {
        if let Err(error) = result {
            all_done = false;
            tracing::warn!(session = id.0, %error, "{what}, trying again");
        }
    };
    for id in directory.sessions.due() {
        tracing::debug!(session = id.0, "a session ends");
        note(id, "a session could not be ended", session::expire(directory, id).await);
    }
    for id in directory.sessions.forgettable() {
        note(id, "an ended session could not be forgotten", session::forget(directory, id).await);
    }
    all_done
}

/// Closes grants that are older than they may become: what was never committed of them can be collected then.
async fn close_old_grants(directory: &Directory, history: &mut History) -> Result<()> {
    history.note(directory.store.revision().await?);
    let Some(then) = history.then().filter(|_| directory.leads()) else { return Ok(()) };
    let mut after = None;
    loop {
        let view = View::new(directory.store.clone());
        let page = view.scan(&key::all_session_grants(), after.as_ref(), GRANTS_STEP).await?;
        let mut plan = Plan::new();
        for (entry, versioned) in &page.entries {
            if versioned.revision <= then {
                close(&view, &mut plan, entry, then).await?;
            }
        }
        if !plan.mutations.is_empty() {
            match directory.store.commit(plan).await {
                // Lost against the end of a session: what is left is found at the next look.
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

async fn close(view: &View, plan: &mut Plan, entry: &Key, then: Revision) -> Result<()> {
    let Some(id) = key::last_u64(entry).map(GrantId) else { return Ok(()) };
    match view.get(&key::grant(id)).await? {
        Some(versioned) if versioned.revision <= then => {
            let grant = Grant::from_bytes(&versioned.value)?;
            cairn_core::session::close_grant(plan, id, &grant, versioned.revision);
        }
        Some(_) => {}
        None => drop(plan.delete(entry.clone())),
    }
    Ok(())
}
