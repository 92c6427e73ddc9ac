//! Edits in order become one set of ranges that replace what was there: nothing of the file needs to be loaded yet.

use super::{Edit, NewChunk, push_merged};
use crate::record::Extent;
use cairn_proto::{Error, Result, limits::FILE_BYTES_MAX};
use std::collections::BTreeMap;

/// The sum of all edits.
#[derive(Clone, Debug, Default)]
pub(super) struct Change {
    /// The size of the file afterwards.
    pub size: u64,
    /// Ranges (start, end) of the file that lose what they hold; in order, apart from each other.
    pub cleared: Vec<(u64, u64)>,
    /// What comes in, in order; within the cleared ranges.
    pub inserted: Vec<Extent>,
    /// Bytes of each new chunk that came in.
    pub live_bytes: Vec<u64>,
}

/// Where replaced bytes come from: a chunk and the position in it, or a hole.
type Source = Option<(usize, u64)>;

/// Replaced ranges by start, apart from each other.
#[derive(Default)]
struct Overlay(BTreeMap<u64, (u64, Source)>);

impl Overlay {
    fn set(&mut self, start: u64, end: u64, source: Source) {
        if start >= end {
            return;
        }
        self.split(start);
        self.split(end);
        let hidden: Vec<u64> = self.0.range(start..end).map(|(start, _)| *start).collect();
        for start in hidden {
            self.0.remove(&start);
        }
        self.0.insert(start, (end, source));
    }

    /// Makes a range that crosses a position into two that meet there.
    fn split(&mut self, at: u64) {
        let Some((start, (end, source))) = self.0.range_mut(..at).next_back() else { return };
        if *end <= at {
            return;
        }
        let right = (*end, source.map(|(chunk, offset)| (chunk, offset + (at - start))));
        *end = at;
        self.0.insert(at, right);
    }
}

/// Applies edits to an empty overlay of a file of `size` bytes.
pub(super) fn resolve(mut size: u64, edits: &[Edit], chunks: &[NewChunk]) -> Result<Change> {
    let mut overlay = Overlay::default();
    let chunk_at = |index: usize| {
        chunks
            .get(index)
            .ok_or_else(|| Error::invalid(format!("an edit names receipt {index} of {}", chunks.len())))
    };
    for edit in edits {
        match *edit {
            Edit::Write { offset, length, chunk, chunk_offset } => {
                let new = chunk_at(chunk)?;
                if chunk_offset.checked_add(length).is_none_or(|end| end > new.length) {
                    return Err(Error::invalid(format!(
                        "an edit takes {length} bytes at {chunk_offset} of chunk {}, which has {} bytes",
                        new.id, new.length
                    )));
                }
                if length > 0 {
                    let end = file_end(offset, length)?;
                    overlay.set(offset, end, Some((chunk, chunk_offset)));
                    size = size.max(end);
                }
            }
            Edit::Append { chunk } => {
                let end = file_end(size, chunk_at(chunk)?.length)?;
                overlay.set(size, end, Some((chunk, 0)));
                size = end;
            }
            Edit::Truncate { length } => {
                size = file_end(0, length)?;
                overlay.set(length, u64::MAX, None);
            }
            Edit::Punch { offset, length } => {
                overlay.set(offset, offset.saturating_add(length).min(size), None);
            }
        }
    }
    Ok(summed(size, overlay, chunks))
}

fn file_end(offset: u64, length: u64) -> Result<u64> {
    offset
        .checked_add(length)
        .filter(|end| *end <= FILE_BYTES_MAX)
        .ok_or_else(|| Error::limit(format!("a file has at most {FILE_BYTES_MAX} bytes")))
}

fn summed(size: u64, overlay: Overlay, chunks: &[NewChunk]) -> Change {
    let mut change = Change { size, live_bytes: vec![0; chunks.len()], ..Change::default() };
    for (start, (end, source)) in overlay.0 {
        match change.cleared.last_mut() {
            Some(last) if last.1 == start => last.1 = end,
            _ => change.cleared.push((start, end)),
        }
        if let Some((index, chunk_offset)) = source {
            let chunk = &chunks[index];
            change.live_bytes[index] += end - start;
            let extent = Extent {
                offset: start,
                length: end - start,
                grant: chunk.id.grant.0,
                index: chunk.id.index,
                chunk_offset,
                group: chunk.group.0,
                chunk_length: chunk.length,
                chunk_checksum: chunk.checksum,
            };
            push_merged(&mut change.inserted, extent);
        }
    }
    change
}
