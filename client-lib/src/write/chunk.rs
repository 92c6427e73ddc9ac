//! A chunk's bytes with their checksums, computed once.

use bytes::Bytes;
use cairn_proto::{
    checksum::{OfBlocks, block_salt, crc64},
    id::ChunkId,
    limits::BLOCK_BYTES,
    v1,
};
use std::sync::Arc;

/// Bytes in one message. With its checksums a message then fits into one HTTP/2 frame of a bulk connection.
pub(crate) const SEND_BYTES: usize = cairn_proto::limits::DATA_BYTES_MAX - 4 * BLOCK_BYTES;

/// Immutable bytes that are to become a chunk, whatever its id will be: block checksums are salted when sent.
#[derive(Clone, Debug)]
pub(crate) struct Sealed {
    data: Bytes,
    blocks: Arc<[u64]>,
    checksum: u64,
}

impl Sealed {
    /// Computes the checksums: of each block, and from those of the whole.
    pub fn new(data: Bytes) -> Self {
        let mut whole = OfBlocks::default();
        let blocks = data
            .chunks(BLOCK_BYTES)
            .map(|block| {
                let crc = crc64(block);
                whole.push(crc, block.len());
                crc
            })
            .collect();
        Self { data, blocks, checksum: whole.value() }
    }

    pub fn data(&self) -> &Bytes {
        &self.data
    }

    pub fn len(&self) -> usize {
        self.data.len()
    }

    pub fn checksum(&self) -> u64 {
        self.checksum
    }

    /// The messages that write it under `chunk`.
    pub fn messages(
        &self,
        chunk: ChunkId,
        group_id: u64,
        epoch: u64,
    ) -> impl Iterator<Item = v1::WriteRequest> + Send + 'static {
        let this = self.clone();
        let count = this.data.len().div_ceil(SEND_BYTES);
        (0..count).map(move |number| {
            let begin = number * SEND_BYTES;
            let end = (begin + SEND_BYTES).min(this.data.len());
            let (first, last) = (begin / BLOCK_BYTES, end.div_ceil(BLOCK_BYTES));
            v1::WriteRequest {
                chunk: Some(chunk.into()),
                group_id,
                epoch,
                offset: begin as u64,
                block_checksums: (first as u32..)
                    .zip(&this.blocks[first..last])
                    .map(|(block, crc)| crc ^ block_salt(chunk, block))
                    .collect(),
                finish: (number + 1 == count).then(|| v1::WriteFinish {
                    length: this.data.len() as u64,
                    checksum: Some(this.checksum),
                }),
                data: this.data.slice(begin..end),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_proto::checksum::verify_blocks;

    #[test]
    fn messages_cover_the_chunk_and_verify() {
        let bytes: Vec<u8> = (0..SEND_BYTES * 2 + 5_000).map(|n| (n * 31 % 251) as u8).collect();
        let sealed = Sealed::new(bytes.clone().into());
        assert_eq!(sealed.checksum(), crc64(&bytes));
        let chunk = ChunkId::new(4, 9);
        let mut joined = Vec::new();
        let messages: Vec<_> = sealed.messages(chunk, 2, 3).collect();
        for message in &messages {
            assert_eq!(message.offset as usize, joined.len());
            assert_eq!(message.offset % BLOCK_BYTES as u64, 0);
            let first = (joined.len() / BLOCK_BYTES) as u32;
            assert_eq!(verify_blocks(chunk, first, &message.data, &message.block_checksums), None);
            joined.extend_from_slice(&message.data);
        }
        assert_eq!(joined, bytes);
        assert_eq!(messages.iter().filter(|message| message.finish.is_some()).count(), 1);
        assert!(messages.last().unwrap().finish.is_some());
    }
}
