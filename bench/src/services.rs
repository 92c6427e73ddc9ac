//! A directory and three file servers as processes, with data on the disk that is measured.
//!
//! Only processes that were started here are signalled, by their ids; they die with this program.

use async_trait::async_trait;
use cairn_proto::net::{Connect, Io, SystemNetwork};
use client_lib::{Client, Error, v1::ServerState};
use rustix::process::Signal;
use std::{
    collections::BTreeMap,
    fs::File,
    io,
    net::TcpListener,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

/// Number of file servers.
pub const FILE_SERVERS: usize = 3;
/// Longest wait for all of them to serve.
const READY: Duration = Duration::from_secs(60);

/// A cluster of processes.
#[derive(Debug)]
pub struct Services {
    directory: Process,
    files: Vec<Process>,
    uris: Vec<String>,
    unix: Arc<dyn Connect>,
}

impl Services {
    /// Starts all, with the programs of `programs` and data below `folder`.
    ///
    /// # Errors
    /// When a program is missing or cannot be started.
    pub fn start(programs: &Path, folder: &Path) -> io::Result<Self> {
        let ports = free_ports(FILE_SERVERS + 1)?;
        let uris: Vec<String> = ports.iter().map(|port| format!("http://127.0.0.1:{port}")).collect();
        let mut sockets = BTreeMap::new();
        let mut processes = Vec::new();
        for (number, port) in ports.iter().enumerate() {
            let name = if number == 0 { "directory".to_owned() } else { format!("file-{number}") };
            let socket = folder.join(format!("{name}.sock"));
            let mut arguments = vec![
                format!("--listen=127.0.0.1:{port},unix:{}", socket.display()),
                format!("--advertise={}", uris[number]),
                format!("--data={}", folder.join(&name).display()),
                "--log=warn".to_owned(),
            ];
            if number > 0 {
                arguments.push(format!("--directory={}", uris[0]));
            }
            sockets.insert(uris[number].clone(), format!("unix:{}", socket.display()));
            let program = programs.join(if number == 0 { "dir-service" } else { "file-service" });
            let mut process =
                Process { program, arguments, log: folder.join(format!("{name}.log")), child: None };
            process.start()?;
            processes.push(process);
        }
        let directory = processes.remove(0);
        Ok(Self { directory, files: processes, uris, unix: Arc::new(UnixInstead { sockets }) })
    }

    /// A client over TCP.
    ///
    /// # Errors
    /// Never.
    pub fn client(&self) -> Result<Client, Error> {
        Client::builder().directory(&self.uris[0]).deadline(READY).build()
    }

    /// A client over the Unix sockets of the same services.
    ///
    /// # Errors
    /// Never.
    pub fn unix_client(&self) -> Result<Client, Error> {
        Client::builder().directory(&self.uris[0]).deadline(READY).network(self.unix.clone()).build()
    }

    /// Process ids: the directory first, then the file servers.
    pub fn ids(&self) -> Vec<u32> {
        std::iter::once(&self.directory).chain(&self.files).filter_map(Process::id).collect()
    }

    /// Waits until all file servers live.
    ///
    /// # Errors
    /// `UNAVAILABLE` when that takes too long.
    pub async fn ready(&self) -> Result<(), Error> {
        let client = self.client()?;
        let deadline = Instant::now() + READY;
        loop {
            let status = client.status().await?;
            let live = status
                .file_servers
                .iter()
                .filter_map(|file| file.server.as_ref())
                .filter(|server| server.state() == ServerState::Live)
                .count();
            if live == self.files.len() {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(Error::unavailable(format!("{live} of {} file servers live", self.files.len())));
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// SIGKILL to the directory, and its start: seconds from there until it looks up a name.
    ///
    /// # Errors
    /// When it cannot be started, or does not answer in time.
    pub async fn restart_directory(&mut self, path: &str) -> Result<f64, Error> {
        self.directory.kill();
        let began = Instant::now();
        self.directory.start()?;
        let deadline = began + READY;
        loop {
            // A client of its own each time: what it waits between attempts is not the directory's.
            let client =
                Client::builder().directory(&self.uris[0]).deadline(Duration::from_millis(200)).build()?;
            match client.stat(path).await {
                Ok(_) => return Ok(began.elapsed().as_secs_f64()),
                Err(error) if Instant::now() >= deadline => return Err(error),
                Err(_) => tokio::time::sleep(Duration::from_millis(2)).await,
            }
        }
    }

    /// SIGKILL to a file server, and its start: seconds from there until the directory says that it lives, and the
    /// number of its chunks.
    ///
    /// # Errors
    /// As [`Self::restart_directory`].
    pub async fn restart_file_server(&mut self) -> Result<(f64, u64), Error> {
        let client = self.client()?;
        let uri = self.uris[1].clone();
        let find = async || {
            let status = client.status().await?;
            let file = status.file_servers.into_iter().find(|file| {
                file.server.as_ref().is_some_and(|server| server.endpoints.iter().any(|at| at.uri == uri))
            });
            let file = file.ok_or_else(|| Error::internal(format!("{uri} has not registered")))?;
            let server = file.server.clone().unwrap_or_default();
            Ok::<_, Error>((
                server.incarnation.clone(),
                server.state(),
                file.usage.unwrap_or_default().chunks,
            ))
        };
        let (life, _, chunks) = find().await?;
        self.files[0].kill();
        let began = Instant::now();
        self.files[0].start()?;
        loop {
            let (now, state, _) = find().await?;
            if now != life && state == ServerState::Live {
                return Ok((began.elapsed().as_secs_f64(), chunks));
            }
            if began.elapsed() >= READY {
                return Err(Error::unavailable("the file server does not come back"));
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

/// Goes to the Unix sockets of services that are named by their TCP addresses.
#[derive(Debug)]
struct UnixInstead {
    sockets: BTreeMap<String, String>,
}

#[async_trait]
impl Connect for UnixInstead {
    async fn connect(&self, uri: &str) -> io::Result<Box<dyn Io>> {
        let uri = self.sockets.get(uri.trim_end_matches('/')).map_or(uri, String::as_str);
        SystemNetwork.connect(uri).await
    }
}

#[derive(Debug)]
struct Process {
    program: PathBuf,
    arguments: Vec<String>,
    log: PathBuf,
    child: Option<Child>,
}

impl Process {
    fn id(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    fn start(&mut self) -> io::Result<()> {
        let log = File::options().create(true).append(true).open(&self.log)?;
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        self.child = Some(spawn(command)?);
        Ok(())
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Errors mean that it has ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Starts a program without this one's `CAIRN_` variables. It dies with the thread that calls this.
///
/// # Errors
/// Naming the program.
pub fn spawn(mut command: Command) -> io::Result<Child> {
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("CAIRN_") {
            command.env_remove(name);
        }
    }
    // SAFETY: between fork and exec only one system call is made, which is safe there.
    unsafe {
        command.pre_exec(|| {
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).map_err(io::Error::from)
        });
    }
    command.spawn().map_err(|error| {
        let program = command.get_program().to_string_lossy().into_owned();
        io::Error::new(
            error.kind(),
            format!("{program}: {error}; build the services with `cargo build --release --workspace --bins`"),
        )
    })
}

/// Ports that nobody listens on, below those that the system picks for outgoing connections, so that they are still
/// free when a killed server comes back.
fn free_ports(count: usize) -> io::Result<Vec<u16>> {
    let from = 12_000 + (std::process::id() % 1_900) as u16 * 10;
    let free: Vec<u16> = (from..from.saturating_add(1_000))
        .filter(|&port| TcpListener::bind(("127.0.0.1", port)).is_ok())
        .take(count)
        .collect();
    if free.len() == count { Ok(free) } else { Err(io::Error::other("no ports are free on 127.0.0.1")) }
}
