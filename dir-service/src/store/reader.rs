//! Reads of a store: recent plans merged over an index, at one revision.

use super::{
    Changes, KeyRange, Page, SCAN_BYTES_MAX,
    index::IndexView,
    recent::{Applied, Changed, Recent, change},
};
use cairn_core::plan::{Key, Precondition, Versioned};
use cairn_proto::{Error, Reason, Result, id::Revision};
use futures::{StreamExt as _, stream};
use parking_lot::RwLock;
use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};
use tokio::sync::watch;

/// Most plans that a watcher takes at a time.
const WATCH_PLANS_MAX: usize = 256;
/// Plans freed under one lock.
const FORGET_PLANS: usize = 256;

/// Everything that readers may see. Only plans that are durable get in.
#[derive(Debug)]
pub(super) struct Reader {
    state: RwLock<State>,
    revision: watch::Sender<Revision>,
}

#[derive(Debug)]
struct State {
    recent: Recent,
    below: Arc<dyn IndexView>,
    closed: bool,
}

impl State {
    /// The revision to read at.
    fn resolve(&self, at: Option<Revision>) -> Result<Revision> {
        self.check_open()?;
        let last = self.recent.last();
        let revision = at.unwrap_or(last);
        if revision < self.recent.base() {
            return Err(compacted(revision, self.recent.base()));
        }
        if revision > last {
            return Err(Error::invalid(format!(
                "revision {revision} lies ahead of the store, which is at {last}"
            )));
        }
        Ok(revision)
    }

    fn check_open(&self) -> Result<()> {
        if self.closed { Err(Error::unavailable("the directory's store is closed")) } else { Ok(()) }
    }
}

/// The answer to a question about a revision that is no longer kept.
pub(super) fn compacted(revision: Revision, oldest: Revision) -> Error {
    Error::new(
        Reason::RevisionCompacted,
        format!(
            "revision {revision} is no longer kept, the oldest is {oldest}: read again at the current one"
        ),
    )
}

impl Reader {
    /// Shows an index.
    pub(super) fn over(below: Arc<dyn IndexView>) -> Self {
        let recent = Recent::over(below.revision());
        let revision = watch::Sender::new(recent.last());
        Self { state: RwLock::new(State { recent, below, closed: false }), revision }
    }

    /// Shows more plans.
    pub(super) fn publish(&self, plans: impl IntoIterator<Item = Arc<Applied>>) {
        let mut state = self.state.write();
        for plan in plans {
            state.recent.push(plan);
        }
        let last = state.recent.last();
        drop(state);
        self.revision.send_replace(last);
    }

    /// Puts the recent plans over a newer view of the index; those that it holds are freed by
    /// [`Reader::forget_some`].
    pub(super) fn rebase(&self, below: Arc<dyn IndexView>) {
        let mut state = self.state.write();
        if !state.closed {
            state.recent.rebase(below.revision());
            state.below = below;
        }
    }

    /// Frees some plans that the view below holds; whether there are more. Readers get in between.
    pub(super) fn forget_some(&self) -> bool {
        self.state.write().recent.forget_some(FORGET_PLANS)
    }

    /// Lets go of the index; every later call fails.
    pub(super) fn close(&self, nothing: Arc<dyn IndexView>) {
        let mut state = self.state.write();
        state.below = nothing;
        state.closed = true;
        drop(state);
        // Watchers wake and see that it is closed.
        self.revision.send_modify(|_| {});
    }

    /// The newest revision.
    pub(super) fn last(&self) -> Result<Revision> {
        let state = self.state.read();
        state.check_open()?;
        Ok(state.recent.last())
    }

    /// Follows the newest revision.
    pub(super) fn subscribe(&self) -> watch::Receiver<Revision> {
        self.revision.subscribe()
    }

    /// Runs `call` on the recent plans.
    pub(super) fn recent<T>(&self, call: impl FnOnce(&Recent) -> T) -> T {
        call(&self.state.read().recent)
    }

    pub(super) fn get(
        &self,
        keys: &[Key],
        at: Option<Revision>,
    ) -> Result<(Revision, Vec<Option<Versioned>>)> {
        let state = self.state.read();
        let revision = state.resolve(at)?;
        let found: Vec<_> = keys.iter().map(|key| state.recent.get(key, revision)).collect();
        let below = state.below.clone();
        drop(state);
        let missing: Vec<&Key> =
            keys.iter().zip(&found).filter(|(_, found)| found.is_none()).map(|(key, _)| key).collect();
        let mut older = if missing.is_empty() { Vec::new() } else { below.get(&missing)? }.into_iter();
        let values = found.into_iter().map(|found| found.unwrap_or_else(|| older.next().flatten())).collect();
        Ok((revision, values))
    }

    /// The revisions at which keys were last written, as far as they are durable.
    pub(super) fn written(&self, keys: &[Key]) -> Result<Vec<Option<Revision>>> {
        let (_, values) = self.get(keys, None)?;
        Ok(values.into_iter().map(|value| value.map(|value| value.revision)).collect())
    }

    pub(super) fn scan(
        &self,
        range: KeyRange,
        limit: usize,
        at: Option<Revision>,
    ) -> Result<(Revision, Page)> {
        // The index moves on under a long scan; one that did not fix its revision begins again.
        loop {
            match self.scan_once(range.clone(), limit.max(1), at) {
                Err(error) if error.reason == Reason::RevisionCompacted && at.is_none() => {}
                done => return done,
            }
        }
    }

    fn scan_once(&self, mut range: KeyRange, limit: usize, at: Option<Revision>) -> Result<(Revision, Page)> {
        let revision = self.state.read().resolve(at)?;
        let mut filler = Filler::new(limit);
        loop {
            // Recent plans and the view below belong together only under one lock.
            let state = self.state.read();
            state.resolve(Some(revision))?;
            let (recent, recent_more) = state.recent.range(&range, revision, limit + 1);
            let below = state.below.clone();
            drop(state);
            let older = below.scan(&range, limit + 1)?;
            match filler.merge(recent, recent_more, older) {
                Some(last) => range = range.behind(last),
                None => return Ok((revision, filler.page)),
            }
        }
    }

    /// Everything at one revision: the view below, and what changed over it. Both belong together.
    pub(super) fn snapshot(&self) -> Result<(Revision, Arc<dyn IndexView>, Vec<Changed>)> {
        let state = self.state.read();
        let revision = state.resolve(None)?;
        let (changed, _) = state.recent.range(&KeyRange::all(), revision, usize::MAX);
        Ok((revision, state.below.clone(), changed))
    }

    pub(super) fn watch(self: &Arc<Self>, prefix: Key, from: Revision) -> Result<Changes> {
        // Before it is answered, so that nothing published from now on is missed.
        let newest = self.revision.subscribe();
        let from = from.max(Revision(1));
        {
            let state = self.state.read();
            state.check_open()?;
            if from <= state.recent.base() {
                return Err(compacted(from, Revision(state.recent.base().0 + 1)));
            }
        }
        let watcher = Watcher {
            reader: self.clone(),
            newest,
            prefix,
            next: from,
            ready: VecDeque::new(),
            ended: false,
        };
        Ok(stream::unfold(watcher, |mut watcher| async move {
            let change = watcher.next().await?;
            Some((change, watcher))
        })
        .boxed())
    }
}

/// Merges pages of recent changes with pages of older entries.
pub(super) struct Filler {
    limit: usize,
    bytes: usize,
    page: Page,
}

impl Filler {
    pub(super) fn new(limit: usize) -> Self {
        Self { limit, bytes: 0, page: Page::default() }
    }

    /// Takes over what both pages tell for sure: up to the end of the one that ends first, where it has more behind
    /// it. Answers where to go on; `None` when the page is full or the range is done.
    fn merge(&mut self, recent: Vec<Changed>, recent_more: bool, older: Page) -> Option<Key> {
        let recent_end = recent.last().filter(|_| recent_more).map(|(key, _)| key.clone());
        let older_end = older.entries.last().filter(|_| older.more).map(|(key, _)| key.clone());
        let end = match (recent_end, older_end) {
            (Some(one), Some(other)) => Some(one.min(other)),
            (one, other) => one.or(other),
        };
        let mut recent = recent.into_iter().peekable();
        let mut older = older.entries.into_iter().peekable();
        loop {
            let newer_first = match (recent.peek(), older.peek()) {
                (None, None) => break,
                (Some((new, _)), Some((old, _))) => {
                    if new == old {
                        older.next();
                    }
                    older.peek().is_none_or(|(old, _)| new <= old)
                }
                (new, _) => new.is_some(),
            };
            let entry =
                if newer_first { recent.next() } else { older.next().map(|(key, value)| (key, Some(value))) };
            let Some((key, value)) = entry else { break };
            if end.as_ref().is_some_and(|end| key > *end) {
                break;
            }
            if let Some(value) = value
                && !self.take(key, value)
            {
                return None;
            }
        }
        end
    }

    fn take(&mut self, key: Key, value: Versioned) -> bool {
        let bytes = key.len() + value.value.len();
        let full = self.page.entries.len() == self.limit || self.bytes + bytes > SCAN_BYTES_MAX;
        if full && !self.page.entries.is_empty() {
            self.page.more = true;
            return false;
        }
        self.bytes += bytes;
        self.page.entries.push((key, value));
        true
    }
}

struct Watcher {
    reader: Arc<Reader>,
    newest: watch::Receiver<Revision>,
    prefix: Key,
    next: Revision,
    ready: VecDeque<super::Change>,
    ended: bool,
}

impl Watcher {
    async fn next(&mut self) -> Option<Result<super::Change>> {
        loop {
            if let Some(change) = self.ready.pop_front() {
                return Some(Ok(change));
            }
            if self.ended {
                return None;
            }
            self.newest.borrow_and_update();
            match self.fill() {
                Err(error) => {
                    self.ended = true;
                    return Some(Err(error));
                }
                Ok(true) => {}
                // The sender lives in the reader that is held here: an error cannot be.
                Ok(false) => self.newest.changed().await.ok()?,
            }
        }
    }

    /// Takes the next plans; whether there were any.
    fn fill(&mut self) -> Result<bool> {
        let state = self.reader.state.read();
        state.check_open()?;
        if self.next <= state.recent.base() {
            return Err(compacted(self.next, Revision(state.recent.base().0 + 1)));
        }
        let before = self.next;
        for plan in state.recent.since(self.next).take(WATCH_PLANS_MAX) {
            self.ready.extend(change(plan, &self.prefix));
            self.next = Revision(plan.revision.0 + 1);
        }
        Ok(self.next != before)
    }
}

/// Checks preconditions against what is durable and what is about to become so.
pub(super) struct Checker<'a> {
    reader: &'a Reader,
    /// Keys changed by plans that were accepted and are not published yet.
    pending: HashMap<Key, Option<Revision>>,
}

impl<'a> Checker<'a> {
    pub(super) fn new(reader: &'a Reader) -> Self {
        Self { reader, pending: HashMap::new() }
    }

    /// Whether all hold.
    pub(super) fn hold(&self, preconditions: &[Precondition]) -> Result<bool> {
        let unknown: Vec<Key> = preconditions
            .iter()
            .filter(|precondition| !self.pending.contains_key(precondition.key()))
            .map(|precondition| precondition.key().clone())
            .collect();
        let mut durable = self.reader.written(&unknown)?.into_iter();
        Ok(preconditions.iter().all(|precondition| {
            let revision = match self.pending.get(precondition.key()) {
                Some(revision) => *revision,
                None => durable.next().flatten(),
            };
            precondition.holds(revision)
        }))
    }

    /// Counts a plan in.
    pub(super) fn accept(&mut self, plan: &Applied) {
        for mutation in &plan.mutations {
            let written = match mutation {
                cairn_core::plan::Mutation::Put(..) => Some(plan.revision),
                cairn_core::plan::Mutation::Delete(_) => None,
            };
            self.pending.insert(mutation.key().clone(), written);
        }
    }
}
