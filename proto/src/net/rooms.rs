//! Which of a server's connections have wide windows.
//!
//! The windows of HTTP/2 are settings of a server, not of a connection. So a service is served twice over the same
//! listeners, with wide and with narrow windows, and each accepted connection goes to one of the two:
//!
//! ```text
//!                        a place left? --> roomy  --> server with wide windows
//!   listener --> split <
//!                        none          --> narrow --> server with narrow windows
//! ```
//!
//! A place comes back when its connection ends. Nothing runs between the listener and the two: whichever of them asks
//! accepts, and what it accepts for the other waits for that one, one connection at most.

use super::{Incoming, Room, Wire};
use crate::limits::ROOMY_CONNECTIONS_MAX;
use std::{
    io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};
use tokio::sync::Semaphore;
use tonic::codegen::tokio_stream::Stream;

/// The places of one server, for all of its listeners. Clones share them.
#[derive(Clone, Debug)]
pub struct Rooms {
    places: Arc<Semaphore>,
}

impl Default for Rooms {
    /// [`ROOMY_CONNECTIONS_MAX`] places.
    fn default() -> Self {
        Self::new(ROOMY_CONNECTIONS_MAX)
    }
}

impl Rooms {
    /// So many places.
    pub fn new(places: usize) -> Self {
        Self { places: Arc::new(Semaphore::new(places)) }
    }

    /// The connections of a listener, those with wide windows and those with narrow ones. Both must be served; when one is
    /// dropped, what would be its part is closed.
    pub fn split(&self, incoming: Incoming) -> [(Room, Incoming); 2] {
        let split = Arc::new(Mutex::new(Split {
            incoming: Some(incoming),
            places: self.places.clone(),
            halves: [Half::default(), Half::default()],
        }));
        [Room::Roomy, Room::Narrow].map(|room| {
            let roomed = Roomed { room, split: split.clone() };
            (room, Box::pin(roomed) as Incoming)
        })
    }
}

struct Split {
    /// `None` behind its end.
    incoming: Option<Incoming>,
    places: Arc<Semaphore>,
    halves: [Half; 2],
}

#[derive(Default)]
struct Half {
    waiting: Option<Wire>,
    waker: Option<Waker>,
    is_gone: bool,
}

impl Half {
    fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

fn at(room: Room) -> usize {
    match room {
        Room::Roomy => 0,
        Room::Narrow => 1,
    }
}

/// The connections of a listener that have one kind of room.
pub struct Roomed {
    room: Room,
    split: Arc<Mutex<Split>>,
}

impl std::fmt::Debug for Roomed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Roomed").field(&self.room).finish()
    }
}

impl Roomed {
    fn lock(&self) -> MutexGuard<'_, Split> {
        self.split.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Stream for Roomed {
    type Item = io::Result<Wire>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut split = self.lock();
        let Split { incoming, places, halves } = &mut *split;
        let (mine, other) = (at(self.room), 1 - at(self.room));
        loop {
            if let Some(wire) = halves[mine].waiting.take() {
                // The other may have stopped accepting because of it.
                halves[other].wake();
                return Poll::Ready(Some(Ok(wire)));
            }
            let Some(accepting) = incoming else { return Poll::Ready(None) };
            halves[mine].waker = Some(cx.waker().clone());
            if halves[other].waiting.is_some() {
                return Poll::Pending;
            }
            let wire = match accepting.as_mut().poll_next(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(None) => {
                    *incoming = None;
                    halves[other].wake();
                    continue;
                }
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Some(Err(error))),
                Poll::Ready(Some(Ok(wire))) => wire,
            };
            let (room, wire) = match places.clone().try_acquire_owned() {
                Ok(place) => (Room::Roomy, wire.holding(place)),
                Err(_) => (Room::Narrow, wire),
            };
            let half = &mut halves[at(room)];
            if !half.is_gone {
                half.waiting = Some(wire);
                if room != self.room {
                    half.wake();
                }
            }
        }
    }
}

impl Drop for Roomed {
    fn drop(&mut self) {
        let mut split = self.lock();
        let half = &mut split.halves[at(self.room)];
        half.is_gone = true;
        half.waiting = None;
        // It may have been the one whom the listener would have woken.
        split.halves[1 - at(self.room)].wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::sync::mpsc;
    use tonic::codegen::tokio_stream::{StreamExt as _, wrappers::UnboundedReceiverStream};

    fn listener() -> (mpsc::UnboundedSender<io::Result<Wire>>, Incoming) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (sender, Box::pin(UnboundedReceiverStream::new(receiver)))
    }

    fn wire() -> io::Result<Wire> {
        Ok(Wire::new(tokio::io::duplex(64).0))
    }

    /// Takes connections of one kind and tells of each.
    fn taking(mut incoming: Incoming) -> (mpsc::UnboundedReceiver<Wire>, tokio::task::JoinHandle<()>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        let task = tokio::spawn(async move {
            while let Some(wire) = incoming.next().await {
                if sender.send(wire.unwrap()).is_err() {
                    return;
                }
            }
        });
        (receiver, task)
    }

    async fn next(of: &mut mpsc::UnboundedReceiver<Wire>) -> Wire {
        tokio::time::timeout(Duration::from_secs(5), of.recv()).await.expect("it arrives").unwrap()
    }

    #[tokio::test]
    async fn the_first_connections_are_roomy_and_a_place_comes_back_with_the_end_of_its_connection() {
        let (connect, incoming) = listener();
        let [(_, roomy), (_, narrow)] = Rooms::new(2).split(incoming);
        let ((mut roomy, _roomy), (mut narrow, _narrow)) = (taking(roomy), taking(narrow));
        for _ in 0..5 {
            connect.send(wire()).unwrap();
        }
        let held = [next(&mut roomy).await, next(&mut roomy).await];
        for _ in 0..3 {
            next(&mut narrow).await;
        }
        assert!(roomy.try_recv().is_err() && narrow.try_recv().is_err());
        drop(held);
        connect.send(wire()).unwrap();
        next(&mut roomy).await;
    }

    #[tokio::test]
    async fn places_are_those_of_all_listeners_together() {
        let rooms = Rooms::new(1);
        let ((connect, one), (connect_2, other)) = (listener(), listener());
        let [(_, roomy), (_, narrow)] = rooms.split(one);
        let [(_, roomy_2), (_, narrow_2)] = rooms.split(other);
        let ((mut roomy, _a), (_b, _c)) = (taking(roomy), taking(narrow));
        let ((mut roomy_2, _d), (mut narrow_2, _e)) = (taking(roomy_2), taking(narrow_2));
        connect.send(wire()).unwrap();
        let _held = next(&mut roomy).await;
        connect_2.send(wire()).unwrap();
        next(&mut narrow_2).await;
        assert!(roomy_2.try_recv().is_err());
    }

    #[tokio::test]
    async fn one_half_goes_on_without_the_other_and_both_end_with_the_listener() {
        for gone in [Room::Roomy, Room::Narrow] {
            let (connect, incoming) = listener();
            let mut halves = Rooms::new(1).split(incoming).map(Some);
            let (_, mut dropped) = halves[at(gone)].take().unwrap();
            let (mut stays, task) = taking(halves[1 - at(gone)].take().unwrap().1);
            tokio::task::yield_now().await;
            // It is the last to have asked the listener.
            assert!(dropped.as_mut().poll_next(&mut Context::from_waker(Waker::noop())).is_pending());
            drop(dropped);
            let mut held = Vec::new();
            match gone {
                // The roomy place is always free again, since nobody serves what holds it.
                Room::Roomy => {
                    connect.send(wire()).unwrap();
                    tokio::task::yield_now().await;
                    assert!(stays.try_recv().is_err());
                }
                Room::Narrow => {
                    connect.send(wire()).unwrap();
                    held.push(next(&mut stays).await);
                    connect.send(wire()).unwrap();
                }
            }
            drop(connect);
            tokio::time::timeout(Duration::from_secs(5), task).await.expect("it ends").unwrap();
        }
    }
}
