//! The client's standing with the directory: opened when first needed, kept alive, numbered requests.
//!
//! Two ways to lose one: the directory says so (`ended`), or nothing was confirmed for a whole TTL (`doubtful`). In
//! doubt locks count as lost, since somebody else may hold them by now; calls go on, since the directory decides.

use crate::{
    directory::{self, Directory},
    retry::{Retry, restore},
    write::grants::Grants,
};
use cairn_proto::{Error, Reason, Result, id::SessionId, limits, v1};
use parking_lot::Mutex;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::{
    sync::{Notify, mpsc},
    time::Instant,
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Request;

/// Requests may be this far ahead of the oldest unanswered one. Below [`limits::ANSWERS_PER_SESSION`], so that the
/// directory still knows the answer to any request that may be repeated.
const WINDOW: u64 = limits::ANSWERS_PER_SESSION - 24;
/// Longest between two renewals.
const RENEWAL_INTERVAL_MAX: Duration = Duration::from_millis(limits::RENEWAL_INTERVAL_MS_MAX);

/// One open session.
#[derive(Debug)]
pub(crate) struct Session {
    pub id: SessionId,
    pub cluster_id: String,
    pub ttl: Duration,
    pub grants: Grants,
    ended: CancellationToken,
    /// Of the locks granted since renewals were last confirmed without a gap.
    doubtful: Mutex<CancellationToken>,
    confirmed_at: Mutex<Instant>,
    confirmed: Notify,
    requests: Mutex<Requests>,
    answered: Notify,
}

#[derive(Debug, Default)]
struct Requests {
    last: u64,
    unanswered: BTreeSet<u64>,
}

impl Session {
    /// Whether the directory has said that it is over.
    pub fn is_ended(&self) -> bool {
        self.ended.is_cancelled()
    }

    /// The directory said that it is over.
    pub fn end(&self) {
        if !self.ended.is_cancelled() {
            tracing::warn!(session = self.id.0, "the session has ended, its locks are lost");
        }
        self.ended.cancel();
        self.doubtful.lock().cancel();
    }

    /// Cancelled when locks of this session that are granted now may be somebody else's.
    pub fn doubtful(&self) -> CancellationToken {
        self.doubtful.lock().clone()
    }

    /// A number for the next mutating request; it waits while too many are unanswered.
    pub async fn ticket(self: &Arc<Self>) -> Ticket {
        loop {
            let answered = self.answered.notified();
            tokio::pin!(answered);
            answered.as_mut().enable();
            {
                let mut requests = self.requests.lock();
                let oldest = requests.unanswered.first().copied().unwrap_or(requests.last + 1);
                if requests.last + 1 - oldest < WINDOW {
                    requests.last += 1;
                    let sequence = requests.last;
                    requests.unanswered.insert(sequence);
                    return Ticket { session: self.clone(), sequence };
                }
            }
            answered.await;
        }
    }

    /// The directory answered to what was sent then: the session lives. Locks that were in doubt stay lost, later
    /// ones do not.
    pub fn confirm(&self, sent_at: Instant) {
        {
            let mut confirmed = self.confirmed_at.lock();
            *confirmed = (*confirmed).max(sent_at);
        }
        {
            let mut doubtful = self.doubtful.lock();
            if doubtful.is_cancelled() && !self.is_ended() && sent_at.elapsed() < self.ttl {
                *doubtful = CancellationToken::new();
            }
        }
        self.confirmed.notify_one();
    }

    /// Whether nothing was confirmed for a whole TTL, as of this moment: a program that was stopped for a while may ask
    /// before [`Self::doubt`] has run again.
    pub fn is_unconfirmed(&self) -> bool {
        self.confirmed_at.lock().elapsed() >= self.ttl
    }

    /// Cancels what is in doubt whenever nothing was confirmed for a whole TTL.
    async fn doubt(&self) {
        loop {
            let end = *self.confirmed_at.lock() + self.ttl;
            if Instant::now() < end {
                tokio::time::sleep_until(end).await;
                continue;
            }
            let doubtful = self.doubtful();
            if !doubtful.is_cancelled() {
                tracing::warn!(
                    session = self.id.0,
                    "no renewal was confirmed within the ttl, locks count as lost"
                );
                doubtful.cancel();
            }
            self.confirmed.notified().await;
        }
    }
}

/// The number of a mutating request, until it is answered.
#[derive(Debug)]
pub(crate) struct Ticket {
    session: Arc<Session>,
    sequence: u64,
}

impl Ticket {
    pub fn id(&self) -> v1::RequestId {
        v1::RequestId { session_id: self.session.id.0, sequence: self.sequence, uuid: String::new() }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.session.requests.lock().unanswered.remove(&self.sequence);
        self.session.answered.notify_waiters();
    }
}

/// A request that was given up without an answer: it may have been done, and may still be.
#[derive(Debug)]
pub(crate) struct Unsettled<M> {
    /// As it was sent; with the same id it gets the answer that was lost.
    pub message: M,
    /// The session of which it was.
    pub session: Arc<Session>,
    /// Keeps the directory from forgetting the answer.
    _ticket: Option<Ticket>,
}

/// The revisions at which open handles read, and which of them the directory was told.
///
/// It keeps what is dropped after the oldest one it was told, and anything else for the grace time only. So a reader at
/// an older one than that, or the first, is told at once; one that is covered already, and one that goes, wait for the
/// next renewal. Handles that are opened and closed in quick succession cost no renewal each.
#[derive(Debug, Default)]
pub(crate) struct Readers {
    marks: Mutex<Marks>,
    /// Rings when [`Marks::are_told`] may have turned false.
    untold: Notify,
}

#[derive(Debug, Default)]
struct Marks {
    /// Handles at each revision.
    open: BTreeMap<u64, usize>,
    /// The mark sent last; 0 for none.
    told: u64,
}

impl Marks {
    fn oldest(&self) -> u64 {
        // A handle on a file that is yet to be made reads at no revision, and must not hide the others.
        self.open.range(1..).next().map_or(0, |(revision, _)| *revision)
    }

    /// Whether what was told covers every reader.
    fn are_told(&self) -> bool {
        let oldest = self.oldest();
        oldest == 0 || (self.told != 0 && self.told <= oldest)
    }
}

impl Readers {
    /// The oldest revision that is read, 0 for none, for a renewal that is sent now. When that is lost, another has to
    /// be sent: it counts as told.
    pub fn tell(&self) -> u64 {
        let mut marks = self.marks.lock();
        marks.told = marks.oldest();
        marks.told
    }

    /// Waits until there is a reader that is not covered by what was told.
    pub async fn untold(&self) {
        loop {
            // Asked for before the look, so that a reader that comes in between rings it.
            let rung = self.untold.notified();
            if !self.marks.lock().are_told() {
                return;
            }
            rung.await;
        }
    }

    pub fn open(self: &Arc<Self>, revision: u64) -> Reader {
        let mut marks = self.marks.lock();
        *marks.open.entry(revision).or_default() += 1;
        let are_told = marks.are_told();
        drop(marks);
        if !are_told {
            self.untold.notify_waiters();
        }
        Reader { readers: self.clone(), revision }
    }
}

/// Holds a revision readable while it lives.
#[derive(Debug)]
pub(crate) struct Reader {
    readers: Arc<Readers>,
    revision: u64,
}

impl Drop for Reader {
    fn drop(&mut self) {
        let open = &mut self.readers.marks.lock().open;
        if let Some(count) = open.get_mut(&self.revision) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.revision);
            }
        }
    }
}

#[derive(Debug, Default)]
struct Current {
    session: Option<Arc<Session>>,
    /// When the last attempt to open one failed, and why.
    failed: Option<(Instant, Error)>,
}

/// Opens sessions, one at a time, and keeps the current one alive.
#[derive(Debug)]
pub(crate) struct Sessions {
    directory: Arc<Directory>,
    readers: Arc<Readers>,
    retry: Arc<Retry>,
    owner: String,
    ttl: Duration,
    /// The cluster of the last session, as `Servers` has it.
    cluster_id: Arc<Mutex<String>>,
    current: tokio::sync::Mutex<Current>,
    closed: AtomicBool,
    /// Stops the background tasks.
    stop: CancellationToken,
}

impl Sessions {
    pub fn new(
        directory: Arc<Directory>,
        readers: Arc<Readers>,
        retry: Arc<Retry>,
        owner: String,
        ttl: Duration,
        cluster_id: Arc<Mutex<String>>,
    ) -> Self {
        Self {
            directory,
            readers,
            retry,
            owner,
            ttl,
            cluster_id,
            current: tokio::sync::Mutex::default(),
            closed: AtomicBool::new(false),
            stop: CancellationToken::new(),
        }
    }

    pub fn owner(&self) -> &str {
        &self.owner
    }

    /// The open session; opens one when there is none or it has ended.
    ///
    /// # Errors
    /// As `SessionService.Open`; `UNAVAILABLE` once the client is closed.
    pub async fn get(&self) -> Result<Arc<Session>> {
        let asked_at = Instant::now();
        let mut current = self.current.lock().await;
        if self.closed.load(Ordering::Acquire) {
            return Err(Error::new(Reason::InvalidArgument, "the client is closed: connect another"));
        }
        if let Some(session) = current.session.as_ref().filter(|session| !session.is_ended()) {
            return Ok(session.clone());
        }
        // Whoever waited for somebody else's attempt does not wait as long again for one of its own.
        if let Some((_, error)) = current.failed.as_ref().filter(|(at, _)| *at >= asked_at) {
            return Err(error.clone());
        }
        match self.open().await {
            Ok(session) => {
                *current = Current { session: Some(session.clone()), failed: None };
                Ok(session)
            }
            Err(error) => {
                current.failed = Some((Instant::now(), error.clone()));
                Err(error)
            }
        }
    }

    async fn open(&self) -> Result<Arc<Session>> {
        let message = v1::OpenRequest {
            request_id: Some(self.unnumbered(SessionId(0))),
            ttl_ms: self.ttl.as_millis() as u64,
            owner: self.owner.clone(),
        };
        let asked_at = Instant::now();
        let answer = self
            .directory
            .call(message, |channel, request| async move { directory::sessions(channel).open(request).await })
            .await?;
        self.cluster_id.lock().clone_from(&answer.cluster_id);
        self.directory.learn(&answer.directories);
        let ttl = Duration::from_millis(answer.ttl_ms.clamp(1, limits::SESSION_TTL_MS_MAX));
        let session = Arc::new(Session {
            id: SessionId(answer.session_id),
            cluster_id: answer.cluster_id,
            ttl,
            grants: Grants::default(),
            ended: CancellationToken::new(),
            doubtful: Mutex::default(),
            confirmed_at: Mutex::new(asked_at),
            confirmed: Notify::new(),
            requests: Mutex::default(),
            answered: Notify::new(),
        });
        tracing::debug!(session = session.id.0, ?ttl, "session opened");
        let (kept, doubted, stop) = (session.clone(), session.clone(), self.stop.clone());
        let (directory, readers) = (self.directory.clone(), self.readers.clone());
        tokio::spawn(async move {
            let ended = kept.ended.clone();
            tokio::select! {
                () = stop.cancelled() => {}
                () = ended.cancelled() => {}
                () = async { tokio::join!(keep(&kept, &directory, &readers), doubted.doubt()); } => {}
            }
        });
        Ok(session)
    }

    /// A request id outside of the numbers of `session`; two sessions never make the same one, also where random choices
    /// are seeded alike.
    fn unnumbered(&self, session: SessionId) -> v1::RequestId {
        let (high, low) = (self.retry.random(), self.retry.random() ^ session.0);
        let bits = u128::from(high) << 64 | u128::from(low);
        let uuid = uuid::Builder::from_random_bytes(bits.to_be_bytes()).into_uuid().to_string();
        v1::RequestId { uuid, ..Default::default() }
    }

    /// Makes a mutating call with a request id of the session: repeated with the same id when the answer is lost,
    /// and once more with a new session when the directory says that the old one ended before the call.
    ///
    /// A call for which the directory may wait for `extra` is not numbered but named by a UUID: others must not wait for
    /// it, see [`WINDOW`], and it may itself wait for one of them, such as the unlock that lets it go on.
    ///
    /// # Errors
    /// As the call; `OUTCOME_UNKNOWN` when the session ended so long after the first attempt that the directory may
    /// have forgotten an answer to it.
    pub async fn mutate<M, T, B, F, Fut>(&self, extra: Duration, build: B, method: F) -> Result<T>
    where
        M: Clone,
        B: Fn(v1::RequestId, &Session) -> M,
        F: Fn(tonic::transport::Channel, Request<M>) -> Fut,
        Fut: Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    {
        self.mutate_with(false, extra, build, method, drop).await
    }

    /// As [`Self::mutate`], for what ends with its session, such as a lock: it may be asked for again in any case. When it
    /// is given up without an answer, `unsettled` hears so.
    ///
    /// # Errors
    /// As the call.
    pub async fn mutate_session<M, T, B, F, Fut>(
        &self,
        extra: Duration,
        build: B,
        method: F,
        unsettled: impl FnOnce(Unsettled<M>),
    ) -> Result<T>
    where
        M: Clone,
        B: Fn(v1::RequestId, &Session) -> M,
        F: Fn(tonic::transport::Channel, Request<M>) -> Fut,
        Fut: Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    {
        self.mutate_with(true, extra, build, method, unsettled).await
    }

    async fn mutate_with<M, T, B, F, Fut>(
        &self,
        ends_with_session: bool,
        extra: Duration,
        build: B,
        method: F,
        unsettled: impl FnOnce(Unsettled<M>),
    ) -> Result<T>
    where
        M: Clone,
        B: Fn(v1::RequestId, &Session) -> M,
        F: Fn(tonic::transport::Channel, Request<M>) -> Fut,
        Fut: Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    {
        let mut sessions_left = 3;
        loop {
            let session = self.get().await?;
            let ticket = match extra.is_zero() {
                true => Some(session.ticket().await),
                false => None,
            };
            let id = ticket.as_ref().map_or_else(|| self.unnumbered(session.id), Ticket::id);
            let message = build(id, &session);
            let began = Instant::now();
            match self.directory.call_with(extra, message.clone(), &method).await {
                Err(error) if error.reason == Reason::SessionExpired => {
                    session.end();
                    // Answers are kept for a TTL after the end of their session, so that until then this means that
                    // nothing was applied. Later it may only mean that the answer to an earlier attempt is gone.
                    if !ends_with_session && began.elapsed() >= session.ttl {
                        return Err(Error::new(
                            Reason::OutcomeUnknown,
                            format!(
                                "the session ended while the directory could not be reached for {} ms, so it is not \
                                 known whether the change was made: look before you repeat it",
                                began.elapsed().as_millis()
                            ),
                        ));
                    }
                    sessions_left -= 1;
                    if sessions_left == 0 {
                        return Err(error);
                    }
                }
                answer => {
                    if answer.as_ref().is_err_and(|error| error.reason.is_transient()) {
                        unsettled(Unsettled { message, session, _ticket: ticket });
                    }
                    return answer;
                }
            }
        }
    }

    /// Ends the session with its locks and grants.
    ///
    /// # Errors
    /// As `SessionService.Close`; the session then ends after its TTL.
    pub async fn close(&self) -> Result<()> {
        self.closed.store(true, Ordering::Release);
        let session = self.current.lock().await.session.take();
        self.stop.cancel();
        let Some(session) = session else { return Ok(()) };
        session.doubtful().cancel();
        if session.is_ended() {
            return Ok(());
        }
        let message = v1::CloseRequest { session_id: session.id.0 };
        self.directory
            .call(
                message,
                |channel, request| async move { directory::sessions(channel).close(request).await },
            )
            .await?;
        session.ended.cancel();
        Ok(())
    }
}

impl Drop for Sessions {
    fn drop(&mut self) {
        self.stop.cancel();
        let Some(session) = self.current.get_mut().session.take().filter(|session| !session.is_ended())
        else {
            return;
        };
        session.doubtful().cancel();
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let directory = self.directory.clone();
        runtime.spawn(async move {
            let message = v1::CloseRequest { session_id: session.id.0 };
            let call = directory.call(message, |channel, request| async move {
                directory::sessions(channel).close(request).await
            });
            // Otherwise the session ends after its TTL.
            let _ = tokio::time::timeout(Duration::from_secs(2), call).await;
        });
    }
}

/// Renews a session until it has ended.
async fn keep(session: &Session, directory: &Directory, readers: &Readers) {
    let interval = (session.ttl / 3).min(RENEWAL_INTERVAL_MAX);
    loop {
        let error = keep_by_stream(session, directory, readers, interval).await;
        if is_over(&error) {
            return session.end();
        }
        tracing::debug!(session = session.id.0, %error, "the keep-alive stream broke");
        // A stream may break where single calls go through.
        match renew(session, directory, readers, interval).await {
            Err(error) if is_over(&error) => return session.end(),
            Err(error) => {
                tracing::debug!(session = session.id.0, %error, "the session could not be renewed");
                tokio::time::sleep((interval / 10).min(Duration::from_millis(500))).await;
            }
            Ok(()) => pause_until(Instant::now() + interval / 2, readers).await,
        }
    }
}

/// Waits for the time of the next renewal: then, or as soon as the directory does not know of a reader.
async fn pause_until(then: Instant, readers: &Readers) {
    tokio::select! {
        () = tokio::time::sleep_until(then) => {}
        () = readers.untold() => {}
    }
}

fn is_over(error: &Error) -> bool {
    matches!(error.reason, Reason::SessionExpired | Reason::NotFound)
}

/// Renews by a single call.
async fn renew(
    session: &Session,
    directory: &Directory,
    readers: &Readers,
    patience: Duration,
) -> Result<()> {
    let (index, channel) = directory.channel()?;
    let sent_at = Instant::now();
    let message = v1::RenewLockRequest {
        session_id: session.id.0,
        oldest_revision: Some(readers.tell()),
        ..Default::default()
    };
    let mut client = directory::names(channel);
    match tokio::time::timeout(patience, client.renew_lock(message)).await {
        Ok(Ok(_)) => {
            session.confirm(sent_at);
            Ok(())
        }
        Ok(Err(status)) => {
            let error = restore(status, &directory.address(index));
            if error.reason.is_transient() {
                directory.rotate(index);
            }
            Err(error)
        }
        Err(_) => {
            directory.rotate(index);
            Err(Error::new(Reason::DeadlineExceeded, "the directory did not answer a renewal"))
        }
    }
}

/// Renews by a stream until it breaks; says why.
async fn keep_by_stream(
    session: &Session,
    directory: &Directory,
    readers: &Readers,
    interval: Duration,
) -> Error {
    let (index, channel) = match directory.channel() {
        Ok(found) => found,
        Err(error) => return error,
    };
    let (sender, receiver) = mpsc::channel(2);
    let renewal = || v1::KeepAliveRequest { session_id: session.id.0, oldest_revision: readers.tell() };
    let mut sent_at = Instant::now();
    let silent = || Error::new(Reason::DeadlineExceeded, "the directory did not answer a keep-alive");
    if sender.try_send(renewal()).is_err() {
        return silent();
    }
    let mut client = directory::sessions(channel);
    let opening = tokio::time::timeout(interval, client.keep_alive(ReceiverStream::new(receiver))).await;
    let mut answers = match opening {
        Ok(Ok(answers)) => answers.into_inner(),
        Ok(Err(status)) => return restore(status, &directory.address(index)),
        Err(_) => return silent(),
    };
    loop {
        match tokio::time::timeout(interval, answers.message()).await {
            Ok(Ok(Some(_))) => session.confirm(sent_at),
            Ok(Ok(None)) => return Error::unavailable("the directory ended the keep-alive stream"),
            Ok(Err(status)) => return restore(status, &directory.address(index)),
            Err(_) => return silent(),
        }
        // Half-way answers do not bring the next renewal forward. However many readers came meanwhile, there is one
        // renewal under way at a time.
        pause_until(sent_at + interval, readers).await;
        sent_at = Instant::now();
        if sender.try_send(renewal()).is_err() {
            return silent();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session() -> Arc<Session> {
        Arc::new(Session {
            id: SessionId(1),
            cluster_id: String::new(),
            ttl: Duration::from_secs(10),
            grants: Grants::default(),
            ended: CancellationToken::new(),
            doubtful: Mutex::default(),
            confirmed_at: Mutex::new(Instant::now()),
            confirmed: Notify::new(),
            requests: Mutex::default(),
            answered: Notify::new(),
        })
    }

    #[tokio::test]
    async fn numbers_grow_and_stay_within_what_the_directory_remembers() {
        let session = session();
        let first = session.ticket().await;
        assert_eq!(first.id().sequence, 1);
        for expected in 2..=WINDOW {
            assert_eq!(session.ticket().await.id().sequence, expected);
        }
        let next = tokio::spawn({
            let session = session.clone();
            async move { session.ticket().await.id().sequence }
        });
        tokio::task::yield_now().await;
        assert!(!next.is_finished(), "the first request is still unanswered");
        drop(first);
        assert_eq!(next.await.unwrap(), WINDOW + 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_session_that_was_not_confirmed_in_time_says_so_before_any_task_has_run() {
        let session = session();
        assert!(!session.is_unconfirmed());
        tokio::time::advance(Duration::from_secs(11)).await;
        assert!(session.is_unconfirmed(), "nothing else has run since");
        session.confirm(Instant::now());
        assert!(!session.is_unconfirmed());
    }

    #[tokio::test(start_paused = true)]
    async fn locks_in_doubt_stay_lost_and_later_ones_are_held_again() {
        let session = session();
        let doubting = tokio::spawn({
            let session = session.clone();
            async move { session.doubt().await }
        });
        for _ in 0..2 {
            let lock = session.doubtful().child_token();
            assert!(!lock.is_cancelled());
            lock.cancelled().await;
            session.confirm(Instant::now());
            assert!(lock.is_cancelled());
        }
        let lock = session.doubtful();
        tokio::time::sleep(session.ttl / 2).await;
        session.confirm(Instant::now());
        tokio::time::sleep(session.ttl * 3 / 4).await;
        assert!(!lock.is_cancelled(), "it was renewed in time");
        session.end();
        session.confirm(Instant::now());
        assert!(lock.is_cancelled() && session.doubtful().is_cancelled());
        doubting.abort();
    }

    #[test]
    fn the_oldest_open_reader_counts() {
        let readers = Arc::new(Readers::default());
        assert_eq!(readers.tell(), 0);
        let new_file = readers.open(0);
        assert_eq!(readers.tell(), 0);
        let (late, early, again) = (readers.open(9), readers.open(4), readers.open(4));
        assert_eq!(readers.tell(), 4);
        drop(early);
        assert_eq!(readers.tell(), 4);
        drop(again);
        assert_eq!(readers.tell(), 9);
        drop((late, new_file));
        assert_eq!(readers.tell(), 0);
    }

    #[test]
    fn a_reader_is_told_at_once_when_nothing_told_covers_it() {
        let readers = Arc::new(Readers::default());
        let are_told = || readers.marks.lock().are_told();
        let new_file = readers.open(0);
        assert!(are_told(), "a file that is yet to be made is read at no revision");
        let first = readers.open(9);
        assert!(!are_told());
        assert_eq!(readers.tell(), 9);
        let (same, later) = (readers.open(9), readers.open(12));
        assert!(are_told());
        let older = readers.open(4);
        assert!(!are_told());
        assert_eq!(readers.tell(), 4);
        drop((first, same, later, older));
        let next = readers.open(13);
        assert!(are_told(), "the mark that was told last is older");
        drop(next);
        assert_eq!(readers.tell(), 0);
        let next = readers.open(14);
        assert!(!are_told(), "the directory was told of none");
        drop((next, new_file));
        assert!(are_told());
    }

    #[tokio::test(start_paused = true)]
    async fn a_pause_ends_early_for_a_reader_that_is_not_covered() {
        let readers = Arc::new(Readers::default());
        let begun = Instant::now();
        let hour = Duration::from_secs(3_600);
        let opening = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            readers.open(7)
        };
        let ((), open) = tokio::join!(pause_until(begun + hour, &readers), opening);
        assert_eq!(begun.elapsed(), Duration::from_secs(1));
        assert_eq!(readers.tell(), 7);
        let covered = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            readers.open(8)
        };
        let ((), _covered) = tokio::join!(pause_until(begun + hour, &readers), covered);
        assert_eq!(begun.elapsed(), hour);
        drop(open);
    }
}
