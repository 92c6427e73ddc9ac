//! A plan: what a decision hands to the directory's store, applied all or not at all.
//!
//! Plans are small in every engine: at most [`PLAN_PRECONDITIONS_MAX`] preconditions, [`PLAN_MUTATIONS_MAX`]
//! mutations and [`PLAN_BYTES_MAX`] bytes. Larger work goes in steps, each valid alone and resumable.

use bytes::Bytes;
use cairn_proto::{Error, Result, id::Revision};

/// Most preconditions of a plan.
pub const PLAN_PRECONDITIONS_MAX: usize = 128;
/// Most mutations of a plan.
pub const PLAN_MUTATIONS_MAX: usize = 128;
/// Most bytes of all keys and values of a plan.
pub const PLAN_BYTES_MAX: usize = 1024 * 1024;

/// A key of the store. Keys order as bytes.
pub type Key = Bytes;

/// A value with the revision of the plan that wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Versioned {
    /// The bytes.
    pub value: Bytes,
    /// The plan that wrote them.
    pub revision: Revision,
}

/// What must hold for a plan to be applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Precondition {
    /// The key has no value.
    Absent(Key),
    /// The key has a value, whichever.
    Exists(Key),
    /// The key's value was written at this revision; `None`: it still has none.
    Unchanged(Key, Option<Revision>),
}

impl Precondition {
    /// The key it is about.
    pub fn key(&self) -> &Key {
        match self {
            Self::Absent(key) | Self::Exists(key) | Self::Unchanged(key, _) => key,
        }
    }

    /// Whether it holds of a key last written at `revision`, or absent.
    pub fn holds(&self, revision: Option<Revision>) -> bool {
        match self {
            Self::Absent(_) => revision.is_none(),
            Self::Exists(_) => revision.is_some(),
            Self::Unchanged(_, expected) => revision == *expected,
        }
    }
}

/// A change of one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// Writes a value.
    Put(Key, Bytes),
    /// Removes a value; removing an absent one changes nothing.
    Delete(Key),
}

impl Mutation {
    /// The key it changes.
    pub fn key(&self) -> &Key {
        match self {
            Self::Put(key, _) | Self::Delete(key) => key,
        }
    }
}

/// Preconditions and mutations. Each key is mutated at most once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// What must hold.
    pub preconditions: Vec<Precondition>,
    /// What changes.
    pub mutations: Vec<Mutation>,
}

impl Plan {
    /// An empty plan.
    pub fn new() -> Self {
        Self::default()
    }

    /// Requires something; a repeated identical requirement is kept once.
    pub fn require(&mut self, precondition: Precondition) -> &mut Self {
        if !self.preconditions.contains(&precondition) {
            self.preconditions.push(precondition);
        }
        self
    }

    /// Requires that a key is as it was read: at its revision, or absent.
    pub fn require_unchanged(&mut self, key: Key, read: Option<&Versioned>) -> &mut Self {
        self.require(Precondition::Unchanged(key, read.map(|versioned| versioned.revision)))
    }

    /// Changes a key; a later change of the same key replaces an earlier one.
    pub fn mutate(&mut self, mutation: Mutation) -> &mut Self {
        match self.mutations.iter_mut().find(|earlier| earlier.key() == mutation.key()) {
            Some(earlier) => *earlier = mutation,
            None => self.mutations.push(mutation),
        }
        self
    }

    /// Writes a key.
    pub fn put(&mut self, key: Key, value: impl Into<Bytes>) -> &mut Self {
        self.mutate(Mutation::Put(key, value.into()))
    }

    /// Removes a key.
    pub fn delete(&mut self, key: Key) -> &mut Self {
        self.mutate(Mutation::Delete(key))
    }

    /// Bytes of all keys and values.
    pub fn bytes(&self) -> usize {
        let preconditions: usize =
            self.preconditions.iter().map(|precondition| precondition.key().len()).sum();
        let mutations: usize = self
            .mutations
            .iter()
            .map(|mutation| match mutation {
                Mutation::Put(key, value) => key.len() + value.len(),
                Mutation::Delete(key) => key.len(),
            })
            .sum();
        preconditions + mutations
    }

    /// Checks the bounds that every engine keeps.
    ///
    /// # Errors
    /// `LIMIT_EXCEEDED` beyond them; `INTERNAL` when a key is changed twice.
    pub fn check(&self) -> Result<()> {
        if self.preconditions.len() > PLAN_PRECONDITIONS_MAX
            || self.mutations.len() > PLAN_MUTATIONS_MAX
            || self.bytes() > PLAN_BYTES_MAX
        {
            return Err(Error::limit(format!(
                "a plan has {} preconditions, {} mutations and {} bytes; at most {PLAN_PRECONDITIONS_MAX}, \
                 {PLAN_MUTATIONS_MAX} and {PLAN_BYTES_MAX} are allowed",
                self.preconditions.len(),
                self.mutations.len(),
                self.bytes()
            )));
        }
        let mut keys: Vec<&Key> = self.mutations.iter().map(Mutation::key).collect();
        keys.sort_unstable();
        if keys.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(Error::internal("a plan changes a key twice"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_change_of_a_key_replaces_the_earlier() {
        let mut plan = Plan::new();
        plan.put(Key::from_static(b"a"), "1").delete(Key::from_static(b"a"));
        assert_eq!(plan.mutations, [Mutation::Delete(Key::from_static(b"a"))]);
        assert!(plan.check().is_ok());
    }

    #[test]
    fn bounds_are_checked() {
        let mut plan = Plan::new();
        for number in 0..=PLAN_MUTATIONS_MAX {
            plan.put(Key::from(number.to_be_bytes().to_vec()), "x");
        }
        assert!(plan.check().is_err());
    }
}
