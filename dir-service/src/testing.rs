//! A serving directory over a store in memory, for tests of operations.

use crate::{
    config::Config,
    directory::Directory,
    store::{MemoryStore, MetaStore},
};
use cairn_proto::{
    host::Host,
    id::{Generation, SessionId},
    v1,
};
use std::sync::Arc;

/// A directory with a few file servers that nobody can reach.
pub struct Bench {
    /// The directory.
    pub directory: Arc<Directory>,
    /// Its store.
    pub store: MemoryStore,
    servers: Vec<u64>,
}

impl Bench {
    /// With three servers.
    pub async fn start() -> Self {
        Self::over(MemoryStore::new()).await
    }

    /// Over a store that may hold something already.
    pub async fn over(store: MemoryStore) -> Self {
        let shared: Arc<dyn MetaStore> = Arc::new(store.clone());
        let cluster_id = "6f2a5d0c-7a2f-4c7f-9c43-0d8a4f4f8f11".to_owned();
        let directory =
            Directory::open(shared, cluster_id, Generation(1), Config::default(), Host::system(7))
                .await
                .unwrap();
        let mut bench = Self { directory: Arc::new(directory), store, servers: Vec::new() };
        for number in 1..=3 {
            let request = v1::RegisterRequest {
                disk_id: format!("disk-{number}"),
                incarnation: format!("life-{number}"),
                endpoints: vec![v1::Endpoint {
                    uri: format!("http://127.0.0.1:{}", 7_500 + number),
                    scope: 1,
                }],
                zone: format!("zone-{number}"),
                usage: Some(v1::Usage { total_bytes: 1 << 40, free_bytes: 1 << 40, ..Default::default() }),
                ..Default::default()
            };
            bench.servers.push(bench.directory.cluster.register(request).await.unwrap().server_id);
        }
        bench.heartbeat();
        bench
    }

    /// All servers say that they live and know all groups.
    pub fn heartbeat(&self) {
        let topology_revision = self.directory.cluster.topology(0).revision;
        for (number, server_id) in (1..).zip(&self.servers) {
            let request = v1::HeartbeatRequest {
                cluster_id: self.directory.cluster_id.clone(),
                server_id: *server_id,
                incarnation: format!("life-{number}"),
                usage: Some(v1::Usage { total_bytes: 1 << 40, free_bytes: 1 << 40, ..Default::default() }),
                topology_revision,
                ..Default::default()
            };
            self.directory.cluster.heartbeat(request).unwrap();
        }
    }

    /// A session of 10 s.
    pub async fn session(&self) -> u64 {
        let request = v1::OpenRequest { owner: "tester".into(), ..Default::default() };
        crate::ops::session::open(&self.directory, request).await.unwrap().session_id
    }

    /// Keeps a session alive.
    pub fn renew(&self, session: u64) {
        self.directory.sessions.renew(SessionId(session), None).unwrap();
    }

    /// A grant that all servers know of.
    pub async fn grant(&self, session_id: u64) -> v1::Grant {
        let request = v1::GrantRequest { session_id, ..Default::default() };
        let grant = crate::ops::grant::grant(&self.directory, request).await.unwrap().grant.unwrap();
        self.heartbeat();
        grant
    }

    /// The receipt of a chunk that all members hold.
    pub fn receipt(grant: &v1::Grant, index: u32, length: u64) -> v1::Receipt {
        let group = grant.group.as_ref().unwrap();
        v1::Receipt {
            chunk: Some(v1::ChunkId { grant_id: grant.id, index }),
            group_id: group.id,
            epoch: group.epoch,
            length,
            checksum: 0x1000 + u64::from(index),
            holder_ids: group.seats.iter().map(|seat| seat.server_id).collect(),
            mac: Default::default(),
        }
    }
}
