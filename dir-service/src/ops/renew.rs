//! Renewals of sessions, also of those whose home is another directory: it moves here
//! ([`cairn_core::cluster::directories`]).

use super::view::View;
use crate::{
    directory::Directory,
    membership::Membership,
    sessions::{Kept, Sessions, expired},
    store::CommitError,
};
use cairn_core::{
    cluster::directories::{self, Home},
    key,
    plan::Plan,
    record::Session,
};
use cairn_proto::{
    Error, Result,
    id::{Revision, SessionId},
};

/// Times that a renewal finds the session's record changed before it gives up.
const ATTEMPTS_MAX: u32 = 16;

/// Renews a session; answers its TTL in milliseconds. `oldest` is the oldest revision it still reads at, 0 for none,
/// `None` when the caller does not tell. Where several directories share the store, this one becomes its home.
///
/// # Errors
/// `SESSION_EXPIRED`; `UNAVAILABLE` while this directory cannot keep sessions, and another may.
pub(super) async fn renew(directory: &Directory, id: SessionId, oldest: Option<Revision>) -> Result<u64> {
    let Some(membership) = &directory.membership else { return directory.sessions.renew(id, oldest) };
    for _ in 0..ATTEMPTS_MAX {
        match directory.sessions.renew_here(id, oldest) {
            Kept::Renewed { ttl_ms, mark } => {
                // Asked behind the renewal: it holds if nobody can have taken the session over by then.
                membership.check_sure()?;
                if let Some(mark) = mark {
                    membership.cover(&directory.sessions, mark).await?;
                }
                return Ok(ttl_ms);
            }
            Kept::Ended => return Err(expired(id)),
            Kept::Elsewhere => {
                if let Some(ttl_ms) = bring_home(directory, membership, id, oldest).await? {
                    return Ok(ttl_ms);
                }
            }
        }
    }
    Err(Error::unavailable("the session's home moves all the time: try again"))
}

/// Makes this directory the home of a session. Answers its TTL, or `None` when its record changed meanwhile.
async fn bring_home(
    directory: &Directory,
    membership: &Membership,
    id: SessionId,
    oldest: Option<Revision>,
) -> Result<Option<u64>> {
    membership.check_sure()?;
    let view = View::new(directory.store.clone());
    let read = view.record::<Session>(&key::session(id)).await?;
    let me = membership.me();
    let from = directories::home(read.as_ref().map(|read| &read.record), me.id);
    let (Home::Here | Home::Elsewhere(_), Some(read)) = (from, read) else { return Err(expired(id)) };
    let ttl_ms = read.record.ttl_ms;
    let sessions = &directory.sessions;
    let mut arrival = Arrival { sessions, id, outcome: Outcome::Unknown };
    if let Some(mark) = sessions.arriving(id, ttl_ms, oldest) {
        arrival.outcome = Outcome::Away;
        membership.cover(sessions, mark).await?;
    }
    if from != Home::Here {
        let mut plan = Plan::new();
        directories::move_home(&mut plan, id, (&read.record, read.revision), me.id, me.joined);
        arrival.outcome = Outcome::Unknown;
        match directory.store.commit(plan).await {
            Ok(_) => {}
            Err(CommitError::Conflict) => {
                arrival.outcome = Outcome::Away;
                return Ok(None);
            }
            Err(CommitError::Unknown(error)) => {
                return Err(Error::unavailable(format!(
                    "it is not known whether this directory keeps the session now: {error}"
                )));
            }
            Err(CommitError::Refused(error)) => {
                arrival.outcome = Outcome::Away;
                return Err(error);
            }
        }
        tracing::debug!(session = id.0, home = me.id, "a session moved its home here");
    }
    arrival.outcome = Outcome::Here(membership.times().moved_ttl_ms(ttl_ms));
    Ok(Some(ttl_ms))
}

/// Ends the arrival of a session, also when the caller goes away in the midst of it.
struct Arrival<'a> {
    sessions: &'a Sessions,
    id: SessionId,
    outcome: Outcome,
}

enum Outcome {
    /// Its home is elsewhere.
    Away,
    /// Its home may be here.
    Unknown,
    /// Its home is here, for so long without renewal.
    Here(u64),
}

impl Drop for Arrival<'_> {
    fn drop(&mut self) {
        match self.outcome {
            Outcome::Away => self.sessions.stayed_away(self.id, true),
            Outcome::Unknown => self.sessions.stayed_away(self.id, false),
            Outcome::Here(ttl_ms) => self.sessions.arrived(self.id, ttl_ms),
        }
    }
}
