//! What every engine must do. One suite, run by each of them.
//!
//! [`run`] takes a maker of empty stores; [`run_reopened`] one of stores that outlive their handles.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a suite of tests, also where it is compiled as a library

use super::{Change, CommitError, KeyRange, MetaStore, SCAN_BYTES_MAX};
use bytes::Bytes;
use cairn_core::plan::{
    Key, Mutation, PLAN_BYTES_MAX, PLAN_MUTATIONS_MAX, PLAN_PRECONDITIONS_MAX, Plan, Precondition,
};
use cairn_proto::{Reason, id::Revision};
use futures::{FutureExt as _, StreamExt as _, future::join_all};
use std::{future::Future, ops::Bound, sync::Arc};

/// Writers in the tests of concurrency.
const WRITERS: usize = 16;
/// Commits of each.
const ROUNDS: usize = 20;

/// Runs everything that holds of a living store, each on a store of its own.
pub async fn run<S: MetaStore, F: Future<Output = Arc<S>>>(make: impl Fn() -> F) {
    revisions_count_applied_plans(&*make().await).await;
    preconditions_of_each_kind(&*make().await).await;
    a_plan_is_applied_whole_or_not_at_all(&*make().await).await;
    plans_beyond_their_bounds_are_refused(&*make().await).await;
    deleted_keys_are_absent_and_can_be_created_again(&*make().await).await;
    reads_at_a_revision_see_exactly_that_revision(&*make().await).await;
    revisions_that_are_not_there_are_refused(&*make().await).await;
    scans_keep_their_bounds_and_limits(&*make().await).await;
    scans_merge_changes_of_all_ages(&*make().await).await;
    scans_bound_their_bytes(&*make().await).await;
    watches_see_every_change_once_in_order(&*make().await).await;
    watches_resume_and_wait(&*make().await).await;
    concurrent_increments_lose_nothing(make().await).await;
    one_of_many_creators_wins(make().await).await;
    acknowledged_commits_are_read_by_all(make().await).await;
    snapshots_stay_whole_under_commits(make().await).await;
}

/// Runs what holds of a store that keeps at most `keep` recent plans, so that older revisions go.
pub async fn run_compacting<S: MetaStore, F: Future<Output = Arc<S>>>(keep: usize, make: impl Fn() -> F) {
    old_revisions_are_compacted(&*make().await, keep).await;
    a_slow_watcher_is_told(&*make().await, keep).await;
}

/// Runs what holds of a store across its handles; `open` opens the same one again after `close` has closed it.
pub async fn run_reopened<S: MetaStore, F: Future<Output = Arc<S>>>(
    open: impl Fn() -> F,
    close: impl AsyncFn(Arc<S>),
) {
    let store = open().await;
    for number in 0..50u32 {
        put(&*store, &format!("a{number:03}"), &number.to_string()).await;
    }
    let mut plan = Plan::new();
    plan.delete(key("a007")).put(key("b"), "new");
    let last = store.commit(plan).await.unwrap();
    let (_, before) = store.scan(KeyRange::all(), 1_000, None).await.unwrap();
    close(store).await;
    let store = open().await;
    assert_eq!(store.revision().await.unwrap(), last);
    let (revision, after) = store.scan(KeyRange::all(), 1_000, None).await.unwrap();
    assert_eq!((revision, &after), (last, &before));
    assert_eq!(after.entries.len(), 50);
    // What was written before still decides.
    let mut plan = Plan::new();
    plan.require(Precondition::Absent(key("b"))).put(key("c"), "");
    assert_eq!(store.commit(plan).await, Err(CommitError::Conflict));
    let mut plan = Plan::new();
    plan.require(Precondition::Unchanged(key("b"), Some(last))).require(Precondition::Absent(key("a007")));
    plan.require(Precondition::Exists(key("a008")));
    assert_eq!(store.commit(plan).await, Ok(Revision(last.0 + 1)));
    close(store).await;
    let store = open().await;
    assert_eq!(store.revision().await.unwrap(), Revision(last.0 + 1), "an empty plan counts too");
    assert_eq!(store.scan(KeyRange::all(), 1_000, None).await.unwrap().1, before);
    close(store).await;
}

fn key(text: &str) -> Key {
    Key::copy_from_slice(text.as_bytes())
}

async fn put(store: &dyn MetaStore, at: &str, value: &str) -> Revision {
    let mut plan = Plan::new();
    plan.put(key(at), value.to_owned());
    store.commit(plan).await.unwrap()
}

async fn get(store: &dyn MetaStore, at: &str, revision: Option<Revision>) -> Option<(String, u64)> {
    let (_, values) = store.get(&[key(at)], revision).await.unwrap();
    let value = values.into_iter().next().unwrap()?;
    Some((String::from_utf8(value.value.to_vec()).unwrap(), value.revision.0))
}

fn text(value: &str, revision: u64) -> Option<(String, u64)> {
    Some((value.to_owned(), revision))
}

async fn revisions_count_applied_plans(store: &dyn MetaStore) {
    assert_eq!(store.revision().await.unwrap(), Revision(0));
    assert_eq!(put(store, "a", "1").await, Revision(1));
    assert_eq!(put(store, "b", "2").await, Revision(2));
    assert_eq!(put(store, "a", "3").await, Revision(3));
    assert_eq!(store.commit(Plan::new()).await, Ok(Revision(4)), "an empty plan is a plan");
    assert_eq!(store.revision().await.unwrap(), Revision(4));
    let (revision, values) = store.get(&[key("b"), key("x"), key("a"), key("b")], None).await.unwrap();
    assert_eq!(revision, Revision(4));
    let found: Vec<_> = values.into_iter().map(|value| value.map(|v| (v.value, v.revision.0))).collect();
    let (b, a) = (Bytes::from_static(b"2"), Bytes::from_static(b"3"));
    assert_eq!(found, [Some((b.clone(), 2)), None, Some((a, 3)), Some((b, 2))]);
    assert_eq!(store.get(&[], None).await.unwrap(), (Revision(4), vec![]));
}

async fn preconditions_of_each_kind(store: &dyn MetaStore) {
    let first = put(store, "there", "1").await;
    put(store, "there", "2").await;
    let now = Revision(first.0 + 1);
    let cases = [
        (Precondition::Absent(key("there")), false),
        (Precondition::Absent(key("gone")), true),
        (Precondition::Exists(key("there")), true),
        (Precondition::Exists(key("gone")), false),
        (Precondition::Unchanged(key("there"), Some(now)), true),
        (Precondition::Unchanged(key("there"), Some(first)), false),
        (Precondition::Unchanged(key("there"), None), false),
        (Precondition::Unchanged(key("gone"), None), true),
        (Precondition::Unchanged(key("gone"), Some(now)), false),
    ];
    for (precondition, holds) in cases {
        let before = store.revision().await.unwrap();
        let mut plan = Plan::new();
        plan.require(precondition.clone()).put(key("other"), "x");
        let expected = if holds { Ok(Revision(before.0 + 1)) } else { Err(CommitError::Conflict) };
        assert_eq!(store.commit(plan).await, expected, "{precondition:?}");
        let after = store.revision().await.unwrap();
        assert_eq!(after.0 - before.0, u64::from(holds), "a conflict takes no revision: {precondition:?}");
    }
}

async fn a_plan_is_applied_whole_or_not_at_all(store: &dyn MetaStore) {
    put(store, "a", "old").await;
    let mut plan = Plan::new();
    plan.put(key("a"), "new").put(key("b"), "new").delete(key("c"));
    plan.require(Precondition::Exists(key("a"))).require(Precondition::Exists(key("missing")));
    assert_eq!(store.commit(plan.clone()).await, Err(CommitError::Conflict));
    assert_eq!(get(store, "a", None).await, text("old", 1));
    assert_eq!(get(store, "b", None).await, None);
    plan.preconditions.pop();
    assert_eq!(store.commit(plan).await, Ok(Revision(2)));
    assert_eq!(get(store, "a", None).await, text("new", 2));
    assert_eq!(get(store, "b", None).await, text("new", 2));
}

async fn plans_beyond_their_bounds_are_refused(store: &dyn MetaStore) {
    let number = |number: usize| key(&format!("{number:04}"));
    let mut largest = Plan::new();
    for at in 0..PLAN_PRECONDITIONS_MAX {
        largest.require(Precondition::Absent(number(at)));
    }
    for at in 0..PLAN_MUTATIONS_MAX {
        largest.put(number(at), "");
    }
    let rest = PLAN_BYTES_MAX - largest.bytes();
    largest.put(number(0), vec![b'x'; rest]);
    assert_eq!(largest.bytes(), PLAN_BYTES_MAX);

    let mut many_preconditions = largest.clone();
    many_preconditions.put(number(0), "").require(Precondition::Absent(key("one more")));
    let mut many_mutations = largest.clone();
    many_mutations.put(number(0), "").delete(key("one more"));
    let mut many_bytes = largest.clone();
    many_bytes.put(number(1), "x");
    for plan in [many_preconditions, many_mutations, many_bytes] {
        match store.commit(plan).await {
            Err(CommitError::Refused(error)) => assert_eq!(error.reason, Reason::LimitExceeded),
            other => panic!("a plan beyond its bounds: {other:?}"),
        }
    }
    let twice = Plan { preconditions: vec![], mutations: vec![Mutation::Delete(key("a")); 2] };
    assert!(matches!(store.commit(twice).await, Err(CommitError::Refused(_))));
    assert_eq!(store.revision().await.unwrap(), Revision(0), "nothing changed");
    assert_eq!(store.commit(largest).await, Ok(Revision(1)));
    assert_eq!(get(store, "0000", None).await.unwrap().0.len(), rest);
}

async fn deleted_keys_are_absent_and_can_be_created_again(store: &dyn MetaStore) {
    put(store, "a", "1").await;
    let mut plan = Plan::new();
    plan.delete(key("a")).delete(key("never"));
    assert_eq!(store.commit(plan.clone()).await, Ok(Revision(2)));
    assert_eq!(store.commit(plan).await, Ok(Revision(3)), "removing what is gone changes nothing");
    assert_eq!(get(store, "a", None).await, None);
    let (_, page) = store.scan(KeyRange::all(), 10, None).await.unwrap();
    assert_eq!((page.entries.len(), page.more), (0, false));
    let mut create = Plan::new();
    create.require(Precondition::Absent(key("a"))).put(key("a"), "2");
    assert_eq!(store.commit(create.clone()).await, Ok(Revision(4)));
    assert_eq!(store.commit(create).await, Err(CommitError::Conflict));
    // Not the value that was read before it was deleted.
    let mut plan = Plan::new();
    plan.require(Precondition::Unchanged(key("a"), Some(Revision(1)))).delete(key("a"));
    assert_eq!(store.commit(plan).await, Err(CommitError::Conflict));
    assert_eq!(get(store, "a", None).await, text("2", 4));
    let empty = put(store, "empty", "").await;
    assert_eq!(get(store, "empty", None).await, text("", empty.0), "an empty value is a value");
}

async fn reads_at_a_revision_see_exactly_that_revision(store: &dyn MetaStore) {
    put(store, "a", "1").await;
    put(store, "b", "2").await;
    let mut plan = Plan::new();
    plan.put(key("a"), "3").delete(key("b")).put(key("c"), "3");
    store.commit(plan).await.unwrap();
    put(store, "b", "4").await;
    let expected: [&[(&str, &str, u64)]; 5] = [
        &[],
        &[("a", "1", 1)],
        &[("a", "1", 1), ("b", "2", 2)],
        &[("a", "3", 3), ("c", "3", 3)],
        &[("a", "3", 3), ("b", "4", 4), ("c", "3", 3)],
    ];
    for (at, expected) in expected.iter().enumerate() {
        let at = Revision(at as u64);
        let (revision, page) = store.scan(KeyRange::all(), 10, Some(at)).await.unwrap();
        assert_eq!(revision, at);
        let found: Vec<_> =
            page.entries.iter().map(|(key, v)| (&key[..], &v.value[..], v.revision.0)).collect();
        let expected: Vec<_> = expected.iter().map(|(k, v, r)| (k.as_bytes(), v.as_bytes(), *r)).collect();
        assert_eq!(found, expected, "at {at}");
        for name in ["a", "b", "c", "d"] {
            let one = expected.iter().find(|(k, _, _)| *k == name.as_bytes());
            let one = one.map(|(_, v, r)| (String::from_utf8(v.to_vec()).unwrap(), *r));
            assert_eq!(get(store, name, Some(at)).await, one, "{name} at {at}");
        }
    }
}

async fn revisions_that_are_not_there_are_refused(store: &dyn MetaStore) {
    put(store, "a", "1").await;
    let ahead = Some(Revision(2));
    assert_eq!(store.get(&[key("a")], ahead).await.unwrap_err().reason, Reason::InvalidArgument);
    assert_eq!(store.scan(KeyRange::all(), 1, ahead).await.unwrap_err().reason, Reason::InvalidArgument);
}

async fn scan_keys(
    store: &dyn MetaStore,
    start: Bound<&str>,
    end: Bound<&str>,
    limit: usize,
) -> (String, bool) {
    let range = KeyRange { start: start.map(key), end: end.map(key) };
    let (_, page) = store.scan(range, limit, None).await.unwrap();
    let keys: Vec<_> = page.entries.iter().map(|(key, _)| std::str::from_utf8(key).unwrap()).collect();
    (keys.join(" "), page.more)
}

async fn scans_keep_their_bounds_and_limits(store: &dyn MetaStore) {
    use Bound::{Excluded, Included, Unbounded};
    let mut plan = Plan::new();
    for name in ["a", "ab", "b", "c", "d"] {
        plan.put(key(name), "");
    }
    store.commit(plan).await.unwrap();
    let found = |keys: &str, more| (keys.to_owned(), more);
    assert_eq!(scan_keys(store, Unbounded, Unbounded, 10).await, found("a ab b c d", false));
    assert_eq!(scan_keys(store, Included("ab"), Excluded("d"), 10).await, found("ab b c", false));
    assert_eq!(scan_keys(store, Excluded("ab"), Included("d"), 10).await, found("b c d", false));
    assert_eq!(scan_keys(store, Included("ab"), Excluded("d"), 3).await, found("ab b c", false));
    assert_eq!(scan_keys(store, Included("ab"), Excluded("d"), 2).await, found("ab b", true));
    assert_eq!(scan_keys(store, Unbounded, Unbounded, 1).await, found("a", true));
    assert_eq!(scan_keys(store, Excluded("d"), Unbounded, 1).await, found("", false));
    for (start, end) in [
        (Included("c"), Included("b")),
        (Excluded("b"), Excluded("b")),
        (Included("b"), Excluded("b")),
        (Excluded("b"), Included("b")),
        (Excluded("d"), Excluded("a")),
    ] {
        assert_eq!(scan_keys(store, start, end, 10).await, found("", false), "an empty range is no error");
    }
    let prefix = |prefix: &str| KeyRange::prefix(key(prefix));
    let count = async |range| store.scan(range, 10, None).await.unwrap().1.entries.len();
    assert_eq!(count(prefix("a")).await, 2);
    assert_eq!(count(prefix("")).await, 5);
    assert_eq!(count(prefix("x")).await, 0);
    let top = Key::from_static(&[0xff, 0xff]);
    let mut plan = Plan::new();
    plan.put(top.clone(), "");
    store.commit(plan).await.unwrap();
    assert_eq!(count(KeyRange::prefix(Key::from_static(&[0xff]))).await, 1);
    assert_eq!(count(KeyRange::prefix(top)).await, 1);
}

async fn scans_merge_changes_of_all_ages(store: &dyn MetaStore) {
    let name = |number: usize| key(&format!("{number:05}"));
    let mut expected = Vec::new();
    for step in 0..30usize {
        let mut plan = Plan::new();
        for at in 0..60 {
            plan.put(name(step * 50 + at), step.to_string());
        }
        store.commit(plan).await.unwrap();
        let mut plan = Plan::new();
        for at in (0..60).step_by(3) {
            plan.delete(name(step * 50 + at));
        }
        store.commit(plan).await.unwrap();
    }
    let revision = store.revision().await.unwrap();
    for number in 0..1_510 {
        if store.get(&[name(number)], Some(revision)).await.unwrap().1[0].is_some() {
            expected.push(name(number));
        }
    }
    assert!(expected.len() > 900);
    for limit in [1, 7, 100, 5_000] {
        let mut range = KeyRange::all();
        let mut found = Vec::new();
        loop {
            let (at, page) = store.scan(range.clone(), limit, Some(revision)).await.unwrap();
            assert_eq!(at, revision);
            assert!(page.entries.len() <= limit);
            found.extend(page.entries.into_iter().map(|(key, _)| key));
            if !page.more {
                break;
            }
            range = range.behind(found.last().unwrap().clone());
        }
        assert_eq!(found, expected, "in pages of {limit}");
    }
}

async fn scans_bound_their_bytes(store: &dyn MetaStore) {
    let value = vec![b'v'; PLAN_BYTES_MAX / 2];
    let count = 2 * SCAN_BYTES_MAX / value.len() + 1;
    for number in 0..count {
        let mut plan = Plan::new();
        plan.put(key(&format!("{number:03}")), value.clone());
        store.commit(plan).await.unwrap();
    }
    let (mut range, mut seen) = (KeyRange::all(), 0);
    loop {
        let (_, page) = store.scan(range.clone(), 1_000, None).await.unwrap();
        let bytes: usize = page.entries.iter().map(|(key, v)| key.len() + v.value.len()).sum();
        assert!(bytes <= SCAN_BYTES_MAX && !page.entries.is_empty());
        seen += page.entries.len();
        if !page.more {
            break;
        }
        range = range.behind(page.entries.last().unwrap().0.clone());
    }
    assert_eq!(seen, count);
}

async fn watches_see_every_change_once_in_order(store: &dyn MetaStore) {
    put(store, "w/a", "1").await;
    let mut changes = store.watch(key("w/"), Revision(1)).await.unwrap();
    let mut later = store.watch(key("w/"), Revision(3)).await.unwrap();
    put(store, "v", "2").await;
    let mut plan = Plan::new();
    plan.put(key("w/b"), "3").put(key("x"), "3").delete(key("w/a"));
    store.commit(plan).await.unwrap();
    let put_of =
        |name: &str, value: &'static str| Mutation::Put(key(name), Bytes::from_static(value.as_bytes()));
    let first = Change { revision: Revision(1), mutations: vec![put_of("w/a", "1")] };
    let third =
        Change { revision: Revision(3), mutations: vec![put_of("w/b", "3"), Mutation::Delete(key("w/a"))] };
    assert_eq!(changes.next().await.unwrap().unwrap(), first);
    assert_eq!(changes.next().await.unwrap().unwrap(), third, "plans without watched keys are not told");
    assert_eq!(later.next().await.unwrap().unwrap(), third);
    assert!(changes.next().now_or_never().is_none(), "nothing more for now");
}

async fn watches_resume_and_wait(store: &dyn MetaStore) {
    for _ in 0..10 {
        put(store, "k", "v").await;
    }
    let mut changes = store.watch(key(""), Revision(4)).await.unwrap();
    for expected in 4..=10 {
        assert_eq!(changes.next().await.unwrap().unwrap().revision, Revision(expected));
    }
    drop(changes);
    let mut future = store.watch(key("k"), Revision(12)).await.unwrap();
    put(store, "k", "v").await;
    assert!(future.next().now_or_never().is_none(), "revision 11 is before the start");
    let (change, revision) = futures::join!(future.next(), put(store, "k", "v"));
    assert_eq!(change.unwrap().unwrap().revision, revision);
}

async fn concurrent_increments_lose_nothing<S: MetaStore>(store: Arc<S>) {
    let increment = |store: Arc<S>| async move {
        let mut conflicts = 0u32;
        for _ in 0..ROUNDS {
            loop {
                let (_, values) = store.get(&[key("counter")], None).await.unwrap();
                let read = values[0].as_ref();
                let count =
                    read.map_or(0, |v| std::str::from_utf8(&v.value).unwrap().parse::<u64>().unwrap());
                let mut plan = Plan::new();
                plan.require_unchanged(key("counter"), read).put(key("counter"), (count + 1).to_string());
                match store.commit(plan).await {
                    Ok(_) => break,
                    Err(CommitError::Conflict) => conflicts += 1,
                    Err(other) => panic!("{other:?}"),
                }
                tokio::task::yield_now().await;
            }
        }
        conflicts
    };
    let tasks: Vec<_> = (0..WRITERS).map(|_| tokio::spawn(increment(store.clone()))).collect();
    for task in tasks {
        task.await.unwrap();
    }
    let total = (WRITERS * ROUNDS) as u64;
    assert_eq!(get(&*store, "counter", None).await, text(&total.to_string(), total));
}

async fn one_of_many_creators_wins<S: MetaStore>(store: Arc<S>) {
    let create = |writer: usize| {
        let store = store.clone();
        async move {
            let mut plan = Plan::new();
            plan.require(Precondition::Absent(key("one"))).put(key("one"), writer.to_string());
            store.commit(plan).await
        }
    };
    let results = join_all((0..WRITERS).map(create)).await;
    let won: Vec<usize> = (0..WRITERS).filter(|writer| results[*writer] == Ok(Revision(1))).collect();
    assert_eq!(won.len(), 1, "{results:?}");
    assert_eq!(results.iter().filter(|result| **result == Err(CommitError::Conflict)).count(), WRITERS - 1);
    assert_eq!(get(&*store, "one", None).await, text(&won[0].to_string(), 1));
}

async fn acknowledged_commits_are_read_by_all<S: MetaStore>(store: Arc<S>) {
    let writer = |writer: usize| {
        let store = store.clone();
        tokio::spawn(async move {
            let name = format!("w{writer}");
            for round in 0..ROUNDS {
                let revision = put(&*store, &name, &round.to_string()).await;
                assert!(store.revision().await.unwrap() >= revision);
                // Read by another task, as another client would.
                let (store, name) = (store.clone(), name.clone());
                let read = tokio::spawn(async move { get(&*store, &name, None).await });
                assert_eq!(read.await.unwrap(), text(&round.to_string(), revision.0));
            }
        })
    };
    for task in (0..WRITERS).map(writer).collect::<Vec<_>>() {
        task.await.unwrap();
    }
}

async fn snapshots_stay_whole_under_commits<S: MetaStore>(store: Arc<S>) {
    const KEYS: usize = 40;
    let name = |number: usize| key(&format!("{number:02}"));
    let fill = move |round: usize| {
        let mut plan = Plan::new();
        for number in 0..KEYS {
            // Every other round some keys are missing.
            if round % 2 == 1 && number % 5 == 0 {
                plan.delete(name(number));
            } else {
                plan.put(name(number), round.to_string());
            }
        }
        plan
    };
    store.commit(fill(0)).await.unwrap();
    let writing = {
        let store = store.clone();
        tokio::spawn(async move {
            for round in 1..100 {
                store.commit(fill(round)).await.unwrap();
            }
        })
    };
    let mut seen = 0;
    loop {
        let finished = writing.is_finished();
        let (revision, mut page) = store.scan(KeyRange::all(), 7, None).await.unwrap();
        let mut entries = std::mem::take(&mut page.entries);
        while page.more {
            let range = KeyRange::all().behind(entries.last().unwrap().0.clone());
            page = store.scan(range, 7, Some(revision)).await.unwrap().1;
            entries.append(&mut page.entries);
            tokio::task::yield_now().await;
        }
        let round = entries[0].1.value.clone();
        assert!(entries.iter().all(|(_, v)| v.value == round && v.revision == revision), "one plan's values");
        let odd = std::str::from_utf8(&round).unwrap().parse::<usize>().unwrap() % 2 == 1;
        assert_eq!(entries.len(), if odd { KEYS - KEYS / 5 } else { KEYS });
        seen += 1;
        if finished {
            break;
        }
        tokio::task::yield_now().await;
    }
    writing.await.unwrap();
    assert!(seen > 0);
}

async fn old_revisions_are_compacted(store: &dyn MetaStore, keep: usize) {
    put(store, "first", "1").await;
    for number in 0..4 * keep + 10 {
        put(store, &format!("k{}", number % 7), &number.to_string()).await;
    }
    let last = store.revision().await.unwrap();
    wait_for(async || {
        matches!(store.get(&[key("first")], Some(Revision(1))).await,
            Err(error) if error.reason == Reason::RevisionCompacted)
    })
    .await;
    let scan = store.scan(KeyRange::all(), 1, Some(Revision(1))).await;
    assert_eq!(scan.unwrap_err().reason, Reason::RevisionCompacted);
    let watch = store.watch(key(""), Revision(1)).await;
    assert_eq!(watch.err().unwrap().reason, Reason::RevisionCompacted);
    // What is kept still reads exactly, and what was written long ago is still there.
    for back in 0..keep as u64 {
        let at = Revision(last.0 - back);
        let (_, page) = store.scan(KeyRange::prefix(key("k")), 100, Some(at)).await.unwrap();
        assert_eq!(page.entries.iter().map(|(_, v)| v.revision).max(), Some(at));
        assert_eq!(page.entries.len(), 7);
    }
    assert_eq!(get(store, "first", None).await, text("1", 1));
}

async fn a_slow_watcher_is_told(store: &dyn MetaStore, keep: usize) {
    let mut changes = store.watch(key("k"), Revision(1)).await.unwrap();
    for _ in 0..4 * keep + 10 {
        put(store, "k", "v").await;
    }
    wait_for(async || store.watch(key("k"), Revision(1)).await.is_err()).await;
    let mut expected = 1;
    let error = loop {
        match changes.next().await.unwrap() {
            Ok(change) => assert_eq!(change.revision, Revision(expected), "no change is skipped"),
            Err(error) => break error,
        }
        expected += 1;
    };
    assert_eq!(error.reason, Reason::RevisionCompacted);
    assert!(changes.next().await.is_none());
}

/// Polls until the condition holds; engines compact in the background.
async fn wait_for(mut condition: impl AsyncFnMut() -> bool) {
    let waited = async {
        while !condition().await {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(30), waited).await.expect("within 30 s");
}
