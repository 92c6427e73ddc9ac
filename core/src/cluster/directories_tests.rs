use super::*;
use crate::plan::{Mutation, Versioned};
use proptest::prelude::*;

const TIMES: Times = Times { dead_ms: 5_000 };

#[test]
fn a_directory_stops_relying_on_a_beat_before_others_may_declare_it_dead() {
    let mut own = Own::default();
    assert!(!own.is_sure(0, TIMES), "before the first beat");
    own.acknowledged(1_000);
    assert!(own.is_sure(4_999, TIMES) && !own.is_sure(5_000, TIMES));
    own.acknowledged(500);
    assert!(own.is_sure(4_999, TIMES), "an older beat that ends late changes nothing");
    own.lost();
    assert!(!own.is_sure(1_001, TIMES));
}

#[test]
fn silence_is_counted_from_when_a_beat_was_seen_first() {
    let at = |revision| BTreeMap::from([(7, Revision(revision))]);
    let mut watched = Watched::default();
    assert!(watched.look(&at(1), 10_000, TIMES).is_empty());
    assert!(watched.look(&at(1), 14_999, TIMES).is_empty());
    assert!(watched.look(&at(2), 15_000, TIMES).is_empty());
    assert!(watched.look(&at(2), 19_999, TIMES).is_empty());
    assert_eq!(watched.look(&at(2), 20_000, TIMES), [7]);
    assert!(watched.look(&BTreeMap::new(), 20_001, TIMES).is_empty());
    assert!(watched.look(&at(2), 30_000, TIMES).is_empty(), "forgotten with its record");
}

#[test]
fn the_lead_is_free_when_its_holder_does_not_live() {
    let lead = Lead { holder: 3, term: 8 };
    let living = BTreeSet::from([3, 4]);
    assert_eq!(claim(None, 4, &living), Claim::Free(1));
    assert_eq!(claim(Some(&lead), 4, &living), Claim::Other(3));
    assert_eq!(claim(Some(&lead), 3, &living), Claim::Own);
    assert_eq!(claim(Some(&lead), 4, &BTreeSet::from([4])), Claim::Free(9));
}

#[test]
fn a_reader_is_covered_by_what_stands_and_by_what_is_under_way() {
    let mut floor = Floor::default();
    assert_eq!(floor.send(None, Revision(100)), Revision(100));
    assert!(!floor.covers(Revision(99)), "the beat may be in the store already");
    assert_eq!(floor.send(Some(Revision(40)), Revision(120)), Revision(40));
    assert!(!floor.covers(Revision(40)), "nor is it known which of the two stands");
    floor.stands(Revision(40));
    assert!(floor.covers(Revision(40)) && !floor.covers(Revision(39)));
}

#[test]
fn the_dead_hold_everything_back() {
    let (alive, dead) = (Directory::default(), Directory { dead: true, ..Directory::default() });
    let beat = |floor| Beat { floor, ..Beat::default() };
    assert_eq!(unread([]), None);
    assert_eq!(unread([(&alive, Some(&beat(9))), (&alive, Some(&beat(5)))]), Some(Revision(5)));
    assert_eq!(unread([(&alive, Some(&beat(9))), (&dead, Some(&beat(9)))]), Some(Revision(0)));
    assert_eq!(unread([(&alive, None)]), Some(Revision(0)), "nothing is known of it");
}

#[test]
fn only_the_home_keeps_a_session() {
    let session = |home, ended| Session { home, ended, ..Session::default() };
    assert_eq!(home(Some(&session(4, false)), 4), Home::Here);
    assert_eq!(home(Some(&session(5, false)), 4), Home::Elsewhere(5));
    assert_eq!(home(Some(&session(0, false)), 4), Home::Elsewhere(0), "of a time with one directory");
    assert_eq!(home(Some(&session(4, true)), 4), Home::Ended);
    assert_eq!(home(None, 4), Home::Ended);
}

/// A store of plans, as engines keep them.
#[derive(Default)]
struct Store {
    revision: u64,
    values: BTreeMap<Key, Versioned>,
}

impl Store {
    fn commit(&mut self, plan: &Plan) -> Option<Revision> {
        let holds = |precondition: &Precondition| {
            precondition.holds(self.values.get(precondition.key()).map(|value| value.revision))
        };
        if !plan.preconditions.iter().all(holds) {
            return None;
        }
        self.revision += 1;
        let revision = Revision(self.revision);
        for mutation in &plan.mutations {
            match mutation {
                Mutation::Put(key, value) => {
                    self.values.insert(key.clone(), Versioned { value: value.clone(), revision });
                }
                Mutation::Delete(key) => drop(self.values.remove(key)),
            }
        }
        Some(revision)
    }

    fn record<R: Record>(&self, key: &Key) -> Option<(R, Revision)> {
        self.values.get(key).map(|value| (R::from_bytes(&value.value).unwrap(), value.revision))
    }
}

/// A directory of the model. It reads and writes as the real one does, its steps in any order and at any distance.
#[derive(Default)]
struct Model {
    id: u64,
    joined: Revision,
    /// The revision of its last beat.
    last: Revision,
    own: Own,
    floor: Floor,
    watched: Watched,
    /// Its sessions: when each ends, and what it reads at.
    homes: BTreeMap<u64, (u64, Option<Revision>)>,
    /// What sessions read at that are about to arrive.
    arriving: Option<Revision>,
    /// A beat that was begun and is not in the store yet: when, and its plan.
    under_way: Option<(u64, Revision, Plan)>,
}

const TTL_MS: u64 = 3_000;
const SESSION: SessionId = SessionId(77);

impl Model {
    fn join(&mut self, store: &mut Store, id: u64, now_ms: u64) {
        *self = Self { id, ..Self::default() };
        let floor = self.floor.send(None, Revision(store.revision));
        let mut plan = Plan::new();
        join(&mut plan, id, &Directory::default(), &Beat { floor: floor.0, ..Beat::default() });
        self.joined = store.commit(&plan).unwrap();
        self.last = self.joined;
        self.floor.stands(floor);
        self.own.acknowledged(now_ms);
    }

    fn begin_beat(&mut self, store: &Store, now_ms: u64) {
        if self.under_way.is_none() {
            let arriving = self.arriving.into_iter();
            let oldest = self.homes.values().filter_map(|(_, reads)| *reads).chain(arriving).min();
            let floor = self.floor.send(oldest, Revision(store.revision));
            let mut plan = Plan::new();
            beat(
                &mut plan,
                self.id,
                self.joined,
                self.last,
                &Beat { floor: floor.0, count: now_ms, ..Beat::default() },
            );
            self.under_way = Some((now_ms, floor, plan));
        }
    }

    /// Answers whether it still lives.
    fn end_beat(&mut self, store: &mut Store) -> bool {
        let Some((began_ms, floor, plan)) = self.under_way.take() else { return true };
        let Some(revision) = store.commit(&plan) else { return false };
        self.last = revision;
        self.floor.stands(floor);
        let gone = store.values.remove(&key::notice(self.id, SESSION)).is_some()
            && store
                .record::<Session>(&key::session(SESSION))
                .is_none_or(|(session, _)| session.home != self.id);
        if gone {
            self.homes.remove(&SESSION.0);
        }
        self.own.acknowledged(began_ms);
        true
    }

    /// Answers whether the renewal is confirmed.
    fn renew(&mut self, store: &mut Store, mark: Revision, now_ms: u64) -> bool {
        if !self.own.is_sure(now_ms, TIMES) {
            return false;
        }
        if let Some((ends_ms, reads)) = self.homes.get_mut(&SESSION.0) {
            *ends_ms = (*ends_ms).max(now_ms + TTL_MS);
            *reads = Some(mark);
            return self.floor.covers(mark);
        }
        let Some((session, read)) = store.record::<Session>(&key::session(SESSION)) else { return false };
        if home(Some(&session), self.id) == Home::Ended {
            return false;
        }
        if !self.floor.covers(mark) {
            self.arriving = self.arriving.into_iter().chain([mark]).min();
            return false;
        }
        let mut plan = Plan::new();
        move_home(&mut plan, SESSION, (&session, read), self.id, self.joined);
        let moved = store.commit(&plan).is_some();
        if moved {
            self.arriving = None;
            self.homes.insert(SESSION.0, (now_ms + TIMES.moved_ttl_ms(TTL_MS), Some(mark)));
        }
        moved
    }

    /// Answers whether the session was ended.
    fn expire(&mut self, store: &mut Store, now_ms: u64) -> bool {
        if self.homes.get(&SESSION.0).is_none_or(|(ends_ms, _)| now_ms < *ends_ms) {
            return false;
        }
        self.homes.remove(&SESSION.0);
        let Some((session, read)) = store.record::<Session>(&key::session(SESSION)) else { return false };
        if home(Some(&session), self.id) != Home::Here {
            return false;
        }
        let mut plan = Plan::new();
        crate::session::end(&mut plan, SESSION, &session, read);
        store.commit(&plan).is_some()
    }

    fn declare(&mut self, store: &mut Store, now_ms: u64) {
        let mut beats = BTreeMap::new();
        for id in 1..100 {
            if let Some((_, revision)) = store.record::<Beat>(&key::beat(id)) {
                let living = store.record::<Directory>(&key::directory(id)).is_some_and(|(it, _)| !it.dead);
                if living && id != self.id {
                    beats.insert(id, revision);
                }
            }
        }
        for id in self.watched.look(&beats, now_ms, TIMES) {
            let (record, read) = store.record::<Directory>(&key::directory(id)).unwrap();
            let mut plan = Plan::new();
            declare_dead(&mut plan, id, (&record, read), beats.get(&id).copied());
            store.commit(&plan);
        }
    }

    /// Takes the session of a dead directory over.
    fn take_over(&mut self, store: &mut Store, now_ms: u64) {
        let Some((session, read)) = store.record::<Session>(&key::session(SESSION)) else { return };
        let dead = store.record::<Directory>(&key::directory(session.home)).is_none_or(|(it, _)| it.dead);
        if !dead || session.ended || session.home == self.id {
            return;
        }
        if !self.floor.covers(Revision(0)) {
            self.arriving = Some(Revision(0));
            return;
        }
        let mut plan = Plan::new();
        take_over(&mut plan, SESSION, (&session, read), self.id, self.joined);
        if store.commit(&plan).is_some() {
            self.homes.insert(SESSION.0, (now_ms + TTL_MS, Some(Revision(0))));
            self.arriving = None;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    /// Three directories, one session whose client talks to any of them, pauses of any length between any two steps.
    /// A confirmed renewal is good for a whole TTL, and what the session reads at is covered at every revision.
    #[test]
    fn a_confirmed_renewal_holds_and_covers_wherever_the_session_is_at_home(
        steps in prop::collection::vec((0usize..3, 0u8..8, prop_oneof![9 => 0u64..400, 1 => 0u64..9_000]), 1..400)
    ) {
        let mut store = Store::default();
        let mut models: [Model; 3] = Default::default();
        let (mut now_ms, mut next_id) = (0, 1);
        for model in &mut models {
            model.join(&mut store, next_id, now_ms);
            next_id += 1;
        }
        let mut plan = Plan::new();
        crate::session::open(&mut plan, SESSION, &Session { home: 1, ttl_ms: TTL_MS, ..Session::default() });
        let mark = store.commit(&plan).unwrap();
        models[0].homes.insert(SESSION.0, (TTL_MS, None));
        let mut confirmed: Option<u64> = None;
        for (which, step, pause_ms) in steps {
            now_ms += pause_ms;
            let model = &mut models[which];
            match step {
                0 => model.begin_beat(&store, now_ms),
                1 | 2 => {
                    if !model.end_beat(&mut store) {
                        let id = next_id;
                        next_id += 1;
                        model.join(&mut store, id, now_ms);
                    }
                }
                3 | 4 => {
                    if model.renew(&mut store, mark, now_ms) {
                        confirmed = Some(now_ms);
                    }
                }
                5 => {
                    if model.expire(&mut store, now_ms) {
                        prop_assert!(
                            confirmed.is_none_or(|at_ms| now_ms - at_ms >= TTL_MS),
                            "ended at {now_ms}, confirmed at {confirmed:?}"
                        );
                        confirmed = None;
                    }
                }
                6 => model.declare(&mut store, now_ms),
                _ => model.take_over(&mut store, now_ms),
            }
            if confirmed.is_some() {
                let all: Vec<(Directory, Option<Beat>)> = (1..next_id)
                    .filter_map(|id| {
                        let (directory, _) = store.record::<Directory>(&key::directory(id))?;
                        Some((directory, store.record::<Beat>(&key::beat(id)).map(|(beat, _)| beat)))
                    })
                    .collect();
                let unread = unread(all.iter().map(|(directory, beat)| (directory, beat.as_ref())));
                prop_assert!(unread <= Some(mark), "{unread:?} may go, a session reads at {mark}");
            }
        }
    }
}
