//! Small files that appear whole or not at all.

use std::ffi::OsString;
use std::io;
use std::path::Path;

use bytes::Bytes;

use crate::{Disk, Open, at_path};

/// Replaces the content of `path` so that after a crash at any moment it has the old or the new content,
/// whole. When this returns, the new one is durable. Its directory must exist. Two calls for one path must
/// not run at the same time: they share the temporary name `<path>.tmp`.
pub async fn write_file_durable(disk: &dyn Disk, path: &Path, bytes: Bytes) -> io::Result<()> {
    let mut name = OsString::from(path);
    name.push(".tmp");
    let temporary = Path::new(&name);
    let file = disk.open(temporary, Open::Create).await?;
    // A temporary file may be left from a crash, longer than the new content.
    file.set_len(0).await?;
    file.write_at(0, vec![bytes]).await?;
    // Content first: a name that is durable before its content could lead to an empty file.
    file.sync().await?;
    drop(file);
    disk.rename(temporary, path).await?;
    disk.sync_dir(parent(path)).await
}

/// Removes `path` and makes that durable. A missing file is fine.
pub async fn remove_file_durable(disk: &dyn Disk, path: &Path) -> io::Result<()> {
    match disk.remove_file(path).await {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    disk.sync_dir(parent(path)).await
}

/// The whole content of `path`, or `None` if it does not exist. [`io::ErrorKind::InvalidData`] if it is
/// longer than `len_max` bytes, so that a wrong file cannot fill the memory.
pub async fn read_file(disk: &dyn Disk, path: &Path, len_max: usize) -> io::Result<Option<Bytes>> {
    let file = match disk.open(path, Open::Read).await {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    let len = file.len().await?;
    if len > len_max as u64 {
        let why = format!("has {len} bytes, at most {len_max} are expected");
        return Err(at_path(io::Error::new(io::ErrorKind::InvalidData, why), "read", path));
    }
    Ok(Some(file.read_at(0, len_max).await?))
}

/// The directory that holds `path`; the empty path for the root.
pub(crate) fn parent(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new(""))
}
