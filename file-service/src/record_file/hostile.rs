//! Hostile bytes in the records that a server keeps about itself.

use super::*;
use cairn_proto::v1;
use disk::{Open, SimDisk};
use fuzz::Decoder;
use std::sync::Arc;

const TOPOLOGY: Kind = Kind { path: "topology", magic: b"CAIRNtop", version: 1, payload_bytes_max: 1 << 20 };

/// Makes length and checksum right, and what stands before them when asked.
fn repair(bytes: &mut [u8], magic: &[u8; 8]) {
    if bytes.len() < HEADER_BYTES {
        return;
    }
    bytes[..8].copy_from_slice(magic);
    bytes[8..12].copy_from_slice(&1u32.to_le_bytes());
    let length = (bytes.len() - HEADER_BYTES) as u32;
    bytes[12..16].copy_from_slice(&length.to_le_bytes());
    let mut sum = ChunkChecksum::default();
    sum.update(&bytes[..16]);
    sum.update(&bytes[HEADER_BYTES..]);
    bytes[16..24].copy_from_slice(&sum.value().to_le_bytes());
}

#[test]
fn hostile_record_files_are_refused_or_read() {
    let topology = v1::TopologyResponse {
        revision: 3,
        generation: 2,
        carrier_ids: vec![1, 2, 300],
        groups: vec![v1::Group { id: 1, seats: vec![v1::Seat::default(); 3], ..Default::default() }; 2],
        servers: vec![v1::Server { id: 5, zone: "a".into(), ..Default::default() }],
        ..Default::default()
    };
    Decoder::new("record-file")
        // An empty element of a list takes two bytes and becomes a struct; the list may be moved while it grows.
        .memory(256, 16 * 1024)
        .sample(encode(&topology, TOPOLOGY).expect("a topology"))
        .repair(|bytes| repair(bytes, b"CAIRNtop"))
        .run(|bytes| {
            if let Err(error) = decode::<v1::TopologyResponse>(bytes, TOPOLOGY) {
                assert!(error.message().contains("'topology'"), "{error}");
            }
        });
}

/// The identity as its own module reads it, from a disk.
#[test]
fn hostile_identities_refuse_to_start_or_are_read() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let path = Path::new("identity");
    let sample = runtime.block_on(async {
        let disk = Arc::new(SimDisk::new(1, 1 << 20));
        let identity = crate::identity::Identity::open(disk.clone(), 7).await.expect("an identity");
        identity
            .join("c", cairn_proto::id::ServerId(3), cairn_proto::id::Generation(2))
            .await
            .expect("joins");
        disk.open(path, Open::Read).await.expect("a file").read_at(0, 4_096).await.expect("bytes").to_vec()
    });
    Decoder::new("identity")
        .one_in(4)
        .memory(20, 128 * 1024)
        .bytes_max(8_000)
        .sample(sample)
        .repair(|bytes| repair(bytes, b"CAIRNidn"))
        .run(|bytes| {
            runtime.block_on(async {
                let disk = Arc::new(SimDisk::new(1, 1 << 20));
                let file = disk.open(path, Open::Create).await.expect("a file");
                file.write_at(0, vec![Bytes::copy_from_slice(bytes)]).await.expect("written");
                if let Ok(identity) = crate::identity::Identity::open(disk.clone(), 7).await {
                    // What was read is durable and reads the same again, with one more start.
                    let again = crate::identity::Identity::open(disk, 8).await.expect("again");
                    assert_eq!(
                        (again.disk_id(), again.cluster_id()),
                        (identity.disk_id(), identity.cluster_id())
                    );
                    assert_ne!(again.incarnation(), identity.incarnation());
                }
            });
        });
}
