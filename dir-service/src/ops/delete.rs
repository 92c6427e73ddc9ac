//! `Delete`: a file, an empty directory, or a bounded step of a whole tree.
//!
//! A tree is removed in post-order, a bounded number of entries a call, in plans of a few entries each. Every plan is
//! valid alone, so a tree half removed is an ordinary smaller tree, whoever stopped. Locked files stay with all their
//! ancestors and are reported; the page token leads the next call past them. Every plan of a call requires that the call
//! was not answered yet and that its session lives: one that comes again, or late, removes nothing that was made since.

use super::{
    held::{Held, children, inode_read},
    resolve::{Found, not_found, resolve},
    transact::{Begun, Operation, begin, finish, transact},
    view::{Stored, View},
};
use crate::{directory::Directory, store::CommitError};
use async_trait::async_trait;
use cairn_core::{
    attributes::check_condition,
    key,
    lock::Place,
    namespace::remove::{Children, Remove, remove},
    plan::{Mutation, Plan, Precondition},
    record::{Dentry, Inode, Lock, Record},
};
use cairn_proto::{
    Error, Reason, Result,
    id::{FencingToken, InodeId, Revision},
    path::FilePath,
    v1,
};
use prost::Message;
use std::collections::VecDeque;

/// Entries that one call of a recursive delete works on.
const STEP_ENTRIES_MAX: usize = 1_024;
/// Entries looked at, and mostly removed, by one plan of it.
const PLAN_ENTRIES_MAX: usize = 24;
/// Locked files that one answer reports.
const KEPT_MAX: usize = 256;
/// Bytes of them at which it reports no more: the answer is kept in a plan.
const KEPT_BYTES_MAX: usize = 256 * 1024;

struct DeleteName<'a> {
    directory: &'a Directory,
    request: &'a v1::DeleteRequest,
    path: FilePath,
    trash_id: u64,
    /// Removed below it in this call.
    removed_before: u64,
}

/// Removes a name.
///
/// # Errors
/// As the contract says.
pub async fn delete(directory: &Directory, request: v1::DeleteRequest) -> Result<v1::DeleteResponse> {
    let path = FilePath::parse(&request.path)?;
    if path.is_root() && !request.recursive {
        return Err(Error::invalid("the root directory cannot be removed").at("/"));
    }
    if request.recursive {
        return delete_tree(directory, &request, path).await;
    }
    let trash_id = directory.ids.next().await?;
    directory.cluster.pace().await;
    let operation = DeleteName { directory, request: &request, path, trash_id, removed_before: 0 };
    transact(&directory.store, request.request_id.as_ref(), &request, &operation).await
}

#[async_trait]
impl Operation for DeleteName<'_> {
    type Response = v1::DeleteResponse;

    async fn decide(&self, view: &View) -> Result<(Plan, Self::Response)> {
        let path = self.path.to_string();
        let resolved = resolve(view, &self.path).await?;
        let found = resolved.existing()?;
        let dentry = resolved.dentry.as_ref().ok_or_else(|| not_found(&self.path))?;
        check_condition(self.request.condition.as_ref(), &path, Some(&found.inode.record))?;
        let (parent, name) = resolved.name()?;
        let held = Held::of_inode(self.directory, view, found.id, self.request.token).await?;
        let mut plan = remove(&Remove {
            path: &path,
            parent: parent.id,
            name,
            dentry_revision: dentry.revision,
            target: inode_read(found),
            lock: held.guard(),
            children: children(view, found).await?,
            trash_id: self.trash_id,
            now_ns: self.directory.host.clock.unix_ns(),
        })?;
        resolved.require_way(view, &mut plan).await?;
        Ok((plan, v1::DeleteResponse { removed: self.removed_before + 1, ..Default::default() }))
    }
}

/// One call of a recursive delete.
async fn delete_tree(
    directory: &Directory,
    request: &v1::DeleteRequest,
    path: FilePath,
) -> Result<v1::DeleteResponse> {
    let (store, request_id) = (&directory.store, request.request_id.as_ref());
    let open = match begin(store, request_id, request).await? {
        Begun::Answered(response) => return Ok(response),
        Begun::Open(open) => open,
    };
    let removed = remove_tree(directory, request, path, open).await;
    if removed.as_ref().is_err_and(|error| error.reason == Reason::Conflict)
        && let Begun::Answered(response) = begin(store, request_id, request).await?
    {
        // The same call by another connection was faster.
        return Ok(response);
    }
    removed
}

async fn remove_tree(
    directory: &Directory,
    request: &v1::DeleteRequest,
    path: FilePath,
    open: Vec<Precondition>,
) -> Result<v1::DeleteResponse> {
    let (store, request_id) = (&directory.store, request.request_id.as_ref());
    let view = View::new(directory.store.clone());
    let resolved = resolve(&view, &path).await?;
    let top = resolved.existing()?.clone();
    check_condition(request.condition.as_ref(), &path.to_string(), Some(&top.inode.record))?;
    let mut walk = Walk {
        directory,
        open,
        token: request.token.map(FencingToken::from),
        budget: STEP_ENTRIES_MAX,
        removed: 0,
        kept: Vec::new(),
        cursor: Vec::new(),
    };
    if top.is_directory() {
        let resume: Vec<&str> = request.page_token.split('/').filter(|name| !name.is_empty()).collect();
        let done = walk.empty(&top, &path, &resume).await?;
        if !done {
            let response = v1::DeleteResponse {
                revision: 0,
                removed: walk.removed,
                more: true,
                next_page_token: walk.cursor.join("/"),
                kept: walk.kept,
            };
            return finish(store, request_id, request, response).await;
        }
    }
    walk.keep_reserved(&top, &path).await?;
    if !walk.kept.is_empty() || path.is_root() {
        let response = v1::DeleteResponse { removed: walk.removed, kept: walk.kept, ..Default::default() };
        return finish(store, request_id, request, response).await;
    }
    let trash_id = directory.ids.next().await?;
    let shown = path.to_string();
    let operation = DeleteName { directory, request, path, trash_id, removed_before: walk.removed };
    transact(store, request_id, request, &operation).await.map_err(|mut error| {
        if error.reason == Reason::NotEmpty {
            // Told by the call before, or made since: only the caller knows which.
            error.detail.message =
                format!("{shown}: some entries were kept, or made meanwhile: delete it again");
        }
        error
    })
}

/// A walk in post-order.
struct Walk<'a> {
    directory: &'a Directory,
    /// What every plan requires: that the call was not answered yet.
    open: Vec<Precondition>,
    token: Option<FencingToken>,
    budget: usize,
    removed: u64,
    kept: Vec<v1::LockInfo>,
    /// Where the walk stands, as names below its top.
    cursor: Vec<String>,
}

/// An entry with what it leads to.
struct Child {
    name: String,
    dentry: Stored<Dentry>,
    found: Found,
}

/// A directory on the way from the top to where a walk stands.
struct Level {
    /// Its own entry; none for the top.
    entry: Option<Child>,
    directory: Found,
    path: FilePath,
    /// Entries that were read and not looked at.
    waiting: VecDeque<Child>,
    /// Files, and directories whose turn is over: to be removed together.
    finished: Vec<Child>,
    /// The last entry that was read.
    after: Option<String>,
    /// Whether that one is to be read again: a call before stopped in it.
    inclusive: bool,
    /// Names below to go on at.
    resume: Vec<String>,
}

impl Level {
    fn new(entry: Option<Child>, directory: Found, path: FilePath, resume: Vec<String>) -> Self {
        Self {
            entry,
            directory,
            path,
            waiting: VecDeque::new(),
            finished: Vec::new(),
            after: resume.first().cloned(),
            inclusive: true,
            resume,
        }
    }

    /// Where to go on below one of its entries.
    fn resume_below(&self, name: &str) -> Vec<String> {
        match self.resume.split_first() {
            Some((first, rest)) if first == name => rest.to_vec(),
            _ => Vec::new(),
        }
    }
}

impl Walk<'_> {
    /// Removes all that can be from a directory, which itself stays. `resume` are names below it to go on at.
    /// Answers whether the end was reached.
    ///
    /// The way down is a list and not the call stack: how deep a tree is, is up to whoever made it.
    async fn empty(&mut self, top: &Found, path: &FilePath, resume: &[&str]) -> Result<bool> {
        let resume = resume.iter().map(|name| (*name).to_owned()).collect();
        let mut way = vec![Level::new(None, top.clone(), path.clone(), resume)];
        while let Some(level) = way.last_mut() {
            let Some(child) = level.waiting.pop_front() else {
                let batch = std::mem::take(&mut level.finished);
                self.remove_batch(&level.directory, &level.path, batch).await?;
                let children =
                    self.next_children(&level.directory, level.after.as_deref(), level.inclusive).await?;
                level.inclusive = false;
                if let Some(last) = children.last() {
                    level.after = Some(last.name.clone());
                    level.waiting = children.into();
                    continue;
                }
                // Emptied as far as can be: now it is the turn of the directory itself.
                let emptied = way.pop().and_then(|level| level.entry);
                if let (Some(entry), Some(above)) = (emptied, way.last_mut()) {
                    above.finished.push(entry);
                }
                continue;
            };
            if self.budget == 0 || !self.has_room() {
                let names = way.iter().filter_map(|level| Some(level.entry.as_ref()?.name.clone()));
                self.cursor = names.chain([child.name]).collect();
                for level in way.into_iter().rev() {
                    self.remove_batch(&level.directory, &level.path, level.finished).await?;
                }
                return Ok(false);
            }
            self.budget -= 1;
            if child.found.is_directory() {
                let resume = level.resume_below(&child.name);
                let (directory, below) = (child.found.clone(), level.path.join(&child.name)?);
                way.push(Level::new(Some(child), directory, below, resume));
            } else {
                level.finished.push(child);
            }
        }
        Ok(true)
    }

    async fn next_children(&self, top: &Found, after: Option<&str>, inclusive: bool) -> Result<Vec<Child>> {
        let view = View::new(self.directory.store.clone());
        let prefix = key::dentries(top.id);
        let page = match after {
            Some(name) if inclusive => {
                let range = crate::store::KeyRange {
                    start: std::ops::Bound::Included(key::dentry(top.id, name)),
                    end: key::prefix_end(&prefix)
                        .map_or(std::ops::Bound::Unbounded, std::ops::Bound::Excluded),
                };
                view.scan_range(range, PLAN_ENTRIES_MAX).await?
            }
            after => {
                let after = after.map(|name| key::dentry(top.id, name));
                view.scan(&prefix, after.as_ref(), PLAN_ENTRIES_MAX).await?
            }
        };
        let mut children = Vec::with_capacity(page.entries.len());
        for (entry_key, versioned) in page.entries {
            let Some((_, name)) = key::split_name(&entry_key) else { continue };
            let dentry =
                Stored { record: Dentry::from_bytes(&versioned.value)?, revision: versioned.revision };
            let id = InodeId(dentry.record.inode);
            if let Some(inode) = view.record::<Inode>(&key::inode(id)).await? {
                children.push(Child { name: name.to_owned(), dentry, found: Found { id, inode } });
            }
        }
        Ok(children)
    }

    /// Removes files and emptied directories in one plan where nothing stands in the way, else one by one.
    async fn remove_batch(&mut self, top: &Found, path: &FilePath, batch: Vec<Child>) -> Result<()> {
        if batch.is_empty() {
            return Ok(());
        }
        self.directory.cluster.pace().await;
        let mut together = Plan::new();
        let mut count = 0;
        let view = View::new(self.directory.store.clone());
        for child in &batch {
            match self.removal(&view, top, path, child).await {
                Ok(plan) => {
                    count += 1;
                    merge(&mut together, plan);
                }
                Err(error) => self.keep(error, path, child).await?,
            }
        }
        if count == 0 {
            return Ok(());
        }
        match self.commit(together).await {
            Ok(_) => {
                self.removed += count;
                return Ok(());
            }
            Err(CommitError::Conflict) => {}
            Err(CommitError::Unknown(error) | CommitError::Refused(error)) => return Err(error),
        }
        // Somebody is at one of them: each by itself, so that only that one waits.
        for child in &batch {
            self.remove_one(top, path, child).await?;
        }
        Ok(())
    }

    async fn remove_one(&mut self, top: &Found, path: &FilePath, child: &Child) -> Result<()> {
        for _ in 0..16 {
            let view = View::new(self.directory.store.clone());
            let dentry: Option<Stored<Dentry>> = view.record(&key::dentry(top.id, &child.name)).await?;
            let Some(dentry) = dentry.filter(|dentry| dentry.record.inode == child.found.id.0) else {
                return Ok(());
            };
            let Some(inode) = view.record::<Inode>(&key::inode(child.found.id)).await? else { return Ok(()) };
            let child =
                Child { name: child.name.clone(), dentry, found: Found { id: child.found.id, inode } };
            let plan = match self.removal(&view, top, path, &child).await {
                Ok(plan) => plan,
                Err(error) => return self.keep(error, path, &child).await,
            };
            match self.commit(plan).await {
                Ok(_) => {
                    self.removed += 1;
                    return Ok(());
                }
                Err(CommitError::Conflict) => {}
                Err(CommitError::Unknown(error) | CommitError::Refused(error)) => return Err(error),
            }
        }
        Err(Error::new(Reason::Conflict, format!("{path}/{}: changed all the time: try again", child.name)))
    }

    async fn commit(&self, mut plan: Plan) -> Result<Revision, CommitError> {
        for precondition in &self.open {
            plan.require(precondition.clone());
        }
        self.directory.store.commit(plan).await
    }

    /// Whether the answer has room for more locked files.
    fn has_room(&self) -> bool {
        let bytes: usize = self.kept.iter().map(Message::encoded_len).sum();
        self.kept.len() < KEPT_MAX && bytes < KEPT_BYTES_MAX
    }

    async fn removal(&self, view: &View, top: &Found, path: &FilePath, child: &Child) -> Result<Plan> {
        let path = path.join(&child.name)?.to_string();
        let held = Held::of_inode(self.directory, view, child.found.id, self.token.map(Into::into)).await?;
        let children = if child.found.is_directory() {
            children(view, &child.found).await?
        } else {
            Children::default()
        };
        let mut guard = held.guard();
        // The token proves the lock of one of the files; it says nothing about the others.
        if guard.check(&path).is_err() {
            guard.token = None;
        }
        remove(&Remove {
            path: &path,
            parent: top.id,
            name: &child.name,
            dentry_revision: child.dentry.revision,
            target: inode_read(&child.found),
            lock: guard,
            children,
            trash_id: self.directory.ids.next().await?,
            now_ns: self.directory.host.clock.unix_ns(),
        })
    }

    /// Notes why something stays; any other error ends the call.
    async fn keep(&mut self, error: Error, path: &FilePath, child: &Child) -> Result<()> {
        let path = path.join(&child.name)?;
        match error.reason {
            Reason::LockHeld => {
                // The lock knows the path it was taken by; where it is now, only this walk knows.
                let lock = error.detail.lock.clone();
                self.kept.extend(lock.map(|lock| v1::LockInfo { path: path.to_string(), ..lock }));
                Ok(())
            }
            // Something in it is kept, reserved, or was made meanwhile.
            Reason::NotEmpty => self.keep_reserved(&child.found, &path).await,
            _ => Err(error),
        }
    }

    /// Notes the names in a directory that do not exist and are locked: they keep it.
    async fn keep_reserved(&mut self, directory: &Found, path: &FilePath) -> Result<()> {
        if !directory.is_directory() {
            return Ok(());
        }
        let view = View::new(self.directory.store.clone());
        let room = KEPT_MAX.saturating_sub(self.kept.len()).max(1);
        let page = view.scan(&key::reservations_in(directory.id), None, room).await?;
        for (entry, versioned) in &page.entries {
            let Some((_, name)) = key::split_name(entry) else { continue };
            let path = path.join(name)?.to_string();
            let held = (Lock::from_bytes(&versioned.value)?, versioned.revision);
            let expires = |session| self.directory.sessions.expires_in_ms(session);
            let infos = Place::of_key(entry, Some(held)).map_or(Vec::new(), |place| place.infos(&expires));
            if !self.kept.is_empty() && !self.has_room() {
                break;
            }
            self.kept.extend(infos.into_iter().map(|lock| v1::LockInfo {
                path: path.clone(),
                // The token proves the lock: it is not shown to those who are declined.
                token: None,
                ..lock
            }));
        }
        Ok(())
    }
}

/// Adds a plan of another name of the same directory.
fn merge(together: &mut Plan, plan: Plan) {
    for precondition in plan.preconditions {
        together.require(precondition);
    }
    for mutation in plan.mutations {
        match mutation {
            Mutation::Put(key, value) => together.put(key, value),
            Mutation::Delete(key) => together.delete(key),
        };
    }
}
