//! Rot and hostile bytes: always reported, never returned, never a panic.

use proptest::prelude::*;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::*;
use crate::Open;

fn accepting() -> LogConfig {
    LogConfig { accept_damage: true, segment_bytes: 12 << 10, payload_bytes_max: 2 << 10, ..config() }
}

/// A small closed log of several segments, with its records' positions.
async fn small_log() -> (SimDisk, Vec<Position>) {
    let disk = SimDisk::new(1, 1 << 20);
    let (log, ..) = open_with(&disk, accepting()).await.unwrap();
    let mut positions = Vec::new();
    for tag in 0..18 {
        positions.push(log.append(1, tag, vec![payload(tag, 900 + tag as usize)]).await.unwrap());
    }
    log.punch(&[positions[7]]).await.unwrap();
    log.close().await.unwrap();
    (disk, positions)
}

fn segment_path(number: u32) -> std::path::PathBuf {
    dir().join(format!("{number:08x}.seg"))
}

#[tokio::test]
async fn a_flipped_bit_is_always_damage() {
    let (disk, positions) = small_log().await;
    let mut rng = SmallRng::seed_from_u64(9);
    for (tag, position) in positions.iter().enumerate() {
        let dead = tag == 7;
        let len = if dead { RECORD_HEADER_BYTES } else { encoded_len(900 + tag as u32) };
        // All bytes of the headers, and a sample of the payloads.
        for at in (0..len).filter(|at| *at < RECORD_HEADER_BYTES || at % 37 == 0 || at + 9 > len) {
            let (copy, bit) = (disk.clone_disk(), rng.random_range(0..8));
            let context = format!("record {tag}, byte {at}, bit {bit}");
            copy.flip_bit(&segment_path(position.segment), u64::from(position.offset + at), bit).unwrap();
            let strict = LogConfig { accept_damage: false, ..accepting() };
            let refused = open_with(&copy, strict.clone()).await.unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::InvalidData, "{context}");
            let (log, recovery, seen) = open_with(&copy, accepting()).await.unwrap();
            let [damage] = recovery.damage[..] else { panic!("{context}: {:?}", recovery.damage) };
            assert_eq!((damage.position, damage.what), (*position, DamageKind::Record), "{context}");
            let others: Vec<u64> = (0..18).filter(|other| *other != tag as u64).collect();
            assert_eq!(tags(&seen), others, "{context}");
            assert!(seen.iter().all(|r| r.dead || r.payload == Some(payload(r.tag, r.len as usize))));
            assert!(log.read_record(*position).await.is_err(), "{context}");
            log.append(1, 99, vec![]).await.unwrap();
            log.close().await.unwrap();
            // It stays known after recovery and further writes.
            open_with(&copy, strict).await.unwrap_err();
        }
    }
}

#[tokio::test]
async fn a_bad_segment_header_has_a_copy() {
    let (disk, positions) = small_log().await;
    let copy = disk.clone_disk();
    copy.flip_bit(&segment_path(1), 20, 3).unwrap();
    let (_, recovery, seen) = open_with(&copy, accepting()).await.unwrap();
    assert_eq!(recovery.damage[0].what, DamageKind::HeaderCopy);
    assert_eq!(seen.len(), 18);
    let copy = disk.clone_disk();
    copy.flip_bit(&segment_path(1), 20, 3).unwrap();
    copy.flip_bit(&segment_path(1), 2068, 3).unwrap();
    let (_, recovery, seen) = open_with(&copy, accepting()).await.unwrap();
    assert_eq!(recovery.damage[0].what, DamageKind::SegmentHeader);
    let left = positions.iter().filter(|position| position.segment > 1).count();
    assert_eq!(seen.len(), left);
    let copy = disk.clone_disk();
    copy.remove_file(&segment_path(2)).await.unwrap();
    let (_, recovery, _) = open_with(&copy, accepting()).await.unwrap();
    assert_eq!(recovery.damage[0].what, DamageKind::MissingSegment);
}

#[tokio::test]
async fn an_unreadable_block_hides_only_itself() {
    let (disk, _) = small_log().await;
    let copy = disk.clone_disk();
    // The retry by block meets the fault again once, so one block stays unread.
    copy.fail_reads(2);
    let (_, recovery, _) = open_with(&copy, accepting()).await.unwrap();
    assert!(!recovery.damage.is_empty());
    // And nothing was changed that a later, luckier read could not see.
    let (_, again, seen) = open_with(&copy, accepting()).await.unwrap();
    assert!(again.damage.is_empty() && seen.len() == 18, "{:?}", again.damage);
    assert!(recovery.damage.iter().all(|damage| damage.position.segment == 1));
}

#[tokio::test]
async fn rot_in_recovered_records_is_not_torn() {
    let disk = SimDisk::new(3, 1 << 20);
    let (log, ..) = open(&disk).await;
    let positions = fill(&log, 0..3, 100).await;
    drop(log);
    // Not closed: only opening again proves the last records.
    disk.crash(CrashKeep::Nothing);
    let (log, ..) = open(&disk).await;
    drop(log);
    disk.crash(CrashKeep::Nothing);
    disk.flip_bit(&segment_path(1), u64::from(positions[2].offset) + 80, 0).unwrap();
    let error = open_with(&disk, config()).await.unwrap_err();
    assert!(error.to_string().contains(&positions[2].to_string()), "{error}");
}

async fn write_segment(bytes: Vec<u8>, number: u32) -> SimDisk {
    let disk = SimDisk::new(4, 1 << 20);
    disk.create_dir_all(dir()).await.unwrap();
    let file = disk.open(&segment_path(number), Open::Create).await.unwrap();
    file.write_at(0, vec![bytes.into()]).await.unwrap();
    disk
}

fn run<T>(test: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(test)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn arbitrary_bytes_are_no_records(
        noise in proptest::collection::vec(any::<u8>(), 0..12_000),
        with_header: bool,
        number in 1u32..5,
    ) {
        run(async {
            let mut bytes = noise;
            if with_header {
                let id = format::SegmentId { log_id: accepting().log_id, number, life: 1 };
                let header = format::encode_segment_header(id, 12 << 10);
                bytes.splice(0..0, header);
            }
            let disk = write_segment(bytes, number).await;
            let (log, _, seen) = open_with(&disk, accepting()).await.unwrap();
            assert!(seen.is_empty());
            log.append(1, 1, vec![]).await.unwrap();
            log.close().await.unwrap();
        });
    }

    #[test]
    fn changed_bytes_are_never_returned(
        edits in proptest::collection::vec((1u32..4, 4096u64..12_288, any::<u8>(), 1usize..600), 1..8),
        cut in proptest::option::of(0u64..12_288),
    ) {
        run(async {
            let (disk, positions) = small_log().await;
            for (number, offset, byte, len) in edits {
                let file = disk.open(&segment_path(number), Open::ReadWrite).await.unwrap();
                file.write_at(offset, vec![vec![byte; len].into()]).await.unwrap();
            }
            if let Some(len) = cut {
                disk.open(&segment_path(2), Open::ReadWrite).await.unwrap().set_len(len).await.unwrap();
            }
            let (log, _, seen) = open_with(&disk, accepting()).await.unwrap();
            for record in &seen {
                assert_eq!(positions[record.tag as usize], record.position);
                assert!(record.dead || record.payload == Some(payload(record.tag, 900 + record.tag as usize)));
            }
            for (tag, position) in positions.iter().enumerate() {
                if let Ok(record) = log.read_record(*position).await {
                    assert_eq!(record.payload, payload(tag as u64, 900 + tag));
                }
            }
            let _ = log.records_from(positions[0], usize::MAX).await;
            log.close().await.unwrap();
        });
    }
}
