//! Names through the client library: what programs and people do with files and directories.

use client_lib::{Condition, DeleteOptions, LockOptions, Reason, RenameOptions, SetAttributes, WriteOptions};
use cluster::Cluster;
use futures::StreamExt;
use std::collections::BTreeSet;

async fn cluster() -> Cluster {
    Cluster::builder().file_servers(1).memory(true).build_and_start().await.unwrap()
}

async fn names(client: &client_lib::Client, path: &str) -> Vec<String> {
    client.list(path).map(|entry| entry.unwrap().name).collect().await
}

#[tokio::test(flavor = "multi_thread")]
async fn names_are_made_listed_renamed_and_removed() {
    let cluster = cluster().await;
    let client = cluster.client().await.unwrap();
    client.mkdir("/a").await.unwrap();
    assert_eq!(client.mkdir("/a").await.unwrap_err().reason, Reason::AlreadyExists);
    assert_eq!(client.create("/missing/file").await.unwrap_err().reason, Reason::NotFound);
    client.create("/a/file").await.unwrap();
    assert_eq!(client.create("/a/file").await.unwrap_err().reason, Reason::AlreadyExists);
    assert_eq!(client.create("/a/file/below").await.unwrap_err().reason, Reason::NotADirectory);
    assert_eq!(client.read("/a").await.unwrap_err().reason, Reason::IsADirectory);
    assert_eq!(client.write("/a", "x").await.unwrap_err().reason, Reason::IsADirectory);
    assert_eq!(client.delete("/a").await.unwrap_err().reason, Reason::NotEmpty);
    assert_eq!(client.delete("/").await.unwrap_err().reason, Reason::InvalidArgument);
    assert!(client.read("/a/file").await.unwrap().is_empty());

    client.mkdir_all("/x/y/z").await.unwrap();
    assert_eq!(client.rename("/x", "/x/y/z/x").await.unwrap_err().reason, Reason::InvalidArgument);
    client.rename("/a/file", "/x/y/file").await.unwrap();
    assert_eq!(names(&client, "/a").await, Vec::<String>::new());
    assert_eq!(names(&client, "/x/y").await, ["file", "z"]);
    assert_eq!(client.rename("/x/y/file", "/a").await.unwrap_err().reason, Reason::IsADirectory);
    assert_eq!(client.rename("/a", "/x/y/file").await.unwrap_err().reason, Reason::NotADirectory);
    client.rename("/a", "/x/y/z").await.unwrap();
    assert_eq!(client.rename("/nothing", "/b").await.unwrap_err().reason, Reason::NotFound);
    assert_eq!(client.rename("/x/y", "/x").await.unwrap_err().reason, Reason::NotEmpty);
    client.rename("/x/y", "/y").await.unwrap();
    assert!(client.exists("/y/file").await.unwrap());
    client.delete("/y/file").await.unwrap();
    assert_eq!(client.delete("/y/file").await.unwrap_err().reason, Reason::NotFound);
    cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_name_the_operation_that_the_logs_know() {
    let cluster = cluster().await;
    let client = cluster.client().await.unwrap();
    let of = |error: client_lib::Error| error.detail.request.clone();
    let read = of(client.read("/absent").await.unwrap_err());
    let named = of(client.mkdir("/absent/below").await.unwrap_err());
    assert_eq!((read.len(), named.len()), (16, 16), "{read} {named}");
    assert_ne!(read, named, "each operation has its own");
    let own = cairn_proto::request::scope("of-the-caller", client.read("/absent")).await.unwrap_err();
    assert_eq!(of(own), "of-the-caller");
    cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn conditions_hold_or_nothing_changes() {
    let cluster = cluster().await;
    let client = cluster.client().await.unwrap();
    let on = |condition| WriteOptions::new().condition(condition);
    let first = client.write_with("/file", "one", on(Condition::Absent)).await.unwrap();
    assert_eq!(
        client.write_with("/file", "two", on(Condition::Absent)).await.unwrap_err().reason,
        Reason::AlreadyExists
    );
    assert_eq!(
        client.write_with("/other", "x", on(Condition::Exists)).await.unwrap_err().reason,
        Reason::NotFound
    );
    let second = client.write_with("/file", "two", on(Condition::Version(first.version))).await.unwrap();
    assert!(second.version > first.version && second.etag != first.etag);
    let error = client.write_with("/file", "three", on(Condition::Etag(first.etag))).await.unwrap_err();
    assert_eq!((error.reason, error.detail.current_version), (Reason::ConditionFailed, second.version));
    let stale = DeleteOptions::new().condition(Condition::Version(first.version));
    assert_eq!(client.delete_with("/file", stale).await.unwrap_err().reason, Reason::ConditionFailed);
    client.write("/target", "t").await.unwrap();
    let absent = RenameOptions::new().condition(Condition::Absent);
    assert_eq!(
        client.rename_with("/file", "/target", absent).await.unwrap_err().reason,
        Reason::AlreadyExists
    );
    assert_eq!(&client.read("/file").await.unwrap()[..], b"two");
    client.delete_with("/file", DeleteOptions::new().condition(Condition::Etag(second.etag))).await.unwrap();
    cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn large_directories_list_in_pages_and_trees_go_in_steps() {
    let cluster = cluster().await;
    let client = cluster.client().await.unwrap();
    client.mkdir_all("/tree/deep/er").await.unwrap();
    let mut expected = BTreeSet::new();
    for group in 0..50 {
        let made = (0..60).map(|number| {
            let name = format!("name {group:02}-{number:02} ü");
            let client = client.clone();
            async move {
                client.create(&format!("/tree/{name}")).await.unwrap();
                name
            }
        });
        expected.extend(futures::future::join_all(made).await);
    }
    client.write("/tree/deep/er/locked", "kept").await.unwrap();
    client.write("/tree/deep/free", "not kept").await.unwrap();
    expected.insert("deep".into());
    assert_eq!(names(&client, "/tree").await, Vec::from_iter(expected));

    let lock = client.lock("/tree/deep/er/locked", LockOptions::new()).await.unwrap();
    let report = client.delete_recursive("/tree").await.unwrap();
    assert_eq!(report.kept.len(), 1, "{report:?}");
    assert_eq!(report.kept[0].path, "/tree/deep/er/locked");
    assert_eq!(names(&client, "/tree").await, ["deep"]);
    assert_eq!(names(&client, "/tree/deep").await, ["er"], "what is not locked is gone");
    assert_eq!(&client.read("/tree/deep/er/locked").await.unwrap()[..], b"kept");
    lock.unlock().await.unwrap();
    let report = client.delete_recursive("/tree").await.unwrap();
    assert!(report.kept.is_empty());
    assert!(!client.exists("/tree").await.unwrap());
    cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn attributes_are_kept_and_ctime_grows() {
    let cluster = cluster().await;
    let client = cluster.client().await.unwrap();
    let made = client.create("/file").await.unwrap();
    assert_eq!(made.mode, 0o644);
    let changes = SetAttributes::new().mode(0o600).uid(7).gid(8).mtime_ns(5).xattr("user.a", "value");
    let changed = client.set_attributes("/file", changes).await.unwrap();
    assert_eq!((changed.mode, changed.uid, changed.gid, changed.mtime_ns), (0o600, 7, 8, 5));
    assert!(changed.ctime_ns > made.ctime_ns);
    assert_eq!(changed.version, made.version, "attributes are not content");
    let written = client.write("/file", "content").await.unwrap();
    assert_eq!((written.mode, written.xattrs.len()), (0o600, 1), "a new version keeps them");
    let removed = client.set_attributes("/file", SetAttributes::new().xattr("user.a", "")).await.unwrap();
    assert!(removed.xattrs.is_empty());
    cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn watchers_see_changes_in_order() {
    let cluster = cluster().await;
    let client = cluster.client().await.unwrap();
    client.mkdir("/watched").await.unwrap();
    let mut changes = Box::pin(client.watch("/watched", 0));
    let first = changes.next();
    let (first, ()) = tokio::join!(first, async {
        // The watch begins with its first poll; keep making changes until it has seen one.
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
        client.write("/watched/a", "1").await.unwrap();
    });
    let first = first.unwrap().unwrap();
    assert_eq!((first.kind(), first.name.as_str()), (client_lib::v1::ChangeKind::Created, "a"));
    client.write("/watched/a", "2").await.unwrap();
    client.rename("/watched/a", "/watched/b").await.unwrap();
    client.delete("/watched/b").await.unwrap();
    let mut seen = Vec::new();
    let mut last = first.revision;
    while seen.len() < 4 {
        let change = changes.next().await.unwrap().unwrap();
        assert!(change.revision >= last);
        last = change.revision;
        seen.push((change.kind(), change.name));
    }
    use client_lib::v1::ChangeKind::{Changed, Created, Removed};
    let expected = [(Changed, "a"), (Removed, "a"), (Created, "b"), (Removed, "b")];
    assert_eq!(seen, expected.map(|(kind, name)| (kind, name.to_owned())));
    cluster.shutdown().await.unwrap();
}
