//! What tests ask of an embedded cluster.

use crate::eventually::eventually;
use cairn_proto::{
    id::FencingToken,
    net::{Traffic, channel},
    v1::{ReadRequest, file_service_client::FileServiceClient},
};
use client_lib::LockOptions;
use cluster::Cluster;
use std::time::Duration;

/// The seed of a run: from the environment, to repeat one, else a new one. Printed, so that a failure shows it.
pub fn seed(variable: &str) -> u64 {
    let seed = match std::env::var(variable) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{variable} is not a number: {text}")),
        Err(_) => rand::random(),
    };
    println!("{variable}={seed} repeats this run");
    seed
}

/// How much of something a test does: from the environment, to do more of it, else a number that suits each change.
pub fn amount(variable: &str, default: u64) -> u64 {
    std::env::var(variable)
        .map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{variable} is not a number: {text}")))
}

/// Waits until the journal's carriers have everything that was acknowledged so far.
///
/// # Panics
/// When that takes longer than 30 s.
pub async fn shipped(cluster: &Cluster) {
    let wanted =
        cluster.status().await.expect("the directory answers").directory.expect("a directory").revision;
    eventually("the journal is carried", Duration::from_secs(30), || async {
        let status = cluster.status().await.map_err(|error| error.to_string())?;
        let directory = status.directory.ok_or("no directory in the status")?;
        let carried = directory.shipped_revision >= wanted;
        if carried { Ok(()) } else { Err(format!("{} of {wanted}", directory.shipped_revision)) }
    })
    .await;
}

/// Waits until every chunk has all its copies, as inventories of all servers say.
///
/// # Panics
/// When that takes longer than `limit`.
pub async fn healthy(cluster: &Cluster, limit: Duration) {
    eventually("all chunks have all their copies", limit, || async {
        let status = cluster.status().await.map_err(|error| error.to_string())?;
        let chunks = status.chunks.ok_or("no chunks in the status")?;
        if status.verified
            && chunks.under_replicated == 0
            && chunks.lost == 0
            && chunks.healthy == chunks.total
        {
            Ok(())
        } else {
            Err(format!("verified: {}, {chunks:?}, {:?}", status.verified, status.repairs))
        }
    })
    .await;
}

/// Takes a lock in a program that then dies without a goodbye: no unlock, no close, no renewal. Answers its token.
///
/// # Panics
/// When the lock cannot be taken.
pub async fn dead_holder(cluster: &Cluster, path: &str, session_ttl: Duration) -> FencingToken {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let builder = cluster.client_builder().session_ttl(session_ttl);
    let path = path.to_owned();
    let holding = runtime.spawn(async move {
        let client = builder.build().expect("a client");
        let lock = client.lock(&path, LockOptions::new()).await.expect("the lock");
        let token = lock.token();
        // Dead programs run no destructors.
        std::mem::forget((lock, client));
        token
    });
    let token = holding.await.expect("the holder");
    runtime.shutdown_background();
    token
}

/// Reads every chunk of a file from every server that should have it, whatever comes.
///
/// # Panics
/// When the directory does not explain the file.
pub async fn read_all_copies(cluster: &Cluster, path: &str) {
    let client = cluster.client().await.expect("a client");
    let explained = client.explain(path).await.expect("the directory explains the file");
    for chunk in explained.chunks {
        for copy in chunk.copies {
            let Some(endpoint) = copy.server.and_then(|server| server.endpoints.into_iter().next()) else {
                continue;
            };
            let Ok(channel) = channel(&cluster.network(), &endpoint.uri, Traffic::Bulk) else { continue };
            let wanted = chunk.extent.and_then(|extent| extent.chunk).and_then(|chunk| chunk.chunk);
            let request = ReadRequest { chunk: wanted, ..Default::default() };
            if let Ok(answer) = FileServiceClient::new(channel).read(request).await {
                let mut parts = answer.into_inner();
                while let Ok(Some(_)) = parts.message().await {}
            }
        }
    }
    client.close().await.ok();
}
