//! The store on real etcd processes.

use super::{
    testing::{Etcd, network},
    *,
};
use crate::store::contract;
use bytes::Bytes;
use cairn_core::plan::Precondition;
use futures::{FutureExt as _, StreamExt as _};
use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

mod faults;
mod measure;

fn identity() -> StoreIdentity {
    StoreIdentity { cluster_id: "c1".into(), generation: Generation(1) }
}

/// A new store under a prefix of its own.
async fn create(options: EtcdOptions) -> Arc<EtcdStore> {
    Arc::new(EtcdStore::create(options, network(), 0, identity()).await.unwrap())
}

fn key(text: &str) -> Key {
    Key::copy_from_slice(text.as_bytes())
}

async fn put(store: &EtcdStore, at: &str, value: &str) -> Result<Revision, CommitError> {
    let mut plan = Plan::new();
    plan.put(key(at), value.to_owned());
    store.commit(plan).await
}

async fn value(store: &EtcdStore, at: &str) -> Option<Bytes> {
    store.get(&[key(at)], None).await.unwrap().1.remove(0).map(|versioned| versioned.value)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keeps_the_contract() {
    let Some(etcd) = Etcd::start().await else { return };
    let number = AtomicUsize::new(0);
    contract::run(async || {
        create(etcd.options(&format!("s{}", number.fetch_add(1, Ordering::Relaxed)))).await
    })
    .await;
}

#[tokio::test]
async fn keeps_the_contract_of_compaction() {
    let Some(etcd) = Etcd::start().await else { return };
    let number = AtomicUsize::new(0);
    let keep = EtcdKeep {
        age: Duration::ZERO,
        revisions_min: 20,
        revisions_max: 20,
        look: Duration::from_millis(5),
    };
    contract::run_compacting(20, async || {
        let options = etcd.options(&format!("s{}", number.fetch_add(1, Ordering::Relaxed)));
        create(EtcdOptions { keep, ..options }).await
    })
    .await;
}

#[tokio::test]
async fn keeps_the_contract_across_handles() {
    let Some(etcd) = Etcd::start().await else { return };
    let options = etcd.options("s");
    let open = async || match EtcdStore::find(&options, &network()).await.unwrap() {
        Found::Nothing => create(options.clone()).await,
        found => {
            assert_eq!(found, Found::Store(identity()));
            Arc::new(EtcdStore::open(options.clone(), network(), 0).await.unwrap())
        }
    };
    contract::run_reopened(open, async |store| drop(store)).await;
}

#[tokio::test]
async fn a_prefix_holds_one_store_and_knows_whose() {
    let Some(etcd) = Etcd::start().await else { return };
    let options = etcd.options("a/b");
    let missing = EtcdStore::open(options.clone(), network(), 0).await.unwrap_err();
    assert_eq!(missing.reason, Reason::NotFound);
    let store = create(options.clone()).await;
    put(&store, "k", "v").await.unwrap();
    let other = StoreIdentity { cluster_id: "c2".into(), generation: Generation(1) };
    let again = EtcdStore::create(options.clone(), network(), 0, other.clone()).await.unwrap_err();
    assert_eq!(again.reason, Reason::AlreadyExists);
    // Another prefix of the same etcd is another store.
    let second = EtcdStore::create(etcd.options("b"), network(), 0, other.clone()).await.unwrap();
    assert_eq!(value(&second, "k").await, None);
    assert_eq!(EtcdStore::open(etcd.options("b"), network(), 0).await.unwrap().identity(), &other);
    // Something that is no record of ours is never taken for one.
    etcd.ctl(&["put", "/b/store", "something else"]);
    let damaged = EtcdStore::open(etcd.options("b"), network(), 0).await.unwrap_err();
    assert!(damaged.message().contains("/b/store"), "{damaged}");
    let moved = put(&second, "k", "v").await.unwrap_err();
    assert!(matches!(moved, CommitError::Refused(_)), "{moved:?}");
    etcd.ctl(&["put", "/c/data/x", "left over"]);
    let occupied = EtcdStore::create(etcd.options("c"), network(), 0, other).await.unwrap_err();
    assert_eq!(occupied.reason, Reason::AlreadyExists);
}

#[tokio::test]
async fn another_life_ends_the_one_before() {
    let Some(etcd) = Etcd::start().await else { return };
    let store = create(etcd.options("s")).await;
    put(&store, "old", "1").await.unwrap();
    let last = put(&store, "k", "1").await.unwrap();
    drop(store.raise_generation(Generation(2)).await.unwrap());
    let refused = put(&store, "k", "2").await.unwrap_err();
    assert!(
        matches!(&refused, CommitError::Refused(error) if error.message().contains("generation")),
        "{refused:?}"
    );
    let raised = EtcdStore::open(etcd.options("s"), network(), 0).await.unwrap();
    assert_eq!(raised.identity().generation, Generation(2));
    assert!(raised.revision().await.unwrap() > last, "revisions go on growing");
    let (_, read) = raised.get(&[key("k"), key("old")], None).await.unwrap();
    let mut plan = Plan::new();
    plan.require_unchanged(key("k"), read[0].as_ref()).require_unchanged(key("old"), read[1].as_ref());
    plan.put(key("k"), "3");
    assert!(raised.commit(plan).await.unwrap() > last);
    assert_eq!(store.raise_generation(Generation(2)).await.unwrap_err().reason, Reason::Unavailable);
    // Nor does it see what the other life does.
    assert_eq!(store.get(&[key("k")], None).await.unwrap_err().reason, Reason::Unavailable);
    assert!(store.scan(KeyRange::all(), 1, None).await.is_err());
}

#[tokio::test]
async fn others_who_write_to_the_same_etcd_leave_gaps_and_no_harm() {
    let Some(etcd) = Etcd::start().await else { return };
    let store = create(etcd.options("s")).await;
    let first = put(&store, "a", "1").await.unwrap();
    let mut changes = store.watch(key(""), first).await.unwrap();
    etcd.ctl(&["put", "foreign", "x"]);
    etcd.ctl(&["put", "/s2/data/a", "x"]);
    let second = put(&store, "a", "2").await.unwrap();
    assert_eq!(second.0, first.0 + 3);
    for revision in [first, second] {
        assert_eq!(changes.next().await.unwrap().unwrap().revision, revision);
    }
    assert!(changes.next().now_or_never().is_none());
    let (_, page) = store.scan(KeyRange::all(), 10, None).await.unwrap();
    assert_eq!(page.entries.len(), 1);
}

#[tokio::test]
async fn a_record_of_the_past_that_cannot_be_is_an_error() {
    let Some(etcd) = Etcd::start().await else { return };
    etcd.ctl(&["put", "/s/data/a", "from before the store"]);
    // As if somebody had written the record of the identity by hand, behind the records.
    let record = Identity { store: identity(), state: State::Complete, start: Revision(0) };
    let network = network();
    let client = Client::new(etcd.options("s"), network.clone(), 0);
    let write = put_record(record.encode());
    client.txn(write).await.unwrap();
    let store = EtcdStore::open(etcd.options("s"), network, 0).await.unwrap();
    let error = store.get(&[key("a")], None).await.unwrap_err();
    assert_eq!(error.reason, Reason::Internal);
    assert!(store.scan(KeyRange::all(), 10, None).await.is_err());
}

fn put_record(value: Bytes) -> TxnRequest {
    let name = Names::under("/s/").store;
    TxnRequest { success: vec![super::put(name, value)], ..Default::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn values_larger_than_an_answer_are_read_in_parts() {
    let Some(etcd) = Etcd::start().await else { return };
    let store = create(etcd.options("s")).await;
    let large = "x".repeat(cairn_core::plan::PLAN_BYTES_MAX - 100);
    let count = client::ANSWER_BYTES_MAX / large.len() + 8;
    let keys: Vec<Key> = (0..count).map(|number| key(&format!("{number:03}"))).collect();
    for key in &keys {
        let mut plan = Plan::new();
        plan.require(Precondition::Absent(key.clone())).put(key.clone(), large.clone());
        store.commit(plan).await.unwrap();
    }
    let (_, values) = store.get(&keys, None).await.unwrap();
    assert!(values.iter().all(|value| value.as_ref().is_some_and(|value| value.value.len() == large.len())));
    let (_, page) = store.scan(KeyRange::all(), 1_000, None).await.unwrap();
    assert!(page.more && !page.entries.is_empty());
}

#[tokio::test]
async fn many_keys_are_read_at_one_revision() {
    let Some(etcd) = Etcd::start().await else { return };
    let store = create(etcd.options("s")).await;
    let keys: Vec<Key> = (0..3 * layout::TXN_OPS_MAX + 7).map(|number| key(&number.to_string())).collect();
    for keys in keys.chunks(100) {
        let mut plan = Plan::new();
        for key in keys {
            plan.put(key.clone(), key.clone());
        }
        store.commit(plan).await.unwrap();
    }
    let (revision, values) = store.get(&keys, None).await.unwrap();
    assert_eq!(revision, store.revision().await.unwrap());
    assert!(keys.iter().zip(values).all(|(key, value)| value.is_some_and(|value| value.value == key)));
    let (at, old) = store.get(&keys, Some(Revision(1))).await.unwrap();
    assert_eq!((at, old.iter().flatten().count()), (Revision(1), 100));
}
