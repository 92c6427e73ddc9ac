//! What an embedded cluster is made of, chosen before it starts.

use crate::{
    Cluster,
    gate::Gates,
    member::{Around, Member, Port, Service, Store},
    wrappers::{Role, Wrappers},
};
use cairn_proto::{Error, Result, limits::DIRECTORIES_MAX, net::Connect};
use dir_service::store::{MemoryStore, MetaStore};
use disk::{Disk, SimDisk};
use file_service::chunks::ChunkStore;
use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
};

/// Most file servers of one embedded cluster.
pub const FILE_SERVERS_MAX: usize = 64;
/// Room of each memory disk. Only what is written takes memory.
const MEMORY_DISK_BYTES: u64 = 1 << 40;

type DirectoryTuning = Box<dyn FnOnce(&mut dir_service::Config) + Send>;
type FileTuning = Arc<dyn Fn(usize, &mut file_service::Config) + Send + Sync>;

/// Chooses what a [`Cluster`] is made of. Everything has a default: three file servers, real disks in a temporary
/// directory that goes with the cluster, free ports of the loopback address.
pub struct Builder {
    directories: Option<usize>,
    file_servers: usize,
    zones: Vec<String>,
    data: Option<PathBuf>,
    memory: bool,
    listen: SocketAddr,
    advertise_host: Option<String>,
    file_port: u16,
    seed: u64,
    directory: Option<DirectoryTuning>,
    file: Option<FileTuning>,
    wrappers: Wrappers,
}

impl fmt::Debug for Builder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Builder")
            .field("directories", &self.directories)
            .field("file_servers", &self.file_servers)
            .field("zones", &self.zones)
            .field("data", &self.data)
            .field("memory", &self.memory)
            .field("listen", &self.listen)
            .finish_non_exhaustive()
    }
}

impl Default for Builder {
    fn default() -> Self {
        Self {
            directories: None,
            file_servers: 3,
            zones: Vec::new(),
            data: None,
            memory: false,
            listen: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0),
            advertise_host: None,
            file_port: 0,
            seed: 1,
            directory: None,
            file: None,
            wrappers: Wrappers::default(),
        }
    }
}

impl Builder {
    /// How many file servers: 1 to [`FILE_SERVERS_MAX`]; 3 unless said otherwise.
    pub fn file_servers(mut self, count: usize) -> Self {
        self.file_servers = count;
        self
    }

    /// Several directories, 1 to [`DIRECTORIES_MAX`], over one store in memory, which outlives all of them. Unless said
    /// otherwise there is one, with a store of its own.
    pub fn directories(mut self, count: usize) -> Self {
        self.directories = Some(count);
        self
    }

    /// The failure domains of the file servers, in turn. Without any, all stand in none.
    pub fn zones<Z: Into<String>>(mut self, zones: impl IntoIterator<Item = Z>) -> Self {
        self.zones = zones.into_iter().map(Into::into).collect();
        self
    }

    /// Keeps data in this directory, also after the cluster's end: `directory` and `file-server-1` and so on.
    pub fn data(mut self, folder: impl AsRef<Path>) -> Self {
        self.data = Some(folder.as_ref().to_owned());
        self
    }

    /// Keeps data in a temporary directory that is removed with the cluster. The default.
    pub fn temporary(mut self) -> Self {
        self.data = None;
        self
    }

    /// Keeps data on simulated disks in memory: fast, and open to faults through [`Cluster::memory_disk`]. Wins over
    /// [`Builder::data`].
    pub fn memory(mut self, memory: bool) -> Self {
        self.memory = memory;
        self
    }

    /// Where the directory listens; `127.0.0.1:0`, any free port, unless said otherwise. File servers listen on the
    /// same address, each on a port of its own.
    pub fn listen(mut self, address: SocketAddr) -> Self {
        self.listen = address;
        self
    }

    /// The host name or address by which others reach the services; the one they listen on unless said otherwise, and
    /// loopback when they listen on every interface.
    pub fn advertise_host(mut self, host: impl Into<String>) -> Self {
        self.advertise_host = Some(host.into());
        self
    }

    /// File servers take ports from this one up, skipping those in use; 0, any free ones, unless said otherwise.
    pub fn file_ports_from(mut self, port: u16) -> Self {
        self.file_port = port;
        self
    }

    /// Seeds every random choice of the services; 1 unless said otherwise.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Changes the directory's configuration, such as its times, before it starts.
    pub fn directory_config(mut self, tune: impl FnOnce(&mut dir_service::Config) + Send + 'static) -> Self {
        self.directory = Some(Box::new(tune));
        self
    }

    /// Changes the configuration of each file server (by index, from 0) before it starts.
    pub fn file_config(
        mut self,
        tune: impl Fn(usize, &mut file_service::Config) + Send + Sync + 'static,
    ) -> Self {
        self.file = Some(Arc::new(tune));
        self
    }

    /// Puts something between each service and its disk, such as a recorder or a fault: whatever the service asks of
    /// its disk goes through what `wrap` answers. Called at each start of a service.
    pub fn disk_wrapper(
        mut self,
        wrap: impl Fn(Role, Arc<dyn Disk>) -> Arc<dyn Disk> + Send + Sync + 'static,
    ) -> Self {
        self.wrappers.disk = Some(Arc::new(wrap));
        self
    }

    /// Puts something between each service, or the clients of [`Cluster::client_builder`], and the network: every
    /// connection they open goes through what `wrap` answers. Called at each start of a service, and once for clients.
    pub fn network_wrapper(
        mut self,
        wrap: impl Fn(Role, Arc<dyn Connect>) -> Arc<dyn Connect> + Send + Sync + 'static,
    ) -> Self {
        self.wrappers.network = Some(Arc::new(wrap));
        self
    }

    /// Puts something between the directory and its store of metadata. Called whenever the directory opens a store.
    pub fn store_wrapper(
        mut self,
        wrap: impl Fn(Arc<dyn MetaStore>) -> Arc<dyn MetaStore> + Send + Sync + 'static,
    ) -> Self {
        self.wrappers.set_store(wrap);
        self
    }

    /// Puts something between each of several directories (by index, from 0) and the store that they share. Called at each
    /// start of one.
    pub fn shared_store_wrapper(
        mut self,
        wrap: impl Fn(usize, Arc<dyn MetaStore>) -> Arc<dyn MetaStore> + Send + Sync + 'static,
    ) -> Self {
        self.wrappers.shared_store = Some(Arc::new(wrap));
        self
    }

    /// Puts something between each file server (by index, from 0) and its store of chunks. Called at each start of one.
    /// What is given later goes around what was given before.
    pub fn chunk_store_wrapper(
        mut self,
        wrap: impl Fn(usize, Arc<dyn ChunkStore>) -> Arc<dyn ChunkStore> + Send + Sync + 'static,
    ) -> Self {
        self.wrappers.set_chunk_store(wrap);
        self
    }

    /// Starts everything and waits until the directory serves and all file servers live.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` for a number of file servers out of range, `IO` when a port or the data directory is in use,
    /// and what a service says that cannot start.
    pub async fn build_and_start(self) -> Result<Cluster> {
        if !(1..=FILE_SERVERS_MAX).contains(&self.file_servers) {
            return Err(Error::invalid(format!(
                "a cluster has 1 to {FILE_SERVERS_MAX} file servers, not {}",
                self.file_servers
            )));
        }
        let temporary = match &self.data {
            None if !self.memory => Some(tempfile::Builder::new().prefix("cairn-").tempdir()?),
            _ => None,
        };
        let folder = temporary.as_ref().map(|folder| folder.path().to_owned()).or(self.data);
        let layout = Layout {
            folder: folder.filter(|_| !self.memory),
            zones: self.zones,
            ip: self.listen.ip(),
            host: self.advertise_host,
            next_file_port: self.file_port,
            seed: self.seed,
            around: Arc::new(Around { gates: Gates::default().into(), wrappers: self.wrappers }),
            file: self.file,
            directory_uris: Vec::new(),
        };
        let shared = self.directories.map(|count| (count, MemoryStore::new()));
        if !(1..=DIRECTORIES_MAX).contains(&self.directories.unwrap_or(1)) {
            return Err(Error::invalid(format!(
                "a store is shared by 1 to {DIRECTORIES_MAX} directories, not {}",
                self.directories.unwrap_or(1)
            )));
        }
        let is_fresh = shared.is_some() || layout.is_fresh(self.file_servers);
        let mut config = dir_service::Config::default();
        if let Some(tune) = self.directory {
            tune(&mut config);
        }
        let given = std::mem::take(&mut config.advertise);
        let mut directories = Vec::new();
        for index in 0..self.directories.unwrap_or(1) {
            let listen = if index == 0 { self.listen } else { SocketAddr::new(self.listen.ip(), 0) };
            let port = Port::reserve(listen, layout.host.as_deref())?;
            let advertise = if index == 0 && !given.is_empty() { given.clone() } else { vec![port.uri()] };
            let config = dir_service::Config { advertise, ..config.clone() };
            let role = if index == 0 { Role::Directory } else { Role::FurtherDirectory(index) };
            // Beside those of the file servers.
            let number = if index == 0 { 0 } else { (FILE_SERVERS_MAX + index) as u64 };
            let first_life = (is_fresh && shared.is_none()).then(|| {
                let mut config = config.clone();
                config.timing.forming_wait_ms = 0;
                Service::Directory(config)
            });
            let service = match &shared {
                Some((_, store)) => Service::SharedDirectory(config, index, store.clone()),
                None => Service::Directory(config),
            };
            let store = layout.store(role, number);
            let seed = self.seed.wrapping_add(number);
            let around = layout.around.clone();
            let directory = Member::new(role, String::new(), port, store, service, around, seed);
            *directory.first_life.lock() = first_life;
            directories.push(Arc::new(directory));
        }
        let layout =
            Layout { directory_uris: directories.iter().map(|one| one.port.uri()).collect(), ..layout };
        Cluster::start_members(directories, layout, is_fresh, self.file_servers, temporary).await
    }
}

/// How further file servers are made.
pub(crate) struct Layout {
    /// Where data is; none for memory.
    folder: Option<PathBuf>,
    zones: Vec<String>,
    ip: IpAddr,
    host: Option<String>,
    next_file_port: u16,
    seed: u64,
    pub(crate) around: Arc<Around>,
    file: Option<FileTuning>,
    pub(crate) directory_uris: Vec<String>,
}

impl Layout {
    /// Whether there is no data of an earlier cluster: the directory then need not wait for servers that know one.
    fn is_fresh(&self, file_servers: usize) -> bool {
        let Some(folder) = &self.folder else { return true };
        let roles = (0..file_servers.max(FILE_SERVERS_MAX)).map(Role::FileServer);
        roles.chain([Role::Directory]).all(|role| !folder.join(role.name()).exists())
    }

    /// Makes the file server with this index, not yet started.
    pub(crate) fn file_server(&mut self, index: usize, zone: Option<String>) -> Result<Member> {
        let zone = zone.unwrap_or_else(|| match self.zones.len() {
            0 => String::new(),
            zones => self.zones[index % zones].clone(),
        });
        let port = self.file_port()?;
        let mut config = file_service::Config {
            directory: self.directory_uris.clone(),
            advertise: vec![port.uri()],
            zone: zone.clone(),
            ..file_service::Config::default()
        };
        if let Some(tune) = &self.file {
            tune(index, &mut config);
        }
        let role = Role::FileServer(index);
        let number = index as u64 + 1;
        let store = self.store(role, number);
        let seed = self.seed.wrapping_add(number);
        Ok(Member::new(role, zone, port, store, Service::File(config), self.around.clone(), seed))
    }

    fn file_port(&mut self) -> Result<Port> {
        while self.next_file_port != 0 {
            let wanted = SocketAddr::new(self.ip, self.next_file_port);
            // Past the last port, any free one will do.
            self.next_file_port = self.next_file_port.checked_add(1).unwrap_or(0);
            if let Ok(port) = Port::reserve(wanted, self.host.as_deref()) {
                return Ok(port);
            }
        }
        Port::reserve(SocketAddr::new(self.ip, 0), self.host.as_deref())
    }

    fn store(&self, role: Role, number: u64) -> Store {
        match &self.folder {
            Some(folder) => Store::Folder(folder.join(role.name())),
            None => Store::Memory(SimDisk::new(self.seed.wrapping_add(number), MEMORY_DISK_BYTES)),
        }
    }
}

impl fmt::Debug for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Layout").field("folder", &self.folder).finish_non_exhaustive()
    }
}
