//! Where groups go, and which group a grant is taken from.
//!
//! Members of a group stand in different zones where there are several, weighted by free space. Each live server is
//! primary of some groups of each factor in use, so that a client which lost a primary is handed another group at
//! once, and so that the load of a dead server spreads. Member sets are few ([`SETS_PER_SERVER`] a server): with
//! every combination in use, any three deaths at once would lose something.

use super::{Candidate, Placed, members};
use crate::record;
use cairn_proto::id::{GroupId, ServerId};
use std::collections::{BTreeMap, BTreeSet};

/// Most member sets that a server is primary in.
pub const SETS_PER_SERVER: usize = 4;
/// Most groups made in one step.
pub const GROUPS_A_STEP: usize = 64;

/// How many groups of a factor each of `servers` servers should be primary of: enough that its followers are all
/// others, as long as these are few.
fn groups_per_server(servers: usize, replicas: usize) -> usize {
    (servers.saturating_sub(1)).div_ceil(replicas.saturating_sub(1).max(1)).clamp(1, SETS_PER_SERVER)
}

/// The groups of a factor that are wanted beside those that exist, at most [`GROUPS_A_STEP`]. None when fewer servers
/// with room live than a write needs. Seats stay empty where there are fewer servers than copies.
pub fn wanted(
    servers: &[Candidate],
    groups: &[Placed],
    replicas: u32,
    min_copies: u32,
) -> Vec<record::Group> {
    let able: Vec<&Candidate> = servers.iter().filter(|server| server.up && server.has_room()).collect();
    if replicas == 0 || able.len() < min_copies.max(1) as usize {
        return Vec::new();
    }
    let mut load = Load::new(groups, replicas);
    let target = groups_per_server(able.len(), replicas as usize);
    let mut wanted = Vec::new();
    while wanted.len() < GROUPS_A_STEP {
        let Some(primary) = able
            .iter()
            .filter(|server| load.primaries(server.id) < target)
            .min_by_key(|server| (load.primaries(server.id), server.id))
        else {
            break;
        };
        let seats = load.followers(primary, &able, replicas as usize);
        let group = record::Group {
            replicas,
            min_copies,
            primary: primary.id.0,
            epoch: 1,
            seats: seats.iter().map(|seat| seat.0).collect(),
            ..Default::default()
        };
        load.add(&group);
        wanted.push(group);
    }
    wanted
}

/// How often each server is used.
struct Load {
    seats: BTreeMap<ServerId, u128>,
    primaries: BTreeMap<ServerId, usize>,
    /// Groups by their members, in order.
    sets: BTreeMap<Vec<ServerId>, usize>,
    /// Sets in which a server is primary.
    led: BTreeMap<ServerId, BTreeSet<Vec<ServerId>>>,
    /// How often two servers are together.
    together: BTreeMap<(ServerId, ServerId), usize>,
}

impl Load {
    fn new(groups: &[Placed], replicas: u32) -> Self {
        let mut load = Self {
            seats: BTreeMap::new(),
            primaries: BTreeMap::new(),
            sets: BTreeMap::new(),
            led: BTreeMap::new(),
            together: BTreeMap::new(),
        };
        for (_, group) in groups.iter().filter(|(_, group)| group.replicas == replicas) {
            load.add(group);
        }
        load
    }

    fn add(&mut self, group: &record::Group) {
        let mut set: Vec<ServerId> = members(group).collect();
        set.sort_unstable();
        for one in &set {
            *self.seats.entry(*one).or_default() += 1;
            for other in set.iter().filter(|other| *other != one) {
                *self.together.entry((*one, *other)).or_default() += 1;
            }
        }
        *self.primaries.entry(ServerId(group.primary)).or_default() += 1;
        self.led.entry(ServerId(group.primary)).or_default().insert(set.clone());
        *self.sets.entry(set).or_default() += 1;
    }

    fn primaries(&self, server: ServerId) -> usize {
        self.primaries.get(&server).copied().unwrap_or_default()
    }

    /// Seats for a group with this primary; seat 0 is the primary's, missing members leave a 0.
    fn followers(&self, primary: &Candidate, able: &[&Candidate], replicas: usize) -> Vec<ServerId> {
        let mut chosen: Vec<&Candidate> = vec![primary];
        if let Some(set) = self.set_to_share(primary, able, replicas) {
            chosen.extend(
                able.iter().copied().filter(|server| server.id != primary.id && set.contains(&server.id)),
            );
        }
        while chosen.len() < replicas {
            let rest =
                able.iter().copied().filter(|server| !chosen.iter().any(|other| other.id == server.id));
            let Some(next) = rest.min_by(|one, other| {
                let rank = |server: &Candidate| {
                    let crowd = chosen.iter().filter(|other| same_zone(other, server)).count();
                    (crowd, self.together.get(&(primary.id, server.id)).copied().unwrap_or_default())
                };
                let load = |server: &Candidate| self.seats.get(&server.id).copied().unwrap_or_default() + 1;
                rank(one)
                    .cmp(&rank(other))
                    // (seats + 1) / weight, compared without division.
                    .then_with(|| (load(one) * other.weight()).cmp(&(load(other) * one.weight())))
                    .then_with(|| one.id.cmp(&other.id))
            }) else {
                break;
            };
            chosen.push(next);
        }
        let mut seats: Vec<ServerId> = chosen.iter().map(|server| server.id).collect();
        seats.resize(replicas, ServerId(0));
        seats
    }

    /// A set that exists already and that this server does not lead yet, as long as it shares none of the zones that
    /// could be told apart. Sharing keeps member sets few.
    fn set_to_share(
        &self,
        primary: &Candidate,
        able: &[&Candidate],
        replicas: usize,
    ) -> Option<&Vec<ServerId>> {
        let zones = able.iter().map(|server| zone(server)).collect::<BTreeSet<_>>().len();
        let led = self.led.get(&primary.id);
        self.sets
            .keys()
            .filter(|set| set.len() == replicas && set.contains(&primary.id))
            .filter(|set| led.is_none_or(|led| !led.contains(*set)))
            .filter(|set| {
                let members: Vec<_> =
                    set.iter().filter_map(|id| able.iter().find(|server| server.id == *id)).collect();
                let spread = members.iter().map(|server| zone(server)).collect::<BTreeSet<_>>().len();
                members.len() == replicas && spread == zones.min(replicas)
            })
            .min_by_key(|set| self.sets.get(*set).copied().unwrap_or_default())
    }
}

fn same_zone(one: &Candidate, other: &Candidate) -> bool {
    !one.zone.is_empty() && one.zone == other.zone
}

fn zone(server: &Candidate) -> (&str, u64) {
    if server.zone.is_empty() { ("", server.id.0) } else { (&server.zone, 0) }
}

/// The best spare server for a seat beside `others`: one that stands in another zone, with the least load for its
/// free space. `seats` tells how many seats each holds.
pub fn spare<'a>(
    servers: &'a [Candidate],
    others: &[ServerId],
    seats: impl Fn(ServerId) -> usize,
) -> Option<&'a Candidate> {
    let beside: Vec<&Candidate> = servers.iter().filter(|server| others.contains(&server.id)).collect();
    servers.iter().filter(|server| server.up && server.has_room() && !others.contains(&server.id)).min_by(
        |one, other| {
            let crowd = |server: &Candidate| beside.iter().filter(|other| same_zone(other, server)).count();
            let load = |server: &Candidate| seats(server.id) as u128 + 1;
            crowd(one)
                .cmp(&crowd(other))
                .then_with(|| (load(one) * other.weight()).cmp(&(load(other) * one.weight())))
                .then_with(|| one.id.cmp(&other.id))
        },
    )
}

/// The group for a grant: its primary lives; all members living first, then at least as many as a write needs; none
/// of the servers to avoid where that can be had; then by chance, weighted by free space and load. `roll` is any
/// number.
pub fn elect(
    servers: &[Candidate],
    groups: &[Placed],
    replicas: u32,
    avoid: &[ServerId],
    roll: u64,
) -> Option<GroupId> {
    let by_id: BTreeMap<ServerId, &Candidate> = servers.iter().map(|server| (server.id, server)).collect();
    let up = |id: &ServerId| by_id.get(id).is_some_and(|server| server.up);
    let able = |id: &ServerId| by_id.get(id).is_some_and(|server| server.up && server.has_room());
    let mut best: Vec<(GroupId, u128)> = Vec::new();
    let mut best_rank = None;
    for (id, group) in groups.iter().filter(|(_, group)| group.replicas == replicas) {
        let primary = ServerId(group.primary);
        let living = members(group).filter(up).count();
        if !able(&primary) || living < group.min_copies.max(1) as usize {
            continue;
        }
        let avoided = members(group).filter(|member| avoid.contains(member)).count();
        let missing = group.replicas as usize - members(group).filter(able).count();
        let rank = (avoid.contains(&primary), missing, avoided);
        if best_rank.is_none_or(|best_rank| rank < best_rank) {
            best_rank = Some(rank);
            best.clear();
        }
        if best_rank == Some(rank) {
            let room =
                members(group).filter_map(|member| by_id.get(&member)).map(|server| server.weight()).min();
            let busy = by_id.get(&primary).map_or(0, |server| server.requests);
            best.push((*id, (room.unwrap_or(1) * 1_000 / (100 + u128::from(busy))).max(1)));
        }
    }
    let total: u128 = best.iter().map(|(_, weight)| weight).sum();
    let mut point = u128::from(roll) * total / (u128::from(u64::MAX) + 1);
    for (id, weight) in &best {
        if point < *weight {
            return Some(*id);
        }
        point -= weight;
    }
    best.last().map(|(id, _)| *id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::invalid;
    use proptest::prelude::*;

    pub(crate) fn server(id: u64, zone: &str) -> Candidate {
        Candidate {
            id: ServerId(id),
            zone: zone.into(),
            total_bytes: 100 << 30,
            free_bytes: 50 << 30,
            requests: 0,
            up: true,
            lost: false,
            draining: false,
        }
    }

    fn numbered(groups: Vec<record::Group>) -> Vec<Placed> {
        groups.into_iter().enumerate().map(|(number, group)| (GroupId(number as u64 + 1), group)).collect()
    }

    #[test]
    fn three_servers_share_one_set_and_each_leads_a_group() {
        let servers = [server(1, ""), server(2, ""), server(3, "")];
        let groups = numbered(wanted(&servers, &[], 3, 2));
        assert_eq!(groups.len(), 3);
        let leaders: BTreeSet<u64> = groups.iter().map(|(_, group)| group.primary).collect();
        assert_eq!(leaders.len(), 3);
        assert!(wanted(&servers, &groups, 3, 2).is_empty(), "nothing more is wanted");
    }

    #[test]
    fn a_dead_servers_load_spreads_over_all_others() {
        let servers: Vec<_> = (1..=7).map(|id| server(id, "")).collect();
        let groups = numbered(wanted(&servers, &[], 3, 2));
        for dead in 1..=7 {
            let mates: BTreeSet<ServerId> = groups
                .iter()
                .filter(|(_, group)| group.primary == dead)
                .flat_map(|(_, group)| members(group).collect::<Vec<_>>())
                .collect();
            assert!(mates.len() >= 5, "server {dead} is together with {mates:?} only");
        }
    }

    #[test]
    fn members_stand_in_different_zones() {
        let servers: Vec<_> = (1..=6).map(|id| server(id, ["a", "b", "c"][id as usize % 3])).collect();
        for group in wanted(&servers, &[], 3, 2) {
            let zones: BTreeSet<_> =
                members(&group).map(|id| servers[id.0 as usize - 1].zone.clone()).collect();
            assert_eq!(zones.len(), 3, "{group:?}");
        }
    }

    #[test]
    fn too_few_servers_make_no_group_and_missing_members_leave_empty_seats() {
        assert!(wanted(&[server(1, "")], &[], 3, 2).is_empty());
        let groups = wanted(&[server(1, ""), server(2, "")], &[], 3, 2);
        assert_eq!(groups.len(), 2);
        assert_eq!(groups[0].seats, [1, 2, 0]);
    }

    #[test]
    fn full_disks_take_nothing() {
        let mut servers = vec![server(1, ""), server(2, ""), server(3, ""), server(4, "")];
        servers[3].free_bytes = 1 << 30;
        let groups = wanted(&servers, &[], 3, 2);
        assert!(groups.iter().all(|group| !group.seats.contains(&4)));
    }

    #[test]
    fn a_grant_avoids_what_the_client_could_not_reach_and_prefers_whole_groups() {
        let mut servers = vec![server(1, ""), server(2, ""), server(3, ""), server(4, "")];
        let groups = numbered(wanted(&servers, &[], 3, 2));
        for roll in [0, 1 << 40, u64::MAX / 2, u64::MAX] {
            let id = elect(&servers, &groups, 3, &[ServerId(1)], roll).unwrap();
            let (_, group) = groups.iter().find(|(other, _)| *other == id).unwrap();
            assert_ne!(group.primary, 1);
        }
        servers[3].up = false;
        for roll in [0, u64::MAX / 3, u64::MAX] {
            let id = elect(&servers, &groups, 3, &[], roll).unwrap();
            let (_, group) = groups.iter().find(|(other, _)| *other == id).unwrap();
            assert!(!group.seats.contains(&4), "a group with all members living exists");
        }
        servers[0].up = false;
        servers[1].up = false;
        assert_eq!(elect(&servers, &groups, 3, &[], 0), None);
    }

    #[test]
    fn free_space_draws_grants() {
        let mut servers = vec![server(1, ""), server(2, "")];
        servers[0].free_bytes = 3 << 30;
        let groups = numbered(wanted(&servers, &[], 1, 1));
        let hits = (0..1_000u64)
            .filter(|step| {
                let id = elect(&servers, &groups, 1, &[], step * (u64::MAX / 1_000)).unwrap();
                groups[id.0 as usize - 1].1.primary == 2
            })
            .count();
        assert!(hits > 850, "the emptier server got {hits} of 1000");
    }

    proptest! {
        #[test]
        fn groups_are_valid_and_every_server_leads(
            zones in proptest::collection::vec(0u8..4, 1..14),
            free in proptest::collection::vec(3u64..1_000, 14),
            replicas in 1u32..6,
        ) {
            let servers: Vec<_> = zones.iter().enumerate().map(|(number, zone)| {
                let mut one = server(number as u64 + 1, if *zone == 0 { "" } else { ["a", "b", "c"][*zone as usize - 1] });
                one.free_bytes = free[number] << 30;
                one
            }).collect();
            let min = crate::cluster::min_copies(replicas);
            let groups = numbered(wanted(&servers, &[], replicas, min));
            prop_assert_eq!(groups.is_empty(), servers.len() < min as usize);
            for (_, group) in &groups {
                prop_assert_eq!(invalid(group), None);
                prop_assert_eq!(members(group).count(), servers.len().min(replicas as usize));
            }
            if !groups.is_empty() {
                for server in &servers {
                    prop_assert!(groups.iter().any(|(_, group)| group.primary == server.id.0));
                }
                let sets: BTreeSet<Vec<u64>> = groups.iter().map(|(_, group)| {
                    let mut set = group.seats.clone();
                    set.sort_unstable();
                    set
                }).collect();
                prop_assert!(sets.len() <= servers.len() * SETS_PER_SERVER);
            }
        }
    }
}
