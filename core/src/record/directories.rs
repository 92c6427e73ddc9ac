//! Records of directories that share a store ([`crate::cluster::directories`]).

use super::Record;
use prost::Message;

/// A directory. Written when it joins and when it is declared dead, so that plans can require that it lives without
/// meeting its beats.
#[derive(Clone, PartialEq, Message)]
pub struct Directory {
    /// How clients and file servers reach it, best first.
    #[prost(string, repeated, tag = "1")]
    pub addresses: Vec<String>,
    /// It was silent for too long, or has left. The record stays until its sessions have another home.
    #[prost(bool, tag = "2")]
    pub dead: bool,
}
record!(Directory, "directory");

/// A directory's sign of life, written again about once a second.
#[derive(Clone, PartialEq, Message)]
pub struct Beat {
    /// Grows with every beat.
    #[prost(uint64, tag = "1")]
    pub count: u64,
    /// No session whose home it is reads at an older revision than this.
    #[prost(uint64, tag = "2")]
    pub floor: u64,
    /// Sessions whose home it is.
    #[prost(uint64, tag = "3")]
    pub sessions: u64,
}
record!(Beat, "beat of a directory");

/// Which directory does the background work.
#[derive(Clone, PartialEq, Message)]
pub struct Lead {
    /// The directory.
    #[prost(uint64, tag = "1")]
    pub holder: u64,
    /// Grows with every change of hands.
    #[prost(uint64, tag = "2")]
    pub term: u64,
}
record!(Lead, "lead of the directories");
