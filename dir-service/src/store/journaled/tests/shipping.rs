//! Journal slices, checkpoints, and stores made from them.

use super::*;
use cairn_core::plan::Mutation;
use futures::{StreamExt as _, TryStreamExt as _};

async fn records(store: &JournaledStore, after: Revision, bytes_max: usize) -> Vec<(Revision, Bytes)> {
    match store.journal_since(after, bytes_max).await.unwrap() {
        JournalSlice::Records(records) => records,
        JournalSlice::Compacted => panic!("compacted behind {after}"),
    }
}

/// A copy of a store, made from a checkpoint and what came after.
async fn copy(store: &JournaledStore, disk: &SimDisk) -> JournaledStore {
    let Checkpoint { revision, entries } = store.checkpoint().unwrap();
    let index = index_of(disk).await;
    let disk: Arc<dyn Disk> = Arc::new(disk.clone());
    let mut restore =
        JournaledStore::create_from(disk, dir(), identity(2), revision, entries, index).await.unwrap();
    while restore.revision() < store.durable_revision() {
        for (revision, plan) in records(store, restore.revision(), 1 << 20).await {
            restore.apply(revision, plan).await.unwrap();
        }
    }
    restore.finish(small()).await.unwrap()
}

/// Every round changes or removes the same keys, and adds one of its own.
fn round_plan(round: u64) -> Plan {
    let mut plan = Plan::new();
    for number in 0..60 {
        let at = key(&format!("{number:02}"));
        if (round + number).is_multiple_of(4) {
            plan.delete(at)
        } else {
            plan.put(at, round.to_string())
        };
    }
    plan.put(key("big"), vec![round as u8; 40_000]);
    plan.put(key(&format!("own/{round:04}")), "x");
    plan
}

#[tokio::test(start_paused = true)]
async fn rebuilt_checkpoints_are_one_revision_and_with_the_journal_make_the_same_store() {
    let disk = sim(1);
    let store = Arc::new(create(&disk, small()).await);
    store.commit(round_plan(1)).await.unwrap();
    let writing = {
        let store = store.clone();
        tokio::spawn(async move {
            for round in 2..400 {
                store.commit(round_plan(round)).await.unwrap();
            }
        })
    };
    let mut moved_on = 0;
    while !writing.is_finished() {
        let Checkpoint { revision, entries } = store.checkpoint().unwrap();
        // Read slowly, while the store goes on.
        let entries = entries.then(async |entry| {
            tokio::task::yield_now().await;
            entry
        });
        let entries: Vec<(Key, Versioned)> = entries.try_collect().await.unwrap();
        assert!(entries.is_sorted_by(|(one, _), (other, _)| one < other));
        let round = revision.0;
        let puts = round_plan(round).mutations.iter().filter(|m| matches!(m, Mutation::Put(..))).count();
        assert_eq!(entries.len() as u64, puts as u64 + round - 1, "at {revision}");
        assert!(entries.iter().all(|(key, v)| v.revision == revision || key.starts_with(b"own/")));
        moved_on += u64::from(store.get(&[], Some(revision)).await.is_err());

        let second = copy(&store, &sim(round)).await;
        let at = second.durable_revision();
        let (_, entries) = everything(&second).await;
        let puts = round_plan(at.0).mutations.iter().filter(|m| matches!(m, Mutation::Put(..))).count();
        assert_eq!(entries.len() as u64, puts as u64 + at.0 - 1, "a copy at {at}");
    }
    writing.await.unwrap();
    assert!(moved_on > 0, "no checkpoint outlived the recent revisions");
    let second = copy(&store, &sim(1_000)).await;
    assert_eq!(everything(&second).await, everything(&*store).await);
    assert_eq!(second.identity(), &identity(2));
    // It goes on where the other was.
    assert_eq!(put(&second, "next", "x").await.0, store.durable_revision().0 + 1);
}

#[tokio::test(start_paused = true)]
async fn a_checkpoint_being_read_keeps_the_journal_behind_it() {
    let store = create(&sim(1), small()).await;
    let fill = async || {
        for round in 1..150 {
            store.commit(round_plan(round)).await.unwrap();
        }
    };
    fill().await;
    let checkpoint = store.checkpoint().unwrap();
    fill().await;
    fill().await;
    assert!(!records(&store, checkpoint.revision, 1).await.is_empty());
    let revision = checkpoint.revision;
    drop(checkpoint);
    wait_for(async || {
        store.commit(round_plan(1)).await.unwrap();
        store.journal_since(revision, 1).await.unwrap() == JournalSlice::Compacted
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn the_journal_is_served_without_gaps_from_memory_and_disk() {
    let store = create(&sim(1), JournaledConfig { journal_keep_bytes: 1 << 30, ..small() }).await;
    let mut durable = store.watch_durable();
    for number in 1..=300u64 {
        let size = if number % 50 == 0 { 300_000 } else { 500 };
        assert_eq!(put(&store, &format!("{number:03}"), vec![1; size]).await, Revision(number));
        assert!(*durable.borrow_and_update() >= Revision(number));
    }
    wait_for(async || store.get(&[], Some(Revision(200))).await.is_err()).await;
    for bytes_max in [1, 2_000, 100_000, 10_000_000] {
        for start in [0, 1, 99, 290, 299] {
            let mut after = Revision(start);
            while after < Revision(300) {
                let slice = records(&store, after, bytes_max).await;
                let bytes: usize = slice.iter().map(|(_, plan)| plan.len()).sum();
                assert!(slice.len() == 1 || bytes <= bytes_max);
                for (revision, plan) in slice {
                    assert_eq!(revision.0, after.0 + 1);
                    let plan = crate::store::codec::decode(&plan).unwrap();
                    assert_eq!(plan.mutations[0].key(), &key(&format!("{:03}", revision.0)));
                    after = revision;
                }
            }
        }
    }
    assert_eq!(records(&store, Revision(300), 1).await, []);
    assert_eq!(store.journal_since(Revision(301), 1).await.unwrap_err().reason, Reason::InvalidArgument);
}

#[tokio::test(start_paused = true)]
async fn rebuilt_an_interrupted_restore_is_begun_again() {
    let source = create(&sim(1), small()).await;
    for number in 0..50 {
        put(&source, &format!("{number:03}"), "x").await;
    }
    let mut incomplete = 0;
    for steps in 0..60 {
        let disk = sim(steps);
        let as_disk: Arc<dyn Disk> = Arc::new(disk.clone());
        disk.power_off_after(steps);
        let attempt = async {
            let index = open_index(&as_disk, dir(), None).await?;
            let Checkpoint { revision, entries } = source.checkpoint()?;
            let restore =
                JournaledStore::create_from(as_disk.clone(), dir(), identity(2), revision, entries, index)
                    .await?;
            restore.finish(small()).await
        };
        let done = match attempt.await {
            Ok(store) => {
                power_loss(store, &disk, CrashKeep::Random).await;
                true
            }
            Err(_) => {
                assert!(disk.is_off());
                disk.crash(CrashKeep::Random);
                false
            }
        };
        match JournaledStore::find(&as_disk, dir()).await.unwrap() {
            Found::Store(found) => assert_eq!(found, identity(2)),
            Found::Incomplete(_) => {
                assert!(!done);
                incomplete += 1;
                let error = open(&disk, small()).await.unwrap_err();
                assert!(error.message().contains("not filled to its end"), "{error}");
            }
            Found::Nothing => assert!(!done),
        }
        if !JournaledStore::exists(&as_disk, dir()).await.unwrap() {
            power_loss(copy(&source, &disk).await, &disk, CrashKeep::Nothing).await;
        }
        assert_eq!(
            everything(&open(&disk, small()).await.unwrap()).await,
            everything(&source).await,
            "{steps}"
        );
    }
    assert!(incomplete > 5);
}

#[tokio::test(start_paused = true)]
async fn a_restore_replaces_lower_generations_only_and_refuses_gaps() {
    let disk = sim(1);
    let store = create(&disk, small()).await;
    put(&store, "old", "x").await;
    store.close().await.unwrap();
    let as_disk: Arc<dyn Disk> = Arc::new(disk.clone());
    let index = index_of(&disk).await;
    let begin = |generation| {
        Restore::begin(as_disk.clone(), dir(), identity(generation), Revision(10), index.clone())
    };
    assert_eq!(begin(1).await.unwrap_err().reason, Reason::AlreadyExists);
    let mut restore = begin(2).await.unwrap();
    let value = |revision| Versioned { value: Bytes::from_static(b"v"), revision: Revision(revision) };
    assert!(restore.load(key("k"), value(11)).await.is_err(), "newer than the checkpoint");
    restore.load(key("k"), value(4)).await.unwrap();
    let plan = || {
        let mut plan = Plan::new();
        plan.put(key("p"), "v");
        crate::store::codec::encode_applied(&plan)
    };
    assert!(restore.apply(Revision(12), plan()).await.is_err(), "a gap");
    restore.apply(Revision(10), plan()).await.unwrap();
    restore.apply(Revision(11), plan()).await.unwrap();
    assert!(restore.load(key("l"), value(4)).await.is_err(), "too late");
    let store = restore.finish(small()).await.unwrap();
    let expected = (Revision(11), vec![(key("k"), value(4)), (key("p"), value(11))]);
    assert_eq!(everything(&store).await, expected);
    power_loss(store, &disk, CrashKeep::Nothing).await;
    assert_eq!(everything(&open(&disk, small()).await.unwrap()).await, expected);
}

#[tokio::test]
async fn rebuilt_a_restore_fills_redb() {
    let source = create(&sim(1), small()).await;
    for number in 0..300 {
        put(&source, &format!("{number:03}"), "x").await;
    }
    let path = tempfile::tempdir().unwrap();
    let disk: Arc<dyn Disk> = RealDisk::open(path.path()).unwrap();
    let index = open_index(&disk, dir(), Some(8 << 20)).await.unwrap();
    let Checkpoint { revision, entries } = source.checkpoint().unwrap();
    put(&source, "later", "x").await;
    let mut restore =
        JournaledStore::create_from(disk, dir(), identity(2), revision, entries, index).await.unwrap();
    for (revision, plan) in records(&source, revision, 1 << 20).await {
        restore.apply(revision, plan).await.unwrap();
    }
    let store = restore.finish(small()).await.unwrap();
    assert_eq!(everything(&store).await, everything(&source).await);
    store.close().await.unwrap();
    drop(store);
    assert_eq!(everything(&real(path.path(), small()).await).await, everything(&source).await);
}
