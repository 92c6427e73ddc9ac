//! What is refused at the door, and what is made whole again.

use super::*;

async fn filled(disk: &SimDisk, count: usize, config: JournaledConfig) -> JournaledStore {
    let store = create(disk, config).await;
    for number in 0..count {
        put(&store, &format!("{number:04}"), vec![7; 50_000]).await;
    }
    store
}

async fn is_compacted(store: &JournaledStore, after: Revision) -> bool {
    store.journal_since(after, 1).await.unwrap() == JournalSlice::Compacted
}

/// Until the journal no longer begins at its beginning.
async fn trim(store: &JournaledStore) {
    wait_for(async || {
        put(store, "filler", vec![7; 50_000]).await;
        is_compacted(store, Revision(0)).await
    })
    .await;
}

fn refused(opened: Result<JournaledStore>, why: &str) {
    let error = opened.unwrap_err();
    assert!(error.message().contains(why) && error.message().contains("rebuild"), "{error}");
}

async fn open_with(disk: &SimDisk, index: Arc<dyn Index>) -> Result<JournaledStore> {
    JournaledStore::open(Arc::new(disk.clone()), dir(), index, small()).await
}

#[tokio::test(start_paused = true)]
async fn a_trimmed_store_opens_again_with_everything() {
    let disk = sim(1);
    let store = filled(&disk, 100, small()).await;
    trim(&store).await;
    let before = everything(&store).await;
    let mut after = Revision(0);
    while is_compacted(&store, after).await {
        after.0 += 1;
    }
    power_loss(store, &disk, CrashKeep::Nothing).await;
    let store = open(&disk, small()).await.unwrap();
    assert_eq!(everything(&store).await, before);
    // The part of the journal that is kept can still be shipped, without a gap.
    assert!(after < before.0);
    while after < before.0 {
        let JournalSlice::Records(records) = store.journal_since(after, 120_000).await.unwrap() else {
            panic!("compacted behind {after}");
        };
        assert!((1..=3).contains(&records.len()), "{} records", records.len());
        for (revision, _) in records {
            assert_eq!(revision.0, after.0 + 1);
            after = revision;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_lost_index_is_made_again_from_a_whole_journal_and_refused_with_a_trimmed_one() {
    let disk = sim(1);
    let store = filled(&disk, 30, small()).await;
    let before = everything(&store).await;
    store.close().await.unwrap();
    let copy = disk.clone_disk();
    copy.remove_file(&dir().join("index.snapshot")).await.unwrap();
    assert_eq!(everything(&open(&copy, small()).await.unwrap()).await, before);

    let store = open(&disk, small()).await.unwrap();
    trim(&store).await;
    store.close().await.unwrap();
    disk.remove_file(&dir().join("index.snapshot")).await.unwrap();
    refused(open(&disk, small()).await, "empty or new");
}

#[tokio::test(start_paused = true)]
async fn a_damaged_index_counts_as_lost() {
    let disk = sim(1);
    let store = filled(&disk, 30, small()).await;
    let before = everything(&store).await;
    store.close().await.unwrap();
    disk.flip_bit(&dir().join("index.snapshot"), 20, 3).unwrap();
    assert_eq!(everything(&open(&disk, small()).await.unwrap()).await, before);
}

#[tokio::test]
async fn a_damaged_redb_file_is_put_aside_and_made_again() {
    let path = tempfile::tempdir().unwrap();
    let store = real(path.path(), small()).await;
    for number in 0..100 {
        put(&store, &format!("{number:04}"), "x").await;
    }
    let before = everything(&store).await;
    store.close().await.unwrap();
    drop(store);
    std::fs::write(path.path().join(DIR).join("index.redb"), vec![0x55; 200_000]).unwrap();
    let store = real(path.path(), small()).await;
    assert_eq!(everything(&store).await, before);
    assert!(path.path().join(DIR).join("index.redb.damaged").exists());
}

#[tokio::test(start_paused = true)]
async fn journals_and_indexes_of_different_ages_are_refused() {
    let disk = sim(1);
    let store = filled(&disk, 30, small()).await;
    store.close().await.unwrap();
    let older = disk.clone_disk();
    let store = open(&disk, small()).await.unwrap();
    trim(&store).await;
    store.close().await.unwrap();
    // An older journal under a newer index: plans that were acknowledged are missing.
    refused(open_with(&older, index_of(&disk).await).await, "older copy, or was cut");
    // An older index over a newer journal, which begins later.
    refused(open_with(&disk, index_of(&older).await).await, "one of them is an older copy");
    // Each with its own is fine.
    open(&disk, small()).await.unwrap();
    open(&older, small()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn missing_segments_are_refused() {
    let disk = sim(1);
    let config = || JournaledConfig { journal_keep_bytes: 1 << 30, ..small() };
    filled(&disk, 200, config()).await.close().await.unwrap();
    let journal = dir().join("journal");
    let segments: Vec<_> = disk.list(&journal).await.unwrap().into_iter().map(|entry| entry.name).collect();
    assert!(segments.len() >= 4, "{segments:?}");
    for missing in [0, 1] {
        let disk = disk.clone_disk();
        disk.remove_file(&journal.join(&segments[missing])).await.unwrap();
        refused(open(&disk, config()).await, "its journal");
    }
    assert_eq!(everything(&open(&disk, config()).await.unwrap()).await.1.len(), 200);
}

#[tokio::test(start_paused = true)]
async fn only_the_right_files_are_a_store() {
    let disk = sim(1);
    let as_disk: Arc<dyn Disk> = Arc::new(disk.clone());
    assert_eq!(JournaledStore::find(&as_disk, dir()).await.unwrap(), Found::Nothing);
    assert_eq!(open(&disk, small()).await.unwrap_err().reason, Reason::NotFound);
    let store = filled(&disk, 3, small()).await;
    assert_eq!(store.identity(), &identity(1));
    store.close().await.unwrap();
    assert_eq!(JournaledStore::find(&as_disk, dir()).await.unwrap(), Found::Store(identity(1)));
    // A second one is not made over it.
    let index = index_of(&disk).await;
    let made = JournaledStore::create(as_disk.clone(), dir(), identity(2), index.clone(), small()).await;
    assert_eq!(made.unwrap_err().reason, Reason::AlreadyExists);
    let meta = dir().join("store.meta");
    disk.flip_bit(&meta, 12, 0).unwrap();
    let error = JournaledStore::find(&as_disk, dir()).await.unwrap_err();
    assert!(error.message().contains("store.meta is damaged"), "{error}");
    disk.flip_bit(&meta, 12, 0).unwrap();
    // Version 1 becomes 3: no damage, but a newer program's.
    disk.flip_bit(&meta, 8, 1).unwrap();
    assert_eq!(JournaledStore::find(&as_disk, dir()).await.unwrap_err().reason, Reason::NotSupported);
    // A journal alone is not taken for an empty directory.
    disk.remove_file(&meta).await.unwrap();
    let error = JournaledStore::find(&as_disk, dir()).await.unwrap_err();
    assert!(error.message().contains("holds a journal but no"), "{error}");
    assert!(JournaledStore::create(as_disk, dir(), identity(2), index, small()).await.is_err());
}
