//! The health of everything, computed from what file servers hold and whether they answer.

use super::{
    Cluster,
    state::{State, group_to_wire},
    tally::{Table, What},
};
use cairn_core::{cluster::placement, record};
use cairn_proto::{
    id::{ChunkId, GroupId, Revision, ServerId},
    limits::CHUNK_BYTES_MAX,
    v1,
};
use std::{collections::BTreeMap, sync::atomic::Ordering};

impl Cluster {
    /// Everything but locks, sessions and the directory's own disk.
    pub fn status(&self) -> v1::StatusResponse {
        let now_ms = self.now_ms();
        let state = self.state.lock();
        let file_servers: Vec<_> = state
            .servers
            .iter()
            .map(|(id, member)| v1::ServerStatus {
                server: state.server(*id),
                usage: member.standing.was_heard().then_some(member.usage),
                heartbeat_ago_ms: member.standing.silent_ms(now_ms),
                missing_chunks: self.missing_at(&state, *id),
                verified_ago_ms: member.verified_ms.map_or(0, |at_ms| now_ms.saturating_sub(at_ms)),
                verified: member.verified_ms.is_some(),
                drained: member.standing.is_gone(),
                notice: match &member.went_back {
                    Some(why) if member.verified_ms.is_none() || self.missing_at(&state, *id) > 0 => {
                        why.clone()
                    }
                    _ => String::new(),
                },
                scrub: member.scrub,
                drain_waits_for: self.drain_waits_for(&state, *id),
                unheard: !member.standing.was_heard(),
            })
            .collect();
        let verified = self.tallies.is_complete()
            && state.servers.values().all(|member| {
                member.verified_ms.is_some() || member.standing.is_dead() || member.standing.is_gone()
            });
        let mut chunks = self.totals(&state);
        let (quarantined_count, quarantined) = state.copies.quarantined();
        chunks.quarantined = quarantined_count;
        let reclaimable_bytes = state
            .groups
            .keys()
            .map(|group| {
                let bytes = self.tallies.get(Table::Dropped, What::DroppedBytes(*group));
                bytes.saturating_mul(state.holders(*group).len() as u64)
            })
            .sum::<u64>()
            + state.servers.values().map(|member| member.usage.reclaimable_bytes).sum::<u64>();
        v1::StatusResponse {
            file_servers,
            chunks: Some(chunks),
            files: self.tallies.get(Table::Inodes, What::Files),
            directories: self.tallies.get(Table::Inodes, What::Directories),
            bytes: self.tallies.get(Table::Inodes, What::FileBytes),
            repairs: Some(self.repairs(&state, &chunks, now_ms)),
            directory: Some(v1::DirectoryStatus {
                cluster_id: self.cluster_id.clone(),
                generation: self.generation.0,
                shipped_revision: self.shipped.revision.load(Ordering::Relaxed),
                journal_lag_ms: self.shipped.lag_ms.load(Ordering::Relaxed),
                journal_lag_ms_max: self.config.timing.journal_lag_ms_max,
                carrier_ids: state.settings.carriers.clone(),
                mode: "serving".into(),
                reason: self.alarm(&state),
                ..Default::default()
            }),
            reclaimable_bytes,
            verified,
            groups: state.groups.iter().map(|(id, stored)| group_to_wire(*id, &stored.record)).collect(),
            quarantined,
            balance: Some(self.balance(&state)),
            sharing: self.membership.as_ref().map_or_else(Vec::new, |membership| membership.status()),
            ..Default::default()
        }
    }

    /// What is missing, what is being done about it, how fast, and what stands in the way.
    fn repairs(&self, state: &State, chunks: &v1::ChunkTotals, now_ms: u64) -> v1::RepairStatus {
        let (named, named_bytes, unnamed) = state.copies.missing();
        let new: u64 = state.servers.keys().map(|server| self.missing_as_newcomer(state, *server)).sum();
        // Of chunks that are known by number alone. Sizes of files are a caller's word, and may be all holes.
        let mean = self.tallies.get(Table::Inodes, What::FileBytes) / chunks.total.max(1);
        let bytes_missing =
            named_bytes.saturating_add((unnamed + new).saturating_mul(mean.min(CHUNK_BYTES_MAX)));
        let bytes_per_second = state.copies.rate.per_second(now_ms);
        v1::RepairStatus {
            chunks_waiting: state.copies.waiting(),
            copies_made: state.copies.made,
            bytes_copied: state.copies.made_bytes,
            obstacles: state.copies.obstacles.clone(),
            copies_missing: named + unnamed + new,
            bytes_missing,
            copies_running: state.copies.running,
            bytes_running: state.copies.running_bytes,
            bytes_per_second,
            time_left_ms: bytes_missing.saturating_mul(1_000).checked_div(bytes_per_second).unwrap_or(0),
        }
    }

    /// Seats that change hands although nobody drains or lost the server that had them.
    fn balance(&self, state: &State) -> v1::BalanceStatus {
        let mut moves = Vec::new();
        for (id, stored) in &state.groups {
            let given = stored.record.former.iter().map(|former| ServerId(*former)).filter(|former| {
                let standing = state.servers.get(former).map(|member| &member.standing);
                standing.is_some_and(|standing| !standing.is_draining() && !standing.is_dead())
            });
            for from in given {
                let to = cairn_core::cluster::members(&stored.record)
                    .find(|member| state.copies.covers(*id, *member) == Some(from))
                    .or_else(|| {
                        cairn_core::cluster::members(&stored.record)
                            .find(|member| self.missing_in(state, *id, *member) > 0)
                    })
                    .filter(|member| !state.holds(*id, *member));
                moves.push(v1::SeatMove {
                    group_id: id.0,
                    from_id: from.0,
                    to_id: to.map_or(0, |to| to.0),
                    copies_missing: to.map_or(0, |to| self.missing_in(state, *id, to)),
                });
            }
        }
        v1::BalanceStatus { seats_moved: state.balanced, moves }
    }

    /// What the drain of a server still waits for; empty when none is under way.
    pub(crate) fn drain_waits_for(&self, state: &State, id: ServerId) -> String {
        let Some(member) = state.servers.get(&id) else { return String::new() };
        if !member.standing.is_draining() || member.standing.is_gone() {
            return String::new();
        }
        let seated = state.groups.values().filter(|stored| stored.record.seats.contains(&id.0)).count();
        let former: Vec<&GroupId> = state
            .groups
            .iter()
            .filter(|(_, stored)| stored.record.former.contains(&id.0))
            .map(|(group, _)| group)
            .collect();
        let mut waits = Vec::new();
        if seated > 0 {
            let candidates = state.candidates();
            let stuck = state
                .groups
                .values()
                .filter(|stored| stored.record.seats.contains(&id.0))
                .filter(|stored| {
                    let beside: Vec<ServerId> = cairn_core::cluster::members(&stored.record).collect();
                    placement::spare(&candidates, &beside, |_| 0).is_none()
                })
                .count();
            waits.push(match stuck {
                0 => format!("{seated} seats move to other servers, one group after the other"),
                _ => format!(
                    "no live server with room can take {stuck} of its {seated} seats: add a file server, or the copies \
                     would be fewer than asked for"
                ),
            });
        }
        if !former.is_empty() {
            let missing: u64 = former
                .iter()
                .filter_map(|group| state.groups.get(*group).map(|stored| (**group, &stored.record)))
                .flat_map(|(group, record)| {
                    cairn_core::cluster::members(record).map(move |server| (group, server))
                })
                .map(|(group, server)| self.missing_in(state, group, server))
                .sum();
            waits.push(format!(
                "the members of {} groups that it left hold all copies: {missing} are missing",
                former.len()
            ));
        }
        if state.carriers().names(id.0) {
            waits.push(
                "it carries the directory's journal until another server does, or the rest is enough".into(),
            );
        }
        waits.join("; ")
    }

    /// What an operator should know.
    fn alarm(&self, state: &State) -> String {
        let lag_ms = self.shipped.lag_ms.load(Ordering::Relaxed);
        if lag_ms <= self.config.timing.journal_lag_ms_max {
            return String::new();
        }
        let why = if self.shipped.able.load(Ordering::Relaxed) {
            "commits wait for them".to_owned()
        } else {
            let silent: Vec<String> = state
                .carriers()
                .all()
                .into_iter()
                .filter(|carrier| !state.is_reachable(ServerId(*carrier)))
                .map(|carrier| carrier.to_string())
                .collect();
            let waits = match silent.is_empty() {
                true => "until there are some, losing the directory's disk would lose everything".to_owned(),
                false => format!(
                    "losing the directory's disk now would lose these changes. Others can take over once more than half of \
                     them answer: start server {}, or drain one that never returns",
                    silent.join(" or ")
                ),
            };
            format!("too few file servers live to carry it: {waits}")
        };
        format!("the journal's copies on the file servers lag {lag_ms} ms behind: {why}")
    }

    /// Copies that a server should hold and does not, with all chunks of groups in which it is new.
    fn missing_at(&self, state: &State, server: ServerId) -> u64 {
        state.copies.missing_at(server) + self.missing_as_newcomer(state, server)
    }

    /// All chunks of groups in which a server is new: nobody knows yet which of them it has.
    fn missing_as_newcomer(&self, state: &State, server: ServerId) -> u64 {
        let new = state.groups.keys().filter(|group| state.copies.is_unverified(**group, server));
        new.map(|group| self.tallies.get(Table::Runs, What::Chunks(*group))).sum()
    }

    /// Copies of a group that a member lacks.
    fn missing_in(&self, state: &State, group: GroupId, server: ServerId) -> u64 {
        match state.copies.is_unverified(group, server) {
            true => self.tallies.get(Table::Runs, What::Chunks(group)),
            false => state.copies.missing_in(group, server),
        }
    }

    fn totals(&self, state: &State) -> v1::ChunkTotals {
        let mut gaps: BTreeMap<GroupId, Vec<(&ChunkId, &super::copies::Missing)>> = BTreeMap::new();
        for (chunk, gap) in state.copies.gaps() {
            gaps.entry(gap.group).or_default().push((chunk, gap));
        }
        let mut totals = v1::ChunkTotals::default();
        for (id, stored) in &state.groups {
            let count = self.tallies.get(Table::Runs, What::Chunks(*id));
            totals.awaiting_collection += self.tallies.get(Table::Dropped, What::Dropped(*id));
            totals.total += count;
            let sum =
                group_totals(state, *id, &stored.record, count, gaps.get(id).map_or(&[], Vec::as_slice));
            totals.healthy += sum.0;
            totals.under_replicated += sum.1;
            totals.lost += sum.2;
        }
        totals
    }
}

/// Healthy, under-replicated and lost chunks of a group. A member that has just got its seat lacks chunks; as long as the
/// server before it is there and has them, they have all their copies.
fn group_totals(
    state: &State,
    id: GroupId,
    group: &record::Group,
    count: u64,
    gaps: &[(&ChunkId, &super::copies::Missing)],
) -> (u64, u64, u64) {
    let holders: Vec<ServerId> = state
        .holders(id)
        .into_iter()
        .filter(|server| state.is_reachable(*server) && !state.copies.is_unverified(id, *server))
        .collect();
    let is_verified = |id: &ServerId| state.servers.get(id).is_some_and(|one| one.verified_ms.is_some());
    let covered = |server: ServerId| state.covered_by(id, server).is_some();
    let seated = cairn_core::cluster::members(group)
        .filter(|server| state.is_reachable(*server) && is_verified(server))
        .filter(|server| !state.copies.is_unverified(id, *server) || covered(*server))
        .count();
    let whole = seated == group.replicas as usize;
    let unnamed = state.copies.unnamed_in(id);
    let named = gaps
        .iter()
        .filter(|(_, gap)| {
            let mut lacks = gap.at.iter();
            let only = lacks.next().filter(|_| lacks.next().is_none());
            !only.is_some_and(|(server, lack)| lack.covered && covered(*server))
        })
        .count() as u64;
    let lost = if holders.is_empty() {
        count
    } else {
        gaps.iter().filter(|(_, gap)| holders.iter().all(|server| gap.at.contains_key(server))).count() as u64
    };
    let lost = lost.min(count);
    let healthy = if whole { count.saturating_sub(named + unnamed) } else { 0 };
    (healthy, count - lost - healthy.min(count - lost), lost)
}

/// One chunk's copies, for `Explain`.
/// `written` tells when its record was.
pub(crate) fn copies_of(
    cluster: &Cluster,
    chunk: ChunkId,
    group: GroupId,
    written: Option<Revision>,
) -> Explained {
    let now_ms = cluster.now_ms();
    let state = cluster.state.lock();
    let Some(stored) = state.groups.get(&group) else { return Explained::default() };
    let gap = state.copies.gap(chunk);
    let mut next = String::new();
    let copies = state
        .holders(group)
        .into_iter()
        .filter_map(|id| {
            let member = state.servers.get(&id)?;
            let seated = stored.record.seats.contains(&id.0);
            let lack = gap.and_then(|gap| gap.at.get(&id));
            let copy = match lack {
                _ if !member.standing.is_reachable() => "unreachable",
                Some(lack) if lack.corrupt => "corrupt",
                Some(_) => "missing",
                None if state.copies.is_unverified(group, id) => "missing",
                None if member.verified_ms.is_some()
                    && written.is_some_and(|written| written <= member.verified_to) =>
                {
                    "verified"
                }
                None => "reported",
            };
            if next.is_empty() && seated && matches!(copy, "missing" | "corrupt") {
                next = match state.covered_by(group, id) {
                    Some(former) => {
                        format!("server {id} fetches a copy: it takes the seat of server {former}, which keeps its copy until then")
                    }
                    None => format!("server {id} fetches a copy from another member"),
                };
            } else if next.is_empty() && seated && copy == "unreachable" {
                let silent_ms = member.standing.silent_ms(now_ms);
                next = match member.standing.is_dead() {
                    true => format!("server {id} is dead: its seat goes to the next spare server with room"),
                    false => format!(
                        "server {id} is silent for {silent_ms} ms: after {} ms its seat goes to a spare server",
                        cluster.config.timing.dead_ms
                    ),
                };
            }
            Some(v1::CopyStatus {
                server: state.server(id),
                state: copy.into(),
                verified_ago_ms: member.verified_ms.map_or(0, |at_ms| now_ms.saturating_sub(at_ms)),
                primary: stored.record.primary == id.0,
            })
        })
        .collect();
    let zones: std::collections::BTreeSet<&str> = cairn_core::cluster::members(&stored.record)
        .filter_map(|id| state.servers.get(&id))
        .map(|member| member.record.zone.as_str())
        .filter(|zone| !zone.is_empty())
        .collect();
    let reason = format!(
        "group {group} of {} copies ({} needed for a write), elected by free space and load{}",
        stored.record.replicas,
        stored.record.min_copies,
        match zones.len() {
            0 => String::new(),
            count => format!(", in {count} zone(s)"),
        }
    );
    Explained { group: Some(group_to_wire(group, &stored.record)), copies, reason, next_repair: next }
}

/// What is known of one chunk's copies.
#[derive(Debug, Default)]
pub(crate) struct Explained {
    pub(crate) group: Option<v1::Group>,
    pub(crate) copies: Vec<v1::CopyStatus>,
    pub(crate) reason: String,
    pub(crate) next_repair: String,
}
