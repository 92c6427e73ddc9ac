//! This directory among others on the same store: it joins, gives signs of life, and knows who lives and who leads.
//!
//! The rules, and why they are enough, are in [`cairn_core::cluster::directories`]; where it runs alone on its store there
//! is no membership, and nothing of this costs anything. One turn:
//!
//! ```text
//!   beat ---applied---> read directories, beats, lead, notices ---> declare the silent dead ---> claim a free lead
//!     |
//!     +--conflict: declared dead---> forget all sessions ---> join again under another id
//! ```

use crate::{
    ids::Ids,
    ops::view::{View, stored},
    sessions::Sessions,
    store::{CommitError, MetaStore},
};
use cairn_core::{
    cluster::directories::{self, Claim, Own, Times, Watched},
    key,
    plan::{Key, Plan, Precondition},
    record::{Beat, Directory, Lead, Session},
};
use cairn_proto::{
    Error, Result,
    id::{Revision, SessionId},
    limits::DIRECTORIES_MAX,
    v1,
};
use parking_lot::Mutex;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

mod team;
pub use team::{Seen, Team};

/// Notices read and answered in one step.
const NOTICES_STEP: usize = 64;
/// Parts of the time between two beats after which one that failed is tried again.
const RETRY_PARTS: u32 = 8;
/// Longest that a renewal waits for a beat that covers what its session reads at.
const COVER_MAX: Duration = Duration::from_secs(2);

/// Who this directory is now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Me {
    /// Its id until it is declared dead.
    pub id: u64,
    /// The plan that wrote its record.
    pub joined: Revision,
}

/// This directory's part.
#[derive(Debug)]
pub struct Membership {
    store: Arc<dyn MetaStore>,
    ids: Arc<Ids>,
    addresses: Vec<String>,
    times: Times,
    beat_interval: Duration,
    started: Instant,
    state: Mutex<State>,
    /// Rings for a beat at once.
    wanted: Notify,
    /// Counts the beats that stand.
    beaten: watch::Sender<u64>,
    /// The term in which this directory leads, as of its last turn.
    term: watch::Sender<Option<u64>>,
    /// The term in which it last gave every session a home.
    housed: AtomicU64,
}

#[derive(Debug)]
struct State {
    me: Me,
    /// The plan that wrote the last beat.
    last: Revision,
    count: u64,
    own: Own,
    watched: Watched,
    team: Arc<Team>,
}

impl Membership {
    /// Joins the directories of a store.
    ///
    /// # Errors
    /// `LIMIT_EXCEEDED` when there are as many as may be; as the store.
    pub async fn join(
        store: Arc<dyn MetaStore>,
        ids: Arc<Ids>,
        sessions: &Sessions,
        addresses: Vec<String>,
        (beat_ms, dead_ms): (u64, u64),
    ) -> Result<Self> {
        let nobody = Me { id: 0, joined: Revision(0) };
        let membership = Self {
            store,
            ids,
            addresses,
            times: Times { dead_ms },
            beat_interval: Duration::from_millis(beat_ms.max(1)),
            started: Instant::now(),
            state: Mutex::new(State {
                me: nobody,
                last: Revision(0),
                count: 0,
                own: Own::default(),
                watched: Watched::default(),
                team: Arc::default(),
            }),
            wanted: Notify::new(),
            beaten: watch::Sender::new(0),
            term: watch::Sender::new(None),
            housed: AtomicU64::new(0),
        };
        membership.enter(sessions).await?;
        Ok(membership)
    }

    /// Who this directory is.
    pub fn me(&self) -> Me {
        self.state.lock().me
    }

    /// How long a silence means what.
    pub fn times(&self) -> Times {
        self.times
    }

    /// Requires in a plan that this directory was not declared dead.
    pub fn require(&self, plan: &mut Plan) -> Me {
        let me = self.me();
        directories::require_living(plan, me.id, me.joined);
        me
    }

    /// Whether this directory may rely on its standing.
    ///
    /// # Errors
    /// `UNAVAILABLE`: another directory may do better.
    pub fn check_sure(&self) -> Result<()> {
        if self.is_sure() {
            return Ok(());
        }
        Err(Error::unavailable(
            "this directory could not reach the store that it shares for too long to keep sessions: try another",
        ))
    }

    fn is_sure(&self) -> bool {
        let now_ms = self.now_ms();
        self.state.lock().own.is_sure(now_ms, self.times)
    }

    fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    /// The term in which this directory leads now, if it does.
    pub fn leads(&self) -> Option<u64> {
        self.held_lead().map(|(lead, _)| lead.term)
    }

    fn held_lead(&self) -> Option<(Lead, Revision)> {
        let now_ms = self.now_ms();
        let state = self.state.lock();
        let sure = state.own.is_sure(now_ms, self.times);
        state.team.lead.clone().filter(|(lead, _)| sure && lead.holder == state.me.id)
    }

    /// Requires in a plan that this directory leads.
    ///
    /// # Errors
    /// `UNAVAILABLE` when it does not any more.
    pub fn require_lead(&self, plan: &mut Plan) -> Result<()> {
        let (_, revision) = self
            .held_lead()
            .ok_or_else(|| Error::unavailable("another directory does the background work now"))?;
        plan.require(Precondition::Unchanged(key::lead(), Some(revision)));
        Ok(())
    }

    /// In this term every session was seen to have a home that lives, or was given one.
    pub fn all_housed(&self, term: u64) {
        self.housed.store(term, Ordering::Relaxed);
    }

    /// Whether this directory leads, and every session has had a home since it does: only then do the floors of all
    /// directories say what sessions read at.
    pub fn knows_readers(&self) -> bool {
        self.leads().is_some_and(|term| self.housed.load(Ordering::Relaxed) == term)
    }

    /// Waits until this directory leads.
    pub async fn leading(&self) {
        let mut term = self.term.subscribe();
        while self.leads().is_none() {
            // A turn that only comes back late changes no term.
            let _ = tokio::time::timeout(self.beat_interval, term.changed()).await;
        }
    }

    /// The directories as they were last read.
    pub fn team(&self) -> Arc<Team> {
        self.state.lock().team.clone()
    }

    /// The directories that live, for clients and file servers.
    pub fn addresses(&self) -> Vec<v1::DirectoryAddress> {
        let team = self.team();
        let address = |(id, seen): (u64, &Seen)| seen.to_wire(id);
        team.living().filter(|(_, seen)| !seen.record.addresses.is_empty()).map(address).collect()
    }

    /// All directories, for operators.
    pub fn status(&self) -> Vec<v1::SharingDirectory> {
        let (team, me, leads) = (self.team(), self.me(), self.leads().is_some());
        let leader = team.lead.as_ref().map(|(lead, _)| lead.holder);
        let shown = |(id, seen): (&u64, &Seen)| v1::SharingDirectory {
            directory: Some(seen.to_wire(*id)),
            dead: seen.record.dead,
            leads: if *id == me.id { leads } else { leader == Some(*id) && !seen.record.dead },
            answers: *id == me.id,
            sessions: seen.beat.as_ref().map_or(0, |(beat, _)| beat.sessions),
        };
        team.directories.iter().map(shown).collect()
    }

    /// Waits until the floor that stands covers a reader at `mark`.
    ///
    /// # Errors
    /// `UNAVAILABLE` when no beat comes through.
    pub async fn cover(&self, sessions: &Sessions, mark: Revision) -> Result<()> {
        let mut beaten = self.beaten.subscribe();
        let covered = async {
            while !sessions.covers(mark) {
                self.wanted.notify_one();
                if beaten.changed().await.is_err() {
                    return;
                }
            }
        };
        tokio::time::timeout(COVER_MAX, covered).await.map_err(|_| {
            Error::unavailable(
                "what the session reads could not be noted in the store: try again, or elsewhere",
            )
        })
    }

    /// Gives signs of life until stopped.
    pub async fn run(&self, sessions: &Sessions) {
        loop {
            let began = Instant::now();
            if let Err(error) = self.turn(sessions).await {
                tracing::warn!(%error, "no sign of life could be given to the store, trying again");
                // Whoever waits for one must not keep the machine busy.
                tokio::time::sleep(self.beat_interval / RETRY_PARTS).await;
            }
            self.show_term();
            let next = began + self.beat_interval;
            tokio::select! {
                () = tokio::time::sleep_until(next) => {}
                () = self.wanted.notified() => {}
            }
        }
    }

    /// Leaves the others at once, so that they need not wait for this directory's silence.
    ///
    /// # Errors
    /// As the store; its silence then says the same.
    pub async fn leave(&self) -> Result<()> {
        let me = self.me();
        let view = View::new(self.store.clone());
        let Some(read) = view.record::<Directory>(&key::directory(me.id)).await? else { return Ok(()) };
        let beat = view.get(&key::beat(me.id)).await?.map(|value| value.revision);
        self.state.lock().own.lost();
        self.show_term();
        let mut plan = Plan::new();
        directories::declare_dead(&mut plan, me.id, (&read.record, read.revision), beat);
        match self.store.commit(plan).await {
            Ok(_) | Err(CommitError::Conflict) => Ok(()),
            Err(CommitError::Unknown(error) | CommitError::Refused(error)) => Err(error),
        }
    }

    fn show_term(&self) {
        let term = self.leads();
        self.term.send_if_modified(|shown| std::mem::replace(shown, term) != term);
    }

    /// Joins under a new id. Sessions are those of the directory that this one was before.
    async fn enter(&self, sessions: &Sessions) -> Result<()> {
        let id = self.ids.next().await?;
        let mut team = Team::read(&self.store).await?;
        if team.living().count() >= DIRECTORIES_MAX {
            return Err(Error::limit(format!(
                "{DIRECTORIES_MAX} directories share the store, which is the most: stop one"
            )));
        }
        let began_ms = self.now_ms();
        sessions.forget_all();
        let (floor, count) = sessions.begin_beat(team.revision);
        let beat = Beat { count: 1, floor: floor.0, sessions: count as u64 };
        let mut plan = Plan::new();
        let record = Directory { addresses: self.addresses.clone(), dead: false };
        directories::join(&mut plan, id, &record, &beat);
        match self.store.commit(plan).await {
            Ok(joined) => {
                let mut state = self.state.lock();
                state.me = Me { id, joined };
                (state.last, state.count) = (joined, 1);
                state.own = Own::default();
                state.own.acknowledged(began_ms);
                team.directories.insert(id, Seen { record, revision: joined, beat: Some((beat, joined)) });
                state.team = Arc::new(team);
                drop(state);
                sessions.beat_stands(floor);
                tracing::info!(directory = id, "joined the directories of the store");
                Ok(())
            }
            // Not known: a directory of that id never gives another sign of life, and is declared dead.
            Err(CommitError::Conflict) => Err(Error::unavailable("a directory's id was taken: try again")),
            Err(CommitError::Unknown(error) | CommitError::Refused(error)) => Err(error),
        }
    }

    /// One sign of life, and what follows from those of others.
    async fn turn(&self, sessions: &Sessions) -> Result<()> {
        let began_ms = self.now_ms();
        if !self.beat(sessions).await? {
            tracing::warn!(directory = self.me().id, "this directory was declared dead: it joins anew");
            self.state.lock().own.lost();
            self.show_term();
            return self.enter(sessions).await;
        }
        let team = Arc::new(Team::read(&self.store).await?);
        self.read_notices(sessions).await?;
        let me = self.me();
        let elsewhere = team.living().filter(|(id, _)| *id != me.id);
        let beats: BTreeMap<u64, Revision> = elsewhere
            .clone()
            .map(|(id, seen)| (id, seen.beat.as_ref().map_or(seen.revision, |(_, revision)| *revision)))
            .collect();
        let counted: u64 =
            elsewhere.filter_map(|(_, seen)| seen.beat.as_ref()).map(|(beat, _)| beat.sessions).sum();
        sessions.note_elsewhere(counted);
        let silent = {
            let now_ms = self.now_ms();
            let mut state = self.state.lock();
            state.own.acknowledged(began_ms);
            state.team = team.clone();
            state.watched.look(&beats, now_ms, self.times)
        };
        self.beaten.send_modify(|count| *count += 1);
        for id in silent {
            self.declare_dead(&team, id).await?;
        }
        self.claim_lead(&team).await
    }

    /// Answers whether this directory still lives.
    async fn beat(&self, sessions: &Sessions) -> Result<bool> {
        let (me, last, count, reached) = {
            let mut state = self.state.lock();
            state.count += 1;
            (state.me, state.last, state.count, state.team.revision)
        };
        let (floor, number) = sessions.begin_beat(reached);
        let beat = Beat { count, floor: floor.0, sessions: number as u64 };
        let mut plan = Plan::new();
        directories::beat(&mut plan, me.id, me.joined, last, &beat);
        match self.store.commit(plan).await {
            Ok(revision) => {
                self.state.lock().last = revision;
                sessions.beat_stands(floor);
                Ok(true)
            }
            Err(CommitError::Conflict) => {
                let view = View::new(self.store.clone());
                let values = view.get_many(&[key::directory(me.id), key::beat(me.id)]).await?;
                let [Some(record), Some(beat)] = values.as_slice() else { return Ok(false) };
                if record.revision != me.joined {
                    return Ok(false);
                }
                // An earlier beat whose outcome was not known is in the store after all.
                self.state.lock().last = beat.revision;
                Err(Error::unavailable("an earlier sign of life arrived late"))
            }
            Err(CommitError::Unknown(error) | CommitError::Refused(error)) => Err(error),
        }
    }

    /// Learns which sessions have another home now, or have ended.
    async fn read_notices(&self, sessions: &Sessions) -> Result<()> {
        let me = self.me();
        loop {
            let view = View::new(self.store.clone());
            let page = view.scan(&key::notices(me.id), None, NOTICES_STEP).await?;
            let ids: Vec<SessionId> =
                page.entries.iter().filter_map(|(key, _)| key::last_u64(key).map(SessionId)).collect();
            if ids.is_empty() {
                return Ok(());
            }
            let keys: Vec<Key> = ids.iter().map(|id| key::session(*id)).collect();
            for (id, value) in ids.iter().zip(view.get_many(&keys).await?) {
                match value.map(|value| stored::<Session>(&value)).transpose()? {
                    Some(session) if session.record.home == me.id && session.record.ended => {
                        sessions.begin_end(*id);
                    }
                    Some(session) if session.record.home == me.id => {}
                    _ => sessions.left(*id),
                }
            }
            let mut plan = Plan::new();
            for (key, value) in &page.entries {
                plan.require(Precondition::Unchanged(key.clone(), Some(value.revision)));
                plan.delete(key.clone());
            }
            match self.store.commit(plan).await {
                // A conflict: one of them was written anew, and is read again.
                Ok(_) | Err(CommitError::Conflict) => {}
                Err(CommitError::Unknown(error) | CommitError::Refused(error)) => return Err(error),
            }
        }
    }

    async fn declare_dead(&self, team: &Team, id: u64) -> Result<()> {
        let Some(seen) = team.directories.get(&id) else { return Ok(()) };
        let mut plan = Plan::new();
        let beat = seen.beat.as_ref().map(|(_, revision)| *revision);
        directories::declare_dead(&mut plan, id, (&seen.record, seen.revision), beat);
        match self.store.commit(plan).await {
            Ok(_) => {
                tracing::warn!(
                    directory = id,
                    addresses = seen.record.addresses.join(", "),
                    "a directory gave no sign of life and was declared dead"
                );
                // What was its part is free now.
                self.wanted.notify_one();
                Ok(())
            }
            Err(CommitError::Conflict) => Ok(()),
            Err(CommitError::Unknown(error) | CommitError::Refused(error)) => Err(error),
        }
    }

    async fn claim_lead(&self, team: &Team) -> Result<()> {
        let me = self.me();
        let mut living: BTreeSet<u64> = team.living().map(|(id, _)| id).collect();
        living.insert(me.id);
        let lead = team.lead.as_ref();
        let Claim::Free(term) = directories::claim(lead.map(|(lead, _)| lead), me.id, &living) else {
            return Ok(());
        };
        let mut plan = Plan::new();
        directories::take_lead(&mut plan, me.id, me.joined, term, lead.map(|(_, revision)| *revision));
        match self.store.commit(plan).await {
            Ok(revision) => {
                tracing::info!(directory = me.id, term, "this directory does the background work now");
                let mut state = self.state.lock();
                let mut team = Team::clone(&state.team);
                team.lead = Some((Lead { holder: me.id, term }, revision));
                state.team = Arc::new(team);
                Ok(())
            }
            Err(CommitError::Conflict) => Ok(()),
            Err(CommitError::Unknown(error) | CommitError::Refused(error)) => Err(error),
        }
    }
}
