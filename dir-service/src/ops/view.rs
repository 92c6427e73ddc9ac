//! What an operation sees: the store at one revision.

use crate::store::{KeyRange, MetaStore, Page};
use cairn_core::{
    key,
    plan::{Key, Versioned},
    record::Record,
};
use cairn_proto::{Result, id::Revision};
use parking_lot::Mutex;
use std::{ops::Bound, sync::Arc};

/// A record with the revision that wrote it.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored<R> {
    /// The record.
    pub record: R,
    /// The plan that wrote it.
    pub revision: Revision,
}

/// Reads of one operation. The first read is linearizable and fixes the revision for all others.
#[derive(Debug)]
pub struct View {
    store: Arc<dyn MetaStore>,
    at: Mutex<Option<Revision>>,
}

impl View {
    /// A view that is fixed by its first read.
    pub fn new(store: Arc<dyn MetaStore>) -> Self {
        Self { store, at: Mutex::new(None) }
    }

    /// The revision, once something was read.
    pub fn revision(&self) -> Option<Revision> {
        *self.at.lock()
    }

    /// The values of keys.
    ///
    /// # Errors
    /// As [`MetaStore::get`].
    pub async fn get_many(&self, keys: &[Key]) -> Result<Vec<Option<Versioned>>> {
        let at = self.revision();
        let (revision, values) = self.store.get(keys, at).await?;
        self.at.lock().get_or_insert(revision);
        Ok(values)
    }

    /// The value of a key.
    ///
    /// # Errors
    /// As [`MetaStore::get`].
    pub async fn get(&self, key: &Key) -> Result<Option<Versioned>> {
        Ok(self.get_many(std::slice::from_ref(key)).await?.pop().flatten())
    }

    /// A record.
    ///
    /// # Errors
    /// As [`MetaStore::get`], and for a damaged record.
    pub async fn record<R: Record>(&self, key: &Key) -> Result<Option<Stored<R>>> {
        self.get(key).await?.map(|versioned| stored(&versioned)).transpose()
    }

    /// Entries of a prefix, behind `after` when given, at most `limit`.
    ///
    /// # Errors
    /// As [`MetaStore::scan`].
    pub async fn scan(&self, prefix: &Key, after: Option<&Key>, limit: usize) -> Result<Page> {
        let range = KeyRange {
            start: after.map_or(Bound::Included(prefix.clone()), |after| Bound::Excluded(after.clone())),
            end: key::prefix_end(prefix).map_or(Bound::Unbounded, Bound::Excluded),
        };
        self.scan_range(range, limit).await
    }

    /// Entries of a range, at most `limit`.
    ///
    /// # Errors
    /// As [`MetaStore::scan`].
    pub async fn scan_range(&self, range: KeyRange, limit: usize) -> Result<Page> {
        let at = self.revision();
        let (revision, page) = self.store.scan(range, limit, at).await?;
        self.at.lock().get_or_insert(revision);
        Ok(page)
    }
}

/// Decodes a value.
///
/// # Errors
/// For a damaged record.
pub fn stored<R: Record>(versioned: &Versioned) -> Result<Stored<R>> {
    Ok(Stored { record: R::from_bytes(&versioned.value)?, revision: versioned.revision })
}
