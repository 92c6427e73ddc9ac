//! A network of in-process pipes whose hosts can be cut off or fall silent.

use async_trait::async_trait;
use cairn_proto::net::{Connect, Incoming, Io, Wire};
use parking_lot::Mutex;
use std::{collections::BTreeMap, io, sync::Arc};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream},
    sync::{mpsc, watch},
};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};

/// How a host behaves.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mood {
    Up,
    /// Connections stay open, nothing comes through, as with SIGSTOP.
    Silent,
    /// Connections break and are refused, as with SIGKILL.
    Down,
}

#[derive(Clone, Debug)]
struct Host {
    accepted: mpsc::Sender<Wire>,
    mood: watch::Sender<Mood>,
}

#[derive(Clone, Debug, Default)]
pub struct Net {
    hosts: Arc<Mutex<BTreeMap<String, Host>>>,
}

impl Net {
    /// A listener at an address.
    pub fn listen(&self, uri: &str) -> Incoming {
        let (accepted, receiver) = mpsc::channel(16);
        let host = Host { accepted, mood: watch::Sender::new(Mood::Up) };
        self.hosts.lock().insert(uri.to_owned(), host);
        Box::pin(ReceiverStream::new(receiver).map(Ok))
    }

    pub fn set(&self, uri: &str, mood: Mood) {
        self.hosts.lock()[uri].mood.send_replace(mood);
    }

    pub fn mood(&self, uri: &str) -> Mood {
        *self.hosts.lock()[uri].mood.borrow()
    }
}

#[async_trait]
impl Connect for Net {
    async fn connect(&self, uri: &str) -> io::Result<Box<dyn Io>> {
        let refused = || io::Error::new(io::ErrorKind::ConnectionRefused, format!("{uri} refuses"));
        let host = self.hosts.lock().get(uri).cloned().ok_or_else(refused)?;
        if *host.mood.borrow() == Mood::Down {
            return Err(refused());
        }
        let (client, near) = tokio::io::duplex(256 * 1024);
        let (far, server) = tokio::io::duplex(256 * 1024);
        host.accepted.send(Wire::new(server)).await.map_err(|_| refused())?;
        tokio::spawn(relay(near, far, host.mood.subscribe()));
        Ok(Box::new(client))
    }
}

async fn relay(near: DuplexStream, far: DuplexStream, mood: watch::Receiver<Mood>) {
    let (near_read, near_write) = tokio::io::split(near);
    let (far_read, far_write) = tokio::io::split(far);
    tokio::select! {
        () = copy(near_read, far_write, mood.clone()) => {}
        () = copy(far_read, near_write, mood) => {}
    }
}

async fn copy(
    mut from: tokio::io::ReadHalf<DuplexStream>,
    mut to: tokio::io::WriteHalf<DuplexStream>,
    mut mood: watch::Receiver<Mood>,
) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let now = *mood.borrow_and_update();
        tokio::select! {
            changed = mood.changed() => if changed.is_err() { return },
            count = from.read(&mut buffer), if now == Mood::Up => match count {
                Ok(count @ 1..) => if to.write_all(&buffer[..count]).await.is_err() { return },
                _ => return,
            },
            () = std::future::ready(()), if now == Mood::Down => return,
        }
    }
}
