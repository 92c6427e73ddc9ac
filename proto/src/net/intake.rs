//! Requests while they arrive: their bytes have a budget, and they must keep coming.
//!
//! ```text
//!   call begins --> waiting --> first bytes of a message --> ... --> whole --> decoded, handled
//!                      ^              |  charged as they come           |
//!                      +--------------+---------------------------------+   the next message of a stream
//! ```
//!
//! What a peer only announced costs nothing. A message is charged until it is whole and its handler asks for what
//! follows, or the call has ended.

use super::MESSAGE_PAUSE_MAX;
use crate::{Error, Reason};
use bytes::Bytes;
use http_body::{Frame, SizeHint};
use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};
use tokio::time::{Instant, Sleep};
use tonic::Status;

/// When a caller that was turned away should come back.
const RETRY_MS: u64 = 100;
/// Bytes before each message in gRPC: whether it is compressed, and its length.
const PREFIX_BYTES: usize = 5;

/// Calls whose caller may say nothing for as long as it likes, between its messages and before the first.
const STREAMS: [&str; 4] = [
    "/cairn.v1.FileService/Write",
    "/cairn.v1.ReplicaService/InstallCheckpoint",
    "/cairn.v1.ReplicaService/Replicate",
    "/cairn.v1.SessionService/KeepAlive",
];

/// A server's budget for bytes of requests that are arriving. Clones share it.
#[derive(Clone, Debug)]
pub struct Intake {
    left: Arc<AtomicUsize>,
}

impl Intake {
    /// A budget of so many bytes.
    pub fn new(bytes: usize) -> Self {
        Self { left: Arc::new(AtomicUsize::new(bytes)) }
    }

    /// Bytes that may still arrive.
    pub fn left(&self) -> usize {
        self.left.load(Ordering::Relaxed)
    }

    /// Bounds the body of a request by its path.
    pub fn bound<B>(&self, path: &str, body: B) -> Body<B> {
        let is_stream = STREAMS.contains(&path) || path.starts_with("/grpc.");
        Body {
            body,
            charge: Charge { intake: self.clone(), bytes: 0 },
            framing: Framing::default(),
            pause: None,
            is_stream,
        }
    }

    fn take(&self, bytes: usize) -> bool {
        self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(bytes)).is_ok()
    }
}

/// What one call has taken of the budget.
#[derive(Debug)]
struct Charge {
    intake: Intake,
    bytes: usize,
}

impl Charge {
    fn add(&mut self, bytes: usize) -> bool {
        let taken = self.intake.take(bytes);
        if taken {
            self.bytes += bytes;
        }
        taken
    }

    fn release(&mut self) {
        self.intake.left.fetch_add(std::mem::take(&mut self.bytes), Ordering::Relaxed);
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.release();
    }
}

/// Where in its messages a body is.
#[derive(Debug, Default)]
struct Framing {
    prefix: Vec<u8>,
    /// Bytes of the message that are still to come.
    missing: u64,
}

impl Framing {
    /// In the middle of a message.
    fn is_inside(&self) -> bool {
        self.missing > 0 || !self.prefix.is_empty()
    }

    /// Takes bytes; says whether a message began in them behind another one that ended.
    fn take(&mut self, mut bytes: &[u8]) -> bool {
        let mut began = !self.is_inside() && !bytes.is_empty();
        while !bytes.is_empty() {
            if self.missing > 0 {
                let share = usize::try_from(self.missing).unwrap_or(usize::MAX).min(bytes.len());
                self.missing -= share as u64;
                bytes = &bytes[share..];
                continue;
            }
            began |= self.prefix.is_empty();
            let share = (PREFIX_BYTES - self.prefix.len()).min(bytes.len());
            self.prefix.extend_from_slice(&bytes[..share]);
            bytes = &bytes[share..];
            if let [_, a, b, c, d] = self.prefix[..] {
                self.missing = u64::from(u32::from_be_bytes([a, b, c, d]));
                self.prefix.clear();
            }
        }
        began
    }
}

/// The body of a request, bounded.
#[derive(Debug)]
pub struct Body<B> {
    body: B,
    charge: Charge,
    framing: Framing,
    /// Runs from the first time that nothing was there, anew with each piece.
    pause: Option<Pin<Box<Sleep>>>,
    is_stream: bool,
}

impl<B> Body<B> {
    fn refuse(&mut self, error: Error) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        self.charge.release();
        Poll::Ready(Some(Err(error.into())))
    }
}

impl<B> http_body::Body for Body<B>
where
    B: http_body::Body<Data = Bytes, Error = Status> + Unpin,
{
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        // Who asks for more has taken the message before.
        if !this.framing.is_inside() {
            this.charge.release();
        }
        match Pin::new(&mut this.body).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(pause) = &mut this.pause {
                    pause.as_mut().reset(Instant::now() + MESSAGE_PAUSE_MAX);
                }
                if let Some(data) = frame.data_ref() {
                    if this.framing.take(data) {
                        this.charge.release();
                    }
                    if !this.charge.add(data.len()) {
                        let why = "this server has too many bytes of requests in memory";
                        return this.refuse(Error::new(Reason::Overloaded, why).retry_after_ms(RETRY_MS));
                    }
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Pending if !this.is_stream || this.framing.is_inside() => {
                let pause = this.pause.get_or_insert_with(|| Box::pin(tokio::time::sleep(MESSAGE_PAUSE_MAX)));
                if pause.as_mut().poll(cx).is_pending() {
                    return Poll::Pending;
                }
                let why = format!("the rest of the request did not come within {MESSAGE_PAUSE_MAX:?}");
                this.refuse(Error::new(Reason::DeadlineExceeded, why))
            }
            other => other,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body::Body as _;
    use std::collections::VecDeque;

    /// Pieces, then silence.
    struct Pieces(VecDeque<Vec<u8>>);

    impl http_body::Body for Pieces {
        type Data = Bytes;
        type Error = Status;
        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
            self.0.pop_front().map_or(Poll::Pending, |piece| Poll::Ready(Some(Ok(Frame::data(piece.into())))))
        }
    }

    fn message(length: u32, sent: usize) -> Vec<u8> {
        [&[0][..], &length.to_be_bytes(), &vec![7; sent]].concat()
    }

    async fn next(body: &mut Body<Pieces>) -> Result<usize, Error> {
        let frame = std::future::poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx)).await;
        Ok(frame.expect("not the end")?.into_data().expect("data").len())
    }

    #[tokio::test(start_paused = true)]
    async fn bytes_are_charged_while_their_message_is_the_last_and_given_back() {
        let intake = Intake::new(1_000);
        let pieces = [message(400, 100), vec![7; 300], message(400, 400), message(600, 590)];
        let mut body = intake.bound("/cairn.v1.FileService/Write", Pieces(pieces.into()));
        next(&mut body).await.unwrap();
        assert_eq!(intake.left(), 895);
        next(&mut body).await.unwrap();
        assert_eq!(intake.left(), 595);
        next(&mut body).await.unwrap();
        assert_eq!(intake.left(), 595, "of the second message alone");
        let other = intake.take(200);
        assert!(other);
        // The first message of 405 goes before the next is charged.
        next(&mut body).await.unwrap();
        assert_eq!(intake.left(), 205);
        drop(body);
        assert_eq!(intake.left(), 800);
    }

    #[tokio::test(start_paused = true)]
    async fn beyond_the_budget_a_request_is_refused_with_a_time() {
        let intake = Intake::new(100);
        let mut body = intake.bound("/cairn.v1.DirectoryService/Commit", Pieces([message(400, 300)].into()));
        let error = next(&mut body).await.unwrap_err();
        assert_eq!((error.reason, error.detail.retry_after_ms), (Reason::Overloaded, RETRY_MS));
        assert_eq!(intake.left(), 100);
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_stops_in_the_middle_ends_and_a_silent_stream_does_not() {
        let intake = Intake::new(10_000);
        for (path, pieces, ends) in [
            ("/cairn.v1.DirectoryService/Lookup", vec![], true),
            ("/cairn.v1.DirectoryService/Lookup", vec![message(50, 10)], true),
            ("/cairn.v1.FileService/Write", vec![message(50, 10)], true),
            ("/cairn.v1.FileService/Write", vec![vec![0, 0]], true),
            ("/cairn.v1.FileService/Write", vec![message(50, 50)], false),
            ("/cairn.v1.FileService/Write", vec![], false),
        ] {
            let count = pieces.len();
            let mut body = intake.bound(path, Pieces(pieces.into()));
            for _ in 0..count {
                next(&mut body).await.unwrap();
            }
            let waited = tokio::time::timeout(MESSAGE_PAUSE_MAX * 20, next(&mut body)).await;
            match waited {
                Ok(ended) => {
                    assert!(ends, "{path}");
                    assert_eq!(ended.unwrap_err().reason, Reason::DeadlineExceeded, "{path}");
                }
                Err(_) => assert!(!ends, "{path}"),
            }
        }
    }

    #[test]
    fn calls_that_stream_are_those_of_the_contract() {
        use prost::Message as _;
        let set = prost_types::FileDescriptorSet::decode(crate::FILE_DESCRIPTOR_SET).unwrap();
        let mut streams = Vec::new();
        for file in set.file {
            for service in &file.service {
                for method in service.method.iter().filter(|method| method.client_streaming()) {
                    streams.push(format!("/{}.{}/{}", file.package(), service.name(), method.name()));
                }
            }
        }
        streams.sort();
        assert_eq!(streams, STREAMS);
    }
}
