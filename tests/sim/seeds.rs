//! Seeds: which to run, each in a process of its own, and how to repeat one.

use std::{
    process::{Command, Stdio},
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// Begins the line that a passed seed prints.
pub const PASSED: &str = "passed seed";
/// Seeds that once failed, each with what was wrong, and since when they pass.
const REGRESSIONS: [(u64, &str); 1] =
    [(90, "a log built on records that a failed sync had left in memory only")];
/// Seeds of a run that does not say how many (`CAIRN_SIM_SEEDS`).
const SEEDS_DEFAULT: u64 = 6;
/// Longest real time of one seed. Generous: a debug build on a busy machine.
const SEED_LIMIT: Duration = Duration::from_secs(300);
/// Seeds at a time.
const THREADS: usize = 2;

/// The one seed that was asked for.
pub fn chosen() -> Option<u64> {
    number("CAIRN_SIM_SEED")
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} is not a number: {text}")))
}

/// Prints logs in simulated time, if `CAIRN_SIM_LOG` says which.
pub fn log() {
    if let Ok(filter) = std::env::var("CAIRN_SIM_LOG") {
        tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(std::io::stderr)
            .with_ansi(false)
            .init();
    }
}

/// What a failed run says.
pub fn failure(seed: u64, problem: &str) -> String {
    format!(
        "seed {seed} failed: {problem}\nrun it again: CAIRN_SIM_SEED={seed} cargo test -p simulation --test simulation \
         -- --nocapture"
    )
}

/// Runs a seed in a process of its own.
///
/// # Errors
/// All that it said, when it failed or did not end in time.
pub fn run_apart(seed: u64, limit: Duration) -> Result<String, String> {
    let mut child = Command::new(std::env::current_exe().expect("this program has a path"))
        .args(["--exact", "one_seed", "--nocapture", "--test-threads=1"])
        .env("CAIRN_SIM_SEED", seed.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("this program starts again");
    let pipe = |source: Option<Box<dyn std::io::Read + Send>>| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            source.map(|mut source| source.read_to_end(&mut bytes));
            String::from_utf8_lossy(&bytes).into_owned()
        })
    };
    let out = pipe(child.stdout.take().map(|it| Box::new(it) as _));
    let err = pipe(child.stderr.take().map(|it| Box::new(it) as _));
    let began = Instant::now();
    let status = loop {
        match child.try_wait().expect("the child is ours") {
            Some(status) => break Some(status),
            None if began.elapsed() > limit => {
                child.kill().ok();
                child.wait().ok();
                break None;
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    let (out, err) = (out.join().unwrap_or_default(), err.join().unwrap_or_default());
    let passed = out.lines().find_map(|line| line.find(PASSED).map(|at| line[at..].to_owned()));
    match (status, passed) {
        (Some(status), Some(line)) if status.success() => Ok(line),
        (Some(status), _) => Err(format!("{}\n{out}\n{err}", failure(seed, &status.to_string()))),
        (None, _) => Err(format!("{}\n{out}\n{err}", failure(seed, &format!("no end within {limit:?}")))),
    }
}

/// Runs the seeds that once failed.
///
/// # Panics
/// When one fails again.
pub fn run_regressions() {
    let failed: Vec<String> = REGRESSIONS
        .iter()
        .filter_map(|(seed, what)| {
            run_apart(*seed, SEED_LIMIT).err().map(|why| format!("{what}, again:\n{why}"))
        })
        .collect();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

/// Runs `CAIRN_SIM_SEEDS` seeds from `CAIRN_SIM_FROM` on.
///
/// # Panics
/// When one fails; all are run, and every failure is printed.
pub fn run_many() {
    let from = number("CAIRN_SIM_FROM").unwrap_or(0);
    let count = number("CAIRN_SIM_SEEDS").unwrap_or(SEEDS_DEFAULT);
    let next = AtomicU64::new(from);
    let failures = Mutex::new(Vec::new());
    let totals = Mutex::new([0u64; 3]);
    let began = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= from + count {
                        return;
                    }
                    match run_apart(seed, SEED_LIMIT) {
                        Ok(line) => {
                            let mut totals = totals.lock().unwrap();
                            let names = ["simulated_ms=", "acknowledged=", "faults="];
                            for (total, name) in totals.iter_mut().zip(names) {
                                *total += sum(&line, name);
                            }
                        }
                        Err(problem) => {
                            println!("{problem}");
                            failures.lock().unwrap().push(seed);
                        }
                    }
                }
            });
        }
    });
    let [simulated_ms, acknowledged, faults] = *totals.lock().unwrap();
    let failures = failures.into_inner().unwrap();
    println!(
        "{count} seeds from {from} in {:.1?}: {} failed; {} s simulated, {acknowledged} operations acknowledged, {faults} \
         faults",
        began.elapsed(),
        failures.len(),
        simulated_ms / 1_000,
    );
    assert!(failures.is_empty(), "failed seeds: {failures:?}");
}

/// The number behind a name in a line, or the sum of those in its braces.
fn sum(line: &str, name: &str) -> u64 {
    let Some(at) = line.find(name) else { return 0 };
    let rest = &line[at + name.len()..];
    let end = if rest.starts_with('{') { rest.find('}') } else { rest.find(' ') };
    let rest = &rest[..end.unwrap_or(rest.len())];
    rest.split([',', '{', '}', ':', ' ']).filter_map(|word| word.trim().parse::<u64>().ok()).sum()
}
