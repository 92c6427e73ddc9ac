//! The life of a directory on a store that it shares with others: it joins them, serves, and leaves.
//!
//! There is nothing to claim and nothing to rebuild here: the store itself is kept by several machines, and whoever can
//! read and write it has the newest. All directories on it show file servers the same life (generation, id of the store,
//! term 1), so that these follow all of them, and refuse one of a lower generation, such as that of a store which was given
//! up for this one.

use crate::{
    background::Loops,
    config::Config,
    directory::Directory,
    gate::{Gate, Mode},
    rebuild::Lobby,
    store::{MetaStore, StoreIdentity, StoreWrapper},
};
use cairn_proto::{Result, host::Host, v1};
use std::{sync::Arc, time::Duration};
use tokio_util::sync::CancellationToken;

/// Between two attempts to open the store.
const RETRY: Duration = Duration::from_millis(300);
/// Longest that leaving the others may take.
const LEAVE_MAX: Duration = Duration::from_secs(2);

/// What such a life needs.
#[derive(Debug)]
pub struct SharedLife {
    /// How to run.
    pub config: Config,
    /// The store that others use, too.
    pub store: Arc<dyn MetaStore>,
    /// Whose store it is and which of its lives, where the store itself says so.
    pub identity: Option<StoreIdentity>,
    /// Network, wall clock, seed.
    pub host: Host,
    /// Between the directory and its store.
    pub wrapper: StoreWrapper,
    /// Opened and closed by the life.
    pub gate: Arc<Gate>,
    /// Where file servers report while the gate is closed.
    pub lobby: Arc<Lobby>,
}

impl SharedLife {
    /// Lives until `shutdown`; whoever waits for requests under way does so before.
    pub async fn run(self: Arc<Self>, shutdown: CancellationToken) {
        loop {
            self.gate.set(Mode::Joining { reason: "reading the store".into() });
            let Some(directory) = shutdown.run_until_cancelled(self.open()).await else { return };
            let loops = Loops::start(&directory, None);
            self.gate.set(Mode::Serving(directory.clone()));
            let mut behind = directory.cluster.behind.subscribe();
            let why = tokio::select! {
                () = shutdown.cancelled() => None,
                () = loops.failed() => Some("a background task failed, as said above".to_owned()),
                behind = behind.wait_for(Option::is_some) => {
                    behind.ok().and_then(|behind| behind.as_ref().map(|behind| behind.reason.clone()))
                }
            };
            if let Some(why) = &why {
                tracing::error!(%why, "the directory joins anew");
                self.gate.set(Mode::Joining { reason: format!("the directory joins anew: {why}") });
            }
            loops.end().await;
            if let Some(membership) = &directory.membership
                && let Ok(Err(error)) = tokio::time::timeout(LEAVE_MAX, membership.leave()).await
            {
                tracing::debug!(%error, "could not tell the other directories that this one stops");
            }
            // A fault that comes back at once must not keep the machine busy.
            if why.is_none() || shutdown.run_until_cancelled(tokio::time::sleep(RETRY)).await.is_none() {
                return;
            }
        }
    }

    async fn open(&self) -> Arc<Directory> {
        loop {
            match self.try_open().await {
                Ok(directory) => return Arc::new(directory),
                Err(error) => {
                    tracing::error!(%error, "the shared store could not be opened, trying again");
                    let reason = format!("the shared store could not be opened: {error}");
                    self.gate.set(Mode::Joining { reason });
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    async fn try_open(&self) -> Result<Directory> {
        let store = self.wrapper.wrap(self.store.clone());
        let directory =
            Directory::open_shared(store, self.identity.clone(), self.config.clone(), self.host.clone())
                .await?;
        let store_id = directory.cluster.state.lock().settings.store_id.clone();
        // The same from each of them, always: a file server writes a change of it to its disk.
        directory.cluster.followed_as(&v1::DirectoryLife {
            generation: directory.generation.0,
            term: 1,
            incarnation: store_id.clone(),
            store_id,
            addresses: Vec::new(),
        });
        Ok(directory)
    }
}

#[cfg(test)]
#[path = "shared_tests.rs"]
mod tests;
