//! Calls to etcd: one connection to one member at a time, another one when that fails.
//!
//! A call is sent only on a connection that stands, so that "could not connect" is never mistaken for "may have been
//! applied". All calls ask for a member that hears a leader (`hasleader`): one that is cut off says so at once, before it
//! does anything, and the next member is tried.

use super::{
    api::{
        AuthenticateRequest, ResponseHeader, StatusRequest, StatusResponse, TxnRequest, TxnResponse,
        auth_client::AuthClient, kv_client::KvClient, maintenance_client::MaintenanceClient,
    },
    failure::{self, Failure},
    link::{Link, connect},
    options::EtcdOptions,
};
use cairn_proto::{Error, Reason, Result, net::Connect};
use parking_lot::Mutex;
use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::time::{Instant, sleep, timeout};
use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataValue},
};

/// Longest that one member may take to answer before another is asked, or the outcome of a change is unknown.
pub(super) const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// A read, or a change that no member took, is tried again for this long in all.
const TRY_FOR: Duration = Duration::from_secs(10);
/// Between two attempts, growing to the second.
const PAUSE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));
/// Largest answer that is taken. A key and its value have at most about 1 MiB, so several of the largest fit.
pub(super) const ANSWER_BYTES_MAX: usize = 32 * 1024 * 1024;

/// Talks to one etcd.
#[derive(Debug)]
pub(super) struct Client {
    options: EtcdOptions,
    network: Arc<dyn Connect>,
    links: Mutex<Links>,
    /// One connection is made at a time, however many wait for it.
    connecting: tokio::sync::Mutex<()>,
    /// The highest revision that was seen.
    seen: AtomicI64,
    /// The etcd cluster that answered first; 0 before.
    cluster: AtomicU64,
}

#[derive(Debug, Default)]
struct Links {
    current: Option<Link>,
    /// Connections made so far; chooses the member for the next one too.
    made: u64,
}

impl Client {
    /// Connects at its first call. `first` chooses the member that is tried first, so that several clients spread.
    pub(super) fn new(options: EtcdOptions, network: Arc<dyn Connect>, first: u64) -> Self {
        let links = Links { current: None, made: first };
        Self {
            options,
            network,
            links: Mutex::new(links),
            connecting: tokio::sync::Mutex::new(()),
            seen: AtomicI64::new(0),
            cluster: AtomicU64::new(0),
        }
    }

    /// What it connects through.
    pub(super) fn network(&self) -> Arc<dyn Connect> {
        self.network.clone()
    }

    /// The highest revision that any answer told.
    pub(super) fn seen(&self) -> i64 {
        self.seen.load(Ordering::Acquire)
    }

    /// A call that changes nothing: tried at one member after the other.
    pub(super) async fn read<T, F>(&self, call: impl Fn(Link) -> F + Send) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, Status>> + Send,
    {
        let mut retry = Retry::new();
        loop {
            let failure = match self.link().await {
                Ok(link) => match self.attempt(&link, call(link.clone())).await {
                    Err(failure @ (Failure::Lost(_) | Failure::Elsewhere(_) | Failure::Token(_))) => failure,
                    done => return done,
                },
                Err(failure) => failure,
            };
            retry.pause(failure).await?;
        }
    }

    /// A transaction that may change something: sent once, and again only where it certainly had no effect.
    pub(super) async fn txn(&self, txn: TxnRequest) -> Result<TxnResponse, Failure> {
        let mut retry = Retry::new();
        loop {
            let failure = match self.link().await {
                Ok(link) => {
                    let mut kv = self.kv(&link);
                    let request = link.request(txn.clone(), CALL_TIMEOUT);
                    let call = async move { kv.txn(request).await.map(tonic::Response::into_inner) };
                    match self.attempt(&link, call).await {
                        Err(failure @ (Failure::Elsewhere(_) | Failure::Token(_))) => failure,
                        done => return done,
                    }
                }
                Err(failure) => failure,
            };
            retry.pause(failure).await?;
        }
    }

    /// What the member that is connected says of itself.
    pub(super) async fn status(&self) -> Result<StatusResponse, Failure> {
        self.read(|link| async move {
            let mut maintenance = MaintenanceClient::new(link.channel.clone());
            let request = link.request(StatusRequest {}, CALL_TIMEOUT);
            maintenance.status(request).await.map(tonic::Response::into_inner)
        })
        .await
    }

    /// Calls on keys over a connection.
    pub(super) fn kv(&self, link: &Link) -> KvClient<tonic::transport::Channel> {
        KvClient::new(link.channel.clone())
            .max_decoding_message_size(ANSWER_BYTES_MAX)
            .max_encoding_message_size(ANSWER_BYTES_MAX)
    }

    /// Takes the revision out of an answer, and makes sure that it is an answer of this etcd. `before` is what
    /// [`Client::seen`] was when the call began.
    pub(super) fn revision(&self, header: Option<&ResponseHeader>, before: i64) -> Result<i64> {
        let Some(header) = header else { return Err(malformed("an answer without a header")) };
        let known = self.cluster.compare_exchange(0, header.cluster_id, Ordering::AcqRel, Ordering::Acquire);
        if let Err(known) = known
            && known != header.cluster_id
        {
            return Err(Error::new(
                Reason::WrongCluster,
                format!(
                    "the members named in {} are of different etcd clusters, {known:x} and {:x}: name those of one",
                    self.options.address, header.cluster_id
                ),
            ));
        }
        if header.revision < before {
            return Err(Error::new(
                Reason::Io,
                format!(
                    "etcd at {} went back from revision {before} to {}: stop the directory, and see whether etcd was \
                     restored from a snapshot under it",
                    self.options.address, header.revision
                ),
            ));
        }
        self.seen.fetch_max(header.revision, Ordering::AcqRel);
        Ok(header.revision)
    }

    /// The connection, made if there is none.
    pub(super) async fn link(&self) -> Result<Link, Failure> {
        if let Some(link) = self.current() {
            return Ok(link);
        }
        let _connecting = self.connecting.lock().await;
        if let Some(link) = self.current() {
            return Ok(link);
        }
        let members = &self.options.address.endpoints;
        let mut refused = Vec::new();
        for _ in 0..members.len() {
            let number = {
                let mut links = self.links.lock();
                links.made = links.made.wrapping_add(1);
                links.made
            };
            let member = &members[(number % members.len() as u64) as usize];
            match self.join(member, number).await {
                Ok(link) => {
                    tracing::debug!(member, "connected to etcd");
                    self.links.lock().current = Some(link.clone());
                    return Ok(link);
                }
                // A wrong password is wrong everywhere.
                Err(failure @ Failure::Refused(_)) => return Err(failure),
                Err(failure) => refused.push(failure.into_error().message().to_owned()),
            }
        }
        Err(Failure::Elsewhere(Error::unavailable(refused.join("; "))))
    }

    async fn join(&self, member: &str, number: u64) -> Result<Link, Failure> {
        let mut link = connect(&self.options, &self.network, member, number).await?;
        if let Some(user) = &self.options.user {
            let mut auth = AuthClient::new(link.channel.clone());
            let request = AuthenticateRequest { name: user.name.clone(), password: user.password.clone() };
            let mut request = Request::new(request);
            request.set_timeout(CALL_TIMEOUT);
            let call = timeout(CALL_TIMEOUT, auth.authenticate(request)).await;
            let answer = call.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer in time")));
            let token = answer.map_err(|status| failure::of(&status, member))?.into_inner().token;
            let mut token: MetadataValue<Ascii> =
                token.parse().map_err(|_| Failure::Refused(malformed("a token that cannot be sent")))?;
            // No log shows it.
            token.set_sensitive(true);
            link.token = Some(token);
        }
        Ok(link)
    }

    fn current(&self) -> Option<Link> {
        self.links.lock().current.clone()
    }

    /// Runs a call; a connection that failed it is given up, so that the next call goes elsewhere.
    async fn attempt<T>(
        &self,
        link: &Link,
        call: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, Failure> {
        let answer = match timeout(CALL_TIMEOUT, call).await {
            Ok(answer) => answer,
            Err(_) => {
                Err(Status::deadline_exceeded(format!("no answer within {} s", CALL_TIMEOUT.as_secs())))
            }
        };
        answer.map_err(|status| self.failed(link, &status))
    }

    /// What a status means; the connection is given up where another may do better.
    pub(super) fn failed(&self, link: &Link, status: &Status) -> Failure {
        let failure = match failure::of(status, &link.member) {
            // There is none that could be renewed.
            Failure::Token(error) if self.options.user.is_none() => Failure::Refused(error),
            failure => failure,
        };
        // What fails the whole of etcd does so on every connection; giving this one up costs little.
        if matches!(failure, Failure::Lost(_) | Failure::Elsewhere(_) | Failure::Token(_)) {
            tracing::debug!(member = link.member, %status, "another connection to etcd is made");
            let mut links = self.links.lock();
            if links.current.as_ref().is_some_and(|current| current.number == link.number) {
                links.current = None;
            }
        }
        failure
    }
}

/// An answer that no etcd gives.
pub(super) fn malformed(what: &str) -> Error {
    Error::internal(format!("etcd sent {what}: is there something else at its address?"))
}

/// Attempts of one call.
struct Retry {
    until: Instant,
    pause: Duration,
}

impl Retry {
    fn new() -> Self {
        Self { until: Instant::now() + TRY_FOR, pause: PAUSE.0 }
    }

    /// Waits before the next attempt; the failure comes back when it was the last.
    async fn pause(&mut self, failure: Failure) -> Result<(), Failure> {
        if matches!(failure, Failure::Refused(_)) || Instant::now() + self.pause >= self.until {
            return Err(failure);
        }
        sleep(self.pause).await;
        self.pause = (self.pause * 2).min(PAUSE.1);
        Ok(())
    }
}
