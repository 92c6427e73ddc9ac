//! Hostile bytes in every file of the directory's store.

use super::{
    JournaledConfig, JournaledStore, MetaStore as _, StoreIdentity, codec,
    index::{Index, MemoryIndex},
};
use bytes::Bytes;
use cairn_core::plan::{Key, Plan, Precondition};
use cairn_proto::id::{Generation, Revision};
use disk::{
    Disk, Open, SimDisk,
    log::{Log, LogConfig, Record},
};
use fuzz::Decoder;
use std::{path::Path, sync::Arc};

fn run<T>(test: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap()
        .block_on(test)
}

fn plan() -> Plan {
    let mut plan = Plan::new();
    plan.require(Precondition::Absent(Key::from_static(b"a")));
    plan.require(Precondition::Exists(Key::from_static(b"b")));
    plan.require(Precondition::Unchanged(Key::from_static(b"c"), None));
    plan.require(Precondition::Unchanged(Key::from_static(b"d"), Some(Revision(7))));
    plan.put(Key::from_static(b"key"), "value");
    plan.delete(Key::from_static(b"gone"));
    plan
}

#[test]
fn hostile_plans_are_refused_or_read() {
    Decoder::new("plan")
        .memory(40, 16 * 1024)
        .sample(codec::encode(&plan()).to_vec())
        .sample(codec::encode_applied(&plan()).to_vec())
        .run(|bytes| {
            if let Ok(plan) = codec::decode(&Bytes::copy_from_slice(bytes)) {
                assert!(plan.bytes() <= bytes.len());
                assert_eq!(codec::decode(&codec::encode(&plan)).unwrap(), plan);
            }
        });
}

fn config() -> JournaledConfig {
    JournaledConfig { segment_bytes: 2 << 20, index_reserve_bytes: 0, ..JournaledConfig::default() }
}

fn identity() -> StoreIdentity {
    StoreIdentity { cluster_id: "c0ffee".into(), generation: Generation(1) }
}

const DIR: &str = "directory";

async fn index_of(disk: &SimDisk) -> Arc<dyn Index> {
    let path = Path::new(DIR).join("index.snapshot");
    Arc::new(MemoryIndex::open(Arc::new(disk.clone()), &path).await.unwrap())
}

/// A closed store with three plans in its journal.
async fn closed_store() -> SimDisk {
    let disk = SimDisk::new(3, 1 << 30);
    let as_disk: Arc<dyn Disk> = Arc::new(disk.clone());
    as_disk.create_dir_all(Path::new(DIR)).await.unwrap();
    let index = index_of(&disk).await;
    let store = JournaledStore::create(as_disk, Path::new(DIR), identity(), index, config()).await.unwrap();
    for number in 0..3 {
        let mut plan = Plan::new();
        plan.put(Key::from(format!("key {number}").into_bytes()), "value");
        store.commit(plan).await.unwrap();
    }
    store.close().await.unwrap();
    disk
}

/// Opens a store, reads it and commits to it.
async fn use_store(disk: &SimDisk) {
    let index = index_of(disk).await;
    let opened = JournaledStore::open(Arc::new(disk.clone()), Path::new(DIR), index, config()).await;
    let Ok(store) = opened else { return };
    let (_, page) = store.scan(super::KeyRange::all(), 100, None).await.unwrap();
    assert!(page.entries.len() <= 100);
    let mut plan = Plan::new();
    plan.put(Key::from_static(b"new"), "value");
    let _ = store.commit(plan).await;
    let _ = store.close().await;
}

/// An intact record behind three good ones, whose payload and revision are hostile.
#[test]
fn hostile_journal_records_refuse_to_open_or_are_read() {
    let good = run(closed_store());
    let sample = |tag: u64, payload: &[u8]| [&tag.to_le_bytes()[..], payload].concat();
    let log_config = LogConfig {
        segment_bytes: config().segment_bytes,
        payload_bytes_max: codec::ENCODED_BYTES_MAX as u32,
        ..LogConfig::new(u128::from(cairn_proto::checksum::crc64(b"c0ffee")) << 64 | 1)
    };
    Decoder::new("journal")
        .one_in(400)
        // Segments stand on the simulated disk.
        .memory(40, 64 << 20)
        .bytes_max(5_000)
        .sample(sample(4, &codec::encode_applied(&plan())))
        .sample(sample(4, &codec::encode(&plan())))
        .sample(sample(u64::MAX, &codec::encode_applied(&plan())))
        .run(|bytes| {
            let Some((tag, payload)) = bytes.split_first_chunk::<8>() else { return };
            let disk = good.clone_disk();
            run(async {
                let dir = Path::new(DIR).join("journal");
                let (log, _) = Log::open(Arc::new(disk.clone()), &dir, log_config.clone(), &mut |_| Ok(()))
                    .await
                    .unwrap();
                let payload = vec![Bytes::copy_from_slice(payload)];
                let record = Record { kind: 0, tag: u64::from_le_bytes(*tag), payload };
                log.append_batch(vec![record]).await.unwrap();
                log.close().await.unwrap();
                drop(log);
                use_store(&disk).await;
            });
        });
}

#[test]
fn hostile_store_descriptions_refuse_to_open_or_are_read() {
    let good = run(closed_store());
    let path = Path::new(DIR).join("store.meta");
    let sample = run(async { good.open(&path, Open::Read).await.unwrap().read_at(0, 4_096).await.unwrap() });
    Decoder::new("store-meta")
        .one_in(200)
        .memory(40, 64 << 20)
        .bytes_max(5_000)
        .sample(sample)
        .repair(|bytes| {
            if let Some(body) = bytes.len().checked_sub(8) {
                let sum = cairn_proto::checksum::crc64(&bytes[..body]);
                bytes[body..].copy_from_slice(&sum.to_le_bytes());
            }
        })
        .run(|bytes| {
            let disk = good.clone_disk();
            run(async {
                let file = disk.open(&path, Open::ReadWrite).await.unwrap();
                file.set_len(0).await.unwrap();
                file.write_at(0, vec![Bytes::copy_from_slice(bytes)]).await.unwrap();
                let as_disk: Arc<dyn Disk> = Arc::new(disk.clone());
                let _ = JournaledStore::find(&as_disk, Path::new(DIR)).await;
                use_store(&disk).await;
            });
        });
}

/// Entries of a checkpoint and plans behind it, as a rebuild gets them from file servers.
#[test]
fn hostile_checkpoint_entries_are_loaded_as_they_are() {
    Decoder::new("restore")
        .one_in(50)
        .memory(40, 64 << 20)
        .bytes_max(5_000)
        .sample("key-value-1234567890")
        .run(|bytes| {
            let disk = SimDisk::new(3, 1 << 30);
            run(async {
                let as_disk: Arc<dyn Disk> = Arc::new(disk.clone());
                disk.create_dir_all(Path::new(DIR)).await.unwrap();
                let index = index_of(&disk).await;
                let mut restore = super::Restore::begin(
                    as_disk,
                    Path::new(DIR),
                    identity(),
                    Revision(bytes.len() as u64),
                    index,
                )
                .await
                .unwrap();
                for (number, part) in bytes.chunks(16).enumerate() {
                    let value = cairn_core::plan::Versioned {
                        value: Bytes::copy_from_slice(part),
                        revision: Revision(number as u64),
                    };
                    let _ = restore.load(Key::copy_from_slice(&part[..part.len() / 2]), value).await;
                }
                let _ = restore.apply(Revision(bytes.len() as u64 + 1), Bytes::copy_from_slice(bytes)).await;
                if let Ok(store) = restore.finish(config()).await {
                    store.close().await.unwrap();
                }
            });
        });
}
