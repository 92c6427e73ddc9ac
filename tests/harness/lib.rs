//! What the tests of whole clusters share.

pub mod checks;
pub mod cluster;
pub mod copies;
pub mod damage;
pub mod eventually;
pub mod golden;
pub mod ground;
pub mod histories;
pub mod load;
pub mod messages;
pub mod mounts;
pub mod network;
pub mod processes;
pub mod raw;
pub mod record;
pub mod reflect;
pub mod services;
pub mod small_disk;
pub mod stalls;
pub mod trees;

pub use cluster::{amount, dead_holder, healthy, read_all_copies, seed, shipped};
