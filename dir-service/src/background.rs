//! Loops beside the requests: each looks, asks a rule of `core` what follows, acts, and looks again.
//!
//! Where several directories share a store, each of them looks, and the one that leads acts. Two may believe for a moment
//! that they lead, one of them late. What each loop does is right all the same:
//!
//! | loop | who | why a late one does no harm |
//! | --- | --- | --- |
//! | [`heartbeats`] | seats: leads; telling: all | plans require the lead unchanged; file servers take no older topology |
//! | [`compare`] | looks: all; removes: leads | garbage of a closed grant stays garbage; surplus goes by the group's epoch |
//! | [`repair`] | leads | a copy more of a committed chunk |
//! | [`confirm`] | all, of their own commits | tells what was committed |
//! | [`collect`] | leads | what no session needs, none can need later; records go by plans that require them unchanged |
//! | [`extents`] | leads | a plan requires the range and its grant; whoever leads next closes the grants |
//! | [`grants`], [`trash`], [`answers`] | leads | plans that require the records unchanged |
//! | [`sessions`] | expiry: the home; old grants: leads | plans that require home, session and grant unchanged |
//! | [`homes`] | leads | plans that require the session unchanged |
//! | [`follow`] | all | reads |

use crate::{directory::Directory, store::JournaledStore};
use cairn_core::plan::Mutation;
use futures::FutureExt as _;
use std::{future::Future, panic::AssertUnwindSafe, sync::Arc};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub mod answers;
pub mod collect;
pub mod compare;
pub mod confirm;
pub mod extents;
pub mod follow;
pub mod grants;
pub mod heartbeats;
pub mod homes;
pub mod repair;
pub mod sessions;
pub mod shipping;
pub mod trash;

/// The loops of one serving directory; they end together.
#[derive(Debug, Default)]
pub struct Loops {
    tasks: TaskTracker,
    stop: CancellationToken,
    failed: CancellationToken,
}

impl Loops {
    /// Starts all of them. Without a journal nothing is shipped.
    pub fn start(directory: &Arc<Directory>, journal: Option<Arc<JournaledStore>>) -> Self {
        let loops = Self::default();
        loops.spawn(heartbeats::run(directory.clone()));
        loops.spawn(heartbeats::tell(directory.clone()));
        loops.spawn(compare::run(directory.clone()));
        loops.spawn(repair::run(directory.clone()));
        loops.spawn(confirm::run(directory.clone()));
        loops.spawn(collect::run(directory.clone()));
        loops.spawn(extents::run(directory.clone()));
        loops.spawn(grants::run(directory.clone()));
        loops.spawn(sessions::run(directory.clone(), loops.stop.clone()));
        loops.spawn(trash::run(directory.clone(), loops.stop.clone()));
        loops.spawn(answers::run(directory.clone(), loops.stop.clone()));
        for table in crate::cluster::tally::Table::ALL {
            let directory = directory.clone();
            loops.spawn(async move {
                let store = directory.store.clone();
                let others_commit =
                    directory.membership.is_some() && table == crate::cluster::tally::Table::Inodes;
                let note = |change: &Mutation| {
                    if others_commit {
                        extents::note(&directory, change);
                    }
                };
                directory.cluster.tallies.follow(store, table, note).await;
            });
        }
        if let Some(membership) = directory.membership.clone() {
            let beating = directory.clone();
            loops.spawn(async move { membership.run(&beating.sessions).await });
            loops.spawn(follow::run(directory.clone()));
            loops.spawn(homes::run(directory.clone()));
        }
        if let Some(journal) = journal {
            loops.spawn(shipping::run(directory.clone(), journal));
        }
        loops
    }

    /// Runs a loop until all are ended.
    pub fn spawn(&self, run: impl Future<Output = ()> + Send + 'static) {
        let (stop, failed) = (self.stop.clone(), self.failed.clone());
        self.tasks.spawn(async move {
            let run = AssertUnwindSafe(run).catch_unwind();
            if let Some(Err(_)) = stop.run_until_cancelled(run).await {
                failed.cancel();
            }
        });
    }

    /// Waits until a loop panicked. A directory that repairs, collects or expires nothing any more must not look healthy:
    /// it is to be opened anew.
    pub async fn failed(&self) {
        self.failed.cancelled().await;
    }

    /// Ends all loops where they next wait.
    pub async fn end(self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

impl Drop for Loops {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_loop_that_panics_is_not_missed_and_one_that_ends_is_none() {
        let loops = Loops::default();
        loops.spawn(async {});
        loops.spawn(async { panic!("planted by a test") });
        loops.failed().await;
        loops.end().await;
        let loops = Loops::default();
        loops.spawn(std::future::pending());
        let failed = loops.failed.clone();
        loops.end().await;
        assert!(!failed.is_cancelled());
    }
}
