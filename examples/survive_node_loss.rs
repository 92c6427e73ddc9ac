//! A file server dies while files are written and read, and nobody notices; when it comes back it catches up.
//!
//!     cargo run -p examples --example survive_node_loss

use cluster::Cluster;
use std::time::{Duration, Instant};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let cluster = Cluster::start(3).await?;
    let client = cluster.client().await?;
    let content = |i: usize| format!("content of file {i}").repeat(1_000);

    let mut slowest = Duration::ZERO;
    for i in 0..60 {
        if i == 20 {
            cluster.kill(0).await;
            println!("file server 0 is dead, as after SIGKILL");
        }
        let began = Instant::now();
        client.write(&format!("/file-{i}"), content(i)).await?;
        assert_eq!(client.read(&format!("/file-{}", i / 2)).await?, content(i / 2));
        slowest = slowest.max(began.elapsed());
    }
    println!("60 files written, 60 read; the slowest of both together took {slowest:?}");
    assert!(slowest < Duration::from_secs(2), "a dead server stalled the work for {slowest:?}");

    cluster.restart(0).await?;
    cluster.wait_ready().await?;
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let chunks = cluster.status().await?.chunks.unwrap_or_default();
        if chunks.total > 0 && chunks.healthy == chunks.total {
            println!("file server 0 is back, and all {} chunks have all their copies", chunks.total);
            break;
        }
        assert!(Instant::now() < deadline, "still not complete: {chunks:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    for i in 0..60 {
        assert_eq!(client.read(&format!("/file-{i}")).await?, content(i));
    }

    client.close().await?;
    cluster.shutdown().await?;
    Ok(())
}
