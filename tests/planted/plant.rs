//! One planted bug: whether it is there, and how often it did its harm.

use cairn_tests::checks::Verdict;
use cluster::Builder;
use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

/// Shared by a test and its wrappers.
#[derive(Debug)]
pub struct Plant {
    armed: bool,
    strikes: AtomicU64,
}

impl Plant {
    fn new(armed: bool) -> Arc<Self> {
        Arc::new(Self { armed, strikes: AtomicU64::new(0) })
    }

    /// Whether the bug is there. A wrapper without it passes everything on.
    pub fn is_armed(&self) -> bool {
        self.armed
    }

    /// The bug did its harm once more.
    pub fn strike(&self) {
        self.strikes.fetch_add(1, Ordering::Relaxed);
    }

    fn strikes(&self) -> u64 {
        self.strikes.load(Ordering::Relaxed)
    }
}

/// Runs a check on a cluster without the bug, where it must pass, and on one with it, where it must not.
pub async fn pair(build: impl Fn(Arc<Plant>) -> Builder, check: impl AsyncFn(Builder) -> Verdict) {
    let idle = Plant::new(false);
    assert_eq!(check(build(idle.clone())).await, Ok(()), "without the bug");
    assert_eq!(idle.strikes(), 0, "a bug that is not there did harm");

    let armed = Plant::new(true);
    let verdict = check(build(armed.clone())).await;
    assert!(armed.strikes() > 0, "the bug had no chance to do harm: {verdict:?}");
    match verdict {
        Ok(()) => panic!("the bug did harm {} times and was not noticed", armed.strikes()),
        Err(violation) => println!("noticed after {} strikes: {violation}", armed.strikes()),
    }
}
