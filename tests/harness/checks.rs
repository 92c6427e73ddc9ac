//! The cores of the promise tests, as functions of a cluster's [`Builder`]: they try to break a promise and answer how
//! that succeeded. The promise tests run them on Cairn as it is, `planted.rs` on Cairn with a bug planted, where they
//! must answer with a violation. Whatever else goes wrong (a cluster that does not start) panics.

use cluster::{Builder, Cluster};
use rand::Rng as _;
use rand::rngs::StdRng;
use std::{fmt::Display, time::Duration};

pub mod bounded;
pub mod checked;
pub mod durable;
pub mod fenced;
pub mod healed;
pub mod linear;
pub mod rebuilt;
pub mod retry;
pub mod whole;

/// Whether a promise held; if not, how it was broken.
pub type Verdict = Result<(), String>;

/// Longest wait for background work that must come to its end.
const WORK_LIMIT: Duration = Duration::from_secs(60);
/// How long nothing forbidden may happen, once it could.
const WATCH: Duration = Duration::from_secs(2);

/// Short times, so that background work is there soon: collection, comparison, expiry.
fn quick(config: &mut dir_service::Config) {
    let timing = &mut config.timing;
    timing.heartbeat_interval_ms = 100;
    timing.background_interval_ms = 20;
    timing.compare_interval_ms = 200;
    timing.forming_wait_ms = 200;
}

/// [`quick`], where nobody's place is to be taken: writers without a client library know one state of a group.
fn steady(config: &mut dir_service::Config) {
    quick(config);
    (config.timing.suspect_ms, config.timing.dead_ms) = (600_000, 600_000);
}

async fn start(builder: Builder) -> Cluster {
    builder.build_and_start().await.expect("a cluster starts")
}

/// Random bytes.
fn bytes(random: &mut StdRng, length: usize) -> Vec<u8> {
    (0..length).map(|_| random.random()).collect()
}

/// An error of a step that must succeed, in words.
fn failed<E: Display>(what: impl Display) -> impl FnOnce(E) -> String {
    move |error| format!("{what}: {error}")
}
