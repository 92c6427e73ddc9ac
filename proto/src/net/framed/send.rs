//! Messages to a body.

use super::PREFIX_BYTES;
use crate::{limits::MESSAGE_BYTES_MAX, v1};
use bytes::{BufMut as _, Bytes, BytesMut};
use http::HeaderMap;
use http_body::{Body, Frame};
use prost::Message;
use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll},
};
use tonic::{
    Status,
    codegen::tokio_stream::{Stream, StreamExt as _},
};

/// Payloads up to this size are copied behind their message's tags: another frame would cost more.
const COPIED_BYTES_MAX: usize = 16 * 1024;
/// Small messages that are there together leave in one frame, up to about this size.
const GATHERED_BYTES: usize = 32 * 1024;
/// HTTP/2 of this process copies frames below 256 bytes into its own buffer, which leaves in one system call with the large
/// frame behind them. What stands before a payload goes in such frames: in one of its own it would leave alone, and wake the
/// receiver for itself.
const ALONG_BYTES: usize = 255;
/// A head up to this size goes along, more would be too many frames.
const ALONG_BYTES_MAX: usize = 4 * 1024;
/// Key of the field `bytes data = 15`.
const DATA_KEY: u8 = 15 << 3 | 2;

/// A message whose last field is bytes.
pub trait Carrier: Message + Default + Send + 'static {
    /// Takes the bytes out.
    fn take_payload(&mut self) -> Bytes;

    /// Writes the message as it was before [`Self::take_payload`] gave away `payload` bytes, up to where they begin.
    fn put_head(&self, payload: usize, out: &mut BytesMut);
}

fn put(message: &impl Message, out: &mut BytesMut) {
    out.reserve(message.encoded_len());
    // The only error is one of room, and a `BytesMut` grows.
    let _ = message.encode(out);
}

fn put_length(length: usize, out: &mut BytesMut) {
    // As above.
    let _ = prost::encode_length_delimiter(length, out);
}

/// Bytes of the field `data` before its content; nothing when it is empty and left out.
fn key_len(payload: usize) -> usize {
    if payload == 0 { 0 } else { 1 + prost::length_delimiter_len(payload) }
}

fn put_data_key(payload: usize, out: &mut BytesMut) {
    if payload > 0 {
        out.put_u8(DATA_KEY);
        put_length(payload, out);
    }
}

impl Carrier for v1::ReadResponse {
    fn take_payload(&mut self) -> Bytes {
        std::mem::take(&mut self.data)
    }

    fn put_head(&self, payload: usize, out: &mut BytesMut) {
        put(self, out);
        put_data_key(payload, out);
    }
}

impl Carrier for v1::ReadManyResponse {
    fn take_payload(&mut self) -> Bytes {
        self.part.as_mut().map(Carrier::take_payload).unwrap_or_default()
    }

    fn put_head(&self, payload: usize, out: &mut BytesMut) {
        /// Key of the field `ReadResponse part = 15`.
        const PART_KEY: u8 = 15 << 3 | 2;
        let Self { index, error, part } = self;
        put(&Self { index: *index, error: error.clone(), part: None }, out);
        if let Some(part) = part {
            out.put_u8(PART_KEY);
            put_length(part.encoded_len() + key_len(payload) + payload, out);
            part.put_head(payload, out);
        }
    }
}

impl Carrier for v1::WriteRequest {
    fn take_payload(&mut self) -> Bytes {
        std::mem::take(&mut self.data)
    }

    fn put_head(&self, payload: usize, out: &mut BytesMut) {
        put(self, out);
        put_data_key(payload, out);
    }
}

impl Carrier for v1::ReplicateRequest {
    fn take_payload(&mut self) -> Bytes {
        self.write.as_mut().map(Carrier::take_payload).unwrap_or_default()
    }

    fn put_head(&self, payload: usize, out: &mut BytesMut) {
        /// Key of the field `WriteRequest write = 1`.
        const WRITE_KEY: u8 = 1 << 3 | 2;
        if let Some(write) = &self.write {
            out.put_u8(WRITE_KEY);
            put_length(write.encoded_len() + key_len(payload) + payload, out);
            write.put_head(payload, out);
        }
    }
}

/// Whose body it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Request,
    Response,
}

/// A body of messages. The payload of a message is held until the connection asks for more after it.
pub struct Sent<M> {
    messages: Pin<Box<dyn Stream<Item = Result<M, Status>> + Send>>,
    role: Role,
    head: BytesMut,
    /// Follows the head.
    payload: Bytes,
    /// What was copied into the last frame: dropped when the next is asked for.
    kept: Vec<Bytes>,
    /// Comes when the head has left.
    end: Option<Result<(), Status>>,
    is_over: bool,
}

impl<M> fmt::Debug for Sent<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sent").field("role", &self.role).finish_non_exhaustive()
    }
}

impl<M: Carrier> Sent<M> {
    fn new(messages: impl Stream<Item = Result<M, Status>> + Send + 'static, role: Role) -> Self {
        Self {
            messages: Box::pin(messages),
            role,
            head: BytesMut::new(),
            payload: Bytes::new(),
            kept: Vec::new(),
            end: None,
            is_over: false,
        }
    }

    /// The body of a request.
    pub(super) fn request(messages: impl Stream<Item = M> + Send + 'static) -> Self {
        Self::new(messages.map(Ok), Role::Request)
    }

    /// The body of an answer; it ends with trailers, which carry the first error.
    pub(super) fn response(messages: impl Stream<Item = Result<M, Status>> + Send + 'static) -> Self {
        Self::new(messages, Role::Response)
    }

    /// Takes a message in. True when the head has to leave before more.
    fn take(&mut self, mut message: M) -> Result<bool, Status> {
        let payload = message.take_payload();
        let start = self.head.len();
        self.head.put_bytes(0, PREFIX_BYTES);
        message.put_head(payload.len(), &mut self.head);
        let length = self.head.len() - start - PREFIX_BYTES + payload.len();
        if length > MESSAGE_BYTES_MAX {
            self.head.truncate(start);
            return Err(Status::out_of_range(format!(
                "a message of {length} bytes is not sent, the limit is {MESSAGE_BYTES_MAX} bytes"
            )));
        }
        let mut prefix = &mut self.head[start..start + PREFIX_BYTES];
        prefix.put_u8(0);
        // At most the limit of messages, checked above.
        prefix.put_u32(length as u32);
        if payload.len() > COPIED_BYTES_MAX {
            self.payload = payload;
            return Ok(true);
        }
        self.head.put_slice(&payload);
        self.kept.push(payload);
        Ok(self.head.len() >= GATHERED_BYTES)
    }

    /// What leaves next of the head, or of the payload behind it.
    fn next_data(&mut self) -> Bytes {
        if self.head.is_empty() {
            return std::mem::take(&mut self.payload);
        }
        let goes_along = !self.payload.is_empty() && self.head.len() <= ALONG_BYTES_MAX;
        let step = if goes_along { self.head.len().min(ALONG_BYTES) } else { self.head.len() };
        self.head.split_to(step).freeze()
    }

    fn end(&mut self, end: Result<(), Status>) -> Option<Result<Frame<Bytes>, Status>> {
        self.is_over = true;
        match (self.role, end) {
            (Role::Request, Ok(())) => None,
            (Role::Request, Err(status)) => Some(Err(status)),
            (Role::Response, end) => {
                let status = end.err().unwrap_or_else(|| Status::ok(""));
                let mut trailers = HeaderMap::new();
                Some(status.add_header(&mut trailers).map(|()| Frame::trailers(trailers)))
            }
        }
    }
}

impl<M: Carrier> Body for Sent<M> {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        if !this.payload.is_empty() {
            return Poll::Ready(Some(Ok(Frame::data(this.next_data()))));
        }
        this.kept.clear();
        if this.is_over {
            return Poll::Ready(None);
        }
        loop {
            if let Some(end) = this.end.take() {
                return Poll::Ready(this.end(end));
            }
            match this.messages.as_mut().poll_next(cx) {
                Poll::Ready(Some(Ok(message))) => match this.take(message) {
                    Ok(false) => continue,
                    Ok(true) => {}
                    Err(status) => this.end = Some(Err(status)),
                },
                Poll::Ready(Some(Err(status))) => this.end = Some(Err(status)),
                Poll::Ready(None) => this.end = Some(Ok(())),
                Poll::Pending if this.head.is_empty() => return Poll::Pending,
                Poll::Pending => {}
            }
            if !this.head.is_empty() {
                return Poll::Ready(Some(Ok(Frame::data(this.next_data()))));
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.is_over && self.payload.is_empty()
    }
}
