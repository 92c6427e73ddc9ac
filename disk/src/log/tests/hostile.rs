//! Hostile bytes in segment files.

use super::super::format;
use super::*;
use crate::Open;
use fuzz::Decoder;

const SEGMENT_BYTES: u32 = 12 << 10;

fn accepting() -> LogConfig {
    LogConfig { accept_damage: true, segment_bytes: SEGMENT_BYTES, payload_bytes_max: 4_000, ..config() }
}

fn path() -> std::path::PathBuf {
    dir().join("00000001.seg")
}

/// A segment with records of some sizes, one of them dead.
async fn sample() -> Vec<u8> {
    let disk = SimDisk::new(3, 1 << 20);
    let (log, _) = Log::open(Arc::new(disk.clone()), dir(), accepting(), &mut |_| Ok(())).await.unwrap();
    let mut positions = Vec::new();
    for (tag, len) in [0usize, 1, 8, 100, 900].into_iter().enumerate() {
        positions.push(log.append(1, tag as u64, vec![payload(tag as u64, len)]).await.unwrap());
    }
    log.punch(&positions[2..3]).await.unwrap();
    log.close().await.unwrap();
    let file = disk.open(&path(), Open::Read).await.unwrap();
    file.read_at(0, SEGMENT_BYTES as usize).await.unwrap().to_vec()
}

/// Makes the checksums of both copies of the segment's header right.
fn repair_header(bytes: &mut [u8]) {
    for at in [0, 2048] {
        if let Some(copy) = bytes.get_mut(at..at + 64) {
            let crc = cairn_crc(&[&copy[..56]]);
            copy[56..].copy_from_slice(&crc.to_le_bytes());
        }
    }
}

/// Makes the checksums of everything that begins like a record right, and its place.
fn repair_records(bytes: &mut [u8]) {
    let config = accepting();
    let mut id = format::SegmentId { log_id: config.log_id, number: 1, life: 1 };
    if let format::SegmentHeader::Known { id: found, .. } = format::decode_segment_header(bytes) {
        id = found;
    }
    let mut at = format::SEGMENT_HEADER_BYTES as usize;
    while at + 72 <= bytes.len() {
        if format::looks_like_record(&bytes[at..]) {
            let len = u32::from_le_bytes(bytes[at + 4..at + 8].try_into().unwrap()) as usize;
            if let Some(payload) = bytes.get(at + 72..(at + 72).saturating_add(len.next_multiple_of(8))) {
                let crc = format::payload_crc(id, at as u32, [payload]);
                bytes[at + 48..at + 56].copy_from_slice(&crc.to_le_bytes());
            }
            bytes[at + 12..at + 16].copy_from_slice(&id.number.to_le_bytes());
            bytes[at + 16..at + 24].copy_from_slice(&id.life.to_le_bytes());
            bytes[at + 24..at + 28].copy_from_slice(&(at as u32).to_le_bytes());
            let crc = cairn_crc(&[&id.log_id.to_le_bytes(), &bytes[at..at + 56]]);
            bytes[at + 56..at + 64].copy_from_slice(&crc.to_le_bytes());
        }
        at += 8;
    }
}

fn cairn_crc(parts: &[&[u8]]) -> u64 {
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc64Nvme);
    parts.iter().for_each(|part| digest.update(part));
    digest.finalize()
}

async fn open_hostile(bytes: &[u8]) {
    let disk = SimDisk::new(4, 1 << 20);
    disk.create_dir_all(dir()).await.unwrap();
    let file = disk.open(&path(), Open::Create).await.unwrap();
    file.write_at(0, vec![Bytes::copy_from_slice(bytes)]).await.unwrap();
    let mut seen: Vec<Scanned> = Vec::new();
    let mut visitor = |record| {
        seen.push(record);
        Ok(())
    };
    let Ok((log, recovery)) = Log::open(Arc::new(disk), dir(), accepting(), &mut visitor).await else {
        return;
    };
    let held: usize = seen.iter().filter_map(|record| record.payload.as_ref()).map(Bytes::len).sum();
    assert!(held <= bytes.len(), "more payload than there are bytes");
    assert_eq!(recovery.records as usize, seen.len());
    for record in &seen {
        assert_eq!(record.dead, record.payload.is_none());
        if let Ok(stored) = log.read_record(record.position).await {
            assert_eq!(Some(&stored.payload), record.payload.as_ref());
        }
    }
    let _ = log.records_from(Position { segment: 1, offset: 0 }, usize::MAX).await;
    let living: Vec<Position> = seen.iter().map(|record| record.position).collect();
    let _ = log.punch(&living).await;
    // Whatever was found, the log takes new records.
    log.append(1, u64::MAX, vec![payload(9, 10)]).await.unwrap();
    log.close().await.unwrap();
}

#[test]
fn hostile_segments_are_refused_or_read() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    // The simulated disk is part of what is counted, and two fresh segments.
    Decoder::new("log-segment")
        .one_in(20)
        .memory(10, 512 * 1024)
        .bytes_max(16 << 10)
        .sample(runtime.block_on(sample()))
        .repair(|bytes| repair_records(bytes))
        .repair(|bytes| {
            repair_header(bytes);
            repair_records(bytes);
        })
        .run(|bytes| runtime.block_on(open_hostile(bytes)));
}

#[test]
fn hostile_headers_are_refused_or_read() {
    let id = format::SegmentId { log_id: accepting().log_id, number: 1, life: 1 };
    let mut record = bytes::BytesMut::new();
    let header = format::RecordHeader {
        len: 100,
        kind: 1,
        flags: 0,
        offset: 4096,
        synced: Position { segment: 1, offset: 4096 },
        tag: 7,
        payload_crc: 8,
        state: format::State::Alive,
    };
    header.encode(id, &mut record);
    Decoder::new("log-headers")
        .sample(record.to_vec())
        .sample(format::encode_segment_header(id, SEGMENT_BYTES).to_vec())
        .bytes_max(5_000)
        .repair(|bytes| repair_header(bytes))
        .repair(|bytes| {
            if let Some(header) = bytes.get_mut(..64) {
                let crc = cairn_crc(&[&accepting().log_id.to_le_bytes(), &header[..56]]);
                header[56..].copy_from_slice(&crc.to_le_bytes());
            }
        })
        .run(move |bytes| {
            let _ = format::decode_segment_header(bytes);
            let _ = format::dead_word_of(bytes);
            for limit in [4096, SEGMENT_BYTES, u32::MAX] {
                if let Some(header) = format::RecordHeader::decode(bytes, id, 4096, limit) {
                    assert!(header.next() <= limit && header.next() > header.offset);
                }
            }
        });
}
