//! Several connections to one peer for small calls. One HTTP/2 connection is one task at each end: with many calls under way
//! that task is what they wait for. Few calls share one, so that a client that does one thing at a time has one connection.

use cairn_proto::Result;
use parking_lot::Mutex;
use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};
use tonic::transport::Channel;

/// Most connections for small calls to one peer.
pub(crate) const SMALL_CONNECTIONS: usize = 4;
/// Calls under way on each connection before the next is used.
const CALLS_SHARED: usize = 4;

/// The connections to one peer, made when they are needed first.
#[derive(Debug, Default)]
pub(crate) struct Connections {
    slots: [Slot; SMALL_CONNECTIONS],
}

#[derive(Debug, Default)]
struct Slot {
    channel: Mutex<Option<Channel>>,
    under_way: Arc<AtomicUsize>,
}

/// A call under way on a connection. Dropping it is its end.
#[derive(Debug)]
pub(crate) struct UnderWay(Arc<AtomicUsize>);

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Slot {
    fn channel(&self, make: impl FnOnce() -> Result<Channel>) -> Result<Channel> {
        let mut channel = self.channel.lock();
        match &*channel {
            Some(channel) => Ok(channel.clone()),
            None => Ok(channel.insert(make()?).clone()),
        }
    }

    fn calls(&self) -> usize {
        self.under_way.load(Ordering::Relaxed)
    }
}

impl Connections {
    /// The connection for another call: the first with room, else that with the fewest calls.
    ///
    /// # Errors
    /// Those of `make`, which makes a channel.
    pub fn pick(&self, make: impl FnOnce() -> Result<Channel>) -> Result<(Channel, UnderWay)> {
        let with_room = self.slots.iter().find(|slot| slot.calls() < CALLS_SHARED);
        let Some(slot) = with_room.or_else(|| self.slots.iter().min_by_key(|slot| slot.calls())) else {
            return Err(cairn_proto::Error::internal("there is no connection to pick"));
        };
        let channel = slot.channel(make)?;
        slot.under_way.fetch_add(1, Ordering::Relaxed);
        Ok((channel, UnderWay(slot.under_way.clone())))
    }

    /// The first connection, for what lasts: streams.
    ///
    /// # Errors
    /// Those of `make`.
    pub fn first(&self, make: impl FnOnce() -> Result<Channel>) -> Result<Channel> {
        self.slots[0].channel(make)
    }

    /// Gives all connections up: the next calls make new ones.
    pub fn forget(&self) {
        for slot in &self.slots {
            slot.channel.lock().take();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic::transport::Endpoint;

    #[tokio::test]
    async fn connections_are_added_with_the_calls_under_way_and_bounded() {
        let connections = Connections::default();
        let made = AtomicUsize::new(0);
        let make = || {
            made.fetch_add(1, Ordering::Relaxed);
            Ok(Endpoint::from_static("http://[::1]:1").connect_lazy())
        };
        for _ in 0..100 {
            connections.pick(make).unwrap();
        }
        assert_eq!(made.load(Ordering::Relaxed), 1, "one after the other");
        let mut under_way: Vec<_> = (0..64).map(|_| connections.pick(make).unwrap().1).collect();
        assert_eq!(made.load(Ordering::Relaxed), SMALL_CONNECTIONS);
        assert!(connections.slots.iter().all(|slot| slot.calls() == 64 / SMALL_CONNECTIONS), "evenly");
        under_way.clear();
        assert!(connections.slots.iter().all(|slot| slot.calls() == 0));
        connections.forget();
        connections.first(make).unwrap();
        assert_eq!(made.load(Ordering::Relaxed), SMALL_CONNECTIONS + 1);
    }
}
