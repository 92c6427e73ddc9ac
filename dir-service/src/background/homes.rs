//! Gives the sessions of dead directories another home, and forgets these directories.
//!
//! Each session has a full TTL at its new home. Before the first is moved, the new home's floor says that everything is
//! read; it does so until each was heard or has ended. Now and then all sessions are looked at for those that nobody
//! keeps: of a time when there was one directory, or whose home lost track of them.

use crate::{
    directory::Directory,
    membership::{Membership, Team},
    ops::view::{View, stored},
    store::{CommitError, KeyRange},
};
use cairn_core::{
    cluster::directories,
    key,
    plan::{Key, Plan, Precondition},
    record::Session,
};
use cairn_proto::{
    Error, Result,
    id::{Revision, SessionId},
};
use std::{sync::Arc, time::Duration};
use tokio::time::Instant;

/// Sessions read at a time.
const PAGE: usize = 256;
/// Sessions moved by one plan.
const STEP: usize = 64;
/// Notices removed by one plan.
const NOTICES_STEP: usize = 64;
/// Between two looks at all sessions for those that nobody keeps.
const LOOK_AT_ALL: Duration = Duration::from_secs(60);

/// Runs until stopped.
pub async fn run(directory: Arc<Directory>) {
    let Some(membership) = directory.membership.clone() else { return };
    let pause = Duration::from_millis(directory.config.timing.background_interval_ms.max(1));
    let mut looked_in: Option<(u64, Option<u64>)> = None;
    let mut look_at_all = Instant::now();
    loop {
        let (me, term) = (membership.me().id, membership.leads());
        let dead = match term {
            Some(_) => membership.team().directories.iter().any(|(_, seen)| seen.record.dead),
            None => false,
        };
        if dead || looked_in != Some((me, term)) || look_at_all <= Instant::now() {
            match round(&directory, &membership, term).await {
                Ok(()) => {
                    if let Some(term) = term {
                        membership.all_housed(term);
                    }
                    looked_in = Some((me, term));
                    look_at_all = Instant::now() + LOOK_AT_ALL;
                }
                Err(error) => tracing::debug!(%error, "sessions without a home are left, trying again"),
            }
        }
        tokio::time::sleep(pause).await;
    }
}

/// A session without a home that keeps it.
struct Lost {
    id: SessionId,
    session: Session,
    read: Revision,
}

/// Looks at all sessions. The one that leads takes over those whose home does not live, every directory its own that it
/// does not know of; then dead directories are forgotten.
///
/// # Errors
/// The store's; `UNAVAILABLE` when it does not lead in this term any more.
async fn round(directory: &Directory, membership: &Membership, term: Option<u64>) -> Result<()> {
    let dead: Vec<(u64, Revision)> = {
        let team = Team::read(&directory.store).await?;
        let dead = team.directories.iter().filter(|(_, seen)| seen.record.dead);
        dead.map(|(id, seen)| (*id, seen.revision)).collect()
    };
    let mut range = KeyRange::prefix(key::sessions());
    loop {
        let (_, page) = directory.store.scan(range.clone(), PAGE, None).await?;
        // Read behind the sessions: the home that one of them was given lives, or was declared dead since.
        let team = Team::read(&directory.store).await?;
        let (leads, me) = (term.is_some(), membership.me().id);
        check_lead(membership, term)?;
        let mut lost = Vec::new();
        for (key, value) in &page.entries {
            let Some(id) = key::last_u64(key).map(SessionId) else { continue };
            let session = stored::<Session>(value)?.record;
            let forgotten = session.home == me && !directory.sessions.knows(id);
            if forgotten || leads && session.home != me && !team.is_living(session.home) {
                lost.push(Lost { id, session, read: value.revision });
            }
        }
        for lost in lost.chunks(STEP) {
            take_over(directory, membership, lost).await?;
        }
        match page.entries.last() {
            Some((last, _)) if page.more => range = range.behind(last.clone()),
            _ => break,
        }
    }
    if term.is_some() {
        check_lead(membership, term)?;
        for (id, read) in dead {
            forget(directory, id, read).await?;
        }
    }
    Ok(())
}

fn check_lead(membership: &Membership, term: Option<u64>) -> Result<()> {
    match term.is_none() || membership.leads() == term {
        true => Ok(()),
        false => Err(Error::unavailable("another directory does the background work now")),
    }
}

/// Makes this directory the home of sessions.
async fn take_over(directory: &Directory, membership: &Membership, lost: &[Lost]) -> Result<()> {
    let sessions = &directory.sessions;
    let living = || lost.iter().filter(|lost| !lost.session.ended);
    // Those that have ended read nothing; one that is on its way here already may have said what it reads.
    let marks: Vec<_> = living().map(|one| sessions.arriving(one.id, one.session.ttl_ms, None)).collect();
    let covered = match marks.into_iter().flatten().min() {
        Some(mark) => membership.cover(sessions, mark).await,
        None => Ok(()),
    };
    let (taken, known) = match covered {
        Ok(()) => {
            let me = membership.me();
            let mut plan = Plan::new();
            for one in lost {
                directories::take_over(&mut plan, one.id, (&one.session, one.read), me.id, me.joined);
            }
            match directory.store.commit(plan).await {
                Ok(_) => (Ok(()), true),
                Err(CommitError::Conflict) => (Err(Error::unavailable("a session changed meanwhile")), true),
                Err(CommitError::Unknown(error)) => (Err(error), false),
                Err(CommitError::Refused(error)) => (Err(error), true),
            }
        }
        Err(error) => (Err(error), true),
    };
    for one in living() {
        match &taken {
            Ok(()) => sessions.arrived(one.id, one.session.ttl_ms),
            Err(_) => sessions.stayed_away(one.id, known),
        }
    }
    taken?;
    for one in lost.iter().filter(|lost| lost.session.ended) {
        sessions.arrived_ended(one.id, one.session.ttl_ms);
    }
    tracing::info!(sessions = lost.len(), "took over sessions without a home");
    Ok(())
}

/// Forgets a dead directory, which is no session's home any more, and what others left for it.
async fn forget(directory: &Directory, id: u64, read: Revision) -> Result<()> {
    loop {
        let view = View::new(directory.store.clone());
        let page = view.scan(&key::notices(id), None, NOTICES_STEP).await?;
        let mut plan = Plan::new();
        for (key, value) in &page.entries {
            plan.require(Precondition::Unchanged(Key::clone(key), Some(value.revision)));
            plan.delete(key.clone());
        }
        let last = page.entries.is_empty();
        if last {
            directories::forget(&mut plan, id, read);
        }
        match directory.store.commit(plan).await {
            Ok(_) | Err(CommitError::Conflict) if last => return Ok(()),
            Ok(_) | Err(CommitError::Conflict) => {}
            Err(CommitError::Unknown(error) | CommitError::Refused(error)) => return Err(error),
        }
    }
}
