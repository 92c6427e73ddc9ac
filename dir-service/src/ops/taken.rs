//! Locks by the path they were taken by.
//!
//! A lock is on an inode, or on a name in a directory (a reservation): renaming a directory above it moves the path that
//! leads there, not the lock. Its record keeps the path it was taken by, which is what its holder and `ListLocks` know of
//! it. So a path that does not lead to the lock any more, or leads to another one, still finds it here.

use super::view::View;
use crate::store::KeyRange;
use cairn_core::{
    key,
    lock::Place,
    plan::Key,
    record::{self, Record as _},
};
use cairn_proto::{
    Result,
    id::{FencingToken, SessionId},
};
use std::ops::Bound;

/// Records read at a time.
const PAGE: usize = 256;

/// The lock that is held by `token` and was taken by `path`. Looked for among the locks of `session`, or among all where
/// the session is not known.
///
/// # Errors
/// As the store.
pub async fn by_token(
    view: &View,
    path: &str,
    token: FencingToken,
    session: Option<SessionId>,
) -> Result<Option<Place>> {
    let wanted = |lock: &record::Lock, place: &Place| lock.path == path && place.session_of(token).is_some();
    match session {
        Some(session) => of_session(view, session, wanted).await,
        None => of_all(view, wanted).await,
    }
}

/// A lock that was taken by `path`, whoever holds it.
///
/// # Errors
/// As the store.
pub async fn by_path(view: &View, path: &str) -> Result<Option<Place>> {
    of_all(view, |lock: &record::Lock, _: &Place| lock.path == path).await
}

async fn of_session(
    view: &View,
    session: SessionId,
    wanted: impl Fn(&record::Lock, &Place) -> bool,
) -> Result<Option<Place>> {
    let prefix = key::session_locks(session);
    let mut after = None;
    loop {
        let page = view.scan(&prefix, after.as_ref(), PAGE).await?;
        for (entry, _) in &page.entries {
            let lock_key: Key = entry.slice(prefix.len()..);
            let Some(stored) = view.record::<record::Lock>(&lock_key).await? else { continue };
            let place = Place::of_key(&lock_key, Some((stored.record.clone(), stored.revision)));
            if let Some(place) = place.filter(|place| wanted(&stored.record, place)) {
                return Ok(Some(place));
            }
        }
        match page.entries.last() {
            Some((last, _)) if page.more => after = Some(last.clone()),
            _ => return Ok(None),
        }
    }
}

async fn of_all(view: &View, wanted: impl Fn(&record::Lock, &Place) -> bool) -> Result<Option<Place>> {
    for prefix in [key::locks(), key::reservations()] {
        let end = key::prefix_end(&prefix).map_or(Bound::Unbounded, Bound::Excluded);
        let mut range = KeyRange { start: Bound::Included(prefix), end };
        loop {
            let page = view.scan_range(range.clone(), PAGE).await?;
            for (lock_key, versioned) in &page.entries {
                let lock = record::Lock::from_bytes(&versioned.value)?;
                let place = Place::of_key(lock_key, Some((lock.clone(), versioned.revision)));
                if let Some(place) = place.filter(|place| wanted(&lock, place)) {
                    return Ok(Some(place));
                }
            }
            match page.entries.last() {
                Some((last, _)) if page.more => range = range.behind(last.clone()),
                _ => break,
            }
        }
    }
    Ok(None)
}
