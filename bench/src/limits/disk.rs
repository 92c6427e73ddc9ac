//! Local files: read from the page cache, written durably.

use super::{Machine, repeat, threads};
use crate::peer::FILE;
use bench::usage::{Meter, Sample};
use rustix::fs::FallocateFlags;
use std::{
    fs::{self, File},
    io::{self, Write as _},
    os::{fd::AsRawFd as _, unix::fs::FileExt as _},
    path::Path,
};

const SMALL_FILES: u64 = 1_000;
const SMALL_BYTES: usize = 4_096;
/// Fits the second-level cache: the best for reading.
const READ_BYTES: usize = 128 << 10;
/// Bytes of one write.
const WRITE_BYTES: usize = 1 << 20;
/// Write-back begins after so many bytes.
const WRITE_BACK_BYTES: u64 = 8 << 20;

/// Makes the files that are read.
///
/// # Errors
/// As the disk says.
pub fn prepare(machine: &Machine) -> io::Result<()> {
    let block = pattern(WRITE_BYTES);
    let mut file = File::create(machine.folder.join(FILE))?;
    let mut rest = machine.large_bytes as usize;
    while rest > 0 {
        let count = rest.min(block.len());
        file.write_all(&block[..count])?;
        rest -= count;
    }
    // Nothing of it is to be written back while something is measured.
    file.sync_all()?;
    let small = machine.folder.join("small");
    fs::create_dir(&small)?;
    for number in 0..SMALL_FILES {
        fs::write(small.join(number.to_string()), &block[..SMALL_BYTES])?;
    }
    File::open(&small)?.sync_all()
}

/// One large file from its beginning to its end.
///
/// # Errors
/// As the disk says.
pub fn read(machine: &Machine) -> io::Result<Sample> {
    let path = machine.folder.join(FILE);
    let mut buffer = vec![0; READ_BYTES];
    let mut once = |_| {
        let file = File::open(&path)?;
        let mut offset = 0;
        loop {
            let count = file.read_at(&mut buffer, offset)?;
            if count == 0 {
                return Ok(());
            }
            offset += count as u64;
        }
    };
    once(0)?;
    let meter = Meter::start(&[]);
    let times = repeat(machine.span, once)?;
    let bytes = times.len() as u64 * machine.large_bytes;
    Ok(meter.stop(times.len() as u64, bytes, times))
}

/// Small files in turn, by one thread.
///
/// # Errors
/// As the disk says.
pub fn read_small(machine: &Machine) -> io::Result<Sample> {
    let folder = machine.folder.join("small");
    let mut buffer = [0; SMALL_BYTES];
    let meter = Meter::start(&[]);
    let times = repeat(machine.span, |number| {
        let file = File::open(folder.join((number * 7 % SMALL_FILES).to_string()))?;
        file.read_exact_at(&mut buffer, 0)
    })?;
    let count = times.len() as u64;
    Ok(meter.stop(count, count * SMALL_BYTES as u64, times))
}

/// The same bytes into some files at once. Bytes count once, however many files they went to.
///
/// # Errors
/// As the disk says.
pub fn write(machine: &Machine, files: usize) -> io::Result<Sample> {
    let block = pattern(WRITE_BYTES);
    let path = |number: usize| machine.folder.join(format!("written-{number}"));
    let meter = Meter::start(&[]);
    threads(files, |number| write_file(&path(number), &block, machine.large_bytes).map(|()| vec![]))?;
    let sample = meter.stop(1, machine.large_bytes, Vec::new());
    for number in 0..files {
        fs::remove_file(path(number))?;
    }
    Ok(sample)
}

fn write_file(path: &Path, block: &[u8], length: u64) -> io::Result<()> {
    let file = File::create(path)?;
    rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, length)?;
    let (mut offset, mut begun) = (0, 0);
    while offset < length {
        let count = (length - offset).min(block.len() as u64);
        file.write_all_at(&block[..count as usize], offset)?;
        offset += count;
        if offset - begun >= WRITE_BACK_BYTES {
            // SAFETY: the descriptor is open; nothing is read or written through memory.
            let failed = unsafe {
                libc::sync_file_range(
                    file.as_raw_fd(),
                    begun as i64,
                    (offset - begun) as i64,
                    libc::SYNC_FILE_RANGE_WRITE,
                )
            };
            if failed != 0 {
                return Err(io::Error::last_os_error());
            }
            begun = offset;
        }
    }
    file.sync_data()
}

/// A new file and its fsync, again and again, all in one folder.
///
/// # Errors
/// As the disk says.
pub fn create_sync(machine: &Machine, count: usize) -> io::Result<Sample> {
    let folder = machine.folder.join("created");
    fs::create_dir(&folder)?;
    let block = pattern(SMALL_BYTES);
    let meter = Meter::start(&[]);
    let (operations, times) = threads(count, |thread| {
        repeat(machine.span, |number| {
            let mut file = File::create_new(folder.join(format!("{thread}-{number}")))?;
            file.write_all(&block)?;
            file.sync_all()
        })
    })?;
    let sample = meter.stop(operations, operations * SMALL_BYTES as u64, times);
    fs::remove_dir_all(&folder)?;
    Ok(sample)
}

/// Bytes that nothing compresses.
pub fn pattern(length: usize) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    })
    .take(length)
    .collect()
}
