//! `Commit`: loads what the decision rests on, lets `core` decide, tells the members.

use super::{
    extents::load_pages,
    lock::place_of,
    resolve::{Found, Resolved, existing, resolve, resolve_in},
    session::end_with_lock,
    taken,
    transact::{Operation, transact},
    view::{View, stored},
};
use crate::{cluster::Placed, directory::Directory, store::KeyRange};
use async_trait::async_trait;
use cairn_core::{
    attributes::{attributes, check_mode},
    commit::{self, Commit, Committed, Receipt, Target},
    key::{self, RUN_CHUNKS},
    layout::{Edit, Pages, Stop},
    lock::Place,
    plan::{Key, Plan},
    record::{ChunkRun, Grant, Group, Layout, Record},
};
use cairn_proto::{
    Error, Reason, Result, convert,
    id::{ChunkId, FencingToken, GrantId, GroupId, InodeId, Revision, ServerId, SessionId},
    v1,
};
use parking_lot::Mutex;
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
    time::Duration,
};
use tokio::time::Instant;

/// Rounds of loading pages, more than a tree has levels and neighbours.
const ROUNDS_MAX: u32 = 64;
/// How long a commit waits for members to acknowledge their seats, and how often it looks.
const SEATS_WAIT_MS: u64 = 2_000;
const SEATS_RECHECK_MS: u64 = 20;
/// Chunk runs read at a time.
const RUNS_PAGE: usize = 1_024;

/// Makes written chunks the next version of a file.
///
/// # Errors
/// As the contract says.
pub async fn commit(directory: &Directory, request: v1::CommitRequest) -> Result<v1::CommitResponse> {
    let target = convert::target(&request.path, request.inode)?;
    convert::xattrs(&request.xattrs)?;
    check_mode(request.mode).map_err(|error| error.at(&request.path))?;
    let operation = MakeVersion {
        directory,
        request: &request,
        shown: super::list::shown(&target),
        target,
        edits: commit::edits(&request.edits)?,
        receipts: commit::receipts(&request.receipts)?,
        id: InodeId(directory.ids.next().await?),
        trash_id: directory.ids.next().await?,
        done: Mutex::default(),
        seats_pending: Mutex::default(),
    };
    directory.cluster.pace().await;
    let patience = Instant::now() + Duration::from_millis(SEATS_WAIT_MS);
    let response = loop {
        match transact(&directory.store, request.request_id.as_ref(), &request, &operation).await {
            // The bytes are where they should be, but a member has not said yet that it knows of its seat (a new
            // group, a directory just started). It is about to: better late than sending the client round.
            Err(error)
                if error.reason == Reason::Misplaced
                    && *operation.seats_pending.lock()
                    && Instant::now() < patience =>
            {
                tokio::time::sleep(Duration::from_millis(SEATS_RECHECK_MS)).await;
            }
            outcome => break outcome?,
        }
    };
    // Nothing is there when the answer was an earlier one: its members were told then.
    let done = std::mem::take(&mut *operation.done.lock());
    if let Some(session) = done.ended {
        directory.sessions.begin_end(session);
    }
    if let Some((id, layout)) = done.laid_out {
        let delay = Duration::from_millis(directory.config.effort.merge_delay_ms);
        directory.fragments.note(id, layout.as_ref(), delay);
    }
    let placed: Vec<Placed> =
        done.live.iter().map(|position| placed(&operation.receipts[*position])).collect();
    if !placed.is_empty() {
        directory.cluster.committed(placed);
    }
    Ok(response)
}

fn placed(receipt: &Receipt) -> Placed {
    let chunk = receipt.chunk;
    Placed {
        chunk: v1::ChunkRef {
            chunk: Some(chunk.id.into()),
            length: chunk.length,
            checksum: chunk.checksum,
            group_id: chunk.group.0,
        },
        holders: receipt.holders.iter().copied().collect(),
    }
}

struct MakeVersion<'a> {
    directory: &'a Directory,
    request: &'a v1::CommitRequest,
    target: convert::Target,
    shown: String,
    edits: Vec<Edit>,
    receipts: Vec<Receipt>,
    id: InodeId,
    trash_id: u64,
    /// What the last plan did beside the records.
    done: Mutex<Done>,
    /// Whether the last decision left holders out that have not acknowledged their seats.
    seats_pending: Mutex<bool>,
}

#[derive(Default)]
struct Done {
    live: Vec<usize>,
    ended: Option<SessionId>,
    /// The file, with its new layout.
    laid_out: Option<(InodeId, Option<Layout>)>,
}

/// The file as the view shows it.
struct File {
    found: Option<Found>,
    /// How a path led here, and when a directory was last moved.
    way: Option<(Resolved, Option<Revision>)>,
}

impl File {
    /// As [`Self::name`]; none for a directory, which a commit refuses as such.
    fn name_of_file(&self) -> Result<Option<(InodeId, &str)>> {
        match &self.found {
            Some(found) if found.is_directory() => Ok(None),
            _ => self.name(),
        }
    }

    fn name(&self) -> Result<Option<(InodeId, &str)>> {
        self.way
            .as_ref()
            .map(|(resolved, _)| resolved.name().map(|(parent, name)| (parent.id, name)))
            .transpose()
    }
}

#[async_trait]
impl Operation for MakeVersion<'_> {
    type Response = v1::CommitResponse;

    async fn decide(&self, view: &View) -> Result<(Plan, Self::Response)> {
        *self.done.lock() = Done::default();
        let (file, place) = self.locate(view).await?;
        let name = file.name_of_file()?;
        let grants = self.grants(view).await?;
        let groups = self.groups(view).await?;
        let committed = self.committed(view).await?;
        let token = self.request.token.map(FencingToken::from);
        let target = match (&file.found, name) {
            (Some(found), _) => {
                let entry = file.way.as_ref().and_then(|(resolved, _)| resolved.dentry.as_ref()).zip(name);
                Target::File {
                    id: found.id,
                    inode: &found.inode.record,
                    revision: found.inode.revision,
                    entry: entry.map(|(dentry, (parent, name))| (parent, name, dentry.revision)),
                }
            }
            (None, Some((parent, name))) => Target::New {
                id: self.id,
                parent,
                name,
                mode: self.request.mode,
                xattrs: &self.request.xattrs,
            },
            (None, None) => return Err(Error::internal("a commit needs an inode or a name")),
        };
        let mut pages = Pages::new();
        let expires = |session| self.directory.sessions.expires_in_ms(session);
        let mut rounds = 0;
        let Committed { mut plan, id, inode, live } = loop {
            let decision = commit::commit(&Commit {
                path: &self.shown,
                target,
                tree_epoch: file.way.as_ref().map(|(_, epoch)| *epoch),
                place: &place,
                token,
                expires_in_ms: &expires,
                unlock: self.request.unlock,
                base_version: self.request.base_version,
                condition: self.request.condition.as_ref(),
                edits: &self.edits,
                receipts: &self.receipts,
                grants: &grants,
                groups: &groups,
                committed: &committed,
                pages: &pages,
                trash_id: self.trash_id,
                mtime_ns: self.request.mtime_ns,
                now_ns: self.directory.host.clock.unix_ns(),
                generation: self.directory.generation,
            });
            match decision {
                Ok(committed) => break committed,
                Err(Stop::Failed(error)) => return Err(self.explained(error)),
                Err(Stop::NeedPages(_)) if rounds >= ROUNDS_MAX => {
                    return Err(Error::internal("a layout asks for pages without end").at(&self.shown));
                }
                Err(Stop::NeedPages(numbers)) => {
                    let id = file.found.as_ref().map_or(self.id, |found| found.id);
                    load_pages(view, id, &numbers, &mut pages).await?;
                    rounds += 1;
                }
            }
        };
        let mut ended = None;
        if let Some(session) = token.filter(|_| self.request.unlock).and_then(|token| place.session_of(token))
            && end_with_lock(self.directory, view, &mut plan, session).await?
        {
            ended = Some(session);
        }
        *self.done.lock() = Done { live, ended, laid_out: Some((id, inode.layout.clone())) };
        Ok((plan, v1::CommitResponse { attributes: Some(attributes(id, &inode)), revision: 0 }))
    }
}

impl MakeVersion<'_> {
    /// The file and its lock. A lock that was taken by this path is found also where a directory above it got another
    /// name since: the lock is on the inode or the reservation, not on the path.
    async fn locate(&self, view: &View) -> Result<(File, Place)> {
        let here = match self.file(view).await {
            Ok(file) => {
                let id = file.found.as_ref().map(|found| found.id);
                let place = place_of(view, id, file.name_of_file()?).await?;
                Ok((file, place))
            }
            Err(error) => Err(error),
        };
        let session = self.request.request_id.as_ref().map_or(0, |id| id.session_id);
        let (convert::Target::Path(path), Some(token)) = (&self.target, self.request.token) else {
            return here;
        };
        let token = FencingToken::from(token);
        let elsewhere = match &here {
            Ok((_, place)) => place.session_of(token).is_none(),
            Err(error) => matches!(error.reason, Reason::NotFound | Reason::NotADirectory),
        };
        if !elsewhere || session == 0 {
            return here;
        }
        let taken = taken::by_token(view, &path.to_string(), token, Some(SessionId(session))).await?;
        let Some(place) = taken else { return here };
        let file = match key::split_name(place.key()) {
            Some((parent, _)) => {
                let resolved = resolve_in(view, parent, path).await?;
                let epoch = view.get(&key::tree_epoch()).await?.map(|versioned| versioned.revision);
                File { found: resolved.found.clone(), way: Some((resolved, epoch)) }
            }
            None => {
                let target = convert::Target::Inode(place.inode());
                File { found: Some(existing(view, &target).await?), way: None }
            }
        };
        Ok((file, place))
    }

    async fn file(&self, view: &View) -> Result<File> {
        match &self.target {
            convert::Target::Inode(_) => {
                Ok(File { found: Some(existing(view, &self.target).await?), way: None })
            }
            convert::Target::Path(path) => {
                let resolved = resolve(view, path).await?;
                let epoch = view.get(&key::tree_epoch()).await?.map(|versioned| versioned.revision);
                Ok(File { found: resolved.found.clone(), way: Some((resolved, epoch)) })
            }
        }
    }

    async fn grants(&self, view: &View) -> Result<BTreeMap<GrantId, (Grant, Revision)>> {
        let ids: BTreeSet<GrantId> = self.receipts.iter().map(|receipt| receipt.chunk.id.grant).collect();
        load(view, &ids, |id| key::grant(*id)).await
    }

    /// The groups as they count: a member that has not durably acknowledged its seat could still follow an older
    /// order to remove what it holds, so its seat is left empty here.
    async fn groups(&self, view: &View) -> Result<BTreeMap<GroupId, (Group, Revision)>> {
        let ids: BTreeSet<GroupId> = self.receipts.iter().map(|receipt| receipt.chunk.group).collect();
        let mut groups: BTreeMap<GroupId, (Group, Revision)> = load(view, &ids, |id| key::group(*id)).await?;
        self.directory.cluster.know(&ids.iter().map(|id| id.0).collect()).await?;
        let mut pending = false;
        for (id, (group, read)) in &mut groups {
            for seat in group.seats.iter_mut().filter(|seat| **seat != 0) {
                if !self.directory.cluster.counts(*id, *read, ServerId(*seat)) {
                    pending |= self.receipts.iter().any(|receipt| receipt.holders.contains(&ServerId(*seat)));
                    *seat = 0;
                }
            }
        }
        *self.seats_pending.lock() = pending;
        Ok(groups)
    }

    /// Chunks that are part of a version already, among those that could share a run with the receipts'.
    async fn committed(&self, view: &View) -> Result<BTreeSet<ChunkId>> {
        let windows: BTreeSet<(u64, u32)> = self
            .receipts
            .iter()
            .map(|receipt| (receipt.chunk.id.grant.0, receipt.chunk.id.index / RUN_CHUNKS))
            .collect();
        let mut committed = BTreeSet::new();
        let windows: Vec<(u64, u32)> = windows.into_iter().collect();
        for row in windows.chunk_by(|a, b| a.0 == b.0 && a.1 + 1 == b.1) {
            let (grant, first) = row[0];
            let behind = (first + row.len() as u32) * RUN_CHUNKS;
            let mut range = KeyRange {
                start: Bound::Included(key::chunk_run(ChunkId::new(grant, first * RUN_CHUNKS))),
                end: Bound::Excluded(key::chunk_run(ChunkId::new(grant, behind))),
            };
            loop {
                let page = view.scan_range(range.clone(), RUNS_PAGE).await?;
                for (key, versioned) in &page.entries {
                    let Some(first) = key::last_chunk(key) else { continue };
                    let run = ChunkRun::from_bytes(&versioned.value)?;
                    committed.extend(
                        (first.index..).take(run.chunks.len()).map(|index| ChunkId::new(grant, index)),
                    );
                }
                match page.entries.last() {
                    Some((last, _)) if page.more => range = range.behind(last.clone()),
                    _ => break,
                }
            }
        }
        Ok(committed)
    }

    /// Adds to an error what only this directory knows: the groups as they are, and their servers.
    fn explained(&self, mut error: Error) -> Error {
        if error.reason == Reason::Misplaced {
            let groups: BTreeSet<u64> = error.detail.chunks.iter().map(|chunk| chunk.group_id).collect();
            error.detail.groups =
                groups.into_iter().filter_map(|group| self.directory.cluster.group(GroupId(group))).collect();
            error.detail.servers = self.directory.cluster.members(&error.detail.groups);
        }
        error
    }
}

async fn load<I: Copy + Ord, R: Record>(
    view: &View,
    ids: &BTreeSet<I>,
    key: impl Fn(&I) -> Key,
) -> Result<BTreeMap<I, (R, Revision)>> {
    let keys: Vec<Key> = ids.iter().map(key).collect();
    let mut loaded = BTreeMap::new();
    if keys.is_empty() {
        return Ok(loaded);
    }
    for (id, value) in ids.iter().zip(view.get_many(&keys).await?) {
        if let Some(versioned) = value {
            let read = stored::<R>(&versioned)?;
            loaded.insert(*id, (read.record, read.revision));
        }
    }
    Ok(loaded)
}
