//! RETRY: a repeated request gets the first answer and is applied once, or is told that it can no longer be known.

use cairn_proto::v1;
use cairn_tests::checks::retry::{self, Numbered};
use client_lib::{Error, Reason};
use cluster::Cluster;

async fn cluster() -> Cluster {
    Cluster::builder().file_servers(1).memory(true).build_and_start().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn retry_gives_the_first_answer_also_after_a_restart() {
    assert_eq!(retry::first_answer(Cluster::builder()).await, Ok(()));
}

#[tokio::test(flavor = "multi_thread")]
async fn retry_of_a_lock_gives_the_same_token() {
    let cluster = cluster().await;
    let mut raw = Numbered::open(&cluster).await;
    let lock = v1::LockRequest {
        request_id: raw.id(1),
        path: "/file".into(),
        mode: v1::LockMode::Exclusive as i32,
        session_id: raw.session,
        ..Default::default()
    };
    let first = raw.directory.lock(lock.clone()).await.unwrap().into_inner();
    let second = raw.directory.lock(lock).await.unwrap().into_inner();
    assert_eq!(first.token, second.token);
    let token = first.token.unwrap();
    assert!(token.revision > 0 && token.generation > 0);
    let unlock = v1::UnlockRequest {
        request_id: raw.id(2),
        path: "/file".into(),
        token: Some(token),
        ..Default::default()
    };
    raw.directory.unlock(unlock.clone()).await.unwrap();
    raw.directory.unlock(unlock).await.unwrap();
    cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn retry_by_many_at_once_is_applied_once() {
    let cluster = cluster().await;
    let raw = Numbered::open(&cluster).await;
    for sequence in 1..20 {
        let path = format!("/file-{sequence}");
        let calls =
            (0..8).map(|_| {
                let mut directory = raw.directory.clone();
                let request = raw.create(sequence, &path);
                async move {
                    directory.create(request).await.map(tonic::Response::into_inner).map_err(Error::from)
                }
            });
        let answers = futures::future::join_all(calls).await;
        let first = answers[0].as_ref().unwrap();
        assert!(answers.iter().all(|answer| answer.as_ref().unwrap() == first), "{answers:?}");
    }
    cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn retry_of_a_forgotten_request_says_so_and_applies_nothing() {
    let cluster = cluster().await;
    let mut raw = Numbered::open(&cluster).await;
    let first = raw.create(1, "/file-1");
    raw.directory.create(first.clone()).await.unwrap();
    raw.directory
        .delete(v1::DeleteRequest { request_id: raw.id(2), path: "/file-1".into(), ..Default::default() })
        .await
        .unwrap();
    // Sequence 1,025 takes the slot of sequence 1.
    raw.directory.create(raw.create(1_025, "/late")).await.unwrap();
    let error = Error::from(raw.directory.create(first).await.unwrap_err());
    assert_eq!(error.reason, Reason::OutcomeUnknown, "{error}");
    let error = Error::from(
        raw.directory
            .lookup(v1::LookupRequest { path: "/file-1".into(), ..Default::default() })
            .await
            .unwrap_err(),
    );
    assert_eq!(error.reason, Reason::NotFound);

    let other = raw.create(1_025, "/another");
    let error = Error::from(raw.directory.create(other).await.unwrap_err());
    assert_eq!(error.reason, Reason::InvalidArgument, "an id names one request: {error}");
    cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn retry_by_uuid_needs_no_session() {
    let cluster = cluster().await;
    let mut raw = Numbered::open(&cluster).await;
    let mut request = raw.create(1, "/file");
    request.request_id = Some(v1::RequestId { uuid: uuid::Uuid::new_v4().to_string(), ..Default::default() });
    let first = raw.directory.create(request.clone()).await.unwrap().into_inner();
    assert_eq!(raw.directory.create(request.clone()).await.unwrap().into_inner(), first);
    request.request_id = Some(v1::RequestId { uuid: "not one".into(), ..Default::default() });
    let error = Error::from(raw.directory.create(request).await.unwrap_err());
    assert_eq!(error.reason, Reason::InvalidArgument);
    cluster.shutdown().await.unwrap();
}
