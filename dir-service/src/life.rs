//! The life of a directory: from an opened store or an empty disk to a serving directory, and back when file servers
//! know a later state.
//!
//! ```text
//! <disk>/directory.current     name of the folder in use, durable
//! <disk>/store-<cluster id>/   a store; with its generation behind it where an operator accepted an older one
//! <disk>/directory.restored    the store in use was restored from a backup and has not served since
//! <disk>/directory.moved       where the store went that was here
//! ```
//!
//! A store that is there is claimed before it serves ([`crate::claim`]).
//!
//! A store is named only once it is whole, so that a crash while one is made leaves the disk as it was before.

use crate::{
    background::Loops,
    claim::{self, Claimed},
    config::Config,
    directory::Directory,
    gate::{Gate, Mode},
    rebuild::{Decision, Lobby, Source},
    store::{Found, JournaledConfig, JournaledStore, MetaStore, StoreIdentity, StoreWrapper, open_index},
};
use cairn_proto::{
    Error, Reason, Result,
    host::Host,
    id::{Generation, Revision},
};
use disk::{Disk, durable};
use rand::{RngCore as _, SeedableRng as _, rngs::StdRng};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// The file that names the store in use.
pub(crate) const CURRENT: &str = "directory.current";
const CURRENT_BYTES_MAX: usize = 4_096;
/// The file that says that the store in use was restored from a backup and has not served since.
pub(crate) const RESTORED: &str = "directory.restored";
/// The file that says that the store in use was moved to another place.
pub(crate) const MOVED: &str = "directory.moved";
/// Between two attempts to form or rebuild.
const RETRY: Duration = Duration::from_millis(300);
/// A claim that took no longer than this leaves the times of a directory as they were loaded.
const CLAIM_SHORT: Duration = Duration::from_millis(500);

/// What follows when a store does not serve any more.
#[derive(Clone, Copy, Debug)]
enum Next {
    /// The end.
    End,
    /// File servers know a later state.
    Rebuild,
    /// They are asked again whether they follow this store: another start was followed, or a background loop failed.
    Again,
    /// An operator accepts the store, in this generation.
    Accept(u64),
}

/// What a life needs.
#[derive(Debug)]
pub struct Life {
    /// How to run.
    pub config: Config,
    /// Where the store is.
    pub disk: Arc<dyn Disk>,
    /// Network, wall clock, seed.
    pub host: Host,
    /// Between the directory and its store.
    pub wrapper: StoreWrapper,
    /// Opened and closed by the life.
    pub gate: Arc<Gate>,
    /// Where file servers report while the gate is closed.
    pub lobby: Arc<Lobby>,
}

impl Life {
    /// Opens the store of the disk, if there is a whole one.
    ///
    /// # Errors
    /// As [`JournaledStore::open`]: a damaged store refuses, and the message says what to do.
    pub async fn find(&self) -> Result<Option<Arc<JournaledStore>>> {
        check_not_moved(&*self.disk).await?;
        let Some(dir) = current(&*self.disk).await? else { return Ok(None) };
        match JournaledStore::find(&self.disk, &dir).await? {
            Found::Store(_) => {}
            // A rebuild was interrupted, or the folder is gone: begin again.
            Found::Nothing | Found::Incomplete(_) => return Ok(None),
        }
        let index = open_index(&self.disk, &dir, self.config.index_cache_bytes).await?;
        let store = JournaledStore::open(self.disk.clone(), &dir, index, JournaledConfig::default()).await?;
        Ok(Some(Arc::new(store)))
    }

    /// Lives until `shutdown`; whoever waits for requests under way does so before.
    pub async fn run(self: Arc<Self>, mut store: Option<Arc<JournaledStore>>, shutdown: CancellationToken) {
        // An operator accepted this store although too few file servers could confirm it.
        let mut accepted = false;
        loop {
            let opened = match store.take() {
                Some(store) => store,
                None => match shutdown.run_until_cancelled(self.make()).await {
                    Some(store) => {
                        accepted = self.lobby.is_forced();
                        store
                    }
                    None => return,
                },
            };
            let next = self.serve(opened, std::mem::take(&mut accepted), &shutdown).await;
            let opened = match next {
                Next::End => return,
                Next::Rebuild => continue,
                Next::Again => shutdown.run_until_cancelled(self.find_again(None)).await,
                Next::Accept(generation) => {
                    accepted = true;
                    shutdown.run_until_cancelled(self.find_again(Some(generation))).await
                }
            };
            match opened {
                Some(opened) => store = opened,
                None => return,
            }
        }
    }

    /// Opens the store that was closed, in a generation of its own where one is given.
    async fn find_again(&self, generation: Option<u64>) -> Option<Arc<JournaledStore>> {
        loop {
            let found = match self.find().await {
                Ok(Some(store)) => match generation {
                    Some(generation) => {
                        let branched = self.branch(&store, generation).await;
                        close(&store).await;
                        branched.map(Some)
                    }
                    None => Ok(Some(store)),
                },
                found => found,
            };
            match found {
                Ok(found) => return found,
                Err(error) => {
                    tracing::error!(%error, "the store could not be opened, trying again");
                    self.gate
                        .set(Mode::Confirming { reason: format!("the store could not be opened: {error}") });
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    /// Serves a store until the end, or until it is behind.
    async fn serve(&self, store: Arc<JournaledStore>, accepted: bool, shutdown: &CancellationToken) -> Next {
        let identity = store.identity().clone();
        let served = shutdown.run_until_cancelled(self.claimed(&store, accepted)).await;
        let directory = match served {
            None => {
                close(&store).await;
                return Next::End;
            }
            Some(Err(next)) => {
                close(&store).await;
                return next;
            }
            Some(Ok(directory)) => directory,
        };
        let mut behind = directory.cluster.behind.subscribe();
        let loops = Loops::start(&directory, Some(store.clone()));
        self.gate.set(Mode::Serving(directory.clone()));
        let mut failed = false;
        let behind = tokio::select! {
            behind = behind.wait_for(Option::is_some) => behind.ok().and_then(|behind| behind.clone()),
            () = shutdown.cancelled() => None,
            () = loops.failed() => {
                failed = true;
                None
            }
        };
        match &behind {
            Some(behind) if behind.rebuild => {
                self.gate.set(Mode::Rebuilding { reason: behind.reason.clone() })
            }
            Some(behind) => self.gate.set(Mode::Confirming { reason: behind.reason.clone() }),
            None if failed => {
                tracing::error!("a background loop failed, as said above: the directory is opened anew");
                let reason = "a background task failed: the store is opened anew".to_owned();
                self.gate.set(Mode::Confirming { reason });
            }
            None => {}
        }
        loops.end().await;
        close(&store).await;
        match behind {
            None if failed => {
                // A fault that comes back at once must not keep the machine busy.
                let _ = shutdown.run_until_cancelled(tokio::time::sleep(RETRY)).await;
                Next::Again
            }
            None => Next::End,
            Some(behind) if behind.rebuild => {
                let ours = behind.cluster_id == identity.cluster_id;
                let generation = if ours { identity.generation.0 } else { 0 };
                self.lobby.open(Some((behind.cluster_id, generation)));
                Next::Rebuild
            }
            Some(_) => Next::Again,
        }
    }

    /// The directory over a store, once file servers have confirmed that it is the newest and follow it; or what to do
    /// instead.
    async fn claimed(&self, store: &Arc<JournaledStore>, accepted: bool) -> Result<Arc<Directory>, Next> {
        let identity = store.identity().clone();
        self.gate.set(Mode::Confirming { reason: "asking the carriers of the journal".into() });
        self.lobby.open(Some((identity.cluster_id.clone(), identity.generation.0)));
        let revision = store.durable_revision();
        loop {
            match self.claim(store, revision, accepted).await {
                Ok(claimed) => return claimed,
                Err(error) => {
                    tracing::error!(%error, "the store could not be loaded, trying again");
                    self.gate
                        .set(Mode::Confirming { reason: format!("the store could not be loaded: {error}") });
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    async fn claim(
        &self,
        store: &Arc<JournaledStore>,
        revision: Revision,
        accepted: bool,
    ) -> Result<Result<Arc<Directory>, Next>> {
        let identity = store.identity();
        let (mut directory, began) = (self.open(store).await?, Instant::now());
        if accepted {
            directory.cluster.forget_carriers().await?;
        }
        let restored =
            durable::read_file(&*self.disk, Path::new(RESTORED), CURRENT_BYTES_MAX).await?.is_some();
        let tell = |reason| self.gate.set(Mode::Confirming { reason });
        let claimed = claim::claim(&directory, &self.lobby, self.random_id(), revision, restored, tell).await;
        match claimed {
            Claimed::Serve(life) => {
                // Silences and sessions are timed from when it was loaded: after a long wait all would seem dead.
                if began.elapsed() > CLAIM_SHORT {
                    directory = self.open(store).await?;
                }
                directory.cluster.followed_as(&life);
                directory.cluster.forget_base().await?;
                if restored {
                    durable::remove_file_durable(&*self.disk, Path::new(RESTORED)).await?;
                }
                Ok(Ok(Arc::new(directory)))
            }
            Claimed::Behind(why) => {
                tracing::error!(%why, "an older copy of the directory's store was mounted");
                self.gate.set(Mode::Rebuilding {
                    reason: format!("the directory's store is an older copy: {why}"),
                });
                Ok(Err(Next::Rebuild))
            }
            Claimed::Accepted(highest) => {
                let generation = highest.max(identity.generation.0) + 1;
                tracing::warn!(generation, "an operator accepts this store without enough file servers");
                Ok(Err(Next::Accept(generation)))
            }
        }
    }

    async fn open(&self, store: &Arc<JournaledStore>) -> Result<Directory> {
        let identity = store.identity();
        let directory = Directory::open(
            self.wrapper.wrap(store.clone() as Arc<dyn MetaStore>),
            identity.cluster_id.clone(),
            identity.generation,
            self.config.clone(),
            self.host.clone(),
        )
        .await?;
        directory.cluster.follow_durable(store.watch_durable());
        directory.cluster.show_disk(self.disk.clone());
        let _ = directory.journal.set(store.clone());
        Ok(directory)
    }

    /// Makes a store of a higher generation from one that is here: what file servers know of the lower one, which may be
    /// more, is given up.
    async fn branch(&self, store: &JournaledStore, generation: u64) -> Result<Arc<JournaledStore>> {
        let cluster_id = store.identity().cluster_id.clone();
        let old = current(&*self.disk).await?;
        let plain = folder(&cluster_id)?;
        let dir = PathBuf::from(format!("{}-{generation}", plain.display()));
        self.disk.create_dir_all(&dir).await?;
        let index = open_index(&self.disk, &dir, self.config.index_cache_bytes).await?;
        let identity = StoreIdentity { cluster_id, generation: Generation(generation) };
        let checkpoint = store.checkpoint()?;
        let restore = JournaledStore::create_from(
            self.disk.clone(),
            &dir,
            identity,
            checkpoint.revision,
            checkpoint.entries,
            index,
        )
        .await?;
        let branched = restore.finish(JournaledConfig::default()).await?;
        name(&*self.disk, &dir).await?;
        tracing::info!(before = ?old, now = %dir.display(), "the store before is kept aside; it may be removed");
        Ok(Arc::new(branched))
    }

    fn random_id(&self) -> String {
        let mut random = [0; 16];
        StdRng::seed_from_u64(self.host.seed ^ self.host.clock.unix_ns()).fill_bytes(&mut random);
        uuid::Builder::from_random_bytes(random).into_uuid().to_string()
    }

    /// Forms or rebuilds until there is a store.
    async fn make(&self) -> Arc<JournaledStore> {
        loop {
            let decision = self.lobby.decided(|waiting| match waiting {
                Decision::AwaitCarriers(reason) => self.gate.set(Mode::Rebuilding { reason }),
                Decision::AwaitAny(reason) => self.gate.set(match self.gate.mode() {
                    Mode::Rebuilding { .. } => Mode::Rebuilding { reason },
                    _ => Mode::Forming { reason },
                }),
                Decision::Form | Decision::Rebuild(_) => {}
            });
            let made = match decision.await {
                Decision::Rebuild(source) => {
                    self.gate.set(Mode::Rebuilding {
                        reason: format!(
                            "reading the journal of cluster {} up to revision {}",
                            source.cluster_id, source.revision
                        ),
                    });
                    let made = self.rebuild(&source).await;
                    self.lobby.rebuilt(
                        &source,
                        &made.as_ref().map(|store| store.durable_revision()).map_err(Clone::clone),
                    );
                    made
                }
                _ => self.form().await,
            };
            match made {
                Ok(store) => return Arc::new(store),
                Err(error) => {
                    tracing::error!(%error, "no store could be made, trying again");
                    let reason = format!("trying again: {error}");
                    self.gate.set(match self.gate.mode() {
                        Mode::Rebuilding { .. } => Mode::Rebuilding { reason },
                        _ => Mode::Forming { reason },
                    });
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    async fn form(&self) -> Result<JournaledStore> {
        let cluster_id = self.random_id();
        tracing::info!(cluster = %cluster_id, "forming a new cluster");
        let identity = StoreIdentity { cluster_id, generation: Generation(1) };
        let dir = folder(&identity.cluster_id)?;
        self.disk.create_dir_all(&dir).await?;
        let index = open_index(&self.disk, &dir, self.config.index_cache_bytes).await?;
        let store =
            JournaledStore::create(self.disk.clone(), &dir, identity, index, JournaledConfig::default())
                .await?;
        name(&*self.disk, &dir).await?;
        Ok(store)
    }

    async fn rebuild(&self, source: &Source) -> Result<JournaledStore> {
        tracing::warn!(
            cluster = %source.cluster_id,
            generation = source.generation,
            revision = source.revision,
            "rebuilding from the file servers"
        );
        let dir = folder(&source.cluster_id)?;
        self.disk.create_dir_all(&dir).await?;
        let index = open_index(&self.disk, &dir, self.config.index_cache_bytes).await?;
        let store = self
            .lobby
            .rebuild(source, &self.host, self.disk.clone(), &dir, index, JournaledConfig::default())
            .await?;
        name(&*self.disk, &dir).await?;
        Ok(store)
    }
}

/// Makes a whole store the one in use.
pub(crate) async fn name(disk: &dyn Disk, dir: &Path) -> Result<()> {
    let name = dir.to_string_lossy().into_owned();
    durable::write_file_durable(disk, Path::new(CURRENT), name.into()).await?;
    Ok(())
}

/// A store that was moved elsewhere must not serve: it is older than that.
pub(crate) async fn check_not_moved(disk: &dyn Disk) -> Result<()> {
    let Some(to) = durable::read_file(disk, Path::new(MOVED), CURRENT_BYTES_MAX).await? else {
        return Ok(());
    };
    let to = String::from_utf8_lossy(&to).trim().to_owned();
    Err(Error::new(
        Reason::Conflict,
        format!(
            "the directory's store was moved to {to}: start the directory there. What is here is older; to use it all \
             the same, remove {MOVED}"
        ),
    ))
}

/// The folder of the store in use.
pub(crate) async fn current(disk: &dyn Disk) -> Result<Option<PathBuf>> {
    let current = durable::read_file(disk, Path::new(CURRENT), CURRENT_BYTES_MAX).await?;
    let Some(current) = current else { return Ok(None) };
    let dir = std::str::from_utf8(&current).ok().map(str::trim).filter(|name| name.starts_with("store-"));
    dir.map(|dir| Some(PathBuf::from(dir))).ok_or_else(|| {
        Error::internal(format!(
            "{CURRENT} is damaged: write the name of the folder with the directory's store into it, or move the disk's \
             content away and rebuild the directory from the file servers"
        ))
    })
}

/// The folder of a cluster's store. A cluster's id comes over the network: only what it should be is a name.
pub(crate) fn folder(cluster_id: &str) -> Result<PathBuf> {
    let plain = !cluster_id.is_empty()
        && cluster_id.len() <= 64
        && cluster_id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    if !plain {
        return Err(Error::invalid(format!("'{cluster_id}' is not the id of a cluster")));
    }
    Ok(PathBuf::from(format!("store-{cluster_id}")))
}

async fn close(store: &JournaledStore) {
    if let Err(error) = store.close().await {
        tracing::error!(%error, "the store was not closed cleanly; nothing acknowledged is lost");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ids_become_names_of_folders() {
        assert_eq!(folder("2b-4").unwrap(), Path::new("store-2b-4"));
        for bad in ["", "../x", "a/b", "a b", "."] {
            assert!(folder(bad).is_err(), "{bad:?}");
        }
    }
}
