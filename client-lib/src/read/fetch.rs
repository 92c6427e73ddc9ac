//! One attempt to read a piece of a chunk from one file server, with every byte verified.

use crate::{read::plan::Piece, retry::restore, segments::Segments, servers::ServerLink};
use cairn_proto::{
    Error, Reason, Result,
    checksum::{OfBlocks, verify_blocks_of},
    id::ChunkId,
    limits::{BLOCK_BYTES, SHORT_READ_BYTES_MAX},
    net::framed,
    v1,
};
use parking_lot::Mutex;
use std::sync::Arc;
use tokio::time::Instant;

const BLOCK: u64 = BLOCK_BYTES as u64;

/// When something last arrived.
#[derive(Clone, Debug)]
pub(crate) struct Progress(Arc<Mutex<(Instant, bool)>>);

impl Progress {
    pub fn new() -> Self {
        Self(Arc::new(Mutex::new((Instant::now(), false))))
    }

    fn arrived(&self) {
        *self.0.lock() = (Instant::now(), true);
    }

    /// When, and whether anything arrived at all.
    pub fn last(&self) -> (Instant, bool) {
        *self.0.lock()
    }
}

/// Reads and verifies a piece.
///
/// # Errors
/// As `FileService.Read`; `CHECKSUM_MISMATCH` when what arrived is not what was committed.
pub(crate) async fn fetch(link: &ServerLink, piece: &Piece, progress: &Progress) -> Result<Segments> {
    let begin = Instant::now();
    let failed = |status| link.judge(restore(status, &link.name()));
    let request = v1::ReadRequest { chunk: piece.chunk.chunk, offset: piece.offset, length: piece.length };
    let mut check = Check::new(piece);
    if piece.length <= SHORT_READ_BYTES_MAX {
        let parts = link.read_short(request).await.map_err(|error| link.judge(error))?;
        link.answered_in(begin.elapsed());
        progress.arrived();
        for part in parts {
            check.take(part).map_err(|error| error.on(link.name()))?;
        }
        if !check.is_complete() {
            return Err(early(link, check.chunk));
        }
    } else {
        let mut client = link.bulk()?;
        let request = framed::expecting(link.request(request));
        let mut answers = framed::incoming(client.read(request).await.map_err(failed)?);
        while !check.is_complete() {
            let Some(message) = answers.message().await.map_err(failed)? else {
                return Err(early(link, check.chunk));
            };
            if !progress.last().1 {
                link.answered_in(begin.elapsed());
            }
            progress.arrived();
            check.take(message).map_err(|error| error.on(link.name()))?;
        }
    }
    link.alive();
    check.finish().map_err(|error| error.on(link.name()))
}

fn early(link: &ServerLink, chunk: ChunkId) -> Error {
    Error::unavailable(format!("file server {} ended a read of chunk {chunk} early", link.name()))
        .on(link.name())
}

/// The verification of one piece.
struct Check<'a> {
    piece: &'a Piece,
    chunk: ChunkId,
    next: u64,
    /// Of all that was taken.
    whole: OfBlocks,
    segments: Segments,
}

impl<'a> Check<'a> {
    fn new(piece: &'a Piece) -> Self {
        Self {
            piece,
            chunk: piece.chunk.chunk.map(ChunkId::from).unwrap_or_default(),
            next: piece.offset / BLOCK * BLOCK,
            whole: OfBlocks::default(),
            segments: Segments::default(),
        }
    }

    fn is_complete(&self) -> bool {
        self.segments.len() >= self.piece.length
    }

    fn bad(&self, what: impl std::fmt::Display) -> Error {
        let mut error =
            Error::new(Reason::ChecksumMismatch, format!("a copy of chunk {} is bad: {what}", self.chunk));
        error.detail.chunks.push(self.piece.chunk);
        error
    }

    fn take(&mut self, message: v1::ReadResponse) -> Result<()> {
        let committed = &self.piece.chunk;
        if message.chunk_length != committed.length || message.chunk_checksum != committed.checksum {
            return Err(self.bad("its length or checksum is not the committed one"));
        }
        let end = message.offset.saturating_add(message.data.len() as u64);
        if message.offset != self.next || message.data.is_empty() || end > committed.length {
            return Err(self.bad(format_args!("bytes {} to {end} were not asked for", message.offset)));
        }
        if !end.is_multiple_of(BLOCK) && end != committed.length {
            return Err(self.bad(format_args!("byte {end} is no end of a block")));
        }
        let first = (message.offset / BLOCK) as u32;
        let sums = &message.block_checksums;
        if let Some(block) = verify_blocks_of(&mut self.whole, self.chunk, first, &message.data, sums) {
            return Err(self.bad(format_args!("block {block} does not match its checksum")));
        }
        self.next = end;
        let from = self.piece.offset.max(message.offset).min(end);
        let to = (self.piece.offset + self.piece.length).min(end).max(from);
        let range = (from - message.offset) as usize..(to - message.offset) as usize;
        self.segments.push(message.data.slice(range));
        Ok(())
    }

    fn finish(self) -> Result<Segments> {
        if self.piece.is_whole() && self.whole.value() != self.piece.chunk.checksum {
            return Err(self.bad("the whole does not match the committed checksum"));
        }
        Ok(self.segments)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use cairn_proto::checksum::{block_checksums, crc64};

    fn piece(data: &[u8], offset: u64, length: u64) -> Piece {
        let chunk = v1::ChunkRef {
            chunk: Some(v1::ChunkId { grant_id: 3, index: 1 }),
            length: data.len() as u64,
            checksum: crc64(data),
            group_id: 1,
        };
        Piece { chunk, offset, length }
    }

    fn message(data: &[u8], offset: usize, end: usize) -> v1::ReadResponse {
        v1::ReadResponse {
            offset: offset as u64,
            block_checksums: block_checksums(
                ChunkId::new(3, 1),
                (offset / BLOCK_BYTES) as u32,
                &data[offset..end],
            ),
            chunk_length: data.len() as u64,
            chunk_checksum: crc64(data),
            data: Bytes::copy_from_slice(&data[offset..end]),
        }
    }

    #[test]
    fn a_range_is_cut_out_of_its_blocks() {
        let data: Vec<u8> = (0..10_000u32).map(|n| n as u8).collect();
        let piece = piece(&data, 5_000, 4_000);
        let mut check = Check::new(&piece);
        check.take(message(&data, 4_096, 8_192)).unwrap();
        assert!(!check.is_complete());
        check.take(message(&data, 8_192, 10_000)).unwrap();
        assert!(check.is_complete());
        assert_eq!(check.finish().unwrap().into_bytes(), data[5_000..9_000]);
    }

    #[test]
    fn what_is_not_as_committed_is_refused() {
        let data = vec![5u8; 9_000];
        let piece = piece(&data, 0, 9_000);
        let refused = |change: &dyn Fn(&mut v1::ReadResponse)| {
            let mut answer = message(&data, 0, 8_192);
            change(&mut answer);
            Check::new(&piece).take(answer).unwrap_err().reason
        };
        let mismatch = Reason::ChecksumMismatch;
        assert_eq!(refused(&|answer| answer.chunk_checksum ^= 1), mismatch);
        assert_eq!(refused(&|answer| answer.chunk_length += 1), mismatch);
        assert_eq!(refused(&|answer| answer.offset = 4_096), mismatch);
        assert_eq!(refused(&|answer| answer.block_checksums[1] ^= 1), mismatch);
        assert_eq!(refused(&|answer| answer.block_checksums.truncate(1)), mismatch);
        assert_eq!(refused(&|answer| answer.data = answer.data.slice(..5_000)), mismatch);
        assert_eq!(refused(&|answer| answer.data = Bytes::new()), mismatch);
    }
}
