//! WHOLE: a reader sees one committed version, whole.

use super::{Verdict, WATCH, WORK_LIMIT, failed, start};
use crate::{
    eventually::eventually,
    raw::{addresses, read_copy},
};
use cairn_proto::{Reason, id::ChunkId};
use client_lib::Client;
use cluster::{Builder, Cluster};
use std::time::{Duration, Instant};

/// Bytes of a chunk.
pub const CHUNK: u64 = 64 * 1024;

/// Life of the reader's session: so long that no renewal of its own accord brings what it reads within the grace time.
const SESSION_TTL: Duration = Duration::from_secs(600);
/// Longer than it takes until the directory knows of a reader.
const GRACE_MS: u64 = 2_000;

/// Content whose every byte says which version it is of, longer than several chunks.
pub fn content(version: u8) -> Vec<u8> {
    vec![version; CHUNK as usize * 5 + usize::from(version) * 1_000]
}

/// A handle reads the version that it opened for as long as it is open, whatever becomes of the file: every copy of
/// every chunk stays, although collection goes on around it, and however long the session lives between renewals. When
/// the handle is closed, they go.
///
/// # Errors
/// When something was collected under the reader, or other bytes were read.
///
/// # Panics
/// When there is no cluster to begin with, or nothing is ever collected.
pub async fn opened_version(builder: Builder) -> Verdict {
    let tune = |config: &mut dir_service::Config| {
        super::quick(config);
        config.timing.grace_ms = GRACE_MS;
        // The collector waits this long before it begins.
        config.timing.session_ttl_ms = 500;
    };
    let cluster = start(builder.file_servers(3).memory(true).directory_config(tune)).await;
    let client =
        cluster.client_builder().chunk_bytes(CHUNK).session_ttl(SESSION_TTL).build().expect("a client");
    client.write("/decoy", content(3)).await.expect("a write");
    client.write("/file", content(1)).await.expect("a write");
    let (decoy, read) = (chunks(&client, "/decoy").await, chunks(&client, "/file").await);
    client.delete("/decoy").await.expect("a delete");
    eventually("the deleted chunks are dropped", WORK_LIMIT, || async {
        let chunks = cluster.status().await.map_err(|error| error.to_string())?.chunks.unwrap_or_default();
        if chunks.awaiting_collection == decoy.len() as u64 { Ok(()) } else { Err(format!("{chunks:?}")) }
    })
    .await;
    let mut old = client.open("/file").await.expect("a handle");
    let first = old.read_at(0, 10).await.map_err(failed("the beginning"))?;
    if first != [1u8; 10][..] {
        return Err("the handle does not read what it opened".to_owned());
    }
    client.write("/file", content(2)).await.expect("a write");

    // What was dropped before the handle was opened is collected: so much for the collector being at work.
    for chunk in decoy {
        gone(&cluster, chunk).await;
    }
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(GRACE_MS) + WATCH {
        for chunk in &read {
            held(&cluster, *chunk).await?;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let whole = old.read_at(0, content(1).len()).await.map_err(failed("the version that was opened"))?;
    if whole != content(1) {
        return Err("the handle reads a mix of versions".to_owned());
    }
    if client.read("/file").await.map_err(failed("the next version"))? != content(2) {
        return Err("the next version is not whole".to_owned());
    }
    old.close().await.expect("a handle closes");
    // Nothing else had kept them.
    for chunk in read {
        gone(&cluster, chunk).await;
    }
    cluster.shutdown().await.expect("a clean end");
    Ok(())
}

/// The chunks of a file.
async fn chunks(client: &Client, path: &str) -> Vec<ChunkId> {
    let explained = client.explain(path).await.expect("the directory explains the file");
    let chunk = |status: cairn_proto::v1::ChunkStatus| status.extent?.chunk?.chunk.map(ChunkId::from);
    let chunks: Vec<ChunkId> = explained.chunks.into_iter().filter_map(chunk).collect();
    assert!(!chunks.is_empty(), "{path} has no chunks");
    chunks
}

/// All servers serve a chunk.
async fn held(cluster: &Cluster, chunk: ChunkId) -> Verdict {
    for uri in addresses(cluster).await.into_values() {
        match read_copy(cluster, &uri, chunk).await {
            Ok(served) if served.bad_block.is_none() => {}
            Ok(_) => return Err(format!("{uri} serves a bad copy of chunk {chunk}")),
            Err(error) if error.reason == Reason::ChunkNotFound => {
                return Err(format!("chunk {chunk} was collected under its reader: {error}"));
            }
            Err(error) => return Err(format!("chunk {chunk} of an opened version: {error}")),
        }
    }
    Ok(())
}

async fn gone(cluster: &Cluster, chunk: ChunkId) {
    for uri in addresses(cluster).await.into_values() {
        eventually("a dropped chunk is collected", WORK_LIMIT, || async {
            match read_copy(cluster, &uri, chunk).await {
                Err(error) if error.reason == Reason::ChunkNotFound => Ok(()),
                other => Err(format!("chunk {chunk} at {uri}: {:?}", other.map(|served| served.bytes.len()))),
            }
        })
        .await;
    }
}
