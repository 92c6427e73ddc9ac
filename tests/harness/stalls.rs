//! How long nothing succeeded.

use std::{
    sync::Mutex,
    time::{Duration, Instant},
};

/// The moments at which operations of one kind succeeded, one behind the other, and what failed.
#[derive(Debug, Default)]
pub struct Successes {
    moments: Mutex<Vec<Instant>>,
    errors: Mutex<Vec<String>>,
}

impl Successes {
    /// One more.
    pub fn note(&self) {
        self.moments.lock().unwrap().push(Instant::now());
    }

    /// An error reached the application.
    pub fn error(&self, error: impl ToString) {
        self.errors.lock().unwrap().push(error.to_string());
    }

    /// What failed so far.
    pub fn errors(&self) -> Vec<String> {
        self.errors.lock().unwrap().clone()
    }

    /// Number of successes.
    pub fn count(&self) -> usize {
        self.moments.lock().unwrap().len()
    }

    /// The longest time without a success between two moments. When nothing has succeeded since, the time until `to`.
    pub fn longest_gap(&self, from: Instant, to: Instant) -> Duration {
        let moments = self.moments.lock().unwrap();
        // The gap in which `from` lies counts as a whole: it began before.
        let first = moments.partition_point(|moment| *moment <= from);
        let mut last = if first == 0 { from } else { moments[first - 1] };
        let mut longest = Duration::ZERO;
        for moment in moments[first..].iter().copied() {
            longest = longest.max(moment.min(to) - last.min(to));
            last = moment;
            if moment >= to {
                return longest;
            }
        }
        longest.max(to.saturating_duration_since(last))
    }

    /// The time from a moment to the first success after it.
    pub fn first_after(&self, from: Instant) -> Option<Duration> {
        let moments = self.moments.lock().unwrap();
        moments.get(moments.partition_point(|moment| *moment <= from)).map(|moment| *moment - from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_gap_is_found_also_at_both_ends() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let of = |moments: &[u64]| Successes {
            moments: Mutex::new(moments.iter().map(|ms| at(*ms)).collect()),
            errors: Mutex::default(),
        };
        let gap = |moments: &[u64], from, to| of(moments).longest_gap(at(from), at(to)).as_millis();
        assert_eq!(gap(&[10, 20, 50, 60], 0, 65), 30);
        assert_eq!(gap(&[10, 20, 50, 60], 15, 25), 10);
        assert_eq!(gap(&[10, 20, 50, 60], 30, 60), 30, "the gap in which the window begins");
        assert_eq!(gap(&[10, 20], 0, 500), 480, "nothing succeeds any more");
        assert_eq!(gap(&[], 100, 500), 400);
        assert_eq!(of(&[10, 20, 50]).first_after(at(20)), Some(Duration::from_millis(30)));
        assert_eq!(of(&[10]).first_after(at(20)), None);
    }
}
