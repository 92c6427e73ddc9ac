//! The newest applied plans in memory, with every version they wrote.
//!
//! They lie over something older (an index at `base`): a read at a revision from `base` on finds here what was
//! written behind `base`, and everything else below. Reads at recent revisions, watches and shipping live on this.

use super::{Change, KeyRange};
use bytes::Bytes;
use cairn_core::plan::{Key, Mutation, Versioned};
use cairn_proto::id::Revision;
use std::{
    collections::{BTreeMap, VecDeque, btree_map::Entry},
    sync::Arc,
};

/// A plan that was applied.
#[derive(Debug)]
pub(super) struct Applied {
    /// Its number.
    pub(super) revision: Revision,
    /// Its mutations as [`super::codec`] writes them.
    pub(super) encoded: Bytes,
    /// The same, decoded; keys and values share the bytes of `encoded`.
    pub(super) mutations: Vec<Mutation>,
}

/// What a plan and each of its mutations take in memory beside their bytes, roughly: the mutation itself, and its
/// share of the map of versions.
const OVERHEAD_BYTES: usize = 256;

impl Applied {
    /// Memory it takes here, roughly.
    pub(super) fn bytes(&self) -> usize {
        self.encoded.len() + OVERHEAD_BYTES * (1 + self.mutations.len())
    }
}

/// What a plan made of a key: `None` where it was removed.
type Version = (Revision, Option<Bytes>);

/// Versions of a key. Nearly all keys have one, which takes no allocation of its own.
#[derive(Debug)]
struct Versions {
    oldest: Version,
    newer: VecDeque<Version>,
}

impl Versions {
    /// The newest version up to a revision.
    fn at(&self, at: Revision) -> Option<Option<Versioned>> {
        let behind = self.newer.partition_point(|(revision, _)| *revision <= at);
        let (revision, value) = match behind.checked_sub(1) {
            Some(index) => &self.newer[index],
            None if self.oldest.0 <= at => &self.oldest,
            None => return None,
        };
        Some(value.clone().map(|value| Versioned { value, revision: *revision }))
    }
}

/// The newest plans.
#[derive(Debug)]
pub(super) struct Recent {
    base: Revision,
    last: Revision,
    plans: VecDeque<Arc<Applied>>,
    versions: BTreeMap<Key, Versions>,
    bytes: usize,
}

impl Recent {
    /// None yet, over something at `base`.
    pub(super) fn over(base: Revision) -> Self {
        Self { base, last: base, plans: VecDeque::new(), versions: BTreeMap::new(), bytes: 0 }
    }

    /// The revision of what lies below: older ones cannot be read.
    pub(super) fn base(&self) -> Revision {
        self.base
    }

    /// The newest revision.
    pub(super) fn last(&self) -> Revision {
        self.last
    }

    /// Plans behind the base.
    pub(super) fn len(&self) -> usize {
        (self.last.0 - self.base.0) as usize
    }

    /// Memory taken by all plans, roughly.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Adds the plan behind the newest.
    pub(super) fn push(&mut self, plan: Arc<Applied>) {
        debug_assert_eq!(plan.revision.0, self.last.0 + 1);
        self.last = plan.revision;
        self.bytes += plan.bytes();
        for mutation in &plan.mutations {
            let (key, value) = match mutation {
                Mutation::Put(key, value) => (key, Some(value.clone())),
                Mutation::Delete(key) => (key, None),
            };
            match self.versions.entry(key.clone()) {
                Entry::Vacant(entry) => {
                    entry.insert(Versions { oldest: (plan.revision, value), newer: VecDeque::new() });
                }
                Entry::Occupied(mut entry) => entry.get_mut().newer.push_back((plan.revision, value)),
            }
        }
        self.plans.push_back(plan);
    }

    /// Says that what lies below has reached `base`. Plans up to there stay until [`Recent::forget_some`]: they do no
    /// harm, since the version of a key that they hold is the one below.
    pub(super) fn rebase(&mut self, base: Revision) {
        debug_assert!(self.base <= base && base <= self.last);
        self.base = base;
    }

    /// Frees at most `count` plans up to the base; whether more are left to free. In steps, so that no reader waits
    /// long for the lock around this.
    pub(super) fn forget_some(&mut self, count: usize) -> bool {
        for _ in 0..count {
            if self.plans.front().is_none_or(|plan| plan.revision > self.base) {
                return false;
            }
            let Some(plan) = self.plans.pop_front() else { return false };
            self.bytes -= plan.bytes();
            for mutation in &plan.mutations {
                let Some(versions) = self.versions.get_mut(mutation.key()) else { continue };
                if versions.oldest.0 > plan.revision {
                    continue;
                }
                match versions.newer.pop_front() {
                    Some(next) => versions.oldest = next,
                    None => drop(self.versions.remove(mutation.key())),
                }
            }
        }
        self.plans.front().is_some_and(|plan| plan.revision <= self.base)
    }

    /// The key's value at a revision: `None` when what lies below has it, `Some(None)` when it was removed.
    pub(super) fn get(&self, key: &Key, at: Revision) -> Option<Option<Versioned>> {
        self.versions.get(key).and_then(|versions| versions.at(at))
    }

    /// At most `count` keys of a range that were changed up to a revision, and whether there are more.
    pub(super) fn range(&self, range: &KeyRange, at: Revision, count: usize) -> (Vec<Changed>, bool) {
        if range.is_empty() {
            return (Vec::new(), false);
        }
        let bounds = (range.start.as_ref(), range.end.as_ref());
        let mut changed = self
            .versions
            .range::<Key, _>(bounds)
            .filter_map(|(key, versions)| Some((key.clone(), versions.at(at)?)));
        let page = changed.by_ref().take(count).collect();
        (page, changed.next().is_some())
    }

    /// Plans from a revision on (inclusive) that are kept, in order.
    pub(super) fn since(&self, from: Revision) -> impl Iterator<Item = &Arc<Applied>> {
        let at = self.plans.partition_point(|plan| plan.revision < from);
        self.plans.range(at..)
    }
}

/// A key, and its value or that it was removed.
pub(super) type Changed = (Key, Option<Versioned>);

/// The part of a plan that a watcher of `prefix` sees, if any.
pub(super) fn change(plan: &Applied, prefix: &Key) -> Option<Change> {
    let mutations: Vec<Mutation> =
        plan.mutations.iter().filter(|mutation| mutation.key().starts_with(prefix)).cloned().collect();
    (!mutations.is_empty()).then_some(Change { revision: plan.revision, mutations })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn applied(revision: u64, mutations: Vec<Mutation>) -> Arc<Applied> {
        Arc::new(Applied { revision: Revision(revision), encoded: Bytes::new(), mutations })
    }

    #[test]
    fn versions_are_found_by_revision_and_forgotten_from_the_oldest() {
        let key = Key::from_static(b"k");
        let put =
            |value: &'static str| Mutation::Put(Key::from_static(b"k"), Bytes::from_static(value.as_bytes()));
        let mut recent = Recent::over(Revision(4));
        recent.push(applied(5, vec![put("a")]));
        recent.push(applied(6, vec![Mutation::Delete(key.clone())]));
        recent.push(applied(7, vec![put("c")]));
        let value = |recent: &Recent, at| recent.get(&key, Revision(at)).map(|found| found.map(|v| v.value));
        assert_eq!(value(&recent, 4), None);
        assert_eq!(value(&recent, 5), Some(Some(Bytes::from_static(b"a"))));
        assert_eq!(value(&recent, 6), Some(None));
        assert_eq!(value(&recent, 9), Some(Some(Bytes::from_static(b"c"))));
        recent.rebase(Revision(6));
        assert!(recent.forget_some(1));
        assert!(!recent.forget_some(10));
        assert_eq!(value(&recent, 6), None);
        assert_eq!(value(&recent, 7), Some(Some(Bytes::from_static(b"c"))));
        recent.rebase(Revision(7));
        recent.forget_some(10);
        assert_eq!((recent.bytes(), recent.len(), recent.versions.len()), (0, 0, 0));
    }
}
