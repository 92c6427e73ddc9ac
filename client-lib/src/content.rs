//! Whole contents in one call: read, write, append, truncate, and streams in and out.

use crate::{
    client::{Client, Core},
    lock::{Hold, Wish},
    options::{Condition, WriteOptions},
    read::{PIECE_BYTES_MAX, Sought},
    write::{chunk::Sealed, commit::replace_all, grants::Placement, store::Stored},
};
use bytes::{Bytes, BytesMut};
use cairn_proto::{
    Error, Reason, Result, limits,
    path::FilePath,
    v1::{self, Attributes, LockMode},
};
use std::{sync::Arc, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    time::Instant,
};

/// The replication of a directory is asked again after this time.
const PLACEMENT_AGE_MAX: Duration = Duration::from_secs(30);
/// Times that bytes are written again because their grant was closed before the commit.
const REWRITES_MAX: u32 = 5;

impl Client {
    /// The whole content of a file. For files that may be too large for memory: [`Client::get_writer`] or
    /// [`Client::open`].
    ///
    /// # Errors
    /// `NOT_FOUND`, `IS_A_DIRECTORY`; `LIMIT_EXCEEDED` for more than 4 GiB ([`crate::READ_BYTES_MAX`]).
    pub async fn read(&self, path: &str) -> Result<Bytes> {
        self.read_range(path, 0, u64::MAX).await
    }

    /// A range of a file; shorter when the file ends before.
    ///
    /// # Errors
    /// As [`Client::read`].
    pub async fn read_range(&self, path: &str, offset: u64, length: u64) -> Result<Bytes> {
        let operation = async move {
            let path = FilePath::parse(path)?.to_string();
            if length == 0 {
                return Ok(Bytes::new());
            }
            // On the wire 0 means to the end.
            let asked =
                if length > limits::FILE_BYTES_MAX - offset.min(limits::FILE_BYTES_MAX) { 0 } else { length };
            let (_, segments) = self.core().read_now(&path, offset, asked).await?;
            Ok(segments.into_bytes())
        };
        self.core().operation(operation).await
    }

    /// Makes `bytes` the content of a file, as one new version; makes the file when there is none.
    ///
    /// Up to one chunk this takes no lock of its own: it is lock, commit and unlock in one step. More than that takes
    /// the file's exclusive lock first.
    ///
    /// # Errors
    /// `LOCK_HELD` with the holder and the time left, `NOT_FOUND` for a missing directory, `IS_A_DIRECTORY`,
    /// `TOO_FEW_SERVERS`, `NO_SPACE`.
    pub async fn write(&self, path: &str, bytes: impl Into<Bytes>) -> Result<Attributes> {
        self.write_with(path, bytes, WriteOptions::new()).await
    }

    /// As [`Client::write`], with a condition, a lock held already, or attributes.
    ///
    /// # Errors
    /// As [`Client::write`]; `CONDITION_FAILED`, `LOCK_LOST`.
    pub async fn write_with(
        &self,
        path: &str,
        bytes: impl Into<Bytes>,
        options: WriteOptions,
    ) -> Result<Attributes> {
        let operation = async move {
            let (path, options) = self.prepare(path, options).await?;
            let bytes = bytes.into();
            if bytes.len() > self.core().chunk_bytes {
                let mut file = self.open_for_replacing(&path, options).await?;
                let written = async {
                    let mut rest = bytes;
                    while !rest.is_empty() {
                        let chunk = rest.split_to(file.next_chunk_bytes().await.min(rest.len()));
                        file.append_chunk(chunk).await?;
                    }
                    Ok(())
                };
                return match written.await {
                    Ok(()) => file.close().await,
                    Err(error) => {
                        file.abort().await;
                        Err(error)
                    }
                };
            }
            let sealed = (!bytes.is_empty()).then(|| Sealed::new(bytes));
            self.core().commit_chunk(&path, sealed.as_ref(), &options, &replace_all).await
        };
        self.core().operation(operation).await
    }

    /// Adds `bytes` at the end of a file, wherever that is then: concurrent appends are all kept. Makes the file when
    /// there is none.
    ///
    /// # Errors
    /// As [`Client::write`].
    pub async fn append(&self, path: &str, bytes: impl Into<Bytes>) -> Result<Attributes> {
        self.append_with(path, bytes, WriteOptions::new()).await
    }

    /// As [`Client::append`], with a condition, a lock held already, or attributes.
    ///
    /// # Errors
    /// As [`Client::write_with`].
    pub async fn append_with(
        &self,
        path: &str,
        bytes: impl Into<Bytes>,
        options: WriteOptions,
    ) -> Result<Attributes> {
        let operation = async move {
            let (path, options) = self.prepare(path, options).await?;
            let bytes = bytes.into();
            if bytes.len() > self.core().chunk_bytes {
                let mut open = self.open_options();
                open.append(true).create(true).options(options);
                let mut file = open.open(&path).await?;
                return match file.write_at(0, bytes).await {
                    Ok(()) => file.close().await,
                    Err(error) => {
                        file.abort().await;
                        Err(error)
                    }
                };
            }
            let sealed = (!bytes.is_empty()).then(|| Sealed::new(bytes));
            let edits = |stored: Option<&Stored>| {
                let append = v1::edit::Edit::Append(v1::AppendEdit { receipt_index: 0 });
                stored.map(|_| v1::Edit { edit: Some(append) }).into_iter().collect()
            };
            self.core().commit_chunk(&path, sealed.as_ref(), &options, &edits).await
        };
        self.core().operation(operation).await
    }

    /// Gives a file another length: cut off, or ending in zeros that take no space.
    ///
    /// # Errors
    /// `NOT_FOUND`, `LOCK_HELD`, `LIMIT_EXCEEDED`.
    pub async fn truncate(&self, path: &str, length: u64) -> Result<Attributes> {
        self.truncate_with(path, length, WriteOptions::new().condition(Condition::Exists)).await
    }

    /// As [`Client::truncate`], with a condition or a lock held already.
    ///
    /// # Errors
    /// As [`Client::truncate`]; `CONDITION_FAILED`, `LOCK_LOST`.
    pub async fn truncate_with(&self, path: &str, length: u64, options: WriteOptions) -> Result<Attributes> {
        let operation = async move {
            if length > limits::FILE_BYTES_MAX {
                return Err(
                    Error::limit(format!("a file has at most {} bytes", limits::FILE_BYTES_MAX)).at(path)
                );
            }
            let (path, options) = self.prepare(path, options).await?;
            let missing = options.condition == Some(Condition::Exists);
            let edits = |_: Option<&Stored>| {
                vec![v1::Edit { edit: Some(v1::edit::Edit::Truncate(v1::TruncateEdit { length })) }]
            };
            let answer = self.core().commit_chunk(&path, None, &options, &edits).await;
            answer.map_err(|mut error| {
                // The condition was this call's own.
                if missing && error.reason == Reason::ConditionFailed && error.detail.current_version == 0 {
                    error = Error::not_found(format!("{path} does not exist")).at(path.as_str());
                }
                error
            })
        };
        self.core().operation(operation).await
    }

    /// Streams `reader` into a file, as one new version, in bounded memory with several chunks under way.
    ///
    /// # Errors
    /// As [`Client::write_with`]; `IO` when `reader` fails. Nothing is changed then.
    pub async fn put_reader<R>(&self, path: &str, reader: R, options: WriteOptions) -> Result<Attributes>
    where
        R: AsyncRead + Unpin,
    {
        let operation = async move {
            let mut reader = reader;
            let first = read_chunk(&mut reader, self.core().chunk_bytes).await?;
            if first.len() < self.core().chunk_bytes {
                // It has ended: one step, without a lock.
                return self.write_with(path, first, options).await;
            }
            let (path, options) = self.prepare(path, options).await?;
            let mut file = self.open_for_replacing(&path, options).await?;
            let copied = async {
                let mut chunk = first;
                while !chunk.is_empty() {
                    file.append_chunk(chunk).await?;
                    let size = file.next_chunk_bytes().await;
                    chunk = read_chunk(&mut reader, size).await?;
                }
                Ok(())
            };
            match copied.await {
                Ok(()) => file.close().await,
                Err(error) => {
                    file.abort().await;
                    Err(error)
                }
            }
        };
        self.core().operation(operation).await
    }

    /// Streams a file into `writer`, one whole version of it, in bounded memory with several pieces under way. Flushes
    /// `writer` at the end.
    ///
    /// # Errors
    /// As [`Client::read`]; `IO` when `writer` fails; `VERSION_GONE` when the version was replaced and its bytes
    /// collected meanwhile; `CHUNK_NOT_FOUND` when no server holds a copy of a part of it any more.
    pub async fn get_writer<W>(&self, path: &str, writer: W) -> Result<Attributes>
    where
        W: AsyncWrite + Unpin,
    {
        let operation = async move {
            let mut writer = writer;
            let path = FilePath::parse(path)?.to_string();
            let core = self.core();
            let layout = core.layout(&Sought::Path(path.clone()), 0, 0).await?;
            // Short ones are done long before anything of them could be collected.
            let _held = match layout.size() {
                0..=67_108_864 => None,
                _ => {
                    core.sessions.get().await?;
                    Some(core.readers.open(layout.revision))
                }
            };
            let parts = layout.parts(0, layout.size(), PIECE_BYTES_MAX)?;
            let mut parts = core.parts(parts);
            loop {
                let mut segments = match parts.next().await {
                    Ok(Some(segments)) => segments,
                    Ok(None) => break,
                    Err(error) if error.reason == Reason::ChunkNotFound => {
                        return Err(self.gone(&path, &layout.attributes, error).await);
                    }
                    Err(error) => return Err(error.at(path)),
                };
                while let Some(bytes) = segments.pop() {
                    writer.write_all(&bytes).await?;
                }
            }
            writer.flush().await?;
            Ok(layout.attributes.clone())
        };
        self.core().operation(operation).await
    }

    /// Why a chunk of a version is not there: the version was replaced, or all copies of the chunk are lost.
    async fn gone(&self, path: &str, read: &Attributes, error: Error) -> Error {
        let is_current = match self.stat(path).await {
            Ok(now) => (now.inode, now.version) == (read.inode, read.version),
            Err(error) if matches!(error.reason, Reason::NotFound | Reason::NotADirectory) => false,
            // Nothing is known of it, so nothing more is said.
            Err(_) => return error.at(path),
        };
        if is_current {
            let mut lost = error.at(path);
            lost.detail.message = format!(
                "a part of it is lost: {}; `cairn explain` shows which servers held it, start them again",
                lost.detail.message
            );
            return lost;
        }
        Error::new(Reason::VersionGone, format!("{path} was replaced while it was read: {error}")).at(path)
    }

    /// Checks path and options; sets the replication that was asked for.
    async fn prepare(&self, path: &str, mut options: WriteOptions) -> Result<(String, WriteOptions)> {
        let parsed = FilePath::parse(path)?;
        options.check()?;
        if parsed.is_root() {
            return Err(Error::new(Reason::IsADirectory, "/ is a directory").at("/"));
        }
        let path = parsed.to_string();
        if options.replication == 0 {
            return Ok((path, options));
        }
        match self.create_with(&path, options.clone()).await {
            Ok(attributes) => options.condition = Some(Condition::Version(attributes.version)),
            Err(error)
                if error.reason == Reason::AlreadyExists && options.condition != Some(Condition::Absent) =>
            {
                let mut change = crate::options::SetAttributes::new().replication(options.replication);
                if let Some(token) = options.token {
                    change = change.token(token);
                }
                if let Some(condition) = options.condition.clone() {
                    change = change.condition(condition);
                }
                self.set_attributes(&path, change).await?;
            }
            Err(error) => return Err(error),
        }
        Ok((path, options))
    }
}

/// Up to `size` bytes; fewer only at the end.
async fn read_chunk<R: AsyncRead + Unpin>(reader: &mut R, size: usize) -> Result<Bytes> {
    let mut chunk = BytesMut::with_capacity(size.min(256 * 1024));
    while chunk.len() < size {
        if chunk.len() == chunk.capacity() {
            chunk.reserve(chunk.len().min(size - chunk.len()));
        }
        let left = size - chunk.len();
        if (&mut *reader).take(left as u64).read_buf(&mut chunk).await? == 0 {
            break;
        }
    }
    Ok(chunk.freeze())
}

impl Core {
    /// Which replication applies to new bytes of a path; known for a while, so that it costs no call for each write.
    ///
    /// # Errors
    /// As `DirectoryService.Lookup`, but for a missing directory, which the commit reports.
    pub async fn placement(&self, path: &FilePath) -> Result<Placement> {
        let shown = path.to_string();
        if let Some((replication, when)) = self.placements.get(&shown)
            && when.elapsed() < PLACEMENT_AGE_MAX
        {
            // A file with a factor of its own.
            return Ok(Placement { replication, path: shown });
        }
        let mut unknown = Vec::new();
        let mut at = path.clone();
        let mut replication = 0;
        while let Some((parent, _)) = at.split_last() {
            let name = parent.to_string();
            if let Some((known, when)) = self.placements.get(&name)
                && when.elapsed() < PLACEMENT_AGE_MAX
            {
                replication = known;
                break;
            }
            let message = v1::LookupRequest { path: name.clone(), ..Default::default() };
            match self.directory.lookup(message).await {
                Ok(found) => {
                    unknown.push(name);
                    let own = found.answer.attributes.unwrap_or_default().replication;
                    if own != 0 {
                        replication = own;
                        break;
                    }
                }
                Err(error) if matches!(error.reason, Reason::NotFound | Reason::NotADirectory) => break,
                Err(error) => return Err(error.at(shown)),
            }
            at = parent;
        }
        let now = Instant::now();
        for name in unknown {
            self.placements.insert(name, (replication, now));
        }
        Ok(Placement { replication, path: shown })
    }

    /// Notes what an answer says of a directory made just now.
    pub fn learn_directory(&self, path: &FilePath, attributes: &Attributes) {
        let known = |path: &FilePath| {
            let (replication, when) = self.placements.get(&path.to_string())?;
            (when.elapsed() < PLACEMENT_AGE_MAX).then_some(replication)
        };
        let replication = match attributes.replication {
            0 => path.split_last().and_then(|(parent, _)| known(&parent)),
            own => Some(own),
        };
        if let Some(replication) = replication {
            self.placements.insert(path.to_string(), (replication, Instant::now()));
        }
    }

    /// Writes at most one chunk and commits it: without a lock, unless one is given or has to be waited for.
    ///
    /// # Errors
    /// As `DirectoryService.Commit` and [`Core::store`].
    pub async fn commit_chunk(
        self: &Arc<Self>,
        path: &str,
        sealed: Option<&Sealed>,
        options: &WriteOptions,
        edits: &(dyn Fn(Option<&Stored>) -> Vec<v1::Edit> + Sync),
    ) -> Result<Attributes> {
        let placement = match (sealed, options.replication) {
            (None, _) => Placement { replication: 0, path: path.to_owned() },
            (Some(_), 0) => self.placement(&FilePath::parse(path)?).await?,
            (Some(_), replication) => Placement { replication, path: path.to_owned() },
        };
        // However this ends, also by the caller giving up: a lock that was waited for is given back.
        let mut own: Option<Hold> = None;
        let mut rewrites = 0;
        let answer = loop {
            let token = own.as_ref().map(Hold::token).or(options.token);
            let stored = match sealed {
                Some(sealed) => match self.store(sealed, &placement, None).await {
                    Ok(stored) => Some(stored),
                    Err(error) => break Err(error),
                },
                None => None,
            };
            let message = v1::CommitRequest {
                path: path.to_owned(),
                token: token.map(Into::into),
                edits: edits(stored.as_ref()),
                receipts: stored.iter().map(|stored| stored.receipt.clone()).collect(),
                condition: options.wire_condition(),
                unlock: own.is_some(),
                mode: options.mode,
                mtime_ns: options.mtime_ns,
                xattrs: options.xattrs.clone(),
                ..Default::default()
            };
            match self.commit(message).await {
                Err(error) if error.reason == Reason::GrantClosed && rewrites < REWRITES_MAX => {
                    rewrites += 1;
                    if let Some(stored) = &stored {
                        stored.grant.spoil();
                    }
                }
                Err(error)
                    if error.reason == Reason::LockHeld && token.is_none() && !options.wait.is_zero() =>
                {
                    let wish = Wish {
                        path: path.to_owned(),
                        mode: LockMode::Exclusive,
                        wait: options.wait,
                        owner: self.sessions.owner().to_owned(),
                        grant_for: None,
                    };
                    own = Some(self.acquire(wish).await?.hold);
                }
                answer => break answer,
            }
        };
        let attributes = answer.map_err(|error| error.at(path))?.attributes.unwrap_or_default();
        if let Some(hold) = &own {
            hold.forget();
        }
        if attributes.replication != 0 {
            self.placements.insert(path.to_owned(), (attributes.replication, Instant::now()));
        }
        Ok(attributes)
    }
}
