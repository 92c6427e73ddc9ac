//! Cairn's file service: holds the bytes.
//!
//! | module | what it does |
//! | --- | --- |
//! | [`app`] | wires the parts and serves them |
//! | [`args`], [`config`] | what a server is told |
//! | [`chunks`] | keeps chunks |
//! | [`identity`], [`topology`] | what a server knows for good: who it is, and the cluster |
//! | [`ingest`], [`receive`] | take chunks in from streams |
//! | [`replicate`], [`peers`] | have followers store them too |
//! | [`fetch`] | gets chunks that are missing here |
//! | [`compose`] | puts chunks together from ranges of others |
//! | [`journal`] | carries the directory's journal |
//! | [`directory`], [`background`] | register, say that the server lives, verify, give room back |
//! | [`grpc`], [`metrics`] | the wire, and figures |
//! | [`places`] | bounds the calls under way |
//! | [`node`] | what all of them share |

pub mod app;
pub mod args;
pub mod background;
pub mod chunks;
pub mod compose;
pub mod config;
pub mod directory;
pub mod fetch;
pub mod grpc;
pub mod identity;
pub mod ingest;
pub mod journal;
pub mod metrics;
pub mod node;
pub mod peers;
pub mod places;
pub mod receive;
mod record_file;
pub mod replicate;
pub mod topology;

pub use app::App;
pub use config::{Config, Timing};

/// Hostile bytes may cost only so much memory: see `fuzz`.
#[cfg(test)]
#[global_allocator]
static ALLOCATOR: fuzz::memory::Counting = fuzz::memory::Counting;
