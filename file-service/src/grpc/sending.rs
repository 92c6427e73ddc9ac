//! Room for chunks on their way to readers.
//!
//! A part of a chunk is charged before it is read from the disk, until the connection has sent all of it or the reader has
//! gone: it leaves in the buffer that it was read into. A reader that takes nothing keeps its room only while nobody else
//! needs it: see [`Answers`].

use bytes::Bytes;
use cairn_proto::{Error, Reason, Result, limits::READ_BYTES_MAX, net::Answers};
use futures::Stream;
use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// What is charged and counted.
const UNIT_BYTES: usize = 4_096;
/// Longest wait for room; then the reader is told to come back, or goes to another copy.
const WAIT: Duration = Duration::from_millis(1_000);
/// When it should come back.
const RETRY_MS: u64 = 200;

/// The room that all reads of a server share.
#[derive(Debug)]
pub struct Sending {
    room: Arc<Semaphore>,
    answers: Answers,
}

impl Default for Sending {
    fn default() -> Self {
        Self::new(READ_BYTES_MAX)
    }
}

/// A share of the room. Dropping it gives it back.
#[derive(Debug)]
pub struct Room(#[allow(dead_code)] OwnedSemaphorePermit); // held, never looked at

impl Sending {
    fn new(bytes: usize) -> Self {
        Self { room: Arc::new(Semaphore::new(bytes / UNIT_BYTES)), answers: Answers::default() }
    }

    /// Answers that were not taken yet.
    pub fn answers(&self) -> &Answers {
        &self.answers
    }

    /// Bytes that may be charged now.
    pub fn left(&self) -> usize {
        self.room.available_permits() * UNIT_BYTES
    }

    /// Room for a part of so many bytes.
    ///
    /// # Errors
    /// `OVERLOADED` with a time when there is none.
    pub async fn room(&self, bytes: usize) -> Result<Room> {
        let units = bytes.div_ceil(UNIT_BYTES).max(1) as u32;
        if let Ok(permit) = self.room.clone().try_acquire_many_owned(units) {
            return Ok(Room(permit));
        }
        let cut = self.answers.cut_stalled();
        if cut > 0 {
            tracing::warn!(cut, "readers that took nothing were cut off to make room for others");
        }
        match tokio::time::timeout(WAIT, self.room.clone().acquire_many_owned(units)).await {
            Ok(Ok(permit)) => Ok(Room(permit)),
            _ => {
                let why = format!("this server has {READ_BYTES_MAX} bytes on their way to readers already");
                Err(Error::new(Reason::Overloaded, why).retry_after_ms(RETRY_MS))
            }
        }
    }
}

impl Room {
    /// Bytes that hold the room until nobody has them any more: they were sent, or their reader has gone.
    pub fn held_by(self, data: Bytes) -> Bytes {
        Bytes::from_owner(Held { data, _room: self })
    }
}

struct Held {
    data: Bytes,
    _room: Room,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.data
    }
}

/// Parts, each read when it is asked for: from the page cache that takes no task and no change of threads. Where the disk
/// let wait, the next part is begun when one is handed out, so that the disk works while the connection sends.
#[derive(Debug)]
pub struct Ahead<S: Stream> {
    parts: Pin<Box<S>>,
    ready: Option<Option<S::Item>>,
    had_to_wait: bool,
}

impl<S: Stream> Ahead<S> {
    /// Of parts whose reading goes on without being asked, once begun.
    pub fn new(parts: S) -> Self {
        Self { parts: Box::pin(parts), ready: None, had_to_wait: false }
    }
}

impl<S: Stream> Unpin for Ahead<S> {}

impl<S: Stream> Stream for Ahead<S> {
    type Item = S::Item;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<S::Item>> {
        let part = match self.ready.take() {
            Some(part) => part,
            None => match self.parts.as_mut().poll_next(cx) {
                Poll::Ready(part) => part,
                Poll::Pending => {
                    self.had_to_wait = true;
                    return Poll::Pending;
                }
            },
        };
        if part.is_some() && std::mem::take(&mut self.had_to_wait) {
            match self.parts.as_mut().poll_next(cx) {
                Poll::Ready(next) => self.ready = Some(next),
                Poll::Pending => self.had_to_wait = true,
            }
        }
        Poll::Ready(part)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_proto::net::{ANSWER_PAUSE_MAX, Connection};
    use futures::StreamExt as _;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[tokio::test(start_paused = true)]
    async fn room_is_held_for_as_long_as_anybody_has_bytes_of_the_part() {
        let sending = Sending::new(64 << 10);
        let room = sending.room(8 << 10).await.unwrap();
        let data = room.held_by(Bytes::from(vec![1; 8 << 10]));
        let rest = data.slice(5_000..);
        assert_eq!(sending.left(), 56 << 10);
        drop(data);
        assert_eq!(sending.left(), 56 << 10, "a piece is on its way");
        drop(rest);
        assert_eq!(sending.left(), 64 << 10);
    }

    #[tokio::test(start_paused = true)]
    async fn the_next_part_is_begun_ahead_only_where_the_disk_let_wait() {
        for wait in [0, 10] {
            let begun = Arc::new(AtomicUsize::new(0));
            let counted = begun.clone();
            let parts = futures::stream::iter(0..5).then(move |number| {
                let begun = counted.clone();
                async move {
                    begun.fetch_add(1, Ordering::Relaxed);
                    if wait > 0 {
                        tokio::time::sleep(Duration::from_millis(wait)).await;
                    }
                    number
                }
            });
            let mut parts = Ahead::new(parts);
            for number in 0..5 {
                assert_eq!(parts.next().await, Some(number));
                let ahead = usize::from(wait > 0 && number < 4);
                assert_eq!(begun.load(Ordering::Relaxed), number + 1 + ahead, "{wait} {number}");
            }
            assert_eq!(parts.next().await, None);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn without_room_readers_are_told_when_to_come_back_and_stalled_ones_are_cut() {
        let sending = Sending::new(64 << 10);
        let connection = Connection::default();
        let mut answer = sending.answers().begin(Some(connection.clone()));
        answer.handed_over();
        let held = sending.room(64 << 10).await.unwrap();
        let error = sending.room(1).await.unwrap_err();
        assert_eq!((error.reason, error.detail.retry_after_ms), (Reason::Overloaded, RETRY_MS));
        assert!(!connection.is_cut(), "it may only be slow");
        tokio::time::advance(ANSWER_PAUSE_MAX).await;
        let waiting = async {
            let room = sending.room(1).await;
            assert!(connection.is_cut());
            room
        };
        let (room, ()) = tokio::join!(waiting, async { drop(held) });
        room.unwrap();
    }
}
