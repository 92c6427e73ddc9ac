//! Wires the parts of a file server together and serves them.

use crate::{
    background::{
        compact, heartbeat,
        scrub::{self, Scrub},
    },
    chunks::{ChunkStore, DiskChunkStore, DiskConfig},
    config::Config,
    directory::Directory,
    fetch,
    grpc::{FileHandler, GuardLayer, ReplicaHandler},
    identity::Identity,
    journal::Journals,
    metrics,
    node::{Mode, Node},
    peers::Peers,
    topology::Topology,
};
use cairn_proto::{
    Error, FILE_DESCRIPTOR_SET, Reason, Result,
    host::Host,
    limits::MESSAGE_BYTES_MAX,
    net::{self, Incoming, Rooms, Traffic, framed::Framed},
    v1::{
        file_service_server::{self, FileServiceServer},
        replica_service_server::{self, ReplicaServiceServer},
    },
};
use disk::Disk;
use std::{net::SocketAddr, sync::Arc, time::Duration};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic_health::{ServingStatus, server::HealthReporter};
use tonic_reflection::{pb, server::Builder as Reflection};
use tracing::Instrument as _;

/// A file server, ready to serve.
#[derive(Debug)]
pub struct App {
    node: Arc<Node>,
    seed: u64,
    metrics: Option<SocketAddr>,
}

impl App {
    /// Opens the disk's records and chunks. All network and chance come from `host`; servers on blank disks need
    /// different seeds.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` for a bad address; `IO` when the disk's records are damaged or of another version.
    pub async fn build(config: Config, disk: Arc<dyn Disk>, host: Host) -> Result<Self> {
        Self::build_wrapped(config, disk, host, |store| store).await
    }

    /// As [`App::build`], with something of the caller's around the store of chunks, such as a recorder or a fault.
    ///
    /// # Errors
    /// As [`App::build`].
    pub async fn build_wrapped(
        config: Config,
        disk: Arc<dyn Disk>,
        host: Host,
        wrap: impl FnOnce(Arc<dyn ChunkStore>) -> Arc<dyn ChunkStore> + Send,
    ) -> Result<Self> {
        let identity = Identity::open(disk.clone(), host.seed).await?;
        let store_id = uuid::Uuid::parse_str(&identity.disk_id())
            .map_err(|error| Error::new(Reason::Io, format!("the disk's id is not a UUID: {error}")))?
            .as_u128();
        let store = DiskConfig { store_id, ..DiskConfig::new("the data directory") };
        let (store, _report) = DiskChunkStore::open(disk.clone(), "chunks", store).await?;
        Self::assemble(config, disk, host, identity, wrap(Arc::new(store))).await
    }

    /// As [`App::build`], with chunks in a store of the caller's choice.
    ///
    /// # Errors
    /// As [`App::build`].
    pub async fn build_on(
        config: Config,
        disk: Arc<dyn Disk>,
        host: Host,
        store: Arc<dyn ChunkStore>,
    ) -> Result<Self> {
        let identity = Identity::open(disk.clone(), host.seed).await?;
        Self::assemble(config, disk, host, identity, store).await
    }

    async fn assemble(
        config: Config,
        disk: Arc<dyn Disk>,
        host: Host,
        identity: Identity,
        store: Arc<dyn ChunkStore>,
    ) -> Result<Self> {
        let timeout = Duration::from_millis(config.timing.directory_call_ms);
        let directory = Directory::new(&host.network, &config.directory, timeout)?;
        let topology = Topology::open(disk.clone()).await?;
        let scrub_disk = disk.clone();
        let journals = Journals::open(disk, &identity.cluster_id()).await?;
        let scrub = Scrub::open(scrub_disk, host.clock.clone()).await?;
        let peers = Peers::new(host.network.clone());
        let node = Node::new(
            config,
            store,
            identity,
            topology,
            peers,
            (directory, host.network.clone()),
            journals,
            scrub,
        );
        Ok(Self { node: Arc::new(node), seed: host.seed, metrics: None })
    }

    /// Serves metrics over HTTP at an address, beside everything else.
    pub fn with_metrics(mut self, address: Option<SocketAddr>) -> Self {
        self.metrics = address;
        self
    }

    /// The shared parts, to look at.
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// Serves until `shutdown`, then drains: accepts nothing more, tells the directory, finishes what is under way
    /// for a bounded time, and closes the disk's files.
    ///
    /// # Errors
    /// `IO` when the metrics address cannot be listened on, or the disk fails at the end.
    pub async fn serve(self, incoming: Vec<Incoming>, shutdown: CancellationToken) -> Result<()> {
        let Self { node, seed, metrics } = self;
        let span = tracing::info_span!("file_service", server = tracing::field::Empty);
        let (reporter, health) = tonic_health::server::health_reporter();
        // What ends with this future, also when it is dropped.
        let mut tasks = JoinSet::new();
        tasks.spawn(show_health(node.clone(), reporter).instrument(span.clone()));
        tasks.spawn(fetch::run(node.clone(), shutdown.clone()).instrument(span.clone()));
        tasks.spawn(scrub::run(node.clone(), shutdown.clone()).instrument(span.clone()));
        tasks.spawn(compact::run(node.clone(), shutdown.clone()).instrument(span.clone()));
        if let Some(address) = metrics {
            let serving = metrics::serve(address, node.clone(), shutdown.clone());
            tasks.spawn(
                async move {
                    if let Err(error) = serving.await {
                        tracing::error!(%error, "metrics are not served");
                    }
                }
                .instrument(span.clone()),
            );
        }
        let mut beating = JoinSet::new();
        beating.spawn(heartbeat::run(node.clone(), seed, shutdown.clone()).instrument(span.clone()));

        let reflection = |error| Error::internal(format!("reflection: {error}"));
        // The descriptors are those of the whole contract; what is listed is what answers here.
        let listed = |own: &str| {
            Reflection::configure()
                .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
                .with_service_name(file_service_server::SERVICE_NAME)
                .with_service_name(replica_service_server::SERVICE_NAME)
                .with_service_name(tonic_health::pb::health_server::SERVICE_NAME)
                .with_service_name(own)
        };
        let guard = GuardLayer::new(node.clone());
        let mut serving = JoinSet::new();
        for (room, connections) in Rooms::default().split(Box::pin(futures::stream::select_all(incoming))) {
            let server = net::server(Traffic::Bulk, room)
                .layer(guard.clone())
                .add_service(Framed::server(
                    FileServiceServer::new(FileHandler::new(node.clone()))
                        .max_decoding_message_size(MESSAGE_BYTES_MAX)
                        .max_encoding_message_size(MESSAGE_BYTES_MAX),
                    &["/cairn.v1.FileService/Write"],
                ))
                .add_service(Framed::server(
                    ReplicaServiceServer::new(ReplicaHandler::new(node.clone()))
                        .max_decoding_message_size(MESSAGE_BYTES_MAX)
                        .max_encoding_message_size(MESSAGE_BYTES_MAX),
                    &["/cairn.v1.ReplicaService/Replicate"],
                ))
                .add_service(health.clone())
                .add_service(
                    listed(pb::v1::server_reflection_server::SERVICE_NAME).build_v1().map_err(reflection)?,
                )
                .add_service(
                    listed(pb::v1alpha::server_reflection_server::SERVICE_NAME)
                        .build_v1alpha()
                        .map_err(reflection)?,
                );
            let shutdown = shutdown.clone();
            serving.spawn(
                async move {
                    server.serve_with_incoming_shutdown(connections, shutdown.cancelled_owned()).await
                }
                .instrument(span.clone()),
            );
        }
        let drained = async {
            shutdown.cancelled().await;
            tracing::info!("draining: no new connections, finishing what is under way");
            node.receiving.draining.cancel();
            tokio::time::sleep(Duration::from_millis(node.config.timing.drain_ms)).await;
        };
        tokio::select! {
            served = all_ended(&mut serving) => served?,
            () = drained => tracing::warn!("some requests did not end in time and are cut off"),
        }
        // Without a signal the last listener ended: stop all the same.
        shutdown.cancel();
        node.receiving.draining.cancel();
        while beating.join_next().await.is_some() {}
        tasks.shutdown().await;
        node.journals.close().await?;
        node.store.close().await?;
        tracing::info!("stopped");
        Ok(())
    }
}

/// The end of all servers, or the first failure of one.
async fn all_ended(serving: &mut JoinSet<Result<(), tonic::transport::Error>>) -> Result<()> {
    while let Some(ended) = serving.join_next().await {
        let ended = ended.map_err(|error| error.to_string());
        ended
            .and_then(|ended| ended.map_err(|error| error.to_string()))
            .map_err(|error| Error::new(Reason::Io, format!("serving ended: {error}")))?;
    }
    Ok(())
}

/// Shows in the health service whether this server serves.
async fn show_health(node: Arc<Node>, reporter: HealthReporter) {
    let mut mode = node.mode.subscribe();
    loop {
        let is_draining = node.receiving.draining.is_cancelled();
        let status = match &*mode.borrow_and_update() {
            Mode::Serving if !is_draining => ServingStatus::Serving,
            _ => ServingStatus::NotServing,
        };
        for service in ["", "cairn.v1.FileService", "cairn.v1.ReplicaService"] {
            reporter.set_service_status(service, status).await;
        }
        tokio::select! {
            changed = mode.changed() => if changed.is_err() { return },
            () = node.receiving.draining.cancelled(), if !is_draining => {}
        }
    }
}
