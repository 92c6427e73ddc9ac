//! What one file server really holds, asked of itself.

use cairn_proto::{
    Error, Reason,
    checksum::crc64,
    net::{Connect, SystemNetwork, Traffic, channel},
    v1::{
        ChunkRef, HeldChunk, InventoryDetail, InventoryRequest, ReadRequest,
        file_service_client::FileServiceClient,
    },
};
use futures::{StreamExt as _, stream};
use std::{sync::Arc, time::Duration};
use tonic::transport::Channel;

/// Chunks that are read at a time.
const READS_AT_ONCE: usize = 8;
/// Longest wait for one chunk, or for the inventory.
const LIMIT: Duration = Duration::from_secs(30);

/// A file server's copies.
#[derive(Clone, Debug)]
pub struct Copies {
    server: FileServiceClient<Channel>,
}

/// What reading all copies of a server showed.
#[derive(Clone, Debug, Default)]
pub struct Census {
    /// Copies that are as they should be.
    pub good: u64,
    /// Copies that the server itself says are bad, or cannot give.
    pub bad: Vec<ChunkRef>,
    /// Copies whose bytes were given although they are not those of the chunk: never to happen.
    pub wrong: Vec<ChunkRef>,
}

impl Copies {
    /// Those of the file server at an address.
    pub fn at(uri: &str) -> Self {
        let network: Arc<dyn Connect> = Arc::new(SystemNetwork);
        let channel = channel(&network, uri, Traffic::Bulk).unwrap();
        let server =
            FileServiceClient::new(channel).max_decoding_message_size(cairn_proto::limits::MESSAGE_BYTES_MAX);
        Self { server }
    }

    /// All chunks that it says it holds.
    ///
    /// # Errors
    /// What the server says, or silence.
    pub async fn list(&self) -> Result<Vec<HeldChunk>, String> {
        let request =
            InventoryRequest { detail: InventoryDetail::Chunks as i32, ..InventoryRequest::default() };
        let mut server = self.server.clone();
        let listing = async {
            let mut answer =
                server.inventory(request).await.map_err(|status| status.to_string())?.into_inner();
            let mut held = Vec::new();
            while let Some(part) = answer.message().await.map_err(|status| status.to_string())? {
                held.extend(part.chunks);
            }
            Ok(held)
        };
        tokio::time::timeout(LIMIT, listing).await.map_err(|_| format!("no inventory within {LIMIT:?}"))?
    }

    /// The bytes of one of its copies.
    ///
    /// # Errors
    /// What the server says, or silence.
    pub async fn read(&self, chunk: &ChunkRef) -> Result<Vec<u8>, Error> {
        let request = ReadRequest { chunk: chunk.chunk, ..ReadRequest::default() };
        let mut server = self.server.clone();
        let reading = async {
            let mut answer = server.read(request).await?.into_inner();
            let mut bytes = Vec::new();
            while let Some(part) = answer.message().await? {
                bytes.extend_from_slice(&part.data);
            }
            Ok::<_, tonic::Status>(bytes)
        };
        match tokio::time::timeout(LIMIT, reading).await {
            Ok(read) => read.map_err(Error::from),
            Err(_) => Err(Error::unavailable(format!("no bytes within {LIMIT:?}"))),
        }
    }

    /// Reads all copies, so that the server verifies them now and not at its next scrub.
    ///
    /// # Errors
    /// When there is no inventory.
    pub async fn census(&self) -> Result<Census, String> {
        let mut census = Census::default();
        let mut reads = stream::iter(self.list().await?)
            .map(|held| async move {
                let chunk = held.chunk.unwrap_or_default();
                let read = if held.corrupt { None } else { Some(self.read(&chunk).await) };
                (chunk, read)
            })
            .buffer_unordered(READS_AT_ONCE);
        while let Some((chunk, read)) = reads.next().await {
            match read {
                // Collected since it was listed.
                Some(Err(error)) if error.reason == Reason::ChunkNotFound => {}
                None | Some(Err(_)) => census.bad.push(chunk),
                Some(Ok(bytes)) if bytes.len() as u64 == chunk.length && crc64(&bytes) == chunk.checksum => {
                    census.good += 1;
                }
                Some(Ok(_)) => census.wrong.push(chunk),
            }
        }
        Ok(census)
    }
}
