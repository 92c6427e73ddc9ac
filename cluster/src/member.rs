//! One service of an embedded cluster: its port, its gate, its disk, and the life it is in.

use crate::{
    gate::{Gate, GatedNetwork, Gates, Life},
    life_disk::LifeDisk,
    life_store::LifeStore,
    wrappers::{Role, Wrappers},
};
use cairn_proto::{
    Error, Result,
    host::{Host, SystemClock},
    net::{Incoming, SystemNetwork, Wire, accept_tcp},
};
use dir_service::store::MemoryStore;
use disk::{CrashKeep, Disk, RealDisk, SimDisk};
use futures::StreamExt as _;
use std::{
    io,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    net::{TcpListener, TcpSocket},
    sync::{Mutex, mpsc, oneshot},
    task::JoinHandle,
    time::Instant,
};
use tokio_util::sync::CancellationToken;

/// Connections that wait to be accepted.
const BACKLOG: u32 = 1_024;
/// Longest wait for an ended life to let go of its data directory.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest wait for a port that is ours to be free of an earlier listener.
const LISTEN_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest wait for a service to stop cleanly; then it is killed.
const STOP_TIMEOUT: Duration = Duration::from_secs(20);

/// What a member runs, with its configuration.
#[derive(Clone, Debug)]
pub(crate) enum Service {
    Directory(dir_service::Config),
    /// One of several, with its index, on a store that they share.
    SharedDirectory(dir_service::Config, usize, MemoryStore),
    File(file_service::Config),
}

impl Service {
    async fn run(
        self,
        (role, wrappers): (Role, Wrappers),
        disk: Arc<dyn Disk>,
        (host, life, store_gate): (Host, Life, Arc<Gate>),
        incoming: Incoming,
        built: oneshot::Sender<Result<()>>,
        shutdown: CancellationToken,
    ) -> Result<()> {
        // Nobody waits for `built` any more when the start was given up; the service is stopped then.
        macro_rules! run {
            ($build:expr) => {
                match $build.await {
                    Ok(app) => {
                        let _ = built.send(Ok(()));
                        app.serve(vec![incoming], shutdown).await
                    }
                    Err(error) => {
                        let _ = built.send(Err(error.clone()));
                        Err(error)
                    }
                }
            };
        }
        match self {
            Self::Directory(config) => {
                run!(dir_service::App::build_wrapped(config, disk, host, wrappers.store))
            }
            Self::SharedDirectory(config, index, store) => {
                let living = LifeStore::new(Arc::new(store), life, store_gate);
                let store = wrappers.shared_store(index, Arc::new(living));
                let app = dir_service::App::build_shared(config, store, None, host, wrappers.store);
                run!(std::future::ready(Ok::<_, Error>(app)))
            }
            Self::File(config) => {
                let wrap = |store| match role {
                    Role::FileServer(index) => wrappers.chunk_store(index, store),
                    Role::Directory | Role::FurtherDirectory(_) | Role::Client => store,
                };
                run!(file_service::App::build_wrapped(config, disk, host, wrap))
            }
        }
    }
}

/// A port that stays ours while nobody listens on it.
#[derive(Debug)]
pub(crate) struct Port {
    pub(crate) address: SocketAddr,
    /// `host:port` by which others connect.
    pub(crate) authority: String,
    /// Bound and never listening: the kernel gives the port to nobody else, and a listener can join.
    _reservation: TcpSocket,
}

impl Port {
    /// Reserves `address`; port 0 takes any free one. Others are told to connect to `host`, or else to the address
    /// itself (to loopback, when it is that of every interface).
    pub(crate) fn reserve(address: SocketAddr, host: Option<&str>) -> Result<Self> {
        let bind = || {
            let socket = socket(address)?;
            Ok((socket.local_addr()?, socket))
        };
        let any_port = address.port() == 0;
        let (address, reservation) = bind().map_err(|error| cannot_listen(address, &error))?;
        let authority = match (host, address.ip()) {
            (Some(host), _) => format!("{host}:{}", address.port()),
            (None, IpAddr::V4(ip)) if ip.is_unspecified() => format!("127.0.0.1:{}", address.port()),
            (None, IpAddr::V6(ip)) if ip.is_unspecified() => format!("[::1]:{}", address.port()),
            (None, _) => address.to_string(),
        };
        let port = Self { address, authority, _reservation: reservation };
        if !any_port {
            // A listener of another program shows only when one tries to listen too.
            drop(port.listen()?);
        }
        Ok(port)
    }

    fn listen(&self) -> Result<TcpListener> {
        self.try_listen().map_err(|error| cannot_listen(self.address, &error))
    }

    /// Listens on the port that is reserved. A listener that was closed may go on listening for a moment: a program
    /// that this process starts meanwhile has a copy of it from its fork until its exec.
    async fn listen_once_free(&self) -> Result<TcpListener> {
        let began = Instant::now();
        loop {
            match self.try_listen() {
                Err(error)
                    if error.kind() == io::ErrorKind::AddrInUse && began.elapsed() < LISTEN_TIMEOUT =>
                {
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
                other => return other.map_err(|error| cannot_listen(self.address, &error)),
            }
        }
    }

    fn try_listen(&self) -> io::Result<TcpListener> {
        socket(self.address)?.listen(BACKLOG)
    }

    pub(crate) fn uri(&self) -> String {
        format!("http://{}", self.authority)
    }
}

fn socket(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    Ok(socket)
}

fn cannot_listen(address: SocketAddr, error: &io::Error) -> Error {
    Error::from(io::Error::new(error.kind(), format!("cannot listen on {address}: {error}")))
}

/// Where a member's data is.
#[derive(Debug)]
pub(crate) enum Store {
    Memory(SimDisk),
    Folder(PathBuf),
}

/// What all members of a cluster share.
#[derive(Debug)]
pub(crate) struct Around {
    pub(crate) gates: Arc<Gates>,
    pub(crate) wrappers: Wrappers,
}

/// A service and what surrounds it, across all its lives.
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) name: String,
    role: Role,
    pub(crate) port: Port,
    pub(crate) gate: Arc<Gate>,
    /// Between a directory and the store that it shares.
    pub(crate) store_gate: Arc<Gate>,
    pub(crate) zone: String,
    pub(crate) store: Store,
    service: Service,
    /// How the service runs in its first life, when that is not as in all others.
    pub(crate) first_life: parking_lot::Mutex<Option<Service>>,
    around: Arc<Around>,
    /// Each life draws its own seed, so that ids made of it never repeat.
    seed: AtomicU64,
    running: Mutex<Option<Running>>,
}

#[derive(Debug)]
struct Running {
    task: JoinHandle<Result<()>>,
    acceptor: JoinHandle<()>,
    shutdown: CancellationToken,
    disk: Arc<LifeDisk>,
}

impl Running {
    /// Ends listening; the port is free when this returns.
    async fn stop_listening(&mut self) {
        self.acceptor.abort();
        let _ = (&mut self.acceptor).await;
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
        self.acceptor.abort();
        // Ends what the service started beside its main task.
        self.shutdown.cancel();
        self.disk.release();
    }
}

impl Member {
    pub(crate) fn new(
        role: Role,
        zone: String,
        port: Port,
        store: Store,
        service: Service,
        around: Arc<Around>,
        seed: u64,
    ) -> Self {
        let (name, gate) = (role.name(), Gate::new());
        around.gates.add(port.authority.clone(), gate.clone());
        let (seed, running) = (AtomicU64::new(seed), Mutex::default());
        let first_life = parking_lot::Mutex::default();
        let store_gate = Gate::new();
        Self { name, role, port, gate, store_gate, zone, store, service, first_life, around, seed, running }
    }

    pub(crate) async fn is_running(&self) -> bool {
        self.running.lock().await.as_ref().is_some_and(|running| !running.task.is_finished())
    }

    /// Starts the service; does nothing when it runs.
    pub(crate) async fn start(&self) -> Result<()> {
        let mut running = self.running.lock().await;
        if running.as_ref().is_some_and(|running| !running.task.is_finished()) {
            return Ok(());
        }
        if let Some(mut ended) = running.take() {
            ended.stop_listening().await;
        }
        let life = self.gate.life();
        let wrappers = &self.around.wrappers;
        let disk = LifeDisk::new(wrappers.disk(self.role, self.open_disk().await?), life.clone());
        let listener = self.port.listen_once_free().await?;
        let behind = life.clone();
        // The listener lives in a task of its own, whose end can be awaited: a service that is killed may leave tasks
        // behind that still hold its side of the connections.
        let (accepted, arriving) = mpsc::channel(1);
        let acceptor = tokio::spawn(async move {
            let mut connections = accept_tcp(listener);
            while let Some(wire) = connections.next().await {
                if accepted.send(wire).await.is_err() {
                    return;
                }
            }
        });
        let arriving = futures::stream::unfold(arriving, |mut arriving| async move {
            arriving.recv().await.map(|wire| (wire, arriving))
        });
        let wrapped = arriving.map(move |wire| {
            let wire = wire?;
            Ok(Wire::new(behind.wrap(Box::new(wire))))
        });
        let incoming: Incoming = Box::pin(wrapped.take_until(life.clone().end()));
        let system = wrappers.network(self.role, Arc::new(SystemNetwork));
        let network = GatedNetwork::new(system, self.around.gates.clone(), Some(life.clone()));
        let host = Host {
            network: Arc::new(network),
            clock: Arc::new(SystemClock),
            seed: self.seed.fetch_add(SEED_STEP, Ordering::Relaxed),
        };
        let (built, is_built) = oneshot::channel();
        let shutdown = CancellationToken::new();
        let service = self.first_life.lock().take().unwrap_or_else(|| self.service.clone());
        let seen = (self.role, wrappers.clone());
        let task = service.run(
            seen,
            disk.clone() as Arc<dyn Disk>,
            (host, life, self.store_gate.clone()),
            incoming,
            built,
            shutdown.clone(),
        );
        let mut started = Running { task: tokio::spawn(task), acceptor, shutdown, disk };
        let built = match is_built.await {
            Ok(built) => built,
            Err(_) => Err(Error::internal("the service ended while it started")),
        };
        if let Err(error) = built {
            // The port is free for another attempt when the caller hears of this one's failure.
            started.stop_listening().await;
            return Err(error.on(&self.name));
        }
        *running = Some(started);
        tracing::debug!(name = %self.name, address = %self.port.address, "started");
        Ok(())
    }

    /// Ends the service as SIGKILL would.
    pub(crate) async fn kill(&self) {
        let mut running = self.running.lock().await;
        self.gate.end_life();
        if let Some(mut running) = running.take() {
            running.task.abort();
            let _ = (&mut running.task).await;
            running.stop_listening().await;
            tracing::debug!(name = %self.name, "killed");
        }
        if let Store::Memory(sim) = &self.store {
            sim.crash(CrashKeep::Everything);
        }
    }

    /// Has the service finish what it does and end.
    ///
    /// # Errors
    /// What the service ended with.
    pub(crate) async fn stop(&self) -> Result<()> {
        let mut running = self.running.lock().await;
        let Some(mut running) = running.take() else { return Ok(()) };
        running.shutdown.cancel();
        let ended = tokio::time::timeout(STOP_TIMEOUT, &mut running.task).await;
        self.gate.end_life();
        running.stop_listening().await;
        match ended {
            Ok(Ok(result)) => result.map_err(|error| error.on(&self.name)),
            Ok(Err(error)) => Err(Error::internal(format!("the service failed: {error}")).on(&self.name)),
            Err(_) => {
                tracing::warn!(name = %self.name, "did not stop in time and was killed");
                Ok(())
            }
        }
    }

    /// Completes when the service has ended by itself, with the reason.
    pub(crate) async fn failed(&self) -> Option<Error> {
        let mut running = self.running.lock().await;
        if !running.as_ref()?.task.is_finished() {
            return None;
        }
        let mut ended = running.take()?;
        match (&mut ended.task).await {
            Ok(Ok(())) => Some(Error::internal("the service ended by itself").on(&self.name)),
            Ok(Err(error)) => Some(error.on(&self.name)),
            Err(error) => Some(Error::internal(format!("the service failed: {error}")).on(&self.name)),
        }
    }

    /// Forgets all data. The service must not be running.
    pub(crate) async fn wipe(&self) -> Result<()> {
        if self.is_running().await {
            return Err(Error::invalid(format!("{} is running: kill it before taking its data", self.name)));
        }
        match &self.store {
            Store::Memory(sim) => wipe_sim(sim).await?,
            Store::Folder(folder) => match std::fs::remove_dir_all(folder) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
                _ => {}
            },
        }
        Ok(())
    }

    async fn open_disk(&self) -> Result<Arc<dyn Disk>> {
        let folder = match &self.store {
            Store::Memory(sim) => return Ok(Arc::new(sim.clone())),
            Store::Folder(folder) => folder,
        };
        // A call that was under way when the last life ended may hold the directory a moment longer.
        let deadline = Instant::now() + RELEASE_TIMEOUT;
        loop {
            match RealDisk::open(folder.clone()) {
                Ok(disk) => return Ok(disk),
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                Err(error) => return Err(Error::from(error).on(&self.name)),
            }
        }
    }
}

/// Far enough apart that seeds of one member and of its neighbours do not meet.
const SEED_STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// Removes every file; directories stay, which no service minds.
async fn wipe_sim(sim: &SimDisk) -> io::Result<()> {
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        for entry in sim.list(&folder).await? {
            let path = folder.join(entry.name);
            if entry.is_dir { folders.push(path) } else { sim.remove_file(&path).await? }
        }
        sim.sync_dir(&folder).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{path::Path, sync::atomic::AtomicBool};

    #[tokio::test]
    async fn a_reserved_port_can_be_listened_on_again_and_again() {
        let port = Port::reserve("127.0.0.1:0".parse().unwrap(), None).unwrap();
        for _ in 0..3 {
            let listener = port.listen().unwrap();
            let (near, far) = tokio::join!(tokio::net::TcpStream::connect(port.address), listener.accept());
            drop((near.unwrap(), far.unwrap(), listener));
            assert!(tokio::net::TcpStream::connect(port.address).await.is_err(), "nobody listens now");
        }
    }

    #[tokio::test]
    async fn programs_started_meanwhile_do_not_keep_a_port() {
        let stop = Arc::new(AtomicBool::new(false));
        let starters: Vec<_> = (0..2)
            .map(|_| {
                let stop = stop.clone();
                std::thread::spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        std::process::Command::new("true").status().unwrap();
                    }
                })
            })
            .collect();
        let port = Port::reserve("127.0.0.1:0".parse().unwrap(), None).unwrap();
        for _ in 0..2_000 {
            drop(port.listen_once_free().await.unwrap());
        }
        stop.store(true, Ordering::Relaxed);
        starters.into_iter().for_each(|starter| starter.join().unwrap());
    }

    #[tokio::test]
    async fn a_port_in_use_is_refused_with_its_address() {
        let port = Port::reserve("127.0.0.1:0".parse().unwrap(), None).unwrap();
        let _listener = port.listen().unwrap();
        let error = Port::reserve(port.address, None).unwrap_err();
        assert!(error.to_string().contains(&port.address.to_string()), "{error}");
    }

    #[tokio::test]
    async fn a_wiped_memory_disk_is_empty() {
        let sim = SimDisk::new(1, 1 << 20);
        sim.create_dir_all(Path::new("a/b")).await.unwrap();
        sim.open(Path::new("a/b/c"), disk::Open::Create).await.unwrap();
        wipe_sim(&sim).await.unwrap();
        assert_eq!(sim.list(Path::new("a/b")).await.unwrap(), vec![]);
    }
}
