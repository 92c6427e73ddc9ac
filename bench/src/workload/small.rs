//! Whole small files.

use super::{
    Bench, Connector, SMALL_BYTES, Workload,
    drive::{Random, close, content, expect_length, timed},
};
use crate::usage::Sample;
use client_lib::Result;

/// New files of 4 KiB, all in one folder.
pub(super) async fn write(bench: &mut Bench, workload: &Workload, connect: Connector<'_>) -> Result<Sample> {
    let folder = bench.folder("written", workload.copies).await?;
    let run = bench.runs;
    let mut clients = Vec::new();
    let mut workers = Vec::new();
    for number in 0..workload.clients {
        let client = connect()?;
        // Session, grant and connections are there before the time counts.
        client.write(&format!("{folder}/{run}-{number}-first"), content(0, SMALL_BYTES)).await?;
        for task in 0..workload.tasks {
            workers.push((client.clone(), format!("{folder}/{run}-{number}-{task}")));
        }
        clients.push(client);
    }
    let bytes = content(run, SMALL_BYTES);
    let sample = timed(workers, &bench.servers, bench.scale.span, move |(client, name), number| {
        let bytes = bytes.clone();
        async move {
            client.write(&format!("{name}-{number}"), bytes).await?;
            Ok(((client, name), SMALL_BYTES as u64))
        }
    })
    .await?;
    close(clients).await?;
    Ok(sample)
}

/// Files chosen at random.
pub(super) async fn read(bench: &mut Bench, workload: &Workload, connect: Connector<'_>) -> Result<Sample> {
    let folder = bench.small_files().await?;
    let files = bench.scale.small_files;
    let client = connect()?;
    for number in 0..files.min(32) {
        client.read(&format!("{folder}/{number}")).await?;
    }
    let workers = (0..workload.tasks)
        .map(|task| (client.clone(), folder.clone(), Random::new(bench.runs * 1_000 + task as u64)))
        .collect();
    timed(workers, &bench.servers, bench.scale.span, move |(client, folder, mut random), _| async move {
        let bytes = client.read(&format!("{folder}/{}", random.below(files))).await?;
        let moved = expect_length(bytes.len() as u64, SMALL_BYTES as u64)?;
        Ok(((client, folder, random), moved))
    })
    .await
}
