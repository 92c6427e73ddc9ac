//! `ClusterService`: servers join, report, are shown and drained.

use crate::{
    gate::{Gate, Mode},
    ops::{backup, explain, status},
    rebuild::Lobby,
};
use cairn_proto::{
    Error, Reason,
    id::{ChunkId, ServerId},
    v1::{self, cluster_service_server::ClusterService},
};
use futures::{StreamExt as _, TryStreamExt as _, stream::BoxStream};
use std::{sync::Arc, time::Duration};
use tonic::{Request, Response, Status};

/// How long a blank file server's registration is held while the cluster forms, so that it need not ask again.
const HOLD: Duration = Duration::from_millis(700);

/// Serves file servers and operators, also while the gate is closed.
#[derive(Debug)]
pub struct ClusterHandler {
    gate: Arc<Gate>,
    lobby: Arc<Lobby>,
}

impl ClusterHandler {
    /// Behind a gate, with a lobby for those who find it closed.
    pub fn new(gate: Arc<Gate>, lobby: Arc<Lobby>) -> Self {
        Self { gate, lobby }
    }
}

#[tonic::async_trait]
impl ClusterService for ClusterHandler {
    type BackupStream = BoxStream<'static, Result<v1::BackupResponse, Status>>;

    async fn backup(
        &self,
        _request: Request<v1::BackupRequest>,
    ) -> Result<Response<Self::BackupStream>, Status> {
        let directory = self.gate.directory()?;
        let parts = backup::backup(&directory)?;
        Ok(Response::new(parts.map_err(Status::from).boxed()))
    }

    async fn register(
        &self,
        request: Request<v1::RegisterRequest>,
    ) -> Result<Response<v1::RegisterResponse>, Status> {
        let request = request.into_inner();
        let mut modes = self.gate.watch();
        let mode = self.gate.mode();
        if let Mode::Forming { .. } | Mode::Rebuilding { .. } | Mode::Confirming { .. } = mode {
            let answer = self.lobby.register(request.clone());
            // A store is confirmed within moments, mostly: the answer then is that of the directory.
            if answer.is_ok() && !matches!(mode, Mode::Confirming { .. }) {
                return Ok(Response::new(answer?));
            }
            let open = modes.wait_for(|mode| matches!(mode, Mode::Serving(_) | Mode::Stopped));
            if tokio::time::timeout(HOLD, open).await.is_err() {
                return Ok(Response::new(answer?));
            }
        }
        let directory = self.gate.directory()?;
        Ok(Response::new(directory.cluster.register(request).await?))
    }

    async fn heartbeat(
        &self,
        request: Request<v1::HeartbeatRequest>,
    ) -> Result<Response<v1::HeartbeatResponse>, Status> {
        let request = request.into_inner();
        if let Mode::Forming { .. } | Mode::Rebuilding { .. } | Mode::Confirming { .. } = self.gate.mode() {
            return Ok(Response::new(self.lobby.heartbeat(request)?));
        }
        Ok(Response::new(self.gate.directory()?.cluster.heartbeat(request)?))
    }

    async fn topology(
        &self,
        request: Request<v1::TopologyRequest>,
    ) -> Result<Response<v1::TopologyResponse>, Status> {
        let known_revision = request.into_inner().known_revision;
        Ok(Response::new(self.gate.directory()?.cluster.topology(known_revision)))
    }

    async fn status(
        &self,
        _request: Request<v1::StatusRequest>,
    ) -> Result<Response<v1::StatusResponse>, Status> {
        let mode = self.gate.mode();
        let reason = match &mode {
            Mode::Serving(directory) => return Ok(Response::new(status::status(directory).await?)),
            Mode::Forming { reason }
            | Mode::Rebuilding { reason }
            | Mode::Confirming { reason }
            | Mode::Joining { reason } => reason.clone(),
            Mode::Stopped => String::new(),
        };
        let directory = v1::DirectoryStatus { mode: mode.name().into(), reason, ..Default::default() };
        Ok(Response::new(v1::StatusResponse { directory: Some(directory), ..Default::default() }))
    }

    async fn explain(
        &self,
        request: Request<v1::ExplainRequest>,
    ) -> Result<Response<v1::ExplainResponse>, Status> {
        let directory = self.gate.directory()?;
        Ok(Response::new(explain::explain(&directory, request.into_inner()).await?))
    }

    async fn drain(&self, request: Request<v1::DrainRequest>) -> Result<Response<v1::DrainResponse>, Status> {
        let request = request.into_inner();
        let directory = self.gate.directory()?;
        Ok(Response::new(directory.cluster.drain(ServerId(request.server_id), !request.cancel).await?))
    }

    async fn forget(
        &self,
        request: Request<v1::ForgetRequest>,
    ) -> Result<Response<v1::ForgetResponse>, Status> {
        let directory = self.gate.directory()?;
        directory.cluster.forget(ServerId(request.into_inner().server_id)).await?;
        Ok(Response::new(v1::ForgetResponse {}))
    }

    async fn report_bad_chunk(
        &self,
        request: Request<v1::ReportBadChunkRequest>,
    ) -> Result<Response<v1::ReportBadChunkResponse>, Status> {
        let request = request.into_inner();
        let directory = self.gate.directory()?;
        let chunk = cairn_proto::convert::required(request.chunk, "chunk")?;
        let id: ChunkId = cairn_proto::convert::chunk_id(chunk.chunk.as_ref())?;
        directory.cluster.reported_bad(ServerId(request.server_id), id)?;
        tracing::warn!(chunk = %id, server = request.server_id, reason = %request.reason, "a client met a bad copy");
        Ok(Response::new(v1::ReportBadChunkResponse {}))
    }

    async fn force_rebuild(
        &self,
        _request: Request<v1::ForceRebuildRequest>,
    ) -> Result<Response<v1::ForceRebuildResponse>, Status> {
        match self.gate.mode() {
            Mode::Rebuilding { .. } => {
                let revision = self.lobby.force().await?;
                Ok(Response::new(v1::ForceRebuildResponse { revision }))
            }
            Mode::Confirming { .. } => {
                let mut modes = self.gate.watch();
                self.lobby.accept();
                let _ = modes.wait_for(|mode| matches!(mode, Mode::Serving(_) | Mode::Stopped)).await;
                let revision = self.gate.directory()?.store.revision().await?.0;
                Ok(Response::new(v1::ForceRebuildResponse { revision }))
            }
            mode => Err(Error::new(
                Reason::NotSupported,
                format!("the directory is {}, nothing is being rebuilt", mode.name()),
            )
            .into()),
        }
    }
}
