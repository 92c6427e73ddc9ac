//! DURABLE: what was acknowledged survives, where it was said to be.

use super::{Verdict, WORK_LIMIT, bytes, failed, quick, start, steady};
use crate::{
    eventually::eventually,
    raw::{Writer, Written, addresses, read_copy},
    record::{Content, Piece, Record, State},
};
use cairn_proto::{
    Error, Reason,
    net::{Traffic, channel},
    v1::{self, file_service_client::FileServiceClient},
};
use client_lib::Client;
use cluster::{Builder, Cluster};
use disk::CrashKeep;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use std::{collections::BTreeSet, time::Duration};

/// Outlives a restart of everything on a slow machine.
const SESSION: Duration = Duration::from_secs(120);

/// Power is lost everywhere, in the moment after the last acknowledgement: what no sync saved is gone. Everything that
/// was acknowledged is there afterwards, and every copy is where its receipt said.
///
/// Receipts are of chunks in no version yet, so that nobody mends a copy that was never made; and the last changes of
/// names are made without any file server, so that no copy of the journal stands in for the directory's own.
///
/// # Errors
/// What was lost.
///
/// # Panics
/// When there is no cluster to begin with.
pub async fn power_loss(builder: Builder, seed: u64) -> Verdict {
    let mut random = StdRng::seed_from_u64(seed);
    let cluster = start(builder.memory(true).file_servers(3).directory_config(steady)).await;
    for (round, keep) in [CrashKeep::Nothing, CrashKeep::Random].into_iter().enumerate() {
        let mut written = Vec::new();
        let writer = Writer::open(&cluster, SESSION).await;
        let grant = writer.grant(8).await;
        let client = cluster.client_builder().chunk_bytes(96 * 1024).build().expect("a client");
        let mut record = Record::new(&format!("/round-{round}"));
        client.mkdir(&record.folder).await.expect("a folder");
        // In the log of small chunks, and in files of their own.
        for (index, length) in [1, 5_000, 60_000, 200_000].into_iter().enumerate() {
            written.push(writer.write(&grant, index as u32, bytes(&mut random, length)).await);
            let piece = Piece { seed: random.random(), length };
            write(&client, &mut record, &format!("file {index}"), piece).await;
        }
        for server in 0..cluster.file_servers() {
            cluster.kill(server).await;
        }
        names(&client, &mut record).await;
        drop(client);
        cluster.lose_power(keep).await.expect("memory disks lose power");
        cluster.restart_all().await.map_err(failed(format!("round {round}: no start after a power loss")))?;
        copies(&cluster, &written).await.map_err(failed(format!("round {round}")))?;
        let client = patient(&cluster);
        let problems = record.verify(&client).await;
        if !problems.is_empty() {
            return Err(format!("round {round}: {}", problems.join("; ")));
        }
    }
    cluster.shutdown().await.expect("a clean end");
    Ok(())
}

/// A client that gives up early where something is gone for good.
fn patient(cluster: &Cluster) -> Client {
    cluster.client_builder().deadline(Duration::from_secs(10)).build().expect("a client")
}

async fn write(client: &Client, record: &mut Record, name: &str, piece: Piece) {
    client.write(&record.path(name), piece.bytes()).await.expect("a write");
    record.done(State::from([(name.to_owned(), Some(Content::File(vec![piece])))]));
}

/// Changes of names, for which the directory alone is enough.
async fn names(client: &Client, record: &mut Record) {
    let moved = record.at("file 0");
    client.rename(&record.path("file 0"), &record.path("moved")).await.expect("a rename");
    record.done(State::from([("file 0".to_owned(), None), ("moved".to_owned(), moved)]));
    client.delete(&record.path("file 1")).await.expect("a delete");
    record.done(State::from([("file 1".to_owned(), None)]));
    for number in 0..3 {
        let name = format!("folder {number}");
        client.mkdir(&record.path(&name)).await.expect("a folder");
        record.done(State::from([(name, Some(Content::Folder))]));
    }
}

/// Every server that a receipt names holds the chunk, whole and good, and they are enough.
async fn copies(cluster: &Cluster, written: &[Written]) -> Verdict {
    let addresses = addresses(cluster).await;
    for one in written {
        let (chunk, holders) = (one.chunk(), &one.receipt.holder_ids);
        if holders.len() < 2 {
            return Err(format!("chunk {chunk} was acknowledged with {} copies", holders.len()));
        }
        for holder in holders {
            let uri =
                addresses.get(holder).ok_or(format!("nobody knows holder {holder} of chunk {chunk}"))?;
            let said = format!("server {holder} was said to hold chunk {chunk} durably");
            let served = read_copy(cluster, uri, chunk).await.map_err(failed(&said))?;
            if served.bad_block.is_some() || served.bytes != one.bytes {
                return Err(format!("{said}, and serves other bytes"));
            }
        }
    }
    Ok(())
}

/// A writer that takes its time: what it has written and not committed stays on the disks for as long as its session
/// lives, also while what others abandoned is collected; its commit, once acknowledged, has all its bytes.
///
/// # Errors
/// What was collected.
///
/// # Panics
/// When there is no cluster to begin with.
pub async fn unfinished_write(builder: Builder, seed: u64) -> Verdict {
    let mut random = StdRng::seed_from_u64(seed);
    let cluster = start(builder.memory(true).file_servers(3).directory_config(steady)).await;
    let writer = Writer::open(&cluster, SESSION).await;
    let mut kept = Vec::new();
    let grant = writer.grant(8).await;
    for (index, length) in [3_000, 200_000].into_iter().enumerate() {
        kept.push(writer.write(&grant, index as u32, bytes(&mut random, length)).await);
    }
    // Proof that what nobody will ever commit is collected in the meantime, at every server.
    for _ in 0..2 {
        let leaver = Writer::open(&cluster, SESSION).await;
        let abandoned = leaver.write(&leaver.grant(8).await, 0, bytes(&mut random, 10_000)).await;
        leaver.close().await;
        gone_everywhere(&cluster, &abandoned).await;
    }
    copies(&cluster, &kept).await.map_err(failed("of a write under way"))?;
    let all: Vec<&Written> = kept.iter().collect();
    writer.commit("/file", &all).await.map_err(failed("the commit of a living writer"))?;
    let content: Vec<u8> = kept.iter().flat_map(|one| one.bytes.to_vec()).collect();
    let read = patient(&cluster).read("/file").await.map_err(failed("acknowledged and not to be read"))?;
    if read != content {
        return Err("acknowledged, and other bytes are read".to_owned());
    }
    copies(&cluster, &kept).await.map_err(failed("after the commit"))?;
    cluster.shutdown().await.expect("a clean end");
    Ok(())
}

/// Waits until no server holds a chunk any more.
pub(super) async fn gone_everywhere(cluster: &Cluster, written: &Written) {
    let chunk = written.chunk();
    for uri in addresses(cluster).await.into_values() {
        eventually("an unneeded chunk is collected", WORK_LIMIT, || async {
            match read_copy(cluster, &uri, chunk).await {
                Err(error) if error.reason == Reason::ChunkNotFound => Ok(()),
                Err(error) => Err(format!("{uri}: {error}")),
                Ok(_) => Err(format!("{uri} still holds chunk {chunk}")),
            }
        })
        .await;
    }
}

/// A member leaves its group between a write and its commit: its copy does not count any more, since it may be
/// removed at any time. The commit is refused until enough members that are current hold the bytes, also by a directory
/// that was restarted meanwhile.
///
/// # Errors
/// When a commit was acknowledged with too few copies.
///
/// # Panics
/// When there is no cluster to begin with, or no seat moves.
pub async fn former_member(builder: Builder, seed: u64) -> Verdict {
    let mut random = StdRng::seed_from_u64(seed);
    let tune = |config: &mut dir_service::Config| {
        quick(config);
        (config.timing.suspect_ms, config.timing.dead_ms) = (1_500, 4_000);
    };
    let cluster = start(builder.memory(true).file_servers(4).directory_config(tune)).await;
    let writer = Writer::open(&cluster, SESSION).await;
    let grant = writer.grant(8).await;
    let group = grant.group.clone().expect("a group");
    let followers: Vec<u64> =
        group.seats.iter().map(|seat| seat.server_id).filter(|id| *id != group.primary_id).collect();
    let [late, leaver] = followers[..] else { panic!("{followers:?}") };
    // One follower is away for a moment, so that the chunk has two copies.
    let (late_index, leaver_index) = (index_of(&cluster, late).await, index_of(&cluster, leaver).await);
    cluster.kill(late_index).await;
    let mut written = writer.write(&grant, 0, bytes(&mut random, 50_000)).await;
    let holders: BTreeSet<u64> = written.receipt.holder_ids.iter().copied().collect();
    assert_eq!(
        holders,
        BTreeSet::from([group.primary_id, leaver]),
        "the copies are not as this check needs them"
    );
    cluster.restart(late_index).await.expect("it starts again");
    cluster.wait_ready().await.expect("ready");

    // The other one is away for long enough to lose its seat, and comes back.
    cluster.kill(leaver_index).await;
    eventually("a spare server has the seat", WORK_LIMIT, || async {
        let now = current(&cluster, group.id).await;
        if now.contains(&leaver) { Err(format!("{now:?}")) } else { Ok(()) }
    })
    .await;
    let now = current(&cluster, group.id).await;
    let counting = now.intersection(&holders).count();
    cluster.restart(leaver_index).await.expect("it starts again");
    cluster.kill_directory().await;
    cluster.restart_directory().await.map_err(failed("the directory starts again"))?;
    cluster.wait_ready().await.expect("ready");

    match writer.commit("/file", &[&written]).await {
        Ok(_) => {
            return Err(format!(
                "a commit was acknowledged with copies at {holders:?}, {counting} of them among the members {now:?}"
            ));
        }
        Err(error) if error.reason == Reason::Misplaced => {}
        Err(error) => panic!("the commit failed in another way: {error}"),
    }
    // As the contract says: members fetch what they miss, and the commit is repeated.
    for member in now.difference(&holders) {
        fetch(&cluster, *member, &group, &written).await.expect("a member fetches");
        written.receipt.holder_ids.push(*member);
    }
    writer.commit("/file", &[&written]).await.map_err(failed("enough members hold it now"))?;
    cluster.kill(leaver_index).await;
    cluster.kill(index_of(&cluster, group.primary_id).await).await;
    let read =
        patient(&cluster).read("/file").await.map_err(failed("with one member and a former one dead"))?;
    if read != written.bytes {
        return Err("other bytes are read".to_owned());
    }
    cluster.shutdown().await.expect("a clean end");
    Ok(())
}

async fn index_of(cluster: &Cluster, id: u64) -> usize {
    for index in 0..cluster.file_servers() {
        if cluster.file_server(index).await.is_ok_and(|server| server.id == id) {
            return index;
        }
    }
    panic!("no file server has id {id}")
}

/// The members of a group.
async fn current(cluster: &Cluster, group: u64) -> BTreeSet<u64> {
    let groups = cluster.topology().await.expect("the directory answers").groups;
    let seats = groups.into_iter().find(|one| one.id == group).map(|group| group.seats).unwrap_or_default();
    seats.into_iter().map(|seat| seat.server_id).filter(|id| *id != 0).collect()
}

/// Has a member fetch a chunk from the first holder.
async fn fetch(cluster: &Cluster, member: u64, group: &v1::Group, written: &Written) -> Result<(), Error> {
    let status = cluster.status().await?;
    let topology = cluster.topology().await?;
    let group = topology.groups.iter().find(|one| one.id == group.id).cloned();
    let source = topology.servers.into_iter().find(|server| written.receipt.holder_ids[0] == server.id);
    let addresses = addresses(cluster).await;
    let uri = addresses.get(&member).ok_or_else(|| Error::not_found("the member is not known"))?;
    let request = v1::FetchFromPrimaryRequest {
        cluster_id: status.directory.unwrap_or_default().cluster_id,
        group,
        source,
        chunks: vec![v1::ChunkRef {
            chunk: written.receipt.chunk,
            length: written.receipt.length,
            checksum: written.receipt.checksum,
            group_id: written.receipt.group_id,
        }],
    };
    let channel = channel(&cluster.network(), uri, Traffic::Small)?;
    let mut answers = FileServiceClient::new(channel).fetch_from_primary(request).await?.into_inner();
    match answers.message().await? {
        Some(answer) if answer.stored => Ok(()),
        answer => Err(Error::unavailable(format!("not stored: {answer:?}"))),
    }
}
