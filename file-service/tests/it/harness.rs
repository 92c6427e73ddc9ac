//! Three file servers, their disks, and calls to them.

use crate::{directory::FakeDirectory, network::Net};
use cairn_proto::{
    Error, Result,
    checksum::{block_checksums, crc64},
    host::{Host, SystemClock},
    id::ChunkId,
    limits::{DATA_BYTES_MAX, MESSAGE_BYTES_MAX},
    net::{self, Traffic},
    v1::{self, file_service_client::FileServiceClient, replica_service_client::ReplicaServiceClient},
};
use disk::{CrashKeep, SimDisk};
use file_service::{
    App, Config, Timing,
    node::{Mode, Node},
};
use std::{sync::Arc, time::Duration};
use tokio::{task::JoinHandle, time::Instant};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

pub const CLUSTER: &str = "the-cluster";
pub const DIRECTORY: &str = "http://directory:1";
/// The group of all three servers; server 1 is its primary.
pub const GROUP: u64 = 1;

pub struct Cluster {
    pub net: Arc<Net>,
    pub directory: FakeDirectory,
    pub servers: Vec<Server>,
    timing: Timing,
}

pub struct Server {
    pub number: u64,
    pub disk: SimDisk,
    running: Option<Running>,
    starts: u64,
}

struct Running {
    node: Arc<Node>,
    shutdown: CancellationToken,
    task: JoinHandle<Result<()>>,
}

pub fn group(epoch: u64, primary: u64) -> v1::Group {
    v1::Group {
        id: GROUP,
        scheme: Some(v1::Scheme { replicas: 3, min_copies: 2 }),
        seats: (1..=3).map(|id| v1::Seat { number: id as u32 - 1, server_id: id }).collect(),
        primary_id: primary,
        epoch,
        former_ids: Vec::new(),
    }
}

fn uri(number: u64) -> String {
    format!("http://server-{number}:1")
}

fn host(number: u64) -> String {
    format!("server-{number}")
}

impl Cluster {
    /// Three servers that know each other and the group.
    pub async fn start() -> Self {
        Self::start_with(Timing { scrub_period_ms: 0, drain_ms: 1_000, ..Timing::default() }).await
    }

    pub async fn start_with(timing: Timing) -> Self {
        let net = Arc::new(Net::default());
        let directory = FakeDirectory::new(CLUSTER);
        directory.change(|state| state.groups = vec![group(1, 1)]);
        tokio::spawn(directory.clone().serve(net.listen("directory", DIRECTORY)));
        let mut cluster = Self { net, directory, timing, servers: Vec::new() };
        for number in 1..=3 {
            let disk = SimDisk::new(number, 2 << 30);
            cluster.servers.push(Server { number, disk, running: None, starts: 0 });
            cluster.restart(number).await;
        }
        cluster.know_everything().await;
        cluster
    }

    /// Waits until all running servers know the directory's topology.
    pub async fn know_everything(&self) {
        let wanted = self.directory.topology().revision;
        for server in self.servers.iter().filter(|server| server.running.is_some()) {
            let node = server.node();
            eventually("the topology is known", || node.topology.map().revision.0 >= wanted).await;
        }
    }

    pub fn server(&self, number: u64) -> &Server {
        &self.servers[number as usize - 1]
    }

    pub fn node(&self, number: u64) -> Arc<Node> {
        self.server(number).node()
    }

    /// Starts a server and waits until the directory has taken it in.
    pub async fn restart(&mut self, number: u64) {
        self.restart_unregistered(number).await;
        let node = self.node(number);
        eventually("the server serves", || *node.mode.borrow() == Mode::Serving).await;
        let incarnation = node.identity.incarnation().to_owned();
        let directory = self.directory.clone();
        let is_known = || {
            directory.0.lock().servers.get(&number).is_some_and(|server| server.incarnation == incarnation)
        };
        eventually("the server is registered", is_known).await;
    }

    pub async fn restart_unregistered(&mut self, number: u64) {
        let config = Config {
            directory: vec!["http://nobody:1".to_owned(), DIRECTORY.to_owned()],
            advertise: vec![uri(number)],
            zone: number.to_string(),
            timing: self.timing,
        };
        let network = self.net.host(&host(number));
        let incoming = self.net.listen(&host(number), &uri(number));
        let server = &mut self.servers[number as usize - 1];
        server.starts += 1;
        let seed = number * 100 + server.starts;
        let app = App::build(
            config,
            Arc::new(server.disk.clone()),
            Host { network, clock: Arc::new(SystemClock), seed },
        )
        .await
        .unwrap();
        let node = app.node().clone();
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(app.serve(vec![incoming], shutdown.clone()));
        server.running = Some(Running { node, shutdown, task });
    }

    /// As `kill -9`: connections break, what was not synced may stay.
    pub async fn kill(&mut self, number: u64) {
        self.net.kill(&host(number));
        let server = &mut self.servers[number as usize - 1];
        let running = server.running.take().unwrap();
        running.task.abort();
        let _ = running.task.await;
        server.disk.crash(CrashKeep::Everything);
    }

    /// Ends a server in good order.
    pub async fn stop(&mut self, number: u64) {
        let server = &mut self.servers[number as usize - 1];
        let running = server.running.take().unwrap();
        running.shutdown.cancel();
        running.task.await.unwrap().unwrap();
        self.net.kill(&host(number));
    }

    pub fn shutdown(&self, number: u64) -> CancellationToken {
        self.server(number).running.as_ref().expect("it runs").shutdown.clone()
    }

    pub fn cut(&self, number: u64) {
        self.net.cut(&host(number));
    }

    pub fn heal(&self, number: u64) {
        self.net.heal(&host(number));
    }

    pub fn channel(&self, number: u64) -> Channel {
        net::channel(&self.net.host("client"), &uri(number), Traffic::Bulk).unwrap()
    }

    pub fn files(&self, number: u64) -> FileServiceClient<Channel> {
        FileServiceClient::new(self.channel(number))
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(2 * MESSAGE_BYTES_MAX)
    }

    pub fn replicas(&self, number: u64) -> ReplicaServiceClient<Channel> {
        ReplicaServiceClient::new(self.channel(number)).max_decoding_message_size(MESSAGE_BYTES_MAX)
    }

    /// Writes a chunk to server 1.
    pub async fn write(&self, chunk: ChunkId, data: &[u8]) -> Result<v1::Receipt> {
        write(&mut self.files(1), messages(chunk, data)).await.map(|mut receipts| receipts.remove(0))
    }

    /// Writes a chunk and waits until all three servers hold it.
    pub async fn write_to_all(&self, chunk: ChunkId, data: &[u8]) -> v1::ChunkRef {
        let receipt = self.write(chunk, data).await.unwrap();
        assert_eq!(receipt.holder_ids, [1, 2, 3]);
        v1::ChunkRef {
            chunk: receipt.chunk,
            length: receipt.length,
            checksum: receipt.checksum,
            group_id: receipt.group_id,
        }
    }

    pub fn holders(&self, chunk: ChunkId) -> Vec<u64> {
        let holds = |server: &&Server| {
            let running = server.running.as_ref();
            running.is_some_and(|running| running.node.store.info(chunk).is_some_and(|info| !info.corrupt))
        };
        self.servers.iter().filter(holds).map(|server| server.number).collect()
    }
}

impl Server {
    pub fn node(&self) -> Arc<Node> {
        self.running.as_ref().expect("it runs").node.clone()
    }
}

pub fn chunk(index: u32) -> ChunkId {
    ChunkId::new(50, index)
}

/// Bytes that differ from block to block.
pub fn bytes(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at / 7 + at / 4096) as u8).collect()
}

/// A chunk's messages, of at most 1 MiB each, all checksums given.
pub fn messages(chunk: ChunkId, data: &[u8]) -> Vec<v1::WriteRequest> {
    let mut messages: Vec<_> = data
        .chunks(DATA_BYTES_MAX)
        .enumerate()
        .map(|(number, data)| v1::WriteRequest {
            offset: (number * DATA_BYTES_MAX) as u64,
            block_checksums: block_checksums(chunk, (number * DATA_BYTES_MAX / 4096) as u32, data),
            data: data.to_vec().into(),
            ..Default::default()
        })
        .collect();
    messages[0].chunk = Some(chunk.into());
    messages[0].group_id = GROUP;
    messages[0].epoch = 1;
    let finish = v1::WriteFinish { length: data.len() as u64, checksum: Some(crc64(data)) };
    messages.last_mut().unwrap().finish = Some(finish);
    messages
}

/// Sends a stream and takes all its answers.
pub async fn write(
    client: &mut FileServiceClient<Channel>,
    messages: Vec<v1::WriteRequest>,
) -> Result<Vec<v1::Receipt>> {
    let (receipts, error) = write_all(client, messages).await;
    error.map_or(Ok(receipts), Err)
}

/// As [`write`], with the receipts before an error.
pub async fn write_all(
    client: &mut FileServiceClient<Channel>,
    messages: Vec<v1::WriteRequest>,
) -> (Vec<v1::Receipt>, Option<Error>) {
    let mut receipts = Vec::new();
    let mut answers = match client.write(futures::stream::iter(messages)).await {
        Ok(answers) => answers.into_inner(),
        Err(status) => return (receipts, Some(status.into())),
    };
    loop {
        match answers.message().await {
            Ok(Some(answer)) => receipts.push(answer.receipt.unwrap()),
            Ok(None) => return (receipts, None),
            Err(status) => return (receipts, Some(status.into())),
        }
    }
}

/// Reads a range of a chunk: (offset of the first byte, bytes), all checksums compared.
pub async fn read(
    client: &mut FileServiceClient<Channel>,
    chunk: ChunkId,
    offset: u64,
    length: u64,
) -> Result<(u64, Vec<u8>)> {
    let request = v1::ReadRequest { chunk: Some(chunk.into()), offset, length };
    let mut parts = client.read(request).await?.into_inner();
    let mut data = Vec::new();
    let mut first = None;
    while let Some(part) = parts.message().await? {
        let first = *first.get_or_insert(part.offset);
        assert_eq!(part.offset, first + data.len() as u64, "parts are in order");
        assert!(part.data.len() <= DATA_BYTES_MAX);
        let block = (part.offset / 4096) as u32;
        assert_eq!(
            cairn_proto::checksum::verify_blocks(chunk, block, &part.data, &part.block_checksums),
            None
        );
        data.extend_from_slice(&part.data);
    }
    Ok((first.unwrap_or_default(), data))
}

/// Waits for a condition; time is virtual in most tests.
pub async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !holds() {
        assert!(Instant::now() < deadline, "in time: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
