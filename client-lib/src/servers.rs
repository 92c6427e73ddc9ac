//! File servers: their endpoints, connections, recent latencies, and which of them are better left alone for now.

use crate::{
    connections::{Connections, UnderWay},
    read::short::ShortReads,
    write::primary::SharedStream,
};
use async_trait::async_trait;
use cairn_proto::{
    Error, Reason, Result,
    id::ServerId,
    limits,
    net::{self, CONNECT_TIMEOUT, Connect, Io, Traffic, framed::Framed},
    v1::{self, file_service_client::FileServiceClient},
};
use parking_lot::{Mutex, RwLock};
use quick_cache::sync::Cache;
use std::{
    collections::VecDeque,
    fmt, io,
    sync::{
        Arc, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::{sync::watch, time::Instant};
use tonic::{Request, transport::Channel};

/// File servers that a client remembers.
const SERVERS_MAX: usize = 16_384;
/// Bulk connections to one server, taken in turn. One HTTP/2 connection is one task at each end.
const BULK_CONNECTIONS: usize = 2;
/// Wait for one of several endpoints before the next is tried.
const ENDPOINT_PATIENCE: Duration = Duration::from_millis(150);
/// An endpoint gets this time before it counts as one that leads to another server as well.
const ASTRAY_INTERVAL: Duration = Duration::from_secs(1);
/// Latencies kept of each server.
const SAMPLES: usize = 64;
/// Fewer say nothing.
const SAMPLES_MIN: usize = 8;
/// A server that does not answer an empty question for this long counts as away. Grows with its own latencies.
const PROBE_MIN: Duration = Duration::from_millis(120);
const PROBE_MAX: Duration = Duration::from_millis(250);
/// Pauses between questions to a server that was away.
const REPROBE_MIN: Duration = Duration::from_millis(100);
const REPROBE_MAX: Duration = Duration::from_secs(2);

/// Connects to whichever endpoint of a server answers, beginning with the one that did last.
struct Endpoints {
    network: Arc<dyn Connect>,
    uris: RwLock<Vec<String>>,
    good: AtomicUsize,
}

impl fmt::Debug for Endpoints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Endpoints").field(&*self.uris.read()).finish()
    }
}

impl Endpoints {
    fn set(&self, uris: Vec<String>) {
        let mut known = self.uris.write();
        if *known != uris {
            *known = uris;
            self.good.store(0, Ordering::Relaxed);
        }
    }

    /// Leaves the one that answered last for the next.
    fn go_on(&self) {
        let count = self.uris.read().len().max(1);
        let good = self.good.load(Ordering::Relaxed);
        self.good.store((good + 1) % count, Ordering::Relaxed);
    }

    fn is_local(&self) -> bool {
        self.uris.read().iter().any(|uri| socket_is_there(uri) == Some(true))
    }
}

/// For `unix:` endpoints whether their socket exists on this host.
fn socket_is_there(uri: &str) -> Option<bool> {
    uri.strip_prefix("unix:").map(|path| std::path::Path::new(path).exists())
}

#[async_trait]
impl Connect for Endpoints {
    async fn connect(&self, _: &str) -> io::Result<Box<dyn Io>> {
        let uris: Vec<String> = self.uris.read().clone();
        let good = self.good.load(Ordering::Relaxed);
        let mut failure = io::Error::new(io::ErrorKind::NotFound, "the server has no endpoint here");
        for step in 0..uris.len() {
            let index = (good + step) % uris.len();
            let uri = &uris[index];
            if socket_is_there(uri) == Some(false) {
                continue;
            }
            let patience = if step + 1 < uris.len() { ENDPOINT_PATIENCE } else { CONNECT_TIMEOUT };
            match tokio::time::timeout(patience, self.network.connect(uri)).await {
                Ok(Ok(io)) => {
                    self.good.store(index, Ordering::Relaxed);
                    return Ok(io);
                }
                Ok(Err(error)) => failure = io::Error::new(error.kind(), format!("{uri}: {error}")),
                Err(_) => failure = io::Error::new(io::ErrorKind::TimedOut, format!("{uri}: no connection")),
            }
        }
        Err(failure)
    }
}

/// All file servers that the client has heard of.
#[derive(Debug)]
pub(crate) struct Servers {
    network: Arc<dyn Connect>,
    links: Cache<ServerId, Arc<ServerLink>>,
    cluster_id: Arc<Mutex<String>>,
}

impl Servers {
    pub fn new(network: Arc<dyn Connect>) -> Self {
        Self { network, links: Cache::new(SERVERS_MAX), cluster_id: Arc::default() }
    }

    /// The cluster that all of them belong to, once it is known.
    pub fn cluster_id(&self) -> &Arc<Mutex<String>> {
        &self.cluster_id
    }

    /// Takes in what an answer says of servers.
    pub fn learn(&self, servers: &[v1::Server]) {
        for server in servers.iter().filter(|server| server.id != 0 && !server.endpoints.is_empty()) {
            let id = ServerId(server.id);
            match self.links.get(&id) {
                Some(link) => link.update(server),
                None => self.links.insert(id, ServerLink::new(&self.network, server, &self.cluster_id)),
            }
        }
    }

    pub fn get(&self, id: ServerId) -> Option<Arc<ServerLink>> {
        self.links.get(&id)
    }

    /// Whether calls to it had better go elsewhere.
    pub fn is_avoided(&self, id: ServerId) -> bool {
        self.links.get(&id).is_none_or(|link| link.is_avoided())
    }

    /// Those among `ids` that are better left alone now.
    pub fn avoided(&self) -> Vec<u64> {
        self.links.iter().filter(|(_, link)| link.is_avoided()).map(|(id, _)| id.0).collect()
    }
}

/// Where a server is, as the directory says.
fn uris(server: &v1::Server) -> Vec<String> {
    server.endpoints.iter().take(16).map(|endpoint| endpoint.uri.clone()).collect()
}

/// One file server.
pub(crate) struct ServerLink {
    pub id: ServerId,
    endpoints: Arc<Endpoints>,
    cluster_id: Arc<Mutex<String>>,
    small: Connections,
    bulk: [Mutex<Option<Channel>>; BULK_CONNECTIONS],
    turn: AtomicUsize,
    /// Reads of short ranges.
    pub reads: Arc<ShortReads>,
    state: Mutex<LinkState>,
    failures: watch::Sender<u64>,
    /// The long-lived stream for small chunks.
    pub stream: Mutex<Option<SharedStream>>,
    this: Weak<ServerLink>,
}

#[derive(Debug)]
struct LinkState {
    server: Arc<v1::Server>,
    latencies: VecDeque<Duration>,
    /// Of those, as it was lately.
    high_latency: Option<Duration>,
    /// Latencies that came since.
    fresh: usize,
    avoided: bool,
    last_alive: Option<Instant>,
    astray_at: Option<Instant>,
}

impl fmt::Debug for ServerLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerLink").field("id", &self.id).field("endpoints", &self.endpoints).finish()
    }
}

impl ServerLink {
    fn new(network: &Arc<dyn Connect>, server: &v1::Server, cluster_id: &Arc<Mutex<String>>) -> Arc<Self> {
        let uris = RwLock::new(uris(server));
        let endpoints = Endpoints { network: network.clone(), uris, good: AtomicUsize::new(0) };
        Arc::new_cyclic(|this| Self {
            id: ServerId(server.id),
            endpoints: Arc::new(endpoints),
            cluster_id: cluster_id.clone(),
            small: Connections::default(),
            bulk: Default::default(),
            turn: AtomicUsize::new(0),
            reads: Arc::default(),
            state: Mutex::new(LinkState {
                server: Arc::new(server.clone()),
                latencies: VecDeque::new(),
                high_latency: None,
                fresh: 0,
                avoided: false,
                last_alive: None,
                astray_at: None,
            }),
            failures: watch::Sender::new(0),
            stream: Mutex::new(None),
            this: this.clone(),
        })
    }

    fn update(&self, server: &v1::Server) {
        let mut state = self.state.lock();
        // Every answer says it, and hardly ever something new.
        if *state.server == *server {
            return;
        }
        self.endpoints.set(uris(server));
        if state.server.incarnation != server.incarnation {
            // Another life of its process: what was seen of the old one says nothing.
            state.latencies.clear();
            state.high_latency = None;
        }
        state.server = Arc::new(server.clone());
    }

    /// As the directory describes it.
    pub fn server(&self) -> Arc<v1::Server> {
        self.state.lock().server.clone()
    }

    fn connect(&self, traffic: Traffic) -> Result<Channel> {
        // The address names the server; where it is, `Endpoints` knows.
        let network: Arc<dyn Connect> = self.endpoints.clone();
        net::channel(&network, &format!("http://file-server-{}:1", self.id), traffic)
    }

    /// A call that only this server of this cluster may answer.
    pub fn request<T>(&self, message: T) -> Request<T> {
        net::meant_for(message, &self.cluster_id.lock(), self.id)
    }

    /// Makes of an error what it means for a caller: an address that leads to another server is left for the next one,
    /// and the server counts as one that cannot be reached.
    pub fn judge(&self, error: Error) -> Error {
        if error.reason != Reason::WrongCluster {
            return error;
        }
        let is_new = {
            let mut state = self.state.lock();
            // Calls that fail together say it of the same address.
            let is_new = state.astray_at.is_none_or(|at| at.elapsed() >= ASTRAY_INTERVAL);
            if is_new {
                state.astray_at = Some(Instant::now());
            }
            is_new
        };
        if is_new {
            tracing::warn!(server = self.id.0, %error, "another server answers at its address, its next one is tried");
            self.endpoints.go_on();
            self.small.forget();
            for slot in &self.bulk {
                slot.lock().take();
            }
        }
        Error::unavailable(format!("file server {} was not reached: {}", self.name(), error.message()))
            .on(self.name())
    }

    /// The stub on the connection for what lasts or is rare.
    ///
    /// # Errors
    /// `INTERNAL` only.
    pub fn small(&self) -> Result<FileServiceClient<Framed<Channel>>> {
        Ok(stub(self.small.first(|| self.connect(Traffic::Small))?))
    }

    /// The stub on one of the connections for small calls, for as long as the call is under way.
    ///
    /// # Errors
    /// `INTERNAL` only.
    pub fn shared(&self) -> Result<(FileServiceClient<Framed<Channel>>, UnderWay)> {
        let (channel, under_way) = self.small.pick(|| self.connect(Traffic::Small))?;
        Ok((stub(channel), under_way))
    }

    /// The stub on one of the connections for chunk data.
    ///
    /// # Errors
    /// `INTERNAL` only.
    pub fn bulk(&self) -> Result<FileServiceClient<Framed<Channel>>> {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed) % BULK_CONNECTIONS;
        let mut slot = self.bulk[turn].lock();
        if let Some(channel) = &*slot {
            return Ok(stub(channel.clone()));
        }
        Ok(stub(slot.insert(self.connect(Traffic::Bulk)?).clone()))
    }

    /// It again, to go with a task.
    pub fn shared_link(&self) -> Option<Arc<Self>> {
        self.this.upgrade()
    }

    /// How messages name it.
    pub fn name(&self) -> String {
        let uri = self.endpoints.uris.read().first().cloned().unwrap_or_default();
        format!("{} at {uri}", self.id)
    }

    /// Whether it can be reached without leaving the host.
    pub fn is_local(&self) -> bool {
        self.endpoints.is_local()
    }

    pub fn is_avoided(&self) -> bool {
        self.state.lock().avoided
    }

    /// Counts up whenever the server is found to be away.
    pub fn failures(&self) -> watch::Receiver<u64> {
        self.failures.subscribe()
    }

    /// An answer came, of whatever kind.
    pub fn alive(&self) {
        let mut state = self.state.lock();
        state.avoided = false;
        state.last_alive = Some(Instant::now());
    }

    /// An answer's first byte came after `latency`.
    pub fn answered_in(&self, latency: Duration) {
        let mut state = self.state.lock();
        if state.latencies.len() == SAMPLES {
            state.latencies.pop_front();
        }
        state.latencies.push_back(latency);
        state.fresh += 1;
        // Every read asks for it of every replica: it is not computed each time.
        let count = state.latencies.len();
        if count >= SAMPLES_MIN && (count < SAMPLES || state.fresh >= SAMPLES_MIN) {
            state.fresh = 0;
            let mut sorted: Vec<_> = state.latencies.iter().copied().collect();
            sorted.sort_unstable();
            state.high_latency = sorted.get(count * 95 / 100).copied();
        }
    }

    /// The 95th percentile of its recent latencies, once there are a few.
    pub fn high_latency(&self) -> Option<Duration> {
        self.state.lock().high_latency
    }

    /// Whether nothing was heard of it for `time`.
    pub fn is_silent_for(&self, time: Duration) -> bool {
        self.state.lock().last_alive.is_none_or(|at| at.elapsed() >= time)
    }

    /// It failed: calls go elsewhere until it answers again, which a background task keeps asking for.
    pub fn away(&self, why: &Error) {
        let first = {
            let mut state = self.state.lock();
            !std::mem::replace(&mut state.avoided, true)
        };
        self.failures.send_modify(|count| *count += 1);
        if !first {
            return;
        }
        tracing::info!(server = self.id.0, error = %why, "a file server is away, others are used");
        let this = self.this.clone();
        tokio::spawn(async move {
            let mut pause = REPROBE_MIN;
            loop {
                tokio::time::sleep(pause).await;
                let Some(link) = this.upgrade() else { return };
                if !link.is_avoided() || link.probe(PROBE_MAX).await {
                    return;
                }
                pause = (pause * 2).min(REPROBE_MAX);
            }
        });
    }

    /// How long a living server may take to answer an empty question.
    pub fn probe_patience(&self) -> Duration {
        self.high_latency().map_or(PROBE_MIN, |high| (high * 4).clamp(PROBE_MIN, PROBE_MAX))
    }

    /// Asks a question that costs the server nothing. Any answer of its own, also a refusal, is a sign of life.
    pub async fn probe(&self, patience: Duration) -> bool {
        let Ok(mut client) = self.small() else { return false };
        // A read without a chunk is refused at once.
        let request = self.request(v1::ReadRequest::default());
        let answer = tokio::time::timeout(patience, client.read(request)).await;
        let alive = match answer {
            Ok(Ok(_)) => true,
            Ok(Err(status)) if Error::from(status.clone()).reason == Reason::WrongCluster => {
                self.judge(status.into());
                false
            }
            Ok(Err(status)) => {
                !status.details().is_empty()
                    || !matches!(
                        status.code(),
                        tonic::Code::Unavailable
                            | tonic::Code::Unknown
                            | tonic::Code::Internal
                            | tonic::Code::Cancelled
                            | tonic::Code::DeadlineExceeded
                    )
            }
            Err(_) => false,
        };
        if alive {
            self.alive();
        }
        alive
    }
}

fn stub(channel: Channel) -> FileServiceClient<Framed<Channel>> {
    FileServiceClient::new(Framed::client(channel))
        .max_decoding_message_size(limits::MESSAGE_BYTES_MAX)
        .max_encoding_message_size(limits::MESSAGE_BYTES_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct OnlyThis(&'static str, Mutex<Vec<String>>);

    #[async_trait]
    impl Connect for OnlyThis {
        async fn connect(&self, uri: &str) -> io::Result<Box<dyn Io>> {
            self.1.lock().push(uri.to_owned());
            if uri != self.0 {
                std::future::pending::<()>().await;
            }
            Ok(Box::new(tokio::io::duplex(16).0))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_endpoint_that_answered_is_remembered_and_absent_sockets_are_left_out() {
        let network = Arc::new(OnlyThis("http://good:1", Mutex::default()));
        let uris = ["unix:/does/not/exist", "http://silent:1", "http://good:1"].map(str::to_owned).to_vec();
        let endpoints =
            Endpoints { network: network.clone(), uris: RwLock::new(uris), good: AtomicUsize::new(0) };
        assert!(!endpoints.is_local());
        endpoints.connect("").await.unwrap();
        assert_eq!(std::mem::take(&mut *network.1.lock()), ["http://silent:1", "http://good:1"]);
        endpoints.connect("").await.unwrap();
        assert_eq!(*network.1.lock(), ["http://good:1"]);
    }

    #[tokio::test]
    async fn a_high_percentile_needs_a_few_samples() {
        let network: Arc<dyn Connect> = Arc::new(OnlyThis("", Mutex::default()));
        let link = ServerLink::new(&network, &v1::Server { id: 1, ..Default::default() }, &Arc::default());
        for ms in 1..=7 {
            link.answered_in(Duration::from_millis(ms));
        }
        assert_eq!(link.high_latency(), None);
        for ms in 8..=200 {
            link.answered_in(Duration::from_millis(ms));
            let of_last = (ms.saturating_sub(64), ms);
            let exact = of_last.0 + (of_last.1 - of_last.0) * 95 / 100 + 1;
            let told = link.high_latency().unwrap().as_millis() as u64;
            assert!(
                (exact - SAMPLES_MIN as u64..=exact).contains(&told),
                "{told} of the last 64, up to {ms}"
            );
        }
    }
}
