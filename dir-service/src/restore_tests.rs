use super::*;
use crate::store::{Found, JournaledStore};
use cairn_proto::checkpoint::Tail;

fn entry(number: u64) -> v1::CheckpointEntry {
    v1::CheckpointEntry {
        key: format!("key {number:04}").into(),
        value: "value".into(),
        revision: 1 + number,
    }
}

fn backup(dir: &Path, generation: u64, entries: u64, cut: usize) -> PathBuf {
    let head = Head { cluster_id: "c-1".into(), generation, revision: 1_000, ..Default::default() };
    let mut parts = vec![Part::Head(head)];
    let mut sum = EntrySum::default();
    for number in 0..entries {
        sum.add(&entry(number));
        parts.push(Part::Entries(vec![entry(number)]));
    }
    parts.push(Part::Tail(Tail { entry_count: sum.count(), checksum: Some(sum.checksum()) }));
    let mut bytes: Vec<u8> =
        parts.into_iter().flat_map(|part| checkpoint::encode(part).unwrap().concat()).collect();
    bytes.truncate(bytes.len() - cut);
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join(BACKUP_FILE), bytes).unwrap();
    dir.join(BACKUP_FILE)
}

#[tokio::test]
async fn a_backup_becomes_a_store_of_a_far_higher_generation() {
    let folder = tempfile::tempdir().unwrap();
    let (from, data) = (folder.path().join("backup"), folder.path().join("data"));
    backup(&from, 7, 300, 0);
    let restored = restore(&from, &data, 0).await.unwrap();
    assert_eq!((restored.entries, restored.revision, restored.backup_generation), (300, 1_000, 7));
    assert_eq!(restored.generation, 1 << 32);
    let disk: Arc<dyn Disk> = RealDisk::open(&data).unwrap();
    let found = JournaledStore::find(&disk, Path::new("store-c-1")).await.unwrap();
    assert!(matches!(found, Found::Store(identity) if identity.generation.0 == 1 << 32));
    drop(disk);
    let error = restore(&from, &data, 0).await.unwrap_err();
    assert_eq!(error.reason, Reason::AlreadyExists, "{error}");
    let again = restore(&from, &folder.path().join("other"), restored.generation + 5).await.unwrap();
    assert_eq!(again.generation, 2 << 32);
}

#[tokio::test]
async fn a_damaged_backup_or_a_folder_in_use_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (from, data) = (folder.path().join("backup"), folder.path().join("data"));
    for cut in [1, 40, 200] {
        backup(&from, 7, 30, cut);
        assert_eq!(restore(&from, &data, 0).await.unwrap_err().reason, Reason::Io);
        assert!(!data.exists(), "nothing is written before the whole was verified");
    }
    let file = backup(&from, 7, 30, 0);
    let bytes = std::fs::read(&file).unwrap();
    for at in (0..bytes.len()).step_by(7) {
        let mut flipped = bytes.clone();
        flipped[at] ^= 4;
        std::fs::write(&file, flipped).unwrap();
        assert!(restore(&from, &data, 0).await.is_err(), "byte {at}");
    }
    std::fs::write(&file, bytes).unwrap();
    std::fs::create_dir_all(&data).unwrap();
    std::fs::write(data.join("thesis.tex"), "mine").unwrap();
    let error = restore(&from, &data, 0).await.unwrap_err();
    assert!(error.message().contains("thesis.tex"), "{error}");
    let error = restore(&folder.path().join("nothing"), &data, 0).await.unwrap_err();
    assert_eq!(error.reason, Reason::NotFound);
}
