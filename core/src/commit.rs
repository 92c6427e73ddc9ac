//! The decision of `Commit`: written chunks become the next version of a file, all or nothing.
//!
//! What must hold, and how a plan proves it still holds when it is applied:
//!
//! | | rule | precondition |
//! | --- | --- | --- |
//! | COMMIT-1 | the token is that of the held exclusive lock; without one nobody holds a lock | lock unchanged |
//! | COMMIT-2 | the file is the one that was read: path, version, etag | entry, tree and inode unchanged |
//! | COMMIT-3 | every receipt's grant is open, so that a collection cannot win as well | grant unchanged |
//! | COMMIT-4 | at least `min_copies` current members of the group hold the chunk durably | group unchanged |
//! | COMMIT-5 | a chunk becomes part of a version once | chunk run absent |
//!
//! **Bound:** one plan holds a commit. Chunks in a row of a grant share a record for each 64 of them, so that 4,096
//! receipts of grants with 256 ids or more fit, whatever the size of the file. A commit that scatters changes over
//! more pages of extents than a plan can take is answered `LIMIT_EXCEEDED`; nothing is changed then.

use crate::{
    attributes::{self, check_condition, next_ctime},
    key::{self, RUN_CHUNKS},
    layout::{self, Edit, NewChunk, Pages, Stop},
    lock::{ExpiresIn, Place},
    namespace::create::enter,
    plan::{PLAN_BYTES_MAX, PLAN_MUTATIONS_MAX, PLAN_PRECONDITIONS_MAX, Plan, Precondition},
    record::{ChunkRun, Grant, Group, Inode, Layout, Record, RunChunk},
};
use cairn_proto::{
    Error, Reason, Result,
    checksum::crc64,
    id::{ChunkId, FencingToken, Generation, GrantId, GroupId, InodeId, Revision, ServerId},
    limits::{COMMIT_EDITS_MAX, COMMIT_RECEIPTS_MAX},
    v1,
};
use std::collections::{BTreeMap, BTreeSet};

mod request;
#[cfg(test)]
mod tests;

pub use request::{edits, receipts};

/// Room in the plan for what is added to it: the answer, the numbering session, the end of a lock's session.
const PLAN_ENTRIES_SPARE: usize = 4;
/// The same in bytes; an answer shows all attributes.
const PLAN_BYTES_SPARE: usize = 96 * 1024;

/// A chunk that is durable, as its primary says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Receipt {
    /// Id, group, length, checksum.
    pub chunk: NewChunk,
    /// Who holds it durably, each once.
    pub holders: BTreeSet<ServerId>,
}

/// Which file.
#[derive(Clone, Copy, Debug)]
pub enum Target<'a> {
    /// One that is there.
    File {
        /// Its id.
        id: InodeId,
        /// Its record.
        inode: &'a Inode,
        /// When the record was written.
        revision: Revision,
        /// The entry it was found by, when it was named by a path: its directory, name, and when it was written.
        entry: Option<(InodeId, &'a str, Revision)>,
    },
    /// One that the commit makes.
    New {
        /// Its id.
        id: InodeId,
        /// The directory it is made in.
        parent: InodeId,
        /// Its name.
        name: &'a str,
        /// Permission bits; 0: 0644.
        mode: u32,
        /// User metadata.
        xattrs: &'a [v1::ExtendedAttribute],
    },
}

/// What the commit rests on.
#[derive(Clone, Copy)]
pub struct Commit<'a> {
    /// The path or inode, for messages.
    pub path: &'a str,
    /// Which file.
    pub target: Target<'a>,
    /// When a directory was last moved, when the file was named by a path.
    pub tree_epoch: Option<Option<Revision>>,
    /// The lock on the file or its name.
    pub place: &'a Place,
    /// The caller's token.
    pub token: Option<FencingToken>,
    /// For messages.
    pub expires_in_ms: ExpiresIn<'a>,
    /// Whether the lock ends with it.
    pub unlock: bool,
    /// The version that the edits were made on; 0: any.
    pub base_version: u64,
    /// What must hold.
    pub condition: Option<&'a v1::Condition>,
    /// The changes, in order.
    pub edits: &'a [Edit],
    /// What they refer to, in the order of the request.
    pub receipts: &'a [Receipt],
    /// The grants of the receipts, as far as they exist.
    pub grants: &'a BTreeMap<GrantId, (Grant, Revision)>,
    /// The groups of the receipts, as far as they exist.
    pub groups: &'a BTreeMap<GroupId, (Group, Revision)>,
    /// Chunks near those of the receipts that are part of a version already.
    pub committed: &'a BTreeSet<ChunkId>,
    /// Pages of the layout that were loaded so far.
    pub pages: &'a Pages,
    /// Id of the record for what the file lets go of.
    pub trash_id: u64,
    /// Last change of content; 0: now.
    pub mtime_ns: u64,
    /// The time of day.
    pub now_ns: u64,
    /// The life of the store.
    pub generation: Generation,
}

/// The decision.
#[derive(Clone, Debug, PartialEq)]
pub struct Committed {
    /// What to apply.
    pub plan: Plan,
    /// The file.
    pub id: InodeId,
    /// Its record afterwards.
    pub inode: Inode,
    /// Positions of the receipts whose chunks are part of the new version.
    pub live: Vec<usize>,
}

/// Decides.
///
/// # Errors
/// As the contract says of `Commit`, save those of paths; `NeedPages` when pages of the layout must be loaded first.
pub fn commit(request: &Commit<'_>) -> Result<Committed, Stop> {
    let (id, before) = match request.target {
        Target::File { id, inode, .. } => (id, Some(inode)),
        Target::New { id, .. } => (id, None),
    };
    if before.is_some_and(|inode| inode.kind != v1::Kind::File as i32) {
        return Err(Error::new(Reason::IsADirectory, format!("{}: is a directory", request.path))
            .at(request.path)
            .into());
    }
    request.place.allows(request.token, request.expires_in_ms).map_err(|error| error.at(request.path))?;
    check_condition(request.condition, request.path, before)?;
    check_base(request, before)?;
    check_receipts(request)?;

    let empty = Layout::default();
    let layout = before.and_then(|inode| inode.layout.as_ref()).unwrap_or(&empty);
    let chunks: Vec<NewChunk> = request.receipts.iter().map(|receipt| receipt.chunk).collect();
    let size = before.map_or(0, |inode| inode.size);
    let spliced =
        layout::splice(layout, size, request.edits, &chunks, request.pages).map_err(|stop| match stop {
            Stop::Failed(error) => Stop::Failed(error.at(request.path)),
            stop => stop,
        })?;

    let mut plan = Plan::new();
    let mut inode = target(&mut plan, request)?;
    lock(&mut plan, request, id)?;
    inode.size = spliced.size;
    inode.checksum = checksum(&spliced.layout, spliced.size);
    inode.layout = Some(spliced.layout);
    inode.mtime_ns = if request.mtime_ns == 0 { request.now_ns } else { request.mtime_ns };
    plan.put(key::inode(id), inode.to_bytes());
    for (number, page) in &spliced.new_pages {
        plan.put(key::extent_page(id, *number), page.to_bytes());
    }
    if !layout::is_empty(&spliced.trash) {
        let mut trash = spliced.trash;
        trash.inode = id.0;
        plan.put(key::trash(request.trash_id), trash.to_bytes());
    }
    for (grant, (_, revision)) in request.grants {
        plan.preconditions.push(Precondition::Unchanged(key::grant(*grant), Some(*revision)));
    }
    for (group, (_, revision)) in request.groups {
        plan.preconditions.push(Precondition::Unchanged(key::group(*group), Some(*revision)));
    }
    let live: Vec<usize> = (0..chunks.len()).filter(|chunk| spliced.live_bytes[*chunk] > 0).collect();
    runs(&mut plan, id, &live, &chunks, &spliced.live_bytes);
    check_bounds(&plan, request.path)?;
    Ok(Committed { plan, id, inode, live })
}

fn check_base(request: &Commit<'_>, before: Option<&Inode>) -> Result<()> {
    let current = before.map_or(0, |inode| inode.version);
    if request.base_version == 0 || request.base_version == current {
        return Ok(());
    }
    let mut error = Error::new(
        Reason::ConditionFailed,
        format!(
            "{}: the edits were made on version {}, but {current} is current",
            request.path, request.base_version
        ),
    )
    .at(request.path);
    error.detail.current_version = current;
    error.detail.current_etag = before.map_or(String::new(), |inode| inode.etag.clone());
    Err(error)
}

/// Grants open, chunks new, used, and held by enough current members.
fn check_receipts(request: &Commit<'_>) -> Result<()> {
    let mut unused: BTreeSet<usize> = (0..request.receipts.len()).collect();
    for edit in request.edits {
        if let Edit::Write { chunk, .. } | Edit::Append { chunk } = edit {
            unused.remove(chunk);
        }
    }
    if let Some(first) = unused.first() {
        return Err(Error::invalid(format!("no edit uses receipt {first}")).at(request.path));
    }
    let mut misplaced = Vec::new();
    for receipt in request.receipts {
        let chunk = receipt.chunk;
        let grant = request.grants.get(&chunk.id.grant).map(|(grant, _)| grant);
        let Some(grant) = grant.filter(|grant| !grant.closed) else {
            return Err(Error::new(
                Reason::GrantClosed,
                format!("grant {} is closed: write the bytes again under a new one", chunk.id.grant),
            )
            .at(request.path));
        };
        if chunk.id.index >= grant.count || GroupId(grant.group) != chunk.group {
            return Err(Error::invalid(format!(
                "grant {} has {} chunks in group {}; the receipt is for chunk {} in group {}",
                chunk.id.grant, grant.count, grant.group, chunk.id, chunk.group
            ))
            .at(request.path));
        }
        if request.committed.contains(&chunk.id) {
            return Err(
                Error::invalid(format!("chunk {} is part of a version already", chunk.id)).at(request.path)
            );
        }
        let Some((group, _)) = request.groups.get(&chunk.group) else {
            return Err(Error::internal(format!("grant {} is in no group", chunk.id.grant)));
        };
        let holding = receipt.holders.iter().filter(|holder| group.seats.contains(&holder.0)).count();
        if holding < min_copies(group) {
            misplaced.push(chunk);
        }
    }
    if misplaced.is_empty() { Ok(()) } else { Err(misplaced_error(request, &misplaced)) }
}

pub(crate) fn min_copies(group: &Group) -> usize {
    // A group that was written without one keeps to the rule of the design.
    let copies = if group.min_copies == 0 { group.replicas / 2 + 1 } else { group.min_copies };
    copies.max(1) as usize
}

fn misplaced_error(request: &Commit<'_>, chunks: &[NewChunk]) -> Error {
    let mut error = Error::new(
        Reason::Misplaced,
        format!(
            "{}: too few current members of their groups hold {} of the chunks: have them fetched and commit again",
            request.path,
            chunks.len()
        ),
    )
    .at(request.path);
    error.detail.chunks = chunks
        .iter()
        .map(|chunk| v1::ChunkRef {
            chunk: Some(chunk.id.into()),
            length: chunk.length,
            checksum: chunk.checksum,
            group_id: chunk.group.0,
        })
        .collect();
    error
}

/// The inode as it will be but for its content, with what the plan needs for that.
fn target(plan: &mut Plan, request: &Commit<'_>) -> Result<Inode> {
    if let Some(epoch) = request.tree_epoch {
        plan.require(Precondition::Unchanged(key::tree_epoch(), epoch));
    }
    match request.target {
        Target::File { id, inode, revision, entry } => {
            plan.require(Precondition::Unchanged(key::inode(id), Some(revision)));
            if let Some((parent, name, written)) = entry {
                plan.require(Precondition::Unchanged(key::dentry(parent, name), Some(written)));
            }
            let version = inode.version + 1;
            Ok(Inode {
                version,
                layout_version: inode.layout_version + 1,
                etag: attributes::etag(request.generation, id, version),
                ctime_ns: next_ctime(inode, request.now_ns),
                ..inode.clone()
            })
        }
        Target::New { id, parent, name, mode, xattrs } => {
            plan.require(Precondition::Absent(key::dentry(parent, name)));
            enter(plan, parent, name, id, v1::Kind::File, request.now_ns);
            let mut inode =
                attributes::new_inode(v1::Kind::File, id, request.generation, mode, request.now_ns);
            attributes::change_xattrs(&mut inode, xattrs)?;
            Ok(inode)
        }
    }
}

/// What becomes of the lock.
fn lock(plan: &mut Plan, request: &Commit<'_>, id: InodeId) -> Result<()> {
    match request.token {
        Some(token) if request.unlock => {
            request.place.release(plan, token)?;
        }
        _ if matches!(request.target, Target::New { .. }) => request.place.move_to(plan, id),
        _ => request.place.require(plan),
    }
    Ok(())
}

/// The checksum of the content, where it is that of one whole chunk, or of nothing.
pub(crate) fn checksum(layout: &Layout, size: u64) -> Option<u64> {
    if size == 0 {
        return Some(crc64(&[]));
    }
    match layout.extents.as_slice() {
        [extent]
            if extent.offset == 0
                && extent.chunk_offset == 0
                && extent.length == size
                && extent.chunk_length == size =>
        {
            Some(extent.chunk_checksum)
        }
        _ => None,
    }
}

/// Records of the chunks that became part of the version: those in a row share one, up to each multiple of
/// [`RUN_CHUNKS`]. Chunks that later edits hid at once are left out: they go with their grant.
pub(crate) fn runs(plan: &mut Plan, inode: InodeId, live: &[usize], chunks: &[NewChunk], live_bytes: &[u64]) {
    let mut order = live.to_vec();
    order.sort_unstable_by_key(|position| chunks[*position].id);
    let in_one_run = |a: &usize, b: &usize| {
        let (a, b) = (chunks[*a].id, chunks[*b].id);
        a.grant == b.grant && a.index + 1 == b.index && !b.index.is_multiple_of(RUN_CHUNKS)
    };
    for run in order.chunk_by(in_one_run) {
        let first = chunks[run[0]];
        let record = ChunkRun {
            inode: inode.0,
            group: first.group.0,
            chunks: run
                .iter()
                .map(|position| RunChunk {
                    length: chunks[*position].length,
                    checksum: chunks[*position].checksum,
                    live_bytes: live_bytes[*position],
                    references: 0,
                })
                .collect(),
        };
        let key = key::chunk_run(first.id);
        plan.preconditions.push(Precondition::Absent(key.clone()));
        plan.mutations.push(crate::plan::Mutation::Put(key, record.to_bytes()));
    }
}

fn check_bounds(plan: &Plan, path: &str) -> Result<()> {
    let entries = plan.mutations.len().max(plan.preconditions.len());
    if plan.mutations.len() + PLAN_ENTRIES_SPARE > PLAN_MUTATIONS_MAX
        || plan.preconditions.len() + PLAN_ENTRIES_SPARE > PLAN_PRECONDITIONS_MAX
        || plan.bytes() + PLAN_BYTES_SPARE > PLAN_BYTES_MAX
    {
        return Err(Error::limit(format!(
            "{path}: the commit changes too much at once ({entries} records, {} bytes of them; {} and {} fit): \
             commit fewer changes at a time, with chunks of larger grants",
            plan.bytes(),
            PLAN_MUTATIONS_MAX - PLAN_ENTRIES_SPARE,
            PLAN_BYTES_MAX - PLAN_BYTES_SPARE,
        ))
        .at(path));
    }
    Ok(())
}
