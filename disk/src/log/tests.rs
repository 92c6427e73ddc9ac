//! The log's behaviour while nothing worse happens than a full disk or a failed call. Crashes and damage are
//! in the modules below.

use std::path::Path;
use std::sync::Arc;

use super::*;
use crate::{CrashKeep, RealDisk, SimDisk};

mod crashes;
mod damage;
mod hostile;

fn config() -> LogConfig {
    LogConfig { segment_bytes: 16 << 10, payload_bytes_max: 4 << 10, ..LogConfig::new(0x1234_5678 << 70) }
}

fn dir() -> &'static Path {
    Path::new("a/log")
}

fn payload(tag: u64, len: usize) -> Bytes {
    (0..len).map(|i| (tag as usize * 31 + i) as u8).collect::<Vec<u8>>().into()
}

/// Opens a log and gives what the scan delivered.
async fn open_with(disk: &dyn DiskLike, config: LogConfig) -> io::Result<(Log, Recovery, Vec<Scanned>)> {
    let mut seen = Vec::new();
    let (log, recovery) = Log::open(disk.share(), dir(), config, &mut |record| {
        seen.push(record);
        Ok(())
    })
    .await?;
    Ok((log, recovery, seen))
}

async fn open(disk: &dyn DiskLike) -> (Log, Recovery, Vec<Scanned>) {
    open_with(disk, config()).await.unwrap()
}

trait DiskLike {
    fn share(&self) -> Arc<dyn Disk>;
}
impl DiskLike for SimDisk {
    fn share(&self) -> Arc<dyn Disk> {
        Arc::new(self.clone())
    }
}
impl DiskLike for Arc<RealDisk> {
    fn share(&self) -> Arc<dyn Disk> {
        self.clone()
    }
}

fn tags(records: &[Scanned]) -> Vec<u64> {
    records.iter().map(|record| record.tag).collect()
}

async fn fill(log: &Log, tags: std::ops::Range<u64>, len: usize) -> Vec<Position> {
    let mut positions = Vec::new();
    for tag in tags {
        positions.push(log.append(7, tag, vec![payload(tag, len)]).await.unwrap());
    }
    positions
}

async fn records_come_back_on(disk: &dyn DiskLike) {
    let (log, recovery, _) = open(disk).await;
    assert_eq!((recovery.records, recovery.end), (0, Position::default()));
    let mut positions = Vec::new();
    for tag in 0..60 {
        let bytes = payload(tag, tag as usize * 50);
        let (one, two) = (bytes.slice(..bytes.len() / 3), bytes.slice(bytes.len() / 3..));
        positions.push(log.append(tag as u8, tag, vec![one, Bytes::new(), two]).await.unwrap());
    }
    assert!(positions.is_sorted() && log.segments().len() > 5);
    assert!(log.synced() > positions[59] && log.end() >= log.synced());
    assert_eq!(log.last_tag(), Some(59));
    let (from, _) = log.records_from(positions[20], usize::MAX).await.unwrap();
    assert_eq!(from.iter().map(|record| record.tag).collect::<Vec<_>>(), (20..60).collect::<Vec<_>>());
    log.close().await.unwrap();
    assert!(log.append(0, 0, vec![]).await.is_err());

    let (log, recovery, seen) = open(disk).await;
    assert!(recovery.damage.is_empty(), "{:?}", recovery.damage);
    assert_eq!((recovery.records, recovery.last_tag, log.last_tag()), (60, Some(59), Some(59)));
    for (tag, record) in seen.iter().enumerate() {
        let bytes = payload(tag as u64, tag * 50);
        assert_eq!((record.position, record.tag, record.kind), (positions[tag], tag as u64, tag as u8));
        assert_eq!(record.payload.as_ref(), Some(&bytes));
        let read = log.read_record(record.position).await.unwrap();
        assert_eq!((read.tag, read.kind, &read.payload), (tag as u64, tag as u8, &bytes));
        if tag > 0 {
            assert_eq!(log.read(record.position, 3, 40).await.unwrap(), bytes.slice(3..43));
        }
    }
    // In small pages, to the end.
    let (mut at, mut all) = (Position::default(), Vec::new());
    at.segment = 1;
    loop {
        let (records, next) = log.records_from(at, 3000).await.unwrap();
        all.extend(records);
        if next == at {
            break;
        }
        at = next;
    }
    assert_eq!(all.len(), 60);
    assert_eq!(log.read_record(log.end()).await.unwrap_err().kind(), io::ErrorKind::NotFound);
    fill(&log, 60..61, 5).await;
    let (records, _) = log.records_from(at, 1).await.unwrap();
    assert_eq!(records[0].tag, 60);
    log.close().await.unwrap();
}

#[tokio::test]
async fn records_come_back() {
    records_come_back_on(&SimDisk::new(1, 1 << 20)).await;
    let root = tempfile::tempdir().unwrap();
    records_come_back_on(&RealDisk::open(root.path()).unwrap()).await;
}

#[tokio::test]
async fn many_share_a_sync_and_keep_their_order() {
    let disk = SimDisk::new(2, 1 << 20);
    let (log, ..) = open(&disk).await;
    let before = disk.counters().syncs;
    let mut waiting = Vec::new();
    for tag in 0..50 {
        waiting
            .push(log.submit(vec![Record { kind: 1, tag, payload: vec![payload(tag, 20)] }]).await.unwrap());
    }
    let mut positions = Vec::new();
    for pending in waiting {
        positions.extend(pending.durable().await.unwrap());
    }
    assert!(positions.is_sorted());
    assert!(disk.counters().syncs - before <= 3, "{} syncs", disk.counters().syncs - before);
    let batch: Vec<Record> = (50..60).map(|tag| Record { kind: 1, tag, payload: vec![] }).collect();
    let positions = log.append_batch(batch).await.unwrap();
    assert!(positions.windows(2).all(|two| two[1].offset - two[0].offset == RECORD_HEADER_BYTES));
    log.close().await.unwrap();
    assert_eq!(tags(&open(&disk).await.2), (0..60).collect::<Vec<_>>());
}

#[tokio::test]
async fn dropped_calls_queue_all_or_nothing() {
    let disk = SimDisk::new(3, 1 << 20);
    let config = LogConfig { queue_bytes_max: 500, queue_batches_max: 2, ..config() };
    let (log, ..) = open_with(&disk, config).await.unwrap();
    let calls = (0..40).map(|tag| {
        let log = log.clone();
        async move {
            let call = log.append(1, tag, vec![payload(tag, 100)]);
            let polls = tag % 5;
            let mut call = std::pin::pin!(call);
            for _ in 0..polls {
                if futures::poll!(call.as_mut()).is_ready() {
                    return;
                }
                tokio::task::yield_now().await;
            }
        }
    });
    futures::future::join_all(calls).await;
    fill(&log, 100..101, 10).await;
    log.close().await.unwrap();
    let (_, recovery, seen) = open(&disk).await;
    assert!(recovery.damage.is_empty());
    assert!(tags(&seen).is_sorted() && seen.last().unwrap().tag == 100, "{:?}", tags(&seen));
    assert!(seen.iter().all(|record| record.payload == Some(payload(record.tag, record.len as usize))));
}

#[tokio::test]
async fn limits_are_refused() {
    let (log, ..) = open(&SimDisk::new(4, 1 << 20)).await;
    let error = log.append(0, 0, vec![payload(0, 5000)]).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    let batch = vec![Record { payload: vec![payload(0, 4000)], ..Record::default() }; 4];
    assert_eq!(log.append_batch(batch).await.unwrap_err().kind(), io::ErrorKind::InvalidInput);
    assert_eq!(log.append_batch(vec![]).await.unwrap_err().kind(), io::ErrorKind::InvalidInput);
    fill(&log, 0..1, 4096).await;
    let bad = LogConfig { segment_bytes: 8192, ..config() };
    let error = open_with(&SimDisk::new(4, 1 << 20), bad).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
}

#[tokio::test]
async fn recycled_segments_show_no_old_records() {
    for recycle in [true, false] {
        let disk = SimDisk::new(5, 1 << 20);
        let config = LogConfig { recycle, ..config() };
        let mut expected = Vec::new();
        for round in 0..20u64 {
            let (log, recovery, seen) = open_with(&disk, config.clone()).await.unwrap();
            assert!(recovery.damage.is_empty(), "{:?}", recovery.damage);
            assert_eq!(tags(&seen), expected, "round {round}");
            let new = round * 100..round * 100 + 30;
            // Always the same sizes, so that old records lie exactly where new ones would.
            let positions = fill(&log, new.clone(), 1000).await;
            let keep = positions[round as usize];
            let removed = log.remove_segments_before(keep).await.unwrap();
            assert_eq!(removed > 0, round > 0);
            let all = expected.iter().copied().zip(std::iter::repeat(Position::default()));
            let all = all.chain(new.zip(positions.iter().copied()));
            expected = all.filter(|(_, at)| at.segment >= keep.segment).map(|(tag, _)| tag).collect();
            let first = log.records_from(Position { segment: 1, offset: 0 }, 1).await;
            assert_eq!(first.err().map(|error| error.kind()), (round > 0).then_some(io::ErrorKind::NotFound));
            if round % 2 == 0 {
                log.close().await.unwrap();
            }
            drop(log);
            disk.crash(CrashKeep::Nothing);
            assert!(disk.used_bytes() < 400 << 10, "{}", disk.used_bytes());
        }
    }
}

async fn names(disk: &SimDisk) -> Vec<String> {
    disk.list(dir()).await.unwrap().into_iter().map(|entry| entry.name).collect()
}

#[tokio::test]
async fn bounded_a_removal_whose_sync_failed_is_done_by_the_next_try() {
    for recycle in [true, false] {
        let disk = SimDisk::new(13, 1 << 20);
        let (log, ..) = open_with(&disk, LogConfig { recycle, ..config() }).await.unwrap();
        let positions = fill(&log, 0..100, 1000).await;
        let kept = positions[80];
        assert!(kept.segment > 5);
        let mut oldest = 1;
        while oldest < kept.segment {
            disk.fail_syncs(1);
            log.remove_segments_before(kept).await.unwrap_err();
            // What is behind the one that may still be there stays, or a crash would leave a gap.
            assert_eq!(log.segments()[0].number, oldest);
            log.remove_segment(oldest).await.unwrap();
            oldest += 1;
        }
        assert_eq!(log.segments()[0].number, kept.segment);
        let spares = |names: Vec<String>| names.iter().filter(|name| name.starts_with("spare-")).count();
        let left = names(&disk).await;
        assert!(left.iter().all(|name| *name >= segments::segment_name(kept.segment)), "{left:?}");
        assert_eq!(spares(left), if recycle { 2 } else { 0 });
        // The spares are there when they are wanted.
        fill(&log, 100..150, 1000).await;
        assert_eq!(spares(names(&disk).await), 0);
        log.close().await.unwrap();
        disk.crash(CrashKeep::Nothing);
        let (_, recovery, seen) = open_with(&disk, LogConfig { recycle, ..config() }).await.unwrap();
        assert!(recovery.damage.is_empty(), "{:?}", recovery.damage);
        assert_eq!(seen.last().unwrap().tag, 149);
    }
}

#[tokio::test]
async fn bounded_a_spare_without_a_place_is_removed_by_the_next_try() {
    let disk = SimDisk::new(14, 1 << 20);
    let (log, ..) = open(&disk).await;
    let positions = fill(&log, 0..60, 1000).await;
    disk.fail_syncs(1);
    log.remove_segment(1).await.unwrap_err();
    assert!(names(&disk).await.contains(&"spare-00000001.seg".to_owned()));
    // Others take the places meanwhile.
    log.remove_segment(2).await.unwrap();
    log.remove_segment(3).await.unwrap();
    log.remove_segments_before(positions[40]).await.unwrap();
    let left = names(&disk).await;
    assert!(!left.contains(&"spare-00000001.seg".to_owned()), "{left:?}");
    assert_eq!(left.iter().filter(|name| name.starts_with("spare-")).count(), 2, "{left:?}");
}

#[tokio::test]
async fn a_life_is_never_given_twice_and_hides_the_one_before() {
    let disk = SimDisk::new(11, 1 << 20);
    let mut lives = Vec::new();
    for _ in 0..5 {
        let (log, ..) = open(&disk).await;
        fill(&log, 0..30, 1000).await;
        lives.extend(log.segments().into_iter().map(|segment| (segment.life, segment.number)));
        log.remove_segments_before(log.synced()).await.unwrap();
        log.close().await.unwrap();
    }
    lives.sort();
    lives.dedup();
    let (life, number) = *lives.last().unwrap();
    assert!(lives.windows(2).all(|two| two[0].0 < two[1].0), "{lives:?}");
    // The same number, the same bytes, another life.
    let file = disk.open(&dir().join(segments::segment_name(number)), crate::Open::ReadWrite).await.unwrap();
    let id = format::SegmentId { log_id: config().log_id, number, life: life + 1 };
    file.write_at(0, vec![format::encode_segment_header(id, config().segment_bytes).freeze()]).await.unwrap();
    let (log, recovery, seen) = open_with(&disk, LogConfig { allow_gaps: true, ..config() }).await.unwrap();
    assert!(seen.is_empty() && recovery.damage.is_empty(), "{seen:?}");
    assert!(log.segments()[0].life > life + 1);
}

#[tokio::test]
async fn a_full_disk_refuses_and_recovers() {
    let disk = SimDisk::new(6, 90 << 10);
    let (log, ..) = open(&disk).await;
    let mut stored = Vec::new();
    let error = loop {
        match log.append(0, stored.len() as u64, vec![payload(0, 1000)]).await {
            Ok(position) => stored.push(position),
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    assert!(!log.is_failed() && stored.len() > 30);
    // A smaller one may still fit; either way nothing breaks.
    let _ = log.append(0, 999, vec![]).await;
    assert_eq!(
        log.append(0, 0, vec![payload(0, 1000)]).await.unwrap_err().kind(),
        io::ErrorKind::StorageFull
    );
    log.close().await.unwrap();

    // Also opening works without room, to read and to trim.
    disk.set_capacity(0);
    let (log, recovery, seen) = open(&disk).await;
    assert!(recovery.damage.is_empty() && seen.len() >= stored.len());
    assert_eq!(log.append(0, 0, vec![]).await.unwrap_err().kind(), io::ErrorKind::StorageFull);
    log.remove_segments_before(stored[20]).await.unwrap();
    log.append(0, 1000, vec![]).await.unwrap();
    log.close().await.unwrap();
    let (_, recovery, seen) = open(&disk).await;
    assert!(recovery.damage.is_empty());
    assert_eq!(seen.last().unwrap().tag, 1000);
}

#[tokio::test]
async fn a_failed_sync_or_write_acknowledges_nothing_more() {
    for seed in 0..50 {
        let disk = SimDisk::new(seed, 1 << 20);
        let (log, ..) = open(&disk).await;
        fill(&log, 0..5, 100).await;
        if seed % 2 == 0 {
            disk.fail_syncs(1)
        } else {
            disk.fail_writes(1)
        }
        let calls = (5..20).map(|tag| log.append(0, tag, vec![payload(tag, 100)]));
        for done in futures::future::join_all(calls).await {
            done.unwrap_err();
        }
        assert!(log.is_failed());
        log.append(0, 0, vec![]).await.unwrap_err();
        log.close().await.unwrap_err();
        drop(log);
        disk.crash(CrashKeep::Random);
        let (_, recovery, seen) = open(&disk).await;
        assert!(recovery.damage.is_empty(), "seed {seed}: {:?}", recovery.damage);
        assert_eq!(tags(&seen), (0..seen.len() as u64).collect::<Vec<_>>(), "seed {seed}");
        assert!(seen.len() >= 5);
    }
}

#[tokio::test]
async fn what_a_failed_sync_left_readable_is_durable_once_it_was_shown() {
    let disk = SimDisk::new(12, 1 << 20);
    let (log, _, _) = open(&disk).await;
    fill(&log, 0..5, 700).await;
    disk.fail_syncs(1);
    log.append(7, 5, vec![payload(5, 700)]).await.unwrap_err();
    drop(log);
    // Only the process ends: its successor finds the record in the page cache, and builds on it.
    disk.crash(CrashKeep::Everything);
    let (log, recovery, seen) = open(&disk).await;
    assert!(recovery.damage.is_empty());
    let shown = tags(&seen);
    fill(&log, 6..8, 700).await;
    drop(log);
    disk.crash(CrashKeep::Nothing);
    let (_, recovery, seen) = open(&disk).await;
    assert!(recovery.damage.is_empty(), "{:?}", recovery.damage);
    assert_eq!(tags(&seen), [shown, vec![6, 7]].concat());
}

#[tokio::test]
async fn a_scan_can_start_late_and_skip_payloads() {
    let disk = SimDisk::new(7, 1 << 20);
    let (log, ..) = open(&disk).await;
    let positions = fill(&log, 0..50, 700).await;
    log.close().await.unwrap();
    let headers = LogConfig { headers_only: true, start_at: positions[30], ..config() };
    let before = disk.counters().bytes_read;
    let (log, recovery, seen) = open_with(&disk, headers).await.unwrap();
    assert!(disk.counters().bytes_read > before && recovery.damage.is_empty());
    assert_eq!(tags(&seen), (30..50).collect::<Vec<_>>());
    assert!(seen.iter().all(|record| record.payload.is_none() && record.len == 700));
    assert_eq!(log.read_record(positions[3]).await.unwrap().payload, payload(3, 700));
    assert_eq!(log.records_from(positions[0], usize::MAX).await.unwrap().0.len(), 50);
}

#[tokio::test]
async fn punched_records_are_dead_and_no_damage() {
    let disk = SimDisk::new(8, 4 << 20);
    let config =
        LogConfig { segment_bytes: 1 << 20, payload_bytes_max: 128 << 10, allow_gaps: true, ..config() };
    let (log, ..) = open_with(&disk, config.clone()).await.unwrap();
    let positions = fill(&log, 0..20, 100_000).await;
    let used = disk.used_bytes();
    log.punch(&[positions[3], positions[4], positions[15]]).await.unwrap();
    log.punch(&[positions[4]]).await.unwrap();
    assert!(disk.used_bytes() < used - 280_000);
    assert_eq!(log.read_record(positions[3]).await.unwrap_err().kind(), io::ErrorKind::NotFound);
    assert_eq!(log.read_record(positions[5]).await.unwrap().payload, payload(5, 100_000));
    assert_eq!(log.records_from(positions[0], usize::MAX).await.unwrap().0.len(), 17);
    assert_eq!(log.punch(&[log.end()]).await.unwrap_err().kind(), io::ErrorKind::NotFound);
    log.close().await.unwrap();
    disk.crash(CrashKeep::Nothing);
    let (log, recovery, seen) = open_with(&disk, config.clone()).await.unwrap();
    assert!(recovery.damage.is_empty(), "{:?}", recovery.damage);
    let dead: Vec<u64> = seen.iter().filter(|record| record.dead).map(|record| record.tag).collect();
    assert_eq!((seen.len(), dead), (20, vec![3, 4, 15]));
    log.remove_segment(positions[10].segment).await.unwrap();
    assert_eq!(log.read_record(positions[10]).await.unwrap_err().kind(), io::ErrorKind::NotFound);
    log.close().await.unwrap();
    assert!(open_with(&disk, config).await.unwrap().1.damage.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_quiet_log_proves_its_last_records() {
    let disk = SimDisk::new(9, 1 << 20);
    let (log, ..) = open(&disk).await;
    fill(&log, 0..3, 100).await;
    let synced = log.synced();
    assert_eq!(log.end(), synced);
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(log.end().offset - synced.offset, RECORD_HEADER_BYTES, "once, not once a second");
    assert_eq!(log.synced(), synced);
}

#[tokio::test]
async fn a_foreign_or_newer_log_is_refused() {
    let disk = SimDisk::new(10, 1 << 20);
    open(&disk).await.0.close().await.unwrap();
    let error = open_with(&disk, LogConfig { log_id: 5, ..config() }).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    assert!(error.to_string().contains("00000001.seg"), "{error}");
    let path = dir().join("00000001.seg");
    let file = disk.open(&path, crate::Open::ReadWrite).await.unwrap();
    let mut header = file.read_at(0, 4096).await.unwrap().to_vec();
    for at in [0, 2048] {
        header[at + 8] = 2;
        let crc = crc_fast::crc64_nvme(&header[at..at + 56]);
        header[at + 56..at + 64].copy_from_slice(&crc.to_le_bytes());
    }
    file.write_at(0, vec![header.into()]).await.unwrap();
    let accept = LogConfig { accept_damage: true, ..config() };
    let error = open_with(&disk, accept).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::Unsupported);
}
