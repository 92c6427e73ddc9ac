//! `FileService`: reads, writes, fetches and inventories.

use crate::{
    fetch::{self, Order},
    grpc::reading,
    ingest::{Begin, Finish, Part, Sender},
    node::Node,
    places::Turn,
    receive::{self, Answer, Intake, Local, Receive, receipt},
    replicate::Fan,
};
use async_trait::async_trait;
use cairn_proto::{
    Error, Result,
    convert::required,
    id::{GrantId, ServerId},
    limits::ORDER_CHUNKS_MAX,
    net::framed,
    request,
    v1::{self, file_service_server::FileService},
};
use futures::{Stream, StreamExt as _, stream::BoxStream};
use std::{ops::RangeInclusive, sync::Arc};
use tokio::{sync::mpsc, task::JoinSet};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::Instrument as _;

/// Receipts that wait for a slow caller; then its stream is read no further.
const ANSWERS_WAITING: usize = 64;
/// Digests or chunks in one message of an inventory.
const INVENTORY_PAGE: usize = 4_096;

/// Serves `FileService`.
#[derive(Clone, Debug)]
pub struct FileHandler {
    node: Arc<Node>,
}

impl FileHandler {
    /// For a node.
    pub fn new(node: Arc<Node>) -> Self {
        Self { node }
    }
}

/// A stream of answers.
type Answers<T> = BoxStream<'static, Result<T, Status>>;

#[tonic::async_trait]
impl FileService for FileHandler {
    type ReadStream = Answers<v1::ReadResponse>;
    type ReadManyStream = Answers<v1::ReadManyResponse>;
    type WriteStream = Answers<v1::WriteResponse>;
    type FetchFromPrimaryStream = Answers<v1::FetchFromPrimaryResponse>;
    type InventoryStream = Answers<v1::InventoryResponse>;

    async fn read(&self, request: Request<v1::ReadRequest>) -> Result<Response<Self::ReadStream>, Status> {
        let (_, extensions, request) = request.into_parts();
        Ok(framed::answer(&extensions, reading::read(self.node.clone(), &request).await?))
    }

    async fn read_many(
        &self,
        request: Request<v1::ReadManyRequest>,
    ) -> Result<Response<Self::ReadManyStream>, Status> {
        let (_, extensions, request) = request.into_parts();
        Ok(framed::answer(&extensions, reading::read_many(self.node.clone(), request.reads)?))
    }

    async fn write(
        &self,
        request: Request<Streaming<v1::WriteRequest>>,
    ) -> Result<Response<Self::WriteStream>, Status> {
        let primary = Arc::new(Primary { node: self.node.clone() });
        let turn = turn(&request);
        let answers = start(&self.node, primary, Sender::Client, turn, framed::received(request));
        let answers = answers.filter_map(|answer| async move {
            match answer {
                Answer::Receipt(receipt) => Some(Ok(v1::WriteResponse { receipt: Some(receipt) })),
                Answer::Failed(error) => Some(Err(error.into())),
                Answer::Refused(..) => None,
            }
        });
        Ok(Response::new(answers.boxed()))
    }

    async fn fetch_from_primary(
        &self,
        request: Request<v1::FetchFromPrimaryRequest>,
    ) -> Result<Response<Self::FetchFromPrimaryStream>, Status> {
        let orders = self.orders(request.into_inner()).await?;
        let (answers, stream) = mpsc::channel(ANSWERS_WAITING);
        let node = self.node.clone();
        tokio::spawn(request::carried(fetch_all(node, orders, answers)).in_current_span());
        Ok(Response::new(ReceiverStream::new(stream).map(Ok).boxed()))
    }

    async fn inventory(
        &self,
        request: Request<v1::InventoryRequest>,
    ) -> Result<Response<Self::InventoryStream>, Status> {
        let request = request.into_inner();
        let last = if request.grant_id_to == 0 { u64::MAX } else { request.grant_id_to };
        let grants = GrantId(request.grant_id_from)..=GrantId(last);
        let node = self.node.clone();
        let stream = match request.detail() {
            v1::InventoryDetail::Chunks => chunks(node, grants).boxed(),
            _ => digests(node, grants).boxed(),
        };
        Ok(Response::new(stream))
    }
}

/// The place of a call.
pub(super) fn turn<T>(request: &Request<T>) -> Turn {
    request.extensions().get::<Turn>().cloned().unwrap_or_default()
}

/// Starts to receive a stream of chunks.
pub(super) fn start<S>(
    node: &Arc<Node>,
    receiver: Arc<dyn Receive>,
    sender: Sender,
    turn: Turn,
    inbound: S,
) -> ReceiverStream<Answer>
where
    S: Stream<Item = Result<v1::WriteRequest, Status>> + Send + Unpin + 'static,
{
    let (answers, stream) = mpsc::channel(ANSWERS_WAITING);
    let receiving = receive::receive(node.receiving.clone(), receiver, sender, turn, inbound, answers);
    tokio::spawn(request::carried(receiving).in_current_span());
    ReceiverStream::new(stream)
}

impl FileHandler {
    /// Checks an order to fetch, also that its source is a server of this cluster.
    async fn orders(&self, request: v1::FetchFromPrimaryRequest) -> Result<Vec<Order>> {
        let node = &self.node;
        node.identity.check(&request.cluster_id, node.identity.generation())?;
        if request.chunks.len() > ORDER_CHUNKS_MAX {
            return Err(Error::limit(format!(
                "{} chunks in one order, at most {ORDER_CHUNKS_MAX} are allowed",
                request.chunks.len()
            )));
        }
        let source = ServerId(required(request.source, "source")?.id);
        if !node.topology.map().servers.contains_key(&source) {
            node.refresh_topology().await?;
        }
        if !node.topology.map().servers.contains_key(&source) {
            let why =
                format!("server {source} is not in the topology: chunks are fetched from known servers only");
            return Err(Error::unavailable(why).on(source.to_string()));
        }
        let group = request.group.map(|group| group.id).unwrap_or_default();
        request
            .chunks
            .iter()
            .map(|chunk| {
                let mut order = Order::from_wire(chunk, vec![source])?;
                if order.group.0 == 0 {
                    order.group = group.into();
                }
                Ok(order)
            })
            .collect()
    }
}

/// Fetches chunks, several at a time, and says how each went.
async fn fetch_all(node: Arc<Node>, orders: Vec<Order>, answers: mpsc::Sender<v1::FetchFromPrimaryResponse>) {
    let mut orders = orders.into_iter();
    let mut running = JoinSet::new();
    loop {
        while running.len() < fetch::PARALLEL
            && let Some(order) = orders.next()
        {
            let node = node.clone();
            let fetching = async move {
                let fetched = fetch::fetch(&node, &order).await;
                v1::FetchFromPrimaryResponse {
                    chunk: Some(order.chunk.into()),
                    stored: fetched.is_ok(),
                    error: fetched.err().map(|error| error.to_string()).unwrap_or_default(),
                }
            };
            running.spawn(request::carried(fetching).in_current_span());
        }
        let Some(done) = running.join_next().await else { return };
        // A caller that has gone stops what has not begun; what has is completed.
        if let Ok(answer) = done
            && answers.send(answer).await.is_err()
        {
            running.detach_all();
            return;
        }
    }
}

fn digests(
    node: Arc<Node>,
    grants: RangeInclusive<GrantId>,
) -> impl Stream<Item = Result<v1::InventoryResponse, Status>> {
    async_stream::stream! {
        let (mut from, to) = grants.into_inner();
        loop {
            let digests = node.store.digests(from..=to, INVENTORY_PAGE);
            let last = digests.last().map(|digest| digest.grant_id);
            let is_last = digests.len() < INVENTORY_PAGE;
            yield Ok(v1::InventoryResponse { digests, chunks: Vec::new() });
            match last {
                Some(last) if !is_last && last < to.0 => from = GrantId(last + 1),
                _ => break,
            }
        }
    }
}

fn chunks(
    node: Arc<Node>,
    grants: RangeInclusive<GrantId>,
) -> impl Stream<Item = Result<v1::InventoryResponse, Status>> {
    async_stream::stream! {
        let mut after = None;
        loop {
            let page = node.store.list(after, grants.clone(), INVENTORY_PAGE);
            let is_last = page.len() < INVENTORY_PAGE;
            after = page.last().map(|info| info.chunk);
            let chunks = page
                .into_iter()
                .map(|info| v1::HeldChunk {
                    chunk: Some(v1::ChunkRef {
                        chunk: Some(info.chunk.into()),
                        length: info.length,
                        checksum: info.checksum,
                        group_id: info.group.0,
                    }),
                    corrupt: info.corrupt,
                    // 0 means never, so a check just now is 1 ms old.
                    verified_ago_ms: info.verified_at.map_or(0, |at| (at.elapsed().as_millis() as u64).max(1)),
                })
                .collect();
            yield Ok(v1::InventoryResponse { digests: Vec::new(), chunks });
            if is_last {
                break;
            }
        }
    }
}

/// Receives chunks as the primary of their group: stores them and has the followers store them.
#[derive(Debug)]
pub(super) struct Primary {
    node: Arc<Node>,
}

impl Primary {
    /// For a node.
    pub(super) fn new(node: Arc<Node>) -> Self {
        Self { node }
    }
}

#[async_trait]
impl Receive for Primary {
    async fn begin(&self, begin: Begin, part: &Part) -> Result<Box<dyn Intake>> {
        let me = self.node.me();
        let (map, group) = self.node.group(begin.group, begin.epoch.0).await?;
        if group.primary_id != me.0 {
            let why = format!(
                "server {me} is not the primary of group {}, server {} is: write there",
                group.id, group.primary_id
            );
            return Err(map.stale(begin.group, why).on(me.to_string()));
        }
        let whole_bytes = part.finish.map(|_| part.data.len());
        let fan = self.node.replicator.begin(&group, me, begin, whole_bytes)?;
        let local = Local::begin(self.node.store.clone(), me, begin, part).await?;
        Ok(Box::new(PrimaryIntake { node: self.node.clone(), begin, local, fan }))
    }
}

struct PrimaryIntake {
    node: Arc<Node>,
    begin: Begin,
    local: Local,
    fan: Fan,
}

#[async_trait]
impl Intake for PrimaryIntake {
    async fn part(&mut self, part: &Part) -> Result<()> {
        let Self { local, fan, .. } = self;
        // Both at once: the followers need not wait for this server's disk.
        let (stored, ()) = futures::join!(local.part(part), fan.send(part));
        stored
    }

    async fn finish(self: Box<Self>, finish: Finish) -> Result<v1::Receipt> {
        let Self { node, begin, local, fan } = *self;
        let me = node.me();
        let local = async move { Box::new(local).finish(finish).await.map(drop) };
        let mut holders = fan.settle(local).await?;
        holders.insert(0, me);
        node.metrics.bytes_written.inc_by(finish.length);
        Ok(receipt(begin, finish.length, finish.checksum, holders))
    }
}
