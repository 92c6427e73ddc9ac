//! Data of earlier formats opens and verifies, data of later ones is refused by name.
//!
//! The sets are in `tests/data/golden/FORMAT/`. Whoever changes a format writes a new one, beside the old ones:
//! `CAIRN_GOLDEN_WRITE=2 cargo test -p tests --test upgrade`.

use cairn_proto::{checksum::crc64, host::Host};
use cairn_tests::{golden, healthy, seed, shipped};
use client_lib::{Client, WriteOptions};
use cluster::Cluster;
use disk::RealDisk;
use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

/// What is in every set. Content can be computed from the name.
const FILES: [(&str, usize); 6] = [
    ("/empty", 0),
    ("/small", 100),
    ("/in/a/folder/blocks", 9_000),
    ("/Grüße 世界", 5),
    ("/large", 70_000),
    ("/many extents", 40 * 100),
];
const SERVERS: usize = 3;

fn content(path: &str, length: usize) -> Vec<u8> {
    // Letters: a set should pack well for the repository.
    (0..length).map(|at| path.as_bytes()[(at / 64 + at) % path.len()]).collect()
}

async fn start(data: &Path) -> Cluster {
    let cluster = Cluster::builder().file_servers(SERVERS).data(data).build_and_start().await.unwrap();
    cluster.wait_ready().await.unwrap();
    cluster
}

/// Fills a cluster with everything that has a form on disk, and stops it.
async fn write_set(set: &Path) {
    let work = tempfile::tempdir().unwrap();
    let cluster = start(work.path()).await;
    let client = cluster.client().await.unwrap();
    client.mkdir_all("/in/a/folder").await.unwrap();
    for (path, length) in FILES {
        let bytes = content(path, length);
        if path == "/many extents" {
            // More than stand in the inode's record: a page of them.
            for at in (0..length).step_by(100).rev() {
                let mut file = client.open_options().write(true).create(true).open(path).await.unwrap();
                file.write_at(at as u64, bytes[at..at + 100].to_vec()).await.unwrap();
                file.close().await.unwrap();
            }
            continue;
        }
        client
            .write_with(path, bytes, WriteOptions::new().xattr("user.kind", b"golden".to_vec()))
            .await
            .unwrap();
    }
    client.write("/deleted", "gone").await.unwrap();
    client.delete("/deleted").await.unwrap();
    client.write("/old name", "moved").await.unwrap();
    client.rename("/old name", "/in/new name").await.unwrap();
    healthy(&cluster, Duration::from_secs(60)).await;
    shipped(&cluster).await;
    client.close().await.unwrap();
    cluster.shutdown().await.unwrap();
    golden::pack(work.path(), set).unwrap();
    println!("{} bytes in {}", fs::metadata(set).unwrap().len(), set.display());
}

async fn verify(client: &Client, context: &str) {
    for (path, length) in FILES {
        assert_eq!(&client.read(path).await.unwrap()[..], content(path, length), "{context}: {path}");
    }
    assert_eq!(&client.read("/in/new name").await.unwrap()[..], b"moved", "{context}");
    for gone in ["/deleted", "/old name"] {
        assert!(!client.exists(gone).await.unwrap(), "{context}: {gone}");
    }
}

/// The sets of all formats, oldest first.
fn sets() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> =
        fs::read_dir(golden::folder()).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    assert!(!folders.is_empty(), "no golden sets");
    folders.iter().map(|folder| folder.join("data.pack")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn data_of_every_format_opens_verifies_and_goes_on() {
    if let Ok(format) = std::env::var("CAIRN_GOLDEN_WRITE") {
        write_set(&golden::folder().join(format).join("data.pack")).await;
    }
    for set in sets() {
        let context = set.display().to_string();
        let work = tempfile::tempdir().unwrap();
        golden::unpack(&set, work.path()).unwrap();
        let cluster = start(work.path()).await;
        let client = cluster.client().await.unwrap();
        verify(&client, &context).await;
        // Every copy, compared by the servers with what the directory's records say.
        healthy(&cluster, Duration::from_secs(60)).await;
        client.write("/new", "written by a later program").await.unwrap();
        client.write("/small", content("/small", 100)).await.unwrap();
        shipped(&cluster).await;
        // The copies of the journal are a format too.
        cluster.kill_directory().await;
        cluster.lose_directory_store().await.unwrap();
        cluster.restart_directory().await.unwrap();
        cluster.wait_ready().await.unwrap();
        let client = cluster.client().await.unwrap();
        verify(&client, &format!("{context}, rebuilt")).await;
        assert_eq!(&client.read("/new").await.unwrap()[..], b"written by a later program");
        cluster.shutdown().await.unwrap();
    }
}

/// Without its index the directory makes it again from the journal, where that is whole.
#[tokio::test(flavor = "multi_thread")]
async fn an_index_of_an_earlier_format_can_be_left_behind() {
    for set in sets() {
        let work = tempfile::tempdir().unwrap();
        golden::unpack(&set, work.path()).unwrap();
        for entry in fs::read_dir(work.path().join("directory")).unwrap() {
            let path = entry.unwrap().path();
            if path.file_name().unwrap().to_str().unwrap().starts_with("index") {
                fs::remove_file(path).unwrap();
            }
        }
        for number in 1..=SERVERS {
            fs::remove_file(work.path().join(format!("file-server-{number}/chunks/index"))).unwrap();
        }
        let cluster = start(work.path()).await;
        verify(&cluster.client().await.unwrap(), "without indexes").await;
        cluster.shutdown().await.unwrap();
    }
}

/// A file of a set with another version in it, its checksums right.
struct Newer {
    /// Below the data of one service.
    file: PathBuf,
    /// Position and bytes of the version.
    version: (usize, &'static [u8]),
    /// A checksum: of which bytes, and where it stands.
    sums: Vec<(std::ops::Range<usize>, usize)>,
}

impl Newer {
    fn make(&self) {
        let mut bytes = fs::read(&self.file).unwrap();
        let (at, version) = self.version;
        bytes[at..at + version.len()].copy_from_slice(version);
        for (of, at) in &self.sums {
            let sum = crc64(&bytes[of.clone()]);
            bytes[*at..at + 8].copy_from_slice(&sum.to_le_bytes());
        }
        fs::write(&self.file, bytes).unwrap();
    }
}

/// The first file with this ending below a folder.
fn find(folder: &Path, ending: &str) -> PathBuf {
    let found = cairn_tests::trees::walk(folder)
        .into_iter()
        .find(|(path, is_file)| *is_file && path.to_str().is_some_and(|path| path.ends_with(ending)));
    folder.join(found.unwrap_or_else(|| panic!("no file {ending} in {}", folder.display())).0)
}

/// Starts a service on its data; answers what it says when it refuses.
async fn refusal(data: &Path, is_directory: bool) -> String {
    let (disk, host) = (RealDisk::open(data).unwrap(), Host::system(seed("CAIRN_SEED")));
    let refused = if is_directory {
        dir_service::App::build(dir_service::Config::default(), disk, host).await.map(drop)
    } else {
        let config =
            file_service::Config { advertise: vec!["http://127.0.0.1:1".into()], ..Default::default() };
        file_service::App::build(config, disk, host).await.map(drop)
    };
    match refused {
        Ok(()) => "nothing: it started".to_owned(),
        Err(error) => error.to_string(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn data_of_a_later_format_is_refused_by_its_version() {
    let set = sets().pop().unwrap();
    let work = tempfile::tempdir().unwrap();
    let fresh = |name: &str| {
        let folder = work.path().join(name);
        golden::unpack(&set, &folder).unwrap();
        folder
    };
    let segment = |file| Newer {
        file,
        version: (8, &[2, 0, 0, 0]),
        // Both copies of the header.
        sums: vec![(0..56, 56)],
    };
    let tail = |file: &Path, from_end: usize| fs::metadata(file).unwrap().len() as usize - from_end;

    let folder = fresh("store.meta");
    let file = find(&folder.join("directory"), "store.meta");
    let end = tail(&file, 8);
    Newer { file, version: (8, &[2]), sums: vec![(0..end, end)] }.make();
    let said = refusal(&folder.join("directory"), true).await;
    assert!(said.contains("store.meta has version 2") && said.contains("knows 1"), "{said}");

    let folder = fresh("journal");
    segment(find(&folder.join("directory"), "00000001.seg")).make();
    let said = refusal(&folder.join("directory"), true).await;
    assert!(said.contains("log format version 2 is not known"), "{said}");

    for record in ["identity", "topology"] {
        let folder = fresh(record);
        let data = folder.join("file-server-1");
        // Refused before its checksum is looked at, which a later version may compute in another way.
        Newer { file: data.join(record), version: (8, &[2, 0, 0, 0]), sums: vec![] }.make();
        let said = refusal(&data, false).await;
        assert!(said.contains(&format!("'{record}' has version 2")), "{said}");
    }

    let folder = fresh("chunks");
    let data = folder.join("file-server-1");
    let file = data.join("chunks/index");
    let end = tail(&file, 8);
    Newer { file, version: (8, &[2, 0, 0, 0]), sums: vec![(0..end, end)] }.make();
    let said = refusal(&data, false).await;
    assert!(said.contains("index version 2 is not known"), "{said}");

    let folder = fresh("segment");
    let data = folder.join("file-server-1");
    segment(find(&data.join("chunks/segments"), ".seg")).make();
    let said = refusal(&data, false).await;
    assert!(said.contains("log format version 2 is not known"), "{said}");

    let folder = fresh("chunk");
    let data = folder.join("file-server-1");
    fs::remove_file(data.join("chunks/index")).unwrap();
    let file = find(&data.join("chunks/files"), ".chunk");
    let header = tail(&file, 64);
    Newer { file, version: (header + 4, &[2, 0]), sums: vec![(header..header + 56, header + 56)] }.make();
    let said = refusal(&data, false).await;
    assert!(said.contains("chunk format version 2 is not known"), "{said}");
}
