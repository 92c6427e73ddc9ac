//! The directory among file servers: who joins, who gets which seat, what is repaired, collected, rebuilt.
#![allow(clippy::unwrap_used)]

mod fake;

use cairn_proto::{Error, Reason, id::ChunkId, v1};
use dir_service::Effort;
use disk::SimDisk;
use fake::{Stage, timing};
use std::collections::BTreeSet;

fn members(grant: &v1::Grant) -> Vec<u64> {
    grant.group.as_ref().unwrap().seats.iter().map(|seat| seat.server_id).collect()
}

fn chunks(status: &v1::StatusResponse) -> v1::ChunkTotals {
    status.chunks.unwrap_or_default()
}

#[tokio::test]
async fn healed_members_that_missed_a_commit_fetch_it_and_the_status_tells_both() {
    let stage = Stage::start(3).await;
    let session = stage.session().await;
    let grant = stage.grant(session, &[]).await.unwrap();
    let members = members(&grant);
    assert_eq!(members.iter().collect::<BTreeSet<_>>().len(), 3);
    stage.write("/a", &grant, 0, &members[..2]).await;
    let status = stage
        .until("one whole file", |status| {
            status.verified && chunks(status).healthy == 1 && chunks(status).total == 1
        })
        .await;
    assert_eq!((status.files, status.directories, status.bytes), (1, 1, 100));
    assert!(stage.servers.iter().all(|server| server.holds(ChunkId::new(grant.id, 0))));
    // A copy that vanishes behind everybody's back is found by the next comparison.
    stage.servers[0].kept.lock().chunks.clear();
    stage.until("a copy was made again", |status| status.repairs.as_ref().unwrap().copies_made >= 2).await;
    assert!(stage.servers[0].holds(ChunkId::new(grant.id, 0)));
}

#[tokio::test]
async fn every_live_server_leads_a_group_and_a_lost_primary_costs_one_more_grant() {
    let mut stage = Stage::start(3).await;
    let session = stage.session().await;
    let first = stage.grant(session, &[]).await.unwrap();
    let leaders: BTreeSet<u64> = stage.status().await.groups.iter().map(|group| group.primary_id).collect();
    assert_eq!(leaders.len(), 3);
    let lost = first.group.as_ref().unwrap().primary_id;
    stage.servers.iter_mut().find(|server| server.id() == lost).unwrap().kill();
    // At once: before anybody could have noticed the silence.
    let second = stage.grant(session, &[lost]).await.unwrap();
    assert_ne!(second.group.unwrap().primary_id, lost);
    // Suspicion moves the role, with a new epoch, and no seat.
    let status = stage
        .until("the silent server leads nothing", |status| {
            status.groups.iter().all(|group| group.primary_id != lost)
        })
        .await;
    assert!(status.groups.iter().all(|group| group.seats.iter().any(|seat| seat.server_id == lost)));
    assert!(status.groups.iter().any(|group| group.epoch > 1));
}

#[tokio::test]
async fn healed_a_dead_members_seat_goes_to_a_spare_server_which_fetches_everything() {
    let mut stage = Stage::start(3).await;
    let session = stage.session().await;
    let grant = stage.grant(session, &[]).await.unwrap();
    for index in 0..5 {
        stage.write(&format!("/{index}"), &grant, index, &members(&grant)).await;
    }
    stage.join().await;
    stage.serving(4).await;
    let dead = members(&grant)[0];
    stage.servers.iter_mut().find(|server| server.id() == dead).unwrap().kill();
    let status = stage
        .until("the seat moved and all copies are there", |status| {
            let moved =
                status.groups.iter().all(|group| group.seats.iter().all(|seat| seat.server_id != dead));
            moved && chunks(status).healthy == 5
        })
        .await;
    assert_eq!(chunks(&status).lost, 0);
    let spare = &stage.servers[3];
    assert!((0..5).all(|index| spare.holds(ChunkId::new(grant.id, index))));
    // An operator gives the dead server up: nobody waits for its disk any more.
    stage.cluster().drain(v1::DrainRequest { server_id: dead, cancel: false }).await.unwrap();
    stage
        .until("the dead server is given up", |status| {
            status.file_servers.iter().any(|one| one.drained && one.server.as_ref().unwrap().id == dead)
        })
        .await;
}

#[tokio::test]
async fn a_server_is_forgotten_once_nothing_depends_on_it_and_comes_back_as_a_new_one() {
    let mut stage = Stage::start(4).await;
    let session = stage.session().await;
    let grant = stage.grant(session, &[]).await.unwrap();
    let chunk = stage.write("/a", &grant, 0, &members(&grant)).await;
    let lost = members(&grant)[0];
    let request = v1::ForgetRequest { server_id: lost };
    let refused = Error::from(stage.cluster().forget(request).await.unwrap_err());
    assert_eq!(refused.reason, Reason::ConditionFailed);
    assert!(refused.to_string().contains("it answers"), "{refused}");
    let place = stage.servers.iter().position(|server| server.id() == lost).unwrap();
    stage.servers[place].kill();
    stage.until("it is silent", |status| state_of(status, lost) != Some(v1::ServerState::Live)).await;
    let refused = Error::from(stage.cluster().forget(request).await.unwrap_err());
    assert_eq!((refused.reason, refused.detail.server), (Reason::ConditionFailed, lost.to_string()));
    // Given up by an operator: nobody waits for what it holds.
    stage.cluster().drain(v1::DrainRequest { server_id: lost, cancel: false }).await.unwrap();
    stage.until("it is gone", |status| state_of(status, lost) == Some(v1::ServerState::Gone)).await;
    stage.cluster().forget(request).await.unwrap();
    assert_eq!(state_of(&stage.status().await, lost), None, "no status shows it");
    let again = Error::from(stage.cluster().forget(request).await.unwrap_err());
    assert_eq!(again.reason, Reason::NotFound);
    let uri = stage.uri.clone();
    stage.servers[place].start(&uri).await;
    stage.until("it is back", |status| state_of(status, lost) == Some(v1::ServerState::Live)).await;
    stage
        .until("what it held is surplus", |status| {
            chunks(status).healthy == 1 && status.groups.iter().all(|group| group.former_ids.is_empty())
        })
        .await;
    let holders = stage.servers.iter().filter(|server| server.holds(chunk)).count();
    assert!(holders >= 3, "{holders} copies");
}

fn state_of(status: &v1::StatusResponse, id: u64) -> Option<v1::ServerState> {
    let mut servers = status.file_servers.iter().filter_map(|one| one.server.as_ref());
    servers.find(|server| server.id == id).map(v1::Server::state)
}

#[tokio::test]
async fn after_a_restart_the_status_invents_nothing_of_servers_that_were_not_heard() {
    let mut stage = Stage::start(3).await;
    let away = stage.servers[2].id();
    stage
        .until("all is carried", |status| {
            let directory = status.directory.as_ref().unwrap();
            directory.shipped_revision >= directory.revision
        })
        .await;
    stage.stop().await;
    stage.servers[2].kill();
    stage.again(stage.disk.clone()).await;
    let status = stage
        .until("two are heard", |status| {
            status.file_servers.iter().filter(|server| !server.unheard).count() == 2
        })
        .await;
    for server in &status.file_servers {
        let is_away = server.server.as_ref().unwrap().id == away;
        assert_eq!((server.unheard, server.usage.is_none()), (is_away, is_away), "{server:?}");
    }
    let uri = stage.uri.clone();
    stage.servers[2].start(&uri).await;
    stage
        .until("the third is heard", |status| {
            status.file_servers.iter().all(|server| !server.unheard && server.usage.is_some())
        })
        .await;
}

#[tokio::test]
async fn deleted_chunks_leave_every_disk_also_one_that_was_away() {
    let mut stage = Stage::start(3).await;
    let session = stage.session().await;
    let grant = stage.grant(session, &[]).await.unwrap();
    let chunk = stage.write("/gone", &grant, 0, &members(&grant)).await;
    let mut renewing = stage.directory();
    let renewals = tokio::spawn(async move {
        loop {
            let request = v1::RenewLockRequest { session_id: session, ..Default::default() };
            renewing.renew_lock(request).await.unwrap();
            tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        }
    });
    stage.servers[2].kill();
    stage.delete("/gone").await;
    stage
        .until("the living are rid of it", |_| {
            !stage.servers[0].holds(chunk) && !stage.servers[1].holds(chunk)
        })
        .await;
    assert!(stage.servers[2].holds(chunk));
    assert_eq!(
        chunks(&stage.status().await).awaiting_collection,
        1,
        "its record waits for the server that is away"
    );
    let uri = stage.uri.clone();
    stage.servers[2].start(&uri).await;
    stage.until("nothing waits any more", |status| chunks(status).awaiting_collection == 0).await;
    assert!(!stage.servers[2].holds(chunk));
    // Its grant is still open; its receipt is of bytes that are gone.
    let again = stage.directory().commit(stage.commit_of("/again", &grant, 0, &members(&grant))).await;
    assert_eq!(again.unwrap_err().code(), tonic::Code::InvalidArgument);
    renewals.abort();
}

#[tokio::test]
async fn chunks_of_unknown_grants_are_listed_and_kept() {
    let stage = Stage::start(3).await;
    let stray = ChunkId::new(999_999, 4);
    let chunk = v1::ChunkRef { chunk: Some(stray.into()), length: 5, checksum: 1, group_id: 1 };
    stage.servers[1].kept.lock().chunks.insert(stray, chunk);
    let status = stage.until("it is listed", |status| chunks(status).quarantined == 1).await;
    assert_eq!(status.quarantined[0].server_id, stage.servers[1].id());
    assert!(stage.servers[1].holds(stray));
}

#[tokio::test]
async fn rebuilt_a_lost_store_comes_back_from_the_carriers_and_never_forms_a_new_cluster() {
    let mut stage = Stage::start(3).await;
    let session = stage.session().await;
    let grant = stage.grant(session, &[]).await.unwrap();
    stage.write("/kept", &grant, 0, &members(&grant)).await;
    stage.write("/deleted", &grant, 1, &members(&grant)).await;
    stage.delete("/deleted").await;
    let before = stage
        .until("all is carried", |status| {
            let directory = status.directory.as_ref().unwrap();
            directory.shipped_revision >= directory.revision && directory.revision > 0
        })
        .await;
    stage.stop().await;
    // Only one carrier is there at first: not enough to be sure, and no reason to form a new cluster.
    stage.servers[1].kill();
    stage.servers[2].kill();
    stage.again(SimDisk::new(2, 1 << 30)).await;
    let waiting = stage
        .until("it waits for carriers", |status| {
            status.directory.as_ref().is_some_and(|directory| directory.reason.contains("are needed"))
        })
        .await;
    assert_eq!(waiting.directory.unwrap().mode, "rebuilding");
    let uri = stage.uri.clone();
    stage.servers[1].start(&uri).await;
    stage.servers[2].start(&uri).await;
    let after = stage.serving(3).await;
    let (before, after) = (before.directory.unwrap(), after.directory.unwrap());
    assert_eq!((after.cluster_id, after.generation), (before.cluster_id, before.generation + 1));
    let lookup = |path: &str| v1::LookupRequest { path: path.into(), ..Default::default() };
    let kept = stage.directory().lookup(lookup("/kept")).await.unwrap().into_inner().attributes.unwrap();
    assert_eq!((kept.size, kept.version), (100, 1));
    let deleted = stage.directory().lookup(lookup("/deleted")).await.unwrap_err();
    assert_eq!(Error::from(deleted).reason, Reason::NotFound);
    // Ids go on beyond all that may have been given away.
    let session = stage.session().await;
    assert!(stage.grant(session, &[]).await.unwrap().id > grant.id + (1 << 31));
}

/// A fourth server must not take the place of one carrier while two are away: it and the last one would be enough to count
/// changes as carried of which those two know nothing, and those two are enough to rebuild from.
#[tokio::test]
async fn rebuilt_carriers_are_not_replaced_while_a_majority_of_them_is_away() {
    let mut stage = Stage::start(4).await;
    let is_carried = |status: &v1::StatusResponse| {
        let directory = status.directory.as_ref().unwrap();
        directory.carrier_ids.len() == 3 && directory.shipped_revision == directory.revision
    };
    let session = stage.session().await;
    let grant = stage.grant(session, &[]).await.unwrap();
    stage.write("/deleted", &grant, 0, &members(&grant)).await;
    let carriers = stage.until("it is carried", is_carried).await.directory.unwrap().carrier_ids;
    let place = |stage: &Stage, id: u64| stage.servers.iter().position(|server| server.id() == id).unwrap();
    let away = [place(&stage, carriers[1]), place(&stage, carriers[2])];
    away.iter().for_each(|place| stage.servers[*place].kill());
    stage
        .until("one of them is dead", |status| {
            carriers.iter().any(|id| state_of(status, *id) == Some(v1::ServerState::Dead))
        })
        .await;
    stage.delete("/deleted").await;
    // Counted from the change, which is after the death: had somebody taken the place, it would be carried.
    let status = stage
        .until("the lag is shown", |status| {
            let directory = status.directory.as_ref().unwrap();
            directory.journal_lag_ms > directory.journal_lag_ms_max && directory.reason.contains("too few")
        })
        .await;
    assert_eq!(status.directory.unwrap().carrier_ids, carriers);
    // With one of them a majority is back, and the other is replaced without anybody's doing.
    let uri = stage.uri.clone();
    stage.servers[away[0]].start(&uri).await;
    stage
        .until("the fourth has taken the place of the one that is dead, and no alarm is left", |status| {
            let directory = status.directory.as_ref().unwrap();
            is_carried(status) && !directory.carrier_ids.contains(&carriers[2]) && directory.reason.is_empty()
        })
        .await;
    // The two that were away are the first that an empty directory hears.
    stage.stop().await;
    stage.servers.iter_mut().for_each(fake::Fake::kill);
    stage.again(SimDisk::new(2, 1 << 30)).await;
    for place in away {
        stage.servers[place].start(&uri).await;
    }
    stage
        .until("one of the carriers is not enough", |status| {
            status.directory.as_ref().is_some_and(|directory| directory.reason.contains("are needed"))
        })
        .await;
    let first = place(&stage, carriers[0]);
    stage.servers[first].start(&uri).await;
    stage
        .until("it serves", |status| {
            status.directory.as_ref().is_some_and(|directory| directory.mode == "serving")
        })
        .await;
    let request = v1::LookupRequest { path: "/deleted".into(), ..Default::default() };
    let deleted = stage.directory().lookup(request).await.unwrap_err();
    assert_eq!(Error::from(deleted).reason, Reason::NotFound);
}

/// Of two carriers one is away for good: only an operator can say so.
#[tokio::test]
async fn a_carrier_that_an_operator_gives_up_is_replaced_although_no_majority_is_left() {
    let mut stage = Stage::start(2).await;
    let is_carried = |status: &v1::StatusResponse| {
        let directory = status.directory.as_ref().unwrap();
        directory.carrier_ids.len() == 2 && directory.shipped_revision == directory.revision
    };
    stage.until("it is carried", is_carried).await;
    let lost = stage.servers[0].id();
    stage.servers[0].kill();
    stage.until("it is silent", |status| state_of(status, lost) != Some(v1::ServerState::Live)).await;
    stage.join().await;
    // Something to carry.
    let request =
        v1::CreateRequest { path: "/d".into(), kind: v1::Kind::Directory as i32, ..Default::default() };
    stage.directory().create(request).await.unwrap();
    stage
        .until("it is dead, and its place is not given", |status| {
            let directory = status.directory.as_ref().unwrap();
            state_of(status, lost) == Some(v1::ServerState::Dead)
                && directory.journal_lag_ms > directory.journal_lag_ms_max
                && directory.carrier_ids.contains(&lost)
        })
        .await;
    stage.cluster().drain(v1::DrainRequest { server_id: lost, cancel: false }).await.unwrap();
    stage
        .until("the third carries instead", |status| {
            is_carried(status) && !status.directory.as_ref().unwrap().carrier_ids.contains(&lost)
        })
        .await;
    // Once the records name it no more, and that is carried too.
    let mut forgotten = stage.cluster().forget(v1::ForgetRequest { server_id: lost }).await;
    for _ in 0..500 {
        let Err(refused) = forgotten else { break };
        assert_eq!(Error::from(refused).reason, Reason::ConditionFailed);
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        forgotten = stage.cluster().forget(v1::ForgetRequest { server_id: lost }).await;
    }
    assert_eq!(state_of(&stage.status().await, lost), None);
}

#[tokio::test]
async fn rebuilt_an_older_copy_of_the_store_gives_way_to_what_the_carriers_know() {
    let mut stage = Stage::start(3).await;
    stage.stop().await;
    let old = stage.disk.clone_disk();
    stage.again(stage.disk.clone()).await;
    stage.serving(3).await;
    let session = stage.session().await;
    let grant = stage.grant(session, &[]).await.unwrap();
    stage.write("/new", &grant, 0, &members(&grant)).await;
    stage
        .until("all is carried", |status| {
            let directory = status.directory.as_ref().unwrap();
            directory.shipped_revision >= directory.revision
        })
        .await;
    stage.stop().await;
    stage.again(old).await;
    stage
        .until("a later generation serves", |status| {
            status.directory.as_ref().is_some_and(|directory| directory.generation == 2)
        })
        .await;
    stage.serving(3).await;
    let request = v1::LookupRequest { path: "/new".into(), ..Default::default() };
    assert_eq!(stage.directory().lookup(request).await.unwrap().into_inner().attributes.unwrap().size, 100);
}

#[tokio::test]
async fn foreign_and_copied_disks_are_refused() {
    let mut stage = Stage::start(3).await;
    let known = stage.servers[0].request();
    let foreign = v1::RegisterRequest { cluster_id: "other".into(), ..known.clone() };
    let error = Error::from(stage.cluster().register(foreign).await.unwrap_err());
    assert_eq!(error.reason, Reason::WrongCluster);
    // The same disk from another process at another address, while the first one lives.
    let copy = v1::RegisterRequest {
        incarnation: "copy".into(),
        endpoints: vec![v1::Endpoint { uri: "http://127.0.0.1:9".into(), scope: 1 }],
        ..known
    };
    let mut outcome = Reason::Unavailable;
    for _ in 0..200 {
        outcome = Error::from(stage.cluster().register(copy.clone()).await.unwrap_err()).reason;
        if outcome != Reason::Unavailable {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    assert_eq!(outcome, Reason::InvalidArgument);
    // A new process at the same address is the same server after a restart.
    stage.servers[0].kill();
    let uri = stage.uri.clone();
    stage.servers[0].start(&uri).await;
    stage.serving(3).await;
    assert_eq!(stage.status().await.file_servers.len(), 3);
}

#[tokio::test]
async fn a_drained_server_hands_everything_over() {
    let mut stage = Stage::start(3).await;
    let session = stage.session().await;
    let grant = stage.grant(session, &[]).await.unwrap();
    let chunk = stage.write("/a", &grant, 0, &members(&grant)).await;
    stage.join().await;
    stage.serving(4).await;
    let leaving = stage.servers[0].id();
    let request = v1::DrainRequest { server_id: leaving, cancel: false };
    stage.cluster().drain(request).await.unwrap();
    let status = stage
        .until("it may be switched off", |status| {
            status.file_servers.iter().any(|one| one.drained && one.server.as_ref().unwrap().id == leaving)
        })
        .await;
    assert!(status.groups.iter().all(|group| group.seats.iter().all(|seat| seat.server_id != leaving)));
    assert_eq!(chunks(&status).healthy, 1);
    assert!(!stage.servers[0].holds(chunk), "its surplus copy was collected");
    assert!(stage.servers[3].holds(chunk));
}

#[tokio::test]
async fn healed_a_server_that_missed_more_than_one_plan_looks_at_gets_all_of_it() {
    // More than the gaps that a plan looks at, than an order or a commit holds, and than wait to be told.
    const MISSED: u32 = 9_000;
    const A_COMMIT: usize = 4_000;
    // Small extents stay as they are: the chunks that were missed are to be counted.
    let effort = Effort { merge_bytes_per_second: 0, ..Effort::default() };
    let mut stage = Stage::start_as(3, timing(), effort).await;
    let session = stage.session().await;
    let grant = stage.grant_of(session, MISSED).await;
    let members = members(&grant);
    let away = |stage: &Stage, place: usize| {
        stage.servers.iter().position(|server| server.id() == members[place]).unwrap()
    };
    let late = away(&stage, 2);
    stage.servers[late].kill();
    for first in (0..MISSED).step_by(A_COMMIT) {
        let indexes = first..(first + A_COMMIT as u32).min(MISSED);
        stage.write_run(&format!("/{first}"), &grant, indexes, &members[..2]).await;
    }
    stage
        .until("all of it is known to be missing", |status| {
            chunks(status).under_replicated == u64::from(MISSED)
        })
        .await;
    let uri = stage.uri.clone();
    stage.servers[late].start(&uri).await;
    stage
        .until("everything is back", |status| {
            status.verified
                && chunks(status).healthy == u64::from(MISSED)
                && chunks(status).under_replicated == 0
        })
        .await;
    assert_eq!(stage.servers[late].holds_how_many(), MISSED as usize);
}

#[tokio::test]
async fn rebuilt_a_copy_of_the_journal_that_vanished_while_nothing_changed_is_made_again() {
    let stage = Stage::start(3).await;
    let is_carried = |status: &v1::StatusResponse| {
        let directory = status.directory.as_ref().unwrap();
        directory.carrier_ids.len() == 3 && directory.shipped_revision == directory.revision
    };
    let status = stage.until("the journal is carried", is_carried).await;
    let carrier = status.directory.unwrap().carrier_ids[1];
    let carrier = stage.servers.iter().find(|server| server.id() == carrier).unwrap();
    let before = carrier.kept.lock().journal.take().expect("a carrier has a copy");
    // Nobody commits anything: only being asked shows that it is gone.
    stage.until("the copy is there again", |_| carrier.kept.lock().journal.is_some()).await;
    let again = carrier.kept.lock().journal.clone().unwrap();
    assert!(again.durable >= before.durable, "{} after {}", again.durable, before.durable);
    assert_eq!(again.checkpoint, again.durable, "a whole one, nothing was there to append to");
}

#[tokio::test]
async fn healed_copies_that_were_missing_of_what_is_deleted_are_missing_no_more() {
    let mut stage = Stage::start(3).await;
    let session = stage.session().await;
    let grant = stage.grant(session, &[]).await.unwrap();
    let members = members(&grant);
    let away = stage.servers.iter().position(|server| server.id() == members[2]).unwrap();
    stage.servers[away].kill();
    stage.write("/kept", &grant, 0, &members[..2]).await;
    stage.write("/deleted", &grant, 1, &members[..2]).await;
    let missing = |status: &v1::StatusResponse| status.repairs.as_ref().unwrap().copies_missing;
    stage.until("both are known to be missing", |status| missing(status) == 2).await;
    stage.delete("/deleted").await;
    // The server stays away: nobody compares what it holds.
    stage.until("one is wanted", |status| chunks(status).total == 1 && missing(status) == 1).await;
}
