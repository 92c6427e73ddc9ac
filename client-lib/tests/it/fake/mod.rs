//! A directory and file servers that keep their state in memory, with faults on order.

pub mod directory;
pub mod files;
pub mod lies;
pub mod net;
pub mod splice;

use cairn_proto::{
    Error,
    net::{Connect, Room, Traffic, server},
    v1::{
        self, cluster_service_server::ClusterServiceServer, directory_service_server::DirectoryServiceServer,
        file_service_server::FileServiceServer, session_service_server::SessionServiceServer,
    },
};
use client_lib::{Client, ClientBuilder};
use directory::{DirectoryFace, State};
use files::{FileFace, FileServer};
use net::{Mood, Net};
use parking_lot::Mutex;
use std::{collections::VecDeque, sync::Arc, time::Duration};

pub const DIRECTORY: &str = "http://directory:7400";

#[derive(Debug)]
pub struct Cluster {
    pub net: Net,
    pub state: Mutex<State>,
    pub servers: Vec<FileServer>,
    /// Errors instead of the next answers of a method, before or after it was applied.
    pub faults: Mutex<VecDeque<Fault>>,
    pub changed: tokio::sync::Notify,
    pub lies: Mutex<lies::Lies>,
}

#[derive(Clone, Debug)]
pub struct Fault {
    pub method: &'static str,
    pub applied: bool,
    pub error: Error,
}

impl Cluster {
    /// A directory and `count` file servers, all members of all groups; group n has server n as primary.
    pub fn start(count: u64) -> Arc<Self> {
        let net = Net::default();
        let servers = (1..=count).map(|id| FileServer { id, ..Default::default() }).collect();
        let cluster = Arc::new(Self {
            net: net.clone(),
            state: Mutex::new(State::new(count)),
            servers,
            faults: Mutex::default(),
            changed: tokio::sync::Notify::new(),
            lies: Mutex::default(),
        });
        let face = DirectoryFace(cluster.clone());
        let incoming = net.listen(DIRECTORY);
        tokio::spawn(
            server(Traffic::Small, Room::Roomy)
                .add_service(DirectoryServiceServer::new(face.clone()))
                .add_service(SessionServiceServer::new(face.clone()))
                .add_service(ClusterServiceServer::new(face))
                .serve_with_incoming(incoming),
        );
        for number in 0..count as usize {
            let incoming = net.listen(&uri(number as u64 + 1));
            let service = FileServiceServer::new(FileFace(cluster.clone(), number))
                .max_decoding_message_size(cairn_proto::limits::MESSAGE_BYTES_MAX);
            tokio::spawn(
                server(Traffic::Bulk, Room::Roomy).add_service(service).serve_with_incoming(incoming),
            );
        }
        cluster
    }

    pub fn builder(&self) -> ClientBuilder {
        let network: Arc<dyn Connect> = Arc::new(self.net.clone());
        Client::builder().directory(DIRECTORY).network(network).owner("test").seed(7).chunk_bytes(64 * 1024)
    }

    /// A client with chunks of 64 KiB.
    pub fn client(&self) -> Client {
        self.builder().build().unwrap()
    }

    pub fn server(&self, id: u64) -> &FileServer {
        &self.servers[id as usize - 1]
    }

    pub fn set_mood(&self, id: u64, mood: Mood) {
        self.net.set(&uri(id), mood);
    }

    pub fn mood(&self, id: u64) -> Mood {
        self.net.mood(&uri(id))
    }

    pub fn group(&self, id: u64) -> v1::Group {
        self.state.lock().groups.get(&id).cloned().unwrap_or_default()
    }

    pub fn fault(&self, method: &'static str, applied: bool, error: Error) {
        self.faults.lock().push_back(Fault { method, applied, error });
    }

    /// What is lied about now.
    pub fn lies(&self) -> lies::Lies {
        self.lies.lock().clone()
    }

    /// The calls of a method so far.
    pub fn calls(&self, method: &str) -> Vec<v1::RequestId> {
        let state = self.state.lock();
        state.calls.iter().filter(|(name, _)| *name == method).map(|(_, id)| id.clone()).collect()
    }
}

pub fn uri(id: u64) -> String {
    format!("http://file{id}:7500")
}

/// Polls until it holds, at most 10 s.
pub async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let end = tokio::time::Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(tokio::time::Instant::now() < end, "never happened: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Bytes without a pattern.
pub fn noise(length: usize, seed: u64) -> Vec<u8> {
    use rand::{RngCore as _, SeedableRng as _};
    let mut bytes = vec![0; length];
    rand::rngs::SmallRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    bytes
}
