//! `Watch`: changes below a directory or of a file, in order of revisions.

use super::{resolve::resolve, view::View};
use crate::{
    directory::Directory,
    store::{Change, Changes},
};
use cairn_core::{
    attributes::attributes,
    key,
    plan::{Key, Mutation},
    record::{Dentry, Inode, Record},
};
use cairn_proto::{
    Error, Result,
    id::{InodeId, Revision},
    path::FilePath,
    v1,
};
use futures::{StreamExt, stream::BoxStream};
use std::collections::HashMap;

/// Entries of a watched directory whose content is watched too.
const CHILDREN_MAX: usize = 1_000_000;
/// Entries of one page when the children are gathered.
const PAGE: usize = 4_096;

/// A stream of changes.
pub type Watched = BoxStream<'static, Result<v1::WatchResponse>>;

/// Watches a path.
///
/// # Errors
/// `NOT_FOUND`, `REVISION_COMPACTED`, `LIMIT_EXCEEDED` for a directory with too many entries.
pub async fn watch(directory: &Directory, request: v1::WatchRequest) -> Result<Watched> {
    let path = FilePath::parse(&request.path)?;
    let view = View::new(directory.store.clone());
    let found = resolve(&view, &path).await?.existing()?.clone();
    let mut names: HashMap<InodeId, String> = HashMap::new();
    if found.is_directory() {
        let mut after: Option<Key> = None;
        loop {
            let page = view.scan(&key::dentries(found.id), after.as_ref(), PAGE).await?;
            for (entry, versioned) in &page.entries {
                let Some((_, name)) = key::split_name(entry) else { continue };
                names.insert(InodeId(Dentry::from_bytes(&versioned.value)?.inode), name.to_owned());
            }
            if names.len() > CHILDREN_MAX {
                return Err(Error::limit(format!("{path}: has more than {CHILDREN_MAX} entries to watch"))
                    .at(request.path));
            }
            after = page.entries.last().map(|(entry, _)| entry.clone());
            if !page.more {
                break;
            }
        }
    }
    let now = view.revision().unwrap_or_default();
    let from = match request.from_revision {
        0 => Revision(now.0 + 1),
        revision => Revision(revision),
    };
    // Names and inodes share the volume's prefix, so one stream keeps their order.
    let volume = Key::copy_from_slice(&key::VOLUME.to_be_bytes());
    let changes: Changes = directory.store.watch(volume, from).await?;
    let watcher = Watcher { top: found.id, names };
    Ok(changes
        .scan(watcher, |watcher, change| {
            let events = match change {
                Ok(change) => watcher.events(&change).unwrap_or_else(|error| vec![Err(error)]),
                Err(error) => vec![Err(error)],
            };
            futures::future::ready(Some(futures::stream::iter(events)))
        })
        .flatten()
        .boxed())
}

struct Watcher {
    top: InodeId,
    names: HashMap<InodeId, String>,
}

impl Watcher {
    fn events(&mut self, change: &Change) -> Result<Vec<Result<v1::WatchResponse>>> {
        let mut events = Vec::new();
        let mut event = |kind: v1::ChangeKind, name: &str, inode: InodeId, shown: Option<v1::Attributes>| {
            events.push(Ok(v1::WatchResponse {
                revision: change.revision.0,
                kind: kind as i32,
                name: name.to_owned(),
                inode: inode.0,
                attributes: shown,
            }));
        };
        let mut inodes: HashMap<InodeId, v1::Attributes> = HashMap::new();
        let (dentry_prefix, inode_prefix) = (key::dentries(self.top), key::inodes());
        for mutation in &change.mutations {
            if let Mutation::Put(at, value) = mutation
                && at.starts_with(&inode_prefix)
                && let Some(id) = key::last_u64(at)
            {
                inodes.insert(InodeId(id), attributes(InodeId(id), &Inode::from_bytes(value)?));
            }
        }
        // Removals first: a rename within the directory then reads "gone here, there now".
        for mutation in &change.mutations {
            if let Mutation::Delete(at) = mutation
                && at.starts_with(&dentry_prefix)
                && let Some((_, name)) = key::split_name(at)
            {
                let inode = self.names.iter().find(|(_, known)| *known == name).map(|(id, _)| *id);
                if let Some(inode) = inode {
                    self.names.remove(&inode);
                }
                event(v1::ChangeKind::Removed, name, inode.unwrap_or_default(), None);
            }
        }
        for mutation in &change.mutations {
            if let Mutation::Put(at, value) = mutation
                && at.starts_with(&dentry_prefix)
                && let Some((_, name)) = key::split_name(at)
            {
                let id = InodeId(Dentry::from_bytes(value)?.inode);
                if self.names.len() < CHILDREN_MAX {
                    self.names.insert(id, name.to_owned());
                }
                event(v1::ChangeKind::Created, name, id, inodes.remove(&id));
            }
        }
        for (id, shown) in inodes {
            if let Some(name) = self.names.get(&id) {
                event(v1::ChangeKind::Changed, name, id, Some(shown));
            } else if id == self.top {
                event(v1::ChangeKind::Changed, "", id, Some(shown));
            }
        }
        for mutation in &change.mutations {
            if let Mutation::Delete(at) = mutation
                && *at == key::inode(self.top)
            {
                event(v1::ChangeKind::Removed, "", self.top, None);
            }
        }
        Ok(events)
    }
}
