//! HEALED: "healthy" is what the file servers hold.

use super::{Verdict, WORK_LIMIT, bytes, quick, start};
use crate::{
    cluster::healthy,
    raw::{addresses, read_copy},
};
use cairn_proto::id::ChunkId;
use client_lib::Client;
use cluster::{Builder, Cluster};
use file_service::chunks::ChunkStore;
use rand::{SeedableRng as _, rngs::StdRng};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

/// Files that the server misses, of lengths that go into its log and into files of their own.
const LENGTHS: [usize; 6] = [1, 4_000, 30_000, 60_000, 100_000, 300_000];

/// How long all may be called healthy after copies were lost: many times the interval at which servers are asked.
const BELIEF: Duration = Duration::from_secs(10);

/// A server misses files while it is away. In the moment in which the cluster is called healthy after its return, every
/// member of every group holds every chunk that it should, whole and good.
///
/// # Errors
/// The copy that was not there.
///
/// # Panics
/// When there is no cluster to begin with, or it is not called healthy within a minute.
pub async fn missed_while_away(builder: Builder, seed: u64) -> Verdict {
    let mut random = StdRng::seed_from_u64(seed);
    let cluster = start(builder.file_servers(3).memory(true).directory_config(quick)).await;
    let client = cluster.client_builder().chunk_bytes(96 * 1024).build().expect("a client");
    client.write("/before", bytes(&mut random, 10_000)).await.expect("a write");
    healthy(&cluster, WORK_LIMIT).await;
    for round in 0..2 {
        let away = 1 + round;
        cluster.kill(away).await;
        for (number, length) in LENGTHS.into_iter().enumerate() {
            let path = format!("/round-{round}-{number}");
            client.write(&path, bytes(&mut random, length)).await.expect("two of three are enough");
        }
        cluster.restart(away).await.expect("a server starts again");
        cluster.wait_ready().await.expect("it lives");
        healthy(&cluster, WORK_LIMIT).await;
        for (number, _) in LENGTHS.into_iter().enumerate() {
            all_copies(&cluster, &client, &format!("/round-{round}-{number}")).await?;
        }
    }
    all_copies(&cluster, &client, "/before").await?;
    cluster.shutdown().await.expect("a clean end");
    Ok(())
}

/// A server loses copies, and nobody is told: no note says what it misses, only its own inventory does. The cluster does
/// not go on being called healthy, and the copies come back.
///
/// # Errors
/// How many copies were gone while all was called healthy, and for how long.
///
/// # Panics
/// When there is no cluster to begin with, or the copies are not back within a minute.
pub async fn lost_copies(builder: Builder, seed: u64) -> Verdict {
    const LOSER: usize = 1;
    let mut random = StdRng::seed_from_u64(seed);
    let stores = Arc::new(Mutex::new(BTreeMap::<usize, Arc<dyn ChunkStore>>::new()));
    let seen = stores.clone();
    let builder = builder.chunk_store_wrapper(move |index, store| {
        seen.lock().expect("no panic").insert(index, store.clone());
        store
    });
    let cluster = start(builder.file_servers(3).memory(true).directory_config(quick)).await;
    let client = cluster.client_builder().chunk_bytes(96 * 1024).build().expect("a client");
    let mut chunks = Vec::new();
    for (number, length) in LENGTHS.into_iter().enumerate() {
        let path = format!("/file-{number}");
        client.write(&path, bytes(&mut random, length)).await.expect("a write");
        let explained = client.explain(&path).await.expect("the directory explains the file");
        chunks.extend(
            explained.chunks.into_iter().filter_map(|chunk| Some(ChunkId::from(chunk.extent?.chunk?.chunk?))),
        );
    }
    healthy(&cluster, WORK_LIMIT).await;
    let store = stores.lock().expect("no panic")[&LOSER].clone();
    store.remove(&chunks).await.expect("the store removes chunks");

    let lost = Instant::now();
    let mut believed = None;
    loop {
        // Whoever asked the server itself would make it notice.
        let gone = chunks.iter().filter(|chunk| store.info(**chunk).is_none()).count();
        if gone == 0 {
            break;
        }
        let status = cluster.status().await.expect("the directory answers");
        let counts = status.chunks.unwrap_or_default();
        if status.verified && counts.healthy == counts.total {
            let since: Instant = *believed.get_or_insert_with(Instant::now);
            if since.elapsed() >= BELIEF {
                return Err(format!(
                    "all was said to be healthy for {BELIEF:?} while one server had lost {gone} of {} copies",
                    chunks.len()
                ));
            }
        } else {
            believed = None;
        }
        assert!(lost.elapsed() < WORK_LIMIT, "{gone} copies are not back: {counts:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    for number in 0..LENGTHS.len() {
        all_copies(&cluster, &client, &format!("/file-{number}")).await?;
    }
    cluster.shutdown().await.expect("a clean end");
    Ok(())
}

/// Every copy of a file that its groups say there is.
async fn all_copies(cluster: &Cluster, client: &Client, path: &str) -> Verdict {
    let addresses = addresses(cluster).await;
    let explained = client.explain(path).await.expect("the directory explains the file");
    for status in explained.chunks {
        let chunk = status.extent.and_then(|extent| extent.chunk).expect("an extent has a chunk");
        let id = chunk.chunk.expect("a chunk has an id").into();
        let seats = status.group.expect("a chunk has a group").seats;
        for seat in seats.iter().filter(|seat| seat.server_id != 0) {
            let uri = addresses.get(&seat.server_id).expect("a member is known");
            let lie = format!(
                "all was said to be healthy, and server {} has no good copy of {path}",
                seat.server_id
            );
            match read_copy(cluster, uri, id).await {
                Ok(copy) if copy.bad_block.is_none() && copy.bytes.len() as u64 == chunk.length => {}
                Ok(copy) => {
                    return Err(format!("{lie}: {} bytes, bad block {:?}", copy.bytes.len(), copy.bad_block));
                }
                Err(error) => return Err(format!("{lie}: {error}")),
            }
        }
    }
    Ok(())
}
