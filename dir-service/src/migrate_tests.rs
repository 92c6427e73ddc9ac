use super::*;
use crate::store::etcd::testing::{Etcd, network};
use std::collections::BTreeMap;

const CLUSTER: &str = "c1";

fn identity(generation: u64) -> StoreIdentity {
    StoreIdentity { cluster_id: CLUSTER.into(), generation: Generation(generation) }
}

/// A directory's folder with a store of many records, deleted ones and large ones among them.
async fn folder_store(folder: &Path) -> Revision {
    let disk: Arc<dyn Disk> = RealDisk::open(folder).unwrap();
    let dir = life::folder(CLUSTER).unwrap();
    let index = open_index(&disk, &dir, None).await.unwrap();
    let config = JournaledConfig::default();
    let store = JournaledStore::create(disk.clone(), &dir, identity(1), index, config).await.unwrap();
    let store = Arc::new(store);
    let shared: Arc<dyn MetaStore> = store.clone();
    prepare(&shared, Generation(1), &Host::system(1)).await.unwrap();
    let name = |number: u32| Key::from([&[0xfe, 0xff][..], &number.to_be_bytes()[..]].concat());
    for step in 0..40 {
        let mut plan = Plan::new();
        for number in 0..100 {
            plan.put(name(step * 100 + number), vec![step as u8; number as usize * 7]);
        }
        plan.delete(name((step * 31) % 1_000));
        shared.commit(plan).await.unwrap();
    }
    let mut plan = Plan::new();
    plan.put(Key::from_static(&[0xff]), vec![7; 900_000]);
    let last = shared.commit(plan).await.unwrap();
    store.close().await.unwrap();
    life::name(&*disk, &dir).await.unwrap();
    last
}

/// All records that belong to nobody but these tests.
async fn records(store: &dyn MetaStore) -> BTreeMap<Key, Vec<u8>> {
    let mut pages = Pages::new(store, store.revision().await.unwrap());
    let mut all = BTreeMap::new();
    while let Some((key, value)) = pages.record().await.unwrap() {
        if key.starts_with(&[0xfe]) || key.starts_with(&[0xff]) {
            all.insert(key, value.value.to_vec());
        }
    }
    all
}

async fn settings(store: Arc<dyn MetaStore>) -> record::Settings {
    View::new(store).record::<record::Settings>(&key::settings()).await.unwrap().unwrap().record
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_goes_to_etcd_and_back_whole() {
    let Some(etcd) = Etcd::start().await else { return };
    let (first, last) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let revision = folder_store(first.path()).await;
    let (folder, on_etcd) = (Place::Folder(first.path().into()), Place::Etcd(etcd.options("moved")));

    let there = migrate(&folder, &on_etcd).await.unwrap();
    assert_eq!((there.from_generation, there.generation, there.revision), (1, 2, revision.0));
    assert_eq!(there.cluster_id, CLUSTER);
    let store = Arc::new(EtcdStore::open(etcd.options("moved"), network(), 0).await.unwrap());
    assert_eq!(store.identity(), &identity(2));
    assert!(store.revision().await.unwrap() > revision, "revisions go on behind the old ones");
    let moved = records(&*store).await;
    assert_eq!(moved[&Key::from_static(&[0xff])].len(), 900_000);
    assert!(moved.len() > 3_000 && there.records > moved.len() as u64);
    assert_eq!(settings(store.clone()).await.generation, 2);
    let (_, values) = store.get(&[Key::from_static(&[0xff])], None).await.unwrap();
    assert!(
        values[0].as_ref().unwrap().revision > revision,
        "a record is newer than all that refers to its past"
    );
    // A change on the way back is not lost either, and what began before the move fails.
    let mut plan = Plan::new();
    plan.require_unchanged(Key::from_static(&[0xff]), values[0].as_ref());
    plan.put(Key::from_static(&[0xff, 1]), "new");
    let changed = store.commit(plan).await.unwrap();
    // The folder that it came from serves nobody any more.
    let disk = RealDisk::open(first.path()).unwrap();
    let why = life::check_not_moved(&*disk).await.unwrap_err();
    assert!(why.message().contains("etcd://"), "{why}");
    drop(disk);
    let again = migrate(&folder, &Place::Etcd(etcd.options("again"))).await.unwrap_err();
    assert_eq!(again.reason, Reason::Conflict, "{again}");

    let back = migrate(&on_etcd, &Place::Folder(last.path().into())).await.unwrap();
    assert_eq!((back.from_generation, back.generation), (2, 3));
    let mut plan = Plan::new();
    plan.put(Key::from_static(&[0xfe]), "too late");
    let late = store.commit(plan).await.unwrap_err();
    assert!(matches!(late, CommitError::Refused(_)), "a directory that still runs on it: {late:?}");
    let closed = EtcdStore::open(etcd.options("moved"), network(), 0).await.unwrap_err();
    assert!(closed.message().contains("moved away"), "{closed}");
    let twice = migrate(&on_etcd, &Place::Etcd(etcd.options("twice"))).await.unwrap_err();
    assert_eq!(twice.reason, Reason::Conflict, "{twice}");

    let disk: Arc<dyn Disk> = RealDisk::open(last.path()).unwrap();
    let dir = life::current(&*disk).await.unwrap().unwrap();
    let index = open_index(&disk, &dir, None).await.unwrap();
    let store = JournaledStore::open(disk, &dir, index, JournaledConfig::default()).await.unwrap();
    let store = Arc::new(store);
    assert_eq!(store.identity(), &identity(3));
    assert!(store.durable_revision() > changed);
    let mut expected = moved;
    expected.insert(Key::from_static(&[0xff, 1]), b"new".to_vec());
    assert_eq!(records(&*store).await, expected);
    assert_eq!(settings(store.clone()).await.generation, 3);
    store.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_move_leaves_the_store_as_it_was() {
    let Some(etcd) = Etcd::start().await else { return };
    let store = EtcdStore::create(etcd.options("s"), network(), 0, identity(4)).await.unwrap();
    let shared: Arc<dyn MetaStore> = Arc::new(store);
    prepare(&shared, Generation(4), &Host::system(1)).await.unwrap();
    let occupied = tempfile::tempdir().unwrap();
    std::fs::write(occupied.path().join("something"), "x").unwrap();
    let failed = migrate(&Place::Etcd(etcd.options("s")), &Place::Folder(occupied.path().into())).await;
    assert_eq!(failed.unwrap_err().reason, Reason::AlreadyExists);
    let store = EtcdStore::open(etcd.options("s"), network(), 0).await.unwrap();
    assert_eq!(store.identity(), &identity(4));

    // One that was interrupted on its way is repeated, over what it left there.
    let target = etcd.options("t");
    let mut fill = EtcdFill::begin(target.clone(), network(), identity(5)).await.unwrap();
    for number in 0..1_500_u32 {
        fill.load(&number.to_be_bytes(), "left over".into()).await.unwrap();
    }
    fill.view().await.unwrap();
    drop(fill);
    assert!(
        EtcdStore::open(target.clone(), network(), 0).await.unwrap_err().message().contains("to its end")
    );
    drop(EtcdStore::close_off(etcd.options("s"), network()).await.unwrap());
    let moved = migrate(&Place::Etcd(etcd.options("s")), &Place::Etcd(target.clone())).await.unwrap();
    assert_eq!(moved.generation, 5);
    let store: Arc<dyn MetaStore> = Arc::new(EtcdStore::open(target, network(), 0).await.unwrap());
    let (_, page) = store.scan(KeyRange::all(), 1_000, None).await.unwrap();
    assert_eq!(page.entries.len() as u64, moved.records + 1, "the counter of ids that were passed over");
    for (from, to) in [("nothing", "x"), ("s", "t")] {
        let (from, to) = (Place::Etcd(etcd.options(from)), Place::Etcd(etcd.options(to)));
        assert!(migrate(&from, &to).await.is_err());
    }
    let empty = tempfile::tempdir().unwrap();
    let nothing = migrate(&Place::Folder(empty.path().into()), &Place::Etcd(etcd.options("x"))).await;
    assert_eq!(nothing.unwrap_err().reason, Reason::NotFound);
}

#[test]
fn places_are_read_and_shown() {
    let read = |text: &str| Place::read("--from", text, &EtcdArgs::default());
    assert_eq!(read("/data").unwrap().to_string(), "/data");
    assert_eq!(read("etcd://a:1/x").unwrap().to_string(), "etcd://a:1/x");
    assert!(read("etcd://a").unwrap_err().message().contains("--from"));
}
