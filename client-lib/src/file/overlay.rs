//! What a handle has changed and not committed: which ranges of the file are new bytes, which are zeros, which are
//! still those of the version it was opened on.

use cairn_proto::v1;
use std::collections::BTreeMap;

/// Where the bytes of a changed range are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// In the handle's chunk of this number, from this position on.
    Chunk(usize, u64),
    /// Nowhere: zeros.
    Zeros,
}

impl Source {
    fn skip(self, count: u64) -> Self {
        match self {
            Self::Chunk(number, offset) => Self::Chunk(number, offset + count),
            Self::Zeros => Self::Zeros,
        }
    }
}

/// A run of a file as the handle sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Run {
    /// Changed.
    New(u64, Source),
    /// As in the version that was opened: position and length.
    Base(u64, u64),
}

/// All changes of a handle.
#[derive(Clone, Debug)]
pub(crate) struct Overlay {
    changed: BTreeMap<u64, (u64, Source)>,
    size: u64,
    base_size: u64,
    /// The old bytes count only below this: the least length the file had meanwhile.
    base_end: u64,
}

impl Overlay {
    /// No change of a file of `size` bytes.
    pub fn new(size: u64) -> Self {
        Self { changed: BTreeMap::new(), size, base_size: size, base_end: size }
    }

    pub fn size(&self) -> u64 {
        self.size
    }

    pub fn is_clean(&self) -> bool {
        self.changed.is_empty() && self.size == self.base_size && self.base_end == self.base_size
    }

    /// Number of changed ranges.
    pub fn ranges(&self) -> usize {
        self.changed.len()
    }

    /// `length` bytes at `offset` are now from `source`; the file grows if need be.
    pub fn write(&mut self, offset: u64, length: u64, source: Source) {
        if length == 0 {
            return;
        }
        self.clear(offset, length);
        self.size = self.size.max(offset + length);
        // A run that goes on in file and chunk is one.
        if let Some((&before, (run, old))) = self.changed.range_mut(..offset).next_back()
            && before + *run == offset
            && old.skip(*run) == source
        {
            *run += length;
            return;
        }
        self.changed.insert(offset, (length, source));
    }

    /// Zeros from `offset` on; the file does not grow.
    pub fn punch(&mut self, offset: u64, length: u64) {
        let end = offset.saturating_add(length).min(self.size);
        if offset < end {
            self.write(offset, end - offset, Source::Zeros);
        }
    }

    /// The file has this length.
    pub fn set_len(&mut self, size: u64) {
        if size < self.size {
            self.clear(size, self.size - size);
            self.base_end = self.base_end.min(size);
        }
        self.size = size;
    }

    /// If `offset..offset + length` is one run of one chunk: which, and where in it.
    pub fn find(&self, offset: u64, length: u64) -> Option<(usize, u64)> {
        let (begin, (run, source)) = self.changed.range(..=offset).next_back()?;
        match source.skip(offset - begin) {
            Source::Chunk(number, at) if offset + length <= begin + run => Some((number, at)),
            _ => None,
        }
    }

    fn clear(&mut self, offset: u64, length: u64) {
        let end = offset + length;
        if let Some((&begin, &(run, source))) = self.changed.range(..offset).next_back()
            && begin + run > offset
        {
            self.changed.insert(begin, (offset - begin, source));
            if begin + run > end {
                self.changed.insert(end, (begin + run - end, source.skip(end - begin)));
            }
        }
        while let Some((&begin, &(run, source))) = self.changed.range(offset..end).next() {
            self.changed.remove(&begin);
            if begin + run > end {
                self.changed.insert(end, (begin + run - end, source.skip(end - begin)));
            }
        }
    }

    /// The runs of a range, cut at the end of the file.
    pub fn runs(&self, offset: u64, length: u64) -> Vec<Run> {
        let end = offset.saturating_add(length).min(self.size);
        let mut runs = Vec::new();
        let mut at = offset;
        let first = self.changed.range(..=offset).next_back().map_or(offset, |(begin, _)| *begin);
        for (&begin, &(run, source)) in self.changed.range(first..) {
            if begin >= end {
                break;
            }
            if begin + run <= at {
                continue;
            }
            self.old(at, begin.max(at), &mut runs);
            at = at.max(begin);
            let until = (begin + run).min(end);
            runs.push(Run::New(until - at, source.skip(at - begin)));
            at = until;
        }
        self.old(at, end, &mut runs);
        runs
    }

    fn old(&self, from: u64, to: u64, runs: &mut Vec<Run>) {
        let base = to.min(self.base_end);
        if from < base {
            runs.push(Run::Base(from, base - from));
        }
        let zeros = from.max(base);
        if zeros < to {
            runs.push(Run::New(to - zeros, Source::Zeros));
        }
    }

    /// The chunks that still count, in order of their first use, and the edits that make the change; `receipt_index`
    /// is the position in that list.
    pub fn edits(&self) -> (Vec<usize>, Vec<v1::Edit>) {
        use v1::edit::Edit;
        let mut used = Vec::new();
        let mut index_of = BTreeMap::new();
        let mut edits = Vec::new();
        let mut length = self.base_size;
        if self.base_end < self.base_size {
            edits.push(Edit::Truncate(v1::TruncateEdit { length: self.base_end }));
            length = self.base_end;
        }
        for (&offset, &(run, source)) in &self.changed {
            match source {
                Source::Chunk(number, chunk_offset) => {
                    let receipt_index = *index_of.entry(number).or_insert_with(|| {
                        used.push(number);
                        used.len() as u32 - 1
                    });
                    edits.push(Edit::Write(v1::WriteEdit {
                        offset,
                        length: run,
                        receipt_index,
                        chunk_offset,
                    }));
                    length = length.max(offset + run);
                }
                // Past the old bytes nothing is there that could be punched.
                Source::Zeros if offset < self.base_end => {
                    edits
                        .push(Edit::Punch(v1::PunchEdit { offset, length: run.min(self.base_end - offset) }));
                }
                Source::Zeros => {}
            }
        }
        if self.size != length {
            edits.push(Edit::Truncate(v1::TruncateEdit { length: self.size }));
        }
        (used, edits.into_iter().map(|edit| v1::Edit { edit: Some(edit) }).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};

    /// The bytes that the runs stand for.
    fn read(overlay: &Overlay, base: &[u8], chunks: &[Vec<u8>], offset: u64, length: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        for run in overlay.runs(offset, length) {
            match run {
                Run::New(count, Source::Zeros) => bytes.resize(bytes.len() + count as usize, 0),
                Run::New(count, Source::Chunk(number, at)) => {
                    bytes.extend_from_slice(&chunks[number][at as usize..(at + count) as usize]);
                }
                Run::Base(at, count) => bytes.extend_from_slice(&base[at as usize..(at + count) as usize]),
            }
        }
        bytes
    }

    /// What a directory makes of the edits.
    fn apply(base: &[u8], chunks: &[Vec<u8>], used: &[usize], edits: &[v1::Edit]) -> Vec<u8> {
        use v1::edit::Edit;
        let mut file = base.to_vec();
        for edit in edits {
            match edit.edit.as_ref().unwrap() {
                Edit::Truncate(edit) => file.resize(edit.length as usize, 0),
                Edit::Punch(edit) => file[edit.offset as usize..][..edit.length as usize].fill(0),
                Edit::Append(_) => unreachable!(),
                Edit::Write(edit) => {
                    let (from, count) = (edit.chunk_offset as usize, edit.length as usize);
                    let end = edit.offset as usize + count;
                    if file.len() < end {
                        file.resize(end, 0);
                    }
                    let chunk = &chunks[used[edit.receipt_index as usize]];
                    file[edit.offset as usize..end].copy_from_slice(&chunk[from..from + count]);
                }
            }
        }
        file
    }

    #[test]
    fn random_changes_read_and_commit_as_a_plain_vector_would() {
        for seed in 0..300 {
            let mut random = SmallRng::seed_from_u64(seed);
            let base: Vec<u8> =
                (0..random.random_range(0..60)).map(|_| random.random_range(1..255)).collect();
            let mut model = base.clone();
            let mut overlay = Overlay::new(base.len() as u64);
            let mut chunks: Vec<Vec<u8>> = Vec::new();
            for _ in 0..random.random_range(0..25) {
                let offset = random.random_range(0..80);
                let length: usize = random.random_range(0..30);
                match random.random_range(0..5) {
                    0 => {
                        model.resize(offset, 0);
                        overlay.set_len(offset as u64);
                    }
                    1 => {
                        let end = (offset + length).min(model.len());
                        if offset < end {
                            model[offset..end].fill(0);
                        }
                        overlay.punch(offset as u64, length as u64);
                    }
                    _ => {
                        let bytes: Vec<u8> = (0..length).map(|_| random.random_range(1..255)).collect();
                        if length > 0 && model.len() < offset + length {
                            model.resize(offset + length, 0);
                        }
                        if length > 0 {
                            model[offset..offset + length].copy_from_slice(&bytes);
                        }
                        if chunks.is_empty() || random.random_bool(0.4) {
                            chunks.push(Vec::new());
                        }
                        let number = chunks.len() - 1;
                        let at = chunks[number].len() as u64;
                        chunks[number].extend_from_slice(&bytes);
                        overlay.write(offset as u64, length as u64, Source::Chunk(number, at));
                    }
                }
                assert_eq!(overlay.size(), model.len() as u64, "seed {seed}");
                assert_eq!(read(&overlay, &base, &chunks, 0, u64::MAX), model, "seed {seed}");
                let (from, count) = (random.random_range(0..80), random.random_range(0..80));
                let end = (from + count).min(model.len());
                let expected = model.get(from..end).unwrap_or_default();
                assert_eq!(
                    read(&overlay, &base, &chunks, from as u64, count as u64),
                    expected,
                    "seed {seed}"
                );
            }
            let (used, edits) = overlay.edits();
            assert_eq!(apply(&base, &chunks, &used, &edits), model, "seed {seed}");
            if overlay.is_clean() {
                assert!(edits.is_empty(), "seed {seed}");
            }
        }
    }

    #[test]
    fn writes_in_order_are_one_range() {
        let mut overlay = Overlay::new(0);
        for step in 0..10 {
            overlay.write(step * 5, 5, Source::Chunk(0, step * 5));
        }
        assert_eq!(overlay.ranges(), 1);
        assert_eq!(overlay.find(12, 8), Some((0, 12)));
        assert_eq!(overlay.find(45, 6), None);
    }
}
