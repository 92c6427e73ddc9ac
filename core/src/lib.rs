//! The rules of Cairn: values in, decision out.
//!
//! Nothing here does IO, reads a clock or rolls dice; time, ids and what the store holds come in as arguments, and a
//! decision goes out, mostly a [`plan::Plan`] that the directory's store applies all or not at all.

pub mod attributes;
pub mod cluster;
pub mod commit;
pub mod compaction;
pub mod key;
pub mod layout;
pub mod listing;
pub mod lock;
pub mod namespace;
pub mod plan;
pub mod record;
pub mod session;
pub mod trash;

/// Hostile bytes may cost only so much memory: see `fuzz`.
#[cfg(test)]
#[global_allocator]
static ALLOCATOR: fuzz::memory::Counting = fuzz::memory::Counting;
