//! Whether a history of concurrent operations could have happened one after the other.
//!
//! The search of Wing and Gong, with the memory of Lowe: an operation may be next when none that was answered before it
//! was asked is still to come; a set of done operations with the state they led to is tried once. An operation without
//! an answer may have been done at any time after it was asked, or never.

use std::{collections::HashSet, hash::Hash};

/// The reference: what operations do, one at a time.
pub trait Model: Clone + Eq + Hash {
    /// What is asked.
    type Op;
    /// What is answered.
    type Ret: PartialEq;

    /// Does it.
    fn apply(&mut self, op: &Self::Op) -> Self::Ret;
}

/// One operation of a history.
#[derive(Clone, Debug)]
pub struct Call<O, R> {
    /// When it was asked.
    pub asked: u64,
    /// When it was answered, and what; nothing when the outcome is not known.
    pub answered: Option<(u64, R)>,
    /// What was asked.
    pub op: O,
}

/// Longest history: operations are bits of a word.
pub const CALLS_MAX: usize = 64;
/// Most states that are tried before the question is given up.
const STATES_MAX: usize = 2_000_000;

/// What a search found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// There is an order.
    Linearizable,
    /// There is none.
    Violation,
    /// Too many orders to try.
    Unknown,
}

/// Looks for an order of all answered calls, and any of the others, that the model agrees with.
pub fn check<M: Model>(first: M, calls: &[Call<M::Op, M::Ret>]) -> Verdict {
    assert!(calls.len() <= CALLS_MAX, "a history of {} calls is too long", calls.len());
    let must = calls.iter().enumerate().filter(|(_, call)| call.answered.is_some());
    let must: u64 = must.map(|(number, _)| 1 << number).sum();
    let mut seen = HashSet::new();
    let mut waiting = vec![(0u64, first)];
    while let Some((done, state)) = waiting.pop() {
        if done & must == must {
            return Verdict::Linearizable;
        }
        // Whatever comes next was asked before the first answer among those still to come.
        let open = |number: usize| done & (1 << number) == 0;
        let first_answer = calls
            .iter()
            .enumerate()
            .filter(|(number, _)| open(*number))
            .filter_map(|(_, call)| call.answered.as_ref().map(|(at, _)| *at))
            .min()
            .unwrap_or(u64::MAX);
        for (number, call) in calls.iter().enumerate() {
            if !open(number) || call.asked > first_answer {
                continue;
            }
            let mut after = state.clone();
            let ret = after.apply(&call.op);
            if call.answered.as_ref().is_some_and(|(_, answer)| *answer != ret) {
                continue;
            }
            let next = (done | 1 << number, after);
            if seen.insert(next.clone()) {
                waiting.push(next);
            }
        }
        if seen.len() > STATES_MAX {
            return Verdict::Unknown;
        }
    }
    Verdict::Violation
}

/// Names that lead to contents, for a few paths in one folder.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Names(pub std::collections::BTreeMap<u8, u64>);

/// What is done with them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// An empty file, 0, where there was nothing.
    Create(u8),
    /// A file where there was nothing.
    WriteNew(u8, u64),
    /// A file, new or replaced.
    Write(u8, u64),
    /// Its content.
    Read(u8),
    /// Nothing where there was a file.
    Delete(u8),
    /// Another name, which may replace.
    Rename(u8, u8),
    /// All names.
    List,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ret {
    /// Done.
    Done,
    /// The content, if there is a file.
    Content(Option<u64>),
    /// There is nothing.
    Missing,
    /// There is something.
    Exists,
    /// The names.
    Names(Vec<u8>),
}

impl Model for Names {
    type Op = Op;
    type Ret = Ret;

    fn apply(&mut self, op: &Op) -> Ret {
        match *op {
            Op::Create(path) | Op::WriteNew(path, _) if self.0.contains_key(&path) => Ret::Exists,
            Op::Create(path) => {
                self.0.insert(path, 0);
                Ret::Done
            }
            Op::WriteNew(path, value) | Op::Write(path, value) => {
                self.0.insert(path, value);
                Ret::Done
            }
            Op::Read(path) => Ret::Content(self.0.get(&path).copied()),
            Op::Delete(path) => self.0.remove(&path).map_or(Ret::Missing, |_| Ret::Done),
            Op::Rename(from, to) => match self.0.remove(&from) {
                None => Ret::Missing,
                Some(content) => {
                    self.0.insert(to, content);
                    Ret::Done
                }
            },
            Op::List => Ret::Names(self.0.keys().copied().collect()),
        }
    }
}

#[test]
fn histories_are_told_apart() {
    let call = |asked, answered, op| Call { asked, answered, op };
    let write = |asked, answered: Option<u64>, value| {
        call(asked, answered.map(|at| (at, Ret::Done)), Op::Write(0, value))
    };
    let read = |asked, answered, value| call(asked, Some((answered, Ret::Content(value))), Op::Read(0));
    let check = |calls: &[_]| check(Names::default(), calls);

    assert_eq!(check(&[write(0, Some(1), 5), read(2, 3, Some(5))]), Verdict::Linearizable);
    assert_eq!(check(&[write(0, Some(1), 5), read(2, 3, None)]), Verdict::Violation, "a stale read");
    assert_eq!(check(&[write(0, Some(9), 5), read(2, 3, None), read(4, 5, Some(5))]), Verdict::Linearizable);
    assert_eq!(check(&[write(0, Some(9), 5), read(2, 3, Some(5)), read(4, 5, None)]), Verdict::Violation);
    // One whose answer was lost may be done late, or never.
    assert_eq!(check(&[write(0, None, 5), read(2, 3, None), read(4, 5, Some(5))]), Verdict::Linearizable);
    assert_eq!(check(&[write(0, None, 5), read(2, 3, None)]), Verdict::Linearizable);
    let twice = [write(0, None, 5), write(2, Some(3), 6), read(4, 5, Some(5)), read(6, 7, Some(6))];
    assert_eq!(check(&twice), Verdict::Violation, "done twice");
}
