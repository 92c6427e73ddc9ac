//! Giving a file or directory another name.

use super::{Guard, InodeRead, create::enter, remove::Children, remove::unlink, stamp_children};
use crate::{
    attributes::next_ctime,
    key,
    plan::{Plan, Precondition},
    record::{Inode, Record},
};
use bytes::Bytes;
use cairn_proto::{
    Error, Reason, Result,
    id::{InodeId, Revision},
    v1,
};

/// What the target name leads to already.
#[derive(Clone, Copy)]
pub struct Replaced<'a> {
    /// When its entry was written.
    pub dentry_revision: Revision,
    /// The inode.
    pub inode: InodeRead<'a>,
    /// Its lock.
    pub lock: Guard<'a>,
    /// Its entries, of a directory.
    pub children: Children,
}

/// What is to be renamed.
#[derive(Clone, Copy)]
pub struct Rename<'a> {
    /// The path now, for messages.
    pub from_path: &'a str,
    /// The path then, for messages.
    pub to_path: &'a str,
    /// The directory of the name now.
    pub from_parent: InodeId,
    /// The name now.
    pub from_name: &'a str,
    /// When its entry was written.
    pub from_revision: Revision,
    /// What it leads to.
    pub source: InodeRead<'a>,
    /// The lock on it.
    pub source_lock: Guard<'a>,
    /// The directory of the name then.
    pub to_parent: InodeId,
    /// The name then.
    pub to_name: &'a str,
    /// What stands there.
    pub replaced: Option<Replaced<'a>>,
    /// The lock on the name then, when nothing stands there.
    pub reservation: Guard<'a>,
    /// The directories from `to_parent` up to the root, for a directory that changes its parent.
    pub ancestors: &'a [InodeId],
    /// When the tree epoch was written.
    pub tree_epoch: Option<Revision>,
    /// Id of the trash record that takes what is replaced.
    pub trash_id: u64,
    /// The time of day.
    pub now_ns: u64,
}

/// Decides. Answers the plan and the inode after it. The same name twice changes nothing.
///
/// # Errors
/// `INVALID_ARGUMENT` for a directory into itself, `IS_A_DIRECTORY` and `NOT_A_DIRECTORY` where kinds do not fit,
/// `NOT_EMPTY`, `LOCK_HELD`, `LOCK_LOST`.
pub fn rename(request: &Rename<'_>) -> Result<(Plan, Inode)> {
    let source = request.source;
    let mut inode = source.inode.clone();
    if request.from_parent == request.to_parent && request.from_name == request.to_name {
        return Ok((Plan::new(), inode));
    }
    let is_directory = inode.kind == v1::Kind::Directory as i32;
    let moves_directory = is_directory && request.from_parent != request.to_parent;
    if is_directory && (request.ancestors.contains(&source.id) || request.to_parent == source.id) {
        return Err(Error::invalid(format!(
            "{}: a directory cannot be moved into itself ({})",
            request.from_path, request.to_path
        ))
        .at(request.from_path));
    }
    request.source_lock.check(request.from_path)?;

    let mut plan = Plan::new();
    let from = key::dentry(request.from_parent, request.from_name);
    plan.require(Precondition::Unchanged(from.clone(), Some(request.from_revision)));
    plan.delete(from);
    stamp_children(&mut plan, request.from_parent, request.now_ns);
    request.source_lock.place.require(&mut plan);

    let to = key::dentry(request.to_parent, request.to_name);
    match &request.replaced {
        None => {
            request.reservation.check(request.to_path)?;
            request.reservation.place.end(&mut plan);
            plan.require(Precondition::Absent(to));
        }
        Some(replaced) => {
            check_kinds(request, replaced, is_directory)?;
            plan.require(Precondition::Unchanged(to, Some(replaced.dentry_revision)));
            unlink(
                &mut plan,
                request.to_path,
                &replaced.inode,
                &replaced.lock,
                replaced.children,
                request.trash_id,
            )?;
        }
    }
    let kind = if is_directory { v1::Kind::Directory } else { v1::Kind::File };
    enter(&mut plan, request.to_parent, request.to_name, source.id, kind, request.now_ns);

    // Unchanged, not only there: the caller's condition was checked against this version, and the answer shows it.
    plan.require(Precondition::Unchanged(key::inode(source.id), Some(source.revision)));
    if moves_directory {
        // Two such renames at once could make a cycle that neither sees: they share one key.
        plan.require(Precondition::Unchanged(key::tree_epoch(), request.tree_epoch));
        plan.put(key::tree_epoch(), Bytes::new());
        inode.parent = request.to_parent.0;
        inode.ctime_ns = next_ctime(&inode, request.now_ns);
        plan.put(key::inode(source.id), inode.to_bytes());
    } else if is_directory {
        // All paths below lead elsewhere now: who found a file by one of them has to look again.
        plan.put(key::tree_epoch(), Bytes::new());
    }
    Ok((plan, inode))
}

fn check_kinds(request: &Rename<'_>, replaced: &Replaced<'_>, is_directory: bool) -> Result<()> {
    let replaces_directory = replaced.inode.inode.kind == v1::Kind::Directory as i32;
    let error = match (is_directory, replaces_directory) {
        (false, true) => Error::new(
            Reason::IsADirectory,
            format!("{}: is a directory and cannot be replaced by a file", request.to_path),
        ),
        (true, false) => Error::new(
            Reason::NotADirectory,
            format!("{}: is a file and cannot be replaced by a directory", request.to_path),
        ),
        _ => return Ok(()),
    };
    Err(error.at(request.to_path))
}
