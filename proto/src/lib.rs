//! The words that all parts of Cairn share: the contract `cairn.v1`, validated types, limits and errors.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`v1`] | generated messages and, behind the features `client` and `server`, stubs |
//! | [`id`] | newtypes for ids and tokens |
//! | [`path`] | file names and paths, normalised and bounded |
//! | [`limits`] | every limit of the contract |
//! | [`error`] | the error vocabulary and its one table to gRPC codes |
//! | [`checksum`] | block and chunk checksums |
//! | [`net`] | listeners, connectors and the transport settings of both ends |
//! | `listen`, `request` | where a server listens, and the id that ties the logs of all services together |
//!
//! This crate is used by clients and servers alike and stays slim: without features it has neither tonic nor tokio
//! in its tree.

pub mod checkpoint;
pub mod checksum;
pub mod convert;
pub mod error;
#[cfg(any(feature = "client", feature = "server"))]
pub mod host;
#[cfg(test)]
mod hostile;
pub mod id;
pub mod limits;
#[cfg(feature = "server")]
pub mod listen;
#[cfg(any(feature = "client", feature = "server"))]
pub mod net;
pub mod path;
#[cfg(any(feature = "client", feature = "server"))]
pub mod request;

/// Generated from `cairn/v1/*.proto`.
#[allow(missing_docs, clippy::all, clippy::unwrap_used, clippy::expect_used, rust_2018_idioms, rustdoc::all)]
pub mod v1 {
    include!(concat!(env!("OUT_DIR"), "/cairn.v1.rs"));
}

/// The encoded file descriptor set of `cairn.v1`, for reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

pub use error::{Error, Reason, Result};

/// Hostile bytes may cost only so much memory: see `fuzz`.
#[cfg(test)]
#[global_allocator]
static ALLOCATOR: fuzz::memory::Counting = fuzz::memory::Counting;
