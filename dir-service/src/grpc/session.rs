//! `SessionService`: sessions, their renewal, chunk ids.

use crate::{
    gate::Gate,
    ops::{grant, session},
};
use cairn_proto::v1::{self, session_service_server::SessionService};
use futures::{StreamExt, stream::BoxStream};
use std::sync::Arc;
use tonic::{Request, Response, Status, Streaming};

/// Serves sessions while the gate is open.
#[derive(Debug)]
pub struct SessionHandler {
    gate: Arc<Gate>,
}

impl SessionHandler {
    /// Behind a gate.
    pub fn new(gate: Arc<Gate>) -> Self {
        Self { gate }
    }
}

#[tonic::async_trait]
impl SessionService for SessionHandler {
    type KeepAliveStream = BoxStream<'static, Result<v1::KeepAliveResponse, Status>>;

    async fn open(&self, request: Request<v1::OpenRequest>) -> Result<Response<v1::OpenResponse>, Status> {
        let directory = self.gate.directory()?;
        Ok(Response::new(session::open(&directory, request.into_inner()).await?))
    }

    async fn keep_alive(
        &self,
        request: Request<Streaming<v1::KeepAliveRequest>>,
    ) -> Result<Response<Self::KeepAliveStream>, Status> {
        let gate = self.gate.clone();
        // The gate is asked for each message: a stream may live longer than a directory that serves.
        let answers = request.into_inner().then(move |message| {
            let gate = gate.clone();
            async move {
                let directory = gate.directory()?;
                Ok(session::keep_alive(&directory, message?).await?)
            }
        });
        Ok(Response::new(answers.boxed()))
    }

    async fn close(&self, request: Request<v1::CloseRequest>) -> Result<Response<v1::CloseResponse>, Status> {
        let directory = self.gate.directory()?;
        Ok(Response::new(session::close(&directory, request.into_inner()).await?))
    }

    async fn grant(&self, request: Request<v1::GrantRequest>) -> Result<Response<v1::GrantResponse>, Status> {
        let directory = self.gate.directory()?;
        Ok(Response::new(grant::grant(&directory, request.into_inner()).await?))
    }
}
