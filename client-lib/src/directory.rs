//! Calls to the directory: which address, how long, how often.

use crate::{
    connections::Connections,
    retry::{Attempts, Retry, restore},
};
use cairn_proto::{
    Error, Reason, Result, limits,
    net::{self, Connect, Traffic},
    request,
    v1::{
        cluster_service_client::ClusterServiceClient, directory_service_client::DirectoryServiceClient,
        session_service_client::SessionServiceClient,
    },
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tonic::{Request, Response, Status, transport::Channel};

/// Longest wait for one answer before the call is made again, maybe at another address. Safe, since every mutating
/// call carries a request id.
const ATTEMPT: Duration = Duration::from_secs(5);

/// The addresses of the directory and their connections.
#[derive(Debug)]
pub(crate) struct Directory {
    network: Arc<dyn Connect>,
    addresses: Vec<String>,
    connections: Vec<Connections>,
    current: AtomicUsize,
    retry: Arc<Retry>,
}

impl Directory {
    pub fn new(network: Arc<dyn Connect>, addresses: Vec<String>, retry: Arc<Retry>) -> Self {
        let connections = addresses.iter().map(|_| Connections::default()).collect();
        Self { network, addresses, connections, current: AtomicUsize::new(0), retry }
    }

    /// The address now in use and its channel, for what lasts: streams.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` for an address of a wrong form.
    pub fn channel(&self) -> Result<(usize, Channel)> {
        let index = self.current();
        Ok((index, self.connections[index].first(|| self.connect(index))?))
    }

    fn current(&self) -> usize {
        self.current.load(Ordering::Relaxed) % self.addresses.len()
    }

    fn connect(&self, index: usize) -> Result<Channel> {
        net::channel(&self.network, &self.addresses[index], Traffic::Small)
    }

    pub fn address(&self, index: usize) -> &str {
        &self.addresses[index]
    }

    /// Moves on from an address that does not answer, unless somebody did already.
    pub fn rotate(&self, from: usize) {
        let next = (from + 1) % self.addresses.len();
        let _ = self.current.compare_exchange(from, next, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// Makes a call until it is answered, its error is final, or the deadline is over. `method` is called once for
    /// each attempt, with the same message.
    ///
    /// # Errors
    /// As the directory answers; the last transient error when the deadline is over.
    pub async fn call<M, T, F, Fut>(&self, message: M, method: F) -> Result<T>
    where
        M: Clone,
        F: Fn(Channel, Request<M>) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        self.call_with(Duration::ZERO, message, method).await
    }

    /// As [`Self::call`], where the directory itself may wait for `extra` before it answers.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub async fn call_with<M, T, F, Fut>(&self, extra: Duration, message: M, method: F) -> Result<T>
    where
        M: Clone,
        F: Fn(Channel, Request<M>) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let mut attempts = self.retry.start_with(extra);
        let request_id = format!("{:016x}", self.retry.random());
        loop {
            match self.attempt(&attempts, extra, &request_id, message.clone(), &method).await {
                Ok(answer) => return Ok(answer),
                Err(mut error) => {
                    error.detail.request =
                        request::current().map_or_else(|| request_id.clone(), |id| id.to_string());
                    attempts.pause(error).await?;
                }
            }
        }
    }

    async fn attempt<M, T, F, Fut>(
        &self,
        attempts: &Attempts<'_>,
        extra: Duration,
        request_id: &str,
        message: M,
        method: &F,
    ) -> Result<T>
    where
        F: Fn(Channel, Request<M>) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let index = self.current();
        let (channel, _under_way) = self.connections[index].pick(|| self.connect(index))?;
        let mut request = Request::new(message);
        request::stamp(&mut request, Some(request_id));
        let patience = (ATTEMPT + extra).min(attempts.remaining()).max(Duration::from_millis(1));
        let error = match tokio::time::timeout(patience, method(channel, request)).await {
            Ok(Ok(answer)) => return Ok(answer.into_inner()),
            Ok(Err(status)) => restore(status, self.address(index)),
            Err(_) => Error::new(
                Reason::DeadlineExceeded,
                format!(
                    "the directory at {} did not answer in {} ms",
                    self.address(index),
                    patience.as_millis()
                ),
            )
            .on(self.address(index)),
        };
        if matches!(error.reason, Reason::Unavailable | Reason::DeadlineExceeded | Reason::Rebuilding) {
            self.rotate(index);
        }
        Err(error)
    }
}

/// The stub for names, versions and locks.
pub(crate) fn names(channel: Channel) -> DirectoryServiceClient<Channel> {
    DirectoryServiceClient::new(channel)
        .max_decoding_message_size(limits::MESSAGE_BYTES_MAX)
        .max_encoding_message_size(limits::MESSAGE_BYTES_MAX)
}

/// The stub for sessions and grants.
pub(crate) fn sessions(channel: Channel) -> SessionServiceClient<Channel> {
    SessionServiceClient::new(channel)
}

/// The stub for the cluster.
pub(crate) fn cluster(channel: Channel) -> ClusterServiceClient<Channel> {
    ClusterServiceClient::new(channel).max_decoding_message_size(limits::MESSAGE_BYTES_MAX)
}
