//! Tests of what only a journaled store can do wrong.

use super::*;
use crate::store::{contract, index::MemoryIndex};
use cairn_proto::id::Generation;
use disk::{CrashKeep, RealDisk, SimDisk};
use std::path::Path;

mod crash;
mod faults;
mod kill;
mod shipping;
mod startup;

const DIR: &str = "directory";

fn dir() -> &'static Path {
    Path::new(DIR)
}

fn identity(generation: u64) -> StoreIdentity {
    StoreIdentity { cluster_id: "c0ffee".into(), generation: Generation(generation) }
}

fn key(text: &str) -> Key {
    Key::copy_from_slice(text.as_bytes())
}

/// Small, so that everything happens often.
fn small() -> JournaledConfig {
    JournaledConfig {
        segment_bytes: 2 * 1024 * 1024,
        keep_plans: 8,
        apply_plans: 4,
        checkpoint_plans: 12,
        journal_keep_bytes: 0,
        index_reserve_bytes: 0,
        ..JournaledConfig::default()
    }
}

fn sim(seed: u64) -> SimDisk {
    SimDisk::new(seed, 1 << 30)
}

async fn index_of(disk: &SimDisk) -> Arc<dyn Index> {
    let disk: Arc<dyn Disk> = Arc::new(disk.clone());
    open_index(&disk, dir(), None).await.unwrap()
}

async fn create(disk: &SimDisk, config: JournaledConfig) -> JournaledStore {
    let index = index_of(disk).await;
    JournaledStore::create(Arc::new(disk.clone()), dir(), identity(1), index, config).await.unwrap()
}

async fn open(disk: &SimDisk, config: JournaledConfig) -> Result<JournaledStore> {
    let disk: Arc<dyn Disk> = Arc::new(disk.clone());
    let index = open_index(&disk, dir(), None).await?;
    JournaledStore::open(disk, dir(), index, config).await
}

async fn put(store: &JournaledStore, at: &str, value: impl Into<Bytes>) -> Revision {
    let mut plan = Plan::new();
    plan.put(key(at), value);
    store.commit(plan).await.unwrap()
}

async fn everything(store: &dyn MetaStore) -> (Revision, Vec<(Key, Versioned)>) {
    let (revision, mut page) = store.scan(KeyRange::all(), 100, None).await.unwrap();
    let mut entries = std::mem::take(&mut page.entries);
    while page.more {
        let range = KeyRange::all().behind(entries.last().unwrap().0.clone());
        page = store.scan(range, 100, Some(revision)).await.unwrap().1;
        entries.append(&mut page.entries);
    }
    (revision, entries)
}

/// Switches the power off under a store, and on again.
async fn power_loss(store: impl std::borrow::Borrow<JournaledStore>, disk: &SimDisk, keep: CrashKeep) {
    disk.power_off_after(0);
    // It cannot save anything any more; this only waits until its tasks have ended, as they do with a machine.
    let _ = store.borrow().close().await;
    drop(store);
    disk.crash(keep);
}

/// Polls until the condition holds.
async fn wait_for(mut condition: impl AsyncFnMut() -> bool) {
    let waited = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), waited).await.expect("within 60 s");
}

#[tokio::test(start_paused = true)]
async fn keeps_the_contract_on_a_simulated_disk() {
    contract::run(async || Arc::new(create(&sim(1), JournaledConfig::default()).await)).await;
    let roomier = || JournaledConfig { keep_plans: 120, apply_plans: 30, ..small() };
    contract::run(async || Arc::new(create(&sim(2), roomier()).await)).await;
    contract::run(async || {
        let index = Arc::new(MemoryIndex::volatile());
        Arc::new(
            JournaledStore::create(Arc::new(sim(3)), dir(), identity(1), index, roomier()).await.unwrap(),
        )
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn keeps_the_contract_of_compaction() {
    let config = || JournaledConfig { keep_plans: 20, apply_plans: 20, ..small() };
    contract::run_compacting(20, async || Arc::new(create(&sim(1), config()).await)).await;
}

#[tokio::test(start_paused = true)]
async fn keeps_the_contract_across_handles() {
    let disk = sim(1);
    create(&disk, small()).await.close().await.unwrap();
    contract::run_reopened(
        async || Arc::new(open(&disk, small()).await.unwrap()),
        async |store| {
            store.close().await.unwrap();
            // Also what was not asked for in a clean way must be there.
            disk.crash(CrashKeep::Nothing);
        },
    )
    .await;
}

/// A store on a real disk with redb.
async fn real(path: &Path, config: JournaledConfig) -> JournaledStore {
    let disk: Arc<dyn Disk> = RealDisk::open(path).unwrap();
    let index = open_index(&disk, dir(), Some(8 << 20)).await.unwrap();
    match JournaledStore::exists(&disk, dir()).await.unwrap() {
        true => JournaledStore::open(disk, dir(), index, config).await.unwrap(),
        false => JournaledStore::create(disk, dir(), identity(1), index, config).await.unwrap(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn keeps_the_contract_on_a_real_disk() {
    let parent = tempfile::tempdir().unwrap();
    let count = std::cell::Cell::new(0);
    let make = async |config| {
        count.set(count.get() + 1);
        Arc::new(real(&parent.path().join(count.get().to_string()), config).await)
    };
    contract::run(async || {
        make(JournaledConfig { segment_bytes: 2 << 20, ..JournaledConfig::default() }).await
    })
    .await;
    contract::run(async || make(JournaledConfig { keep_plans: 120, apply_plans: 30, ..small() }).await).await;
    let config = || JournaledConfig { keep_plans: 20, apply_plans: 20, ..small() };
    contract::run_compacting(20, async || make(config()).await).await;
}

#[tokio::test]
async fn keeps_the_contract_across_handles_on_a_real_disk() {
    let path = tempfile::tempdir().unwrap();
    let open = async || Arc::new(real(path.path(), small()).await);
    contract::run_reopened(open, async |store: Arc<JournaledStore>| store.close().await.unwrap()).await;
}

#[tokio::test(start_paused = true)]
async fn many_commits_share_one_sync() {
    let disk = sim(1);
    let store = Arc::new(create(&disk, JournaledConfig::default()).await);
    disk.set_sync_latency(Duration::from_millis(5));
    let before = disk.counters().syncs;
    let writers = (0..64).map(|writer| {
        let store = store.clone();
        async move {
            for round in 0..10 {
                put(&store, &format!("{writer}"), round.to_string()).await;
            }
        }
    });
    futures::future::join_all(writers).await;
    let syncs = disk.counters().syncs - before;
    assert!(syncs <= 25, "640 commits took {syncs} syncs");
    assert_eq!(store.durable_revision(), Revision(640));
}

#[tokio::test(start_paused = true)]
async fn commits_can_be_slowed() {
    let store = create(&sim(1), small()).await;
    store.set_commit_delay(Some(Duration::from_millis(100)));
    let began = tokio::time::Instant::now();
    put(&store, "a", "1").await;
    put(&store, "a", "2").await;
    assert!(began.elapsed() >= Duration::from_millis(200));
    store.set_commit_delay(None);
    let began = tokio::time::Instant::now();
    put(&store, "a", "3").await;
    assert!(began.elapsed() < Duration::from_millis(100));
}

#[tokio::test(start_paused = true)]
async fn closing_commits_what_waits_and_refuses_what_comes() {
    let disk = sim(1);
    let store = Arc::new(create(&disk, small()).await);
    disk.set_sync_latency(Duration::from_millis(10));
    let waiting: Vec<_> = (0..20)
        .map(|number| {
            let store = store.clone();
            tokio::spawn(async move { put(&store, &number.to_string(), "x").await })
        })
        .collect();
    tokio::task::yield_now().await;
    store.close().await.unwrap();
    for task in waiting {
        task.await.unwrap();
    }
    let mut plan = Plan::new();
    plan.put(key("late"), "x");
    assert!(matches!(store.commit(plan).await, Err(CommitError::Refused(_))));
    assert_eq!(store.get(&[key("1")], None).await.unwrap_err().reason, Reason::Unavailable);
    store.close().await.unwrap();
    disk.crash(CrashKeep::Nothing);
    let store = open(&disk, small()).await.unwrap();
    assert_eq!(everything(&store).await.1.len(), 20);
}
