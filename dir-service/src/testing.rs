//! A serving directory over a store in memory, for tests of operations.

use crate::{
    config::Config,
    directory::Directory,
    store::{Changes, CommitError, KeyRange, MemoryStore, MetaStore, Page},
};
use async_trait::async_trait;
use cairn_core::plan::{Key, Plan, Versioned};
use cairn_proto::{
    Error,
    host::Host,
    id::{Generation, Revision, SessionId},
    v1,
};
use parking_lot::Mutex;
use std::sync::Arc;
use tokio::sync::oneshot;

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
        Self::seeing(store, shared).await
    }

    /// With a gate in front of its store.
    pub async fn gated() -> (Self, Gate) {
        let store = MemoryStore::new();
        let gate = Gate { store: store.clone(), held: Arc::default() };
        (Self::seeing(store, Arc::new(gate.clone())).await, gate)
    }

    async fn seeing(store: MemoryStore, shared: Arc<dyn MetaStore>) -> Self {
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

/// A store that holds a plan up on its way, so that another one can overtake it. As in the real one, the plan is applied
/// whether or not somebody still waits for the answer.
#[derive(Clone, Debug)]
pub struct Gate {
    store: MemoryStore,
    held: Arc<Mutex<Option<Barrier>>>,
}

/// The gate's ends of [`HeldUp`].
type Barrier = (oneshot::Sender<()>, oneshot::Receiver<()>);

/// A plan that is to be held up.
#[derive(Debug)]
pub struct HeldUp {
    /// Resolves when it has come.
    pub arrived: oneshot::Receiver<()>,
    /// Lets it go on, as does dropping this.
    pub release: oneshot::Sender<()>,
}

impl Gate {
    /// Holds the next plan up.
    pub fn hold_next(&self) -> HeldUp {
        let (arrive, arrived) = oneshot::channel();
        let (release, released) = oneshot::channel();
        *self.held.lock() = Some((arrive, released));
        HeldUp { arrived, release }
    }
}

#[async_trait]
impl MetaStore for Gate {
    async fn get(
        &self,
        keys: &[Key],
        at: Option<Revision>,
    ) -> Result<(Revision, Vec<Option<Versioned>>), Error> {
        self.store.get(keys, at).await
    }

    async fn scan(
        &self,
        range: KeyRange,
        limit: usize,
        at: Option<Revision>,
    ) -> Result<(Revision, Page), Error> {
        self.store.scan(range, limit, at).await
    }

    async fn commit(&self, plan: Plan) -> Result<Revision, CommitError> {
        let Some((arrive, released)) = self.held.lock().take() else { return self.store.commit(plan).await };
        let store = self.store.clone();
        let applying = tokio::spawn(async move {
            let _ = arrive.send(());
            let _ = released.await;
            store.commit(plan).await
        });
        applying.await.expect("the store does not panic")
    }

    async fn watch(&self, prefix: Key, from: Revision) -> Result<Changes, Error> {
        self.store.watch(prefix, from).await
    }

    async fn revision(&self) -> Result<Revision, Error> {
        self.store.revision().await
    }
}
