//! Calls below `client-lib`: chunks that are written and in no version yet, commits put together by hand, and what a
//! single server answers for a single copy.

use crate::eventually::eventually;
use bytes::Bytes;
use cairn_proto::{
    Error, Result,
    checksum::{block_checksums, crc64, verify_blocks},
    id::ChunkId,
    limits::{BLOCK_BYTES, DATA_BYTES_MAX},
    net::{Connect, Traffic, channel},
    v1::{
        self, directory_service_client::DirectoryServiceClient, file_service_client::FileServiceClient,
        session_service_client::SessionServiceClient,
    },
};
use cluster::Cluster;
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use tonic::transport::Channel;

/// Longest wait for one raw step while servers start or elect.
const STEP_LIMIT: Duration = Duration::from_secs(30);

/// A session without a client: what it writes stays out of every version until it commits.
#[derive(Debug)]
pub struct Writer {
    session: u64,
    directory: Channel,
    network: Arc<dyn Connect>,
}

/// A chunk that was acknowledged by its primary.
#[derive(Clone, Debug)]
pub struct Written {
    /// What the primary answered.
    pub receipt: v1::Receipt,
    /// What was sent.
    pub bytes: Bytes,
}

impl Written {
    /// The chunk's id.
    pub fn chunk(&self) -> ChunkId {
        self.receipt.chunk.map(ChunkId::from).expect("a receipt names its chunk")
    }
}

impl Writer {
    /// Opens a session that lives so long without renewal.
    ///
    /// # Panics
    /// When the directory does not open one.
    pub async fn open(cluster: &Cluster, ttl: Duration) -> Self {
        let network = cluster.network();
        let directory = channel(&network, &cluster.directory_uri(), Traffic::Small).expect("an address");
        let request = v1::OpenRequest {
            ttl_ms: ttl.as_millis() as u64,
            owner: "a raw writer".to_owned(),
            ..Default::default()
        };
        let opened = SessionServiceClient::new(directory.clone()).open(request).await.expect("a session");
        Self { session: opened.into_inner().session_id, directory, network }
    }

    /// Chunk ids to write under.
    ///
    /// # Panics
    /// When the directory gives none within 30 s.
    pub async fn grant(&self, count: u32) -> v1::Grant {
        eventually("a grant", STEP_LIMIT, || async {
            let request = v1::GrantRequest { session_id: self.session, count, ..Default::default() };
            let answer = SessionServiceClient::new(self.directory.clone()).grant(request).await;
            answer.map_err(Error::from)?.into_inner().grant.ok_or_else(|| Error::internal("no grant"))
        })
        .await
    }

    /// Has a chunk made durable by the primary of the grant's group, in no version.
    ///
    /// # Panics
    /// When the primary does not acknowledge it within 30 s.
    pub async fn write(&self, grant: &v1::Grant, index: u32, bytes: impl Into<Bytes>) -> Written {
        let bytes = bytes.into();
        eventually("a chunk is written", STEP_LIMIT, || self.write_once(grant, index, bytes.clone())).await
    }

    async fn write_once(&self, grant: &v1::Grant, index: u32, bytes: Bytes) -> Result<Written> {
        let group = grant.group.as_ref().ok_or_else(|| Error::internal("a grant without a group"))?;
        let primary = grant.members.iter().find(|member| member.id == group.primary_id);
        let uri = primary.and_then(|member| member.endpoints.first()).map(|endpoint| endpoint.uri.as_str());
        let channel = channel(&self.network, uri.unwrap_or_default(), Traffic::Bulk)?;
        let chunk = ChunkId::new(grant.id, index);
        let parts = bytes.chunks(DATA_BYTES_MAX).count();
        let messages: Vec<v1::WriteRequest> = bytes
            .chunks(DATA_BYTES_MAX)
            .enumerate()
            .map(|(number, part)| {
                let offset = number * DATA_BYTES_MAX;
                let finish = v1::WriteFinish { length: bytes.len() as u64, checksum: Some(crc64(&bytes)) };
                v1::WriteRequest {
                    chunk: Some(chunk.into()),
                    group_id: group.id,
                    epoch: group.epoch,
                    offset: offset as u64,
                    block_checksums: block_checksums(chunk, (offset / BLOCK_BYTES) as u32, part),
                    finish: (number + 1 == parts).then_some(finish),
                    data: bytes.slice_ref(part),
                }
            })
            .collect();
        let answers = FileServiceClient::new(channel).write(futures::stream::iter(messages)).await;
        let answer = answers.map_err(Error::from)?.into_inner().message().await.map_err(Error::from)?;
        let receipt = answer.and_then(|answer| answer.receipt);
        let receipt = receipt.ok_or_else(|| Error::unavailable("the primary ended the stream"))?;
        Ok(Written { receipt, bytes })
    }

    /// Makes written chunks the whole content of a file, one behind the other.
    ///
    /// # Errors
    /// As `DirectoryService.Commit`.
    pub async fn commit(&self, path: &str, written: &[&Written]) -> Result<v1::CommitResponse> {
        let truncate = v1::Edit { edit: Some(v1::edit::Edit::Truncate(v1::TruncateEdit { length: 0 })) };
        let mut edits = vec![truncate];
        let mut offset = 0;
        for (index, one) in written.iter().enumerate() {
            let length = one.receipt.length;
            let write = v1::WriteEdit { offset, length, receipt_index: index as u32, chunk_offset: 0 };
            edits.push(v1::Edit { edit: Some(v1::edit::Edit::Write(write)) });
            offset += length;
        }
        let request = v1::CommitRequest {
            path: path.to_owned(),
            edits,
            receipts: written.iter().map(|one| one.receipt.clone()).collect(),
            ..Default::default()
        };
        let answer = DirectoryServiceClient::new(self.directory.clone()).commit(request).await;
        Ok(answer.map_err(Error::from)?.into_inner())
    }

    /// Ends the session, and its grants with it.
    ///
    /// # Panics
    /// When the directory does not answer.
    pub async fn close(self) {
        let request = v1::CloseRequest { session_id: self.session };
        SessionServiceClient::new(self.directory).close(request).await.expect("the session ends");
    }
}

/// Where each file server of the topology listens, by its id.
///
/// # Panics
/// When the directory does not answer.
pub async fn addresses(cluster: &Cluster) -> BTreeMap<u64, String> {
    let topology = cluster.topology().await.expect("the directory answers");
    let address =
        |server: v1::Server| server.endpoints.into_iter().next().map(|endpoint| (server.id, endpoint.uri));
    topology.servers.into_iter().filter_map(address).collect()
}

/// What one server serves for a chunk, as it came.
#[derive(Clone, Debug, Default)]
pub struct Served {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// The first block that does not match the checksum that came with it.
    pub bad_block: Option<u32>,
}

/// Asks the server at an address for a whole chunk, and takes what it says for what it is.
///
/// # Errors
/// As `FileService.Read`, `CHUNK_NOT_FOUND` and `CHECKSUM_MISMATCH` among them.
pub async fn read_copy(cluster: &Cluster, uri: &str, chunk: ChunkId) -> Result<Served> {
    let channel = channel(&cluster.network(), uri, Traffic::Bulk)?;
    let request = v1::ReadRequest { chunk: Some(chunk.into()), ..Default::default() };
    let answer = FileServiceClient::new(channel).read(request).await;
    let mut parts = answer.map_err(Error::from)?.into_inner();
    let mut served = Served::default();
    while let Some(part) = parts.message().await.map_err(Error::from)? {
        let first = (part.offset / BLOCK_BYTES as u64) as u32;
        let bad = verify_blocks(chunk, first, &part.data, &part.block_checksums);
        served.bad_block = served.bad_block.or(bad);
        served.bytes.extend_from_slice(&part.data);
    }
    Ok(served)
}
