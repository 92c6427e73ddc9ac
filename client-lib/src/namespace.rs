//! Names: make, list, look at, move and remove them; locks and health as an operator sees them.

use crate::{
    client::Client,
    directory,
    options::{
        Condition, DeleteOptions, ListOptions, RenameOptions, SetAttributes, WriteOptions, replication,
    },
    pages::Pages,
    task::Task,
};
use cairn_proto::{
    Error, Reason, Result, convert,
    path::FilePath,
    v1::{self, Attributes, Entry, ExplainResponse, Kind, LockInfo, StatusResponse, WatchResponse},
};
use futures::{Stream, TryStreamExt as _};
use std::time::Duration;

/// Locked files that a report of a recursive delete names; more are only counted.
pub const KEPT_MAX: usize = 10_000;

/// Times that a recursive delete begins anew because something was made behind it.
const DELETE_ROUNDS_MAX: u32 = 16;
/// Pause before a watch that broke is opened again.
const WATCH_PAUSE: Duration = Duration::from_millis(100);
/// Chunks that an explanation names.
const EXPLAINED_CHUNKS_MAX: usize = 262_144;

/// What a recursive delete did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DeleteReport {
    /// Number of entries removed.
    pub removed: u64,
    /// Locked files that stayed, and with them the directories above them; at most [`KEPT_MAX`] are named.
    pub kept: Vec<LockInfo>,
    /// Number of locked files that stayed.
    pub kept_count: u64,
}

impl Client {
    /// Makes an empty file.
    ///
    /// # Errors
    /// `ALREADY_EXISTS`, `NOT_FOUND` for a missing directory, `NOT_A_DIRECTORY`, `LOCK_HELD`.
    pub async fn create(&self, path: &str) -> Result<Attributes> {
        self.create_with(path, WriteOptions::new()).await
    }

    /// As [`Client::create`], with attributes or a lock held already.
    ///
    /// # Errors
    /// As [`Client::create`].
    pub async fn create_with(&self, path: &str, options: WriteOptions) -> Result<Attributes> {
        self.make(path, Kind::File, options).await
    }

    /// Makes a directory.
    ///
    /// # Errors
    /// As [`Client::create`].
    pub async fn mkdir(&self, path: &str) -> Result<Attributes> {
        self.mkdir_with(path, WriteOptions::new()).await
    }

    /// As [`Client::mkdir`], with attributes; a replication applies to what is made in it.
    ///
    /// # Errors
    /// As [`Client::create`].
    pub async fn mkdir_with(&self, path: &str, options: WriteOptions) -> Result<Attributes> {
        let attributes = self.make(path, Kind::Directory, options).await?;
        self.core().learn_directory(&FilePath::parse(path)?, &attributes);
        Ok(attributes)
    }

    /// Makes a directory and those above it that are missing. One that exists is fine.
    ///
    /// # Errors
    /// `NOT_A_DIRECTORY` when a file is in the way.
    pub async fn mkdir_all(&self, path: &str) -> Result<Attributes> {
        let path = FilePath::parse(path)?;
        // Mostly all of it, or all but the last name, exists.
        let mut missing = Vec::new();
        let mut at = path.clone();
        let mut found = loop {
            match self.stat(&at.to_string()).await {
                Ok(attributes) => break attributes,
                Err(error) if error.reason == Reason::NotFound && !at.is_root() => {
                    let parent = at.split_last().map(|(parent, _)| parent).unwrap_or_default();
                    missing.push(std::mem::replace(&mut at, parent));
                }
                Err(error) => return Err(error),
            }
        };
        for directory in missing.iter().rev() {
            let directory = directory.to_string();
            found = match self.mkdir(&directory).await {
                // Somebody else made it meanwhile.
                Err(error) if error.reason == Reason::AlreadyExists => self.stat(&directory).await?,
                answer => answer?,
            };
        }
        if found.kind() != Kind::Directory {
            return Err(
                Error::new(Reason::NotADirectory, format!("{path} is not a directory")).at(path.to_string())
            );
        }
        Ok(found)
    }

    async fn make(&self, path: &str, kind: Kind, options: WriteOptions) -> Result<Attributes> {
        let path = FilePath::parse(path)?.to_string();
        options.check()?;
        if options.condition.as_ref().is_some_and(|condition| *condition != Condition::Absent) {
            return Err(Error::invalid("only the condition 'absent' can hold for what is made").at(path));
        }
        let answer = self
            .core()
            .sessions
            .mutate(
                Duration::ZERO,
                |id, _| v1::CreateRequest {
                    request_id: Some(id),
                    path: path.clone(),
                    kind: kind as i32,
                    mode: options.mode,
                    replication: options.replication,
                    condition: options.wire_condition(),
                    token: options.wire_token(),
                    xattrs: options.xattrs.clone(),
                    mtime_ns: options.mtime_ns,
                },
                |channel, request| async move { directory::names(channel).create(request).await },
            )
            .await
            .map_err(|error| error.at(path.as_str()))?;
        convert::required(answer.attributes, "attributes")
    }

    /// Removes a file or an empty directory.
    ///
    /// # Errors
    /// `NOT_FOUND`, `NOT_EMPTY`, `LOCK_HELD`.
    pub async fn delete(&self, path: &str) -> Result<()> {
        self.delete_with(path, DeleteOptions::new()).await
    }

    /// As [`Client::delete`], with a condition or a lock held already.
    ///
    /// # Errors
    /// As [`Client::delete`]; `CONDITION_FAILED`, `LOCK_LOST`.
    pub async fn delete_with(&self, path: &str, options: DeleteOptions) -> Result<()> {
        let path = FilePath::parse(path)?.to_string();
        self.delete_step(&path, false, &options, String::new()).await?;
        Ok(())
    }

    /// Removes a directory with all that is in it, or a file. It goes in bounded steps: when it is interrupted, what
    /// was removed is gone and the rest is whole. Locked files and the directories above them stay and are reported.
    ///
    /// # Errors
    /// `NOT_FOUND`. A locked file is no error.
    pub async fn delete_recursive(&self, path: &str) -> Result<DeleteReport> {
        self.delete_recursive_with(path, DeleteOptions::new()).await
    }

    /// As [`Client::delete_recursive`], with a condition, or a lock that is held already: on `path` itself, not on
    /// something in it.
    ///
    /// # Errors
    /// As [`Client::delete_recursive`]; `CONDITION_FAILED`, `LOCK_LOST`.
    pub async fn delete_recursive_with(&self, path: &str, options: DeleteOptions) -> Result<DeleteReport> {
        let path = FilePath::parse(path)?.to_string();
        let mut report = DeleteReport::default();
        let mut page_token = String::new();
        let mut rounds = 0;
        loop {
            let step = match self.delete_step(&path, true, &options, page_token).await {
                Ok(step) => step,
                // Somebody else removed the rest.
                Err(error) if error.reason == Reason::NotFound && report.removed > 0 => return Ok(report),
                // What an earlier step reported as kept is in the way, or else something was made behind the walk.
                Err(error) if error.reason == Reason::NotEmpty && report.kept_count > 0 => return Ok(report),
                Err(error) if error.reason == Reason::NotEmpty && rounds < DELETE_ROUNDS_MAX => {
                    rounds += 1;
                    page_token = String::new();
                    continue;
                }
                Err(error) => return Err(error),
            };
            report.removed += step.removed;
            report.kept_count += step.kept.len() as u64;
            let room = KEPT_MAX - report.kept.len();
            report.kept.extend(step.kept.into_iter().take(room));
            if !step.more {
                return Ok(report);
            }
            page_token = step.next_page_token;
        }
    }

    async fn delete_step(
        &self,
        path: &str,
        recursive: bool,
        options: &DeleteOptions,
        page_token: String,
    ) -> Result<v1::DeleteResponse> {
        self.core()
            .sessions
            .mutate(
                Duration::ZERO,
                |id, _| v1::DeleteRequest {
                    request_id: Some(id),
                    path: path.to_owned(),
                    recursive,
                    condition: options.condition.clone().map(Into::into),
                    token: options.token.map(Into::into),
                    page_token: page_token.clone(),
                },
                |channel, request| async move { directory::names(channel).delete(request).await },
            )
            .await
            .map_err(|error| error.at(path))
    }

    /// Gives a file or directory another name, replacing a file or an empty directory there.
    ///
    /// # Errors
    /// `NOT_FOUND`, `NOT_EMPTY`, `LOCK_HELD`, `INVALID_ARGUMENT` for a directory into itself.
    pub async fn rename(&self, from: &str, to: &str) -> Result<Attributes> {
        self.rename_with(from, to, RenameOptions::new()).await
    }

    /// As [`Client::rename`], with conditions or locks held already.
    ///
    /// # Errors
    /// As [`Client::rename`]; `ALREADY_EXISTS`, `CONDITION_FAILED`, `LOCK_LOST`.
    pub async fn rename_with(&self, from: &str, to: &str, options: RenameOptions) -> Result<Attributes> {
        let (from, to) = (FilePath::parse(from)?.to_string(), FilePath::parse(to)?.to_string());
        let answer = self
            .core()
            .sessions
            .mutate(
                Duration::ZERO,
                |id, _| v1::RenameRequest {
                    request_id: Some(id),
                    from: from.clone(),
                    to: to.clone(),
                    condition: options.condition.clone().map(Into::into),
                    token: options.token.map(Into::into),
                    replaced_token: options.replaced_token.map(Into::into),
                    source_condition: options.source_condition.clone().map(Into::into),
                },
                |channel, request| async move { directory::names(channel).rename(request).await },
            )
            .await
            .map_err(|error| error.at(from.as_str()))?;
        // Directories below the names moved too.
        self.core().placements.clear();
        convert::required(answer.attributes, "attributes")
    }

    /// Changes attributes.
    ///
    /// # Errors
    /// `NOT_FOUND`, `LOCK_HELD`, `CONDITION_FAILED`.
    pub async fn set_attributes(&self, path: &str, changes: SetAttributes) -> Result<Attributes> {
        let path = FilePath::parse(path)?.to_string();
        convert::xattrs(&changes.message.xattrs)?;
        replication(changes.message.replication.unwrap_or(0))?;
        let answer = self
            .core()
            .sessions
            .mutate(
                Duration::ZERO,
                |id, _| v1::SetAttributesRequest {
                    request_id: Some(id),
                    path: path.clone(),
                    ..changes.message.clone()
                },
                |channel, request| async move { directory::names(channel).set_attributes(request).await },
            )
            .await
            .map_err(|error| error.at(path.as_str()))?;
        if changes.message.replication.is_some() {
            self.core().placements.clear();
        }
        convert::required(answer.attributes, "attributes")
    }

    /// Attributes of a file or directory.
    ///
    /// # Errors
    /// `NOT_FOUND`, `NOT_A_DIRECTORY`.
    pub async fn stat(&self, path: &str) -> Result<Attributes> {
        let path = FilePath::parse(path)?.to_string();
        let message = v1::LookupRequest { path: path.clone(), ..Default::default() };
        let answer =
            self.core().directory.lookup(message).await.map_err(|error| error.at(path.as_str()))?.answer;
        convert::required(answer.attributes, "attributes")
    }

    /// Whether there is something at a path.
    ///
    /// # Errors
    /// When that cannot be told.
    pub async fn exists(&self, path: &str) -> Result<bool> {
        match self.stat(path).await {
            Ok(_) => Ok(true),
            Err(error) if matches!(error.reason, Reason::NotFound | Reason::NotADirectory) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The entries of a directory in byte order of their names, with attributes; the next page is fetched while one is
    /// consumed. Entries made or removed meanwhile may or may not be seen, others are seen once.
    pub fn list(&self, path: &str) -> impl Stream<Item = Result<Entry>> + Send + Unpin + use<> {
        self.list_with(path, ListOptions::new())
    }

    /// As [`Client::list`], with options.
    pub fn list_with(
        &self,
        path: &str,
        options: ListOptions,
    ) -> impl Stream<Item = Result<Entry>> + Send + Unpin + use<> {
        let (client, path) = (self.clone(), path.to_owned());
        Box::pin(async_stream::try_stream! {
            let fetch = |page_token: String| {
                let (client, path, options) = (client.clone(), path.clone(), options.clone());
                Task::spawn(async move { client.list_page(&path, &page_token, &options).await })
            };
            let mut next = Some(fetch(String::new()));
            let mut pages = Pages::default();
            while let Some(page) = next.take() {
                let (entries, page_token) = page.await??;
                next = pages.next(page_token, entries.len())?.map(&fetch);
                for entry in entries {
                    yield entry;
                }
            }
        })
    }

    /// One page of a directory's entries, and the token of the next page, empty at the end.
    ///
    /// # Errors
    /// `NOT_FOUND`, `NOT_A_DIRECTORY`.
    pub async fn list_page(
        &self,
        path: &str,
        page_token: &str,
        options: &ListOptions,
    ) -> Result<(Vec<Entry>, String)> {
        let path = FilePath::parse(path)?.to_string();
        let message = v1::ListRequest {
            path: path.clone(),
            page_size: options.page_size,
            page_token: page_token.to_owned(),
            with_attributes: options.attributes,
            ..Default::default()
        };
        let answer = self
            .core()
            .directory
            .call(message, |channel, request| async move { directory::names(channel).list(request).await })
            .await
            .map_err(|error| error.at(path))?;
        Ok((answer.entries, answer.next_page_token))
    }

    /// All held locks.
    pub fn locks(&self) -> impl Stream<Item = Result<LockInfo>> + Send + Unpin + use<> {
        let client = self.clone();
        Box::pin(async_stream::try_stream! {
            let mut page_token = String::new();
            let mut pages = Pages::default();
            loop {
                let message = v1::ListLocksRequest { page_token, ..Default::default() };
                let page = client
                    .core()
                    .directory
                    .call(message, |channel, request| async move {
                        directory::names(channel).list_locks(request).await
                    })
                    .await?;
                let next = pages.next(page.next_page_token, page.locks.len())?;
                for lock in page.locks {
                    yield lock;
                }
                match next {
                    Some(token) => page_token = token,
                    None => return,
                }
            }
        })
    }

    /// Takes a lock away from whoever holds it; says how many holders that ended.
    ///
    /// # Errors
    /// `LOCK_LOST` when nobody holds one, `NOT_FOUND`.
    pub async fn unlock_force(&self, path: &str) -> Result<u32> {
        let path = FilePath::parse(path)?.to_string();
        let answer = self
            .core()
            .sessions
            .mutate(
                Duration::ZERO,
                |id, _| v1::UnlockRequest {
                    request_id: Some(id),
                    path: path.clone(),
                    token: None,
                    force: true,
                },
                |channel, request| async move { directory::names(channel).unlock(request).await },
            )
            .await
            .map_err(|error| error.at(path.as_str()))?;
        Ok(answer.ended)
    }

    /// Gives a lock back by its token: for a lock that was taken elsewhere.
    ///
    /// # Errors
    /// `LOCK_LOST` when the token's lock is not held.
    pub async fn unlock(&self, path: &str, token: cairn_proto::id::FencingToken) -> Result<()> {
        let path = FilePath::parse(path)?.to_string();
        if self.core().release(&path, token).await? {
            return Ok(());
        }
        Err(Error::new(Reason::LockLost, format!("no lock with the token {token} is held on {path}"))
            .at(path))
    }

    /// Health of everything.
    ///
    /// # Errors
    /// When no directory can be reached.
    pub async fn status(&self) -> Result<StatusResponse> {
        self.core()
            .directory
            .call(v1::StatusRequest {}, |channel, request| async move {
                directory::cluster(channel).status(request).await
            })
            .await
    }

    /// All records of the directory at one revision, in parts of about 1 MiB: the first says of which cluster,
    /// generation and revision, the last how many they are and their checksum. It is whole only with that one. Memory: a
    /// part at a time.
    ///
    /// # Errors
    /// `RESOURCE_EXHAUSTED` while other backups run; when no directory can be reached, also in the middle.
    pub async fn backup(&self) -> Result<impl Stream<Item = Result<v1::BackupResponse>> + Send + use<>> {
        let parts = self
            .core()
            .directory
            .call(v1::BackupRequest {}, |channel, request| async move {
                directory::cluster(channel).backup(request).await
            })
            .await?;
        Ok(parts.map_err(Error::from))
    }

    /// Where each chunk of a file is and why; of a very long file, the first 262,144 chunks.
    ///
    /// # Errors
    /// `NOT_FOUND`.
    pub async fn explain(&self, path: &str) -> Result<ExplainResponse> {
        let path = FilePath::parse(path)?.to_string();
        let mut whole: Option<ExplainResponse> = None;
        let mut page_token = String::new();
        let mut pages = Pages::default();
        loop {
            let message = v1::ExplainRequest { path: path.clone(), page_token };
            let mut page = self
                .core()
                .directory
                .call(message, |channel, request| async move {
                    directory::cluster(channel).explain(request).await
                })
                .await
                .map_err(|error| error.at(path.as_str()))?;
            let next = std::mem::take(&mut page.next_page_token);
            let next = pages.next(next, page.chunks.len()).map_err(|error| error.at(path.as_str()))?;
            let whole = match &mut whole {
                Some(whole) => {
                    whole.chunks.append(&mut page.chunks);
                    whole
                }
                none => none.insert(page),
            };
            match next {
                Some(token) if whole.chunks.len() < EXPLAINED_CHUNKS_MAX => page_token = token,
                next => {
                    whole.next_page_token = next.unwrap_or_default();
                    return Ok(std::mem::take(whole));
                }
            }
        }
    }

    /// Empties a file server so that it can be switched off, or takes that order back.
    ///
    /// # Errors
    /// `NOT_FOUND`.
    pub async fn drain(&self, server: cairn_proto::id::ServerId, cancel: bool) -> Result<v1::DrainResponse> {
        let message = v1::DrainRequest { server_id: server.0, cancel };
        self.core()
            .directory
            .call(message, |channel, request| async move { directory::cluster(channel).drain(request).await })
            .await
    }

    /// Strikes a file server that does not come back from the directory's records. For operators.
    ///
    /// # Errors
    /// `NOT_FOUND`; `CONDITION_FAILED` saying why, while anything depends on it.
    pub async fn forget(&self, server: cairn_proto::id::ServerId) -> Result<()> {
        let message = v1::ForgetRequest { server_id: server.0 };
        self.core()
            .directory
            .call(
                message,
                |channel, request| async move { directory::cluster(channel).forget(request).await },
            )
            .await
            .map(drop)
    }

    /// Starts a rebuild of the directory from the carriers that have reported, although acknowledged changes may be
    /// missing then. For operators.
    ///
    /// # Errors
    /// `NOT_SUPPORTED` when nothing is being rebuilt.
    pub async fn force_rebuild(&self) -> Result<u64> {
        let answer = self
            .core()
            .directory
            .call(v1::ForceRebuildRequest {}, |channel, request| async move {
                directory::cluster(channel).force_rebuild(request).await
            })
            .await?;
        Ok(answer.revision)
    }

    /// Changes to a file, or to the entries of a directory, from a revision on; 0 means from now. It goes on by itself
    /// after a broken connection, without leaving out or repeating a change.
    ///
    /// The stream ends with an error `REVISION_COMPACTED` when the revision is no longer kept: look again, then watch
    /// from there; and with `NOT_FOUND` when there is nothing at the path.
    pub fn watch(
        &self,
        path: &str,
        from_revision: u64,
    ) -> impl Stream<Item = Result<WatchResponse>> + Send + Unpin + use<> {
        let (client, path) = (self.clone(), path.to_owned());
        Box::pin(async_stream::try_stream! {
            let path = FilePath::parse(&path)?.to_string();
            let core = client.core().clone();
            // From the last revision seen on, leaving out as many of its changes as were handed out.
            let (mut from, mut seen) = (from_revision, 0);
            if from == 0 {
                // A break before the first change must not lose what happens meanwhile.
                let message = v1::LookupRequest { path: path.clone(), ..Default::default() };
                from = core
                    .directory
                    .lookup(message)
                    .await
                    .map_err(|error| error.at(path.as_str()))?
                    .answer
                    .revision
                    + 1;
            }
            loop {
                let message = v1::WatchRequest { path: path.clone(), from_revision: from };
                let mut changes = core
                    .directory
                    .call(message, |channel, request| async move { directory::names(channel).watch(request).await })
                    .await
                    .map_err(|error| error.at(path.as_str()))?;
                let mut skip = seen;
                let broken = loop {
                    match changes.message().await {
                        Ok(Some(change)) => {
                            if change.revision == from && skip > 0 {
                                skip -= 1;
                                continue;
                            }
                            if change.revision != from {
                                (from, seen) = (change.revision, 0);
                            }
                            seen += 1;
                            yield change;
                        }
                        Ok(None) => break Error::unavailable("the directory ended the watch"),
                        Err(status) => break crate::retry::restore(status, "the directory"),
                    }
                };
                if !broken.reason.is_transient() {
                    Err(broken.at(path.as_str()))?;
                }
                tokio::time::sleep(WATCH_PAUSE).await;
            }
        })
    }
}
