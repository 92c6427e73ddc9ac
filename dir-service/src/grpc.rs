//! Handlers: decode, call, encode. One file per service of the contract.

pub mod cluster;
pub mod directory;
pub mod layer;
pub mod session;
