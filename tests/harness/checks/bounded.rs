//! BOUNDED: who sends more than can be taken is slowed down.

use super::{Verdict, failed, start, steady};
use crate::raw::Writer;
use bytes::Bytes;
use cairn_proto::{
    checksum::{block_checksums, crc64},
    id::ChunkId,
    net::{Traffic, channel},
    v1::{self, file_service_client::FileServiceClient},
};
use cluster::Builder;
use futures::StreamExt as _;
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

/// What the sender has in all, in chunks that fit one message.
const CHUNKS: u32 = 1_024;
const CHUNK_BYTES: usize = 64 * 1024;
/// What may be taken from a sender before any of it is durable: the chunks of its stream that wait to be, what its
/// connection's window and buffers hold, and one message on its way at each end.
const TAKEN_MAX: u64 = 64 * CHUNK_BYTES as u64 + (16 << 20) + (4 << 20);
/// A sync takes this long while disks stall. The first one ends long after the sender must have been held back.
const STALL: Duration = Duration::from_secs(10);
/// Nothing more being taken for so long means that the sender is held back.
const STILL: Duration = Duration::from_millis(1_500);
const SESSION: Duration = Duration::from_secs(120);
const LIMIT: Duration = Duration::from_secs(60);

/// All disks stall, and a writer goes on sending: it is held back before more than the stated bound is taken from it.
/// When the disks go on, so does the writer, and everything arrives.
///
/// # Errors
/// How much was taken; what did not arrive.
///
/// # Panics
/// When there is no cluster to begin with.
pub async fn stalled_disks(builder: Builder) -> Verdict {
    let waits = |_, config: &mut file_service::Config| config.timing.write_wait_ms = 60_000;
    let builder = builder.file_servers(3).memory(true).directory_config(steady).file_config(waits);
    let cluster = start(builder).await;
    let writer = Writer::open(&cluster, SESSION).await;
    let grant = writer.grant(CHUNKS + 1).await;
    // All members know the group now, and have a connection to each other.
    writer.write(&grant, CHUNKS, vec![4; CHUNK_BYTES]).await;
    let group = grant.group.clone().expect("a grant has a group");
    let primary = grant.members.iter().find(|member| member.id == group.primary_id).expect("a primary");
    let channel = channel(&cluster.network(), &primary.endpoints[0].uri, Traffic::Bulk).expect("an address");
    let disks: Vec<_> =
        (0..cluster.file_servers()).filter_map(|server| cluster.memory_disk(server)).collect();
    disks.iter().for_each(|disk| disk.set_sync_latency(STALL));

    let taken = Arc::new(AtomicU64::new(0));
    let data = Bytes::from(vec![5; CHUNK_BYTES]);
    let counted = taken.clone();
    let messages = futures::stream::iter(0..CHUNKS).map(move |index| {
        counted.fetch_add(CHUNK_BYTES as u64, Ordering::Relaxed);
        let chunk = ChunkId::new(grant.id, index);
        v1::WriteRequest {
            chunk: Some(chunk.into()),
            group_id: group.id,
            epoch: group.epoch,
            offset: 0,
            block_checksums: block_checksums(chunk, 0, &data),
            finish: Some(v1::WriteFinish { length: data.len() as u64, checksum: Some(crc64(&data)) }),
            data: data.clone(),
        }
    });
    let writing = tokio::spawn(async move {
        let mut answers = FileServiceClient::new(channel).write(messages).await?.into_inner();
        let mut receipts = 0;
        while answers.message().await?.is_some() {
            receipts += 1;
        }
        Ok::<u32, tonic::Status>(receipts)
    });
    let mut seen = (0, tokio::time::Instant::now());
    loop {
        let now = taken.load(Ordering::Relaxed);
        if now > TAKEN_MAX {
            return Err(format!("{now} bytes were taken while no disk did anything, {TAKEN_MAX} may be"));
        }
        if now != seen.0 {
            seen = (now, tokio::time::Instant::now());
        } else if now > 0 && seen.1.elapsed() >= STILL {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    println!("{} KiB were taken from a sender while no disk did anything", seen.0 >> 10);
    disks.iter().for_each(|disk| disk.set_sync_latency(Duration::ZERO));
    let receipts = tokio::time::timeout(LIMIT, writing)
        .await
        .map_err(|_| "the sender was not let go on".to_owned())?
        .expect("the writer")
        .map_err(failed("a write that had to wait"))?;
    if receipts != CHUNKS {
        return Err(format!("{receipts} of {CHUNKS} chunks were acknowledged"));
    }
    cluster.shutdown().await.expect("a clean end");
    Ok(())
}
