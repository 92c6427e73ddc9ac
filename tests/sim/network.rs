//! The network between the hosts of a run: connections as TCP makes them, over links that delay, hold and break.
//!
//! Bytes of one direction of a connection arrive in order and once, as TCP promises; between connections anything may
//! overtake anything. A link from one host to another is one way:
//!
//! ```text
//!           cut                    heal
//!   open ---------> cut: what would arrive is held ---------> held bytes arrive, in order
//! ```
//!
//! A connection ends in three ways. A process that closes it or dies lets the other side know (end of stream, then
//! resets), behind all bytes under way. A host that loses power says nothing; its peers learn of it when it is up
//! again. [`Network::break_connections`] resets both sides.
//!
//! Everything is an event with a time of arrival in whole milliseconds; [`Network::deliver`] does what is due. Nothing
//! moves in between, so hosts may run one after the other.

use crate::trace::Trace;
use async_trait::async_trait;
use bytes::Bytes;
use cairn_proto::net::{Connect, Incoming, Io, Wire, authority};
use futures::StreamExt as _;
use parking_lot::Mutex;
use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};
use std::{
    collections::{BTreeMap, VecDeque},
    fmt, io,
    ops::RangeInclusive,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{mpsc, oneshot},
};

/// A host, by number.
pub type HostId = usize;

/// Bytes of one direction that may be under way or unread: buffers of both kernels.
pub const BUFFER_BYTES: usize = 256 << 10;
/// Most bytes that a host takes from one write.
const SEGMENT_BYTES: usize = 64 << 10;
/// Delay of a link in its usual state, milliseconds.
const USUAL_DELAY_MS: RangeInclusive<u64> = 1..=3;

/// All hosts' connections. Clones are the same network.
#[derive(Clone)]
pub struct Network {
    state: Arc<Mutex<State>>,
}

struct State {
    now_ms: u64,
    dice: SmallRng,
    trace: Trace,
    hosts: Vec<Port>,
    links: BTreeMap<(HostId, HostId), Link>,
    events: BTreeMap<(u64, u64), Event>,
    next_event: u64,
    conns: BTreeMap<u64, Conn>,
    next_conn: u64,
}

/// What the network knows of a host.
struct Port {
    authority: String,
    listener: Option<mpsc::UnboundedSender<SimStream>>,
    is_powered: bool,
}

#[derive(Clone)]
struct Link {
    is_cut: bool,
    delay_ms: RangeInclusive<u64>,
    /// What arrived while it was cut.
    held: Vec<Event>,
}

#[derive(Clone)]
struct Event {
    from: HostId,
    to: HostId,
    conn: u64,
    /// The end of the connection that it goes to.
    side: usize,
    what: What,
}

type Dialling = Arc<Mutex<Option<oneshot::Sender<io::Result<SimStream>>>>>;

#[derive(Clone)]
enum What {
    /// Asks for a connection.
    Syn(Dialling),
    /// It was accepted.
    SynAck(Dialling),
    /// Nobody listens.
    Refused(Dialling),
    Data(Bytes),
    /// No more bytes will come.
    Fin,
    /// The other side is gone.
    Reset,
}

/// A connection: end 0 dialled, end 1 accepted.
struct Conn {
    ends: [End; 2],
}

struct End {
    host: HostId,
    /// Whether the stream exists.
    is_open: bool,
    /// Gone without a word: power was lost.
    is_silent: bool,
    inbox: VecDeque<Bytes>,
    /// Sent by this end and not yet read by the other.
    unread_bytes: usize,
    is_ended: bool,
    is_reset: bool,
    has_sent_fin: bool,
    last_arrival_ms: u64,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl End {
    fn new(host: HostId, is_open: bool) -> Self {
        Self {
            host,
            is_open,
            is_silent: false,
            inbox: VecDeque::new(),
            unread_bytes: 0,
            is_ended: false,
            is_reset: false,
            has_sent_fin: false,
            last_arrival_ms: 0,
            reader: None,
            writer: None,
        }
    }

    fn wake_all(&mut self) -> Vec<Waker> {
        self.reader.take().into_iter().chain(self.writer.take()).collect()
    }
}

/// What is left to do of an event once the state is unlocked: wakers and channels may run anything.
enum After {
    Nothing,
    Wake(Vec<Waker>),
    Accept(mpsc::UnboundedSender<SimStream>, SimStream),
    Answer(Dialling, io::Result<SimStream>),
}

impl Network {
    /// One without hosts.
    pub fn new(seed: u64, trace: Trace) -> Self {
        let state = State {
            now_ms: 0,
            dice: SmallRng::seed_from_u64(seed),
            trace,
            hosts: Vec::new(),
            links: BTreeMap::new(),
            events: BTreeMap::new(),
            next_event: 0,
            conns: BTreeMap::new(),
            next_conn: 0,
        };
        Self { state: Arc::new(Mutex::new(state)) }
    }

    /// Adds a host that is reached by this `host:port`.
    pub fn add_host(&self, authority: &str) -> HostId {
        let mut state = self.state.lock();
        state.hosts.push(Port { authority: authority.to_owned(), listener: None, is_powered: true });
        state.hosts.len() - 1
    }

    /// The way to other hosts for whatever runs on `host`.
    pub fn connector(&self, host: HostId) -> Arc<dyn Connect> {
        Arc::new(Connector { network: self.clone(), host })
    }

    /// Has a host accept connections.
    pub fn listen(&self, host: HostId) -> Incoming {
        let (sender, receiver) = mpsc::unbounded_channel();
        self.state.lock().hosts[host].listener = Some(sender);
        let arriving = futures::stream::unfold(receiver, |mut receiver| async move {
            receiver.recv().await.map(|stream| (stream, receiver))
        });
        Box::pin(arriving.map(|stream| Ok(Wire::new(stream))))
    }

    /// Nobody listens there any more.
    pub fn unlisten(&self, host: HostId) {
        let listener = self.state.lock().hosts[host].listener.take();
        drop(listener);
    }

    /// Takes a host's power: its connections are gone, and nobody is told.
    pub fn power_off(&self, host: HostId) {
        self.unlisten(host);
        let mut state = self.state.lock();
        state.hosts[host].is_powered = false;
        for end in state.conns.values_mut().flat_map(|conn| &mut conn.ends).filter(|end| end.host == host) {
            end.is_silent = true;
        }
    }

    /// Gives it back; peers of connections from before now learn that they are gone.
    pub fn power_on(&self, host: HostId) {
        let mut state = self.state.lock();
        if std::mem::replace(&mut state.hosts[host].is_powered, true) {
            return;
        }
        let stale: Vec<(u64, usize)> = state
            .conns
            .iter()
            .flat_map(|(&number, conn)| [(number, 0, conn), (number, 1, conn)])
            .filter(|(_, side, conn)| conn.ends[*side].host == host && conn.ends[*side].is_silent)
            .map(|(number, side, _)| (number, side))
            .collect();
        for (conn, side) in stale {
            state.send(conn, side, What::Reset);
        }
    }

    /// What goes from one host to another is held, or no more.
    pub fn set_cut(&self, from: HostId, to: HostId, is_cut: bool) {
        let mut state = self.state.lock();
        let link = state.link(from, to);
        link.is_cut = is_cut;
        if is_cut {
            return;
        }
        for event in std::mem::take(&mut link.held) {
            state.schedule(event);
        }
    }

    /// Sets a link's delay, milliseconds; none for the usual one.
    pub fn set_delay(&self, from: HostId, to: HostId, delay_ms: Option<RangeInclusive<u64>>) {
        self.state.lock().link(from, to).delay_ms = delay_ms.unwrap_or(USUAL_DELAY_MS);
    }

    /// Heals all links.
    pub fn heal(&self) {
        let links: Vec<_> = self.state.lock().links.keys().copied().collect();
        for (from, to) in links {
            self.set_cut(from, to, false);
            self.set_delay(from, to, None);
        }
    }

    /// Resets all connections between two hosts, as a router that forgot them does.
    pub fn break_connections(&self, one: HostId, other: HostId) -> usize {
        let mut wakers = Vec::new();
        let mut state = self.state.lock();
        let mut broken = 0;
        for conn in state.conns.values_mut() {
            let hosts = [conn.ends[0].host, conn.ends[1].host];
            if hosts == [one, other] || hosts == [other, one] {
                broken += 1;
                for end in &mut conn.ends {
                    end.is_reset = true;
                    wakers.extend(end.wake_all());
                }
            }
        }
        drop(state);
        wakers.into_iter().for_each(Waker::wake);
        broken
    }

    /// Does all that is due.
    pub fn deliver(&self, now_ms: u64) {
        self.state.lock().now_ms = now_ms;
        loop {
            let after = {
                let mut state = self.state.lock();
                let Some(entry) = state.events.first_entry() else { return };
                if entry.key().0 > now_ms {
                    return;
                }
                let event = entry.remove();
                state.arrive(event, self)
            };
            match after {
                After::Nothing => {}
                After::Wake(wakers) => wakers.into_iter().for_each(Waker::wake),
                After::Accept(listener, stream) => drop(listener.send(stream)),
                After::Answer(dialling, answer) => {
                    let waiting = dialling.lock().take();
                    if let Some(waiting) = waiting {
                        // Who no longer waits drops the stream, which closes it.
                        drop(waiting.send(answer));
                    }
                }
            }
        }
    }

    /// Open connections, and bytes that are under way or unread.
    pub fn load(&self) -> (usize, usize) {
        let state = self.state.lock();
        let bytes = state.conns.values().flat_map(|conn| &conn.ends).map(|end| end.unread_bytes).sum();
        (state.conns.len(), bytes)
    }
}

impl fmt::Debug for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Network")
    }
}

impl State {
    fn link(&mut self, from: HostId, to: HostId) -> &mut Link {
        self.links.entry((from, to)).or_insert_with(|| Link {
            is_cut: false,
            delay_ms: USUAL_DELAY_MS,
            held: Vec::new(),
        })
    }

    /// Sends from one side of a connection to the other.
    fn send(&mut self, conn: u64, side: usize, what: What) {
        let Some(it) = self.conns.get(&conn) else { return };
        let (from, to) = (it.ends[side].host, it.ends[1 - side].host);
        self.schedule(Event { from, to, conn, side: 1 - side, what });
    }

    fn schedule(&mut self, event: Event) {
        let delay = self.link(event.from, event.to).delay_ms.clone();
        let mut at = self.now_ms + self.dice.random_range(delay);
        if let Some(conn) = self.conns.get_mut(&event.conn) {
            let end = &mut conn.ends[1 - event.side];
            at = at.max(end.last_arrival_ms);
            end.last_arrival_ms = at;
        }
        self.next_event += 1;
        self.events.insert((at, self.next_event), event);
    }

    fn arrive(&mut self, event: Event, network: &Network) -> After {
        let link = self.link(event.from, event.to);
        if link.is_cut {
            link.held.push(event);
            return After::Nothing;
        }
        let kind = match &event.what {
            What::Syn(_) => "syn",
            What::SynAck(_) => "accepted",
            What::Refused(_) => "refused",
            What::Data(_) => "data",
            What::Fin => "fin",
            What::Reset => "reset",
        };
        let bytes = if let What::Data(bytes) = &event.what { bytes.clone() } else { Bytes::new() };
        self.trace.event(kind, &[self.now_ms, event.from as u64, event.to as u64, event.conn], &bytes);
        let Event { from, to, conn: number, side, what } = event;
        match what {
            What::Syn(dialling) => self.accept(from, to, dialling, network),
            What::Refused(dialling) => {
                After::Answer(dialling, Err(io::Error::from(io::ErrorKind::ConnectionRefused)))
            }
            What::SynAck(dialling) => {
                let stream = SimStream { network: network.clone(), conn: number, side: 0 };
                After::Answer(dialling, Ok(stream))
            }
            What::Data(_) | What::Fin | What::Reset => {
                let Some(conn) = self.conns.get_mut(&number) else { return After::Nothing };
                let end = &mut conn.ends[side];
                if end.is_silent {
                    return After::Nothing;
                }
                if !end.is_open {
                    // The kernel of a closed connection answers bytes with a reset.
                    if matches!(what, What::Data(_)) && !end.is_reset {
                        end.is_reset = true;
                        self.send(number, side, What::Reset);
                    }
                    return After::Nothing;
                }
                match what {
                    What::Data(bytes) if !end.is_reset => end.inbox.push_back(bytes),
                    What::Fin => end.is_ended = true,
                    What::Reset => end.is_reset = true,
                    _ => {}
                }
                After::Wake(end.wake_all())
            }
        }
    }

    fn accept(&mut self, from: HostId, to: HostId, dialling: Dialling, network: &Network) -> After {
        let port = &self.hosts[to];
        if !port.is_powered {
            // Nobody answers; the caller's own patience ends it.
            return After::Nothing;
        }
        let listener = port.listener.clone();
        let Some(listener) = listener.filter(|listener| !listener.is_closed()) else {
            self.schedule(Event { from: to, to: from, conn: 0, side: 0, what: What::Refused(dialling) });
            return After::Nothing;
        };
        self.next_conn += 1;
        let number = self.next_conn;
        self.conns.insert(number, Conn { ends: [End::new(from, true), End::new(to, true)] });
        self.schedule(Event { from: to, to: from, conn: number, side: 0, what: What::SynAck(dialling) });
        After::Accept(listener, SimStream { network: network.clone(), conn: number, side: 1 })
    }

    /// A stream was dropped.
    fn close(&mut self, number: u64, side: usize) -> Vec<Waker> {
        let Some(conn) = self.conns.get_mut(&number) else { return Vec::new() };
        let end = &mut conn.ends[side];
        end.is_open = false;
        let unread: usize = end.inbox.drain(..).map(|bytes| bytes.len()).sum();
        let is_silent = end.is_silent;
        // A process that ends without having read everything resets; one that has, ends the stream.
        let word = match (unread, end.has_sent_fin) {
            (1.., _) => Some(What::Reset),
            (0, false) => Some(What::Fin),
            (0, true) => None,
        };
        let other = &mut conn.ends[1 - side];
        other.unread_bytes = other.unread_bytes.saturating_sub(unread);
        let wakers: Vec<_> = other.writer.take().into_iter().collect();
        let is_over = !other.is_open;
        if let Some(word) = word.filter(|_| !is_silent) {
            self.send(number, side, word);
        }
        if is_over {
            self.conns.remove(&number);
        }
        wakers
    }
}

#[derive(Debug)]
struct Connector {
    network: Network,
    host: HostId,
}

#[async_trait]
impl Connect for Connector {
    async fn connect(&self, uri: &str) -> io::Result<Box<dyn Io>> {
        let wanted = authority(uri)?;
        let (sender, receiver) = oneshot::channel();
        {
            let mut state = self.network.state.lock();
            let to = state.hosts.iter().position(|port| port.authority == wanted);
            let to =
                to.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("no host at {wanted}")))?;
            let dialling = Arc::new(Mutex::new(Some(sender)));
            state.schedule(Event { from: self.host, to, conn: 0, side: 1, what: What::Syn(dialling) });
        }
        match receiver.await {
            Ok(stream) => Ok(Box::new(stream?)),
            // The other host has no power: silence.
            Err(_) => std::future::pending().await,
        }
    }
}

/// One side of a connection.
pub struct SimStream {
    network: Network,
    conn: u64,
    side: usize,
}

impl fmt::Debug for SimStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SimStream({}, {})", self.conn, self.side)
    }
}

impl Drop for SimStream {
    fn drop(&mut self) {
        let wakers = self.network.state.lock().close(self.conn, self.side);
        wakers.into_iter().for_each(Waker::wake);
    }
}

fn reset() -> io::Error {
    io::Error::from(io::ErrorKind::ConnectionReset)
}

impl AsyncRead for SimStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut state = self.network.state.lock();
        let Some(conn) = state.conns.get_mut(&self.conn) else { return Poll::Ready(Err(reset())) };
        let end = &mut conn.ends[self.side];
        let mut taken = 0;
        while buf.remaining() > 0
            && let Some(bytes) = end.inbox.front_mut()
        {
            let part = bytes.split_to(bytes.len().min(buf.remaining()));
            buf.put_slice(&part);
            taken += part.len();
            if bytes.is_empty() {
                end.inbox.pop_front();
            }
        }
        if taken == 0 {
            if end.is_reset {
                return Poll::Ready(Err(reset()));
            }
            if end.is_ended || buf.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
            end.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let other = &mut conn.ends[1 - self.side];
        other.unread_bytes = other.unread_bytes.saturating_sub(taken);
        let writer = other.writer.take();
        drop(state);
        if let Some(writer) = writer {
            writer.wake();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for SimStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let mut state = self.network.state.lock();
        let Some(conn) = state.conns.get_mut(&self.conn) else { return Poll::Ready(Err(reset())) };
        let end = &mut conn.ends[self.side];
        if end.is_reset {
            return Poll::Ready(Err(reset()));
        }
        if end.has_sent_fin {
            return Poll::Ready(Err(io::Error::from(io::ErrorKind::BrokenPipe)));
        }
        let room = BUFFER_BYTES.saturating_sub(end.unread_bytes);
        if room == 0 {
            end.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let length = data.len().min(room).min(SEGMENT_BYTES);
        end.unread_bytes += length;
        state.send(self.conn, self.side, What::Data(Bytes::copy_from_slice(&data[..length])));
        Poll::Ready(Ok(length))
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut state = self.network.state.lock();
        let Some(conn) = state.conns.get_mut(&self.conn) else { return Poll::Ready(Ok(())) };
        if !std::mem::replace(&mut conn.ends[self.side].has_sent_fin, true) {
            state.send(self.conn, self.side, What::Fin);
        }
        Poll::Ready(Ok(()))
    }
}
