//! What the directory believes of a file server.
//!
//! ```text
//!   registered,                compared
//!   or known at the start         |
//!        |                        v
//!        +--> JOINING ---------> LIVE <-----------+
//!                |                |               |
//!                | silent         | silent        | heard (JOINING again when it was never compared)
//!                | suspect_ms     | suspect_ms    |
//!                +----> SUSPECT <-+ --------------+
//!                          |
//!                          | silent dead_ms, within the budget of deaths
//!                          v
//!                        DEAD ---- registered ----> JOINING
//!
//!   over any of these:  --- drain ---> DRAINING --- empty ---> GONE --- cancel ---> as it was
//! ```
//!
//! Suspicion moves roles, death moves seats, slowness moves nothing. Time is an argument: milliseconds of a clock
//! that only goes forward.

use cairn_proto::{id::ServerId, v1};
use std::collections::BTreeMap;

/// How long a silence means what.
#[derive(Clone, Copy, Debug)]
pub struct Silence {
    /// Silence after which roles move.
    pub suspect_ms: u64,
    /// Silence after which seats move.
    pub dead_ms: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Joining,
    Live,
    Suspect,
    Dead,
}

/// One server's state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    phase: Phase,
    draining: bool,
    gone: bool,
    heard_ms: u64,
    compared: bool,
    /// Whether it was heard at all since the directory started.
    heard: bool,
}

impl Standing {
    /// A server that has just registered.
    pub fn registered(now_ms: u64) -> Self {
        Self { heard: true, ..Self::remembered(now_ms, false, false) }
    }

    /// A server that the directory knows from its records when it starts. It is given the benefit of the doubt until
    /// it has had time to be heard.
    pub fn remembered(now_ms: u64, draining: bool, gone: bool) -> Self {
        Self { phase: Phase::Joining, draining, gone, heard_ms: now_ms, compared: false, heard: false }
    }

    /// It registered again: also the dead come back this way.
    pub fn register(&mut self, now_ms: u64) {
        self.phase = Phase::Joining;
        self.compared = false;
        self.heard = true;
        self.heard_ms = self.heard_ms.max(now_ms);
    }

    /// A heartbeat. `false` when it must register first: its seats may have gone to others.
    #[must_use]
    pub fn hear(&mut self, now_ms: u64) -> bool {
        if self.phase == Phase::Dead {
            return false;
        }
        self.heard = true;
        self.heard_ms = self.heard_ms.max(now_ms);
        self.phase = if self.compared { Phase::Live } else { Phase::Joining };
        true
    }

    /// Its inventory was compared.
    pub fn compare(&mut self) {
        self.compared = true;
        if self.phase == Phase::Joining {
            self.phase = Phase::Live;
        }
    }

    /// Time passed. Answers whether anything changed; `may_die` is asked once silence has lasted long enough.
    pub fn tick(&mut self, now_ms: u64, silence: Silence, may_die: impl FnOnce() -> bool) -> bool {
        let silent_ms = now_ms.saturating_sub(self.heard_ms);
        let before = self.phase;
        if matches!(self.phase, Phase::Joining | Phase::Live) && silent_ms >= silence.suspect_ms {
            self.phase = Phase::Suspect;
        }
        if self.phase == Phase::Suspect && silent_ms >= silence.dead_ms && may_die() {
            self.phase = Phase::Dead;
        }
        self.phase != before
    }

    /// It says that it stops: roles move now, without waiting for its silence.
    pub fn leave(&mut self) {
        if matches!(self.phase, Phase::Joining | Phase::Live) {
            self.phase = Phase::Suspect;
        }
    }

    /// An operator's order, given or taken back.
    pub fn drain(&mut self, draining: bool) {
        self.draining = draining;
        self.gone &= draining;
    }

    /// A draining server is empty.
    pub fn release(&mut self) {
        self.gone = self.draining;
    }

    /// It answers, as far as is known.
    pub fn is_reachable(&self) -> bool {
        matches!(self.phase, Phase::Joining | Phase::Live)
    }

    /// It may take new chunks and the primary role.
    pub fn is_up(&self) -> bool {
        self.is_reachable() && !self.draining && !self.gone
    }

    /// Declared dead.
    pub fn is_dead(&self) -> bool {
        self.phase == Phase::Dead
    }

    /// Whether it is to be emptied, or is empty by order.
    pub fn is_draining(&self) -> bool {
        self.draining
    }

    /// Emptied and released.
    pub fn is_gone(&self) -> bool {
        self.gone
    }

    /// Whether it was heard since the directory started.
    pub fn was_heard(&self) -> bool {
        self.heard
    }

    /// Time since it was heard.
    pub fn silent_ms(&self, now_ms: u64) -> u64 {
        now_ms.saturating_sub(self.heard_ms)
    }

    /// As others see it. Of a draining server that fell silent the silence is told.
    pub fn state(&self) -> v1::ServerState {
        match self.phase {
            _ if self.gone => v1::ServerState::Gone,
            Phase::Dead => v1::ServerState::Dead,
            Phase::Suspect => v1::ServerState::Suspect,
            _ if self.draining => v1::ServerState::Draining,
            Phase::Live => v1::ServerState::Live,
            Phase::Joining => v1::ServerState::Joining,
        }
    }
}

/// What still depends on a server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ties {
    /// It is heard, or was a moment ago.
    pub answers: bool,
    /// Groups in which it has a seat.
    pub seats: usize,
    /// Groups that it left and in which it may hold what others lack.
    pub left: usize,
    /// It carries the directory's journal, as far as the settings say that a rebuilt directory would read.
    pub carries: bool,
}

/// Why a server must not be struck from the records, and what to do; `None` when nothing depends on it any more.
pub fn must_stay(ties: Ties) -> Option<String> {
    if ties.answers {
        return Some("it answers, or did a moment ago: drain it and switch it off first".into());
    }
    if ties.seats > 0 {
        return Some(format!(
            "it has a seat in {} groups: they go to other servers when it is dead or drained, as far as there are some",
            ties.seats
        ));
    }
    if ties.left > 0 {
        return Some(format!(
            "it may hold the only copies of chunks in {} groups that it left: wait until all copies are made again, and \
             drain it to give up what it holds",
            ties.left
        ));
    }
    ties.carries.then(|| "it carries the directory's journal until another server does".into())
}

/// How many servers may be declared dead without an operator: when half the cluster falls silent, that is the
/// network, and moving all its seats would make it worse.
#[derive(Clone, Debug, Default)]
pub struct Deaths {
    declared: BTreeMap<ServerId, u64>,
}

/// The span in which deaths are counted.
const DEATHS_SPAN_MS: u64 = 3_600_000;
/// One in so many servers may die in it, and always one.
const DEATHS_SHARE: usize = 3;

impl Deaths {
    /// Counts a death in, if the budget allows it.
    pub fn declare(&mut self, server: ServerId, servers: usize, now_ms: u64) -> bool {
        self.declared.retain(|_, at_ms| now_ms.saturating_sub(*at_ms) < DEATHS_SPAN_MS);
        if self.declared.len() >= (servers / DEATHS_SHARE).max(1) {
            return false;
        }
        self.declared.insert(server, now_ms);
        true
    }

    /// The server is back.
    pub fn back(&mut self, server: ServerId) {
        self.declared.remove(&server);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use v1::ServerState::*;

    const SILENCE: Silence = Silence { suspect_ms: 3_000, dead_ms: 30_000 };

    #[test]
    fn silence_leads_from_live_over_suspect_to_dead_and_only_registration_leads_back() {
        let mut server = Standing::registered(0);
        assert_eq!(server.state(), Joining);
        server.compare();
        assert_eq!(server.state(), Live);
        assert!(!server.tick(2_999, SILENCE, || true));
        assert!(server.tick(3_000, SILENCE, || true));
        assert_eq!(server.state(), Suspect);
        assert!(!server.is_up());
        assert!(server.hear(4_000));
        assert_eq!(server.state(), Live);
        server.tick(34_000, SILENCE, || true);
        assert_eq!(server.state(), Dead);
        assert!(!server.hear(35_000));
        server.register(36_000);
        assert_eq!(server.state(), Joining);
    }

    #[test]
    fn a_death_needs_the_budget() {
        let mut server = Standing::registered(0);
        server.tick(90_000, SILENCE, || false);
        assert_eq!(server.state(), Suspect);
        server.tick(90_001, SILENCE, || true);
        assert_eq!(server.state(), Dead);

        let mut deaths = Deaths::default();
        assert!(deaths.declare(ServerId(1), 4, 0));
        assert!(!deaths.declare(ServerId(2), 4, 10));
        deaths.back(ServerId(1));
        assert!(deaths.declare(ServerId(2), 4, 20));
        assert!(!deaths.declare(ServerId(3), 4, DEATHS_SPAN_MS + 19));
        assert!(deaths.declare(ServerId(3), 4, DEATHS_SPAN_MS + 20));
    }

    #[test]
    fn only_a_server_on_which_nothing_depends_is_forgotten() {
        assert_eq!(must_stay(Ties::default()), None);
        let ties = [
            Ties { answers: true, ..Ties::default() },
            Ties { seats: 1, ..Ties::default() },
            Ties { left: 2, ..Ties::default() },
            Ties { carries: true, ..Ties::default() },
        ];
        let reasons: Vec<_> = ties.into_iter().filter_map(must_stay).collect();
        assert_eq!(reasons.len(), 4);
        assert!(reasons[2].contains("2 groups"), "{reasons:?}");
    }

    #[test]
    fn draining_lies_over_liveness() {
        let mut server = Standing::registered(0);
        server.compare();
        server.drain(true);
        assert_eq!(server.state(), Draining);
        assert!(server.is_reachable() && !server.is_up());
        server.tick(5_000, SILENCE, || true);
        assert_eq!(server.state(), Suspect);
        assert!(server.hear(5_001));
        server.release();
        assert_eq!(server.state(), Gone);
        server.drain(false);
        assert_eq!(server.state(), Live);
        server.release();
        assert_eq!(server.state(), Live, "only a draining server is released");
    }

    #[test]
    fn a_server_that_says_goodbye_is_suspect_at_once() {
        let mut server = Standing::registered(0);
        server.leave();
        assert_eq!(server.state(), Suspect);
        assert!(server.hear(1));
        assert_eq!(server.state(), Joining);
    }

    proptest::proptest! {
        #[test]
        fn no_server_dies_before_its_time(steps in proptest::collection::vec((0u64..10_000, 0u8..4), 1..60)) {
            let (mut server, mut now, mut heard) = (Standing::registered(0), 0, 0);
            for (pass_ms, event) in steps {
                now += pass_ms;
                match event {
                    0 => if server.hear(now) { heard = now },
                    1 => server.compare(),
                    2 => { server.register(now); heard = now }
                    _ => { server.tick(now, SILENCE, || true); }
                }
                if server.is_dead() {
                    proptest::prop_assert!(now - heard >= SILENCE.dead_ms);
                }
                if now - heard < SILENCE.suspect_ms {
                    proptest::prop_assert!(server.is_up());
                }
            }
        }
    }
}
