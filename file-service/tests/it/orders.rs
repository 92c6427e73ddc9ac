//! HEALED, and what the directory orders: confirmations, fetches, collections, topologies, journal copies.

use crate::harness::*;
use cairn_proto::{Reason, id::ChunkId, v1};
use std::time::Duration;

const MIB: usize = 1024 * 1024;

async fn confirm(cluster: &Cluster, number: u64, chunks: Vec<v1::ChunkRef>) -> Vec<ChunkId> {
    let topology = cluster.directory.topology();
    let request = v1::ConfirmRequest {
        cluster_id: CLUSTER.into(),
        generation: 1,
        chunks,
        groups: topology.groups,
        servers: topology.servers,
    };
    let answer = cluster.replicas(number).confirm(request).await.unwrap().into_inner();
    answer.missing.iter().map(ChunkId::from).collect()
}

/// Chunks that server 3 misses.
async fn miss(cluster: &mut Cluster, count: u32) -> Vec<v1::ChunkRef> {
    cluster.kill(3).await;
    let mut chunks = Vec::new();
    for index in 0..count {
        let length = if index == 0 { 3 * MIB + 5 } else { 100 + index as usize };
        let receipt = cluster.write(chunk(index), &bytes(length)).await.unwrap();
        assert_eq!(receipt.holder_ids, [1, 2]);
        chunks.push(v1::ChunkRef {
            chunk: receipt.chunk,
            length: receipt.length,
            checksum: receipt.checksum,
            group_id: receipt.group_id,
        });
    }
    cluster.restart(3).await;
    chunks
}

#[tokio::test(start_paused = true)]
async fn a_member_that_missed_chunks_fetches_what_was_committed() {
    let mut cluster = Cluster::start().await;
    let chunks = miss(&mut cluster, 40).await;
    assert!(confirm(&cluster, 2, chunks.clone()).await.is_empty(), "it holds them");
    assert_eq!(confirm(&cluster, 3, chunks.clone()).await.len(), 40);
    let all = || (0..40).all(|index| cluster.holders(chunk(index)) == [1, 2, 3]);
    eventually("all are fetched", all).await;
    assert!(cluster.node(3).fetcher.is_empty());
    assert!(confirm(&cluster, 3, chunks).await.is_empty());
    assert_eq!(read(&mut cluster.files(3), chunk(0), 0, 0).await.unwrap().1, bytes(3 * MIB + 5));
}

#[tokio::test(start_paused = true)]
async fn another_member_is_asked_when_the_primary_does_not_answer() {
    for is_silent in [false, true] {
        let mut cluster = Cluster::start().await;
        let chunks = miss(&mut cluster, 5).await;
        match is_silent {
            true => cluster.cut(1),
            false => cluster.kill(1).await,
        }
        assert_eq!(confirm(&cluster, 3, chunks).await.len(), 5);
        let holds = |index| cluster.node(3).store.info(chunk(index)).is_some();
        eventually("all are fetched", || (0..5).all(holds)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_copy_of_other_bytes_than_committed_is_replaced() {
    for is_corrupt in [false, true] {
        let mut cluster = Cluster::start().await;
        let chunks = miss(&mut cluster, 1).await;
        // As if a writer that lost its lock had sent something else under the id.
        let node = cluster.node(3);
        let sums = cairn_proto::checksum::block_checksums(chunk(0), 0, b"other");
        let checksum = cairn_proto::checksum::crc64(b"other");
        node.store.put(chunk(0), GROUP.into(), "other".into(), sums, checksum, false).await.unwrap();
        if is_corrupt {
            node.store.mark_corrupt(chunk(0));
        }
        assert_eq!(confirm(&cluster, 3, chunks.clone()).await, [chunk(0)]);
        let is_right = || node.store.info(chunk(0)).is_some_and(|info| info.checksum == chunks[0].checksum);
        eventually("it is replaced", is_right).await;
        assert!(!node.store.info(chunk(0)).unwrap().corrupt);
    }
}

async fn fetch(
    cluster: &Cluster,
    number: u64,
    source: u64,
    chunks: Vec<v1::ChunkRef>,
) -> Result<Vec<v1::FetchFromPrimaryResponse>, cairn_proto::Error> {
    let request = v1::FetchFromPrimaryRequest {
        cluster_id: CLUSTER.into(),
        group: Some(group(1, 1)),
        // The address is a lie: only the topology's counts.
        source: Some(v1::Server { id: source, ..Default::default() }),
        chunks,
    };
    let mut answers = cluster.files(number).fetch_from_primary(request).await?.into_inner();
    let mut all = Vec::new();
    while let Some(answer) = answers.message().await? {
        all.push(answer);
    }
    Ok(all)
}

#[tokio::test(start_paused = true)]
async fn fetch_from_primary_answers_for_each_chunk() {
    let mut cluster = Cluster::start().await;
    let mut chunks = miss(&mut cluster, 20).await;
    chunks[7].checksum ^= 1;
    chunks.push(v1::ChunkRef { chunk: Some(chunk(999).into()), length: 5, checksum: 1, group_id: GROUP });
    let answers = fetch(&cluster, 3, 2, chunks.clone()).await.unwrap();
    assert_eq!(answers.len(), 21);
    for answer in answers {
        let id = ChunkId::from(answer.chunk.as_ref().unwrap());
        let is_good = id != chunk(7) && id != chunk(999);
        assert_eq!(answer.stored, is_good, "{id}: {}", answer.error);
        assert_eq!(answer.error.is_empty(), is_good, "{id}");
        assert_eq!(cluster.node(3).store.info(id).is_some(), is_good, "{id}");
    }
    let again = fetch(&cluster, 3, 2, chunks[..3].to_vec()).await.unwrap();
    assert!(again.iter().all(|answer| answer.stored), "safe to repeat");
}

#[tokio::test(start_paused = true)]
async fn only_servers_of_the_topology_are_fetched_from() {
    let mut cluster = Cluster::start().await;
    let chunks = miss(&mut cluster, 1).await;
    let error = fetch(&cluster, 3, 99, chunks.clone()).await.unwrap_err();
    assert_eq!(error.reason, Reason::Unavailable);
    assert!(error.message().contains("server 99"), "{error}");
    let too_many = vec![chunks[0]; 4_097];
    assert_eq!(fetch(&cluster, 3, 1, too_many).await.unwrap_err().reason, Reason::LimitExceeded);
}

fn collect(chunks: &[ChunkId], epoch: u64, generation: u64) -> v1::CollectRequest {
    v1::CollectRequest {
        cluster_id: CLUSTER.into(),
        generation,
        chunks: chunks.iter().copied().map(Into::into).collect(),
        // A group that server 2 has left.
        groups: vec![without(2, epoch)],
    }
}

fn without(member: u64, epoch: u64) -> v1::Group {
    let mut group = group(epoch, 1);
    group.seats.retain(|seat| seat.server_id != member);
    group
}

#[tokio::test(start_paused = true)]
async fn a_collection_is_durable_and_needs_the_newest_epoch_and_generation() {
    let mut cluster = Cluster::start().await;
    cluster.write_to_all(chunk(1), &bytes(1000)).await;
    cluster.write_to_all(chunk(2), &bytes(1000)).await;
    cluster.directory.change(|state| {
        state.groups = vec![without(2, 4)];
        state.generation = 3;
    });
    cluster.know_everything().await;
    let mut client = cluster.replicas(2);
    let member = v1::CollectRequest { groups: vec![group(4, 1)], ..collect(&[chunk(1)], 4, 3) };
    let foreign = v1::CollectRequest { cluster_id: "other".into(), ..collect(&[chunk(1)], 4, 3) };
    for (request, reason) in [
        (foreign, Reason::WrongCluster),
        (collect(&[chunk(1)], 3, 3), Reason::StaleEpoch),
        (collect(&[chunk(1)], 4, 2), Reason::StaleEpoch),
        (member, Reason::StaleEpoch),
    ] {
        let status = client.collect(request).await.unwrap_err();
        assert_eq!(cairn_proto::Error::from(status).reason, reason);
    }
    assert_eq!(cluster.holders(chunk(1)), [1, 2, 3]);
    let answer = client.collect(collect(&[chunk(1), chunk(77)], 4, 3)).await.unwrap().into_inner();
    assert_eq!((answer.removed, answer.freed_bytes), (2, 1000));
    cluster.kill(2).await;
    cluster.server(2).disk.crash(disk::CrashKeep::Nothing);
    cluster.restart(2).await;
    assert_eq!(cluster.holders(chunk(1)), [1, 3]);
    assert_eq!(cluster.holders(chunk(2)), [1, 2, 3]);
}

#[tokio::test(start_paused = true)]
async fn an_adopted_topology_is_durable_and_never_goes_back() {
    let mut cluster = Cluster::start().await;
    let mut topology = cluster.directory.topology();
    topology.revision += 10;
    topology.groups = vec![group(8, 3)];
    let adopt = async |topology: &v1::TopologyResponse| {
        let request = v1::AdoptRequest { topology: Some(topology.clone()) };
        cluster.replicas(2).adopt(request).await.map_err(cairn_proto::Error::from)
    };
    assert_eq!(adopt(&topology).await.unwrap().into_inner().revision, topology.revision);
    assert_eq!(adopt(&topology).await.unwrap().into_inner().revision, topology.revision, "safe to repeat");
    let mut older = topology.clone();
    older.revision -= 1;
    assert_eq!(adopt(&older).await.unwrap_err().reason, Reason::StaleEpoch);
    let foreign = v1::TopologyResponse { cluster_id: "other".into(), ..topology.clone() };
    assert_eq!(adopt(&foreign).await.unwrap_err().reason, Reason::WrongCluster);
    cluster.kill(2).await;
    cluster.server(2).disk.crash(disk::CrashKeep::Nothing);
    cluster.net.cut("directory");
    cluster.restart_unregistered(2).await;
    let map = cluster.node(2).topology.map();
    assert_eq!((map.revision.0, map.groups[&GROUP.into()].epoch), (topology.revision, 8));
    // It serves what it knows while the directory is away.
    let missing = read(&mut cluster.files(2), chunk(1), 0, 0).await.unwrap_err();
    assert_eq!(missing.reason, Reason::ChunkNotFound);
}

#[tokio::test(start_paused = true)]
async fn the_journal_is_carried_over_the_wire() {
    let mut cluster = Cluster::start().await;
    let record = |revision: u64| v1::JournalRecord { revision, plan: format!("plan {revision}").into() };
    let append =
        |previous: u64, generation, revisions: std::ops::RangeInclusive<u64>| v1::AppendJournalRequest {
            cluster_id: CLUSTER.into(),
            generation,
            previous_revision: previous,
            records: revisions.map(record).collect(),
            carrier_ids: vec![1, 2, 3],
        };
    let reason = |status: tonic::Status| cairn_proto::Error::from(status).reason;
    let mut client = cluster.replicas(3);
    let gap = client.append_journal(append(5, 1, 6..=7)).await.unwrap_err();
    assert_eq!(reason(gap), Reason::RevisionCompacted);
    let parts: Vec<_> = (0..3)
        .map(|number| v1::InstallCheckpointRequest {
            cluster_id: if number == 0 { CLUSTER.into() } else { String::new() },
            generation: u64::from(number == 0),
            revision: if number == 0 { 5 } else { 0 },
            entries: (0..10)
                .map(|entry| v1::CheckpointEntry {
                    key: format!("{number}-{entry}").into(),
                    value: vec![number; 1000].into(),
                    revision: 4,
                })
                .collect(),
            entry_count: (number == 2).then_some(30),
            carrier_ids: vec![3],
        })
        .collect();
    let installed = client.install_checkpoint(futures::stream::iter(parts)).await.unwrap();
    assert_eq!(installed.into_inner().durable_revision, 5);
    let appended = client.append_journal(append(5, 1, 6..=7)).await.unwrap();
    assert_eq!(appended.into_inner().durable_revision, 7);

    cluster.kill(3).await;
    cluster.server(3).disk.crash(disk::CrashKeep::Nothing);
    cluster.directory.change(|state| state.generation = 2);
    cluster.restart(3).await;
    let registered = cluster.directory.0.lock().registers.last().unwrap().clone();
    let copy = &registered.journals[0];
    assert_eq!((copy.generation, copy.checkpoint_revision, copy.durable_revision), (1, 5, 7));
    assert_eq!(copy.carrier_ids, [1, 2, 3]);

    let mut client = cluster.replicas(3);
    let request = v1::ReadJournalRequest { cluster_id: CLUSTER.into(), generation: 1 };
    let mut parts = client.read_journal(request).await.unwrap().into_inner();
    let (mut entries, mut revisions, mut checkpoint) = (0, Vec::new(), 0);
    while let Some(part) = parts.message().await.unwrap() {
        checkpoint = checkpoint.max(part.checkpoint_revision);
        entries += part.entries.len();
        revisions.extend(part.records.into_iter().map(|record| record.revision));
    }
    assert_eq!((checkpoint, entries, revisions), (5, 30, vec![6, 7]));
    let older = client.append_journal(append(7, 1, 8..=8)).await.unwrap_err();
    assert_eq!(reason(older), Reason::StaleEpoch, "the server knows generation 2");
    let missing = client
        .read_journal(v1::ReadJournalRequest { cluster_id: CLUSTER.into(), generation: 9 })
        .await
        .unwrap_err();
    assert_eq!(reason(missing), Reason::NotFound);
}

#[tokio::test(start_paused = true)]
async fn chunks_that_nobody_has_are_given_up_in_the_end() {
    let cluster = Cluster::start().await;
    let nowhere = v1::ChunkRef { chunk: Some(chunk(5).into()), length: 9, checksum: 1, group_id: GROUP };
    assert_eq!(confirm(&cluster, 2, vec![nowhere]).await, [chunk(5)]);
    let node = cluster.node(2);
    eventually("it is given up", || node.fetcher.is_empty()).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(node.store.info(chunk(5)).is_none());
}
