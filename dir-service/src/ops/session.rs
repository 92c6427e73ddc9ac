//! `SessionService`: open, keep alive, close; and the steps in which a session ends.

use super::{
    renew::renew,
    transact::{Operation, Response, transact},
    view::{Stored, View, stored},
};
use crate::{
    directory::Directory,
    sessions::{Possession, expired},
    store::CommitError,
};
use async_trait::async_trait;
use cairn_core::{
    cluster::directories,
    key,
    lock::Place,
    plan::{Key, PLAN_MUTATIONS_MAX, Plan},
    record::{Grant, Lock, Record, Session},
    session,
};
use cairn_proto::{
    Error, Reason, Result, convert,
    id::{GrantId, Revision, SessionId},
    v1,
};

/// Locks that one step of a session's end looks at: each takes up to three mutations.
const LOCKS_STEP: usize = 32;
/// Bytes of a step's plan beyond which no further lock is added; a lock with all its holders stays below half a MiB.
const STEP_BYTES: usize = 256 * 1024;
/// Grants that one step closes.
const GRANTS_STEP: usize = 48;
/// Answers that one step removes.
const ANSWERS_STEP: usize = 100;
/// Conflicts of a step before it is left to the next round.
const ATTEMPTS_MAX: u32 = 64;

impl Response for v1::OpenResponse {
    fn set_revision(&mut self, _revision: Revision) {}
}

struct OpenSession<'a> {
    directory: &'a Directory,
    id: SessionId,
    session: Session,
}

/// Opens a session.
///
/// # Errors
/// As the contract says.
pub async fn open(directory: &Directory, request: v1::OpenRequest) -> Result<v1::OpenResponse> {
    if request.request_id.as_ref().is_some_and(|id| id.session_id != 0) {
        return Err(Error::invalid("the request id of Open is a uuid: there is no session yet"));
    }
    let ttl_ms = session::ttl_ms(request.ttl_ms, directory.config.timing.session_ttl_ms)?;
    let owner = convert::owner(&request.owner)?.to_owned();
    directory.sessions.admit()?;
    directory.cluster.pace().await;
    let id = SessionId(directory.ids.next().await?);
    let operation = OpenSession { directory, id, session: Session { ttl_ms, owner, ..Session::default() } };
    let opening = transact(&directory.store, request.request_id.as_ref(), &request, &operation);
    let opened = opened_by(directory, id, ttl_ms, opening, |response| response.session_id).await?;
    // Who they are now, also in an answer that is repeated.
    Ok(v1::OpenResponse { directories: directory.cluster.directories(), ..opened })
}

#[async_trait]
impl Operation for OpenSession<'_> {
    type Response = v1::OpenResponse;

    async fn decide(&self, _view: &View) -> Result<(Plan, Self::Response)> {
        let mut plan = Plan::new();
        open_here(self.directory, &mut plan, self.id, &self.session);
        let response = v1::OpenResponse {
            session_id: self.id.0,
            ttl_ms: self.session.ttl_ms,
            generation: self.directory.generation.0,
            cluster_id: self.directory.cluster_id.clone(),
            directories: Vec::new(),
        };
        Ok((plan, response))
    }
}

/// Opens a session in a plan, whose home is this directory.
pub(super) fn open_here(directory: &Directory, plan: &mut Plan, id: SessionId, session: &Session) {
    match &directory.membership {
        Some(membership) => {
            let home = membership.require(plan).id;
            session::open(plan, id, &Session { home, ..session.clone() });
        }
        None => session::open(plan, id, session),
    }
}

/// Carries out what opens session `id`, whose life begins before its record is written: when the caller goes away in the
/// midst of it, the record may still be written, and then ends with its TTL like any other.
///
/// `session_of` tells the session of an answer, which is another one when the answer is a repeated one.
///
/// # Errors
/// As the work, and as the store.
pub(super) async fn opened_by<R>(
    directory: &Directory,
    id: SessionId,
    ttl_ms: u64,
    work: impl Future<Output = Result<R>>,
    session_of: impl Fn(&R) -> u64,
) -> Result<R> {
    directory.sessions.opened(id, ttl_ms);
    match work.await {
        Ok(response) => {
            let opened = SessionId(session_of(&response));
            if opened != id {
                directory.sessions.withdraw(id);
            }
            note_opened(directory, opened).await?;
            Ok(response)
        }
        Err(error) => {
            // Where it cannot be known whether a record was or will be written, the TTL decides.
            let view = View::new(directory.store.clone());
            if error.reason != Reason::OutcomeUnknown && matches!(view.get(&key::session(id)).await, Ok(None))
            {
                directory.sessions.withdraw(id);
            }
            Err(error)
        }
    }
}

/// Begins the life of a session whose record was written; one that has ended since (the answer was a repeated one)
/// stays ended.
///
/// # Errors
/// As the store.
async fn note_opened(directory: &Directory, id: SessionId) -> Result<()> {
    let known = match &directory.membership {
        Some(_) => directory.sessions.knows(id),
        None => directory.sessions.check(id).is_ok(),
    };
    if known {
        return Ok(());
    }
    let view = View::new(directory.store.clone());
    if let Some(stored) = view.record::<Session>(&key::session(id)).await?
        && !stored.record.ended
        && is_here(directory, &stored.record)
    {
        directory.sessions.opened(id, stored.record.ttl_ms);
    }
    Ok(())
}

/// Renews a session by one message of its stream.
///
/// # Errors
/// `SESSION_EXPIRED`.
pub async fn keep_alive(
    directory: &Directory,
    request: v1::KeepAliveRequest,
) -> Result<v1::KeepAliveResponse> {
    let id = SessionId(request.session_id);
    let ttl_ms = renew(directory, id, Some(Revision(request.oldest_revision))).await?;
    let revision = directory.store.revision().await?;
    Ok(v1::KeepAliveResponse { session_id: id.0, ttl_ms, revision: revision.0 })
}

/// Whether this directory is a session's home.
fn is_here(directory: &Directory, session: &Session) -> bool {
    directory.membership.as_ref().is_none_or(|membership| session.home == membership.me().id)
}

/// Ends a session with its locks and grants. One that has ended already is no error.
///
/// # Errors
/// As the store; the end goes on in the background then.
pub async fn close(directory: &Directory, request: v1::CloseRequest) -> Result<v1::CloseResponse> {
    if request.session_id == 0 {
        return Err(Error::invalid("give the session to close"));
    }
    let id = SessionId(request.session_id);
    directory.sessions.begin_end(id);
    end(directory, id).await?;
    Ok(v1::CloseResponse {})
}

/// The record of a session that lives.
///
/// # Errors
/// `SESSION_EXPIRED`.
pub(super) async fn living(directory: &Directory, view: &View, id: SessionId) -> Result<Stored<Session>> {
    directory.sessions.check(id)?;
    match view.record::<Session>(&key::session(id)).await? {
        Some(stored) if !stored.record.ended => Ok(stored),
        _ => Err(expired(id)),
    }
}

/// Ends, in a plan, a session that was opened by `Lock` and goes with its lock. Answers whether it is such a one.
///
/// # Errors
/// As the store.
pub(super) async fn end_with_lock(
    directory: &Directory,
    view: &View,
    plan: &mut Plan,
    id: SessionId,
) -> Result<bool> {
    let Some(stored) = view.record::<Session>(&key::session(id)).await? else { return Ok(false) };
    if !stored.record.of_lock || stored.record.ended {
        return Ok(false);
    }
    session::end(plan, id, &stored.record, stored.revision);
    tell_home(directory, plan, id, &stored.record);
    Ok(true)
}

/// Tells a session's home, in a plan, that it ends.
fn tell_home(directory: &Directory, plan: &mut Plan, id: SessionId, session: &Session) {
    if let Some(membership) = &directory.membership {
        directories::tell_home(plan, id, session.home, membership.me().id);
    }
}

/// Notes that a session takes one more lock or grant.
///
/// # Errors
/// `LIMIT_EXCEEDED` when it has as many as it may have.
pub(super) async fn admit_one(directory: &Directory, id: SessionId, what: Possession) -> Result<()> {
    if directory.sessions.take(id, what) {
        return Ok(());
    }
    let view = View::new(directory.store.clone());
    let (prefix, name) = match what {
        Possession::Lock => (key::session_locks(id), "locks"),
        Possession::Grant => (key::session_grants(id), "open grants"),
    };
    let (mut number, mut after) = (0, None);
    loop {
        let page = view.scan(&prefix, after.as_ref(), what.most()).await?;
        number += page.entries.len();
        match page.entries.last() {
            Some((last, _)) if page.more => after = Some(last.clone()),
            _ => break,
        }
    }
    directory.sessions.counted(id, what, number);
    let counted_elsewhere = directory.membership.is_some() && number < what.most();
    if directory.sessions.take(id, what) || counted_elsewhere {
        return Ok(());
    }
    Err(Error::limit(format!("session {id} has {number} {name}, which is the most: give some back")))
}

/// Ends a session as far as it holds something: its mark, its locks, its grants. Resumable at any point; what is
/// done already is skipped. Its answers are kept.
///
/// # Errors
/// As the store.
pub async fn end(directory: &Directory, id: SessionId) -> Result<()> {
    steps(directory, |view| mark_step(directory, view, id)).await?;
    steps(directory, |view| locks_step(view, id)).await?;
    steps(directory, |view| grants_step(view, id)).await?;
    directory.sessions.freed(id);
    Ok(())
}

/// Ends a session whose time is over. One that was never written (see `opened_by`) is written as ended: behind that, the
/// plan that was to open it comes too late. One whose home is elsewhere is left alone.
///
/// # Errors
/// As the store.
pub async fn expire(directory: &Directory, id: SessionId) -> Result<()> {
    steps(directory, |view| bar_step(directory, view, id)).await?;
    if directory.membership.is_some() {
        steps(directory, |view| expire_step(directory, view, id)).await?;
        let view = View::new(directory.store.clone());
        let read = view.record::<Session>(&key::session(id)).await?;
        if read.is_none_or(|read| !is_here(directory, &read.record)) {
            directory.sessions.left(id);
            return Ok(());
        }
    }
    end(directory, id).await
}

/// Marks a session as ended if this is its home.
async fn expire_step(directory: &Directory, view: View, id: SessionId) -> Result<Option<Plan>> {
    let Some(read) = view.record::<Session>(&key::session(id)).await? else { return Ok(None) };
    if read.record.ended || !is_here(directory, &read.record) {
        return Ok(None);
    }
    let mut plan = Plan::new();
    session::end(&mut plan, id, &read.record, read.revision);
    Ok(Some(plan))
}

/// Removes what is left of a session that has ended and whose answers are no longer kept.
///
/// # Errors
/// As the store.
pub async fn forget(directory: &Directory, id: SessionId) -> Result<()> {
    steps(directory, |view| forget_step(view, id)).await?;
    directory.sessions.forget(id);
    Ok(())
}

/// Commits plans until a step has nothing left to do.
async fn steps<F, S>(directory: &Directory, mut step: S) -> Result<()>
where
    S: FnMut(View) -> F,
    F: Future<Output = Result<Option<Plan>>>,
{
    let mut attempts = 0;
    while let Some(plan) = step(View::new(directory.store.clone())).await? {
        match directory.store.commit(plan).await {
            Ok(_) => attempts = 0,
            Err(CommitError::Conflict) if attempts < ATTEMPTS_MAX => attempts += 1,
            Err(CommitError::Conflict) => {
                return Err(Error::new(Reason::Conflict, "others changed the same records all the time"));
            }
            Err(CommitError::Unknown(error) | CommitError::Refused(error)) => return Err(error),
        }
    }
    Ok(())
}

async fn bar_step(directory: &Directory, view: View, id: SessionId) -> Result<Option<Plan>> {
    if view.get(&key::session(id)).await?.is_some() {
        return Ok(None);
    }
    let mut plan = Plan::new();
    open_here(directory, &mut plan, id, &Session { ended: true, ..Session::default() });
    Ok(Some(plan))
}

async fn mark_step(directory: &Directory, view: View, id: SessionId) -> Result<Option<Plan>> {
    let Some(read) = view.record::<Session>(&key::session(id)).await? else { return Ok(None) };
    if read.record.ended {
        return Ok(None);
    }
    let mut plan = Plan::new();
    session::end(&mut plan, id, &read.record, read.revision);
    tell_home(directory, &mut plan, id, &read.record);
    Ok(Some(plan))
}

async fn locks_step(view: View, id: SessionId) -> Result<Option<Plan>> {
    let prefix = key::session_locks(id);
    let page = view.scan(&prefix, None, LOCKS_STEP).await?;
    let mut plan = Plan::new();
    for (entry, _) in &page.entries {
        let lock_key: Key = entry.slice(prefix.len()..);
        let held = view.record::<Lock>(&lock_key).await?.map(|stored| (stored.record, stored.revision));
        match Place::of_key(&lock_key, held) {
            Some(place) => place.release_session(&mut plan, id),
            None => drop(plan.delete(entry.clone())),
        }
        if plan.mutations.len() + 3 > PLAN_MUTATIONS_MAX || plan.bytes() > STEP_BYTES {
            break;
        }
    }
    Ok((!page.entries.is_empty()).then_some(plan))
}

async fn grants_step(view: View, id: SessionId) -> Result<Option<Plan>> {
    let page = view.scan(&key::session_grants(id), None, GRANTS_STEP).await?;
    let grants: Vec<GrantId> =
        page.entries.iter().filter_map(|(entry, _)| key::last_u64(entry).map(GrantId)).collect();
    let keys: Vec<Key> = grants.iter().map(|grant| key::grant(*grant)).collect();
    let mut plan = Plan::new();
    for (grant, value) in grants.into_iter().zip(view.get_many(&keys).await?) {
        plan.delete(key::session_grant(id, grant));
        if let Some(read) = value.as_ref().map(stored::<Grant>).transpose()? {
            session::close_grant(&mut plan, grant, &read.record, read.revision);
        }
    }
    Ok((!plan.mutations.is_empty()).then_some(plan))
}

async fn forget_step(view: View, id: SessionId) -> Result<Option<Plan>> {
    let page = view.scan(&key::answers(id), None, ANSWERS_STEP).await?;
    let mut plan = Plan::new();
    for (entry, _) in page.entries {
        plan.delete(entry);
    }
    if !page.more {
        let Some(read) = view.get(&key::session(id)).await? else {
            return Ok((!plan.mutations.is_empty()).then_some(plan));
        };
        if !Session::from_bytes(&read.value)?.ended {
            return Err(Error::internal(format!("session {id} was to be forgotten before it ended")));
        }
        plan.delete(key::session(id));
    }
    Ok(Some(plan))
}
