//! One accepted connection: what bounds it from below HTTP/2.

use super::{GREETING_TIMEOUT, Io};
use std::{
    fmt, io,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, Waker},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::OwnedSemaphorePermit,
    time::Sleep,
};
use tonic::transport::server::Connected;

/// Bytes of HTTP/2's connection preface.
const GREETING_BYTES: usize = 24;

/// One accepted connection. It ends when its peer does not say the greeting of HTTP/2 in time: afterwards pings tell
/// whether the peer lives, before that nothing would. And it can be ended from a request that came over it.
pub struct Wire {
    io: Box<dyn Io>,
    greeting: Option<Greeting>,
    connection: Connection,
    /// A connection has a place among all, and may have one among the roomy ones.
    places: Vec<OwnedSemaphorePermit>,
}

struct Greeting {
    missing: usize,
    /// Runs from the first time that nothing was there.
    until: Option<Pin<Box<Sleep>>>,
}

impl Wire {
    /// Wraps a connection.
    pub fn new(io: impl Io) -> Self {
        Self::make(Box::new(io), Vec::new())
    }

    /// A connection that holds a place.
    pub(super) fn counted(io: Box<dyn Io>, permit: OwnedSemaphorePermit) -> Self {
        Self::make(io, vec![permit])
    }

    /// Has it hold one place more.
    pub(super) fn holding(mut self, place: OwnedSemaphorePermit) -> Self {
        self.places.push(place);
        self
    }

    fn make(io: Box<dyn Io>, places: Vec<OwnedSemaphorePermit>) -> Self {
        let greeting = Some(Greeting { missing: GREETING_BYTES, until: None });
        Self { io, greeting, connection: Connection::default(), places }
    }

    /// Ends a connection that has not greeted in time.
    fn greet(&mut self, cx: &mut Context<'_>, got: Option<usize>) -> io::Result<()> {
        let Some(greeting) = &mut self.greeting else { return Ok(()) };
        if let Some(got) = got {
            greeting.missing = greeting.missing.saturating_sub(got);
            if greeting.missing == 0 || got == 0 {
                self.greeting = None;
            }
            return Ok(());
        }
        let until = greeting.until.get_or_insert_with(|| Box::pin(tokio::time::sleep(GREETING_TIMEOUT)));
        match until.as_mut().poll(cx) {
            Poll::Ready(()) => {
                Err(io::Error::new(io::ErrorKind::TimedOut, "no greeting of HTTP/2 came in time"))
            }
            Poll::Pending => Ok(()),
        }
    }
}

impl fmt::Debug for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Wire")
    }
}

/// A connection as its requests know it: each carries one among its extensions.
#[derive(Clone, Default)]
pub struct Connection {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    is_cut: bool,
    reader: Option<Waker>,
}

impl Connection {
    /// Ends the connection at once, with everything that is on its way.
    pub fn cut(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.is_cut = true;
        if let Some(reader) = state.reader.take() {
            reader.wake();
        }
    }

    /// Whether it was cut.
    pub fn is_cut(&self) -> bool {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).is_cut
    }

    fn check(&self, cx: Option<&Context<'_>>) -> io::Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.is_cut {
            return Err(io::Error::new(
                io::ErrorKind::ConnectionAborted,
                "the peer did not take its answers",
            ));
        }
        if let Some(cx) = cx
            && state.reader.as_ref().is_none_or(|reader| !reader.will_wake(cx.waker()))
        {
            state.reader = Some(cx.waker().clone());
        }
        Ok(())
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Connection")
    }
}

impl Connected for Wire {
    type ConnectInfo = Connection;

    fn connect_info(&self) -> Connection {
        self.connection.clone()
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.connection.check(Some(cx))?;
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.io).poll_read(cx, buf);
        match &polled {
            Poll::Ready(Ok(())) => self.greet(cx, Some(buf.filled().len() - before))?,
            Poll::Ready(Err(_)) => {}
            Poll::Pending => self.greet(cx, None)?,
        }
        polled
    }
}

impl AsyncWrite for Wire {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.connection.check(None)?;
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.connection.check(None)?;
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.connection.check(None)?;
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_does_not_greet_is_cut_off_and_one_that_does_may_be_silent() {
        let (mut near, far) = tokio::io::duplex(1_024);
        let mut wire = Wire::new(far);
        near.write_all(b"PRI * HTTP/2").await.unwrap();
        let mut buffer = [0; 64];
        assert_eq!(wire.read(&mut buffer).await.unwrap(), 12);
        assert_eq!(wire.read(&mut buffer).await.unwrap_err().kind(), io::ErrorKind::TimedOut);

        let (mut near, far) = tokio::io::duplex(1_024);
        let mut wire = Wire::new(far);
        near.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        assert_eq!(wire.read(&mut buffer).await.unwrap(), 24);
        let waited = tokio::time::timeout(GREETING_TIMEOUT * 10, wire.read(&mut buffer)).await;
        assert!(waited.is_err(), "it waits for as long as the peer likes");
    }

    #[tokio::test]
    async fn a_cut_connection_wakes_its_reader_with_an_error() {
        let (_near, far) = tokio::io::duplex(1_024);
        let mut wire = Wire::new(far);
        let connection = wire.connect_info();
        let reading = tokio::spawn(async move { wire.read(&mut [0; 8]).await });
        tokio::task::yield_now().await;
        connection.cut();
        assert_eq!(reading.await.unwrap().unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
    }
}
