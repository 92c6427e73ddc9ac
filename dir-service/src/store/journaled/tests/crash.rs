//! Random plans against a model, with power losses anywhere. A failure names the seed that replays it
//! (`CAIRN_TEST_SEED`); `CAIRN_TEST_SEEDS` runs more of them.

use super::*;
use cairn_core::plan::{Mutation, Precondition};
use futures::future::join_all;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use std::collections::BTreeMap;

const SEEDS: u64 = 25;
const LIVES: usize = 12;

type State = BTreeMap<Key, (Bytes, Revision)>;

/// What a store must hold at each revision.
struct Model {
    states: Vec<State>,
}

impl Model {
    fn last(&self) -> Revision {
        Revision(self.states.len() as u64 - 1)
    }

    fn cut(&mut self, last: Revision) {
        self.states.truncate(last.0 as usize + 1);
    }

    /// Applies a plan; `None` when it conflicts.
    fn apply(&mut self, plan: &Plan) -> Option<Revision> {
        let mut state = self.states.last().unwrap().clone();
        let holds = plan.preconditions.iter().all(|precondition| {
            precondition.holds(state.get(precondition.key()).map(|(_, revision)| *revision))
        });
        if !holds {
            return None;
        }
        let revision = Revision(self.states.len() as u64);
        for mutation in &plan.mutations {
            match mutation {
                Mutation::Put(key, value) => drop(state.insert(key.clone(), (value.clone(), revision))),
                Mutation::Delete(key) => drop(state.remove(key)),
            }
        }
        self.states.push(state);
        Some(revision)
    }

    async fn check(&self, store: &JournaledStore, at: Revision, seed: u64) {
        let (revision, entries) = everything(store).await;
        assert_eq!(revision, at, "seed {seed}");
        let found: State = entries.into_iter().map(|(key, v)| (key, (v.value, v.revision))).collect();
        let expected = &self.states[at.0 as usize];
        let keys = |state: &State| state.keys().cloned().collect::<Vec<_>>();
        assert_eq!(keys(&found), keys(expected), "seed {seed} at {at}");
        for (key, value) in expected {
            assert!(found[key] == *value, "seed {seed} at {at}: {key:?}");
        }
    }
}

fn random_plan(rng: &mut SmallRng, state: &State, number: u64) -> Plan {
    let mut plan = Plan::new();
    let name = |rng: &mut SmallRng| key(&format!("k{:02}", rng.random_range(0..40)));
    for _ in 0..rng.random_range(0..3) {
        let key = name(rng);
        let there = state.get(&key).map(|(_, revision)| *revision);
        // Mostly what holds, unless a plan before it in the same burst changes the key.
        plan.require(match rng.random_range(0..10) {
            0 => Precondition::Absent(key),
            1 => Precondition::Exists(key),
            _ => Precondition::Unchanged(key, there),
        });
    }
    for _ in 0..rng.random_range(1..5) {
        let key = name(rng);
        if rng.random_ratio(1, 4) {
            plan.delete(key);
        } else {
            let size =
                if rng.random_ratio(1, 10) { rng.random_range(0..150_000) } else { rng.random_range(0..60) };
            let mut value = format!("{number}/").into_bytes();
            value.resize(value.len() + size, number as u8);
            plan.put(key, value);
        }
    }
    plan
}

fn keep(rng: &mut SmallRng) -> CrashKeep {
    [CrashKeep::Nothing, CrashKeep::Random, CrashKeep::Everything][rng.random_range(0..3)]
}

/// Opens or makes the store, through as many power losses as it takes.
async fn open_somehow(
    disk: &SimDisk,
    config: &JournaledConfig,
    rng: &mut SmallRng,
    seed: u64,
) -> JournaledStore {
    loop {
        let done = async {
            let disk: Arc<dyn Disk> = Arc::new(disk.clone());
            let index = open_index(&disk, dir(), None).await?;
            match JournaledStore::find(&disk, dir()).await? {
                Found::Store(_) => JournaledStore::open(disk, dir(), index, config.clone()).await,
                _ => JournaledStore::create(disk, dir(), identity(1), index, config.clone()).await,
            }
        };
        match done.await {
            Ok(store) => return store,
            Err(error) => {
                assert!(disk.is_off(), "seed {seed}: {error}");
                disk.crash(keep(rng));
                if rng.random_bool(0.5) {
                    disk.power_off_after(rng.random_range(0..60));
                }
            }
        }
    }
}

/// One seed's story; answers how many plans were acknowledged and how many were left unknown.
async fn live_and_die(seed: u64) -> (usize, usize) {
    let mut rng = SmallRng::seed_from_u64(seed);
    let disk = SimDisk::new(seed, 1 << 30);
    disk.set_write_back_one_in(rng.random_range(0..4));
    let mut model = Model { states: vec![State::new()] };
    let (mut number, mut known, mut unknown) = (0, 0, 0);
    for _ in 0..LIVES {
        let config = JournaledConfig {
            keep_plans: rng.random_range(1..30),
            apply_plans: rng.random_range(1..10),
            checkpoint_plans: rng.random_range(1..40),
            batch_plans_max: rng.random_range(1..20),
            journal_keep_bytes: if rng.random_bool(0.5) { 0 } else { 4 << 20 },
            ..small()
        };
        if rng.random_bool(0.5) {
            disk.power_off_after(rng.random_range(0..40));
        }
        let store = open_somehow(&disk, &config, &mut rng, seed).await;
        let mut acknowledged = store.durable_revision();
        assert_eq!(acknowledged, model.last(), "seed {seed}: opening changes nothing");
        model.check(&store, acknowledged, seed).await;
        let mut possible = acknowledged;

        disk.power_off_after(rng.random_range(1..150));
        while !disk.is_off() && !store.is_failed() {
            let plans: Vec<Plan> = (0..rng.random_range(1..25))
                .map(|_| {
                    number += 1;
                    random_plan(&mut rng, model.states.last().unwrap(), number)
                })
                .collect();
            // Queued in this order, so decided in this order.
            let expected: Vec<Option<Revision>> = plans.iter().map(|plan| model.apply(plan)).collect();
            let answers = join_all(plans.into_iter().map(|plan| store.commit(plan))).await;
            for (answer, expected) in answers.into_iter().zip(expected) {
                match (answer, expected) {
                    (Ok(revision), Some(expected)) if revision == expected => {
                        known += 1;
                        (acknowledged, possible) = (revision, revision);
                    }
                    (Err(CommitError::Conflict), None) => {}
                    (Err(CommitError::Unknown(_)), Some(expected)) => {
                        unknown += 1;
                        possible = expected;
                    }
                    // Behind a failed batch the model goes on with plans that were not applied.
                    (Err(CommitError::Refused(_) | CommitError::Conflict), _) if disk.is_off() => {}
                    (answer, expected) => panic!("seed {seed}: {answer:?} where {expected:?} is due"),
                }
            }
            // Readers see what is durable, also when the journal has failed.
            model.check(&store, acknowledged, seed).await;
        }
        model.cut(possible);
        if rng.random_bool(0.3) {
            disk.crash(CrashKeep::Everything);
        }
        power_loss(store, &disk, keep(&mut rng)).await;
        let store = open_somehow(&disk, &config, &mut rng, seed).await;
        // All acknowledged plans are there, and of the others the first few, each whole.
        let revision = store.durable_revision();
        assert!(
            revision >= acknowledged,
            "seed {seed}: {acknowledged} was acknowledged, {revision} is there"
        );
        assert!(revision <= possible, "seed {seed}: at most {possible} can be, {revision} is there");
        model.cut(revision);
        model.check(&store, revision, seed).await;
        if rng.random_bool(0.3) {
            store.close().await.unwrap();
        }
        power_loss(store, &disk, keep(&mut rng)).await;
    }
    (known, unknown)
}

#[tokio::test(start_paused = true)]
async fn durable_what_is_acknowledged_survives_power_loss_at_any_moment() {
    let seeds = match std::env::var("CAIRN_TEST_SEED") {
        Ok(seed) => vec![seed.parse().unwrap()],
        Err(_) => {
            (0..std::env::var("CAIRN_TEST_SEEDS").map_or(SEEDS, |count| count.parse().unwrap())).collect()
        }
    };
    let (mut known, mut unknown) = (0, 0);
    for seed in &seeds {
        println!("seed {seed}");
        let (more_known, more_unknown) = live_and_die(*seed).await;
        (known, unknown) = (known + more_known, unknown + more_unknown);
    }
    // Else this test tests nothing.
    assert!(known > 50 * seeds.len() && unknown > seeds.len(), "{known} known, {unknown} unknown");
}
