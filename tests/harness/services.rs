//! A directory and file servers as real processes with real data folders, and the `cairn` command beside them.

use crate::{
    ground::{Ground, Place},
    processes::{Process, free_ports, is_free, program},
};
use cairn_proto::{
    id::ServerId,
    net::{Connect, SystemNetwork, Traffic, channel},
    v1::{Server, ServerState, StatusRequest, StatusResponse, cluster_service_client::ClusterServiceClient},
};
use client_lib::Client;
use std::{
    fs,
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::{Duration, Instant},
};
use tempfile::TempDir;
use tokio::io::AsyncWriteExt as _;

/// Longest wait for all services to serve after a start. Generous: a debug build on a busy machine.
pub const READY_LIMIT: Duration = Duration::from_secs(60);
/// Longest run of one `cairn` command that is not told otherwise.
pub const COMMAND_LIMIT: Duration = Duration::from_secs(120);

/// The processes of one cluster. Dropping it kills them and removes their data.
#[derive(Debug)]
pub struct Services {
    /// The directory.
    pub directory: Process,
    /// The file servers.
    pub files: Vec<Process>,
    directory_uri: String,
    file_uris: Vec<String>,
    /// File servers that were ever named: a name is never used twice.
    named: usize,
    ground: Ground,
    // The last to go: everything else stands on it.
    folder: TempDir,
}

impl Services {
    /// Starts a directory and file servers, and waits until all of them live.
    pub async fn start(files: usize) -> Self {
        Self::start_with(files, &[]).await
    }

    /// The same, with flags for the directory.
    pub async fn start_with(files: usize, directory_flags: &[&str]) -> Self {
        let mut services = Self::prepare(files, directory_flags);
        services.start_all();
        services.ready().await;
        services
    }

    /// Names them, chooses ports and folders, and starts nothing. `directory_flags` go to the directory.
    pub fn prepare(files: usize, directory_flags: &[&str]) -> Self {
        Self::prepare_on(Ground::default(), files, directory_flags)
    }

    /// The same on networks and disks of their own.
    pub fn prepare_on(mut ground: Ground, files: usize, directory_flags: &[&str]) -> Self {
        let folder = tempfile::Builder::new().prefix("cairn-test-").tempdir().unwrap();
        let place = ground.place("directory", folder.path());
        let directory = process("directory", "dir-service", &place, directory_flags, folder.path());
        let mut services = Self {
            directory,
            files: Vec::new(),
            directory_uri: place.uri,
            file_uris: Vec::new(),
            named: 0,
            ground,
            folder,
        };
        for _ in 0..files {
            services.add_file_server();
        }
        services
    }

    /// Names another file server, without starting it. Answers its position.
    pub fn add_file_server(&mut self) -> usize {
        self.named += 1;
        let name = format!("file-{}", self.named);
        let place = self.ground.place(&name, self.folder.path());
        let flags = ["--directory", &self.directory_uri];
        self.files.push(process(&name, "file-service", &place, &flags, self.folder.path()));
        self.file_uris.push(place.uri);
        self.files.len() - 1
    }

    /// Kills a file server for good and removes its data. Those behind it move up by one position.
    pub fn remove_file_server(&mut self, i: usize) {
        let mut process = self.files.remove(i);
        self.file_uris.remove(i);
        process.kill9();
        self.ground.remove(&process.name, self.folder.path());
    }

    /// The networks and disks.
    pub fn ground(&self) -> &Ground {
        &self.ground
    }

    /// Starts those that do not run.
    pub fn start_all(&mut self) {
        for process in self.all() {
            if !process.is_running() {
                process.kill9();
                process.start();
            }
        }
    }

    /// SIGKILL to all at the same moment.
    pub fn kill_all(&mut self) {
        for process in self.all() {
            process.kill9_now();
        }
        for process in self.all() {
            process.kill9();
        }
    }

    /// The directory first, then the file servers.
    pub fn all(&mut self) -> impl Iterator<Item = &mut Process> {
        std::iter::once(&mut self.directory).chain(&mut self.files)
    }

    /// Where the directory listens.
    pub fn directory_uri(&self) -> &str {
        &self.directory_uri
    }

    /// Where file server `i` listens.
    pub fn file_uri(&self, i: usize) -> &str {
        &self.file_uris[i]
    }

    /// The folder of one of them: `directory`, `file-1`, ...
    pub fn data(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A place for anything else; removed with the services.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The directory's view of everything's health.
    pub async fn status(&self) -> Result<StatusResponse, String> {
        status(&self.directory_uri).await
    }

    /// Waits until the directory serves, and every file server that runs lives and stands where it should.
    ///
    /// # Panics
    /// When one of them ended by itself, or after [`READY_LIMIT`].
    pub async fn ready(&mut self) -> StatusResponse {
        self.ready_within(READY_LIMIT).await
    }

    /// The same with another limit.
    ///
    /// # Panics
    /// As [`Services::ready`].
    pub async fn ready_within(&mut self, limit: Duration) -> StatusResponse {
        let deadline = Instant::now() + limit;
        loop {
            let mut wanted = Vec::new();
            self.directory.assert_running();
            for (file, uri) in self.files.iter_mut().zip(&self.file_uris) {
                file.assert_running();
                if file.is_running() {
                    wanted.push(uri.clone());
                }
            }
            let last = match self.status().await {
                Ok(status) => match unready(&status, &wanted) {
                    None => return status,
                    Some(reason) => reason,
                },
                Err(error) => error,
            };
            assert!(Instant::now() < deadline, "not ready within {limit:?}: {last}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Waits until every server was compared and no chunk lacks a copy.
    ///
    /// # Panics
    /// After `limit`.
    pub async fn healthy(&mut self, limit: Duration) -> StatusResponse {
        let deadline = Instant::now() + limit;
        loop {
            let status = self.ready().await;
            let chunks = status.chunks.unwrap_or_default();
            if status.verified && chunks.under_replicated == 0 && chunks.lost == 0 {
                return status;
            }
            assert!(
                Instant::now() < deadline,
                "not healthy within {limit:?}: verified {}, {chunks:?}, {:?}",
                status.verified,
                status.repairs
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Waits until what a file server holds was compared with the records after `moment`: bad copies that it knew of
    /// then are counted as missing from now on.
    ///
    /// # Panics
    /// After `limit`.
    pub async fn compared_since(&mut self, i: usize, moment: Instant, limit: Duration) {
        let uri = self.file_uris[i].clone();
        let deadline = Instant::now() + limit;
        loop {
            let status = self.ready().await;
            let of = status.file_servers.iter().find(|status| {
                let endpoints = status.server.iter().flat_map(|server| &server.endpoints);
                endpoints.into_iter().any(|endpoint| endpoint.uri == uri)
            });
            if let Some(of) = of
                && of.verified
                && Duration::from_millis(of.verified_ago_ms) < moment.elapsed()
            {
                return;
            }
            assert!(Instant::now() < deadline, "{uri} was not compared within {limit:?}: {of:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Kills the directory, deletes its store and starts it again, once the journal's carriers have all that was
    /// acknowledged. Waits until it is rebuilt.
    ///
    /// # Panics
    /// When the journal is not carried within `limit`.
    pub async fn lose_directory(&mut self, limit: Duration) {
        let wanted = self.ready().await.directory.unwrap_or_default().revision;
        let deadline = Instant::now() + limit;
        loop {
            let directory = self.ready().await.directory.unwrap_or_default();
            if directory.shipped_revision >= wanted {
                break;
            }
            assert!(Instant::now() < deadline, "the journal is not carried: {directory:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.directory.kill9();
        // The folder may be a mount: it stays.
        for entry in fs::read_dir(self.data("directory")).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { fs::remove_dir_all(path).unwrap() } else { fs::remove_file(path).unwrap() }
        }
        self.directory.start();
        self.ready().await;
    }

    /// Orders that everything is moved off a file server, and waits until it may be switched off.
    ///
    /// # Panics
    /// After `limit`.
    pub async fn drain(&mut self, i: usize, limit: Duration) {
        let uri = self.file_uris[i].clone();
        let deadline = Instant::now() + limit;
        let client = Client::connect(&[&self.directory_uri]).await.unwrap();
        let is_it = |server: &&Server| server.endpoints.iter().any(|endpoint| endpoint.uri == uri);
        let status = self.ready().await;
        let server = status.file_servers.iter().filter_map(|status| status.server.as_ref()).find(is_it);
        let id = ServerId(server.unwrap_or_else(|| panic!("{uri} is not known")).id);
        loop {
            // Asking again says how far it is.
            let last = match client.drain(id, false).await {
                Ok(answer) if answer.drained => return,
                Ok(answer) => format!("{answer:?}"),
                Err(error) => error.to_string(),
            };
            if Instant::now() >= deadline {
                let status = self.status().await.map(|status| (status.chunks, status.repairs, status.groups));
                panic!("{uri} is not drained within {limit:?}: {last}; {status:?}");
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// The `cairn` command, talking to this directory.
    pub fn cairn(&self) -> Cairn {
        Cairn::new(&self.directory_uri, self.folder.path())
    }

    /// Each process with the most memory it ever used, in MiB, as one line; and the largest, in bytes.
    pub fn memory_peaks(&mut self) -> (String, u64) {
        let peaks: Vec<_> =
            self.all().map(|process| (process.name.clone(), process.memory_peak_bytes())).collect();
        let line: Vec<_> = peaks.iter().map(|(name, peak)| format!("{name} {} MiB", peak >> 20)).collect();
        (line.join(", "), peaks.iter().map(|(_, peak)| *peak).max().unwrap_or(0))
    }
}

fn process(name: &str, binary: &str, place: &Place, flags: &[&str], folder: &Path) -> Process {
    let mut arguments: Vec<&str> = vec!["--listen", &place.listen, "--data", place.data.to_str().unwrap()];
    arguments.extend(flags);
    if place.namespace.is_some() {
        arguments.push("--insecure");
    }
    let log = std::env::var("CAIRN_TEST_LOG").unwrap_or_else(|_| "info".to_owned());
    let process = Process::new(name, program(binary), &arguments, folder).variable("CAIRN_LOG", &log);
    match &place.namespace {
        Some(namespace) => process.in_namespace(namespace),
        None => process,
    }
}

/// The status that a directory gives.
pub async fn status(directory_uri: &str) -> Result<StatusResponse, String> {
    let network: Arc<dyn Connect> = Arc::new(SystemNetwork);
    let channel = channel(&network, directory_uri, Traffic::Small).map_err(|error| error.to_string())?;
    let mut service =
        ClusterServiceClient::new(channel).max_decoding_message_size(cairn_proto::limits::MESSAGE_BYTES_MAX);
    match tokio::time::timeout(Duration::from_secs(10), service.status(StatusRequest {})).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => Err(format!("{:?}: {}", status.code(), status.message())),
        Err(_) => Err("no answer within 10 s".to_owned()),
    }
}

/// What is missing for all of these file servers to be of use.
fn unready(status: &StatusResponse, file_uris: &[String]) -> Option<String> {
    let directory = status.directory.clone().unwrap_or_default();
    if directory.mode != "serving" {
        return Some(format!("the directory is {}: {}", directory.mode, directory.reason));
    }
    file_uris.iter().find_map(|uri| {
        // A blank disk at an old address is another server.
        let mut servers = status
            .file_servers
            .iter()
            .filter_map(|status| status.server.as_ref())
            .filter(|server| server.endpoints.iter().any(|endpoint| endpoint.uri == *uri))
            .peekable();
        if servers.peek().is_none() {
            return Some(format!("{uri} has not registered"));
        }
        let states: Vec<ServerState> = servers.map(|server| server.state()).collect();
        if states.contains(&ServerState::Live) { None } else { Some(format!("{uri} is {states:?}")) }
    })
}

/// The `cairn` command.
#[derive(Clone, Debug)]
pub struct Cairn {
    directory_uri: String,
    folder: PathBuf,
}

/// How a command ended.
#[derive(Clone, Debug)]
pub struct Ran {
    /// Its words, for messages.
    pub command: String,
    /// Its exit status; 128 + signal when it was killed.
    pub status: i32,
    /// What it wrote to standard output.
    pub out: Vec<u8>,
    /// What it wrote to standard error.
    pub err: String,
    /// How long it ran.
    pub took: Duration,
}

impl Cairn {
    /// One that runs in `folder` and talks to that directory.
    pub fn new(directory_uri: &str, folder: &Path) -> Self {
        Self { directory_uri: directory_uri.to_owned(), folder: folder.to_owned() }
    }

    /// Runs a command with nothing on standard input.
    pub async fn run(&self, words: &[&str]) -> Ran {
        self.run_within(words, b"", COMMAND_LIMIT).await
    }

    /// Runs a command with this on standard input.
    pub async fn feed(&self, words: &[&str], input: &[u8]) -> Ran {
        self.run_within(words, input, COMMAND_LIMIT).await
    }

    /// Runs a command, for at most `limit`.
    ///
    /// # Panics
    /// When it has not ended by then.
    pub async fn run_within(&self, words: &[&str], input: &[u8], limit: Duration) -> Ran {
        let began = Instant::now();
        let mut child = self.command(words).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let input = input.to_vec();
        let fed = tokio::spawn(async move {
            // A command that does not read its input closes it.
            let _ = stdin.write_all(&input).await;
        });
        let ended = tokio::time::timeout(limit, child.wait_with_output()).await;
        let output =
            ended.unwrap_or_else(|_| panic!("cairn {words:?} has not ended within {limit:?}")).unwrap();
        fed.await.unwrap();
        Ran {
            command: format!("cairn {}", words.join(" ")),
            status: code(output.status),
            out: output.stdout,
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
            took: began.elapsed(),
        }
    }

    /// The command, for tests that run it in their own way. All its streams are pipes, and it dies when dropped.
    pub fn command(&self, words: &[&str]) -> tokio::process::Command {
        let mut command = tokio::process::Command::new(program("cairn"));
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("CAIRN_") {
                command.env_remove(name);
            }
        }
        command
            .args(words)
            .env("CAIRN_DIRECTORY", &self.directory_uri)
            .current_dir(&self.folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        command
    }

    /// Runs a command that must succeed and print JSON.
    pub async fn json(&self, words: &[&str]) -> serde_json::Value {
        self.run(words).await.good().json()
    }
}

fn code(status: std::process::ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt as _;
    status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(-1)
}

impl Ran {
    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.out).into_owned()
    }

    /// Standard output as JSON.
    ///
    /// # Panics
    /// When it is not JSON.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.out)
            .unwrap_or_else(|error| panic!("{}: no JSON ({error}): {}", self.command, self.text()))
    }

    /// It succeeded and had nothing to say on standard error.
    ///
    /// # Panics
    /// When it did not.
    #[track_caller]
    pub fn good(self) -> Self {
        assert_eq!(self.status, 0, "{}: {}{}", self.command, self.err, self.text());
        // While a server is being missed on a slow machine it may say what it waits for; that is no complaint.
        let complaints = self.err.lines().filter(|line| !line.starts_with("cairn: waiting: "));
        assert_eq!(complaints.collect::<Vec<_>>(), [""; 0], "{} complained", self.command);
        self
    }

    /// It failed with this status, and said so in one message on standard error with all of these words.
    ///
    /// # Panics
    /// When it did not.
    #[track_caller]
    pub fn failed(self, status: i32, words: &[&str]) -> Self {
        assert_eq!(self.status, status, "{}: {}{}", self.command, self.err, self.text());
        for word in words {
            assert!(self.err.contains(word), "{}: '{word}' is not in: {}", self.command, self.err);
        }
        self
    }
}

/// `cairn up`: a whole cluster in one process. Dropping it kills it and removes its data.
#[derive(Debug)]
pub struct Up {
    /// The process.
    pub process: Process,
    directory_uri: String,
    folder: TempDir,
}

impl Up {
    /// Names it, and starts nothing. Its data is in `data` below its folder.
    pub fn prepare() -> Self {
        let folder = tempfile::Builder::new().prefix("cairn-test-").tempdir().unwrap();
        // The file servers listen from 100 ports above on.
        let port = loop {
            let port = free_ports(1)[0];
            if (100..103).all(|above| is_free(port + above)) {
                break port;
            }
        };
        let data = folder.path().join("data");
        let words = ["up", "--listen", &format!("127.0.0.1:{port}"), "--data", data.to_str().unwrap()];
        let process = Process::new("cairn-up", program("cairn"), &words, folder.path());
        Self { process, directory_uri: format!("http://127.0.0.1:{port}"), folder }
    }

    /// Starts it and waits until it says that it is ready. Answers how long that took.
    pub async fn start(&mut self) -> Duration {
        let said = self.process.output().matches(READY_WORDS).count();
        let began = Instant::now();
        self.process.start();
        while self.process.output().matches(READY_WORDS).count() == said {
            self.process.assert_running();
            assert!(began.elapsed() < READY_LIMIT, "not ready within {READY_LIMIT:?}");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        began.elapsed()
    }

    /// A started one.
    pub async fn started() -> Self {
        let mut up = Self::prepare();
        up.start().await;
        up
    }

    /// Where the directory listens.
    pub fn directory_uri(&self) -> &str {
        &self.directory_uri
    }

    /// A place for anything else; removed with the cluster.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The `cairn` command, talking to this directory.
    pub fn cairn(&self) -> Cairn {
        Cairn::new(&self.directory_uri, self.folder.path())
    }
}

/// The last thing that `cairn up` says when it is ready.
const READY_WORDS: &str = "Ctrl-C stops it";
