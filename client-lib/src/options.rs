//! What a caller may ask of an operation beyond its path.

use crate::lock::Lock;
use cairn_proto::{
    Result, convert,
    id::FencingToken,
    v1::{self, ExtendedAttribute, LockMode},
};
use std::time::Duration;

/// What must hold for a change to be made; otherwise it fails with `CONDITION_FAILED` and nothing is changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    /// The name must not exist.
    Absent,
    /// The name must exist.
    Exists,
    /// The file must have this version.
    Version(u64),
    /// The file must have this etag.
    Etag(String),
}

impl From<Condition> for v1::Condition {
    fn from(condition: Condition) -> Self {
        use v1::condition::Require;
        let require = match condition {
            Condition::Absent => Require::Absent(true),
            Condition::Exists => Require::Exists(true),
            Condition::Version(version) => Require::Version(version),
            Condition::Etag(etag) => Require::Etag(etag),
        };
        Self { require: Some(require) }
    }
}

/// A lock or its token, for options that take either.
impl From<&Lock> for FencingToken {
    fn from(lock: &Lock) -> Self {
        lock.token()
    }
}

/// How to write, create or append.
///
/// ```
/// use client_lib::{Condition, WriteOptions};
/// let once = WriteOptions::new().condition(Condition::Absent).mode(0o600);
/// # let _ = once;
/// ```
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct WriteOptions {
    pub(crate) condition: Option<Condition>,
    pub(crate) token: Option<FencingToken>,
    pub(crate) wait: Duration,
    pub(crate) replication: u32,
    pub(crate) mode: u32,
    pub(crate) mtime_ns: u64,
    pub(crate) xattrs: Vec<ExtendedAttribute>,
}

impl WriteOptions {
    /// No condition, no lock, all defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// What must hold.
    pub fn condition(mut self, condition: Condition) -> Self {
        self.condition = Some(condition);
        self
    }

    /// Writes under a lock that is held already: a `&Lock`, or a token that somebody handed over.
    pub fn token(mut self, token: impl Into<FencingToken>) -> Self {
        self.token = Some(token.into());
        self
    }

    /// How long to wait for somebody else's lock. Without it the call is declined at once with `LOCK_HELD`.
    pub fn wait(mut self, wait: Duration) -> Self {
        self.wait = wait;
        self
    }

    /// Replication factor of the file, kept with it; 0 means inherited. When the file does not exist yet, an empty
    /// one is made first, so that others may see it empty for a moment.
    pub fn replication(mut self, replication: u32) -> Self {
        self.replication = replication;
        self
    }

    /// Permission bits when it is made by this; 0 means 0644 for files and 0755 for directories.
    pub fn mode(mut self, mode: u32) -> Self {
        self.mode = mode;
        self
    }

    /// Time of the last change, nanoseconds since 1970; 0 means now.
    pub fn mtime_ns(mut self, mtime_ns: u64) -> Self {
        self.mtime_ns = mtime_ns;
        self
    }

    /// Adds user metadata when it is made by this; at most 64 KiB in all.
    pub fn xattr(mut self, name: impl Into<String>, value: impl Into<bytes::Bytes>) -> Self {
        self.xattrs.push(ExtendedAttribute { name: name.into(), value: value.into() });
        self
    }

    pub(crate) fn check(&self) -> Result<()> {
        convert::xattrs(&self.xattrs)?;
        replication(self.replication)
    }

    pub(crate) fn wire_condition(&self) -> Option<v1::Condition> {
        self.condition.clone().map(Into::into)
    }

    pub(crate) fn wire_token(&self) -> Option<v1::FencingToken> {
        self.token.map(Into::into)
    }
}

pub(crate) fn replication(replication: u32) -> Result<()> {
    if replication > cairn_proto::limits::REPLICATION_MAX {
        return Err(cairn_proto::Error::limit(format!(
            "a replication of {replication} is more than {}",
            cairn_proto::limits::REPLICATION_MAX
        )));
    }
    Ok(())
}

/// How to delete.
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct DeleteOptions {
    pub(crate) condition: Option<Condition>,
    pub(crate) token: Option<FencingToken>,
}

impl DeleteOptions {
    /// No condition, no lock.
    pub fn new() -> Self {
        Self::default()
    }

    /// What must hold.
    pub fn condition(mut self, condition: Condition) -> Self {
        self.condition = Some(condition);
        self
    }

    /// Deletes under a lock that is held already.
    pub fn token(mut self, token: impl Into<FencingToken>) -> Self {
        self.token = Some(token.into());
        self
    }
}

/// How to rename.
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct RenameOptions {
    pub(crate) condition: Option<Condition>,
    pub(crate) source_condition: Option<Condition>,
    pub(crate) token: Option<FencingToken>,
    pub(crate) replaced_token: Option<FencingToken>,
}

impl RenameOptions {
    /// Replaces a file or an empty directory at the new name.
    pub fn new() -> Self {
        Self::default()
    }

    /// What must hold of the new name: [`Condition::Absent`] refuses to replace.
    pub fn condition(mut self, condition: Condition) -> Self {
        self.condition = Some(condition);
        self
    }

    /// What must hold of the old name.
    pub fn source_condition(mut self, condition: Condition) -> Self {
        self.source_condition = Some(condition);
        self
    }

    /// A lock on the old name that is held already.
    pub fn token(mut self, token: impl Into<FencingToken>) -> Self {
        self.token = Some(token.into());
        self
    }

    /// A lock on what is replaced that is held already.
    pub fn replaced_token(mut self, token: impl Into<FencingToken>) -> Self {
        self.replaced_token = Some(token.into());
        self
    }
}

/// Which attributes to change; what is not named stays.
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct SetAttributes {
    pub(crate) message: v1::SetAttributesRequest,
}

impl SetAttributes {
    /// No change.
    pub fn new() -> Self {
        Self::default()
    }

    /// Permission bits.
    pub fn mode(mut self, mode: u32) -> Self {
        self.message.mode = Some(mode);
        self
    }

    /// Owner.
    pub fn uid(mut self, uid: u32) -> Self {
        self.message.uid = Some(uid);
        self
    }

    /// Owning group.
    pub fn gid(mut self, gid: u32) -> Self {
        self.message.gid = Some(gid);
        self
    }

    /// Last access, nanoseconds since 1970.
    pub fn atime_ns(mut self, atime_ns: u64) -> Self {
        self.message.atime_ns = Some(atime_ns);
        self
    }

    /// Last change of content, nanoseconds since 1970.
    pub fn mtime_ns(mut self, mtime_ns: u64) -> Self {
        self.message.mtime_ns = Some(mtime_ns);
        self
    }

    /// Replication factor of what is written from now on; 0 means inherited.
    pub fn replication(mut self, replication: u32) -> Self {
        self.message.replication = Some(replication);
        self
    }

    /// Sets user metadata; an empty value removes it.
    pub fn xattr(mut self, name: impl Into<String>, value: impl Into<bytes::Bytes>) -> Self {
        self.message.xattrs.push(ExtendedAttribute { name: name.into(), value: value.into() });
        self
    }

    /// What must hold.
    pub fn condition(mut self, condition: Condition) -> Self {
        self.message.condition = Some(condition.into());
        self
    }

    /// Changes under a lock that is held already.
    pub fn token(mut self, token: impl Into<FencingToken>) -> Self {
        self.message.token = Some(token.into().into());
        self
    }
}

/// How to lock.
#[derive(Clone, Debug)]
#[must_use]
pub struct LockOptions {
    pub(crate) mode: LockMode,
    pub(crate) wait: Duration,
    pub(crate) owner: Option<String>,
}

impl Default for LockOptions {
    fn default() -> Self {
        Self { mode: LockMode::Exclusive, wait: Duration::ZERO, owner: None }
    }
}

impl LockOptions {
    /// Exclusive, declined at once when somebody else holds a lock.
    pub fn new() -> Self {
        Self::default()
    }

    /// Shares the lock with others who ask for the same; nobody can change the file meanwhile.
    pub fn shared(mut self) -> Self {
        self.mode = LockMode::Shared;
        self
    }

    /// Exclusive or shared.
    pub fn mode(mut self, mode: LockMode) -> Self {
        self.mode = mode;
        self
    }

    /// How long to wait for another holder.
    pub fn wait(mut self, wait: Duration) -> Self {
        self.wait = wait;
        self
    }

    /// Who asks, as shown to others; at most 255 bytes. By default the client's own name.
    pub fn owner(mut self, owner: impl Into<String>) -> Self {
        self.owner = Some(owner.into());
        self
    }
}

/// How to list.
#[derive(Clone, Debug)]
#[must_use]
pub struct ListOptions {
    pub(crate) attributes: bool,
    pub(crate) page_size: u32,
}

impl Default for ListOptions {
    fn default() -> Self {
        Self { attributes: true, page_size: 0 }
    }
}

impl ListOptions {
    /// With attributes, in pages of the directory's choice.
    pub fn new() -> Self {
        Self::default()
    }

    /// Names and kinds alone: less work for the directory.
    pub fn without_attributes(mut self) -> Self {
        self.attributes = false;
        self
    }

    /// Entries fetched at a time, at most 4,096; 0 means 1,024.
    pub fn page_size(mut self, page_size: u32) -> Self {
        self.page_size = page_size.min(cairn_proto::limits::PAGE_ENTRIES_MAX as u32);
        self
    }
}
