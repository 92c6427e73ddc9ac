//! "Healthy" is true: of every chunk of any file there are as many copies as its group has seats, with the same bytes.
//!
//! While a seat moves, the newcomer's copy may be missing, and is said to be; the copy of who gives the seat counts. It may
//! be gone a moment after it was told of, when the newcomer's is there: then what is said now is looked at.

use bytes::BytesMut;
use cairn_proto::{
    Error, Reason,
    net::{Connect, Traffic, channel},
    v1::{ChunkId, Kind, ReadRequest, file_service_client::FileServiceClient},
};
use client_lib::Client;
use futures::StreamExt as _;
use std::{collections::BTreeMap, sync::Arc};
use tonic::transport::Channel;

/// Looks at a file, each behind a new question. What is a lie stays one.
const ATTEMPTS: usize = 3;

/// Reads every copy of every chunk of every file.
///
/// # Errors
/// The first copy that is missing or other than the rest.
pub async fn differences(client: Client, network: Arc<dyn Connect>) -> Result<(), String> {
    let mut channels: BTreeMap<String, Channel> = BTreeMap::new();
    let mut folders = vec![String::new()];
    while let Some(folder) = folders.pop() {
        let mut entries = client.list(if folder.is_empty() { "/" } else { &folder });
        while let Some(entry) = entries.next().await {
            let entry = entry.map_err(|error| error.to_string())?;
            let path = format!("{folder}/{}", entry.name);
            if entry.attributes.is_some_and(|attributes| attributes.kind() == Kind::Directory) {
                folders.push(path);
            } else {
                file(&client, &network, &mut channels, &path)
                    .await
                    .map_err(|why| format!("{path}: {why}"))?;
            }
        }
    }
    Ok(())
}

async fn file(
    client: &Client,
    network: &Arc<dyn Connect>,
    channels: &mut BTreeMap<String, Channel>,
    path: &str,
) -> Result<(), String> {
    let mut why = String::new();
    for _ in 0..ATTEMPTS {
        match look(client, network, channels, path).await? {
            None => return Ok(()),
            Some(missing) => why = missing,
        }
    }
    Err(why)
}

/// Reads all copies of a file's chunks. Answers where there are fewer than there should be by what was said just before: a
/// seat may have moved since.
async fn look(
    client: &Client,
    network: &Arc<dyn Connect>,
    channels: &mut BTreeMap<String, Channel>,
    path: &str,
) -> Result<Option<String>, String> {
    let explained = client.explain(path).await.map_err(|error| error.to_string())?;
    for chunk in explained.chunks {
        let Some(wanted) = chunk.extent.and_then(|extent| extent.chunk).and_then(|chunk| chunk.chunk) else {
            continue;
        };
        let seats = chunk.group.map(|group| group.seats).unwrap_or_default();
        let seats = seats.iter().filter(|seat| seat.server_id != 0).count();
        let mut copies: Vec<BytesMut> = Vec::new();
        let mut missing = Vec::new();
        for copy in chunk.copies {
            let server = copy.server.ok_or("a copy without a server")?;
            let uri = &server.endpoints.first().ok_or("a server without an address")?.uri;
            if copy.state == "missing" || copy.state == "unreachable" {
                missing.push(format!("{uri} is {}", copy.state));
                continue;
            }
            if !channels.contains_key(uri) {
                let made = channel(network, uri, Traffic::Bulk).map_err(|error| error.to_string())?;
                channels.insert(uri.clone(), made);
            }
            let said = |why: Error| format!("{wanted:?} on {uri}, which is said to be {}: {why}", copy.state);
            match read(channels[uri].clone(), wanted).await {
                Ok(bytes) => copies.push(bytes),
                Err(error) if error.reason == Reason::ChunkNotFound => missing.push(said(error)),
                Err(error) => return Err(said(error)),
            }
        }
        if copies.windows(2).any(|two| two[0] != two[1]) {
            return Err(format!("{wanted:?} has copies that differ"));
        }
        if copies.len() < seats.max(1) {
            return Ok(Some(format!(
                "{wanted:?} has {} copies of {seats}: {}",
                copies.len(),
                missing.join(", ")
            )));
        }
    }
    Ok(None)
}

async fn read(channel: Channel, chunk: ChunkId) -> Result<BytesMut, Error> {
    let request = ReadRequest { chunk: Some(chunk), ..Default::default() };
    let mut parts = FileServiceClient::new(channel).read(request).await?.into_inner();
    let mut bytes = BytesMut::new();
    while let Some(part) = parts.message().await? {
        bytes.extend_from_slice(&part.data);
    }
    Ok(bytes)
}
