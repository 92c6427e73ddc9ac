//! Removing a file or an empty directory.

use super::{Guard, InodeRead, stamp_children};
use crate::{
    key, layout,
    plan::{Plan, Precondition},
    record::Record,
};
use cairn_proto::{
    Error, Reason, Result,
    id::{InodeId, Revision},
    v1,
};

/// What is to be removed.
#[derive(Clone, Copy)]
pub struct Remove<'a> {
    /// The path, for messages.
    pub path: &'a str,
    /// The directory that holds the name.
    pub parent: InodeId,
    /// The name.
    pub name: &'a str,
    /// When the entry was written.
    pub dentry_revision: Revision,
    /// What it leads to.
    pub target: InodeRead<'a>,
    /// The lock on it.
    pub lock: Guard<'a>,
    /// Of a directory: whether it has entries, and when its children key was stamped.
    pub children: Children,
    /// Id of the trash record that takes its content.
    pub trash_id: u64,
    /// The time of day.
    pub now_ns: u64,
}

/// What is known of a directory's entries.
#[derive(Clone, Copy, Debug, Default)]
pub struct Children {
    /// It has at least one, or a name in it is reserved.
    pub any: bool,
    /// When its entries last changed.
    pub stamp: Option<Revision>,
}

/// Decides.
///
/// # Errors
/// `NOT_EMPTY`, `LOCK_HELD`, `LOCK_LOST`.
pub fn remove(request: &Remove<'_>) -> Result<Plan> {
    let mut plan = Plan::new();
    plan.require(Precondition::Unchanged(
        key::dentry(request.parent, request.name),
        Some(request.dentry_revision),
    ));
    plan.delete(key::dentry(request.parent, request.name));
    unlink(&mut plan, request.path, &request.target, &request.lock, request.children, request.trash_id)?;
    stamp_children(&mut plan, request.parent, request.now_ns);
    Ok(plan)
}

/// Ends an inode whose last name goes: its record, its lock, its content.
pub(super) fn unlink(
    plan: &mut Plan,
    path: &str,
    target: &InodeRead<'_>,
    lock: &Guard<'_>,
    children: Children,
    trash_id: u64,
) -> Result<()> {
    lock.check(path)?;
    lock.place.end(plan);
    let inode_key = key::inode(target.id);
    plan.require(Precondition::Unchanged(inode_key.clone(), Some(target.revision)));
    plan.delete(inode_key);
    if target.inode.kind == v1::Kind::Directory as i32 {
        if children.any {
            let why = format!("{path}: the directory is not empty, or a name in it is locked");
            return Err(Error::new(Reason::NotEmpty, why).at(path));
        }
        let stamp = key::children(target.id);
        plan.require(Precondition::Unchanged(stamp.clone(), children.stamp));
        plan.delete(stamp);
    }
    if let Some(layout) = &target.inode.layout {
        let trash = layout::discard(target.id, layout);
        if !layout::is_empty(&trash) {
            plan.put(key::trash(trash_id), trash.to_bytes());
        }
    }
    Ok(())
}
