//! Real etcd processes for tests: on loopback, on free ports, with their data in a folder that goes with them.

#![allow(clippy::unwrap_used, clippy::expect_used)] // for tests, also where it is compiled as a library

use super::{EtcdAddress, EtcdOptions, EtcdStore};
use cairn_proto::net::{Connect, SystemNetwork};
use std::{
    env,
    fs::{self, File},
    io::Write as _,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// Longest that etcd may take until it answers.
const READY_MAX: Duration = Duration::from_secs(30);
/// Attempts to start: a port that was free may be taken before etcd has it.
const STARTS_MAX: usize = 5;
/// The variable that makes a missing etcd a failure instead of a skipped test.
pub const REQUIRED: &str = "CAIRN_ETCD_REQUIRED";

/// The etcd program; `None`, said loudly, where there is none.
///
/// # Panics
/// Where there is none although `CAIRN_ETCD_REQUIRED` is set.
pub fn program() -> Option<PathBuf> {
    let folders = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&folders).map(|folder| folder.join("etcd")).find(|path| path.is_file());
    if found.is_none() {
        assert!(env::var_os(REQUIRED).is_none(), "there is no etcd program: apt-get install etcd-server");
        // Past the capture of the test's output: a skipped test is to be seen.
        let test = std::thread::current().name().unwrap_or("a test").to_owned();
        let line =
            format!("\n!!! SKIPPED: {test}: there is no etcd program (apt-get install etcd-server)\n\n");
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
    found
}

/// Some members that form one etcd. They end, and their data goes, when it is dropped.
#[derive(Debug)]
pub struct Etcd {
    members: Vec<Member>,
    folder: PathBuf,
    program: PathBuf,
}

#[derive(Debug)]
struct Member {
    process: Option<Child>,
    client_port: u16,
    arguments: Vec<String>,
    log: PathBuf,
}

impl Etcd {
    /// One member; `None` where there is no etcd program.
    pub async fn start() -> Option<Self> {
        Self::start_with(1, |_| Vec::new()).await
    }

    /// So many members, with arguments of the caller's; `None` where there is no etcd program.
    pub async fn start_with(members: usize, more: impl Fn(&Path) -> Vec<String>) -> Option<Self> {
        let program = program()?;
        for _ in 0..STARTS_MAX {
            let mut etcd = Self::prepare(&program, members, &more);
            for member in 0..members {
                etcd.launch(member);
            }
            let tls = etcd.members[0].arguments.iter().any(|argument| argument.starts_with("--cert-file"));
            if etcd.is_listening().await && (tls || etcd.is_ready().await) {
                return Some(etcd);
            }
        }
        panic!("etcd did not start {STARTS_MAX} times");
    }

    /// Where a store under `prefix` is.
    pub fn address(&self, prefix: &str) -> EtcdAddress {
        let members: Vec<String> =
            self.members.iter().map(|it| format!("127.0.0.1:{}", it.client_port)).collect();
        format!("{}{}/{prefix}", super::SCHEME, members.join(",")).parse().unwrap()
    }

    /// Options for a store under `prefix`.
    pub fn options(&self, prefix: &str) -> EtcdOptions {
        EtcdOptions::new(self.address(prefix))
    }

    /// Address of one member for its clients, as `host:port`.
    pub fn member(&self, member: usize) -> String {
        format!("127.0.0.1:{}", self.members[member].client_port)
    }

    /// The folder with everything of it.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Ends a member at once, as a crash does.
    pub fn kill(&mut self, member: usize) {
        if let Some(mut process) = self.members[member].process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }

    /// Starts a member again that was killed.
    pub fn restart(&mut self, member: usize) {
        self.launch(member);
    }

    /// Runs `etcdctl` on the first member; what it printed.
    ///
    /// # Panics
    /// When it fails.
    pub fn ctl(&self, arguments: &[&str]) -> String {
        let output = Command::new("etcdctl")
            .env("ETCDCTL_API", "3")
            .arg(format!("--endpoints={}", self.member(0)))
            .args(arguments)
            .output()
            .expect("etcdctl (apt-get install etcd-client)");
        let told = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{arguments:?}: {told}{}", String::from_utf8_lossy(&output.stderr));
        told
    }

    fn prepare(program: &Path, members: usize, more: &impl Fn(&Path) -> Vec<String>) -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let folder = env::temp_dir().join(format!("cairn-etcd-{}-{number}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let ports: Vec<(u16, u16)> = (0..members).map(|_| (free_port(), free_port())).collect();
        let peer = |member: usize| format!("http://127.0.0.1:{}", ports[member].1);
        let cluster: Vec<String> = (0..members).map(|member| format!("m{member}={}", peer(member))).collect();
        let more = more(&folder);
        let scheme = if more.iter().any(|it| it.starts_with("--cert-file")) { "https" } else { "http" };
        let members = (0..members).map(|member| {
            let client = format!("{scheme}://127.0.0.1:{}", ports[member].0);
            let mut arguments = vec![
                format!("--name=m{member}"),
                format!("--data-dir={}", folder.join(format!("m{member}")).display()),
                format!("--listen-client-urls={client}"),
                format!("--advertise-client-urls={client}"),
                format!("--listen-peer-urls={}", peer(member)),
                format!("--initial-advertise-peer-urls={}", peer(member)),
                format!("--initial-cluster={}", cluster.join(",")),
                format!("--initial-cluster-token={}-{number}", std::process::id()),
                "--logger=zap".to_owned(),
            ];
            arguments.extend(more.iter().cloned());
            let log = folder.join(format!("m{member}.log"));
            Member { process: None, client_port: ports[member].0, arguments, log }
        });
        Self { members: members.collect(), program: program.to_owned(), folder: folder.clone() }
    }

    fn launch(&mut self, member: usize) {
        let member = &mut self.members[member];
        assert!(member.process.is_none(), "it runs");
        let log = File::options().create(true).append(true).open(&member.log).unwrap();
        let process = Command::new(&self.program)
            .args(&member.arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        member.process = Some(process);
    }

    /// Whether all members take connections; not when one ended.
    async fn is_listening(&mut self) -> bool {
        let until = Instant::now() + READY_MAX;
        for member in &mut self.members {
            while tokio::net::TcpStream::connect(("127.0.0.1", member.client_port)).await.is_err() {
                let ended = member.process.as_mut().is_none_or(|it| it.try_wait().unwrap().is_some());
                if ended || Instant::now() > until {
                    let log = fs::read_to_string(&member.log).unwrap_or_default();
                    eprintln!("etcd did not start: {log}");
                    return false;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
        true
    }

    async fn is_ready(&self) -> bool {
        EtcdStore::find(&self.options("ready"), &network()).await.is_ok()
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        for member in 0..self.members.len() {
            self.kill(member);
        }
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// The real network.
pub fn network() -> Arc<dyn Connect> {
    Arc::new(SystemNetwork)
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}
