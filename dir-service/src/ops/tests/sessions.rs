use super::*;
use crate::{
    ops::{grant, session},
    store::{KeyRange, MetaStore},
};
use cairn_core::{key, record::Record};
use cairn_proto::{
    Reason,
    id::{GrantId, SessionId},
    limits::GRANTS_PER_SESSION_MAX,
};

async fn count(bench: &Bench, prefix: cairn_core::plan::Key) -> usize {
    bench.store.scan(KeyRange::prefix(prefix), 100_000, None).await.unwrap().1.entries.len()
}

async fn is_closed(bench: &Bench, grant: u64) -> bool {
    let (_, values) = bench.store.get(&[key::grant(GrantId(grant))], None).await.unwrap();
    cairn_core::record::Grant::from_bytes(&values[0].as_ref().unwrap().value).unwrap().closed
}

#[tokio::test(start_paused = true)]
async fn a_silent_session_ends_with_its_locks_and_grants_and_leaves_no_trace() {
    let bench = Bench::start().await;
    let _loops = Loops::start(&bench.directory);
    let session = bench.session().await;
    let granted = bench.grant(session).await;
    for number in 0..100 {
        lock(&bench, exclusive(&format!("/f{number}"), session)).await.unwrap();
    }
    let request_id = in_session(session, 1);
    commit(&bench, v1::CommitRequest { request_id, path: "/g".into(), ..Default::default() }).await.unwrap();
    tokio::time::sleep(Duration::from_millis(9_900)).await;
    assert_eq!(count(&bench, key::reservations()).await, 100);
    assert!(!is_closed(&bench, granted.id).await);
    tokio::time::sleep(Duration::from_millis(1_000)).await;
    assert_eq!(count(&bench, key::reservations()).await, 0);
    assert_eq!(count(&bench, key::session_locks(SessionId(session))).await, 0);
    assert!(is_closed(&bench, granted.id).await);
    assert_eq!(count(&bench, key::all_session_grants()).await, 0);
    assert_eq!(count(&bench, key::answers(SessionId(session))).await, 1, "answers are kept for one more ttl");
    let request = v1::GrantRequest { session_id: session, ..Default::default() };
    assert_eq!(grant::grant(&bench.directory, request).await.unwrap_err().reason, Reason::SessionExpired);
    assert_eq!(lock(&bench, exclusive("/x", session)).await.unwrap_err().reason, Reason::SessionExpired);
    until("all is forgotten", || async {
        count(&bench, key::answers(SessionId(session))).await + count(&bench, key::sessions()).await == 0
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_closed_session_has_given_everything_back() {
    let bench = Bench::start().await;
    let session_id = bench.session().await;
    let granted = bench.grant(session_id).await;
    lock(&bench, exclusive("/f", session_id)).await.unwrap();
    for _ in 0..2 {
        session::close(&bench.directory, v1::CloseRequest { session_id }).await.unwrap();
        assert_eq!(count(&bench, key::reservations()).await, 0);
        assert!(is_closed(&bench, granted.id).await);
    }
    let renewal = v1::KeepAliveRequest { session_id, oldest_revision: 0 };
    let error = session::keep_alive(&bench.directory, renewal).await.unwrap_err();
    assert_eq!(error.reason, Reason::SessionExpired);
}

#[tokio::test(start_paused = true)]
async fn after_a_start_every_session_has_a_full_ttl() {
    let bench = Bench::start().await;
    let session = bench.session().await;
    let held = lock(&bench, exclusive("/f", session)).await.unwrap();
    tokio::time::sleep(Duration::from_millis(9_000)).await;
    let bench = Bench::over(bench.store.clone()).await;
    let _loops = Loops::start(&bench.directory);
    tokio::time::sleep(Duration::from_millis(9_000)).await;
    assert_eq!(lock(&bench, exclusive("/f", 0)).await.unwrap_err().reason, Reason::LockHeld);
    let made = v1::CommitRequest { path: "/f".into(), token: held.token, unlock: true, ..Default::default() };
    commit(&bench, made).await.unwrap();
    let oldest_read = || bench.directory.sessions.oldest_read().map(|revision| revision.0);
    assert_eq!(oldest_read(), Some(0));
    let renew_lock = async |oldest_revision| {
        let renewal = v1::RenewLockRequest { session_id: session, oldest_revision, ..Default::default() };
        crate::ops::lock::renew_lock(&bench.directory, renewal).await.unwrap();
    };
    renew_lock(None).await;
    assert_eq!(oldest_read(), Some(0), "it said nothing of what it reads");
    let renewal = v1::KeepAliveRequest { session_id: session, oldest_revision: 7 };
    session::keep_alive(&bench.directory, renewal).await.unwrap();
    assert_eq!(oldest_read(), Some(7));
    for (told, holds) in [(None, Some(7)), (Some(5), Some(5)), (None, Some(5)), (Some(0), None), (None, None)]
    {
        renew_lock(told).await;
        assert_eq!(oldest_read(), holds, "told {told:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn opening_is_repeatable_and_bounded() {
    let bench = Bench::start().await;
    let request = v1::OpenRequest {
        request_id: Some(v1::RequestId {
            uuid: "5e1bd0c0-91a9-4f8d-a7f5-1b8f6c7a0003".into(),
            ..Default::default()
        }),
        ttl_ms: 3_000,
        owner: "ann".into(),
    };
    let first = session::open(&bench.directory, request.clone()).await.unwrap();
    assert_eq!((first.ttl_ms, first.generation), (3_000, 1));
    assert_eq!(session::open(&bench.directory, request).await.unwrap(), first);
    assert_eq!(count(&bench, key::sessions()).await, 1);
    for ttl_ms in [999, 600_001] {
        let request = v1::OpenRequest { ttl_ms, ..Default::default() };
        assert_eq!(session::open(&bench.directory, request).await.unwrap_err().reason, Reason::LimitExceeded);
    }
    let owner = "o".repeat(256);
    let request = v1::OpenRequest { owner, ..Default::default() };
    assert_eq!(session::open(&bench.directory, request).await.unwrap_err().reason, Reason::LimitExceeded);
}

#[tokio::test(start_paused = true)]
async fn open_grants_are_bounded_and_their_ends_make_room() {
    let bench = Bench::start().await;
    let session_id = bench.session().await;
    let request = v1::GrantRequest { session_id, count: 1, ..Default::default() };
    for _ in 0..GRANTS_PER_SESSION_MAX {
        grant::grant(&bench.directory, request.clone()).await.unwrap();
    }
    let error = grant::grant(&bench.directory, request.clone()).await.unwrap_err();
    assert_eq!(error.reason, Reason::LimitExceeded);
    // Old grants are closed while the session lives on.
    let _loops = Loops::start(&bench.directory);
    let start = tokio::time::Instant::now();
    until("old grants are closed", || async {
        bench.renew(session_id);
        count(&bench, key::all_session_grants()).await == 0
    })
    .await;
    assert!(start.elapsed() >= Duration::from_secs(3_600));
    bench.heartbeat();
    grant::grant(&bench.directory, request).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn answers_named_by_a_uuid_are_kept_for_ten_minutes() {
    let bench = Bench::start().await;
    let _loops = Loops::start(&bench.directory);
    let request = v1::CommitRequest {
        request_id: Some(v1::RequestId {
            uuid: "5e1bd0c0-91a9-4f8d-a7f5-1b8f6c7a0004".into(),
            ..Default::default()
        }),
        path: "/f".into(),
        ..Default::default()
    };
    commit(&bench, request).await.unwrap();
    tokio::time::sleep(Duration::from_secs(599)).await;
    assert_eq!(count(&bench, key::answer_uuids()).await, 1);
    until("the answer is forgotten", || async { count(&bench, key::answer_uuids()).await == 0 }).await;
}

#[tokio::test(start_paused = true)]
async fn a_grant_names_its_group_and_members() {
    let bench = Bench::start().await;
    let session = bench.session().await;
    let granted = bench.grant(session).await;
    let group = granted.group.unwrap();
    assert_eq!(granted.count, 256);
    assert_eq!(group.seats.len(), 3);
    assert_eq!(granted.members.len(), 3);
    assert!(granted.members.iter().all(|member| !member.endpoints.is_empty()));
    let request = v1::GrantRequest { session_id: session, path: "/none/f".into(), ..Default::default() };
    assert_eq!(grant::grant(&bench.directory, request).await.unwrap_err().reason, Reason::NotFound);
    let request = v1::GrantRequest { session_id: session, count: 65_537, ..Default::default() };
    assert_eq!(grant::grant(&bench.directory, request).await.unwrap_err().reason, Reason::LimitExceeded);
}
