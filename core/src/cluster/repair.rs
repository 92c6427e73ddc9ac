//! What is copied next, from where to where.
//!
//! Chunks with the fewest copies come first: a chunk with one copy is one death away from being lost. Each server
//! takes part in a bounded number of orders at a time, so that repair yields to what users wait for.

use cairn_proto::id::{ChunkId, GroupId, ServerId};
use std::collections::BTreeMap;

/// A chunk of which copies are missing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gap {
    /// The chunk.
    pub chunk: ChunkId,
    /// Length in bytes.
    pub length: u64,
    /// Checksum of all bytes.
    pub checksum: u64,
    /// Its group.
    pub group: GroupId,
    /// Reachable servers that hold a good copy, primary first.
    pub sources: Vec<ServerId>,
    /// Reachable members that miss it.
    pub targets: Vec<ServerId>,
}

/// Chunks that one server fetches from another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    /// Who fetches.
    pub target: ServerId,
    /// From whom.
    pub source: ServerId,
    /// The group.
    pub group: GroupId,
    /// Which chunks: positions in the gaps that were given.
    pub gaps: Vec<usize>,
}

/// Bounds of the work under way.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Orders that a server takes part in, as source or target.
    pub orders_a_server: usize,
    /// Chunks of an order.
    pub chunks_an_order: usize,
    /// Bytes of an order.
    pub bytes_an_order: u64,
}

/// The next orders. `busy` counts the orders under way by server; a gap with no source is an obstacle and left out.
pub fn plan(gaps: &[Gap], busy: &BTreeMap<ServerId, usize>, bounds: Bounds) -> Vec<Order> {
    let mut busy = busy.clone();
    let mut urgent: Vec<usize> = (0..gaps.len()).collect();
    urgent.sort_by_key(|number| (gaps[*number].sources.len(), gaps[*number].chunk));
    let mut orders: Vec<(Order, u64)> = Vec::new();
    for number in urgent {
        let gap = &gaps[number];
        for target in &gap.targets {
            let joined = orders.iter_mut().find(|(order, bytes)| {
                order.target == *target
                    && order.group == gap.group
                    && gap.sources.contains(&order.source)
                    && order.gaps.len() < bounds.chunks_an_order
                    && bytes.saturating_add(gap.length) <= bounds.bytes_an_order
            });
            if let Some((order, bytes)) = joined {
                order.gaps.push(number);
                *bytes += gap.length;
                continue;
            }
            let load = |server: &ServerId| busy.get(server).copied().unwrap_or_default();
            if load(target) >= bounds.orders_a_server {
                continue;
            }
            let source = gap
                .sources
                .iter()
                .filter(|source| *source != target && load(source) < bounds.orders_a_server)
                .min_by_key(|source| load(source));
            let Some(source) = source.copied() else { continue };
            *busy.entry(source).or_default() += 1;
            *busy.entry(*target).or_default() += 1;
            orders
                .push((Order { target: *target, source, group: gap.group, gaps: vec![number] }, gap.length));
        }
    }
    orders.into_iter().map(|(order, _)| order).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BOUNDS: Bounds = Bounds { orders_a_server: 2, chunks_an_order: 3, bytes_an_order: 1_000 };

    fn gap(index: u32, sources: &[u64], targets: &[u64]) -> Gap {
        Gap {
            chunk: ChunkId::new(1, index),
            length: 100,
            checksum: 0,
            group: GroupId(1),
            sources: sources.iter().copied().map(ServerId).collect(),
            targets: targets.iter().copied().map(ServerId).collect(),
        }
    }

    #[test]
    fn the_fewest_copies_come_first() {
        let gaps = [gap(0, &[1, 2], &[3]), gap(1, &[2], &[1, 3]), gap(2, &[], &[1, 2, 3])];
        let orders = plan(&gaps, &BTreeMap::new(), BOUNDS);
        assert_eq!(orders[0].gaps[0], 1);
        assert!(orders.iter().all(|order| !order.gaps.contains(&2)), "nothing can be fetched from nowhere");
        assert!(orders.iter().any(|order| order.gaps.contains(&0)));
    }

    proptest! {
        #[test]
        fn orders_keep_their_bounds_and_name_true_sources(
            shape in proptest::collection::vec((0u8..16, 0u8..16, 1u64..2_000), 0..40),
            already in proptest::collection::vec(0usize..4, 4),
        ) {
            let gaps: Vec<Gap> = shape.iter().enumerate().map(|(index, (have, miss, length))| {
                let of = |mask: u8| (0..4u64).filter(|bit| mask & (1 << bit) != 0).map(|bit| bit + 1).collect::<Vec<_>>();
                Gap { length: *length, ..gap(index as u32, &of(*have), &of(miss & !have)) }
            }).collect();
            let busy: BTreeMap<_, _> = already.iter().enumerate().map(|(number, count)| (ServerId(number as u64 + 1), *count)).collect();
            let mut load = busy.clone();
            for order in plan(&gaps, &busy, BOUNDS) {
                prop_assert_ne!(order.source, order.target);
                prop_assert!(order.gaps.len() <= BOUNDS.chunks_an_order);
                let bytes: u64 = order.gaps.iter().map(|number| gaps[*number].length).sum();
                prop_assert!(bytes <= BOUNDS.bytes_an_order || order.gaps.len() == 1);
                for number in &order.gaps {
                    prop_assert!(gaps[*number].sources.contains(&order.source));
                    prop_assert!(gaps[*number].targets.contains(&order.target));
                }
                *load.entry(order.source).or_default() += 1;
                *load.entry(order.target).or_default() += 1;
            }
            for (server, count) in load {
                prop_assert!(count <= BOUNDS.orders_a_server.max(busy.get(&server).copied().unwrap_or(0)));
            }
        }
    }
}
