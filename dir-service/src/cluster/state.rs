//! Servers, groups and settings in memory.

use super::copies::Copies;
use crate::ops::view::Stored;
use cairn_core::{
    cluster::{
        Candidate, Placed,
        carriers::{self, Carriers},
        server::{Deaths, Standing},
    },
    record,
};
use cairn_proto::{
    id::{GroupId, Revision, ServerId},
    v1,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

/// A file server: its record, and what only this directory knows of it.
#[derive(Clone, Debug)]
pub struct Member {
    /// Identity, endpoints, zone.
    pub record: record::Server,
    /// The plan that wrote the record.
    pub revision: Revision,
    /// What its silence means.
    pub standing: Standing,
    /// Its disk, as last reported. Before it was heard, what placement assumes of it: a size from its record, and room.
    pub usage: v1::Usage,
    /// Revision of the topology that it keeps durably.
    pub topology_revision: Revision,
    /// How far it is with re-reading its copies, as last reported.
    pub scrub: Option<v1::ScrubProgress>,
    /// Its copies of journals, as last reported.
    pub journals: Vec<v1::JournalCopy>,
    /// Lives of its process that ended: whoever still uses one is a second process on a copied disk.
    pub superseded: Vec<String>,
    /// Another process that wants to be this server while the known one is still heard, and since when.
    pub challenger: Option<(String, u64)>,
    /// When its inventory was last compared.
    pub verified_ms: Option<u64>,
    /// The revision of the records that it was compared with: what was committed later is only reported.
    pub verified_to: Revision,
    /// When its inventory must be compared again, at the latest.
    pub compare_ms: u64,
    /// Its disk was found to be an older copy of itself: what to tell an operator until all is there again.
    pub went_back: Option<String>,
}

impl Member {
    /// From a record.
    pub fn new(record: record::Server, revision: Revision, standing: Standing) -> Self {
        Self {
            usage: v1::Usage {
                total_bytes: record.total_bytes,
                free_bytes: record.total_bytes,
                ..Default::default()
            },
            record,
            revision,
            standing,
            topology_revision: Revision(0),
            scrub: None,
            journals: Vec::new(),
            superseded: Vec::new(),
            challenger: None,
            verified_ms: None,
            verified_to: Revision(0),
            compare_ms: 0,
            went_back: None,
        }
    }
}

/// All of it.
#[derive(Debug, Default)]
pub struct State {
    /// Servers by id.
    pub servers: BTreeMap<ServerId, Member>,
    /// Groups by id.
    pub groups: BTreeMap<GroupId, Stored<record::Group>>,
    /// The same groups, as the rules take them.
    pub placed: Arc<Vec<Placed>>,
    /// Settings of the cluster.
    pub settings: record::Settings,
    /// The plan that wrote the settings; `None` before the first.
    pub settings_revision: Option<Revision>,
    /// The newest change of any of these.
    pub revision: Revision,
    /// The directory's term within its generation, once it serves.
    pub term: u64,
    /// The budget of deaths.
    pub deaths: Deaths,
    /// Missing copies.
    pub copies: Copies,
    /// Seats that moved so that a server takes its share, since the start.
    pub balanced: u64,
    /// Members that have a seat in a group since a topology revision that they have not acknowledged yet.
    newcomers: BTreeMap<(GroupId, ServerId), Revision>,
}

impl State {
    /// A server as others see it.
    pub fn server(&self, id: ServerId) -> Option<v1::Server> {
        self.servers.get(&id).map(|member| server_to_wire(id, member))
    }

    /// Who carries the journal.
    pub fn carriers(&self) -> Carriers {
        Carriers::of(&self.settings)
    }

    /// Servers as the choice of carriers sees them.
    pub fn carrying(&self) -> BTreeMap<u64, carriers::Server> {
        let server = |(id, member): (&ServerId, &Member)| {
            let standing = &member.standing;
            let server = carriers::Server {
                able: standing.is_up() && standing.was_heard(),
                answers: standing.is_reachable() && standing.was_heard(),
                lost: standing.is_dead() || standing.is_gone() || standing.is_draining(),
                leaves: standing.is_draining() || standing.is_gone(),
                given_up: standing.is_gone(),
                free_bytes: member.usage.free_bytes,
            };
            (id.0, server)
        };
        self.servers.iter().map(server).collect()
    }

    /// Servers that an operator gave up, or that were emptied: nobody waits for them.
    pub fn released(&self) -> BTreeSet<u64> {
        let gone = self.servers.iter().filter(|(_, member)| member.standing.is_gone());
        gone.map(|(id, _)| id.0).collect()
    }

    /// Servers that may take new chunks.
    pub fn servers_up(&self) -> usize {
        self.servers.values().filter(|member| member.standing.is_up()).count()
    }

    /// Servers as placement sees them.
    pub fn candidates(&self) -> Vec<Candidate> {
        let candidate = |(id, member): (&ServerId, &Member)| Candidate {
            id: *id,
            zone: member.record.zone.clone(),
            total_bytes: member.usage.total_bytes,
            free_bytes: member.usage.free_bytes,
            requests: member.usage.requests,
            up: member.standing.is_up(),
            lost: member.standing.is_dead() || member.standing.is_gone(),
            draining: member.standing.is_draining(),
        };
        self.servers.iter().map(candidate).collect()
    }

    /// Takes a group over as the store has it; members that were not there before are newcomers.
    pub fn put_group(&mut self, id: GroupId, group: record::Group, revision: Revision, now_ms: u64) {
        let before: BTreeSet<u64> = self
            .groups
            .get(&id)
            .map(|stored| stored.record.seats.iter().copied().collect())
            .unwrap_or_default();
        let existed = self.groups.contains_key(&id);
        // Where others change groups, a state between may not have been seen: whoever was out of the group in it may still
        // follow an order of that time, until it has acknowledged this one.
        let skipped = self.groups.get(&id).is_some_and(|known| group.epoch > known.record.epoch + 1);
        for seat in group.seats.iter().filter(|seat| skipped && before.contains(*seat)) {
            self.newcomers.insert((id, ServerId(*seat)), revision);
            if let Some(member) = self.servers.get_mut(&ServerId(*seat)) {
                member.compare_ms = 0;
            }
        }
        for seat in group.seats.iter().filter(|seat| **seat != 0 && !before.contains(*seat)) {
            if existed {
                // It holds nothing of the group's chunks yet, as far as anybody knows.
                self.copies.newcomer(id, ServerId(*seat), now_ms);
                if let Some(member) = self.servers.get_mut(&ServerId(*seat)) {
                    member.compare_ms = 0;
                }
            }
            self.newcomers.insert((id, ServerId(*seat)), revision);
        }
        self.cover(id, &group, revision);
        for seat in before.iter().filter(|seat| !group.seats.contains(*seat)) {
            self.newcomers.remove(&(id, ServerId(*seat)));
            self.copies.left(id, ServerId(*seat));
        }
        self.groups.insert(id, Stored { record: group, revision });
        self.revision = self.revision.max(revision);
        self.placed = Arc::new(self.groups.iter().map(|(id, stored)| (*id, stored.record.clone())).collect());
    }

    /// Notes which former members had everything when they gave their seats on, to whom, and which nobody waits for any
    /// more.
    fn cover(&mut self, id: GroupId, next: &record::Group, revision: Revision) {
        let Some(before) = self.groups.get(&id).map(|stored| stored.record.clone()) else { return };
        for (old, new) in before.seats.iter().zip(&next.seats).filter(|(old, new)| old != new) {
            let (old, new) = (ServerId(*old), ServerId(*new));
            if next.former.contains(&old.0) && self.holds(id, old) && self.is_verified(old) {
                self.copies.cover(id, new, old, revision);
            }
        }
        for former in before.former.iter().filter(|former| !next.former.contains(*former)) {
            self.copies.uncover(id, ServerId(*former));
        }
    }

    /// The server whose copies count for those that a member still lacks, while it is there to give them.
    pub fn covered_by(&self, group: GroupId, newcomer: ServerId) -> Option<ServerId> {
        self.copies.covers(group, newcomer).filter(|former| self.is_verified(*former))
    }

    /// Whether everything is known, there and in its place, so that a seat may move for evenness: any repair comes first.
    pub fn is_calm(&self) -> bool {
        self.groups.iter().all(|(id, stored)| stored.record.former.is_empty() && self.is_settled(*id))
            && !self
                .servers
                .values()
                .any(|member| member.standing.is_draining() && !member.standing.is_gone())
    }

    /// A server keeps this topology durably.
    pub fn acknowledged(&mut self, server: ServerId, revision: Revision) {
        let Some(member) = self.servers.get_mut(&server) else { return };
        if revision <= member.topology_revision {
            return;
        }
        member.topology_revision = revision;
        self.newcomers.retain(|(_, newcomer), since| *newcomer != server || *since > revision);
    }

    /// Whether a member has not acknowledged its seat yet.
    pub fn is_newcomer(&self, group: GroupId, server: ServerId) -> bool {
        self.newcomers.contains_key(&(group, server))
    }

    /// Servers that know less than the current topology and can be told.
    pub fn to_tell(&self) -> Vec<ServerId> {
        self.servers
            .iter()
            .filter(|(_, member)| member.topology_revision < self.revision && member.standing.is_reachable())
            .map(|(id, _)| *id)
            .collect()
    }

    /// Servers and groups for the wire.
    pub fn topology(&self, cluster_id: &str, generation: u64) -> v1::TopologyResponse {
        v1::TopologyResponse {
            revision: self.revision.0,
            servers: self.servers.iter().map(|(id, member)| server_to_wire(*id, member)).collect(),
            groups: self.groups.iter().map(|(id, stored)| group_to_wire(*id, &stored.record)).collect(),
            cluster_id: cluster_id.to_owned(),
            generation,
            carrier_ids: self.settings.carriers.clone(),
            term: self.term,
        }
    }

    /// Members that hold copies or should: seats and former members of a group.
    pub fn holders(&self, group: GroupId) -> Vec<ServerId> {
        let Some(stored) = self.groups.get(&group) else { return Vec::new() };
        let seats = cairn_core::cluster::members(&stored.record);
        seats.chain(stored.record.former.iter().map(|former| ServerId(*former))).collect()
    }

    /// Whether all members of a group answer and hold all they should, as far as was compared.
    pub fn is_settled(&self, id: GroupId) -> bool {
        let Some(stored) = self.groups.get(&id) else { return false };
        let group = &stored.record;
        !group.seats.contains(&0)
            && cairn_core::cluster::members(group)
                .all(|server| self.holds(id, server) && self.is_verified(server))
    }

    /// Whether a member holds all it should of a group, as far as was compared.
    pub fn holds(&self, group: GroupId, server: ServerId) -> bool {
        !self.is_newcomer(group, server) && self.copies.holds(group, server)
    }

    fn is_verified(&self, server: ServerId) -> bool {
        self.servers
            .get(&server)
            .is_some_and(|member| member.standing.is_reachable() && member.verified_ms.is_some())
    }

    /// Whether a server answers, as far as is known.
    pub fn is_reachable(&self, server: ServerId) -> bool {
        self.servers.get(&server).is_some_and(|member| member.standing.is_reachable())
    }
}

fn server_to_wire(id: ServerId, member: &Member) -> v1::Server {
    v1::Server {
        id: id.0,
        incarnation: member.record.incarnation.clone(),
        endpoints: member
            .record
            .endpoints
            .iter()
            .map(|endpoint| v1::Endpoint { uri: endpoint.uri.clone(), scope: endpoint.scope })
            .collect(),
        zone: member.record.zone.clone(),
        state: member.standing.state() as i32,
    }
}

/// A group as clients and file servers see it.
pub fn group_to_wire(id: GroupId, group: &record::Group) -> v1::Group {
    v1::Group {
        id: id.0,
        scheme: Some(v1::Scheme { replicas: group.replicas, min_copies: group.min_copies }),
        seats: group
            .seats
            .iter()
            .zip(0..)
            .map(|(server_id, number)| v1::Seat { number, server_id: *server_id })
            .collect(),
        primary_id: group.primary,
        epoch: group.epoch,
        former_ids: group.former.clone(),
    }
}
