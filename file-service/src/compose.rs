//! Putting a chunk together from ranges of others, for files that many small writes left in crumbs.
//!
//! ```text
//!   source, here or at another server:  blocks compared with their checksums
//!        |                      |
//!        | the range's bytes    | the same bytes
//!        v                      v
//!   checksum of the whole    copied into the new chunk ---> checksums of its blocks
//!        |                                                        |
//!        +-------> the seal on every member compares both <-------+
//! ```
//!
//! The checksum that will be committed is computed from the sources' bytes as they were verified, those of the new
//! blocks from the copy: a byte that changes in this server's memory in between fails the seal, here and on all
//! followers, and nothing is committed.
//!
//! One chunk at a time is put together by a server ([`Composer`]): at most 8 MiB, and one message of a source, are in
//! memory.

use crate::{
    ingest::{Begin, Finish, Part},
    node::Node,
    topology::Map,
};
use bytes::{Bytes, BytesMut};
use cairn_proto::{
    Error, Reason, Result,
    checksum::{ChunkChecksum, block_checksums, verify_blocks},
    convert::{chunk_id, chunk_length, required},
    id::{ChunkId, Epoch, GroupId, ServerId},
    limits::{
        BLOCK_BYTES, CHUNK_BYTES_DEFAULT, DATA_BYTES_MAX, MESSAGE_BYTES_MAX, ORDER_CHUNKS_MAX,
        READ_DATA_BYTES,
    },
    net::{Traffic, meant_for},
    v1::{self, file_service_client::FileServiceClient},
};
use std::time::Duration;
use tokio::sync::{Semaphore, SemaphorePermit};

/// What a directory is asked to wait while another chunk is put together.
const BUSY_RETRY_MS: u64 = 200;
const BLOCK: u64 = BLOCK_BYTES as u64;

/// Lets one composition in at a time.
#[derive(Debug)]
pub struct Composer(Semaphore);

impl Default for Composer {
    fn default() -> Self {
        Self(Semaphore::new(1))
    }
}

impl Composer {
    /// The right to put a chunk together.
    ///
    /// # Errors
    /// `OVERLOADED` while somebody else has it.
    pub fn enter(&self) -> Result<SemaphorePermit<'_>> {
        self.0.try_acquire().map_err(|_| {
            Error::new(Reason::Overloaded, "another chunk is being put together here")
                .retry_after_ms(BUSY_RETRY_MS)
        })
    }
}

/// A range of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    chunk: ChunkId,
    group: GroupId,
    chunk_length: u64,
    chunk_checksum: u64,
    offset: u64,
    length: u64,
}

impl Range {
    fn end(&self) -> u64 {
        self.offset + self.length
    }
}

/// What a chunk is to be made of, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recipe {
    /// The new chunk.
    pub begin: Begin,
    ranges: Vec<Range>,
    length: u64,
}

impl Recipe {
    /// Checks an order.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT`, `LIMIT_EXCEEDED`.
    pub fn from_wire(request: &v1::ComposeRequest) -> Result<Self> {
        let begin = Begin {
            chunk: chunk_id(request.chunk.as_ref())?,
            group: GroupId(request.group_id),
            epoch: Epoch(request.epoch),
        };
        if request.parts.is_empty() || request.parts.len() > ORDER_CHUNKS_MAX {
            return Err(Error::limit(format!(
                "a chunk is put together from 1 to {ORDER_CHUNKS_MAX} ranges, not {}",
                request.parts.len()
            )));
        }
        let ranges = request.parts.iter().map(range).collect::<Result<Vec<Range>>>()?;
        let length = ranges.iter().map(|range| range.length).fold(0, u64::saturating_add);
        if length > CHUNK_BYTES_DEFAULT {
            return Err(Error::limit(format!(
                "{length} bytes are put together, at most {CHUNK_BYTES_DEFAULT} are allowed"
            )));
        }
        if ranges.iter().any(|range| range.chunk == begin.chunk) {
            return Err(Error::invalid(format!("chunk {} is to be made of itself", begin.chunk)));
        }
        Ok(Self { begin, ranges, length })
    }
}

fn range(part: &v1::ComposePart) -> Result<Range> {
    let chunk = required(part.chunk.as_ref(), "chunk")?;
    let range = Range {
        chunk: chunk_id(chunk.chunk.as_ref())?,
        group: GroupId(chunk.group_id),
        chunk_length: chunk_length(chunk.length)?,
        chunk_checksum: chunk.checksum,
        offset: part.offset,
        length: part.length,
    };
    if part.length == 0 || part.offset.checked_add(part.length).is_none_or(|end| end > chunk.length) {
        return Err(Error::invalid(format!(
            "{} bytes at {} of chunk {}, which has {} bytes",
            part.length, part.offset, range.chunk, chunk.length
        )));
    }
    Ok(range)
}

/// Gathers the bytes; answers the chunk as a writer would send it.
///
/// # Errors
/// `CHUNK_NOT_FOUND` or `CHECKSUM_MISMATCH` when nobody has a good copy of a range; `UNAVAILABLE`.
pub async fn gather(node: &Node, recipe: &Recipe) -> Result<Vec<Part>> {
    let mut data = BytesMut::with_capacity(recipe.length as usize);
    let mut whole = ChunkChecksum::default();
    for range in &recipe.ranges {
        let mut at = range.offset;
        while at < range.end() {
            let bytes = read(node, range, at).await?;
            whole.update(&bytes);
            data.extend_from_slice(&bytes);
            at += bytes.len() as u64;
        }
    }
    let finish = Finish { length: recipe.length, checksum: whole.value(), computed_here: true };
    Ok(parts(recipe.begin, data.freeze(), finish))
}

/// A chunk in messages.
fn parts(begin: Begin, data: Bytes, finish: Finish) -> Vec<Part> {
    let chunk = begin.chunk;
    let mut parts: Vec<Part> = (0..data.len())
        .step_by(DATA_BYTES_MAX)
        .map(|at| {
            let data = data.slice(at..data.len().min(at + DATA_BYTES_MAX));
            let blocks = block_checksums(chunk, (at / BLOCK_BYTES) as u32, &data);
            Part { chunk, begin: (at == 0).then_some(begin), offset: at as u64, data, blocks, finish: None }
        })
        .collect();
    if let Some(last) = parts.last_mut() {
        last.finish = Some(finish);
    }
    parts
}

/// Verified bytes of a range from `at` on: at least one, at most a message of them.
async fn read(node: &Node, range: &Range, at: u64) -> Result<Bytes> {
    let failed = match read_here(node, range, at).await {
        Ok(bytes) => return Ok(bytes),
        Err(error) => error,
    };
    let map = node.topology.map();
    let sources: Vec<ServerId> = map.groups.get(&range.group).map(Map::holders).unwrap_or_default();
    let mut failed = failed;
    for source in sources.into_iter().filter(|source| *source != node.me()) {
        match read_from(node, &map, range, at, source).await {
            Ok(bytes) => return Ok(bytes),
            Err(error) => failed = error.on(source.to_string()),
        }
    }
    Err(failed)
}

async fn read_here(node: &Node, range: &Range, at: u64) -> Result<Bytes> {
    let first = at - at % BLOCK;
    let len = (range.end() - first).min(DATA_BYTES_MAX as u64) as usize;
    let part = match node.store.read(range.chunk, first, len).await {
        Ok(part) => part,
        Err(error) => {
            if error.reason == Reason::ChecksumMismatch {
                node.found_bad(range.chunk);
            }
            return Err(error);
        }
    };
    cut(range, at, part.offset, part.data, &part.blocks, part.info.length, part.info.checksum)
}

async fn read_from(node: &Node, map: &Map, range: &Range, at: u64, source: ServerId) -> Result<Bytes> {
    let first = at - at % BLOCK;
    let length = (range.end() - first).min(READ_DATA_BYTES as u64);
    let traffic = if length as usize <= DATA_BYTES_MAX / 8 { Traffic::Small } else { Traffic::Bulk };
    let channel = node.peers.channel(map, source, traffic)?;
    let mut client = FileServiceClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let request = v1::ReadRequest { chunk: Some(range.chunk.into()), offset: first, length };
    let wait = Duration::from_millis(node.config.timing.fetch_wait_ms);
    let reading = async {
        let mut parts =
            client.read(meant_for(request, &node.identity.cluster_id(), source)).await?.into_inner();
        Ok::<_, Error>(parts.message().await?)
    };
    let part = tokio::time::timeout(wait, reading)
        .await
        .map_err(|_| Error::unavailable(format!("server {source} does not answer")))??
        .ok_or_else(|| Error::unavailable(format!("server {source} ended a read early")))?;
    cut(range, at, part.offset, part.data, &part.block_checksums, part.chunk_length, part.chunk_checksum)
}

/// What of a verified run of blocks belongs to the range, from `at` on.
fn cut(
    range: &Range,
    at: u64,
    offset: u64,
    data: Bytes,
    blocks: &[u64],
    length: u64,
    checksum: u64,
) -> Result<Bytes> {
    let bad = |what: &str| {
        Error::new(Reason::ChecksumMismatch, format!("a copy of chunk {} is bad: {what}", range.chunk))
    };
    if (length, checksum) != (range.chunk_length, range.chunk_checksum) {
        return Err(bad("its length or checksum is not the committed one"));
    }
    let end = offset.saturating_add(data.len() as u64);
    if !offset.is_multiple_of(BLOCK) || offset > at || end <= at || end > length {
        return Err(bad("other bytes than were asked for"));
    }
    if let Some(block) = verify_blocks(range.chunk, (offset / BLOCK) as u32, &data, blocks) {
        return Err(bad(&format!("block {block} does not match its checksum")));
    }
    Ok(data.slice((at - offset) as usize..(range.end().min(end) - offset) as usize))
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_proto::checksum::crc64;

    fn request(parts: &[(u64, u64, u64)]) -> v1::ComposeRequest {
        let part = |(number, (length, offset, count)): (usize, &(u64, u64, u64))| v1::ComposePart {
            chunk: Some(v1::ChunkRef {
                chunk: Some(v1::ChunkId { grant_id: 4, index: number as u32 }),
                length: *length,
                checksum: 1,
                group_id: 2,
            }),
            offset: *offset,
            length: *count,
        };
        v1::ComposeRequest {
            chunk: Some(v1::ChunkId { grant_id: 9, index: 0 }),
            group_id: 2,
            epoch: 1,
            parts: parts.iter().enumerate().map(part).collect(),
            ..Default::default()
        }
    }

    #[test]
    fn orders_that_cannot_be_are_refused() {
        let reason = |parts: &[_]| Recipe::from_wire(&request(parts)).unwrap_err().reason;
        assert_eq!(Recipe::from_wire(&request(&[(10, 3, 7), (5, 0, 1)])).unwrap().length, 8);
        assert_eq!(reason(&[]), Reason::LimitExceeded);
        assert_eq!(reason(&[(10, 3, 8)]), Reason::InvalidArgument);
        assert_eq!(reason(&[(10, u64::MAX, 2)]), Reason::InvalidArgument);
        assert_eq!(reason(&[(10, 3, 0)]), Reason::InvalidArgument);
        assert_eq!(
            reason(&[(CHUNK_BYTES_DEFAULT, 0, CHUNK_BYTES_DEFAULT), (1, 0, 1)]),
            Reason::LimitExceeded
        );
    }

    #[test]
    fn ranges_are_cut_out_of_verified_blocks() {
        let chunk = ChunkId::new(4, 0);
        let bytes: Vec<u8> = (0..10_000u32).map(|n| (n / 3) as u8).collect();
        let sums = block_checksums(chunk, 0, &bytes);
        let range = Range {
            chunk,
            group: GroupId(2),
            chunk_length: 10_000,
            chunk_checksum: crc64(&bytes),
            offset: 5_000,
            length: 4_000,
        };
        let data = Bytes::from(bytes.clone());
        let some = |from: usize, to: usize| (data.slice(from..to), &sums[from / 4_096..to.div_ceil(4_096)]);
        let cut_at = |at, (data, sums): (Bytes, &[u64]), offset| {
            cut(&range, at, offset, data, sums, 10_000, range.chunk_checksum)
        };
        assert_eq!(cut_at(5_000, some(4_096, 8_192), 4_096).unwrap(), bytes[5_000..8_192]);
        assert_eq!(cut_at(8_192, some(8_192, 10_000), 8_192).unwrap(), bytes[8_192..9_000]);
        assert_eq!(cut_at(5_000, some(0, 8_192), 0).unwrap(), bytes[5_000..8_192]);
        assert!(cut_at(5_000, some(8_192, 10_000), 8_192).is_err(), "bytes behind those that are wanted");
        assert!(cut_at(5_000, some(4_096, 8_192), 0).is_err(), "blocks of another place");
        let mut flipped = bytes.clone();
        flipped[6_000] ^= 1;
        let flipped = Bytes::from(flipped).slice(4_096..8_192);
        assert!(cut_at(5_000, (flipped, &sums[1..2]), 4_096).is_err());
    }

    #[test]
    fn a_chunk_is_sent_as_a_writer_would() {
        let begin = Begin { chunk: ChunkId::new(9, 0), group: GroupId(2), epoch: Epoch(1) };
        let data = Bytes::from(vec![7; DATA_BYTES_MAX + 10]);
        let finish = Finish { length: data.len() as u64, checksum: crc64(&data), computed_here: true };
        let parts = parts(begin, data, finish);
        assert_eq!(parts.len(), 2);
        assert_eq!((parts[0].begin, parts[0].finish), (Some(begin), None));
        assert_eq!(
            (parts[1].begin, parts[1].finish, parts[1].offset),
            (None, Some(finish), DATA_BYTES_MAX as u64)
        );
        assert_eq!(parts[1].blocks, block_checksums(begin.chunk, 256, &parts[1].data));
    }
}
