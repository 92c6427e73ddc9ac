//! What the simulation promises beyond the contract: to forget, tear, flip and fill.

use super::*;
use crate::durable::{read_file, write_file_durable};

fn p(path: &str) -> &Path {
    Path::new(path)
}

async fn put(disk: &SimDisk, path: &str, byte: u8, len: usize) -> Arc<dyn DiskFile> {
    let file = disk.open(p(path), Open::Create).await.unwrap();
    file.write_at(0, vec![vec![byte; len].into()]).await.unwrap();
    file
}

async fn get(disk: &SimDisk, path: &str) -> Option<Bytes> {
    read_file(disk, p(path), 1 << 20).await.unwrap()
}

#[tokio::test]
async fn content_and_names_are_lost_apart() {
    let disk = SimDisk::new(1, 1 << 20);
    let a = put(&disk, "a", 1, 100).await;
    a.sync().await.unwrap();
    put(&disk, "b", 2, 100).await;
    disk.sync_dir(p("")).await.unwrap();
    put(&disk, "c", 3, 100).await.sync().await.unwrap();
    a.write_at(50, vec![vec![9; 100].into()]).await.unwrap();
    disk.crash(CrashKeep::Nothing);
    assert_eq!(get(&disk, "a").await.unwrap(), vec![1; 100]);
    assert_eq!(get(&disk, "b").await.unwrap(), vec![]);
    assert_eq!(get(&disk, "c").await, None);
    assert!(a.read_at(0, 1).await.is_err(), "a handle from before the crash");
    assert!(a.sync().await.is_err());
}

#[tokio::test]
async fn a_crash_tears_by_sector() {
    let disk = SimDisk::new(2, 1 << 20);
    let file = put(&disk, "a", 1, 64 << 10).await;
    file.sync().await.unwrap();
    disk.sync_dir(p("")).await.unwrap();
    file.write_at(0, vec![vec![2; 64 << 10].into()]).await.unwrap();
    disk.crash(CrashKeep::Random);
    let seen = get(&disk, "a").await.unwrap();
    assert_eq!(seen.len(), 64 << 10);
    for sector in seen.chunks(512) {
        assert!(sector.iter().all(|byte| *byte == sector[0]));
    }
    assert!(seen.contains(&1) && seen.contains(&2));
}

#[tokio::test]
async fn a_replaced_file_is_old_or_new() {
    for seed in 0..200 {
        let disk = SimDisk::new(seed, 1 << 20);
        write_file_durable(&disk, p("f"), vec![1; 3000].into()).await.unwrap();
        disk.power_off_after(seed % 8);
        let done = write_file_durable(&disk, p("f"), vec![2; 2000].into()).await;
        disk.crash(CrashKeep::Random);
        let seen = get(&disk, "f").await.unwrap();
        assert!(seen == vec![2; 2000] || done.is_err() && seen == vec![1; 3000], "seed {seed}");
    }
}

#[tokio::test]
async fn a_failed_sync_poisons_and_loses() {
    let disk = SimDisk::new(3, 1 << 20);
    let file = put(&disk, "a", 1, 4096).await;
    disk.sync_dir(p("")).await.unwrap();
    disk.fail_syncs(1);
    assert_eq!(crate::os_error(&file.sync().await.unwrap_err()), Some(libc::EIO));
    assert!(file.sync().await.unwrap_err().to_string().contains("failed before"));
    assert!(file.write_at(0, vec![Bytes::from_static(b"x")]).await.is_err());
    assert_eq!(file.read_at(0, 1).await.unwrap(), vec![1]);
    // A sync through another handle succeeds, and still saves nothing.
    disk.open(p("a"), Open::ReadWrite).await.unwrap().sync().await.unwrap();
    disk.crash(CrashKeep::Nothing);
    assert_ne!(get(&disk, "a").await.unwrap(), vec![1; 4096]);
}

#[tokio::test]
async fn a_full_disk_says_so_and_recovers() {
    let disk = SimDisk::new(4, 5 * 4096);
    let file = put(&disk, "a", 1, 3 * 4096).await;
    let full = file.write_at(3 * 4096, vec![vec![1; 3 * 4096].into()]).await.unwrap_err();
    assert_eq!(full.kind(), io::ErrorKind::StorageFull);
    let other = disk.open(p("b"), Open::Create).await.unwrap();
    assert_eq!(other.allocate(0, 4096).await.unwrap_err().kind(), io::ErrorKind::StorageFull);
    file.punch(0, 2 * 4096).await.unwrap();
    other.allocate(0, 2 * 4096).await.unwrap();
    disk.remove_file(p("a")).await.unwrap();
    assert_eq!(disk.used_bytes(), 5 * 4096, "a handle keeps the space");
    drop(file);
    assert_eq!(disk.used_bytes(), 2 * 4096);
}

#[tokio::test]
async fn only_the_process_dies() {
    let disk = SimDisk::new(5, 1 << 20);
    put(&disk, "a", 1, 10).await;
    disk.crash(CrashKeep::Everything);
    assert_eq!(get(&disk, "a").await.unwrap(), vec![1; 10]);
    disk.crash(CrashKeep::Nothing);
    assert_eq!(get(&disk, "a").await, None);
}

#[tokio::test]
async fn copies_are_apart_and_seeds_repeat() {
    let disk = SimDisk::new(6, 1 << 20);
    let file = put(&disk, "a", 1, 64 << 10).await;
    file.sync().await.unwrap();
    disk.sync_dir(p("")).await.unwrap();
    file.write_at(0, vec![vec![2; 32 << 10].into()]).await.unwrap();
    let copy = disk.clone_disk();
    disk.crash(CrashKeep::Random);
    copy.crash(CrashKeep::Random);
    assert_eq!(get(&disk, "a").await, get(&copy, "a").await);
    copy.flip_bit(p("a"), 0, 3).unwrap();
    assert_ne!(get(&disk, "a").await, get(&copy, "a").await);
}

#[tokio::test(start_paused = true)]
async fn syncs_take_virtual_time() {
    let disk = SimDisk::new(7, 1 << 20);
    let file = put(&disk, "a", 1, 10).await;
    disk.set_sync_latency(Duration::from_secs(5));
    let start = tokio::time::Instant::now();
    file.sync().await.unwrap();
    assert_eq!(start.elapsed(), Duration::from_secs(5));
    assert_eq!(disk.counters().syncs, 1);
}
