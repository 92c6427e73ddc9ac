//! Moves a directory's store to another engine, while no directory runs on it.
//!
//! ```text
//!   close the source to directories --> copy all records --> read both again and compare --> a higher generation --> done
//!                    ^------------- an error: the source is as it was --------------|
//! ```
//!
//! A folder is closed by its lock, and at the end by a file that says where the store went; a store on etcd by its record of the
//! identity, which every change requires to be as it was: a directory that was forgotten somewhere changes nothing any more. The new
//! store goes on behind the last revision of the old one. It begins as after a rebuild: locks end, ids and epochs are passed
//! over, so that nothing that the old one gave away is given again. An interrupted migration is repeated.

use crate::{
    args::etcd::{EtcdArgs, is_etcd},
    directory::prepare,
    life,
    ops::view::View,
    restore::check_empty,
    store::{
        CommitError, EtcdOptions, EtcdStore, Found, JournaledConfig, JournaledStore, KeyRange, MetaStore,
        Restore, StoreIdentity, etcd::EtcdFill, open_index,
    },
};
use cairn_core::{
    cluster::carriers::Carriers,
    key,
    plan::{Key, Plan, Versioned},
    record::{self, Record as _},
};
use cairn_proto::{
    Error, Reason, Result,
    host::Host,
    id::{Generation, Revision},
};
use disk::{Disk, RealDisk, durable};
use rand::{TryRngCore as _, rngs::OsRng};
use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

/// Records copied or compared at a time.
const PAGE: usize = 1_000;

/// Where a store is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// The data folder of a directory.
    Folder(PathBuf),
    /// etcd.
    Etcd(EtcdOptions),
}

impl Place {
    /// Reads `etcd://host:2379/prefix`, with flags of the etcd, or a folder.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` naming every problem.
    pub fn read(flag: &str, text: &str, etcd: &EtcdArgs) -> Result<Self> {
        if !is_etcd(text) {
            return Ok(Self::Folder(PathBuf::from(text)));
        }
        let mut problems = Vec::new();
        let options = etcd.options(flag, text, &mut problems);
        options.map(Self::Etcd).ok_or_else(|| Error::invalid(problems.join("\n")))
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folder(folder) => folder.display().fmt(f),
            Self::Etcd(options) => options.address.fmt(f),
        }
    }
}

/// What was moved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Migrated {
    /// The cluster.
    pub cluster_id: String,
    /// The revision of the old store.
    pub revision: u64,
    /// Number of records; each was read again from both stores and is the same.
    pub records: u64,
    /// The generation of the old store.
    pub from_generation: u64,
    /// The generation of the new store.
    pub generation: u64,
}

/// Moves a store. The old one stays as it is, and is closed to directories.
///
/// # Errors
/// `NOT_FOUND` when there is no store; `ALREADY_EXISTS` when there is something where it is to go; `CHECKSUM_MISMATCH` when the two
/// are not the same in the end; those of the engines.
pub async fn migrate(from: &Place, to: &Place) -> Result<Migrated> {
    let seed = OsRng
        .try_next_u64()
        .map_err(|error| Error::internal(format!("the system gives no random numbers: {error}")))?;
    let host = &Host::system(seed);
    if from == to {
        return Err(Error::invalid("the store is there already"));
    }
    let source = Source::close_off(from, host).await?;
    let moved = copy_to(&source, to, host).await;
    match &moved {
        Ok(_) => source.leave(to).await?,
        Err(_) => source.keep().await,
    }
    moved
}

async fn copy_to(source: &Source, to: &Place, host: &Host) -> Result<Migrated> {
    let old = source.identity();
    let identity =
        StoreIdentity { cluster_id: old.cluster_id.clone(), generation: Generation(old.generation.0 + 1) };
    let store = source.store();
    let revision = store.revision().await?;
    let records = match to {
        Place::Etcd(options) => {
            let mut fill = EtcdFill::begin(options.clone(), host.network.clone(), identity.clone()).await?;
            let mut pages = Pages::new(&*store, revision);
            while let Some(page) = pages.next().await? {
                for (key, value) in page {
                    fill.load(&key, value.value).await?;
                }
            }
            let target = fill.view().await?;
            let records = compare(&*store, revision, &*target).await?;
            settle(&target, &identity, host, true).await?;
            fill.finish(revision).await?;
            records
        }
        Place::Folder(folder) => {
            check_empty(folder)?;
            let disk: Arc<dyn Disk> = RealDisk::open(folder)?;
            let dir = life::folder(&identity.cluster_id)?;
            disk.create_dir_all(&dir).await?;
            let index = open_index(&disk, &dir, None).await?;
            let mut restore = Restore::begin(disk.clone(), &dir, identity.clone(), revision, index).await?;
            let mut pages = Pages::new(&*store, revision);
            while let Some(page) = pages.next().await? {
                for (key, value) in page {
                    restore.load(key, value).await?;
                }
            }
            let journaled = Arc::new(restore.finish(JournaledConfig::default()).await?);
            let target: Arc<dyn MetaStore> = journaled.clone();
            let records = compare(&*store, revision, &*target).await?;
            settle(&target, &identity, host, false).await?;
            journaled.close().await?;
            life::name(&*disk, &dir).await?;
            records
        }
    };
    Ok(Migrated {
        cluster_id: identity.cluster_id,
        revision: revision.0,
        records,
        from_generation: old.generation.0,
        generation: identity.generation.0,
    })
}

/// Makes the new store fit for its generation. Nobody carries its journal yet. A shared one names its cluster in its settings. One that is `shared` is never told by file
/// servers that there is something newer: it is the newest.
async fn settle(
    store: &Arc<dyn MetaStore>,
    identity: &StoreIdentity,
    host: &Host,
    shared: bool,
) -> Result<()> {
    prepare(store, identity.generation, host).await?;
    let view = View::new(store.clone());
    let Some(stored) = view.record::<record::Settings>(&key::settings()).await? else { return Ok(()) };
    let mut settings = stored.record;
    Carriers::default().name_in(&mut settings);
    settings.cluster_id = String::new();
    if shared {
        settings.cluster_id = identity.cluster_id.clone();
        (settings.base_generation, settings.base_revision) = (0, 0);
    }
    let mut plan = Plan::new();
    plan.put(key::settings(), settings.to_bytes());
    match store.commit(plan).await {
        Ok(_) => Ok(()),
        Err(CommitError::Conflict) => Err(Error::internal("somebody else changes the new store")),
        Err(CommitError::Unknown(error) | CommitError::Refused(error)) => Err(error),
    }
}

/// Reads both stores and makes sure that they have the same records; how many.
async fn compare(old: &dyn MetaStore, revision: Revision, new: &dyn MetaStore) -> Result<u64> {
    let (mut olds, mut news) = (Pages::new(old, revision), Pages::new(new, new.revision().await?));
    let mut count = 0;
    loop {
        let (before, after) = (olds.record().await?, news.record().await?);
        match (before, after) {
            (None, None) => return Ok(count),
            (Some((key, value)), Some((same, copy))) if key == same && value.value == copy.value => {
                count += 1
            }
            (before, after) => {
                let at = before.or(after).map(|(key, _)| key.escape_ascii().to_string()).unwrap_or_default();
                return Err(Error::new(
                    Reason::ChecksumMismatch,
                    format!(
                        "the new store differs from the old one at key {at}: empty it and repeat the migration"
                    ),
                ));
            }
        }
    }
}

/// All records at one revision, in order.
struct Pages<'a> {
    store: &'a dyn MetaStore,
    at: Revision,
    range: Option<KeyRange>,
    page: std::vec::IntoIter<(Key, Versioned)>,
}

impl<'a> Pages<'a> {
    fn new(store: &'a dyn MetaStore, at: Revision) -> Self {
        Self { store, at, range: Some(KeyRange::all()), page: Vec::new().into_iter() }
    }

    async fn next(&mut self) -> Result<Option<Vec<(Key, Versioned)>>> {
        let Some(range) = self.range.take() else { return Ok(None) };
        let (_, page) = self.store.scan(range.clone(), PAGE, Some(self.at)).await?;
        if let (true, Some((last, _))) = (page.more, page.entries.last()) {
            self.range = Some(range.behind(last.clone()));
        }
        Ok(Some(page.entries))
    }

    async fn record(&mut self) -> Result<Option<(Key, Versioned)>> {
        loop {
            if let Some(record) = self.page.next() {
                return Ok(Some(record));
            }
            match self.next().await? {
                Some(page) => self.page = page.into_iter(),
                None => return Ok(None),
            }
        }
    }
}

/// A store that no directory can use meanwhile.
enum Source {
    Folder { disk: Arc<dyn Disk>, store: Arc<JournaledStore> },
    Etcd { store: Arc<EtcdStore>, was_open: bool },
}

impl Source {
    async fn close_off(place: &Place, host: &Host) -> Result<Self> {
        match place {
            Place::Folder(folder) => Self::of_folder(folder).await,
            Place::Etcd(options) => {
                let (store, was_open) = EtcdStore::close_off(options.clone(), host.network.clone()).await?;
                Ok(Self::Etcd { store: Arc::new(store), was_open })
            }
        }
    }

    async fn of_folder(folder: &Path) -> Result<Self> {
        let nothing = |why: &str| Error::not_found(format!("{}: {why}", folder.display()));
        if !folder.join(life::CURRENT).is_file() {
            return Err(nothing("there is no directory's store here"));
        }
        // Its lock is that of a running directory.
        let disk: Arc<dyn Disk> =
            RealDisk::open(folder).map_err(|error| Error::from(error).at(folder.display().to_string()))?;
        if folder.join(life::RESTORED).is_file() {
            return Err(nothing(
                "the store was restored from a backup: start the directory on it once, then move it",
            ));
        }
        life::check_not_moved(&*disk).await?;
        let dir =
            life::current(&*disk).await?.ok_or_else(|| nothing("there is no directory's store here"))?;
        let Found::Store(_) = JournaledStore::find(&disk, &dir).await? else {
            return Err(nothing("the directory's store is not whole"));
        };
        let index = open_index(&disk, &dir, None).await?;
        let store = JournaledStore::open(disk.clone(), &dir, index, JournaledConfig::default()).await?;
        Ok(Self::Folder { disk, store: Arc::new(store) })
    }

    fn identity(&self) -> StoreIdentity {
        match self {
            Self::Folder { store, .. } => store.identity().clone(),
            Self::Etcd { store, .. } => store.identity().clone(),
        }
    }

    fn store(&self) -> Arc<dyn MetaStore> {
        match self {
            Self::Folder { store, .. } => store.clone(),
            Self::Etcd { store, .. } => store.clone(),
        }
    }

    /// Leaves it closed, for good.
    async fn leave(self, to: &Place) -> Result<()> {
        match self {
            Self::Etcd { store, .. } => store.leave().await,
            Self::Folder { disk, store } => {
                let where_to = format!("{to}\n");
                durable::write_file_durable(&*disk, Path::new(life::MOVED), where_to.into()).await?;
                store.close().await
            }
        }
    }

    /// Opens it to directories again, unless an earlier migration was interrupted: that one may have ended at the other side.
    async fn keep(self) {
        let kept = match self {
            Self::Folder { store, .. } => store.close().await,
            Self::Etcd { store, was_open: true } => store.open_up().await,
            Self::Etcd { was_open: false, .. } => Ok(()),
        };
        if let Err(error) = kept {
            tracing::error!(%error, "the old store is still closed: repeat the migration");
        }
    }
}

#[cfg(test)]
#[path = "migrate_tests.rs"]
mod tests;
