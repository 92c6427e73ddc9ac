//! Names: look up, make, rename, list.

use super::{
    Bench, Connector, Workload,
    drive::{Random, close, timed},
};
use crate::usage::{Meter, Sample};
use client_lib::{Client, Error, ListOptions, Result};
use futures::StreamExt as _;

/// Attributes of files chosen at random.
pub(super) async fn lookup(bench: &mut Bench, workload: &Workload, connect: Connector<'_>) -> Result<Sample> {
    let folder = bench.small_files().await?;
    let files = bench.scale.small_files;
    let client = connect()?;
    client.stat(&folder).await?;
    let workers = (0..workload.tasks)
        .map(|task| (client.clone(), folder.clone(), Random::new(bench.runs * 1_000 + task as u64)))
        .collect();
    timed(workers, &bench.servers, bench.scale.span, move |(client, folder, mut random), _| async move {
        client.stat(&format!("{folder}/{}", random.below(files))).await?;
        Ok(((client, folder, random), 0))
    })
    .await
}

/// New directories, all in one folder.
pub(super) async fn mkdir(bench: &mut Bench, workload: &Workload, connect: Connector<'_>) -> Result<Sample> {
    let (clients, workers) = makers(bench, workload, connect, "made").await?;
    let sample = timed(workers, &bench.servers, bench.scale.span, |(client, name), number| async move {
        client.mkdir(&format!("{name}-{number}")).await?;
        Ok(((client, name), 0))
    })
    .await?;
    close(clients).await?;
    Ok(sample)
}

/// A directory each, renamed again and again in one folder.
pub(super) async fn rename(bench: &mut Bench, workload: &Workload, connect: Connector<'_>) -> Result<Sample> {
    let (clients, workers) = makers(bench, workload, connect, "renamed").await?;
    let sample = timed(workers, &bench.servers, bench.scale.span, |(client, name), number| async move {
        let from = if number == 0 { name.clone() } else { format!("{name}-{}", number - 1) };
        client.rename(&from, &format!("{name}-{number}")).await?;
        Ok(((client, name), 0))
    })
    .await?;
    close(clients).await?;
    Ok(sample)
}

/// Clients with sessions, and for each worker the name of a directory that it made.
async fn makers(
    bench: &mut Bench,
    workload: &Workload,
    connect: Connector<'_>,
    what: &str,
) -> Result<(Vec<Client>, Vec<(Client, String)>)> {
    let folder = bench.folder(what, 0).await?;
    let (mut clients, mut workers) = (Vec::new(), Vec::new());
    for number in 0..workload.clients {
        let client = connect()?;
        for task in 0..workload.tasks {
            let name = format!("{folder}/{}-{number}-{task}", bench.runs);
            client.mkdir(&name).await?;
            workers.push((client.clone(), name));
        }
        clients.push(client);
    }
    Ok((clients, workers))
}

/// One directory from its first entry to its last.
pub(super) async fn list(bench: &mut Bench, attributes: bool, connect: Connector<'_>) -> Result<Sample> {
    let folder = bench.listed().await?;
    let client = connect()?;
    client.stat(&folder).await?;
    let options = ListOptions::new().page_size(4_096);
    let options = if attributes { options } else { options.without_attributes() };
    let meter = Meter::start(&bench.servers);
    let mut entries = 0;
    let mut listing = client.list_with(&folder, options);
    while let Some(entry) = listing.next().await {
        entry?;
        entries += 1;
    }
    let sample = meter.stop(entries, 0, Vec::new());
    if entries != bench.scale.listed {
        return Err(Error::internal(format!("{entries} of {} entries were listed", bench.scale.listed)));
    }
    Ok(sample)
}
