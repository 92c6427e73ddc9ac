//! The health of everything.

use crate::{
    directory::Directory,
    ops::view::{View, stored},
};
use cairn_core::{key, plan::Key, record};
use cairn_proto::{Result, v1};

/// Records read at a time.
const PAGE: usize = 1_024;

/// Status, with locks and sessions counted from the records.
///
/// # Errors
/// The store's.
pub async fn status(directory: &Directory) -> Result<v1::StatusResponse> {
    let mut status = directory.cluster.status();
    status.extents = Some(directory.fragments.status());
    for prefix in [key::locks(), key::reservations()] {
        status.locks += count(directory, prefix, |_| Ok(true)).await?;
    }
    let open = |value: &cairn_core::plan::Versioned| Ok(!stored::<record::Session>(value)?.record.ended);
    status.sessions = count(directory, key::sessions(), open).await?;
    let revision = directory.store.revision().await?;
    if let Some(shown) = &mut status.directory {
        shown.revision = revision.0;
        if let Some(space) = directory.cluster.disk_space().await {
            (shown.disk_total_bytes, shown.disk_free_bytes) = space;
        }
    }
    Ok(status)
}

async fn count(
    directory: &Directory,
    prefix: Key,
    counts: impl Fn(&cairn_core::plan::Versioned) -> Result<bool>,
) -> Result<u64> {
    let mut total = 0;
    let mut after: Option<Key> = None;
    loop {
        // Each page at its own revision: a count need not be of one moment, and must not hold revisions.
        let page = View::new(directory.store.clone()).scan(&prefix, after.as_ref(), PAGE).await?;
        for (_, value) in &page.entries {
            total += u64::from(counts(value)?);
        }
        after = page.entries.last().map(|(key, _)| key.clone());
        if !page.more || after.is_none() {
            return Ok(total);
        }
    }
}
