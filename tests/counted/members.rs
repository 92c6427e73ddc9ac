//! File servers join and leave under load, and nothing acknowledged is lost.

use crate::ALONE;
use cairn_tests::{amount, load::Load, seed, services::Services};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use std::time::{Duration, Instant};

const WORKERS: usize = 6;
const FILE_SERVERS: usize = 4;
/// Everything is compared after so many changes.
const CHANGES_A_ROUND: u64 = 10;
const LIMIT: Duration = Duration::from_secs(240);

/// `CAIRN_MEMBERSHIP_CHANGES` (default 4) says how many: each is a server that joins, or one that is emptied and gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn durable_membership_changes_under_load_lose_nothing() {
    let _alone = ALONE.lock().await;
    let wanted = amount("CAIRN_MEMBERSHIP_CHANGES", 4);
    let seed = seed("CAIRN_SEED");
    let mut dice = StdRng::seed_from_u64(seed);
    let mut services =
        Services::start_with(FILE_SERVERS, &["--grace-ms", "4000", "--compare-ms", "3000"]).await;
    let mut load = Load::start(services.directory_uri(), WORKERS, seed).await;
    load.progress(WORKERS as u64 * 10, LIMIT).await;
    let (began, mut compared, mut drains) = (Instant::now(), 0, Vec::new());
    for change in 1..=wanted {
        if services.files.len() <= FILE_SERVERS {
            services.add_file_server();
            services.start_all();
            services.ready().await;
        } else {
            let victim = dice.random_range(0..services.files.len());
            let drain = Instant::now();
            services.drain(victim, LIMIT).await;
            drains.push(drain.elapsed());
            services.remove_file_server(victim);
        }
        load.progress(WORKERS as u64 * 2, LIMIT).await;
        if change.is_multiple_of(CHANGES_A_ROUND) || change == wanted {
            let (problems, names) = load.verify(services.directory_uri()).await;
            assert!(problems.is_empty(), "seed {seed}, after {change} changes:\n{}", problems.join("\n"));
            compared += names;
        }
    }
    load.stop().await;
    services.kill_all();
    services.start_all();
    services.healthy(LIMIT).await;
    let (problems, names) = load.verify(services.directory_uri()).await;
    assert!(problems.is_empty(), "seed {seed}, at the end:\n{}", problems.join("\n"));
    drains.sort();
    println!(
        "{wanted} membership changes in {:.0} s, {} operations acknowledged meanwhile, 0 lost, {} names compared; \
         a drain took {:?} (median) to {:?}",
        began.elapsed().as_secs_f64(),
        load.acknowledged(),
        compared + names,
        drains.get(drains.len() / 2).copied().unwrap_or_default(),
        drains.last().copied().unwrap_or_default(),
    );
}
