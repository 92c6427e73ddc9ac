//! The services of a file server on the wire. A handler decodes, calls and encodes.

mod file;
mod guard;
mod reading;
mod replica;
mod sending;

pub use file::FileHandler;
pub use guard::{Guard, GuardLayer};
pub use replica::ReplicaHandler;
pub use sending::Sending;
