//! Large files: written and read in order, and small ranges of them at random.

use super::{
    Bench, Connector, SMALL_BYTES, Workload,
    drive::{Random, close, content, expect_length, timed},
};
use crate::usage::{Meter, Sample};
use client_lib::Result;
use std::time::Instant;

/// One large file from memory, replaced at each run.
pub(super) async fn write(bench: &mut Bench, workload: &Workload, connect: Connector<'_>) -> Result<Sample> {
    let folder = bench.folder("large", workload.copies).await?;
    let client = connect()?;
    client.write(&format!("{folder}/first"), content(0, SMALL_BYTES)).await?;
    let bytes = content(bench.runs, bench.scale.large_bytes as usize);
    let length = bytes.len() as u64;
    let meter = Meter::start(&bench.servers);
    client.write(&format!("{folder}/file"), bytes).await?;
    let sample = meter.stop(1, length, Vec::new());
    client.close().await?;
    Ok(sample)
}

/// One large file, verified and dropped, again and again.
pub(super) async fn read(bench: &mut Bench, connect: Connector<'_>) -> Result<Sample> {
    let length = bench.scale.large_bytes;
    let path = bench.large_file("read", length).await?;
    let client = connect()?;
    // Connections, and the page cache of the servers.
    client.get_writer(&path, tokio::io::sink()).await?;
    let meter = Meter::start(&bench.servers);
    let (mut bytes, mut times) = (0, Vec::new());
    while times.is_empty() || meter.seconds() < bench.scale.span.as_secs_f64() {
        let begin = Instant::now();
        bytes += expect_length(client.get_writer(&path, tokio::io::sink()).await?.size, length)?;
        times.push(u32::try_from(begin.elapsed().as_micros()).unwrap_or(u32::MAX));
    }
    let sample = meter.stop(times.len() as u64, bytes, times);
    client.close().await?;
    Ok(sample)
}

/// Blocks at random places, each a version of its own. A file has one writer at a time, so that each client has a file;
/// together they are as long as the one of a single client.
pub(super) async fn overwrite(
    bench: &mut Bench,
    workload: &Workload,
    connect: Connector<'_>,
) -> Result<Sample> {
    let length = bench.scale.table_bytes / workload.clients as u64;
    let blocks = (length / SMALL_BYTES as u64).max(1);
    let (mut clients, mut workers) = (Vec::new(), Vec::new());
    for number in 0..workload.clients {
        let path = bench.large_file(&format!("table-{}-{number}", workload.clients), length).await?;
        let client = connect()?;
        let mut file = client.open_options().write(true).open(&path).await?;
        file.write_at(0, content(number as u64, SMALL_BYTES)).await?;
        file.commit().await?;
        workers.push((file, Random::new(bench.runs * 1_000 + number as u64)));
        clients.push(client);
    }
    let bytes = content(bench.runs, SMALL_BYTES);
    let sample = timed(workers, &bench.servers, bench.scale.span, move |(mut file, mut random), _| {
        let bytes = bytes.clone();
        async move {
            file.write_at(random.below(blocks) * SMALL_BYTES as u64, bytes).await?;
            file.commit().await?;
            Ok(((file, random), SMALL_BYTES as u64))
        }
    })
    .await?;
    // The handles are dropped, and their locks end with the sessions at the latest.
    close(clients).await?;
    Ok(sample)
}

/// Blocks at random places through open handles.
pub(super) async fn read_random(
    bench: &mut Bench,
    workload: &Workload,
    connect: Connector<'_>,
) -> Result<Sample> {
    let length = bench.scale.table_bytes;
    let path = bench.large_file("table-1-0", length).await?;
    let blocks = (length / SMALL_BYTES as u64).max(1);
    let client = connect()?;
    let mut workers = Vec::new();
    for task in 0..workload.tasks {
        let mut file = client.open(&path).await?;
        file.read_at(0, SMALL_BYTES).await?;
        workers.push((file, Random::new(bench.runs * 1_000 + task as u64)));
    }
    let sample =
        timed(workers, &bench.servers, bench.scale.span, move |(mut file, mut random), _| async move {
            let bytes = file.read_at(random.below(blocks) * SMALL_BYTES as u64, SMALL_BYTES).await?;
            let moved = expect_length(bytes.len() as u64, SMALL_BYTES as u64)?;
            Ok(((file, random), moved))
        })
        .await?;
    client.close().await?;
    Ok(sample)
}
