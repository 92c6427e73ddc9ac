//! What must hold in the end.

pub mod copies;
pub mod linear;
