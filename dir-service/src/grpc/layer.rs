//! What every request passes: bounds on requests under way and on their bytes, and a span with the request's id.

use bytes::Bytes;
use cairn_proto::{
    Error, Reason, limits,
    net::{Answer, Answers, Connection, Intake, REQUEST_HEADER},
    request,
};
use http_body::{Frame, SizeHint};
use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};
use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::{Status, body::Body};
use tower::{Layer, Service};
use tracing::Instrument as _;

/// When a caller that was turned away should come back.
const RETRY_MS: u64 = 50;
/// The call that may wait for somebody else's.
const LOCK: &str = "/cairn.v1.DirectoryService/Lock";

/// Counts of requests, for metrics.
#[derive(Debug, Default)]
pub struct Counts {
    /// Requests begun.
    pub requests: AtomicU64,
    /// Requests turned away because too many were under way.
    pub refused: AtomicU64,
    /// Requests under way.
    pub under_way: AtomicU64,
}

/// Wraps every gRPC service of the directory.
#[derive(Clone, Debug)]
pub struct RequestLayer {
    places: Arc<Semaphore>,
    /// Of calls that may wait for a lock, apart: who waits must not keep the holder from giving it back.
    lock_places: Arc<Semaphore>,
    ids: Arc<parking_lot::Mutex<SmallRng>>,
    counts: Arc<Counts>,
    intake: Intake,
    answers: Answers,
}

impl RequestLayer {
    /// At most [`limits::REQUESTS_MAX`] requests at a time, and [`limits::LOCK_REQUESTS_MAX`] for locks; ids for requests that bring none come from the seed.
    pub fn new(seed: u64, counts: Arc<Counts>) -> Self {
        Self::bounded(limits::REQUESTS_MAX, limits::LOCK_REQUESTS_MAX, seed, counts)
    }

    fn bounded(places: usize, lock_places: usize, seed: u64, counts: Arc<Counts>) -> Self {
        Self {
            places: Arc::new(Semaphore::new(places)),
            lock_places: Arc::new(Semaphore::new(lock_places)),
            ids: Arc::new(parking_lot::Mutex::new(SmallRng::seed_from_u64(seed))),
            counts,
            intake: Intake::new(limits::REQUEST_BYTES_MAX),
            answers: Answers::default(),
        }
    }
}

impl<S> Layer<S> for RequestLayer {
    type Service = RequestService<S>;
    fn layer(&self, inner: S) -> Self::Service {
        RequestService { inner, layer: self.clone() }
    }
}

/// A service behind [`RequestLayer`].
#[derive(Clone, Debug)]
pub struct RequestService<S> {
    inner: S,
    layer: RequestLayer,
}

/// Counts a request out, also one whose caller went away.
struct UnderWay(Arc<Counts>);

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.under_way.fetch_sub(1, Ordering::Relaxed);
    }
}

impl<S> Service<http::Request<Body>> for RequestService<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = futures::future::BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let counts = self.layer.counts.clone();
        counts.requests.fetch_add(1, Ordering::Relaxed);
        let places = match request.uri().path() {
            LOCK => &self.layer.lock_places,
            _ => &self.layer.places,
        };
        let Ok(place) = places.clone().try_acquire_owned() else {
            counts.refused.fetch_add(1, Ordering::Relaxed);
            // Who does not take his answers may be why.
            self.layer.answers.cut_stalled();
            let error = Error::new(Reason::Overloaded, "the directory has too many requests under way")
                .retry_after_ms(RETRY_MS);
            return Box::pin(async move { Ok(tonic::Status::from(error).into_http()) });
        };
        counts.under_way.fetch_add(1, Ordering::Relaxed);
        let under_way = UnderWay(counts);
        let id = match request::given(request.headers()) {
            Some(id) => id.to_owned(),
            None => format!("{:016x}", self.layer.ids.lock().random::<u64>()),
        };
        let span = tracing::info_span!("request", id = %id, call = %request.uri().path());
        let mut answer = self.layer.answers.begin(request.extensions().get::<Connection>().cloned());
        let (intake, path) = (self.layer.intake.clone(), request.uri().path().to_owned());
        let request = request.map(|body| Body::new(intake.bound(&path, body)));
        let call = request::scope(&id, self.inner.call(request));
        Box::pin(
            async move {
                // A stream counts until it has nothing to say; streams themselves are bounded by connection.
                let held = Some((place, under_way));
                let mut response = call.await?;
                if let Ok(id) = http::HeaderValue::from_str(&id) {
                    response.headers_mut().insert(REQUEST_HEADER, id);
                }
                // Until the connection asks for the body, its peer has no room for it.
                answer.handed_over();
                Ok(response.map(|body| Body::new(AnswerBody { body, answer, held })))
            }
            .instrument(span),
        )
    }
}

/// An answer that keeps its place until the peer has taken it.
struct AnswerBody {
    body: Body,
    answer: Answer,
    held: Option<(OwnedSemaphorePermit, UnderWay)>,
}

impl http_body::Body for AnswerBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        self.answer.taken();
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        match &polled {
            Poll::Ready(Some(Ok(_))) => self.answer.handed_over(),
            _ => self.held = None,
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

#[cfg(test)]
mod tests {
    use super::*;
    use tower::ServiceExt as _;

    #[tokio::test]
    async fn too_many_requests_are_turned_away_and_places_come_back() {
        let counts = Arc::new(Counts::default());
        let layer = RequestLayer::bounded(1, 1, 7, counts.clone());
        let (release, wait) = tokio::sync::oneshot::channel::<()>();
        let wait = Arc::new(parking_lot::Mutex::new(Some(wait)));
        let service = layer.layer(tower::service_fn(move |_: http::Request<Body>| {
            let wait = wait.lock().take();
            async move {
                if let Some(wait) = wait {
                    let _ = wait.await;
                }
                Ok::<_, std::convert::Infallible>(http::Response::new(Body::empty()))
            }
        }));
        let first = tokio::spawn(service.clone().oneshot(http::Request::new(Body::empty())));
        while counts.under_way.load(Ordering::Relaxed) == 0 {
            tokio::task::yield_now().await;
        }
        let refused = service.clone().oneshot(http::Request::new(Body::empty())).await.unwrap();
        assert_eq!(refused.headers()["grpc-status"], "8");
        let lock = http::Request::builder().uri(LOCK).body(Body::empty()).unwrap();
        let answered = service.clone().oneshot(lock).await.unwrap();
        assert!(!answered.headers().contains_key("grpc-status"), "locks have places of their own");
        drop(answered);
        release.send(()).unwrap();
        let answered = first.await.unwrap().unwrap();
        assert_eq!(answered.headers()[REQUEST_HEADER].len(), 16);
        drop(answered);
        let request = http::Request::builder().header(REQUEST_HEADER, "mine").body(Body::empty()).unwrap();
        let answered = service.oneshot(request).await.unwrap();
        assert_eq!(answered.headers()[REQUEST_HEADER], "mine");
        drop(answered);
        assert_eq!(counts.under_way.load(Ordering::Relaxed), 0);
        assert_eq!(counts.refused.load(Ordering::Relaxed), 1);
    }
}
