//! Ranges of chunks to who reads them: one as a stream of parts, or several short ones together.

use super::sending::Ahead;
use crate::node::Node;
use cairn_proto::{
    Error, Reason, Result,
    convert::chunk_id,
    id::ChunkId,
    limits::{BLOCK_BYTES, QUESTIONS_MAX, READ_DATA_BYTES, SHORT_READ_BYTES_MAX},
    v1,
};
use futures::{
    Stream, StreamExt as _,
    stream::{self, FuturesUnordered},
};
use std::sync::Arc;
use tonic::Status;

/// What of a chunk is still to be read.
#[derive(Debug)]
struct Range {
    next: u64,
    end: u64,
}

impl Range {
    /// The asked bytes, widened to whole blocks and cut to the chunk.
    fn asked(node: &Node, chunk: ChunkId, request: &v1::ReadRequest) -> Result<Self> {
        let info = node.store.info(chunk).ok_or_else(|| {
            let mut error = Error::new(Reason::ChunkNotFound, format!("chunk {chunk} is not held here"));
            error.detail.chunks = vec![v1::ChunkRef { chunk: Some(chunk.into()), ..Default::default() }];
            error.on(node.me().to_string())
        })?;
        if request.offset >= info.length {
            return Err(Error::invalid(format!(
                "offset {} is behind the {} bytes of chunk {chunk}",
                request.offset, info.length
            )));
        }
        let end = match request.length {
            0 => info.length,
            length => request.offset.saturating_add(length).min(info.length),
        };
        Ok(Self { next: request.offset - request.offset % BLOCK_BYTES as u64, end })
    }

    fn is_empty(&self) -> bool {
        self.next >= self.end
    }
}

/// The parts of a range, in order. The first is read before this returns, so that an error can be the answer.
pub(super) async fn read(
    node: Arc<Node>,
    request: &v1::ReadRequest,
) -> Result<impl Stream<Item = Result<v1::ReadResponse, Status>> + Send + use<>> {
    let chunk = chunk_id(request.chunk.as_ref())?;
    let range = Range::asked(&node, chunk, request)?;
    let (first, left) = read_part(&node, chunk, range).await?;
    let rest = stream::try_unfold(left, move |range| {
        let node = node.clone();
        async move {
            if range.is_empty() {
                return Ok(None);
            }
            read_part(&node, chunk, range).await.map(Some).map_err(Status::from)
        }
    });
    Ok(stream::once(std::future::ready(Ok(first))).chain(Ahead::new(rest)))
}

/// The parts of several short ranges, as they are read: one that waits for the disk holds up no other.
///
/// # Errors
/// `LIMIT_EXCEEDED` for too many or too long ones. What is wrong with one is its answer.
pub(super) fn read_many(
    node: Arc<Node>,
    requests: Vec<v1::ReadRequest>,
) -> Result<impl Stream<Item = Result<v1::ReadManyResponse, Status>> + Send + use<>> {
    let count = requests.len();
    if count > QUESTIONS_MAX {
        return Err(Error::limit(format!("{count} reads in one call, at most {QUESTIONS_MAX} are allowed")));
    }
    if let Some(long) = requests
        .iter()
        .map(|request| request.length)
        .find(|length| !(1..=SHORT_READ_BYTES_MAX).contains(length))
    {
        return Err(Error::limit(format!(
            "{long} bytes to be read together with others, 1 to {SHORT_READ_BYTES_MAX} are allowed"
        )));
    }
    let reads: FuturesUnordered<_> =
        (0..).zip(requests).map(|(index, request)| read_short(node.clone(), index, request)).collect();
    Ok(reads.flat_map(stream::iter).map(Ok))
}

/// All parts of a short range, one or two, or how far it went and why not on.
async fn read_short(node: Arc<Node>, index: u32, request: v1::ReadRequest) -> Vec<v1::ReadManyResponse> {
    let mut answers = Vec::with_capacity(1);
    let read: Result<()> = async {
        let chunk = chunk_id(request.chunk.as_ref())?;
        let mut range = Range::asked(&node, chunk, &request)?;
        while !range.is_empty() {
            let (part, left) = read_part(&node, chunk, range).await?;
            answers.push(v1::ReadManyResponse { index, error: None, part: Some(part) });
            range = left;
        }
        Ok(())
    }
    .await;
    if let Err(error) = read {
        node.metrics.failed(error.reason);
        answers.push(v1::ReadManyResponse { index, error: Some(error.to_wire()), part: None });
    }
    answers
}

/// The next part of a range, and what is left of it.
async fn read_part(node: &Node, chunk: ChunkId, range: Range) -> Result<(v1::ReadResponse, Range)> {
    // Parts begin at multiples of their size, as buffers and the device like it.
    let size = READ_DATA_BYTES as u64;
    let wanted = (range.end - range.next).min(size - range.next % size) as usize;
    let room = node.sending.room(wanted).await.map_err(|error| error.on(node.me().to_string()))?;
    let part = match node.store.read(chunk, range.next, wanted).await {
        Ok(part) => part,
        Err(mut error) => {
            if error.reason == Reason::ChecksumMismatch {
                node.found_bad(chunk);
            }
            error.detail.chunks = vec![v1::ChunkRef { chunk: Some(chunk.into()), ..Default::default() }];
            return Err(error.on(node.me().to_string()));
        }
    };
    let next = part.offset + part.data.len() as u64;
    node.metrics.bytes_read.inc_by(part.data.len() as u64);
    let response = v1::ReadResponse {
        offset: part.offset,
        block_checksums: part.blocks,
        chunk_length: part.info.length,
        chunk_checksum: part.info.checksum,
        data: room.held_by(part.data),
    };
    Ok((response, Range { next, ..range }))
}
