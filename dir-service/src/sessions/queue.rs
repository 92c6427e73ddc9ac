//! Who waits for which lock, first come first served.

use cairn_core::plan::Key;
use cairn_proto::{Error, Reason, Result};
use parking_lot::Mutex;
use std::{
    collections::HashMap,
    sync::{Arc, Weak},
};
use tokio::{sync::OwnedMutexGuard, time::Instant};

/// Waiters of one lock; more are answered OVERLOADED.
pub const WAITERS_MAX: usize = 1_024;

/// One fair queue for each lock that somebody waits for.
#[derive(Debug, Default)]
pub struct Queues {
    queues: Mutex<HashMap<Key, Weak<Queue>>>,
}

#[derive(Debug, Default)]
struct Queue {
    /// Tokio's mutex is fair: it goes to those who wait in the order of their coming.
    turn: Arc<tokio::sync::Mutex<()>>,
}

/// The right to try for a lock before all who came later. Ends when dropped.
#[derive(Debug)]
pub struct Turn {
    _turn: OwnedMutexGuard<()>,
    _queue: Arc<Queue>,
}

impl Queues {
    /// Whether somebody waits for this lock already.
    pub fn is_waited_for(&self, key: &Key) -> bool {
        self.queues.lock().get(key).is_some_and(|queue| queue.strong_count() > 0)
    }

    /// Waits until all who came earlier are done.
    ///
    /// # Errors
    /// `DEADLINE_EXCEEDED`; `OVERLOADED` when too many wait.
    pub async fn turn(&self, key: &Key, deadline: Instant) -> Result<Turn> {
        let queue = self.join(key)?;
        let turn =
            tokio::time::timeout_at(deadline, queue.turn.clone().lock_owned()).await.map_err(|_| {
                Error::new(Reason::DeadlineExceeded, "others who came earlier still wait for the lock")
            })?;
        Ok(Turn { _turn: turn, _queue: queue })
    }

    fn join(&self, key: &Key) -> Result<Arc<Queue>> {
        let mut queues = self.queues.lock();
        if let Some(queue) = queues.get(key).and_then(Weak::upgrade) {
            // Every waiter holds the queue once, the guard of its turn apart.
            if Arc::strong_count(&queue) > WAITERS_MAX {
                return Err(Error::new(
                    Reason::Overloaded,
                    format!("{WAITERS_MAX} others wait for this lock: try again later"),
                )
                .retry_after_ms(1_000));
            }
            return Ok(queue);
        }
        queues.retain(|_, queue| queue.strong_count() > 0);
        let queue = Arc::new(Queue::default());
        queues.insert(key.clone(), Arc::downgrade(&queue));
        Ok(queue)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test(start_paused = true)]
    async fn turns_come_in_order_and_end_with_their_deadline() {
        let queues = Arc::new(Queues::default());
        let key = Key::from_static(b"lock");
        let deadline = Instant::now() + Duration::from_secs(5);
        let first = queues.turn(&key, deadline).await.unwrap();
        let (sender, mut order) = tokio::sync::mpsc::unbounded_channel();
        for number in 0..3 {
            let (queues, key, sender) = (queues.clone(), key.clone(), sender.clone());
            tokio::spawn(async move {
                let turn = queues.turn(&key, deadline).await.unwrap();
                sender.send(number).unwrap();
                drop(turn);
            });
            tokio::task::yield_now().await;
        }
        let soon = Instant::now() + Duration::from_millis(10);
        assert_eq!(queues.turn(&key, soon).await.unwrap_err().reason, Reason::DeadlineExceeded);
        drop(first);
        for number in 0..3 {
            assert_eq!(order.recv().await, Some(number));
        }
        drop(sender);
        assert_eq!(order.recv().await, None);
        assert!(!queues.is_waited_for(&key));
    }

    #[tokio::test]
    async fn waiters_are_bounded() {
        let queues = Queues::default();
        let key = Key::from_static(b"lock");
        let waiting: Vec<_> = (0..WAITERS_MAX).map(|_| queues.join(&key).unwrap()).collect();
        assert_eq!(queues.join(&key).unwrap_err().reason, Reason::Overloaded);
        drop(waiting);
        assert!(queues.join(&key).is_ok());
    }
}
