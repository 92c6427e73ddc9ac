//! When a primary waits for a follower, and when a chunk has its receipt. Values in, decision out; no IO, no clock.
//!
//! ```text
//!                 silent 0.3 s after the local copy was durable
//!      +--------+ -------------------------------------------> +------+
//!      | Prompt |                                              | Late |
//!      +--------+ <------------------------------------------- +------+
//!        |    ^                     answered                       |
//!        |    | answered                                           |
//!        |    +---------- +--------+                               |
//!        +--------------> | Broken | <-----------------------------+
//!     connection broke    +--------+        connection broke
//! ```
//!
//! Only a prompt follower is waited for. A late one is still sent chunks, as far as its bounded buffer takes them; a
//! broken one is not, unless a write cannot do without it. One that answers for other chunks meanwhile is not silent: a
//! chunk that it is slow with has its receipt without it, the next one waits for it again. "Answered" is any receipt or refusal of a chunk, or an
//! answer to the probe that runs in the background while a follower is not prompt.

use cairn_proto::{Error, Reason, id::ServerId};

/// How a follower stands with its primary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Standing {
    /// It answers in time, as far as is known.
    #[default]
    Prompt,
    /// It was silent for too long.
    Late,
    /// Its connection broke, or none could be made.
    Broken,
}

/// What happened with a follower.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// It answered.
    Answered,
    /// A chunk waited too long for it, and it answered nothing meanwhile.
    Silent,
    /// Its connection broke, or none could be made.
    Disconnected,
}

impl Standing {
    /// The standing after an event.
    pub fn after(self, event: Event) -> Self {
        match (self, event) {
            (_, Event::Answered) => Self::Prompt,
            (_, Event::Disconnected) => Self::Broken,
            (Self::Broken, Event::Silent) => Self::Broken,
            (_, Event::Silent) => Self::Late,
        }
    }
}

/// Which followers a chunk is sent to: those that are not broken, and the broken ones too when there are not enough
/// copies without them.
pub fn is_sent_to(standing: Standing, not_broken: usize, copies_min: usize) -> bool {
    // One copy is the primary's own.
    standing != Standing::Broken || 1 + not_broken < copies_min
}

/// How a chunk's copy at a follower goes.
#[derive(Clone, Debug, PartialEq)]
pub enum Copy {
    /// Not answered yet.
    Awaited(Standing),
    /// Durable there.
    Durable,
    /// There will be none for this receipt, and why.
    Out(Error),
}

/// What to do about a chunk whose own copy is durable.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// Wait for followers.
    Wait,
    /// Enough: these followers hold it.
    Receipt(Vec<ServerId>),
    /// It cannot have enough copies.
    TooFew(Error),
}

/// Decides about a chunk that is durable at its primary.
///
/// `is_overdue` says that the local copy has been durable for the time after which silence means late; `is_hopeless`
/// that the longest wait of all is over. `copies_min` counts the primary's own copy.
pub fn decide(
    copies: &[(ServerId, Copy)],
    copies_min: usize,
    is_overdue: bool,
    is_hopeless: bool,
) -> Verdict {
    let holders: Vec<ServerId> =
        copies.iter().filter(|(_, copy)| *copy == Copy::Durable).map(|(id, _)| *id).collect();
    let waits_for = |copy: &Copy| match copy {
        Copy::Awaited(standing) => *standing == Standing::Prompt && !is_overdue,
        _ => false,
    };
    let enough = 1 + holders.len() >= copies_min;
    if enough && !copies.iter().any(|(_, copy)| waits_for(copy)) {
        return Verdict::Receipt(holders);
    }
    let any_awaited = copies.iter().any(|(_, copy)| matches!(copy, Copy::Awaited(_)));
    if !enough && (is_hopeless || !any_awaited) {
        return Verdict::TooFew(too_few(copies, copies_min));
    }
    Verdict::Wait
}

/// `TOO_FEW_SERVERS` naming who is missing and why; `NO_SPACE` when full disks alone are the reason, and
/// `STALE_EPOCH` as it is when a follower knows a newer epoch.
pub fn too_few(copies: &[(ServerId, Copy)], copies_min: usize) -> Error {
    let stale = copies.iter().find_map(|(_, copy)| match copy {
        Copy::Out(error) if error.reason == Reason::StaleEpoch => Some(error.clone()),
        _ => None,
    });
    if let Some(stale) = stale {
        return stale;
    }
    let mut missing = Vec::new();
    let mut full = None;
    let mut others = false;
    for (id, copy) in copies {
        match copy {
            Copy::Durable => {}
            Copy::Awaited(_) => {
                others = true;
                missing.push(format!("server {id} (does not answer)"));
            }
            Copy::Out(error) => {
                match error.reason {
                    Reason::NoSpace => full = full.or(Some(*id)),
                    _ => others = true,
                }
                missing.push(format!("server {id} ({})", error.message()));
            }
        }
    }
    let durable = 1 + copies.iter().filter(|(_, copy)| *copy == Copy::Durable).count();
    let message = format!(
        "the chunk is durable on {durable} of the {copies_min} servers it needs; missing: {}",
        if missing.is_empty() { "members in empty seats".to_owned() } else { missing.join(", ") }
    );
    match full {
        Some(id) if !others => Error::new(Reason::NoSpace, message).on(id.to_string()),
        _ => Error::new(Reason::TooFewServers, message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROMPT: Copy = Copy::Awaited(Standing::Prompt);
    const LATE: Copy = Copy::Awaited(Standing::Late);

    fn broken() -> Copy {
        Copy::Out(Error::unavailable("connection refused"))
    }

    fn of(copies: &[Copy], overdue: bool, hopeless: bool) -> Verdict {
        let copies: Vec<_> = (2..).map(ServerId).zip(copies.iter().cloned()).collect();
        decide(&copies, 2, overdue, hopeless)
    }

    fn receipt(ids: &[u64]) -> Verdict {
        Verdict::Receipt(ids.iter().map(|id| ServerId(*id)).collect())
    }

    #[test]
    fn all_transitions() {
        use Event::*;
        use Standing::*;
        let table = [
            (Prompt, Answered, Prompt),
            (Prompt, Silent, Late),
            (Prompt, Disconnected, Broken),
            (Late, Answered, Prompt),
            (Late, Silent, Late),
            (Late, Disconnected, Broken),
            (Broken, Answered, Prompt),
            (Broken, Silent, Broken),
            (Broken, Disconnected, Broken),
        ];
        for (before, event, after) in table {
            assert_eq!(before.after(event), after, "{before:?} {event:?}");
        }
    }

    #[test]
    fn all_living_members_are_waited_for() {
        assert_eq!(of(&[Copy::Durable, PROMPT], false, false), Verdict::Wait);
        assert_eq!(of(&[Copy::Durable, Copy::Durable], false, false), receipt(&[2, 3]));
    }

    #[test]
    fn a_broken_connection_counts_at_once_and_silence_when_overdue() {
        assert_eq!(of(&[Copy::Durable, broken()], false, false), receipt(&[2]));
        assert_eq!(of(&[Copy::Durable, PROMPT], true, false), receipt(&[2]));
        assert_eq!(
            of(&[Copy::Durable, LATE], false, false),
            receipt(&[2]),
            "known to be late: not waited for"
        );
    }

    #[test]
    fn never_fewer_than_the_least_number_of_copies() {
        assert_eq!(
            of(&[PROMPT, broken()], true, false),
            Verdict::Wait,
            "overdue, but it cannot be done without"
        );
        assert_eq!(of(&[LATE, broken()], false, false), Verdict::Wait);
        let Verdict::TooFew(error) = of(&[broken(), broken()], false, false) else { panic!() };
        assert_eq!(error.reason, Reason::TooFewServers);
        assert!(error.message().contains("server 2 (connection refused), server 3"), "{error}");
        let Verdict::TooFew(error) = of(&[LATE, broken()], true, true) else { panic!() };
        assert!(error.message().contains("server 2 (does not answer)"), "{error}");
    }

    #[test]
    fn full_disks_are_named_as_the_reason() {
        let full = || Copy::Out(Error::new(Reason::NoSpace, "the disk is full"));
        let Verdict::TooFew(error) = of(&[full(), full()], false, false) else { panic!() };
        assert_eq!((error.reason, error.detail.server.as_str()), (Reason::NoSpace, "2"));
        let Verdict::TooFew(error) = of(&[full(), broken()], false, false) else { panic!() };
        assert_eq!(error.reason, Reason::TooFewServers);
        assert!(error.message().contains("disk is full"), "{error}");
    }

    #[test]
    fn broken_followers_are_tried_only_when_needed() {
        assert!(is_sent_to(Standing::Late, 1, 2));
        assert!(!is_sent_to(Standing::Broken, 1, 2));
        assert!(is_sent_to(Standing::Broken, 0, 2));
    }
}
