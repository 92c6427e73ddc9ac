//! `ReplicaService`: what other servers and the directory ask of this one.

use super::file::{Primary, start, turn};
use crate::{
    chunks::ChunkInfo,
    compose::{self, Recipe},
    fetch::Order,
    ingest::{Begin, Part, Sender},
    node::Node,
    receive::{Answer, Intake, Local, Receive},
    topology::{Adopted, Map},
};
use async_trait::async_trait;
use cairn_proto::{
    Error, Reason, Result,
    convert::chunk_id,
    id::{ChunkId, Generation, GroupId, ServerId},
    limits::{MESSAGE_BYTES_MAX, ORDER_CHUNKS_MAX},
    net::framed,
    v1::{self, replica_service_server::ReplicaService},
};
use futures::{StreamExt as _, stream::BoxStream};
use std::{collections::HashMap, sync::Arc};
use tonic::{Request, Response, Status, Streaming};

/// Serves `ReplicaService`.
#[derive(Clone, Debug)]
pub struct ReplicaHandler {
    node: Arc<Node>,
}

impl ReplicaHandler {
    /// For a node.
    pub fn new(node: Arc<Node>) -> Self {
        Self { node }
    }
}

/// Surplus copies removed in one step, during which no epoch changes here.
const SURPLUS_STEP: usize = 64;

/// A stream of answers.
type Answers<T> = BoxStream<'static, Result<T, Status>>;

#[tonic::async_trait]
impl ReplicaService for ReplicaHandler {
    type ReplicateStream = Answers<v1::ReplicateResponse>;
    type ReadJournalStream = Answers<v1::ReadJournalResponse>;

    async fn replicate(
        &self,
        request: Request<Streaming<v1::ReplicateRequest>>,
    ) -> Result<Response<Self::ReplicateStream>, Status> {
        let turn = turn(&request);
        let messages =
            framed::received(request).map(|message| message.map(|request| request.write.unwrap_or_default()));
        let follower = Arc::new(Follower { node: self.node.clone() });
        let answers =
            start(&self.node, follower, Sender::Primary, turn, messages).map(|answer| match answer {
                Answer::Receipt(receipt) => {
                    Ok(v1::ReplicateResponse { receipt: Some(receipt), ..Default::default() })
                }
                Answer::Refused(chunk, error) => {
                    let mut detail = *error.detail;
                    detail.reason = error.reason.to_wire() as i32;
                    Ok(v1::ReplicateResponse {
                        chunk: Some(chunk.into()),
                        error: Some(detail),
                        receipt: None,
                    })
                }
                Answer::Failed(error) => Err(error.into()),
            });
        Ok(Response::new(answers.boxed()))
    }

    async fn confirm(
        &self,
        request: Request<v1::ConfirmRequest>,
    ) -> Result<Response<v1::ConfirmResponse>, Status> {
        let request = request.into_inner();
        let missing = self.confirm(request).await?;
        Ok(Response::new(v1::ConfirmResponse { missing: missing.into_iter().map(Into::into).collect() }))
    }

    async fn collect(
        &self,
        request: Request<v1::CollectRequest>,
    ) -> Result<Response<v1::CollectResponse>, Status> {
        let request = request.into_inner();
        bounded(request.chunks.len())?;
        self.node.check_order(&request.cluster_id, Generation(request.generation)).await?;
        let chunks =
            request.chunks.iter().map(|chunk| chunk_id(Some(chunk))).collect::<Result<Vec<ChunkId>>>()?;
        let mut freed_bytes = 0;
        let part = if request.groups.is_empty() { ORDER_CHUNKS_MAX } else { SURPLUS_STEP };
        for chunks in chunks.chunks(part) {
            // No epoch changes between the look at it and the removal that rests on it.
            let _order = match request.groups.is_empty() {
                true => None,
                false => Some(self.node.orders.read().await),
            };
            self.check_surplus(&request.groups)?;
            // First: a fetch under way must not bring them back.
            self.node.fetcher.forget(chunks);
            freed_bytes += self.node.store.remove(chunks).await?.bytes;
        }
        self.node.forget_bad(&chunks);
        Ok(Response::new(v1::CollectResponse {
            // Those that were never here are gone as well.
            removed: chunks.len() as u64,
            freed_bytes,
        }))
    }

    async fn compose(
        &self,
        request: Request<v1::ComposeRequest>,
    ) -> Result<Response<v1::ComposeResponse>, Status> {
        let request = request.into_inner();
        self.node.check_order(&request.cluster_id, Generation(request.generation)).await?;
        let recipe = Recipe::from_wire(&request)?;
        let _composing = self.node.composer.enter().map_err(|error| error.on(self.node.me().to_string()))?;
        let parts = compose::gather(&self.node, &recipe).await?;
        let primary = Primary::new(self.node.clone());
        let mut intake = None;
        let mut receipt = None;
        for part in &parts {
            let mut current = match intake.take() {
                Some(intake) => intake,
                None => primary.begin(recipe.begin, part).await?,
            };
            current.part(part).await?;
            match part.finish {
                Some(finish) => receipt = Some(current.finish(finish).await?),
                None => intake = Some(current),
            }
        }
        Ok(Response::new(v1::ComposeResponse { receipt }))
    }

    async fn adopt(&self, request: Request<v1::AdoptRequest>) -> Result<Response<v1::AdoptResponse>, Status> {
        let topology =
            request.into_inner().topology.ok_or_else(|| Error::invalid("the field 'topology' is missing"))?;
        self.node.check_order(&topology.cluster_id, Generation(topology.generation)).await?;
        let adopted = self.node.adopt(&topology).await?;
        let map = self.node.topology.map();
        if adopted == Adopted::Older {
            let why = format!(
                "the topology is of generation {} revision {}, this server knows {} {}",
                topology.generation, topology.revision, map.generation, map.revision
            );
            return Err(Error::new(Reason::StaleEpoch, why).on(self.node.me().to_string()).into());
        }
        Ok(Response::new(v1::AdoptResponse { revision: map.revision.0 }))
    }

    async fn append_journal(
        &self,
        request: Request<v1::AppendJournalRequest>,
    ) -> Result<Response<v1::AppendJournalResponse>, Status> {
        let request = request.into_inner();
        let bytes: usize = request.records.iter().map(|record| record.plan.len()).sum();
        if bytes > MESSAGE_BYTES_MAX {
            return Err(Error::limit(format!("{bytes} bytes of journal records in one message")).into());
        }
        self.node.check_order(&request.cluster_id, Generation(request.generation)).await?;
        let durable_revision = self.node.journals.append(request).await?.0;
        Ok(Response::new(v1::AppendJournalResponse { durable_revision }))
    }

    async fn install_checkpoint(
        &self,
        request: Request<Streaming<v1::InstallCheckpointRequest>>,
    ) -> Result<Response<v1::InstallCheckpointResponse>, Status> {
        let mut messages = request.into_inner();
        let first =
            messages.message().await?.ok_or_else(|| Error::invalid("a checkpoint without a message"))?;
        self.node.check_order(&first.cluster_id, Generation(first.generation)).await?;
        let durable_revision = self.node.journals.install(first, messages).await?.0;
        Ok(Response::new(v1::InstallCheckpointResponse { durable_revision }))
    }

    async fn follow(
        &self,
        request: Request<v1::FollowRequest>,
    ) -> Result<Response<v1::FollowResponse>, Status> {
        let request = request.into_inner();
        let identity = &self.node.identity;
        identity.check_meant(Some(request.cluster_id.as_str()), None)?;
        let life = cairn_proto::convert::required(request.life, "life")?;
        let heard_ago_ms = identity.heard_ago_ms();
        let outcome = match request.ask_only {
            true => identity.would_follow(&life),
            false => identity.follow(&life, request.serves).await?,
        };
        let (current, map) = (identity.life(), self.node.topology.map());
        if !request.ask_only {
            tracing::info!(
                generation = life.generation,
                term = life.term,
                ?outcome,
                "a directory asked to be followed"
            );
        }
        Ok(Response::new(v1::FollowResponse {
            outcome: outcome as i32,
            current: Some(current),
            heard_ago_ms: heard_ago_ms.unwrap_or_default(),
            journals: self.node.journals.copies(),
            topology_generation: map.generation.0,
            topology_revision: map.revision.0,
        }))
    }

    async fn read_journal(
        &self,
        request: Request<v1::ReadJournalRequest>,
    ) -> Result<Response<Self::ReadJournalStream>, Status> {
        let request = request.into_inner();
        // Older generations may be read: a rebuild reads what the directory was before.
        self.node.identity.check(&request.cluster_id, self.node.identity.generation())?;
        let mut reading =
            self.node.journals.read(&request.cluster_id, Generation(request.generation)).await?;
        let parts = async_stream::try_stream! {
            while let Some(part) = reading.next().await? {
                yield part;
            }
        };
        Ok(Response::new(parts.boxed()))
    }
}

fn bounded(chunks: usize) -> Result<()> {
    if chunks > ORDER_CHUNKS_MAX {
        return Err(Error::limit(format!(
            "{chunks} chunks in one order, at most {ORDER_CHUNKS_MAX} are allowed"
        )));
    }
    Ok(())
}

impl ReplicaHandler {
    /// Whether an order about surplus copies rests on the epochs that are known here.
    fn check_surplus(&self, groups: &[v1::Group]) -> Result<()> {
        let (map, me) = (self.node.topology.map(), self.node.me());
        for group in groups {
            let known = map.groups.get(&GroupId(group.id));
            if let Some(known) = known.filter(|known| known.epoch > group.epoch) {
                let why = format!(
                    "the order rests on epoch {} of group {}, this server knows {}",
                    group.epoch, group.id, known.epoch
                );
                return Err(map.stale(GroupId(group.id), why).on(me.to_string()));
            }
            // A member's copies are not surplus: this order is for somebody else.
            if Map::members(group).any(|id| id == me) {
                let why =
                    format!("server {me} is a member of group {}: its copies are not surplus", group.id);
                return Err(map.stale(GroupId(group.id), why).on(me.to_string()));
            }
        }
        Ok(())
    }

    /// Queues the committed chunks that are missing here; answers which they are.
    async fn confirm(&self, request: v1::ConfirmRequest) -> Result<Vec<ChunkId>> {
        let node = &self.node;
        bounded(request.chunks.len())?;
        node.check_order(&request.cluster_id, Generation(request.generation)).await?;
        let groups: HashMap<u64, &v1::Group> = request.groups.iter().map(|group| (group.id, group)).collect();
        // Servers are reached by the topology of the directory, not by what an order says.
        let unknown = |server: &v1::Server| !node.topology.map().servers.contains_key(&ServerId(server.id));
        if request.servers.iter().any(unknown)
            && let Err(error) = node.refresh_topology().await
        {
            tracing::debug!(%error, "could not ask for servers that a confirmation names");
        }
        let mut missing = Vec::new();
        for chunk in &request.chunks {
            let id = chunk_id(chunk.chunk.as_ref())?;
            let held = node.store.info(id);
            if held.as_ref().is_some_and(|held| {
                !held.corrupt && (held.length, held.checksum) == (chunk.length, chunk.checksum)
            }) {
                continue;
            }
            let other = |held: &ChunkInfo| (held.length, held.checksum) != (chunk.length, chunk.checksum);
            // Of a copy of length 0 only the id is known; any content replaces it.
            if let Some(held) = held.filter(|held| held.length > 0 && other(held)) {
                // The commit is the truth: this copy is of other bytes. Bad ones too would keep the right ones out.
                tracing::error!(chunk = %id, length = held.length, "a chunk is held with other content than committed");
                node.store.remove(&[id]).await?;
            }
            missing.push(id);
            let sources = sources(groups.get(&chunk.group_id).copied());
            if !node.fetcher.push(Order::from_wire(chunk, sources)?) {
                tracing::warn!(chunk = %id, "the fetch queue is full; the next comparison will ask for it again");
            }
        }
        Ok(missing)
    }
}

/// The primary first, then the other members, then former ones.
fn sources(group: Option<&v1::Group>) -> Vec<ServerId> {
    group.map(Map::holders).unwrap_or_default()
}

/// Receives chunks as a follower: stores them here only.
#[derive(Debug)]
struct Follower {
    node: Arc<Node>,
}

#[async_trait]
impl Receive for Follower {
    async fn begin(&self, begin: Begin, part: &Part) -> Result<Box<dyn Intake>> {
        let node = &self.node;
        let map = node.topology.map();
        match map.groups.get(&begin.group) {
            Some(known) if known.epoch > begin.epoch.0 => {
                let why = format!(
                    "group {} is at epoch {}, its primary knows {}",
                    begin.group, known.epoch, begin.epoch
                );
                return Err(map.stale(begin.group, why).on(node.me().to_string()));
            }
            Some(known) if known.epoch == begin.epoch.0 && !Map::members(known).any(|id| id == node.me()) => {
                let why = format!("server {} is not a member of group {}", node.me(), begin.group);
                return Err(map.stale(begin.group, why).on(node.me().to_string()));
            }
            Some(known) if known.epoch == begin.epoch.0 => {}
            // The primary heard of a change first. A chunk is harmless until it is committed, and whether this
            // server counts as a holder is for the directory to say.
            _ => node.heartbeat_wanted.notify_one(),
        }
        let local = Local::begin(node.store.clone(), node.me(), begin, part).await?;
        Ok(Box::new(local))
    }
}
