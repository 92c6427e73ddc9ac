//! Chunks to a group's primary: large ones on streams of their own, small ones on one stream that many writers share.

use crate::{
    retry::restore,
    servers::ServerLink,
    write::{chunk::Sealed, grants::Slot},
};
use cairn_proto::{Error, Reason, Result, id::ChunkId, net::framed, v1};
use parking_lot::Mutex;
use std::{
    collections::HashMap,
    sync::{Arc, Weak},
    time::Duration,
};
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};
use tokio_stream::wrappers::ReceiverStream;

/// Chunks up to this size share a stream, one message each.
const SHARED_BYTES_MAX: usize = 256 * 1024;
/// Messages under way on a shared stream: at most 8 MiB.
const SHARED_MESSAGES_MAX: usize = 32;
/// Receipts awaited from a shared stream.
const SHARED_PENDING_MAX: usize = 1_024;
/// Silence of a primary after which it is asked whether it lives.
const SILENCE: Duration = Duration::from_millis(80);
/// Longest wait for a receipt from a primary that lives, at the first attempt and for each 8 MiB.
const RECEIPT_PATIENCE: Duration = Duration::from_secs(2);

/// A shared stream that carries nothing for this long is closed; the next chunk opens another. A file server need not keep
/// streams of clients that are idle.
const SHARED_IDLE: Duration = Duration::from_secs(5);

/// A long-lived `Write` stream, until it is over.
#[derive(Clone, Debug)]
pub(crate) struct SharedStream(Shared);

/// Nothing once the stream has ended.
type Shared = Arc<Mutex<Option<Open>>>;

/// The sending half of a stream. Dropping it ends the stream.
#[derive(Debug)]
struct Open {
    messages: mpsc::Sender<v1::WriteRequest>,
    /// Who waits for which receipt.
    pending: HashMap<ChunkId, oneshot::Sender<Result<v1::Receipt>>>,
    used_at: Instant,
}

impl SharedStream {
    fn open(link: &ServerLink) -> Result<Self> {
        let mut client = link.small()?;
        let (messages, receiver) = mpsc::channel(SHARED_MESSAGES_MAX);
        let open = Open { messages, pending: HashMap::new(), used_at: Instant::now() };
        let shared: Shared = Arc::new(Mutex::new(Some(open)));
        let (name, waiting) = (link.name(), Arc::downgrade(&shared));
        let request = framed::outgoing(link.request(ReceiverStream::new(receiver)));
        tokio::spawn(async move {
            let call = async {
                match client.write(request).await {
                    Ok(answers) => relay(answers.into_inner(), &waiting, &name).await,
                    Err(status) => restore(status, &name),
                }
            };
            tokio::pin!(call);
            let error = tokio::select! {
                error = &mut call => error,
                () = close_when_idle(&waiting) => {
                    // Nobody waits for it any more: it ends in good order, or is cut off.
                    let _ = tokio::time::timeout(SHARED_IDLE, call).await;
                    return;
                }
            };
            let ended = waiting.upgrade().and_then(|shared| shared.lock().take());
            for (_, receipt) in ended.into_iter().flat_map(|open| open.pending) {
                let _ = receipt.send(Err(error.clone()));
            }
        });
        Ok(Self(shared))
    }

    /// A place for a chunk on the stream, which stays open until it is dropped; none on a stream that is over.
    ///
    /// # Errors
    /// `OVERLOADED` when too many chunks wait.
    fn enter(&self, chunk: ChunkId) -> Result<Option<Entered>> {
        let mut shared = self.0.lock();
        let Some(open) = shared.as_mut() else { return Ok(None) };
        if open.pending.len() >= SHARED_PENDING_MAX {
            return Err(Error::new(Reason::Overloaded, "too many chunks wait for the same file server"));
        }
        let (sender, receipt) = oneshot::channel();
        open.pending.insert(chunk, sender);
        open.used_at = Instant::now();
        Ok(Some(Entered { shared: self.0.clone(), messages: open.messages.clone(), chunk, receipt }))
    }
}

/// A chunk on a shared stream. Dropping it forgets about its receipt.
struct Entered {
    shared: Shared,
    messages: mpsc::Sender<v1::WriteRequest>,
    chunk: ChunkId,
    receipt: oneshot::Receiver<Result<v1::Receipt>>,
}

impl Entered {
    async fn write(mut self, message: v1::WriteRequest) -> Result<v1::Receipt> {
        let messages = self.messages.clone();
        let sent = async {
            // When the stream ends, `receipt` says why.
            let _ = messages.send(message).await;
            std::future::pending::<()>().await;
        };
        tokio::select! {
            answer = &mut self.receipt => answer.unwrap_or_else(|_| Err(ended())),
            () = sent => Err(ended()),
        }
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        if let Some(open) = self.shared.lock().as_mut() {
            open.pending.remove(&self.chunk);
        }
    }
}

fn ended() -> Error {
    Error::unavailable("the write stream has ended")
}

/// Closes a stream that carries nothing for long enough; ready when it is closed.
async fn close_when_idle(waiting: &Weak<Mutex<Option<Open>>>) {
    loop {
        let left = {
            let Some(shared) = waiting.upgrade() else { return };
            let mut shared = shared.lock();
            let Some(open) = shared.as_ref() else { return };
            let idle = if open.pending.is_empty() { open.used_at.elapsed() } else { Duration::ZERO };
            if idle >= SHARED_IDLE {
                shared.take();
                return;
            }
            SHARED_IDLE - idle
        };
        tokio::time::sleep(left).await;
    }
}

/// Hands receipts to those who wait; says why the stream ended.
async fn relay(
    mut answers: tonic::Streaming<v1::WriteResponse>,
    waiting: &Weak<Mutex<Option<Open>>>,
    name: &str,
) -> Error {
    loop {
        let receipt = match answers.message().await {
            Ok(Some(answer)) => answer.receipt,
            Ok(None) => return Error::unavailable(format!("file server {name} ended the write stream")),
            Err(status) => return restore(status, name),
        };
        let Some(receipt) = receipt else { continue };
        let chunk = receipt.chunk.map(ChunkId::from).unwrap_or_default();
        let waiter = waiting
            .upgrade()
            .and_then(|shared| shared.lock().as_mut().and_then(|open| open.pending.remove(&chunk)));
        if let Some(waiter) = waiter {
            let _ = waiter.send(Ok(receipt));
        }
    }
}

impl ServerLink {
    /// Writes a chunk through this primary and waits for its receipt, as long as the server shows signs of life.
    /// `attempt` counts from 0; later ones are more patient.
    ///
    /// # Errors
    /// As `FileService.Write`; `UNAVAILABLE` when the server went away or fell silent.
    pub async fn write(&self, slot: &Slot, sealed: &Sealed, attempt: u32) -> Result<v1::Receipt> {
        let mut failures = self.failures();
        failures.mark_unchanged();
        let result = tokio::select! {
            result = self.write_unwatched(slot, sealed) => result,
            error = self.watch(sealed.len(), attempt) => Err(error),
            _ = failures.changed() => {
                Err(Error::unavailable(format!("file server {} went away", self.name())))
            }
        };
        match result {
            Ok(receipt) => {
                self.alive();
                check(&receipt, slot, sealed).map_err(|error| error.on(self.name()))?;
                Ok(receipt)
            }
            Err(error) => {
                let error = self.judge(error);
                // One that is merely slow is left alone by this write only.
                if error.reason == Reason::Unavailable {
                    self.away(&error);
                }
                Err(error.on(self.name()))
            }
        }
    }

    async fn write_unwatched(&self, slot: &Slot, sealed: &Sealed) -> Result<v1::Receipt> {
        let group = &slot.grant.group;
        let mut messages = sealed.messages(slot.chunk, group.id, group.epoch);
        if sealed.len() <= SHARED_BYTES_MAX {
            let message = messages.next().ok_or_else(|| Error::internal("an empty chunk"))?;
            return self.enter_shared_stream(slot.chunk)?.write(message).await;
        }
        let mut client = self.bulk()?;
        let request = framed::outgoing(self.request(futures::stream::iter(messages)));
        let answers = client.write(request).await;
        let mut answers = answers.map_err(|status| restore(status, &self.name()))?.into_inner();
        match answers.message().await {
            Ok(Some(v1::WriteResponse { receipt: Some(receipt) })) => Ok(receipt),
            Ok(_) => Err(Error::unavailable("the write stream ended without a receipt")),
            Err(status) => Err(restore(status, &self.name())),
        }
    }

    /// A place on the shared stream, or on another one when that is over.
    fn enter_shared_stream(&self, chunk: ChunkId) -> Result<Entered> {
        let mut shared = self.stream.lock();
        if let Some(stream) = shared.as_ref()
            && let Some(entered) = stream.enter(chunk)?
        {
            return Ok(entered);
        }
        let stream = SharedStream::open(self)?;
        let entered = stream.enter(chunk)?;
        *shared = Some(stream);
        entered.ok_or_else(ended)
    }

    /// Ready with an error when the primary has fallen silent, or is too slow to wait for.
    async fn watch(&self, length: usize, attempt: u32) -> Error {
        let share = 1.0 + length as f64 / cairn_proto::limits::CHUNK_BYTES_DEFAULT as f64;
        let patience = RECEIPT_PATIENCE.mul_f64(share * f64::from(attempt + 1));
        let end = Instant::now() + patience;
        loop {
            tokio::time::sleep(SILENCE).await;
            let probe_patience = self.probe_patience() * (attempt + 1);
            if self.is_silent_for(SILENCE) && !self.probe(probe_patience).await {
                return Error::unavailable(format!("file server {} does not answer", self.name()));
            }
            if Instant::now() >= end {
                return Error::new(
                    Reason::DeadlineExceeded,
                    format!("file server {} gave no receipt in {} ms", self.name(), patience.as_millis()),
                );
            }
        }
    }
}

/// A receipt must be for what was sent.
fn check(receipt: &v1::Receipt, slot: &Slot, sealed: &Sealed) -> Result<()> {
    let chunk = receipt.chunk.map(ChunkId::from).unwrap_or_default();
    if chunk != slot.chunk || receipt.length != sealed.len() as u64 || receipt.checksum != sealed.checksum() {
        return Err(Error::new(
            Reason::ChecksumMismatch,
            format!("the receipt for chunk {} is about other bytes", slot.chunk),
        ));
    }
    Ok(())
}
