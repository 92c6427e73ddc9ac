//! A generic gRPC client with no proto file does the whole job: the calls that the README shows for grpcurl.

use cairn_tests::reflect::{CallError, GenericClient};
use cluster::Cluster;
use serde_json::{Value, json};

const DIRECTORY: &str = "cairn.v1.DirectoryService";

/// The endpoint of the group's primary, as a person would pick it from the grant.
fn primary(grant: &Value) -> String {
    let id = &grant["group"]["primary_id"];
    let member = grant["members"].as_array().unwrap().iter().find(|member| member["id"] == *id).unwrap();
    let uris =
        member["endpoints"].as_array().unwrap().iter().map(|endpoint| endpoint["uri"].as_str().unwrap());
    uris.clone().find(|uri| uri.starts_with("http://")).unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_generic_client_locks_writes_commits_reads_and_deletes() {
    let cluster = Cluster::start(3).await.unwrap();
    let directory = GenericClient::connect(&cluster.directory_uri()).await.unwrap();
    for service in ["DirectoryService", "SessionService", "ClusterService"] {
        assert!(directory.services().contains(&format!("cairn.v1.{service}")), "{service}");
    }

    let lock = directory
        .unary(
            &format!("{DIRECTORY}/Lock"),
            json!({"path": "/note", "mode": "LOCK_MODE_EXCLUSIVE", "ttl_ms": 60000, "grant_count": 1, "owner": "me"}),
        )
        .await
        .unwrap();
    let grant = &lock["grant"];
    let files = GenericClient::connect(&primary(grant)).await.unwrap();
    assert!(files.services().contains(&"cairn.v1.FileService".to_owned()));
    assert!(
        !files.services().contains(&"cairn.v1.DirectoryService".to_owned()),
        "what is listed answers there"
    );

    // "hello\n" in base64, as JSON has bytes.
    let written = files
        .unary(
            "cairn.v1.FileService/Write",
            json!({
                "chunk": {"grant_id": grant["id"]},
                "group_id": grant["group"]["id"],
                "epoch": grant["group"]["epoch"],
                "data": "aGVsbG8K",
                "finish": {"length": 6},
            }),
        )
        .await
        .unwrap();
    let receipt = &written["receipt"];
    assert_eq!(receipt["holder_ids"].as_array().unwrap().len(), 3, "{receipt}");

    // Somebody else is declined while the lock is held, and told by whom.
    let declined = directory
        .unary(&format!("{DIRECTORY}/Lock"), json!({"path": "/note", "mode": "LOCK_MODE_EXCLUSIVE"}))
        .await
        .unwrap_err();
    match declined {
        CallError::Status(status) => assert!(status.message().contains("me"), "{status:?}"),
        other => panic!("{other:?}"),
    }
    directory
        .unary(&format!("{DIRECTORY}/RenewLock"), json!({"session_id": lock["session_id"]}))
        .await
        .unwrap();

    let committed = directory
        .unary(
            &format!("{DIRECTORY}/Commit"),
            json!({
                "path": "/note",
                "token": lock["token"],
                "edits": [{"truncate": {}}, {"append": {}}],
                "receipts": [receipt],
                "unlock": true,
            }),
        )
        .await
        .unwrap();
    assert_eq!(committed["attributes"]["size"], "6");

    let found = directory
        .unary(&format!("{DIRECTORY}/Lookup"), json!({"path": "/note", "with_extents": true}))
        .await
        .unwrap();
    let chunk = &found["extents"][0]["chunk"]["chunk"];
    let read = files.call("cairn.v1.FileService/Read", json!({"chunk": chunk})).await.unwrap();
    assert_eq!(read[0]["data"], "aGVsbG8K");

    // The same file through the client library.
    let client = cluster.client().await.unwrap();
    assert_eq!(&client.read("/note").await.unwrap()[..], b"hello\n");

    directory.unary(&format!("{DIRECTORY}/Delete"), json!({"path": "/note"})).await.unwrap();
    let gone = directory.unary(&format!("{DIRECTORY}/Lookup"), json!({"path": "/note"})).await.unwrap_err();
    assert!(matches!(gone, CallError::Status(status) if status.code() == tonic::Code::NotFound));
    cluster.shutdown().await.unwrap();
}
