//! A local end of a transfer: counts what passes, and keeps the error that the local side met, so that it can be told
//! from Cairn's own.

use crate::{failure::Failure, transfer::progress::Progress};
use cairn_proto::Error;
use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A reader or writer of this machine.
pub struct Watched<'a, T> {
    inner: T,
    name: &'a str,
    progress: &'a Progress,
    /// Bytes that passed.
    pub bytes: u64,
    error: Option<io::Error>,
}

impl<'a, T> Watched<'a, T> {
    /// Watches `inner`, which people call `name`.
    pub fn new(inner: T, name: &'a str, progress: &'a Progress) -> Self {
        Self { inner, name, progress, bytes: 0, error: None }
    }

    /// What was watched.
    #[cfg(test)]
    pub fn into_inner(self) -> T {
        self.inner
    }

    /// What to tell of a failed transfer: whose fault it was.
    pub fn failure(&mut self, path: &str, error: Error) -> Failure {
        match self.error.take() {
            Some(error) if error.kind() == io::ErrorKind::BrokenPipe => Failure::BrokenPipe,
            Some(error) => Failure::local(self.name)(error),
            None => Failure::at(path)(error),
        }
    }

    fn passed(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
        self.progress.add(bytes as u64);
    }

    fn failed(&mut self, error: io::Error) -> io::Error {
        let kind = error.kind();
        self.error = Some(error);
        kind.into()
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Watched<'_, T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        Pin::new(&mut this.inner).poll_read(cx, buf).map(|read| match read {
            Ok(()) => {
                this.passed(buf.filled().len() - before);
                Ok(())
            }
            Err(error) => Err(this.failed(error)),
        })
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Watched<'_, T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        Pin::new(&mut this.inner).poll_write(cx, buf).map(|written| match written {
            Ok(bytes) => {
                this.passed(bytes);
                Ok(bytes)
            }
            Err(error) => Err(this.failed(error)),
        })
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        Pin::new(&mut this.inner).poll_flush(cx).map_err(|error| this.failed(error))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        Pin::new(&mut this.inner).poll_shutdown(cx).map_err(|error| this.failed(error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    #[tokio::test]
    async fn bytes_are_counted_both_ways() {
        let progress = Progress::hidden();
        let mut source = Watched::new(&b"seven b"[..], "a", &progress);
        let mut all = Vec::new();
        source.read_to_end(&mut all).await.unwrap();
        assert_eq!((all.len(), source.bytes), (7, 7));
        let mut target = Watched::new(Vec::new(), "b", &progress);
        target.write_all(&all).await.unwrap();
        assert_eq!((target.bytes, target.into_inner()), (7, all));
    }

    #[tokio::test]
    async fn the_local_sides_error_is_told_from_cairns() {
        let progress = Progress::hidden();
        let (near, far) = tokio::io::duplex(1);
        drop(far);
        let mut target = Watched::new(near, "b", &progress);
        let error = target.write_all(b"x").await.unwrap_err();
        assert!(matches!(target.failure("/a", error.into()), Failure::BrokenPipe));
        let failure = target.failure("/a", Error::not_found("no such file"));
        assert_eq!(failure.to_string(), "/a: no such file");
    }
}
