//! Generated from `proto/etcd/*.proto`: the part of etcd's v3 API that is used.

#![allow(
    dead_code,
    missing_docs,
    clippy::all,
    clippy::unwrap_used,
    clippy::expect_used,
    rust_2018_idioms,
    rustdoc::all
)]

pub(super) mod mvccpb {
    include!(concat!(env!("OUT_DIR"), "/mvccpb.rs"));
}

pub(super) mod etcdserverpb {
    include!(concat!(env!("OUT_DIR"), "/etcdserverpb.rs"));
}

pub(super) use etcdserverpb::*;
pub(super) use mvccpb::{Event, KeyValue, event};
