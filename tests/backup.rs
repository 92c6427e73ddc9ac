//! `cairn backup` of a running directory and `cairn restore`: over real processes.

use cairn_proto::v1::StatusResponse;
use cairn_tests::{eventually::eventually, services::Services};
use client_lib::Client;
use std::{path::Path, time::Duration};

const LIMIT: Duration = Duration::from_secs(120);

async fn write(client: &Client, names: impl Iterator<Item = u32>) {
    for number in names {
        client.write(&format!("/file {number}"), content(number)).await.unwrap();
    }
}

fn content(number: u32) -> Vec<u8> {
    vec![number as u8; 3_000 + number as usize]
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_is_restored_and_says_what_is_gone_and_what_it_does_not_know() {
    // Collection is quick, so that what is deleted after the backup is gone.
    let flags = ["--session-ttl-ms", "1000", "--grace-ms", "200", "--compare-ms", "1000"];
    let mut services = Services::prepare(3, &flags);
    services.start_all();
    services.ready().await;
    let cairn = services.cairn();
    let client = Client::connect(&[services.directory_uri()]).await.unwrap();
    write(&client, 0..40).await;
    let backup = services.folder().join("backups");

    // While others write: the backup is of one revision.
    let writing = client.clone();
    let writer = tokio::spawn(async move {
        for number in 0.. {
            writing.write(&format!("/meanwhile {number}"), "x").await.unwrap();
        }
    });
    let first = cairn.json(&["backup", "--json", text(&backup)]).await;
    let second = cairn.json(&["backup", "--json", text(&backup)]).await;
    writer.abort();
    let _ = writer.await;
    assert!(second["revision"].as_u64() >= first["revision"].as_u64(), "{first} {second}");
    let names: Vec<_> = std::fs::read_dir(&backup).unwrap().map(|one| one.unwrap().file_name()).collect();
    assert_eq!(names, ["directory.backup"], "one whole file");
    let foreign = services.folder().join("directory");
    cairn.run(&["backup", text(&foreign)]).await.failed(1, &["not a folder of backups"]);

    // The directory loses its store when files were deleted, renamed and made since.
    for number in 0..10 {
        client.delete(&format!("/file {number}")).await.unwrap();
    }
    client.rename("/file 20", "/renamed").await.unwrap();
    write(&client, 100..110).await;
    let held = |status: &StatusResponse| -> Vec<u64> {
        status.file_servers.iter().map(|server| server.usage.unwrap_or_default().chunks).collect()
    };
    // What the writer left when it was ended may be a chunk that no file has.
    let live = eventually("what was deleted is collected", LIMIT, || async {
        let status = services.status().await?;
        let (chunks, held) = (status.chunks.unwrap_or_default(), held(&status));
        // Each file has one chunk: before that is so, what was deleted is not even accounted for.
        let accounted = chunks.total == status.files && chunks.awaiting_collection == 0;
        let collected = accounted && held.iter().all(|held| *held <= chunks.total + 2);
        if collected && chunks.healthy == chunks.total {
            Ok(chunks.total)
        } else {
            Err(format!("{chunks:?} {held:?}"))
        }
    })
    .await;
    client.close().await.unwrap();
    let data = services.data("directory");
    let refused = cairn.run(&["restore", text(&backup), "--data", text(&data)]).await;
    refused.failed(1, &["not empty"]);
    services.directory.kill9();
    std::fs::rename(&data, services.folder().join("lost")).unwrap();
    let restored = cairn.json(&["restore", "--json", text(&backup), "--data", text(&data)]).await;
    assert_eq!(restored["revision"], second["revision"]);
    assert_eq!(restored["records"], second["records"]);
    services.directory.start();
    services.ready().await;

    let status = eventually("all is compared", LIMIT, || async {
        let status = services.status().await.unwrap();
        let chunks = status.chunks.unwrap();
        if status.verified && chunks.lost == 10 && chunks.quarantined > 0 { Ok(status) } else { Err(chunks) }
    })
    .await;
    assert_eq!(status.directory.as_ref().unwrap().generation, restored["generation"].as_u64().unwrap());
    assert!(
        held(&status).iter().all(|held| *held >= live),
        "nothing was collected: {:?} {live}",
        held(&status)
    );
    let builder = Client::builder().directory(services.directory_uri()).deadline(Duration::from_secs(5));
    let client = builder.build().unwrap();
    for number in 10..40 {
        assert_eq!(client.read(&format!("/file {number}")).await.unwrap(), content(number));
    }
    assert!(!client.exists("/renamed").await.unwrap() && !client.exists("/file 100").await.unwrap());
    for number in [0, 9] {
        let path = format!("/file {number}");
        assert_eq!(client.stat(&path).await.unwrap().size, content(number).len() as u64, "the name is back");
        assert!(client.read(&path).await.is_err(), "its bytes are gone, and nothing is made up");
    }
    // It goes on, with ids that were never given before.
    write(&client, 200..210).await;
    for number in 200..210 {
        assert_eq!(client.read(&format!("/file {number}")).await.unwrap(), content(number));
    }
    // The same backup once more: the file servers know that generation, so it must be said.
    services.directory.kill9();
    std::fs::remove_dir_all(&data).unwrap();
    cairn.run(&["restore", text(&backup), "--data", text(&data)]).await.good();
    services.directory.start();
    eventually("it says that its generation is too low", LIMIT, || async {
        let directory = services.status().await?.directory.unwrap_or_default();
        assert_ne!(directory.mode, "serving");
        if directory.reason.contains("--above") { Ok(()) } else { Err(directory.reason) }
    })
    .await;
    services.directory.kill9();
    std::fs::remove_dir_all(&data).unwrap();
    let generation = restored["generation"].to_string();
    let words = ["restore", text(&backup), "--data", text(&data), "--above", &generation];
    cairn.run(&words).await.good();
    services.directory.start();
    services.ready().await;
    let client = Client::connect(&[services.directory_uri()]).await.unwrap();
    assert_eq!(client.read("/file 30").await.unwrap(), content(30));
    assert!(!client.exists("/file 200").await.unwrap());
}

/// Files of the measured store.
fn measured_files() -> u64 {
    std::env::var("CAIRN_BACKUP_FILES").map_or(1_000_000, |files| files.parse().unwrap())
}

/// Makes a directory's store with so many files, as records: two for each.
async fn fill(data: &Path, files: u64) {
    use cairn_core::record::Record as _;
    use cairn_core::{attributes, key, plan::Versioned, record};
    use cairn_proto::id::{Generation, InodeId, ROOT_INODE, Revision};
    use dir_service::store::{JournaledConfig, Restore, StoreIdentity, open_index};
    use std::sync::Arc;

    let cluster_id = "0f1e2d3c-0000-4000-8000-000000000001";
    let disk: Arc<dyn disk::Disk> = disk::RealDisk::open(data).unwrap();
    let dir = Path::new("store-0f1e2d3c-0000-4000-8000-000000000001");
    disk.create_dir_all(dir).await.unwrap();
    let index = open_index(&disk, dir, None).await.unwrap();
    let identity = StoreIdentity { cluster_id: cluster_id.into(), generation: Generation(1) };
    let revision = Revision(files + 10);
    let mut restore = Restore::begin(disk.clone(), dir, identity, revision, index).await.unwrap();
    let value = |bytes| Versioned { value: bytes, revision: Revision(1) };
    let root = attributes::root(Generation(1), 1);
    let settings = record::Settings { generation: 1, ..Default::default() };
    restore.load(key::settings(), value(settings.to_bytes())).await.unwrap();
    restore.load(key::inode(ROOT_INODE), value(root.to_bytes())).await.unwrap();
    let counter = record::Counter { next: files + 10_000 };
    restore.load(key::counter("id"), value(counter.to_bytes())).await.unwrap();
    for number in 0..files {
        let id = InodeId(2_000 + number);
        let extent = record::Extent { length: 4_096, grant: 1_500 + number / 4_096, ..Default::default() };
        let inode = record::Inode {
            kind: cairn_proto::v1::Kind::File as i32,
            version: 1,
            nlink: 1,
            size: 4_096,
            layout: Some(record::Layout { extents: vec![extent], ..Default::default() }),
            ..root.clone()
        };
        let dentry = record::Dentry { inode: id.0, kind: inode.kind };
        restore.load(key::inode(id), value(inode.to_bytes())).await.unwrap();
        let name = format!("a file of the measured store {number:07}");
        restore.load(key::dentry(ROOT_INODE, &name), value(dentry.to_bytes())).await.unwrap();
    }
    restore.finish(JournaledConfig::default()).await.unwrap().close().await.unwrap();
    std::fs::write(data.join("directory.current"), dir.to_str().unwrap()).unwrap();
}

/// Figures for docs/operations.md: `cargo test --release -p tests --test backup -- --ignored --nocapture`.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes; it measures"]
async fn a_million_files_are_backed_up_restored_and_rebuilt() {
    use std::time::Instant;
    let files = measured_files();
    let mut services = Services::prepare(3, &[]);
    let data = services.data("directory");
    fill(&data, files).await;
    services.start_all();
    services.ready().await;
    let shipped = Instant::now();
    eventually("the carriers have it", LIMIT * 5, || async {
        let directory = services.status().await?.directory.unwrap_or_default();
        let all = !directory.carrier_ids.is_empty() && directory.shipped_revision >= directory.revision;
        if all { Ok(()) } else { Err(format!("{directory:?}")) }
    })
    .await;
    println!("{files} files: carried by a majority after {:?}", shipped.elapsed());
    let cairn = services.cairn();
    let backup = services.folder().join("backup");
    let backed_up = cairn.run_within(&["backup", "--json", text(&backup)], b"", LIMIT * 5).await.good();
    println!("backup: {:?}, {}", backed_up.took, backed_up.text().trim());

    let lose = |services: &mut Services| {
        services.directory.kill9();
        std::fs::remove_dir_all(services.data("directory")).unwrap();
    };
    lose(&mut services);
    let began = Instant::now();
    services.directory.start();
    services.ready_within(LIMIT * 5).await;
    println!("rebuild from the file servers: serves after {:?}", began.elapsed());

    lose(&mut services);
    let words = ["restore", "--json", text(&backup), "--data", text(&data)];
    let restored = cairn.run_within(&words, b"", LIMIT * 5).await.good();
    println!("restore: {:?}, {}", restored.took, restored.text().trim());
    let began = Instant::now();
    services.directory.start();
    services.ready_within(LIMIT * 5).await;
    println!("the restored directory serves after {:?}", began.elapsed());
    println!("memory: {}", services.memory_peaks().0);
    let client = Client::connect(&[services.directory_uri()]).await.unwrap();
    let name = format!("/a file of the measured store {:07}", files - 1);
    assert_eq!(client.stat(&name).await.unwrap().size, 4_096);
}
