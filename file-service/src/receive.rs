//! Receives chunks from a stream: bytes of the next chunk are taken in while earlier ones become durable.
//!
//! What is bounded, and how: chunks of one stream whose durability is awaited ([`CHUNKS_IN_FLIGHT_MAX`]), and bytes
//! held for all streams together ([`HELD_BYTES_MAX`]). Beyond, the sender is slowed down by not reading on. A stream that
//! carries nothing has no place among the calls under way; it takes one with its next message, and a chunk that does not
//! go on for [`CHUNK_PAUSE_MAX`] is given up, so that none is kept for ever.

use crate::{
    chunks::{ChunkStore, ChunkWriter},
    ingest::{Begin, Finish, Ingest, Part, Sender},
    places::Turn,
};
use async_trait::async_trait;
use bytes::Bytes;
use cairn_proto::{
    Error, Result,
    error::Reason,
    id::{ChunkId, ServerId},
    limits::DATA_BYTES_MAX,
    v1,
};
use futures::{Stream, StreamExt as _};
use parking_lot::Mutex;
use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tracing::Instrument as _;

/// Chunks of one stream that wait to be durable; the next one is not read before one of them is.
pub const CHUNKS_IN_FLIGHT_MAX: usize = 64;
/// Longest pause between two messages of one chunk.
pub const CHUNK_PAUSE_MAX: Duration = Duration::from_secs(30);
/// Bytes of all streams that are in memory until they are on their way to the disk; half for clients', half for
/// primaries' streams.
pub const HELD_BYTES_MAX: usize = 256 * DATA_BYTES_MAX;
const HELD_UNIT_BYTES: usize = 4_096;

/// Takes chunks in: the primary's way, or a follower's.
#[async_trait]
pub trait Receive: Send + Sync + 'static {
    /// Begins a chunk with its first part, which is then given to [`Intake::part`] too.
    async fn begin(&self, begin: Begin, part: &Part) -> Result<Box<dyn Intake>>;
}

/// One chunk that is arriving. Dropping it gives the chunk up.
#[async_trait]
pub trait Intake: Send {
    /// Takes the next part.
    async fn part(&mut self, part: &Part) -> Result<()>;
    /// Makes the chunk durable, after its last part.
    async fn finish(self: Box<Self>, finish: Finish) -> Result<v1::Receipt>;
}

/// What the streams of a server share.
#[derive(Debug)]
pub struct Receiving {
    /// Of clients' streams.
    held: Arc<Semaphore>,
    /// Of primaries' streams, apart: two servers whose clients fill them would else wait for each other as followers.
    held_for_primaries: Arc<Semaphore>,
    arriving: Mutex<HashMap<ChunkId, usize>>,
    /// Ends streams that carry nothing, and refuses new ones.
    pub draining: CancellationToken,
}

impl Default for Receiving {
    fn default() -> Self {
        let half = || Arc::new(Semaphore::new(HELD_BYTES_MAX / 2 / HELD_UNIT_BYTES));
        Self {
            held: half(),
            held_for_primaries: half(),
            arriving: Mutex::default(),
            draining: CancellationToken::new(),
        }
    }
}

impl Receiving {
    /// Whether a chunk is arriving now.
    pub fn is_arriving(&self, chunk: ChunkId) -> bool {
        self.arriving.lock().contains_key(&chunk)
    }

    async fn hold(&self, sender: Sender, bytes: usize) -> Result<OwnedSemaphorePermit> {
        let units = bytes.div_ceil(HELD_UNIT_BYTES).max(1) as u32;
        let held = match sender {
            Sender::Client => &self.held,
            Sender::Primary => &self.held_for_primaries,
        };
        let permit = held.clone().acquire_many_owned(units).await;
        permit.map_err(|_| Error::unavailable("the server is stopping"))
    }
}

/// A chunk's entry in [`Receiving::arriving`], for as long as it arrives.
struct Arriving(Arc<Receiving>, ChunkId);

impl Arriving {
    fn new(receiving: &Arc<Receiving>, chunk: ChunkId) -> Self {
        *receiving.arriving.lock().entry(chunk).or_default() += 1;
        Self(receiving.clone(), chunk)
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        let mut arriving = self.0.arriving.lock();
        if let Some(count) = arriving.get_mut(&self.1) {
            *count -= 1;
            if *count == 0 {
                arriving.remove(&self.1);
            }
        }
    }
}

/// What a stream answers.
#[derive(Debug)]
pub enum Answer {
    /// A chunk is durable.
    Receipt(v1::Receipt),
    /// A chunk was refused; the stream goes on. Only on streams of primaries.
    Refused(ChunkId, Error),
    /// The stream is over.
    Failed(Error),
}

/// Receives a stream until it ends; answers go to `answers`, whose closing means that the caller has gone.
///
/// A client's stream ends with its first failing chunk, after the receipts of all chunks before it. A primary's stream
/// goes on after a refused chunk. `turn` is the call's place, which is given back while the stream is idle.
pub async fn receive<S>(
    receiving: Arc<Receiving>,
    receiver: Arc<dyn Receive>,
    sender: Sender,
    turn: Turn,
    inbound: S,
    answers: mpsc::Sender<Answer>,
) where
    S: Stream<Item = Result<v1::WriteRequest, Status>> + Send + Unpin,
{
    let mut run = Run {
        ingest: Ingest::new(sender),
        sender,
        turn,
        receiving: receiving.clone(),
        receiver,
        current: None,
        number: 0,
        finishing: JoinSet::new(),
        unanswered: BTreeMap::new(),
        failed: None,
    };
    let mut inbound = inbound;
    let mut is_open = true;
    loop {
        if let Some((number, _)) = &run.failed
            && run.unanswered.range(..number).next().is_none()
        {
            if let Some((_, error)) = run.failed.take() {
                let _ = answers.send(Answer::Failed(error)).await;
            }
            break;
        }
        let may_read = is_open && run.failed.is_none() && run.finishing.len() < CHUNKS_IN_FLIGHT_MAX;
        let is_idle = run.finishing.is_empty() && run.current.is_none();
        if !is_open && run.finishing.is_empty() {
            break;
        }
        if is_idle {
            run.turn.leave();
        }
        let in_chunk = run.current.is_some();
        let answer = tokio::select! {
            biased;
            () = answers.closed() => break,
            Some(done) = run.finishing.join_next() => run.finished(done),
            message = inbound.next(), if may_read => match message {
                Some(Ok(message)) => run.take(message).await,
                // What was not finished is given up; what was is answered.
                Some(Err(status)) => {
                    is_open = false;
                    run.give_up();
                    // Such as a message that is too large. A caller that has gone does not hear it.
                    run.failed = Some((run.number + 1, status.into()));
                    None
                }
                None => {
                    is_open = false;
                    run.give_up();
                    None
                }
            },
            () = tokio::time::sleep(CHUNK_PAUSE_MAX), if may_read && in_chunk => run.stalled(),
            () = receiving.draining.cancelled(), if is_idle => {
                if sender == Sender::Client {
                    let _ = answers.send(Answer::Failed(Error::unavailable("the server is stopping"))).await;
                }
                break;
            }
        };
        if let Some(answer) = answer
            && answers.send(answer).await.is_err()
        {
            break;
        }
    }
    // Chunks that are sealed already become durable although nobody waits for them any more.
    run.finishing.detach_all();
}

type Done = (u64, ChunkId, Result<v1::Receipt>);

struct Run {
    ingest: Ingest,
    sender: Sender,
    turn: Turn,
    receiving: Arc<Receiving>,
    receiver: Arc<dyn Receive>,
    current: Option<Current>,
    /// Numbers the chunks of the stream.
    number: u64,
    finishing: JoinSet<Done>,
    /// Chunks in `finishing`, by number.
    unanswered: BTreeMap<u64, ChunkId>,
    /// The first failed chunk of a client's stream.
    failed: Option<(u64, Error)>,
}

struct Current {
    chunk: ChunkId,
    intake: Box<dyn Intake>,
    arriving: Arriving,
}

impl Run {
    fn give_up(&mut self) {
        self.current = None;
        self.ingest.reset();
    }

    async fn take(&mut self, message: v1::WriteRequest) -> Option<Answer> {
        // A primary names a chunk in its first message only: others belong to one that was refused, or to none.
        if self.sender == Sender::Primary && self.ingest.is_idle() && message.chunk.is_none() {
            return None;
        }
        let named = message.chunk.as_ref().map(ChunkId::from);
        let chunk = named.or(self.current.as_ref().map(|current| current.chunk)).unwrap_or_default();
        match self.try_take(message).await {
            Ok(()) => None,
            Err(error) => {
                self.give_up();
                // Behind all chunks that are finishing: the failed one is not among them.
                self.fail(self.number + 1, chunk, error)
            }
        }
    }

    /// The chunk under way does not go on.
    fn stalled(&mut self) -> Option<Answer> {
        let chunk = self.current.as_ref().map(|current| current.chunk).unwrap_or_default();
        self.give_up();
        let why = format!("the rest of chunk {chunk} did not come within {CHUNK_PAUSE_MAX:?}");
        self.fail(self.number, chunk, Error::new(Reason::DeadlineExceeded, why))
    }

    async fn try_take(&mut self, message: v1::WriteRequest) -> Result<()> {
        self.turn.enter()?;
        let part = self.ingest.take(message)?;
        let held = self.receiving.hold(self.sender, part.data.len()).await?;
        if let Some(begin) = part.begin {
            // Given up first: it may be the same chunk, sent anew.
            self.current = None;
            self.number += 1;
            let arriving = Arriving::new(&self.receiving, begin.chunk);
            let intake = self.receiver.begin(begin, &part).await?;
            self.current = Some(Current { chunk: begin.chunk, intake, arriving });
        }
        let current = self.current.as_mut().ok_or_else(|| Error::internal("a part without a chunk"))?;
        current.intake.part(&part).await?;
        if let (Some(finish), Some(current)) = (part.finish, part.finish.and_then(|_| self.current.take())) {
            let (number, chunk) = (self.number, part.chunk);
            self.unanswered.insert(number, chunk);
            let finishing = async move {
                let Current { intake, arriving, .. } = current;
                let done = intake.finish(finish).await;
                drop((held, arriving));
                (number, chunk, done)
            };
            self.finishing.spawn(finishing.in_current_span());
        }
        Ok(())
    }

    fn finished(&mut self, done: Result<Done, tokio::task::JoinError>) -> Option<Answer> {
        let (number, chunk, done) = match done {
            Ok(done) => done,
            // Which one it was is not known: none of them may count as durable.
            Err(error) => {
                self.unanswered.clear();
                return Some(Answer::Failed(Error::internal(format!("a chunk was not stored: {error}"))));
            }
        };
        self.unanswered.remove(&number);
        match done {
            // A receipt behind a failed chunk is not given: an error is about the first chunk without one.
            Ok(_) if self.failed.as_ref().is_some_and(|(failed, _)| *failed < number) => None,
            Ok(receipt) => Some(Answer::Receipt(receipt)),
            Err(error) => self.fail(number, chunk, error),
        }
    }

    fn fail(&mut self, number: u64, chunk: ChunkId, error: Error) -> Option<Answer> {
        if self.sender == Sender::Primary {
            return Some(Answer::Refused(chunk, error));
        }
        if self.failed.as_ref().is_none_or(|(failed, _)| number < *failed) {
            self.failed = Some((number, error));
        }
        self.give_up();
        None
    }
}

/// Stores a chunk in the local store. Small ones go in one step.
#[derive(Debug)]
pub struct Local {
    store: Arc<dyn ChunkStore>,
    me: ServerId,
    begin: Begin,
    bytes: Stored,
}

#[derive(Debug)]
enum Stored {
    Whole(Bytes, Vec<u64>),
    Streamed(Box<dyn ChunkWriter>),
}

impl Local {
    /// Begins a chunk.
    ///
    /// # Errors
    /// As [`ChunkStore::begin`].
    pub async fn begin(store: Arc<dyn ChunkStore>, me: ServerId, begin: Begin, part: &Part) -> Result<Self> {
        let bytes = match part.finish {
            Some(_) => Stored::Whole(Bytes::new(), Vec::new()),
            None => Stored::Streamed(
                store.begin(begin.chunk, begin.group, None).await.map_err(|error| on(error, me))?,
            ),
        };
        Ok(Self { store, me, begin, bytes })
    }
}

/// A full disk is named by its server, so that the writer knows whom to avoid.
fn on(error: Error, me: ServerId) -> Error {
    match error.reason {
        Reason::NoSpace | Reason::Io => error.on(me.to_string()),
        _ => error,
    }
}

#[async_trait]
impl Intake for Local {
    async fn part(&mut self, part: &Part) -> Result<()> {
        match &mut self.bytes {
            Stored::Whole(data, blocks) => (*data, *blocks) = (part.data.clone(), part.blocks.clone()),
            Stored::Streamed(_) if part.data.is_empty() => {}
            Stored::Streamed(writer) => writer
                .append(part.data.clone(), part.blocks.clone())
                .await
                .map_err(|error| on(error, self.me))?,
        }
        Ok(())
    }

    async fn finish(self: Box<Self>, finish: Finish) -> Result<v1::Receipt> {
        let Self { store, me, begin, bytes } = *self;
        let Finish { length, checksum, computed_here } = finish;
        let sealed = match bytes {
            Stored::Whole(data, blocks) => {
                store.put(begin.chunk, begin.group, data, blocks, checksum, computed_here).await
            }
            Stored::Streamed(writer) => writer.seal(length, checksum, computed_here).await,
        };
        let info = sealed.map_err(|error| on(error, me))?;
        Ok(receipt(begin, info.length, info.checksum, vec![me]))
    }
}

/// A receipt that names `holders`.
pub fn receipt(begin: Begin, length: u64, checksum: u64, holders: Vec<ServerId>) -> v1::Receipt {
    v1::Receipt {
        chunk: Some(begin.chunk.into()),
        group_id: begin.group.0,
        epoch: begin.epoch.0,
        length,
        checksum,
        holder_ids: holders.into_iter().map(|id| id.0).collect(),
        mac: Bytes::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::places::{Place, Places};
    use cairn_proto::{checksum::crc64, net::Answers};
    use tokio::time::timeout;
    use tokio_stream::wrappers::ReceiverStream;

    const LONG: Duration = Duration::from_secs(60);

    #[tokio::test(start_paused = true)]
    async fn clients_that_fill_their_half_leave_primaries_theirs() {
        let receiving = Receiving::default();
        let all = receiving.hold(Sender::Client, HELD_BYTES_MAX / 2).await.unwrap();
        assert!(timeout(LONG, receiving.hold(Sender::Client, 1)).await.is_err(), "clients have no more");
        let primaries = timeout(LONG, receiving.hold(Sender::Primary, HELD_BYTES_MAX / 2)).await;
        let primaries = primaries.expect("what clients hold is not in the way").unwrap();
        assert!(timeout(LONG, receiving.hold(Sender::Primary, 1)).await.is_err(), "primaries have no more");
        drop((all, primaries));
        drop(timeout(LONG, receiving.hold(Sender::Client, 1)).await.expect("given back").unwrap());
    }

    /// Takes every chunk, and stores none.
    struct Nowhere;

    #[async_trait]
    impl Receive for Nowhere {
        async fn begin(&self, begin: Begin, _: &Part) -> Result<Box<dyn Intake>> {
            Ok(Box::new(Nothing(begin)))
        }
    }

    struct Nothing(Begin);

    #[async_trait]
    impl Intake for Nothing {
        async fn part(&mut self, _: &Part) -> Result<()> {
            Ok(())
        }

        async fn finish(self: Box<Self>, finish: Finish) -> Result<v1::Receipt> {
            Ok(receipt(self.0, finish.length, finish.checksum, Vec::new()))
        }
    }

    /// A client's stream: what is sent, what is answered, and the call's place.
    struct Stream {
        messages: mpsc::Sender<Result<v1::WriteRequest, Status>>,
        answers: mpsc::Receiver<Answer>,
        _place: Arc<Place>,
    }

    impl Stream {
        fn start(places: &Places) -> Self {
            let place = Arc::new(places.take().unwrap());
            let (messages, inbound) = mpsc::channel(4);
            let (sender, answers) = mpsc::channel(4);
            let receiving = Arc::new(Receiving::default());
            let inbound = ReceiverStream::new(inbound);
            let turn = Turn::of(&place);
            tokio::spawn(receive(receiving, Arc::new(Nowhere), Sender::Client, turn, inbound, sender));
            Self { messages, answers, _place: place }
        }

        /// Sends one half of a chunk of 8 KiB.
        async fn half(&self, second: bool) {
            let data = vec![7; 4_096];
            let whole = [&data[..], &data[..]].concat();
            let finish = v1::WriteFinish { length: 8_192, checksum: Some(crc64(&whole)) };
            let message = match second {
                true => v1::WriteRequest { offset: 4_096, finish: Some(finish), ..Default::default() },
                false => v1::WriteRequest {
                    chunk: Some(ChunkId::new(5, 6).into()),
                    group_id: 1,
                    epoch: 1,
                    ..Default::default()
                },
            };
            self.messages.send(Ok(v1::WriteRequest { data: data.into(), ..message })).await.unwrap();
        }

        /// Why the stream ended.
        async fn failed(&mut self) -> Error {
            match self.answers.recv().await {
                Some(Answer::Failed(error)) => error,
                other => panic!("not the end: {other:?}"),
            }
        }
    }

    /// Waits until a place is free, or none is.
    async fn until_free(places: &Places, wanted: bool) {
        for _ in 0..1_000 {
            if places.take().is_ok() == wanted {
                return;
            }
            tokio::task::yield_now().await;
        }
        panic!("a place is free: never {wanted}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_has_a_place_while_it_carries_a_chunk_and_no_longer() {
        let places = Places::new(1, Answers::default());
        let mut streams = Vec::new();
        for _ in 0..3 {
            until_free(&places, true).await;
            streams.push(Stream::start(&places));
        }
        until_free(&places, true).await;
        streams[0].half(false).await;
        until_free(&places, false).await;
        streams[1].half(false).await;
        let error = streams[1].failed().await;
        assert_eq!(error.reason, Reason::Overloaded);
        assert!(error.detail.retry_after_ms > 0);
        streams[0].half(true).await;
        let answer = streams[0].answers.recv().await;
        assert!(matches!(answer, Some(Answer::Receipt(_))), "{answer:?}");
        until_free(&places, true).await;
        streams[2].half(false).await;
        until_free(&places, false).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_chunk_that_does_not_go_on_ends_its_stream() {
        let places = Places::new(1, Answers::default());
        let mut stream = Stream::start(&places);
        stream.half(false).await;
        let error = timeout(2 * CHUNK_PAUSE_MAX, stream.failed()).await.expect("it ends");
        assert_eq!(error.reason, Reason::DeadlineExceeded);
        assert!(stream.answers.recv().await.is_none(), "the call is over, and its place with it");
    }
}
