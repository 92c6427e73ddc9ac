//! Processor time and memory of processes, and a meter around what is measured.

use serde::Serialize;
use std::time::Instant;

/// Processor time that a process used since it began, seconds, in user and system mode, with all its threads. Zero
/// when there is no such process any more.
pub fn processor_seconds(process: u32) -> f64 {
    let mut clock: libc::clockid_t = 0;
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: both calls only write to the places given, which live long enough.
    let known = unsafe {
        libc::clock_getcpuclockid(process as libc::pid_t, &raw mut clock) == 0
            && libc::clock_gettime(clock, &raw mut time) == 0
    };
    if known { time.tv_sec as f64 + time.tv_nsec as f64 / 1e9 } else { 0.0 }
}

/// Most memory that a process had at a time, bytes; nothing when there is no such process.
pub fn memory_peak(process: u32) -> Option<u64> {
    status_bytes(process, "VmHWM:")
}

/// Memory that a process has now, bytes; nothing when there is no such process.
pub fn memory_now(process: u32) -> Option<u64> {
    status_bytes(process, "VmRSS:")
}

fn status_bytes(process: u32, field: &str) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let kib = status.lines().find_map(|line| line.strip_prefix(field))?.trim().strip_suffix(" kB")?;
    Some(kib.trim().parse::<u64>().ok()? * 1024)
}

/// What one run of a workload, or of a limit, did and cost.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Sample {
    /// Finished operations.
    pub operations: u64,
    /// Bytes moved for the caller.
    pub bytes: u64,
    /// Time, seconds.
    pub seconds: f64,
    /// Processor time of this process meanwhile, seconds.
    pub client_seconds: f64,
    /// Processor time of the servers meanwhile, seconds; zero when they are not of this machine.
    pub server_seconds: f64,
    /// Time of an operation, microseconds: half of them took less.
    pub p50_us: f64,
    /// Time of an operation, microseconds: one in a hundred took longer.
    pub p99_us: f64,
}

impl Sample {
    /// How much of `unit` a second.
    pub fn rate(&self, unit: Unit) -> f64 {
        let count = match unit {
            Unit::Operations | Unit::Entries => self.operations as f64,
            Unit::Mebibytes => self.bytes as f64 / f64::from(1 << 20),
        };
        count / self.seconds.max(1e-9)
    }

    /// Processor time for one operation in microseconds, or for one GiB in seconds: at the client and at the servers.
    pub fn cost(&self, unit: Unit) -> (f64, f64) {
        let per = match unit {
            Unit::Operations | Unit::Entries => self.operations as f64 / 1e6,
            Unit::Mebibytes => self.bytes as f64 / f64::from(1 << 30),
        };
        (self.client_seconds / per.max(1e-12), self.server_seconds / per.max(1e-12))
    }
}

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// Operations a second; costs are microseconds an operation.
    Operations,
    /// MiB a second; costs are seconds for a GiB.
    Mebibytes,
    /// Entries of a directory a second; costs are microseconds an entry.
    Entries,
}

impl Unit {
    /// What rates are written in.
    pub fn rate_name(self) -> &'static str {
        match self {
            Self::Operations => "op/s",
            Self::Mebibytes => "MiB/s",
            Self::Entries => "entries/s",
        }
    }

    /// What costs are written in.
    pub fn cost_name(self) -> &'static str {
        match self {
            Self::Operations => "us/op",
            Self::Mebibytes => "s/GiB",
            Self::Entries => "us/entry",
        }
    }
}

/// Runs from its start to its stop.
#[derive(Debug)]
pub struct Meter<'a> {
    servers: &'a [u32],
    own: f64,
    theirs: f64,
    began: Instant,
}

impl<'a> Meter<'a> {
    /// Starts; `servers` are the ids of the processes whose time counts as the servers'.
    pub fn start(servers: &'a [u32]) -> Self {
        let theirs = servers.iter().map(|&id| processor_seconds(id)).sum();
        Self { servers, own: processor_seconds(std::process::id()), theirs, began: Instant::now() }
    }

    /// Time since the start, seconds.
    pub fn seconds(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }

    /// Stops. `times` are those of single operations in microseconds, in any order.
    pub fn stop(self, operations: u64, bytes: u64, mut times: Vec<u32>) -> Sample {
        let seconds = self.seconds();
        let theirs: f64 = self.servers.iter().map(|&id| processor_seconds(id)).sum();
        let client_seconds = processor_seconds(std::process::id()) - self.own;
        times.sort_unstable();
        let at = |part: f64| {
            let place = ((times.len() as f64 * part) as usize).min(times.len().saturating_sub(1));
            times.get(place).map_or(0.0, |&time| f64::from(time))
        };
        Sample {
            operations,
            bytes,
            seconds,
            client_seconds,
            server_seconds: (theirs - self.theirs).max(0.0),
            p50_us: at(0.5),
            p99_us: at(0.99),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_shows_in_the_processor_time_of_this_process() {
        let own = [std::process::id()];
        let meter = Meter::start(&own);
        let mut sum = 0u64;
        while meter.seconds() < 0.05 {
            sum = std::hint::black_box(sum.wrapping_add(1));
        }
        let sample = meter.stop(10, 1 << 20, vec![30, 10, 20]);
        assert!(sample.client_seconds > 0.0 && sample.server_seconds > 0.0, "{sample:?}");
        assert_eq!((sample.p50_us, sample.p99_us), (20.0, 30.0));
        assert!(memory_peak(own[0]).unwrap() >= memory_now(own[0]).unwrap() / 2);
    }

    #[test]
    fn rates_and_costs_are_by_operation_or_by_byte() {
        let sample = Sample {
            operations: 100,
            bytes: 1 << 30,
            seconds: 2.0,
            client_seconds: 1.0,
            server_seconds: 3.0,
            ..Sample::default()
        };
        assert_eq!(sample.rate(Unit::Operations), 50.0);
        assert_eq!(sample.rate(Unit::Mebibytes), 512.0);
        let (client, server) = sample.cost(Unit::Mebibytes);
        assert_eq!((client, server), (1.0, 3.0));
        let (client, server) = sample.cost(Unit::Operations);
        assert!((client - 10_000.0).abs() < 1e-6 && (server - 30_000.0).abs() < 1e-6);
    }

    #[test]
    fn processes_that_are_gone_cost_nothing() {
        // Linux numbers processes below 2^22.
        assert_eq!(processor_seconds(1 << 22), 0.0);
        assert_eq!(memory_peak(1 << 22), None);
    }
}
