//! Who holds which seat, and who is primary: what follows for a group from what became of its members.
//!
//! Each decision is the group's next record, with its epoch one higher. A member that lost its seat is remembered as
//! `former` until its copies are known to be surplus: they stay a source for its successor.
//!
//! 1. A group of fewer copies than the cluster's factor is raised, once there are servers for all new seats; save one
//!    that was made for files which ask for fewer.
//! 2. A dead, gone or draining member's seat goes to a spare server with room, in another zone where that can be had.
//!    Without a spare the seat stays: the dead may come back.
//! 3. An empty seat is filled likewise.
//! 4. A primary that is not up hands its role to a member that is; with copies verified where there is one.

use super::{Candidate, Placed, is_member, members, placement::spare};
use crate::record;
use cairn_proto::id::{GroupId, ServerId};
use std::collections::BTreeMap;

/// What decisions on seats rest on.
#[derive(Debug)]
pub struct Context<'a> {
    /// All servers.
    pub servers: &'a [Candidate],
    /// Seats held, by server.
    pub seats: &'a BTreeMap<ServerId, usize>,
    /// Groups led, by server.
    pub primaries: &'a BTreeMap<ServerId, usize>,
    /// The cluster's factor; groups of fewer copies are raised to it.
    pub factor: u32,
    /// Copies that a write needs in a raised group.
    pub min_copies: u32,
    /// All members hold all they should, as far as is known: a draining member's seat may move.
    pub settled: bool,
}

impl Context<'_> {
    fn server(&self, id: ServerId) -> Option<&Candidate> {
        self.servers.iter().find(|server| server.id == id)
    }

    fn spare(&self, beside: &[ServerId]) -> Option<ServerId> {
        let seats = |id| self.seats.get(&id).copied().unwrap_or_default();
        spare(self.servers, beside, seats).map(|server| server.id)
    }

    /// Whether a member's seat should go to another.
    fn leaves(&self, member: ServerId) -> bool {
        self.server(member).is_none_or(|server| server.lost || (server.draining && self.settled))
    }
}

/// The group's next record, and why; `None` when everything is as it should be or cannot be made better.
/// `holds` tells of which members all copies are verified.
pub fn change(
    group: &record::Group,
    context: &Context<'_>,
    holds: impl Fn(ServerId) -> bool,
) -> Option<(record::Group, &'static str)> {
    let mut next = group.clone();
    let mut why = None;
    if group.replicas < context.factor && !group.fixed && raise(&mut next, context) {
        why = Some("more servers joined");
    }
    for number in 0..next.seats.len() {
        let holder = ServerId(next.seats[number]);
        if holder.0 != 0 && !context.leaves(holder) {
            continue;
        }
        let beside: Vec<ServerId> = members(&next).collect();
        let Some(newcomer) = context.spare(&beside) else { continue };
        next.seats[number] = newcomer.0;
        next.former.retain(|former| *former != newcomer.0);
        if holder.0 != 0 {
            next.former.push(holder.0);
            why = why.or(Some("a member was lost or is being emptied"));
            // One at a time where the member still serves: its successor catches up first.
            if context.server(holder).is_some_and(|server| !server.lost) {
                break;
            }
        }
        why = why.or(Some("a seat was empty"));
    }
    let primary = ServerId(next.primary);
    let primary_up = context.server(primary).is_some_and(|server| server.up);
    if !is_member(&next, primary) || !primary_up {
        let heir = members(&next)
            .filter(|member| *member != primary && context.server(*member).is_some_and(|server| server.up))
            .min_by_key(|member| {
                (!holds(*member), context.primaries.get(member).copied().unwrap_or(0), *member)
            });
        match heir {
            Some(heir) => {
                next.primary = heir.0;
                why = why.or(Some("the primary fell silent"));
            }
            // Nobody could take the role: whoever holds it keeps it as long as it has a seat.
            None if !is_member(&next, primary) => return None,
            None => {}
        }
    }
    let why = why?;
    next.epoch += 1;
    Some((next, why))
}

/// Adds seats up to the factor and fills them; `false` when there are not enough servers for all.
fn raise(next: &mut record::Group, context: &Context<'_>) -> bool {
    let mut raised = next.clone();
    for _ in raised.replicas..context.factor {
        let beside: Vec<ServerId> = members(&raised).collect();
        let Some(newcomer) = context.spare(&beside) else { return false };
        raised.seats.push(newcomer.0);
        raised.former.retain(|former| *former != newcomer.0);
    }
    raised.replicas = context.factor;
    raised.min_copies = raised.min_copies.max(context.min_copies);
    *next = raised;
    true
}

/// Gives a server that leads no group of a factor the primary role of one in which it is a member and holds all
/// copies, from a primary that leads several.
pub fn rebalance(
    groups: &[Placed],
    servers: &[Candidate],
    holds: impl Fn(GroupId, ServerId) -> bool,
) -> Option<(GroupId, record::Group)> {
    let mut led: BTreeMap<(u32, u64), usize> = BTreeMap::new();
    for (_, group) in groups {
        *led.entry((group.replicas, group.primary)).or_default() += 1;
    }
    let count = |replicas: u32, server: u64| led.get(&(replicas, server)).copied().unwrap_or_default();
    for server in servers.iter().filter(|server| server.up && server.has_room()) {
        let best = groups
            .iter()
            .filter(|(id, group)| {
                is_member(group, server.id)
                    && count(group.replicas, server.id.0) == 0
                    && holds(*id, server.id)
            })
            .filter(|(_, group)| count(group.replicas, group.primary) > 1)
            .max_by_key(|(id, group)| (count(group.replicas, group.primary), std::cmp::Reverse(*id)));
        if let Some((id, group)) = best {
            let next = record::Group { primary: server.id.0, epoch: group.epoch + 1, ..group.clone() };
            return Some((*id, next));
        }
    }
    None
}

/// The cluster's factor with so many servers up: an operator's, or as many as there are up to the default. Raised,
/// never lowered.
pub fn factor(settings: &record::Settings, servers_up: usize) -> u32 {
    if settings.replication_fixed {
        return settings.replication;
    }
    let possible =
        u32::try_from(servers_up).unwrap_or(u32::MAX).min(cairn_proto::limits::REPLICATION_DEFAULT);
    settings.replication.max(possible)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::{invalid, min_copies};
    use proptest::prelude::*;

    fn server(id: u64) -> Candidate {
        Candidate {
            id: ServerId(id),
            zone: String::new(),
            total_bytes: 100 << 30,
            free_bytes: 50 << 30,
            requests: 0,
            up: true,
            lost: false,
            draining: false,
        }
    }

    fn group(seats: &[u64]) -> record::Group {
        let replicas = seats.len() as u32;
        record::Group {
            replicas,
            min_copies: min_copies(replicas),
            seats: seats.to_vec(),
            primary: seats[0],
            epoch: 4,
            ..Default::default()
        }
    }

    fn decide(
        group: &record::Group,
        servers: &[Candidate],
        factor: u32,
        settled: bool,
    ) -> Option<record::Group> {
        let context = Context {
            servers,
            seats: &BTreeMap::new(),
            primaries: &BTreeMap::new(),
            factor,
            min_copies: min_copies(factor),
            settled,
        };
        change(group, &context, |_| true).map(|(next, _)| next)
    }

    #[test]
    fn a_suspect_primary_hands_its_role_on_and_keeps_its_seat() {
        let mut servers = [server(1), server(2), server(3)];
        assert_eq!(decide(&group(&[1, 2, 3]), &servers, 3, true), None);
        servers[0].up = false;
        let next = decide(&group(&[1, 2, 3]), &servers, 3, true).unwrap();
        assert_eq!((next.seats.as_slice(), next.primary, next.epoch), ([1, 2, 3].as_slice(), 2, 5));
    }

    #[test]
    fn a_dead_members_seat_goes_to_a_spare_server_or_waits_for_one() {
        let mut servers = vec![server(1), server(2), server(3)];
        (servers[2].up, servers[2].lost) = (false, true);
        assert_eq!(decide(&group(&[1, 2, 3]), &servers, 3, true), None);
        servers.push(server(4));
        let next = decide(&group(&[1, 2, 3]), &servers, 3, false).unwrap();
        assert_eq!((next.seats.as_slice(), next.former.as_slice()), ([1, 2, 4].as_slice(), [3].as_slice()));
    }

    #[test]
    fn a_draining_member_waits_until_the_others_are_whole() {
        let mut servers = vec![server(1), server(2), server(3), server(4)];
        (servers[0].up, servers[0].draining) = (false, true);
        let waiting = decide(&group(&[1, 2, 3]), &servers, 3, false).unwrap();
        assert_eq!((waiting.seats.as_slice(), waiting.primary), ([1, 2, 3].as_slice(), 2));
        let moved = decide(&waiting, &servers, 3, true).unwrap();
        assert_eq!((moved.seats.as_slice(), moved.former.as_slice()), ([4, 2, 3].as_slice(), [1].as_slice()));
    }

    #[test]
    fn groups_grow_with_the_cluster_and_a_write_needs_a_majority_then() {
        let servers = [server(1), server(2)];
        assert_eq!(decide(&group(&[1]), &servers, 3, true), None, "not enough servers yet");
        let servers = [server(1), server(2), server(3)];
        let next = decide(&group(&[1]), &servers, 3, true).unwrap();
        assert_eq!((next.replicas, next.min_copies, next.seats.len(), next.primary), (3, 2, 3, 1));
        let asked_for = record::Group { fixed: true, ..group(&[1]) };
        assert_eq!(decide(&asked_for, &servers, 3, true), None, "its files ask for one copy");
        assert_eq!(invalid(&next), None);
    }

    #[test]
    fn a_server_that_leads_nothing_gets_a_role_from_one_that_leads_much() {
        let servers = [server(1), server(2), server(3)];
        let groups = vec![(GroupId(1), group(&[1, 2, 3])), (GroupId(2), group(&[1, 3, 2]))];
        let (id, next) = rebalance(&groups, &servers, |_, _| true).unwrap();
        assert_eq!((id, next.primary), (GroupId(1), 2));
        assert_eq!(rebalance(&groups, &servers, |_, _| false), None, "its copies are not verified");
    }

    #[test]
    fn the_factor_only_grows_unless_it_is_fixed() {
        let mut settings = record::Settings { replication: 2, ..Default::default() };
        assert_eq!((factor(&settings, 1), factor(&settings, 3), factor(&settings, 9)), (2, 3, 3));
        settings.replication_fixed = true;
        assert_eq!(factor(&settings, 9), 2);
    }

    proptest! {
        #[test]
        fn whatever_happens_groups_stay_valid_and_epochs_grow(
            events in proptest::collection::vec((0usize..8, 0u8..6, any::<bool>()), 1..80),
            start in 1usize..4,
        ) {
            let mut servers: Vec<_> = (1..=8).map(server).collect();
            for late in &mut servers[start..] { late.up = false; }
            let mut current = group(&(1..=start as u64).collect::<Vec<_>>());
            for (number, event, settled) in events {
                let one = &mut servers[number];
                match event {
                    0 => (one.up, one.lost) = (false, false),
                    1 => (one.up, one.lost) = (false, true),
                    2 => (one.up, one.draining) = (false, true),
                    3 => one.free_bytes = 0,
                    _ => (one.up, one.lost, one.draining, one.free_bytes) = (true, false, false, 50 << 30),
                }
                if let Some(next) = decide(&current, &servers, 3, settled) {
                    prop_assert_eq!(invalid(&next), None);
                    prop_assert_eq!(next.epoch, current.epoch + 1);
                    prop_assert!(next.replicas >= current.replicas);
                    prop_assert_eq!(next.min_copies, min_copies(next.replicas));
                    prop_assert!(next.former.iter().all(|former| !next.seats.contains(former)));
                    for seat in &next.seats {
                        let kept = current.seats.contains(seat);
                        prop_assert!(*seat == 0 || kept || servers[*seat as usize - 1].up);
                    }
                    current = next;
                }
            }
        }
    }
}
