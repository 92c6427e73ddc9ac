//! The cluster as this server knows it, kept durably: servers, groups with their epochs, carriers of the journal.
//!
//! It never goes back: an older (generation, revision) is refused, and a group never returns to a lower epoch.

use crate::record_file::{self, Kind};
use cairn_proto::{
    Error, Reason, Result,
    id::{Generation, GroupId, Revision, ServerId},
    v1,
};
use disk::Disk;
use std::{collections::HashMap, sync::Arc};
use tokio::sync::watch;

const FILE: Kind =
    Kind { path: "topology", magic: b"CAIRNtop", version: 1, payload_bytes_max: 64 * 1024 * 1024 };

/// One state of the cluster.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Map {
    /// The life of the directory's store that it comes from.
    pub generation: Generation,
    /// Grows with every change within a generation.
    pub revision: Revision,
    /// The servers.
    pub servers: HashMap<ServerId, v1::Server>,
    /// The groups.
    pub groups: HashMap<GroupId, v1::Group>,
    /// The servers that carry the journal.
    pub carriers: Vec<ServerId>,
}

impl Map {
    fn from_wire(wire: &v1::TopologyResponse) -> Self {
        Self {
            generation: Generation(wire.generation),
            revision: Revision(wire.revision),
            servers: wire.servers.iter().map(|server| (ServerId(server.id), server.clone())).collect(),
            groups: wire.groups.iter().map(|group| (GroupId(group.id), group.clone())).collect(),
            carriers: wire.carrier_ids.iter().map(|id| ServerId(*id)).collect(),
        }
    }

    fn to_wire(&self) -> v1::TopologyResponse {
        let mut servers: Vec<_> = self.servers.values().cloned().collect();
        servers.sort_unstable_by_key(|server| server.id);
        let mut groups: Vec<_> = self.groups.values().cloned().collect();
        groups.sort_unstable_by_key(|group| group.id);
        v1::TopologyResponse {
            revision: self.revision.0,
            servers,
            groups,
            cluster_id: String::new(),
            generation: self.generation.0,
            carrier_ids: self.carriers.iter().map(|id| id.0).collect(),
            term: 0,
        }
    }

    /// What follows when `next` arrives; `None` when it is not newer.
    fn advanced(&self, mut next: Map) -> Option<Map> {
        if (next.generation, next.revision) <= (self.generation, self.revision) {
            return None;
        }
        for (id, known) in &self.groups {
            if let Some(group) = next.groups.get_mut(id)
                && group.epoch < known.epoch
            {
                *group = known.clone();
            }
        }
        Some(next)
    }

    /// The servers that hold a seat of a group, in order of seats.
    pub fn members(group: &v1::Group) -> impl Iterator<Item = ServerId> + '_ {
        group.seats.iter().filter(|seat| seat.server_id != 0).map(|seat| ServerId(seat.server_id))
    }

    /// Servers that may hold a group's chunks: the primary, the other members, then former ones.
    pub fn holders(group: &v1::Group) -> Vec<ServerId> {
        let primary = ServerId(group.primary_id);
        let others = Map::members(group).filter(|id| *id != primary);
        let former = group.former_ids.iter().map(|id| ServerId(*id));
        std::iter::once(primary).filter(|id| id.0 != 0).chain(others).chain(former).collect()
    }

    /// `STALE_EPOCH` with the group as it is known here, for a caller that knows something else.
    pub fn stale(&self, group: GroupId, message: String) -> Error {
        let mut error = Error::new(Reason::StaleEpoch, message);
        if let Some(group) = self.groups.get(&group) {
            error.detail.servers =
                Map::members(group).filter_map(|id| self.servers.get(&id).cloned()).collect();
            error.detail.groups = vec![group.clone()];
        }
        error
    }
}

/// How a topology was received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Adopted {
    /// It was newer, and is durable now.
    Yes,
    /// It is the known one.
    Known,
    /// The known one is newer: nothing changed.
    Older,
}

/// The durable map.
#[derive(Debug)]
pub struct Topology {
    disk: Arc<dyn Disk>,
    current: watch::Sender<Arc<Map>>,
    /// Held while the file is written.
    writing: tokio::sync::Mutex<()>,
}

impl Topology {
    /// Reads the map; an empty one for a blank disk.
    ///
    /// # Errors
    /// `IO` when the record is damaged or of another version.
    pub async fn open(disk: Arc<dyn Disk>) -> Result<Self> {
        let wire = record_file::read::<v1::TopologyResponse>(disk.as_ref(), FILE).await?.unwrap_or_default();
        let current = watch::Sender::new(Arc::new(Map::from_wire(&wire)));
        Ok(Self { disk, current, writing: tokio::sync::Mutex::new(()) })
    }

    /// The map as it is now.
    pub fn map(&self) -> Arc<Map> {
        self.current.borrow().clone()
    }

    /// Tells of every new map.
    pub fn watch(&self) -> watch::Receiver<Arc<Map>> {
        self.current.subscribe()
    }

    /// Takes a newer map over; durable on return, and not seen by anybody before.
    ///
    /// # Errors
    /// `NO_SPACE` or `IO`, with nothing changed.
    pub async fn adopt(&self, wire: &v1::TopologyResponse) -> Result<Adopted> {
        let _writing = self.writing.lock().await;
        let known = self.map();
        let next = Map::from_wire(wire);
        let order = (next.generation, next.revision).cmp(&(known.generation, known.revision));
        let Some(next) = known.advanced(next) else {
            return Ok(if order.is_eq() { Adopted::Known } else { Adopted::Older });
        };
        record_file::write(self.disk.as_ref(), FILE, &next.to_wire()).await?;
        self.current.send_replace(Arc::new(next));
        Ok(Adopted::Yes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use disk::{CrashKeep, SimDisk};
    use proptest::prelude::*;

    fn wire(generation: u64, revision: u64, epoch: u64) -> v1::TopologyResponse {
        let group = v1::Group { id: 9, epoch, ..Default::default() };
        v1::TopologyResponse { generation, revision, groups: vec![group], ..Default::default() }
    }

    #[tokio::test]
    async fn it_survives_a_crash_and_never_goes_back() {
        let disk = SimDisk::new(1, 1 << 20);
        let topology = Topology::open(Arc::new(disk.clone())).await.unwrap();
        assert_eq!(topology.adopt(&wire(1, 5, 2)).await.unwrap(), Adopted::Yes);
        assert_eq!(topology.adopt(&wire(1, 5, 2)).await.unwrap(), Adopted::Known);
        assert_eq!(topology.adopt(&wire(1, 4, 3)).await.unwrap(), Adopted::Older);
        disk.crash(CrashKeep::Nothing);
        let again = Topology::open(Arc::new(disk)).await.unwrap();
        assert_eq!(again.map(), topology.map());
        assert_eq!(again.adopt(&wire(2, 1, 1)).await.unwrap(), Adopted::Yes, "a higher generation is newer");
        assert_eq!(again.map().groups[&GroupId(9)].epoch, 2, "but no group goes back");
    }

    proptest! {
        #[test]
        fn neither_the_map_nor_an_epoch_goes_back(steps in prop::collection::vec((0..4u64, 0..6u64, 0..6u64), 1..40)) {
            let mut map = Map::default();
            for (generation, revision, epoch) in steps {
                let before = map.clone();
                if let Some(next) = map.advanced(Map::from_wire(&wire(generation, revision, epoch))) {
                    map = next;
                }
                prop_assert!((map.generation, map.revision) >= (before.generation, before.revision));
                let epoch_of = |map: &Map| map.groups.get(&GroupId(9)).map_or(0, |group| group.epoch);
                prop_assert!(epoch_of(&map) >= epoch_of(&before));
            }
        }
    }
}
