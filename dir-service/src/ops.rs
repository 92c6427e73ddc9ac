//! Operations: load records, let `core` decide, commit its plan, decide again on conflict.

pub mod backup;
pub mod commit;
pub mod create;
pub mod delete;
pub mod explain;
pub mod extents;
pub mod grant;
pub mod held;
pub mod list;
pub mod lock;
pub mod lookup;
pub mod rename;
mod renew;
pub mod resolve;
pub mod session;
pub mod set_attributes;
pub mod status;
pub mod taken;
pub mod transact;
pub mod view;
pub mod watch;

#[cfg(test)]
mod tests;
