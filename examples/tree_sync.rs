//! A real directory goes in, comes out elsewhere, and is the same: this package's own, or the one given.
//!
//!     cargo run -p examples --example tree_sync -- [DIRECTORY]

use client_lib::{Client, Kind};
use cluster::Cluster;
use futures::TryStreamExt as _;
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let source = std::env::args_os().nth(1).map_or(env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    let target = tempfile::tempdir()?;
    let cluster = Cluster::start(3).await?;
    let client = cluster.client().await?;

    upload(&client, &source, "/tree").await?;
    download(&client, "/tree", target.path()).await?;

    let (before, after) = (contents(&source)?, contents(target.path())?);
    assert!(!before.is_empty(), "{} holds nothing", source.display());
    assert!(before == after, "what came out is not what went in");
    println!("{} files and directories went in and came out the same", after.len());

    client.close().await?;
    cluster.shutdown().await?;
    Ok(())
}

/// Copies a local directory into Cairn.
async fn upload(client: &Client, from: &Path, to: &str) -> anyhow::Result<()> {
    client.mkdir(to).await?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let name =
            entry.file_name().into_string().map_err(|name| anyhow::anyhow!("{name:?} is not UTF-8"))?;
        let path = format!("{to}/{name}");
        let kind = entry.file_type()?;
        if kind.is_dir() {
            Box::pin(upload(client, &entry.path(), &path)).await?;
        } else if kind.is_file() {
            client.write(&path, fs::read(entry.path())?).await?;
        }
    }
    Ok(())
}

/// Copies a directory out of Cairn.
async fn download(client: &Client, from: &str, to: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(to)?;
    let mut entries = client.list(from);
    while let Some(entry) = entries.try_next().await? {
        let (path, local) = (format!("{from}/{}", entry.name), to.join(&entry.name));
        if entry.kind() == Kind::Directory {
            Box::pin(download(client, &path, &local)).await?;
        } else {
            fs::write(local, client.read(&path).await?)?;
        }
    }
    Ok(())
}

/// All files with their bytes, and all directories, below a local one.
fn contents(root: &Path) -> anyhow::Result<BTreeMap<PathBuf, Option<Vec<u8>>>> {
    let (mut found, mut folders) = (BTreeMap::new(), vec![root.to_owned()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            let (path, kind) = (entry.path(), entry.file_type()?);
            let name = path.strip_prefix(root)?.to_owned();
            if kind.is_dir() {
                found.insert(name, None);
                folders.push(path);
            } else if kind.is_file() {
                found.insert(name, Some(fs::read(path)?));
            }
        }
    }
    Ok(found)
}
