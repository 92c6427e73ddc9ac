//! A network on which somebody else answers some of the calls to a file server.
//!
//! ```text
//! service --connection--> Between --path of the lie?--yes--> Lie
//!                            \--no--> the real server
//! ```

use crate::plant::Plant;
use async_trait::async_trait;
use bytes::Bytes;
use cairn_core::plan::{Mutation, Plan};
use cairn_proto::{
    net::{Connect, Io, Room, SERVER_HEADER, Traffic, Wire, channel, server},
    v1::{
        self,
        replica_service_client::ReplicaServiceClient,
        replica_service_server::{ReplicaService, ReplicaServiceServer},
    },
};
use cluster::{Builder, Cluster, Role};
use dir_service::store::codec;
use futures::{StreamExt as _, stream, stream::BoxStream};
use std::{
    convert::Infallible,
    future::Future,
    io,
    marker::PhantomData,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};
use tonic::{
    Request, Response, Status, Streaming,
    body::Body,
    codegen::{Service, http},
    server::NamedService,
    transport::Channel,
};
use tower::ServiceExt as _;

const REPLICATE: &str = "/cairn.v1.ReplicaService/Replicate";
const READ_JOURNAL: &str = "/cairn.v1.ReplicaService/ReadJournal";
/// Bytes between the two ends of a connection.
const PIPE_BYTES: usize = 1024 * 1024;

/// File servers whose followers acknowledge every chunk and store none.
pub fn hollow_copies(plant: Arc<Plant>) -> Builder {
    meddled(plant, |role| matches!(role, Role::FileServer(_)).then_some(REPLICATE))
}

/// A directory that is read journals without the plans that deleted a name.
pub fn forgotten_deletes(plant: Arc<Plant>) -> Builder {
    meddled(plant, |role| (role == Role::Directory).then_some(READ_JOURNAL))
}

fn meddled(plant: Arc<Plant>, of: fn(Role) -> Option<&'static str>) -> Builder {
    Cluster::builder().network_wrapper(move |role, inner| match of(role) {
        Some(path) => Arc::new(Meddled { inner, path, plant: plant.clone() }),
        None => inner,
    })
}

/// Connects to somebody in between.
#[derive(Debug)]
struct Meddled {
    inner: Arc<dyn Connect>,
    path: &'static str,
    plant: Arc<Plant>,
}

#[async_trait]
impl Connect for Meddled {
    async fn connect(&self, uri: &str) -> io::Result<Box<dyn Io>> {
        // Whoever is not there cannot be connected to.
        drop(self.inner.connect(uri).await?);
        let real = channel(&self.inner, uri, Traffic::Bulk).map_err(io::Error::other)?;
        let (near, far) = tokio::io::duplex(PIPE_BYTES);
        let lie = Lie { real: real.clone(), path: self.path, plant: self.plant.clone() };
        let serving = server(Traffic::Bulk, Room::Roomy)
            .add_service(Between::<Replica>::new(lie.clone()))
            .add_service(Between::<File>::new(lie.clone()))
            .add_service(Between::<Registry>::new(lie.clone()))
            .add_service(Between::<Health>::new(lie))
            .serve_with_incoming(stream::iter([Ok::<_, io::Error>(Wire::new(far))]).chain(stream::pending()));
        let serving = tokio::spawn(serving);
        Ok(Box::new(Near { io: near, serving }))
    }
}

/// The near end of a connection; the service in between ends with it.
struct Near {
    io: tokio::io::DuplexStream,
    serving: tokio::task::JoinHandle<Result<(), tonic::transport::Error>>,
}

impl Drop for Near {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl tokio::io::AsyncRead for Near {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut tokio::io::ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl tokio::io::AsyncWrite for Near {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

/// Passes the calls of one service on, but for the one that is lied about.
struct Between<N> {
    lie: Lie,
    name: PhantomData<fn() -> N>,
}

impl<N> Between<N> {
    fn new(lie: Lie) -> Self {
        Self { lie, name: PhantomData }
    }
}

impl<N> Clone for Between<N> {
    fn clone(&self) -> Self {
        Self::new(self.lie.clone())
    }
}

macro_rules! services {
    ($($name:ident: $wire:literal),*) => {
        $(
            enum $name {}

            impl NamedService for Between<$name> {
                const NAME: &'static str = $wire;
            }
        )*
    };
}

services!(
    Replica: "cairn.v1.ReplicaService",
    File: "cairn.v1.FileService",
    Registry: "cairn.v1.ClusterService",
    Health: "grpc.health.v1.Health"
);

impl<N: 'static> Service<http::Request<Body>> for Between<N> {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        if self.lie.plant.is_armed() && request.uri().path() == self.lie.path {
            return ReplicaServiceServer::new(self.lie.clone()).call(request);
        }
        let real = self.lie.real.clone();
        Box::pin(async move {
            let answer = real.oneshot(request).await;
            Ok(answer.unwrap_or_else(|error| Status::unavailable(error.to_string()).into_http()))
        })
    }
}

/// Answers in a real server's name.
#[derive(Clone, Debug)]
struct Lie {
    real: Channel,
    path: &'static str,
    plant: Arc<Plant>,
}

type Answers<T> = BoxStream<'static, Result<T, Status>>;

/// A chunk on its way: its id, group and epoch.
type Begun = Option<(v1::ChunkId, u64, u64)>;

#[tonic::async_trait]
impl ReplicaService for Lie {
    type ReplicateStream = Answers<v1::ReplicateResponse>;
    type ReadJournalStream = Answers<v1::ReadJournalResponse>;

    /// Acknowledges each chunk and forgets it.
    async fn replicate(
        &self,
        request: Request<Streaming<v1::ReplicateRequest>>,
    ) -> Result<Response<Self::ReplicateStream>, Status> {
        let me = request.metadata().get(SERVER_HEADER).and_then(|value| value.to_str().ok()?.parse().ok());
        let me: u64 = me.ok_or_else(|| Status::invalid_argument("for whom?"))?;
        let plant = self.plant.clone();
        let begun: Begun = None;
        let answers = stream::unfold((request.into_inner(), begun), move |(mut messages, mut begun)| {
            let plant = plant.clone();
            async move {
                loop {
                    let write = match messages.message().await {
                        Ok(Some(message)) => message.write.unwrap_or_default(),
                        Ok(None) => return None,
                        Err(status) => return Some((Err(status), (messages, begun))),
                    };
                    if let Some(chunk) = write.chunk {
                        begun = Some((chunk, write.group_id, write.epoch));
                    }
                    let (Some((chunk, group_id, epoch)), Some(finish)) = (begun, write.finish) else {
                        continue;
                    };
                    plant.strike();
                    let receipt = v1::Receipt {
                        chunk: Some(chunk),
                        group_id,
                        epoch,
                        length: finish.length,
                        checksum: finish.checksum.unwrap_or_default(),
                        holder_ids: vec![me],
                        ..Default::default()
                    };
                    let answer = v1::ReplicateResponse { receipt: Some(receipt), ..Default::default() };
                    return Some((Ok(answer), (messages, None)));
                }
            }
        });
        Ok(Response::new(answers.boxed()))
    }

    /// The real journal with empty plans in the place of those that deleted a name.
    async fn read_journal(
        &self,
        request: Request<v1::ReadJournalRequest>,
    ) -> Result<Response<Self::ReadJournalStream>, Status> {
        let mut client = ReplicaServiceClient::new(self.real.clone())
            .max_decoding_message_size(cairn_proto::limits::MESSAGE_BYTES_MAX);
        let parts = client.read_journal(request).await?.into_inner();
        let plant = self.plant.clone();
        let parts = parts.map(move |part| {
            let mut part = part?;
            for record in &mut part.records {
                if let Some(emptied) = without_delete(&record.plan) {
                    record.plan = emptied;
                    plant.strike();
                }
            }
            Ok(part)
        });
        Ok(Response::new(parts.boxed()))
    }

    async fn confirm(&self, _: Request<v1::ConfirmRequest>) -> Result<Response<v1::ConfirmResponse>, Status> {
        Err(passed_by())
    }

    async fn collect(&self, _: Request<v1::CollectRequest>) -> Result<Response<v1::CollectResponse>, Status> {
        Err(passed_by())
    }

    async fn compose(&self, _: Request<v1::ComposeRequest>) -> Result<Response<v1::ComposeResponse>, Status> {
        Err(passed_by())
    }

    async fn adopt(&self, _: Request<v1::AdoptRequest>) -> Result<Response<v1::AdoptResponse>, Status> {
        Err(passed_by())
    }

    async fn append_journal(
        &self,
        _: Request<v1::AppendJournalRequest>,
    ) -> Result<Response<v1::AppendJournalResponse>, Status> {
        Err(passed_by())
    }

    async fn follow(&self, _: Request<v1::FollowRequest>) -> Result<Response<v1::FollowResponse>, Status> {
        Err(passed_by())
    }

    async fn install_checkpoint(
        &self,
        _: Request<Streaming<v1::InstallCheckpointRequest>>,
    ) -> Result<Response<v1::InstallCheckpointResponse>, Status> {
        Err(passed_by())
    }
}

/// These calls go to the real server.
fn passed_by() -> Status {
    Status::unimplemented("nobody lies about this")
}

/// An empty plan in the place of one that deletes a name and makes none, as a rename would.
fn without_delete(plan: &Bytes) -> Option<Bytes> {
    let mutations = codec::decode(plan).expect("a plan").mutations;
    let is_name = |mutation: &&Mutation| mutation.key().get(..5) == Some(&b"\0\0\0\x01d"[..]);
    let deletes = mutations.iter().filter(is_name).any(|mutation| matches!(mutation, Mutation::Delete(_)));
    let makes = mutations.iter().filter(is_name).any(|mutation| matches!(mutation, Mutation::Put(..)));
    (deletes && !makes).then(|| codec::encode_applied(&Plan::new()))
}
