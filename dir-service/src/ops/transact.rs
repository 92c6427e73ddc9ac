//! The loop of every mutating operation, and promise RETRY.
//!
//! ```text
//!   view -> answered before? --yes--> that answer
//!             | no
//!             v
//!           decide (core) --error--> error, nothing changed
//!             | plan + response
//!             v
//!           commit plan + answer --conflict--> again, with a new view
//!             | applied at revision r
//!             v
//!           response with r
//! ```
//!
//! The answer is written in the same plan as the change, so that either both are there or none, and is looked up
//! before every other check: a repeated delete answers "removed", not "not found". A session's answers share
//! [`limits::ANSWERS_PER_SESSION`] slots by sequence; a slot that holds a later sequence means that it can no longer be
//! known what became of the request: `OUTCOME_UNKNOWN`, and nothing is applied.
//!
//! A request that takes several plans ([`begin`]) has each of them require that it was not answered yet, and ends with one
//! that writes its answer ([`finish`], or an operation): what comes late, or twice, then changes nothing more.

use super::view::{Stored, View};
use crate::store::{CommitError, MetaStore};
use async_trait::async_trait;
use cairn_core::{
    key,
    plan::{Key, Plan, Precondition, Versioned},
    record::{Answer, Record, Session},
};
use cairn_proto::{
    Error, Reason, Result,
    id::{Revision, SessionId},
    limits, v1,
};
use prost::Message;
use std::{sync::Arc, time::Duration};

/// How often an operation is decided again before it answers `CONFLICT`.
const ATTEMPTS_MAX: u32 = 64;

/// A mutating operation.
#[async_trait]
pub trait Operation: Send + Sync {
    /// What it answers.
    type Response: Response;

    /// Decides on what the view shows: a plan and the answer if the plan is applied. An empty plan is not committed,
    /// and its answer not kept, unless [`Operation::is_kept`] says so.
    ///
    /// # Errors
    /// Whatever stands in the way; nothing is changed then.
    async fn decide(&self, view: &View) -> Result<(Plan, Self::Response)>;

    /// Whether the answer is kept although the plan is empty.
    fn is_kept(&self) -> bool {
        false
    }
}

/// An answer that tells the revision of its plan, which is known only after the commit.
pub trait Response: Message + Default + Clone {
    /// Fills the revision in wherever the answer shows it.
    fn set_revision(&mut self, revision: Revision);
}

/// Names a request, so that it is applied once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKey {
    /// Not repeatable.
    None,
    /// Numbered by its session.
    Session(SessionId, u64),
    /// Named by a UUID.
    Uuid([u8; 16]),
}

impl RequestKey {
    /// Reads the id of a request.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` for half an id, two ids, or a UUID that is none.
    pub fn parse(id: Option<&v1::RequestId>) -> Result<Self> {
        let Some(id) = id else { return Ok(Self::None) };
        match (id.session_id, id.sequence, id.uuid.as_str()) {
            (0, 0, "") => Ok(Self::None),
            (1.., 1.., "") => Ok(Self::Session(SessionId(id.session_id), id.sequence)),
            (0, 0, uuid) => uuid::Uuid::parse_str(uuid)
                .map(|uuid| Self::Uuid(uuid.into_bytes()))
                .map_err(|_| Error::invalid(format!("the request id '{uuid}' is not a uuid"))),
            _ => Err(Error::invalid("a request id is a session with a sequence from 1 on, or a uuid")),
        }
    }

    fn key(self) -> Option<Key> {
        match self {
            Self::None => None,
            Self::Session(session, sequence) => Some(key::answer(session, sequence)),
            Self::Uuid(uuid) => Some(key::answer_uuid(uuid)),
        }
    }

    fn sequence(self) -> u64 {
        match self {
            Self::Session(_, sequence) => sequence,
            _ => 0,
        }
    }
}

/// Runs an operation to its end. `request` is the whole request as it came in: an id that is used again for another
/// request is refused.
///
/// # Errors
/// What the operation says; `CONFLICT` when others were always faster; `OUTCOME_UNKNOWN` as in the module's
/// documentation; `SESSION_EXPIRED` when the numbering session has ended.
pub async fn transact<O: Operation>(
    store: &Arc<dyn MetaStore>,
    request_id: Option<&v1::RequestId>,
    request: &impl Message,
    operation: &O,
) -> Result<O::Response> {
    let request_key = RequestKey::parse(request_id)?;
    let request_hash = cairn_proto::checksum::crc64(&request.encode_to_vec());
    let mut unknown = None;
    for attempt in 0..ATTEMPTS_MAX {
        if attempt > 3 {
            // Others are at the same keys: give way, a little longer each time.
            tokio::time::sleep(Duration::from_micros(u64::from(attempt * attempt) * 50)).await;
        }
        let view = View::new(store.clone());
        let slot = match answered(&view, request_key, request_hash).await? {
            Earlier::Response(response) => return Ok(response),
            Earlier::Slot(slot) => slot,
        };
        // With an id the answer is not there, so the earlier attempt was not applied, and cannot be any more: the
        // slot's precondition fails for whichever comes second.
        if let Some(error) = unknown.take()
            && request_key == RequestKey::None
        {
            return Err(error);
        }
        let session = session_of(&view, request_key).await?;
        let (mut plan, mut response) = operation.decide(&view).await?;
        if plan.mutations.is_empty() && (request_key == RequestKey::None || !operation.is_kept()) {
            response.set_revision(view.revision().unwrap_or_default());
            return Ok(response);
        }
        if let Some(key) = request_key.key() {
            let answer = Answer {
                sequence: request_key.sequence(),
                request_hash,
                response: response.encode_to_vec().into(),
            };
            plan.require_unchanged(key.clone(), slot.as_ref());
            plan.put(key, answer.to_bytes());
        }
        if let Some((key, session)) = session {
            plan.require(Precondition::Unchanged(key, Some(session.revision)));
        }
        match store.commit(plan).await {
            Ok(revision) => {
                response.set_revision(revision);
                return Ok(response);
            }
            Err(CommitError::Conflict) => {}
            Err(CommitError::Unknown(error)) => {
                unknown = Some(Error::new(
                    Reason::OutcomeUnknown,
                    format!("it is not known whether the change was made: {error}"),
                ));
            }
            Err(CommitError::Refused(error)) => return Err(error),
        }
    }
    Err(unknown.unwrap_or_else(|| {
        Error::new(Reason::Conflict, "others changed the same records all the time: try again")
            .retry_after_ms(50)
    }))
}

/// How a request that takes several plans stands.
#[derive(Debug)]
pub enum Begun<R> {
    /// It was answered before.
    Answered(R),
    /// It was not, for as long as these hold: each of its plans is to require them.
    Open(Vec<Precondition>),
}

/// Begins, or goes on with, a request that takes several plans.
///
/// # Errors
/// As [`transact`].
pub async fn begin<R: Response>(
    store: &Arc<dyn MetaStore>,
    request_id: Option<&v1::RequestId>,
    request: &impl Message,
) -> Result<Begun<R>> {
    let view = View::new(store.clone());
    let request_key = RequestKey::parse(request_id)?;
    let hash = cairn_proto::checksum::crc64(&request.encode_to_vec());
    let slot = match answered(&view, request_key, hash).await? {
        Earlier::Response(response) => return Ok(Begun::Answered(response)),
        Earlier::Slot(slot) => slot,
    };
    let mut open = Vec::new();
    if let Some((key, session)) = session_of(&view, request_key).await? {
        open.push(Precondition::Unchanged(key, Some(session.revision)));
    }
    if let Some(key) = request_key.key() {
        open.push(Precondition::Unchanged(key, slot.map(|slot| slot.revision)));
    }
    Ok(Begun::Open(open))
}

/// Ends a request that took several plans with its answer, or with the one that it was given meanwhile.
///
/// # Errors
/// As [`transact`].
pub async fn finish<R: Response + 'static>(
    store: &Arc<dyn MetaStore>,
    request_id: Option<&v1::RequestId>,
    request: &impl Message,
    response: R,
) -> Result<R> {
    transact(store, request_id, request, &Finish(response)).await
}

struct Finish<R>(R);

#[async_trait]
impl<R: Response> Operation for Finish<R> {
    type Response = R;

    async fn decide(&self, view: &View) -> Result<(Plan, R)> {
        // Without an id there is nothing to keep, and the answer shows the revision that it was given at.
        view.get_many(&[]).await?;
        Ok((Plan::new(), self.0.clone()))
    }

    fn is_kept(&self) -> bool {
        true
    }
}

enum Earlier<R> {
    Response(R),
    Slot(Option<Versioned>),
}

async fn answered<R: Response>(view: &View, request: RequestKey, request_hash: u64) -> Result<Earlier<R>> {
    let Some(key) = request.key() else { return Ok(Earlier::Slot(None)) };
    let Some(slot) = view.get(&key).await? else { return Ok(Earlier::Slot(None)) };
    let answer = Answer::from_bytes(&slot.value)?;
    if answer.sequence > request.sequence() {
        return Err(Error::new(
            Reason::OutcomeUnknown,
            format!(
                "the answer to request {} is no longer kept: the session is {} requests further, {} are kept",
                request.sequence(),
                answer.sequence - request.sequence(),
                limits::ANSWERS_PER_SESSION
            ),
        ));
    }
    if answer.sequence < request.sequence() {
        return Ok(Earlier::Slot(Some(slot)));
    }
    if answer.request_hash != request_hash {
        return Err(Error::invalid("this request id was used for another request: number requests upwards"));
    }
    let mut response = R::decode(answer.response.clone())
        .map_err(|error| Error::internal(format!("a stored answer is damaged: {error}")))?;
    response.set_revision(slot.revision);
    Ok(Earlier::Response(response))
}

async fn session_of(view: &View, request: RequestKey) -> Result<Option<(Key, Stored<Session>)>> {
    let RequestKey::Session(session, _) = request else { return Ok(None) };
    let key = key::session(session);
    match view.record::<Session>(&key).await? {
        Some(stored) if !stored.record.ended => Ok(Some((key, stored))),
        _ => Err(Error::new(Reason::SessionExpired, format!("session {session} has ended: open another"))),
    }
}

macro_rules! responses {
    ($($name:ident),*) => {
        $(impl Response for v1::$name {
            fn set_revision(&mut self, revision: Revision) {
                self.revision = revision.0;
            }
        })*
    };
}

responses!(
    CommitResponse,
    CreateResponse,
    DeleteResponse,
    RenameResponse,
    SetAttributesResponse,
    UnlockResponse
);

impl Response for v1::LockResponse {
    fn set_revision(&mut self, revision: Revision) {
        self.revision = revision.0;
        // The token of a lock is the revision of the plan that granted it.
        if let Some(token) = &mut self.token
            && token.revision == 0
        {
            token.revision = revision.0;
        }
    }
}
