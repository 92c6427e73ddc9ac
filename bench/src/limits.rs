//! What the machine can do, with nothing of Cairn in the way.

pub mod disk;
pub mod echo;
pub mod log;
pub mod raw;

use bench::usage::{Sample, Unit};
use std::{io, path::PathBuf, time::Duration};

/// One limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// A page-cached file by pread and write over loopback TCP.
    RawTcp,
    /// The same over a Unix socket.
    RawUnix,
    /// gRPC unary calls: bytes of the answer, calls in flight.
    Echo(u32, usize),
    /// pread of a page-cached file by its own reader.
    LocalRead,
    /// open, pread and close of small page-cached files.
    LocalSmallRead,
    /// fallocate, write, early write-back, fdatasync: files at once.
    LocalWrite(usize),
    /// New file of 4 KiB and fsync: threads.
    CreateSync(usize),
    /// One log, group commit: writers of 4 KiB.
    GroupLog(usize),
    /// 4 KiB into logs at once, and all of them synced: logs.
    LogSync(usize),
}

impl Limit {
    /// What is counted.
    pub fn unit(self) -> Unit {
        match self {
            Self::RawTcp | Self::RawUnix | Self::LocalRead | Self::LocalWrite(_) => Unit::Mebibytes,
            _ => Unit::Operations,
        }
    }
}

/// Where and how long limits are measured.
#[derive(Debug)]
pub struct Machine {
    /// A folder on the disk.
    pub folder: PathBuf,
    /// Length of one measurement.
    pub span: Duration,
    /// Bytes of a large file.
    pub large_bytes: u64,
    /// Process id of the other end.
    pub peer: u32,
    /// Its port for raw TCP.
    pub raw_port: u16,
    /// Its port for echo calls.
    pub echo_port: u16,
}

impl Machine {
    /// Measures a limit once.
    ///
    /// # Errors
    /// As the machine says.
    pub fn measure(&self, limit: Limit) -> io::Result<Sample> {
        match limit {
            Limit::RawTcp => raw::tcp(self),
            Limit::RawUnix => raw::unix(self),
            Limit::Echo(bytes, in_flight) => echo::measure(self, bytes, in_flight),
            Limit::LocalRead => disk::read(self),
            Limit::LocalSmallRead => disk::read_small(self),
            Limit::LocalWrite(files) => disk::write(self, files),
            Limit::CreateSync(threads) => disk::create_sync(self, threads),
            Limit::GroupLog(writers) => log::group(self, writers),
            Limit::LogSync(logs) => log::together(self, logs),
        }
    }
}

/// Runs some threads at once. Each answers what its operations took; all of them, and their number.
///
/// # Errors
/// The first failure of any.
pub fn threads<F>(threads: usize, operation: F) -> io::Result<(u64, Vec<u32>)>
where
    F: Fn(usize) -> io::Result<Vec<u32>> + Sync,
{
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|number| {
                let operation = &operation;
                scope.spawn(move || operation(number))
            })
            .collect();
        let mut times = Vec::new();
        for worker in workers {
            times.extend(worker.join().map_err(|_| io::Error::other("a thread of a limit panicked"))??);
        }
        Ok((times.len() as u64, times))
    })
}

/// Calls `operation` until `span` is over, at least once; answers what each took, microseconds.
///
/// # Errors
/// The first failure.
pub fn repeat(span: Duration, mut operation: impl FnMut(u64) -> io::Result<()>) -> io::Result<Vec<u32>> {
    let end = std::time::Instant::now() + span;
    let mut times = Vec::new();
    loop {
        let begin = std::time::Instant::now();
        if begin >= end && !times.is_empty() {
            return Ok(times);
        }
        operation(times.len() as u64)?;
        times.push(u32::try_from(begin.elapsed().as_micros()).unwrap_or(u32::MAX));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_limit_that_needs_no_other_end_is_measured() {
        let folder = tempfile::tempdir().unwrap();
        let machine = Machine {
            folder: folder.path().to_owned(),
            span: Duration::from_millis(5),
            large_bytes: 3 << 20,
            peer: 0,
            raw_port: 0,
            echo_port: echo::serve().unwrap(),
        };
        disk::prepare(&machine).unwrap();
        for limit in [
            Limit::Echo(64, 1),
            Limit::Echo(4_096, 8),
            Limit::LocalRead,
            Limit::LocalSmallRead,
            Limit::LocalWrite(1),
            Limit::LocalWrite(3),
            Limit::CreateSync(4),
            Limit::GroupLog(4),
            Limit::LogSync(3),
        ] {
            let sample = machine.measure(limit).unwrap();
            assert!(sample.rate(limit.unit()) > 0.0, "{limit:?}: {sample:?}");
        }
    }
}
