//! The client against services in memory, over pipes that can be cut.

// A test says what went wrong by panicking.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod blocking;
mod content;
mod failures;
mod fake;
mod handles;
mod hostile;
mod locks;
mod names;

/// Hostile answers may cost only so much memory.
#[global_allocator]
static ALLOCATOR: fuzz::memory::Counting = fuzz::memory::Counting;
