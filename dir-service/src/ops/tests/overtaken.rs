//! Requests whose plan is overtaken by another one, between their decision and its turn.

use super::*;
use crate::{
    ops,
    store::{KeyRange, MetaStore as _},
    testing::HeldUp,
};
use cairn_proto::Reason;

async fn mkdir(bench: &Bench, path: &str) {
    let request =
        v1::CreateRequest { path: path.into(), kind: v1::Kind::Directory as i32, ..Default::default() };
    ops::create::create(&bench.directory, request).await.unwrap();
}

async fn rename(bench: &Bench, request: v1::RenameRequest) -> Result<v1::RenameResponse> {
    ops::rename::rename(&bench.directory, request).await
}

fn from_to(from: &str, to: &str) -> v1::RenameRequest {
    v1::RenameRequest { from: from.into(), to: to.into(), ..Default::default() }
}

async fn inode(bench: &Bench, path: &str) -> Option<u64> {
    let request = v1::LookupRequest { path: path.into(), ..Default::default() };
    match ops::lookup::lookup(&bench.directory, request).await {
        Ok(found) => Some(found.attributes.unwrap().inode),
        Err(error) => {
            assert_eq!(error.reason, Reason::NotFound, "{error:?}");
            None
        }
    }
}

/// Begins a request, has another one overtake its plan, and answers what became of it.
async fn overtaken<T: Send + 'static>(
    held: HeldUp,
    request: impl Future<Output = Result<T>> + Send + 'static,
    other: impl Future<Output = ()>,
) -> Result<T> {
    let request = tokio::spawn(request);
    held.arrived.await.expect("a plan comes");
    other.await;
    held.release.send(()).expect("it waits");
    request.await.unwrap()
}

#[tokio::test(start_paused = true)]
async fn linear_a_rename_with_a_condition_sees_the_commit_that_overtakes_it() {
    let (bench, gate) = Bench::gated().await;
    let made = create(&bench, "/a").await;
    let session = bench.session().await;
    let grant = bench.grant(session).await;
    let request = v1::RenameRequest {
        source_condition: Some(v1::Condition {
            require: Some(v1::condition::Require::Version(made.version)),
        }),
        ..from_to("/a", "/b")
    };
    let directory = bench.directory.clone();
    let renaming = async move { ops::rename::rename(&directory, request).await };
    let error = overtaken(gate.hold_next(), renaming, async {
        commit(&bench, append("/a", &grant, 0..1, 10)).await.unwrap();
    })
    .await
    .unwrap_err();
    assert_eq!(error.reason, Reason::ConditionFailed);
    assert_eq!((inode(&bench, "/a").await, inode(&bench, "/b").await), (Some(made.inode), None));
}

/// What a path led to when a request came must not be changed under the path it has got since.
#[tokio::test(start_paused = true)]
async fn linear_no_change_follows_a_directory_that_was_renamed_before_it() {
    type Request = fn(Arc<Directory>, String) -> futures::future::BoxFuture<'static, Result<()>>;
    let requests: [(&str, Request); 5] = [
        ("delete", |directory, folder| {
            let request = v1::DeleteRequest { path: format!("{folder}/f"), ..Default::default() };
            Box::pin(async move { ops::delete::delete(&directory, request).await.map(drop) })
        }),
        ("create", |directory, folder| {
            let kind = v1::Kind::File as i32;
            let request = v1::CreateRequest { path: format!("{folder}/new"), kind, ..Default::default() };
            Box::pin(async move { ops::create::create(&directory, request).await.map(drop) })
        }),
        ("set attributes", |directory, folder| {
            let path = format!("{folder}/f");
            let request = v1::SetAttributesRequest { path, mode: Some(0o600), ..Default::default() };
            Box::pin(async move { ops::set_attributes::set_attributes(&directory, request).await.map(drop) })
        }),
        ("rename from", |directory, folder| {
            let request = from_to(&format!("{folder}/f"), "/elsewhere");
            Box::pin(async move { ops::rename::rename(&directory, request).await.map(drop) })
        }),
        ("rename to", |directory, folder| {
            let request = from_to("/other", &format!("{folder}/new"));
            Box::pin(async move { ops::rename::rename(&directory, request).await.map(drop) })
        }),
    ];
    // Few directories on the way, and more than are required one by one.
    for depth in [1, 40] {
        for (name, request) in &requests {
            let (bench, gate) = Bench::gated().await;
            mkdir(&bench, "/d").await;
            let mut below = String::new();
            for number in 1..depth {
                below += &format!("/{number}");
                mkdir(&bench, &format!("/d{below}")).await;
            }
            let file = create(&bench, &format!("/d{below}/f")).await;
            let other = create(&bench, "/other").await;
            let asked = request(bench.directory.clone(), format!("/d{below}"));
            let error = overtaken(gate.hold_next(), asked, async {
                rename(&bench, from_to("/d", "/e")).await.unwrap();
                assert_eq!(inode(&bench, &format!("/e{below}/new")).await, None);
            })
            .await
            .expect_err(name);
            assert_eq!(error.reason, Reason::NotFound, "{name}: {error:?}");
            assert_eq!(inode(&bench, &format!("/e{below}/f")).await, Some(file.inode), "{name}");
            assert_eq!(inode(&bench, &format!("/e{below}/new")).await, None, "{name}");
            assert_eq!(inode(&bench, "/other").await, Some(other.inode), "{name}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn fenced_a_directory_in_which_a_name_is_locked_meanwhile_is_not_removed() {
    for recursive in [false, true] {
        let (bench, gate) = Bench::gated().await;
        mkdir(&bench, "/d").await;
        let session = bench.session().await;
        let directory = bench.directory.clone();
        let request = v1::DeleteRequest { path: "/d".into(), recursive, ..Default::default() };
        let deleting = async move { ops::delete::delete(&directory, request).await };
        let mut token = None;
        let error = overtaken(gate.hold_next(), deleting, async {
            token = lock(&bench, exclusive("/d/new", session)).await.unwrap().token;
        })
        .await
        .unwrap_err();
        assert_eq!(error.reason, Reason::NotEmpty, "recursive: {recursive}");
        let grant = bench.grant(session).await;
        let request = v1::CommitRequest { token, ..append("/d/new", &grant, 0..1, 10) };
        commit(&bench, request).await.unwrap();
        assert!(inode(&bench, "/d/new").await.is_some());
    }
}

#[tokio::test(start_paused = true)]
async fn a_lock_in_a_directory_does_not_change_when_that_was_modified() {
    let bench = Bench::start().await;
    mkdir(&bench, "/d").await;
    let modified = async || {
        let request = v1::LookupRequest { path: "/d".into(), ..Default::default() };
        ops::lookup::lookup(&bench.directory, request).await.unwrap().attributes.unwrap().mtime_ns
    };
    let session = bench.session().await;
    for path in ["/d/a", "/d/b"] {
        let before = modified().await;
        lock(&bench, exclusive(path, session)).await.unwrap();
        assert_eq!(modified().await, before);
        create(&bench, "/d/made").await;
        delete(&bench, "/d/made", None).await.unwrap();
    }
}

/// Whoever asked is gone before the plan is applied: what it opened ends by its time to live all the same.
#[tokio::test(start_paused = true)]
async fn a_session_ends_also_when_its_caller_went_away_while_it_was_opened() {
    // Until the time of the session is over, or before.
    for held_ms in [1, 15_000] {
        let (bench, gate) = Bench::gated().await;
        let _loops = Loops::start(&bench.directory);
        create(&bench, "/f").await;
        let held = gate.hold_next();
        let directory = bench.directory.clone();
        let taking = tokio::spawn(async move { ops::lock::lock(&directory, exclusive("/f", 0)).await });
        held.arrived.await.unwrap();
        taking.abort();
        tokio::time::sleep(Duration::from_millis(held_ms)).await;
        held.release.send(()).unwrap();
        tokio::time::sleep(Duration::from_millis(1)).await;
        let locks = ops::lock::list_locks(&bench.directory, v1::ListLocksRequest::default()).await.unwrap();
        assert_eq!(locks.locks.len(), usize::from(held_ms == 1), "too late, it is not opened any more");
        let taken = lock(&bench, v1::LockRequest { wait_ms: 60_000, ..exclusive("/f", 0) }).await.unwrap();
        let request = v1::UnlockRequest { path: "/f".into(), token: taken.token, ..Default::default() };
        ops::lock::unlock(&bench.directory, request).await.unwrap();
        until("nothing is left of the sessions", async || {
            let stored = bench.store.scan(sessions(), 1, None).await.unwrap().1;
            bench.directory.sessions.count() == 0 && stored.entries.is_empty()
        })
        .await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_declined_lock_leaves_no_session() {
    let bench = Bench::start().await;
    create(&bench, "/f").await;
    lock(&bench, exclusive("/f", 0)).await.unwrap();
    for _ in 0..10 {
        assert_eq!(lock(&bench, exclusive("/f", 0)).await.unwrap_err().reason, Reason::LockHeld);
    }
    assert_eq!(bench.directory.sessions.count(), 1);
}

fn delete_all(path: &str, request_id: Option<v1::RequestId>) -> v1::DeleteRequest {
    v1::DeleteRequest { path: path.into(), recursive: true, request_id, ..Default::default() }
}

/// A folder with a file that stays because it is locked, and one that goes.
async fn folder(bench: &Bench, session: u64) {
    mkdir(bench, "/d").await;
    create(bench, "/d/gone").await;
    create(bench, "/d/kept").await;
    lock(bench, exclusive("/d/kept", session)).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn retry_a_recursive_delete_that_comes_again_removes_nothing_that_was_made_since() {
    let uuid = v1::RequestId { uuid: uuid::Uuid::from_u128(7).to_string(), ..Default::default() };
    for with_session in [true, false] {
        let bench = Bench::start().await;
        let session = bench.session().await;
        folder(&bench, session).await;
        let id = if with_session { in_session(session, 7) } else { Some(uuid.clone()) };
        let request = delete_all("/d", id);
        let first = ops::delete::delete(&bench.directory, request.clone()).await.unwrap();
        assert_eq!((first.removed, first.kept.len()), (1, 1));
        create(&bench, "/d/new").await;
        let again = ops::delete::delete(&bench.directory, request).await.unwrap();
        assert_eq!(again, first);
        assert!(inode(&bench, "/d/new").await.is_some());
    }
}

#[tokio::test(start_paused = true)]
async fn retry_each_step_of_a_recursive_delete_gives_its_first_answer() {
    let bench = Bench::start().await;
    let session = bench.session().await;
    mkdir(&bench, "/d").await;
    for number in 0..1_100 {
        create(&bench, &format!("/d/{number:04}")).await;
        bench.renew(session);
    }
    let first =
        ops::delete::delete(&bench.directory, delete_all("/d", in_session(session, 1))).await.unwrap();
    assert!(first.more && first.removed == 1_024, "{first:?}");
    let again =
        ops::delete::delete(&bench.directory, delete_all("/d", in_session(session, 1))).await.unwrap();
    assert_eq!(again, first);
    assert!(inode(&bench, "/d/1099").await.is_some(), "the step was not made twice");
}

#[tokio::test(start_paused = true)]
async fn retry_two_of_the_same_recursive_delete_at_once_are_one() {
    let (bench, gate) = Bench::gated().await;
    let session = bench.session().await;
    folder(&bench, session).await;
    let request = delete_all("/d", in_session(session, 7));
    let (directory, late) = (bench.directory.clone(), request.clone());
    let mut first = None;
    let slow = async move { ops::delete::delete(&directory, late).await };
    let answer = overtaken(gate.hold_next(), slow, async {
        first = Some(ops::delete::delete(&bench.directory, request).await.unwrap());
        create(&bench, "/d/gone").await;
        // Behind where the slow one stands.
        create(&bench, "/d/later").await;
    })
    .await
    .unwrap();
    assert_eq!(Some(answer), first);
    assert!(inode(&bench, "/d/gone").await.is_some() && inode(&bench, "/d/later").await.is_some());
}

#[tokio::test(start_paused = true)]
async fn retry_a_recursive_delete_of_a_session_that_has_ended_removes_nothing() {
    let bench = Bench::start().await;
    let (ended, session) = (bench.session().await, bench.session().await);
    folder(&bench, session).await;
    let request = v1::CloseRequest { session_id: ended };
    ops::session::close(&bench.directory, request).await.unwrap();
    let request = delete_all("/d", in_session(ended, 1));
    let error = ops::delete::delete(&bench.directory, request).await.unwrap_err();
    assert_eq!(error.reason, Reason::SessionExpired);
    assert!(inode(&bench, "/d/gone").await.is_some());
}

fn sessions() -> KeyRange {
    KeyRange::prefix(cairn_core::key::sessions())
}
