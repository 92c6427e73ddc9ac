//! Merging extents: many small writes leave a file in crumbs, and this puts ranges of it into chunks of their own.
//!
//! ```text
//!   file     |a|b|a|c|a|d|a|e|a| ... |        many extents, most of a few KiB
//!             \_______________/
//!   compose     one chunk                     on the servers of a group, bytes verified on the way
//!             /               \
//!   file     |        n        | ... |        the same version, another layout
//! ```
//!
//! The version stays: no byte, time, etag or version of the file changes, only where its bytes are. The replaced
//! extents go the way of all that a version lets go of (`trash`), so that readers of the older layout go on.
//!
//! **What is merged** ([`merges`]): runs of extents that follow each other without a hole, at least [`EXTENTS_MIN`],
//! on average at most [`AVERAGE_BYTES`] long. Each run is begun where it pays and ended where it paid most: an extent
//! adds `AVERAGE_BYTES - length` to the run's score, and the prefix with the highest score is taken. Whole chunks of
//! a streamed file end a run at once. A byte is moved some two times while a file grows by small appends, because
//! what was merged twice is longer than the average.
//!
//! **Whoever writes wins** ([`relayout`]): the plan requires the file, the lock on it, the grant and the group to be as
//! they were read. A range whose extents are no longer those that were put together is given up.

use crate::{
    commit::{self, Receipt},
    key,
    layout::{self, Edit, Pages, Stop},
    lock::Place,
    plan::{Plan, Precondition},
    record::{Extent, Grant, Group, Inode, Layout, Record},
};
use cairn_proto::{
    Error, Reason, Result,
    id::{GrantId, InodeId, Revision},
    limits::CHUNK_BYTES_DEFAULT,
};

/// Fewest extents that are merged.
pub const EXTENTS_MIN: usize = 16;
/// Most extents of one merge.
pub const EXTENTS_MAX: usize = 4_096;
/// Longest average of the extents of a merge.
pub const AVERAGE_BYTES: u64 = 64 * 1024;
/// Longest chunk that is made.
pub const MERGE_BYTES_MAX: u64 = CHUNK_BYTES_DEFAULT;

/// A range of a file that becomes one chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Merge {
    /// The extents that it replaces, in order, without a hole.
    pub extents: Vec<Extent>,
}

impl Merge {
    /// Position in the file.
    pub fn offset(&self) -> u64 {
        self.extents.first().map_or(0, |extent| extent.offset)
    }

    /// Number of bytes.
    pub fn length(&self) -> u64 {
        self.extents.iter().map(|extent| extent.length).sum()
    }
}

/// Number of extents of a layout.
pub fn extent_count(layout: &Layout) -> u64 {
    layout.extents.len() as u64 + layout.pages.iter().map(|page| page.extents).sum::<u64>()
}

/// Whether a layout has so many extents that it is worth a look, when it had `looked` at the last one (0: never).
pub fn is_worth_a_look(layout: &Layout, looked: u64) -> bool {
    let count = extent_count(layout);
    count >= EXTENTS_MIN as u64 && count >= looked.saturating_add(EXTENTS_MIN as u64 / 2)
}

/// What is merged of some extents in order. The last run may be cut off where more extents follow: the rest of it is
/// found by a look that begins at its end.
pub fn merges(extents: &[Extent]) -> Vec<Merge> {
    let mut found = Vec::new();
    let mut rest = extents;
    while !rest.is_empty() {
        let (taken, best) = best_prefix(rest);
        if best >= EXTENTS_MIN {
            found.push(Merge { extents: rest[..best].to_vec() });
            rest = &rest[best..];
        } else {
            // Nothing that begins here pays.
            rest = &rest[taken.max(1)..];
        }
    }
    found
}

/// How far a run that begins with the first extent goes before it no longer pays, and its best prefix.
fn best_prefix(extents: &[Extent]) -> (usize, usize) {
    let (mut score, mut best_score, mut best, mut bytes) = (0i128, 0i128, 0, 0u64);
    for (number, extent) in extents.iter().enumerate() {
        let follows = number == 0 || extents[number - 1].end() == extent.offset;
        bytes = bytes.saturating_add(extent.length);
        score += i128::from(AVERAGE_BYTES) - i128::from(extent.length);
        if !follows || bytes > MERGE_BYTES_MAX || number >= EXTENTS_MAX || score < 0 {
            // An extent that does not follow, or has no room, may begin the next run.
            let passed = if follows && score < 0 { number + 1 } else { number };
            return (passed, best);
        }
        if score > best_score {
            (best_score, best) = (score, number + 1);
        }
    }
    (extents.len(), best)
}

/// What the change of a layout rests on.
#[derive(Clone, Copy, Debug)]
pub struct Relayout<'a> {
    /// The file.
    pub id: InodeId,
    /// Its record.
    pub inode: &'a Inode,
    /// When the record was written.
    pub revision: Revision,
    /// The lock on the file, whoever holds it.
    pub place: &'a Place,
    /// What was put together.
    pub merge: &'a Merge,
    /// The chunk.
    pub receipt: &'a Receipt,
    /// The chunk's grant.
    pub grant: (&'a Grant, Revision),
    /// The chunk's group, without members that do not count.
    pub group: (&'a Group, Revision),
    /// Pages of the layout that were loaded so far.
    pub pages: &'a Pages,
    /// Id of the record for what the file lets go of.
    pub trash_id: u64,
}

/// The plan that swaps a merged chunk in. `None`: the range is no longer what was put together.
///
/// # Errors
/// `NeedPages`; `GRANT_CLOSED`; `MISPLACED` when too few current members hold the chunk; `LIMIT_EXCEEDED`.
pub fn relayout(request: &Relayout<'_>) -> Result<Option<Plan>, Stop> {
    let Relayout { id, inode, merge, receipt, pages, .. } = *request;
    let empty = Layout::default();
    let before = inode.layout.as_ref().unwrap_or(&empty);
    let (start, end) = (merge.offset(), merge.offset() + merge.length());
    let now = layout::extents_in(before, start, end, merge.extents.len() + 1, pages)?;
    if now.extents != merge.extents {
        return Ok(None);
    }
    let chunk = receipt.chunk;
    let (grant, grant_revision) = request.grant;
    if grant.closed {
        return Err(Error::new(Reason::GrantClosed, format!("grant {} is closed", chunk.id.grant)).into());
    }
    if chunk.id.index >= grant.count || grant.group != chunk.group.0 || chunk.length != merge.length() {
        return Err(Error::internal(format!("chunk {} is not what was to be put together", chunk.id)).into());
    }
    let (group, group_revision) = request.group;
    let holding = receipt.holders.iter().filter(|holder| group.seats.contains(&holder.0)).count();
    if holding < commit::min_copies(group) {
        return Err(Error::new(
            Reason::Misplaced,
            format!("{holding} current members of group {} hold chunk {}", chunk.group, chunk.id),
        )
        .into());
    }
    let edit = Edit::Write { offset: start, length: merge.length(), chunk: 0, chunk_offset: 0 };
    let spliced = layout::splice(before, inode.size, &[edit], &[chunk], pages)?;
    if spliced.size != inode.size {
        return Err(Error::internal(format!("merging extents would change the size of inode {id}")).into());
    }
    let mut plan = Plan::new();
    plan.require(Precondition::Unchanged(key::inode(id), Some(request.revision)));
    request.place.require(&mut plan);
    plan.require(Precondition::Unchanged(key::grant(GrantId(chunk.id.grant.0)), Some(grant_revision)));
    plan.require(Precondition::Unchanged(key::group(chunk.group), Some(group_revision)));
    let checksum = inode.checksum.or_else(|| commit::checksum(&spliced.layout, spliced.size));
    let next = Inode {
        layout_version: inode.layout_version + 1,
        layout: Some(spliced.layout),
        checksum,
        ..inode.clone()
    };
    plan.put(key::inode(id), next.to_bytes());
    for (number, page) in &spliced.new_pages {
        plan.put(key::extent_page(id, *number), page.to_bytes());
    }
    if !layout::is_empty(&spliced.trash) {
        let mut trash = spliced.trash;
        trash.inode = id.0;
        plan.put(key::trash(request.trash_id), trash.to_bytes());
    }
    commit::runs(&mut plan, id, &[0], &[chunk], &spliced.live_bytes);
    plan.check()?;
    Ok(Some(plan))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        layout::NewChunk,
        plan::Mutation,
        record::{ChunkRun, Trash},
    };
    use cairn_proto::id::{ChunkId, GroupId, ServerId};
    use proptest::prelude::*;

    const FILE: InodeId = InodeId(9);

    /// Extents one behind the other, each of a chunk of its own; a negative length is a hole.
    fn extents(lengths: &[i64]) -> Vec<Extent> {
        let mut at = 0;
        let mut found = Vec::new();
        for (index, length) in lengths.iter().enumerate() {
            if *length > 0 {
                found.push(Extent {
                    offset: at,
                    length: *length as u64,
                    grant: 5,
                    index: index as u32,
                    group: 7,
                    chunk_length: *length as u64,
                    ..Extent::default()
                });
            }
            at += length.unsigned_abs();
        }
        found
    }

    fn lengths(merges: &[Merge]) -> Vec<(u64, usize)> {
        merges.iter().map(|merge| (merge.offset(), merge.extents.len())).collect()
    }

    #[test]
    fn many_small_extents_become_one_and_few_or_long_ones_stay() {
        let small = vec![4_096; 40];
        assert_eq!(lengths(&merges(&extents(&small))), [(0, 40)]);
        assert_eq!(lengths(&merges(&extents(&small[..EXTENTS_MIN - 1]))), []);
        assert_eq!(lengths(&merges(&extents(&[8 << 20; 100]))), []);
        let mut log = vec![8 << 20, 8 << 20];
        log.extend(&small);
        log.push(8 << 20);
        assert_eq!(lengths(&merges(&extents(&log))), [(16 << 20, 40)], "whole chunks are left alone");
    }

    #[test]
    fn a_hole_or_a_full_chunk_ends_a_run() {
        let mut holed = vec![4_096; 20];
        holed.push(-4_096);
        holed.extend([4_096; 20]);
        assert_eq!(lengths(&merges(&extents(&holed))), [(0, 20), (21 * 4_096, 20)]);
        let long = vec![32 << 10; 600];
        let found = merges(&extents(&long));
        assert_eq!(lengths(&found), [(0, 256), (8 << 20, 256), (16 << 20, 88)]);
    }

    // Between two pushes the file is merged.
    #[allow(clippy::same_item_push)]
    #[test]
    fn a_growing_file_is_moved_few_times() {
        // 4 KiB at a time, looked at after each append.
        let (mut file, mut moved, mut appended) = (Vec::new(), 0, 0);
        for _ in 0..5_000 {
            file.push(4_096);
            appended += 4_096;
            for merge in merges(&extents(&file)) {
                let at = extents(&file).iter().position(|extent| extent.offset == merge.offset()).unwrap();
                moved += merge.length();
                file.splice(at..at + merge.extents.len(), [merge.length() as i64]);
            }
        }
        assert!(moved < 3 * appended, "{moved} bytes moved of {appended}");
        assert!(file.len() < 400, "{} extents are left", file.len());
    }

    fn chunk(length: u64) -> NewChunk {
        NewChunk { id: ChunkId::new(80, 3), group: GroupId(7), length, checksum: 11 }
    }

    fn decide(
        layout: &Layout,
        size: u64,
        merge: &Merge,
        closed: bool,
        holders: &[u64],
    ) -> Result<Option<Plan>> {
        let inode = Inode {
            kind: 1,
            version: 6,
            layout_version: 20,
            size,
            layout: Some(layout.clone()),
            ..Inode::default()
        };
        let grant = Grant { group: 7, count: 8, closed, ..Grant::default() };
        let group =
            Group { replicas: 3, min_copies: 2, seats: vec![1, 2, 0], primary: 1, ..Group::default() };
        let receipt = Receipt {
            chunk: chunk(merge.length()),
            holders: holders.iter().copied().map(ServerId).collect(),
        };
        let place = Place::of_inode(FILE, None);
        let request = Relayout {
            id: FILE,
            inode: &inode,
            revision: Revision(40),
            place: &place,
            merge,
            receipt: &receipt,
            grant: (&grant, Revision(30)),
            group: (&group, Revision(31)),
            pages: &Pages::new(),
            trash_id: 900,
        };
        relayout(&request).map_err(|stop| match stop {
            Stop::Failed(error) => error,
            Stop::NeedPages(pages) => panic!("no pages are there: {pages:?}"),
        })
    }

    fn put<R: Record>(plan: &Plan, key: &crate::plan::Key) -> R {
        let found = plan.mutations.iter().find_map(|mutation| match mutation {
            Mutation::Put(at, value) if at == key => Some(R::from_bytes(value).unwrap()),
            _ => None,
        });
        found.unwrap()
    }

    #[test]
    fn the_layout_changes_and_the_version_does_not() {
        let inline = Layout { extents: extents(&[4_096; 16]), ..Layout::default() };
        let merge = merges(&inline.extents).remove(0);
        let plan = decide(&inline, 16 * 4_096, &merge, false, &[1, 2]).unwrap().unwrap();
        let inode: Inode = put(&plan, &key::inode(FILE));
        assert_eq!((inode.version, inode.layout_version, inode.size), (6, 21, 16 * 4_096));
        assert_eq!(inode.checksum, Some(11), "the file is one whole chunk now");
        let layout = inode.layout.unwrap();
        assert_eq!(layout.extents.len(), 1);
        assert_eq!(layout.extents[0].chunk(), ChunkId::new(80, 3));
        let trash: Trash = put(&plan, &key::trash(900));
        assert_eq!((trash.inode, trash.extents.len()), (FILE.0, 16));
        let run: ChunkRun = put(&plan, &key::chunk_run(ChunkId::new(80, 3)));
        assert_eq!((run.inode, run.chunks[0].live_bytes), (FILE.0, 16 * 4_096));
        for needed in [
            Precondition::Unchanged(key::inode(FILE), Some(Revision(40))),
            Precondition::Unchanged(key::lock(FILE), None),
            Precondition::Unchanged(key::grant(GrantId(80)), Some(Revision(30))),
            Precondition::Unchanged(key::group(GroupId(7)), Some(Revision(31))),
            Precondition::Absent(key::chunk_run(ChunkId::new(80, 3))),
        ] {
            assert!(plan.preconditions.contains(&needed), "{needed:?}");
        }
    }

    #[test]
    fn what_changed_meanwhile_is_given_up() {
        let inline = Layout { extents: extents(&[4_096; 16]), ..Layout::default() };
        let merge = merges(&inline.extents).remove(0);
        let mut other = inline.clone();
        other.extents[7].grant = 6;
        assert_eq!(decide(&other, 16 * 4_096, &merge, false, &[1, 2]).unwrap(), None);
        other.extents.remove(7);
        assert_eq!(decide(&other, 16 * 4_096, &merge, false, &[1, 2]).unwrap(), None, "a hole was punched");
        let reason = |closed, holders: &[u64]| {
            decide(&inline, 16 * 4_096, &merge, closed, holders).unwrap_err().reason
        };
        assert_eq!(reason(true, &[1, 2]), Reason::GrantClosed);
        assert_eq!(reason(false, &[1, 3]), Reason::Misplaced, "server 3 has no seat");
    }

    /// Which chunk, and which byte of it, a file's byte is.
    fn byte(extents: &[Extent], at: u64) -> Option<(ChunkId, u64)> {
        let extent = extents.iter().find(|extent| extent.offset <= at && at < extent.end())?;
        Some((extent.chunk(), extent.chunk_offset + (at - extent.offset)))
    }

    proptest! {
        #[test]
        fn merges_are_runs_of_what_is_there(
            lengths in proptest::collection::vec(prop_oneof![4 => 1i64..9_000, 1 => 1i64..300_000, 1 => -9_000i64..-1], 0..300),
        ) {
            let all = extents(&lengths);
            let mut end = 0;
            for merge in merges(&all) {
                prop_assert!(merge.extents.len() >= EXTENTS_MIN && merge.length() <= MERGE_BYTES_MAX);
                prop_assert!(merge.length() <= AVERAGE_BYTES * merge.extents.len() as u64);
                prop_assert!(merge.offset() >= end, "in order, apart from each other");
                end = merge.offset() + merge.length();
                let at = all.iter().position(|extent| extent.offset == merge.offset()).unwrap();
                prop_assert_eq!(&all[at..at + merge.extents.len()], merge.extents.as_slice());
                prop_assert!(merge.extents.windows(2).all(|pair| pair[0].end() == pair[1].offset));
            }
        }

        #[test]
        fn every_byte_stays_what_it_was(
            lengths in proptest::collection::vec(prop_oneof![6 => 1i64..9_000, 1 => -9_000i64..-1], 16),
        ) {
            let inline = Layout { extents: extents(&lengths), ..Layout::default() };
            let size = lengths.iter().map(|length| length.unsigned_abs()).sum();
            for merge in merges(&inline.extents) {
                let plan = decide(&inline, size, &merge, false, &[1, 2]).unwrap().unwrap();
                let after = put::<Inode>(&plan, &key::inode(FILE)).layout.unwrap().extents;
                for at in (0..size).step_by(977) {
                    let moved = merge.offset() <= at && at < merge.offset() + merge.length();
                    let expected = match moved {
                        true => Some((ChunkId::new(80, 3), at - merge.offset())),
                        false => byte(&inline.extents, at),
                    };
                    prop_assert_eq!(byte(&after, at), expected);
                }
            }
        }
    }
}
