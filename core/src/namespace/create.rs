//! Making a file or directory.

use super::{Guard, InodeRead, stamp_children};
use crate::{
    attributes::{self, check_replication},
    key,
    plan::{Plan, Precondition},
    record::{Dentry, Inode, Record},
};
use cairn_proto::{
    Error, Reason, Result,
    id::{Generation, InodeId},
    v1,
};

/// What is to be made.
#[derive(Clone, Copy)]
pub struct Create<'a> {
    /// The path, for messages.
    pub path: &'a str,
    /// The directory it is made in.
    pub parent: InodeRead<'a>,
    /// Its name there.
    pub name: &'a str,
    /// What the name leads to already.
    pub existing: Option<&'a Inode>,
    /// The lock on the name.
    pub reservation: Guard<'a>,
    /// File or directory.
    pub kind: v1::Kind,
    /// The id of the new inode.
    pub id: InodeId,
    /// Permission bits; 0: the kind's default.
    pub mode: u32,
    /// Replication factor; 0: inherited.
    pub replication: u32,
    /// User metadata.
    pub xattrs: &'a [v1::ExtendedAttribute],
    /// Last change; 0: now.
    pub mtime_ns: u64,
    /// The life of the store.
    pub generation: Generation,
    /// The time of day.
    pub now_ns: u64,
}

/// Decides. Answers the plan and the new inode.
///
/// # Errors
/// `ALREADY_EXISTS`, `LOCK_HELD` or `LOCK_LOST` of the name, `LIMIT_EXCEEDED` of attributes.
pub fn create(request: &Create<'_>) -> Result<(Plan, Inode)> {
    if request.existing.is_some() {
        return Err(
            Error::new(Reason::AlreadyExists, format!("{}: exists already", request.path)).at(request.path)
        );
    }
    request.reservation.check(request.path)?;
    let mut inode =
        attributes::new_inode(request.kind, request.id, request.generation, request.mode, request.now_ns);
    inode.replication = check_replication(request.replication)?;
    attributes::change_xattrs(&mut inode, request.xattrs)?;
    if request.mtime_ns != 0 {
        inode.mtime_ns = request.mtime_ns;
    }
    if request.kind == v1::Kind::Directory {
        inode.parent = request.parent.id.0;
    }
    let mut plan = Plan::new();
    enter(&mut plan, request.parent.id, request.name, request.id, request.kind, request.now_ns);
    plan.require(Precondition::Absent(key::dentry(request.parent.id, request.name)));
    // A lock on the name becomes the lock of what is made under it.
    request.reservation.place.move_to(&mut plan, request.id);
    plan.put(key::inode(request.id), inode.to_bytes());
    Ok((plan, inode))
}

/// Puts a name into a directory that must still be there. What stood there before is the caller's to require.
pub fn enter(plan: &mut Plan, parent: InodeId, name: &str, id: InodeId, kind: v1::Kind, now_ns: u64) {
    // Exists, not unchanged: creates in one directory do not conflict with each other.
    plan.require(Precondition::Exists(key::inode(parent)));
    plan.put(key::dentry(parent, name), Dentry { inode: id.0, kind: kind as i32 }.to_bytes());
    stamp_children(plan, parent, now_ns);
}
