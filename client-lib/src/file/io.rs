//! `AsyncRead`, `AsyncWrite` and `AsyncSeek` of a handle.
//!
//! Bytes that are ready and room that is free are used at once; anything else is begun as one operation that owns the
//! handle's state and is driven by the following polls.

use crate::file::{File, body::Body};
use cairn_proto::{Error, Reason, Result};
use futures::future::BoxFuture;
use std::{
    io::{self, SeekFrom},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};
use tokio::{
    io::{AsyncRead, AsyncSeek, AsyncWrite, ReadBuf},
    sync::{Mutex, OwnedMutexGuard},
};

impl File {
    /// Finishes what an earlier poll began.
    fn poll_pending(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Some(pending) = &mut self.pending {
            let result = ready!(pending.as_mut().poll(cx));
            self.pending = None;
            // Whoever drives it to its end: a flush or close that was given up must not pass for the next one.
            (self.flushing, self.closing) = (false, false);
            return Poll::Ready(result.map_err(to_io));
        }
        Poll::Ready(Ok(()))
    }

    /// Begins an operation on the state.
    fn begin<F>(&mut self, operation: F)
    where
        F: FnOnce(OwnedMutexGuard<Body>) -> BoxFuture<'static, Result<()>> + Send + 'static,
    {
        let body: Arc<Mutex<Body>> = self.body.clone();
        self.pending = Some(Box::pin(async move { operation(body.lock_owned().await).await }));
    }
}

impl AsyncRead for File {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            ready!(self.poll_pending(cx))?;
            if let Ok(mut body) = self.body.try_lock()
                && let Some(count) = body.take_ready(buffer.initialize_unfilled())
            {
                buffer.advance(count);
                return Poll::Ready(Ok(()));
            }
            let wanted = buffer.remaining();
            self.begin(move |mut body| Box::pin(async move { body.fill(wanted).await }));
        }
    }
}

impl AsyncWrite for File {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.poll_pending(cx))?;
            if let Ok(mut body) = self.body.try_lock()
                && let Some(count) = body.try_write(bytes).map_err(to_io)?
            {
                return Poll::Ready(Ok(count));
            }
            self.begin(|mut body| Box::pin(async move { body.make_room().await }));
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.flushing {
            ready!(self.poll_pending(cx))?;
            self.begin(|mut body| Box::pin(async move { body.flush().await }));
            self.flushing = true;
        }
        self.poll_pending(cx)
    }

    /// Commits and gives the lock back, as [`File::close`].
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.closing {
            if self.flushing {
                ready!(self.as_mut().poll_flush(cx))?;
            }
            ready!(self.poll_pending(cx))?;
            self.begin(|mut body| Box::pin(async move { body.close().await.map(drop) }));
            self.closing = true;
        }
        self.poll_pending(cx)
    }
}

impl AsyncSeek for File {
    fn start_seek(mut self: Pin<&mut Self>, position: SeekFrom) -> io::Result<()> {
        if self.pending.is_some() {
            return Err(io::Error::other("another operation is under way: complete it before seeking"));
        }
        self.seek_to = Some(position);
        Ok(())
    }

    fn poll_complete(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<u64>> {
        ready!(self.poll_pending(cx))?;
        let sought = self.seek_to.take();
        let Ok(mut body) = self.body.try_lock() else {
            return Poll::Ready(Err(io::Error::other("another operation is under way")));
        };
        Poll::Ready(match sought {
            Some(position) => body.seek(position),
            None => Ok(body.position),
        })
    }
}

impl Body {
    /// Moves the position; past the end is allowed, before the begin is not.
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(position) => Some(position),
            SeekFrom::End(by) => self.size().checked_add_signed(by),
            SeekFrom::Current(by) => self.position.checked_add_signed(by),
        };
        let position = position.filter(|position| *position <= cairn_proto::limits::FILE_BYTES_MAX);
        self.position = position.ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidInput,
                "the position would be before the begin or past any end",
            )
        })?;
        Ok(self.position)
    }
}

/// An IO error of a fitting kind, with Cairn's error inside.
pub(crate) fn to_io(error: Error) -> io::Error {
    let kind = match error.reason {
        Reason::NotFound => io::ErrorKind::NotFound,
        Reason::AlreadyExists => io::ErrorKind::AlreadyExists,
        Reason::InvalidArgument | Reason::LimitExceeded => io::ErrorKind::InvalidInput,
        Reason::NotADirectory => io::ErrorKind::NotADirectory,
        Reason::IsADirectory => io::ErrorKind::IsADirectory,
        Reason::NotEmpty => io::ErrorKind::DirectoryNotEmpty,
        Reason::LockHeld => io::ErrorKind::ResourceBusy,
        Reason::NoSpace => io::ErrorKind::StorageFull,
        Reason::ChecksumMismatch => io::ErrorKind::InvalidData,
        Reason::DeadlineExceeded => io::ErrorKind::TimedOut,
        Reason::NotSupported => io::ErrorKind::Unsupported,
        _ => io::ErrorKind::Other,
    };
    io::Error::new(kind, error)
}
