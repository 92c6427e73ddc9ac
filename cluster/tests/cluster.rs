//! The embedded cluster does to its services what it says.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a test may

use cairn_proto::{Reason, net::Traffic, v1};
use cluster::{Cluster, Role};
use disk::CrashKeep;
use parking_lot::Mutex;
use std::{collections::BTreeSet, sync::Arc, time::Duration};

async fn asks_inventory(cluster: &Cluster, i: usize) -> Result<(), tonic::Status> {
    let channel =
        cairn_proto::net::channel(&cluster.network(), &cluster.file_server_uri(i), Traffic::Small).unwrap();
    let mut files = v1::file_service_client::FileServiceClient::new(channel);
    files.inventory(v1::InventoryRequest::default()).await.map(|_| ())
}

#[tokio::test]
async fn it_starts_serves_and_leaves_nothing() {
    let cluster = Cluster::builder().zones(["one", "two"]).build_and_start().await.unwrap();
    let client = cluster.client().await.unwrap();
    client.write("/a", "bytes").await.unwrap();
    assert_eq!(client.read("/a").await.unwrap(), "bytes");
    let zones = ["one", "two", "one"];
    for (i, zone) in zones.iter().enumerate() {
        let server = cluster.file_server(i).await.unwrap();
        assert_eq!((server.zone.as_str(), server.address), (*zone, cluster.file_server_uri(i)));
        assert_ne!(server.id, 0);
    }
    let folder = cluster.directory_folder().unwrap();
    assert!(folder.is_dir());
    client.close().await.unwrap();
    cluster.shutdown().await.unwrap();
    assert!(!folder.exists(), "temporary data stays behind");
}

#[tokio::test]
async fn a_killed_server_breaks_and_comes_back_with_its_data() {
    let cluster = Cluster::builder().file_servers(1).build_and_start().await.unwrap();
    let client = cluster.client().await.unwrap();
    client.write("/a", "bytes").await.unwrap();
    let (id, uri) = (cluster.file_server(0).await.unwrap().id, cluster.file_server_uri(0));
    cluster.kill(0).await;
    assert_eq!(asks_inventory(&cluster, 0).await.unwrap_err().code(), tonic::Code::Unavailable);
    cluster.restart(0).await.unwrap();
    cluster.wait_ready().await.unwrap();
    let back = cluster.file_server(0).await.unwrap();
    assert_eq!((back.id, back.address), (id, uri), "the same server at the same address");
    assert_eq!(client.read("/a").await.unwrap(), "bytes");
    cluster.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_partitioned_server_neither_answers_nor_fails_until_it_heals() {
    let cluster = Cluster::builder().file_servers(2).memory(true).build_and_start().await.unwrap();
    cluster.partition(0);
    let asked = tokio::time::timeout(Duration::from_millis(500), asks_inventory(&cluster, 0)).await;
    assert!(asked.is_err(), "there was an answer: {asked:?}");
    cluster.heal(0);
    // Whatever it answers, it answers.
    tokio::time::timeout(Duration::from_secs(10), asks_inventory(&cluster, 0)).await.expect("healed").ok();
    cluster.wait_ready().await.unwrap();
    cluster.shutdown().await.unwrap();
}

#[tokio::test]
async fn the_directory_dies_and_comes_back_with_its_names() {
    let cluster = Cluster::builder().memory(true).build_and_start().await.unwrap();
    let client = cluster.client().await.unwrap();
    client.write("/a", "bytes").await.unwrap();
    assert_eq!(cluster.lose_directory_store().await.unwrap_err().reason, Reason::InvalidArgument);
    cluster.kill_directory().await;
    cluster.restart_directory().await.unwrap();
    cluster.wait_ready().await.unwrap();
    assert_eq!(client.read("/a").await.unwrap(), "bytes");
    cluster.shutdown().await.unwrap();
}

#[tokio::test]
async fn power_loss_everywhere_keeps_what_was_acknowledged() {
    let cluster = Cluster::builder().memory(true).build_and_start().await.unwrap();
    let client = cluster.client().await.unwrap();
    client.write("/a", "bytes").await.unwrap();
    cluster.lose_power(CrashKeep::Nothing).await.unwrap();
    cluster.restart_all().await.unwrap();
    assert_eq!(client.read("/a").await.unwrap(), "bytes");
    cluster.shutdown().await.unwrap();
}

#[tokio::test]
async fn data_that_stays_is_there_for_the_next_cluster_and_in_use_for_another() {
    let data = tempfile::tempdir().unwrap();
    let start = || Cluster::builder().file_servers(1).data(data.path()).build_and_start();
    let cluster = start().await.unwrap();
    cluster.client().await.unwrap().write("/a", "bytes").await.unwrap();
    cluster.shutdown().await.unwrap();
    let cluster = start().await.unwrap();
    assert_eq!(cluster.client().await.unwrap().read("/a").await.unwrap(), "bytes");
    cluster.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_server_that_is_added_takes_part() {
    let cluster = Cluster::builder().file_servers(1).memory(true).build_and_start().await.unwrap();
    let i = cluster.add_file_server(Some("far")).await.unwrap();
    assert_eq!(i, 1);
    assert_eq!(cluster.file_server(1).await.unwrap().zone, "far");
    assert_eq!(cluster.status().await.unwrap().file_servers.len(), 2);
    cluster.shutdown().await.unwrap();
}

#[tokio::test]
async fn wrappers_stand_before_every_disk_network_and_store() {
    type Calls = BTreeSet<(&'static str, Option<Role>)>;
    let seen: Arc<Mutex<Calls>> = Arc::default();
    let note = |what: &'static str| {
        let seen = seen.clone();
        move |role: Option<Role>| {
            seen.lock().insert((what, role));
        }
    };
    let (disks, networks, stores, chunks) = (note("disk"), note("network"), note("store"), note("chunks"));
    let builder = Cluster::builder().file_servers(1).memory(true);
    let builder = builder
        .disk_wrapper(move |role, disk| {
            disks(Some(role));
            disk
        })
        .network_wrapper(move |role, network| {
            networks(Some(role));
            network
        })
        .store_wrapper(move |store| {
            stores(None);
            store
        })
        .chunk_store_wrapper(move |index, store| {
            chunks(Some(Role::FileServer(index)));
            store
        });
    let cluster = builder.build_and_start().await.unwrap();
    cluster.client().await.unwrap().write("/a", "bytes").await.unwrap();
    let (directory, file) = (Some(Role::Directory), Some(Role::FileServer(0)));
    let all = [
        ("chunks", file),
        ("disk", directory),
        ("disk", file),
        ("network", directory),
        ("network", file),
        ("network", Some(Role::Client)),
        ("store", None),
    ];
    assert_eq!(*seen.lock(), BTreeSet::from(all));
    cluster.shutdown().await.unwrap();
}
