//! Getting chunks that this server misses, or holds badly, from other members of their group.

use crate::{node::Node, topology::Map};
use cairn_proto::{
    Error, Reason, Result,
    convert::{chunk_id, chunk_length},
    id::{ChunkId, GroupId, ServerId},
    limits::{DATA_BYTES_MAX, MESSAGE_BYTES_MAX},
    net::{
        Traffic,
        framed::{self, Framed},
        meant_for,
    },
    v1::{self, file_service_client::FileServiceClient},
};
use parking_lot::Mutex;
use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};
use tokio::{sync::Notify, task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;

/// Chunks that wait to be fetched; more are dropped, and found again when the directory compares inventories.
pub const QUEUE_MAX: usize = 65_536;
/// Fetches at a time, of the queue and of each `FetchFromPrimary`.
pub const PARALLEL: usize = 8;
/// How often a chunk is tried before it is left to the directory's comparison.
const ATTEMPTS_MAX: u32 = 8;
/// Wait before a chunk is tried again, and while it is arriving by another way; doubled up to 32 times.
const RETRY_MS: u64 = 200;

/// A chunk to get.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    /// The chunk.
    pub chunk: ChunkId,
    /// Its group.
    pub group: GroupId,
    /// Its length.
    pub length: u64,
    /// CRC-64/NVME of all its bytes.
    pub checksum: u64,
    /// Who may have it, best first. This server itself is passed over.
    pub sources: Vec<ServerId>,
}

impl Order {
    /// Checks a chunk that is named on the wire.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` or `LIMIT_EXCEEDED`.
    pub fn from_wire(chunk: &v1::ChunkRef, sources: Vec<ServerId>) -> Result<Self> {
        Ok(Self {
            chunk: chunk_id(chunk.chunk.as_ref())?,
            group: GroupId(chunk.group_id),
            length: chunk_length(chunk.length)?,
            checksum: chunk.checksum,
            sources,
        })
    }
}

/// The queue of chunks to get; each chunk is in it once.
#[derive(Debug, Default)]
pub struct Fetcher {
    queue: Mutex<Queue>,
    pushed: Notify,
}

#[derive(Debug, Default)]
struct Queue {
    ready: VecDeque<Waiting>,
    /// All chunks that wait, wait to be tried again, or are being fetched.
    known: HashSet<ChunkId>,
    /// Chunks that are on their way, by whatever order, how often, and whether they were collected meanwhile.
    arriving: HashMap<ChunkId, (usize, bool)>,
}

/// A chunk that is on its way.
struct Arriving<'a> {
    fetcher: &'a Fetcher,
    chunk: ChunkId,
}

impl<'a> Arriving<'a> {
    fn begin(fetcher: &'a Fetcher, chunk: ChunkId) -> Self {
        fetcher.queue.lock().arriving.entry(chunk).or_default().0 += 1;
        Self { fetcher, chunk }
    }

    /// Whether an order to remove it came while it was on its way.
    fn is_collected(&self) -> bool {
        self.fetcher.queue.lock().arriving.get(&self.chunk).is_some_and(|(_, collected)| *collected)
    }
}

impl Drop for Arriving<'_> {
    fn drop(&mut self) {
        let mut queue = self.fetcher.queue.lock();
        if let Some((count, _)) = queue.arriving.get_mut(&self.chunk) {
            *count -= 1;
            if *count == 0 {
                queue.arriving.remove(&self.chunk);
            }
        }
    }
}

#[derive(Debug)]
struct Waiting {
    order: Order,
    attempts: u32,
}

impl Fetcher {
    /// Queues a chunk unless it is known already. False when there is no room.
    pub fn push(&self, order: Order) -> bool {
        {
            let mut queue = self.queue.lock();
            if queue.known.contains(&order.chunk) {
                return true;
            }
            if queue.known.len() >= QUEUE_MAX {
                return false;
            }
            queue.known.insert(order.chunk);
            queue.ready.push_back(Waiting { order, attempts: 0 });
        }
        self.pushed.notify_one();
        true
    }

    /// Chunks that wait or are being fetched.
    pub fn len(&self) -> usize {
        self.queue.lock().known.len()
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn again(&self, waiting: Waiting) {
        self.queue.lock().ready.push_back(waiting);
        self.pushed.notify_one();
    }

    fn done(&self, chunk: ChunkId) {
        self.queue.lock().known.remove(&chunk);
    }

    /// Takes chunks out of the queue, because they are collected. Called before they are removed: those that are on
    /// their way are removed again when they arrive.
    pub fn forget(&self, chunks: &[ChunkId]) {
        let mut queue = self.queue.lock();
        for chunk in chunks {
            queue.known.remove(chunk);
            if let Some((_, collected)) = queue.arriving.get_mut(chunk) {
                *collected = true;
            }
        }
    }

    fn pop(&self) -> Option<Waiting> {
        let mut queue = self.queue.lock();
        loop {
            let waiting = queue.ready.pop_front()?;
            if queue.known.contains(&waiting.order.chunk) {
                return Some(waiting);
            }
        }
    }
}

/// Works the queue off until `shutdown`.
pub async fn run(node: Arc<Node>, shutdown: CancellationToken) {
    let mut running = JoinSet::new();
    loop {
        while running.len() < PARALLEL
            && let Some(waiting) = node.fetcher.pop()
        {
            running.spawn(attempt(node.clone(), waiting, shutdown.clone()));
        }
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = running.join_next(), if !running.is_empty() => {}
            () = node.fetcher.pushed.notified(), if running.len() < PARALLEL => {}
        }
    }
}

async fn attempt(node: Arc<Node>, mut waiting: Waiting, shutdown: CancellationToken) {
    let chunk = waiting.order.chunk;
    // A late write of the same chunk is about to bring it: two writers would only disturb each other.
    let fetched = match node.receiving.is_arriving(chunk) {
        true => Err(Error::new(Reason::Conflict, "it is arriving from its primary")),
        false => fetch(&node, &waiting.order).await,
    };
    let Err(error) = fetched else {
        node.fetcher.done(chunk);
        return;
    };
    waiting.attempts += 1;
    // Nobody has it any more: it was collected, or never committed.
    if waiting.attempts >= ATTEMPTS_MAX || error.reason == Reason::ChunkNotFound && waiting.attempts > 1 {
        tracing::warn!(chunk = %chunk, %error, "could not fetch a chunk; the next comparison will ask for it again");
        node.fetcher.done(chunk);
        return;
    }
    tracing::debug!(chunk = %chunk, %error, "fetching a chunk again soon");
    // Slept in a task of its own, so that a place is free for other chunks.
    tokio::spawn(async move {
        let wait = Duration::from_millis(RETRY_MS << waiting.attempts.min(5));
        tokio::select! {
            () = tokio::time::sleep(wait) => node.fetcher.again(waiting),
            () = shutdown.cancelled() => {}
        }
    });
}

/// Makes a chunk durable here, from the first of its sources that has it. Does nothing when it is held already.
///
/// # Errors
/// That of the last source; `UNAVAILABLE` when no source is in the topology.
pub async fn fetch(node: &Node, order: &Order) -> Result<()> {
    if let Some(held) = node.store.info(order.chunk)
        && !held.corrupt
    {
        if (held.length, held.checksum) == (order.length, order.checksum) {
            return Ok(());
        }
        let why = format!("chunk {} is held here with other content than was committed", order.chunk);
        return Err(Error::new(Reason::ChunkExists, why));
    }
    let arriving = Arriving::begin(&node.fetcher, order.chunk);
    let map = node.topology.map();
    let mut failed = Error::unavailable(format!("no other server is known to have chunk {}", order.chunk));
    for source in order.sources.iter().filter(|source| **source != node.me()) {
        match fetch_from(node, &map, order, *source).await {
            Ok(()) if arriving.is_collected() => {
                node.store.remove(&[order.chunk]).await?;
                let why = format!("chunk {} was collected while it arrived", order.chunk);
                return Err(Error::new(Reason::ChunkNotFound, why));
            }
            Ok(()) => {
                node.metrics.chunks_fetched.inc();
                node.metrics.bytes_written.inc_by(order.length);
                return Ok(());
            }
            Err(error) => {
                if error.reason == Reason::WrongCluster {
                    node.peers.astray(*source);
                }
                failed = error.on(source.to_string());
            }
        }
        // Another source does not help against these.
        if matches!(failed.reason, Reason::NoSpace | Reason::Conflict) {
            break;
        }
    }
    Err(failed)
}

async fn fetch_from(node: &Node, map: &Map, order: &Order, source: ServerId) -> Result<()> {
    let chunk = order.chunk;
    let traffic = match order.length as usize <= DATA_BYTES_MAX / 8 {
        true => Traffic::Small,
        false => Traffic::Bulk,
    };
    let channel = node.peers.channel(map, source, traffic)?;
    let mut client =
        FileServiceClient::new(Framed::client(channel)).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let wait = Duration::from_millis(node.config.timing.fetch_wait_ms);
    let silent = |_| Error::unavailable(format!("server {source} does not answer")).on(source.to_string());
    let request = v1::ReadRequest { chunk: Some(chunk.into()), offset: 0, length: 0 };
    let request = framed::expecting(meant_for(request, &node.identity.cluster_id(), source));
    let reading = tokio::time::timeout(wait, client.read(request)).await.map_err(silent)?;
    let mut parts = framed::incoming(reading?);
    let differs = |what: &str| {
        let why = format!("server {source} has another chunk {chunk} than was committed ({what})");
        Error::new(Reason::ChecksumMismatch, why)
    };
    let mut offset = 0;
    let mut writer = None;
    loop {
        let deadline = Instant::now() + wait;
        let part = tokio::time::timeout_at(deadline, parts.message()).await.map_err(silent)??;
        let Some(part) = part else { break };
        if (part.chunk_length, part.chunk_checksum) != (order.length, order.checksum) {
            return Err(differs("length or checksum"));
        }
        if part.offset != offset || part.data.is_empty() || offset + part.data.len() as u64 > order.length {
            return Err(differs("parts out of order"));
        }
        offset += part.data.len() as u64;
        if part.offset == 0 && offset == order.length && part.data.len() <= DATA_BYTES_MAX {
            node.store
                .put(chunk, order.group, part.data, part.block_checksums, order.checksum, false)
                .await?;
            return Ok(());
        }
        // The store compares every block with its checksum.
        let writer = match &mut writer {
            Some(writer) => writer,
            None => writer.insert(node.store.begin(chunk, order.group, Some(order.length)).await?),
        };
        writer.append(part.data, part.block_checksums).await?;
    }
    match writer {
        // The seal compares the whole with the order's length and checksum.
        Some(writer) => writer.seal(order.length, order.checksum, false).await.map(drop),
        None => Err(differs("no bytes")),
    }
}
