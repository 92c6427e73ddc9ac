//! A cluster in this process, and a file's life in it: create, write, read, delete.
//!
//!     cargo run -p examples --example quickstart

use client_lib::{Client, Reason};
use cluster::Cluster;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    // One directory and three file servers. In production this is an address: `http://directory:7400`.
    let cluster = Cluster::start(3).await?;
    let client = Client::connect(&[cluster.directory_uri()]).await?;

    client.mkdir("/notes").await?;
    client.create("/notes/today").await?;
    client.write("/notes/today", "three copies, one file").await?;

    let bytes = client.read("/notes/today").await?;
    assert_eq!(bytes, "three copies, one file");
    let attributes = client.stat("/notes/today").await?;
    println!("read {} bytes of version {}", bytes.len(), attributes.version);

    client.delete("/notes/today").await?;
    match client.read("/notes/today").await {
        Err(error) if error.reason == Reason::NotFound => println!("deleted: {error}"),
        other => panic!("the file is gone, yet there is {other:?}"),
    }

    client.close().await?;
    cluster.shutdown().await?;
    Ok(())
}
