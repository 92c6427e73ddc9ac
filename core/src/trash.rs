//! Working off what files let go of: live bytes of chunks sink, chunks without any are dropped, pages are removed.
//!
//! ```text
//!   trash record:  subtrees --open--> leaves --open--> extents --account--> (gone)
//!                                                       bare pages --remove--> (gone)
//! ```
//!
//! Each step is one plan, which rewrites or removes the trash record together with what it accounts for: nothing is
//! counted twice, whenever the directory stops.
//!
//! A run of chunks stays when its last live byte goes: it says that these ids are used up, and its chunks wait for
//! collection.

use crate::{
    key::{self, RUN_CHUNKS},
    layout::trash_page,
    plan::{Plan, Precondition},
    record::{ChunkRun, Dropped, Extent, ExtentPage, Record, Trash},
};
use cairn_proto::id::{ChunkId, InodeId, Revision};
use std::collections::BTreeMap;

/// Extents that one step accounts for: each changes at most its run and drops its chunk.
pub const EXTENTS_STEP: usize = 48;
/// Pages that one step removes.
pub const PAGES_STEP: usize = 96;

/// What the next step of a trash record needs.
#[derive(Clone, Debug, PartialEq)]
pub enum Next {
    /// All chunk runs that could hold these extents' chunks: those that begin from the multiple of
    /// [`RUN_CHUNKS`] on. Then [`account`].
    Runs(Vec<Extent>),
    /// Pages can go: [`remove_pages`].
    Pages,
    /// A page of extents: [`open_leaf`].
    Leaf(u64),
    /// A page of references, with its depth: [`open_inner`].
    Inner(u64, u32),
    /// Nothing is left: [`finish`].
    Nothing,
}

/// A trash record as it was read.
#[derive(Clone, Copy, Debug)]
pub struct Read<'a> {
    /// Its id.
    pub id: u64,
    /// The record.
    pub trash: &'a Trash,
    /// When it was written.
    pub revision: Revision,
}

/// Runs by their first chunk, with the revisions that wrote them.
pub type Runs = BTreeMap<ChunkId, (ChunkRun, Revision)>;

/// The next step. Extents come before pages are opened, so that the record stays small.
pub fn next(trash: &Trash) -> Next {
    if !trash.extents.is_empty() {
        return Next::Runs(trash.extents.iter().take(EXTENTS_STEP).copied().collect());
    }
    if !trash.bare_pages.is_empty() {
        return Next::Pages;
    }
    if let Some(leaf) = trash.leaves.last() {
        return Next::Leaf(*leaf);
    }
    match trash.subtrees[..] {
        [.., page, depth] => Next::Inner(page, depth as u32),
        _ => Next::Nothing,
    }
}

/// Accounts for the first extents of a trash record. Answers the plan and the chunks that no run knows: damage, to be
/// logged.
pub fn account(read: Read<'_>, mut runs: Runs) -> (Plan, Vec<ChunkId>) {
    let mut plan = Plan::new();
    let mut trash = read.trash.clone();
    let rest = trash.extents.split_off(trash.extents.len().min(EXTENTS_STEP));
    let mut unknown = Vec::new();
    let mut changed = std::collections::BTreeSet::new();
    for extent in std::mem::replace(&mut trash.extents, rest) {
        let chunk = extent.chunk();
        let Some(first) = holder(&runs, chunk, InodeId(read.trash.inode)) else {
            unknown.push(chunk);
            continue;
        };
        let Some((run, _)) = runs.get_mut(&first) else { continue };
        let entry = &mut run.chunks[(chunk.index - first.index) as usize];
        let was_live = entry.live_bytes > 0;
        entry.live_bytes = entry.live_bytes.saturating_sub(extent.length);
        changed.insert(first);
        if was_live && entry.live_bytes == 0 {
            let dropped = Dropped {
                group: run.group,
                length: entry.length,
                checksum: entry.checksum,
                ..Dropped::default()
            };
            // Should the chunk be in a second run after all, its bytes are still needed.
            if holder_alive(&runs, chunk).is_none() {
                plan.put(key::dropped(chunk), dropped.to_bytes());
            }
        }
    }
    for first in changed {
        if let Some((run, revision)) = runs.get(&first) {
            plan.require(Precondition::Unchanged(key::chunk_run(first), Some(*revision)));
            plan.put(key::chunk_run(first), run.to_bytes());
        }
    }
    rewrite(&mut plan, read, &trash);
    (plan, unknown)
}

/// Removes pages whose extents are accounted for elsewhere.
pub fn remove_pages(read: Read<'_>) -> Plan {
    let mut plan = Plan::new();
    let mut trash = read.trash.clone();
    let keep = trash.bare_pages.len().saturating_sub(PAGES_STEP);
    for page in trash.bare_pages.split_off(keep) {
        plan.delete(key::extent_page(InodeId(trash.inode), page));
    }
    rewrite(&mut plan, read, &trash);
    plan
}

/// Takes the last leaf's extents into the trash record and removes the page. `None`: the page is not there.
pub fn open_leaf(read: Read<'_>, page: Option<&ExtentPage>) -> Plan {
    let mut plan = Plan::new();
    let mut trash = read.trash.clone();
    if let Some(number) = trash.leaves.pop() {
        plan.delete(key::extent_page(InodeId(trash.inode), number));
    }
    trash.extents.extend(page.iter().flat_map(|page| &page.extents));
    rewrite(&mut plan, read, &trash);
    plan
}

/// Takes the pages below the last subtree's root into the trash record and removes that. `None`: it is not there.
pub fn open_inner(read: Read<'_>, page: Option<&ExtentPage>) -> Plan {
    let mut plan = Plan::new();
    let mut trash = read.trash.clone();
    if let [.., number, depth] = trash.subtrees[..] {
        trash.subtrees.truncate(trash.subtrees.len() - 2);
        match page {
            Some(content) => trash_page(&mut trash, number, depth as u32, content),
            None => trash.bare_pages.push(number),
        }
    }
    rewrite(&mut plan, read, &trash);
    plan
}

/// Removes an empty trash record.
pub fn finish(read: Read<'_>) -> Plan {
    let mut plan = Plan::new();
    plan.require(Precondition::Unchanged(key::trash(read.id), Some(read.revision)));
    plan.delete(key::trash(read.id));
    plan
}

fn rewrite(plan: &mut Plan, read: Read<'_>, trash: &Trash) {
    plan.require(Precondition::Unchanged(key::trash(read.id), Some(read.revision)));
    if next(trash) == Next::Nothing {
        plan.delete(key::trash(read.id));
    } else {
        plan.put(key::trash(read.id), trash.to_bytes());
    }
}

/// The first chunk of the run of an inode that holds a chunk.
fn holder(runs: &Runs, chunk: ChunkId, inode: InodeId) -> Option<ChunkId> {
    covering(runs, chunk).find(|(_, run)| run.inode == inode.0).map(|(first, _)| first)
}

/// A run in which the chunk still has live bytes.
fn holder_alive(runs: &Runs, chunk: ChunkId) -> Option<ChunkId> {
    covering(runs, chunk)
        .find(|(first, run)| run.chunks[(chunk.index - first.index) as usize].live_bytes > 0)
        .map(|(first, _)| first)
}

fn covering(runs: &Runs, chunk: ChunkId) -> impl Iterator<Item = (ChunkId, &ChunkRun)> {
    let start = ChunkId::new(chunk.grant.0, chunk.index / RUN_CHUNKS * RUN_CHUNKS);
    runs.range(start..=chunk)
        .filter(move |(first, (run, _))| chunk.index - first.index < run.chunks.len() as u32)
        .map(|(first, (run, _))| (*first, run))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{plan::Mutation, record::RunChunk};

    fn extent(index: u32, length: u64) -> Extent {
        Extent { length, grant: 5, index, group: 7, chunk_length: 100, ..Extent::default() }
    }

    fn run(inode: u64, live: &[u64]) -> ChunkRun {
        let chunks = live
            .iter()
            .map(|live| RunChunk { length: 100, checksum: 1, live_bytes: *live, references: 0 })
            .collect();
        ChunkRun { inode, group: 7, chunks }
    }

    fn put<R: Record>(plan: &Plan, key: &crate::plan::Key) -> Option<R> {
        plan.mutations.iter().find_map(|mutation| match mutation {
            Mutation::Put(at, value) if at == key => Some(R::from_bytes(value).unwrap()),
            _ => None,
        })
    }

    #[test]
    fn a_chunk_is_dropped_with_its_last_live_byte() {
        let trash = Trash {
            inode: 9,
            extents: vec![extent(64, 60), extent(65, 100), extent(64, 40)],
            ..Trash::default()
        };
        let runs = Runs::from([(ChunkId::new(5, 64), (run(9, &[100, 150]), Revision(3)))]);
        let read = Read { id: 1, trash: &trash, revision: Revision(4) };
        let (plan, unknown) = account(read, runs);
        assert!(unknown.is_empty());
        let run: ChunkRun = put(&plan, &key::chunk_run(ChunkId::new(5, 64))).unwrap();
        assert_eq!(run.chunks.iter().map(|chunk| chunk.live_bytes).collect::<Vec<_>>(), [0, 50]);
        assert!(put::<Dropped>(&plan, &key::dropped(ChunkId::new(5, 64))).is_some());
        assert!(put::<Dropped>(&plan, &key::dropped(ChunkId::new(5, 65))).is_none());
        assert!(plan.mutations.contains(&Mutation::Delete(key::trash(1))), "all is accounted for");
        assert!(plan.preconditions.contains(&Precondition::Unchanged(key::trash(1), Some(Revision(4)))));
    }

    #[test]
    fn a_chunk_in_two_runs_is_kept_for_the_other() {
        let trash = Trash { inode: 9, extents: vec![extent(3, 100)], ..Trash::default() };
        let runs = Runs::from([
            (ChunkId::new(5, 2), (run(8, &[100, 100]), Revision(3))),
            (ChunkId::new(5, 3), (run(9, &[100]), Revision(3))),
        ]);
        let (plan, _) = account(Read { id: 1, trash: &trash, revision: Revision(4) }, runs);
        assert!(put::<Dropped>(&plan, &key::dropped(ChunkId::new(5, 3))).is_none());
        assert!(put::<ChunkRun>(&plan, &key::chunk_run(ChunkId::new(5, 3))).is_some());
        assert!(put::<ChunkRun>(&plan, &key::chunk_run(ChunkId::new(5, 2))).is_none());
    }

    #[test]
    fn steps_are_bounded_and_unknown_chunks_are_told() {
        let extents: Vec<Extent> = (0..200).map(|index| extent(index * 2, 100)).collect();
        let trash = Trash { inode: 9, extents, ..Trash::default() };
        let runs: Runs =
            (1..200).map(|index| (ChunkId::new(5, index * 2), (run(9, &[100]), Revision(3)))).collect();
        let (plan, unknown) = account(Read { id: 1, trash: &trash, revision: Revision(4) }, runs);
        assert_eq!(unknown, [ChunkId::new(5, 0)]);
        assert!(plan.check().is_ok());
        let rest: Trash = put(&plan, &key::trash(1)).unwrap();
        assert_eq!(rest.extents.len(), 200 - EXTENTS_STEP);
    }

    #[test]
    fn trees_are_opened_from_their_roots_to_their_extents() {
        let mut trash = Trash { inode: 9, subtrees: vec![40, 1], ..Trash::default() };
        let refs = |pages: &[u64]| ExtentPage {
            pages: pages
                .iter()
                .map(|page| crate::record::PageRef { page: *page, ..Default::default() })
                .collect(),
            ..Default::default()
        };
        let mut removed = Vec::new();
        let mut accounted = 0;
        for _ in 0..20 {
            let read = Read { id: 1, trash: &trash, revision: Revision(4) };
            let plan = match next(&trash) {
                Next::Inner(40, 1) => open_inner(read, Some(&refs(&[41, 42]))),
                Next::Leaf(page) => {
                    let leaf = ExtentPage { extents: vec![extent(page as u32, 1)], ..Default::default() };
                    open_leaf(read, Some(&leaf))
                }
                Next::Runs(extents) => {
                    accounted += extents.len();
                    account(read, Runs::new()).0
                }
                Next::Pages => remove_pages(read),
                other => panic!("{other:?}"),
            };
            removed.extend(plan.mutations.iter().filter_map(|mutation| match mutation {
                Mutation::Delete(key) if key.get(4) == Some(&b'x') => key::last_u64(key),
                _ => None,
            }));
            match put::<Trash>(&plan, &key::trash(1)) {
                Some(next) => trash = next,
                None => break,
            }
        }
        removed.sort_unstable();
        assert_eq!(removed, [40, 41, 42]);
        assert_eq!(accounted, 2);
    }
}
