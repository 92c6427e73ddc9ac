//! When a failed call is made again, and how long to wait before.

use cairn_proto::{Error, Reason, Result};
use parking_lot::Mutex;
use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};
use std::{sync::Arc, time::Duration};
use tokio::time::Instant;

/// The first pause; each further one doubles.
const PAUSE_MIN: Duration = Duration::from_millis(10);
/// The longest pause.
const PAUSE_MAX: Duration = Duration::from_millis(500);
/// With less time left than this no further attempt begins: it would be cut off, and what the servers last said would be
/// hidden behind "did not answer in 1 ms".
const ATTEMPT_MIN: Duration = Duration::from_millis(50);
/// Retries that may be made in a burst against servers that say they are busy.
const BUDGET_MAX: f64 = 100.0;
/// How fast that allowance comes back.
const BUDGET_PER_SECOND: f64 = 20.0;

/// What all calls of a client share: the deadline, the allowance for retries, and randomness.
#[derive(Debug)]
pub(crate) struct Retry {
    observer: Observer,
    deadline: Duration,
    budget: Mutex<Budget>,
    random: Mutex<SmallRng>,
}

/// Called before each pause with the reason, and how long ago the first attempt failed.
type OnPause = dyn Fn(&Error, Duration) + Send + Sync;

/// Who is told of pauses, if anybody.
#[derive(Clone, Default)]
pub(crate) struct Observer(pub Option<Arc<OnPause>>);

impl std::fmt::Debug for Observer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Observer").field(&self.0.is_some()).finish()
    }
}

#[derive(Debug)]
struct Budget {
    max: f64,
    left: f64,
    at: Instant,
}

impl Retry {
    pub fn new(deadline: Duration, budget: Option<u32>, seed: u64) -> Self {
        let max = budget.map_or(BUDGET_MAX, f64::from);
        Self {
            observer: Observer::default(),
            deadline,
            budget: Mutex::new(Budget { max, left: max, at: Instant::now() }),
            random: Mutex::new(SmallRng::seed_from_u64(seed)),
        }
    }

    /// Tells this one of every pause.
    pub fn observed_by(self, observer: Observer) -> Self {
        Self { observer, ..self }
    }

    /// Begins an operation: its deadline runs from now.
    pub fn start(&self) -> Attempts<'_> {
        self.start_with(Duration::ZERO)
    }

    /// Begins an operation that may take `extra` longer, such as one that waits for a lock.
    pub fn start_with(&self, extra: Duration) -> Attempts<'_> {
        let began = Instant::now();
        Attempts { retry: self, failing: None, until: began + self.deadline + extra, failures: 0, told: None }
    }

    pub fn random(&self) -> u64 {
        self.random.lock().random()
    }

    /// A number in `0.0..1.0`.
    fn fraction(&self) -> f64 {
        self.random.lock().random()
    }

    fn spend(&self) -> bool {
        let mut budget = self.budget.lock();
        let now = Instant::now();
        let earned = now.duration_since(budget.at).as_secs_f64() * BUDGET_PER_SECOND;
        budget.left = (budget.left + earned).min(budget.max);
        budget.at = now;
        let may = budget.left >= 1.0;
        if may {
            budget.left -= 1.0;
        }
        may
    }
}

/// The attempts of one operation.
#[derive(Debug)]
pub(crate) struct Attempts<'a> {
    retry: &'a Retry,
    /// When the first attempt failed: what came before was work, not waiting.
    failing: Option<Instant>,
    until: Instant,
    failures: u32,
    /// The last failure that said more than that nobody answered in time.
    told: Option<Error>,
}

impl Attempts<'_> {
    pub fn remaining(&self) -> Duration {
        self.until.saturating_duration_since(Instant::now())
    }

    /// Failures so far.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// Waits before the next attempt, when `error` is one that passes.
    ///
    /// # Errors
    /// `error` itself when it is final, the deadline is over, or too many retries were made lately.
    pub async fn pause(&mut self, error: Error) -> Result<()> {
        if !error.reason.is_transient() {
            return Err(error);
        }
        self.pause_after_any(error).await
    }

    /// As [`Self::pause`], for a caller that does something else the next time, whatever the error.
    ///
    /// # Errors
    /// `error` itself when the deadline is over or too many retries were made lately.
    pub async fn pause_after_any(&mut self, error: Error) -> Result<()> {
        // A server that is away is not helped by giving up early; one that is overloaded is.
        let away = matches!(
            error.reason,
            Reason::Unavailable | Reason::Rebuilding | Reason::TooFewServers | Reason::DeadlineExceeded
        );
        let remaining = self.remaining().saturating_sub(ATTEMPT_MIN);
        if remaining.is_zero() || (!away && !self.retry.spend()) {
            return Err(self.give_up(error));
        }
        let doubled = PAUSE_MIN.saturating_mul(1 << self.failures.min(10)).min(PAUSE_MAX);
        self.failures += 1;
        // Later than told by a random share: all who were turned away at once were told the same.
        let told = Duration::from_millis(error.detail.retry_after_ms.min(10_000));
        let pause = doubled
            .mul_f64(0.5 + self.retry.fraction() / 2.0)
            .max(told.mul_f64(1.0 + self.retry.fraction() / 2.0))
            .min(remaining);
        tracing::debug!(%error, ?pause, failures = self.failures, "trying again");
        if let Some(observer) = &self.retry.observer.0 {
            observer(&error, self.failing.get_or_insert_with(Instant::now).elapsed());
        }
        if error.reason != Reason::DeadlineExceeded {
            self.told = Some(error);
        }
        tokio::time::sleep(pause).await;
        Ok(())
    }

    /// What the caller is told: the last failure, and the one that explains it when it was mere silence. The reason stays
    /// that of the last attempt, since after silence the outcome of a change is not known.
    fn give_up(&mut self, mut error: Error) -> Error {
        if error.reason == Reason::DeadlineExceeded
            && let Some(told) = self.told.take()
        {
            error.detail.message = format!("{}; before that: {}", error.message(), told.message());
        }
        error
    }

    /// Counts a failure without waiting: the next attempt goes elsewhere.
    ///
    /// # Errors
    /// `error` when the deadline is over.
    pub fn elsewhere(&mut self, error: Error) -> Result<()> {
        if self.remaining().is_zero() {
            return Err(self.give_up(error));
        }
        self.failures += 1;
        self.failing.get_or_insert_with(Instant::now);
        if error.reason != Reason::DeadlineExceeded {
            self.told = Some(error);
        }
        Ok(())
    }
}

/// Cairn's error from a gRPC status. What the transport itself says counts as an unreachable server.
pub(crate) fn restore(status: tonic::Status, server: &str) -> Error {
    let transport = status.details().is_empty()
        && matches!(
            status.code(),
            tonic::Code::Internal
                | tonic::Code::Unknown
                | tonic::Code::Cancelled
                | tonic::Code::Unavailable
                | tonic::Code::Aborted
        );
    if transport {
        return Error::unavailable(format!("{server} cannot be reached: {}", status.message())).on(server);
    }
    named(Error::from(status), server)
}

/// Says which server an error is about, where that is of use.
pub(crate) fn named(error: Error, server: &str) -> Error {
    // What is wrong with a path is so whoever says it; only trouble of a server needs its name.
    let of_server = (error.reason.is_transient() && error.reason != Reason::TooFewServers)
        || matches!(
            error.reason,
            Reason::NoSpace
                | Reason::Io
                | Reason::Internal
                | Reason::NotSupported
                | Reason::WrongCluster
                | Reason::StaleEpoch
                | Reason::ChunkNotFound
                | Reason::ChecksumMismatch
        );
    if of_server { error.on(server) } else { error }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn transient_errors_are_retried_until_the_deadline_and_final_ones_never() {
        let retry = Retry::new(Duration::from_secs(3), None, 1);
        let mut attempts = retry.start();
        let error = attempts.pause(Error::not_found("no")).await.unwrap_err();
        assert_eq!(error.reason, Reason::NotFound);
        let begin = Instant::now();
        let mut count = 0;
        while attempts.pause(Error::unavailable("away")).await.is_ok() {
            count += 1;
        }
        assert!(begin.elapsed() <= Duration::from_secs(3), "{:?}", begin.elapsed());
        assert!((5..60).contains(&count), "{count}");
    }

    #[tokio::test(start_paused = true)]
    async fn no_attempt_begins_that_could_only_be_cut_off() {
        let retry = Retry::new(Duration::from_secs(3), None, 1);
        let mut attempts = retry.start();
        while attempts.pause(Error::new(Reason::TooFewServers, "1 of 2")).await.is_ok() {
            assert!(attempts.remaining() >= ATTEMPT_MIN, "{:?}", attempts.remaining());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn silence_at_the_end_does_not_hide_what_was_said_before() {
        let retry = Retry::new(Duration::from_millis(200), None, 1);
        let mut attempts = retry.start();
        attempts.pause(Error::new(Reason::TooFewServers, "1 of 2 servers")).await.unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
        let error = attempts.pause(Error::new(Reason::DeadlineExceeded, "no answer")).await.unwrap_err();
        assert_eq!(error.reason, Reason::DeadlineExceeded, "the outcome is unknown");
        assert_eq!(error.message(), "no answer; before that: 1 of 2 servers");
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_watches_is_told_why_and_for_how_long() {
        let told = Arc::new(Mutex::new(Vec::new()));
        let observer = Observer(Some(Arc::new({
            let told = told.clone();
            move |why: &Error, since: Duration| told.lock().push((why.reason, since))
        })));
        let retry = Retry::new(Duration::from_secs(30), None, 1).observed_by(observer);
        let mut attempts = retry.start();
        attempts.pause(Error::unavailable("away")).await.unwrap();
        tokio::time::sleep(Duration::from_secs(2)).await;
        attempts.pause(Error::new(Reason::TooFewServers, "1 of 2 live")).await.unwrap();
        assert!(attempts.pause(Error::not_found("final")).await.is_err());
        let told = told.lock();
        assert_eq!(
            told.iter().map(|(reason, _)| *reason).collect::<Vec<_>>(),
            [Reason::Unavailable, Reason::TooFewServers]
        );
        assert!(told[0].1.is_zero() && told[1].1 >= Duration::from_secs(2), "{told:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn the_stated_time_is_honoured() {
        let retry = Retry::new(Duration::from_secs(30), None, 1);
        let begin = Instant::now();
        let error = Error::new(Reason::Overloaded, "busy").retry_after_ms(1_500);
        retry.start().pause(error).await.unwrap();
        assert!(begin.elapsed() >= Duration::from_millis(1_500));
    }

    #[tokio::test(start_paused = true)]
    async fn callers_that_were_turned_away_together_do_not_come_back_together() {
        let mut moments = std::collections::BTreeSet::new();
        for seed in 0..100 {
            let retry = Retry::new(Duration::from_secs(30), None, seed);
            let begin = Instant::now();
            retry.start().pause(Error::new(Reason::Overloaded, "busy").retry_after_ms(1_000)).await.unwrap();
            assert!((1_000..=1_502).contains(&begin.elapsed().as_millis()), "{:?}", begin.elapsed());
            moments.insert(begin.elapsed().as_millis() / 10);
        }
        assert!(moments.len() > 25, "{} different moments", moments.len());
    }

    #[tokio::test(start_paused = true)]
    async fn a_busy_server_is_not_retried_beyond_the_budget() {
        let retry = Retry::new(Duration::from_secs(3_600), Some(3), 1);
        let busy = || Error::new(Reason::Overloaded, "busy");
        let mut made = 0;
        while made < 1_000 && retry.start().pause(busy()).await.is_ok() {
            made += 1;
        }
        assert!((3..10).contains(&made), "{made}");
        assert!(retry.start().pause(Error::unavailable("away")).await.is_ok(), "waiting needs no budget");
    }

    #[test]
    fn the_transport_speaks_of_reachability() {
        let error = restore(tonic::Status::internal("h2 protocol error"), "http://a:1");
        assert_eq!(error.reason, Reason::Unavailable);
        let told = restore(Error::internal("a fault").into(), "http://a:1");
        assert_eq!(told.reason, Reason::Internal);
        assert_eq!(told.detail.server, "http://a:1");
        let told = restore(Error::not_found("no such file").at("/a").into(), "http://a:1");
        assert_eq!(told.to_string(), "/a: no such file");
        let told = restore(Error::new(Reason::TooFewServers, "1 of 2 live").into(), "http://a:1");
        assert_eq!(told.to_string(), "1 of 2 live", "others are missing, not the one that says so");
    }
}
