//! How long an application waits when a server dies or falls silent: real processes, real signals, no error allowed.
//!
//! `CAIRN_FAILOVER_ROUNDS` (default 2) says how often each fault is made. From 20 on they are counted: each is made so
//! often, and the promise is held against the 99th percentile.

use cairn_tests::{amount, services::Services, stalls::Successes};
use client_lib::{Client, Error, WriteOptions};
use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::Mutex,
    task::JoinSet,
    time::{Interval, MissedTickBehavior},
};

/// Promised: no operation is stalled for longer by a killed file server.
const KILLED_LIMIT: Duration = Duration::from_millis(500);
/// Promised: nor for longer by one that is silent.
const SILENT_LIMIT: Duration = Duration::from_secs(3);
/// Promised: after its restart the directory serves again by then.
const DIRECTORY_LIMIT: Duration = Duration::from_secs(2);
/// Each promise is measured again for as often when it was not kept: what a server's death costs is there each time,
/// what other programs on the machine cost is not. A release build is measured once.
const ATTEMPTS: usize = if cfg!(debug_assertions) { 3 } else { 1 };
/// From so many rounds on each fault is made and measured as often, and percentiles count.
const COUNTED: usize = 20;
/// Longest wait for all copies to be there before the next fault.
const HEALTHY_LIMIT: Duration = Duration::from_secs(120);

const SMALL_FILES: usize = 64;
const SMALL_BYTES: usize = 16 * 1024;
const STREAM_BYTES: usize = 24 << 20;
const STREAM_CHUNK_BYTES: u64 = 1 << 20;
/// The application does one small operation, and streams one piece, at most this often: an application that takes
/// all of the machine would measure itself.
const PACE: Duration = Duration::from_millis(5);
const PIECE_BYTES: usize = 64 * 1024;

/// One test at a time has the machine: they measure.
static ALONE: Mutex<()> = Mutex::const_new(());

fn rounds() -> usize {
    usize::try_from(amount("CAIRN_FAILOVER_ROUNDS", 2)).unwrap()
}

/// Load before a fault, for the gaps that the machine makes by itself.
fn calm() -> Duration {
    Duration::from_millis(if rounds() >= COUNTED { 700 } else { 2_000 })
}

/// What is watched after a fault.
fn after() -> Duration {
    Duration::from_millis(if rounds() >= COUNTED { 2_000 } else { 4_000 })
}

/// An application that writes and reads small files and long streams all the time.
struct Application {
    kinds: [(&'static str, Arc<Successes>); 4],
    stop: Arc<AtomicBool>,
    tasks: JoinSet<()>,
}

impl Application {
    async fn start(services: &Services) -> Self {
        let client = || Client::builder().directory(services.directory_uri()).chunk_bytes(STREAM_CHUNK_BYTES);
        let writing = client().build().unwrap();
        for number in 0..SMALL_FILES {
            writing.write(&format!("/read-{number}"), vec![number as u8; SMALL_BYTES]).await.unwrap();
        }
        let long: Vec<u8> = (0..STREAM_BYTES).map(|at| (at / 7) as u8).collect();
        writing.write("/long", long).await.unwrap();

        let kinds: [(_, Arc<Successes>); 4] = ["writes", "reads", "written stream", "read stream"]
            .map(|name| (name, Arc::new(Successes::default())));
        let [writes, reads, written, read] = kinds.clone().map(|(_, successes)| successes);
        let stop = Arc::new(AtomicBool::new(false));
        let mut tasks = JoinSet::new();

        let (client_1, stopped, successes) = (client().build().unwrap(), stop.clone(), writes);
        tasks.spawn(async move {
            let mut pace = pace();
            for number in 0.. {
                pace.tick().await;
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let path = format!("/written-{}", number % SMALL_FILES);
                note(&successes, client_1.write(&path, vec![number as u8; SMALL_BYTES]).await);
            }
        });
        let (client_2, stopped, successes) = (client().build().unwrap(), stop.clone(), reads);
        tasks.spawn(async move {
            let mut pace = pace();
            for number in 0.. {
                pace.tick().await;
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let number = number % SMALL_FILES;
                match client_2.read(&format!("/read-{number}")).await {
                    Ok(bytes) if bytes == vec![number as u8; SMALL_BYTES] => successes.note(),
                    Ok(_) => successes.error(format!("/read-{number} has other bytes")),
                    Err(error) => successes.error(error),
                }
            }
        });
        let (client_3, stopped, successes) = (client().build().unwrap(), stop.clone(), written);
        tasks.spawn(async move {
            while !stopped.load(Ordering::Relaxed) {
                let source = Source { left: STREAM_BYTES, pace: pace(), successes: successes.clone() };
                note(&successes, client_3.put_reader("/streamed", source, WriteOptions::new()).await);
            }
        });
        let (client_4, stopped, successes) = (client().build().unwrap(), stop.clone(), read);
        tasks.spawn(async move {
            while !stopped.load(Ordering::Relaxed) {
                let sink = Sink { at: 0, pace: pace(), successes: successes.clone() };
                note(&successes, client_4.get_writer("/long", sink).await);
            }
        });
        Self { kinds, stop, tasks }
    }

    /// The longest gap of each kind, in its order.
    fn gaps(&self, from: Instant, to: Instant) -> [Duration; 4] {
        self.kinds.each_ref().map(|(_, successes)| successes.longest_gap(from, to))
    }

    async fn stop(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        while let Some(ended) = self.tasks.join_next().await {
            ended.unwrap();
        }
        for (name, successes) in &self.kinds {
            assert_eq!(successes.errors(), Vec::<String>::new(), "errors of {name} reached the application");
            assert!(successes.count() > 10, "{name}: only {}", successes.count());
        }
    }
}

fn pace() -> Interval {
    let mut pace = tokio::time::interval(PACE);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    pace
}

fn note<T>(successes: &Successes, result: Result<T, Error>) {
    match result {
        Ok(_) => successes.note(),
        Err(error) => successes.error(format!("{:?}: {error}", error.reason)),
    }
}

/// What is written: notes whenever more is taken.
struct Source {
    left: usize,
    pace: Interval,
    successes: Arc<Successes>,
}

impl AsyncRead for Source {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        ready!(self.pace.poll_tick(context));
        let count = self.left.min(buffer.remaining()).min(PIECE_BYTES);
        buffer.initialize_unfilled_to(count).fill(b'w');
        buffer.advance(count);
        self.left -= count;
        self.successes.note();
        Poll::Ready(Ok(()))
    }
}

/// What is read: checks it, and notes whenever more arrives.
struct Sink {
    at: usize,
    pace: Interval,
    successes: Arc<Successes>,
}

impl AsyncWrite for Sink {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.pace.poll_tick(context));
        let bytes = &bytes[..bytes.len().min(PIECE_BYTES)];
        if let Some(wrong) = (0..bytes.len()).find(|at| bytes[*at] != ((self.at + at) / 7) as u8) {
            return Poll::Ready(Err(io::Error::other(format!("wrong byte at {}", self.at + wrong))));
        }
        self.at += bytes.len();
        self.successes.note();
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

fn in_words(application: &Application, gaps: [Duration; 4]) -> String {
    let words: Vec<_> = application
        .kinds
        .iter()
        .zip(gaps)
        .map(|((name, _), gap)| format!("{name} {:.3} s", gap.as_secs_f64()))
        .collect();
    words.join(", ")
}

/// What one fault did.
struct Measured {
    what: String,
    /// The longest gaps before it.
    calm: [Duration; 4],
    /// The longest gaps since.
    gaps: [Duration; 4],
}

impl Measured {
    /// What was done, whoever it was done to.
    fn kind(&self) -> &str {
        self.what.rsplit(' ').next().unwrap_or_default()
    }

    /// Gaps may be as long as promised. Where the machine itself makes long ones, without any fault, those come on top:
    /// they hit whichever operation is under way.
    fn kept(&self, application: &Application, limit: Duration) -> Result<(), String> {
        let Self { what, calm, gaps } = self;
        println!("{what}: longest gap: {}", in_words(application, *gaps));
        println!("      without a fault: {}", in_words(application, *calm));
        let noise = calm.iter().max().copied().unwrap_or_default();
        for ((name, _), gap) in application.kinds.iter().zip(gaps) {
            if *gap > limit + noise {
                return Err(format!(
                    "{what}: {name} were stalled for {gap:?}, promised are {limit:?}, the machine's own are {noise:?}"
                ));
            }
        }
        Ok(())
    }
}

/// Shows percentiles of what many faults did, by the kind of fault, and holds the promise against the 99th.
fn counted(application: &Application, limit: Duration, all: &[Measured]) {
    let percentile = |sorted: &[Duration], share: usize| {
        sorted[(sorted.len() * share).div_ceil(100).max(1) - 1].as_secs_f64()
    };
    let sorted = |mut gaps: Vec<Duration>| {
        gaps.sort();
        gaps
    };
    let mut kinds: Vec<&str> = all.iter().map(|measured| measured.kind()).collect();
    kinds.sort_unstable();
    kinds.dedup();
    for kind in kinds {
        let of: Vec<&Measured> = all.iter().filter(|measured| measured.kind() == kind).collect();
        let rows = application.kinds.iter().enumerate().map(|(at, (name, _))| {
            let gaps = of.iter().map(|measured| measured.gaps[at]).collect();
            let calm = of.iter().map(|measured| measured.calm[at]).collect();
            (*name, sorted(gaps), sorted(calm))
        });
        for (name, gaps, calm) in rows {
            let [p50, p99, max] = [50, 99, 100].map(|share| percentile(&gaps, share));
            let noise = percentile(&calm, 99);
            println!(
                "{kind}, {} times, {name}: p50 {p50:.3} s, p99 {p99:.3} s, longest {max:.3} s; without a fault p99 \
                 {noise:.3} s",
                gaps.len()
            );
            assert!(
                p99 <= limit.as_secs_f64() + noise,
                "{kind}: {name} p99 {p99:.3} s, promised are {limit:?}"
            );
        }
    }
}

/// Makes a fault in each round, on an application that is at work, until the promise was kept as often.
async fn keeps(
    limit: Duration,
    mut fault: impl AsyncFnMut(&mut Services, &Application, usize) -> Vec<Measured>,
) {
    let _alone = ALONE.lock().await;
    let mut services = Services::start(3).await;
    let application = Application::start(&services).await;
    if rounds() >= COUNTED {
        let mut all = Vec::new();
        for round in 0..rounds() {
            services.healthy(HEALTHY_LIMIT).await;
            let measured = fault(&mut services, &application, round).await;
            for measured in &measured {
                println!("{round}: {}: {}", measured.what, in_words(&application, measured.gaps));
            }
            all.extend(measured);
        }
        counted(&application, limit, &all);
        application.stop().await;
        return;
    }
    for round in 0..rounds() {
        for attempt in 1..=ATTEMPTS {
            services.healthy(HEALTHY_LIMIT).await;
            let measured = fault(&mut services, &application, round).await;
            let kept: Result<Vec<()>, String> =
                measured.iter().map(|measured| measured.kept(&application, limit)).collect();
            match kept {
                Ok(_) => break,
                Err(broken) if attempt == ATTEMPTS => panic!("{broken} ({attempt} times in a row)"),
                Err(broken) => println!("measured again: {broken}"),
            }
        }
    }
    application.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_killed_file_server_stalls_nothing_for_longer_than_half_a_second() {
    keeps(KILLED_LIMIT, async |services, application, round| {
        let start = Instant::now();
        tokio::time::sleep(calm()).await;
        let killed = Instant::now();
        let victim = round % services.files.len();
        services.files[victim].kill9();
        tokio::time::sleep(after()).await;
        // Its return disturbs nothing either.
        let back = Instant::now();
        services.start_all();
        services.ready().await;
        let calm = application.gaps(start, killed);
        let name = &services.files[victim].name;
        vec![
            Measured { what: format!("{name} killed"), calm, gaps: application.gaps(killed, back) },
            Measured { what: format!("{name} back"), calm, gaps: application.gaps(back, Instant::now()) },
        ]
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_silent_file_server_stalls_nothing_for_longer_than_three_seconds() {
    keeps(SILENT_LIMIT, async |services, application, round| {
        let start = Instant::now();
        tokio::time::sleep(calm()).await;
        let silent = Instant::now();
        let victim = round % services.files.len();
        services.files[victim].pause();
        // Until it is suspect, and beyond.
        tokio::time::sleep(SILENT_LIMIT + after()).await;
        let end = Instant::now();
        services.files[victim].resume();
        services.ready().await;
        let what = format!("{} silent", services.files[victim].name);
        vec![Measured { what, calm: application.gaps(start, silent), gaps: application.gaps(silent, end) }]
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_restarted_directory_serves_within_two_seconds() {
    keeps(DIRECTORY_LIMIT, async |services, application, _| {
        let start = Instant::now();
        tokio::time::sleep(calm()).await;
        let killed = Instant::now();
        services.directory.kill9();
        tokio::time::sleep(Duration::from_millis(700)).await;
        let restart = Instant::now();
        services.directory.start();
        services.ready().await;
        tokio::time::sleep(DIRECTORY_LIMIT).await;
        // A gap began before the restart; what counts is when it ends.
        let down = restart - killed;
        let gaps = application.gaps(restart, Instant::now()).map(|gap| gap.saturating_sub(down));
        vec![Measured { what: "directory back".to_owned(), calm: application.gaps(start, killed), gaps }]
    })
    .await;
}
