//! Files of this machine: what is there, and writing a copy so that it appears whole or not at all.

use crate::failure::Failure;
use std::{
    ffi::OsString,
    fs::{FileTimes, Metadata, Permissions},
    io,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    time::{Duration, UNIX_EPOCH},
};
use tokio::fs;

/// What a local name leads to.
#[derive(Debug, PartialEq, Eq)]
pub enum Kind {
    File,
    Directory,
    /// What cannot be kept in Cairn, in words.
    Other(&'static str),
}

/// The words for a symbolic link.
pub const LINK: &str = "a symbolic link";
/// The words for a pipe.
pub const PIPE: &str = "a pipe";

/// What it is, without following a symbolic link.
pub fn kind(metadata: &Metadata) -> Kind {
    let kind = metadata.file_type();
    if kind.is_file() {
        Kind::File
    } else if kind.is_dir() {
        Kind::Directory
    } else if kind.is_symlink() {
        Kind::Other(LINK)
    } else if kind.is_fifo() {
        Kind::Other(PIPE)
    } else if kind.is_socket() {
        Kind::Other("a socket")
    } else {
        Kind::Other("a device")
    }
}

/// Nanoseconds since 1970 of the last change; 1 for what is older, since 0 means "not given" in Cairn.
pub fn mtime_ns(metadata: &Metadata) -> u64 {
    let ns = metadata.mtime().saturating_mul(1_000_000_000).saturating_add(metadata.mtime_nsec());
    u64::try_from(ns).unwrap_or(0).max(1)
}

/// Permission bits; never 0, which means "not given" in Cairn: the owner may read at least.
pub fn mode(metadata: &Metadata) -> u32 {
    match metadata.mode() & 0o7777 {
        0 => 0o400,
        mode => mode,
    }
}

/// The names in a directory, sorted.
pub async fn names(folder: &Path) -> Result<Vec<OsString>, Failure> {
    let mut reader = fs::read_dir(folder).await.map_err(Failure::local(folder))?;
    let mut names = Vec::new();
    while let Some(entry) = reader.next_entry().await.map_err(Failure::local(folder))? {
        names.push(entry.file_name());
    }
    names.sort();
    Ok(names)
}

/// Sets permission bits and time of last change.
pub async fn set_attributes(path: &Path, mode: u32, mtime_ns: u64) -> Result<(), Failure> {
    let target = path.to_owned();
    blocking(path, move || {
        let file = std::fs::File::open(&target)?;
        let modified = UNIX_EPOCH + Duration::from_nanos(mtime_ns);
        file.set_times(FileTimes::new().set_modified(modified))?;
        // Not set-user-id and the like: a copy from elsewhere gives nobody rights.
        file.set_permissions(Permissions::from_mode(mode & 0o777))
    })
    .await
}

async fn blocking<T, F>(path: &Path, call: F) -> Result<T, Failure>
where
    T: Send + 'static,
    F: FnOnce() -> io::Result<T> + Send + 'static,
{
    tokio::task::spawn_blocking(call)
        .await
        .map_err(io::Error::other)
        .and_then(|result| result)
        .map_err(Failure::local(path))
}

/// A file being written: under another name beside its own until [`NewFile::finish`].
pub struct NewFile {
    pub file: fs::File,
    path: PathBuf,
    /// None when it is written in place: a device or a pipe.
    temporary: Option<PathBuf>,
}

impl NewFile {
    /// Starts writing `path`, which may exist.
    pub async fn create(path: &Path) -> Result<Self, Failure> {
        // What a link leads to is replaced, not the link.
        let path = fs::canonicalize(path).await.unwrap_or_else(|_| path.to_owned());
        match fs::metadata(&path).await {
            Ok(there) if there.is_dir() => {
                let error = io::Error::new(io::ErrorKind::IsADirectory, "is a directory");
                return Err(Failure::local(&path)(error));
            }
            Ok(there) if !there.is_file() => {
                let file =
                    fs::OpenOptions::new().write(true).open(&path).await.map_err(Failure::local(&path))?;
                return Ok(Self { file, path, temporary: None });
            }
            _ => {}
        }
        let mut attempt = 0;
        loop {
            let temporary = beside(&path, attempt);
            match fs::OpenOptions::new().write(true).create_new(true).open(&temporary).await {
                Ok(file) => return Ok(Self { file, path, temporary: Some(temporary) }),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && attempt < 100 => attempt += 1,
                Err(error) => return Err(Failure::local(&path)(error)),
            }
        }
    }

    /// Gives it its attributes and its name.
    pub async fn finish(mut self, mode: u32, mtime_ns: u64) -> Result<(), Failure> {
        use tokio::io::AsyncWriteExt as _;
        self.file.flush().await.map_err(Failure::local(&self.path))?;
        if let Some(temporary) = &self.temporary {
            set_attributes_of(&self.file, &self.path, mode, mtime_ns).await?;
            fs::rename(temporary, &self.path).await.map_err(Failure::local(&self.path))?;
            self.temporary = None;
        }
        Ok(())
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            let _ = std::fs::remove_file(temporary);
        }
    }
}

async fn set_attributes_of(file: &fs::File, path: &Path, mode: u32, mtime_ns: u64) -> Result<(), Failure> {
    let file = file.try_clone().await.map_err(Failure::local(path))?.into_std().await;
    blocking(path, move || {
        file.set_times(FileTimes::new().set_modified(UNIX_EPOCH + Duration::from_nanos(mtime_ns)))?;
        file.set_permissions(Permissions::from_mode(mode & 0o777))
    })
    .await
}

/// A name in the same directory, short enough whatever the length of the file's own.
fn beside(path: &Path, attempt: u32) -> PathBuf {
    path.with_file_name(format!(".cairn-{}-{}-{attempt}", std::process::id(), crate::transfer::serial()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt as _;

    #[tokio::test]
    async fn an_unfinished_file_leaves_nothing_and_keeps_what_was_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        std::fs::write(&path, "old").unwrap();
        let mut new = NewFile::create(&path).await.unwrap();
        new.file.write_all(b"half of the n").await.unwrap();
        drop(new);
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[tokio::test]
    async fn a_finished_file_has_content_mode_and_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ä b");
        let mut new = NewFile::create(&path).await.unwrap();
        new.file.write_all(b"new").await.unwrap();
        new.finish(0o640, 1_700_000_000_123_456_789).await.unwrap();
        let metadata = std::fs::metadata(&path).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert_eq!(mode(&metadata), 0o640);
        assert_eq!(mtime_ns(&metadata), 1_700_000_000_123_456_789);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[tokio::test]
    async fn a_link_is_written_through_and_a_device_in_place() {
        let folder = tempfile::tempdir().unwrap();
        let (path, link) = (folder.path().join("a"), folder.path().join("link"));
        std::fs::write(&path, "old").unwrap();
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let mut new = NewFile::create(&link).await.unwrap();
        new.file.write_all(b"new").await.unwrap();
        new.finish(0o644, 1).await.unwrap();
        assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        let null = NewFile::create(Path::new("/dev/null")).await.unwrap();
        null.finish(0o600, 1).await.unwrap();
        assert!(!std::fs::metadata("/dev/null").unwrap().is_file());
    }
}
