//! Chunks to a group's primary: large ones on streams of their own, small ones on one stream that many writers share.

use crate::{
    retry::restore,
    servers::ServerLink,
    write::{chunk::Sealed, grants::Slot},
};
use cairn_proto::{Error, Reason, Result, id::ChunkId, net::framed, v1};
use parking_lot::Mutex;
use std::{collections::HashMap, sync::Arc, time::Duration};
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

/// Who waits for which receipt; nothing once the stream has ended.
type Pending = Arc<Mutex<Option<HashMap<ChunkId, oneshot::Sender<Result<v1::Receipt>>>>>>;

/// One long-lived `Write` stream.
#[derive(Clone, Debug)]
pub(crate) struct SharedStream {
    messages: mpsc::Sender<v1::WriteRequest>,
    pending: Pending,
}

impl SharedStream {
    fn open(link: &ServerLink) -> Result<Self> {
        let mut client = link.small()?;
        let (messages, receiver) = mpsc::channel(SHARED_MESSAGES_MAX);
        let pending: Pending = Arc::new(Mutex::new(Some(HashMap::new())));
        let (name, waiting) = (link.name(), pending.clone());
        let request = framed::outgoing(link.request(ReceiverStream::new(receiver)));
        tokio::spawn(async move {
            let error = match client.write(request).await {
                Ok(answers) => relay(answers.into_inner(), &waiting, &name).await,
                Err(status) => restore(status, &name),
            };
            let waiting = waiting.lock().take();
            for (_, receipt) in waiting.into_iter().flatten() {
                let _ = receipt.send(Err(error.clone()));
            }
        });
        Ok(Self { messages, pending })
    }

    fn is_open(&self) -> bool {
        self.pending.lock().is_some()
    }

    async fn write(&self, chunk: ChunkId, message: v1::WriteRequest) -> Result<v1::Receipt> {
        let ended = || Error::unavailable("the write stream has ended");
        let (sender, receipt) = oneshot::channel();
        {
            let mut pending = self.pending.lock();
            let pending = pending.as_mut().ok_or_else(ended)?;
            if pending.len() >= SHARED_PENDING_MAX {
                return Err(Error::new(Reason::Overloaded, "too many chunks wait for the same file server"));
            }
            pending.insert(chunk, sender);
        }
        let _forget = Forget { pending: &self.pending, chunk };
        let sent = async {
            // When the stream ends, `receipt` says why.
            let _ = self.messages.send(message).await;
            std::future::pending::<()>().await;
        };
        tokio::select! {
            answer = receipt => answer.unwrap_or_else(|_| Err(ended())),
            () = sent => Err(ended()),
        }
    }
}

struct Forget<'a> {
    pending: &'a Pending,
    chunk: ChunkId,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        if let Some(pending) = self.pending.lock().as_mut() {
            pending.remove(&self.chunk);
        }
    }
}

/// Hands receipts to those who wait; says why the stream ended.
async fn relay(mut answers: tonic::Streaming<v1::WriteResponse>, pending: &Pending, name: &str) -> Error {
    loop {
        let receipt = match answers.message().await {
            Ok(Some(answer)) => answer.receipt,
            Ok(None) => return Error::unavailable(format!("file server {name} ended the write stream")),
            Err(status) => return restore(status, name),
        };
        let Some(receipt) = receipt else { continue };
        let chunk = receipt.chunk.map(ChunkId::from).unwrap_or_default();
        if let Some(waiting) = pending.lock().as_mut().and_then(|pending| pending.remove(&chunk)) {
            let _ = waiting.send(Ok(receipt));
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
            let stream = self.shared_stream()?;
            return stream.write(slot.chunk, message).await;
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

    fn shared_stream(&self) -> Result<SharedStream> {
        let mut shared = self.stream.lock();
        if let Some(stream) = shared.as_ref().filter(|stream| stream.is_open()) {
            return Ok(stream.clone());
        }
        let stream = SharedStream::open(self)?;
        *shared = Some(stream.clone());
        Ok(stream)
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
