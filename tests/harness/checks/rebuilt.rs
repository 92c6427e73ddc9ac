//! REBUILT: the directory's store is lost, and comes back from the file servers as it was.

use super::{Verdict, failed, quick, start};
use crate::shipped;
use client_lib::{Client, Kind};
use cluster::{Builder, Cluster};
use disk::CrashKeep;
use futures::StreamExt as _;
use std::collections::BTreeMap;

/// What a client sees of a path: kind, version, size and content.
pub type Seen = (Kind, u64, u64, Vec<u8>);

/// Everything a client can see, by path.
///
/// # Errors
/// When something that is listed cannot be read.
pub async fn snapshot(client: &Client) -> Result<BTreeMap<String, Seen>, String> {
    let mut seen = BTreeMap::new();
    let mut folders = vec![String::new()];
    while let Some(folder) = folders.pop() {
        let mut entries = client.list(if folder.is_empty() { "/" } else { &folder });
        while let Some(entry) = entries.next().await {
            let entry = entry.map_err(failed(format!("a list of {folder}/")))?;
            let path = format!("{folder}/{}", entry.name);
            let attributes = client.stat(&path).await.map_err(failed(&path))?;
            let content = match attributes.kind() {
                Kind::File => client.read(&path).await.map_err(failed(&path))?.to_vec(),
                _ => {
                    folders.push(path.clone());
                    Vec::new()
                }
            };
            seen.insert(path, (attributes.kind(), attributes.version, attributes.size, content));
        }
    }
    Ok(seen)
}

/// Takes the directory's store away, once everything is carried, and has it rebuilt: it is the same cluster, in a higher
/// generation.
///
/// # Errors
/// When it is not, or no directory comes back.
///
/// # Panics
/// When nothing can be carried.
pub async fn lose_and_rebuild(cluster: &Cluster) -> Verdict {
    shipped(cluster).await;
    let before = cluster.status().await.expect("a status").directory.expect("a directory");
    cluster.kill_directory().await;
    rebuild(cluster, &before.cluster_id, before.generation).await
}

async fn rebuild(cluster: &Cluster, cluster_id: &str, generation: u64) -> Verdict {
    cluster.lose_directory_store().await.expect("the store is taken away");
    cluster.restart_all().await.map_err(failed("no directory after the loss of its store"))?;
    let after = cluster.status().await.map_err(failed("the rebuilt directory"))?;
    let after = after.directory.unwrap_or_default();
    if after.cluster_id != cluster_id || after.generation <= generation {
        return Err(format!(
            "cluster {} of generation {} came back as {} of generation {}",
            cluster_id, generation, after.cluster_id, after.generation
        ));
    }
    Ok(())
}

/// Compares what is seen after a rebuild with what was seen before.
fn same(before: &BTreeMap<String, Seen>, after: &BTreeMap<String, Seen>) -> Verdict {
    for (path, seen) in after {
        match before.get(path) {
            None => return Err(format!("{path} came back")),
            Some(known) if known != seen => return Err(format!("{path} is not as it was")),
            Some(_) => {}
        }
    }
    match before.keys().find(|path| !after.contains_key(*path)) {
        Some(path) => Err(format!("{path} is gone")),
        None => Ok(()),
    }
}

/// A namespace with `files` files: nested and empty directories, files of all sizes, some of them deleted, moved,
/// appended to and cut.
async fn namespace(cluster: &Cluster, files: u32) -> Client {
    let client = cluster.client_builder().chunk_bytes(64 * 1024).build().expect("a client");
    client.mkdir_all("/a/b/c").await.expect("folders");
    client.mkdir("/empty folder").await.expect("a folder");
    client.create("/a/empty").await.expect("a file");
    let file = |number: u32| format!("/a/b/file {number} é");
    for number in 0..files {
        let content = vec![number as u8; 1 + (number as usize * 7_919) % 300_000];
        client.write(&file(number), content).await.expect("a write");
    }
    for number in 0..files / 4 {
        client.delete(&file(number)).await.expect("a delete");
    }
    for number in files / 4..files / 2 {
        client.rename(&file(number), &format!("/a/b/c/moved {number}")).await.expect("a rename");
    }
    client.append(&file(files / 2), "more").await.expect("an append");
    client.truncate(&file(files / 2 + 1), 5).await.expect("a cut");
    client
}

/// The directory's store is lost twice: names, versions, sizes and bytes are the same afterwards, nothing deleted comes
/// back, nothing renamed moves back, and the directory goes on as before.
///
/// # Errors
/// What is different.
///
/// # Panics
/// When there is no cluster to begin with.
pub async fn lost_store(builder: Builder, files: u32) -> Verdict {
    let cluster = start(builder.file_servers(3).memory(true)).await;
    let client = namespace(&cluster, files).await;
    let before = snapshot(&client).await?;
    assert!(before.len() > files as usize / 2, "{} names", before.len());
    for round in 0..2 {
        lose_and_rebuild(&cluster).await?;
        let fresh = cluster.client().await.expect("a client");
        let after = snapshot(&fresh).await.map_err(failed(format!("after rebuild {round}")))?;
        same(&before, &after).map_err(failed(format!("after rebuild {round}")))?;
        fresh.close().await.ok();
    }
    let client = cluster.client().await.expect("a client");
    client.write("/after", "the rebuild").await.map_err(failed("a write after the rebuild"))?;
    lose_and_rebuild(&cluster).await?;
    let read = cluster.client().await.expect("a client").read("/after").await;
    if read.map_err(failed("what was written after a rebuild"))? != "the rebuild" {
        return Err("what was written after a rebuild has other bytes".to_owned());
    }
    cluster.shutdown().await.expect("a clean end");
    Ok(())
}

/// Power is lost everywhere, and the directory's disk does not come back: what its carriers said they hold is there.
///
/// # Errors
/// What is different.
///
/// # Panics
/// When there is no cluster to begin with.
pub async fn lost_store_and_power(builder: Builder, files: u32) -> Verdict {
    let cluster = start(builder.file_servers(3).memory(true).directory_config(quick)).await;
    let client = namespace(&cluster, files).await;
    let before = snapshot(&client).await?;
    client.close().await.ok();
    drop(client);
    shipped(&cluster).await;
    let status = cluster.status().await.expect("a status").directory.expect("a directory");
    cluster.lose_power(CrashKeep::Nothing).await.expect("memory disks lose power");
    rebuild(&cluster, &status.cluster_id, status.generation).await?;
    let client = cluster.client().await.expect("a client");
    let after = snapshot(&client).await.map_err(failed("after the rebuild"))?;
    same(&before, &after)?;
    cluster.shutdown().await.expect("a clean end");
    Ok(())
}
