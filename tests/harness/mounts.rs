//! Small file systems of their own: ext4 in an image file, mounted through a loop device. Needs root; where mounting
//! is not possible, tests skip, loudly.

use std::{
    fs::{self, File},
    io::Write as _,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
    process::Command,
};
use tempfile::TempDir;

/// A mounted file system. Dropping it unmounts and removes it: whatever uses it must have ended.
#[derive(Debug)]
pub struct Mount {
    point: PathBuf,
    image: PathBuf,
    _folder: TempDir,
}

/// `EXT4_IOC_SHUTDOWN` with the flag that drops what the journal holds in memory.
const SHUTDOWN: libc::c_ulong = 0x8004_587d;
const NO_LOG_FLUSH: u32 = 2;

impl Mount {
    /// An empty ext4 of so many MiB at `point`, which is made. `None` where that is not possible, said aloud.
    pub fn ext4(point: &Path, mib: u64) -> Option<Self> {
        let folder = tempfile::Builder::new().prefix("cairn-mount-").tempdir().unwrap();
        let image = folder.path().join("image");
        File::create(&image).unwrap().set_len(mib << 20).unwrap();
        fs::create_dir_all(point).unwrap();
        let mount = Self { point: point.to_owned(), image, _folder: folder };
        let made = run(Command::new("mkfs.ext4").args(["-q", "-F", "-m", "0"]).arg(&mount.image));
        if let Err(why) = made.and_then(|()| mount.mount()) {
            println!("\n!!! SKIPPED: no file system can be mounted here: {why}\n");
            return None;
        }
        // What mkfs makes is no data folder of a server.
        fs::remove_dir(point.join("lost+found")).unwrap();
        Some(mount)
    }

    fn mount(&self) -> Result<(), String> {
        run(Command::new("mount").args(["-o", "loop"]).arg(&self.image).arg(&self.point))
    }

    /// Takes all room but `left` bytes away, until the file that is answered is removed.
    pub fn fill(&self, left: u64) -> PathBuf {
        let path = self.point.join("filler");
        let mut file = File::options().create(true).append(true).open(&path).unwrap();
        let zeros = vec![0; 1 << 20];
        loop {
            let free = self.free_bytes();
            if free <= left {
                break;
            }
            let count = zeros.len().min((free - left) as usize);
            if file.write_all(&zeros[..count]).is_err() || file.sync_all().is_err() {
                break;
            }
            if free - left < 4_096 {
                break;
            }
        }
        path
    }

    /// Bytes that may still be written.
    pub fn free_bytes(&self) -> u64 {
        let stat = rustix::fs::statvfs(&self.point).unwrap();
        stat.f_bavail * stat.f_frsize
    }

    /// Takes the device away, as a disk that dies: every later write and sync fails, and what was not synced is lost.
    pub fn shut_down(&self) {
        let folder = File::open(&self.point).unwrap();
        // SAFETY: the kernel reads one u32 through the pointer, which is valid for the call.
        let result = unsafe { libc::ioctl(folder.as_raw_fd(), SHUTDOWN, &NO_LOG_FLUSH) };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    }

    /// Mounts it anew, as after a reboot: its journal is replayed. Whatever used it must have ended.
    ///
    /// # Panics
    /// When it is in use.
    pub fn remount(&self) {
        run(Command::new("umount").arg(&self.point)).unwrap();
        self.mount().unwrap();
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Lazily: a process that was just killed may hold it for a moment.
        let _ = run(Command::new("umount").arg("-l").arg(&self.point));
    }
}

fn run(command: &mut Command) -> Result<(), String> {
    let done = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    if done.status.success() {
        return Ok(());
    }
    Err(format!("{command:?}: {}", String::from_utf8_lossy(&done.stderr).trim()))
}
