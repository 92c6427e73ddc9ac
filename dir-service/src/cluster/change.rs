//! Plans that change servers, groups and settings; memory follows what was committed.

use super::{
    Cluster,
    state::{Member, State},
    tally::{Table, What},
};
use crate::{ops::view::View, store::CommitError};
use cairn_core::{
    cluster::{
        Placed, balance, members, placement, seats,
        server::{Standing, Ties, must_stay},
    },
    key,
    plan::Plan,
    record::{self, Record},
};
use cairn_proto::{
    Error, Reason, Result,
    id::{GroupId, Revision, ServerId},
    v1,
};
use std::collections::{BTreeMap, BTreeSet};

/// Entries read at a time.
const PAGE: usize = 1_024;
/// Groups changed by one plan.
const GROUPS_A_PLAN: usize = 32;

/// Records to change together.
#[derive(Debug, Default)]
pub(crate) struct Change {
    pub(crate) groups: Vec<Placed>,
    pub(crate) servers: Vec<(ServerId, record::Server)>,
    pub(crate) settings: Option<record::Settings>,
    pub(crate) forgotten: Option<ServerId>,
    /// Only the directory that leads decides this.
    pub(crate) led: bool,
}

impl Cluster {
    /// Reads everything again, all at one revision. What only this directory knows of servers stays.
    pub(crate) async fn reload(&self) -> Result<()> {
        let mut loaded = self.loading.lock().await;
        let view = View::new(self.store.clone());
        let (mut servers, mut groups) = (Vec::new(), Vec::new());
        let settings = view.record::<record::Settings>(&key::settings()).await?;
        for (prefix, is_server) in [(key::servers(), true), (key::groups(), false)] {
            let mut after = None;
            loop {
                let page = view.scan(&prefix, after.as_ref(), PAGE).await?;
                for (key, versioned) in &page.entries {
                    let Some(id) = key::last_u64(key) else { continue };
                    if is_server {
                        servers.push((
                            ServerId(id),
                            record::Server::from_bytes(&versioned.value)?,
                            versioned.revision,
                        ));
                    } else {
                        groups.push((
                            GroupId(id),
                            record::Group::from_bytes(&versioned.value)?,
                            versioned.revision,
                        ));
                    }
                }
                after = page.entries.last().map(|(key, _)| key.clone());
                if !page.more || after.is_none() {
                    break;
                }
            }
        }
        let now_ms = self.now_ms();
        let mut state = self.state.lock();
        if self.membership.is_some() {
            // Another directory may have struck some from the records.
            let there: BTreeSet<ServerId> = servers.iter().map(|(id, ..)| *id).collect();
            let gone = state.servers.keys().filter(|id| !there.contains(id)).copied().collect::<Vec<_>>();
            gone.into_iter().for_each(|id| strike(&mut state, id));
        }
        for (id, record, revision) in servers {
            put_server(&mut state, id, record, revision, now_ms);
        }
        for (id, group, revision) in groups {
            if state.groups.get(&id).is_none_or(|known| known.revision != revision) {
                state.put_group(id, group, revision, now_ms);
            }
        }
        if let Some(stored) = settings {
            state.settings = stored.record;
            state.settings_revision = Some(stored.revision);
            state.revision = state.revision.max(stored.revision);
        }
        *loaded = view.revision().unwrap_or_default();
        Ok(())
    }

    /// Reads everything again if it may have changed up to a revision.
    pub(crate) async fn reload_to(&self, changed: Revision) -> Result<()> {
        if *self.loading.lock().await >= changed {
            return Ok(());
        }
        self.reload().await?;
        self.changed_by_others();
        Ok(())
    }

    fn changed_by_others(&self) {
        self.adopting.notify_one();
        self.stirred.notify_one();
        self.seated.notify_one();
    }

    /// Applies a change if nothing of it was changed by others. `changing` is held by the caller.
    ///
    /// # Errors
    /// `UNAVAILABLE` when others were faster; memory is up to date then.
    pub(crate) async fn apply(&self, change: Change) -> Result<Revision> {
        let others = || Error::unavailable("the cluster's records changed meanwhile: try again");
        self.try_apply(change).await?.ok_or_else(others)
    }

    /// As [`Cluster::apply`]; `None` when others were faster.
    ///
    /// # Errors
    /// The store's.
    pub(crate) async fn try_apply(&self, mut change: Change) -> Result<Option<Revision>> {
        let mut plan = Plan::new();
        if let Some(membership) = &self.membership {
            if change.led {
                membership.require_lead(&mut plan)?;
            }
            let state = self.state.lock();
            // What makes or strikes records is decided on all of them: no two such plans pass each other. It also gives
            // a topology without a record a revision.
            let news = change.groups.iter().any(|(id, _)| !state.groups.contains_key(id))
                || change.servers.iter().any(|(id, _)| !state.servers.contains_key(id));
            if (news || change.forgotten.is_some()) && change.settings.is_none() {
                change.settings = Some(state.settings.clone());
            }
        }
        {
            let state = self.state.lock();
            for (id, group) in &change.groups {
                if let Some(wrong) = cairn_core::cluster::invalid(group) {
                    return Err(Error::internal(format!("group {id} would be wrong: {wrong}")));
                }
                let read = state.groups.get(id).map(|stored| stored.revision);
                put(&mut plan, key::group(*id), read, group.to_bytes());
            }
            for (id, server) in &change.servers {
                let read = state.servers.get(id).map(|member| member.revision);
                put(&mut plan, key::server(*id), read, server.to_bytes());
            }
            if let Some(id) = change.forgotten {
                let read = state.servers.get(&id).map(|member| member.revision);
                plan.require(cairn_core::plan::Precondition::Unchanged(key::server(id), read));
                plan.delete(key::server(id));
            }
            if let Some(settings) = &change.settings {
                put(&mut plan, key::settings(), state.settings_revision, settings.to_bytes());
            }
        }
        match self.store.commit(plan).await {
            Ok(revision) if self.membership.is_some() => {
                self.reload().await?;
                self.changed_by_others();
                Ok(Some(revision))
            }
            Ok(revision) => {
                let now_ms = self.now_ms();
                let mut state = self.state.lock();
                for (id, server) in change.servers {
                    put_server(&mut state, id, server, revision, now_ms);
                }
                for (id, group) in change.groups {
                    state.put_group(id, group, revision, now_ms);
                }
                if let Some(id) = change.forgotten {
                    strike(&mut state, id);
                    state.revision = state.revision.max(revision);
                }
                if let Some(settings) = change.settings {
                    state.settings = settings;
                    state.settings_revision = Some(revision);
                    state.revision = state.revision.max(revision);
                }
                drop(state);
                self.adopting.notify_one();
                self.stirred.notify_one();
                Ok(Some(revision))
            }
            Err(CommitError::Refused(error)) => Err(error),
            Err(CommitError::Conflict | CommitError::Unknown(_)) => {
                self.reload().await?;
                Ok(None)
            }
        }
    }

    /// Makes the groups that are wanted of a factor, and fixes the cluster's factor at the first.
    pub(crate) async fn make_groups(&self, replicas: u32) -> Result<()> {
        let _changing = self.changing.lock().await;
        let (candidates, placed) = self.view();
        let wanted = placement::wanted(&candidates, &placed, replicas, self.min_copies(replicas));
        // Fewer than the cluster's own factor: a file or directory asks for it.
        let fixed = replicas < self.replication_default();
        let mut settings = self.next_settings();
        for groups in wanted.chunks(GROUPS_A_PLAN) {
            let mut change = Change { settings: settings.take(), ..Change::default() };
            for group in groups {
                let id = GroupId(self.ids.next().await?);
                tracing::info!(group = id.0, seats = ?group.seats, primary = group.primary, "made a group");
                change.groups.push((id, record::Group { fixed, ..group.clone() }));
            }
            self.apply(change).await?;
        }
        Ok(())
    }

    /// The settings with the factor raised and the operator's words taken in, when that changes them.
    fn next_settings(&self) -> Option<record::Settings> {
        let state = self.state.lock();
        let mut next = self.with_operator(&state.settings);
        next.replication = seats::factor(&next, state.servers_up());
        (next != state.settings).then_some(next)
    }

    /// What time did to servers, and what follows for settings, seats, roles and groups.
    ///
    /// # Errors
    /// The store's; the next step goes on.
    pub(crate) async fn step(&self) -> Result<()> {
        self.pass_time();
        if self.membership.as_ref().is_some_and(|membership| membership.leads().is_none()) {
            return Ok(());
        }
        let _changing = self.changing.lock().await;
        let has_groups = !self.state.lock().groups.is_empty();
        if !has_groups {
            // The first write decides the factor, by the servers that are there then.
            return self.release_drained().await;
        }
        if let Some(settings) = self.next_settings() {
            tracing::info!(replication = settings.replication, "the cluster's factor changes");
            self.apply(Change { settings: Some(settings), led: true, ..Change::default() }).await?;
        }
        let changes = self.seat_changes();
        for groups in changes.chunks(GROUPS_A_PLAN) {
            self.apply(Change { groups: groups.to_vec(), led: true, ..Change::default() }).await?;
        }
        if changes.is_empty()
            && let Some(one) = self.seat_to_move()
        {
            tracing::info!(
                group = one.group.0,
                epoch = one.next.epoch,
                from = one.from.0,
                to = one.to.0,
                "a seat moves to an emptier server"
            );
            let groups = vec![(one.group, one.next)];
            self.apply(Change { groups, led: true, ..Change::default() }).await?;
            self.state.lock().balanced += 1;
        }
        self.release_drained().await?;
        drop(_changing);
        let factors: BTreeSet<u32> = {
            let state = self.state.lock();
            // Not those of groups that are about to be raised.
            let lasting = |group: &record::Group| group.fixed || group.replicas >= state.settings.replication;
            let groups = state.groups.values().map(|stored| &stored.record);
            groups.filter(|group| lasting(group)).map(|group| group.replicas).collect()
        };
        for replicas in factors {
            self.make_groups(replicas).await?;
        }
        Ok(())
    }

    fn pass_time(&self) {
        let (now_ms, silence) = (self.now_ms(), self.silence());
        let mut state = self.state.lock();
        let state = &mut *state;
        let count = state.servers.len();
        for (id, member) in &mut state.servers {
            let deaths = &mut state.deaths;
            if member.standing.tick(now_ms, silence, || deaths.declare(*id, count, now_ms)) {
                tracing::warn!(
                    server = id.0,
                    state = ?member.standing.state(),
                    silent_ms = member.standing.silent_ms(now_ms),
                    "a file server fell silent"
                );
            }
        }
    }

    /// The groups that should be changed, as they should be.
    fn seat_changes(&self) -> Vec<Placed> {
        let state = self.state.lock();
        let candidates = state.candidates();
        let (mut held, mut led) = (BTreeMap::new(), BTreeMap::new());
        for (_, group) in state.placed.iter() {
            for member in members(group) {
                *held.entry(member).or_insert(0usize) += 1;
            }
            *led.entry(ServerId(group.primary)).or_insert(0usize) += 1;
        }
        let factor = state.settings.replication;
        let mut changes = Vec::new();
        for (id, group) in state.placed.iter() {
            let context = seats::Context {
                servers: &candidates,
                seats: &held,
                primaries: &led,
                factor,
                min_copies: self.min_copies(factor.max(group.replicas)),
                settled: state.is_settled(*id),
            };
            let Some((next, why)) = seats::change(group, &context, |member| state.holds(*id, member)) else {
                continue;
            };
            tracing::info!(group = id.0, epoch = next.epoch, seats = ?next.seats, primary = next.primary, why,
                "a group changes");
            for member in members(&next).filter(|member| !cairn_core::cluster::is_member(group, *member)) {
                *held.entry(member).or_insert(0) += 1;
            }
            if next.primary != group.primary {
                *led.entry(ServerId(next.primary)).or_insert(0) += 1;
                if let Some(count) = led.get_mut(&ServerId(group.primary)) {
                    *count = count.saturating_sub(1);
                }
            }
            changes.push((*id, next));
        }
        if changes.is_empty() {
            changes = given_up(&state);
        }
        if changes.is_empty() {
            let holds = |id, server| state.holds(id, server);
            if let Some((id, next)) = seats::rebalance(&state.placed, &candidates, holds) {
                tracing::info!(group = id.0, epoch = next.epoch, primary = next.primary, "a role moves");
                changes.push((id, next));
            }
        }
        changes
    }

    /// The seat that should go to an emptier server, once everything is known and in its place.
    fn seat_to_move(&self) -> Option<balance::Move> {
        let state = self.state.lock();
        if !self.tallies.is_complete() || !state.is_calm() {
            return None;
        }
        let bytes = |id| self.tallies.get(Table::Runs, What::Bytes(id));
        let ignored_bytes = self.config.effort.balance_ignored_bytes;
        balance::next(&state.candidates(), &state.placed, bytes, ignored_bytes)
    }

    /// Draining servers without a seat, copies that are still needed, or a part in carrying the journal are released.
    async fn release_drained(&self) -> Result<()> {
        let carried = self.carried();
        let released: Vec<(ServerId, record::Server)> = {
            let state = self.state.lock();
            // Its successor knows that it is one before the server may go.
            let carried = state.settings_revision.is_none_or(|changed| changed <= carried);
            let carriers = state.carriers();
            let carries = |id: ServerId| carriers.names(id.0) || !carried;
            let needed = |id: ServerId| {
                let dead = state.servers.get(&id).is_some_and(|member| member.standing.is_dead());
                // Whoever is dead carries nothing any more, whatever the records say.
                !dead && carries(id)
                    || state.groups.values().any(|stored| {
                        stored.record.seats.contains(&id.0) || stored.record.former.contains(&id.0)
                    })
            };
            state
                .servers
                .iter()
                .filter(|(_, member)| member.standing.is_draining() && !member.standing.is_gone())
                .filter(|(id, _)| !needed(**id))
                .map(|(id, member)| (*id, record::Server { gone: true, ..member.record.clone() }))
                .collect()
        };
        if released.is_empty() {
            return Ok(());
        }
        for (id, _) in &released {
            tracing::info!(server = id.0, "drained: it may be switched off");
        }
        self.apply(Change { servers: released, led: true, ..Change::default() }).await.map(|_| ())
    }

    /// Former members of a group whose copies are gone are forgotten.
    pub(crate) async fn forget_former(&self, id: GroupId, server: ServerId) -> Result<()> {
        let _changing = self.changing.lock().await;
        let next = {
            let state = self.state.lock();
            let Some(stored) = state.groups.get(&id) else { return Ok(()) };
            if !stored.record.former.contains(&server.0) {
                return Ok(());
            }
            let mut next = stored.record.clone();
            next.former.retain(|former| *former != server.0);
            next
        };
        self.apply(Change { groups: vec![(id, next)], led: true, ..Change::default() }).await.map(|_| ())
    }

    /// Strikes a server from the records on which nothing depends.
    ///
    /// # Errors
    /// `NOT_FOUND`; `CONDITION_FAILED` saying what depends on it; the store's.
    pub async fn forget(&self, id: ServerId) -> Result<()> {
        let _changing = self.changing.lock().await;
        {
            let carried = self.carried();
            let state = self.state.lock();
            let unknown = || Error::not_found(format!("no file server {id} is known")).on(id.to_string());
            let member = state.servers.get(&id).ok_or_else(unknown)?;
            let groups = || state.groups.values().map(|stored| &stored.record);
            // Its successor knows that it is one before the server may go.
            let settled = state.settings_revision.is_none_or(|changed| changed <= carried);
            let ties = Ties {
                answers: member.standing.is_reachable(),
                seats: groups().filter(|group| group.seats.contains(&id.0)).count(),
                left: groups().filter(|group| group.former.contains(&id.0)).count(),
                carries: state.carriers().names(id.0) || !settled,
            };
            if let Some(why) = must_stay(ties) {
                let message = format!("server {id} cannot be forgotten: {why}");
                return Err(Error::new(Reason::ConditionFailed, message).on(id.to_string()));
            }
        }
        self.apply(Change { forgotten: Some(id), ..Change::default() }).await?;
        tracing::info!(server = id.0, "forgotten");
        Ok(())
    }

    /// Begins or ends the emptying of a server.
    ///
    /// # Errors
    /// `NOT_FOUND`; the store's.
    pub async fn drain(&self, id: ServerId, draining: bool) -> Result<v1::DrainResponse> {
        {
            let _changing = self.changing.lock().await;
            let record = {
                let state = self.state.lock();
                let member = state.servers.get(&id).ok_or_else(|| {
                    Error::not_found(format!("no file server {id} is known")).on(id.to_string())
                })?;
                let mut record = member.record.clone();
                record.draining = draining;
                record.gone &= draining;
                (record != member.record).then_some(record)
            };
            if let Some(record) = record {
                self.apply(Change { servers: vec![(id, record)], ..Change::default() }).await?;
            }
        }
        self.step().await?;
        let state = self.state.lock();
        let seats = state.groups.values().filter(|stored| stored.record.seats.contains(&id.0)).count();
        Ok(v1::DrainResponse {
            seats_left: seats as u64,
            drained: state.servers.get(&id).is_some_and(|member| member.standing.is_gone()),
            waits_for: self.drain_waits_for(&state, id),
        })
    }
}

/// Groups without their former members that are dead and that an operator gave up (drain of a dead server): nobody
/// waits for their copies once all current members hold theirs.
fn given_up(state: &State) -> Vec<Placed> {
    let lost = |former: &u64| {
        state
            .servers
            .get(&ServerId(*former))
            .is_none_or(|member| member.standing.is_dead() && member.standing.is_draining())
    };
    let groups =
        state.placed.iter().filter(|(id, group)| group.former.iter().any(lost) && state.is_settled(*id));
    groups
        .map(|(id, group)| {
            let mut next = group.clone();
            next.former.retain(|former| !lost(former));
            (*id, next)
        })
        .collect()
}

fn put(plan: &mut Plan, key: cairn_core::plan::Key, read: Option<Revision>, value: bytes::Bytes) {
    plan.require(cairn_core::plan::Precondition::Unchanged(key.clone(), read));
    plan.put(key, value);
}

/// A server's record is gone.
fn strike(state: &mut State, id: ServerId) {
    state.servers.remove(&id);
    state.deaths.back(id);
    state.copies.set_quarantined(id, 0, Vec::new());
}

fn put_server(state: &mut State, id: ServerId, record: record::Server, revision: Revision, now_ms: u64) {
    state.revision = state.revision.max(revision);
    let (draining, gone) = (record.draining, record.gone);
    let member = state.servers.entry(id).or_insert_with(|| {
        Member::new(record.clone(), revision, Standing::remembered(now_ms, draining, gone))
    });
    let ended = std::mem::replace(&mut member.record, record).incarnation;
    if ended != member.record.incarnation {
        member.supersede(ended);
    }
    member.revision = revision;
    member.standing.drain(draining);
    if gone {
        member.standing.release();
    }
}
