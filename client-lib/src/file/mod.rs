//! Handles on open files.

mod body;
mod io;
pub(crate) mod overlay;
mod write;

use crate::{
    client::Client,
    lock::Wish,
    options::{Condition, WriteOptions},
    read::{READ_BYTES_MAX, Sought, plan::Layout},
};
use body::Body;
use bytes::Bytes;
use cairn_proto::{
    Error, Reason, Result,
    id::FencingToken,
    limits,
    path::FilePath,
    v1::{Attributes, LockMode},
};
use futures::future::BoxFuture;
pub(crate) use io::to_io;
use overlay::Overlay;
use std::{sync::Arc, time::Duration};
use tokio::sync::Mutex;
use write::WriteSide;

/// An open file: one version of it to read, or a new version in the making.
///
/// A handle reads the version that was current when it was opened, whole, whatever others commit meanwhile. What is
/// written becomes one new version at [`File::commit`] or [`File::close`] (which is also `shutdown` of [`AsyncWrite`]),
/// nothing before; until then only the handle itself sees it. Dropped without either, the changes are given up. A
/// handle that writes holds the file's exclusive lock until it is closed or dropped.
///
/// [`AsyncWrite`]: tokio::io::AsyncWrite
pub struct File {
    body: Arc<Mutex<Body>>,
    /// An operation begun by a `poll_` function.
    pending: Option<BoxFuture<'static, Result<()>>>,
    flushing: bool,
    closing: bool,
    seek_to: Option<std::io::SeekFrom>,
    path: String,
}

impl std::fmt::Debug for File {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("File").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Client {
    /// Opens a file to read its current version.
    ///
    /// # Errors
    /// `NOT_FOUND`, `IS_A_DIRECTORY`.
    pub async fn open(&self, path: &str) -> Result<File> {
        self.open_options().read(true).open(path).await
    }

    /// For opening in other ways, as `std::fs::OpenOptions` does.
    pub fn open_options(&self) -> OpenOptions {
        OpenOptions {
            client: self.clone(),
            read: false,
            write: false,
            append: false,
            create: false,
            create_new: false,
            truncate: false,
            commit_on_flush: false,
            options: WriteOptions::new(),
        }
    }

    /// A handle for content that replaces all there was.
    pub(crate) async fn open_for_replacing(&self, path: &str, options: WriteOptions) -> Result<File> {
        let mut open = self.open_options();
        open.write(true).create(true).truncate(true).options(options);
        open.open(path).await
    }
}

/// How to open a file.
///
/// ```no_run
/// # async fn example(client: client_lib::Client) -> client_lib::Result<()> {
/// let mut file = client.open_options().read(true).write(true).create(true).open("/data/table").await?;
/// file.write_at(4096, "a page").await?;
/// file.close().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct OpenOptions {
    client: Client,
    read: bool,
    write: bool,
    append: bool,
    create: bool,
    create_new: bool,
    truncate: bool,
    commit_on_flush: bool,
    options: WriteOptions,
}

impl OpenOptions {
    /// For reading.
    pub fn read(&mut self, yes: bool) -> &mut Self {
        self.read = yes;
        self
    }

    /// For writing, under the file's exclusive lock.
    pub fn write(&mut self, yes: bool) -> &mut Self {
        self.write = yes;
        self
    }

    /// For writing at the end.
    pub fn append(&mut self, yes: bool) -> &mut Self {
        self.append = yes;
        self
    }

    /// Makes the file when there is none (at the first commit or close).
    pub fn create(&mut self, yes: bool) -> &mut Self {
        self.create = yes;
        self
    }

    /// Makes the file and fails with `ALREADY_EXISTS` when there is one.
    pub fn create_new(&mut self, yes: bool) -> &mut Self {
        self.create_new = yes;
        self
    }

    /// Begins with no content (at the first commit or close).
    pub fn truncate(&mut self, yes: bool) -> &mut Self {
        self.truncate = yes;
        self
    }

    /// Commits at every flush.
    pub fn commit_on_flush(&mut self, yes: bool) -> &mut Self {
        self.commit_on_flush = yes;
        self
    }

    /// Writes under a lock that is held already: a `&Lock`, or its token. The handle does not end it.
    pub fn token(&mut self, token: impl Into<FencingToken>) -> &mut Self {
        self.options.token = Some(token.into());
        self
    }

    /// What must hold at the first commit.
    pub fn condition(&mut self, condition: Condition) -> &mut Self {
        self.options.condition = Some(condition);
        self
    }

    /// How long to wait for somebody else's lock; otherwise the open is declined at once with `LOCK_HELD`.
    pub fn wait(&mut self, wait: Duration) -> &mut Self {
        self.options.wait = wait;
        self
    }

    /// Permission bits when it is made by this.
    pub fn mode(&mut self, mode: u32) -> &mut Self {
        self.options.mode = mode;
        self
    }

    /// All of token, condition, wait, mode, modification time and extended attributes.
    pub fn options(&mut self, options: WriteOptions) -> &mut Self {
        self.options = options;
        self
    }

    /// Opens it.
    ///
    /// # Errors
    /// `NOT_FOUND`, `IS_A_DIRECTORY`, `ALREADY_EXISTS` for `create_new`, `LOCK_HELD` with the holder and the time
    /// left, `INVALID_ARGUMENT` for options that do not go together.
    pub async fn open(&self, path: &str) -> Result<File> {
        let path = FilePath::parse(path)?;
        let writes = self.write || self.append;
        let makes = self.create || self.create_new;
        let aimless = !self.read && !writes;
        let needs_write = (makes || self.truncate) && !writes;
        if aimless || needs_write || (self.append && self.truncate) {
            return Err(Error::invalid(
                "a file is opened to read, write or append; create and truncate need write; append and truncate \
                 exclude each other",
            )
            .at(path.to_string()));
        }
        self.options.check()?;
        let body = if writes { self.open_to_write(&path).await? } else { self.open_to_read(&path).await? };
        Ok(File {
            body: Arc::new(Mutex::new(body)),
            pending: None,
            flushing: false,
            closing: false,
            seek_to: None,
            path: path.to_string(),
        })
    }

    async fn open_to_read(&self, path: &FilePath) -> Result<Body> {
        let core = self.client.core().clone();
        // The session's renewals keep the version readable.
        core.sessions.get().await?;
        let layout = core.layout(&Sought::Path(path.to_string()), 0, 0).await?;
        Ok(Body::new(core, path.to_string(), layout, true, None))
    }

    async fn open_to_write(&self, path: &FilePath) -> Result<Body> {
        let core = self.client.core().clone();
        let shown = path.to_string();
        let mut placement = core.placement(path).await?;
        let mut own = None;
        let token = match self.options.token {
            Some(token) => token,
            None => {
                let wish = Wish {
                    path: shown.clone(),
                    mode: LockMode::Exclusive,
                    wait: self.options.wait,
                    owner: core.sessions.owner().to_owned(),
                    grant_for: Some(placement.replication),
                };
                let hold = core.acquire(wish).await?.hold;
                own.insert(hold).token()
            }
        };
        // Under the lock the version cannot change any more. An early return gives the lock back.
        let found = match core.layout(&Sought::Path(shown.clone()), 0, u64::from(self.truncate)).await {
            Ok(layout) => Some(layout),
            Err(error) if error.reason == Reason::NotFound && (self.create || self.create_new) => None,
            Err(error) => return Err(error),
        };
        if self.create_new && found.is_some() {
            return Err(Error::new(Reason::AlreadyExists, format!("{shown} exists already")).at(shown));
        }
        let exists = found.is_some();
        let mut base = found.unwrap_or_default();
        if base.attributes.replication != 0 {
            placement.replication = base.attributes.replication;
        }
        if self.options.replication != 0 {
            placement.replication = self.options.replication;
        }
        let mut overlay = Overlay::new(base.size());
        if self.truncate {
            overlay.set_len(0);
            // Its extents are of no further use.
            base = Arc::new(Layout { extents: Vec::new(), ..(*base).clone() });
        }
        let mut options = self.options.clone();
        if self.create_new {
            options.condition = Some(Condition::Absent);
        }
        let mut side = WriteSide::new(&core, token, own, placement, overlay, options);
        (side.exists, side.append, side.commit_on_flush) = (exists, self.append, self.commit_on_flush);
        Ok(Body::new(core, shown, base, self.read, Some(side)))
    }
}

impl File {
    /// The path by which it was opened.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The version it was opened on, or that it committed last; without what is not committed.
    pub async fn attributes(&mut self) -> Result<Attributes> {
        Ok(self.settled().await?.base.attributes.clone())
    }

    /// Its length now, with what is not committed.
    pub async fn size(&mut self) -> Result<u64> {
        Ok(self.settled().await?.size())
    }

    /// The token of the lock it writes under.
    pub async fn token(&mut self) -> Result<Option<FencingToken>> {
        Ok(self.settled().await?.write.as_ref().map(|side| side.token))
    }

    /// Up to `length` bytes at `offset`: fewer only at the end of the file. The position does not move.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` when it was not opened to read; `LIMIT_EXCEEDED` beyond 4 GiB; `VERSION_GONE`; `UNAVAILABLE` when no replica answers.
    pub async fn read_at(&mut self, offset: u64, length: usize) -> Result<Bytes> {
        let mut body = self.settled().await?;
        body.check_readable()?;
        let rest = body.size().saturating_sub(offset);
        if rest.min(length as u64) > READ_BYTES_MAX {
            return Err(
                Error::limit(format!("one read returns at most {READ_BYTES_MAX} bytes")).at(&*body.path)
            );
        }
        let core = body.core.clone();
        Ok(core.operation(body.read_range(offset, length as u64)).await?.into_bytes())
    }

    /// Writes `bytes` at `offset`, or at the end of a file opened to append. The position does not move.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` when it was not opened to write; `LIMIT_EXCEEDED` when one version would take too many
    /// pieces; earlier failures of writing ahead.
    pub async fn write_at(&mut self, offset: u64, bytes: impl Into<Bytes>) -> Result<()> {
        let bytes = bytes.into();
        let mut body = self.settled().await?;
        let core = body.core.clone();
        core.operation(body.write_at(offset, &bytes)).await
    }

    /// Writes `bytes` at the end.
    ///
    /// # Errors
    /// As [`File::write_at`].
    pub async fn append(&mut self, bytes: impl Into<Bytes>) -> Result<()> {
        let bytes = bytes.into();
        let mut body = self.settled().await?;
        let end = body.size();
        body.write_at(end, &bytes).await
    }

    /// Gives it another length; a longer one ends in zeros that take no space.
    ///
    /// # Errors
    /// As [`File::write_at`].
    pub async fn set_len(&mut self, length: u64) -> Result<()> {
        if length > limits::FILE_BYTES_MAX {
            return Err(Error::limit(format!("a file has at most {} bytes", limits::FILE_BYTES_MAX)));
        }
        let mut body = self.settled().await?;
        body.writer()?.overlay.set_len(length);
        body.changed();
        Ok(())
    }

    /// Makes a range read as zeros, taking no space. The length does not change.
    ///
    /// # Errors
    /// As [`File::write_at`].
    pub async fn punch(&mut self, offset: u64, length: u64) -> Result<()> {
        let mut body = self.settled().await?;
        body.writer()?.overlay.punch(offset, length);
        body.changed();
        Ok(())
    }

    /// Waits until all that was written is durable on file servers. Others do not see it before a commit, unless the
    /// file was opened with `commit_on_flush`.
    ///
    /// # Errors
    /// The first failure of writing.
    pub async fn flush(&mut self) -> Result<()> {
        let mut body = self.settled().await?;
        let core = body.core.clone();
        core.operation(body.flush()).await
    }

    /// Makes all changes the next version, visible to everybody, and goes on holding the lock. Without changes nothing
    /// happens.
    ///
    /// # Errors
    /// `LOCK_LOST` when the session ended or an operator took the lock: nothing was changed; `CONDITION_FAILED`;
    /// `OUTCOME_UNKNOWN` when it can no longer be known whether it was applied.
    pub async fn commit(&mut self) -> Result<Attributes> {
        let mut body = self.settled().await?;
        let core = body.core.clone();
        core.operation(body.commit(false)).await
    }

    /// Commits if there are changes, and gives the lock back.
    ///
    /// # Errors
    /// As [`File::commit`]. The changes are given up then.
    pub async fn close(mut self) -> Result<Attributes> {
        let mut body = self.settled().await?;
        let core = body.core.clone();
        core.operation(body.close()).await
    }

    /// Gives the changes up and the lock back.
    pub async fn abort(mut self) {
        self.pending = None;
        self.body.lock().await.abort().await;
    }

    /// Adds a whole chunk at the end without copying it.
    pub(crate) async fn append_chunk(&mut self, bytes: Bytes) -> Result<()> {
        let mut body = self.settled().await?;
        let core = body.core.clone();
        core.operation(body.append_chunk(bytes)).await
    }

    /// How long the next chunk should be.
    pub(crate) async fn next_chunk_bytes(&mut self) -> usize {
        self.body.lock().await.next_chunk_bytes()
    }

    /// The body, once nothing is under way that a `poll_` function began.
    async fn settled(&mut self) -> Result<tokio::sync::MutexGuard<'_, Body>> {
        if let Some(pending) = &mut self.pending {
            let result = pending.await;
            self.pending = None;
            (self.flushing, self.closing) = (false, false);
            result?;
        }
        Ok(self.body.lock().await)
    }
}
