//! Full and failing disks under real processes: no acknowledgement lies, reads go on, errors name the server, and
//! writes come back with the room.
//!
//! The disks are small file systems of their own; without the right to mount, these tests skip, loudly. What a failed
//! sync does is also tried on simulated disks, everywhere.

use cairn_tests::{mounts::Mount, services::Services};
use client_lib::{Client, Reason, WriteOptions};
use cluster::Cluster;
use std::{
    fs,
    time::{Duration, Instant},
};

/// Longest wait for something to come back.
const BACK_LIMIT: Duration = Duration::from_secs(120);

fn content(number: u64, length: usize) -> Vec<u8> {
    (0..length).map(|at| (at as u64 * 31 + number * 7 + at as u64 / 4_096) as u8).collect()
}

async fn connect(services: &Services) -> Client {
    let builder = Client::builder().directory(services.directory_uri());
    builder.deadline(Duration::from_secs(10)).build().unwrap()
}

/// Everything that was acknowledged, as it was.
async fn verify(client: &Client, written: &[u64], length: usize) {
    for number in written {
        assert_eq!(
            client.read(&format!("/file-{number}")).await.unwrap(),
            content(*number, length),
            "file {number}"
        );
    }
}

/// Writes files until one is refused; answers what was acknowledged and the error.
async fn write_until_refused(client: &Client, from: u64, length: usize) -> (Vec<u64>, client_lib::Error) {
    let mut written = Vec::new();
    for number in from..from + 10_000 {
        match client.write(&format!("/file-{number}"), content(number, length)).await {
            Ok(_) => written.push(number),
            Err(error) => return (written, error),
        }
    }
    panic!("the disk was never full");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_file_server_is_named_reads_go_on_and_writes_come_back_with_the_room() {
    const LENGTH: usize = 3 << 20;
    let mut services = Services::prepare(1, &["--grace-ms", "500", "--compare-ms", "2000"]);
    let Some(disk) = Mount::ext4(&services.data("file-1"), 256) else { return };
    services.start_all();
    services.ready().await;
    let client = connect(&services).await;
    let (mut written, error) = write_until_refused(&client, 0, LENGTH).await;
    println!("{} files of 3 MiB, {} MiB left: {error}", written.len(), disk.free_bytes() >> 20);
    assert_eq!(error.reason, Reason::NoSpace, "{error:?}");
    let id = services.status().await.unwrap().file_servers[0].server.clone().unwrap().id;
    assert_eq!(error.detail.server, id.to_string(), "the full server is named: {error:?}");
    assert!(written.len() > 10);

    // The names of a full cluster still change, and what is there is read.
    client.mkdir("/folder").await.unwrap();
    client.rename("/file-0", "/folder/moved").await.unwrap();
    client.rename("/folder/moved", "/file-0").await.unwrap();
    verify(&client, &written, LENGTH).await;
    services.files[0].assert_running();

    // Deleting makes room, without a restart.
    for number in written.split_off(written.len() / 2) {
        client.delete(&format!("/file-{number}")).await.unwrap();
    }
    let deadline = Instant::now() + BACK_LIMIT;
    let number = 20_000;
    while let Err(error) = client.write(&format!("/file-{number}"), content(number, LENGTH)).await {
        assert_eq!(error.reason, Reason::NoSpace, "{error:?}");
        assert!(
            Instant::now() < deadline,
            "the room has not come back: {} MiB free",
            disk.free_bytes() >> 20
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    written.push(number);
    // Nor was an acknowledgement one only in memory.
    services.kill_all();
    services.start_all();
    services.ready().await;
    verify(&client, &written, LENGTH).await;
    services.kill_all();
}

#[tokio::test(flavor = "multi_thread")]
async fn one_full_server_among_three_stops_no_writer() {
    const LENGTH: usize = 3 << 20;
    let mut services = Services::prepare(3, &["--compare-ms", "2000"]);
    let Some(disk) = Mount::ext4(&services.data("file-2"), 160) else { return };
    services.start_all();
    services.ready().await;
    let client = connect(&services).await;
    let mut written = Vec::new();
    // Twice what the small one can take.
    for number in 0..2 * (disk.free_bytes() / LENGTH as u64) {
        client.write(&format!("/file-{number}"), content(number, LENGTH)).await.unwrap();
        written.push(number);
    }
    println!("{} files, {} MiB left on the small server", written.len(), disk.free_bytes() >> 20);
    verify(&client, &written, LENGTH).await;
    // The missing copies are told, not hidden.
    let deadline = Instant::now() + BACK_LIMIT;
    loop {
        let status = services.status().await.unwrap();
        let chunks = status.chunks.unwrap_or_default();
        if chunks.under_replicated > 0 {
            assert_eq!(chunks.lost, 0);
            break;
        }
        assert!(Instant::now() < deadline, "{chunks:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    services.kill_all();
    services.start_all();
    services.ready().await;
    verify(&client, &written, LENGTH).await;
    services.kill_all();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_whose_disk_is_full_refuses_changes_serves_and_comes_back() {
    let mut services = Services::prepare(1, &[]);
    let Some(disk) = Mount::ext4(&services.data("directory"), 192) else { return };
    services.start_all();
    services.ready().await;
    let client = connect(&services).await;
    client.mkdir("/kept").await.unwrap();
    client.write("/kept/file", content(1, 5_000)).await.unwrap();
    let filler = disk.fill(1 << 20);
    println!("{} KiB left for the directory", disk.free_bytes() >> 10);
    // Until what was prepared before is used up.
    let mut acknowledged = Vec::new();
    let big = vec![7; 60 << 10];
    let error = loop {
        let number = acknowledged.len();
        let options = WriteOptions::new().xattr("user.big", big.clone());
        match client.create_with(&format!("/kept/entry-{number}"), options).await {
            Ok(_) => acknowledged.push(number),
            Err(error) => break error,
        }
        assert!(number < 3_000, "the disk is never full: {} KiB left", disk.free_bytes() >> 10);
    };
    println!("{} changes, then: {error}", acknowledged.len());
    assert_eq!(error.reason, Reason::NoSpace, "{error:?}");
    assert!(error.message().contains("free some space"), "what to do: {error}");
    services.directory.assert_running();

    // It serves what it has.
    assert_eq!(client.read("/kept/file").await.unwrap(), content(1, 5_000));
    for number in &acknowledged {
        assert!(client.exists(&format!("/kept/entry-{number}")).await.unwrap(), "entry {number}");
    }
    let again = client.create_with("/kept/again", WriteOptions::new().xattr("user.big", big.clone())).await;
    assert_eq!(
        again.unwrap_err().reason,
        Reason::NoSpace,
        "a small change may find room, a large one does not"
    );
    assert_eq!(services.status().await.unwrap().directory.unwrap().mode, "serving");

    // With the room come the changes, without a restart.
    fs::remove_file(filler).unwrap();
    let deadline = Instant::now() + BACK_LIMIT;
    while let Err(error) =
        client.create_with("/more", WriteOptions::new().xattr("user.big", big.clone())).await
    {
        assert_eq!(error.reason, Reason::NoSpace, "{error:?}");
        assert!(Instant::now() < deadline, "changes have not come back: {error}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    services.kill_all();
    services.start_all();
    services.ready().await;
    let client = connect(&services).await;
    assert!(client.exists("/more").await.unwrap());
    for number in &acknowledged {
        assert!(client.exists(&format!("/kept/entry-{number}")).await.unwrap(), "entry {number}");
    }
    assert_eq!(client.read("/kept/file").await.unwrap(), content(1, 5_000));
    services.kill_all();
}

/// The device goes away under a running file server: nothing that it acknowledged is lost, and nothing is
/// acknowledged any more, until it is started anew on a disk that works.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_server_whose_disk_fails_acknowledges_nothing_more() {
    const LENGTH: usize = 20_000;
    let mut services = Services::prepare(1, &[]);
    let Some(disk) = Mount::ext4(&services.data("file-1"), 256) else { return };
    services.start_all();
    services.ready().await;
    let client = connect(&services).await;
    let mut written = Vec::new();
    for number in 0..20 {
        client.write(&format!("/file-{number}"), content(number, LENGTH)).await.unwrap();
        written.push(number);
    }
    disk.shut_down();
    for number in 100..110 {
        // Small and large chunks go different ways.
        let length = if number % 2 == 0 { LENGTH } else { 200_000 };
        let failed = client.write(&format!("/file-{number}"), content(number, length)).await;
        let error = failed.expect_err("an acknowledgement that the disk does not keep");
        println!("{error}");
    }
    services.files[0].kill9();
    disk.remount();
    services.start_all();
    services.ready().await;
    verify(&client, &written, LENGTH).await;
    client.write("/file-200", content(200, LENGTH)).await.unwrap();
    verify(&client, &[200], LENGTH).await;
    services.kill_all();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_whose_disk_fails_acknowledges_nothing_more_and_loses_nothing() {
    let mut services = Services::prepare(1, &[]);
    let Some(disk) = Mount::ext4(&services.data("directory"), 256) else { return };
    services.start_all();
    services.ready().await;
    let client = connect(&services).await;
    for number in 0..20 {
        client.mkdir(&format!("/folder-{number}")).await.unwrap();
    }
    disk.shut_down();
    for number in 100..103 {
        let error =
            client.mkdir(&format!("/folder-{number}")).await.expect_err("an acknowledgement without a disk");
        println!("{error}");
    }
    services.directory.kill9();
    disk.remount();
    services.start_all();
    services.ready().await;
    let client = connect(&services).await;
    for number in 0..20 {
        assert!(client.exists(&format!("/folder-{number}")).await.unwrap(), "folder {number}");
    }
    client.mkdir("/again").await.unwrap();
    services.kill_all();
}

/// The same without root: one sync fails, and everything afterwards would succeed again, as it does on a kernel that
/// has dropped what it could not write.
#[tokio::test(flavor = "multi_thread")]
async fn after_one_failed_sync_a_server_takes_nothing_more_for_durable() {
    let cluster = Cluster::builder().file_servers(1).memory(true).build_and_start().await.unwrap();
    let builder = cluster.client_builder().deadline(Duration::from_secs(3));
    let client = builder.build().unwrap();
    client.write("/before", "kept").await.unwrap();

    // A file server: small chunks share a log, which is not written to again.
    cluster.memory_disk(0).unwrap().fail_syncs(1);
    for number in 0..3 {
        let error = client.write(&format!("/small-{number}"), "lost").await.expect_err("not durable");
        println!("{error}");
    }
    assert_eq!(&client.read("/before").await.unwrap()[..], b"kept");
    cluster.stop(0).await.ok();
    cluster.restart(0).await.unwrap();
    cluster.wait_ready().await.unwrap();
    let client = cluster.client().await.unwrap();
    client.write("/after", "kept too").await.unwrap();

    // The directory: it serves, and changes nothing before it was started anew.
    cluster.directory_memory_disk().unwrap().fail_syncs(1);
    let hasty = cluster.client_builder().deadline(Duration::from_secs(3)).build().unwrap();
    for number in 0..3 {
        let error = hasty.mkdir(&format!("/folder-{number}")).await.expect_err("not durable");
        println!("{error}");
    }
    assert_eq!(&hasty.read("/before").await.unwrap()[..], b"kept");
    cluster.kill_directory().await;
    cluster.restart_directory().await.unwrap();
    cluster.wait_ready().await.unwrap();
    let client = cluster.client().await.unwrap();
    client.mkdir("/again").await.unwrap();
    for (path, content) in [("/before", "kept"), ("/after", "kept too")] {
        assert_eq!(&client.read(path).await.unwrap()[..], content.as_bytes());
    }
    cluster.shutdown().await.unwrap();
}
