//! A small file system of its own on a loop device, to fill up. Needs root.

use crate::network::run;
use rustix::fs::{FallocateFlags, fallocate, statvfs};
use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

const FILLER: &str = "filler";
/// What is left of a full disk: less than anything needs.
const LEFT_BYTES: u64 = 64 * 1024;

/// A mounted file system in an image file. Dropping it unmounts it and removes the image.
#[derive(Debug)]
pub struct SmallDisk {
    image: PathBuf,
    mount: PathBuf,
    mounted: bool,
}

impl SmallDisk {
    /// Makes a file system of so many bytes, which lie in `image` as far as they are used, and mounts it.
    ///
    /// # Errors
    /// In words, when this machine or user cannot.
    pub fn make(image: &Path, mount: &Path, bytes: u64) -> Result<Self, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("mounting needs root".to_owned());
        }
        let mut disk = Self { image: image.to_owned(), mount: mount.to_owned(), mounted: false };
        let words = |error: std::io::Error| error.to_string();
        File::create(image).and_then(|file| file.set_len(bytes)).map_err(words)?;
        fs::create_dir_all(mount).map_err(words)?;
        let (image, mount) = (image.to_str().unwrap_or_default(), mount.to_str().unwrap_or_default());
        run(&["mkfs.ext4", "-q", "-F", "-m", "0", "-E", "lazy_itable_init=1,lazy_journal_init=1", image])?;
        run(&["mount", "-o", "loop,discard", image, mount])?;
        disk.mounted = true;
        // A data folder is empty at first.
        fs::remove_dir(disk.mount.join("lost+found")).map_err(words)?;
        Ok(disk)
    }

    /// Leaves no room on it.
    ///
    /// # Panics
    /// When that fails.
    pub fn fill(&self) {
        let file = File::options().create(true).append(true).open(self.mount.join(FILLER)).unwrap();
        let mut piece = self.free_bytes();
        while self.free_bytes() > LEFT_BYTES && piece >= 4_096 {
            let length = file.metadata().unwrap().len();
            if fallocate(&file, FallocateFlags::empty(), length, piece).is_err() {
                piece /= 2;
            } else {
                piece = piece.min(self.free_bytes());
            }
        }
        assert!(self.free_bytes() < 4 << 20, "{} bytes are left", self.free_bytes());
    }

    /// Gives the room back. The file system hands it out again a moment later.
    pub fn empty(&self) {
        let _ = fs::remove_file(self.mount.join(FILLER));
    }

    /// What is free.
    ///
    /// # Panics
    /// When the file system does not say.
    pub fn free_bytes(&self) -> u64 {
        let space = statvfs(&self.mount).unwrap();
        space.f_bavail * space.f_frsize
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        if self.mounted {
            let mount = self.mount.to_str().unwrap_or_default();
            if let Err(why) = run(&["umount", mount]).or_else(|_| run(&["umount", "-l", mount])) {
                eprintln!("{why}");
            }
        }
        let _ = fs::remove_file(&self.image);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    fn a_full_disk_takes_nothing_until_it_is_emptied() {
        let folder = tempfile::tempdir().unwrap();
        let mount = folder.path().join("mount");
        let disk = match SmallDisk::make(&folder.path().join("image"), &mount, 64 << 20) {
            Ok(disk) => disk,
            Err(why) => {
                println!("!!! SKIPPED: no loop devices here: {why}");
                return;
            }
        };
        let bytes = vec![7; 8 << 20];
        fs::write(mount.join("before"), &bytes).unwrap();
        disk.fill();
        assert!(fs::write(mount.join("while full"), &bytes).is_err());
        disk.empty();
        let deadline = Instant::now() + Duration::from_secs(60);
        while let Err(error) = fs::write(mount.join("after"), &bytes) {
            assert!(Instant::now() < deadline, "{error}");
            std::thread::sleep(Duration::from_millis(20));
        }
        assert!(fs::read(mount.join("before")).unwrap() == bytes);
    }
}
