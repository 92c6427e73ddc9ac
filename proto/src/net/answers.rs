//! Answers that wait for their peers to take them.
//!
//! HTTP/2 lets a peer leave an answer where it is, for as long as it answers pings. That alone is no harm; it is when
//! others wait for the room. So every piece of an answer is noted from when it was handed to the connection until the
//! connection asks for the next one, and who finds no room calls [`Answers::cut_stalled`]: connections with a piece
//! that nobody took for [`ANSWER_PAUSE_MAX`] are ended, and what they hold comes back.

use super::{ANSWER_PAUSE_MAX, Connection};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};
use tokio::time::Instant;

/// The untaken answers of a server. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Answers {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    waiting: HashMap<u64, (Instant, Connection)>,
}

impl Answers {
    /// An answer that begins now.
    pub fn begin(&self, connection: Option<Connection>) -> Answer {
        Answer { answers: self.clone(), connection, number: None }
    }

    /// Ends connections whose peers have left an answer untaken for too long. Answers how many.
    pub fn cut_stalled(&self) -> usize {
        let now = Instant::now();
        let mut cut = 0;
        for (since, connection) in self.lock().waiting.values() {
            if now.duration_since(*since) >= ANSWER_PAUSE_MAX && !connection.is_cut() {
                connection.cut();
                cut += 1;
            }
        }
        cut
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One answer. Dropping it is its end.
#[derive(Debug)]
pub struct Answer {
    answers: Answers,
    connection: Option<Connection>,
    number: Option<u64>,
}

impl Answer {
    /// A piece was handed to the connection: from now on its peer is waited for.
    pub fn handed_over(&mut self) {
        self.taken();
        let Some(connection) = &self.connection else { return };
        let mut state = self.answers.lock();
        let number = state.next;
        state.next += 1;
        state.waiting.insert(number, (Instant::now(), connection.clone()));
        self.number = Some(number);
    }

    /// The connection asks for more: the peer took what there was.
    pub fn taken(&mut self) {
        if let Some(number) = self.number.take() {
            self.answers.lock().waiting.remove(&number);
        }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.taken();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn only_peers_that_take_nothing_are_cut_off() {
        let answers = Answers::default();
        let [slow, idle, quick] = [(); 3].map(|()| Connection::default());
        let mut of_slow = answers.begin(Some(slow.clone()));
        let of_idle = answers.begin(Some(idle.clone()));
        let mut of_quick = answers.begin(Some(quick.clone()));
        of_slow.handed_over();
        of_quick.handed_over();
        assert_eq!(answers.cut_stalled(), 0);
        tokio::time::advance(ANSWER_PAUSE_MAX / 2).await;
        of_quick.taken();
        of_quick.handed_over();
        tokio::time::advance(ANSWER_PAUSE_MAX / 2).await;
        assert_eq!(answers.cut_stalled(), 1);
        assert!(slow.is_cut() && !idle.is_cut() && !quick.is_cut());
        assert_eq!(answers.cut_stalled(), 0, "once");
        drop((of_slow, of_idle, of_quick));
        assert!(answers.lock().waiting.is_empty());
    }
}
