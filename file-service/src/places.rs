//! Places of calls under way: there are so many, and who finds none is turned away.
//!
//! A call has a place from its beginning to its end, but for a stream of chunks: that one has a place only while it
//! carries something, so that streams that wait for their next chunk shut nobody out. How many of those there are is
//! bounded by connections and by the streams of each.

use cairn_proto::{Error, Reason, Result, net::Answers};
use parking_lot::Mutex;
use std::sync::{Arc, Weak};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// What an overloaded server asks its callers to wait.
const OVERLOADED_RETRY_MS: u64 = 50;

/// The places of one server. Clones share them.
#[derive(Clone, Debug)]
pub struct Places {
    free: Arc<Semaphore>,
    max: usize,
    answers: Answers,
}

impl Places {
    /// So many places. Those who leave `answers` untaken are cut off when there is none left.
    pub fn new(max: usize, answers: Answers) -> Self {
        Self { free: Arc::new(Semaphore::new(max)), max, answers }
    }

    /// Takes a place.
    ///
    /// # Errors
    /// `OVERLOADED` when there is none, with when to come back.
    pub fn take(&self) -> Result<Place> {
        let place = Place { places: self.clone(), taken: Mutex::default() };
        place.enter()?;
        Ok(place)
    }
}

/// One call's place. Dropping it gives it back.
#[derive(Debug)]
pub struct Place {
    places: Places,
    taken: Mutex<Option<OwnedSemaphorePermit>>,
}

impl Place {
    /// Takes the place again, if it was given back.
    ///
    /// # Errors
    /// As [`Places::take`].
    pub fn enter(&self) -> Result<()> {
        let mut taken = self.taken.lock();
        if taken.is_none() {
            let permit = self.places.free.clone().try_acquire_owned().map_err(|_| {
                // Who does not take his answers may be why.
                self.places.answers.cut_stalled();
                let why = format!("this server works on {} requests already", self.places.max);
                Error::new(Reason::Overloaded, why).retry_after_ms(OVERLOADED_RETRY_MS)
            })?;
            *taken = Some(permit);
        }
        Ok(())
    }

    /// Gives the place back until the next [`Place::enter`].
    pub fn leave(&self) {
        self.taken.lock().take();
    }
}

/// The place of a call for whoever handles it. It ends with the call, however long the handler goes on.
#[derive(Clone, Debug, Default)]
pub struct Turn(Weak<Place>);

impl Turn {
    /// Of a place.
    pub fn of(place: &Arc<Place>) -> Self {
        Self(Arc::downgrade(place))
    }

    /// As [`Place::enter`]; nothing for a call that is over.
    ///
    /// # Errors
    /// As there.
    pub fn enter(&self) -> Result<()> {
        self.0.upgrade().map_or(Ok(()), |place| place.enter())
    }

    /// As [`Place::leave`].
    pub fn leave(&self) {
        if let Some(place) = self.0.upgrade() {
            place.leave();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_that_was_left_is_anothers_until_it_is_given_back() {
        let places = Places::new(1, Answers::default());
        let one = Arc::new(places.take().unwrap());
        let turn = Turn::of(&one);
        let error = places.take().unwrap_err();
        assert_eq!((error.reason, error.detail.retry_after_ms), (Reason::Overloaded, OVERLOADED_RETRY_MS));
        turn.leave();
        let two = places.take().unwrap();
        assert_eq!(turn.enter().unwrap_err().reason, Reason::Overloaded);
        drop(two);
        turn.enter().unwrap();
        turn.enter().unwrap();
        assert!(places.take().is_err(), "it is taken again, once");
        drop(one);
        let _three = places.take().unwrap();
        turn.enter().unwrap();
    }
}
