//! Filling a new store from a checkpoint and journal records: rebuild, restore, migration.

use super::{Found, JournaledConfig, JournaledStore, StoreIdentity, meta::Meta, open};
use crate::store::{
    codec,
    index::{Index, IndexChange},
};
use bytes::Bytes;
use cairn_core::plan::{Key, Versioned};
use cairn_proto::{Error, Reason, Result, id::Revision};
use disk::Disk;
use futures::{Stream, StreamExt as _};
use std::{path::Path, sync::Arc};

/// Entries or plans that go to the index at a time.
const BATCH_ITEMS: usize = 8_192;
/// Bytes of them.
const BATCH_BYTES: usize = 4 * 1024 * 1024;

/// A store that is being filled: entries at one revision, then plans behind it, then [`Restore::finish`]. Until then
/// the directory holds an incomplete store, whatever happens: dropped or crashed, it is begun again.
#[derive(Debug)]
pub struct Restore {
    disk: Arc<dyn Disk>,
    dir: std::path::PathBuf,
    index: Arc<dyn Index>,
    meta: Meta,
    revision: Revision,
    entries: Vec<(Key, Versioned)>,
    changes: Vec<IndexChange>,
    bytes: usize,
    /// The first application ends the loading of entries.
    applying: bool,
}

impl Restore {
    /// Begins a store whose entries hold at `revision`. An incomplete store is replaced, a complete one only by a
    /// higher generation of the same cluster.
    ///
    /// # Errors
    /// `ALREADY_EXISTS` for another complete store; those of the disk.
    pub async fn begin(
        disk: Arc<dyn Disk>,
        dir: &Path,
        identity: StoreIdentity,
        revision: Revision,
        index: Arc<dyn Index>,
    ) -> Result<Self> {
        // A store that is too damaged to be recognised is moved away by a person, not replaced.
        if let Found::Store(old) = JournaledStore::find(&disk, dir).await?
            && (old.cluster_id != identity.cluster_id || old.generation >= identity.generation)
        {
            return Err(Error::new(
                Reason::AlreadyExists,
                format!(
                    "{} holds the store of cluster {} in generation {}, which generation {} of cluster {} does not \
                     replace",
                    dir.display(),
                    old.cluster_id,
                    old.generation,
                    identity.generation,
                    identity.cluster_id
                ),
            ));
        }
        let meta = open::begin(&*disk, dir, identity, &*index).await?;
        let (entries, changes) = (Vec::new(), Vec::new());
        let dir = dir.to_owned();
        Ok(Self { disk, dir, index, meta, revision, entries, changes, bytes: 0, applying: false })
    }

    /// Adds an entry of the checkpoint.
    ///
    /// # Errors
    /// Those of the index; `INTERNAL` for an entry newer than the checkpoint, or after [`Restore::apply`].
    pub async fn load(&mut self, key: Key, value: Versioned) -> Result<()> {
        if self.applying || value.revision > self.revision {
            return Err(Error::internal(format!(
                "a checkpoint at revision {} holds an entry of revision {}",
                self.revision, value.revision
            )));
        }
        self.bytes += key.len() + value.value.len();
        self.entries.push((key, value));
        if self.entries.len() >= BATCH_ITEMS || self.bytes >= BATCH_BYTES {
            self.flush(false).await
        } else {
            Ok(())
        }
    }

    /// Applies an encoded plan. Those that the store has already are passed over.
    ///
    /// # Errors
    /// `INTERNAL` for a gap or a malformed plan; those of the index.
    pub async fn apply(&mut self, revision: Revision, plan: Bytes) -> Result<()> {
        if revision <= self.revision {
            return Ok(());
        }
        if revision.0 != self.revision.0.saturating_add(1) {
            return Err(Error::internal(format!(
                "a journal goes on with revision {revision} behind {}",
                self.revision
            )));
        }
        if !self.applying {
            self.flush(false).await?;
            self.applying = true;
        }
        let mutations = codec::decode(&plan)?.mutations;
        self.bytes += plan.len();
        self.changes.push((revision, mutations));
        self.revision = revision;
        if self.changes.len() >= BATCH_ITEMS || self.bytes >= BATCH_BYTES {
            self.flush(false).await
        } else {
            Ok(())
        }
    }

    /// The revision that was reached.
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// Makes everything durable and opens the store.
    ///
    /// # Errors
    /// Those of the disk and the index; the store then stays incomplete.
    pub async fn finish(mut self, config: JournaledConfig) -> Result<JournaledStore> {
        if !self.entries.is_empty() {
            self.flush(false).await?;
        }
        self.flush(true).await?;
        // The journal begins behind what the index now durably has.
        self.meta.journal_after = self.revision;
        self.meta.complete = true;
        self.meta.write(&*self.disk, &self.dir).await?;
        JournaledStore::open(self.disk, &self.dir, self.index, config).await
    }

    async fn flush(&mut self, durable: bool) -> Result<()> {
        self.bytes = 0;
        let entries = std::mem::take(&mut self.entries);
        if !entries.is_empty() {
            self.index.load(entries).await?;
        }
        let changes = std::mem::take(&mut self.changes);
        if durable || !changes.is_empty() {
            self.index.apply(changes, self.revision, durable).await?;
        }
        Ok(())
    }
}

impl JournaledStore {
    /// Begins a store from the entries of a checkpoint. Journal records follow with [`Restore::apply`], then
    /// [`Restore::finish`].
    ///
    /// # Errors
    /// As [`Restore::begin`] and [`Restore::load`], and those of the stream.
    pub async fn create_from(
        disk: Arc<dyn Disk>,
        dir: &Path,
        identity: StoreIdentity,
        revision: Revision,
        entries: impl Stream<Item = Result<(Key, Versioned)>>,
        index: Arc<dyn Index>,
    ) -> Result<Restore> {
        let mut restore = Restore::begin(disk, dir, identity, revision, index).await?;
        let mut entries = std::pin::pin!(entries);
        while let Some(entry) = entries.next().await {
            let (key, value) = entry?;
            restore.load(key, value).await?;
        }
        Ok(restore)
    }
}
