//! From a path to the records it leads to, within one view.

use super::view::{Stored, View};
use cairn_core::{
    key,
    plan::{Plan, Precondition},
    record::{Dentry, Inode},
};
use cairn_proto::{
    Error, Reason, Result,
    convert::Target,
    id::{InodeId, ROOT_INODE, Revision},
    path::FilePath,
    v1,
};

/// Entries on a path's way that a plan requires one by one. Behind a longer way stands the tree's epoch, which every
/// renamed directory changes: exact too, and in the way of others.
const WAY_ENTRIES_MAX: usize = 24;

/// An inode with its id.
#[derive(Clone, Debug)]
pub struct Found {
    /// The id.
    pub id: InodeId,
    /// The record.
    pub inode: Stored<Inode>,
}

impl Found {
    /// Whether it is a directory.
    pub fn is_directory(&self) -> bool {
        self.inode.record.kind == v1::Kind::Directory as i32
    }
}

/// A path's last name, the directory it stands in, and what it leads to.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// The path as it was asked for.
    pub path: FilePath,
    /// The directory of the last name. `None` for the root.
    pub parent: Option<Found>,
    /// The entry, if the name exists.
    pub dentry: Option<Stored<Dentry>>,
    /// What the entry leads to, if the name exists.
    pub found: Option<Found>,
    /// Replication factor set on the nearest ancestor (or the inode itself) that has one; 0: the cluster's.
    pub replication: u32,
    /// The entries of the path's other names, in order: the directory that holds one, and when it was written.
    way: Vec<(InodeId, Revision)>,
}

impl Resolved {
    /// The parent and last name.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` for the root, which has neither.
    pub fn name(&self) -> Result<(&Found, &str)> {
        match (&self.parent, self.path.file_name()) {
            (Some(parent), Some(name)) => Ok((parent, name.as_str())),
            _ => Err(Error::invalid("the root directory cannot be made, moved or removed").at("/")),
        }
    }

    /// Requires that the path's directories still lead to where its last name stands. Without it a change that was
    /// decided before a directory on the way was renamed would be made to what has another path by then. The last
    /// name itself is the caller's to require.
    ///
    /// # Errors
    /// As the store.
    pub async fn require_way(&self, view: &View, plan: &mut Plan) -> Result<()> {
        if self.way.len() > WAY_ENTRIES_MAX {
            let epoch = view.get(&key::tree_epoch()).await?.map(|versioned| versioned.revision);
            plan.require(Precondition::Unchanged(key::tree_epoch(), epoch));
            return Ok(());
        }
        for ((directory, written), name) in self.way.iter().zip(self.path.names()) {
            plan.require(Precondition::Unchanged(key::dentry(*directory, name.as_str()), Some(*written)));
        }
        Ok(())
    }

    /// What the path leads to.
    ///
    /// # Errors
    /// `NOT_FOUND` naming the path.
    pub fn existing(&self) -> Result<&Found> {
        self.found.as_ref().ok_or_else(|| not_found(&self.path))
    }
}

/// `NOT_FOUND` of a path.
pub fn not_found(path: &FilePath) -> Error {
    Error::not_found(format!("{path}: no such file or directory")).at(path.to_string())
}

/// Walks a path from the root. The last name may be missing, every other must be there.
///
/// # Errors
/// `NOT_FOUND` for a missing ancestor, `NOT_A_DIRECTORY` for one that is a file, each naming it.
pub async fn resolve(view: &View, path: &FilePath) -> Result<Resolved> {
    let root =
        inode(view, ROOT_INODE).await?.ok_or_else(|| Error::internal("the root directory has no record"))?;
    let mut here = Found { id: ROOT_INODE, inode: root };
    let mut replication = here.inode.record.replication;
    let Some((last, ancestors)) = path.names().split_last() else {
        return Ok(Resolved {
            path: path.clone(),
            parent: None,
            dentry: None,
            found: Some(here),
            replication,
            way: Vec::new(),
        });
    };
    let mut walked = FilePath::root();
    let mut way = Vec::with_capacity(ancestors.len());
    for name in ancestors {
        require_directory(&here, &walked)?;
        walked = walked.join(name.as_str())?;
        let (dentry, found) = step(view, &here, name.as_str()).await?.ok_or_else(|| not_found(&walked))?;
        way.push((here.id, dentry.revision));
        here = found;
        if here.inode.record.replication != 0 {
            replication = here.inode.record.replication;
        }
    }
    require_directory(&here, &walked)?;
    let (dentry, found) = step(view, &here, last.as_str()).await?.unzip();
    if let Some(found) = found.as_ref().filter(|found| found.inode.record.replication != 0) {
        replication = found.inode.record.replication;
    }
    Ok(Resolved { path: path.clone(), parent: Some(here), dentry, found, replication, way })
}

/// What a path's last name leads to in a directory that is known by its id, wherever the path leads now.
///
/// # Errors
/// `NOT_FOUND` when the directory is gone.
pub async fn resolve_in(view: &View, parent: InodeId, path: &FilePath) -> Result<Resolved> {
    let record = inode(view, parent).await?.ok_or_else(|| not_found(path))?;
    let parent = Found { id: parent, inode: record };
    let name = path.file_name().ok_or_else(|| not_found(path))?;
    let (dentry, found) = step(view, &parent, name.as_str()).await?.unzip();
    let of_found = found.as_ref().map_or(0, |found| found.inode.record.replication);
    let replication = if of_found == 0 { parent.inode.record.replication } else { of_found };
    Ok(Resolved { path: path.clone(), parent: Some(parent), dentry, found, replication, way: Vec::new() })
}

/// What a path or inode id leads to.
///
/// # Errors
/// As [`resolve`], and `NOT_FOUND` for a missing target.
pub async fn existing(view: &View, target: &Target) -> Result<Found> {
    match target {
        Target::Path(path) => resolve(view, path).await?.existing().cloned(),
        Target::Inode(id) => inode(view, *id)
            .await?
            .map(|inode| Found { id: *id, inode })
            .ok_or_else(|| Error::not_found(format!("inode {id} does not exist (any more)"))),
    }
}

/// An inode's record.
///
/// # Errors
/// As the store.
pub async fn inode(view: &View, id: InodeId) -> Result<Option<Stored<Inode>>> {
    view.record(&key::inode(id)).await
}

fn require_directory(found: &Found, path: &FilePath) -> Result<()> {
    if found.is_directory() {
        return Ok(());
    }
    Err(Error::new(Reason::NotADirectory, format!("{path}: not a directory")).at(path.to_string()))
}

async fn step(view: &View, parent: &Found, name: &str) -> Result<Option<(Stored<Dentry>, Found)>> {
    let Some(dentry) = view.record::<Dentry>(&key::dentry(parent.id, name)).await? else { return Ok(None) };
    let id = InodeId(dentry.record.inode);
    let inode = inode(view, id).await?.ok_or_else(|| {
        Error::internal(format!("the entry '{name}' of inode {} leads to no inode", parent.id))
    })?;
    Ok(Some((dentry, Found { id, inode })))
}
