//! "Healthy" is true: of every chunk of any file there are as many copies as its group has seats, with the same bytes.
//!
//! While a seat moves, the newcomer's copy may be missing, and is said to be; the copy of who gives the seat counts.

use bytes::BytesMut;
use cairn_proto::{
    net::{Connect, Traffic, channel},
    v1::{Kind, ReadRequest, file_service_client::FileServiceClient},
};
use client_lib::Client;
use futures::StreamExt as _;
use std::{collections::BTreeMap, sync::Arc};
use tonic::transport::Channel;

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
    let explained = client.explain(path).await.map_err(|error| error.to_string())?;
    for chunk in explained.chunks {
        let wanted = chunk.extent.and_then(|extent| extent.chunk).and_then(|chunk| chunk.chunk);
        let seats = chunk.group.map(|group| group.seats).unwrap_or_default();
        let mut first = None;
        let mut good = 0;
        for copy in chunk.copies {
            let server = copy.server.ok_or("a copy without a server")?;
            // One that lost its seat may be away for good; members are not, in a healthy cluster.
            let is_member = seats.iter().any(|seat| seat.server_id == server.id);
            if !is_member && copy.state == "unreachable" {
                continue;
            }
            if copy.state == "missing" {
                continue;
            }
            let uri = &server.endpoints.first().ok_or("a server without an address")?.uri;
            let channel = match channels.get(uri) {
                Some(channel) => channel.clone(),
                None => {
                    let made = channel(network, uri, Traffic::Bulk).map_err(|error| error.to_string())?;
                    channels.insert(uri.clone(), made.clone());
                    made
                }
            };
            let failed = |status: tonic::Status| {
                format!("{wanted:?} on {uri}, which is said to be {}: {}", copy.state, status.message())
            };
            let request = ReadRequest { chunk: wanted, ..Default::default() };
            let mut parts = FileServiceClient::new(channel).read(request).await.map_err(failed)?.into_inner();
            let mut bytes = BytesMut::new();
            while let Some(part) = parts.message().await.map_err(failed)? {
                bytes.extend_from_slice(&part.data);
            }
            good += 1;
            match &first {
                None => first = Some(bytes),
                Some(first) if *first == bytes => {}
                Some(_) => return Err(format!("{wanted:?} on {uri} has other bytes")),
            }
        }
        let seats = seats.iter().filter(|seat| seat.server_id != 0).count();
        if wanted.is_some() && good < seats.max(1) {
            return Err(format!("{wanted:?} has {good} copies of {seats}"));
        }
    }
    Ok(())
}
