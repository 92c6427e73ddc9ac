//! What one client was told about a folder that it alone works in: what must be there, byte by byte.
//!
//! An operation without a known outcome leaves a doubt: all that it touched is as before, or all is as after. Names in
//! doubt are left alone until the end, and names are never used twice, so that an operation that comes late cannot hide
//! behind a later one.

use crate::nature;
use cairn_proto::v1::Kind;
use client_lib::{Client, Error, Reason};
use futures::StreamExt as _;
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

/// What is at a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    /// A file with these bytes.
    File(Arc<Vec<u8>>),
    /// An empty directory.
    Folder,
}

/// A name, what was there before an operation, and what is there after it.
pub type Change = (String, Option<Item>, Option<Item>);

/// An operation.
#[derive(Clone, Debug)]
pub struct Entry {
    /// In words.
    pub what: String,
    /// All that it touches.
    pub changes: Vec<Change>,
    /// When its answer came.
    pub answered_ms: u64,
}

/// The folder as it must be.
#[derive(Debug)]
pub struct Ledger {
    /// Its path.
    pub folder: String,
    /// What is certain.
    pub known: BTreeMap<String, Item>,
    /// What is not.
    pub doubts: Vec<Entry>,
    /// The operation under way.
    pub pending: Option<Entry>,
    /// Acknowledged of late: what a loss of the directory's store may undo, the latest last.
    recent: VecDeque<Entry>,
    /// Names of which nothing is certain any more.
    ignored: BTreeSet<String>,
    /// Names made so far.
    pub made: u64,
}

/// Acknowledgements older than this are not kept for undoing.
const RECENT_MS: u64 = 30_000;

impl Ledger {
    /// Of an empty folder.
    pub fn new(folder: &str) -> Self {
        Self {
            folder: folder.to_owned(),
            known: BTreeMap::new(),
            doubts: Vec::new(),
            pending: None,
            recent: VecDeque::new(),
            ignored: BTreeSet::new(),
            made: 0,
        }
    }

    /// The whole path of a name.
    pub fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.folder)
    }

    /// A name that was never used.
    pub fn fresh_name(&mut self) -> String {
        self.made += 1;
        format!("n{}", self.made)
    }

    /// Names in use, certain or not.
    pub fn names(&self) -> usize {
        self.known.len() + self.doubts.len() + self.ignored.len()
    }

    /// Notes an operation before it is asked for: changes of names, from what is known.
    pub fn begin(&mut self, what: String, after: Vec<(String, Option<Item>)>) {
        let changes = after
            .into_iter()
            .map(|(name, after)| (name.clone(), self.known.get(&name).cloned(), after))
            .collect();
        self.pending = Some(Entry { what, changes, answered_ms: 0 });
    }

    /// It was acknowledged.
    pub fn acknowledged(&mut self) {
        let Some(mut entry) = self.pending.take() else { return };
        entry.answered_ms = nature::now_ms();
        self.apply(&entry.changes, false);
        self.recent.push_back(entry);
        while self.recent.front().is_some_and(|entry| entry.answered_ms + RECENT_MS < nature::now_ms()) {
            self.recent.pop_front();
        }
    }

    /// Its outcome is not known.
    pub fn doubtful(&mut self, why: &str) {
        let Some(mut entry) = self.pending.take() else { return };
        for (name, ..) in &entry.changes {
            self.known.remove(name);
        }
        entry.what = format!("{} ({why})", entry.what);
        entry.answered_ms = nature::now_ms();
        self.doubts.push(entry);
    }

    /// It was declined: nothing has changed.
    pub fn declined(&mut self) {
        self.pending = None;
    }

    fn apply(&mut self, changes: &[Change], undo: bool) {
        for (name, before, after) in changes {
            match if undo { before } else { after } {
                Some(item) => self.known.insert(name.clone(), item.clone()),
                None => self.known.remove(name),
            };
        }
    }

    /// The directory's store was lost, and rebuilt: it may lack the last acknowledgements, but none from before
    /// `certain_ms`. Finds out which, and goes on from there.
    ///
    /// # Errors
    /// In words, what is there when that is no state of the allowed time; or why it could not be read.
    pub async fn rebuilt(&mut self, client: &Client, certain_ms: u64) -> Result<u64, String> {
        // What was in doubt stays so, with other states before it: nothing is certain of it any more.
        for doubt in std::mem::take(&mut self.doubts) {
            self.ignored.extend(doubt.changes.into_iter().map(|(name, ..)| name));
        }
        let mut undone = 0;
        let mut first = None;
        loop {
            let problems = self.compare(client).await?;
            if problems.is_empty() {
                self.recent.clear();
                return Ok(undone);
            }
            let first = first.get_or_insert(problems);
            let last = self.recent.pop_back().filter(|entry| entry.answered_ms >= certain_ms);
            let Some(last) = last else {
                return Err(format!(
                    "with {undone} undone, still no state that ever was: {}",
                    first.join("; ")
                ));
            };
            undone += 1;
            self.apply(&last.changes, true);
            for (name, ..) in &last.changes {
                if self.ignored.contains(name) {
                    self.known.remove(name);
                }
            }
        }
    }

    /// Reads everything back. Doubts are settled by what is found.
    ///
    /// # Errors
    /// When something could not be read, so that nothing is proven.
    pub async fn verify(&mut self, client: &Client) -> Result<Vec<String>, String> {
        let mut problems = self.compare(client).await?;
        for doubt in std::mem::take(&mut self.doubts) {
            let not_before = self.fits(client, &doubt, |(_, before, _)| before).await?;
            if let Some(not_before) = not_before
                && let Some(not_after) = self.fits(client, &doubt, |(.., after)| after).await?
            {
                problems
                    .push(format!("{}: neither undone ({not_before}) nor done ({not_after})", doubt.what));
            }
        }
        Ok(problems)
    }

    async fn fits(
        &self,
        client: &Client,
        doubt: &Entry,
        side: impl Fn(&Change) -> &Option<Item>,
    ) -> Result<Option<String>, String> {
        for change in &doubt.changes {
            if self.ignored.contains(&change.0) {
                continue;
            }
            if let Some(problem) = differs(client, &self.path(&change.0), side(change).as_ref()).await? {
                return Ok(Some(problem));
            }
        }
        Ok(None)
    }

    /// What is wrong about the names that are certain.
    async fn compare(&self, client: &Client) -> Result<Vec<String>, String> {
        let mut found =
            names(client, &self.folder).await.map_err(|error| format!("{}: {error}", self.folder))?;
        let mut problems = Vec::new();
        for (name, item) in &self.known {
            found.remove(name);
            problems.extend(differs(client, &self.path(name), Some(item)).await?);
        }
        for name in
            self.ignored.iter().chain(self.doubts.iter().flat_map(|it| it.changes.iter().map(|c| &c.0)))
        {
            found.remove(name);
        }
        problems
            .extend(found.iter().map(|name| format!("{} is there, though nobody left it", self.path(name))));
        Ok(problems)
    }

    /// What a listing shows that cannot be true.
    pub fn listed(&self, found: &BTreeSet<String>) -> Option<String> {
        let missing = self.known.keys().find(|name| !found.contains(*name));
        let doubted =
            |name: &String| self.doubts.iter().any(|it| it.changes.iter().any(|change| change.0 == *name));
        let extra = found
            .iter()
            .find(|&name| !self.known.contains_key(name) && !self.ignored.contains(name) && !doubted(name));
        match (missing, extra) {
            (Some(name), _) => Some(format!("a listing of {} lacks {name}", self.folder)),
            (_, Some(name)) => Some(format!("a listing of {} shows {name}, which is gone", self.folder)),
            _ => None,
        }
    }
}

/// The names of a folder.
pub async fn names(client: &Client, folder: &str) -> Result<BTreeSet<String>, Error> {
    let mut entries = client.list(folder);
    let mut names = BTreeSet::new();
    while let Some(entry) = entries.next().await {
        names.insert(entry?.name);
    }
    Ok(names)
}

/// How what is at a path differs from what should be.
async fn differs(client: &Client, path: &str, wanted: Option<&Item>) -> Result<Option<String>, String> {
    let failed = |error: Error| match error.reason {
        Reason::NotFound => Ok(Some(format!("{path} is missing"))),
        Reason::IsADirectory => Ok(Some(format!("{path} is a directory"))),
        Reason::ChunkNotFound | Reason::ChecksumMismatch => {
            Ok(Some(format!("{path} cannot be read: {error}")))
        }
        _ => Err(format!("{path}: {:?}: {error}", error.reason)),
    };
    match wanted {
        None => match client.stat(path).await {
            Err(error) if error.reason == Reason::NotFound => Ok(None),
            Err(error) => failed(error),
            Ok(_) => Ok(Some(format!("{path} is there"))),
        },
        Some(Item::Folder) => match client.stat(path).await {
            Ok(attributes) if attributes.kind() == Kind::Directory => Ok(None),
            Ok(_) => Ok(Some(format!("{path} is a file"))),
            Err(error) => failed(error),
        },
        Some(Item::File(bytes)) => match client.read(path).await {
            Ok(found) if found[..] == bytes[..] => Ok(None),
            Ok(found) => {
                let at = found.iter().zip(bytes.iter()).position(|(one, other)| one != other);
                Ok(Some(format!("{path} has other bytes: {} of {}, from {at:?}", found.len(), bytes.len())))
            }
            Err(error) => failed(error),
        },
    }
}
