//! `Watch`: changes below a directory or of a file, in order of revisions.

use super::{resolve::resolve, view::View};
use crate::{
    directory::Directory,
    store::{Change, Changes},
};
use cairn_core::{
    attributes::attributes,
    key,
    plan::{Key, Mutation},
    record::{Dentry, Inode, Record},
};
use cairn_proto::{
    Error, Reason, Result,
    id::{InodeId, Revision},
    limits::{WATCHED_BYTES_MAX, WATCHED_ENTRIES_MAX},
    path::FilePath,
    v1,
};
use futures::{StreamExt, stream::BoxStream};
use std::{collections::HashMap, sync::Arc};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Entries of one page when the children are gathered.
const PAGE: usize = 4_096;
/// What a name takes besides its bytes: its place in a table that may be half empty, and what the allocator adds.
const NAME_BYTES: usize = 96;
/// When a caller comes back who found no room for the names it watches.
const RETRY_MS: u64 = 5_000;

/// A stream of changes.
pub type Watched = BoxStream<'static, Result<v1::WatchResponse>>;

/// Watches a path.
///
/// # Errors
/// `NOT_FOUND`, `REVISION_COMPACTED`. `LIMIT_EXCEEDED` for more entries than a watch may have, `OVERLOADED` while other
/// watches hold the room for names: both also in the stream, when entries are added.
pub async fn watch(directory: &Directory, request: v1::WatchRequest) -> Result<Watched> {
    let path = FilePath::parse(&request.path)?;
    let view = View::new(directory.store.clone());
    let found = resolve(&view, &path).await?.existing()?.clone();
    let mut names = directory.watch_room.names();
    if found.is_directory() {
        let mut after: Option<Key> = None;
        loop {
            let page = view.scan(&key::dentries(found.id), after.as_ref(), PAGE).await?;
            for (entry, versioned) in &page.entries {
                let Some((_, name)) = key::split_name(entry) else { continue };
                let id = InodeId(Dentry::from_bytes(&versioned.value)?.inode);
                names.insert(id, name).map_err(|error| error.at(request.path.as_str()))?;
            }
            after = page.entries.last().map(|(entry, _)| entry.clone());
            if !page.more {
                break;
            }
        }
    }
    let now = view.revision().unwrap_or_default();
    let from = match request.from_revision {
        0 => Revision(now.0 + 1),
        revision => Revision(revision),
    };
    // Names and inodes share the volume's prefix, so one stream keeps their order.
    let volume = Key::copy_from_slice(&key::VOLUME.to_be_bytes());
    let changes: Changes = directory.store.watch(volume, from).await?;
    let watcher = Watcher { top: found.id, names };
    Ok(changes
        .scan(watcher, |watcher, change| {
            let events = match change {
                Ok(change) => watcher.events(&change).unwrap_or_else(|error| vec![Err(error)]),
                Err(error) => vec![Err(error)],
            };
            futures::future::ready(Some(futures::stream::iter(events)))
        })
        .flatten()
        .boxed())
}

/// Room for the names that watches hold, all together.
#[derive(Debug)]
pub struct WatchRoom {
    bytes: usize,
    free: Arc<Semaphore>,
}

impl Default for WatchRoom {
    fn default() -> Self {
        Self::new(WATCHED_BYTES_MAX)
    }
}

impl WatchRoom {
    /// Room for so many bytes.
    fn new(bytes: usize) -> Self {
        Self { bytes, free: Arc::new(Semaphore::new(bytes)) }
    }

    /// The names of one watch, none yet.
    fn names(&self) -> Names {
        Names { table: HashMap::new(), room: self.bytes, free: self.free.clone(), held: None }
    }
}

/// The names of a watched directory, by what they lead to. They give their room back when dropped.
struct Names {
    table: HashMap<InodeId, Box<str>>,
    /// All the room there is, for all watches.
    room: usize,
    free: Arc<Semaphore>,
    held: Option<OwnedSemaphorePermit>,
}

impl Names {
    /// Takes a name in, instead of the one that led there before.
    ///
    /// # Errors
    /// `LIMIT_EXCEEDED` for more names than a watch may have, or than there is room for; `OVERLOADED` while others have
    /// the room.
    fn insert(&mut self, id: InodeId, name: &str) -> Result<()> {
        self.remove(id);
        let bytes = cost(name);
        let held = self.held.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        if self.table.len() >= WATCHED_ENTRIES_MAX || held + bytes > self.room {
            return Err(Error::limit(format!(
                "the directory has more entries than can be watched: at most {WATCHED_ENTRIES_MAX}, whose names take at \
                 most {} MiB; watch files in it, or smaller directories",
                self.room >> 20
            )));
        }
        let permit = u32::try_from(bytes)
            .ok()
            .and_then(|permits| self.free.clone().try_acquire_many_owned(permits).ok());
        let Some(permit) = permit else {
            return Err(Error::new(
                Reason::Overloaded,
                "other watches hold all the names that the directory service has memory for",
            )
            .retry_after_ms(RETRY_MS));
        };
        match &mut self.held {
            Some(held) => held.merge(permit),
            None => self.held = Some(permit),
        }
        self.table.insert(id, name.into());
        Ok(())
    }

    fn remove(&mut self, id: InodeId) {
        let Some(name) = self.table.remove(&id) else { return };
        // Dropped, what is split off is free again.
        drop(self.held.as_mut().and_then(|held| held.split(cost(&name))));
    }

    fn get(&self, id: InodeId) -> Option<&str> {
        self.table.get(&id).map(|name| &**name)
    }

    /// What a name leads to.
    fn find(&self, name: &str) -> Option<InodeId> {
        self.table.iter().find(|(_, known)| &***known == name).map(|(id, _)| *id)
    }
}

/// Bytes of memory that a name is taken for.
fn cost(name: &str) -> usize {
    NAME_BYTES + name.len()
}

struct Watcher {
    top: InodeId,
    names: Names,
}

impl Watcher {
    fn events(&mut self, change: &Change) -> Result<Vec<Result<v1::WatchResponse>>> {
        let mut events = Vec::new();
        let mut event = |kind: v1::ChangeKind, name: &str, inode: InodeId, shown: Option<v1::Attributes>| {
            events.push(Ok(v1::WatchResponse {
                revision: change.revision.0,
                kind: kind as i32,
                name: name.to_owned(),
                inode: inode.0,
                attributes: shown,
            }));
        };
        let mut inodes: HashMap<InodeId, v1::Attributes> = HashMap::new();
        let (dentry_prefix, inode_prefix) = (key::dentries(self.top), key::inodes());
        for mutation in &change.mutations {
            if let Mutation::Put(at, value) = mutation
                && at.starts_with(&inode_prefix)
                && let Some(id) = key::last_u64(at)
            {
                inodes.insert(InodeId(id), attributes(InodeId(id), &Inode::from_bytes(value)?));
            }
        }
        // Removals first: a rename within the directory then reads "gone here, there now".
        for mutation in &change.mutations {
            if let Mutation::Delete(at) = mutation
                && at.starts_with(&dentry_prefix)
                && let Some((_, name)) = key::split_name(at)
            {
                let inode = self.names.find(name);
                if let Some(inode) = inode {
                    self.names.remove(inode);
                }
                event(v1::ChangeKind::Removed, name, inode.unwrap_or_default(), None);
            }
        }
        // What was replaced had the name that another has now: nothing is known under it any more.
        for mutation in &change.mutations {
            if let Mutation::Delete(at) = mutation
                && at.starts_with(&inode_prefix)
                && let Some(id) = key::last_u64(at)
            {
                self.names.remove(InodeId(id));
            }
        }
        for mutation in &change.mutations {
            if let Mutation::Put(at, value) = mutation
                && at.starts_with(&dentry_prefix)
                && let Some((_, name)) = key::split_name(at)
            {
                let id = InodeId(Dentry::from_bytes(value)?.inode);
                // Without its name, later changes of it would not be told: the watch ends, and says so.
                self.names.insert(id, name)?;
                event(v1::ChangeKind::Created, name, id, inodes.remove(&id));
            }
        }
        for (id, shown) in inodes {
            if let Some(name) = self.names.get(id) {
                event(v1::ChangeKind::Changed, name, id, Some(shown));
            } else if id == self.top {
                event(v1::ChangeKind::Changed, "", id, Some(shown));
            }
        }
        for mutation in &change.mutations {
            if let Mutation::Delete(at) = mutation
                && *at == key::inode(self.top)
            {
                event(v1::ChangeKind::Removed, "", self.top, None);
            }
        }
        Ok(events)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Bench;

    async fn create(bench: &Bench, path: &str) {
        let kind = v1::Kind::File as i32;
        let request = v1::CreateRequest { path: path.into(), kind, ..Default::default() };
        crate::ops::create::create(&bench.directory, request).await.unwrap();
    }

    async fn root(bench: &Bench) -> Result<Watched> {
        watch(&bench.directory, v1::WatchRequest { path: "/".into(), from_revision: 0 }).await
    }

    fn overloaded<T>(result: Result<T>) {
        let error = result.err().unwrap();
        assert_eq!((error.reason, error.detail.retry_after_ms), (Reason::Overloaded, RETRY_MS));
    }

    /// A directory with room for so many names of one letter.
    async fn bench(names: usize) -> Bench {
        let mut bench = Bench::start().await;
        Arc::get_mut(&mut bench.directory).unwrap().watch_room = WatchRoom::new(names * cost("a"));
        bench
    }

    #[tokio::test(start_paused = true)]
    async fn watches_share_the_room_for_names_and_give_it_back() {
        let bench = bench(3).await;
        create(&bench, "/a").await;
        create(&bench, "/b").await;
        let first = root(&bench).await.unwrap();
        overloaded(root(&bench).await);
        assert_eq!(
            bench.directory.watch_room.free.available_permits(),
            cost("a"),
            "what a refused one had taken is free"
        );
        drop(first);
        let _second = root(&bench).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_watch_that_can_no_longer_name_changes_ends() {
        let bench = bench(5).await;
        create(&bench, "/a").await;
        create(&bench, "/b").await;
        let (mut watched, other) = (root(&bench).await.unwrap(), root(&bench).await.unwrap());
        create(&bench, "/c").await;
        assert_eq!(watched.next().await.unwrap().unwrap().name, "c");
        let delete = v1::DeleteRequest { path: "/a".into(), ..Default::default() };
        crate::ops::delete::delete(&bench.directory, delete).await.unwrap();
        create(&bench, "/d").await;
        for (kind, name) in [(v1::ChangeKind::Removed, "a"), (v1::ChangeKind::Created, "d")] {
            let change = watched.next().await.unwrap().unwrap();
            assert_eq!((change.kind(), change.name.as_str()), (kind, name), "the room of one is the other's");
        }
        create(&bench, "/e").await;
        overloaded(watched.next().await.unwrap());
        drop((watched, other));
        let _again = root(&bench).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn files_that_are_replaced_again_and_again_take_no_room() {
        let bench = bench(2).await;
        let mut watched = root(&bench).await.unwrap();
        for round in 0..5 {
            create(&bench, "/b").await;
            assert_eq!(watched.next().await.unwrap().unwrap().name, "b");
            let rename = v1::RenameRequest { from: "/b".into(), to: "/a".into(), ..Default::default() };
            crate::ops::rename::rename(&bench.directory, rename).await.unwrap();
            for (kind, name) in [(v1::ChangeKind::Removed, "b"), (v1::ChangeKind::Created, "a")] {
                let change = watched.next().await.unwrap().unwrap();
                assert_eq!((change.kind(), change.name.as_str()), (kind, name), "round {round}");
            }
            assert_eq!(bench.directory.watch_room.free.available_permits(), cost("a"), "round {round}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_directory_that_never_fits_is_not_told_to_come_back() {
        let bench = bench(2).await;
        for path in ["/a", "/b", "/c"] {
            create(&bench, path).await;
        }
        let error = root(&bench).await.err().unwrap();
        assert_eq!((error.reason, error.detail.path.as_str()), (Reason::LimitExceeded, "/"));
    }

    #[test]
    fn another_name_of_the_same_file_takes_the_place_of_the_first() {
        let room = WatchRoom::new(2 * cost("a"));
        let mut names = room.names();
        for name in ["a", "b", "c"] {
            names.insert(InodeId(7), name).unwrap();
        }
        assert_eq!(
            (names.get(InodeId(7)), names.find("a"), names.find("c")),
            (Some("c"), None, Some(InodeId(7)))
        );
        assert_eq!(room.free.available_permits(), cost("a"));
    }
}
