//! What stands before every call: a bound on calls under way, a request id, figures, and a refusal while this server
//! does not serve.

use crate::{
    metrics::Method,
    node::{Mode, Node},
    places::{Place, Places, Turn},
};
use bytes::Bytes;
use cairn_proto::{
    Error,
    id::Generation,
    limits,
    net::{Answer, CLUSTER_HEADER, Connection, DIRECTORY_HEADER, Intake, SERVER_HEADER},
    request,
};
use http::{HeaderMap, Request, Response};
use http_body::{Frame, SizeHint};
use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
};
use tonic::{Status, body::Body};
use tower::{Layer, Service};
use tracing::Instrument as _;

/// Makes [`Guard`]s that share one server's bounds.
#[derive(Clone, Debug)]
pub struct GuardLayer {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    node: Arc<Node>,
    /// Calls of clients.
    places: Places,
    /// Calls of servers, apart: what clients began could not end if they took all places.
    peer_places: Places,
    /// Bytes of clients' requests that are arriving.
    intake: Intake,
    /// The same of servers.
    peer_intake: Intake,
    next_request: AtomicU64,
}

impl GuardLayer {
    /// Bounds for a server.
    pub fn new(node: Arc<Node>) -> Self {
        let places = || Places::new(limits::REQUESTS_MAX, node.sending.answers().clone());
        let (places, peer_places) = (places(), places());
        Self {
            shared: Arc::new(Shared {
                node,
                places,
                peer_places,
                intake: Intake::new(limits::REQUEST_BYTES_MAX),
                peer_intake: Intake::new(limits::REQUEST_BYTES_MAX),
                next_request: AtomicU64::new(0),
            }),
        }
    }
}

impl<S> Layer<S> for GuardLayer {
    type Service = Guard<S>;

    fn layer(&self, inner: S) -> Guard<S> {
        Guard { inner, shared: self.shared.clone() }
    }
}

/// Stands before a service.
#[derive(Clone, Debug)]
pub struct Guard<S> {
    inner: S,
    shared: Arc<Shared>,
}

impl Shared {
    /// A place for a call, or why there is none.
    fn admit(&self, path: &str, headers: &HeaderMap) -> Result<Place, Error> {
        if path.starts_with("/cairn.") {
            match &*self.node.mode.borrow() {
                Mode::Serving => {}
                Mode::Joining => {
                    return Err(Error::unavailable("this server waits for the directory to take it in")
                        .retry_after_ms(self.node.config.timing.register_retry_ms));
                }
                Mode::Refused(error) => return Err(error.clone()),
            }
            // Ids of groups and chunks mean something else in another cluster: a write must not land there.
            let named = |key| headers.get(key).map(|value| value.to_str().unwrap_or("?"));
            self.node.identity.check_meant(named(CLUSTER_HEADER), named(SERVER_HEADER))?;
        }
        let places = match path.starts_with("/cairn.v1.FileService/") {
            true => &self.places,
            false => &self.peer_places,
        };
        places.take().map_err(|error| error.on(self.node.me().to_string()))
    }

    /// The caller's id of the request, or one that is made here.
    fn request_id(&self, headers: &HeaderMap) -> String {
        match request::given(headers) {
            Some(id) => id.to_owned(),
            None => {
                let number = self.next_request.fetch_add(1, Ordering::Relaxed);
                format!("{}-{number}", self.node.me())
            }
        }
    }
}

impl<S> Service<Request<Body>> for Guard<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let path = request.uri().path();
        let id = self.shared.request_id(request.headers());
        let span = tracing::debug_span!("call", path, request = id);
        // Only known services: a caller must not make up labels.
        if path.starts_with("/cairn.v1.") && path.len() < 64 {
            let method = Method { method: path[1..].to_owned() };
            self.shared.node.metrics.requests.get_or_create(&method).inc();
        }
        let node = self.shared.node.clone();
        let place = match self.shared.admit(path, request.headers()) {
            Ok(place) => Arc::new(place),
            Err(error) => {
                node.metrics.failed(error.reason);
                let response = Status::from(error).into_http();
                return Box::pin(async move { Ok(response) });
            }
        };
        let directory = directory(request.headers());
        let identity = node.identity.clone();
        let answer = node.sending.answers().begin(request.extensions().get::<Connection>().cloned());
        let turn = Turn::of(&place);
        let tracked = Tracked::new(node, place, answer);
        let intake = match path.starts_with("/cairn.v1.FileService/") {
            true => &self.shared.intake,
            false => &self.shared.peer_intake,
        };
        let intake = intake.clone();
        let path = path.to_owned();
        let mut request = request.map(|body| Body::new(intake.bound(&path, body)));
        // Streams of chunks give their place back while they carry none.
        request.extensions_mut().insert(turn);
        let call = request::scope(&id, self.inner.call(request));
        Box::pin(
            async move {
                let mut tracked = tracked;
                if let Some((generation, term)) = directory
                    && let Err(error) = identity.hear(generation, term).await
                {
                    tracing::debug!(%error, "an order is refused");
                    return Ok(Status::from(error).into_http());
                }
                let response = call.await?;
                tracked.look_at(response.headers());
                // Until the connection asks for the body, its peer has no room for it.
                tracked.answer.handed_over();
                Ok(response.map(|body| Body::new(GuardedBody { body, tracked })))
            }
            .instrument(span),
        )
    }
}

/// The directory that sends an order, if it says so.
fn directory(headers: &HeaderMap) -> Option<(Generation, u64)> {
    let (generation, term) = headers.get(DIRECTORY_HEADER)?.to_str().ok()?.split_once('.')?;
    Some((Generation(generation.parse().ok()?), term.parse().ok()?))
}

/// A call under way.
struct Tracked {
    node: Arc<Node>,
    answer: Answer,
    _place: Arc<Place>,
}

impl Tracked {
    fn new(node: Arc<Node>, place: Arc<Place>, answer: Answer) -> Self {
        node.metrics.requests_active.inc();
        Self { node, answer, _place: place }
    }

    /// Counts an error that headers or trailers carry.
    fn look_at(&self, headers: &HeaderMap) {
        if headers.get("grpc-status").is_none_or(|code| code == "0") {
            return;
        }
        if let Some(status) = Status::from_header_map(headers) {
            let error = Error::from(status);
            tracing::debug!(%error, reason = ?error.reason, "call failed");
            self.node.metrics.failed(error.reason);
        }
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        self.node.metrics.requests_active.dec();
    }
}

/// A response that keeps its call's place until its end, but for what a stream of chunks gives back itself.
struct GuardedBody {
    body: Body,
    tracked: Tracked,
}

impl http_body::Body for GuardedBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        self.tracked.answer.taken();
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        if let Poll::Ready(Some(Ok(_))) = &polled {
            self.tracked.answer.handed_over();
        }
        if let Poll::Ready(Some(Ok(frame))) = &polled
            && let Some(trailers) = frame.trailers_ref()
        {
            self.tracked.look_at(trailers);
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
