//! Files in a Cairn cluster, as if there were no servers.
//!
//! A [`Client`] reads, writes, lists, locks and moves files by path. It finds the servers through the directory,
//! computes and verifies checksums, spreads and repeats work, and goes around servers that fail.
//!
//! ```no_run
//! use client_lib::{Client, Condition, LockOptions, WriteOptions};
//! use std::time::Duration;
//! use tokio::io::{AsyncReadExt, AsyncWriteExt};
//!
//! #[tokio::main]
//! async fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let client = Client::connect(&["http://127.0.0.1:7400"]).await?;
//!
//!     // Whole files in one call.
//!     client.mkdir_all("/reports/2025").await?;
//!     let once = WriteOptions::new().condition(Condition::Absent);
//!     client.write_with("/reports/2025/may.txt", "all well", once).await?;
//!     assert_eq!(client.read("/reports/2025/may.txt").await?, "all well");
//!
//!     // Handles: what is written becomes one new version at close, nothing before.
//!     let mut file = client.open_options().write(true).create(true).open("/reports/log").await?;
//!     file.write_all(b"first line\n").await?;
//!     file.close().await?;
//!     let mut text = String::new();
//!     client.open("/reports/log").await?.read_to_string(&mut text).await?;
//!
//!     // Locks keep other writers away; the token proves the lock.
//!     let lock = client.lock("/reports/log", LockOptions::new().wait(Duration::from_secs(5))).await?;
//!     client.append_with("/reports/log", "second line\n", WriteOptions::new().token(&lock)).await?;
//!     lock.unlock().await?;
//!
//!     client.delete("/reports/log").await?;
//!     client.close().await?;
//!     Ok(())
//! }
//! ```
//!
//! Programs without a runtime use [`blocking`].
//!
//! # What a caller can rely on
//!
//! - A read sees one committed version, whole. Each byte was verified against the checksum that its writer computed.
//! - A write is acknowledged when it is durable on enough servers and in the directory. Calls that lost their answer are
//!   repeated under the same request id, never applied twice; `OUTCOME_UNKNOWN` says when it can no longer be known.
//! - The death of a file server costs time, not an error, as long as enough others live.
//! - Errors are [`Error`]s with a [`Reason`] to match on; they name the path or server and what to do.
//! - Memory is bounded: chunks under way (8 of [`ClientBuilder::chunk_bytes`]) and one being filled for each handle that
//!   writes, 32 MiB ahead of each handle that reads.

pub mod blocking;
mod client;
mod connections;
mod content;
mod directory;
mod file;
mod lock;
mod namespace;
mod options;
mod pages;
mod read;
mod retry;
mod segments;
mod servers;
mod session;
mod task;
mod together;
mod write;

pub use cairn_proto::{
    Error, Reason, Result,
    id::{FencingToken, ServerId},
    limits,
    path::FilePath,
    v1,
    v1::{
        Attributes, DrainResponse, Entry, ExplainResponse, Kind, LockInfo, LockMode, StatusResponse,
        WatchResponse,
    },
};
pub use client::{Client, ClientBuilder};
pub use file::{File, OpenOptions};
pub use lock::Lock;
pub use namespace::{DeleteReport, KEPT_MAX};
pub use options::{
    Condition, DeleteOptions, ListOptions, LockOptions, RenameOptions, SetAttributes, WriteOptions,
};
pub use read::READ_BYTES_MAX;

/// Hostile bytes may cost only so much memory: see `fuzz`.
#[cfg(test)]
#[global_allocator]
static ALLOCATOR: fuzz::memory::Counting = fuzz::memory::Counting;
