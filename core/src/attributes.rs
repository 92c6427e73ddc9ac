//! Attributes of inodes: how they begin, change and look to clients.

use crate::record::{Inode, Layout, Xattr};
use cairn_proto::{
    Error, Reason, Result,
    id::{Generation, InodeId},
    limits::{REPLICATION_MAX, XATTR_BYTES_MAX},
    v1,
};

/// Permission bits of files that do not say otherwise.
pub const FILE_MODE_DEFAULT: u32 = 0o644;
/// Permission bits of directories that do not say otherwise.
pub const DIRECTORY_MODE_DEFAULT: u32 = 0o755;
/// All bits that a mode may have.
const MODE_MASK: u32 = 0o7777;

/// The etag of a version. The generation is part of it: a rebuilt directory may give a version number again that the
/// lost one gave to other content.
pub fn etag(generation: Generation, inode: InodeId, version: u64) -> String {
    format!("{generation:x}-{inode:x}-{version:x}", generation = generation.0, inode = inode.0)
}

/// An inode just made: an empty file of version 1, or an empty directory. `mode` was checked ([`check_mode`]).
pub fn new_inode(kind: v1::Kind, id: InodeId, generation: Generation, mode: u32, now_ns: u64) -> Inode {
    let is_file = kind == v1::Kind::File;
    let default = if is_file { FILE_MODE_DEFAULT } else { DIRECTORY_MODE_DEFAULT };
    Inode {
        kind: kind as i32,
        mode: if mode == 0 { default } else { mode },
        atime_ns: now_ns,
        mtime_ns: now_ns,
        ctime_ns: now_ns,
        nlink: 1,
        version: 1,
        layout_version: 1,
        layout: is_file.then(Layout::default),
        etag: etag(generation, id, 1),
        checksum: is_file.then(|| cairn_proto::checksum::crc64(&[])),
        ..Inode::default()
    }
}

/// The root directory of a new volume.
pub fn root(generation: Generation, now_ns: u64) -> Inode {
    new_inode(v1::Kind::Directory, cairn_proto::id::ROOT_INODE, generation, 0, now_ns)
}

/// The next ctime: now, but later than any before, also when the wall clock goes back.
pub fn next_ctime(inode: &Inode, now_ns: u64) -> u64 {
    now_ns.max(inode.ctime_ns + 1)
}

/// How clients see an inode.
pub fn attributes(id: InodeId, inode: &Inode) -> v1::Attributes {
    v1::Attributes {
        inode: id.0,
        kind: inode.kind,
        size: inode.size,
        version: inode.version,
        mode: inode.mode,
        uid: inode.uid,
        gid: inode.gid,
        atime_ns: inode.atime_ns,
        mtime_ns: inode.mtime_ns,
        ctime_ns: inode.ctime_ns,
        nlink: inode.nlink,
        etag: inode.etag.clone(),
        xattrs: inode
            .xattrs
            .iter()
            .map(|xattr| v1::ExtendedAttribute { name: xattr.name.clone(), value: xattr.value.clone() })
            .collect(),
        project_id: inode.project_id,
        replication: inode.replication,
        checksum: inode.checksum,
        parent: inode.parent,
    }
}

/// Whether a condition holds of what is there (`None`: nothing).
///
/// # Errors
/// `ALREADY_EXISTS` for `absent`, `NOT_FOUND` for `exists`, else `CONDITION_FAILED` with the version and etag that
/// are there.
pub fn check_condition(condition: Option<&v1::Condition>, path: &str, inode: Option<&Inode>) -> Result<()> {
    use v1::condition::Require;
    let Some(require) = condition.and_then(|condition| condition.require.as_ref()) else { return Ok(()) };
    let failed = |wanted: String| {
        let (version, etag) = inode.map_or((0, String::new()), |inode| (inode.version, inode.etag.clone()));
        let there =
            if version == 0 { "nothing is there".to_owned() } else { format!("version {version} is there") };
        let mut error =
            Error::new(Reason::ConditionFailed, format!("{path}: {wanted} was required, {there}")).at(path);
        error.detail.current_version = version;
        error.detail.current_etag = etag;
        Err(error)
    };
    match require {
        Require::Absent(true) if inode.is_some() => {
            Err(Error::new(Reason::AlreadyExists, format!("{path}: exists already")).at(path))
        }
        Require::Exists(true) if inode.is_none() => {
            Err(Error::not_found(format!("{path}: no such file")).at(path))
        }
        Require::Version(version) if inode.is_none_or(|inode| inode.version != *version) => {
            failed(format!("version {version}"))
        }
        Require::Etag(etag) if inode.is_none_or(|inode| inode.etag != *etag) => {
            failed(format!("etag {etag}"))
        }
        _ => Ok(()),
    }
}

/// Sets and removes extended attributes: an empty value removes one.
///
/// # Errors
/// `LIMIT_EXCEEDED` when they would be too large together; nothing is changed then.
pub fn change_xattrs(inode: &mut Inode, changes: &[v1::ExtendedAttribute]) -> Result<()> {
    let mut xattrs = inode.xattrs.clone();
    for change in changes {
        xattrs.retain(|xattr| xattr.name != change.name);
        if !change.value.is_empty() {
            xattrs.push(Xattr { name: change.name.clone(), value: change.value.clone() });
        }
    }
    xattrs.sort_by(|a, b| a.name.cmp(&b.name));
    let total: usize = xattrs.iter().map(|xattr| xattr.name.len() + xattr.value.len()).sum();
    if total > XATTR_BYTES_MAX {
        return Err(Error::limit(format!(
            "extended attributes would have {total} bytes together, at most {XATTR_BYTES_MAX} are allowed"
        )));
    }
    inode.xattrs = xattrs;
    Ok(())
}

/// A replication factor that can be set.
///
/// # Errors
/// `LIMIT_EXCEEDED` beyond the most copies.
pub fn check_replication(replication: u32) -> Result<u32> {
    if replication > REPLICATION_MAX {
        return Err(Error::limit(format!(
            "a replication factor of {replication} is above {REPLICATION_MAX}"
        )));
    }
    Ok(replication)
}

/// Checks permission bits. A mode as `stat` gives it, with the kind of a file in its upper bits, is none.
///
/// # Errors
/// `INVALID_ARGUMENT`, naming the bits that are too much.
pub fn check_mode(mode: u32) -> Result<u32> {
    match mode & !MODE_MASK {
        0 => Ok(mode),
        more => Err(Error::invalid(format!(
            "mode {mode:#o} has bits that are no permissions ({more:#o}): at most {MODE_MASK:#o} can be set"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use v1::condition::Require;

    fn condition(require: Require) -> v1::Condition {
        v1::Condition { require: Some(require) }
    }

    #[test]
    fn conditions_say_what_is_there() {
        let inode = new_inode(v1::Kind::File, InodeId(9), Generation(1), 0, 5);
        let check = |require, inode: Option<&Inode>| check_condition(Some(&condition(require)), "/f", inode);
        assert!(check(Require::Absent(true), None).is_ok());
        assert_eq!(check(Require::Absent(true), Some(&inode)).unwrap_err().reason, Reason::AlreadyExists);
        assert_eq!(check(Require::Exists(true), None).unwrap_err().reason, Reason::NotFound);
        assert!(check(Require::Version(1), Some(&inode)).is_ok());
        let error = check(Require::Version(3), Some(&inode)).unwrap_err();
        assert_eq!((error.reason, error.detail.current_version), (Reason::ConditionFailed, 1));
        assert!(check(Require::Etag(inode.etag.clone()), Some(&inode)).is_ok());
        assert!(check(Require::Etag("other".into()), None).is_err());
        assert!(check_condition(None, "/f", None).is_ok());
    }

    #[test]
    fn ctime_grows_although_the_clock_goes_back() {
        let inode = Inode { ctime_ns: 100, ..Inode::default() };
        assert_eq!(next_ctime(&inode, 50), 101);
        assert_eq!(next_ctime(&inode, 500), 500);
    }

    #[test]
    fn an_empty_value_removes_an_attribute_and_too_much_changes_nothing() {
        let xattr =
            |name: &str, value: Vec<u8>| v1::ExtendedAttribute { name: name.into(), value: value.into() };
        let mut inode = Inode::default();
        change_xattrs(&mut inode, &[xattr("b", vec![1]), xattr("a", vec![2])]).unwrap();
        assert_eq!(inode.xattrs[0].name, "a");
        assert!(change_xattrs(&mut inode, &[xattr("c", vec![0; XATTR_BYTES_MAX])]).is_err());
        change_xattrs(&mut inode, &[xattr("a", vec![])]).unwrap();
        assert_eq!(inode.xattrs.len(), 1);
    }
}
