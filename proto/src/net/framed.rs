//! Messages that end in many bytes, as bodies of HTTP of our own making: the same bytes on the wire as tonic's, without
//! its copy of every message at both ends.
//!
//! ```text
//!   tonic    encode: message -> one buffer -> DATA frame        decode: DATA frames -> one buffer -> message
//!   framed   encode: prefix and tags -> small DATA frame        decode: DATA frames, kept as they came -> message,
//!                    payload ------- as it is -> DATA frame             whose payload is a slice of its frame
//! ```
//!
//! Everything else stays tonic's: paths, metadata, statuses, what it answers before a handler is asked. For that, a body
//! goes *aside*: [`Framed`] stands around tonic's client or server, takes the body out of what passes, leaves an empty one
//! and puts the real one among the extensions, where the other side of tonic finds it.
//!
//! | who | sends | receives |
//! | --- | --- | --- |
//! | client, around its channel | [`outgoing`] | [`expecting`], then [`incoming`] |
//! | server, around its service | [`answer`] | [`received`] |
//!
//! Each works without the wrapper too, by tonic's own ways. A peer notices nothing: `Go` or `Python` clients read and
//! write the same calls.

mod receive;
mod send;
#[cfg(test)]
mod tests;

pub use receive::Received;
pub use send::{Carrier, Sent};

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
};
use tonic::{
    Extensions, Request, Response, Status, Streaming,
    body::Body,
    codegen::tokio_stream::{self, Stream},
    server::NamedService,
};
use tower::Service;

/// Bytes before each message in gRPC: whether it is compressed, and its length.
const PREFIX_BYTES: usize = 5;

/// A body on its way past tonic.
#[derive(Clone, Debug, Default)]
struct Aside(Arc<Mutex<Option<Body>>>);

impl Aside {
    fn new(body: Body) -> Self {
        Self(Arc::new(Mutex::new(Some(body))))
    }

    fn take(&self) -> Option<Body> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Among a request's extensions: the wrapper takes framed bodies from who answers it.
#[derive(Clone, Copy, Debug)]
struct Offered;

/// Among a request's extensions: its caller wants the answer's body as it comes.
#[derive(Clone, Copy, Debug)]
struct Expected;

/// Where a wrapper stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Client,
    /// With the paths of calls whose requests are received by [`received`].
    Server(&'static [&'static str]),
}

/// Stands around tonic's channel or service, and carries bodies past tonic.
#[derive(Clone, Debug)]
pub struct Framed<S> {
    inner: S,
    side: Side,
}

impl<S> Framed<S> {
    /// Around a client's channel.
    pub fn client(channel: S) -> Self {
        Self { inner: channel, side: Side::Client }
    }

    /// Around a server's service, whose handlers of the calls `streams` (their whole paths) use [`received`].
    pub fn server(service: S, streams: &'static [&'static str]) -> Self {
        Self { inner: service, side: Side::Server(streams) }
    }
}

impl<S: NamedService> NamedService for Framed<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<http::Request<Body>> for Framed<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>>,
{
    type Response = http::Response<Body>;
    type Error = S::Error;
    type Future = Passing<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        let mut takes_answer = false;
        match self.side {
            Side::Client => {
                if let Some(body) = request.extensions_mut().remove::<Aside>().and_then(|aside| aside.take())
                {
                    *request.body_mut() = body;
                }
                takes_answer = request.extensions_mut().remove::<Expected>().is_some();
            }
            Side::Server(streams) => {
                request.extensions_mut().insert(Offered);
                if streams.contains(&request.uri().path()) {
                    let body = std::mem::take(request.body_mut());
                    request.extensions_mut().insert(Aside::new(body));
                }
            }
        }
        Passing { call: Box::pin(self.inner.call(request)), side: self.side, takes_answer }
    }
}

/// A call under way.
#[derive(Debug)]
pub struct Passing<F> {
    call: Pin<Box<F>>,
    side: Side,
    takes_answer: bool,
}

impl<F, E> Future for Passing<F>
where
    F: Future<Output = Result<http::Response<Body>, E>>,
{
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut response = ready!(self.call.as_mut().poll(cx))?;
        match self.side {
            // Anything but 200 is for tonic to explain.
            Side::Client if self.takes_answer && response.status() == http::StatusCode::OK => {
                let body = std::mem::take(response.body_mut());
                response.extensions_mut().insert(Aside::new(body));
            }
            Side::Client => {}
            Side::Server(_) => {
                if let Some(body) = response.extensions_mut().remove::<Aside>().and_then(|aside| aside.take())
                {
                    *response.body_mut() = body;
                }
            }
        }
        Poll::Ready(Ok(response))
    }
}

/// A call that sends a stream of messages over a [`Framed`] channel.
pub fn outgoing<M, S>(request: Request<S>) -> Request<tokio_stream::Empty<M>>
where
    M: Carrier,
    S: Stream<Item = M> + Send + 'static,
{
    let (metadata, mut extensions, messages) = request.into_parts();
    extensions.insert(Aside::new(Body::new(Sent::request(messages))));
    Request::from_parts(metadata, extensions, tokio_stream::empty())
}

/// A call over a [`Framed`] channel whose answer is read with [`incoming`].
pub fn expecting<T>(mut request: Request<T>) -> Request<T> {
    request.extensions_mut().insert(Expected);
    request
}

/// The messages of an answer to a call that was [`expecting`] it.
pub fn incoming<M>(response: Response<Streaming<M>>) -> Received<M>
where
    M: prost::Message + Default,
{
    match response.extensions().get::<Aside>().and_then(Aside::take) {
        Some(body) => Received::response(body),
        None => Received::streaming(response.into_inner()),
    }
}

/// The messages of a request to a service that may stand in a [`Framed`].
pub fn received<M>(request: Request<Streaming<M>>) -> Received<M>
where
    M: prost::Message + Default,
{
    match request.extensions().get::<Aside>().and_then(Aside::take) {
        Some(body) => Received::request(body),
        None => Received::streaming(request.into_inner()),
    }
}

/// Messages of an answer.
pub type Answered<M> = Pin<Box<dyn Stream<Item = Result<M, Status>> + Send>>;

/// A stream of messages as the answer to a request with these extensions.
pub fn answer<M, S>(request: &Extensions, messages: S) -> Response<Answered<M>>
where
    M: Carrier,
    S: Stream<Item = Result<M, Status>> + Send + 'static,
{
    if request.get::<Offered>().is_none() {
        return Response::new(Box::pin(messages));
    }
    let mut response: Response<Answered<M>> = Response::new(Box::pin(tokio_stream::empty()));
    response.extensions_mut().insert(Aside::new(Body::new(Sent::response(messages))));
    response
}
