//! Checks at the door: generated messages on receipt become values that cannot be wrong.

use crate::{
    Error, Result,
    id::{ChunkId, GrantId},
    limits::{CHUNK_BYTES_MAX, GRANT_COUNT_MAX, OWNER_BYTES_MAX, XATTR_BYTES_MAX, XATTR_NAME_BYTES_MAX},
    path::FilePath,
    v1,
};

/// A required field.
///
/// # Errors
/// `INVALID_ARGUMENT` naming the field when it is absent.
pub fn required<T>(field: Option<T>, name: &str) -> Result<T> {
    field.ok_or_else(|| Error::invalid(format!("the field '{name}' is missing")))
}

/// A chunk id that can exist.
///
/// # Errors
/// `INVALID_ARGUMENT` when absent, for grant 0, or an index no grant can have.
pub fn chunk_id(chunk: Option<&v1::ChunkId>) -> Result<ChunkId> {
    let chunk = ChunkId::from(required(chunk, "chunk")?);
    if chunk.grant == GrantId(0) || chunk.index >= GRANT_COUNT_MAX {
        return Err(Error::invalid(format!("{chunk} is not a chunk id: take one from a grant")));
    }
    Ok(chunk)
}

/// A chunk's length: 1 byte to 64 MiB.
///
/// # Errors
/// `LIMIT_EXCEEDED` otherwise.
pub fn chunk_length(length: u64) -> Result<u64> {
    if length == 0 || length > CHUNK_BYTES_MAX {
        return Err(Error::limit(format!("a chunk has 1 to {CHUNK_BYTES_MAX} bytes, not {length}")));
    }
    Ok(length)
}

/// What a request is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A path.
    Path(FilePath),
    /// An inode.
    Inode(crate::id::InodeId),
}

/// A path or an inode, exactly one of them.
///
/// # Errors
/// `INVALID_ARGUMENT` for both or none; as [`FilePath::parse`] for the path.
pub fn target(path: &str, inode: u64) -> Result<Target> {
    match (path.is_empty(), inode) {
        (false, 0) => FilePath::parse(path).map(Target::Path),
        (true, 1..) => Ok(Target::Inode(inode.into())),
        (true, 0) => Err(Error::invalid("give a path or an inode")),
        (false, _) => Err(Error::invalid("give a path or an inode, not both").at(path)),
    }
}

/// Extended attributes within their limits.
///
/// # Errors
/// `LIMIT_EXCEEDED` or `INVALID_ARGUMENT`.
pub fn xattrs(xattrs: &[v1::ExtendedAttribute]) -> Result<()> {
    let total: usize = xattrs.iter().map(|xattr| xattr.name.len() + xattr.value.len()).sum();
    if total > XATTR_BYTES_MAX {
        return Err(Error::limit(format!(
            "extended attributes have {total} bytes, at most {XATTR_BYTES_MAX}"
        )));
    }
    for xattr in xattrs {
        if xattr.name.is_empty() || xattr.name.len() > XATTR_NAME_BYTES_MAX || xattr.name.contains('\0') {
            return Err(Error::invalid("an extended attribute's name has 1 to 255 bytes without NUL"));
        }
    }
    Ok(())
}

/// A name by which a client shows itself to others.
///
/// # Errors
/// `LIMIT_EXCEEDED` beyond 255 bytes.
pub fn owner(owner: &str) -> Result<&str> {
    if owner.len() > OWNER_BYTES_MAX {
        return Err(Error::limit(format!(
            "an owner's name has {} bytes, at most {OWNER_BYTES_MAX}",
            owner.len()
        )));
    }
    Ok(owner)
}
