use super::*;
use crate::store::{KeyRange, MetaStore};
use cairn_core::{
    key,
    record::{ChunkRun, Dropped, Record},
};
use cairn_proto::{Reason, limits::ANSWERS_PER_SESSION};
use std::collections::BTreeMap;

async fn lookup(bench: &Bench, path: &str) -> v1::LookupResponse {
    let request = v1::LookupRequest { path: path.into(), with_extents: true, ..Default::default() };
    crate::ops::lookup::lookup(&bench.directory, request).await.unwrap()
}

async fn records<R: Record>(bench: &Bench, prefix: cairn_core::plan::Key) -> Vec<R> {
    let (_, page) = bench.store.scan(KeyRange::prefix(prefix), 100_000, None).await.unwrap();
    page.entries.iter().map(|(_, versioned)| R::from_bytes(&versioned.value).unwrap()).collect()
}

#[tokio::test(start_paused = true)]
async fn a_commit_is_seen_by_the_next_lookup() {
    let bench = Bench::start().await;
    let session = bench.session().await;
    let grant = bench.grant(session).await;
    let made = commit(&bench, append("/f", &grant, 0..1, 100)).await.unwrap();
    let seen = lookup(&bench, "/f").await;
    assert_eq!(seen.attributes, made.attributes);
    assert_eq!(seen.layout_revision, made.revision);
    let extent = &seen.extents[0];
    assert_eq!((extent.offset, extent.length), (0, 100));
    assert_eq!(extent.chunk.as_ref().unwrap().chunk, Some(v1::ChunkId { grant_id: grant.id, index: 0 }));
    assert_eq!(seen.attributes.unwrap().checksum, Some(0x1000));
    assert_eq!((seen.groups.len(), seen.servers.len()), (1, 3));
    let first = made.attributes.unwrap();
    let inode = first.inode;
    let by_inode = v1::CommitRequest { path: String::new(), inode, ..append("", &grant, 1..2, 50) };
    let next = commit(&bench, by_inode).await.unwrap().attributes.unwrap();
    assert_eq!((next.version, next.size, next.checksum), (2, 150, None));
    assert!(next.ctime_ns > first.ctime_ns && next.etag != first.etag);
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_committed_changes_nothing() {
    let bench = Bench::start().await;
    let session = bench.session().await;
    let grant = bench.grant(session).await;
    commit(&bench, append("/f", &grant, 0..1, 100)).await.unwrap();
    let revision = bench.store.revision().await.unwrap();
    let mkdir =
        v1::CreateRequest { path: "/d".into(), kind: v1::Kind::Directory as i32, ..Default::default() };
    let require = |require| Some(v1::Condition { require: Some(require) });
    use v1::condition::Require;
    for (request, reason) in [
        (append("/none/f", &grant, 1..2, 10), Reason::NotFound),
        (append("/f/g", &grant, 1..2, 10), Reason::NotADirectory),
        (append("/", &grant, 1..2, 10), Reason::IsADirectory),
        (append("/f", &grant, 0..1, 100), Reason::InvalidArgument),
        (append("/f", &grant, 256..257, 10), Reason::InvalidArgument),
        (v1::CommitRequest { base_version: 7, ..append("/f", &grant, 1..2, 10) }, Reason::ConditionFailed),
        (
            v1::CommitRequest { condition: require(Require::Absent(true)), ..append("/f", &grant, 1..2, 10) },
            Reason::AlreadyExists,
        ),
        (
            v1::CommitRequest { condition: require(Require::Exists(true)), ..append("/g", &grant, 1..2, 10) },
            Reason::NotFound,
        ),
        (
            v1::CommitRequest {
                condition: require(Require::Etag("x".into())),
                ..append("/f", &grant, 1..2, 10)
            },
            Reason::ConditionFailed,
        ),
        (
            v1::CommitRequest { path: String::new(), inode: 99, ..append("", &grant, 1..2, 10) },
            Reason::NotFound,
        ),
        (v1::CommitRequest { edits: Vec::new(), ..append("/f", &grant, 1..2, 10) }, Reason::InvalidArgument),
    ] {
        let error = commit(&bench, request.clone()).await.unwrap_err();
        assert_eq!(error.reason, reason, "{request:?}: {error}");
    }
    assert_eq!(bench.store.revision().await.unwrap(), revision);
    crate::ops::create::create(&bench.directory, mkdir).await.unwrap();
    assert_eq!(
        commit(&bench, append("/d", &grant, 1..2, 10)).await.unwrap_err().reason,
        Reason::IsADirectory
    );
}

#[tokio::test(start_paused = true)]
async fn a_misplaced_chunk_is_told_with_group_and_servers() {
    let bench = Bench::start().await;
    let session = bench.session().await;
    let grant = bench.grant(session).await;
    let mut request = append("/f", &grant, 0..2, 10);
    request.receipts[1].holder_ids.truncate(1);
    request.receipts[1].holder_ids.extend([9_999, 9_999, 0]);
    let error = commit(&bench, request.clone()).await.unwrap_err();
    assert_eq!(error.reason, Reason::Misplaced);
    assert_eq!(error.detail.chunks.len(), 1);
    assert_eq!(error.detail.chunks[0].chunk, Some(v1::ChunkId { grant_id: grant.id, index: 1 }));
    assert_eq!((error.detail.groups.len(), error.detail.servers.len()), (1, 3));
    // A second member fetched it: an older epoch in the receipt does not matter.
    request.receipts[1].holder_ids =
        grant.group.unwrap().seats[..2].iter().map(|seat| seat.server_id).collect();
    request.receipts[1].epoch = 0;
    commit(&bench, request).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_commit_waits_for_members_to_know_their_seats() {
    let bench = Arc::new(Bench::start().await);
    let session = bench.session().await;
    let request = v1::GrantRequest { session_id: session, ..Default::default() };
    let grant = crate::ops::grant::grant(&bench.directory, request).await.unwrap().grant.unwrap();
    let committing = tokio::spawn({
        let (bench, request) = (bench.clone(), append("/f", &grant, 0..1, 10));
        async move { commit(&bench, request).await }
    });
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(!committing.is_finished());
    bench.heartbeat();
    committing.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn concurrent_commits_of_one_file_all_count() {
    let bench = Arc::new(Bench::start().await);
    let session = bench.session().await;
    let grant = bench.grant(session).await;
    let commits: Vec<_> = (0..24)
        .map(|index| {
            let (bench, request) = (bench.clone(), append("/f", &grant, index..index + 1, 10));
            tokio::spawn(async move { commit(&bench, request).await.unwrap().attributes.unwrap().version })
        })
        .collect();
    let mut versions = Vec::new();
    for one in commits {
        versions.push(one.await.unwrap());
    }
    versions.sort_unstable();
    assert_eq!(versions, (1..=24).collect::<Vec<_>>(), "each made a version of its own");
    let seen = lookup(&bench, "/f").await;
    assert_eq!(seen.attributes.unwrap().size, 240);
    // With a condition exactly one wins.
    let commits: Vec<_> = (24..32)
        .map(|index| {
            let request =
                v1::CommitRequest { base_version: 24, ..append("/f", &grant, index..index + 1, 10) };
            let bench = bench.clone();
            tokio::spawn(async move { commit(&bench, request).await.map_err(|error| error.reason) })
        })
        .collect();
    let mut won = 0;
    for one in commits {
        match one.await.unwrap() {
            Ok(_) => won += 1,
            Err(reason) => assert_eq!(reason, Reason::ConditionFailed),
        }
    }
    assert_eq!(won, 1);
}

#[tokio::test(start_paused = true)]
async fn retry_each_request_is_applied_once() {
    let bench = Bench::start().await;
    let session = v1::OpenRequest { ttl_ms: 600_000, ..Default::default() };
    let session = crate::ops::session::open(&bench.directory, session).await.unwrap().session_id;
    let grant = bench.grant(session).await;
    let request = v1::CommitRequest { request_id: in_session(session, 1), ..append("/f", &grant, 0..1, 10) };
    let first = commit(&bench, request.clone()).await.unwrap();
    assert_eq!(commit(&bench, request.clone()).await.unwrap(), first);
    // Also when the file is gone meanwhile.
    delete(&bench, "/f", None).await.unwrap();
    assert_eq!(commit(&bench, request.clone()).await.unwrap(), first);
    let other = v1::CommitRequest { mode: 0o600, ..request.clone() };
    assert_eq!(commit(&bench, other).await.unwrap_err().reason, Reason::InvalidArgument);
    // A failed request is not an answer: it may succeed later under the same id.
    let blocked =
        v1::CommitRequest { request_id: in_session(session, 2), path: "/a/f".into(), ..Default::default() };
    assert_eq!(commit(&bench, blocked.clone()).await.unwrap_err().reason, Reason::NotFound);
    let mkdir =
        v1::CreateRequest { path: "/a".into(), kind: v1::Kind::Directory as i32, ..Default::default() };
    crate::ops::create::create(&bench.directory, mkdir).await.unwrap();
    commit(&bench, blocked).await.unwrap();
    // The slot is taken over by a later request: what became of the first can no longer be known.
    let later = v1::CommitRequest {
        request_id: in_session(session, 1 + ANSWERS_PER_SESSION),
        path: "/g".into(),
        ..Default::default()
    };
    commit(&bench, later).await.unwrap();
    assert_eq!(commit(&bench, request).await.unwrap_err().reason, Reason::OutcomeUnknown);
}

#[tokio::test(start_paused = true)]
async fn retry_of_one_request_at_the_same_time_is_applied_once() {
    let bench = Arc::new(Bench::start().await);
    let session = bench.session().await;
    let grant = bench.grant(session).await;
    let request = v1::CommitRequest { request_id: in_session(session, 1), ..append("/f", &grant, 0..1, 10) };
    let repeats: Vec<_> = (0..8)
        .map(|_| {
            let (bench, request) = (bench.clone(), request.clone());
            tokio::spawn(async move { commit(&bench, request).await.unwrap() })
        })
        .collect();
    let mut answers = Vec::new();
    for one in repeats {
        answers.push(one.await.unwrap());
    }
    assert!(answers.windows(2).all(|pair| pair[0] == pair[1]));
    assert_eq!(lookup(&bench, "/f").await.attributes.unwrap().version, 1);
}

#[tokio::test(start_paused = true)]
async fn the_largest_commit_is_one_version_and_reads_back_in_pages() {
    let bench = Bench::start().await;
    let session = bench.session().await;
    let request = v1::GrantRequest { session_id: session, count: 4_096, ..Default::default() };
    let grant = crate::ops::grant::grant(&bench.directory, request).await.unwrap().grant.unwrap();
    bench.heartbeat();
    commit(&bench, append("/f", &grant, 0..4_096, 1 << 20)).await.unwrap();
    let (mut extents, mut page_token) = (Vec::new(), String::new());
    loop {
        let request =
            v1::LookupRequest { path: "/f".into(), with_extents: true, page_token, ..Default::default() };
        let page = crate::ops::lookup::lookup(&bench.directory, request).await.unwrap();
        extents.extend(page.extents);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!(extents.len(), 4_096);
    assert!((0..).zip(&extents).all(|(number, extent)| extent.offset == number << 20));
}

#[tokio::test(start_paused = true)]
async fn deleted_and_overwritten_bytes_are_dropped_and_all_pages_go() {
    let bench = Bench::start().await;
    let session = bench.session().await;
    let grant = v1::GrantRequest { session_id: session, count: 8_192, ..Default::default() };
    let grant = crate::ops::grant::grant(&bench.directory, grant).await.unwrap().grant.unwrap();
    bench.heartbeat();
    commit(&bench, append("/f", &grant, 0..1_000, 10)).await.unwrap();
    commit(&bench, append("/small", &grant, 5_000..5_001, 10)).await.unwrap();
    // 3 bytes of chunk 0 stay alive, chunks 1 and 2 go, 4 bytes of chunk 3 stay.
    let mut request = append("/f", &grant, 1_000..1_001, 33);
    let write = v1::WriteEdit { offset: 3, length: 33, receipt_index: 0, chunk_offset: 0 };
    request.edits = vec![v1::Edit { edit: Some(v1::edit::Edit::Write(write)) }];
    commit(&bench, request).await.unwrap();
    let store: Arc<dyn MetaStore> = Arc::new(bench.store.clone());
    while crate::background::trash::round(&store, &mut Vec::new()).await.unwrap() > 0 {}
    let dropped: Vec<Dropped> = records(&bench, key::all_dropped()).await;
    assert_eq!(dropped.len(), 2);
    let live: BTreeMap<u64, u64> = records::<ChunkRun>(&bench, key::chunk_runs())
        .await
        .iter()
        .flat_map(|run| &run.chunks)
        .map(|chunk| (chunk.checksum - 0x1000, chunk.live_bytes))
        .collect();
    assert_eq!([live[&0], live[&1], live[&2], live[&3], live[&4], live[&1_000]], [3, 0, 0, 4, 10, 33]);
    delete(&bench, "/f", None).await.unwrap();
    while crate::background::trash::round(&store, &mut Vec::new()).await.unwrap() > 0 {}
    assert_eq!(records::<Dropped>(&bench, key::all_dropped()).await.len(), 1_001);
    assert_eq!(records::<cairn_core::record::Trash>(&bench, key::all_trash()).await.len(), 0);
    let (_, all) = bench.store.scan(KeyRange::all(), 100_000, None).await.unwrap();
    assert!(all.entries.iter().all(|(key, _)| key.get(4) != Some(&b'x')), "no page is left behind");
    let live: u64 = records::<ChunkRun>(&bench, key::chunk_runs())
        .await
        .iter()
        .flat_map(|run| &run.chunks)
        .map(|chunk| chunk.live_bytes)
        .sum();
    assert_eq!(live, 10, "the other file's");
    let again = commit(&bench, append("/g", &grant, 1..2, 10)).await.unwrap_err();
    assert_eq!(again.reason, Reason::InvalidArgument, "a dropped chunk cannot come back");
}

#[tokio::test(start_paused = true)]
async fn a_commit_and_the_end_of_its_grant_cannot_both_win() {
    let bench = Arc::new(Bench::start().await);
    for round in 0..16u32 {
        let session = bench.session().await;
        let grant = bench.grant(session).await;
        let path = format!("/f{round}");
        let committing = tokio::spawn({
            let (bench, request) = (bench.clone(), append(&path, &grant, 0..1, 10));
            async move {
                for _ in 0..round % 5 {
                    tokio::task::yield_now().await;
                }
                commit(&bench, request).await
            }
        });
        let close = v1::CloseRequest { session_id: session };
        crate::ops::session::close(&bench.directory, close).await.unwrap();
        let (closed_at, values) =
            bench.store.get(&[key::grant(cairn_proto::id::GrantId(grant.id))], None).await.unwrap();
        let closed = values[0].as_ref().unwrap().revision;
        assert!(closed <= closed_at);
        match committing.await.unwrap() {
            Ok(made) => assert!(made.revision < closed.0),
            Err(error) => assert_eq!(error.reason, Reason::GrantClosed),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn every_rename_of_a_directory_makes_commits_by_path_look_again() {
    let bench = Bench::start().await;
    let mut seen = Vec::new();
    let epoch = || async {
        let (_, values) = bench.store.get(&[key::tree_epoch()], None).await.unwrap();
        values[0].as_ref().map(|versioned| versioned.revision)
    };
    for path in ["/a", "/b"] {
        let kind = v1::Kind::Directory as i32;
        let request = v1::CreateRequest { path: path.into(), kind, ..Default::default() };
        crate::ops::create::create(&bench.directory, request).await.unwrap();
    }
    for (from, to) in [("/a", "/c"), ("/c", "/b/c")] {
        seen.push(epoch().await);
        let request = v1::RenameRequest { from: from.into(), to: to.into(), ..Default::default() };
        crate::ops::rename::rename(&bench.directory, request).await.unwrap();
    }
    seen.push(epoch().await);
    assert!(seen.windows(2).all(|pair| pair[0] < pair[1]), "{seen:?}");
}
