//! Channels to file servers.

use cairn_proto::{
    Error, Reason, Result,
    limits::MESSAGE_BYTES_MAX,
    net::{Connect, DIRECTORY_HEADER, SERVER_HEADER, Traffic, channel},
    v1,
    v1::{file_service_client::FileServiceClient, replica_service_client::ReplicaServiceClient},
};
use parking_lot::Mutex;
use std::{
    collections::HashMap,
    future::Future,
    sync::{Arc, OnceLock},
    time::Duration,
};
use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::Channel,
};

/// Longest that a small call to a file server takes.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// A channel whose calls say which server they are meant for: an address may lead to another one than it did, and an
/// inventory or order of one server must never pass for that of another.
pub type Addressed = InterceptedService<Channel, MeantFor>;

/// Names the server that a call is meant for (0 is not named), and the directory that calls, once it serves.
#[derive(Clone, Debug)]
pub struct MeantFor {
    server: u64,
    directory: Option<MetadataValue<Ascii>>,
}

impl Interceptor for MeantFor {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if self.server != 0 {
            request.metadata_mut().insert(SERVER_HEADER, MetadataValue::from(self.server));
        }
        if let Some(directory) = &self.directory {
            request.metadata_mut().insert(DIRECTORY_HEADER, directory.clone());
        }
        Ok(request)
    }
}

/// Keeps one channel to each server, and tries its endpoints in turn.
#[derive(Debug)]
pub struct Peers {
    network: Arc<dyn Connect>,
    channels: Mutex<HashMap<u64, Peer>>,
    /// Generation and term of the directory that calls.
    directory: OnceLock<MetadataValue<Ascii>>,
}

#[derive(Debug)]
struct Peer {
    endpoints: Vec<v1::Endpoint>,
    current: usize,
    channel: Channel,
}

impl Peers {
    /// Over a network.
    pub fn new(network: Arc<dyn Connect>) -> Self {
        Self { network, channels: Mutex::default(), directory: OnceLock::new() }
    }

    /// All calls from now on say that they come from the directory of this generation and term.
    pub fn call_as(&self, generation: u64, term: u64) {
        if let Ok(directory) = MetadataValue::try_from(format!("{generation}.{term}")) {
            let _ = self.directory.set(directory);
        }
    }

    fn meant_for(&self, server: u64) -> MeantFor {
        MeantFor { server, directory: self.directory.get().cloned() }
    }

    fn channel(&self, server: &v1::Server) -> Result<Channel> {
        let mut channels = self.channels.lock();
        if let Some(peer) = channels.get(&server.id)
            && peer.endpoints == server.endpoints
        {
            return Ok(peer.channel.clone());
        }
        let endpoint = server.endpoints.first().ok_or_else(|| {
            Error::unavailable(format!("server {} has no address", server.id)).on(server.id.to_string())
        })?;
        let channel = channel(&self.network, &endpoint.uri, Traffic::Small)?;
        let peer = Peer { endpoints: server.endpoints.clone(), current: 0, channel: channel.clone() };
        channels.insert(server.id, peer);
        Ok(channel)
    }

    /// The current endpoint could not be used: the next one is tried with the next call.
    fn failed(&self, id: u64) {
        let mut channels = self.channels.lock();
        let Some(peer) = channels.get_mut(&id) else { return };
        if peer.endpoints.len() < 2 {
            return;
        }
        peer.current = (peer.current + 1) % peer.endpoints.len();
        if let Ok(next) = channel(&self.network, &peer.endpoints[peer.current].uri, Traffic::Small) {
            peer.channel = next;
        }
    }

    /// Calls a server's `ReplicaService`.
    ///
    /// # Errors
    /// As the call's; `UNAVAILABLE` when it takes longer than [`CALL_TIMEOUT`].
    pub async fn replica<T, F, Fut>(&self, server: &v1::Server, call: F) -> Result<T>
    where
        F: FnOnce(ReplicaServiceClient<Addressed>) -> Fut,
        Fut: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        self.replica_within(CALL_TIMEOUT, server, call).await
    }

    /// The same for a call that may take longer.
    ///
    /// # Errors
    /// As the call's; `UNAVAILABLE` when it takes longer than `timeout`.
    pub async fn replica_within<T, F, Fut>(
        &self,
        timeout: Duration,
        server: &v1::Server,
        call: F,
    ) -> Result<T>
    where
        F: FnOnce(ReplicaServiceClient<Addressed>) -> Fut,
        Fut: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        let client = ReplicaServiceClient::with_interceptor(self.channel(server)?, self.meant_for(server.id))
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        self.run(timeout, server, call(client)).await
    }

    /// Calls a server's `FileService`.
    ///
    /// # Errors
    /// As the call's; `UNAVAILABLE` when it takes longer than [`CALL_TIMEOUT`] to begin answering.
    pub async fn file<T, F, Fut>(&self, server: &v1::Server, call: F) -> Result<T>
    where
        F: FnOnce(FileServiceClient<Addressed>) -> Fut,
        Fut: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        let client = FileServiceClient::with_interceptor(self.channel(server)?, self.meant_for(server.id))
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        self.run(CALL_TIMEOUT, server, call(client)).await
    }

    async fn run<T>(
        &self,
        timeout: Duration,
        server: &v1::Server,
        call: impl Future<Output = Result<tonic::Response<T>, Status>>,
    ) -> Result<T> {
        match tokio::time::timeout(timeout, call).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => {
                let error = Error::from(status).on(server.id.to_string());
                // Another server answers at this address now.
                if matches!(error.reason, Reason::Unavailable | Reason::WrongCluster) {
                    self.failed(server.id);
                }
                Err(error)
            }
            Err(_) => {
                self.failed(server.id);
                Err(Error::unavailable(format!("no answer within {} s", timeout.as_secs()))
                    .on(server.id.to_string()))
            }
        }
    }
}
