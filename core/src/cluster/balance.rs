//! A new server takes its share: seats move from the fullest servers to much emptier ones.
//!
//! A server's *load* is the bytes of live chunks of the groups in which it has a seat; its *share* is that load by the
//! size of its disk. The load is reckoned from the records and not from what disks report: it follows a move at once,
//! and garbage or other programs' files on a disk move no seat.
//!
//! A seat moves as it does when its holder is drained ([`super::seats`]): the newcomer takes the seat with the next
//! epoch, fetches everything, and the server before it is `former` until all members are known to hold all; its copies
//! count until then. One seat of the whole cluster moves at a time, and none while anything is missing, silent, unknown
//! or being drained: whoever asks [`next`] says so. So balancing never competes with a repair.
//!
//! Which seat: of the fullest server that one can be taken from, to the emptiest that may take it, the largest that fits.
//!
//! - *Ends, never swings:* a move may not make the taker's share larger than what the giver keeps. Each move therefore
//!   lowers the sum of load * share, which has finitely many values for given groups: [`next`] comes to `None`, and no
//!   move is the reverse of one before. What users write meanwhile does not start it again unless shares differ by more
//!   than the tolerance.
//! - *Tolerance:* it begins only for a giver that has a tenth of its load and the given number of bytes more
//!   than the taker would have at the same share, and a seat of a sixteenth of that difference at least. It ends when no
//!   single seat fits: a seat is all bytes of a group, so shares may go on to differ by up to one group's bytes.
//! - *Never worse:* the group's members stand in as many zones as before, the number of copies stays, and the taker has
//!   room for the bytes and a tenth of its disk beside.
//!
//! Groups are few in a small cluster: three servers of three copies have three groups with nine seats. A fourth server
//! takes two of the nine (22 % of all copies; 25 % would be even), and leads groups of its own for new data.

use super::{Candidate, Placed, is_member, members};
use crate::record;
use cairn_proto::id::{GroupId, ServerId};
use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
};

/// Loads closer than this part of the fuller one are even.
const TOLERANCE: u128 = 10;
/// Seats smaller than this part of the difference are not worth a move.
const CRUMB: u128 = 16;
/// What stays free on the taker's disk: one part in so many.
const SPARE_SHARE: u64 = 10;

/// A seat that should go to another server.
#[derive(Clone, Debug, PartialEq)]
pub struct Move {
    /// The group.
    pub group: GroupId,
    /// Who gives the seat.
    pub from: ServerId,
    /// Who takes it.
    pub to: ServerId,
    /// The group's next record.
    pub next: record::Group,
}

/// The next seat to move; `None` when loads are even as far as can be. `bytes` tells the live bytes of a group, of one
/// copy; differences of at most `ignored_bytes` are left. To be asked only while every member of every group is known
/// to hold everything and no seat is on its way.
pub fn next(
    servers: &[Candidate],
    groups: &[Placed],
    bytes: impl Fn(GroupId) -> u64,
    ignored_bytes: u64,
) -> Option<Move> {
    let mut loads: BTreeMap<ServerId, u128> = BTreeMap::new();
    for (id, group) in groups {
        for member in members(group) {
            *loads.entry(member).or_default() += u128::from(bytes(*id));
        }
    }
    let load = |server: &Candidate| loads.get(&server.id).copied().unwrap_or_default();
    let size = |server: &Candidate| u128::from(server.total_bytes);
    let mut able: Vec<&Candidate> =
        servers.iter().filter(|server| server.up && server.total_bytes > 0).collect();
    // By share, compared without division.
    able.sort_by(|one, other| {
        (load(one) * size(other)).cmp(&(load(other) * size(one))).then(one.id.cmp(&other.id))
    });
    for from in able.iter().rev() {
        for to in able.iter().filter(|to| to.id != from.id && to.has_room()) {
            // What the giver has more than it would at the taker's share.
            let excess = load(from).saturating_sub(load(to) * size(from) / size(to));
            if excess <= u128::from(ignored_bytes) || excess * TOLERANCE <= load(from) {
                break;
            }
            let fits = |seat: u128| {
                seat * CRUMB >= excess
                    && (load(to) + seat) * size(from) <= (load(from) - seat) * size(to)
                    && u128::from(to.free_bytes) >= seat + u128::from(to.total_bytes / SPARE_SHARE)
            };
            let best = groups
                .iter()
                .filter(|(_, group)| is_member(group, from.id) && !is_member(group, to.id))
                .filter(|(id, _)| fits(u128::from(bytes(*id))))
                .filter_map(|(id, group)| Some((*id, group, moved(group, from.id, to.id)?)))
                .filter(|(_, group, next)| zones(servers, next) >= zones(servers, group))
                // Rather a seat that leads nothing: no writer has to go elsewhere.
                .max_by_key(|(id, group, _)| (group.primary != from.id.0, bytes(*id), Reverse(*id)));
            if let Some((group, _, next)) = best {
                return Some(Move { group, from: from.id, to: to.id, next });
            }
        }
    }
    None
}

/// The group with a seat given on. The role of a primary that leaves goes to the first member that stays.
fn moved(group: &record::Group, from: ServerId, to: ServerId) -> Option<record::Group> {
    let mut next = group.clone();
    let seat = next.seats.iter_mut().find(|seat| **seat == from.0)?;
    *seat = to.0;
    next.former.retain(|former| *former != to.0);
    next.former.push(from.0);
    if next.primary == from.0 {
        let heir = members(&next).find(|member| *member != to);
        next.primary = heir.unwrap_or(to).0;
    }
    next.epoch += 1;
    Some(next)
}

/// In how many zones the members stand; a server without a zone is one of its own.
fn zones(servers: &[Candidate], group: &record::Group) -> usize {
    let zone = |id: ServerId| {
        let zone = servers.iter().find(|server| server.id == id).map(|server| server.zone.as_str());
        match zone {
            Some(zone) if !zone.is_empty() => (zone, ServerId(0)),
            _ => ("", id),
        }
    };
    members(group).map(zone).collect::<BTreeSet<_>>().len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::{invalid, min_copies};
    use proptest::prelude::*;

    const GIB: u64 = 1 << 30;

    fn server(id: u64, zone: &str, size: u64) -> Candidate {
        Candidate {
            id: ServerId(id),
            zone: zone.into(),
            total_bytes: size,
            free_bytes: size,
            requests: 0,
            up: true,
            lost: false,
            draining: false,
        }
    }

    fn group(id: u64, seats: &[u64]) -> Placed {
        let replicas = seats.len() as u32;
        let group = record::Group {
            replicas,
            min_copies: min_copies(replicas),
            seats: seats.to_vec(),
            primary: seats[0],
            epoch: 1,
            ..Default::default()
        };
        (GroupId(id), group)
    }

    fn seats_of(groups: &[Placed], server: u64) -> usize {
        groups.iter().filter(|(_, group)| is_member(group, ServerId(server))).count()
    }

    /// Moves until nothing is left to move, each seat's former holder forgotten; answers the moves.
    fn settle(
        servers: &[Candidate],
        groups: &mut [Placed],
        bytes: impl Fn(GroupId) -> u64 + Copy,
        ignored: u64,
    ) -> Vec<Move> {
        let mut moves = Vec::new();
        while let Some(one) = next(servers, groups, bytes, ignored) {
            assert!(moves.len() < 10_000, "it does not end");
            let (_, group) = groups.iter_mut().find(|(id, _)| *id == one.group).unwrap();
            *group = record::Group { former: Vec::new(), ..one.next.clone() };
            moves.push(one);
        }
        moves
    }

    #[test]
    fn a_fourth_server_takes_two_of_nine_seats() {
        let servers: Vec<_> = (1..=4).map(|id| server(id, "", 100 * GIB)).collect();
        let mut groups = vec![group(1, &[1, 2, 3]), group(2, &[2, 3, 1]), group(3, &[3, 1, 2])];
        let moves = settle(&servers, &mut groups, |_| GIB, 0);
        assert_eq!(moves.len(), 2);
        assert!(moves.iter().all(|one| one.to == ServerId(4) && one.next.former == [one.from.0]));
        let held: Vec<usize> = (1..=4).map(|id| seats_of(&groups, id)).collect();
        assert_eq!((held[3], held.iter().sum::<usize>()), (2, 9));
        assert!(groups.iter().all(|(_, group)| group.primary != 4), "no writer had to go elsewhere");
    }

    #[test]
    fn what_differs_little_or_would_only_swap_sides_stays() {
        let servers = [server(1, "", 100 * GIB), server(2, "", 100 * GIB)];
        let one = [group(1, &[1])];
        assert_eq!(next(&servers, &one, |_| GIB, 0), None, "the taker would be the fuller one");
        let many: Vec<_> = (1..=21).map(|id| group(id, &[1 + u64::from(id > 11)])).collect();
        assert_eq!(next(&servers, &many, |_| GIB, 0), None, "11 and 10 are even");
        let few = [group(1, &[1]), group(2, &[1])];
        assert_eq!(next(&servers, &few, |_| GIB, 2 * GIB), None, "the operator does not mind");
        assert!(next(&servers, &few, |_| GIB, 2 * GIB - 1).is_some());
        assert_eq!(next(&servers, &few, |_| 0, 0), None, "there is nothing to move");
    }

    #[test]
    fn a_larger_disk_takes_more_and_a_full_one_nothing() {
        let mut servers = [server(1, "", 100 * GIB), server(2, "", 300 * GIB)];
        let groups: Vec<_> = (1..=8).map(|id| group(id, &[1])).collect();
        let mut even = groups.clone();
        settle(&servers, &mut even, |_| GIB, 0);
        assert_eq!((seats_of(&even, 1), seats_of(&even, 2)), (2, 6));
        servers[1].free_bytes = 30 * GIB;
        assert_eq!(next(&servers, &groups, |_| GIB, 0), None, "a tenth stays free");
        (servers[1].free_bytes, servers[1].up) = (300 * GIB, false);
        assert_eq!(next(&servers, &groups, |_| GIB, 0), None, "it is silent");
    }

    #[test]
    fn zones_are_not_given_up_for_evenness() {
        let servers = [
            server(1, "a", 100 * GIB),
            server(2, "b", 100 * GIB),
            server(3, "c", 100 * GIB),
            server(4, "a", 100 * GIB),
        ];
        let mut groups = vec![group(1, &[1, 2, 3]), group(2, &[2, 3, 1]), group(3, &[3, 1, 2])];
        let moves = settle(&servers, &mut groups, |_| GIB, 0);
        assert!(!moves.is_empty() && moves.iter().all(|one| one.from == ServerId(1)), "{moves:?}");
        assert!(groups.iter().all(|(_, group)| zones(&servers, group) == 3));
    }

    #[test]
    fn a_primary_that_gives_its_seat_hands_its_role_to_one_that_stays() {
        let servers = [server(1, "", GIB), server(2, "", GIB), server(3, "", GIB)];
        let mut groups = vec![group(1, &[1, 2]), group(2, &[1, 2])];
        groups[1].1.primary = 1;
        let one = next(&servers, &groups, |_| GIB / 100, 0).unwrap();
        assert_eq!(invalid(&one.next), None);
        let led = next(&servers, &[group(1, &[1]), group(2, &[1])], |_| GIB / 100, 0).unwrap();
        assert_eq!((led.next.seats.as_slice(), led.next.primary), ([2].as_slice(), 2), "nobody else stays");
    }

    proptest! {
        #[test]
        fn it_ends_even_and_gives_up_neither_zones_nor_copies(
            sizes in proptest::collection::vec(1u64..50, 2..10),
            zoned in proptest::collection::vec(0usize..4, 10),
            shape in proptest::collection::vec((0u64..1_000_000, 0usize..10_000), 1..40),
            replicas in 1usize..4,
            ignored in 0u64..100_000,
        ) {
            let servers: Vec<_> = sizes.iter().enumerate().map(|(number, size)| {
                server(number as u64 + 1, ["", "a", "b", "c"][zoned[number]], size * GIB)
            }).collect();
            let replicas = replicas.min(servers.len());
            let weights: Vec<u64> = shape.iter().map(|(bytes, _)| *bytes).collect();
            let mut groups: Vec<Placed> = shape.iter().enumerate().map(|(number, (_, first))| {
                // Uneven on purpose: most seats are on the first servers.
                let first = (first % servers.len()) / 2;
                let seats: Vec<u64> = (0..replicas).map(|seat| ((first + seat) % servers.len()) as u64 + 1).collect();
                group(number as u64 + 1, &seats)
            }).collect();
            let before = groups.clone();
            let bytes = |id: GroupId| weights[id.0 as usize - 1];
            let loads = |groups: &[Placed]| -> BTreeMap<u64, u128> {
                servers.iter().map(|server| {
                    let held = groups.iter().filter(|(_, group)| is_member(group, server.id));
                    (server.id.0, held.map(|(id, _)| u128::from(bytes(*id))).sum())
                }).collect()
            };
            let moves = settle(&servers, &mut groups, bytes, ignored);
            let mut trying = before.clone();
            for one in &moves {
                let share = |loads: &BTreeMap<u64, u128>, id: ServerId| {
                    loads[&id.0] as f64 / servers[id.0 as usize - 1].total_bytes as f64
                };
                let then = loads(&trying);
                let (_, group) = trying.iter_mut().find(|(id, _)| *id == one.group).unwrap();
                prop_assert_eq!(one.next.epoch, group.epoch + 1);
                *group = record::Group { former: Vec::new(), ..one.next.clone() };
                let now = loads(&trying);
                prop_assert!(share(&then, one.from) > share(&then, one.to));
                prop_assert!(share(&now, one.to) <= share(&now, one.from) + 1e-9, "it swings");
            }
            for ((_, was), (_, is)) in before.iter().zip(&groups) {
                prop_assert_eq!(invalid(is), None);
                prop_assert_eq!(members(is).count(), members(was).count());
                prop_assert!(zones(&servers, is) >= zones(&servers, was));
            }
            prop_assert_eq!(next(&servers, &groups, bytes, ignored), None);
            // Where zones do not bind, no seat is left that would fit within the tolerance.
            if zoned.iter().all(|zone| *zone == 0) {
                let now = loads(&groups);
                for from in &servers {
                    for to in servers.iter().filter(|to| to.id != from.id) {
                        let excess = now[&from.id.0]
                            .saturating_sub(now[&to.id.0] * u128::from(from.total_bytes) / u128::from(to.total_bytes));
                        let even = excess <= u128::from(ignored) || excess * TOLERANCE <= now[&from.id.0];
                        let stuck = groups.iter()
                            .filter(|(_, group)| is_member(group, from.id) && !is_member(group, to.id))
                            .all(|(id, _)| {
                                let seat = u128::from(bytes(*id));
                                seat * CRUMB < excess
                                    || (now[&to.id.0] + seat) * u128::from(from.total_bytes)
                                        > (now[&from.id.0] - seat) * u128::from(to.total_bytes)
                            });
                        prop_assert!(even || stuck);
                    }
                }
            }
        }
    }
}
