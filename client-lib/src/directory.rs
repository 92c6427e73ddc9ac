//! Calls to the directory: which address, how long, how often.

use crate::{
    connections::Connections,
    retry::{Attempts, Retry, named, restore},
    together::{Asked, Together},
};
use cairn_proto::{
    Error, Reason, Result, limits,
    net::{self, Connect, Traffic},
    request,
    v1::{
        self, cluster_service_client::ClusterServiceClient, directory_service_client::DirectoryServiceClient,
        lookup_answer::Outcome, session_service_client::SessionServiceClient,
    },
};
use parking_lot::{Mutex, RwLock};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};
use tonic::{Request, Response, Status, transport::Channel};

/// Longest wait for one answer before the call is made again, maybe at another address. Safe, since every mutating
/// call carries a request id.
const ATTEMPT: Duration = Duration::from_secs(5);

/// Most addresses that a client uses: those it was given, and those it learned.
const ADDRESSES_MAX: usize = 64;

/// The addresses of the directory and their connections.
///
/// One is in use until it does not answer, then the next is: what a client does stays together. Where several directories
/// share a store, any of them takes any call. They are learned from the first that answers, and each client uses one of
/// them by chance, so that clients spread over all.
#[derive(Debug)]
pub(crate) struct Directory {
    network: Arc<dyn Connect>,
    /// Only grows: places in it are kept by streams.
    places: RwLock<Vec<Arc<Place>>>,
    current: AtomicUsize,
    /// Whether one of several was chosen.
    chosen: AtomicBool,
    retry: Arc<Retry>,
}

/// What a lookup found.
#[derive(Debug)]
pub(crate) struct Found {
    /// Without groups and servers.
    pub answer: v1::LookupResponse,
    /// Those, of all lookups that were answered together.
    pub members: Arc<Members>,
}

/// Groups and servers that came with an answer.
#[derive(Debug, Default)]
pub(crate) struct Members(Mutex<Option<(Vec<v1::Group>, Vec<v1::Server>)>>);

impl Members {
    fn of(groups: Vec<v1::Group>, servers: Vec<v1::Server>) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Some((groups, servers)))))
    }

    /// Hands them to the first who calls; when it returns, they are learned.
    pub fn learn(&self, learn: impl FnOnce(&[v1::Group], &[v1::Server])) {
        let mut members = self.0.lock();
        if let Some((groups, servers)) = members.take() {
            learn(&groups, &servers);
        }
    }
}

#[derive(Debug)]
struct Place {
    address: String,
    connections: Connections,
    lookups: Arc<Together<v1::LookupRequest, Found>>,
}

impl Place {
    fn new(address: String) -> Arc<Self> {
        Arc::new(Self { address, connections: Connections::default(), lookups: Arc::default() })
    }
}

impl Directory {
    pub fn new(network: Arc<dyn Connect>, addresses: Vec<String>, retry: Arc<Retry>) -> Self {
        let places = RwLock::new(addresses.into_iter().map(Place::new).collect());
        let (current, chosen) = (AtomicUsize::new(0), AtomicBool::new(false));
        Self { network, places, current, chosen, retry }
    }

    /// Takes in which directories share the store, as one of them says; of one that is alone there is nothing to learn. The
    /// first time one of them is chosen.
    pub fn learn(&self, directories: &[v1::DirectoryAddress]) {
        if directories.is_empty() {
            return;
        }
        let mut places = self.places.write();
        for address in directories.iter().flat_map(|one| one.addresses.first()) {
            let known = places.iter().any(|place| place.address == *address);
            if !known && places.len() < ADDRESSES_MAX {
                places.push(Place::new(address.clone()));
            }
        }
        let named = |place: &Place| directories.iter().any(|one| one.addresses.contains(&place.address));
        let there: Vec<usize> = (0..places.len()).filter(|index| named(&places[*index])).collect();
        if there.is_empty() || self.chosen.swap(true, Ordering::Relaxed) {
            return;
        }
        let chosen = there[(self.retry.random() % there.len() as u64) as usize];
        self.current.store(chosen, Ordering::Relaxed);
    }

    /// The address now in use and its channel, for what lasts: streams.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` for an address of a wrong form.
    pub fn channel(&self) -> Result<(usize, Channel)> {
        let (index, place) = self.current();
        Ok((index, place.connections.first(|| self.connect(&place))?))
    }

    fn current(&self) -> (usize, Arc<Place>) {
        let places = self.places.read();
        let index = self.current.load(Ordering::Relaxed) % places.len();
        (index, places[index].clone())
    }

    fn connect(&self, place: &Place) -> Result<Channel> {
        net::channel(&self.network, &place.address, Traffic::Small)
    }

    pub fn address(&self, index: usize) -> String {
        let places = self.places.read();
        places[index % places.len()].address.clone()
    }

    /// Moves on from an address that does not answer, unless somebody did already.
    pub fn rotate(&self, from: usize) {
        let next = (from + 1) % self.places.read().len();
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
        let own = self.own_id();
        loop {
            match self.attempt(&attempts, extra, own.as_deref(), message.clone(), &method).await {
                Ok(answer) => return Ok(answer),
                Err(error) => attempts.pause(in_operation(error, own.as_deref())).await?,
            }
        }
    }

    async fn attempt<M, T, F, Fut>(
        &self,
        attempts: &Attempts<'_>,
        extra: Duration,
        own: Option<&str>,
        message: M,
        method: &F,
    ) -> Result<T>
    where
        F: Fn(Channel, Request<M>) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let (index, place) = self.current();
        let (channel, _under_way) = place.connections.pick(|| self.connect(&place))?;
        let mut request = Request::new(message);
        request::stamp(&mut request, own);
        let answer =
            async { method(channel, request).await.map_err(|status| restore(status, &place.address)) };
        self.wait(index, attempts, extra, answer).await.map(Response::into_inner)
    }

    /// Looks a path or inode up; with many lookups under way, several in one call.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub async fn lookup(self: &Arc<Self>, message: v1::LookupRequest) -> Result<Found> {
        match self.own_id() {
            Some(own) => request::scope(&own, self.look(message)).await,
            None => self.look(message).await,
        }
    }

    async fn look(self: &Arc<Self>, message: v1::LookupRequest) -> Result<Found> {
        let mut attempts = self.retry.start();
        loop {
            let (index, place) = self.current();
            let (directory, of) = (self.clone(), place.clone());
            let answer =
                place.lookups.ask(message.clone(), move |asked| directory.clone().look_up(of.clone(), asked));
            match self.wait(index, &attempts, Duration::ZERO, answer).await {
                Ok(found) => return Ok(found),
                Err(error) => attempts.pause(in_operation(error, None)).await?,
            }
        }
    }

    /// Makes one call for some lookups.
    async fn look_up(self: Arc<Self>, place: Arc<Place>, mut asked: Vec<Asked<v1::LookupRequest, Found>>) {
        while asked.len() > 1 {
            let lookups = asked.iter().map(|asked| asked.question.clone()).collect();
            let message = v1::LookupManyRequest { lookups };
            let answer = self.once(&place, message, |channel, request| async move {
                names(channel).lookup_many(request).await
            });
            let answer = match answer.await {
                // An older directory.
                Err(error) if error.reason == Reason::NotSupported => break,
                Err(error) => {
                    asked.into_iter().for_each(|asked| asked.answer(Err(error.clone())));
                    return;
                }
                Ok(answer) => answer,
            };
            if answer.answers.is_empty() {
                // Dropped, they are told that there was no answer.
                return;
            }
            let members = Members::of(answer.groups, answer.servers);
            let rest = asked.split_off(answer.answers.len().min(asked.len()));
            for (asked, answer) in asked.into_iter().zip(answer.answers) {
                asked.answer(match answer.outcome {
                    Some(Outcome::Found(answer)) => Ok(Found { answer, members: members.clone() }),
                    Some(Outcome::Error(error)) => Err(named(Error::from_wire(error), &place.address)),
                    None => Err(Error::internal("the directory answered a lookup with nothing")),
                });
            }
            // The answer was full before them.
            asked = rest;
        }
        let single = |asked: Asked<v1::LookupRequest, Found>| async {
            let found = self.once(&place, asked.question.clone(), |channel, request| async move {
                names(channel).lookup(request).await
            });
            asked.answer(found.await.map(|mut answer| {
                let groups = std::mem::take(&mut answer.groups);
                let members = Members::of(groups, std::mem::take(&mut answer.servers));
                Found { answer, members }
            }));
        };
        futures::future::join_all(asked.into_iter().map(single)).await;
    }

    /// Makes a call once, for as long as one attempt may take.
    async fn once<M, T, F, Fut>(&self, place: &Place, message: M, method: F) -> Result<T>
    where
        F: FnOnce(Channel, Request<M>) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let (channel, _under_way) = place.connections.pick(|| self.connect(place))?;
        let mut request = Request::new(message);
        request::stamp(&mut request, self.own_id().as_deref());
        match tokio::time::timeout(ATTEMPT, method(channel, request)).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => Err(restore(status, &place.address)),
            Err(_) => Err(silent(&place.address, ATTEMPT)),
        }
    }

    /// Waits for the answer of one attempt, and leaves an address that gives none for the next one.
    async fn wait<T>(
        &self,
        index: usize,
        attempts: &Attempts<'_>,
        extra: Duration,
        answer: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let patience = (ATTEMPT + extra).min(attempts.remaining()).max(Duration::from_millis(1));
        let error = match tokio::time::timeout(patience, answer).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(error)) => error,
            Err(_) => silent(&self.address(index), patience),
        };
        if matches!(error.reason, Reason::Unavailable | Reason::DeadlineExceeded | Reason::Rebuilding) {
            self.rotate(index);
        }
        Err(error)
    }

    /// An id for calls that are part of no operation.
    fn own_id(&self) -> Option<String> {
        request::current().is_none().then(|| format!("{:016x}", self.retry.random()))
    }
}

fn silent(address: &str, patience: Duration) -> Error {
    let why = format!("the directory at {address} did not answer in {} ms", patience.as_millis());
    Error::new(Reason::DeadlineExceeded, why).on(address)
}

/// An error that names the operation it is about.
fn in_operation(mut error: Error, own: Option<&str>) -> Error {
    let current = request::current();
    error.detail.request = current.as_deref().or(own).unwrap_or_default().to_owned();
    error
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
