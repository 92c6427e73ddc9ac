//! The real services in one thread on a simulated network, clock, chance and disk.
//!
//! ```text
//! cargo test -p simulation                                    a few seeds, and those that once failed
//! make sim SEEDS=1000                                         more, optimised
//! CAIRN_SIM_SEED=42 cargo test -p simulation -- --nocapture   one again; with CAIRN_SIM_LOG=debug its log,
//!                                                             with CAIRN_SIM_TRACE=FILE its events
//! ```
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`nature`] | time and chance of the whole program |
//! | [`network`] | connections between hosts, and their faults |
//! | [`world`] | hosts: runtime, clock, disk, life and death |
//! | [`workload`] | what clients do, and what they were told |
//! | [`nemesis`] | what breaks |
//! | [`checkers`] | what must hold |
//! | [`run`] | one run from its seed to its outcome |
//! | [`trace`] | what happened, as one number |
//!
//! Each seed runs in a process of its own: no counter of a dependency is left from another one, and a run that never
//! ends is noticed.

mod checkers;
mod nature;
mod nemesis;
mod network;
mod run;
mod seeds;
mod trace;
mod workload;
mod world;

use std::time::Duration;

/// Runs `CAIRN_SIM_SEED`, if it is set, and says what came of it.
#[test]
fn one_seed() {
    let Some(seed) = seeds::chosen() else { return };
    seeds::log();
    let ran = std::thread::Builder::new().name(format!("seed {seed}")).stack_size(64 << 20);
    let outcome = ran.spawn(move || run::run(seed)).unwrap().join().expect("the run panicked");
    match outcome {
        Ok(outcome) => println!("{} {seed} {outcome}", seeds::PASSED),
        Err(problem) => panic!("{}", seeds::failure(seed, &problem)),
    }
}

/// The promises hold in every run.
#[test]
fn many_seeds() {
    if seeds::chosen().is_none() {
        seeds::run_many();
    }
}

/// What once failed does not fail again.
#[test]
fn seeds_that_once_failed() {
    if seeds::chosen().is_none() {
        seeds::run_regressions();
    }
}

/// A seed gives the same run again: every byte on the network at the same time.
#[test]
fn a_seed_gives_the_same_run_again() {
    if seeds::chosen().is_some() {
        return;
    }
    for seed in [1, 2, 3] {
        let limit = Duration::from_secs(300);
        let (one, other) = (seeds::run_apart(seed, limit).unwrap(), seeds::run_apart(seed, limit).unwrap());
        assert_eq!(one, other, "seed {seed} gave two different runs");
    }
    let outcomes: Vec<_> =
        [1, 2].map(|seed| seeds::run_apart(seed, Duration::from_secs(300)).unwrap()).into();
    assert_ne!(outcomes[0], outcomes[1], "the trace tells nothing");
}
