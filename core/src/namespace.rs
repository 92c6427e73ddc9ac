//! The rules of names: what creating, removing and renaming require and change.
//!
//! Each rule takes what the store holds of the few records it touches, and answers a plan whose preconditions are
//! exactly what the decision rested on. Paths are never stored: a name is a [`record::Dentry`] under its directory's
//! inode, so renaming a directory moves everything below it by changing one entry.
//!
//! Invariants:
//!
//! - **NAME-1** every dentry leads to an inode, and every inode but the root is led to by `nlink` dentries;
//! - **NAME-2** a directory's `parent` is the directory whose dentry leads to it; following parents ends at the root;
//! - **NAME-3** a removed directory had no entries, and no name in it was locked: creating and reserving a name stamp
//!   the parent's children key, removing requires it unchanged;
//! - **NAME-4** a change by a path requires the entries of the path's directories as they were (or the tree's epoch,
//!   which every renamed directory changes): none follows a directory that was renamed meanwhile.

pub mod create;
pub mod remove;
pub mod rename;

#[cfg(test)]
mod tests;

use crate::{
    key,
    lock::{ExpiresIn, Place},
    plan::Plan,
    record,
};
use bytes::Bytes;
use cairn_proto::{
    Result,
    id::{FencingToken, InodeId, Revision},
};

/// An inode as it was read.
#[derive(Clone, Copy, Debug)]
pub struct InodeRead<'a> {
    /// Its id.
    pub id: InodeId,
    /// Its record.
    pub inode: &'a record::Inode,
    /// When the record was written.
    pub revision: Revision,
}

/// The lock of an inode or of a name that does not exist yet, and what the caller proves to hold of it.
#[derive(Clone, Copy)]
pub struct Guard<'a> {
    /// The lock as it was read.
    pub place: &'a Place,
    /// The caller's token.
    pub token: Option<FencingToken>,
    /// For messages.
    pub expires_in_ms: ExpiresIn<'a>,
}

impl Guard<'_> {
    /// Whether the caller may change what the lock protects.
    ///
    /// # Errors
    /// `LOCK_HELD`, `LOCK_LOST`.
    pub fn check(&self, path: &str) -> Result<()> {
        self.place.allows(self.token, self.expires_in_ms).map_err(|error| error.at(path))
    }
}

/// Stamps a directory whose entries change: its mtime, and the proof against a concurrent removal.
pub fn stamp_children(plan: &mut Plan, directory: InodeId, now_ns: u64) {
    plan.put(key::children(directory), Bytes::copy_from_slice(&now_ns.to_le_bytes()));
}

/// Stamps a directory in which a name is reserved: the proof against a concurrent removal, and its mtime as it was.
/// `stamp` is the present one, if there is any.
pub fn stamp_reservation(plan: &mut Plan, directory: InodeId, stamp: Option<Bytes>) {
    plan.put(key::children(directory), stamp.unwrap_or_default());
}

/// The time of a directory's last stamp.
pub fn stamped_at(stamp: &[u8]) -> u64 {
    stamp.try_into().map_or(0, u64::from_le_bytes)
}
