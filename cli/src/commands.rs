//! The commands, by what they are about.

pub mod backup;
pub mod bench;
pub mod cluster;
pub mod health;
pub mod list;
pub mod lock;
pub mod migrate;
pub mod names;
pub mod stream;
pub mod up;
