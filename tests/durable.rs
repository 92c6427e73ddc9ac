//! DURABLE: whatever is killed at whatever moment, nothing acknowledged is lost.
//!
//! Real processes on a real disk under load; what was acknowledged is recorded here, outside of the cluster.
//! `CAIRN_NEMESIS_SECONDS` (default 30) says how long faults are made, `CAIRN_SEED` replays their order.

use cairn_tests::{checks::durable, load::Load, processes::Process, seed, services::Services, trees};
use client_lib::Client;
use cluster::Cluster;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::SliceRandom as _};
use std::{
    collections::BTreeMap,
    fs,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

const WORKERS: usize = 8;
/// Acknowledged operations a second before the first fault, without which a run shows nothing.
const RATE_MIN: f64 = if cfg!(debug_assertions) { 50.0 } else { 100.0 };
/// Longest that the load may need to go on after a fault: start of the services, ends of leases, all in a debug build.
const RECOVERY_LIMIT: Duration = Duration::from_secs(90);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    /// SIGKILL to every process at the same moment.
    Everything,
    /// SIGKILL to one file server.
    OneFileServer,
    /// SIGKILL to two of three file servers: fewer than a write needs are left.
    TwoFileServers,
    /// SIGKILL to the directory.
    Directory,
}

const FAULTS: [Fault; 4] = [Fault::Everything, Fault::OneFileServer, Fault::TwoFileServers, Fault::Directory];

fn from_environment(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().unwrap_or_else(|_| panic!("{name}={value}")))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn durable_kill_9_at_random_moments_loses_nothing_acknowledged() {
    let seed = from_environment("CAIRN_SEED", rand::random());
    let length = Duration::from_secs(from_environment("CAIRN_NEMESIS_SECONDS", 30));
    println!("CAIRN_SEED={seed} CAIRN_NEMESIS_SECONDS={}", length.as_secs());
    let mut random = StdRng::seed_from_u64(seed);

    let mut services = Services::start(3).await;
    let load = Load::start(services.directory_uri(), WORKERS, seed).await;
    let rate = load.baseline(RATE_MIN).await;
    println!("before the first fault: {rate:.0} acknowledged operations a second");
    let began = Instant::now();

    let mut fired: BTreeMap<Fault, u32> = BTreeMap::new();
    let (mut rounds, mut compared) = (0, 0);
    while began.elapsed() < length || fired.len() < FAULTS.len() {
        let mut faults = FAULTS;
        faults.shuffle(&mut random);
        for fault in faults {
            tokio::time::sleep(Duration::from_millis(random.random_range(50..1_000))).await;
            make(fault, &mut services, &mut random).await;
            *fired.entry(fault).or_default() += 1;
            services.ready().await;
            load.progress(WORKERS as u64, RECOVERY_LIMIT).await;
        }
        rounds += 1;
        let (problems, names) = load.verify(services.directory_uri()).await;
        compared += names;
        assert!(problems.is_empty(), "seed {seed}, round {rounds}:\n{}", problems.join("\n"));
    }
    // Once more, from a cold start, with nothing under way.
    services.kill_all();
    services.start_all();
    services.ready().await;
    let (problems, names) = load.verify(services.directory_uri()).await;
    compared += names;
    assert!(problems.is_empty(), "seed {seed}, at the end:\n{}", problems.join("\n"));

    let acknowledged = load.acknowledged();
    let unknown = load.tally.unknown.load(Ordering::Relaxed);
    println!(
        "{acknowledged} operations acknowledged, {unknown} of unknown outcome, {compared} names compared, faults: \
         {fired:?}; {}",
        services.memory_peaks().0
    );
    for reason in load.tally.unknown_reasons() {
        println!("unknown: {reason}");
    }
    assert!(rate >= RATE_MIN, "{rate:.0} operations a second are too few to show anything");
    assert!(acknowledged * 4 > (acknowledged + unknown) * 3, "too many operations of unknown outcome");
}

async fn make(fault: Fault, services: &mut Services, random: &mut StdRng) {
    match fault {
        Fault::Everything => services.kill_all(),
        Fault::Directory => services.directory.kill9(),
        Fault::OneFileServer => choose(services, random, 1),
        Fault::TwoFileServers => choose(services, random, 2),
    }
    // Down for a moment, or for long enough to be taken for dead by clients.
    tokio::time::sleep(Duration::from_millis(random.random_range(0..1_500))).await;
    services.start_all();
}

fn choose(services: &mut Services, random: &mut StdRng, count: usize) {
    let mut files: Vec<&mut Process> = services.files.iter_mut().collect();
    files.shuffle(random);
    for file in files.into_iter().take(count) {
        file.kill9();
    }
}

/// A check that has never found anything shows nothing: changes behind the record's back are found.
#[tokio::test(flavor = "multi_thread")]
async fn durable_the_record_notices_what_is_lost_or_altered() {
    let services = Services::start(3).await;
    let load = Load::start(services.directory_uri(), 1, 1).await;
    load.progress(200, RECOVERY_LIMIT).await;
    let (problems, names) = load.verify(services.directory_uri()).await;
    assert_eq!(problems, Vec::<String>::new());
    assert!(names > 5, "{names}");

    let client = Client::connect(&[services.directory_uri()]).await.unwrap();
    let mut record = load.record(0).await;
    let files: Vec<String> =
        record.known.keys().filter(|name| !name.starts_with("folder")).cloned().collect();
    let [lost, longer, other, ..] = &files[..] else { panic!("{files:?}") };
    client.delete(&record.path(lost)).await.unwrap();
    client.append(&record.path(longer), "x").await.unwrap();
    client.write(&record.path(other), "something else").await.unwrap();
    client.mkdir(&record.path("stranger")).await.unwrap();
    let problems = record.verify(&client).await;
    assert_eq!(problems.len(), 4, "{problems:?}");
}

/// Nor is a check worth anything that does not notice what it is there for: disks that lost what was acknowledged.
#[tokio::test(flavor = "multi_thread")]
async fn durable_disks_that_lost_acknowledged_writes_are_noticed() {
    let mut services = Services::start(3).await;
    let mut load = Load::start(services.directory_uri(), 2, 2).await;
    load.progress(100, RECOVERY_LIMIT).await;
    services.kill_all();
    let names = ["directory", "file-1", "file-2", "file-3"];
    let saved = services.folder().join("saved");
    for name in names {
        trees::copy(&services.data(name), &saved.join(name));
    }
    services.start_all();
    services.ready().await;
    load.progress(100, RECOVERY_LIMIT).await;
    load.stop().await;
    services.kill_all();
    for name in names {
        fs::remove_dir_all(services.data(name)).unwrap();
        fs::rename(saved.join(name), services.data(name)).unwrap();
    }
    services.start_all();
    services.ready().await;
    let (problems, names) = load.verify(services.directory_uri()).await;
    assert!(!problems.is_empty(), "100 operations were undone, and {names} names are as they should be");
}

/// Kills lose nothing that was handed to the kernel; a power loss does. On memory disks that forget what was not synced.
#[tokio::test(flavor = "multi_thread")]
async fn durable_power_loss_everywhere_loses_nothing_acknowledged() {
    assert_eq!(durable::power_loss(Cluster::builder(), seed("DURABLE_SEED")).await, Ok(()));
}

#[tokio::test(flavor = "multi_thread")]
async fn durable_unfinished_writes_are_not_collected() {
    assert_eq!(durable::unfinished_write(Cluster::builder(), seed("DURABLE_SEED")).await, Ok(()));
}

#[tokio::test(flavor = "multi_thread")]
async fn durable_copies_of_former_members_do_not_count() {
    assert_eq!(durable::former_member(Cluster::builder(), seed("DURABLE_SEED")).await, Ok(()));
}
