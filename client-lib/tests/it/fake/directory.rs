//! The directory's part: names, locks, sessions, grants, versions.

use super::{Cluster, Fault, lies::told, splice::Content, uri};
use cairn_proto::{
    Error, Reason,
    path::FilePath,
    v1::{
        self, cluster_service_server::ClusterService, directory_service_server::DirectoryService,
        session_service_server::SessionService,
    },
};
use prost::Message;
use std::{
    collections::{BTreeMap, BTreeSet},
    pin::Pin,
    sync::Arc,
};
use tokio::time::{Duration, Instant};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming};

type Answer<T> = Result<Response<T>, Status>;

#[derive(Clone, Debug, Default)]
pub struct Node {
    pub attributes: v1::Attributes,
    pub content: Content,
    /// Counts changes of the layout within a version.
    pub layout: u64,
}

#[derive(Debug)]
pub struct State {
    pub revision: u64,
    next_id: u64,
    pub nodes: BTreeMap<String, Node>,
    pub locks: BTreeMap<String, Vec<v1::LockInfo>>,
    pub sessions: BTreeSet<u64>,
    pub grants: BTreeMap<u64, u64>,
    pub groups: BTreeMap<u64, v1::Group>,
    pub servers: Vec<v1::Server>,
    answers: BTreeMap<(u64, u64, String), Vec<u8>>,
    pub calls: Vec<(&'static str, v1::RequestId)>,
    pub reports: Vec<v1::ReportBadChunkRequest>,
    pub grant_requests: Vec<v1::GrantRequest>,
    pub oldest_revision: u64,
    pub renewals: usize,
    pub min_copies: usize,
    pub extents_page: usize,
    /// Changes layouts once, when a second page is asked for.
    pub compact_between_pages: bool,
    turn: u64,
}

impl State {
    pub fn new(count: u64) -> Self {
        let seats: Vec<_> =
            (1..=count).map(|server_id| v1::Seat { number: server_id as u32 - 1, server_id }).collect();
        let group =
            |id| v1::Group { id, seats: seats.clone(), primary_id: id, epoch: 1, ..Default::default() };
        let root = v1::Attributes { inode: 1, kind: v1::Kind::Directory as i32, ..Default::default() };
        Self {
            revision: 1,
            next_id: 100,
            nodes: [("/".to_owned(), Node { attributes: root, ..Default::default() })].into(),
            locks: BTreeMap::new(),
            sessions: BTreeSet::new(),
            grants: BTreeMap::new(),
            groups: (1..=count).map(|id| (id, group(id))).collect(),
            servers: (1..=count)
                .map(|id| v1::Server {
                    id,
                    endpoints: vec![v1::Endpoint { uri: uri(id), scope: 0 }],
                    ..Default::default()
                })
                .collect(),
            answers: BTreeMap::new(),
            calls: Vec::new(),
            reports: Vec::new(),
            grant_requests: Vec::new(),
            oldest_revision: 0,
            renewals: 0,
            min_copies: 1,
            extents_page: 1_024,
            compact_between_pages: false,
            turn: 0,
        }
    }

    fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn node(&self, path: &str) -> Result<&Node, Error> {
        self.nodes.get(path).ok_or_else(|| Error::not_found(format!("{path} does not exist")))
    }

    fn path(&self, path: &str, inode: u64) -> Result<String, Error> {
        if inode == 0 {
            return Ok(path.to_owned());
        }
        let found = self.nodes.iter().find(|(_, node)| node.attributes.inode == inode);
        found.map(|(path, _)| path.clone()).ok_or_else(|| Error::not_found("no such inode"))
    }

    fn check_parent(&self, path: &str) -> Result<(), Error> {
        let (parent, _) = FilePath::parse(path)?.split_last().map(|(p, n)| (p, n.clone())).unwrap();
        match self.node(&parent.to_string())?.attributes.kind() {
            v1::Kind::Directory => Ok(()),
            _ => Err(Error::new(Reason::NotADirectory, "the parent is a file")),
        }
    }

    fn check_lock(&self, path: &str, token: Option<v1::FencingToken>) -> Result<(), Error> {
        let held = self.locks.get(path).map(Vec::as_slice).unwrap_or_default();
        match token {
            Some(token) if held.iter().any(|lock| lock.token == Some(token)) => Ok(()),
            Some(_) => Err(Error::new(Reason::LockLost, "the token's lock is not held")),
            None => match held.first() {
                Some(lock) => {
                    let mut error = Error::new(Reason::LockHeld, format!("{} holds a lock", lock.owner));
                    error.detail.lock = Some(lock.clone());
                    Err(error)
                }
                None => Ok(()),
            },
        }
    }

    fn check_condition(&self, path: &str, condition: Option<&v1::Condition>) -> Result<(), Error> {
        use v1::condition::Require;
        let node = self.nodes.get(path);
        let version = node.map_or(0, |node| node.attributes.version);
        let holds = match condition.and_then(|condition| condition.require.as_ref()) {
            None => true,
            Some(Require::Absent(_)) => node.is_none(),
            Some(Require::Exists(_)) => node.is_some(),
            Some(Require::Version(wanted)) => node.is_some() && version == *wanted,
            Some(Require::Etag(etag)) => node.is_some_and(|node| node.attributes.etag == *etag),
        };
        if holds {
            return Ok(());
        }
        let mut error = Error::new(Reason::ConditionFailed, "the condition does not hold");
        error.detail.current_version = version;
        Err(error)
    }

    fn check_session(&self, id: Option<&v1::RequestId>) -> Result<(), Error> {
        match id {
            Some(id) if id.session_id != 0 && !self.sessions.contains(&id.session_id) => {
                Err(Error::new(Reason::SessionExpired, "the session has ended"))
            }
            _ => Ok(()),
        }
    }

    pub fn end_session(&mut self, id: u64) {
        self.sessions.remove(&id);
        self.grants.retain(|_, owner| *owner != id);
        for held in self.locks.values_mut() {
            held.retain(|lock| lock.session_id != id);
        }
        self.locks.retain(|_, held| !held.is_empty());
    }

    fn grant(&mut self, session_id: u64, count: u32, avoid: &[u64]) -> v1::Grant {
        let count_groups = self.groups.len() as u64;
        let mut group = self.groups[&(self.turn % count_groups + 1)].clone();
        for _ in 0..count_groups {
            if !avoid.contains(&group.primary_id) {
                break;
            }
            self.turn += 1;
            group = self.groups[&(self.turn % count_groups + 1)].clone();
        }
        self.turn += 1;
        let id = self.id();
        self.grants.insert(id, session_id);
        let count = if count == 0 { 256 } else { count };
        v1::Grant {
            id,
            group: Some(group),
            members: self.servers.clone(),
            count,
            session_id,
            ..Default::default()
        }
    }

    fn commit(&mut self, request: &v1::CommitRequest) -> Result<v1::CommitResponse, Error> {
        let path = self.path(&request.path, request.inode)?;
        self.check_lock(&path, request.token)?;
        self.check_condition(&path, request.condition.as_ref())?;
        for receipt in &request.receipts {
            if !self.grants.contains_key(&receipt.chunk.unwrap().grant_id) {
                return Err(Error::new(Reason::GrantClosed, "the grant was closed"));
            }
        }
        let mut misplaced = Error::new(Reason::Misplaced, "too few holders");
        for receipt in request.receipts.iter().filter(|receipt| receipt.holder_ids.len() < self.min_copies) {
            misplaced.detail.chunks.push(v1::ChunkRef {
                chunk: receipt.chunk,
                length: receipt.length,
                checksum: receipt.checksum,
                group_id: receipt.group_id,
            });
        }
        if !misplaced.detail.chunks.is_empty() {
            misplaced.detail.groups = self.groups.values().cloned().collect();
            misplaced.detail.servers = self.servers.clone();
            return Err(misplaced);
        }
        if !self.nodes.contains_key(&path) {
            self.check_parent(&path)?;
            let inode = self.id();
            let attributes = v1::Attributes {
                inode,
                kind: v1::Kind::File as i32,
                mode: request.mode,
                ..Default::default()
            };
            self.nodes.insert(path.clone(), Node { attributes, ..Default::default() });
        }
        self.revision += 1;
        let revision = self.revision;
        let node = self.nodes.get_mut(&path).unwrap();
        if node.attributes.kind() == v1::Kind::Directory {
            return Err(Error::new(Reason::IsADirectory, "a directory"));
        }
        if request.base_version != 0 && request.base_version != node.attributes.version {
            return Err(Error::new(Reason::ConditionFailed, "another version"));
        }
        for edit in &request.edits {
            node.content.apply(edit, &request.receipts);
        }
        node.attributes.version += 1;
        node.attributes.size = node.content.size;
        node.attributes.etag = format!("{}-{}", node.attributes.inode, node.attributes.version);
        if request.mtime_ns != 0 {
            node.attributes.mtime_ns = request.mtime_ns;
        }
        let attributes = Some(node.attributes.clone());
        if request.unlock {
            self.locks.remove(&path);
        }
        Ok(v1::CommitResponse { attributes, revision })
    }
}

#[derive(Clone, Debug)]
pub struct DirectoryFace(pub Arc<Cluster>);

impl DirectoryFace {
    fn fault(&self, method: &str, applied: bool) -> Result<(), Status> {
        let mut faults = self.0.faults.lock();
        let at = faults.iter().position(|fault: &Fault| fault.method == method && fault.applied == applied);
        match at.and_then(|at| faults.remove(at)) {
            Some(fault) => Err(fault.error.into()),
            None => Ok(()),
        }
    }

    /// Applies a change once for each request id.
    fn once<T: Message + Default>(
        &self,
        method: &'static str,
        id: Option<v1::RequestId>,
        apply: impl FnOnce(&mut State) -> Result<T, Error>,
    ) -> Answer<T> {
        let id = id.expect("every change carries a request id");
        assert_eq!(id.uuid.is_empty(), id.sequence != 0, "a number of a session or a uuid");
        let key = (id.session_id, id.sequence, id.uuid.clone());
        {
            let mut state = self.0.state.lock();
            state.calls.push((method, id.clone()));
        }
        self.fault(method, false)?;
        let answer = {
            let mut state = self.0.state.lock();
            match state.answers.get(&key) {
                Some(answer) => T::decode(answer.as_slice()).unwrap(),
                None => {
                    state.check_session(Some(&id))?;
                    let answer = apply(&mut state)?;
                    state.answers.insert(key, answer.encode_to_vec());
                    answer
                }
            }
        };
        self.0.changed.notify_waiters();
        self.fault(method, true)?;
        Ok(Response::new(answer))
    }

    fn note(&self, method: &'static str) {
        self.0.state.lock().calls.push((method, v1::RequestId::default()));
    }
}

#[tonic::async_trait]
impl DirectoryService for DirectoryFace {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<v1::WatchResponse, Status>> + Send>>;

    async fn lookup(&self, request: Request<v1::LookupRequest>) -> Answer<v1::LookupResponse> {
        self.note("Lookup");
        self.fault("Lookup", false)?;
        let lies = self.0.lies();
        if let Some(refusal) = lies.refusal {
            return Err(refusal);
        }
        let request = request.into_inner();
        let mut state = self.0.state.lock();
        if !request.page_token.is_empty() && std::mem::take(&mut state.compact_between_pages) {
            state.nodes.values_mut().for_each(|node| node.layout += 1);
        }
        let path = state.path(&request.path, request.inode)?;
        let node = state.node(&path)?;
        if request.version != 0 && request.version != node.attributes.version {
            return Err(Error::new(Reason::VersionGone, "another version is current").into());
        }
        let end = if request.length == 0 { u64::MAX } else { request.offset.saturating_add(request.length) };
        let (skip, layout) = request.page_token.split_once('@').unwrap_or(("0", ""));
        let skip: usize = skip.parse().unwrap();
        if !layout.is_empty() && layout != node.layout.to_string() {
            return Err(Error::new(Reason::VersionGone, "the layout changed between two pages").into());
        }
        let wanted: Vec<_> = node
            .content
            .extents
            .iter()
            .filter(|extent| extent.offset < end && extent.offset + extent.length > request.offset)
            .copied()
            .collect();
        let page: Vec<_> = wanted.iter().skip(skip).take(state.extents_page).copied().collect();
        let next = skip + page.len();
        let more = request.with_extents && next < wanted.len();
        let answer = v1::LookupResponse {
            attributes: Some(node.attributes.clone()),
            extents: if request.with_extents { page } else { Vec::new() },
            next_page_token: if more { format!("{next}@{}", node.layout) } else { String::new() },
            groups: state.groups.values().cloned().collect(),
            servers: state.servers.clone(),
            revision: state.revision,
            layout_revision: node.attributes.version * 100 + node.layout,
        };
        Ok(Response::new(told(&lies.lookup, answer)))
    }

    async fn lookup_many(&self, request: Request<v1::LookupManyRequest>) -> Answer<v1::LookupManyResponse> {
        self.note("LookupMany");
        let mut many = v1::LookupManyResponse::default();
        for lookup in request.into_inner().lookups {
            let outcome = match self.lookup(Request::new(lookup)).await {
                Ok(found) => {
                    let mut found = found.into_inner();
                    (many.groups, many.servers) =
                        (std::mem::take(&mut found.groups), std::mem::take(&mut found.servers));
                    v1::lookup_answer::Outcome::Found(found)
                }
                Err(status) => v1::lookup_answer::Outcome::Error(Error::from(status).to_wire()),
            };
            many.answers.push(v1::LookupAnswer { outcome: Some(outcome) });
        }
        Ok(Response::new(many))
    }

    async fn list(&self, request: Request<v1::ListRequest>) -> Answer<v1::ListResponse> {
        self.note("List");
        let request = request.into_inner();
        let state = self.0.state.lock();
        state.node(&request.path)?;
        let base = format!("{}/", request.path.trim_end_matches('/'));
        let size = if request.page_size == 0 { 1_024 } else { request.page_size as usize };
        let mut entries: Vec<_> = state
            .nodes
            .iter()
            .filter_map(|(path, node)| {
                let name = path.strip_prefix(&base).filter(|name| !name.is_empty() && !name.contains('/'))?;
                Some(v1::Entry {
                    name: name.to_owned(),
                    inode: node.attributes.inode,
                    kind: node.attributes.kind,
                    attributes: request.with_attributes.then(|| node.attributes.clone()),
                })
            })
            .filter(|entry| entry.name > request.page_token)
            .take(size + 1)
            .collect();
        let more = entries.len() > size;
        entries.truncate(size);
        let next_page_token =
            if more { entries.last().map(|entry| entry.name.clone()).unwrap() } else { String::new() };
        let answer = v1::ListResponse { entries, next_page_token, revision: state.revision };
        Ok(Response::new(told(&self.0.lies().list, answer)))
    }

    async fn lock(&self, request: Request<v1::LockRequest>) -> Answer<v1::LockResponse> {
        let request = request.into_inner();
        let end = Instant::now() + Duration::from_millis(request.wait_ms);
        loop {
            let changed = self.0.changed.notified();
            let asked = request.clone();
            let answer = self.once("Lock", request.request_id.clone(), move |state| {
                if !state.sessions.contains(&asked.session_id) {
                    return Err(Error::new(Reason::SessionExpired, "the session has ended"));
                }
                let path = state.path(&asked.path, asked.inode)?;
                if !state.nodes.contains_key(&path) {
                    state.check_parent(&path)?;
                }
                let shared = asked.mode() == v1::LockMode::Shared;
                let held = state.locks.get(&path).map(Vec::as_slice).unwrap_or_default();
                if !(shared && held.iter().all(|lock| lock.mode() == v1::LockMode::Shared)) {
                    state.check_lock(&path, None)?;
                }
                state.revision += 1;
                let token = Some(v1::FencingToken { generation: 1, revision: state.revision });
                let inode = state.nodes.get(&path).map_or(0, |node| node.attributes.inode);
                let lock = v1::LockInfo {
                    path: path.clone(),
                    inode,
                    mode: asked.mode,
                    token,
                    session_id: asked.session_id,
                    owner: asked.owner,
                    expires_in_ms: 10_000,
                };
                state.locks.entry(path.clone()).or_default().push(lock);
                let grant =
                    (asked.grant_count > 0).then(|| state.grant(asked.session_id, asked.grant_count, &[]));
                Ok(v1::LockResponse {
                    token,
                    session_id: asked.session_id,
                    ttl_ms: 10_000,
                    attributes: state.nodes.get(&path).map(|node| node.attributes.clone()),
                    grant,
                    revision: state.revision,
                })
            });
            match answer {
                Err(status) if status.code() == tonic::Code::Aborted && Instant::now() < end => {
                    let _ = tokio::time::timeout_at(end, changed).await;
                }
                answer => return answer,
            }
        }
    }

    async fn renew_lock(&self, request: Request<v1::RenewLockRequest>) -> Answer<v1::RenewLockResponse> {
        self.note("RenewLock");
        let request = request.into_inner();
        let mut state = self.0.state.lock();
        state.renewals += 1;
        if !state.sessions.contains(&request.session_id) {
            return Err(Error::new(Reason::SessionExpired, "the session has ended").into());
        }
        if request.token.is_some() {
            state.check_lock(&request.path, request.token)?;
        }
        if let Some(oldest) = request.oldest_revision {
            state.oldest_revision = oldest;
        }
        Ok(Response::new(v1::RenewLockResponse { ttl_ms: 10_000 }))
    }

    async fn unlock(&self, request: Request<v1::UnlockRequest>) -> Answer<v1::UnlockResponse> {
        let request = request.into_inner();
        self.once("Unlock", request.request_id, |state| {
            let ended = if request.force {
                state.locks.remove(&request.path).map_or(0, |held| held.len())
            } else {
                state.check_lock(&request.path, request.token)?;
                let held = state.locks.get_mut(&request.path).unwrap();
                held.retain(|lock| lock.token != request.token);
                if held.is_empty() {
                    state.locks.remove(&request.path);
                }
                1
            };
            if ended == 0 {
                return Err(Error::new(Reason::LockLost, "nobody holds a lock"));
            }
            Ok(v1::UnlockResponse { revision: state.revision, ended: ended as u32 })
        })
    }

    async fn list_locks(&self, _: Request<v1::ListLocksRequest>) -> Answer<v1::ListLocksResponse> {
        let locks = self.0.state.lock().locks.values().flatten().cloned().collect();
        let answer = v1::ListLocksResponse { locks, next_page_token: String::new() };
        Ok(Response::new(told(&self.0.lies().list_locks, answer)))
    }

    async fn commit(&self, request: Request<v1::CommitRequest>) -> Answer<v1::CommitResponse> {
        let request = request.into_inner();
        let lies = self.0.lies();
        let honest = self.once("Commit", request.request_id.clone(), |state| state.commit(&request))?;
        Ok(Response::new(told(&lies.commit, honest.into_inner())))
    }

    async fn create(&self, request: Request<v1::CreateRequest>) -> Answer<v1::CreateResponse> {
        let request = request.into_inner();
        self.once("Create", request.request_id.clone(), |state| {
            state.check_parent(&request.path)?;
            if state.nodes.contains_key(&request.path) {
                return Err(Error::new(Reason::AlreadyExists, "it exists"));
            }
            state.check_lock(&request.path, request.token)?;
            state.revision += 1;
            let attributes = v1::Attributes {
                inode: state.id(),
                kind: request.kind,
                version: 1,
                mode: request.mode,
                replication: request.replication,
                xattrs: request.xattrs.clone(),
                ..Default::default()
            };
            let node = Node { attributes: attributes.clone(), ..Default::default() };
            state.nodes.insert(request.path.clone(), node);
            Ok(v1::CreateResponse { attributes: Some(attributes), revision: state.revision })
        })
    }

    async fn delete(&self, request: Request<v1::DeleteRequest>) -> Answer<v1::DeleteResponse> {
        let request = request.into_inner();
        self.once("Delete", request.request_id.clone(), |state| {
            state.node(&request.path)?;
            let inside = format!("{}/", request.path);
            if !request.recursive {
                if state.nodes.keys().any(|path| path.starts_with(&inside)) {
                    return Err(Error::new(Reason::NotEmpty, "it has entries"));
                }
                state.check_lock(&request.path, request.token)?;
                state.check_condition(&request.path, request.condition.as_ref())?;
                state.nodes.remove(&request.path);
                return Ok(v1::DeleteResponse { removed: 1, ..Default::default() });
            }
            // Five entries a step, deepest first.
            let mut answer = v1::DeleteResponse::default();
            let mut paths: Vec<_> = state
                .nodes
                .keys()
                .filter(|path| **path == request.path || path.starts_with(&inside))
                .cloned()
                .collect();
            paths.reverse();
            for path in paths {
                if !request.page_token.is_empty() && path >= request.page_token {
                    continue;
                }
                let below = format!("{path}/");
                if let Some(held) = state.locks.get(&path) {
                    answer.kept.extend(held.iter().cloned());
                } else if !state.nodes.keys().any(|other| other.starts_with(&below)) {
                    state.nodes.remove(&path);
                    answer.removed += 1;
                }
                answer.next_page_token = path;
                if answer.removed == 5 {
                    answer.more = true;
                    break;
                }
            }
            Ok(answer)
        })
    }

    async fn rename(&self, request: Request<v1::RenameRequest>) -> Answer<v1::RenameResponse> {
        let request = request.into_inner();
        self.once("Rename", request.request_id.clone(), |state| {
            state.check_lock(&request.from, request.token)?;
            state.check_lock(&request.to, request.replaced_token)?;
            state.check_condition(&request.to, request.condition.as_ref())?;
            let node = state.node(&request.from)?.clone();
            state.nodes.remove(&request.from);
            state.nodes.insert(request.to.clone(), node.clone());
            Ok(v1::RenameResponse { attributes: Some(node.attributes), revision: state.revision })
        })
    }

    async fn set_attributes(
        &self,
        request: Request<v1::SetAttributesRequest>,
    ) -> Answer<v1::SetAttributesResponse> {
        let request = request.into_inner();
        self.once("SetAttributes", request.request_id.clone(), |state| {
            let node = state.nodes.get_mut(&request.path).ok_or_else(|| Error::not_found("none"))?;
            node.attributes.mode = request.mode.unwrap_or(node.attributes.mode);
            node.attributes.replication = request.replication.unwrap_or(node.attributes.replication);
            node.attributes.mtime_ns = request.mtime_ns.unwrap_or(node.attributes.mtime_ns);
            Ok(v1::SetAttributesResponse { attributes: Some(node.attributes.clone()), revision: 1 })
        })
    }

    async fn watch(&self, request: Request<v1::WatchRequest>) -> Answer<Self::WatchStream> {
        self.note("Watch");
        let from = request.into_inner().from_revision;
        // Two changes at each revision; the stream breaks after three messages, until revision 6 was told.
        let changes = (from.max(1)..=6).flat_map(|revision| {
            ["a", "b"].map(|name| v1::WatchResponse { revision, name: name.to_owned(), ..Default::default() })
        });
        let mut items: Vec<_> = changes.take(3).map(Ok).collect();
        items.push(Err(Status::unavailable("broken")));
        Ok(Response::new(Box::pin(tokio_stream::iter(items))))
    }
}

#[tonic::async_trait]
impl SessionService for DirectoryFace {
    type KeepAliveStream = ReceiverStream<Result<v1::KeepAliveResponse, Status>>;

    async fn open(&self, request: Request<v1::OpenRequest>) -> Answer<v1::OpenResponse> {
        self.note("Open");
        self.fault("Open", false)?;
        let request = request.into_inner();
        assert!(!request.request_id.unwrap().uuid.is_empty());
        let mut state = self.0.state.lock();
        let session_id = state.id();
        state.sessions.insert(session_id);
        let answer = v1::OpenResponse {
            session_id,
            ttl_ms: request.ttl_ms,
            generation: 1,
            cluster_id: "fake".into(),
            directories: Vec::new(),
        };
        Ok(Response::new(told(&self.0.lies().open, answer)))
    }

    async fn keep_alive(
        &self,
        request: Request<Streaming<v1::KeepAliveRequest>>,
    ) -> Answer<Self::KeepAliveStream> {
        self.fault("KeepAlive", false)?;
        let mut messages = request.into_inner();
        let (sender, receiver) = tokio::sync::mpsc::channel(4);
        let cluster = self.0.clone();
        tokio::spawn(async move {
            while let Ok(Some(message)) = messages.message().await {
                let alive = {
                    let mut state = cluster.state.lock();
                    state.renewals += 1;
                    state.oldest_revision = message.oldest_revision;
                    state.sessions.contains(&message.session_id)
                };
                let answer = match alive {
                    true => {
                        Ok(v1::KeepAliveResponse { session_id: message.session_id, ..Default::default() })
                    }
                    false => Err(Error::new(Reason::SessionExpired, "the session has ended").into()),
                };
                if sender.send(answer).await.is_err() || !alive {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn close(&self, request: Request<v1::CloseRequest>) -> Answer<v1::CloseResponse> {
        self.note("Close");
        self.0.state.lock().end_session(request.into_inner().session_id);
        Ok(Response::new(v1::CloseResponse {}))
    }

    async fn grant(&self, request: Request<v1::GrantRequest>) -> Answer<v1::GrantResponse> {
        self.note("Grant");
        self.fault("Grant", false)?;
        let request = request.into_inner();
        let mut state = self.0.state.lock();
        state.grant_requests.push(request.clone());
        if !state.sessions.contains(&request.session_id) {
            return Err(Error::new(Reason::SessionExpired, "the session has ended").into());
        }
        let grant = state.grant(request.session_id, request.count, &request.avoid_server_ids);
        let grant = told(&self.0.lies().grant, grant);
        Ok(Response::new(v1::GrantResponse { grant: Some(grant) }))
    }
}

#[tonic::async_trait]
impl ClusterService for DirectoryFace {
    async fn register(&self, _: Request<v1::RegisterRequest>) -> Answer<v1::RegisterResponse> {
        Err(Status::unimplemented(""))
    }
    type BackupStream = futures::stream::Empty<Result<v1::BackupResponse, Status>>;
    async fn backup(&self, _: Request<v1::BackupRequest>) -> Answer<Self::BackupStream> {
        Err(Status::unimplemented(""))
    }
    async fn heartbeat(&self, _: Request<v1::HeartbeatRequest>) -> Answer<v1::HeartbeatResponse> {
        Err(Status::unimplemented(""))
    }
    async fn topology(&self, _: Request<v1::TopologyRequest>) -> Answer<v1::TopologyResponse> {
        self.note("Topology");
        let state = self.0.state.lock();
        Ok(Response::new(v1::TopologyResponse {
            groups: state.groups.values().cloned().collect(),
            servers: state.servers.clone(),
            ..Default::default()
        }))
    }
    async fn status(&self, _: Request<v1::StatusRequest>) -> Answer<v1::StatusResponse> {
        self.fault("Status", false)?;
        Ok(Response::new(v1::StatusResponse { files: 42, ..Default::default() }))
    }
    async fn explain(&self, request: Request<v1::ExplainRequest>) -> Answer<v1::ExplainResponse> {
        let request = request.into_inner();
        let next_page_token = if request.page_token.is_empty() { "2".into() } else { String::new() };
        let chunks = vec![v1::ChunkStatus::default()];
        let answer = v1::ExplainResponse { chunks, next_page_token, ..Default::default() };
        Ok(Response::new(told(&self.0.lies().explain, answer)))
    }
    async fn drain(&self, _: Request<v1::DrainRequest>) -> Answer<v1::DrainResponse> {
        Ok(Response::new(v1::DrainResponse { drained: true, ..Default::default() }))
    }
    async fn forget(&self, _: Request<v1::ForgetRequest>) -> Answer<v1::ForgetResponse> {
        Ok(Response::new(v1::ForgetResponse {}))
    }
    async fn report_bad_chunk(
        &self,
        request: Request<v1::ReportBadChunkRequest>,
    ) -> Answer<v1::ReportBadChunkResponse> {
        self.0.state.lock().reports.push(request.into_inner());
        Ok(Response::new(v1::ReportBadChunkResponse {}))
    }
    async fn force_rebuild(&self, _: Request<v1::ForceRebuildRequest>) -> Answer<v1::ForceRebuildResponse> {
        Err(Error::new(Reason::NotSupported, "nothing is being rebuilt").into())
    }
}
