//! The real programs as processes: started, killed, stopped and continued, asked to end, started again.
//!
//! Each process writes what it says to a file of its own, which is shown when the test fails. Only processes that were
//! started here are ever signalled, by their ids; they die with the test, also when that is killed itself.

use rustix::process::{Pid, Signal};
use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    net::Ipv4Addr,
    os::{fd::AsRawFd as _, unix::process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::Mutex,
    time::{Duration, Instant},
};
use tokio::net::TcpSocket;

/// Longest wait for a process to end after it was asked to.
pub const END_LIMIT: Duration = Duration::from_secs(30);
/// Bytes of a log that are shown of a failed test's process.
const SHOWN_BYTES: usize = 6_000;

/// The path of one of this workspace's programs, built with the same profile as the running test.
///
/// `cargo test --workspace` builds them, since each of their packages has an integration test.
///
/// # Panics
/// When it was not built.
pub fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    // target/PROFILE/deps/TEST
    let path = test.parent().and_then(Path::parent).unwrap().join(name);
    assert!(
        path.is_file(),
        "{} is missing: run `cargo build --workspace --bins` (with the profile of the tests), or test the workspace",
        path.display()
    );
    path
}

/// Ports of the loopback address that nobody listens on, all different, also from those that this process was given
/// before. They lie below those that the system picks for outgoing connections, so that a killed server's port is
/// still free when it comes back.
pub fn free_ports(count: usize) -> Vec<u16> {
    const FROM: u16 = 12_000;
    const TO: u16 = 31_000;
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    let mut given = GIVEN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut ports = Vec::new();
    for _ in 0..100_000 {
        if ports.len() == count {
            return ports;
        }
        let port = rand::random_range(FROM..TO);
        if is_free(port) && given.insert(port) {
            ports.push(port);
        }
    }
    panic!("no {count} ports are free on 127.0.0.1");
}

/// Whether nobody listens on a port of the loopback address. Asks by binding alone: a listener, though closed at once,
/// would live on in a program that another test starts at that moment, from its fork until its exec.
pub fn is_free(port: u16) -> bool {
    TcpSocket::new_v4()
        .and_then(|socket| {
            socket.set_reuseaddr(true)?;
            socket.bind((Ipv4Addr::LOCALHOST, port).into())
        })
        .is_ok()
}

/// One program with its arguments, running or not. Dropping it kills it.
#[derive(Debug)]
pub struct Process {
    /// What it is called in messages.
    pub name: String,
    program: PathBuf,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    namespace: Option<PathBuf>,
    log: PathBuf,
    child: Option<Child>,
    /// Memory peaks of earlier lives.
    peak_bytes: u64,
}

impl Process {
    /// A process that is not started yet. Its log is `folder/NAME.log`. It gets no `CAIRN_` variable of the test's own
    /// environment.
    pub fn new(name: &str, program: PathBuf, arguments: &[&str], folder: &Path) -> Self {
        Self {
            name: name.to_owned(),
            program,
            arguments: arguments.iter().map(|&argument| argument.to_owned()).collect(),
            environment: Vec::new(),
            namespace: None,
            log: folder.join(format!("{name}.log")),
            child: None,
            peak_bytes: 0,
        }
    }

    /// Sets a variable of its environment.
    #[must_use]
    pub fn variable(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Gives it the network of a namespace: the file that stands for it.
    #[must_use]
    pub fn in_namespace(mut self, namespace: &Path) -> Self {
        self.namespace = Some(namespace.to_owned());
        self
    }

    /// Starts it. Must be called from the thread that runs the test, since the process dies with the calling thread.
    ///
    /// # Panics
    /// When it runs already or cannot be started.
    pub fn start(&mut self) {
        assert!(self.child.is_none(), "{} runs already", self.name);
        let log = File::options().create(true).append(true).open(&self.log).unwrap();
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).stdin(Stdio::null());
        command.stdout(log.try_clone().unwrap()).stderr(log);
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("CAIRN_") {
                command.env_remove(name);
            }
        }
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        let namespace = self.namespace.as_ref().map(|path| File::open(path).unwrap());
        // SAFETY: between fork and exec only two system calls are made, which are safe there.
        unsafe {
            command.pre_exec(move || {
                if let Some(namespace) = &namespace
                    && libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) != 0
                {
                    return Err(io::Error::last_os_error());
                }
                rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).map_err(io::Error::from)
            });
        }
        self.child =
            Some(command.spawn().unwrap_or_else(|error| panic!("{}: {error}", self.program.display())));
    }

    /// Whether it was started and has not ended, by itself or otherwise.
    pub fn is_running(&mut self) -> bool {
        self.child.as_mut().is_some_and(|child| child.try_wait().unwrap().is_none())
    }

    /// Fails the test when it ended by itself.
    ///
    /// # Panics
    /// When it is not running.
    pub fn assert_running(&mut self) {
        if let Some(child) = &mut self.child
            && let Some(status) = child.try_wait().unwrap()
        {
            panic!("{} ended by itself: {status}\n{}", self.name, self.output());
        }
    }

    /// SIGKILL, and waits until it is gone. Nothing when it does not run.
    pub fn kill9(&mut self) {
        self.note_memory();
        if let Some(mut child) = self.child.take() {
            // An error means that it has ended by itself.
            let _ = child.kill();
            child.wait().unwrap();
        }
    }

    /// Sends SIGKILL without waiting, so that several processes can be killed at the same moment;
    /// [`Process::kill9`] then waits.
    pub fn kill9_now(&mut self) {
        self.note_memory();
        if let Some(child) = &mut self.child {
            let _ = child.kill();
        }
    }

    /// SIGSTOP: it goes on to exist, but does nothing.
    pub fn pause(&self) {
        self.signal(Signal::STOP);
    }

    /// SIGCONT.
    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    /// SIGTERM, and waits for it to end.
    ///
    /// # Panics
    /// When it is not running, or has not ended within [`END_LIMIT`].
    pub async fn terminate(&mut self) -> ExitStatus {
        self.note_memory();
        self.signal(Signal::TERM);
        self.ended().await
    }

    /// SIGINT, as Ctrl-C sends it, and waits for it to end.
    ///
    /// # Panics
    /// As [`Process::terminate`].
    pub async fn interrupt(&mut self) -> ExitStatus {
        self.note_memory();
        self.signal(Signal::INT);
        self.ended().await
    }

    /// Waits for it to end.
    ///
    /// # Panics
    /// When it was not started, or has not ended within [`END_LIMIT`].
    pub async fn ended(&mut self) -> ExitStatus {
        let deadline = Instant::now() + END_LIMIT;
        loop {
            let child = self.child.as_mut().unwrap_or_else(|| panic!("{} was not started", self.name));
            if let Some(status) = child.try_wait().unwrap() {
                self.child = None;
                return status;
            }
            assert!(
                Instant::now() < deadline,
                "{} has not ended within {END_LIMIT:?}\n{}",
                self.name,
                self.output()
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// All that it has said in all its lives.
    pub fn output(&self) -> String {
        fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// Most memory that it used at a time in any of its lives, bytes.
    pub fn memory_peak_bytes(&mut self) -> u64 {
        self.note_memory();
        self.peak_bytes
    }

    /// Its process id.
    ///
    /// # Panics
    /// When it is not running.
    pub fn id(&self) -> u32 {
        self.child.as_ref().unwrap_or_else(|| panic!("{} does not run", self.name)).id()
    }

    fn note_memory(&mut self) {
        let Some(child) = &self.child else { return };
        let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let peak = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:"))
            .and_then(|rest| rest.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        // A process that has just ended has no such line.
        self.peak_bytes = self.peak_bytes.max(peak.unwrap_or(0) * 1024);
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.id()).unwrap()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap_or_else(|error| panic!("{}: {error}", self.name));
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill9();
        if std::thread::panicking() {
            let output = self.output();
            let mut from = output.len().saturating_sub(SHOWN_BYTES);
            while !output.is_char_boundary(from) {
                from += 1;
            }
            eprintln!("--- the end of what {} said\n{}\n---", self.name, &output[from..]);
        }
    }
}
