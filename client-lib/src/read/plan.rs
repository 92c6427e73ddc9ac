//! Which parts of which chunks make up a range of a file.

use cairn_proto::{
    Error, Result,
    limits::{BLOCK_BYTES, CHUNK_BYTES_MAX},
    v1,
};

/// A version of a file: its attributes and the extents of a range of it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Layout {
    pub attributes: v1::Attributes,
    /// By offset, without overlaps.
    pub extents: Vec<v1::Extent>,
    /// At which all of this holds.
    pub revision: u64,
    pub layout_revision: u64,
}

/// A part of a chunk.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Piece {
    pub chunk: v1::ChunkRef,
    /// Position in the chunk.
    pub offset: u64,
    pub length: u64,
}

impl Piece {
    /// Whether it is all of its chunk.
    pub fn is_whole(&self) -> bool {
        self.offset == 0 && self.length == self.chunk.length
    }
}

/// A run of a file.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Part {
    /// A hole.
    Zeros(u64),
    /// Bytes of a chunk.
    Bytes(Piece),
}

impl Layout {
    pub fn size(&self) -> u64 {
        self.attributes.size
    }

    /// Checks what a directory said: extents in order, each somewhere in the file and in its chunk.
    ///
    /// # Errors
    /// `INTERNAL` naming the extent.
    pub fn check(&self) -> Result<()> {
        let mut behind = 0;
        for extent in &self.extents {
            let end = extent.offset.checked_add(extent.length);
            let in_file =
                end.filter(|end| extent.offset >= behind && *end <= self.size() && extent.length > 0);
            let in_chunk = extent.chunk.is_none_or(|chunk| {
                let end = extent.chunk_offset.checked_add(extent.length);
                chunk.length <= CHUNK_BYTES_MAX && end.is_some_and(|end| end <= chunk.length)
            });
            behind = in_file.filter(|_| in_chunk).ok_or_else(|| {
                Error::internal(format!(
                    "the directory answered with an extent that cannot be: {} bytes at {} of a file of {} bytes, \
                     from {} of a chunk of {}",
                    extent.length,
                    extent.offset,
                    self.size(),
                    extent.chunk_offset,
                    extent.chunk.map_or(0, |chunk| chunk.length)
                ))
            })?;
        }
        Ok(())
    }

    /// The parts of `offset..offset + length`, cut at the end of the file, none longer than `piece_bytes_max` if it
    /// is to be fetched.
    ///
    /// # Errors
    /// `INTERNAL` for an extent outside of its chunk.
    pub fn parts(&self, offset: u64, length: u64, piece_bytes_max: u64) -> Result<Vec<Part>> {
        let end = offset.saturating_add(length).min(self.size());
        let mut at = offset;
        let mut parts = Vec::new();
        let first = self.extents.partition_point(|extent| extent.offset + extent.length <= offset);
        for extent in &self.extents[first..] {
            if extent.offset >= end || at >= end {
                break;
            }
            if extent.offset > at {
                parts.push(Part::Zeros(extent.offset - at));
                at = extent.offset;
            }
            let skipped = at - extent.offset;
            let count = (extent.length - skipped).min(end - at);
            match &extent.chunk {
                None => parts.push(Part::Zeros(count)),
                Some(chunk) => cut(chunk, extent.chunk_offset + skipped, count, piece_bytes_max, &mut parts)?,
            }
            at += count;
        }
        if at < end {
            parts.push(Part::Zeros(end - at));
        }
        Ok(parts)
    }
}

/// Cuts a range of a chunk at multiples of the largest piece, so that no block is fetched twice.
pub(crate) fn cut(
    chunk: &v1::ChunkRef,
    offset: u64,
    length: u64,
    piece_bytes_max: u64,
    parts: &mut Vec<Part>,
) -> Result<()> {
    let end = offset.checked_add(length).filter(|end| *end <= chunk.length).ok_or_else(|| {
        Error::internal(format!("an extent reaches outside of its chunk of {} bytes", chunk.length))
    })?;
    let step = (piece_bytes_max / BLOCK_BYTES as u64).max(1) * BLOCK_BYTES as u64;
    let mut at = offset;
    while at < end {
        let next = ((at / step + 1) * step).min(end);
        parts.push(Part::Bytes(Piece { chunk: *chunk, offset: at, length: next - at }));
        at = next;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(index: u32, length: u64) -> v1::ChunkRef {
        v1::ChunkRef { chunk: Some(v1::ChunkId { grant_id: 1, index }), length, checksum: 7, group_id: 1 }
    }

    fn piece(index: u32, chunk_length: u64, offset: u64, length: u64) -> Part {
        Part::Bytes(Piece { chunk: chunk(index, chunk_length), offset, length })
    }

    fn layout() -> Layout {
        let extent = |offset, length, chunk, chunk_offset| v1::Extent { offset, length, chunk, chunk_offset };
        Layout {
            attributes: v1::Attributes { size: 50_000, ..Default::default() },
            extents: vec![
                extent(0, 10_000, Some(chunk(0, 10_000)), 0),
                extent(12_000, 1_000, None, 0),
                extent(20_000, 20_000, Some(chunk(1, 30_000)), 5_000),
            ],
            ..Default::default()
        }
    }

    #[test]
    fn gaps_and_holes_are_zeros_and_long_runs_are_cut_at_blocks() {
        let parts = layout().parts(9_000, 100_000, 8_192).unwrap();
        assert_eq!(
            parts,
            [
                piece(0, 10_000, 9_000, 1_000),
                Part::Zeros(2_000),
                Part::Zeros(1_000),
                Part::Zeros(7_000),
                piece(1, 30_000, 5_000, 3_192),
                piece(1, 30_000, 8_192, 8_192),
                piece(1, 30_000, 16_384, 8_192),
                piece(1, 30_000, 24_576, 424),
                Part::Zeros(10_000),
            ]
        );
    }

    #[test]
    fn ranges_begin_and_end_anywhere() {
        assert_eq!(layout().parts(20_001, 5, 1 << 20).unwrap(), [piece(1, 30_000, 5_001, 5)]);
        assert_eq!(layout().parts(60_000, 5, 1 << 20).unwrap(), []);
        assert_eq!(layout().parts(45_000, u64::MAX, 1 << 20).unwrap(), [Part::Zeros(5_000)]);
    }

    #[test]
    fn extents_that_cannot_be_are_refused() {
        layout().check().unwrap();
        let refused = |change: &dyn Fn(&mut v1::Extent)| {
            let mut layout = layout();
            change(&mut layout.extents[2]);
            layout.check().is_err()
        };
        assert!(refused(&|extent| extent.offset = u64::MAX));
        assert!(refused(&|extent| extent.offset = 12_999), "it overlaps the one before");
        assert!(refused(&|extent| extent.length = u64::MAX));
        assert!(refused(&|extent| extent.length = 0));
        assert!(refused(&|extent| extent.offset = 30_001), "it reaches behind the end of the file");
        assert!(refused(&|extent| extent.chunk_offset = u64::MAX));
        assert!(refused(&|extent| extent.chunk_offset = 10_001));
        assert!(refused(&|extent| extent.chunk = Some(chunk(1, CHUNK_BYTES_MAX + 1))));
    }

    #[test]
    fn an_extent_outside_of_its_chunk_is_refused() {
        let mut layout = layout();
        layout.extents[2].chunk_offset = 15_000;
        assert!(layout.parts(0, 50_000, 1 << 20).is_err());
    }
}
