//! Counts over all records of a kind, kept current by following the store's changes.
//!
//! At the start the records are scanned a page at a time, each page at its own revision, while changes are followed
//! from before the first page. A change counts when its key lies in a page that was read before it; a key that is not
//! reached yet is read later, with the change in it. What a change replaced is read at the revision before it.

use crate::store::{Change, KeyRange, MetaStore};
use cairn_core::{
    key,
    plan::{Key, Mutation},
    record::{ChunkRun, Dropped, Inode, Record},
};
use cairn_proto::{
    Reason, Result,
    id::{GroupId, Revision},
    v1,
};
use futures::StreamExt as _;
use parking_lot::Mutex;
use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

/// Records read at a time.
const PAGE: usize = 1_024;

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum What {
    /// Files.
    Files,
    /// Directories.
    Directories,
    /// Bytes in files.
    FileBytes,
    /// Chunks of a group that a version refers to.
    Chunks(GroupId),
    /// Their bytes, of one copy.
    Bytes(GroupId),
    /// Dropped chunks of a group that wait for collection.
    Dropped(GroupId),
    /// Their bytes, of one copy.
    DroppedBytes(GroupId),
}

/// A table of records that is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Table {
    /// Files and directories.
    Inodes,
    /// Committed chunks.
    Runs,
    /// Dropped chunks.
    Dropped,
}

impl Table {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Inodes, Self::Runs, Self::Dropped];

    fn prefix(self) -> Key {
        match self {
            Self::Inodes => key::inodes(),
            Self::Runs => key::chunk_runs(),
            Self::Dropped => key::all_dropped(),
        }
    }

    /// What one record counts for.
    fn measure(self, value: &[u8]) -> Result<Vec<(What, i128)>> {
        Ok(match self {
            Self::Inodes => {
                let inode = Inode::from_bytes(value)?;
                if inode.kind == v1::Kind::Directory as i32 {
                    vec![(What::Directories, 1)]
                } else {
                    vec![(What::Files, 1), (What::FileBytes, i128::from(inode.size))]
                }
            }
            Self::Runs => {
                let run = ChunkRun::from_bytes(value)?;
                let (group, mut live, mut bytes) = (GroupId(run.group), 0, 0);
                for chunk in run.chunks.iter().filter(|chunk| chunk.live_bytes > 0) {
                    live += 1;
                    bytes += i128::from(chunk.length);
                }
                vec![(What::Chunks(group), live), (What::Bytes(group), bytes)]
            }
            Self::Dropped => {
                let dropped = Dropped::from_bytes(value)?;
                let group = GroupId(dropped.group);
                vec![(What::Dropped(group), 1), (What::DroppedBytes(group), i128::from(dropped.length))]
            }
        })
    }
}

/// The counts of one table, and whether all of it was read. Sizes of files are a caller's word: a few files of 2^63
/// bytes, all holes, are more than 64 bits count.
type Counts = (bool, HashMap<What, i128>);

/// All counts.
#[derive(Debug, Default)]
pub struct Tallies {
    counts: Mutex<HashMap<Table, Counts>>,
}

impl Tallies {
    /// A count.
    pub fn get(&self, table: Table, what: What) -> u64 {
        let counts = self.counts.lock();
        let count = counts.get(&table).and_then(|(_, counts)| counts.get(&what)).copied().unwrap_or_default();
        u64::try_from(count.max(0)).unwrap_or(u64::MAX)
    }

    /// Whether all records were read since the start.
    pub fn is_complete(&self) -> bool {
        let counts = self.counts.lock();
        Table::ALL.iter().all(|table| counts.get(table).is_some_and(|(complete, _)| *complete))
    }

    fn add(&self, table: Table, deltas: Vec<(What, i128)>, sign: i128) {
        let mut counts = self.counts.lock();
        let (_, counts) = counts.entry(table).or_default();
        for (what, delta) in deltas {
            let count = counts.entry(what).or_default();
            *count += sign * delta;
            if *count == 0 {
                counts.remove(&what);
            }
        }
    }

    /// Follows a table until the store ends. Begins anew when it fell too far behind. `seen` is shown every change.
    pub async fn follow(
        &self,
        store: Arc<dyn MetaStore>,
        table: Table,
        seen: impl Fn(&Mutation) + Send + Sync,
    ) {
        loop {
            self.counts.lock().remove(&table);
            match self.follow_once(&store, table, &seen).await {
                Ok(()) => return,
                Err(error) if error.reason == Reason::RevisionCompacted => {}
                Err(error) => {
                    tracing::debug!(%error, ?table, "counting begins anew");
                    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
                }
            }
        }
    }

    async fn follow_once(
        &self,
        store: &Arc<dyn MetaStore>,
        table: Table,
        seen: &(impl Fn(&Mutation) + Send + Sync),
    ) -> Result<()> {
        let begun = store.revision().await?;
        let mut changes = store.watch(table.prefix(), Revision(begun.0 + 1)).await?;
        let mut range = KeyRange::prefix(table.prefix());
        // Last key of each page, and the revision at which it was read.
        let mut pages: BTreeMap<Key, Revision> = BTreeMap::new();
        let mut scanned: Option<Revision> = None;
        loop {
            // Changes first: they must not pile up behind a long scan.
            loop {
                let next = match scanned {
                    Some(_) => Some(changes.next().await),
                    None => futures::future::poll_immediate(changes.next()).await,
                };
                match next {
                    Some(Some(change)) => {
                        let change = change?;
                        change.mutations.iter().for_each(seen);
                        self.take(store, table, change, &pages, scanned).await?;
                    }
                    Some(None) => return Ok(()),
                    None => break,
                }
            }
            let (revision, page) = store.scan(range.clone(), PAGE, None).await?;
            for (_, versioned) in &page.entries {
                self.add(table, table.measure(&versioned.value)?, 1);
            }
            match page.entries.last() {
                Some((last, _)) if page.more => {
                    pages.insert(last.clone(), revision);
                    range = range.behind(last.clone());
                }
                _ => {
                    scanned = Some(revision);
                    self.counts.lock().entry(table).or_default().0 = true;
                }
            }
        }
    }

    async fn take(
        &self,
        store: &Arc<dyn MetaStore>,
        table: Table,
        change: Change,
        pages: &BTreeMap<Key, Revision>,
        scanned: Option<Revision>,
    ) -> Result<()> {
        let counted: Vec<&Mutation> = change
            .mutations
            .iter()
            .filter(|mutation| {
                let page = pages.range(mutation.key().clone()..).next().map(|(_, revision)| *revision);
                page.or(scanned).is_some_and(|read| change.revision > read)
            })
            .collect();
        if counted.is_empty() {
            return Ok(());
        }
        let keys: Vec<Key> = counted.iter().map(|mutation| mutation.key().clone()).collect();
        let (_, before) = store.get(&keys, Some(Revision(change.revision.0 - 1))).await?;
        for (mutation, before) in counted.into_iter().zip(before) {
            if let Some(before) = before {
                self.add(table, table.measure(&before.value)?, -1);
            }
            if let Mutation::Put(_, value) = mutation {
                self.add(table, table.measure(value)?, 1);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::MemoryStore;
    use cairn_core::plan::Plan;
    use cairn_proto::id::InodeId;

    async fn put(store: &MemoryStore, id: u64, size: Option<u64>) {
        let mut plan = Plan::new();
        match size {
            Some(size) => {
                let inode = Inode { kind: v1::Kind::File as i32, size, ..Default::default() };
                plan.put(key::inode(InodeId(id)), inode.to_bytes())
            }
            None => plan.delete(key::inode(InodeId(id))),
        };
        store.commit(plan).await.unwrap();
    }

    async fn settled(tallies: &Tallies, files: u64, bytes: u64) {
        let all = async {
            while (tallies.get(Table::Inodes, What::Files), tallies.get(Table::Inodes, What::FileBytes))
                != (files, bytes)
            {
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(10), all).await.expect("counts settle");
    }

    #[tokio::test]
    async fn counts_begin_with_what_is_there_and_follow_every_change() {
        let store = MemoryStore::new();
        for id in 0..3_000 {
            put(&store, id, Some(10)).await;
        }
        let tallies = Arc::new(Tallies::default());
        let follower = {
            let (tallies, store) = (tallies.clone(), Arc::new(store.clone()));
            tokio::spawn(async move { tallies.follow(store, Table::Inodes, |_| {}).await })
        };
        // While the scan is under way.
        for id in (0..3_000).step_by(7) {
            put(&store, id, if id % 2 == 0 { Some(25) } else { None }).await;
            tokio::task::yield_now().await;
        }
        let deleted = (0..3_000).step_by(7).filter(|id| id % 2 == 1).count() as u64;
        let grown = (0..3_000).step_by(7).filter(|id| id % 2 == 0).count() as u64;
        settled(&tallies, 3_000 - deleted, (3_000 - deleted) * 10 + grown * 15).await;
        put(&store, 5_000, Some(1)).await;
        settled(&tallies, 3_001 - deleted, (3_000 - deleted) * 10 + grown * 15 + 1).await;
        follower.abort();
    }
}
