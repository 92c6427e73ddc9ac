//! The same file system for programs without a runtime.
//!
//! A [`Client`] here has a runtime of its own; each call waits for its end. A [`File`] implements `std::io::Read`,
//! `Write` and `Seek`. Calls block their thread, so tasks of an async program should use [`crate::Client`] instead.
//! Dropping is safe anywhere, also inside of a runtime.
//!
//! ```no_run
//! use client_lib::blocking::Client;
//! use std::io::{Read, Write};
//!
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let client = Client::connect(&["http://127.0.0.1:7400"])?;
//!     let mut file = client.create_file("/notes.txt")?;
//!     writeln!(file, "remember")?;
//!     file.close()?;
//!     let mut text = String::new();
//!     client.open("/notes.txt")?.read_to_string(&mut text)?;
//!     client.close()?;
//!     Ok(())
//! }
//! ```

use crate::{
    Attributes, DeleteOptions, DeleteReport, Entry, ListOptions, LockInfo, LockOptions, RenameOptions,
    SetAttributes, StatusResponse, WriteOptions, client::ClientBuilder, file::to_io,
};
use bytes::Bytes;
use cairn_proto::{Error, Result, id::FencingToken};
use futures::StreamExt as _;
use std::{
    io::{self, Read, Seek, SeekFrom, Write},
    sync::{Arc, mpsc},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncSeekExt as _, AsyncWriteExt as _},
    runtime::Runtime,
};

/// Most bytes that one `read` of a [`File`] returns.
const READ_STEP_BYTES: usize = 1024 * 1024;
/// Threads of the runtime.
const WORKERS: usize = 2;

/// The runtime behind a client and all that came from it.
#[derive(Debug)]
struct Background(Option<Runtime>);

impl Background {
    /// Runs `future` to its end. It waits on a channel, so that it cannot panic wherever it is called.
    fn run<T: Send + 'static>(&self, future: impl Future<Output = T> + Send + 'static) -> Result<T> {
        let stopped = || Error::unavailable("the client's runtime has stopped");
        let (sender, receiver) = mpsc::sync_channel(1);
        self.0.as_ref().ok_or_else(stopped)?.spawn(async move {
            let _ = sender.send(future.await);
        });
        receiver.recv().map_err(|_| stopped())
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            // Waiting for it would panic inside of another runtime.
            runtime.shutdown_background();
        }
    }
}

/// A file system for programs without a runtime. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Client {
    client: crate::Client,
    background: Arc<Background>,
}

impl Client {
    /// A client with default settings; see [`crate::Client::connect`].
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` for an address of another form; `IO` when no runtime can be started.
    pub fn connect<A: AsRef<str>>(directories: &[A]) -> Result<Self> {
        let builder = crate::Client::builder();
        Self::build(directories.iter().fold(builder, |builder, address| builder.directory(address.as_ref())))
    }

    /// A client with other settings.
    ///
    /// # Errors
    /// As [`ClientBuilder::build`]; `IO` when no runtime can be started.
    pub fn build(builder: ClientBuilder) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(WORKERS)
            .thread_name("cairn-client")
            .enable_all()
            .build()?;
        Ok(Self { client: builder.build()?, background: Arc::new(Background(Some(runtime))) })
    }

    /// The client behind it.
    pub fn inner(&self) -> &crate::Client {
        &self.client
    }

    fn run<T, F, Fut>(&self, call: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(crate::Client) -> Fut,
        Fut: Future<Output = Result<T>> + Send + 'static,
    {
        self.background.run(call(self.client.clone()))?
    }

    /// See [`crate::Client::close`].
    ///
    /// # Errors
    /// As there.
    pub fn close(&self) -> Result<()> {
        self.run(|client| async move { client.close().await })
    }

    /// See [`crate::Client::read`].
    ///
    /// # Errors
    /// As there.
    pub fn read(&self, path: &str) -> Result<Bytes> {
        let path = path.to_owned();
        self.run(|client| async move { client.read(&path).await })
    }

    /// See [`crate::Client::read_range`].
    ///
    /// # Errors
    /// As there.
    pub fn read_range(&self, path: &str, offset: u64, length: u64) -> Result<Bytes> {
        let path = path.to_owned();
        self.run(move |client| async move { client.read_range(&path, offset, length).await })
    }

    /// See [`crate::Client::write`].
    ///
    /// # Errors
    /// As there.
    pub fn write(&self, path: &str, bytes: impl Into<Bytes>) -> Result<Attributes> {
        self.write_with(path, bytes, WriteOptions::new())
    }

    /// See [`crate::Client::write_with`].
    ///
    /// # Errors
    /// As there.
    pub fn write_with(
        &self,
        path: &str,
        bytes: impl Into<Bytes>,
        options: WriteOptions,
    ) -> Result<Attributes> {
        let (path, bytes) = (path.to_owned(), bytes.into());
        self.run(|client| async move { client.write_with(&path, bytes, options).await })
    }

    /// See [`crate::Client::append_with`].
    ///
    /// # Errors
    /// As there.
    pub fn append_with(
        &self,
        path: &str,
        bytes: impl Into<Bytes>,
        options: WriteOptions,
    ) -> Result<Attributes> {
        let (path, bytes) = (path.to_owned(), bytes.into());
        self.run(|client| async move { client.append_with(&path, bytes, options).await })
    }

    /// See [`crate::Client::truncate`].
    ///
    /// # Errors
    /// As there.
    pub fn truncate(&self, path: &str, length: u64) -> Result<Attributes> {
        let path = path.to_owned();
        self.run(move |client| async move { client.truncate(&path, length).await })
    }

    /// See [`crate::Client::create_with`].
    ///
    /// # Errors
    /// As there.
    pub fn create(&self, path: &str, options: WriteOptions) -> Result<Attributes> {
        let path = path.to_owned();
        self.run(|client| async move { client.create_with(&path, options).await })
    }

    /// See [`crate::Client::mkdir`].
    ///
    /// # Errors
    /// As there.
    pub fn mkdir(&self, path: &str) -> Result<Attributes> {
        let path = path.to_owned();
        self.run(|client| async move { client.mkdir(&path).await })
    }

    /// See [`crate::Client::mkdir_all`].
    ///
    /// # Errors
    /// As there.
    pub fn mkdir_all(&self, path: &str) -> Result<Attributes> {
        let path = path.to_owned();
        self.run(|client| async move { client.mkdir_all(&path).await })
    }

    /// See [`crate::Client::delete_with`].
    ///
    /// # Errors
    /// As there.
    pub fn delete(&self, path: &str, options: DeleteOptions) -> Result<()> {
        let path = path.to_owned();
        self.run(|client| async move { client.delete_with(&path, options).await })
    }

    /// See [`crate::Client::delete_recursive`].
    ///
    /// # Errors
    /// As there.
    pub fn delete_recursive(&self, path: &str) -> Result<DeleteReport> {
        let path = path.to_owned();
        self.run(|client| async move { client.delete_recursive(&path).await })
    }

    /// See [`crate::Client::rename_with`].
    ///
    /// # Errors
    /// As there.
    pub fn rename(&self, from: &str, to: &str, options: RenameOptions) -> Result<Attributes> {
        let (from, to) = (from.to_owned(), to.to_owned());
        self.run(|client| async move { client.rename_with(&from, &to, options).await })
    }

    /// See [`crate::Client::stat`].
    ///
    /// # Errors
    /// As there.
    pub fn stat(&self, path: &str) -> Result<Attributes> {
        let path = path.to_owned();
        self.run(|client| async move { client.stat(&path).await })
    }

    /// See [`crate::Client::exists`].
    ///
    /// # Errors
    /// As there.
    pub fn exists(&self, path: &str) -> Result<bool> {
        let path = path.to_owned();
        self.run(|client| async move { client.exists(&path).await })
    }

    /// See [`crate::Client::set_attributes`].
    ///
    /// # Errors
    /// As there.
    pub fn set_attributes(&self, path: &str, changes: SetAttributes) -> Result<Attributes> {
        let path = path.to_owned();
        self.run(|client| async move { client.set_attributes(&path, changes).await })
    }

    /// The entries of a directory, a page at a time behind the iterator; see [`crate::Client::list`].
    pub fn list(&self, path: &str) -> impl Iterator<Item = Result<Entry>> + use<> {
        let (client, path) = (self.clone(), path.to_owned());
        let mut page = Vec::new().into_iter();
        let mut token = Some(String::new());
        std::iter::from_fn(move || {
            loop {
                if let Some(entry) = page.next() {
                    return Some(Ok(entry));
                }
                let (this, at) = (token.take()?, path.clone());
                match client
                    .run(|client| async move { client.list_page(&at, &this, &ListOptions::new()).await })
                {
                    Ok((entries, next)) => {
                        page = entries.into_iter();
                        token = (!next.is_empty()).then_some(next);
                    }
                    Err(error) => return Some(Err(error)),
                }
            }
        })
    }

    /// All held locks, at most 10,000; see [`crate::Client::locks`].
    ///
    /// # Errors
    /// As there.
    pub fn locks(&self) -> Result<Vec<LockInfo>> {
        self.run(|client| async move {
            let locks: Vec<Result<LockInfo>> = client.locks().take(10_000).collect().await;
            locks.into_iter().collect()
        })
    }

    /// See [`crate::Client::status`].
    ///
    /// # Errors
    /// As there.
    pub fn status(&self) -> Result<StatusResponse> {
        self.run(|client| async move { client.status().await })
    }

    /// See [`crate::Client::lock`].
    ///
    /// # Errors
    /// As there.
    pub fn lock(&self, path: &str, options: LockOptions) -> Result<Lock> {
        let path = path.to_owned();
        let lock = self.run(|client| async move { client.lock(&path, options).await })?;
        Ok(Lock { lock: Some(lock), background: self.background.clone() })
    }

    /// See [`crate::Client::unlock_force`].
    ///
    /// # Errors
    /// As there.
    pub fn unlock_force(&self, path: &str) -> Result<u32> {
        let path = path.to_owned();
        self.run(|client| async move { client.unlock_force(&path).await })
    }

    /// Opens a file to read; see [`crate::Client::open`].
    ///
    /// # Errors
    /// As there.
    pub fn open(&self, path: &str) -> Result<File> {
        self.open_with(path, |options| {
            options.read(true);
        })
    }

    /// Opens a file for new content, to be visible at [`File::close`].
    ///
    /// # Errors
    /// As [`crate::OpenOptions::open`].
    pub fn create_file(&self, path: &str) -> Result<File> {
        self.open_with(path, |options| {
            options.write(true).create(true).truncate(true);
        })
    }

    /// Opens a file in any way: `choose` sets the options.
    ///
    /// # Errors
    /// As [`crate::OpenOptions::open`].
    pub fn open_with(&self, path: &str, choose: impl FnOnce(&mut crate::OpenOptions)) -> Result<File> {
        let path = path.to_owned();
        let mut options = self.client.open_options();
        choose(&mut options);
        let file = self.run(|_| async move { options.open(&path).await })?;
        Ok(File { file: Some(file), background: self.background.clone() })
    }
}

/// A held lock; see [`crate::Lock`].
#[derive(Debug)]
pub struct Lock {
    lock: Option<crate::Lock>,
    background: Arc<Background>,
}

impl Lock {
    /// Proves it at commit, rename and delete.
    pub fn token(&self) -> FencingToken {
        self.lock.as_ref().map(crate::Lock::token).unwrap_or_default()
    }

    /// Whether somebody else may hold it by now.
    pub fn is_lost(&self) -> bool {
        self.lock.as_ref().is_none_or(crate::Lock::is_lost)
    }

    /// Gives it back.
    ///
    /// # Errors
    /// As [`crate::Lock::unlock`].
    pub fn unlock(mut self) -> Result<()> {
        match self.lock.take() {
            Some(lock) => self.background.run(async move { lock.unlock().await })?,
            None => Ok(()),
        }
    }
}

impl From<&Lock> for FencingToken {
    fn from(lock: &Lock) -> Self {
        lock.token()
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        if let Some(lock) = self.lock.take() {
            // Where its background work can be begun.
            let _ = self.background.run(async move {
                let _ = tokio::time::timeout(Duration::from_secs(2), lock.unlock()).await;
            });
        }
    }
}

/// An open file; see [`crate::File`]. Dropped without [`File::close`], its changes are given up.
#[derive(Debug)]
pub struct File {
    file: Option<crate::File>,
    background: Arc<Background>,
}

impl File {
    /// Lends the file to the runtime for one operation.
    fn run<T, F, Fut>(&mut self, operation: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(crate::File) -> Fut,
        Fut: Future<Output = (crate::File, Result<T>)> + Send + 'static,
    {
        let file = self.file.take().ok_or_else(|| Error::invalid("the file is closed"))?;
        let (file, result) = self.background.run(operation(file))?;
        self.file = Some(file);
        result
    }

    /// See [`crate::File::read_at`].
    ///
    /// # Errors
    /// As there.
    pub fn read_at(&mut self, offset: u64, length: usize) -> Result<Bytes> {
        self.run(move |mut file| async move {
            let result = file.read_at(offset, length).await;
            (file, result)
        })
    }

    /// See [`crate::File::write_at`].
    ///
    /// # Errors
    /// As there.
    pub fn write_at(&mut self, offset: u64, bytes: impl Into<Bytes>) -> Result<()> {
        let bytes = bytes.into();
        self.run(move |mut file| async move {
            let result = file.write_at(offset, bytes).await;
            (file, result)
        })
    }

    /// See [`crate::File::set_len`].
    ///
    /// # Errors
    /// As there.
    pub fn set_len(&mut self, length: u64) -> Result<()> {
        self.run(move |mut file| async move {
            let result = file.set_len(length).await;
            (file, result)
        })
    }

    /// Its length now, with what is not committed.
    ///
    /// # Errors
    /// When it is closed.
    pub fn size(&mut self) -> Result<u64> {
        self.run(|mut file| async move {
            let result = file.size().await;
            (file, result)
        })
    }

    /// See [`crate::File::commit`].
    ///
    /// # Errors
    /// As there.
    pub fn commit(&mut self) -> Result<Attributes> {
        self.run(|mut file| async move {
            let result = file.commit().await;
            (file, result)
        })
    }

    /// See [`crate::File::close`].
    ///
    /// # Errors
    /// As there.
    pub fn close(mut self) -> Result<Attributes> {
        let file = self.file.take().ok_or_else(|| Error::invalid("the file is closed"))?;
        self.background.run(async move { file.close().await })?
    }
}

impl Drop for File {
    fn drop(&mut self) {
        if let Some(file) = self.file.take() {
            let _ = self
                .background
                .run(async move { tokio::time::timeout(Duration::from_secs(2), file.abort()).await });
        }
    }
}

impl Read for File {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut own = vec![0; buffer.len().min(READ_STEP_BYTES)];
        let read = self.run(|mut file| async move {
            let result = file.read(&mut own).await.map(|count| {
                own.truncate(count);
                own
            });
            (file, Ok(result))
        });
        let bytes = read.map_err(to_io)??;
        buffer[..bytes.len()].copy_from_slice(&bytes);
        Ok(bytes.len())
    }
}

impl Write for File {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let own = Bytes::copy_from_slice(&bytes[..bytes.len().min(READ_STEP_BYTES)]);
        let written = self.run(|mut file| async move {
            let result = file.write(&own).await;
            (file, Ok(result))
        });
        written.map_err(to_io)?
    }

    /// Makes what was written durable; others see it at [`File::commit`] or [`File::close`].
    fn flush(&mut self) -> io::Result<()> {
        let flushed = self.run(|mut file| async move {
            let result = file.flush().await;
            (file, result)
        });
        flushed.map_err(to_io)
    }
}

impl Seek for File {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let sought = self.run(move |mut file| async move {
            let result = file.seek(to).await;
            (file, Ok(result))
        });
        sought.map_err(to_io)?
    }
}
