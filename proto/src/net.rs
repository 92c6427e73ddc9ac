//! The network as a service sees it: connectors and listeners come in from outside, settings are in one place.
//!
//! A service never opens a socket by itself. It is given a [`Connect`] for outgoing and an [`Incoming`] for incoming
//! connections, so that the same code runs over TCP, Unix sockets, in-process pipes and a simulated network.
//!
//! Small calls and bulk data use separate connections ([`Traffic`]): a 1 MiB frame would delay a small call behind it.
//! Memory is bounded by connections x window ([`window_bytes_max`]): the first [`limits::ROOMY_CONNECTIONS_MAX`]
//! connections of a server have wide windows, all others those that HTTP/2 gives at least ([`Room`]).
//!
//! What a server accepts is bounded before its handlers see it: a connection that sends no greeting in time ends
//! ([`Wire`]), bytes of requests that are still arriving have a budget and must keep coming ([`Intake`]), and a peer
//! that does not take its answers is cut off when their room is needed ([`Answers`]).

use crate::{Error, Result, id::ServerId, limits};
use async_trait::async_trait;
use hyper_util::rt::TokioIo;
use std::{fmt, io, pin::Pin, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::Semaphore,
};
use tonic::{
    Request,
    codegen::tokio_stream::Stream,
    metadata::MetadataValue,
    transport::{Channel, Endpoint, Server},
};

mod answers;
pub mod framed;
mod intake;
mod rooms;
mod wire;

pub use answers::{Answer, Answers};
pub use intake::{Body, Intake};
pub use rooms::{Roomed, Rooms};
pub use wire::{Connection, Wire};

/// Metadata key of the id that ties the logs of all services together.
pub const REQUEST_HEADER: &str = "x-cairn-request";

/// Metadata keys of the cluster and the server that a call to a file server is meant for. An address may lead
/// elsewhere than it did: a server that is another refuses the call with `WRONG_CLUSTER`. Both may be left out.
pub const CLUSTER_HEADER: &str = "x-cairn-cluster";
/// See [`CLUSTER_HEADER`].
pub const SERVER_HEADER: &str = "x-cairn-server";

/// Metadata key of a serving directory's generation and term, `7.3`, on its calls to file servers: one that follows a later
/// directory refuses them with `STALE_EPOCH`. May be left out.
pub const DIRECTORY_HEADER: &str = "x-cairn-directory";

/// A call that only the named server of the named cluster may answer; an empty cluster is not named. It carries the id
/// of the current operation ([`crate::request`]).
pub fn meant_for<T>(message: T, cluster_id: &str, server: ServerId) -> Request<T> {
    let mut request = Request::new(message);
    let metadata = request.metadata_mut();
    if let Some(cluster_id) = MetadataValue::try_from(cluster_id).ok().filter(|_| !cluster_id.is_empty()) {
        metadata.insert(CLUSTER_HEADER, cluster_id);
    }
    metadata.insert(SERVER_HEADER, MetadataValue::from(server.0));
    crate::request::stamp(&mut request, None);
    request
}

/// Receive window of one bulk stream.
pub const BULK_STREAM_WINDOW_BYTES: u32 = 4 * 1024 * 1024;
/// Receive window of one bulk connection. Also h2's allowance for small DATA frames (half of it).
pub const BULK_CONNECTION_WINDOW_BYTES: u32 = 16 * 1024 * 1024;
/// Largest HTTP/2 frame of bulk connections. The default of 16 KiB costs a system call each.
pub const BULK_FRAME_BYTES: u32 = 1024 * 1024;
/// Receive window of one stream of small calls.
pub const SMALL_STREAM_WINDOW_BYTES: u32 = 1024 * 1024;
/// Receive window of one connection of small calls.
pub const SMALL_CONNECTION_WINDOW_BYTES: u32 = 2 * 1024 * 1024;
/// Largest HTTP/2 frame of connections of small calls.
pub const SMALL_FRAME_BYTES: u32 = 64 * 1024;

/// Receive window of a narrow connection and of each of its streams: the least that HTTP/2 allows a connection.
pub const NARROW_WINDOW_BYTES: u32 = 65_535;
/// Largest HTTP/2 frame of narrow connections, the least that HTTP/2 allows.
pub const NARROW_FRAME_BYTES: u32 = 16 * 1024;
/// Streams of a narrow connection. Small frames that wait count 256 bytes each against half of the window; were more
/// streams allowed, a peer that begins a small call on each of them could be taken for an attacker.
pub const NARROW_STREAMS_MAX: u32 = 100;

/// Longest wait for a connection to be made.
pub const CONNECT_TIMEOUT: Duration = Duration::from_millis(1_000);
/// A connection on which nothing arrives for this long is asked whether it lives.
pub const PING_INTERVAL: Duration = Duration::from_millis(1_000);
/// It is given up when the answer takes longer than this.
pub const PING_TIMEOUT: Duration = Duration::from_millis(2_000);

/// A new connection says the greeting of HTTP/2 within this time.
pub const GREETING_TIMEOUT: Duration = Duration::from_secs(5);
/// Between two pieces of one message, and before the first of a call with one message, nothing takes longer than this.
pub const MESSAGE_PAUSE_MAX: Duration = Duration::from_secs(10);
/// A peer that leaves an answer untaken for this long is cut off, if others wait for its room.
pub const ANSWER_PAUSE_MAX: Duration = Duration::from_secs(3);

/// What a connection carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Traffic {
    /// Metadata: many calls of a few hundred bytes.
    Small,
    /// Chunk data.
    Bulk,
}

/// How wide the windows of an accepted connection are. A window is memory that the peer may fill without asking.
///
/// Few connections carry much at a time, and for them wide windows pay; ten thousand with wide windows would be more than
/// any machine has. So the first ones get wide windows, for as long as they last, and the others narrow ones, which still
/// carry a few hundred megabytes a second within one site.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Room {
    /// One of [`limits::ROOMY_CONNECTIONS_MAX`].
    Roomy,
    /// One of the rest.
    Narrow,
}

/// Most bytes that all peers of a server together can have sent without anybody having taken them.
pub const fn window_bytes_max(traffic: Traffic) -> u64 {
    let roomy = match traffic {
        Traffic::Small => SMALL_CONNECTION_WINDOW_BYTES,
        Traffic::Bulk => BULK_CONNECTION_WINDOW_BYTES,
    };
    limits::ROOMY_CONNECTIONS_MAX as u64 * roomy as u64
        + (limits::CONNECTIONS_MAX - limits::ROOMY_CONNECTIONS_MAX) as u64 * NARROW_WINDOW_BYTES as u64
}

/// Anything that bytes can be read from and written to.
pub trait Io: AsyncRead + AsyncWrite + Send + Unpin + 'static {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Io for T {}

/// Makes outgoing connections.
#[async_trait]
pub trait Connect: fmt::Debug + Send + Sync + 'static {
    /// Connects to `http://host:port` or `unix:/path`.
    ///
    /// # Errors
    /// As the network says; `InvalidInput` for an address of another form.
    async fn connect(&self, uri: &str) -> io::Result<Box<dyn Io>>;
}

/// The real network.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemNetwork;

#[async_trait]
impl Connect for SystemNetwork {
    async fn connect(&self, uri: &str) -> io::Result<Box<dyn Io>> {
        if let Some(path) = uri.strip_prefix("unix:") {
            return Ok(Box::new(UnixStream::connect(path).await?));
        }
        let stream = TcpStream::connect(authority(uri)?).await?;
        stream.set_nodelay(true)?;
        Ok(Box::new(stream))
    }
}

/// `host:port` of an `http://` address.
///
/// # Errors
/// `InvalidInput` for an address of another form.
pub fn authority(uri: &str) -> io::Result<&str> {
    uri.strip_prefix("http://")
        .map(|rest| rest.trim_end_matches('/'))
        .filter(|rest| rest.contains(':') && !rest.contains('/'))
        .ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("'{uri}' is not an address: write http://host:port or unix:/path"),
            )
        })
}

/// A channel to one address. It connects at its first call, and again after the connection broke.
///
/// # Errors
/// `INVALID_ARGUMENT` for an address that is neither `http://host:port` nor `unix:/path`.
pub fn channel(network: &Arc<dyn Connect>, uri: &str, traffic: Traffic) -> Result<Channel> {
    if !uri.starts_with("unix:") {
        authority(uri).map_err(|error| Error::invalid(error.to_string()))?;
    }
    // A Unix socket has no host; HTTP/2 wants an authority all the same.
    let shown = if uri.starts_with("unix:") { "http://localhost" } else { uri };
    let endpoint = Endpoint::from_shared(shown.to_owned())
        .map_err(|error| Error::invalid(format!("'{uri}' is not an address: {error}")))?
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT)
        .keep_alive_while_idle(true);
    let endpoint = match traffic {
        Traffic::Small => endpoint
            .initial_stream_window_size(SMALL_STREAM_WINDOW_BYTES)
            .initial_connection_window_size(SMALL_CONNECTION_WINDOW_BYTES)
            .max_frame_size(SMALL_FRAME_BYTES),
        Traffic::Bulk => endpoint
            .initial_stream_window_size(BULK_STREAM_WINDOW_BYTES)
            .initial_connection_window_size(BULK_CONNECTION_WINDOW_BYTES)
            .max_frame_size(BULK_FRAME_BYTES),
    };
    let (network, uri) = (network.clone(), uri.to_owned());
    Ok(endpoint.connect_with_connector_lazy(tower::service_fn(move |_| {
        let (network, uri) = (network.clone(), uri.clone());
        async move { network.connect(&uri).await.map(TokioIo::new) }
    })))
}

/// A server with the settings for its traffic, for connections with so much room.
pub fn server(traffic: Traffic, room: Room) -> Server {
    let server = Server::builder()
        .http2_keepalive_interval(Some(PING_INTERVAL * 5))
        .http2_keepalive_timeout(Some(PING_TIMEOUT * 5));
    match (room, traffic) {
        (Room::Narrow, _) => server
            .max_concurrent_streams(NARROW_STREAMS_MAX)
            .initial_stream_window_size(NARROW_WINDOW_BYTES)
            .initial_connection_window_size(NARROW_WINDOW_BYTES)
            .max_frame_size(NARROW_FRAME_BYTES),
        (Room::Roomy, Traffic::Small) => server
            .max_concurrent_streams(limits::STREAMS_PER_CONNECTION_MAX)
            .initial_stream_window_size(SMALL_STREAM_WINDOW_BYTES)
            .initial_connection_window_size(SMALL_CONNECTION_WINDOW_BYTES)
            .max_frame_size(SMALL_FRAME_BYTES),
        (Room::Roomy, Traffic::Bulk) => server
            .max_concurrent_streams(limits::STREAMS_PER_CONNECTION_MAX)
            .initial_stream_window_size(BULK_STREAM_WINDOW_BYTES)
            .initial_connection_window_size(BULK_CONNECTION_WINDOW_BYTES)
            .max_frame_size(BULK_FRAME_BYTES),
    }
}

/// Accepted connections, given to a service by whoever starts it.
pub type Incoming = Pin<Box<dyn Stream<Item = io::Result<Wire>> + Send>>;

/// Connections of a TCP listener, at most [`limits::CONNECTIONS_MAX`] at a time; more wait in the kernel's queue.
pub fn accept_tcp(listener: TcpListener) -> Incoming {
    let listener = Arc::new(listener);
    accept(move || {
        let listener = listener.clone();
        async move {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            Ok(Box::new(stream) as Box<dyn Io>)
        }
    })
}

/// Connections of a Unix socket listener, bounded likewise.
pub fn accept_unix(listener: UnixListener) -> Incoming {
    let listener = Arc::new(listener);
    accept(move || {
        let listener = listener.clone();
        async move {
            let (stream, _) = listener.accept().await?;
            Ok(Box::new(stream) as Box<dyn Io>)
        }
    })
}

fn accept<F, Fut>(next: F) -> Incoming
where
    F: Fn() -> Fut + Send + 'static,
    Fut: Future<Output = io::Result<Box<dyn Io>>> + Send,
{
    let places = Arc::new(Semaphore::new(limits::CONNECTIONS_MAX));
    Box::pin(async_stream::stream! {
        loop {
            let Ok(permit) = places.clone().acquire_owned().await else { return };
            match next().await {
                Ok(io) => yield Ok(Wire::counted(io, permit)),
                // Out of descriptors, or a connection that went away again: the listener itself is fine.
                Err(error) => {
                    tracing::warn!(%error, "could not accept a connection");
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
        }
    })
}

#[cfg(test)]
mod tests;
