//! Hostile bytes in copies of the directory's journal.

use super::*;
use cairn_proto::checksum::ChunkChecksum;
use disk::{
    Open, SimDisk,
    log::{Log, LogConfig, Record},
};
use fuzz::Decoder;

const COPY_DIR: &str = "journal/0000000000000002";

fn run<T>(test: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap()
        .block_on(test)
}

async fn installed() -> SimDisk {
    let disk = SimDisk::new(7, 1 << 30);
    let journals = Journals::open(Arc::new(disk.clone()), "c").await.unwrap();
    let entries = (0..3).map(|number| v1::CheckpointEntry {
        key: format!("key {number}").into(),
        value: "value".into(),
        revision: number,
    });
    let first = v1::InstallCheckpointRequest {
        cluster_id: "c".into(),
        generation: 2,
        revision: 5,
        carrier_ids: vec![1, 2],
        entries: entries.collect(),
        entry_count: Some(3),
    };
    journals.install(first, futures::stream::empty()).await.unwrap();
    let records =
        (6..9).map(|revision| v1::JournalRecord { revision, plan: format!("plan {revision}").into() });
    let append = v1::AppendJournalRequest {
        cluster_id: "c".into(),
        generation: 2,
        previous_revision: 5,
        records: records.collect(),
        carrier_ids: vec![1, 2, 3],
    };
    journals.append(append).await.unwrap();
    journals.close().await.unwrap();
    disk
}

/// Makes the checksums of all frames of a checkpoint right.
fn repair_frames(bytes: &mut [u8]) {
    let mut at = 0;
    while at + 16 <= bytes.len() {
        let length =
            u32::from_le_bytes([bytes[at + 4], bytes[at + 5], bytes[at + 6], bytes[at + 7]]) as usize;
        let end = (at + 16).saturating_add(length);
        let Some(payload) = bytes.get(at + 16..end) else { return };
        let mut sum = ChunkChecksum::default();
        sum.update(&bytes[at..at + 8]);
        sum.update(payload);
        bytes[at + 8..at + 16].copy_from_slice(&sum.value().to_le_bytes());
        at = end;
    }
}

/// Opens all copies and reads them, as a rebuild does.
async fn use_copies(disk: &SimDisk) {
    let Ok(journals) = Journals::open(Arc::new(disk.clone()), "c").await else { return };
    for copy in journals.copies() {
        if let Ok(mut reading) = journals.read(&copy.cluster_id, Generation(copy.generation)).await {
            let mut parts = 0;
            while let Ok(Some(_)) = reading.next().await {
                parts += 1;
                assert!(parts < 10_000, "a copy without an end");
            }
        }
    }
    let append = v1::AppendJournalRequest {
        cluster_id: "c".into(),
        generation: 2,
        previous_revision: journals.revision(),
        records: vec![v1::JournalRecord {
            revision: journals.revision().saturating_add(1),
            plan: "p".into(),
        }],
        carrier_ids: vec![1],
    };
    let _ = journals.append(append).await;
    journals.close().await.unwrap();
}

#[test]
fn hostile_checkpoints_are_not_offered_or_read() {
    let disk = run(installed());
    let path = Path::new(COPY_DIR).join("checkpoint-0000000000000005");
    let sample =
        run(async { disk.open(&path, Open::Read).await.unwrap().read_at(0, 1 << 20).await.unwrap() });
    Decoder::new("checkpoint")
        .one_in(200)
        // The log's segments of 8 MiB stand on the simulated disk.
        .memory(256, 128 << 20)
        .sample(sample)
        .repair(|bytes| repair_frames(bytes))
        .run(|bytes| {
            let disk = disk.clone_disk();
            run(async {
                let file = disk.open(&path, Open::ReadWrite).await.unwrap();
                file.set_len(0).await.unwrap();
                file.write_at(0, vec![bytes::Bytes::copy_from_slice(bytes)]).await.unwrap();
                use_copies(&disk).await;
            });
        });
}

#[test]
fn hostile_records_of_a_journal_copy_are_not_offered_or_read() {
    // As `Copy` names its log.
    let place = [2u64.to_le_bytes(), 5u64.to_le_bytes()].concat();
    let crc = cairn_proto::checksum::crc64;
    let log_id = u128::from(crc(b"c")) << 64 | u128::from(crc(&place));
    let config = LogConfig { segment_bytes: 8 << 20, payload_bytes_max: 4 << 20, ..LogConfig::new(log_id) };
    let good = run(installed());
    // Kind, revision, payload.
    let sample = |kind: u8, tag: u64, payload: &[u8]| [&[kind][..], &tag.to_le_bytes(), payload].concat();
    Decoder::new("journal-copy")
        .one_in(1_000)
        .memory(64, 128 << 20)
        .bytes_max(5_000)
        .sample(sample(1, 9, b"plan 9"))
        .sample(sample(2, 8, &[10, 3, 1, 2, 3]))
        .sample(sample(7, 8, b""))
        .run(|bytes| {
            let Some((head, payload)) = bytes.split_first_chunk::<9>() else { return };
            let disk = good.clone_disk();
            run(async {
                let dir = Path::new(COPY_DIR).join("log-0000000000000005");
                let (log, _) =
                    Log::open(Arc::new(disk.clone()), &dir, config.clone(), &mut |_| Ok(())).await.unwrap();
                let tag = u64::from_le_bytes(head[1..].try_into().unwrap());
                let payload = vec![bytes::Bytes::copy_from_slice(payload)];
                log.append_batch(vec![Record { kind: head[0], tag, payload }]).await.unwrap();
                log.close().await.unwrap();
                drop(log);
                use_copies(&disk).await;
            });
        });
}
