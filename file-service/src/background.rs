//! Loops that run beside the calls.

pub mod compact;
pub mod heartbeat;
pub mod scrub;
