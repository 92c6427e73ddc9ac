//! Rules of the cluster: what a server's silence means, where groups and grants go, who holds which seat, when seats move
//! so that a new server takes its share, what a server's inventory tells, what is repaired first, and how several
//! directories share one store.

pub mod balance;
pub mod carriers;
pub mod compare;
pub mod directories;
pub mod follow;
pub mod placement;
pub mod repair;
pub mod seats;
pub mod server;

use crate::record;
use cairn_proto::id::{GroupId, ServerId};

/// A server as placement sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Its id.
    pub id: ServerId,
    /// Its failure domain; empty means one of its own.
    pub zone: String,
    /// Its disk.
    pub total_bytes: u64,
    /// Free on its disk.
    pub free_bytes: u64,
    /// Requests under way.
    pub requests: u32,
    /// It lives, and nobody asked to empty it.
    pub up: bool,
    /// It was declared dead, or is gone for good.
    pub lost: bool,
    /// An operator asked to empty it.
    pub draining: bool,
}

/// A disk with less than a fiftieth free takes nothing new.
const ROOM_SHARE: u64 = 50;

impl Candidate {
    /// Whether it may take new seats and chunks.
    pub fn has_room(&self) -> bool {
        self.total_bytes == 0 || self.free_bytes >= self.total_bytes / ROOM_SHARE
    }

    /// How much it should hold compared with others: its free space in MiB, at least 1.
    fn weight(&self) -> u128 {
        u128::from((self.free_bytes >> 20).max(1))
    }
}

/// A group with its id.
pub type Placed = (GroupId, record::Group);

/// Copies that must be durable before an acknowledgement, of a factor.
pub fn min_copies(factor: u32) -> u32 {
    factor / 2 + 1
}

/// The members of a group, by seat, without empty seats.
pub fn members(group: &record::Group) -> impl Iterator<Item = ServerId> + '_ {
    group.seats.iter().filter(|seat| **seat != 0).map(|seat| ServerId(*seat))
}

/// Whether a server holds a seat.
pub fn is_member(group: &record::Group, server: ServerId) -> bool {
    server.0 != 0 && group.seats.contains(&server.0)
}

/// What is wrong with a group that must never be so: a server on two seats, seats that are not as many as copies, a
/// primary without a seat.
pub fn invalid(group: &record::Group) -> Option<String> {
    let mut seats: Vec<u64> = group.seats.iter().copied().filter(|seat| *seat != 0).collect();
    seats.sort_unstable();
    if seats.windows(2).any(|pair| pair[0] == pair[1]) {
        return Some("a server holds two seats".into());
    }
    if group.seats.len() != group.replicas as usize {
        return Some(format!("{} seats for {} copies", group.seats.len(), group.replicas));
    }
    if group.primary == 0 || !group.seats.contains(&group.primary) {
        return Some(format!("primary {} holds no seat", group.primary));
    }
    None
}
