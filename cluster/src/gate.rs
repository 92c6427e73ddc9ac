//! The switch in front of a server's connections: cut silently, or broken at once.
//!
//! Every connection to and from a server of an embedded cluster goes through its [`Gate`]. While the gate is *cut*,
//! bytes neither arrive nor fail, as with a pulled cable: reads and writes wait, and a closed connection is kept from
//! the other side until the gate heals. When a *life* of the server ends, all of its connections break at once.

use async_trait::async_trait;
use cairn_proto::net::{Connect, Io, authority};
use futures::task::AtomicWaker;
use parking_lot::{Mutex, RwLock};
use std::{
    collections::HashMap,
    fmt, io,
    pin::Pin,
    sync::{Arc, Weak},
    task::{Context, Poll},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::watch,
};

/// What the gate lets through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct State {
    /// Nothing arrives and nothing fails.
    cut: bool,
    /// The server's current life; connections of earlier ones are broken.
    life: u64,
}

/// The switch of one server, across all its lives.
pub(crate) struct Gate {
    state: watch::Sender<State>,
    /// Tasks that wait on a connection of this gate.
    waiting: Mutex<Vec<Weak<Wakers>>>,
    /// Connections that were closed while cut: the other side learns of it when the gate heals.
    held: Mutex<Vec<Box<dyn Io>>>,
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gate({:?})", *self.state.borrow())
    }
}

#[derive(Debug, Default)]
struct Wakers {
    read: AtomicWaker,
    write: AtomicWaker,
}

impl Gate {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            state: watch::Sender::new(State { cut: false, life: 1 }),
            waiting: Mutex::default(),
            held: Mutex::default(),
        })
    }

    /// Lets nothing through and nothing fail, until [`Gate::heal`].
    pub(crate) fn cut(&self) {
        self.change(|state| state.cut = true);
    }

    /// Lets everything through again.
    pub(crate) fn heal(&self) {
        self.change(|state| state.cut = false);
        self.held.lock().clear();
    }

    pub(crate) fn is_cut(&self) -> bool {
        self.state.borrow().cut
    }

    /// Ends the current life: its connections break.
    pub(crate) fn end_life(&self) {
        self.change(|state| state.life += 1);
    }

    /// The current life.
    pub(crate) fn life(self: &Arc<Self>) -> Life {
        Life { gate: self.clone(), number: self.state.borrow().life }
    }

    /// Returns as soon as the gate is not cut.
    pub(crate) async fn open(&self) {
        // The sender lives as long as `self`, so the wait cannot fail.
        let _ = self.state.subscribe().wait_for(|state| !state.cut).await;
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        self.state.send_modify(change);
        self.waiting.lock().retain(|wakers| {
            let Some(wakers) = wakers.upgrade() else { return false };
            wakers.read.wake();
            wakers.write.wake();
            true
        });
    }
}

/// One life of a server, from its start to its death.
#[derive(Clone, Debug)]
pub(crate) struct Life {
    gate: Arc<Gate>,
    number: u64,
}

impl Life {
    /// Whether it still lasts.
    pub(crate) fn lasts(&self) -> bool {
        self.gate.state.borrow().life == self.number
    }

    /// The error of whatever is tried after its end.
    pub(crate) fn ended() -> io::Error {
        io::Error::new(io::ErrorKind::ConnectionReset, "the server was killed")
    }

    /// Completes when it ends.
    pub(crate) async fn end(self) {
        let mut state = self.gate.state.subscribe();
        // The sender lives as long as `self`, so the wait cannot fail.
        let _ = state.wait_for(|state| state.life != self.number).await;
    }

    /// Waits until the gate is open; an error when the life ends first.
    async fn open(&self) -> io::Result<()> {
        let mut state = self.gate.state.subscribe();
        let number = self.number;
        let open = state.wait_for(|state| !state.cut || state.life != number).await;
        match open {
            Ok(state) if state.life == number => Ok(()),
            _ => Err(Self::ended()),
        }
    }

    /// Puts a connection behind the gate.
    pub(crate) fn wrap(&self, io: Box<dyn Io>) -> GatedIo {
        let wakers = Arc::new(Wakers::default());
        let mut waiting = self.gate.waiting.lock();
        waiting.retain(|wakers| wakers.strong_count() > 0);
        waiting.push(Arc::downgrade(&wakers));
        GatedIo { io: Some(io), life: self.clone(), wakers }
    }
}

/// A connection behind a gate.
pub(crate) struct GatedIo {
    /// Taken only by `drop`.
    io: Option<Box<dyn Io>>,
    life: Life,
    wakers: Arc<Wakers>,
}

impl GatedIo {
    /// The connection, if bytes may pass now.
    fn pass(&mut self) -> Poll<io::Result<Pin<&mut dyn Io>>> {
        let state = *self.life.gate.state.borrow();
        if state.life != self.life.number {
            return Poll::Ready(Err(Life::ended()));
        }
        if state.cut {
            return Poll::Pending;
        }
        match &mut self.io {
            Some(io) => Poll::Ready(Ok(Pin::new(io.as_mut()))),
            None => Poll::Ready(Err(Life::ended())),
        }
    }
}

macro_rules! pass {
    ($self:ident, $cx:ident, $side:ident) => {{
        // Registered before the state is read, so that no change is missed in between.
        $self.wakers.$side.register($cx.waker());
        match $self.get_mut().pass() {
            Poll::Ready(Ok(io)) => io,
            Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
            Poll::Pending => return Poll::Pending,
        }
    }};
}

impl AsyncRead for GatedIo {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        pass!(self, cx, read).poll_read(cx, buf)
    }
}

impl AsyncWrite for GatedIo {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        pass!(self, cx, write).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        pass!(self, cx, write).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.as_ref().is_some_and(|io| io.is_write_vectored())
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        pass!(self, cx, write).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        pass!(self, cx, write).poll_shutdown(cx)
    }
}

impl Drop for GatedIo {
    fn drop(&mut self) {
        // A closed connection is a sign of life that a cut must not let through.
        if let Some(io) = self.io.take()
            && self.life.gate.is_cut()
        {
            self.life.gate.held.lock().push(io);
        }
    }
}

/// Which gate stands before an address.
#[derive(Debug, Default)]
pub(crate) struct Gates {
    by_authority: RwLock<HashMap<String, Arc<Gate>>>,
}

impl Gates {
    /// Puts a gate before `host:port`.
    pub(crate) fn add(&self, authority: String, gate: Arc<Gate>) {
        self.by_authority.write().insert(authority, gate);
    }

    fn of(&self, uri: &str) -> Option<Arc<Gate>> {
        let authority = authority(uri).ok()?;
        self.by_authority.read().get(authority).cloned()
    }
}

/// The network as one server, or a client, of an embedded cluster sees it.
#[derive(Debug)]
pub(crate) struct GatedNetwork {
    inner: Arc<dyn Connect>,
    gates: Arc<Gates>,
    /// The life of the server whose connections these are; a client has none.
    own: Option<Life>,
}

impl GatedNetwork {
    pub(crate) fn new(inner: Arc<dyn Connect>, gates: Arc<Gates>, own: Option<Life>) -> Self {
        Self { inner, gates, own }
    }
}

#[async_trait]
impl Connect for GatedNetwork {
    async fn connect(&self, uri: &str) -> io::Result<Box<dyn Io>> {
        if let Some(own) = &self.own {
            own.open().await?;
        }
        if let Some(gate) = self.gates.of(uri) {
            gate.open().await;
        }
        let io = self.inner.connect(uri).await?;
        // What a client sends to a server passes that server's gate on the other end.
        match &self.own {
            Some(own) => Ok(Box::new(own.wrap(io))),
            None => Ok(io),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        time::timeout,
    };

    const SHORT: Duration = Duration::from_secs(60);

    #[tokio::test(start_paused = true)]
    async fn a_cut_neither_delivers_nor_fails_and_a_heal_delivers() {
        let gate = Gate::new();
        let (near, mut far) = tokio::io::duplex(64);
        let mut near = gate.life().wrap(Box::new(near));
        far.write_all(b"before").await.unwrap();
        let mut got = [0; 6];
        near.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"before");

        gate.cut();
        far.write_all(b"during").await.unwrap();
        assert!(timeout(SHORT, near.read(&mut got)).await.is_err(), "nothing arrives while cut");
        assert!(timeout(SHORT, near.write_all(b"x")).await.is_err(), "nothing leaves while cut");

        gate.heal();
        timeout(SHORT, near.read_exact(&mut got)).await.expect("healed").unwrap();
        assert_eq!(&got, b"during");
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_waits_in_a_cut_goes_on_when_it_heals() {
        let gate = Gate::new();
        let (near, far) = tokio::io::duplex(64);
        let mut near = gate.life().wrap(Box::new(near));
        gate.cut();
        let writer = tokio::spawn(async move { near.write_all(b"late").await.map(|()| near) });
        tokio::task::yield_now().await;
        gate.heal();
        let _near = timeout(SHORT, writer).await.expect("woken").unwrap().unwrap();
        let mut far = far;
        let mut got = [0; 4];
        far.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"late");
    }

    #[tokio::test(start_paused = true)]
    async fn a_close_behind_a_cut_is_seen_only_after_it_heals() {
        let gate = Gate::new();
        let (near, mut far) = tokio::io::duplex(64);
        let near = gate.life().wrap(Box::new(near));
        gate.cut();
        gate.end_life();
        drop(near);
        let mut got = [0; 1];
        assert!(timeout(SHORT, far.read(&mut got)).await.is_err(), "the end must not show");
        gate.heal();
        assert_eq!(timeout(SHORT, far.read(&mut got)).await.expect("healed").unwrap(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn the_end_of_a_life_breaks_its_connections_and_not_those_of_the_next() {
        let gate = Gate::new();
        let (near, far) = tokio::io::duplex(64);
        let mut near = gate.life().wrap(Box::new(near));
        let reader = tokio::spawn(async move { near.read(&mut [0; 1]).await });
        tokio::task::yield_now().await;
        gate.end_life();
        let error = timeout(SHORT, reader).await.expect("woken").unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        drop(far);

        let (near, mut far) = tokio::io::duplex(64);
        let mut near = gate.life().wrap(Box::new(near));
        near.write_all(b"y").await.unwrap();
        far.read_exact(&mut [0; 1]).await.unwrap();
    }
}
