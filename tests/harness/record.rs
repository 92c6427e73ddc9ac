//! What one client was told, kept outside of the cluster: which files must be there with which bytes, and which
//! operations have no known outcome.
//!
//! Each record belongs to one folder that one client alone works in, so it knows exactly what must be found there. An
//! operation that failed without saying whether it was done leaves a [`Doubt`]: all it touched is as before, or all is
//! as after. The names in a doubt are left alone until [`Record::verify`] has seen which it was.

use cairn_proto::{Reason, v1::Kind};
use client_lib::{Client, Error};
use futures::StreamExt as _;
use rand::{RngCore as _, SeedableRng as _, rngs::SmallRng};
use std::collections::{BTreeMap, BTreeSet};

/// Content that is described by a seed and a length, so that records stay small.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where its bytes come from.
    pub seed: u64,
    /// How many they are.
    pub length: usize,
}

impl Piece {
    /// The bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.length];
        SmallRng::seed_from_u64(self.seed).fill_bytes(&mut bytes);
        bytes
    }
}

/// What is at a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// A file of these pieces, one behind the other.
    File(Vec<Piece>),
    /// An empty directory.
    Folder,
}

/// A set of names with what is there; `None` for nothing.
pub type State = BTreeMap<String, Option<Content>>;

/// An operation without a known outcome.
#[derive(Clone, Debug)]
pub struct Doubt {
    /// Its words, for messages.
    pub what: String,
    /// If it was not done.
    pub before: State,
    /// If it was.
    pub after: State,
}

/// What must be found in one folder.
#[derive(Debug)]
pub struct Record {
    /// The folder, without a slash behind it.
    pub folder: String,
    /// What is certain.
    pub known: BTreeMap<String, Content>,
    /// What is not.
    pub doubts: Vec<Doubt>,
}

/// Whether an error leaves open whether something was done, or says that it could not be done now: what may be heard
/// while things break.
pub fn leaves_open(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::Unavailable
            | Reason::Rebuilding
            | Reason::TooFewServers
            | Reason::NoSpace
            | Reason::OutcomeUnknown
            | Reason::DeadlineExceeded
            | Reason::Overloaded
            | Reason::Conflict
            | Reason::SessionExpired
            | Reason::GrantClosed
            | Reason::LockHeld
            | Reason::LockLost
    )
}

impl Record {
    /// Of an empty folder.
    pub fn new(folder: &str) -> Self {
        Self { folder: folder.to_owned(), known: BTreeMap::new(), doubts: Vec::new() }
    }

    /// What is at a name, for a [`Doubt`].
    pub fn at(&self, name: &str) -> Option<Content> {
        self.known.get(name).cloned()
    }

    /// An operation was acknowledged.
    pub fn done(&mut self, after: State) {
        for (name, content) in after {
            match content {
                Some(content) => self.known.insert(name, content),
                None => self.known.remove(&name),
            };
        }
    }

    /// An operation failed.
    ///
    /// # Errors
    /// When the error says something that cannot be true of what was acknowledged before.
    pub fn failed(&mut self, what: &str, after: State, error: &Error) -> Result<(), String> {
        let honest = leaves_open(error.reason);
        let before: State = after.keys().map(|name| (name.clone(), self.at(name))).collect();
        for name in after.keys() {
            self.known.remove(name);
        }
        self.doubts.push(Doubt { what: format!("{what} ({error})"), before, after });
        if honest {
            Ok(())
        } else {
            Err(format!("{}: {what} failed with {:?}: {error}", self.folder, error.reason))
        }
    }

    /// Reads everything back and compares. Doubts are settled by what is found. Answers all that is wrong, in words.
    pub async fn verify(&mut self, client: &Client) -> Vec<String> {
        let mut problems = Vec::new();
        let mut found = match names(client, &self.folder).await {
            Ok(found) => found,
            Err(error) => return vec![format!("{}: could not be listed: {error}", self.folder)],
        };
        for (name, content) in &self.known {
            found.remove(name);
            if let Err(problem) = compare(client, &self.path(name), Some(content)).await {
                problems.push(format!("acknowledged, but {problem}"));
            }
        }
        for doubt in std::mem::take(&mut self.doubts) {
            for name in doubt.before.keys() {
                found.remove(name);
            }
            let before = self.fits(client, &doubt.before).await;
            let settled = match &before {
                Ok(()) => doubt.before,
                Err(not_before) => match self.fits(client, &doubt.after).await {
                    Ok(()) => doubt.after,
                    Err(not_after) => {
                        problems.push(format!(
                            "{}: neither undone ({not_before}) nor done ({not_after})",
                            doubt.what
                        ));
                        continue;
                    }
                },
            };
            self.done(settled);
        }
        problems.extend(found.iter().map(|name| format!("{} is there, but nobody made it", self.path(name))));
        problems
    }

    /// The whole path of a name.
    pub fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.folder)
    }

    async fn fits(&self, client: &Client, state: &State) -> Result<(), String> {
        for (name, content) in state {
            compare(client, &self.path(name), content.as_ref()).await?;
        }
        Ok(())
    }
}

async fn names(client: &Client, folder: &str) -> Result<BTreeSet<String>, Error> {
    let mut entries = client.list(folder);
    let mut names = BTreeSet::new();
    while let Some(entry) = entries.next().await {
        names.insert(entry?.name);
    }
    Ok(names)
}

async fn compare(client: &Client, path: &str, wanted: Option<&Content>) -> Result<(), String> {
    match wanted {
        None => match client.stat(path).await {
            Err(error) if error.reason == Reason::NotFound => Ok(()),
            Err(error) => Err(format!("{path}: {error}")),
            Ok(_) => Err(format!("{path} is there")),
        },
        Some(Content::Folder) => match client.stat(path).await {
            Ok(attributes) if attributes.kind() == Kind::Directory => Ok(()),
            Ok(_) => Err(format!("{path} is a file, not a directory")),
            Err(error) => Err(format!("{path}: {error}")),
        },
        Some(Content::File(pieces)) => {
            let bytes = client.read(path).await.map_err(|error| format!("{path}: {error}"))?;
            let mut rest = &bytes[..];
            for piece in pieces {
                if rest.len() < piece.length || rest[..piece.length] != piece.bytes() {
                    let wanted: usize = pieces.iter().map(|piece| piece.length).sum();
                    return Err(format!("{path} has other bytes ({} of {wanted})", bytes.len()));
                }
                rest = &rest[piece.length..];
            }
            if rest.is_empty() { Ok(()) } else { Err(format!("{path} has {} bytes too many", rest.len())) }
        }
    }
}
