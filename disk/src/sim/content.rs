//! The bytes of one simulated file: what a reader sees, and what the platter has.

use std::collections::BTreeMap;
use std::sync::Arc;

use rand::Rng;
use rand::rngs::SmallRng;

use super::CrashKeep;

/// Space is counted and kept in pages of this size.
pub(super) const PAGE_BYTES: u64 = 4096;
/// A crash keeps or loses runs of this size, so a write can tear inside a page.
pub(super) const SECTOR_BYTES: u64 = 512;

/// An allocated page; `None` while it holds only zeros, so that a zero-filled file costs no memory.
type Page = Option<Arc<[u8; PAGE_BYTES as usize]>>;

#[derive(Clone, Debug, Default)]
pub(super) struct Content {
    now: BTreeMap<u64, Page>,
    now_len: u64,
    /// What a crash leaves for sure.
    kept: BTreeMap<u64, Page>,
    kept_len: u64,
    /// One bit for each sector that was written since the last sync. A sector whose write-back failed is not
    /// here: it is seen, but no later sync will save it.
    dirty: BTreeMap<u64, u8>,
    len_dirty: bool,
}

impl Content {
    pub(super) fn len(&self) -> u64 {
        self.now_len
    }

    pub(super) fn pages(&self) -> u64 {
        self.now.len() as u64
    }

    /// Pages that a write of the range would newly allocate.
    pub(super) fn pages_missing(&self, offset: u64, len: u64) -> u64 {
        let pages = page_range(offset, len);
        let wanted = pages.end - pages.start;
        wanted - self.now.range(pages).count() as u64
    }

    pub(super) fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let end = self.now_len.min(offset.saturating_add(len as u64));
        if offset >= end {
            return Vec::new();
        }
        let mut out = vec![0; (end - offset) as usize];
        for (&index, page) in self.now.range(page_range(offset, end - offset)) {
            if let Some(bytes) = page {
                let start = index * PAGE_BYTES;
                let (from, to) = (offset.max(start), end.min(start + PAGE_BYTES));
                out[(from - offset) as usize..(to - offset) as usize]
                    .copy_from_slice(&bytes[(from - start) as usize..(to - start) as usize]);
            }
        }
        out
    }

    pub(super) fn write(&mut self, offset: u64, data: &[u8]) {
        let end = offset + data.len() as u64;
        let mut at = offset;
        while at < end {
            let (index, start) = (at / PAGE_BYTES, at / PAGE_BYTES * PAGE_BYTES);
            let to = end.min(start + PAGE_BYTES);
            let piece = &data[(at - offset) as usize..(to - offset) as usize];
            let page = self.now.entry(index).or_default();
            if page.is_some() || piece.iter().any(|&byte| byte != 0) {
                let bytes = Arc::make_mut(page.get_or_insert_with(|| Arc::new([0; PAGE_BYTES as usize])));
                bytes[(at - start) as usize..(to - start) as usize].copy_from_slice(piece);
            }
            *self.dirty.entry(index).or_default() |= sectors(at - start, to - start);
            at = to;
        }
        self.grow(end);
    }

    pub(super) fn allocate(&mut self, offset: u64, len: u64) {
        for index in page_range(offset, len) {
            self.now.entry(index).or_insert_with(|| {
                self.dirty.insert(index, u8::MAX);
                None
            });
        }
        self.grow(offset + len);
    }

    pub(super) fn punch(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len);
        let touched: Vec<u64> = self.now.range(page_range(offset, len)).map(|(&index, _)| index).collect();
        for index in touched {
            let start = index * PAGE_BYTES;
            let (from, to) = (offset.max(start) - start, end.min(start + PAGE_BYTES) - start);
            if to - from == PAGE_BYTES {
                self.now.remove(&index);
            } else if let Some(Some(bytes)) = self.now.get_mut(&index) {
                Arc::make_mut(bytes)[from as usize..to as usize].fill(0);
            }
            *self.dirty.entry(index).or_default() |= sectors(from, to);
        }
    }

    pub(super) fn set_len(&mut self, len: u64) {
        if len < self.now_len {
            self.punch(len, self.now_len.div_ceil(PAGE_BYTES) * PAGE_BYTES - len);
            let behind = self.now.split_off(&len.div_ceil(PAGE_BYTES));
            self.dirty.extend(behind.into_keys().map(|index| (index, u8::MAX)));
        }
        if len != self.now_len {
            self.now_len = len;
            self.len_dirty = true;
        }
    }

    fn grow(&mut self, end: u64) {
        if end > self.now_len {
            self.now_len = end;
            self.len_dirty = true;
        }
    }

    pub(super) fn sync(&mut self) {
        for (index, _) in std::mem::take(&mut self.dirty) {
            match self.now.get(&index) {
                Some(page) => drop(self.kept.insert(index, page.clone())),
                None => drop(self.kept.remove(&index)),
            }
        }
        self.kept_len = self.now_len;
        self.len_dirty = false;
    }

    /// As Linux does: some pages made it, the others are marked clean and will not be tried again.
    pub(super) fn fail_sync(&mut self, rng: &mut SmallRng) {
        for (index, mask) in std::mem::take(&mut self.dirty) {
            self.keep_sectors(index, mask & rng.random::<u8>());
        }
    }

    /// What the kernel does on its own at any time: writes some dirty sectors, of which a later overwrite
    /// may be lost again.
    pub(super) fn write_back_some(&mut self, rng: &mut SmallRng) {
        let Some(index) = (!self.dirty.is_empty()).then(|| rng.random_range(0..self.dirty.len())) else {
            return;
        };
        if let Some((&page, &mask)) = self.dirty.iter().nth(index) {
            self.keep_sectors(page, mask & rng.random::<u8>());
        }
    }

    pub(super) fn crash(&mut self, keep: CrashKeep, rng: &mut SmallRng) {
        match keep {
            // The page cache outlives a process.
            CrashKeep::Everything => return,
            CrashKeep::Nothing => {}
            CrashKeep::Random => {
                for (index, mask) in std::mem::take(&mut self.dirty) {
                    self.keep_sectors(index, mask & rng.random::<u8>());
                }
                if self.len_dirty {
                    let (low, high) = (self.kept_len.min(self.now_len), self.kept_len.max(self.now_len));
                    self.kept_len = match rng.random_range(0..3) {
                        0 => low,
                        1 => high,
                        _ => rng.random_range(low..=high),
                    };
                }
            }
        }
        self.now = self.kept.clone();
        // Whatever was longer is cut.
        self.now_len = i64::MAX as u64;
        self.set_len(self.kept_len);
        self.sync();
    }

    /// Flips a bit in what is seen and what is kept. False where the file is shorter or has a hole.
    pub(super) fn flip(&mut self, offset: u64, bit: u8) -> bool {
        let (index, at) = (offset / PAGE_BYTES, (offset % PAGE_BYTES) as usize);
        let mut flipped = false;
        for side in [&mut self.now, &mut self.kept] {
            if let Some(page) = side.get_mut(&index) {
                let bytes = Arc::make_mut(page.get_or_insert_with(|| Arc::new([0; PAGE_BYTES as usize])));
                bytes[at] ^= 1 << (bit % 8);
                flipped = true;
            }
        }
        flipped && offset < self.now_len
    }

    /// Copies the sectors in `mask` of one page from what is seen to what is kept.
    fn keep_sectors(&mut self, index: u64, mask: u8) {
        if mask == 0 {
            return;
        }
        let seen = self.now.get(&index);
        if mask == u8::MAX && seen.is_none() {
            self.kept.remove(&index);
            return;
        }
        let seen = seen.cloned().flatten();
        let kept = self.kept.entry(index).or_default();
        if seen.is_none() && kept.is_none() {
            return;
        }
        let bytes = Arc::make_mut(kept.get_or_insert_with(|| Arc::new([0; PAGE_BYTES as usize])));
        for sector in 0..8 {
            if mask & (1 << sector) != 0 {
                let range = sector * SECTOR_BYTES as usize..(sector + 1) * SECTOR_BYTES as usize;
                match &seen {
                    Some(seen) => bytes[range.clone()].copy_from_slice(&seen[range]),
                    None => bytes[range].fill(0),
                }
            }
        }
    }
}

/// The pages that a range touches. The caller has bounded the range.
fn page_range(offset: u64, len: u64) -> std::ops::Range<u64> {
    if len == 0 {
        return 0..0;
    }
    offset / PAGE_BYTES..offset.saturating_add(len).div_ceil(PAGE_BYTES)
}

/// The bits of the sectors that `from..to`, inside a page, touches.
fn sectors(from: u64, to: u64) -> u8 {
    (from / SECTOR_BYTES..to.div_ceil(SECTOR_BYTES)).fold(0, |mask, sector| mask | 1 << sector)
}
