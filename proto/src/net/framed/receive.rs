//! Messages out of a body.

use super::PREFIX_BYTES;
use crate::limits::MESSAGE_BYTES_MAX;
use bytes::{Buf, BufMut as _, Bytes, BytesMut};
use http_body::Body as _;
use prost::Message;
use std::{
    collections::VecDeque,
    fmt,
    pin::Pin,
    task::{Context, Poll, ready},
};
use tonic::{Code, Status, Streaming, body::Body, codegen::tokio_stream::Stream};

/// Frames of one message that are kept as they came. A message in more of them is gathered in one buffer: a hostile peer
/// would else hold a buffer with every byte.
const FRAMES_KEPT: usize = 8;
/// A payload that is less than this part of what arrived with it is copied: it would else hold all of that.
const SHARE_MAX: usize = 4;

/// Bytes that arrived in several frames, in order.
#[derive(Debug, Default)]
struct Rope {
    frames: VecDeque<Bytes>,
    /// Instead of frames, when there were too many.
    gathered: BytesMut,
    length: usize,
}

impl Rope {
    /// Takes a frame of a message of which `wanted` bytes are waited for at most.
    fn push(&mut self, frame: Bytes, wanted: usize) {
        if frame.is_empty() {
            return;
        }
        self.length += frame.len();
        if self.gathered.is_empty() && self.frames.len() < FRAMES_KEPT {
            self.frames.push_back(frame);
            return;
        }
        if self.gathered.is_empty() {
            self.gathered.reserve(wanted.max(self.length));
            for kept in self.frames.drain(..) {
                self.gathered.put_slice(&kept);
            }
        }
        self.gathered.put_slice(&frame);
    }

    /// The bytes are about to be taken out.
    fn settle(&mut self) {
        if !self.gathered.is_empty() {
            self.frames.push_back(self.gathered.split().freeze());
            // What is left of its room is of the messages that went.
            self.gathered = BytesMut::new();
        }
    }
}

impl Buf for Rope {
    fn remaining(&self) -> usize {
        self.length
    }

    fn chunk(&self) -> &[u8] {
        self.frames.front().map(|frame| &frame[..]).unwrap_or_default()
    }

    fn advance(&mut self, mut count: usize) {
        self.length -= count;
        while count > 0 {
            let Some(front) = self.frames.front_mut() else { return };
            let step = count.min(front.len());
            front.advance(step);
            count -= step;
            if front.is_empty() {
                self.frames.pop_front();
            }
        }
    }

    fn copy_to_bytes(&mut self, count: usize) -> Bytes {
        match self.frames.front_mut() {
            Some(front) if front.len() == count => {
                self.length -= count;
                self.frames.pop_front().unwrap_or_default()
            }
            Some(front) if front.len() > count && front.len() / SHARE_MAX <= count => {
                self.length -= count;
                front.split_to(count)
            }
            _ => {
                let mut joined = BytesMut::with_capacity(count);
                joined.put(self.take(count));
                joined.freeze()
            }
        }
    }
}

/// A stream of messages. What it holds is at most a message and a frame: nothing more is asked for before.
///
/// As tonic's: an error ends it, a peer's status is its last item unless it is OK, and a message longer than
/// [`MESSAGE_BYTES_MAX`] is refused when its length is read.
pub struct Received<M> {
    source: Source<M>,
}

enum Source<M> {
    Framed(Framed),
    Streaming(Streaming<M>),
}

struct Framed {
    body: Body,
    rope: Rope,
    /// Length of the message that arrives.
    length: Option<usize>,
    is_request: bool,
    is_over: bool,
}

impl<M> fmt::Debug for Received<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Received")
    }
}

// No field is ever pinned by it.
impl<M> Unpin for Received<M> {}

impl<M: Message + Default> Received<M> {
    pub(super) fn request(body: Body) -> Self {
        Self::framed(body, true)
    }

    pub(super) fn response(body: Body) -> Self {
        Self::framed(body, false)
    }

    pub(super) fn streaming(messages: Streaming<M>) -> Self {
        Self { source: Source::Streaming(messages) }
    }

    fn framed(body: Body, is_request: bool) -> Self {
        let framed = Framed { body, rope: Rope::default(), length: None, is_request, is_over: false };
        Self { source: Source::Framed(framed) }
    }

    /// The next message; nothing at the end.
    ///
    /// # Errors
    /// The peer's status, `INTERNAL` for what is no message of this kind, `OUT_OF_RANGE` for one that is too long, and
    /// what the connection failed with.
    pub async fn message(&mut self) -> Result<Option<M>, Status> {
        std::future::poll_fn(|cx| Pin::new(&mut *self).poll_next(cx)).await.transpose()
    }
}

impl<M: Message + Default> Stream for Received<M> {
    type Item = Result<M, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        match &mut self.source {
            Source::Framed(framed) => framed.poll_next(cx),
            Source::Streaming(messages) => Pin::new(messages).poll_next(cx),
        }
    }
}

impl Framed {
    fn poll_next<M: Message + Default>(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<M, Status>>> {
        if self.is_over {
            return Poll::Ready(None);
        }
        let next = loop {
            match self.whole() {
                Ok(Some(message)) => return Poll::Ready(Some(Ok(message))),
                Ok(None) => {}
                Err(status) => break Some(Err(status)),
            }
            match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.rope.push(data, self.length.unwrap_or(PREFIX_BYTES)),
                    Err(frame) => break self.end(frame.trailers_ref()).err().map(Err),
                },
                // A caller that has gone is the end of its request.
                Some(Err(status)) if self.is_request && status.code() == Code::Cancelled => break None,
                Some(Err(status)) => break Some(Err(status)),
                None => break self.end(None).err().map(Err),
            }
        };
        self.is_over = true;
        // What it held may be large.
        self.rope = Rope::default();
        self.body = Body::empty();
        Poll::Ready(next)
    }

    /// The next message, if all of it is here.
    fn whole<M: Message + Default>(&mut self) -> Result<Option<M>, Status> {
        let length = match self.length {
            Some(length) => length,
            None if self.rope.length < PREFIX_BYTES => return Ok(None),
            None => {
                self.rope.settle();
                let flag = self.rope.get_u8();
                if flag != 0 {
                    return Err(Status::internal(format!(
                        "protocol error: a message is compressed or no message at all (its first byte is {flag}), and \
                         no compression was agreed on"
                    )));
                }
                let length = self.rope.get_u32() as usize;
                if length > MESSAGE_BYTES_MAX {
                    return Err(Status::out_of_range(format!(
                        "a message of {length} bytes is not read, the limit is {MESSAGE_BYTES_MAX} bytes"
                    )));
                }
                *self.length.insert(length)
            }
        };
        if self.rope.length < length {
            return Ok(None);
        }
        self.length = None;
        self.rope.settle();
        let mut bytes = (&mut self.rope).take(length);
        let message = M::decode(&mut bytes).map_err(|error| Status::internal(error.to_string()))?;
        Ok(Some(message))
    }

    fn end(&self, trailers: Option<&http::HeaderMap>) -> Result<(), Status> {
        if let Some(status) = trailers.and_then(Status::from_header_map)
            && status.code() != Code::Ok
        {
            return Err(status);
        }
        if self.rope.length > 0 || self.length.is_some() {
            return Err(Status::internal("the stream ended in the middle of a message"));
        }
        Ok(())
    }
}
