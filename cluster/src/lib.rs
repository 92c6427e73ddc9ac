//! A whole Cairn in one process: a directory and file servers on the caller's runtime, over real sockets.
//!
//! For programs that want to try themselves against a cluster that loses servers, and for `cairn up`:
//!
//! ```no_run
//! # async fn run() -> cairn_proto::Result<()> {
//! let cluster = cluster::Cluster::start(3).await?;
//! let client = cluster.client().await?;
//! // ... use the client, and meanwhile:
//! cluster.kill(0).await; // as SIGKILL would: connections break, nothing is flushed
//! cluster.restart(0).await?; // the same server with the same disk
//! cluster.partition(1); // a pulled cable: bytes neither arrive nor fail
//! cluster.heal(1);
//! cluster.wait_ready().await?; // all servers live again
//! # drop(client);
//! cluster.shutdown().await
//! # }
//! ```
//!
//! | to have | see |
//! | --- | --- |
//! | another number of servers, zones, data that stays, memory disks, other times | [`Cluster::builder`] |
//! | a dead, restarted or unreachable file server | [`Cluster::kill`], [`Cluster::restart`], [`Cluster::partition`] |
//! | several directories over one store | [`Builder::directories`], [`Cluster::kill_directory_at`] and the like |
//! | a dead or forgetful directory | [`Cluster::kill_directory`], [`Cluster::lose_directory_store`] |
//! | everything dead at once, or without power | [`Cluster::kill_all`], [`Cluster::lose_power`] |
//! | a directory's data folder from a backup | [`restore`] |
//! | a directory's store on another engine | [`migrate`] |
//! | faults of a disk | [`Cluster::memory_disk`], [`Cluster::folder`] |
//! | faults of your own making | [`Builder::disk_wrapper`], [`Builder::network_wrapper`] and the like |
//!
//! File servers are counted from 0 in the order they were added; the ids that the directory gives them are in
//! [`Cluster::file_server`].

mod builder;
mod faults;
mod gate;
mod life_disk;
mod life_store;
mod member;
mod wrappers;

pub use builder::{Builder, FILE_SERVERS_MAX};
pub use dir_service::{
    args::etcd::EtcdArgs,
    migrate::{Migrated, Place, migrate},
    restore::{BACKUP_FILE, Restored, restore},
};
pub use wrappers::Role;

use builder::Layout;
use cairn_proto::{
    Error, Result,
    net::{Connect, SystemNetwork, Traffic, channel},
    v1::{
        ServerState, StatusRequest, StatusResponse, TopologyRequest, TopologyResponse,
        cluster_service_client::ClusterServiceClient,
    },
};
use client_lib::Client;
use gate::GatedNetwork;
use member::Member;
use parking_lot::RwLock;
use std::{sync::Arc, time::Duration};
use tempfile::TempDir;
use tokio::{sync::Mutex, time::Instant};
use tonic::transport::Channel;

/// Longest wait for all servers to live.
const READY_TIMEOUT: Duration = Duration::from_secs(30);
/// Between two looks at the directory's status.
const READY_POLL: Duration = Duration::from_millis(5);

/// A running cluster. Dropping it kills all services; [`Cluster::shutdown`] ends them cleanly.
#[derive(Debug)]
pub struct Cluster {
    /// One, or several that share a store.
    directories: Vec<Arc<Member>>,
    file_servers: RwLock<Vec<Arc<Member>>>,
    layout: Mutex<Layout>,
    network: Arc<dyn Connect>,
    /// To each directory.
    channels: Vec<Channel>,
    /// Removed with the cluster; declared last, so after the services.
    _temporary: Option<TempDir>,
}

/// A file server of an embedded cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileServer {
    /// The id that the directory gave it.
    pub id: u64,
    /// Where it listens, `http://host:port`.
    pub address: String,
    /// The failure domain it stands in; empty means none.
    pub zone: String,
}

impl Cluster {
    /// Starts a directory and `file_servers` file servers on temporary data, and waits until all of them live.
    ///
    /// # Errors
    /// As [`Builder::build_and_start`].
    pub async fn start(file_servers: usize) -> Result<Self> {
        Self::builder().file_servers(file_servers).build_and_start().await
    }

    /// Chooses what the cluster is made of.
    pub fn builder() -> Builder {
        Builder::default()
    }

    async fn start_members(
        directories: Vec<Arc<Member>>,
        layout: Layout,
        is_fresh: bool,
        file_servers: usize,
        temporary: Option<TempDir>,
    ) -> Result<Self> {
        let around = &layout.around;
        let system = around.wrappers.network(Role::Client, Arc::new(SystemNetwork));
        let network: Arc<dyn Connect> = Arc::new(GatedNetwork::new(system, around.gates.clone(), None));
        let channels = layout.directory_uris.iter().map(|uri| channel(&network, uri, Traffic::Small));
        let channels = channels.collect::<Result<_>>()?;
        let cluster = Self {
            directories,
            file_servers: RwLock::default(),
            layout: Mutex::new(layout),
            network,
            channels,
            _temporary: temporary,
        };
        for directory in &cluster.directories {
            directory.start().await?;
        }
        if is_fresh {
            // In turn, so that the directory gives them their ids in order.
            for _ in 0..file_servers {
                cluster.add_member(None).await?;
            }
        } else {
            // They have ids, and disks to read through: together.
            let members = cluster.new_members(file_servers).await?;
            futures::future::try_join_all(members.iter().map(|member| member.start())).await?;
            cluster.file_servers.write().extend(members);
        }
        cluster.wait_ready().await?;
        Ok(cluster)
    }

    /// A new client, with a session of its own.
    ///
    /// # Errors
    /// As [`client_lib::ClientBuilder::build`].
    #[allow(clippy::unused_async)]
    pub async fn client(&self) -> Result<Client> {
        self.client_builder().build()
    }

    /// A client's settings, with the cluster's directory and network chosen already.
    pub fn client_builder(&self) -> client_lib::ClientBuilder {
        let builder = Client::builder().network(self.network());
        self.directory_uris().into_iter().fold(builder, |builder, uri| builder.directory(uri))
    }

    /// The network between clients and this cluster, on which partitioned servers do not answer. Programs that
    /// connect by other means reach a partitioned server's port and wait there.
    pub fn network(&self) -> Arc<dyn Connect> {
        self.network.clone()
    }

    /// Where the directory listens, `http://host:port`; of several the first.
    pub fn directory_uri(&self) -> String {
        self.directories[0].port.uri()
    }

    /// Where all directories listen.
    pub fn directory_uris(&self) -> Vec<String> {
        self.directories.iter().map(|directory| directory.port.uri()).collect()
    }

    /// Number of directories, running or not.
    pub fn directories(&self) -> usize {
        self.directories.len()
    }

    /// Number of file servers, running or not.
    pub fn file_servers(&self) -> usize {
        self.file_servers.read().len()
    }

    /// Where file server `i` listens, `http://host:port`.
    ///
    /// # Panics
    /// When there is no such file server; so in all methods that take an index.
    pub fn file_server_uri(&self, i: usize) -> String {
        self.member(i).port.uri()
    }

    /// A file server as the directory knows it.
    ///
    /// # Errors
    /// `UNAVAILABLE` without a directory, `NOT_FOUND` when the server never registered.
    pub async fn file_server(&self, i: usize) -> Result<FileServer> {
        let member = self.member(i);
        let address = member.port.uri();
        let known = self.topology().await?.servers.into_iter().find(|server| {
            server.state() != ServerState::Gone
                && server.endpoints.iter().any(|endpoint| endpoint.uri == address)
        });
        let server = known.ok_or_else(|| {
            Error::not_found(format!("{} has not registered with the directory", member.name)).on(&address)
        })?;
        Ok(FileServer { id: server.id, address, zone: member.zone.clone() })
    }

    /// Adds a file server, and waits until it lives. Without a zone it takes the next of [`Builder::zones`].
    /// Answers its index.
    ///
    /// # Errors
    /// As [`Builder::build_and_start`].
    pub async fn add_file_server(&self, zone: Option<&str>) -> Result<usize> {
        let i = self.add_member(zone).await?;
        self.wait_ready().await?;
        Ok(i)
    }

    /// The first members, not yet started.
    async fn new_members(&self, count: usize) -> Result<Vec<Arc<Member>>> {
        let mut layout = self.layout.lock().await;
        (0..count).map(|i| layout.file_server(i, None).map(Arc::new)).collect()
    }

    async fn add_member(&self, zone: Option<&str>) -> Result<usize> {
        let mut layout = self.layout.lock().await;
        let i = self.file_servers();
        if i >= FILE_SERVERS_MAX {
            return Err(Error::limit(format!(
                "an embedded cluster has at most {FILE_SERVERS_MAX} file servers"
            )));
        }
        let member = Arc::new(layout.file_server(i, zone.map(str::to_owned))?);
        member.start().await?;
        self.file_servers.write().push(member);
        Ok(i)
    }

    /// The directory's view of everything's health.
    ///
    /// # Errors
    /// `UNAVAILABLE` without a directory.
    pub async fn status(&self) -> Result<StatusResponse> {
        self.status_at(0).await
    }

    /// The view of the directory with this index, from 0.
    ///
    /// # Errors
    /// `UNAVAILABLE` without that directory.
    ///
    /// # Panics
    /// When there is no such directory; so in all methods that take an index of one.
    pub async fn status_at(&self, directory: usize) -> Result<StatusResponse> {
        Ok(self.cluster_service(directory).status(StatusRequest {}).await?.into_inner())
    }

    /// All servers and groups.
    ///
    /// # Errors
    /// `UNAVAILABLE` without a directory.
    pub async fn topology(&self) -> Result<TopologyResponse> {
        Ok(self.cluster_service(0).topology(TopologyRequest::default()).await?.into_inner())
    }

    /// Waits until the directory serves and every file server that runs and is not partitioned is live.
    ///
    /// # Errors
    /// `DEADLINE_EXCEEDED` after 30 s, saying who is missing; what a service said that ended by itself.
    pub async fn wait_ready(&self) -> Result<()> {
        let deadline = Instant::now() + READY_TIMEOUT;
        loop {
            let missing = match tokio::time::timeout_at(deadline, self.missing()).await {
                Ok(missing) => missing?,
                Err(_) => vec!["the directory".to_owned()],
            };
            if missing.is_empty() {
                return Ok(());
            }
            if Instant::now() >= deadline {
                let message = format!(
                    "not ready after {} s, still missing: {}",
                    READY_TIMEOUT.as_secs(),
                    missing.join(", ")
                );
                return Err(Error::new(cairn_proto::Reason::DeadlineExceeded, message));
            }
            tokio::time::sleep(READY_POLL).await;
        }
    }

    /// Completes when a service has ended by itself, with its reason.
    pub async fn failed(&self) -> Error {
        loop {
            for member in self.members() {
                if let Some(error) = member.failed().await {
                    return error;
                }
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Who is not there yet.
    async fn missing(&self) -> Result<Vec<String>> {
        for member in self.members() {
            if let Some(error) = member.failed().await {
                return Err(error);
            }
        }
        let mut missing = Vec::new();
        for (index, directory) in self.directories.iter().enumerate() {
            // Of several, those that do not run are not waited for.
            if self.directories.len() == 1 || directory.is_running().await && !directory.gate.is_cut() {
                missing.extend(self.missing_at(index).await);
            }
        }
        Ok(missing)
    }

    /// Who is not there yet, as one directory sees it.
    async fn missing_at(&self, index: usize) -> Vec<String> {
        let status = match self.status_at(index).await {
            Ok(status) => status,
            Err(error) => return vec![format!("the directory ({error})")],
        };
        if let Some(directory) = &status.directory
            && directory.mode != "serving"
        {
            return vec![format!("the directory ({}: {})", directory.mode, directory.reason)];
        }
        let mut missing = Vec::new();
        let members = self.file_servers.read().clone();
        for member in members {
            if !member.is_running().await || member.gate.is_cut() {
                continue;
            }
            let address = member.port.uri();
            let live = status.file_servers.iter().filter_map(|it| it.server.as_ref()).any(|server| {
                matches!(server.state(), ServerState::Live | ServerState::Draining)
                    && server.endpoints.iter().any(|endpoint| endpoint.uri == address)
            });
            if !live {
                missing.push(member.name.clone());
            }
        }
        missing
    }

    /// Stops all services cleanly: first the file servers finish what they do, then the directory.
    ///
    /// # Errors
    /// What the first service said that did not end well.
    pub async fn shutdown(self) -> Result<()> {
        let file_servers = std::mem::take(&mut *self.file_servers.write());
        let stopped = futures::future::join_all(file_servers.iter().map(|member| member.stop())).await;
        let directories = futures::future::join_all(self.directories.iter().map(|one| one.stop())).await;
        stopped.into_iter().chain(directories).collect()
    }

    fn cluster_service(&self, directory: usize) -> ClusterServiceClient<Channel> {
        ClusterServiceClient::new(self.channels[directory].clone())
            .max_decoding_message_size(cairn_proto::limits::MESSAGE_BYTES_MAX)
    }

    fn members(&self) -> Vec<Arc<Member>> {
        let mut members = self.directories.clone();
        members.extend(self.file_servers.read().iter().cloned());
        members
    }

    fn member(&self, i: usize) -> Arc<Member> {
        self.file_servers.read()[i].clone()
    }
}
