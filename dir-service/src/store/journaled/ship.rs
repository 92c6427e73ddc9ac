//! The journal and its checkpoints, for the file servers that carry copies.

use super::{JournaledStore, Shared};
use crate::store::{KeyRange, index::IndexView, recent::Changed};
use bytes::Bytes;
use cairn_core::plan::{Key, Versioned};
use cairn_proto::{Error, Result, id::Revision};
use futures::{StreamExt as _, stream, stream::BoxStream};
use std::{
    collections::VecDeque,
    fmt,
    sync::{Arc, Weak},
};

/// Entries of the index read at a time for a checkpoint.
const CHECKPOINT_PAGE: usize = 1_024;

/// A part of the journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JournalSlice {
    /// Durable plans in order and without a gap, encoded; empty when there are none yet behind the asked revision.
    Records(Vec<(Revision, Bytes)>),
    /// Plans behind the asked revision are no longer kept: a checkpoint is needed.
    Compacted,
}

/// Everything at one revision.
pub struct Checkpoint {
    /// The revision.
    pub revision: Revision,
    /// All keys in order, with their values. While this lives, the journal behind the revision is kept (within its
    /// bound), so that what comes after the checkpoint can be shipped too. Ends after an error.
    pub entries: BoxStream<'static, Result<(Key, Versioned)>>,
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checkpoint").field("revision", &self.revision).finish_non_exhaustive()
    }
}

impl JournaledStore {
    /// Durable plans behind a revision, about `bytes_max` bytes of them (one at least, however large).
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` for a revision ahead of the store; those of the disk.
    pub async fn journal_since(&self, after: Revision, bytes_max: usize) -> Result<JournalSlice> {
        let last = self.shared.reader.last()?;
        if after > last {
            return Err(Error::invalid(format!(
                "revision {after} lies ahead of the store, which is at {last}"
            )));
        }
        if after == last {
            return Ok(JournalSlice::Records(Vec::new()));
        }
        let next = Revision(after.0 + 1);
        let mut slice = Slice { records: Vec::new(), bytes: 0, bytes_max };
        let in_memory = self.shared.reader.recent(|recent| {
            let mut plans = recent.since(next).peekable();
            if plans.peek().is_none_or(|plan| plan.revision != next) {
                return false;
            }
            plans.all(|plan| slice.take(plan.revision, &plan.encoded));
            true
        });
        if in_memory {
            return Ok(JournalSlice::Records(slice.records));
        }
        self.read_journal(next, last, slice).await
    }

    async fn read_journal(&self, next: Revision, last: Revision, mut slice: Slice) -> Result<JournalSlice> {
        let Some(mut position) = self.shared.places.lock().find(next) else {
            return Ok(JournalSlice::Compacted);
        };
        loop {
            let (records, end) = match self.shared.log.records_from(position, slice.bytes_max).await {
                // Trimmed in this moment.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    return Ok(JournalSlice::Compacted);
                }
                read => read?,
            };
            for record in &records {
                let revision = Revision(record.tag);
                if revision < next {
                    continue;
                }
                let expected = slice.records.last().map_or(next.0, |(last, _)| last.0 + 1);
                if revision.0 != expected {
                    return Err(Error::internal(format!(
                        "the journal of the directory's store holds revision {revision} at {} where {expected} is due",
                        record.position
                    )));
                }
                // What is durable but not yet shown to readers waits.
                if revision > last || !slice.take(revision, &record.payload) {
                    return Ok(JournalSlice::Records(slice.records));
                }
            }
            if end == position || records.is_empty() {
                return Ok(JournalSlice::Records(slice.records));
            }
            position = end;
        }
    }

    /// Everything at the current revision, without holding commits up. Memory: the recent plans, shared with the
    /// store, and one page of the index at a time.
    ///
    /// # Errors
    /// `UNAVAILABLE` when the store is closed.
    pub fn checkpoint(&self) -> Result<Checkpoint> {
        let (hold, revision, below, changed) = {
            // Under the lock that trimming takes: nothing behind the revision may go in between.
            let mut places = self.shared.places.lock();
            let (revision, below, changed) = self.shared.reader.snapshot()?;
            places.hold(revision);
            (Hold { shared: Arc::downgrade(&self.shared), revision }, revision, below, changed)
        };
        let reading =
            Reading { below, changed: changed.into(), range: KeyRange::all(), ended: false, _hold: hold };
        let pages = stream::unfold(reading, |mut reading| async move {
            if reading.ended {
                return None;
            }
            let page = reading.page();
            tokio::task::yield_now().await;
            let entries: Vec<Result<(Key, Versioned)>> = match page {
                Ok(entries) => entries.into_iter().map(Ok).collect(),
                Err(error) => {
                    reading.ended = true;
                    vec![Err(error)]
                }
            };
            Some((stream::iter(entries), reading))
        });
        Ok(Checkpoint { revision, entries: pages.flatten().boxed() })
    }
}

struct Slice {
    records: Vec<(Revision, Bytes)>,
    bytes: usize,
    bytes_max: usize,
}

impl Slice {
    /// Whether it had room for another record.
    fn take(&mut self, revision: Revision, encoded: &Bytes) -> bool {
        if !self.records.is_empty() && self.bytes + encoded.len() > self.bytes_max {
            return false;
        }
        self.bytes += encoded.len();
        self.records.push((revision, encoded.clone()));
        true
    }
}

/// Keeps the journal from being trimmed. Weak: a forgotten checkpoint must not keep a closed store's files open.
struct Hold {
    shared: Weak<Shared>,
    revision: Revision,
}

impl Drop for Hold {
    fn drop(&mut self) {
        if let Some(shared) = self.shared.upgrade() {
            shared.places.lock().release(self.revision);
        }
    }
}

struct Reading {
    below: Arc<dyn IndexView>,
    changed: VecDeque<Changed>,
    range: KeyRange,
    ended: bool,
    _hold: Hold,
}

impl Reading {
    /// The next page of the index, with what changed over it.
    fn page(&mut self) -> Result<Vec<(Key, Versioned)>> {
        let page = self.below.scan(&self.range, CHECKPOINT_PAGE)?;
        let end = page.entries.last().filter(|_| page.more).map(|(key, _)| key.clone());
        let mut entries = Vec::with_capacity(page.entries.len());
        let take_changed = |changed: &mut VecDeque<Changed>, entries: &mut Vec<_>, through: &Key| {
            while changed.front().is_some_and(|(key, _)| key < through) {
                if let Some((key, Some(value))) = changed.pop_front() {
                    entries.push((key, value));
                }
            }
        };
        for (key, value) in page.entries {
            take_changed(&mut self.changed, &mut entries, &key);
            match self.changed.pop_front_of(&key) {
                Some(Some(newer)) => entries.push((key, newer)),
                Some(None) => {}
                None => entries.push((key, value)),
            }
        }
        match end {
            Some(end) => self.range = self.range.behind(end),
            None => {
                entries.extend(self.changed.drain(..).filter_map(|(key, value)| Some((key, value?))));
                self.ended = true;
            }
        }
        Ok(entries)
    }
}

trait PopFrontOf {
    /// Takes the first change if it is of this key.
    fn pop_front_of(&mut self, key: &Key) -> Option<Option<Versioned>>;
}

impl PopFrontOf for VecDeque<Changed> {
    fn pop_front_of(&mut self, key: &Key) -> Option<Option<Versioned>> {
        if self.front()?.0 != *key {
            return None;
        }
        self.pop_front().map(|(_, value)| value)
    }
}
