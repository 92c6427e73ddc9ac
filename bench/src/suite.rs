//! The steps of a round, and how a run goes.

use crate::{
    Args,
    goals::{self, GOALS},
    limits::{Limit, Machine, disk},
    outcome::{Hardware, Observation, Outcome},
    services::{Services, spawn},
};
use bench::{
    report::Series,
    usage::{Sample, Unit, memory_peak},
    workload::{Bench, Scale, find},
};
use std::{
    io::{self, BufRead as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};
use tokio::runtime::Runtime;

/// Folder of the workloads in the cluster.
const FOLDER: &str = "/bench";

/// How a step is done.
#[derive(Clone, Copy, Debug)]
pub enum How {
    /// By the machine alone.
    Limit(Limit),
    /// By the cluster, a workload of that name.
    Cairn(&'static str),
    /// The same over Unix sockets.
    CairnUnix(&'static str),
}

/// One thing that is measured in each round.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// Its name.
    pub id: &'static str,
    /// What it is, in words. Empty for a workload, which says it itself.
    pub what: &'static str,
    /// How it is done.
    pub how: How,
}

const fn limit(id: &'static str, what: &'static str, limit: Limit) -> Step {
    Step { id, what, how: How::Limit(limit) }
}

const fn cairn(id: &'static str) -> Step {
    Step { id, what: "", how: How::Cairn(id) }
}

/// A round: what is compared stands together.
pub const STEPS: [Step; 37] = [
    limit("raw_tcp", "limit: raw TCP, pread + write of a page-cached file", Limit::RawTcp),
    cairn("large_read"),
    limit("raw_unix", "limit: raw Unix socket, the same", Limit::RawUnix),
    Step { id: "large_read_unix", what: "large read, Unix socket", how: How::CairnUnix("large_read") },
    limit("local_read", "limit: local open + pread", Limit::LocalRead),
    limit("local_write_1", "limit: fallocate + write + early write-back + fdatasync", Limit::LocalWrite(1)),
    cairn("large_write_one_copy"),
    limit("local_write_3", "limit: the same into 3 files at once", Limit::LocalWrite(3)),
    cairn("large_write"),
    limit("echo_4k_1", "limit: unary echo of 4 KiB, 1 in flight", Limit::Echo(4_096, 1)),
    limit("log_sync_1", "limit: one preallocated log, write + fdatasync", Limit::LogSync(1)),
    limit("log_sync_3", "limit: three logs at once", Limit::LogSync(3)),
    cairn("small_write_1"),
    cairn("overwrite_1"),
    limit("create_sync_1", "limit: ext4 create + fsync, 1 thread", Limit::CreateSync(1)),
    limit("create_sync_16", "limit: ext4 create + fsync, 16 threads", Limit::CreateSync(16)),
    cairn("small_write_16"),
    cairn("small_write_64"),
    cairn("small_write_64_shared"),
    cairn("small_write_64_one_copy"),
    cairn("overwrite_16"),
    limit("echo_4k_64", "limit: unary echo of 4 KiB, 64 in flight", Limit::Echo(4_096, 64)),
    cairn("small_read_1"),
    cairn("small_read_16"),
    cairn("small_read_64"),
    cairn("random_read_64"),
    limit("local_small_read", "limit: local open + pread + close of 4 KiB", Limit::LocalSmallRead),
    limit("echo_64_64", "limit: unary echo of 64 bytes, 64 in flight", Limit::Echo(64, 64)),
    cairn("lookup_1"),
    cairn("lookup_64"),
    limit("group_log_64", "limit: one log, group commit, 64 writers of 4 KiB", Limit::GroupLog(64)),
    cairn("mkdir_1"),
    cairn("mkdir_64"),
    cairn("rename_1"),
    cairn("rename_64"),
    cairn("list"),
    cairn("list_attributes"),
];

impl Step {
    /// What it is, in words.
    pub fn words(&self) -> &'static str {
        match self.how {
            How::Cairn(id) => find(id).map_or("", |workload| workload.what),
            _ => self.what,
        }
    }

    fn unit(&self) -> Unit {
        match self.how {
            How::Limit(limit) => limit.unit(),
            How::Cairn(id) | How::CairnUnix(id) => {
                find(id).map_or(Unit::Operations, |workload| workload.unit)
            }
        }
    }
}

/// Runs everything that the arguments ask for.
///
/// # Errors
/// The first failure: there are no figures of a run that was not whole.
pub fn run(args: &Args) -> io::Result<Outcome> {
    let scale = if args.quick { Scale::quick() } else { Scale::full() };
    let rounds = args.rounds.unwrap_or(if args.quick { 2 } else { 5 }).max(1);
    let steps = chosen(&args.only)?;
    let hardware = Hardware::look(&args.data);
    let folder = tempfile::Builder::new().prefix("bench-data-").tempdir_in(&args.data)?;
    let programs = match &args.services {
        Some(folder) => folder.clone(),
        None => std::env::current_exe()?.parent().map(Path::to_owned).unwrap_or_default(),
    };
    let (machine, peer) = machine(folder.path(), &scale)?;
    let mut cluster = Running::start(&programs, folder.path(), scale)?;

    let mut series: Vec<Series> =
        steps.iter().map(|step| Series::new(step.id, step.words(), step.unit())).collect();
    for round in 1..=rounds {
        for (step, series) in steps.iter().zip(&mut series) {
            eprintln!("round {round} of {rounds}: {}", step.id);
            let sample = match step.how {
                How::Limit(limit) => machine.measure(limit)?,
                How::Cairn(id) => cluster.measure(id, false)?,
                How::CairnUnix(id) => cluster.measure(id, true)?,
            };
            series.samples.push(sample);
        }
    }
    let memory = cluster.memory();
    let observations = if args.only.is_empty() { cluster.observe()? } else { Vec::new() };
    drop((cluster, peer));
    if args.keep {
        eprintln!("data and logs stay in {}", folder.keep().display());
    }
    let goals = goals::judge(&series, &observations);
    Ok(Outcome { hardware: hardware.done(), quick: args.quick, rounds, goals, series, memory, observations })
}

/// The steps whose names contain any of these, and what they are compared with.
fn chosen(only: &[String]) -> io::Result<Vec<Step>> {
    let named = |id: &str| only.is_empty() || only.iter().any(|name| id.contains(name.as_str()));
    let mut wanted: Vec<&str> = STEPS.iter().map(|step| step.id).filter(|id| named(id)).collect();
    if wanted.is_empty() {
        let known: Vec<_> = STEPS.iter().map(|step| step.id).collect();
        return Err(io::Error::other(format!("--only fits no step; there are {}", known.join(", "))));
    }
    for goal in &GOALS {
        if goal.measured.is_some_and(named) {
            wanted.extend(goal.against.steps());
        }
    }
    Ok(STEPS.into_iter().filter(|step| wanted.contains(&step.id)).collect())
}

/// Prepares the files of the limits, and starts their other end.
fn machine(folder: &Path, scale: &Scale) -> io::Result<(Machine, Peer)> {
    let folder = folder.join("limits");
    std::fs::create_dir(&folder)?;
    let mut machine = Machine {
        folder: folder.clone(),
        span: scale.span,
        large_bytes: scale.large_bytes,
        peer: 0,
        raw_port: 0,
        echo_port: 0,
    };
    disk::prepare(&machine)?;
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("--peer").arg(&folder).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut peer = Peer(spawn(command)?);
    let mut line = String::new();
    if let Some(out) = peer.0.stdout.take() {
        io::BufReader::new(out).read_line(&mut line)?;
    }
    let mut ports = line.split_whitespace().filter_map(|word| word.parse().ok());
    let (Some(raw), Some(echo)) = (ports.next(), ports.next()) else {
        return Err(io::Error::other("the other end of the limits did not start"));
    };
    (machine.peer, machine.raw_port, machine.echo_port) = (peer.0.id(), raw, echo);
    Ok((machine, peer))
}

/// The other end of the limits. Dropping it ends it.
struct Peer(Child);

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A cluster at work.
struct Running {
    services: Services,
    bench: Bench,
    scale: Scale,
    folder: PathBuf,
    // Last: the others need it when they are dropped.
    runtime: Runtime,
}

impl Running {
    fn start(programs: &Path, folder: &Path, scale: Scale) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let services = Services::start(programs, folder)?;
        let bench = runtime.block_on(async {
            services.ready().await?;
            Bench::new(services.client()?, FOLDER, scale.clone(), services.ids()).await
        });
        let bench = bench.map_err(io::Error::other)?;
        Ok(Self { services, bench, scale, folder: folder.to_owned(), runtime })
    }

    fn measure(&mut self, id: &str, unix: bool) -> io::Result<Sample> {
        let workload = find(id).ok_or_else(|| io::Error::other(format!("no workload is called {id}")))?;
        let services = &self.services;
        let connect = || if unix { services.unix_client() } else { services.client() };
        self.runtime.block_on(self.bench.run(workload, &connect)).map_err(|error| {
            let logs = self.folder.display();
            io::Error::other(format!("{error} (with --keep the services' logs stay in {logs})"))
        })
    }

    /// Most memory of each process.
    fn memory(&self) -> Vec<Observation> {
        let mut all = Vec::new();
        for (number, id) in self.services.ids().into_iter().enumerate() {
            let what = if number == 0 { "directory".to_owned() } else { format!("file server {number}") };
            all.push((what, memory_peak(id)));
        }
        all.push(("client".to_owned(), memory_peak(std::process::id())));
        all.into_iter()
            .map(|(what, bytes)| {
                Observation::new("memory", &what, bytes.unwrap_or(0) as f64 / 1048576.0, "MiB")
            })
            .collect()
    }

    /// What is seen once, at the end.
    fn observe(&mut self) -> io::Result<Vec<Observation>> {
        let Self { services, runtime, .. } = self;
        let directory = services.ids().first().and_then(|&id| memory_peak(id)).unwrap_or(0);
        let seen = runtime.block_on(async {
            let status = services.client()?.status().await?;
            let names = status.files + status.directories;
            let (file, chunks) = services.restart_file_server().await?;
            let restart = services.restart_directory(FOLDER).await?;
            Ok::<_, client_lib::Error>((names, file, chunks, restart))
        });
        let (names, file, chunks, restart) = seen.map_err(io::Error::other)?;
        let memory = directory as f64 / 1048576.0;
        Ok(vec![
            Observation::new(
                "directory_memory",
                &format!("directory memory at {names} names"),
                memory,
                "MiB",
            ),
            Observation::new("directory_restart", &format!("directory restart, {names} names"), restart, "s"),
            Observation::new("file_restart", &format!("file server restart, {chunks} chunks"), file, "s"),
            Observation::new(
                "listed",
                "entries in the listed directory",
                self.scale.listed as f64,
                "entries",
            ),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bench::workload::ALL;

    #[test]
    fn every_workload_is_a_step_and_every_step_says_what_it_is() {
        for workload in &ALL {
            assert!(STEPS.iter().any(|step| step.id == workload.id), "{} is no step", workload.id);
        }
        for (i, step) in STEPS.iter().enumerate() {
            assert!(!step.words().is_empty(), "{}", step.id);
            assert!(STEPS[..i].iter().all(|other| other.id != step.id), "two steps {}", step.id);
        }
    }

    #[test]
    fn chosen_steps_bring_what_they_are_compared_with() {
        let ids = |only: &[&str]| -> Vec<_> {
            let only: Vec<String> = only.iter().map(|&name| name.to_owned()).collect();
            chosen(&only).unwrap().iter().map(|step| step.id).collect()
        };
        assert_eq!(ids(&[]).len(), STEPS.len());
        assert_eq!(ids(&["lookup_64"]), ["echo_64_64", "lookup_64"]);
        assert_eq!(ids(&["small_write_1"])[..4], ["echo_4k_1", "log_sync_1", "log_sync_3", "small_write_1"]);
        assert!(chosen(&["nothing".to_owned()]).is_err());
    }
}
