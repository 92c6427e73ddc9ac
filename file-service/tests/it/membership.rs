//! Joining, coming back, and belonging to one cluster only.

use crate::{directory::FakeDirectory, harness::*};
use cairn_proto::Reason;
use file_service::node::Mode;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

async fn health(cluster: &Cluster, number: u64) -> ServingStatus {
    let mut client = HealthClient::new(cluster.channel(number));
    client.check(HealthCheckRequest { service: String::new() }).await.unwrap().into_inner().status()
}

#[tokio::test(start_paused = true)]
async fn identity_and_topology_survive_a_restart() {
    let mut cluster = Cluster::start().await;
    let registered = cluster.directory.0.lock().registers.clone();
    assert!(registered.iter().all(|register| register.cluster_id.is_empty() && register.server_id == 0));
    let before = cluster.node(2);
    let (disk_id, map) = (before.identity.disk_id(), before.topology.map());
    cluster.kill(2).await;
    cluster.server(2).disk.crash(disk::CrashKeep::Nothing);
    cluster.restart(2).await;
    let again = cluster.directory.0.lock().registers.last().unwrap().clone();
    assert_eq!((again.cluster_id.as_str(), again.server_id), (CLUSTER, 2));
    assert_eq!(again.disk_id, disk_id);
    assert_ne!(again.incarnation, before.identity.incarnation());
    let node = cluster.node(2);
    assert!(node.topology.map().revision >= map.revision);
    assert_eq!(health(&cluster, 2).await, ServingStatus::Serving);
}

#[tokio::test(start_paused = true)]
async fn a_disk_of_another_cluster_serves_nothing_and_keeps_everything() {
    let mut cluster = Cluster::start().await;
    cluster.write_to_all(chunk(1), b"precious").await;
    cluster.kill(2).await;
    // Another directory took the address over.
    let other = FakeDirectory::new("another-cluster");
    cluster.net.kill("directory");
    tokio::spawn(other.clone().serve(cluster.net.listen("other", DIRECTORY)));
    cluster.restart_unregistered(2).await;
    let node = cluster.node(2);
    eventually("it is refused", || matches!(*node.mode.borrow(), Mode::Refused(_))).await;
    assert_eq!(health(&cluster, 2).await, ServingStatus::NotServing);
    let error = read(&mut cluster.files(2), chunk(1), 0, 0).await.unwrap_err();
    assert_eq!(error.reason, Reason::WrongCluster);
    // The right directory comes back.
    cluster.net.kill("other");
    tokio::spawn(cluster.directory.clone().serve(cluster.net.listen("directory", DIRECTORY)));
    eventually("it serves again", || *node.mode.borrow() == Mode::Serving).await;
    assert_eq!(read(&mut cluster.files(2), chunk(1), 0, 0).await.unwrap().1, b"precious");
    assert_eq!(node.identity.cluster_id(), CLUSTER);
}

#[tokio::test(start_paused = true)]
async fn a_blank_disk_serves_nothing_before_it_is_taken_in() {
    let mut cluster = Cluster::start().await;
    cluster.kill(2).await;
    cluster.servers[1].disk = disk::SimDisk::new(99, 2 << 30);
    cluster.net.cut("directory");
    cluster.restart_unregistered(2).await;
    let error = read(&mut cluster.files(2), chunk(1), 0, 0).await.unwrap_err();
    assert_eq!(error.reason, Reason::Unavailable);
    assert!(error.detail.retry_after_ms > 0);
    assert_eq!(health(&cluster, 2).await, ServingStatus::NotServing);
    cluster.net.heal("directory");
    let node = cluster.node(2);
    eventually("it joins", || *node.mode.borrow() == Mode::Serving).await;
    assert_eq!(node.identity.server_id().0, 2);
}

#[tokio::test(start_paused = true)]
async fn a_forgotten_server_registers_again() {
    let cluster = Cluster::start().await;
    let before = cluster.directory.0.lock().registers.len();
    cluster.directory.change(|state| state.forget = true);
    eventually("somebody registers", || cluster.directory.0.lock().registers.len() > before).await;
}

#[tokio::test(start_paused = true)]
async fn a_directory_that_lost_its_memory_takes_nothing_back() {
    let cluster = Cluster::start().await;
    cluster.directory.change(|state| {
        state.generation = 5;
        state.groups = vec![group(7, 2)];
    });
    cluster.know_everything().await;
    let node = cluster.node(3);
    eventually("the generation is kept", || node.identity.generation().0 == 5).await;
    let known = node.topology.map();
    cluster.directory.change(|state| {
        state.generation = 4;
        state.revision += 100;
        state.groups = vec![group(2, 1)];
        state.forget = true;
    });
    let beats = cluster.directory.0.lock().heartbeats.len();
    eventually("heartbeats go on", || cluster.directory.0.lock().heartbeats.len() > beats + 20).await;
    assert_eq!(node.topology.map(), known);
    assert_eq!(node.identity.generation().0, 5);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_stops_says_so_and_ends_what_is_under_way() {
    let mut cluster = Cluster::start().await;
    cluster.write_to_all(chunk(1), b"kept").await;
    // Idle streams of others, and one that carries a chunk.
    let (sender, receiver) = futures::channel::mpsc::unbounded();
    let mut parts = messages(chunk(2), &bytes(3 << 20)).into_iter();
    sender.unbounded_send(parts.next().unwrap()).unwrap();
    let mut answers = cluster.files(1).write(receiver).await.unwrap().into_inner();
    let follower = cluster.node(2);
    eventually("it arrives", || follower.receiving.is_arriving(chunk(2))).await;
    let node = cluster.node(1);
    cluster.shutdown(1).cancel();
    eventually("it drains", || node.receiving.draining.is_cancelled()).await;
    parts.for_each(|part| sender.unbounded_send(part).unwrap());
    let receipt = answers.message().await.unwrap().unwrap().receipt.unwrap();
    assert_eq!(receipt.holder_ids, [1, 2, 3]);
    drop((answers, sender));
    cluster.stop(1).await;
    let state = cluster.directory.0.lock();
    assert!(state.heartbeats.iter().any(|beat| beat.server_id == 1 && beat.leaving));
}
