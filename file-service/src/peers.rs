//! Connections to other servers, by id: bulk data and small calls apart, over whichever endpoint can be reached.

use crate::topology::Map;
use async_trait::async_trait;
use cairn_proto::{
    Error, Result,
    id::ServerId,
    net::{self, Connect, Io, Traffic},
    v1,
};
use parking_lot::Mutex;
use std::{collections::HashMap, fmt, io, sync::Arc, time::Duration};
use tokio::time::Instant;
use tonic::transport::Channel;

/// Longest wait for one endpoint of several; the next one is tried then.
const ENDPOINT_TIMEOUT: Duration = Duration::from_millis(300);
/// An endpoint gets this time before it counts as one that leads to another server as well.
const ASTRAY_INTERVAL: Duration = Duration::from_secs(1);

/// Channels to other servers. Each connects at its first call and again after its connection broke.
#[derive(Debug)]
pub struct Peers {
    network: Arc<dyn Connect>,
    peers: Mutex<HashMap<ServerId, Peer>>,
}

#[derive(Debug)]
struct Peer {
    endpoints: Arc<Endpoints>,
    bulk: Channel,
    small: Channel,
}

impl Peers {
    /// No connections yet.
    pub fn new(network: Arc<dyn Connect>) -> Self {
        Self { network, peers: Mutex::default() }
    }

    /// The channel to a server of the map.
    ///
    /// # Errors
    /// `UNAVAILABLE` when the map does not have the server, or has no endpoint of it.
    pub fn channel(&self, map: &Map, id: ServerId, traffic: Traffic) -> Result<Channel> {
        let server = map.servers.get(&id).filter(|server| !server.endpoints.is_empty()).ok_or_else(|| {
            Error::unavailable(format!(
                "server {id} is not in the topology (revision {}), so it cannot be reached",
                map.revision
            ))
            .on(id.to_string())
        })?;
        let mut peers = self.peers.lock();
        let peer = match peers.entry(id) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                let uris = Mutex::default();
                let endpoints = Arc::new(Endpoints { network: self.network.clone(), uris });
                entry.insert(connect(id, endpoints)?)
            }
        };
        peer.endpoints.set(server);
        Ok(match traffic {
            Traffic::Bulk => peer.bulk.clone(),
            Traffic::Small => peer.small.clone(),
        })
    }

    /// Forgets servers that the map no longer has.
    pub fn retain(&self, map: &Map) {
        self.peers.lock().retain(|id, _| map.servers.contains_key(id));
    }

    /// Another server answered at the endpoint that was reached: the next one is tried.
    pub fn astray(&self, id: ServerId) {
        let mut peers = self.peers.lock();
        if let Some(peer) = peers.get_mut(&id)
            && peer.endpoints.go_on()
            && let Ok(again) = connect(id, peer.endpoints.clone())
        {
            tracing::warn!(server = id.0, "another server answers at its address, its next one is tried");
            *peer = again;
        }
    }
}

fn connect(id: ServerId, endpoints: Arc<Endpoints>) -> Result<Peer> {
    let network: Arc<dyn Connect> = endpoints.clone();
    // Only a name for HTTP/2: the endpoints decide where the connection goes.
    let uri = format!("http://server-{id}:1");
    let channel = |traffic| net::channel(&network, &uri, traffic);
    Ok(Peer { bulk: channel(Traffic::Bulk)?, small: channel(Traffic::Small)?, endpoints })
}

/// Connects to the first endpoint that answers; the one that did is tried first the next time.
struct Endpoints {
    network: Arc<dyn Connect>,
    uris: Mutex<Uris>,
}

#[derive(Debug, Default)]
struct Uris {
    all: Vec<String>,
    reached: Option<String>,
    /// The first to try after one that led astray, and when that was.
    first: usize,
    astray_at: Option<Instant>,
}

impl Endpoints {
    fn set(&self, server: &v1::Server) {
        let mut uris = self.uris.lock();
        if !uris.all.iter().eq(server.endpoints.iter().map(|endpoint| &endpoint.uri)) {
            uris.all = server.endpoints.iter().map(|endpoint| endpoint.uri.clone()).collect();
            uris.reached = None;
            uris.first = 0;
        }
    }

    /// Makes the endpoint behind the one that was reached the first. False when that was done just now: calls that fail
    /// together say it of the same one.
    fn go_on(&self) -> bool {
        let mut uris = self.uris.lock();
        if uris.astray_at.is_some_and(|at| at.elapsed() < ASTRAY_INTERVAL) {
            return false;
        }
        let reached = uris.reached.take().and_then(|uri| uris.all.iter().position(|known| *known == uri));
        uris.first = (reached.unwrap_or(uris.first) + 1) % uris.all.len().max(1);
        uris.astray_at = Some(Instant::now());
        true
    }

    fn in_order(&self) -> Vec<String> {
        let uris = self.uris.lock();
        let reached = uris.reached.clone().into_iter();
        let (before, from_first) = uris.all.split_at(uris.first.min(uris.all.len()));
        let rest = from_first.iter().chain(before);
        reached.chain(rest.filter(|uri| uris.reached.as_ref() != Some(uri)).cloned()).collect()
    }
}

impl fmt::Debug for Endpoints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.uris.lock().fmt(f)
    }
}

#[async_trait]
impl Connect for Endpoints {
    async fn connect(&self, _name: &str) -> io::Result<Box<dyn Io>> {
        let mut failed = io::Error::new(io::ErrorKind::NotFound, "the server has no endpoint");
        let uris = self.in_order();
        let last = uris.len().saturating_sub(1);
        for (number, uri) in uris.into_iter().enumerate() {
            // The last one may take as long as the caller waits.
            let connecting = self.network.connect(&uri);
            let connected = match number == last {
                true => connecting.await,
                false => tokio::time::timeout(ENDPOINT_TIMEOUT, connecting)
                    .await
                    .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())),
            };
            match connected {
                Ok(io) => {
                    self.uris.lock().reached = Some(uri);
                    return Ok(io);
                }
                Err(error) => failed = io::Error::new(error.kind(), format!("{uri}: {error}")),
            }
        }
        Err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reaches only addresses with an `up` in them, and keeps a record.
    #[derive(Debug, Default)]
    struct Sparse(Mutex<Vec<String>>);

    #[async_trait]
    impl Connect for Sparse {
        async fn connect(&self, uri: &str) -> io::Result<Box<dyn Io>> {
            self.0.lock().push(uri.to_owned());
            match uri.contains("up") {
                true => Ok(Box::new(tokio::io::duplex(1).0)),
                false => std::future::pending().await,
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_endpoint_that_answered_is_tried_first() {
        let network = Arc::new(Sparse::default());
        let endpoints = Endpoints { network: network.clone(), uris: Mutex::default() };
        let endpoint = |uri: &str| v1::Endpoint { uri: uri.to_owned(), scope: 0 };
        endpoints.set(&v1::Server {
            endpoints: vec![endpoint("http://down:1"), endpoint("http://up:1")],
            ..Default::default()
        });
        endpoints.connect("").await.unwrap();
        endpoints.connect("").await.unwrap();
        assert_eq!(*network.0.lock(), ["http://down:1", "http://up:1", "http://up:1"]);
    }

    #[tokio::test(start_paused = true)]
    async fn an_endpoint_that_leads_to_another_server_is_left_for_the_next() {
        let network = Arc::new(Sparse::default());
        let endpoints = Endpoints { network: network.clone(), uris: Mutex::default() };
        let endpoint = |uri: &str| v1::Endpoint { uri: uri.to_owned(), scope: 0 };
        endpoints.set(&v1::Server {
            endpoints: vec![endpoint("http://up:1"), endpoint("http://up:2")],
            ..Default::default()
        });
        endpoints.connect("").await.unwrap();
        assert!(endpoints.go_on());
        assert!(!endpoints.go_on(), "another call that failed with the first");
        endpoints.connect("").await.unwrap();
        tokio::time::sleep(ASTRAY_INTERVAL).await;
        assert!(endpoints.go_on());
        endpoints.connect("").await.unwrap();
        assert_eq!(*network.0.lock(), ["http://up:1", "http://up:2", "http://up:1"]);
    }
}
