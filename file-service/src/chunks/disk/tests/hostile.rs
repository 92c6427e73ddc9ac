//! Hostile bytes in every file of a chunk store.

use super::super::format::{self, ChunkHeader};
use super::super::snapshot;
use super::*;
use ::disk::log::{Log, LogConfig, Record};
use bytes::BytesMut;
use cairn_proto::checksum::{block_checksums, crc64};
use fuzz::Decoder;

/// What a store takes that is open: segments of its log, tables of its files, and the simulated disk, all counted.
const STORE_BYTES: usize = 4 << 20;

fn chunk() -> ChunkId {
    ChunkId::new(0xa0, 7)
}

/// A chunk of these bytes as it stands in a record, and as it stands in a file.
fn encoded(data: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let blocks = block_checksums(chunk(), 0, data);
    let header = ChunkHeader {
        chunk: chunk(),
        group: GroupId(3),
        length: data.len() as u32,
        checksum: crc64(data),
        computed_here: false,
        table_checksum: format::table_checksum(&blocks),
    };
    let (mut head, mut table) = (BytesMut::new(), BytesMut::new());
    header.encode(&mut head);
    format::encode_table(&blocks, &mut table);
    ([&head, &table, data].concat(), [data, &table, &head].concat())
}

fn sum_header(header: &mut [u8]) {
    let sum = crc64(&header[..56]);
    header[56..64].copy_from_slice(&sum.to_le_bytes());
}

/// Makes the header and the table's checksum of a record right.
fn repair_record(bytes: &mut [u8]) {
    if bytes.len() < format::HEADER_BYTES {
        return;
    }
    let length = format::u32_at(bytes, 20);
    let table = (bytes.len() - format::HEADER_BYTES).min(length as usize / 512 + 8);
    let sum =
        crc64(&bytes[format::HEADER_BYTES..format::HEADER_BYTES + table.min(format::table_bytes(length))]);
    bytes[40..48].copy_from_slice(&sum.to_le_bytes());
    sum_header(bytes);
}

/// Makes the header at the end of a file right.
fn repair_file(bytes: &mut [u8]) {
    if let Some(at) = bytes.len().checked_sub(format::HEADER_BYTES) {
        sum_header(&mut bytes[at..]);
    }
}

fn repair_snapshot(bytes: &mut [u8]) {
    let Some(body) = bytes.len().checked_sub(8).filter(|body| *body >= 40) else { return };
    let count = (body - 40) / snapshot::ENTRY_BYTES;
    bytes[..8].copy_from_slice(b"CAIRNIDX");
    bytes[32..40].copy_from_slice(&(count as u64).to_le_bytes());
    let sum = crc64(&bytes[..body]);
    bytes[body..].copy_from_slice(&sum.to_le_bytes());
}

fn snapshot_sample(count: u32) -> Vec<u8> {
    let settled = ::disk::log::Position { segment: 1, offset: 4096 };
    let mut writer = snapshot::Writer::new(settled, 9, u64::from(count));
    for index in 0..count {
        writer.push(&super::super::index::Held {
            chunk: ChunkId::new(0xa0, index),
            group: GroupId(2),
            length: 100 + index,
            checksum: 3,
            corrupt: index == 0,
            computed_here: index == 1,
            verified: 0,
            place: if index == 2 { Place::File(0) } else { Place::Record(settled) },
        });
    }
    writer.finish().to_vec()
}

async fn write_file(disk: &SimDisk, path: &Path, bytes: &[u8]) {
    disk.create_dir_all(path.parent().unwrap()).await.unwrap();
    let file = disk.open(path, Open::Create).await.unwrap();
    file.write_at(0, vec![Bytes::copy_from_slice(bytes)]).await.unwrap();
}

/// Opens whatever is there and does everything to it that a server does.
async fn use_store(disk: &SimDisk) {
    let Ok((store, report)) = DiskChunkStore::open(Arc::new(disk.clone()), DIR, config()).await else {
        return;
    };
    let held = store.list(None, ALL, 10_000);
    assert_eq!(report.chunks as usize, held.len());
    let _ = store.digests(ALL, 100);
    for info in held {
        let good = store.verify(info.chunk).await;
        if let Ok(part) = store.read(info.chunk, 0, 1 << 20).await {
            assert!(
                cairn_proto::checksum::verify_blocks(
                    info.chunk,
                    (part.offset / 4096) as u32,
                    &part.data,
                    &part.blocks
                )
                .is_none()
            );
        } else {
            assert_ne!(good.ok(), Some(true), "verified and not readable");
        }
    }
    let data = pattern(1, 100);
    put(&store, ChunkId::new(1 << 40, 1), &data).await.unwrap();
    assert_eq!(read_all(&store, ChunkId::new(1 << 40, 1)).await.unwrap(), data);
    let _ = store.maintain().await;
    let _ = store.remove(&[chunk()]).await;
    store.close().await.unwrap();
}

fn run<T>(test: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap()
        .block_on(test)
}

#[test]
fn hostile_chunk_headers_and_removals_are_refused_or_read() {
    let (record, _) = encoded(b"some bytes of a chunk");
    Decoder::new("chunk-record")
        .sample(record)
        .sample(encoded(&pattern(2, 5_000)).0)
        .sample(format::encode_removed(&[chunk(), ChunkId::new(1, 2)]).to_vec())
        .repair(|bytes| repair_record(bytes))
        .repair(|bytes| {
            if bytes.len() >= 64 {
                sum_header(bytes);
            }
        })
        .run(|bytes| {
            let _ = ChunkHeader::decode(bytes);
            assert_eq!(format::decode_removed(bytes).count(), bytes.len() / 12);
            if let Some(header) = super::super::read::check_payload(bytes) {
                assert_eq!(format::payload_bytes(header.length), bytes.len());
            }
        });
}

#[test]
fn hostile_snapshots_are_refused_or_read() {
    Decoder::new("chunk-index")
        .sample(snapshot_sample(0))
        .sample(snapshot_sample(5))
        .repair(|bytes| repair_snapshot(bytes))
        .run(|bytes| {
            if let snapshot::Decoded::Snapshot(snapshot) = snapshot::decode(bytes) {
                assert!(snapshot.chunks.len() * snapshot::ENTRY_BYTES < bytes.len());
            }
        });
}

#[test]
fn hostile_large_chunk_files_are_listed_as_bad_and_never_served() {
    let (_, file) = encoded(&pattern(3, 9_000));
    let name = format!("{:016x}-{:08x}.chunk", chunk().grant.0, chunk().index);
    let path = Path::new(DIR).join("files/a0").join(name);
    Decoder::new("chunk-file")
        .one_in(100)
        .memory(10, STORE_BYTES)
        .bytes_max(12_000)
        .sample(file)
        .sample(encoded(b"small").1)
        .repair(|bytes| repair_file(bytes))
        .run(|bytes| {
            run(async {
                let disk = SimDisk::new(1, 64 << 20);
                write_file(&disk, &path, bytes).await;
                use_store(&disk).await;
            });
        });
}

/// Intact records of the log whose payload is hostile: the first byte says of which kind.
#[test]
fn hostile_records_of_a_chunk_store_are_refused_or_read() {
    let kind = |kind: u8, payload: Vec<u8>| [vec![kind], payload].concat();
    let (record, _) = encoded(&pattern(4, 500));
    Decoder::new("chunk-log")
        .one_in(100)
        .memory(10, STORE_BYTES)
        .bytes_max(6_000)
        .sample(kind(1, record))
        .sample(kind(2, format::encode_removed(&[chunk()]).to_vec()))
        .sample(kind(3, vec![1, 2, 3]))
        .repair(|bytes| {
            let mut payload = bytes.split_off(1.min(bytes.len()));
            repair_record(&mut payload);
            bytes.append(&mut payload);
        })
        .run(|bytes| {
            let Some((kind, payload)) = bytes.split_first() else { return };
            run(async {
                let disk = SimDisk::new(1, 64 << 20);
                let mut log_config = LogConfig::new(config().store_id);
                log_config.segment_bytes = config().segment_bytes;
                log_config.payload_bytes_max = 64 << 10;
                let dir = Path::new(DIR).join("segments");
                let (log, _) =
                    Log::open(Arc::new(disk.clone()), &dir, log_config, &mut |_| Ok(())).await.unwrap();
                let record =
                    Record { kind: *kind, tag: u64::MAX, payload: vec![Bytes::copy_from_slice(payload)] };
                log.append_batch(vec![record]).await.unwrap();
                log.close().await.unwrap();
                drop(log);
                use_store(&disk).await;
            });
        });
}

/// A snapshot that passed its checksum and says what is not so.
#[test]
fn hostile_snapshots_never_make_a_store_serve_what_is_not_there() {
    let good = run(async {
        let disk = SimDisk::new(1, 64 << 20);
        let (store, _) = open(&disk).await;
        for index in 0..6 {
            put(&store, ChunkId::new(2, index), &pattern(u64::from(index), 300)).await.unwrap();
        }
        store.close().await.unwrap();
        drop(store);
        settle().await;
        disk
    });
    let index = run(async {
        let file = good.open(&Path::new(DIR).join("index"), Open::Read).await.unwrap();
        file.read_at(0, 1 << 20).await.unwrap().to_vec()
    });
    Decoder::new("chunk-store-index")
        .one_in(100)
        .memory(10, STORE_BYTES)
        .sample(index)
        .repair(|bytes| repair_snapshot(bytes))
        .run(|bytes| {
            let disk = good.clone_disk();
            run(async {
                let path = Path::new(DIR).join("index");
                disk.remove_file(&path).await.unwrap();
                write_file(&disk, &path, bytes).await;
                use_store(&disk).await;
            });
        });
}
