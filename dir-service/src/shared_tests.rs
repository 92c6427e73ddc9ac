use super::*;
use crate::{
    App,
    store::{
        EtcdStore,
        etcd::testing::{Etcd, network},
    },
};
use cairn_proto::{
    net::{Traffic, accept_tcp, channel},
    v1::{self, directory_service_client::DirectoryServiceClient},
};
use std::collections::VecDeque;
use tokio::{net::TcpListener, task::JoinHandle};
use tonic::transport::Channel;

/// A directory on etcd, as the program starts it.
struct Started {
    client: DirectoryServiceClient<Channel>,
    identity: StoreIdentity,
    gate: Arc<Gate>,
    stop: CancellationToken,
    serving: JoinHandle<Result<()>>,
}

impl Started {
    async fn on(etcd: &Etcd, seed: u64) -> Self {
        let host = Host::system(seed);
        let store = EtcdStore::open_or_create(etcd.options("s"), network(), seed).await.unwrap();
        let identity = store.identity().clone();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let uri = format!("http://{}", listener.local_addr().unwrap());
        let config = Config { advertise: vec![uri.clone()], ..Config::default() };
        let app = App::build_shared(
            config,
            Arc::new(store),
            Some(identity.clone()),
            host.clone(),
            StoreWrapper::default(),
        );
        let (gate, stop) = (app.gate(), CancellationToken::new());
        let serving = tokio::spawn(app.serve(vec![accept_tcp(listener)], stop.clone()));
        let client = DirectoryServiceClient::new(channel(&host.network, &uri, Traffic::Small).unwrap());
        let started = Self { client, identity, gate, stop, serving };
        started.serves().await;
        started
    }

    async fn serves(&self) {
        let serves = async {
            while !matches!(self.gate.mode(), Mode::Serving(_)) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), serves).await.expect("it serves");
    }

    async fn mkdir(&self, path: &str) -> Result<(), tonic::Status> {
        let request =
            v1::CreateRequest { path: path.into(), kind: v1::Kind::Directory.into(), ..Default::default() };
        self.client.clone().create(request).await.map(drop)
    }

    async fn names(&self) -> Vec<String> {
        let request = v1::ListRequest { path: "/".into(), ..Default::default() };
        let listed = self.client.clone().list(request).await.unwrap().into_inner();
        listed.entries.into_iter().map(|entry| entry.name).collect()
    }

    async fn stop(self) {
        self.stop.cancel();
        self.serving.await.unwrap().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_on_etcd_serves_and_is_the_same_after_a_restart() {
    let Some(mut etcd) = Etcd::start().await else { return };
    let first = Started::on(&etcd, 1).await;
    first.mkdir("/a").await.unwrap();
    first.mkdir("/a/b").await.unwrap();
    let again = first.mkdir("/a").await.unwrap_err();
    assert_eq!(again.code(), tonic::Code::AlreadyExists);
    // etcd goes away and comes back under it.
    etcd.kill(0);
    etcd.restart(0);
    let made = async {
        while let Err(status) = first.mkdir("/c").await {
            if status.code() == tonic::Code::AlreadyExists {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), made).await.expect("it goes on with etcd");
    let identity = first.identity.clone();
    first.stop().await;
    // Another process on another machine, with nothing of the first one's.
    let second = Started::on(&etcd, 2).await;
    assert_eq!(second.identity, identity);
    assert_eq!(second.names().await, ["a", "c"]);
    second.mkdir("/d").await.unwrap();
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn linear_three_directories_on_one_etcd_see_each_others_changes_and_outlive_each_other() {
    let Some(mut etcd) = Etcd::start().await else { return };
    let mut all: VecDeque<Started> =
        [Started::on(&etcd, 1).await, Started::on(&etcd, 2).await, Started::on(&etcd, 3).await].into();
    let mut names = Vec::new();
    for round in 0..9 {
        let name = format!("made-{round}");
        all[round % 3].mkdir(&format!("/{name}")).await.unwrap();
        let again = all[(round + 1) % 3].mkdir(&format!("/{name}")).await.unwrap_err();
        assert_eq!(again.code(), tonic::Code::AlreadyExists);
        names.push(name);
        for directory in &all {
            assert_eq!(directory.names().await, names, "round {round}");
        }
    }
    let first = all.pop_front().unwrap();
    first.stop().await;
    etcd.kill(0);
    etcd.restart(0);
    for (directory, name) in all.iter().zip(["x", "y"]) {
        let made = async {
            while let Err(status) = directory.mkdir(&format!("/{name}")).await {
                if status.code() == tonic::Code::AlreadyExists {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), made).await.expect("it goes on with etcd");
        names.push(name.to_owned());
        for directory in &all {
            assert_eq!(directory.names().await, names);
        }
    }
    for directory in all {
        directory.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_changes_nothing_any_more_once_its_store_was_moved_away() {
    let Some(etcd) = Etcd::start().await else { return };
    let forgotten = Started::on(&etcd, 1).await;
    forgotten.mkdir("/before").await.unwrap();
    let (moved, was_open) = EtcdStore::close_off(etcd.options("s"), network()).await.unwrap();
    assert!(was_open);
    let status = forgotten.mkdir("/after").await.unwrap_err();
    assert!(status.message().contains("moved away"), "{status}");
    moved.open_up().await.unwrap();
    let now = Started::on(&etcd, 2).await;
    assert_eq!(now.names().await, ["before"]);
    now.stop().await;
    forgotten.stop().await;
}
