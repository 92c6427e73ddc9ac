//! The client: what it is made of, and how one is made.

use crate::{
    directory::Directory,
    read::{hedge::HedgeBudget, plan::Layout},
    retry::{Observer, Retry},
    servers::Servers,
    session::{Readers, Sessions},
};
use cairn_proto::{
    Error, Result, convert, limits,
    net::{Connect, SystemNetwork},
    request, v1,
};
use quick_cache::sync::Cache;
use std::{sync::Arc, time::Duration};
use tokio::{
    sync::{Mutex, OwnedSemaphorePermit, Semaphore},
    time::Instant,
};

/// Groups whose members are remembered.
const GROUPS_MAX: usize = 16_384;
/// Versions of long files whose extents are remembered.
const LAYOUTS_MAX: usize = 64;
/// Directories whose replication is remembered.
const PLACEMENTS_MAX: usize = 4_096;
/// Reports of bad copies under way.
const REPORTS_MAX: usize = 8;
/// Bad copies that are not reported again.
const REPORTED_MAX: usize = 1_024;
/// Chunks of the default length that are sealed but not yet durable, over all handles of a client; with those being
/// filled, this bounds its memory.
const CHUNKS_IN_FLIGHT: usize = 8;
/// Default deadline of an operation.
const DEADLINE: Duration = Duration::from_secs(30);
/// Most addresses of the directory.
const DIRECTORIES_MAX: usize = 64;

/// A file system. Cheap to clone; clones share connections, the session and caches.
///
/// Nothing is connected before the first call. See the [crate documentation](crate) for an example.
#[derive(Clone, Debug)]
pub struct Client {
    core: Arc<Core>,
}

/// What the parts of a client share.
#[derive(Debug)]
pub(crate) struct Core {
    pub directory: Arc<Directory>,
    pub sessions: Sessions,
    pub servers: Servers,
    pub retry: Arc<Retry>,
    pub readers: Arc<Readers>,
    pub chunk_bytes: usize,
    pub hedges: HedgeBudget,
    pub groups: Cache<u64, Arc<v1::Group>>,
    pub layouts: Cache<(u64, u64, u64), Arc<Layout>>,
    pub placements: Cache<String, (u32, Instant)>,
    /// Blocks of 4,096 bytes that may be under way.
    pub in_flight: Arc<Semaphore>,
    in_flight_max: usize,
    pub reporting: Arc<Semaphore>,
    pub reported: Cache<(u64, u32, u64), ()>,
    pub refreshed: Mutex<Option<Instant>>,
}

impl Client {
    /// A client with default settings for the directory at any of these addresses (`http://host:port` or
    /// `unix:/path`). None needs to answer yet: the first call connects, and waits up to its deadline.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` for an address of another form, or none.
    #[allow(clippy::unused_async)]
    pub async fn connect<A: AsRef<str>>(directories: &[A]) -> Result<Self> {
        directories
            .iter()
            .fold(Self::builder(), |builder, address| builder.directory(address.as_ref()))
            .build()
    }

    /// For other than default settings.
    pub fn builder() -> ClientBuilder {
        ClientBuilder::default()
    }

    /// Ends the session with its locks and grants. Calls that need a session fail afterwards, on all clones.
    ///
    /// # Errors
    /// When the directory cannot be told; the session then ends after its TTL.
    pub async fn close(&self) -> Result<()> {
        self.core.sessions.close().await
    }

    /// The chunk size that this client writes with, bytes.
    pub fn chunk_bytes(&self) -> u64 {
        self.core.chunk_bytes as u64
    }

    pub(crate) fn core(&self) -> &Arc<Core> {
        &self.core
    }
}

impl Core {
    /// Runs one operation of the caller under an id that all services log, and that its error names; within another
    /// operation it is a part of that one.
    pub async fn operation<T>(&self, future: impl Future<Output = Result<T>>) -> Result<T> {
        if request::current().is_some() {
            return future.await;
        }
        let id = format!("{:016x}", self.retry.random());
        request::scope(&id, future).await.map_err(|mut error| {
            error.detail.request = id;
            error
        })
    }

    /// Room for a chunk among those under way; a chunk longer than all of it takes it alone.
    ///
    /// # Errors
    /// Never while the client lives.
    pub async fn place_in_flight(&self, length: usize) -> Result<OwnedSemaphorePermit> {
        let blocks = length.div_ceil(limits::BLOCK_BYTES).min(self.in_flight_max);
        let place = self.in_flight.clone().acquire_many_owned(blocks as u32).await;
        place.map_err(|_| Error::internal("the client has no room for chunks"))
    }
}

/// Settings of a [`Client`].
#[derive(Clone, Debug)]
#[must_use]
pub struct ClientBuilder {
    directories: Vec<String>,
    network: Arc<dyn Connect>,
    owner: Option<String>,
    session_ttl: Duration,
    chunk_bytes: u64,
    deadline: Duration,
    retry_budget: Option<u32>,
    observer: Observer,
    seed: Option<u64>,
}

impl Default for ClientBuilder {
    fn default() -> Self {
        Self {
            directories: Vec::new(),
            network: Arc::new(SystemNetwork),
            owner: None,
            session_ttl: Duration::from_millis(limits::SESSION_TTL_MS_DEFAULT),
            chunk_bytes: limits::CHUNK_BYTES_DEFAULT,
            deadline: DEADLINE,
            retry_budget: None,
            observer: Observer::default(),
            seed: None,
        }
    }
}

impl ClientBuilder {
    /// Adds an address of the directory; at most 64.
    pub fn directory(mut self, address: impl Into<String>) -> Self {
        self.directories.push(address.into());
        self
    }

    /// Makes connections by this instead of the machine's network.
    pub fn network(mut self, network: Arc<dyn Connect>) -> Self {
        self.network = network;
        self
    }

    /// The name shown to others as holder of locks; at most 255 bytes. Default: user, host and process id.
    pub fn owner(mut self, owner: impl Into<String>) -> Self {
        self.owner = Some(owner.into());
        self
    }

    /// Life of the session without renewal: how long locks stay when this process dies. 1 s to 10 min, default 10 s.
    pub fn session_ttl(mut self, ttl: Duration) -> Self {
        self.session_ttl = ttl;
        self
    }

    /// Chunk size of writes: a multiple of 4,096, at most 64 MiB, default 8 MiB. Memory of a client is bounded by
    /// about 8 chunks under way, and one for each handle that writes. Very long files get longer chunks by themselves.
    pub fn chunk_bytes(mut self, chunk_bytes: u64) -> Self {
        self.chunk_bytes = chunk_bytes;
        self
    }

    /// How long one operation may try before it reports the last failure. Default 30 s.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Retries in a burst against servers that say they are overloaded; more come back at 20 a second. Default 100.
    pub fn retry_budget(mut self, retries: u32) -> Self {
        self.retry_budget = Some(retries);
        self
    }

    /// Calls `observer` before each pause between two attempts, with what the last one failed of and how long
    /// ago the first one failed. For programs that tell a person why they wait. It must not block.
    pub fn on_retry(mut self, observer: impl Fn(&Error, Duration) + Send + Sync + 'static) -> Self {
        self.observer = Observer(Some(Arc::new(observer)));
        self
    }

    /// Seeds every random choice of the client. Default: random.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = Some(seed);
        self
    }

    /// Makes the client. It connects at its first call.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` or `LIMIT_EXCEEDED` for a setting out of range, or no address.
    pub fn build(self) -> Result<Client> {
        if self.directories.is_empty() || self.directories.len() > DIRECTORIES_MAX {
            return Err(Error::invalid(format!(
                "a client needs 1 to {DIRECTORIES_MAX} addresses of the directory, such as http://127.0.0.1:7400"
            )));
        }
        for address in &self.directories {
            if !address.starts_with("unix:") {
                cairn_proto::net::authority(address).map_err(|error| Error::invalid(error.to_string()))?;
            }
        }
        let chunk_bytes = convert::chunk_length(self.chunk_bytes)?;
        if chunk_bytes % limits::BLOCK_BYTES as u64 != 0 {
            return Err(Error::invalid(format!(
                "a chunk size of {chunk_bytes} is no multiple of {}",
                limits::BLOCK_BYTES
            )));
        }
        let ttl_ms = self.session_ttl.as_millis() as u64;
        if !(limits::SESSION_TTL_MS_MIN..=limits::SESSION_TTL_MS_MAX).contains(&ttl_ms) {
            return Err(Error::limit(format!(
                "a session lives {} to {} ms without renewal, not {ttl_ms}",
                limits::SESSION_TTL_MS_MIN,
                limits::SESSION_TTL_MS_MAX
            )));
        }
        let owner = self.owner.unwrap_or_else(own_name);
        convert::owner(&owner)?;
        let seed = self.seed.unwrap_or_else(|| uuid::Uuid::new_v4().as_u64_pair().0);
        let retry = Arc::new(Retry::new(self.deadline, self.retry_budget, seed).observed_by(self.observer));
        let directory = Arc::new(Directory::new(self.network.clone(), self.directories, retry.clone()));
        let readers = Arc::new(Readers::default());
        let in_flight_max = CHUNKS_IN_FLIGHT * (chunk_bytes as usize / limits::BLOCK_BYTES);
        let servers = Servers::new(self.network);
        let sessions = Sessions::new(
            directory.clone(),
            readers.clone(),
            retry.clone(),
            owner,
            self.session_ttl,
            servers.cluster_id().clone(),
        );
        Ok(Client {
            core: Arc::new(Core {
                directory,
                sessions,
                servers,
                retry,
                readers,
                chunk_bytes: chunk_bytes as usize,
                hedges: HedgeBudget::default(),
                groups: Cache::new(GROUPS_MAX),
                layouts: Cache::new(LAYOUTS_MAX),
                placements: Cache::new(PLACEMENTS_MAX),
                in_flight: Arc::new(Semaphore::new(in_flight_max)),
                in_flight_max,
                reporting: Arc::new(Semaphore::new(REPORTS_MAX)),
                reported: Cache::new(REPORTED_MAX),
                refreshed: Mutex::default(),
            }),
        })
    }
}

/// User, host and process as far as the environment tells, within the limit.
fn own_name() -> String {
    let from = |names: [&str; 2], other: &str| {
        names
            .into_iter()
            .find_map(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
            .unwrap_or_else(|| other.to_owned())
    };
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map(|name| name.trim().to_owned())
        .unwrap_or_else(|_| from(["HOSTNAME", "HOST"], "host"));
    let mut name = format!("{}@{host}", from(["USER", "LOGNAME"], "user"));
    let process = format!(":{}", std::process::id());
    let mut end = name.len().min(limits::OWNER_BYTES_MAX - process.len());
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    name.truncate(end);
    name + &process
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_proto::Reason;

    #[test]
    fn settings_are_checked_before_anything_connects() {
        let builder = || Client::builder().directory("http://127.0.0.1:7400");
        assert!(builder().build().is_ok());
        let reason = |builder: ClientBuilder| builder.build().unwrap_err().reason;
        assert_eq!(reason(Client::builder()), Reason::InvalidArgument);
        assert_eq!(reason(builder().directory("7400")), Reason::InvalidArgument);
        assert_eq!(reason(builder().chunk_bytes(5_000)), Reason::InvalidArgument);
        assert_eq!(reason(builder().chunk_bytes(0)), Reason::LimitExceeded);
        assert_eq!(reason(builder().chunk_bytes(128 << 20)), Reason::LimitExceeded);
        assert_eq!(reason(builder().session_ttl(Duration::from_millis(10))), Reason::LimitExceeded);
        assert_eq!(reason(builder().owner("x".repeat(256))), Reason::LimitExceeded);
    }

    #[test]
    fn the_own_name_is_within_the_limit() {
        assert!(convert::owner(&own_name()).is_ok());
        assert!(own_name().contains('@'));
    }
}
