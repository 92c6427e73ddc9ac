//! How fast a Cairn cluster is, seen by a program that uses `client-lib`.
//!
//! The library has what runs against any cluster: the [`workload`]s, the [`usage`] of processors and memory while they
//! run, and the [`report`] of it. `cairn bench` is that and no more. The program `bench` (`make bench`) adds the limits
//! of the machine, measured in the same run, and starts services of its own.
//!
//! A workload is prepared outside of the time that is measured (its files, its clients with their sessions and
//! connections), and bounded in time. Writes are acknowledged as durable, and reads verify all checksums: there is no
//! other way to use the client.

pub mod any;
pub mod report;
pub mod spread;
pub mod usage;
pub mod workload;
