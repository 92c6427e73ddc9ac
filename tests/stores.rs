//! Wrong stores of the directory and wrong disks of file servers: the right thing is said, nothing is collected or
//! overwritten, and at most one directory is followed (REBUILT, DURABLE, HEALED).

use cairn_proto::{host::Host, net::accept_tcp, v1};
use cairn_tests::{eventually::eventually, healthy, processes::free_ports, shipped};
use client_lib::{Client, Reason};
use cluster::Cluster;
use disk::RealDisk;
use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// Generous: a debug build on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy_folder(&entry.path(), &target),
            false => drop(std::fs::copy(entry.path(), target).unwrap()),
        }
    }
}

fn replace_folder(with: &Path, folder: &Path) {
    std::fs::remove_dir_all(folder).unwrap();
    copy_folder(with, folder);
}

async fn on_folders(folder: &Path, file_servers: usize) -> Cluster {
    Cluster::builder().file_servers(file_servers).data(folder).build_and_start().await.unwrap()
}

async fn directory(cluster: &Cluster) -> v1::DirectoryStatus {
    cluster.status().await.unwrap().directory.unwrap()
}

/// A client that gives up at once where the directory does not answer.
fn hasty(cluster: &Cluster) -> Client {
    cluster.client_builder().deadline(Duration::from_millis(300)).build().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn rebuilt_an_older_copy_of_the_directorys_store_never_answers_with_the_past() {
    let (folder, old) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let cluster = on_folders(folder.path(), 3).await;
    let client = cluster.client().await.unwrap();
    client.write("/deleted later", "old").await.unwrap();
    client.write("/changed later", "old").await.unwrap();
    shipped(&cluster).await;
    cluster.kill_directory().await;
    let store = cluster.directory_folder().unwrap();
    copy_folder(&store, old.path());
    cluster.restart_directory().await.unwrap();
    client.delete("/deleted later").await.unwrap();
    client.write("/changed later", "new").await.unwrap();
    client.write("/made later", "new").await.unwrap();
    shipped(&cluster).await;
    let before = directory(&cluster).await;

    cluster.kill_directory().await;
    replace_folder(old.path(), &store);
    cluster.restart_directory().await.unwrap();
    let began = Instant::now();
    let client = hasty(&cluster);
    let mut answered = 0;
    while answered < 20 {
        let (deleted, made) = (client.stat("/deleted later").await, client.stat("/made later").await);
        assert!(deleted.is_err(), "what was deleted is back");
        let waits =
            |reason| matches!(reason, Reason::Rebuilding | Reason::Unavailable | Reason::DeadlineExceeded);
        match made {
            Ok(_) => answered += 1,
            Err(error) => assert!(waits(error.reason), "{error}"),
        }
        if let Ok(bytes) = client.read("/changed later").await {
            assert_eq!(&bytes[..], b"new");
        }
        assert!(began.elapsed() < LIMIT, "it does not answer");
    }
    cluster.wait_ready().await.unwrap();
    assert!(directory(&cluster).await.generation > before.generation);
    healthy(&cluster, LIMIT).await;
    cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn rebuilt_a_store_that_nobody_can_confirm_waits_and_says_for_whom() {
    let folder = tempfile::tempdir().unwrap();
    let cluster = on_folders(folder.path(), 3).await;
    cluster.client().await.unwrap().write("/file", "content").await.unwrap();
    shipped(&cluster).await;
    cluster.kill_all().await;
    cluster.restart_directory().await.unwrap();
    cluster.restart(1).await.unwrap();
    // One of three carriers: the other two may know of something newer than this store.
    let reason = eventually("it says for whom it waits", LIMIT, || async {
        let directory = directory(&cluster).await;
        assert_ne!(directory.mode, "serving");
        if directory.reason.contains("1 of the 3") { Ok(directory.reason) } else { Err(directory.reason) }
    })
    .await;
    assert!(reason.contains("waiting for server"), "{reason}");
    let error = hasty(&cluster).stat("/file").await.unwrap_err();
    assert!(matches!(error.reason, Reason::Unavailable | Reason::DeadlineExceeded), "{error}");
    let generation = {
        cluster.restart(2).await.unwrap();
        cluster.wait_ready().await.unwrap();
        directory(&cluster).await.generation
    };
    assert_eq!(generation, 1, "it was the newest: nothing is rebuilt");
    assert_eq!(&cluster.client().await.unwrap().read("/file").await.unwrap()[..], b"content");

    // An operator goes on without the two others: in a generation of its own, with carriers of its own.
    cluster.kill_all().await;
    cluster.restart_directory().await.unwrap();
    cluster.restart(0).await.unwrap();
    eventually("it waits", LIMIT, || async {
        let directory = directory(&cluster).await;
        if directory.mode == "confirming" { Ok(()) } else { Err(directory) }
    })
    .await;
    let channel = cairn_proto::net::channel(
        &cluster.network(),
        &cluster.directory_uri(),
        cairn_proto::net::Traffic::Small,
    );
    let mut operator = v1::cluster_service_client::ClusterServiceClient::new(channel.unwrap());
    operator.force_rebuild(v1::ForceRebuildRequest {}).await.unwrap();
    eventually("it serves without them", LIMIT, || async {
        let directory = directory(&cluster).await;
        if directory.mode == "serving" && directory.generation == 2 { Ok(()) } else { Err(directory) }
    })
    .await;
    for i in [1, 2] {
        cluster.restart(i).await.unwrap();
    }
    cluster.wait_ready().await.unwrap();
    assert_eq!(&cluster.client().await.unwrap().read("/file").await.unwrap()[..], b"content");
    cluster.shutdown().await.unwrap();
}

/// A second directory, on a copy of the first one's store.
struct Second {
    uri: String,
    gate: Arc<dir_service::gate::Gate>,
    stop: CancellationToken,
    serving: tokio::task::JoinHandle<cairn_proto::Result<()>>,
}

impl Second {
    async fn start(data: &Path, port: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
        let uri = format!("http://{}", listener.local_addr().unwrap());
        let config = dir_service::Config { advertise: vec![uri.clone()], ..Default::default() };
        let disk = RealDisk::open(data).unwrap();
        let app = dir_service::App::build(config, disk, Host::system(rand::random())).await.unwrap();
        let (gate, stop) = (app.gate(), CancellationToken::new());
        let serving = tokio::spawn(app.serve(vec![accept_tcp(listener)], stop.clone()));
        Self { uri, gate, stop, serving }
    }

    fn mode(&self) -> (&'static str, String) {
        let mode = self.gate.mode();
        let reason = match &mode {
            dir_service::gate::Mode::Confirming { reason }
            | dir_service::gate::Mode::Rebuilding { reason } => reason.clone(),
            _ => String::new(),
        };
        (mode.name(), reason)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fenced_of_two_directories_on_copies_of_one_store_one_is_followed() {
    let (folder, copy) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let port = free_ports(1)[0];
    let tune = move |_: usize, config: &mut file_service::Config| {
        config.directory.push(format!("http://127.0.0.1:{port}"));
    };
    let builder = Cluster::builder().file_servers(3).data(folder.path()).file_config(tune);
    let cluster = builder.build_and_start().await.unwrap();
    let client = cluster.client().await.unwrap();
    client.write("/file", "before the copy").await.unwrap();
    shipped(&cluster).await;
    cluster.kill_directory().await;
    copy_folder(&cluster.directory_folder().unwrap(), copy.path());
    cluster.restart_directory().await.unwrap();
    cluster.wait_ready().await.unwrap();

    let second = Second::start(copy.path(), port).await;
    eventually("the second one waits", LIMIT, || async {
        let (mode, reason) = second.mode();
        assert_ne!(mode, "serving");
        if reason.contains(&cluster.directory_uri()) { Ok(()) } else { Err((mode, reason)) }
    })
    .await;
    for number in 0..20_u8 {
        client.write(&format!("/while both run {number}"), vec![7_u8; 9_000]).await.unwrap();
        assert_ne!(second.mode().0, "serving");
    }
    assert_eq!(directory(&cluster).await.generation, 1, "nobody took anything over");
    shipped(&cluster).await;

    // The first one dies. The second notices that it is older than what the file servers have, and rebuilds.
    cluster.kill_directory().await;
    eventually("the second one serves", LIMIT, || async {
        let mode = second.mode();
        if mode.0 == "serving" { Ok(()) } else { Err(mode) }
    })
    .await;
    assert_eq!(second.gate.directory().unwrap().generation.0, 2);
    cluster.restart_directory().await.unwrap();
    eventually("the first one waits for the second", LIMIT, || async {
        let directory = directory(&cluster).await;
        assert_ne!(directory.mode, "serving");
        if directory.reason.contains(&second.uri) { Ok(()) } else { Err(directory) }
    })
    .await;
    let other = Client::connect(&[&second.uri]).await.unwrap();
    other.mkdir("/made by the second").await.unwrap();
    assert!(other.exists("/while both run 19").await.unwrap());
    eventually("the carriers have it", LIMIT, || async {
        let status = other.status().await.unwrap().directory.unwrap();
        if status.shipped_revision >= status.revision { Ok(()) } else { Err(status) }
    })
    .await;

    second.stop.cancel();
    second.serving.await.unwrap().unwrap();
    cluster.wait_ready().await.unwrap();
    assert!(directory(&cluster).await.generation > 2);
    let client = cluster.client().await.unwrap();
    assert!(client.exists("/made by the second").await.unwrap());
    for number in 0..20_u8 {
        assert_eq!(client.read(&format!("/while both run {number}")).await.unwrap().len(), 9_000);
    }
    healthy(&cluster, LIMIT).await;
    cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn healed_disks_that_changed_places_are_known_by_their_identity() {
    let folder = tempfile::tempdir().unwrap();
    let cluster = on_folders(folder.path(), 3).await;
    let client = cluster.client().await.unwrap();
    for number in 0..10_u8 {
        client.write(&format!("/file {number}"), vec![number; 50_000]).await.unwrap();
    }
    healthy(&cluster, LIMIT).await;
    let ids = [cluster.file_server(0).await.unwrap().id, cluster.file_server(1).await.unwrap().id];
    cluster.kill(0).await;
    cluster.kill(1).await;
    let (one, two) = (cluster.folder(0).unwrap(), cluster.folder(1).unwrap());
    let aside = folder.path().join("aside");
    std::fs::rename(&one, &aside).unwrap();
    std::fs::rename(&two, &one).unwrap();
    std::fs::rename(&aside, &two).unwrap();
    cluster.restart(0).await.unwrap();
    cluster.restart(1).await.unwrap();
    // All of them counted as living all the time: what matters is that they reported from where they are now.
    eventually("each disk says who it is", LIMIT, || async {
        let found =
            [cluster.file_server(0).await, cluster.file_server(1).await].map(|one| one.map(|one| one.id));
        if found == [Ok(ids[1]), Ok(ids[0])] { Ok(()) } else { Err(found) }
    })
    .await;
    cluster.wait_ready().await.unwrap();
    healthy(&cluster, LIMIT).await;
    let status = cluster.status().await.unwrap();
    assert_eq!(status.repairs.unwrap().copies_made, 0, "nothing was missing");
    assert_eq!(status.file_servers.len(), 3);
    for number in 0..10_u8 {
        assert_eq!(client.read(&format!("/file {number}")).await.unwrap(), vec![number; 50_000]);
    }
    cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn healed_a_blank_disk_is_a_new_server_and_takes_nothing_away() {
    let folder = tempfile::tempdir().unwrap();
    let cluster = on_folders(folder.path(), 3).await;
    let client = cluster.client().await.unwrap();
    for number in 0..10_u8 {
        client.write(&format!("/file {number}"), vec![number; 50_000]).await.unwrap();
    }
    healthy(&cluster, LIMIT).await;
    let id = cluster.file_server(2).await.unwrap().id;
    let held = || async {
        let status = cluster.status().await.unwrap();
        let chunks: Vec<u64> =
            status.file_servers.iter().map(|server| server.usage.unwrap_or_default().chunks).collect();
        if chunks.iter().filter(|chunks| **chunks == 10).count() >= 2 { Ok(()) } else { Err(chunks) }
    };
    eventually("all report what they hold", LIMIT, held).await;
    cluster.kill(2).await;
    cluster.lose_file_store(2).await.unwrap();
    cluster.restart(2).await.unwrap();
    let newcomer = eventually("it joins as a new server", LIMIT, || async {
        let status = cluster.status().await.unwrap();
        let known = |server: &&v1::ServerStatus| server.server.as_ref().is_some_and(|server| server.id > id);
        status.file_servers.iter().find(known).cloned().ok_or(status.file_servers.len())
    })
    .await;
    assert!(newcomer.server.unwrap().id > id, "not taken for the one whose place it has");
    for number in 0..10_u8 {
        assert_eq!(client.read(&format!("/file {number}")).await.unwrap(), vec![number; 50_000]);
    }
    eventually("the others lost nothing", LIMIT, held).await;
    cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn healed_a_disk_of_another_cluster_is_refused_and_kept() {
    let (folder, other_folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let cluster = on_folders(folder.path(), 3).await;
    let other = on_folders(other_folder.path(), 1).await;
    cluster.client().await.unwrap().write("/file", "ours").await.unwrap();
    other.client().await.unwrap().write("/file", "theirs").await.unwrap();
    shipped(&other).await;
    let cluster_id = directory(&other).await.cluster_id;
    other.kill(0).await;
    cluster.kill(2).await;
    let (ours, theirs) = (cluster.folder(2).unwrap(), other.folder(0).unwrap());
    let aside = folder.path().join("aside");
    std::fs::rename(&ours, &aside).unwrap();
    copy_folder(&theirs, &ours);
    cluster.restart(2).await.unwrap();
    let uri = cluster.file_server_uri(2);
    let channel =
        cairn_proto::net::channel(&cluster.network(), &uri, cairn_proto::net::Traffic::Bulk).unwrap();
    let server = v1::file_service_client::FileServiceClient::new(channel);
    eventually("it says that it belongs elsewhere", LIMIT, || async {
        let error = match server.clone().inventory(v1::InventoryRequest::default()).await {
            Ok(_) => return Err("it serves".to_owned()),
            Err(status) => cairn_proto::Error::from(status),
        };
        let said = error.reason == Reason::WrongCluster && error.message().contains(&cluster_id);
        if said { Ok(()) } else { Err(error.to_string()) }
    })
    .await;
    assert_eq!(cluster.client().await.unwrap().read("/file").await.unwrap(), "ours");
    cluster.kill(2).await;
    // Back where it belongs, it serves what it has.
    replace_folder(&ours, &theirs);
    other.restart(0).await.unwrap();
    other.wait_ready().await.unwrap();
    assert_eq!(other.client().await.unwrap().read("/file").await.unwrap(), "theirs");
    std::fs::remove_dir_all(&ours).unwrap();
    std::fs::rename(&aside, &ours).unwrap();
    cluster.restart(2).await.unwrap();
    cluster.wait_ready().await.unwrap();
    healthy(&cluster, LIMIT).await;
    cluster.shutdown().await.unwrap();
    other.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn healed_a_disk_that_is_an_older_copy_of_itself_counts_what_it_lost_as_missing() {
    let (folder, old) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let cluster = on_folders(folder.path(), 3).await;
    let client = cluster.client().await.unwrap();
    client.write("/in the copy", vec![1_u8; 50_000]).await.unwrap();
    healthy(&cluster, LIMIT).await;
    cluster.kill(2).await;
    copy_folder(&cluster.folder(2).unwrap(), old.path());
    cluster.restart(2).await.unwrap();
    cluster.wait_ready().await.unwrap();
    for number in 0..20_u8 {
        client.write(&format!("/later {number}"), vec![number; 50_000]).await.unwrap();
    }
    healthy(&cluster, LIMIT).await;
    let id = cluster.file_server(2).await.unwrap().id;
    // The others do not live while it comes back, so that nothing heals before it was seen.
    for i in 0..3 {
        cluster.kill(i).await;
    }
    replace_folder(old.path(), &cluster.folder(2).unwrap());
    cluster.restart(2).await.unwrap();
    eventually("it is recognised, and what it lost is missing", LIMIT, || async {
        let status = cluster.status().await.unwrap();
        let server =
            status.file_servers.iter().find(|one| one.server.as_ref().is_some_and(|one| one.id == id));
        let server = server.cloned().unwrap_or_default();
        let is_seen = server.notice.contains("older copy") && server.missing_chunks >= 20;
        if is_seen { Ok(()) } else { Err((server.notice, server.missing_chunks, server.verified)) }
    })
    .await;
    cluster.restart_all().await.unwrap();
    healthy(&cluster, LIMIT).await;
    let status = cluster.status().await.unwrap();
    assert!(status.file_servers.iter().all(|server| server.notice.is_empty()), "all is there again");
    assert_eq!(status.chunks.unwrap().quarantined, 0);
    for number in 0..20_u8 {
        assert_eq!(client.read(&format!("/later {number}")).await.unwrap(), vec![number; 50_000]);
    }
    cluster.shutdown().await.unwrap();
}
