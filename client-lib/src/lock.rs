//! Locks: leases on a file, kept by the session.

use crate::{
    client::{Client, Core},
    directory,
    options::LockOptions,
    pages::Pages,
    session::{Session, Unsettled},
};
use cairn_proto::{
    Error, Reason, Result, convert,
    id::FencingToken,
    limits,
    path::FilePath,
    v1::{self, LockMode},
};
use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{runtime::Handle, sync::oneshot, time::Instant};
use tokio_util::sync::CancellationToken;

/// Longest that the directory is asked to wait in one call, so that a lost answer is noticed.
const WAIT_STEP: Duration =
    Duration::from_millis(if limits::LOCK_WAIT_MS_MAX < 10_000 { limits::LOCK_WAIT_MS_MAX } else { 10_000 });

/// Between two attempts to give a lock back that nobody holds any more.
const RELEASE_PAUSE: Duration = Duration::from_secs(1);

/// A lock that was granted.
#[derive(Debug)]
pub(crate) struct Granted {
    pub hold: Hold,
    pub attributes: Option<v1::Attributes>,
    pub revision: u64,
}

/// A lock that is held. Dropped before it was given back, it is given back in the background: the session would keep it
/// for as long as the client lives.
#[derive(Debug)]
pub(crate) struct Hold {
    core: Arc<Core>,
    path: String,
    token: FencingToken,
    session: Arc<Session>,
    /// Whether the directory answered that it is over.
    done: AtomicBool,
    /// Where to give it back, since it may be dropped outside of any runtime.
    runtime: Option<Handle>,
}

impl Hold {
    fn new(core: Arc<Core>, path: String, token: FencingToken, session: Arc<Session>) -> Self {
        let runtime = Handle::try_current().ok();
        Self { core, path, token, session, done: AtomicBool::new(false), runtime }
    }

    /// Proves it.
    pub fn token(&self) -> FencingToken {
        self.token
    }

    /// Gives it back; says whether it was held until then. Cancelled, or without an answer, it is still to be given
    /// back: twice does no harm.
    ///
    /// # Errors
    /// As [`Core::release`].
    pub async fn release(&self) -> Result<bool> {
        let held = self.core.release(&self.path, self.token).await?;
        self.forget();
        Ok(held)
    }

    /// It is over already: a commit gave it back.
    pub fn forget(&self) {
        self.done.store(true, Ordering::Release);
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if self.done.load(Ordering::Acquire) || self.session.is_ended() {
            return;
        }
        // A runtime that is stopping drops the task unrun; the session ends with the client then.
        let Some(runtime) = self.runtime.take().or_else(|| Handle::try_current().ok()) else { return };
        let (core, session) = (self.core.clone(), self.session.clone());
        runtime.spawn(core.release_at_last(std::mem::take(&mut self.path), self.token, session));
    }
}

/// What is asked for.
#[derive(Clone, Debug)]
pub(crate) struct Wish {
    pub path: String,
    pub mode: LockMode,
    pub wait: Duration,
    pub owner: String,
    /// The replication to ask a grant for along with the lock, when none is in hand.
    pub grant_for: Option<u32>,
}

impl Core {
    /// Takes a lock, waiting for other holders as long as wished. When the caller stops waiting and the lock is granted
    /// all the same, it is given back.
    ///
    /// # Errors
    /// As `DirectoryService.Lock`.
    pub async fn acquire(self: &Arc<Self>, wish: Wish) -> Result<Granted> {
        convert::owner(&wish.owner)?;
        let (sender, receiver) = oneshot::channel();
        let core = self.clone();
        tokio::spawn(async move {
            let granted = core.acquire_now(wish, &sender).await;
            // Whoever drops what was sent gives the lock back: here, or in the channel when nobody takes it out.
            drop(sender.send(granted));
        });
        receiver.await.unwrap_or_else(|_| Err(Error::unavailable("the runtime is stopping")))
    }

    async fn acquire_now(
        self: &Arc<Self>,
        wish: Wish,
        asker: &oneshot::Sender<Result<Granted>>,
    ) -> Result<Granted> {
        let end = Instant::now() + wish.wait;
        loop {
            let step = end.saturating_duration_since(Instant::now()).min(WAIT_STEP);
            let answer = self
                .sessions
                .mutate_session(
                    step,
                    |id, session| v1::LockRequest {
                        request_id: Some(id),
                        path: wish.path.clone(),
                        mode: wish.mode as i32,
                        session_id: session.id.0,
                        wait_ms: step.as_millis() as u64,
                        owner: wish.owner.clone(),
                        grant_count: match wish.grant_for {
                            Some(replication) if !session.grants.is_ready(replication) => {
                                limits::GRANT_COUNT_DEFAULT
                            }
                            _ => 0,
                        },
                        ..Default::default()
                    },
                    |channel, request| async move { directory::names(channel).lock(request).await },
                    |unsettled| drop(tokio::spawn(settle(Arc::downgrade(self), unsettled))),
                )
                .await;
            match answer {
                Ok(answer) => {
                    let session = self.sessions.get().await?;
                    if session.id.0 != answer.session_id {
                        // The session ended right behind the grant, and the lock with it.
                        continue;
                    }
                    let token = convert::required(answer.token, "token")?.into();
                    // First of all: whatever fails from here on gives the lock back.
                    let hold = Hold::new(self.clone(), wish.path.clone(), token, session.clone());
                    if let (Some(grant), Some(replication)) = (answer.grant, wish.grant_for) {
                        self.learn(grant.group.as_slice(), &grant.members);
                        session.grants.add(replication, grant)?;
                    }
                    return Ok(Granted { hold, attributes: answer.attributes, revision: answer.revision });
                }
                Err(error)
                    if error.reason == Reason::LockHeld && Instant::now() < end && !asker.is_closed() =>
                {
                    // Asked again at once, the directory waits; but not in a busy loop when it does not.
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                Err(error) => return Err(error.at(wish.path.as_str())),
            }
        }
    }

    /// Gives a lock back. One that is no longer held is as good as given back.
    ///
    /// # Errors
    /// As `DirectoryService.Unlock`, but for `LOCK_LOST`.
    pub async fn release(&self, path: &str, token: FencingToken) -> Result<bool> {
        let answer = self
            .sessions
            .mutate_session(
                Duration::ZERO,
                |id, _| v1::UnlockRequest {
                    request_id: Some(id),
                    path: path.to_owned(),
                    token: Some(token.into()),
                    force: false,
                },
                |channel, request| async move { directory::names(channel).unlock(request).await },
                drop,
            )
            .await;
        match answer {
            Ok(_) => Ok(true),
            Err(error) if matches!(error.reason, Reason::LockLost | Reason::NotFound) => Ok(false),
            Err(error) => Err(error.at(path)),
        }
    }

    /// Gives a lock back, however long the directory cannot be reached: nobody else does before its session ends.
    async fn release_at_last(self: Arc<Self>, path: String, token: FencingToken, session: Arc<Session>) {
        let (this, mut core) = (Arc::downgrade(&self), self);
        loop {
            let error = match core.release(&path, token).await {
                Ok(_) => return,
                Err(error) => error,
            };
            if !error.reason.is_transient() && error.reason != Reason::OutcomeUnknown {
                if !session.is_ended() {
                    tracing::warn!(path, %error, "a lock was not given back, it ends with its session");
                }
                return;
            }
            tracing::debug!(path, %error, "a lock is given back later");
            // A client that is dropped meanwhile ends its session.
            drop(core);
            tokio::time::sleep(RELEASE_PAUSE).await;
            if session.is_ended() {
                return;
            }
            let Some(again) = this.upgrade() else { return };
            core = again;
        }
    }
}

/// Learns what became of a request for a lock whose asker has given up, and gives back what was granted: the session would
/// keep it for as long as the client lives. The same request is sent again, with its wait, so that no earlier one can
/// still be waiting when this one is declined.
async fn settle(core: Weak<Core>, unsettled: Unsettled<v1::LockRequest>) {
    let Unsettled { message, session, .. } = &unsettled;
    let wait = Duration::from_millis(message.wait_ms);
    while !session.is_ended() {
        let Some(core) = core.upgrade() else { return };
        let asked = core
            .directory
            .call_with(wait, message.clone(), |channel, request| async move {
                directory::names(channel).lock(request).await
            })
            .await;
        match asked {
            Ok(granted) => {
                if let Some(token) = granted.token.filter(|_| granted.session_id == session.id.0) {
                    core.release_at_last(message.path.clone(), token.into(), session.clone()).await;
                }
                return;
            }
            Err(error) if error.reason.is_transient() => {
                tracing::debug!(path = message.path, %error, "whether a lock was granted is asked again later");
                drop(core);
                tokio::time::sleep(RELEASE_PAUSE).await;
            }
            Err(error) => {
                tracing::debug!(path = message.path, %error, "a lock that was given up was not granted");
                return;
            }
        }
    }
}

/// A held lock. It is kept by the client's session until [`Lock::unlock`] or drop.
///
/// Whoever acts on things outside of Cairn under a lock should watch [`Lock::lost`] and hand on [`Lock::token`], which
/// only grows from holder to holder. Cairn itself refuses commits of former holders in any case.
#[derive(Debug)]
pub struct Lock {
    mode: LockMode,
    granted: Granted,
    lost: CancellationToken,
    /// The file it is on, 0 as long as none was seen: a reservation moves to the file that is made under it.
    inode: Arc<AtomicU64>,
}

/// What became of a lock that is not found where it was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// It is held, on a file that has another name by now.
    Held,
    /// The file was removed, or replaced, by whoever showed the lock's token: nobody else could.
    Used,
    /// Somebody took it away, or its session ended.
    Lost,
}

impl Core {
    /// Looks for the lock of a token that is not found at its path any more.
    async fn fate(&self, path: &str, token: FencingToken, inode: u64) -> Result<Fate> {
        let mut page_token = String::new();
        let mut pages = Pages::default();
        loop {
            let message = v1::ListLocksRequest { page_token, ..Default::default() };
            let page = self
                .directory
                .call(message, |channel, request| async move {
                    directory::names(channel).list_locks(request).await
                })
                .await?;
            if page.locks.iter().any(|lock| lock.token.map(FencingToken::from) == Some(token)) {
                return Ok(Fate::Held);
            }
            match pages.next(page.next_page_token, page.locks.len())? {
                Some(token) => page_token = token,
                None => break,
            }
        }
        if inode == 0 {
            return Ok(Fate::Lost);
        }
        Ok(if self.inode_of(path).await? == inode { Fate::Lost } else { Fate::Used })
    }

    /// The inode that a path leads to; 0 for none.
    async fn inode_of(&self, path: &str) -> Result<u64> {
        let message = v1::LookupRequest { path: path.to_owned(), ..Default::default() };
        match self.directory.lookup(message).await {
            Ok(found) => Ok(found.answer.attributes.unwrap_or_default().inode),
            Err(error) if matches!(error.reason, Reason::NotFound | Reason::NotADirectory) => Ok(0),
            Err(error) => Err(error.at(path)),
        }
    }
}

impl Client {
    /// Takes a lock on a path; the name need not exist yet, its directory must.
    ///
    /// # Errors
    /// `LOCK_HELD` with the holder and the time left, at once or after the wait that the options allow; `NOT_FOUND`
    /// for a missing directory.
    pub async fn lock(&self, path: &str, options: LockOptions) -> Result<Lock> {
        let path = FilePath::parse(path)?.to_string();
        let core = self.core();
        let granted = core
            .acquire(Wish {
                path,
                mode: options.mode,
                wait: options.wait,
                owner: options.owner.unwrap_or_else(|| core.sessions.owner().to_owned()),
                grant_for: None,
            })
            .await?;
        let lost = granted.hold.session.doubtful().child_token();
        let inode = granted.attributes.as_ref().map_or(0, |attributes| attributes.inode);
        let inode = Arc::new(AtomicU64::new(inode));
        let lock = Lock { mode: options.mode, granted, lost, inode };
        lock.watch();
        Ok(lock)
    }
}

impl Lock {
    /// The path by which it was taken.
    pub fn path(&self) -> &str {
        &self.granted.hold.path
    }

    /// How it excludes others.
    pub fn mode(&self) -> LockMode {
        self.mode
    }

    /// Proves it at commit, rename and delete.
    pub fn token(&self) -> FencingToken {
        self.granted.hold.token
    }

    /// The file when the lock was granted; nothing when the name did not exist.
    pub fn attributes(&self) -> Option<&v1::Attributes> {
        self.granted.attributes.as_ref()
    }

    /// The revision at which it was granted.
    pub fn revision(&self) -> u64 {
        self.granted.revision
    }

    /// Whether somebody else may hold it by now: the session ended, was not confirmed for its whole TTL, or an
    /// operator took the lock away.
    pub fn is_lost(&self) -> bool {
        self.lost.is_cancelled() || self.granted.hold.session.is_unconfirmed()
    }

    /// Waits until it is lost.
    pub async fn lost(&self) {
        self.lost.cancelled().await;
    }

    /// Gives it back. A lock that ended with its file, by a change under its own token, is as good as given back; one
    /// whose file was renamed since is given back with the session.
    ///
    /// # Errors
    /// `LOCK_LOST` when it was lost before; as `DirectoryService.Unlock`.
    pub async fn unlock(self) -> Result<()> {
        let hold = &self.granted.hold;
        if hold.release().await? {
            return Ok(());
        }
        let inode = self.inode.load(Ordering::Relaxed);
        if hold.core.fate(&hold.path, hold.token, inode).await? != Fate::Lost {
            return Ok(());
        }
        Err(Error::new(
            Reason::LockLost,
            format!("the lock on {} was lost before it was given back", hold.path),
        )
        .at(hold.path.as_str()))
    }

    /// Asks now and then whether it is still held: an operator may have taken it away. It ends with the lock; a lock
    /// whose file was removed under its own token is watched no longer.
    fn watch(&self) {
        let lost = self.lost.clone();
        let hold = &self.granted.hold;
        let session = hold.session.clone();
        let core = Arc::downgrade(&hold.core);
        let (path, token, inode) = (hold.path.clone(), hold.token, self.inode.clone());
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    () = lost.cancelled() => return,
                    () = tokio::time::sleep(session.ttl / 3) => {}
                }
                let Some(core) = core.upgrade() else { return };
                let message = v1::RenewLockRequest {
                    session_id: session.id.0,
                    token: Some(token.into()),
                    path: path.clone(),
                    // Told by the session's own renewals alone: two calls may arrive in the other order.
                    oldest_revision: None,
                };
                let asked = core.directory.call(message, |channel, request| async move {
                    directory::names(channel).renew_lock(request).await
                });
                let answer = tokio::select! {
                    () = lost.cancelled() => return,
                    answer = asked => answer,
                };
                match answer {
                    Ok(_) if inode.load(Ordering::Relaxed) == 0 => {
                        inode.store(core.inode_of(&path).await.unwrap_or(0), Ordering::Relaxed);
                    }
                    Err(error) if error.reason == Reason::LockLost => {
                        // Renamed or removed by its own holder, it is not lost; not knowing, it may be.
                        match core.fate(&path, token, inode.load(Ordering::Relaxed)).await {
                            Ok(Fate::Held) => {}
                            Ok(Fate::Used) => return,
                            Ok(Fate::Lost) | Err(_) => lost.cancel(),
                        }
                    }
                    Err(error) if error.reason == Reason::SessionExpired => session.end(),
                    _ => {}
                }
            }
        });
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Ends the task that watches it. What is not given back is so by the hold.
        self.lost.cancel();
    }
}
