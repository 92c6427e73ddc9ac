//! What every disk must do, run against each implementation.

use std::future::Future;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;

use crate::durable::{read_file, remove_file_durable, write_file_durable};
use crate::{Disk, Open, RealDisk, SimDisk};

async fn on_all<F: Future<Output = ()>>(test: impl Fn(Arc<dyn Disk>) -> F) {
    let dir = tempfile::tempdir().unwrap();
    test(RealDisk::open(dir.path().join("a/data")).unwrap()).await;
    test(Arc::new(SimDisk::new(1, 64 << 20))).await;
}

fn p(path: &str) -> &Path {
    Path::new(path)
}

fn b(bytes: &'static [u8]) -> Bytes {
    Bytes::from_static(bytes)
}

async fn names(disk: &dyn Disk, dir: &str) -> Vec<(String, bool, u64)> {
    let all = disk.list(p(dir)).await.unwrap();
    all.into_iter().filter(|e| e.name != "LOCK").map(|e| (e.name, e.is_dir, e.len)).collect()
}

#[tokio::test]
async fn opening_follows_the_mode() {
    on_all(|disk| async move {
        for how in [Open::Read, Open::ReadWrite] {
            assert_eq!(disk.open(p("f"), how).await.unwrap_err().kind(), ErrorKind::NotFound);
        }
        assert_eq!(disk.open(p("no/f"), Open::Create).await.unwrap_err().kind(), ErrorKind::NotFound);
        let file = disk.open(p("f"), Open::CreateNew).await.unwrap();
        file.write_at(0, vec![b(b"x")]).await.unwrap();
        assert_eq!(disk.open(p("f"), Open::CreateNew).await.unwrap_err().kind(), ErrorKind::AlreadyExists);
        assert_eq!(disk.open(p("f"), Open::Create).await.unwrap().len().await.unwrap(), 1);
        let file = disk.open(p("f"), Open::Read).await.unwrap();
        assert!(file.write_at(0, vec![b(b"x")]).await.is_err());
        disk.create_dir_all(p("d")).await.unwrap();
        assert!(disk.open(p("d"), Open::Read).await.is_err());
        assert!(disk.open(p("f/g"), Open::Create).await.is_err());
    })
    .await;
}

#[tokio::test]
async fn paths_cannot_leave_the_root() {
    on_all(|disk| async move {
        for path in ["/etc/passwd", "../x", "a/../../x", "..", ""] {
            let error = disk.open(p(path), Open::Create).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{path}");
            assert_eq!(disk.rename(p("a"), p(path)).await.unwrap_err().kind(), ErrorKind::InvalidInput);
            assert_eq!(disk.remove_file(p(path)).await.unwrap_err().kind(), ErrorKind::InvalidInput);
        }
        assert_eq!(disk.list(p("/")).await.unwrap_err().kind(), ErrorKind::InvalidInput);
        assert_eq!(disk.create_dir_all(p("../x")).await.unwrap_err().kind(), ErrorKind::InvalidInput);
    })
    .await;
}

#[tokio::test]
async fn bytes_come_back() {
    on_all(|disk| async move {
        let file = disk.open(p("f"), Open::Create).await.unwrap();
        file.write_at(3, vec![b(b"abc"), Bytes::new(), b(b"def")]).await.unwrap();
        assert_eq!(file.len().await.unwrap(), 9);
        assert_eq!(file.read_at(0, 100).await.unwrap(), b(b"\0\0\0abcdef"));
        assert_eq!(file.read_at(8, 1).await.unwrap(), b(b"f"));
        assert_eq!(file.read_at(9, 1).await.unwrap(), b(b""));
        assert_eq!(file.read_at(1 << 40, 10).await.unwrap(), b(b""));
        assert_eq!(file.read_at(4, usize::MAX).await.unwrap(), b(b"bcdef"));
        // More slices and more bytes than one call takes.
        let parts: Vec<Bytes> = (0..3000u32).map(|i| Bytes::from(vec![i as u8; 700])).collect();
        file.write_at(5000, parts.clone()).await.unwrap();
        file.write_back(0, 1 << 20).await.unwrap();
        file.sync().await.unwrap();
        assert_eq!(file.read_at(5000, 3 << 20).await.unwrap(), parts.concat());
        file.set_len(6000).await.unwrap();
        file.set_len(7000).await.unwrap();
        assert_eq!(file.read_at(5990, 2000).await.unwrap()[10..], [0; 1000]);
    })
    .await;
}

#[tokio::test]
async fn allocating_keeps_and_punching_zeroes() {
    on_all(|disk| async move {
        let file = disk.open(p("f"), Open::Create).await.unwrap();
        file.write_at(0, vec![Bytes::from(vec![7; 10_000])]).await.unwrap();
        file.allocate(0, 20_000).await.unwrap();
        let mut expected = vec![7; 10_000];
        expected.resize(20_000, 0);
        assert_eq!(file.read_at(0, 30_000).await.unwrap(), expected);
        file.punch(100, 9000).await.unwrap();
        expected[100..9100].fill(0);
        assert_eq!(file.read_at(0, 30_000).await.unwrap(), expected);
        assert_eq!(file.len().await.unwrap(), 20_000);
    })
    .await;
}

#[tokio::test]
async fn names_change() {
    on_all(|disk| async move {
        disk.create_dir_all(p("a/b/c")).await.unwrap();
        disk.create_dir_all(p("a/b")).await.unwrap();
        let file = disk.open(p("a/z"), Open::Create).await.unwrap();
        file.write_at(0, vec![b(b"12")]).await.unwrap();
        disk.open(p("a/y"), Open::Create).await.unwrap();
        let expected = [("b".into(), true, 0), ("y".into(), false, 0), ("z".into(), false, 2)];
        assert_eq!(names(&*disk, "a").await, expected);
        disk.rename(p("a/z"), p("a/y")).await.unwrap();
        disk.rename(p("a/y"), p("a/b/x")).await.unwrap();
        assert_eq!(names(&*disk, "a/b").await, [("c".into(), true, 0), ("x".into(), false, 2)]);
        assert_eq!(disk.rename(p("a/y"), p("q")).await.unwrap_err().kind(), ErrorKind::NotFound);
        disk.remove_file(p("a/b/x")).await.unwrap();
        assert_eq!(file.read_at(0, 9).await.unwrap(), b(b"12"), "an open handle goes on");
        assert_eq!(disk.remove_file(p("a/b/x")).await.unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(disk.remove_dir(p("a/b")).await.unwrap_err().kind(), ErrorKind::DirectoryNotEmpty);
        disk.remove_dir(p("a/b/c")).await.unwrap();
        disk.sync_dir(p("a/b")).await.unwrap();
        disk.sync_dir(p("")).await.unwrap();
        assert_eq!(names(&*disk, "").await, [("a".into(), true, 0)]);
        assert!(disk.space(p("a")).await.unwrap().free_bytes > 0);
    })
    .await;
}

#[tokio::test]
async fn durable_files_are_whole() {
    on_all(|disk| async move {
        let path = p("conf");
        assert_eq!(read_file(&*disk, path, 10).await.unwrap(), None);
        write_file_durable(&*disk, path, b(b"0123456789")).await.unwrap();
        write_file_durable(&*disk, path, b(b"one")).await.unwrap();
        assert_eq!(read_file(&*disk, path, 3).await.unwrap(), Some(b(b"one")));
        let error = read_file(&*disk, path, 2).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidData);
        assert!(error.to_string().contains("conf"), "{error}");
        remove_file_durable(&*disk, path).await.unwrap();
        remove_file_durable(&*disk, path).await.unwrap();
        assert_eq!(names(&*disk, "").await, []);
    })
    .await;
}

#[tokio::test]
async fn a_data_directory_has_one_owner() {
    let dir = tempfile::tempdir().unwrap();
    let first = RealDisk::open(dir.path()).unwrap();
    let error = RealDisk::open(dir.path()).unwrap_err();
    assert!(error.to_string().contains("in use by another process"), "{error}");
    drop(first);
    RealDisk::open(dir.path()).unwrap();
}
