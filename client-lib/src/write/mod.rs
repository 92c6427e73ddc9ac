//! The way of a write: bytes become chunks, chunks get receipts, receipts become a version.

pub(crate) mod chunk;
pub(crate) mod commit;
pub(crate) mod grants;
pub(crate) mod primary;
pub(crate) mod rows;
pub(crate) mod store;
