//! File servers that keep everything in a map, and a directory among them.
#![allow(clippy::unwrap_used, missing_docs)]

use cairn_proto::{
    Error, Reason,
    host::Host,
    id::ChunkId,
    net::{SystemNetwork, Traffic, accept_tcp, channel},
    v1::{
        self,
        cluster_service_client::ClusterServiceClient,
        directory_service_client::DirectoryServiceClient,
        file_service_server::{FileService, FileServiceServer},
        replica_service_server::{ReplicaService, ReplicaServiceServer},
        session_service_client::SessionServiceClient,
    },
};
use dir_service::{App, Config, Effort, Timing};
use disk::{Disk, SimDisk};
use futures::{StreamExt as _, stream, stream::BoxStream};
use parking_lot::Mutex;
use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
    sync::Arc,
    time::Duration,
};
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming, transport::Channel};

/// Times that fit a test.
pub fn timing() -> Timing {
    Timing {
        heartbeat_interval_ms: 40,
        suspect_ms: 400,
        dead_ms: 1_000,
        late_copy_ms: 300,
        session_ttl_ms: 1_000,
        grace_ms: 200,
        compare_interval_ms: 250,
        forming_wait_ms: 150,
        background_interval_ms: 25,
        grant_keep_ms: 300,
        ..Timing::default()
    }
}

/// What a file server keeps.
#[derive(Clone, Default)]
pub struct Kept {
    pub cluster_id: String,
    pub server_id: u64,
    pub generation: u64,
    pub topology: v1::TopologyResponse,
    pub chunks: BTreeMap<ChunkId, v1::ChunkRef>,
    pub journal: Option<Journal>,
    /// It takes nothing of the journal.
    pub deaf: bool,
}

/// A copy of the journal.
#[derive(Clone, Default)]
pub struct Journal {
    pub generation: u64,
    pub checkpoint: u64,
    pub durable: u64,
    pub entries: Vec<v1::CheckpointEntry>,
    pub records: Vec<v1::JournalRecord>,
    pub carriers: Vec<u64>,
}

type Net = Arc<Mutex<HashMap<u64, Arc<Mutex<Kept>>>>>;

#[derive(Clone)]
struct Handler {
    kept: Arc<Mutex<Kept>>,
    net: Net,
}

/// A file server. Its disk outlives its process.
pub struct Fake {
    pub kept: Arc<Mutex<Kept>>,
    disk_id: String,
    life: u32,
    address: std::net::SocketAddr,
    net: Net,
    tasks: Vec<JoinHandle<()>>,
}

impl Fake {
    pub fn holds(&self, chunk: ChunkId) -> bool {
        self.kept.lock().chunks.contains_key(&chunk)
    }

    pub fn holds_how_many(&self) -> usize {
        self.kept.lock().chunks.len()
    }

    pub fn id(&self) -> u64 {
        self.kept.lock().server_id
    }

    pub fn kill(&mut self) {
        self.tasks.drain(..).for_each(|task| task.abort());
    }

    pub fn request(&self) -> v1::RegisterRequest {
        let kept = self.kept.lock();
        v1::RegisterRequest {
            cluster_id: kept.cluster_id.clone(),
            server_id: kept.server_id,
            disk_id: self.disk_id.clone(),
            incarnation: format!("{}-{}", self.disk_id, self.life),
            endpoints: vec![v1::Endpoint { uri: format!("http://{}", self.address), scope: 1 }],
            zone: String::new(),
            generation: kept.generation,
            journals: copies(&kept),
            usage: Some(usage(&kept)),
            ..Default::default()
        }
    }

    pub async fn start(&mut self, directory: &str) {
        self.life += 1;
        let listener = loop {
            // The killed life may still hold the port for a moment.
            match TcpListener::bind(self.address).await {
                Ok(listener) => break listener,
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        };
        self.address = listener.local_addr().unwrap();
        let handler = Handler { kept: self.kept.clone(), net: self.net.clone() };
        let router = cairn_proto::net::server(Traffic::Small, cairn_proto::net::Room::Roomy)
            .add_service(FileServiceServer::new(handler.clone()))
            .add_service(ReplicaServiceServer::new(handler));
        self.tasks.push(tokio::spawn(async move {
            let _ = router.serve_with_incoming(accept_tcp(listener)).await;
        }));
        let (kept, net, request) = (self.kept.clone(), self.net.clone(), self.request());
        let channel = channel_to(directory);
        self.tasks.push(tokio::spawn(live(kept, net, request, ClusterServiceClient::new(channel))));
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.kill();
    }
}

fn usage(kept: &Kept) -> v1::Usage {
    let used_bytes = kept.chunks.values().map(|chunk| chunk.length).sum();
    v1::Usage {
        total_bytes: 1 << 40,
        free_bytes: 1 << 39,
        used_bytes,
        chunks: kept.chunks.len() as u64,
        ..Default::default()
    }
}

fn copies(kept: &Kept) -> Vec<v1::JournalCopy> {
    let copy = |journal: &Journal| v1::JournalCopy {
        cluster_id: kept.cluster_id.clone(),
        generation: journal.generation,
        checkpoint_revision: journal.checkpoint,
        durable_revision: journal.durable,
        carrier_ids: journal.carriers.clone(),
    };
    kept.journal.iter().map(copy).collect()
}

async fn live(
    kept: Arc<Mutex<Kept>>,
    net: Net,
    first: v1::RegisterRequest,
    mut directory: ClusterServiceClient<Channel>,
) {
    let mut registered = false;
    loop {
        let now = kept.lock().clone();
        let topology = if registered {
            let heartbeat = v1::HeartbeatRequest {
                cluster_id: now.cluster_id.clone(),
                server_id: now.server_id,
                incarnation: first.incarnation.clone(),
                usage: Some(usage(&now)),
                topology_revision: now.topology.revision,
                journals: copies(&now),
                ..Default::default()
            };
            match directory.heartbeat(heartbeat).await {
                Ok(answer) => answer.into_inner().topology,
                Err(status) => {
                    registered &= Error::from(status).reason != Reason::NotFound;
                    None
                }
            }
        } else {
            let request = v1::RegisterRequest {
                cluster_id: now.cluster_id.clone(),
                server_id: now.server_id,
                generation: now.generation,
                journals: copies(&now),
                usage: Some(usage(&now)),
                ..first.clone()
            };
            match directory.register(request).await {
                Ok(answer) => {
                    let answer = answer.into_inner();
                    registered = true;
                    let mut mine = kept.lock();
                    mine.cluster_id = answer.cluster_id;
                    mine.server_id = answer.server_id;
                    mine.generation = mine.generation.max(answer.generation);
                    net.lock().insert(answer.server_id, kept.clone());
                    answer.topology
                }
                Err(_) => None,
            }
        };
        if let Some(topology) = topology {
            adopt(&mut kept.lock(), topology);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn adopt(kept: &mut Kept, topology: v1::TopologyResponse) {
    let known = (kept.topology.generation, kept.topology.revision);
    if (topology.generation, topology.revision) > known {
        kept.generation = kept.generation.max(topology.generation);
        kept.topology = topology;
    }
}

#[tonic::async_trait]
impl FileService for Handler {
    type ReadStream = BoxStream<'static, Result<v1::ReadResponse, Status>>;
    type ReadManyStream = BoxStream<'static, Result<v1::ReadManyResponse, Status>>;
    type WriteStream = BoxStream<'static, Result<v1::WriteResponse, Status>>;
    type FetchFromPrimaryStream = BoxStream<'static, Result<v1::FetchFromPrimaryResponse, Status>>;
    type InventoryStream = BoxStream<'static, Result<v1::InventoryResponse, Status>>;

    async fn read(&self, _: Request<v1::ReadRequest>) -> Result<Response<Self::ReadStream>, Status> {
        Err(Status::unimplemented("not needed"))
    }

    async fn read_many(
        &self,
        _: Request<v1::ReadManyRequest>,
    ) -> Result<Response<Self::ReadManyStream>, Status> {
        Err(Status::unimplemented("not needed"))
    }

    async fn write(
        &self,
        _: Request<Streaming<v1::WriteRequest>>,
    ) -> Result<Response<Self::WriteStream>, Status> {
        Err(Status::unimplemented("not needed"))
    }

    async fn fetch_from_primary(
        &self,
        request: Request<v1::FetchFromPrimaryRequest>,
    ) -> Result<Response<Self::FetchFromPrimaryStream>, Status> {
        let request = request.into_inner();
        let source = self.net.lock().get(&request.source.unwrap().id).cloned();
        let source = source.map(|source| source.lock().chunks.clone()).unwrap_or_default();
        let mut answers = Vec::new();
        for chunk in request.chunks {
            let id = ChunkId::from(chunk.chunk.unwrap());
            let stored = source.contains_key(&id);
            if stored {
                self.kept.lock().chunks.insert(id, chunk);
            }
            answers.push(Ok(v1::FetchFromPrimaryResponse {
                chunk: chunk.chunk,
                stored,
                error: String::new(),
            }));
        }
        Ok(Response::new(stream::iter(answers).boxed()))
    }

    async fn inventory(
        &self,
        request: Request<v1::InventoryRequest>,
    ) -> Result<Response<Self::InventoryStream>, Status> {
        let request = request.into_inner();
        let chunks = self.kept.lock().chunks.clone();
        let mut part = v1::InventoryResponse::default();
        if request.detail() == v1::InventoryDetail::Chunks {
            let wanted = request.grant_id_from..=request.grant_id_to;
            part.chunks = chunks
                .into_iter()
                .filter(|(id, _)| wanted.contains(&id.grant.0))
                .map(|(_, chunk)| v1::HeldChunk { chunk: Some(chunk), ..Default::default() })
                .collect();
        } else {
            let mut digests: BTreeMap<u64, v1::GrantDigest> = BTreeMap::new();
            for (id, chunk) in chunks {
                let digest = digests.entry(id.grant.0).or_default();
                digest.grant_id = id.grant.0;
                digest.chunk_count += 1;
                let term = cairn_proto::checksum::digest_term(id, chunk.length, chunk.checksum);
                digest.digest = digest.digest.wrapping_add(term);
            }
            part.digests = digests.into_values().collect();
        }
        Ok(Response::new(stream::iter([Ok(part)]).boxed()))
    }
}

#[tonic::async_trait]
impl ReplicaService for Handler {
    type ReplicateStream = BoxStream<'static, Result<v1::ReplicateResponse, Status>>;
    type ReadJournalStream = BoxStream<'static, Result<v1::ReadJournalResponse, Status>>;

    async fn replicate(
        &self,
        _: Request<Streaming<v1::ReplicateRequest>>,
    ) -> Result<Response<Self::ReplicateStream>, Status> {
        Err(Status::unimplemented("not needed"))
    }

    async fn follow(
        &self,
        request: Request<v1::FollowRequest>,
    ) -> Result<Response<v1::FollowResponse>, Status> {
        let kept = self.kept.lock();
        Ok(Response::new(v1::FollowResponse {
            outcome: v1::FollowOutcome::Followed as i32,
            current: request.into_inner().life,
            journals: copies(&kept),
            ..Default::default()
        }))
    }

    async fn confirm(
        &self,
        request: Request<v1::ConfirmRequest>,
    ) -> Result<Response<v1::ConfirmResponse>, Status> {
        let kept = self.kept.lock();
        let ids = request.into_inner().chunks.into_iter().filter_map(|chunk| chunk.chunk);
        let missing = ids.filter(|chunk| !kept.chunks.contains_key(&ChunkId::from(chunk))).collect();
        Ok(Response::new(v1::ConfirmResponse { missing }))
    }

    async fn collect(
        &self,
        request: Request<v1::CollectRequest>,
    ) -> Result<Response<v1::CollectResponse>, Status> {
        let mut kept = self.kept.lock();
        let request = request.into_inner();
        for chunk in &request.chunks {
            kept.chunks.remove(&ChunkId::from(chunk));
        }
        Ok(Response::new(v1::CollectResponse { removed: request.chunks.len() as u64, freed_bytes: 0 }))
    }

    async fn compose(
        &self,
        request: Request<v1::ComposeRequest>,
    ) -> Result<Response<v1::ComposeResponse>, Status> {
        let request = request.into_inner();
        let group =
            self.kept.lock().topology.groups.iter().find(|group| group.id == request.group_id).cloned();
        let members: Vec<u64> =
            group.iter().flat_map(|group| &group.seats).map(|seat| seat.server_id).collect();
        let chunk = v1::ChunkRef {
            chunk: request.chunk,
            length: request.parts.iter().map(|part| part.length).sum(),
            checksum: 7,
            group_id: request.group_id,
        };
        let id = ChunkId::from(request.chunk.unwrap());
        let holders: Vec<_> = members.iter().filter_map(|id| self.net.lock().get(id).cloned()).collect();
        for kept in holders {
            kept.lock().chunks.insert(id, chunk);
        }
        let receipt = v1::Receipt {
            chunk: request.chunk,
            group_id: request.group_id,
            epoch: request.epoch,
            length: chunk.length,
            checksum: chunk.checksum,
            holder_ids: members,
            mac: Vec::new().into(),
        };
        Ok(Response::new(v1::ComposeResponse { receipt: Some(receipt) }))
    }

    async fn adopt(&self, request: Request<v1::AdoptRequest>) -> Result<Response<v1::AdoptResponse>, Status> {
        let mut kept = self.kept.lock();
        adopt(&mut kept, request.into_inner().topology.unwrap());
        Ok(Response::new(v1::AdoptResponse { revision: kept.topology.revision }))
    }

    async fn append_journal(
        &self,
        request: Request<v1::AppendJournalRequest>,
    ) -> Result<Response<v1::AppendJournalResponse>, Status> {
        let request = request.into_inner();
        let mut kept = self.kept.lock();
        if kept.deaf {
            return Err(Error::unavailable("deaf").into());
        }
        let compacted = || Error::new(Reason::RevisionCompacted, "send a checkpoint");
        let journal = kept.journal.as_mut().ok_or_else(compacted)?;
        if journal.generation != request.generation || journal.durable != request.previous_revision {
            return Err(compacted().into());
        }
        journal.durable = request.records.last().map_or(journal.durable, |record| record.revision);
        journal.records.extend(request.records);
        if !request.carrier_ids.is_empty() {
            journal.carriers = request.carrier_ids;
        }
        Ok(Response::new(v1::AppendJournalResponse { durable_revision: journal.durable }))
    }

    async fn install_checkpoint(
        &self,
        request: Request<Streaming<v1::InstallCheckpointRequest>>,
    ) -> Result<Response<v1::InstallCheckpointResponse>, Status> {
        if self.kept.lock().deaf {
            return Err(Error::unavailable("deaf").into());
        }
        let mut parts = request.into_inner();
        let mut journal = Journal::default();
        let mut complete = false;
        while let Some(part) = parts.message().await? {
            if part.generation != 0 {
                journal.generation = part.generation;
                journal.checkpoint = part.revision;
                journal.durable = part.revision;
                journal.carriers = part.carrier_ids;
            }
            journal.entries.extend(part.entries);
            complete |= part.entry_count == Some(journal.entries.len() as u64);
        }
        if !complete {
            return Err(Status::aborted("cut off"));
        }
        let durable_revision = journal.durable;
        self.kept.lock().journal = Some(journal);
        Ok(Response::new(v1::InstallCheckpointResponse { durable_revision }))
    }

    async fn read_journal(
        &self,
        request: Request<v1::ReadJournalRequest>,
    ) -> Result<Response<Self::ReadJournalStream>, Status> {
        let kept = self.kept.lock();
        let journal = kept.journal.clone().filter(|one| one.generation == request.get_ref().generation);
        let journal = journal.ok_or_else(|| Error::not_found("no copy of that generation"))?;
        let part = v1::ReadJournalResponse {
            checkpoint_revision: journal.checkpoint,
            entries: journal.entries,
            records: journal.records,
        };
        Ok(Response::new(stream::iter([Ok(part)]).boxed()))
    }
}

fn channel_to(uri: &str) -> Channel {
    let network: Arc<dyn cairn_proto::net::Connect> = Arc::new(SystemNetwork);
    channel(&network, uri, Traffic::Small).unwrap()
}

/// A directory and its file servers.
pub struct Stage {
    pub servers: Vec<Fake>,
    pub uri: String,
    pub disk: SimDisk,
    config: Config,
    net: Net,
    running: Option<(CancellationToken, JoinHandle<()>)>,
}

impl Stage {
    /// With so many file servers, serving.
    pub async fn start(servers: usize) -> Self {
        Self::start_with(servers, timing()).await
    }

    pub async fn start_with(servers: usize, timing: Timing) -> Self {
        Self::start_as(servers, timing, Effort { merge_delay_ms: 20, ..Effort::default() }).await
    }

    pub async fn start_as(servers: usize, timing: Timing, effort: Effort) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut stage = Self {
            servers: Vec::new(),
            uri: format!("http://{}", listener.local_addr().unwrap()),
            disk: SimDisk::new(1, 1 << 30),
            config: Config { timing, effort, ..Config::default() },
            net: Net::default(),
            running: None,
        };
        stage.serve(listener).await;
        for _ in 0..servers {
            stage.join().await;
        }
        stage.serving(servers).await;
        stage
    }

    async fn serve(&mut self, listener: TcpListener) {
        let disk: Arc<dyn Disk> = Arc::new(self.disk.clone());
        let seed = self.net.lock().len() as u64;
        let app = App::build(self.config.clone(), disk, Host::system(seed)).await.unwrap();
        let shutdown = CancellationToken::new();
        let stopped = shutdown.clone();
        let task = tokio::spawn(async move { app.serve(vec![accept_tcp(listener)], stopped).await.unwrap() });
        self.running = Some((shutdown, task));
    }

    /// One more file server with an empty disk.
    pub async fn join(&mut self) {
        let number = self.servers.len();
        let mut fake = Fake {
            kept: Arc::default(),
            disk_id: format!("disk-{number}"),
            life: 0,
            address: "127.0.0.1:0".parse().unwrap(),
            net: self.net.clone(),
            tasks: Vec::new(),
        };
        fake.start(&self.uri).await;
        self.servers.push(fake);
    }

    pub async fn stop(&mut self) {
        let (shutdown, task) = self.running.take().unwrap();
        shutdown.cancel();
        task.await.unwrap();
    }

    /// Starts the directory again, on this disk.
    pub async fn again(&mut self, disk: SimDisk) {
        self.disk = disk;
        let address = self.uri.strip_prefix("http://").unwrap().to_owned();
        let listener = loop {
            match TcpListener::bind(&address).await {
                Ok(listener) => break listener,
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        };
        self.serve(listener).await;
    }

    pub fn cluster(&self) -> ClusterServiceClient<Channel> {
        ClusterServiceClient::new(channel_to(&self.uri))
    }

    pub fn directory(&self) -> DirectoryServiceClient<Channel> {
        DirectoryServiceClient::new(channel_to(&self.uri))
    }

    pub async fn status(&self) -> v1::StatusResponse {
        self.cluster().status(v1::StatusRequest {}).await.map(Response::into_inner).unwrap_or_default()
    }

    /// Waits for a status; panics with the last one after 20 s.
    pub async fn until(&self, what: &str, holds: impl Fn(&v1::StatusResponse) -> bool) -> v1::StatusResponse {
        let mut last = v1::StatusResponse::default();
        for _ in 0..1_000 {
            last = self.status().await;
            if holds(&last) {
                return last;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("not within 20 s: {what}; last seen {last:#?}");
    }

    /// Waits until the directory serves and knows so many live servers.
    pub async fn serving(&self, servers: usize) -> v1::StatusResponse {
        self.until("serving with live servers", |status| {
            let live = status.file_servers.iter().filter(|one| {
                one.server.as_ref().is_some_and(|server| server.state() == v1::ServerState::Live)
            });
            status.directory.as_ref().is_some_and(|directory| directory.mode == "serving")
                && live.count() == servers
        })
        .await
    }

    pub async fn session(&self) -> u64 {
        let mut client = SessionServiceClient::new(channel_to(&self.uri));
        client.open(v1::OpenRequest::default()).await.unwrap().into_inner().session_id
    }

    pub async fn grant(&self, session_id: u64, avoid: &[u64]) -> Result<v1::Grant, Error> {
        let request = v1::GrantRequest { session_id, avoid_server_ids: avoid.to_vec(), ..Default::default() };
        self.grant_as(request).await
    }

    /// A grant of so many ids.
    pub async fn grant_of(&self, session_id: u64, count: u32) -> v1::Grant {
        self.grant_as(v1::GrantRequest { session_id, count, ..Default::default() }).await.unwrap()
    }

    async fn grant_as(&self, request: v1::GrantRequest) -> Result<v1::Grant, Error> {
        let mut client = SessionServiceClient::new(channel_to(&self.uri));
        Ok(client.grant(request).await?.into_inner().grant.unwrap())
    }

    /// Puts a chunk on some servers as if it had been written there, and commits it as a file.
    pub async fn write(&self, path: &str, grant: &v1::Grant, index: u32, holders: &[u64]) -> ChunkId {
        let id = ChunkId::new(grant.id, index);
        let group = grant.group.as_ref().unwrap();
        let chunk = v1::ChunkRef { chunk: Some(id.into()), length: 100, checksum: 7, group_id: group.id };
        for holder in holders {
            self.net.lock()[holder].lock().chunks.insert(id, chunk);
        }
        self.directory().commit(self.commit_of(path, grant, index, holders)).await.unwrap();
        id
    }

    /// The same with many chunks, appended to one file.
    pub async fn write_run(&self, path: &str, grant: &v1::Grant, indexes: Range<u32>, holders: &[u64]) {
        let group = grant.group.as_ref().unwrap();
        for holder in holders {
            let kept = self.net.lock()[holder].clone();
            let mut kept = kept.lock();
            for index in indexes.clone() {
                let id = ChunkId::new(grant.id, index);
                let chunk =
                    v1::ChunkRef { chunk: Some(id.into()), length: 100, checksum: 7, group_id: group.id };
                kept.chunks.insert(id, chunk);
            }
        }
        let commit = self.commit_of_many(path, grant, indexes, holders);
        self.directory().commit(commit).await.unwrap();
    }

    /// The commit of a file of one chunk.
    pub fn commit_of(&self, path: &str, grant: &v1::Grant, index: u32, holders: &[u64]) -> v1::CommitRequest {
        self.commit_of_many(path, grant, index..index + 1, holders)
    }

    fn commit_of_many(
        &self,
        path: &str,
        grant: &v1::Grant,
        indexes: Range<u32>,
        holders: &[u64],
    ) -> v1::CommitRequest {
        let group = grant.group.as_ref().unwrap();
        let receipt = |index| v1::Receipt {
            chunk: Some(ChunkId::new(grant.id, index).into()),
            group_id: group.id,
            epoch: group.epoch,
            length: 100,
            checksum: 7,
            holder_ids: holders.to_vec(),
            mac: Vec::new().into(),
        };
        let append =
            |receipt_index| v1::Edit { edit: Some(v1::edit::Edit::Append(v1::AppendEdit { receipt_index })) };
        v1::CommitRequest {
            path: path.into(),
            edits: (0..indexes.len() as u32).map(append).collect(),
            receipts: indexes.map(receipt).collect(),
            ..Default::default()
        }
    }

    pub async fn delete(&self, path: &str) {
        let request = v1::DeleteRequest { path: path.into(), ..Default::default() };
        self.directory().delete(request).await.unwrap();
    }
}
