//! The way to one follower: long-lived `Replicate` streams that carry one chunk after another.
//!
//! A chunk has a stream for itself from its first message to its last; then the stream goes back to a pool and carries
//! the next chunk, while the answers of the chunks before are still on their way. So a small chunk costs a message,
//! and never waits behind a large one. What waits to be sent is bounded by bytes ([`ROOM_BYTES`]).

use super::standing::{Event, Standing};
use crate::{
    config::Timing, identity::Identity, metrics::Metrics, peers::Peers, receive::CHUNKS_IN_FLIGHT_MAX,
    topology::Topology,
};
use cairn_proto::{
    Error, Reason, Result,
    id::{ChunkId, ServerId},
    limits::{DATA_BYTES_MAX, MESSAGE_BYTES_MAX},
    net::{
        Traffic,
        framed::{self, Framed},
        meant_for,
    },
    v1::{self, replica_service_client::ReplicaServiceClient},
};
use futures::StreamExt as _;
use parking_lot::Mutex;
use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch},
    time::Instant,
};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tracing::Instrument as _;

/// Most bytes that wait to be sent to one follower, on each of its two connections.
pub const ROOM_BYTES: usize = 32 * DATA_BYTES_MAX;
/// Between two warnings that a follower drops out of receipts; each tells how many there were since the last.
const WARNING_INTERVAL: Duration = Duration::from_secs(30);
/// What the least message counts for, so that the number of messages is bounded as well.
const ROOM_UNIT_BYTES: usize = 4_096;
/// Idle streams kept on each connection; more are closed.
const IDLE_STREAMS_MAX: usize = 16;

/// What links share.
#[derive(Debug)]
pub(super) struct Context {
    pub(super) peers: Arc<Peers>,
    pub(super) topology: Arc<Topology>,
    pub(super) identity: Arc<Identity>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) timing: Timing,
    /// Counts changes of any follower's standing, for those who wait for one.
    pub(super) changes: watch::Sender<u64>,
}

/// The way to one follower.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) id: ServerId,
    context: Arc<Context>,
    me: Weak<Link>,
    standing: Mutex<Standing>,
    answered_at: Mutex<Option<Instant>>,
    /// When a drop was last logged as a warning, and how many there were since.
    warned: Mutex<Option<(Instant, u64)>>,
    bulk: Lane,
    small: Lane,
    is_probing: AtomicBool,
}

/// One connection's idle streams and room.
#[derive(Debug)]
struct Lane {
    idle: Mutex<Vec<Stream>>,
    room: Arc<Semaphore>,
}

impl Default for Lane {
    fn default() -> Self {
        Self { idle: Mutex::default(), room: Arc::new(Semaphore::new(ROOM_BYTES / ROOM_UNIT_BYTES)) }
    }
}

/// An answer for one chunk, or why there will be none.
pub(super) type Answer = Result<v1::Receipt>;

/// The sending half of a stream. Dropping it ends the stream once all answers are there.
#[derive(Debug)]
struct Stream {
    queue: mpsc::UnboundedSender<(v1::ReplicateRequest, OwnedSemaphorePermit)>,
    awaited: Awaited,
}

/// The chunks of a stream that have no answer yet; `None` when the stream is over.
type Awaited = Arc<Mutex<Option<HashMap<ChunkId, VecDeque<oneshot::Sender<Answer>>>>>>;

impl Link {
    pub(super) fn new(id: ServerId, context: Arc<Context>) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            id,
            context,
            me: me.clone(),
            standing: Mutex::default(),
            answered_at: Mutex::default(),
            warned: Mutex::default(),
            bulk: Lane::default(),
            small: Lane::default(),
            is_probing: AtomicBool::new(false),
        })
    }

    pub(super) fn standing(&self) -> Standing {
        *self.standing.lock()
    }

    /// Notes that a chunk waited longer than `late` for the follower: it is late itself unless it answered meanwhile.
    pub(super) fn overdue(&self, late: Duration) {
        if self.answered_at.lock().is_none_or(|at| at.elapsed() >= late) {
            self.event(Event::Silent, "a chunk waited too long for it");
        } else {
            tracing::debug!(
                follower = self.id.0,
                "a chunk has its receipt without a follower that is slow with it"
            );
        }
    }

    /// Notes what happened, and watches a follower that is not prompt until it is.
    pub(super) fn event(&self, event: Event, why: &str) {
        if event == Event::Answered {
            *self.answered_at.lock() = Some(Instant::now());
        }
        let (before, after) = {
            let mut standing = self.standing.lock();
            let before = *standing;
            *standing = before.after(event);
            (before, *standing)
        };
        if before != after {
            match after {
                Standing::Prompt => tracing::info!(follower = self.id.0, "follower answers again"),
                _ => self.log_drop(after, why),
            }
            if after == Standing::Late {
                self.context.metrics.late_followers.inc();
            }
            self.context.changes.send_modify(|count| *count += 1);
        }
        if after != Standing::Prompt && !self.is_probing.swap(true, Ordering::AcqRel) {
            tokio::spawn(probe(self.me.clone()));
        }
    }

    /// A follower whose disk is slow drops out and comes back many times a second: one warning an interval tells enough.
    fn log_drop(&self, standing: Standing, why: &str) {
        let mut warned = self.warned.lock();
        match &mut *warned {
            Some((at, more)) if at.elapsed() < WARNING_INTERVAL => {
                *more += 1;
                tracing::debug!(follower = self.id.0, ?standing, why, "follower drops out of receipts");
            }
            before => {
                let since = before.map_or(0, |(_, more)| more);
                *before = Some((Instant::now(), 0));
                let follower = self.id.0;
                tracing::warn!(follower, ?standing, why, since, "follower drops out of receipts");
            }
        }
    }

    fn lane(&self, traffic: Traffic) -> &Lane {
        match traffic {
            Traffic::Bulk => &self.bulk,
            Traffic::Small => &self.small,
        }
    }

    /// A stream that carries no unfinished chunk, and that the follower reads on: it stops at so many chunks in flight,
    /// and one more would wait for those before although the follower has nothing against it.
    fn stream(self: &Arc<Self>, traffic: Traffic) -> Stream {
        let mut idle = self.lane(traffic).idle.lock();
        idle.retain(|stream| stream.awaited.lock().is_some());
        let has_room = |stream: &Stream| {
            stream.awaited.lock().as_ref().is_some_and(|awaited| awaited.len() < CHUNKS_IN_FLIGHT_MAX)
        };
        if let Some(at) = idle.iter().rposition(has_room) {
            return idle.remove(at);
        }
        drop(idle);
        let (queue, messages) = mpsc::unbounded_channel();
        let awaited: Awaited = Arc::new(Mutex::new(Some(HashMap::new())));
        let span = tracing::debug_span!(parent: None, "replicate", follower = self.id.0);
        let sending = Sending { link: self.me.clone(), context: self.context.clone(), id: self.id };
        tokio::spawn(run(sending, traffic, messages, awaited.clone()).instrument(span));
        Stream { queue, awaited }
    }

    fn has_awaited(&self) -> bool {
        // Streams that are lent out are not idle; whoever holds one hears of its end by itself.
        [&self.bulk, &self.small].into_iter().any(|lane| {
            lane.idle
                .lock()
                .iter()
                .any(|stream| stream.awaited.lock().as_ref().is_some_and(|awaited| !awaited.is_empty()))
        })
    }

    async fn is_healthy(&self) -> bool {
        let map = self.context.topology.map();
        let Ok(channel) = self.context.peers.channel(&map, self.id, Traffic::Small) else { return false };
        let mut client = HealthClient::new(channel);
        let check = client.check(HealthCheckRequest { service: String::new() });
        let timeout = Duration::from_millis(self.context.timing.probe_timeout_ms);
        matches!(tokio::time::timeout(timeout, check).await,
            Ok(Ok(answer)) if answer.get_ref().status() == ServingStatus::Serving)
    }
}

/// Asks a follower whether it is there until it is prompt again, so that no write has to find out.
async fn probe(link: Weak<Link>) {
    loop {
        let Some(interval_ms) = link.upgrade().map(|link| link.context.timing.probe_interval_ms) else {
            return;
        };
        tokio::time::sleep(Duration::from_millis(interval_ms)).await;
        let Some(link) = link.upgrade() else { return };
        let standing = link.standing();
        let is_back = match standing {
            Standing::Prompt => true,
            // The answers that it owes say more than the answer to a question.
            Standing::Late if link.has_awaited() => false,
            _ => link.is_healthy().await,
        };
        if is_back {
            link.is_probing.store(false, Ordering::Release);
            if standing != Standing::Prompt {
                link.event(Event::Answered, "");
            }
            return;
        }
    }
}

/// What the task of a stream has of its link: the link owns its idle streams, and ends them when it goes.
struct Sending {
    link: Weak<Link>,
    context: Arc<Context>,
    id: ServerId,
}

impl Sending {
    fn event(&self, event: Event, why: &str) {
        if let Some(link) = self.link.upgrade() {
            link.event(event, why);
        }
    }
}

/// Sends a stream's messages and hands its answers to those who wait for them.
async fn run(
    link: Sending,
    traffic: Traffic,
    messages: mpsc::UnboundedReceiver<(v1::ReplicateRequest, OwnedSemaphorePermit)>,
    awaited: Awaited,
) {
    // The room of a message is given back when it leaves for the connection, which has its own bound.
    let outbound = UnboundedReceiverStream::new(messages).map(|(message, _room)| message);
    let map = link.context.topology.map();
    let ended = async {
        let channel = link.context.peers.channel(&map, link.id, traffic)?;
        let mut client = ReplicaServiceClient::new(Framed::client(channel))
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        let request = framed::outgoing(meant_for(outbound, &link.context.identity.cluster_id(), link.id));
        let mut answers = client.replicate(request).await?.into_inner();
        while let Some(answer) = answers.message().await? {
            let (chunk, answer) = parse(&link, answer)?;
            link.event(Event::Answered, "");
            let waiter =
                awaited.lock().as_mut().and_then(|awaited| take(awaited, chunk, VecDeque::pop_front));
            if let Some(waiter) = waiter {
                // Nobody may wait any more: the chunk has its receipt without this copy.
                let _ = waiter.send(answer);
            }
        }
        Ok::<(), Error>(())
    }
    .await;
    let waiters = awaited.lock().take().unwrap_or_default();
    let error = match ended {
        Err(error) => error,
        Ok(()) if waiters.is_empty() => return,
        Ok(()) => Error::unavailable("the follower ended the stream"),
    };
    if error.reason == Reason::WrongCluster {
        link.context.peers.astray(link.id);
    }
    link.event(Event::Disconnected, error.message());
    for waiter in waiters.into_values().flatten() {
        let _ = waiter.send(Err(Error::unavailable(error.message().to_owned())));
    }
}

fn parse(link: &Sending, answer: v1::ReplicateResponse) -> Result<(ChunkId, Answer)> {
    if let (Some(chunk), Some(detail)) = (&answer.chunk, answer.error) {
        return Ok((
            chunk.into(),
            Err(Error { reason: Reason::from_wire(detail.reason()), detail: Box::new(detail) }),
        ));
    }
    let receipt = answer.receipt.ok_or_else(|| Error::internal("an answer of the follower says nothing"))?;
    if receipt.holder_ids != [link.id.0] {
        return Err(Error::unavailable(format!(
            "the server at the address of server {} says that it is another one",
            link.id
        )));
    }
    let chunk = receipt.chunk.as_ref().map(ChunkId::from).unwrap_or_default();
    Ok((chunk, Ok(receipt)))
}

fn take(
    awaited: &mut HashMap<ChunkId, VecDeque<oneshot::Sender<Answer>>>,
    chunk: ChunkId,
    pop: fn(&mut VecDeque<oneshot::Sender<Answer>>) -> Option<oneshot::Sender<Answer>>,
) -> Option<oneshot::Sender<Answer>> {
    let waiters = awaited.get_mut(&chunk)?;
    let waiter = pop(waiters);
    if waiters.is_empty() {
        awaited.remove(&chunk);
    }
    waiter
}

/// One chunk on its way to one follower. Dropping it before its last message gives the chunk up there.
#[derive(Debug)]
pub(super) struct Leg {
    link: Arc<Link>,
    traffic: Traffic,
    chunk: ChunkId,
    stream: Option<Stream>,
    answer: Option<oneshot::Receiver<Answer>>,
}

impl Leg {
    pub(super) fn begin(link: Arc<Link>, traffic: Traffic, chunk: ChunkId) -> Self {
        Self { link, traffic, chunk, stream: None, answer: None }
    }

    pub(super) fn link(&self) -> &Arc<Link> {
        &self.link
    }

    /// Waits for room for a message with so many bytes of data; `None` when there is none in time.
    pub(super) async fn reserve(&self, data_bytes: usize, wait: Duration) -> Option<OwnedSemaphorePermit> {
        let units = data_bytes.div_ceil(ROOM_UNIT_BYTES).max(1) as u32;
        let room = self.link.lane(self.traffic).room.clone();
        if let Ok(permit) = room.clone().try_acquire_many_owned(units) {
            return Some(permit);
        }
        tokio::time::timeout(wait, room.acquire_many_owned(units)).await.ok()?.ok()
    }

    /// Sends the chunk's next message in the room that was reserved for it.
    ///
    /// # Errors
    /// `UNAVAILABLE` when the connection broke: the leg is over.
    pub(super) fn send(
        &mut self,
        message: v1::WriteRequest,
        is_last: bool,
        room: OwnedSemaphorePermit,
    ) -> Result<()> {
        if self.answer.is_none() {
            self.answer = Some(self.register());
        }
        let broken = || Error::unavailable("its connection broke");
        let stream = self.stream.as_ref().ok_or_else(broken)?;
        let request = v1::ReplicateRequest { write: Some(message) };
        // A closed queue means that the stream is over.
        stream.queue.send((request, room)).map_err(|_| broken())?;
        if is_last && let Some(stream) = self.stream.take() {
            let mut idle = self.link.lane(self.traffic).idle.lock();
            if idle.len() < IDLE_STREAMS_MAX {
                idle.push(stream);
            }
        }
        Ok(())
    }

    /// What the follower says, once all messages are sent.
    pub(super) fn answer(&mut self) -> Option<oneshot::Receiver<Answer>> {
        self.answer.take()
    }

    /// Takes a stream and leaves word where its answer goes.
    fn register(&mut self) -> oneshot::Receiver<Answer> {
        let (sender, answer) = oneshot::channel();
        let stream = self.link.stream(self.traffic);
        // A stream that ended just now drops the sender, which reads as a broken connection.
        if let Some(awaited) = stream.awaited.lock().as_mut() {
            awaited.entry(self.chunk).or_default().push_back(sender);
        }
        self.stream = Some(stream);
        answer
    }
}

impl Drop for Leg {
    fn drop(&mut self) {
        // Not finished: the stream ends with the leg, and nobody waits for an answer.
        if let Some(stream) = self.stream.take()
            && let Some(awaited) = stream.awaited.lock().as_mut()
        {
            take(awaited, self.chunk, VecDeque::pop_back);
        }
    }
}
