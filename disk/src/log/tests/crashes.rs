//! Power loss at any moment: what was acknowledged survives, in order, and nothing else looks like a record
//! or like damage.

use std::collections::BTreeSet;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::*;

/// A record as the model knows it.
#[derive(Clone, Debug)]
struct Known {
    tag: u64,
    len: usize,
    /// From its acknowledgement or from a scan.
    position: Option<Position>,
    /// Some punch named it.
    maybe_dead: bool,
    /// A punch of it was acknowledged.
    dead: bool,
}

#[derive(Debug, Default)]
struct Model {
    /// In order of submission; those without a position were not acknowledged.
    records: Vec<Known>,
    next_tag: u64,
    /// Records in segments below this may be gone.
    floor: u32,
}

impl Model {
    fn check(&mut self, seed: u64, seen: &[Scanned]) {
        let mut known = self.records.iter().peekable();
        let mut cut = false;
        let mut now = Vec::new();
        for record in seen {
            // Every record that was skipped must be one that may be missing.
            let found = loop {
                let next = known.next().unwrap_or_else(|| panic!("seed {seed}: phantom {record:?}"));
                if next.tag == record.tag {
                    break next;
                }
                let trimmed = next.position.is_some_and(|at| at.segment < self.floor) && now.is_empty();
                let unsure = next.position.is_none() && now.is_empty();
                assert!(trimmed || unsure, "seed {seed}: lost {next:?} before {record:?}");
            };
            cut |= found.position.is_none();
            assert!(!cut || found.position.is_none(), "seed {seed}: {found:?} out of order");
            assert!(found.position.is_none_or(|at| at == record.position), "seed {seed}: moved {found:?}");
            if record.dead {
                assert!(found.maybe_dead, "seed {seed}: {found:?} died");
            } else {
                assert!(!found.dead, "seed {seed}: {found:?} lives again");
                assert_eq!(record.payload, Some(payload(found.tag, found.len)), "seed {seed}");
            }
            now.push(Known { position: Some(record.position), dead: record.dead, ..found.clone() });
        }
        for left in known {
            let trimmed = left.position.is_some_and(|at| at.segment < self.floor) && now.is_empty();
            assert!(left.position.is_none() || trimmed, "seed {seed}: lost {left:?}");
        }
        self.records = now;
    }
}

async fn live(seed: u64, rng: &mut SmallRng, disk: &SimDisk, config: LogConfig, model: &mut Model) {
    let opened = open_with(disk, config).await;
    let (log, recovery, seen) = match opened {
        Ok(opened) => opened,
        Err(error) => {
            assert!(disk.is_off(), "seed {seed}: {error}");
            return;
        }
    };
    assert!(recovery.damage.is_empty(), "seed {seed}: {:?}", recovery.damage);
    model.check(seed, &seen);
    let mut waiting = Vec::new();
    loop {
        match rng.random_range(0..12) {
            0..8 => {
                let mut batch = Vec::new();
                let first = model.records.len();
                for _ in 0..rng.random_range(1..4) {
                    let (tag, len) = (model.next_tag, rng.random_range(0..1500));
                    model.next_tag += 1;
                    batch.push(Record { kind: 3, tag, payload: vec![payload(tag, len)] });
                    model.records.push(Known { tag, len, position: None, maybe_dead: false, dead: false });
                }
                match log.submit(batch).await {
                    Ok(pending) => waiting.push((first, pending)),
                    Err(_) => break,
                }
            }
            8 => {
                let floor = log.synced().segment.saturating_sub(rng.random_range(0..4));
                if log.segments().len() > 4 {
                    model.floor = model.floor.max(floor);
                    let _ = log.remove_segments_before(Position { segment: floor, offset: 0 }).await;
                }
            }
            9 => {
                let alive = model.records.iter().enumerate().filter_map(|(index, known)| {
                    let at = known.position.filter(|at| at.segment >= model.floor)?;
                    Some((index, at))
                });
                let alive: Vec<(usize, Position)> = alive.collect();
                if !alive.is_empty() {
                    let (index, at) = alive[rng.random_range(0..alive.len())];
                    model.records[index].maybe_dead = true;
                    if log.punch(&[at]).await.is_ok() {
                        model.records[index].dead = true;
                    }
                }
            }
            10 => tokio::time::sleep(Duration::from_millis(rng.random_range(1..3000))).await,
            _ => {
                for (first, pending) in waiting.drain(..) {
                    let Ok(positions) = pending.durable().await else { break };
                    for (index, position) in positions.into_iter().enumerate() {
                        model.records[first + index].position = Some(position);
                    }
                }
                if rng.random_ratio(1, 20) {
                    let _ = log.close().await;
                    return;
                }
            }
        }
        if disk.is_off() || log.is_failed() {
            break;
        }
    }
    // What was answered before the power went counts, whether or not anybody had looked.
    for (first, pending) in waiting {
        if let Ok(positions) = pending.durable().await {
            for (index, position) in positions.into_iter().enumerate() {
                model.records[first + index].position = Some(position);
            }
        }
    }
}

fn crash_run(seed: u64) {
    let mut rng = SmallRng::seed_from_u64(seed);
    let disk = SimDisk::new(seed, 4 << 20);
    disk.set_write_back_one_in(rng.random_range(0..6));
    let config = LogConfig {
        recycle: rng.random(),
        segment_bytes: rng.random_range(3..12) * 4096,
        payload_bytes_max: 1500,
        group_bytes_max: rng.random_range(1..20_000),
        ..config()
    };
    let mut model = Model::default();
    for _ in 0..12 {
        disk.power_off_after(rng.random_range(0..150));
        // A runtime for each life: its tasks die with it, as a process's do.
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(live(seed, &mut rng, &disk, config.clone(), &mut model));
        drop(runtime);
        let keep = [CrashKeep::Random, CrashKeep::Random, CrashKeep::Nothing, CrashKeep::Everything];
        disk.crash(keep[rng.random_range(0..keep.len())]);
    }
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let opened = open_with(&disk, config.clone()).await;
        let (_, recovery, seen) = opened.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        assert!(recovery.damage.is_empty(), "seed {seed}: {:?}", recovery.damage);
        model.check(seed, &seen);
    });
}

#[test]
fn acknowledged_records_survive_any_crash() {
    // `LOG_SEED=21` repeats one run, `LOG_SEEDS=5000` makes more.
    let number = |name: &str| std::env::var(name).ok().and_then(|value| value.parse::<u64>().ok());
    let seeds = number("LOG_SEED").map_or(0..number("LOG_SEEDS").unwrap_or(150), |seed| seed..seed + 1);
    for seed in seeds {
        crash_run(seed);
    }
}

#[test]
fn a_seed_repeats_itself() {
    // The last state of the disk says enough about everything before.
    let run = |seed| {
        let disk = SimDisk::new(seed, 1 << 20);
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        let (mut rng, mut model) = (SmallRng::seed_from_u64(seed), Model::default());
        disk.power_off_after(200);
        runtime.block_on(live(seed, &mut rng, &disk, config(), &mut model));
        (disk.counters(), disk.used_bytes(), model.records.len())
    };
    assert_eq!(run(77), run(77));
    let distinct: BTreeSet<String> = (0..5).map(|seed| format!("{:?}", run(seed))).collect();
    assert_eq!(distinct.len(), 5);
}
