//! The primary's part in a write: each chunk goes to all followers while its bytes arrive, and has its receipt by the
//! rule of [`standing`].
//!
//! A follower that is slow, silent or gone costs a write at most the time after which it counts as late, once; from
//! then on writes go on without it, while a probe in the background finds out when it is back.

use crate::{
    config::Timing,
    identity::Identity,
    ingest::{Begin, Finish, Part},
    metrics::Metrics,
    peers::Peers,
    topology::{Map, Topology},
};
use cairn_proto::{Error, Reason, Result, id::ServerId, limits::DATA_BYTES_MAX, net::Traffic, v1};
use futures::{StreamExt as _, stream::FuturesUnordered};
use parking_lot::Mutex;
use std::{collections::HashMap, future::Future, sync::Arc, time::Duration};
use tokio::{
    sync::{Notify, oneshot, watch},
    time::Instant,
};

mod link;
pub mod standing;

use link::{Answer, Context, Leg, Link};
use standing::{Copy, Event, Standing, Verdict, decide, is_sent_to, too_few};

/// Whole chunks up to this size travel on the connection for small calls, where no large frame is before them.
const SMALL_CHUNK_BYTES_MAX: usize = DATA_BYTES_MAX / 8;

/// Sends chunks to followers. One for the whole server.
#[derive(Debug)]
pub struct Replicator {
    context: Arc<Context>,
    links: Mutex<HashMap<ServerId, Arc<Link>>>,
    /// Rung when a follower says that it knows a newer epoch.
    topology_wanted: Arc<Notify>,
}

impl Replicator {
    /// No followers yet.
    pub fn new(
        peers: Arc<Peers>,
        topology: Arc<Topology>,
        identity: Arc<Identity>,
        metrics: Arc<Metrics>,
        timing: Timing,
        topology_wanted: Arc<Notify>,
    ) -> Self {
        let context = Context { peers, topology, identity, metrics, timing, changes: watch::Sender::new(0) };
        Self { context: Arc::new(context), links: Mutex::default(), topology_wanted }
    }

    /// How a follower stands; one that was never written to is prompt.
    pub fn standing(&self, follower: ServerId) -> Standing {
        self.links.lock().get(&follower).map_or(Standing::Prompt, |link| link.standing())
    }

    /// Tells of changes of any follower's standing.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.context.changes.subscribe()
    }

    /// Forgets followers that the map no longer has.
    pub fn retain(&self, map: &Map) {
        self.links.lock().retain(|id, _| map.servers.contains_key(id));
    }

    /// Begins a chunk at the followers of a group whose primary is `me`. `whole_bytes` is its length when its first
    /// message is its last.
    ///
    /// # Errors
    /// `TOO_FEW_SERVERS` when the group has fewer members than copies are needed.
    pub fn begin(
        &self,
        group: &v1::Group,
        me: ServerId,
        begin: Begin,
        whole_bytes: Option<usize>,
    ) -> Result<Fan> {
        let copies_min = group.scheme.map_or(1, |scheme| scheme.min_copies).max(1) as usize;
        let followers: Vec<Arc<Link>> =
            Map::members(group).filter(|id| *id != me).map(|id| self.link(id)).collect();
        if 1 + followers.len() < copies_min {
            return Err(too_few(&[], copies_min));
        }
        let traffic = match whole_bytes {
            Some(bytes) if bytes <= SMALL_CHUNK_BYTES_MAX => Traffic::Small,
            _ => Traffic::Bulk,
        };
        let not_broken = followers.iter().filter(|link| link.standing() != Standing::Broken).count();
        let legs = followers
            .into_iter()
            .map(|link| {
                let id = link.id;
                let state = match is_sent_to(link.standing(), not_broken, copies_min) {
                    true => LegState::Open(Leg::begin(link, traffic, begin.chunk)),
                    false => LegState::Out(Error::unavailable("cannot be reached")),
                };
                (id, state)
            })
            .collect();
        Ok(Fan {
            legs,
            copies_min,
            context: self.context.clone(),
            topology_wanted: self.topology_wanted.clone(),
            finish: None,
        })
    }

    fn link(&self, id: ServerId) -> Arc<Link> {
        self.links.lock().entry(id).or_insert_with(|| Link::new(id, self.context.clone())).clone()
    }
}

/// One chunk on its way to all followers. Dropping it before its last part gives the chunk up there.
#[derive(Debug)]
pub struct Fan {
    legs: Vec<(ServerId, LegState)>,
    copies_min: usize,
    context: Arc<Context>,
    topology_wanted: Arc<Notify>,
    finish: Option<Finish>,
}

#[derive(Debug)]
enum LegState {
    Open(Leg),
    Out(Error),
}

impl Fan {
    /// Sends the next part to all followers. A follower that has no room for it in time drops out as late, unless the
    /// chunk cannot have enough copies without it: then it is waited for.
    pub async fn send(&mut self, part: &Part) {
        self.finish = part.finish;
        let timing = self.context.timing;
        let bytes = part.data.len();
        let reserving = self.legs.iter().map(|(_, state)| async move {
            let LegState::Open(leg) = state else { return None };
            let wait_ms = if leg.link().standing() == Standing::Prompt { timing.late_ms } else { 0 };
            leg.reserve(bytes, Duration::from_millis(wait_ms)).await
        });
        let mut rooms = futures::future::join_all(reserving).await;
        let mut missing = self.copies_min.saturating_sub(1 + rooms.iter().flatten().count());
        if missing > 0 {
            let deadline = Instant::now() + Duration::from_millis(timing.write_wait_ms);
            let mut waiting: FuturesUnordered<_> = self
                .legs
                .iter()
                .enumerate()
                .filter(|(number, _)| rooms[*number].is_none())
                .filter_map(|(number, (_, state))| match state {
                    LegState::Open(leg) => {
                        Some(async move { (number, leg.reserve(bytes, deadline - Instant::now()).await) })
                    }
                    LegState::Out(_) => None,
                })
                .collect();
            while missing > 0
                && let Some((number, room)) = waiting.next().await
            {
                missing -= usize::from(room.is_some());
                rooms[number] = room;
            }
        }
        for ((_, state), room) in self.legs.iter_mut().zip(rooms) {
            let LegState::Open(leg) = state else { continue };
            let sent = match room {
                Some(room) => leg.send(part.to_wire(), part.finish.is_some(), room),
                None => {
                    let error = Error::unavailable("does not take bytes fast enough");
                    leg.link().event(Event::Silent, error.message());
                    Err(error)
                }
            };
            if let Err(error) = sent {
                *state = LegState::Out(error);
            }
        }
    }

    /// Makes the local copy durable and waits for the followers by the rule. Answers which of them hold the chunk
    /// durably.
    ///
    /// # Errors
    /// That of the local copy; `TOO_FEW_SERVERS`, `NO_SPACE` or `STALE_EPOCH` as [`standing::too_few`] has it.
    pub async fn settle(mut self, local: impl Future<Output = Result<()>>) -> Result<Vec<ServerId>> {
        let mut changes = self.context.changes.subscribe();
        local.await?;
        let late = tokio::time::sleep(Duration::from_millis(self.context.timing.late_ms));
        let hopeless = tokio::time::sleep(Duration::from_millis(self.context.timing.write_wait_ms));
        tokio::pin!(late, hopeless);
        let (mut is_overdue, mut is_hopeless) = (false, false);
        let mut answered: HashMap<ServerId, Copy> = HashMap::new();
        let mut answers: FuturesUnordered<_> = self
            .legs
            .iter_mut()
            .filter_map(|(id, state)| match state {
                LegState::Open(leg) => leg.answer().map(|answer| wait_for(*id, answer)),
                LegState::Out(_) => None,
            })
            .collect();
        loop {
            let copies: Vec<(ServerId, Copy)> = self
                .legs
                .iter()
                .map(|(id, state)| {
                    let copy = match (answered.get(id), state) {
                        (Some(copy), _) => copy.clone(),
                        (None, LegState::Open(leg)) => Copy::Awaited(leg.link().standing()),
                        (None, LegState::Out(error)) => Copy::Out(error.clone()),
                    };
                    (*id, copy)
                })
                .collect();
            match decide(&copies, self.copies_min, is_overdue, is_hopeless) {
                Verdict::Receipt(holders) => return Ok(holders),
                Verdict::TooFew(error) => return Err(error),
                Verdict::Wait => {}
            }
            tokio::select! {
                Some((id, answer)) = answers.next() => {
                    let copy = self.judge(answer);
                    answered.insert(id, copy);
                }
                _ = changes.changed() => {}
                () = &mut late, if !is_overdue => {
                    is_overdue = true;
                    for (id, state) in &self.legs {
                        if let LegState::Open(leg) = state && !answered.contains_key(id) {
                            leg.link().overdue(Duration::from_millis(self.context.timing.late_ms));
                        }
                    }
                }
                () = &mut hopeless, if !is_hopeless => is_hopeless = true,
            }
        }
    }

    fn judge(&self, answer: Answer) -> Copy {
        let expected = self.finish.map(|finish| (finish.length, finish.checksum));
        match answer {
            Ok(receipt) if expected == Some((receipt.length, receipt.checksum)) => Copy::Durable,
            Ok(_) => Copy::Out(Error::internal("answered for other bytes")),
            Err(error) => {
                if error.reason == Reason::StaleEpoch {
                    self.topology_wanted.notify_one();
                }
                Copy::Out(error)
            }
        }
    }
}

async fn wait_for(id: ServerId, answer: oneshot::Receiver<Answer>) -> (ServerId, Answer) {
    (id, answer.await.unwrap_or_else(|_| Err(Error::unavailable("its connection broke"))))
}
