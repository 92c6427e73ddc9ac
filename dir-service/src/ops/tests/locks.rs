use super::*;
use crate::ops::lock::{list_locks, renew_lock, unlock};
use cairn_proto::{Reason, id::FencingToken};

fn token_of(response: &v1::LockResponse) -> FencingToken {
    response.token.unwrap().into()
}

fn release(path: &str, token: Option<v1::FencingToken>) -> v1::UnlockRequest {
    v1::UnlockRequest { path: path.into(), token, force: token.is_none(), ..Default::default() }
}

#[tokio::test(start_paused = true)]
async fn a_second_writer_is_declined_at_once_with_the_holder() {
    let bench = Bench::start().await;
    create(&bench, "/f").await;
    let (ann, bob) = (bench.session().await, bench.session().await);
    lock(&bench, exclusive("/f", ann)).await.unwrap();
    tokio::time::advance(Duration::from_millis(2_500)).await;
    bench.renew(bob);
    let error = lock(&bench, exclusive("/f", bob)).await.unwrap_err();
    assert_eq!(error.reason, Reason::LockHeld);
    let held = error.detail.lock.unwrap();
    assert_eq!((held.session_id, held.path.as_str()), (ann, "/f"));
    assert_eq!(held.owner, format!("owner {ann}"));
    assert_eq!(held.expires_in_ms, 7_500);
    assert_eq!(held.token, None, "a token proves a lock: it is not shown to others");
    // The same session is no exception: two handles of one program exclude each other.
    assert_eq!(lock(&bench, exclusive("/f", ann)).await.unwrap_err().reason, Reason::LockHeld);
}

#[tokio::test(start_paused = true)]
async fn fenced_a_late_commit_of_a_former_holder_is_refused() {
    let bench = Bench::start().await;
    let _loops = Loops::start(&bench.directory);
    create(&bench, "/f").await;
    let ann = bench.session().await;
    let grant = bench.grant(ann).await;
    let first = lock(&bench, exclusive("/f", ann)).await.unwrap();
    // Ann falls silent; her session ends and Bob gets the lock.
    let bob = lock(&bench, v1::LockRequest { wait_ms: 30_000, ..exclusive("/f", 0) }).await.unwrap();
    assert!(token_of(&bob) > token_of(&first));
    let late = v1::CommitRequest { token: first.token, ..append("/f", &grant, 0..1, 10) };
    assert_eq!(commit(&bench, late.clone()).await.unwrap_err().reason, Reason::LockLost);
    // Nor without the token, nor once Bob is gone: her grant ended with her session.
    let bare = v1::CommitRequest { token: None, ..late };
    assert_eq!(commit(&bench, bare.clone()).await.unwrap_err().reason, Reason::LockHeld);
    unlock(&bench.directory, release("/f", bob.token)).await.unwrap();
    assert_eq!(commit(&bench, bare).await.unwrap_err().reason, Reason::GrantClosed);
}

#[tokio::test(start_paused = true)]
async fn fenced_tokens_grow_across_delete_and_re_create() {
    let bench = Bench::start().await;
    let session = bench.session().await;
    let mut last = FencingToken::default();
    for _ in 0..4 {
        create(&bench, "/f").await;
        let held = lock(&bench, exclusive("/f", session)).await.unwrap();
        assert!(token_of(&held) > last);
        last = token_of(&held);
        assert_eq!(delete(&bench, "/f", None).await.unwrap_err().reason, Reason::LockHeld);
        delete(&bench, "/f", held.token).await.unwrap();
        let error = unlock(&bench.directory, release("/f", held.token)).await.unwrap_err();
        assert_eq!(error.reason, Reason::LockLost, "the lock went with the file");
        let reserved = lock(&bench, exclusive("/f", session)).await.unwrap();
        assert!(token_of(&reserved) > last && reserved.attributes.is_none());
        last = token_of(&reserved);
        unlock(&bench.directory, release("/f", reserved.token)).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn shared_locks_keep_writers_away_and_go_one_by_one() {
    let bench = Bench::start().await;
    create(&bench, "/f").await;
    let session = bench.session().await;
    let shared = v1::LockRequest { mode: v1::LockMode::Shared as i32, ..exclusive("/f", session) };
    let first = lock(&bench, shared.clone()).await.unwrap();
    let second = lock(&bench, v1::LockRequest { session_id: 0, ..shared }).await.unwrap();
    assert_ne!(first.token, second.token);
    let bare = v1::CommitRequest { path: "/f".into(), ..Default::default() };
    assert_eq!(commit(&bench, bare.clone()).await.unwrap_err().reason, Reason::LockHeld);
    assert_eq!(lock(&bench, exclusive("/f", session)).await.unwrap_err().reason, Reason::LockHeld);
    let page = list_locks(&bench.directory, v1::ListLocksRequest { page_size: 1, ..Default::default() });
    let page = page.await.unwrap();
    assert_eq!((page.locks.len(), page.locks[0].token), (1, first.token));
    let rest = v1::ListLocksRequest { page_token: page.next_page_token, ..Default::default() };
    let rest = list_locks(&bench.directory, rest).await.unwrap();
    assert_eq!((rest.locks.len(), rest.locks[0].token), (1, second.token));
    assert_eq!(rest.next_page_token, "");
    unlock(&bench.directory, release("/f", first.token)).await.unwrap();
    assert_eq!(commit(&bench, bare.clone()).await.unwrap_err().reason, Reason::LockHeld);
    unlock(&bench.directory, release("/f", second.token)).await.unwrap();
    commit(&bench, bare).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn all_locks_and_reservations_are_listed_in_pages() {
    let bench = Bench::start().await;
    let session = bench.session().await;
    for number in 0..3 {
        create(&bench, &format!("/f{number}")).await;
        lock(&bench, exclusive(&format!("/f{number}"), session)).await.unwrap();
        lock(&bench, exclusive(&format!("/new{number}"), session)).await.unwrap();
    }
    let (mut paths, mut page_token) = (Vec::new(), String::new());
    loop {
        let page = v1::ListLocksRequest { page_size: 2, page_token: page_token.clone() };
        let page = list_locks(&bench.directory, page).await.unwrap();
        paths.extend(page.locks.into_iter().map(|lock| (lock.path, lock.inode != 0)));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    paths.sort();
    let expected: Vec<_> = ["/f0", "/f1", "/f2", "/new0", "/new1", "/new2"]
        .map(|path| (path.to_owned(), path.starts_with("/f")))
        .into();
    assert_eq!(paths, expected);
    let bad = v1::ListLocksRequest { page_token: "zz".into(), ..Default::default() };
    assert_eq!(list_locks(&bench.directory, bad).await.unwrap_err().reason, Reason::InvalidArgument);
}

#[tokio::test(start_paused = true)]
async fn a_reservation_keeps_the_name_and_becomes_the_files_lock() {
    let bench = Bench::start().await;
    let session = bench.session().await;
    let grant = bench.grant(session).await;
    let held = lock(&bench, exclusive("/new", session)).await.unwrap();
    assert!(held.attributes.is_none());
    let request =
        v1::CreateRequest { path: "/new".into(), kind: v1::Kind::File as i32, ..Default::default() };
    let error = crate::ops::create::create(&bench.directory, request).await.unwrap_err();
    assert_eq!(error.reason, Reason::LockHeld);
    let bare = append("/new", &grant, 0..1, 10);
    assert_eq!(commit(&bench, bare.clone()).await.unwrap_err().reason, Reason::LockHeld);
    let made = commit(&bench, v1::CommitRequest { token: held.token, ..bare }).await.unwrap();
    assert_eq!(made.attributes.unwrap().version, 1);
    // The same token goes on holding the file, which others find locked.
    assert_eq!(lock(&bench, exclusive("/new", 0)).await.unwrap_err().reason, Reason::LockHeld);
    let more = v1::CommitRequest { token: held.token, unlock: true, ..append("/new", &grant, 1..2, 10) };
    assert_eq!(commit(&bench, more).await.unwrap().attributes.unwrap().size, 20);
    let free = lock(&bench, exclusive("/new", 0)).await.unwrap();
    assert_eq!(free.attributes.unwrap().version, 2);
}

#[tokio::test(start_paused = true)]
async fn a_reservation_needs_its_parent() {
    let bench = Bench::start().await;
    assert_eq!(lock(&bench, exclusive("/none/f", 0)).await.unwrap_err().reason, Reason::NotFound);
    create(&bench, "/f").await;
    assert_eq!(lock(&bench, exclusive("/f/g", 0)).await.unwrap_err().reason, Reason::NotADirectory);
    let unspecified = v1::LockRequest { mode: 0, ..exclusive("/f", 0) };
    assert_eq!(lock(&bench, unspecified).await.unwrap_err().reason, Reason::InvalidArgument);
    let too_long = v1::LockRequest { wait_ms: 60_001, ..exclusive("/f", 0) };
    assert_eq!(lock(&bench, too_long).await.unwrap_err().reason, Reason::LimitExceeded);
}

#[tokio::test(start_paused = true)]
async fn waiters_get_the_lock_in_order_of_their_coming() {
    let bench = Arc::new(Bench::start().await);
    create(&bench, "/f").await;
    let held = lock(&bench, exclusive("/f", 0)).await.unwrap();
    let (sender, mut order) = tokio::sync::mpsc::unbounded_channel();
    for number in 0..4 {
        let (bench, sender) = (bench.clone(), sender.clone());
        tokio::spawn(async move {
            let request = v1::LockRequest { wait_ms: 8_000, ttl_ms: 60_000, ..exclusive("/f", 0) };
            let held = lock(&bench, request).await.unwrap();
            sender.send(number).unwrap();
            unlock(&bench.directory, release("/f", held.token)).await.unwrap();
        });
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(order.try_recv().is_err());
    unlock(&bench.directory, release("/f", held.token)).await.unwrap();
    for number in 0..4 {
        assert_eq!(order.recv().await, Some(number));
    }
}

#[tokio::test(start_paused = true)]
async fn a_wait_ends_at_its_deadline() {
    let bench = Bench::start().await;
    create(&bench, "/f").await;
    let session = bench.session().await;
    lock(&bench, v1::LockRequest { ttl_ms: 60_000, ..exclusive("/f", 0) }).await.unwrap();
    let before = tokio::time::Instant::now();
    let waiting = v1::LockRequest { wait_ms: 3_000, ..exclusive("/f", session) };
    let error = lock(&bench, waiting).await.unwrap_err();
    assert_eq!(error.reason, Reason::LockHeld);
    let waited = before.elapsed().as_millis();
    assert!((3_000..3_100).contains(&waited), "{waited} ms");
}

#[tokio::test(start_paused = true)]
async fn a_unary_client_holds_a_lock_by_renewing_it() {
    let bench = Bench::start().await;
    let _loops = Loops::start(&bench.directory);
    create(&bench, "/f").await;
    let held = lock(&bench, v1::LockRequest { ttl_ms: 2_000, ..exclusive("/f", 0) }).await.unwrap();
    assert_eq!(held.ttl_ms, 2_000);
    let renewal = v1::RenewLockRequest {
        session_id: held.session_id,
        token: held.token,
        path: "/f".into(),
        ..Default::default()
    };
    for _ in 0..5 {
        tokio::time::sleep(Duration::from_millis(1_500)).await;
        assert_eq!(renew_lock(&bench.directory, renewal.clone()).await.unwrap().ttl_ms, 2_000);
    }
    assert_eq!(lock(&bench, exclusive("/f", 0)).await.unwrap_err().reason, Reason::LockHeld);
    let other = v1::RenewLockRequest {
        token: Some(v1::FencingToken { generation: 1, revision: 1 }),
        ..renewal.clone()
    };
    assert_eq!(renew_lock(&bench.directory, other).await.unwrap_err().reason, Reason::LockLost);
    unlock(&bench.directory, release("/f", held.token)).await.unwrap();
    assert_eq!(renew_lock(&bench.directory, renewal.clone()).await.unwrap_err().reason, Reason::LockLost);
    let bare = v1::RenewLockRequest { token: None, ..renewal };
    let error = renew_lock(&bench.directory, bare).await.unwrap_err();
    assert_eq!(error.reason, Reason::SessionExpired, "the session went with its lock");
}

#[tokio::test(start_paused = true)]
async fn an_operator_takes_a_lock_away() {
    let bench = Bench::start().await;
    create(&bench, "/f").await;
    let held = lock(&bench, exclusive("/f", 0)).await.unwrap();
    let neither = v1::UnlockRequest { path: "/f".into(), ..Default::default() };
    assert_eq!(unlock(&bench.directory, neither).await.unwrap_err().reason, Reason::InvalidArgument);
    assert_eq!(unlock(&bench.directory, release("/f", None)).await.unwrap().ended, 1);
    assert_eq!(unlock(&bench.directory, release("/f", None)).await.unwrap().ended, 0);
    let late = v1::CommitRequest { path: "/f".into(), token: held.token, ..Default::default() };
    assert_eq!(commit(&bench, late).await.unwrap_err().reason, Reason::LockLost);
    assert_eq!(
        unlock(&bench.directory, release("/f", held.token)).await.unwrap_err().reason,
        Reason::LockLost
    );
}

#[tokio::test(start_paused = true)]
async fn retry_a_repeated_lock_or_unlock_is_the_first_one() {
    let bench = Bench::start().await;
    create(&bench, "/f").await;
    let uuid = |text: &str| Some(v1::RequestId { uuid: text.into(), ..Default::default() });
    let request = v1::LockRequest {
        request_id: uuid("0b7e0f2e-33cf-4d0f-8a4c-2b1b7f4f7a01"),
        grant_count: 4,
        ..exclusive("/f", 0)
    };
    let first = lock(&bench, request.clone()).await.unwrap();
    assert_eq!(first.grant.as_ref().unwrap().count, 4);
    assert_eq!(first.grant.as_ref().unwrap().session_id, first.session_id);
    assert_eq!(first.token.unwrap().revision, first.revision);
    assert_eq!(lock(&bench, request.clone()).await.unwrap(), first);
    let another = v1::LockRequest { ttl_ms: 5_000, ..request };
    assert_eq!(lock(&bench, another).await.unwrap_err().reason, Reason::InvalidArgument);
    let request = v1::UnlockRequest {
        request_id: uuid("0b7e0f2e-33cf-4d0f-8a4c-2b1b7f4f7a02"),
        ..release("/f", first.token)
    };
    let released = unlock(&bench.directory, request.clone()).await.unwrap();
    let next = lock(&bench, exclusive("/f", 0)).await.unwrap();
    assert_eq!(unlock(&bench.directory, request).await.unwrap(), released);
    let renewal = v1::RenewLockRequest {
        session_id: next.session_id,
        token: next.token,
        path: "/f".into(),
        ..Default::default()
    };
    renew_lock(&bench.directory, renewal).await.unwrap();
}

/// How the client library asks when it may have to wait: the number of a session would hold up the session's others.
#[tokio::test(start_paused = true)]
async fn retry_a_lock_of_a_session_may_be_named_by_a_uuid() {
    let bench = Bench::start().await;
    create(&bench, "/f").await;
    let session_id = bench.session().await;
    let request = |last: u8| v1::LockRequest {
        request_id: Some(v1::RequestId {
            uuid: format!("0b7e0f2e-33cf-4d0f-8a4c-2b1b7f4f7a{last:02}"),
            ..Default::default()
        }),
        wait_ms: 1_000,
        ..exclusive("/f", session_id)
    };
    let first = lock(&bench, request(3)).await.unwrap();
    assert_eq!(first.session_id, session_id);
    assert_eq!(lock(&bench, request(3)).await.unwrap(), first);
    assert_eq!(lock(&bench, request(4)).await.unwrap_err().reason, Reason::LockHeld);
    crate::ops::session::close(&bench.directory, v1::CloseRequest { session_id }).await.unwrap();
    assert_eq!(lock(&bench, request(3)).await.unwrap(), first, "what was answered stays so");
    assert_eq!(lock(&bench, request(4)).await.unwrap_err().reason, Reason::SessionExpired);
    lock(&bench, exclusive("/f", 0)).await.unwrap();
}

async fn mkdir(bench: &Bench, path: &str) {
    let request =
        v1::CreateRequest { path: path.into(), kind: v1::Kind::Directory as i32, ..Default::default() };
    crate::ops::create::create(&bench.directory, request).await.unwrap();
}

async fn rename(bench: &Bench, from: &str, to: &str) {
    let request = v1::RenameRequest { from: from.into(), to: to.into(), ..Default::default() };
    crate::ops::rename::rename(&bench.directory, request).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_lock_is_renewed_and_given_back_by_its_path_after_a_rename_above_it() {
    let bench = Bench::start().await;
    mkdir(&bench, "/p").await;
    create(&bench, "/p/f").await;
    let session = bench.session().await;
    for path in ["/p/f", "/p/new"] {
        let held = lock(&bench, exclusive(path, session)).await.unwrap();
        rename(&bench, "/p", "/q").await;
        // Somebody else's directory by the old name must not be mistaken for it.
        mkdir(&bench, "/p").await;
        let other = create(&bench, path).await;
        let renew = v1::RenewLockRequest {
            session_id: session,
            token: held.token,
            path: path.into(),
            ..Default::default()
        };
        renew_lock(&bench.directory, renew.clone()).await.unwrap();
        // With the session's number, and without.
        let request_id = (path == "/p/f").then(|| in_session(session, 1)).flatten();
        let request = v1::UnlockRequest { request_id, ..release(path, held.token) };
        assert_eq!(unlock(&bench.directory, request).await.unwrap().ended, 1);
        assert_eq!(renew_lock(&bench.directory, renew).await.unwrap_err().reason, Reason::LockLost);
        assert_ne!(other.inode, 0);
        delete(&bench, path, None).await.unwrap();
        delete(&bench, "/p", None).await.unwrap();
        rename(&bench, "/q", "/p").await;
    }
}

#[tokio::test(start_paused = true)]
async fn an_operator_ends_a_lock_by_the_path_that_the_list_shows() {
    let bench = Bench::start().await;
    mkdir(&bench, "/p").await;
    let session = bench.session().await;
    lock(&bench, exclusive("/p/new", session)).await.unwrap();
    rename(&bench, "/p", "/q").await;
    let listed = list_locks(&bench.directory, v1::ListLocksRequest::default()).await.unwrap().locks;
    let shown = listed[0].path.clone();
    assert_eq!(unlock(&bench.directory, release(&shown, None)).await.unwrap().ended, 1);
    assert!(list_locks(&bench.directory, v1::ListLocksRequest::default()).await.unwrap().locks.is_empty());
    let error = unlock(&bench.directory, release(&shown, None)).await.unwrap_err();
    assert_eq!(error.reason, Reason::NotFound, "/p is gone, and nothing was locked by it");
}

#[tokio::test(start_paused = true)]
async fn a_new_file_is_committed_where_its_reservation_is_after_a_rename_above_it() {
    let bench = Bench::start().await;
    mkdir(&bench, "/p").await;
    let session = bench.session().await;
    let grant = bench.grant(session).await;
    let held = lock(&bench, exclusive("/p/new", session)).await.unwrap();
    rename(&bench, "/p", "/q").await;
    let request = v1::CommitRequest {
        request_id: in_session(session, 1),
        token: held.token,
        unlock: true,
        ..append("/p/new", &grant, 0..1, 10)
    };
    // Another path of the same session proves nothing.
    let stray =
        v1::CommitRequest { path: "/q/other".into(), request_id: in_session(session, 2), ..request.clone() };
    assert_eq!(commit(&bench, stray).await.unwrap_err().reason, Reason::LockLost);
    let committed = commit(&bench, request).await.unwrap().attributes.unwrap();
    let removed = delete(&bench, "/q/new", None).await;
    assert_eq!((committed.size, removed.is_ok()), (10, true));
}

#[tokio::test(start_paused = true)]
async fn a_recursive_delete_reports_what_is_reserved_below_it() {
    let bench = Bench::start().await;
    for path in ["/a", "/a/s", "/a/t"] {
        mkdir(&bench, path).await;
    }
    create(&bench, "/a/t/f").await;
    let session = bench.session().await;
    let held = lock(&bench, exclusive("/a/s/new", session)).await.unwrap();
    let request = v1::DeleteRequest { path: "/a".into(), recursive: true, ..Default::default() };
    let answer = crate::ops::delete::delete(&bench.directory, request.clone()).await.unwrap();
    let kept: Vec<_> = answer.kept.iter().map(|lock| (lock.path.as_str(), lock.token)).collect();
    assert_eq!((kept, answer.removed, answer.more), (vec![("/a/s/new", None)], 2, false));
    unlock(&bench.directory, release("/a/s/new", held.token)).await.unwrap();
    let answer = crate::ops::delete::delete(&bench.directory, request).await.unwrap();
    assert_eq!((answer.kept.len(), answer.removed), (0, 2));
}
