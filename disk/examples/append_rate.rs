//! Measures the log on the real disk: the time of one durable append, and the rate of many writers.
//!
//! `cargo run --release -p disk --example append_rate -- <directory>`

use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use disk::RealDisk;
use disk::log::{Log, LogConfig};

const RUN_TIME: Duration = Duration::from_secs(2);
const WARM_UP_TIME: Duration = Duration::from_millis(300);

#[tokio::main]
async fn main() -> std::io::Result<()> {
    let root =
        std::env::args().nth(1).ok_or_else(|| std::io::Error::other("name a directory to write to"))?;
    let disk = RealDisk::open(root)?;
    for (writers, bytes) in [(1, 100), (1, 4096), (16, 4096), (64, 100), (64, 4096), (256, 4096)] {
        let dir = format!("log-{writers}-{bytes}");
        let (log, _) = Log::open(disk.clone(), Path::new(&dir), LogConfig::new(1), &mut |_| Ok(())).await?;
        measure(&log, writers, bytes, WARM_UP_TIME).await?;
        let mut taken = measure(&log, writers, bytes, RUN_TIME).await?;
        log.close().await?;
        taken.sort();
        let rate = taken.len() as f64 / RUN_TIME.as_secs_f64();
        let (median, late) = (taken[taken.len() / 2], taken[taken.len() * 99 / 100]);
        println!("{writers:4} writers x {bytes:5} bytes: {rate:8.0}/s, median {median:?}, p99 {late:?}");
    }
    Ok(())
}

async fn measure(log: &Log, writers: usize, bytes: usize, time: Duration) -> std::io::Result<Vec<Duration>> {
    let payload = Bytes::from(vec![7; bytes]);
    let until = Instant::now() + time;
    let tasks: Vec<_> = (0..writers)
        .map(|_| {
            let (log, payload) = (log.clone(), payload.clone());
            tokio::spawn(async move {
                let mut taken = Vec::new();
                while Instant::now() < until {
                    let start = Instant::now();
                    log.append(0, 0, vec![payload.clone()]).await?;
                    taken.push(start.elapsed());
                }
                std::io::Result::Ok(taken)
            })
        })
        .collect();
    let mut all = Vec::new();
    for task in tasks {
        all.extend(task.await.map_err(std::io::Error::other)??);
    }
    Ok(all)
}
