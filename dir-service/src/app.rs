//! The composition root: builds the parts, serves them, and ends them together.

use crate::{
    config::Config,
    gate::{Gate, Mode},
    grpc::{
        cluster::ClusterHandler,
        directory::DirectoryHandler,
        layer::{Counts, RequestLayer},
        session::SessionHandler,
    },
    life::Life,
    metrics,
    rebuild::Lobby,
    shared::SharedLife,
    store::{JournaledStore, MetaStore, StoreIdentity, StoreWrapper},
};
use cairn_proto::{
    Error, FILE_DESCRIPTOR_SET, Result,
    host::Host,
    limits::MESSAGE_BYTES_MAX,
    net::{Incoming, Room, Rooms, Traffic, server},
    v1::{
        cluster_service_server::{self, ClusterServiceServer},
        directory_service_server::{self, DirectoryServiceServer},
        session_service_server::{self, SessionServiceServer},
    },
};
use disk::Disk;
use std::{
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};
use tokio::{
    task::{JoinHandle, JoinSet},
    time::Instant,
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

/// Longest that requests under way may take once the directory stops.
const DRAIN_MAX: Duration = Duration::from_secs(5);
/// After the last answer was begun, its bytes have this long to leave. Streams without an end are cut then.
const DRAIN_QUIET: Duration = Duration::from_millis(100);

/// A directory, ready to serve.
#[derive(Debug)]
pub struct App {
    life: AnyLife,
    gate: Arc<Gate>,
    lobby: Arc<Lobby>,
    seed: u64,
    counts: Arc<Counts>,
    metrics: Option<SocketAddr>,
}

/// A store of its own, with what was found of it, or one that it shares.
#[derive(Debug)]
enum AnyLife {
    Alone(Arc<Life>, Option<Arc<JournaledStore>>),
    Shared(Arc<SharedLife>),
}

enum Running {
    Alone(JoinHandle<()>),
    Shared(AbortOnDropHandle<()>),
}

impl App {
    /// Opens the store on the disk, if there is one, and wires everything; nothing is served yet.
    ///
    /// # Errors
    /// When the store is damaged or of a newer version; the message names what to do.
    pub async fn build(config: Config, disk: Arc<dyn Disk>, host: Host) -> Result<Self> {
        Self::build_wrapped(config, disk, host, StoreWrapper::default()).await
    }

    /// As [`App::build`], with something of the caller's between the directory and its store.
    ///
    /// # Errors
    /// As [`App::build`].
    pub async fn build_wrapped(
        config: Config,
        disk: Arc<dyn Disk>,
        host: Host,
        wrapper: StoreWrapper,
    ) -> Result<Self> {
        let gate = Arc::new(Gate::default());
        let lobby = Arc::new(Lobby::new(config.clone()));
        let seed = host.seed;
        let (gate_of, lobby_of) = (gate.clone(), lobby.clone());
        let life = Arc::new(Life { config, disk, host, wrapper, gate: gate_of, lobby: lobby_of });
        let store = life.find().await?;
        let life = AnyLife::Alone(life, store);
        Ok(Self { life, gate, lobby, seed, counts: Arc::default(), metrics: None })
    }

    /// Wires a directory over a store that others use at the same time, each of them an app of its own. `wrapper` stands
    /// between this one and the store. A store that says itself whose it is has an `identity`. Nothing is served, nor the
    /// store touched, yet.
    pub fn build_shared(
        config: Config,
        store: Arc<dyn MetaStore>,
        identity: Option<StoreIdentity>,
        host: Host,
        wrapper: StoreWrapper,
    ) -> Self {
        let gate = Arc::new(Gate::default());
        let lobby = Arc::new(Lobby::new(config.clone()));
        let seed = host.seed;
        let (gate_of, lobby_of) = (gate.clone(), lobby.clone());
        let life = SharedLife { config, store, identity, host, wrapper, gate: gate_of, lobby: lobby_of };
        let life = AnyLife::Shared(Arc::new(life));
        Self { life, gate, lobby, seed, counts: Arc::default(), metrics: None }
    }

    /// Serves figures in the form of Prometheus at this address too.
    #[must_use]
    pub fn with_metrics(mut self, address: Option<SocketAddr>) -> Self {
        self.metrics = address;
        self
    }

    /// What the directory is doing; follow it to know when it serves.
    pub fn gate(&self) -> Arc<Gate> {
        self.gate.clone()
    }

    /// Serves on all listeners until `shutdown`, then lets requests under way finish, and closes the store.
    ///
    /// # Errors
    /// When a listener fails.
    pub async fn serve(self, incoming: Vec<Incoming>, shutdown: CancellationToken) -> Result<()> {
        let (gate, counts) = (self.gate.clone(), self.counts.clone());
        // The directory outlives the listeners: requests under way need it.
        let ended = CancellationToken::new();
        // One that shares its store gives no sign of life beyond its end, however it ends.
        let life = match self.life {
            AnyLife::Alone(life, store) => Running::Alone(tokio::spawn(life.run(store, ended.clone()))),
            AnyLife::Shared(life) => {
                Running::Shared(AbortOnDropHandle::new(tokio::spawn(life.run(ended.clone()))))
            }
        };
        let metrics = self.metrics.map(|address| {
            tokio::spawn(metrics::serve(address, gate.clone(), counts.clone(), shutdown.clone()))
        });
        let mut listeners = JoinSet::new();
        let layer = RequestLayer::new(self.seed, counts.clone());
        let rooms = Rooms::default();
        for (room, incoming) in incoming.into_iter().flat_map(|incoming| rooms.split(incoming)) {
            let router = router(&gate, &self.lobby, layer.clone(), room).await?;
            let shutdown = shutdown.clone();
            listeners.spawn(async move {
                router.serve_with_incoming_shutdown(incoming, shutdown.cancelled_owned()).await
            });
        }
        let mut outcome = Ok(());
        tokio::select! {
            () = shutdown.cancelled() => {}
            ended = listeners.join_next() => if !shutdown.is_cancelled() {
                outcome = Err(Error::unavailable(match ended {
                    Some(Ok(Err(error))) => format!("a listener failed: {error}"),
                    Some(Err(error)) => format!("a listener failed: {error}"),
                    Some(Ok(Ok(()))) | None => "the listeners are closed".to_owned(),
                }));
            },
        }
        if outcome.is_ok() {
            drain(&mut listeners, &counts).await;
        }
        listeners.shutdown().await;
        gate.set(Mode::Stopped);
        ended.cancel();
        let life = match life {
            Running::Alone(life) => life.await,
            Running::Shared(life) => life.await,
        };
        if let Err(error) = life {
            tracing::error!(%error, "the directory did not end cleanly");
        }
        if let Some(metrics) = metrics {
            metrics.abort();
        }
        outcome
    }
}

/// Waits for requests under way. Streams that never end (renewals, watches) do not hold it up.
async fn drain(listeners: &mut JoinSet<Result<(), tonic::transport::Error>>, counts: &Counts) {
    let begun = Instant::now();
    let mut quiet_since = begun;
    loop {
        if counts.under_way.load(Ordering::Relaxed) > 0 {
            quiet_since = Instant::now();
        }
        if quiet_since.elapsed() >= DRAIN_QUIET || begun.elapsed() >= DRAIN_MAX {
            return;
        }
        let step = tokio::time::timeout(Duration::from_millis(5), listeners.join_next()).await;
        if matches!(step, Ok(None)) {
            return;
        }
    }
}

async fn router(
    gate: &Arc<Gate>,
    lobby: &Arc<Lobby>,
    layer: RequestLayer,
    room: Room,
) -> Result<
    tonic::transport::server::Router<tower::layer::util::Stack<RequestLayer, tower::layer::util::Identity>>,
> {
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_serving::<DirectoryServiceServer<DirectoryHandler>>().await;
    reporter.set_serving::<SessionServiceServer<SessionHandler>>().await;
    reporter.set_serving::<ClusterServiceServer<ClusterHandler>>().await;
    // The descriptors are those of the whole contract; what is listed is what answers here.
    let reflection = |own: &str| {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .with_service_name(directory_service_server::SERVICE_NAME)
            .with_service_name(session_service_server::SERVICE_NAME)
            .with_service_name(cluster_service_server::SERVICE_NAME)
            .with_service_name(tonic_health::pb::health_server::SERVICE_NAME)
            .with_service_name(own)
    };
    let broken = |error| Error::internal(format!("the descriptors for reflection are damaged: {error}"));
    Ok(server(Traffic::Small, room)
        .layer(layer)
        .add_service(health)
        .add_service(
            reflection(tonic_reflection::pb::v1::server_reflection_server::SERVICE_NAME)
                .build_v1()
                .map_err(broken)?,
        )
        .add_service(
            reflection(tonic_reflection::pb::v1alpha::server_reflection_server::SERVICE_NAME)
                .build_v1alpha()
                .map_err(broken)?,
        )
        .add_service(
            DirectoryServiceServer::new(DirectoryHandler::new(gate.clone()))
                .max_decoding_message_size(MESSAGE_BYTES_MAX)
                .max_encoding_message_size(MESSAGE_BYTES_MAX),
        )
        .add_service(
            SessionServiceServer::new(SessionHandler::new(gate.clone()))
                .max_decoding_message_size(MESSAGE_BYTES_MAX)
                .max_encoding_message_size(MESSAGE_BYTES_MAX),
        )
        .add_service(
            ClusterServiceServer::new(ClusterHandler::new(gate.clone(), lobby.clone()))
                .max_decoding_message_size(MESSAGE_BYTES_MAX)
                .max_encoding_message_size(MESSAGE_BYTES_MAX),
        ))
}
