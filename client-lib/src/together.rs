//! Questions to one server that go in one call. A call costs more than a small question, so while some calls are under way
//! further questions wait, and go together with the next one. One question at a time goes by itself, at once.
//!
//! ```text
//!   nothing under way     question --> a call of its own
//!   otherwise             question --> waiting --+--> one call for all that wait, one of CALLS at a time
//!                         question --> waiting --+
//! ```
//!
//! A call that takes long gives its place away: what waits is not held up by a disk or server that does not answer. A call
//! for several questions belongs to several operations, so that servers log it under an id of its own.

use cairn_proto::{Error, Result, limits::QUESTIONS_MAX};
use parking_lot::Mutex;
use std::{collections::VecDeque, sync::Arc, time::Duration};
use tokio::sync::oneshot;

/// Calls under way while questions wait: one for each connection of small calls.
const CALLS: usize = crate::connections::SMALL_CONNECTIONS;
/// A call that takes longer counts no more.
const SLOW: Duration = Duration::from_millis(10);

/// A question, and who waits for its answer. Dropping it answers that the server did not.
#[derive(Debug)]
pub(crate) struct Asked<Q, A> {
    pub question: Q,
    answer: oneshot::Sender<Result<A>>,
}

impl<Q, A> Asked<Q, A> {
    /// Hands the answer over, if somebody still waits for it.
    pub fn answer(self, answer: Result<A>) {
        let _ = self.answer.send(answer);
    }
}

/// Questions to one server, of all tasks of a client.
#[derive(Debug)]
pub(crate) struct Together<Q, A> {
    state: Mutex<State<Q, A>>,
}

#[derive(Debug)]
struct State<Q, A> {
    waiting: VecDeque<Asked<Q, A>>,
    calls: usize,
}

impl<Q, A> Default for Together<Q, A> {
    fn default() -> Self {
        Self { state: Mutex::new(State { waiting: VecDeque::new(), calls: 0 }) }
    }
}

/// The place of a call among those that count.
struct Place<Q, A>(Arc<Together<Q, A>>);

impl<Q, A> Drop for Place<Q, A> {
    fn drop(&mut self) {
        self.0.state.lock().calls -= 1;
    }
}

/// What to do for a question.
enum Turn<Q, A> {
    /// Nothing else is under way.
    Alone(Place<Q, A>, Asked<Q, A>),
    /// It waits, and somebody has to make calls for those that do.
    Begin(Arc<Together<Q, A>>),
    /// It waits, and others make calls.
    Wait,
}

impl<Q: Send + 'static, A: Send + 'static> Together<Q, A> {
    /// Asks a question. `call` makes one call for up to [`QUESTIONS_MAX`] of them and answers each; only of a question that
    /// goes by itself it is a part of the caller's operation, and ends with it.
    ///
    /// # Errors
    /// As `call` answers; `UNAVAILABLE` when it ended without.
    pub async fn ask<F, Fut>(self: &Arc<Self>, question: Q, call: F) -> Result<A>
    where
        F: Fn(Vec<Asked<Q, A>>) -> Fut + Send + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        match self.turn(Asked { question, answer }) {
            Turn::Alone(_place, asked) => call(vec![asked]).await,
            Turn::Begin(together) => drop(tokio::spawn(together.work(call))),
            Turn::Wait => {}
        }
        answered.await.unwrap_or_else(|_| Err(Error::unavailable("the call ended without an answer")))
    }

    fn turn(self: &Arc<Self>, asked: Asked<Q, A>) -> Turn<Q, A> {
        let mut state = self.state.lock();
        let (is_alone, has_room) = (state.calls == 0, state.calls < CALLS);
        if has_room {
            state.calls += 1;
        }
        if is_alone {
            return Turn::Alone(Place(self.clone()), asked);
        }
        state.waiting.push_back(asked);
        if has_room { Turn::Begin(self.clone()) } else { Turn::Wait }
    }

    /// Makes calls until nothing waits: of those that count, all but one at most do so, and none leaves before.
    async fn work<F, Fut>(self: Arc<Self>, call: F)
    where
        F: Fn(Vec<Asked<Q, A>>) -> Fut + Send + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        loop {
            // Tasks that were answered just now ask again in this moment.
            tokio::task::yield_now().await;
            let Some(batch) = self.take() else { return };
            let mut call = Box::pin(call(batch));
            if tokio::time::timeout(SLOW, &mut call).await.is_err() {
                tokio::spawn(call);
            }
        }
    }

    /// The next questions; without any, the place of who asks is free from now on.
    fn take(&self) -> Option<Vec<Asked<Q, A>>> {
        let mut state = self.state.lock();
        let mut batch = Vec::new();
        while batch.len() < QUESTIONS_MAX
            && let Some(asked) = state.waiting.pop_front()
        {
            // Who went away meanwhile wants no answer.
            if !asked.answer.is_closed() {
                batch.push(asked);
            }
        }
        if batch.is_empty() {
            state.calls -= 1;
            return None;
        }
        Some(batch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::future::join_all;

    type Questions = Together<u32, u32>;

    /// Answers each with its double, after a while; those above 1,000 never.
    async fn double(batch: Vec<Asked<u32, u32>>, sizes: Arc<Mutex<Vec<usize>>>) {
        sizes.lock().push(batch.len());
        tokio::time::sleep(Duration::from_millis(1)).await;
        let mut late = Vec::new();
        for asked in batch {
            match asked.question {
                0..=1_000 => {
                    let double = asked.question * 2;
                    asked.answer(Ok(double));
                }
                _ => late.push(asked),
            }
        }
        if !late.is_empty() {
            std::future::pending::<()>().await;
        }
    }

    async fn ask(questions: &Arc<Questions>, number: u32, sizes: &Arc<Mutex<Vec<usize>>>) -> Result<u32> {
        let sizes = sizes.clone();
        questions.ask(number, move |batch| double(batch, sizes.clone())).await
    }

    #[tokio::test(start_paused = true)]
    async fn one_after_the_other_goes_by_itself_and_many_at_once_together() {
        let (questions, sizes) = (Arc::new(Questions::default()), Arc::new(Mutex::new(Vec::new())));
        for number in 0..3 {
            assert_eq!(ask(&questions, number, &sizes).await.unwrap(), number * 2);
        }
        assert_eq!(std::mem::take(&mut *sizes.lock()), [1, 1, 1]);
        let answers = join_all((0..200).map(|number| ask(&questions, number, &sizes))).await;
        for (number, answer) in (0..).zip(answers) {
            assert_eq!(answer.unwrap(), number * 2);
        }
        assert_eq!(*sizes.lock(), [1, 64, 64, 64, 7]);
        tokio::time::sleep(SLOW).await;
        assert_eq!(questions.state.lock().calls, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_never_answered_holds_up_nothing_else() {
        let (questions, sizes) = (Arc::new(Questions::default()), Arc::new(Mutex::new(Vec::new())));
        // More of them than calls that count, one of them by itself.
        let stuck: Vec<_> = (0..20)
            .map(|number| {
                let (questions, sizes) = (questions.clone(), sizes.clone());
                tokio::spawn(async move { ask(&questions, 2_000 + number, &sizes).await })
            })
            .collect();
        for number in 0..5 {
            tokio::time::sleep(SLOW * 2).await;
            let answer = tokio::time::timeout(SLOW * 4, ask(&questions, number, &sizes)).await;
            assert_eq!(answer.unwrap().unwrap(), number * 2);
        }
        assert!(stuck.iter().all(|stuck| !stuck.is_finished()));
    }

    #[tokio::test(start_paused = true)]
    async fn who_goes_away_is_not_asked_for_and_leaves_its_place() {
        let (questions, sizes) = (Arc::new(Questions::default()), Arc::new(Mutex::new(Vec::new())));
        let asking = join_all((0..50).map(|number| ask(&questions, number, &sizes)));
        assert!(tokio::time::timeout(Duration::ZERO, asking).await.is_err());
        tokio::time::sleep(SLOW).await;
        assert_eq!(questions.state.lock().calls, 0);
        assert_eq!(*sizes.lock(), [1], "the one that was asked by itself");
        assert_eq!(ask(&questions, 4, &sizes).await.unwrap(), 8);
    }

    #[tokio::test]
    async fn a_call_that_answers_nobody_is_an_error() {
        let questions = Arc::new(Questions::default());
        let asked = questions.ask(1, |batch| async move { drop(batch) }).await;
        assert_eq!(asked.unwrap_err().reason, cairn_proto::Reason::Unavailable);
    }
}
