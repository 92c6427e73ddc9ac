//! File servers as others see them: three of them in one process, with a directory that only knows who is there.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on says where

mod directory;
mod harness;
mod membership;
mod network;
mod orders;
mod program;
mod reads;
mod replication;
mod scrub;
mod writes;
