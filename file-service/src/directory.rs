//! Calls to the directory, at whichever of its addresses answers.

use cairn_proto::{
    Error, Reason, Result,
    limits::MESSAGE_BYTES_MAX,
    net::{self, Connect, Traffic},
    v1::{self, cluster_service_client::ClusterServiceClient},
};
use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tonic::{Response, Status, transport::Channel};

/// The directory.
#[derive(Debug)]
pub struct Directory {
    channels: Vec<(String, Channel)>,
    /// The one that answered last is asked first.
    good: AtomicUsize,
    timeout: Duration,
}

/// A client of one of its addresses.
pub type Client = ClusterServiceClient<Channel>;

impl Directory {
    /// Connects at the first call.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` for a bad address, or none.
    pub fn new(network: &Arc<dyn Connect>, addresses: &[String], timeout: Duration) -> Result<Self> {
        if addresses.is_empty() {
            return Err(Error::invalid("a file server needs the address of a directory"));
        }
        let channels = addresses
            .iter()
            .map(|uri| Ok((uri.clone(), net::channel(network, uri, Traffic::Small)?)))
            .collect::<Result<_>>()?;
        Ok(Self { channels, good: AtomicUsize::new(0), timeout })
    }

    /// The address that answered last.
    pub fn address(&self) -> &str {
        &self.channels[self.good.load(Ordering::Relaxed) % self.channels.len()].0
    }

    /// Registers this server.
    ///
    /// # Errors
    /// `WRONG_CLUSTER`, `INVALID_ARGUMENT`; `UNAVAILABLE` when no address answers.
    pub async fn register(&self, request: v1::RegisterRequest) -> Result<v1::RegisterResponse> {
        self.call(|mut client| {
            let request = request.clone();
            async move { client.register(request).await }
        })
        .await
    }

    /// Says that this server lives.
    ///
    /// # Errors
    /// `NOT_FOUND`: register again; `UNAVAILABLE` when no address answers.
    pub async fn heartbeat(&self, request: v1::HeartbeatRequest) -> Result<v1::HeartbeatResponse> {
        self.call(|mut client| {
            let request = request.clone();
            async move { client.heartbeat(request).await }
        })
        .await
    }

    /// Asks for servers and groups.
    ///
    /// # Errors
    /// `UNAVAILABLE` when no address answers.
    pub async fn topology(&self, known_revision: u64) -> Result<v1::TopologyResponse> {
        self.call(|mut client| async move { client.topology(v1::TopologyRequest { known_revision }).await })
            .await
    }

    async fn call<T, F>(&self, call: impl Fn(Client) -> F) -> Result<T>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let good = self.good.load(Ordering::Relaxed);
        let mut failed = Error::unavailable("no directory");
        for offset in 0..self.channels.len() {
            let number = (good + offset) % self.channels.len();
            let (uri, channel) = &self.channels[number];
            let client =
                ClusterServiceClient::new(channel.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX);
            let answer = match tokio::time::timeout(self.timeout, call(client)).await {
                Ok(answer) => answer.map_err(Error::from),
                Err(_) => Err(Error::unavailable("does not answer")),
            };
            match answer {
                Ok(answer) => {
                    self.good.store(number, Ordering::Relaxed);
                    return Ok(answer.into_inner());
                }
                // Another directory may do better only where this one could not answer at all.
                Err(error) if !matches!(error.reason, Reason::Unavailable | Reason::DeadlineExceeded) => {
                    return Err(error.on(uri.clone()));
                }
                Err(error) => failed = error.on(uri.clone()),
            }
        }
        Err(failed)
    }
}
