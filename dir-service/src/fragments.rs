//! Files that wait for their extents to be merged, and what was done so far.
//!
//! A commit notes its file here; a slow walk over all files finds what was noted before the directory's start. All of
//! it is in memory and bounded: what does not fit is found by the next walk.

use cairn_core::{compaction, record::Layout};
use cairn_proto::{id::InodeId, v1};
use parking_lot::Mutex;
use std::{
    collections::HashMap,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};
use tokio::{sync::Notify, time::Instant};

/// Files that wait.
const WAITING_MAX: usize = 65_536;
/// Files whose number of extents at the last look is remembered.
const LOOKED_MAX: usize = 65_536;
/// Longest wait after a merge was given up, as a multiple of the first: a power of two.
const DOUBLINGS_MAX: u32 = 9;

#[derive(Clone, Copy, Debug)]
struct Waiting {
    due: Instant,
    failures: u32,
}

#[derive(Debug, Default)]
struct Files {
    waiting: HashMap<InodeId, Waiting>,
    /// Number of extents that were left at the last look.
    looked: HashMap<InodeId, u64>,
}

/// The queue, and figures.
#[derive(Debug, Default)]
pub struct Fragments {
    files: Mutex<Files>,
    noted: Notify,
    merges: AtomicU64,
    extents: AtomicU64,
    bytes: AtomicU64,
    given_up: AtomicU64,
}

impl Fragments {
    /// Notes a file that has a new layout; it is looked at after `delay`, if it is worth it.
    pub fn note(&self, inode: InodeId, layout: Option<&Layout>, delay: Duration) {
        let Some(layout) = layout else { return };
        let mut files = self.files.lock();
        let looked = files.looked.get(&inode).copied().unwrap_or_default();
        let worth = compaction::is_worth_a_look(layout, looked);
        // A file that is written again and again is looked at when its first note says so.
        if !worth || files.waiting.len() >= WAITING_MAX || files.waiting.contains_key(&inode) {
            return;
        }
        files.waiting.insert(inode, Waiting { due: Instant::now() + delay, failures: 0 });
        drop(files);
        self.noted.notify_one();
    }

    /// Takes a file that is due, with how often its merges were given up in a row.
    pub(crate) fn take(&self) -> Option<(InodeId, u32)> {
        let mut files = self.files.lock();
        let now = Instant::now();
        let (inode, waiting) = files
            .waiting
            .iter()
            .filter(|(_, waiting)| waiting.due <= now)
            .min_by_key(|(inode, waiting)| (waiting.due, **inode))
            .map(|(inode, waiting)| (*inode, *waiting))?;
        files.waiting.remove(&inode);
        Some((inode, waiting.failures))
    }

    /// A file was looked at and has so many extents now.
    pub(crate) fn looked(&self, inode: InodeId, extents: u64) {
        let mut files = self.files.lock();
        if files.looked.len() >= LOOKED_MAX {
            // Forgetting costs a needless look.
            files.looked.clear();
        }
        files.looked.insert(inode, extents);
    }

    /// A merge was given up: the file is tried again, later each time.
    pub(crate) fn again(&self, inode: InodeId, failures: u32, first: Duration) {
        self.given_up.fetch_add(1, Ordering::Relaxed);
        let mut files = self.files.lock();
        files.looked.remove(&inode);
        if files.waiting.len() < WAITING_MAX {
            let due = Instant::now() + first * (1 << failures.min(DOUBLINGS_MAX));
            files.waiting.insert(inode, Waiting { due, failures: failures + 1 });
        }
    }

    /// A merge is committed.
    pub(crate) fn merged(&self, extents: u64, bytes: u64) {
        self.merges.fetch_add(1, Ordering::Relaxed);
        self.extents.fetch_add(extents, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Waits until the next file is due, or at most so long.
    pub(crate) async fn wait(&self, most: Duration) {
        let now = Instant::now();
        let due = self.files.lock().waiting.values().map(|waiting| waiting.due).min();
        let until = due.unwrap_or(now + most).min(now + most);
        tokio::select! {
            () = self.noted.notified() => {}
            () = tokio::time::sleep_until(until) => {}
        }
    }

    /// For the status.
    pub fn status(&self) -> v1::ExtentStatus {
        v1::ExtentStatus {
            files_waiting: self.files.lock().waiting.len() as u64,
            merges: self.merges.load(Ordering::Relaxed),
            extents_merged: self.extents.load(Ordering::Relaxed),
            bytes_copied: self.bytes.load(Ordering::Relaxed),
            given_up: self.given_up.load(Ordering::Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_core::record::Extent;

    fn layout(extents: usize) -> Layout {
        Layout { extents: vec![Extent::default(); extents], ..Layout::default() }
    }

    #[tokio::test(start_paused = true)]
    async fn a_file_waits_once_and_is_looked_at_again_when_it_grew() {
        let fragments = Fragments::default();
        let (file, delay) = (InodeId(5), Duration::from_secs(2));
        fragments.note(file, Some(&layout(15)), delay);
        assert_eq!(fragments.status().files_waiting, 0, "few extents");
        fragments.note(file, Some(&layout(16)), delay);
        tokio::time::advance(Duration::from_secs(1)).await;
        fragments.note(file, Some(&layout(17)), delay);
        assert_eq!(fragments.take(), None);
        fragments.wait(Duration::from_secs(60)).await;
        fragments.wait(Duration::from_secs(60)).await;
        assert_eq!(fragments.take(), Some((file, 0)), "writing on does not put it off");
        fragments.looked(file, 17);
        fragments.note(file, Some(&layout(20)), delay);
        assert_eq!(fragments.status().files_waiting, 0);
        fragments.note(file, Some(&layout(25)), delay);
        assert_eq!(fragments.status().files_waiting, 1);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_given_up_is_tried_later_each_time() {
        let fragments = Fragments::default();
        fragments.again(InodeId(5), 0, Duration::from_secs(1));
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(fragments.take(), Some((InodeId(5), 1)));
        fragments.again(InodeId(5), 1, Duration::from_secs(1));
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(fragments.take(), None);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(fragments.take(), Some((InodeId(5), 2)));
    }
}
