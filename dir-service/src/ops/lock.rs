//! Locks: taking one, waiting for one, keeping it, giving it back.

use super::{
    grant::{Offer, give},
    list::shown_attributes,
    renew::renew,
    resolve::{self, Found, resolve},
    session::{admit_one, end_with_lock, living, open_here, opened_by},
    taken,
    transact::{Operation, transact},
    view::View,
};
use crate::{directory::Directory, sessions::Possession, store::KeyRange};
use async_trait::async_trait;
use cairn_core::{
    key,
    lock::{Applicant, Place},
    namespace::stamp_reservation,
    plan::{Key, Plan, Precondition},
    record::{self, Record},
    session,
};
use cairn_proto::{
    Error, Reason, Result,
    convert::{self, Target},
    id::{FencingToken, GrantId, InodeId, Revision, SessionId},
    limits::{LOCK_WAIT_MS_MAX, PAGE_ENTRIES_DEFAULT, PAGE_ENTRIES_MAX},
    path::FilePath,
    v1,
};
use futures::StreamExt;
use parking_lot::Mutex;
use std::{ops::Bound, time::Duration};
use tokio::time::Instant;

/// How often a waiter looks whether its own session still lives, and whether its path leads elsewhere.
const RECHECK_MS: u64 = 1_000;
/// Sessions of forced locks that are ended in the same plan; others end by their TTL, since they cannot be renewed
/// by their lock.
const FORCED_SESSIONS_MAX: usize = 16;

/// Takes a lock, at once or by waiting for it.
///
/// # Errors
/// As the contract says.
pub async fn lock(directory: &Directory, request: v1::LockRequest) -> Result<v1::LockResponse> {
    let operation = TakeLock::new(directory, &request).await?;
    let deadline = Instant::now() + Duration::from_millis(request.wait_ms);
    let mut turn = None;
    loop {
        // What happens from here on is seen by whoever waits below.
        let from = match request.wait_ms {
            0 => Revision(0),
            _ => Revision(directory.store.revision().await?.0 + 1),
        };
        let taking = transact(&directory.store, request.request_id.as_ref(), &request, &operation);
        let taken = match request.session_id {
            0 => {
                let session_of = |response: &v1::LockResponse| response.session_id;
                opened_by(directory, operation.session, operation.ttl_ms, taking, session_of).await
            }
            _ => taking.await,
        };
        let error = match taken {
            Ok(response) => return Ok(response),
            Err(error) => error,
        };
        let contended = operation.contended.lock().take();
        let Some(key) = contended.filter(|_| error.reason == Reason::LockHeld && Instant::now() < deadline)
        else {
            return Err(error);
        };
        if operation.has_turn(&key) {
            wait_for_change(directory, &key, from, deadline).await;
        } else {
            // Another lock than before, when the path leads elsewhere now: queue up there.
            drop(turn.take());
            match directory.sessions.queues.turn(&key, deadline).await {
                Ok(granted) => turn = Some(granted),
                Err(late) if late.reason == Reason::DeadlineExceeded => return Err(error),
                Err(other) => return Err(other),
            }
            *operation.turn.lock() = Some(key);
        }
    }
}

/// Resolves when a lock's record changed, at the deadline, or when it is time to look again anyway.
async fn wait_for_change(directory: &Directory, key: &Key, from: Revision, deadline: Instant) {
    let until = deadline.min(Instant::now() + Duration::from_millis(RECHECK_MS));
    let change = async {
        match directory.store.watch(key.clone(), from).await {
            Ok(mut changes) => drop(changes.next().await),
            Err(error) => {
                tracing::debug!(%error, "a lock cannot be watched, looking at it every second");
                std::future::pending::<()>().await;
            }
        }
    };
    let _elapsed = tokio::time::timeout_at(until, change).await;
}

struct TakeLock<'a> {
    directory: &'a Directory,
    request: &'a v1::LockRequest,
    target: Target,
    ttl_ms: u64,
    session: SessionId,
    grant: Option<(GrantId, u32)>,
    /// The lock that was in the way of the last attempt.
    contended: Mutex<Option<Key>>,
    /// The lock that it is this caller's turn to get.
    turn: Mutex<Option<Key>>,
}

impl<'a> TakeLock<'a> {
    async fn new(directory: &'a Directory, request: &'a v1::LockRequest) -> Result<Self> {
        let target = convert::target(&request.path, request.inode)?;
        convert::owner(&request.owner)?;
        if request.mode() == v1::LockMode::Unspecified {
            return Err(Error::invalid("say whether the lock is exclusive or shared"));
        }
        if request.wait_ms > LOCK_WAIT_MS_MAX {
            return Err(Error::limit(format!("a call waits at most {LOCK_WAIT_MS_MAX} ms for a lock")));
        }
        let ttl_ms = session::ttl_ms(request.ttl_ms, directory.config.timing.session_ttl_ms)?;
        let session = if request.session_id == 0 {
            directory.sessions.admit()?;
            SessionId(directory.ids.next().await?)
        } else {
            SessionId(request.session_id)
        };
        let grant = match request.grant_count {
            0 => None,
            asked => Some((GrantId(directory.ids.next().await?), session::grant_count(asked)?)),
        };
        if request.session_id != 0 && directory.sessions.check(session).is_ok() {
            // An expired session is refused when the request is decided: its earlier answer comes first.
            admit_one(directory, session, Possession::Lock).await?;
            if grant.is_some() {
                admit_one(directory, session, Possession::Grant).await?;
            }
        }
        directory.cluster.pace().await;
        Ok(Self {
            directory,
            request,
            target,
            ttl_ms,
            session,
            grant,
            contended: Mutex::default(),
            turn: Mutex::default(),
        })
    }

    fn has_turn(&self, key: &Key) -> bool {
        self.turn.lock().as_ref() == Some(key)
    }

    /// The session in the plan: opened with the lock, or required to live.
    async fn session(&self, view: &View, plan: &mut Plan) -> Result<u64> {
        if self.request.session_id != 0 {
            let stored = living(self.directory, view, self.session).await?;
            session::require(plan, self.session, stored.revision);
            return Ok(stored.record.ttl_ms);
        }
        let opened = record::Session {
            ttl_ms: self.ttl_ms,
            owner: self.request.owner.clone(),
            of_lock: true,
            ..record::Session::default()
        };
        open_here(self.directory, plan, self.session, &opened);
        Ok(self.ttl_ms)
    }
}

#[async_trait]
impl Operation for TakeLock<'_> {
    type Response = v1::LockResponse;

    async fn decide(&self, view: &View) -> Result<(Plan, Self::Response)> {
        let mut plan = Plan::new();
        let ttl_ms = self.session(view, &mut plan).await?;
        let spot = Spot::find(view, &self.target).await?;
        spot.require(&mut plan);
        let path = super::list::shown(&self.target);
        let expires = |session| self.directory.sessions.expires_in_ms(session);
        let applicant = Applicant {
            session: self.session,
            owner: &self.request.owner,
            path: &path,
            mode: self.request.mode(),
            generation: self.directory.generation,
        };
        let key = spot.place.key();
        if let Err(error) = spot.place.grant(&mut plan, &applicant, &expires) {
            *self.contended.lock() = Some(key.clone());
            return Err(error);
        }
        if self.request.wait_ms > 0
            && !self.has_turn(key)
            && self.directory.sessions.queues.is_waited_for(key)
        {
            *self.contended.lock() = Some(key.clone());
            return Err(
                Error::new(Reason::LockHeld, format!("{path}: others wait for the lock already")).at(path)
            );
        }
        spot.stamp(view, &mut plan).await?;
        let grant = match self.grant {
            Some((id, count)) => {
                let offer = Offer { session: self.session, replication: spot.replication, avoid: &[], count };
                Some(give(self.directory, &mut plan, id, &offer).await?)
            }
            None => None,
        };
        let attributes = match &spot.found {
            Some(found) => Some(shown_attributes(view, found).await?),
            None => None,
        };
        let token = FencingToken { generation: self.directory.generation, revision: Revision(0) };
        let response = v1::LockResponse {
            token: Some(token.into()),
            session_id: self.session.0,
            ttl_ms,
            attributes,
            grant,
            revision: 0,
        };
        Ok((plan, response))
    }
}

/// Where a path or inode is locked: the inode, or the name where none is.
struct Spot {
    place: Place,
    found: Option<Found>,
    /// The directory of a name where no inode is.
    reserved_in: Option<InodeId>,
    replication: u32,
    /// What keeps the path leading here.
    way: Vec<Precondition>,
}

impl Spot {
    async fn find(view: &View, target: &Target) -> Result<Self> {
        let path = match target {
            Target::Inode(_) => {
                let found = resolve::existing(view, target).await?;
                let replication = found.inode.record.replication;
                let place = Place::of_inode(found.id, read(view, &key::lock(found.id)).await?);
                return Ok(Self {
                    place,
                    found: Some(found),
                    reserved_in: None,
                    replication,
                    way: Vec::new(),
                });
            }
            Target::Path(path) => path,
        };
        let resolved = resolve(view, path).await?;
        let mut way = Vec::new();
        if let Some(parent) = &resolved.parent {
            let (_, name) = resolved.name()?;
            let entry = key::dentry(parent.id, name);
            way.push(Precondition::Unchanged(entry, resolved.dentry.as_ref().map(|dentry| dentry.revision)));
            way.push(Precondition::Exists(key::inode(parent.id)));
            let epoch = view.get(&key::tree_epoch()).await?.map(|versioned| versioned.revision);
            way.push(Precondition::Unchanged(key::tree_epoch(), epoch));
        }
        let (place, reserved_in) = match &resolved.found {
            Some(found) => (Place::of_inode(found.id, read(view, &key::lock(found.id)).await?), None),
            None => {
                let (parent, name) = resolved.name()?;
                let held = read(view, &key::reservation(parent.id, name)).await?;
                (Place::of_name(parent.id, name, held), Some(parent.id))
            }
        };
        Ok(Self { place, found: resolved.found, reserved_in, replication: resolved.replication, way })
    }

    /// Keeps the directory of a reserved name from being removed by a plan that saw no such name in it.
    async fn stamp(&self, view: &View, plan: &mut Plan) -> Result<()> {
        if let Some(directory) = self.reserved_in {
            let stamp = view.get(&key::children(directory)).await?.map(|versioned| versioned.value);
            stamp_reservation(plan, directory, stamp);
        }
        Ok(())
    }

    fn require(&self, plan: &mut Plan) {
        if let Some(found) = &self.found {
            plan.require(Precondition::Exists(key::inode(found.id)));
        }
        for precondition in &self.way {
            plan.require(precondition.clone());
        }
    }
}

async fn read(view: &View, key: &Key) -> Result<Option<(record::Lock, Revision)>> {
    Ok(view.record::<record::Lock>(key).await?.map(|stored| (stored.record, stored.revision)))
}

/// Keeps a lock's session alive.
///
/// # Errors
/// As the contract says.
pub async fn renew_lock(
    directory: &Directory,
    request: v1::RenewLockRequest,
) -> Result<v1::RenewLockResponse> {
    let session = SessionId(request.session_id);
    if let Some(token) = request.token {
        let token = FencingToken::from(token);
        let path = FilePath::parse(&request.path)?;
        let view = View::new(directory.store.clone());
        let shown = path.to_string();
        let spot = Spot::find(&view, &Target::Path(path)).await;
        if spot.map_or_else(absent, |spot| Ok(spot.place.session_of(token)))? != Some(session)
            && taken::by_token(&view, &shown, token, Some(session)).await?.is_none()
        {
            return Err(lock_lost(&request.path, token));
        }
    }
    let ttl_ms = renew(directory, session, request.oldest_revision.map(Revision)).await?;
    Ok(v1::RenewLockResponse { ttl_ms })
}

/// A path that leads nowhere holds no lock; any other error is one.
fn absent(error: Error) -> Result<Option<SessionId>> {
    match error.reason {
        Reason::NotFound | Reason::NotADirectory => Ok(None),
        _ => Err(error),
    }
}

fn lock_lost(path: &str, token: FencingToken) -> Error {
    Error::new(Reason::LockLost, format!("{path} is not locked by token {token} any more: lock it again"))
        .at(path)
}

/// Gives a lock back, or takes it away.
///
/// # Errors
/// As the contract says.
pub async fn unlock(directory: &Directory, request: v1::UnlockRequest) -> Result<v1::UnlockResponse> {
    let path = FilePath::parse(&request.path)?;
    if !request.force && request.token.is_none() {
        return Err(Error::invalid("give the lock's token, or force").at(&request.path));
    }
    directory.cluster.pace().await;
    let operation = ReleaseLock { directory, request: &request, path, ended: Mutex::default() };
    let response = transact(&directory.store, request.request_id.as_ref(), &request, &operation).await?;
    for session in operation.ended.into_inner() {
        directory.sessions.begin_end(session);
    }
    Ok(response)
}

struct ReleaseLock<'a> {
    directory: &'a Directory,
    request: &'a v1::UnlockRequest,
    path: FilePath,
    /// Sessions that the last plan ended.
    ended: Mutex<Vec<SessionId>>,
}

#[async_trait]
impl Operation for ReleaseLock<'_> {
    type Response = v1::UnlockResponse;

    async fn decide(&self, view: &View) -> Result<(Plan, Self::Response)> {
        self.ended.lock().clear();
        let mut plan = Plan::new();
        let token = self.request.token.map(FencingToken::from).filter(|_| !self.request.force);
        let place = self.place(view, token).await?;
        let (sessions, ended) = match token {
            Some(token) => (vec![place.release(&mut plan, token)?], 1),
            None => (place.sessions(), place.end(&mut plan)),
        };
        for session in sessions.into_iter().take(FORCED_SESSIONS_MAX) {
            if end_with_lock(self.directory, view, &mut plan, session).await? {
                self.ended.lock().push(session);
            }
        }
        Ok((plan, v1::UnlockResponse { revision: 0, ended }))
    }
}

impl ReleaseLock<'_> {
    /// The lock that is meant: where the path leads, or else one that was taken by that path before a directory above it
    /// got another name.
    async fn place(&self, view: &View, token: Option<FencingToken>) -> Result<Place> {
        let shown = self.path.to_string();
        let here = match Spot::find(view, &Target::Path(self.path.clone())).await {
            Ok(spot) => Ok(spot.place),
            Err(error) => match error.reason {
                Reason::NotFound | Reason::NotADirectory => Err(error),
                _ => return Err(error),
            },
        };
        let Some(token) = token else {
            if here.as_ref().is_ok_and(|place| !place.sessions().is_empty()) {
                return here;
            }
            return taken::by_path(view, &shown).await?.map_or(here, Ok);
        };
        if let Ok(place) = here
            && place.session_of(token).is_some()
        {
            return Ok(place);
        }
        let session = self.request.request_id.as_ref().map(|id| SessionId(id.session_id));
        taken::by_token(view, &shown, token, session.filter(|session| session.0 != 0))
            .await?
            .ok_or_else(|| lock_lost(&self.request.path, token))
    }
}

/// A page of all locks, by the keys of their records.
///
/// # Errors
/// `INVALID_ARGUMENT` for a page token that is none, `LIMIT_EXCEEDED` for too large a page.
pub async fn list_locks(
    directory: &Directory,
    request: v1::ListLocksRequest,
) -> Result<v1::ListLocksResponse> {
    let limit = match request.page_size as usize {
        0 => PAGE_ENTRIES_DEFAULT,
        size if size <= PAGE_ENTRIES_MAX => size,
        size => return Err(Error::limit(format!("a page has at most {PAGE_ENTRIES_MAX} locks, not {size}"))),
    };
    let (mut start, mut skip) = match request.page_token.as_str() {
        "" => (key::locks(), 0),
        token => parse_page_token(token)?,
    };
    let view = View::new(directory.store.clone());
    let expires = |session| directory.sessions.expires_in_ms(session);
    let mut locks = Vec::new();
    for prefix in [key::locks(), key::reservations()] {
        if start < prefix {
            (start, skip) = (prefix.clone(), 0);
        }
        let end = key::prefix_end(&prefix).map_or(Bound::Unbounded, Bound::Excluded);
        let mut range = KeyRange { start: Bound::Included(start.clone()), end };
        while !range.is_empty() {
            let page = view.scan_range(range.clone(), limit).await?;
            for (key, versioned) in &page.entries {
                let held = (record::Lock::from_bytes(&versioned.value)?, versioned.revision);
                let infos = Place::of_key(key, Some(held)).map_or(Vec::new(), |place| place.infos(&expires));
                // A place in the middle of a lock's holders counts only for that lock.
                let first = if *key == start { skip } else { 0 };
                for (position, info) in infos.into_iter().enumerate().skip(first) {
                    if locks.len() == limit {
                        let next_page_token = page_token(key, position);
                        return Ok(v1::ListLocksResponse { locks, next_page_token });
                    }
                    locks.push(info);
                }
            }
            match page.entries.last() {
                Some((last, _)) if page.more => range = range.behind(last.clone()),
                _ => break,
            }
        }
    }
    Ok(v1::ListLocksResponse { locks, next_page_token: String::new() })
}

fn page_token(key: &Key, position: usize) -> String {
    let hex: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{hex}-{position:x}")
}

fn parse_page_token(token: &str) -> Result<(Key, usize)> {
    let parse = || {
        let (hex, position) = token.split_once('-')?;
        let bytes: Option<Vec<u8>> = hex
            .as_bytes()
            .chunks(2)
            .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok())
            .collect();
        let key = Key::from(bytes?);
        Place::of_key(&key, None)?;
        Some((key, usize::from_str_radix(position, 16).ok()?))
    };
    parse().ok_or_else(|| Error::invalid("this is not a page token of a list of locks"))
}

/// An inode's lock or a name's reservation as the commit takes it.
pub(crate) async fn place_of(
    view: &View,
    found: Option<InodeId>,
    name: Option<(InodeId, &str)>,
) -> Result<Place> {
    match (found, name) {
        (Some(inode), _) => Ok(Place::of_inode(inode, read(view, &key::lock(inode)).await?)),
        (None, Some((parent, name))) => {
            Ok(Place::of_name(parent, name, read(view, &key::reservation(parent, name)).await?))
        }
        (None, None) => Err(Error::internal("a lock is on an inode or a name")),
    }
}
