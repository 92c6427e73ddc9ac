//! What the clients of a run do, and what they were told.

pub mod appender;
pub mod blocks;
pub mod counter;
pub mod impatient;
pub mod ledger;
pub mod private;
pub mod shared_names;
mod team;

pub use team::Team;

use crate::nature;
use client_lib::{Error, Reason};
use parking_lot::Mutex;
use rand::{Rng as _, rngs::SmallRng};
use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::sync::watch;

/// What all clients of a run share: outside of the simulated world, as an observer is.
#[derive(Clone, Debug)]
pub struct Shared {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// Whether operations may begin.
    working: watch::Sender<bool>,
    busy: AtomicU64,
    void: AtomicBool,
    acknowledged: AtomicU64,
    failures: Mutex<BTreeMap<String, u64>>,
    violations: Mutex<Vec<String>>,
}

/// An operation is under way while this lives.
#[derive(Debug)]
pub struct Busy(Arc<Inner>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.busy.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Shared {
    /// Nothing done yet; operations may begin.
    pub fn new() -> Self {
        let inner = Inner {
            working: watch::Sender::new(true),
            busy: AtomicU64::new(0),
            void: AtomicBool::new(false),
            acknowledged: AtomicU64::new(0),
            failures: Mutex::default(),
            violations: Mutex::default(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Lets operations begin, or no more.
    pub fn set_working(&self, working: bool) {
        self.inner.working.send_replace(working);
    }

    /// Waits until an operation may begin.
    pub async fn may_work(&self) {
        let _ = self.inner.working.subscribe().wait_for(|working| *working).await;
    }

    /// The directory's store was lost, and what may have gone with it is not settled yet: until then no answer proves
    /// anything, since operations under way may see, or be done to, an earlier state.
    pub fn set_void(&self, void: bool) {
        self.inner.void.store(void, Ordering::Relaxed);
    }

    /// Whether answers prove nothing now.
    pub fn is_void(&self) -> bool {
        self.inner.void.load(Ordering::Relaxed)
    }

    /// Notes that an operation is under way.
    pub fn busy(&self) -> Busy {
        self.inner.busy.fetch_add(1, Ordering::Relaxed);
        Busy(self.inner.clone())
    }

    /// Operations under way.
    pub fn under_way(&self) -> u64 {
        self.inner.busy.load(Ordering::Relaxed)
    }

    /// An operation succeeded.
    pub fn acknowledged(&self) {
        self.inner.acknowledged.fetch_add(1, Ordering::Relaxed);
    }

    /// An operation failed.
    pub fn failed(&self, what: &str, error: &Error) {
        tracing::info!(what, %error, "failed");
        *self.inner.failures.lock().entry(format!("{:?}", error.reason)).or_default() += 1;
    }

    /// A promise was broken.
    pub fn violation(&self, what: String) {
        if self.is_void() {
            tracing::info!(what, "no violation: the store was lost meanwhile");
            return;
        }
        tracing::error!(what, "violation");
        self.inner.violations.lock().push(format!("at {} ms: {what}", nature::now_ms()));
    }

    /// Whether an error leaves open what was done, or says that nothing could be done now. Any other error makes a
    /// statement about names and contents, which whoever works alone knows to be wrong.
    pub fn is_honest(&self, error: &Error) -> bool {
        matches!(
            error.reason,
            Reason::Unavailable
                | Reason::Rebuilding
                | Reason::TooFewServers
                | Reason::OutcomeUnknown
                | Reason::DeadlineExceeded
                | Reason::Overloaded
                | Reason::Conflict
                | Reason::SessionExpired
                | Reason::GrantClosed
                | Reason::LockHeld
                | Reason::LockLost
                | Reason::NoSpace
                | Reason::Io
        )
    }

    /// A pause between two operations.
    pub async fn breathe(&self, dice: &mut SmallRng) {
        let pause = if dice.random_bool(0.1) { dice.random_range(0..500) } else { dice.random_range(0..80) };
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }

    /// Acknowledged operations so far.
    pub fn count(&self) -> u64 {
        self.inner.acknowledged.load(Ordering::Relaxed)
    }

    /// Failed operations so far, by reason.
    pub fn failures(&self) -> BTreeMap<String, u64> {
        self.inner.failures.lock().clone()
    }

    /// All broken promises so far.
    pub fn violations(&self) -> Vec<String> {
        self.inner.violations.lock().clone()
    }
}
