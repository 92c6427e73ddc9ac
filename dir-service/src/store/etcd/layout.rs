//! How keys, revisions and plans of the store are those of etcd.
//!
//! ```text
//! <prefix>store       whose store it is: see `identity`
//! <prefix>tick        written by a plan that changes no key otherwise, so that it takes a revision
//! <prefix>data/<key>  the records
//! ```
//!
//! A revision of the store is etcd's, shifted so that the record of the identity was written at the one that it names as its
//! start: 0 in a new store, behind the last one of where it came from in one that was moved here. Where an etcd has only this store,
//! its plans are numbered without a gap; where others write too, with gaps.

use super::{
    api::{
        Compare, DeleteRangeRequest, KeyValue, PutRequest, RangeRequest, RequestOp, TxnRequest,
        compare::{CompareResult, CompareTarget, TargetUnion},
        request_op,
    },
    client::malformed,
};
use crate::store::{KeyRange, reader::compacted};
use bytes::{Bytes, BytesMut};
use cairn_core::plan::{Key, Mutation, Plan, Precondition, Versioned};
use cairn_proto::{Error, Result, id::Revision};
use std::ops::Bound;

/// Comparisons of a transaction, or operations of its either branch, that every etcd takes (its `--max-txn-ops`, by default).
pub(super) const TXN_OPS_MAX: usize = 128;

/// Names under a prefix.
#[derive(Clone, Debug)]
pub(super) struct Names {
    pub(super) store: Bytes,
    pub(super) tick: Bytes,
    pub(super) data: Bytes,
}

impl Names {
    pub(super) fn under(prefix: &str) -> Self {
        let name = |name: &str| Bytes::from(format!("{prefix}{name}"));
        Self { store: name("store"), tick: name("tick"), data: name("data/") }
    }

    /// The name of a record in etcd.
    pub(super) fn record(&self, key: &[u8]) -> Bytes {
        let mut name = BytesMut::with_capacity(self.data.len() + key.len());
        name.extend_from_slice(&self.data);
        name.extend_from_slice(key);
        name.freeze()
    }

    /// The key of a record by its name in etcd.
    pub(super) fn key(&self, name: &Bytes) -> Result<Key> {
        match name.starts_with(&self.data) {
            true => Ok(name.slice(self.data.len()..)),
            false => Err(malformed("a key that was not asked for")),
        }
    }

    /// First name and name behind the last of a range; `None` of an empty one.
    pub(super) fn range(&self, range: &KeyRange) -> Option<(Bytes, Bytes)> {
        if range.is_empty() {
            return None;
        }
        // The least name behind one is that with a zero byte more.
        let behind = |key: &Key| self.record(&[&key[..], &[0]].concat());
        let start = match &range.start {
            Bound::Unbounded => self.data.clone(),
            Bound::Included(key) => self.record(key),
            Bound::Excluded(key) => behind(key),
        };
        let end = match &range.end {
            Bound::Unbounded => end_of(&self.data),
            Bound::Included(key) => behind(key),
            Bound::Excluded(key) => self.record(key),
        };
        (start < end).then_some((start, end))
    }

    /// Names that begin as those of records with the prefix do.
    pub(super) fn prefix(&self, prefix: &Key) -> (Bytes, Bytes) {
        let start = self.record(prefix);
        let end = end_of(&start);
        (start, end)
    }
}

/// The name behind all that begin with one of ours, which has a byte that is not the last.
fn end_of(name: &Bytes) -> Bytes {
    match KeyRange::prefix(name.clone()).end {
        Bound::Excluded(end) => end,
        // etcd's word for no end.
        _ => Bytes::from_static(&[0]),
    }
}

/// A life of a store in etcd.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    pub(super) names: Names,
    /// etcd's revision of the record of the identity. It changes when the store is moved away or gets another life.
    pub(super) written: i64,
    /// The store's revision at that.
    pub(super) start: Revision,
}

impl Layout {
    /// The store's revision at one of etcd's.
    pub(super) fn revision(&self, etcd: i64) -> Result<Revision> {
        let shifted = i128::from(etcd) - i128::from(self.written) + i128::from(self.start.0);
        u64::try_from(shifted)
            .map(Revision)
            .map_err(|_| malformed("a revision from before the store was made"))
    }

    /// etcd's revision at one of the store.
    pub(super) fn etcd(&self, revision: Revision) -> Result<i64> {
        if revision < self.start {
            return Err(compacted(revision, self.start));
        }
        let ahead = revision.0 - self.start.0;
        i64::try_from(ahead)
            .ok()
            .and_then(|ahead| self.written.checked_add(ahead))
            .ok_or_else(|| Error::invalid(format!("revision {revision} lies ahead of every store")))
    }

    /// A record that etcd answered.
    pub(super) fn versioned(&self, kv: KeyValue) -> Result<Versioned> {
        Ok(Versioned { revision: self.revision(kv.mod_revision)?, value: kv.value })
    }

    /// A plan as a transaction. It is not applied either when the store has another life by now; then, or when a precondition does
    /// not hold, it answers the record of the identity.
    ///
    /// A plan with all the preconditions that are allowed leaves no room for that comparison. That is one of this life's directory
    /// all the same: whoever gives a store another life makes sure first that no directory runs on it.
    pub(super) fn txn(&self, plan: Plan) -> TxnRequest {
        let mut compare = Vec::with_capacity(plan.preconditions.len() + 1);
        compare.extend(plan.preconditions.iter().map(|precondition| self.compare(precondition)));
        if compare.len() < TXN_OPS_MAX {
            compare.push(self.lives());
        }
        // Only what writes takes a revision; removing what is not there does not.
        let writes = plan.mutations.iter().any(|mutation| matches!(mutation, Mutation::Put(..)));
        let mut success: Vec<RequestOp> =
            plan.mutations.into_iter().map(|mutation| self.operation(mutation)).collect();
        if !writes && success.len() < TXN_OPS_MAX {
            success.push(put(self.names.tick.clone(), Bytes::new()));
        }
        TxnRequest { compare, success, failure: vec![range(one(self.names.store.clone()))] }
    }

    /// That the store still has this life.
    pub(super) fn lives(&self) -> Compare {
        written_at(self.names.store.clone(), self.written)
    }

    fn compare(&self, precondition: &Precondition) -> Compare {
        use CompareResult::{Equal, Greater};
        let name = self.names.record(precondition.key());
        match precondition {
            Precondition::Absent(_) | Precondition::Unchanged(_, None) => absent(name),
            Precondition::Exists(_) => {
                compare(name, CompareTarget::Version, Greater, TargetUnion::Version(0))
            }
            Precondition::Unchanged(_, Some(revision)) => {
                // No record has a revision that no store can reach.
                let written = self.record_written(*revision).unwrap_or(i64::MAX);
                compare(name, CompareTarget::Mod, Equal, TargetUnion::ModRevision(written))
            }
        }
    }

    /// etcd's revision of a record's: records that were moved here are older than the start.
    fn record_written(&self, revision: Revision) -> Option<i64> {
        let shifted = i128::from(revision.0) - i128::from(self.start.0) + i128::from(self.written);
        i64::try_from(shifted).ok().filter(|written| *written > 0)
    }

    fn operation(&self, mutation: Mutation) -> RequestOp {
        match mutation {
            Mutation::Put(key, value) => put(self.names.record(&key), value),
            Mutation::Delete(key) => {
                let request = DeleteRangeRequest { key: self.names.record(&key), ..Default::default() };
                RequestOp { request: Some(request_op::Request::RequestDeleteRange(request)) }
            }
        }
    }
}

/// That no name of a range is there.
pub(super) fn all_absent((start, end): (Bytes, Bytes)) -> Compare {
    Compare { range_end: end, ..absent(start) }
}

/// That nothing is there.
pub(super) fn absent(name: Bytes) -> Compare {
    compare(name, CompareTarget::Version, CompareResult::Equal, TargetUnion::Version(0))
}

/// That what is there was written at a revision of etcd.
pub(super) fn written_at(name: Bytes, revision: i64) -> Compare {
    compare(name, CompareTarget::Mod, CompareResult::Equal, TargetUnion::ModRevision(revision))
}

fn compare(key: Bytes, target: CompareTarget, result: CompareResult, union: TargetUnion) -> Compare {
    Compare {
        result: result.into(),
        target: target.into(),
        key,
        range_end: Bytes::new(),
        target_union: Some(union),
    }
}

/// Writes a key.
pub(super) fn put(key: Bytes, value: Bytes) -> RequestOp {
    let request = PutRequest { key, value, ..Default::default() };
    RequestOp { request: Some(request_op::Request::RequestPut(request)) }
}

/// Reads within a transaction.
pub(super) fn range(request: RangeRequest) -> RequestOp {
    RequestOp { request: Some(request_op::Request::RequestRange(request)) }
}

/// Reads one key.
pub(super) fn one(key: Bytes) -> RangeRequest {
    RangeRequest { key, ..Default::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> Layout {
        Layout { names: Names::under("/cairn/"), written: 100, start: Revision(7) }
    }

    #[test]
    fn revisions_are_shifted_there_and_back() {
        let layout = layout();
        assert_eq!(layout.revision(100).unwrap(), Revision(7));
        assert_eq!(layout.revision(93).unwrap(), Revision(0));
        assert!(layout.revision(92).is_err());
        assert_eq!(layout.etcd(Revision(9)).unwrap(), 102);
        assert!(layout.etcd(Revision(6)).is_err(), "from before it was complete");
        assert!(layout.etcd(Revision(u64::MAX)).is_err());
        assert_eq!(layout.record_written(Revision(6)), Some(99));
        assert_eq!(layout.record_written(Revision(u64::MAX)), None);
    }

    #[test]
    fn ranges_become_names() {
        let names = Names::under("/cairn/");
        let text = |range: KeyRange| {
            names.range(&range).map(|(a, b)| format!("{} {}", a.escape_ascii(), b.escape_ascii()))
        };
        assert_eq!(text(KeyRange::all()).unwrap(), "/cairn/data/ /cairn/data0");
        let key = |text: &'static str| Key::from_static(text.as_bytes());
        let range = KeyRange { start: Bound::Excluded(key("a")), end: Bound::Included(key("b")) };
        assert_eq!(text(range).unwrap(), "/cairn/data/a\\x00 /cairn/data/b\\x00");
        let range = KeyRange { start: Bound::Included(key("b")), end: Bound::Excluded(key("b")) };
        assert_eq!(text(range), None);
        let top = KeyRange::prefix(Key::from_static(&[0xff, 0xff]));
        assert_eq!(text(top).unwrap(), "/cairn/data/\\xff\\xff /cairn/data0");
    }

    #[test]
    fn a_plan_at_its_bounds_is_a_transaction_at_its_bounds() {
        let mut plan = Plan::new();
        for number in 0..TXN_OPS_MAX {
            let key = Key::from(number.to_be_bytes().to_vec());
            plan.require(Precondition::Absent(key.clone())).delete(key);
        }
        let txn = layout().txn(plan);
        assert_eq!((txn.compare.len(), txn.success.len(), txn.failure.len()), (TXN_OPS_MAX, TXN_OPS_MAX, 1));
        let txn = layout().txn(Plan::new());
        assert_eq!((txn.compare.len(), txn.success.len()), (1, 1), "the life, and a tick");
    }
}
