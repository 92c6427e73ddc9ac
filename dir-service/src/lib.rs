//! The directory: names, versions, locks and placement.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`store`] | the only way to metadata: get, scan, commit(plan), watch; engines |
//! | [`ops`] | operations: load records, let `core` decide, commit |
//! | [`directory`] | the parts that every operation needs |
//! | [`cluster`] | file servers, placement groups, copies |
//! | [`sessions`] | renewals |
//! | [`membership`] | this directory among others on one store |
//! | [`fragments`] | files that wait for their extents to be merged |
//! | [`background`] | loops beside the requests |
//! | [`app`] | wires the parts, serves, stops |
//! | [`life`] | from an empty disk or an opened store to a serving directory |
//! | [`shared`] | the same on a store that several directories share |
//! | [`rebuild`] | forming a cluster, rebuilding one from its file servers |
//! | [`restore`], [`migrate`] | a store from a backup, or from another engine |
//! | [`gate`] | between handlers and the directory: forming, rebuilding, serving |
//! | [`grpc`] | handlers |
//! | [`config`] | what can be told at the start |

pub mod app;
pub mod args;
pub mod background;
pub mod claim;
pub mod cluster;
pub mod config;
pub mod directory;
pub mod fragments;
pub mod gate;
pub mod grpc;
pub mod ids;
pub mod life;
pub mod membership;
pub mod metrics;
pub mod migrate;
pub mod ops;
pub mod rebuild;
pub mod restore;
pub mod sessions;
pub mod shared;
pub mod store;
#[cfg(test)]
pub(crate) mod testing;

pub use app::App;
pub use config::{Config, Effort, Timing};

/// Hostile bytes may cost only so much memory: see `fuzz`.
#[cfg(test)]
#[global_allocator]
static ALLOCATOR: fuzz::memory::Counting = fuzz::memory::Counting;
