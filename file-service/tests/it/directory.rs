//! A directory that only knows who is there, and keeps what it is told.

use cairn_proto::{
    Error, Reason,
    net::{self, Incoming, Room, Traffic},
    v1::{
        self,
        cluster_service_server::{ClusterService, ClusterServiceServer},
    },
};
use parking_lot::Mutex;
use std::{collections::BTreeMap, sync::Arc};
use tonic::{Request, Response, Status};

/// What it knows and was told.
#[derive(Debug)]
pub struct State {
    pub cluster_id: String,
    pub generation: u64,
    pub revision: u64,
    pub servers: BTreeMap<u64, v1::Server>,
    pub groups: Vec<v1::Group>,
    pub heartbeats: Vec<v1::HeartbeatRequest>,
    pub registers: Vec<v1::RegisterRequest>,
    pub topology_calls: usize,
    /// Answers NOT_FOUND to the next heartbeat.
    pub forget: bool,
}

/// The directory; clones are the same.
#[derive(Clone, Debug)]
pub struct FakeDirectory(pub Arc<Mutex<State>>);

impl FakeDirectory {
    pub fn new(cluster_id: &str) -> Self {
        Self(Arc::new(Mutex::new(State {
            cluster_id: cluster_id.to_owned(),
            generation: 1,
            revision: 1,
            servers: BTreeMap::new(),
            groups: Vec::new(),
            heartbeats: Vec::new(),
            registers: Vec::new(),
            topology_calls: 0,
            forget: false,
        })))
    }

    pub fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.0.lock();
        change(&mut state);
        state.revision += 1;
    }

    pub fn topology(&self) -> v1::TopologyResponse {
        self.0.lock().topology()
    }

    /// Serves until the task is dropped.
    pub async fn serve(self, incoming: Incoming) {
        net::server(Traffic::Small, Room::Roomy)
            .add_service(ClusterServiceServer::new(self))
            .serve_with_incoming(incoming)
            .await
            .unwrap();
    }
}

impl State {
    pub fn topology(&self) -> v1::TopologyResponse {
        v1::TopologyResponse {
            revision: self.revision,
            servers: self.servers.values().cloned().collect(),
            groups: self.groups.clone(),
            cluster_id: self.cluster_id.clone(),
            generation: self.generation,
            carrier_ids: Vec::new(),
            term: 0,
        }
    }
}

fn unimplemented<T>() -> Result<T, Status> {
    Err(Error::new(Reason::NotSupported, "not part of the test").into())
}

#[tonic::async_trait]
impl ClusterService for FakeDirectory {
    type BackupStream = futures::stream::Empty<Result<v1::BackupResponse, Status>>;

    async fn backup(
        &self,
        _request: Request<v1::BackupRequest>,
    ) -> Result<Response<Self::BackupStream>, Status> {
        unimplemented()
    }

    async fn register(
        &self,
        request: Request<v1::RegisterRequest>,
    ) -> Result<Response<v1::RegisterResponse>, Status> {
        let request = request.into_inner();
        let mut state = self.0.lock();
        state.registers.push(request.clone());
        if !request.cluster_id.is_empty() && request.cluster_id != state.cluster_id {
            return Err(Error::new(Reason::WrongCluster, "another cluster's disk").into());
        }
        // The zone of a test server is its number.
        let id: u64 = request.zone.parse().expect("a number");
        let server = v1::Server {
            id,
            incarnation: request.incarnation,
            endpoints: request.endpoints,
            zone: request.zone,
            state: v1::ServerState::Live as i32,
        };
        state.servers.insert(id, server);
        state.revision += 1;
        Ok(Response::new(v1::RegisterResponse {
            directories: Vec::new(),
            cluster_id: state.cluster_id.clone(),
            server_id: id,
            generation: state.generation,
            heartbeat_interval_ms: 100,
            topology: Some(state.topology()),
            rebuilding: false,
            life: None,
        }))
    }

    async fn heartbeat(
        &self,
        request: Request<v1::HeartbeatRequest>,
    ) -> Result<Response<v1::HeartbeatResponse>, Status> {
        let request = request.into_inner();
        let mut state = self.0.lock();
        let known = request.topology_revision;
        let is_known = state.servers.contains_key(&request.server_id);
        state.heartbeats.push(request);
        if std::mem::take(&mut state.forget) || !is_known {
            return Err(Error::not_found("no such server").into());
        }
        Ok(Response::new(v1::HeartbeatResponse {
            directories: Vec::new(),
            generation: state.generation,
            state: v1::ServerState::Live as i32,
            topology: (known != state.revision).then(|| state.topology()),
            life: None,
        }))
    }

    async fn topology(
        &self,
        _request: Request<v1::TopologyRequest>,
    ) -> Result<Response<v1::TopologyResponse>, Status> {
        let mut state = self.0.lock();
        state.topology_calls += 1;
        Ok(Response::new(state.topology()))
    }

    async fn status(&self, _: Request<v1::StatusRequest>) -> Result<Response<v1::StatusResponse>, Status> {
        unimplemented()
    }

    async fn explain(&self, _: Request<v1::ExplainRequest>) -> Result<Response<v1::ExplainResponse>, Status> {
        unimplemented()
    }

    async fn drain(&self, _: Request<v1::DrainRequest>) -> Result<Response<v1::DrainResponse>, Status> {
        unimplemented()
    }

    async fn forget(&self, _: Request<v1::ForgetRequest>) -> Result<Response<v1::ForgetResponse>, Status> {
        unimplemented()
    }

    async fn report_bad_chunk(
        &self,
        _: Request<v1::ReportBadChunkRequest>,
    ) -> Result<Response<v1::ReportBadChunkResponse>, Status> {
        unimplemented()
    }

    async fn force_rebuild(
        &self,
        _: Request<v1::ForceRebuildRequest>,
    ) -> Result<Response<v1::ForceRebuildResponse>, Status> {
        unimplemented()
    }
}
