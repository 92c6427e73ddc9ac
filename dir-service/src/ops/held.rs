//! Loads what the rules of names want to see of locks and directories.

use super::{resolve::Found, view::View};
use crate::directory::Directory;
use cairn_core::{
    key,
    lock::Place,
    namespace::{Guard, InodeRead, remove::Children},
    plan::Key,
    record::Lock,
};
use cairn_proto::{
    Result,
    id::{FencingToken, InodeId, Revision, SessionId},
    v1,
};

/// A lock as it was read, with what the caller proves to hold of it.
pub struct Held<'a> {
    place: Place,
    token: Option<FencingToken>,
    expires_in_ms: Box<dyn Fn(SessionId) -> u64 + Send + Sync + 'a>,
}

impl<'a> Held<'a> {
    /// The lock of an inode.
    ///
    /// # Errors
    /// As the store.
    pub async fn of_inode(
        directory: &'a Directory,
        view: &View,
        inode: InodeId,
        token: Option<v1::FencingToken>,
    ) -> Result<Self> {
        let held = read(view, &key::lock(inode)).await?;
        Ok(Self::new(directory, Place::of_inode(inode, held), token))
    }

    /// The lock of a name that does not exist.
    ///
    /// # Errors
    /// As the store.
    pub async fn of_name(
        directory: &'a Directory,
        view: &View,
        parent: InodeId,
        name: &str,
        token: Option<v1::FencingToken>,
    ) -> Result<Self> {
        let held = read(view, &key::reservation(parent, name)).await?;
        Ok(Self::new(directory, Place::of_name(parent, name, held), token))
    }

    fn new(directory: &'a Directory, place: Place, token: Option<v1::FencingToken>) -> Self {
        let expires_in_ms = Box::new(move |session| directory.sessions.expires_in_ms(session));
        Self { place, token: token.map(FencingToken::from), expires_in_ms }
    }

    /// The lock as it was read.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// As the rules take it.
    pub fn guard(&self) -> Guard<'_> {
        Guard { place: &self.place, token: self.token, expires_in_ms: &*self.expires_in_ms }
    }
}

async fn read(view: &View, key: &Key) -> Result<Option<(Lock, Revision)>> {
    Ok(view.record::<Lock>(key).await?.map(|stored| (stored.record, stored.revision)))
}

/// An inode as the rules take it.
pub fn inode_read(found: &Found) -> InodeRead<'_> {
    InodeRead { id: found.id, inode: &found.inode.record, revision: found.inode.revision }
}

/// Whether a directory has entries, and when they last changed. A file has none.
///
/// # Errors
/// As the store.
pub async fn children(view: &View, found: &Found) -> Result<Children> {
    if !found.is_directory() {
        return Ok(Children::default());
    }
    let stamp = view.get(&key::children(found.id)).await?.map(|versioned| versioned.revision);
    let entries = view.scan(&key::dentries(found.id), None, 1).await?;
    let reserved = view.scan(&key::reservations_in(found.id), None, 1).await?;
    Ok(Children { any: !entries.entries.is_empty() || !reserved.entries.is_empty(), stamp })
}

/// The directories from one up to the root.
///
/// # Errors
/// As the store; `INTERNAL` when they do not end at the root.
pub async fn ancestors(view: &View, directory: &Found) -> Result<Vec<InodeId>> {
    let mut chain = vec![directory.id];
    let mut parent = InodeId(directory.inode.record.parent);
    while parent != InodeId(0) {
        if chain.len() > cairn_proto::limits::PATH_DEPTH_MAX + 1 {
            return Err(cairn_proto::Error::limit(
                "the directory is too deep for another one to be moved there",
            ));
        }
        chain.push(parent);
        parent = match super::resolve::inode(view, parent).await? {
            Some(inode) => InodeId(inode.record.parent),
            None => InodeId(0),
        };
    }
    Ok(chain)
}
