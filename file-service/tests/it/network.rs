//! A network in memory, whose connections can go silent or break.

use async_trait::async_trait;
use cairn_proto::net::{Connect, Incoming, Io, Wire};
use parking_lot::Mutex;
use std::{collections::HashMap, io, sync::Arc};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, ReadHalf, WriteHalf},
    sync::{mpsc, watch},
};

#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Gate {
    is_cut: bool,
    life: u64,
}

/// All hosts and who listens where.
#[derive(Debug, Default)]
pub struct Net {
    listeners: Mutex<HashMap<String, (String, mpsc::UnboundedSender<Wire>)>>,
    gates: Mutex<HashMap<String, watch::Sender<Gate>>>,
}

impl Net {
    /// The network as a host sees it.
    pub fn host(self: &Arc<Self>, host: &str) -> Arc<dyn Connect> {
        Arc::new(HostNet { net: self.clone(), host: host.to_owned() })
    }

    /// Listens at an address.
    pub fn listen(&self, host: &str, uri: &str) -> Incoming {
        let (sender, mut wires) = mpsc::unbounded_channel();
        self.listeners.lock().insert(uri.to_owned(), (host.to_owned(), sender));
        Box::pin(async_stream::stream! {
            while let Some(wire) = wires.recv().await {
                yield Ok(wire);
            }
        })
    }

    /// Breaks all connections of a host, and refuses new ones to it.
    pub fn kill(&self, host: &str) {
        self.listeners.lock().retain(|_, (listener, _)| listener != host);
        self.change(host, |gate| gate.life += 1);
    }

    /// From here on no byte from or to the host arrives, and nothing fails.
    pub fn cut(&self, host: &str) {
        self.change(host, |gate| gate.is_cut = true);
    }

    /// Bytes arrive again.
    pub fn heal(&self, host: &str) {
        self.change(host, |gate| gate.is_cut = false);
    }

    fn change(&self, host: &str, change: impl FnOnce(&mut Gate)) {
        self.gates.lock().entry(host.to_owned()).or_default().send_modify(change);
    }

    fn gate(&self, host: &str) -> watch::Receiver<Gate> {
        self.gates.lock().entry(host.to_owned()).or_default().subscribe()
    }
}

#[derive(Debug)]
struct HostNet {
    net: Arc<Net>,
    host: String,
}

#[async_trait]
impl Connect for HostNet {
    async fn connect(&self, uri: &str) -> io::Result<Box<dyn Io>> {
        let refused = || io::Error::new(io::ErrorKind::ConnectionRefused, format!("nobody listens at {uri}"));
        let (there, listener) = self.net.listeners.lock().get(uri).cloned().ok_or_else(refused)?;
        let mut path = Path([self.net.gate(&self.host), self.net.gate(&there)]);
        path.open(path.lives()).await.ok_or_else(refused)?;
        let (near, near_inner) = tokio::io::duplex(64 * 1024);
        let (far, far_inner) = tokio::io::duplex(64 * 1024);
        let (near_read, near_write) = tokio::io::split(near_inner);
        let (far_read, far_write) = tokio::io::split(far_inner);
        tokio::spawn(pump(near_read, far_write, path.clone()));
        tokio::spawn(pump(far_read, near_write, path));
        listener.send(Wire::new(far)).map_err(|_| refused())?;
        Ok(Box::new(near))
    }
}

/// The gates between two hosts.
#[derive(Clone)]
struct Path([watch::Receiver<Gate>; 2]);

impl Path {
    fn lives(&self) -> [u64; 2] {
        [self.0[0].borrow().life, self.0[1].borrow().life]
    }

    /// Waits until nothing is cut; `None` when one of the lives is over.
    async fn open(&mut self, lives: [u64; 2]) -> Option<()> {
        loop {
            if self.lives() != lives {
                return None;
            }
            let is_cut = self.0.each_ref().map(|gate| gate.borrow().is_cut);
            if is_cut == [false, false] {
                return Some(());
            }
            self.changed().await;
        }
    }

    async fn changed(&mut self) {
        let [a, b] = &mut self.0;
        tokio::select! {
            _ = a.changed() => {}
            _ = b.changed() => {}
        }
    }

    async fn broken(&mut self, lives: [u64; 2]) {
        while self.lives() == lives {
            self.changed().await;
        }
    }
}

async fn pump<T: Io>(mut from: ReadHalf<T>, mut to: WriteHalf<T>, mut path: Path) {
    let lives = path.lives();
    let mut buffer = vec![0; 64 * 1024];
    let mut watching = path.clone();
    let copying = async {
        while let Ok(length @ 1..) = from.read(&mut buffer).await {
            if path.open(lives).await.is_none() || to.write_all(&buffer[..length]).await.is_err() {
                return;
            }
        }
        // The end of a connection does not arrive either while it is cut.
        if path.open(lives).await.is_some() {
            let _ = to.shutdown().await;
        }
    };
    tokio::select! {
        () = copying => {}
        () = watching.broken(lives) => {}
    }
}
