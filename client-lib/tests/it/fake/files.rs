//! File servers with their chunks in memory.

use super::{Cluster, lies::told, net::Mood};
use bytes::{Bytes, BytesMut};
use cairn_proto::{
    Error, Reason,
    checksum::{crc64, verify_blocks},
    id::ChunkId,
    limits::BLOCK_BYTES,
    v1::{self, file_service_server::FileService},
};
use futures::{StreamExt as _, stream, stream::BoxStream};
use parking_lot::Mutex;
use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

#[derive(Clone, Debug)]
pub struct Held {
    pub data: Bytes,
    pub blocks: Vec<u64>,
    pub checksum: u64,
}

#[derive(Debug, Default)]
pub struct FileServer {
    pub id: u64,
    pub chunks: Mutex<BTreeMap<ChunkId, Held>>,
    /// Errors of the next writes.
    pub refuse_writes: Mutex<VecDeque<Error>>,
    /// Falls over in the middle of the next chunk.
    pub die_in_write: Mutex<Option<Mood>>,
    /// Members that miss the next chunks.
    pub leave_out: Mutex<Vec<u64>>,
    pub reads: AtomicUsize,
    pub writes: AtomicUsize,
    /// Streams of writes that are open.
    pub write_streams: AtomicUsize,
    pub fetched: AtomicUsize,
}

impl FileServer {
    /// Flips a bit of each chunk held here.
    pub fn spoil(&self) {
        for held in self.chunks.lock().values_mut() {
            let mut bytes = BytesMut::from(&held.data[..]);
            let middle = bytes.len() / 2;
            bytes[middle] ^= 4;
            held.data = bytes.freeze();
        }
    }
}

#[derive(Clone, Debug)]
pub struct FileFace(pub Arc<Cluster>, pub usize);

impl FileFace {
    fn me(&self) -> &FileServer {
        &self.0.servers[self.1]
    }

    fn store(&self, message: &v1::WriteRequest, data: Bytes, blocks: Vec<u64>) -> Result<v1::Receipt, Error> {
        let chunk = ChunkId::from(message.chunk.unwrap());
        let finish = message.finish.unwrap();
        if let Some(error) = self.me().refuse_writes.lock().pop_front() {
            return Err(error);
        }
        let group = self.0.group(message.group_id);
        if group.primary_id != self.me().id || group.epoch != message.epoch {
            let mut error = Error::new(Reason::StaleEpoch, "the group moved on");
            error.detail.groups.push(group);
            return Err(error);
        }
        assert_eq!(verify_blocks(chunk, 0, &data, &blocks), None, "a client sends good checksums");
        assert_eq!(finish.length, data.len() as u64);
        assert_eq!(finish.checksum, Some(crc64(&data)));
        let held = Held { data, blocks, checksum: finish.checksum.unwrap() };
        let left_out = self.me().leave_out.lock().clone();
        let mut holder_ids = Vec::new();
        for seat in &group.seats {
            let up = self.0.mood(seat.server_id) == Mood::Up;
            if up && !left_out.contains(&seat.server_id) {
                self.0.server(seat.server_id).chunks.lock().insert(chunk, held.clone());
                holder_ids.push(seat.server_id);
            }
        }
        self.me().writes.fetch_add(1, Ordering::Relaxed);
        Ok(v1::Receipt {
            chunk: Some(chunk.into()),
            group_id: group.id,
            epoch: group.epoch,
            length: finish.length,
            checksum: held.checksum,
            holder_ids,
            ..Default::default()
        })
    }
}

#[tonic::async_trait]
impl FileService for FileFace {
    type ReadStream = BoxStream<'static, Result<v1::ReadResponse, Status>>;
    type ReadManyStream = BoxStream<'static, Result<v1::ReadManyResponse, Status>>;
    type WriteStream = ReceiverStream<Result<v1::WriteResponse, Status>>;
    type FetchFromPrimaryStream = ReceiverStream<Result<v1::FetchFromPrimaryResponse, Status>>;
    type InventoryStream = ReceiverStream<Result<v1::InventoryResponse, Status>>;

    async fn read(&self, request: Request<v1::ReadRequest>) -> Result<Response<Self::ReadStream>, Status> {
        let request = request.into_inner();
        let chunk = cairn_proto::convert::chunk_id(request.chunk.as_ref())?;
        self.me().reads.fetch_add(1, Ordering::Relaxed);
        let held = self.me().chunks.lock().get(&chunk).cloned();
        let held = held.ok_or_else(|| Error::new(Reason::ChunkNotFound, "not here"))?;
        let length = held.data.len();
        let begin = request.offset as usize / BLOCK_BYTES * BLOCK_BYTES;
        let end = match request.length {
            0 => length,
            some => ((request.offset + some) as usize).next_multiple_of(BLOCK_BYTES).min(length),
        };
        let messages: Vec<v1::ReadResponse> = (begin..end)
            .step_by(1 << 20)
            .map(|at| {
                let next = (at + (1 << 20)).min(end);
                v1::ReadResponse {
                    offset: at as u64,
                    block_checksums: held.blocks[at / BLOCK_BYTES..next.div_ceil(BLOCK_BYTES)].to_vec(),
                    chunk_length: length as u64,
                    chunk_checksum: held.checksum,
                    data: held.data.slice(at..next),
                }
            })
            .collect();
        let told = match self.0.lies().read {
            Some(lie) => lie(messages),
            None => stream::iter(messages.into_iter().map(Ok)).boxed(),
        };
        Ok(Response::new(told))
    }

    async fn read_many(
        &self,
        request: Request<v1::ReadManyRequest>,
    ) -> Result<Response<Self::ReadManyStream>, Status> {
        let mut answers = Vec::new();
        for (index, read) in (0..).zip(request.into_inner().reads) {
            let told = move |part: Result<v1::ReadResponse, Status>| match part {
                Ok(part) => v1::ReadManyResponse { index, error: None, part: Some(part) },
                Err(status) => {
                    v1::ReadManyResponse { index, error: Some(Error::from(status).to_wire()), part: None }
                }
            };
            match self.read(Request::new(read)).await {
                Ok(parts) => answers.push(parts.into_inner().map(told).boxed()),
                Err(status) => answers.push(stream::iter([told(Err(status))]).boxed()),
            }
        }
        Ok(Response::new(stream::select_all(answers).map(Ok).boxed()))
    }

    async fn write(
        &self,
        request: Request<Streaming<v1::WriteRequest>>,
    ) -> Result<Response<Self::WriteStream>, Status> {
        let mut messages = request.into_inner();
        let this = self.clone();
        let (sender, receiver) = tokio::sync::mpsc::channel(16);
        self.me().write_streams.fetch_add(1, Ordering::Relaxed);
        let streaming = async move {
            let (mut data, mut blocks) = (BytesMut::new(), Vec::new());
            while let Ok(Some(mut message)) = messages.message().await {
                if let Some(mood) = this.me().die_in_write.lock().take() {
                    this.0.set_mood(this.me().id, mood);
                    return;
                }
                assert_eq!(message.offset, data.len() as u64);
                data.extend_from_slice(&message.data);
                blocks.append(&mut message.block_checksums);
                if message.finish.is_none() {
                    continue;
                }
                let done = this.store(&message, data.split().freeze(), std::mem::take(&mut blocks));
                let failed = done.is_err();
                let receipt = done.map(|receipt| told(&this.0.lies().receipt, receipt));
                let answer = receipt.map(|receipt| v1::WriteResponse { receipt: Some(receipt) });
                if sender.send(answer.map_err(Status::from)).await.is_err() || failed {
                    return;
                }
            }
        };
        let this = self.clone();
        tokio::spawn(async move {
            streaming.await;
            this.me().write_streams.fetch_sub(1, Ordering::Relaxed);
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn fetch_from_primary(
        &self,
        request: Request<v1::FetchFromPrimaryRequest>,
    ) -> Result<Response<Self::FetchFromPrimaryStream>, Status> {
        let request = request.into_inner();
        assert_eq!(request.cluster_id, "fake");
        let source = self.0.server(request.source.unwrap().id);
        let (sender, receiver) = tokio::sync::mpsc::channel(request.chunks.len());
        for chunk in request.chunks {
            let id = ChunkId::from(chunk.chunk.unwrap());
            let held = source.chunks.lock().get(&id).cloned();
            let stored = held.is_some();
            if let Some(held) = held {
                self.me().chunks.lock().insert(id, held);
                self.me().fetched.fetch_add(1, Ordering::Relaxed);
            }
            let answer = v1::FetchFromPrimaryResponse { chunk: chunk.chunk, stored, error: String::new() };
            sender.try_send(Ok(answer)).unwrap();
        }
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn inventory(
        &self,
        _: Request<v1::InventoryRequest>,
    ) -> Result<Response<Self::InventoryStream>, Status> {
        Err(Error::new(Reason::NotSupported, "not here").into())
    }
}
