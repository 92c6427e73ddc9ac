//! HEALED: how long until every copy is there again, against how much is missing.

use crate::ALONE;
use cairn_tests::services::Services;
use client_lib::Client;
use futures::{StreamExt as _, stream};
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(300);
const WRITES_AT_ONCE: usize = 8;

/// What a server misses: so many files of so many bytes.
#[derive(Clone, Copy, Debug)]
struct Missing {
    files: usize,
    bytes: usize,
}

/// `CAIRN_HEAL_FILES` (default 200) and `CAIRN_HEAL_MIB` (default 8) say how much is missed: lists, with commas.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn healed_in_a_time_that_grows_with_what_is_missing() {
    let _alone = ALONE.lock().await;
    let list = |variable: &str, default: &str| -> Vec<usize> {
        let text = std::env::var(variable).unwrap_or_else(|_| default.to_owned());
        text.split(',').map(|number| number.trim().parse().unwrap()).collect()
    };
    let mut cases: Vec<Missing> = Vec::new();
    cases.extend(list("CAIRN_HEAL_FILES", "200").iter().map(|files| Missing { files: *files, bytes: 4_096 }));
    cases.extend(
        list("CAIRN_HEAL_MIB", "8").iter().map(|mib| Missing { files: mib.div_ceil(8), bytes: 8 << 20 }),
    );
    for missing in cases {
        let away = returned(missing).await;
        println!(
            "{} files of {} bytes: {:.2} s after the return of a server that was away",
            missing.files,
            missing.bytes,
            away.as_secs_f64()
        );
    }
}

async fn write(services: &Services, missing: Missing) {
    let client = Client::connect(&[services.directory_uri()]).await.unwrap();
    stream::iter(0..missing.files)
        .map(|number| {
            let client = &client;
            async move {
                client.write(&format!("/file-{number}"), vec![number as u8; missing.bytes]).await.unwrap();
            }
        })
        .buffer_unordered(WRITES_AT_ONCE)
        .collect::<Vec<()>>()
        .await;
    client.close().await.ok();
}

/// A server was away while everything was written, and comes back. Time from its start.
async fn returned(missing: Missing) -> Duration {
    let mut services = Services::start_with(3, &["--dead-ms", "3600000"]).await;
    services.files[2].kill9();
    write(&services, missing).await;
    assert_missing(&services, missing.files).await;
    let start = Instant::now();
    services.files[2].start();
    services.healthy(LIMIT).await;
    start.elapsed()
}

async fn assert_missing(services: &Services, files: usize) {
    let chunks = services.status().await.unwrap().chunks.unwrap_or_default();
    assert!(chunks.under_replicated >= files as u64, "status does not lie: {chunks:?}");
}

/// How much slower a small write or read may be meanwhile: the goal is 2. More is allowed where servers, clients and other
/// programs share few processors.
const SLOWER_MAX: f64 = 4.0;
/// Least operations of each kind that make a median.
const OPERATIONS_MIN: usize = 30;
const REPAIRED_FILES: usize = 24;
const REPAIRED_BYTES: usize = 4 << 20;
/// So that the repair takes some seconds on any machine.
const REPAIR_MIB: &str = "24";

/// How long each operation took, writes and reads apart.
#[derive(Debug, Default)]
struct Latencies {
    writes: Vec<Duration>,
    reads: Vec<Duration>,
}

impl Latencies {
    fn medians(&mut self) -> (Duration, Duration) {
        let median = |took: &mut Vec<Duration>| {
            took.sort_unstable();
            took[took.len() / 2]
        };
        (median(&mut self.writes), median(&mut self.reads))
    }

    fn is_enough(&self) -> bool {
        self.reads.len() >= OPERATIONS_MIN
    }

    /// Writes a small file and reads it.
    async fn take(&mut self, client: &Client, number: usize) {
        let (path, bytes) = (format!("/foreground-{}", number % 32), vec![number as u8; 4_096]);
        let begun = Instant::now();
        client.write(&path, bytes.clone()).await.unwrap();
        self.writes.push(begun.elapsed());
        let begun = Instant::now();
        assert!(client.read(&path).await.unwrap() == bytes);
        self.reads.push(begun.elapsed());
    }
}

/// What users wait for while a server's data is copied to it, beside what they wait for when nothing is.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn healed_without_slowing_others_down_too_much() {
    let _alone = ALONE.lock().await;
    // Measured again where other programs on the machine came in between: what repairs cost is there each time.
    let mut ratios = (f64::MAX, f64::MAX);
    for _ in 0..3 {
        ratios = slowed_down().await;
        if ratios.0 <= SLOWER_MAX && ratios.1 <= SLOWER_MAX {
            return;
        }
    }
    panic!("writes take {:.1} and reads {:.1} times as long during a repair", ratios.0, ratios.1);
}

/// How many times as long writes and reads took.
async fn slowed_down() -> (f64, f64) {
    let mut services = Services::start_with(3, &["--dead-ms", "3600000", "--repair-mib", REPAIR_MIB]).await;
    let client = Client::connect(&[services.directory_uri()]).await.unwrap();
    services.files[2].kill9();
    write(&services, Missing { files: REPAIRED_FILES, bytes: REPAIRED_BYTES }).await;
    services.files[2].start();
    services.ready().await;
    let mut during = Latencies::default();
    let mut number = 0;
    loop {
        let before = missing(&services).await;
        during.take(&client, number).await;
        number += 1;
        if before == 0 {
            break;
        }
    }
    let copied = services.healthy(LIMIT).await.repairs.unwrap_or_default();
    assert!(during.is_enough(), "the repair was over after {number} operations: {copied:?}");
    let mut calm = Latencies::default();
    while calm.reads.len() < during.reads.len().max(OPERATIONS_MIN) {
        missing(&services).await;
        calm.take(&client, number).await;
        number += 1;
    }
    let ((calm_writes, calm_reads), (writes, reads)) = (calm.medians(), during.medians());
    let ratio = |one: Duration, other: Duration| one.as_secs_f64() / other.as_secs_f64();
    let ratios = (ratio(writes, calm_writes), ratio(reads, calm_reads));
    println!(
        "medians of {} operations while {} MiB are copied, and of {} after it: writes {writes:.1?} and {calm_writes:.1?} \
         ({:.2} times), reads {reads:.1?} and {calm_reads:.1?} ({:.2} times)",
        during.reads.len(),
        copied.bytes_copied >> 20,
        calm.reads.len(),
        ratios.0,
        ratios.1
    );
    ratios
}

/// Copies that are missing.
async fn missing(services: &Services) -> u64 {
    services.status().await.unwrap().repairs.unwrap_or_default().copies_missing
}
