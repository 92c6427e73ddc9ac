use super::*;
use cairn_proto::v1::JournalCopy;
use proptest::prelude::*;

fn life(generation: u64, store: &str, term: u64, process: &str, address: &str) -> DirectoryLife {
    DirectoryLife {
        generation,
        store_id: store.into(),
        term,
        incarnation: process.into(),
        addresses: vec![address.into()],
    }
}

fn only(carriers: &[u64]) -> Carriers {
    Carriers { now: carriers.to_vec(), before: Vec::new() }
}

fn answer(outcome: FollowOutcome, current: &DirectoryLife, revision: u64) -> FollowResponse {
    FollowResponse {
        outcome: outcome as i32,
        current: Some(current.clone()),
        journals: vec![JournalCopy {
            generation: current.generation,
            durable_revision: revision,
            ..Default::default()
        }],
        ..Default::default()
    }
}

#[test]
fn a_restart_at_the_same_address_is_followed_at_once_with_a_higher_term() {
    let old = life(3, "s", 4, "p1", "http://a");
    assert_eq!(follow(&old, Some(1), &life(3, "s", 4, "p2", "http://a"), false), FollowOutcome::Newer);
    assert_eq!(follow(&old, Some(1), &life(3, "s", 5, "p2", "http://a"), false), FollowOutcome::Followed);
    assert_eq!(follow(&old, Some(1), &old, false), FollowOutcome::Followed, "asked again");
    assert_eq!(
        follow(&DirectoryLife::default(), None, &old, false),
        FollowOutcome::Followed,
        "the first of all"
    );
}

#[test]
fn a_directory_elsewhere_waits_while_the_known_one_is_heard() {
    let known = life(3, "s", 4, "p1", "http://a");
    for asks in [life(3, "s", 9, "p2", "http://b"), life(4, "t", 1, "p2", "http://b")] {
        assert_eq!(follow(&known, Some(HELD_MS - 1), &asks, false), FollowOutcome::Held);
        assert_eq!(follow(&known, Some(HELD_MS), &asks, false), FollowOutcome::Followed);
        assert_eq!(follow(&known, None, &asks, false), FollowOutcome::Followed);
    }
}

#[test]
fn one_that_serves_is_followed_unless_it_was_superseded() {
    let by_number = DirectoryLife { generation: 3, term: 4, ..Default::default() };
    let serving = life(3, "s", 4, "p1", "http://a");
    assert_eq!(follow(&by_number, Some(1), &serving, false), FollowOutcome::Newer, "anybody could claim it");
    assert_eq!(follow(&by_number, Some(1), &serving, true), FollowOutcome::Followed);
    let elsewhere = life(3, "s", 5, "p2", "http://b");
    assert_eq!(follow(&serving, Some(1), &elsewhere, true), FollowOutcome::Followed);
    assert_eq!(follow(&elsewhere, None, &serving, true), FollowOutcome::Newer);
}

#[test]
fn a_generation_belongs_to_one_store() {
    let known = life(3, "s", 4, "p1", "http://a");
    assert_eq!(follow(&known, None, &life(3, "t", 9, "p2", "http://b"), false), FollowOutcome::OtherStore);
    assert_eq!(follow(&known, None, &life(4, "t", 1, "p2", "http://b"), false), FollowOutcome::Followed);
    assert_eq!(follow(&known, None, &life(2, "r", 9, "p2", "http://b"), false), FollowOutcome::Newer);
    // What was written before stores had ids.
    let unnamed = DirectoryLife { generation: 3, ..Default::default() };
    assert_eq!(follow(&unnamed, None, &life(3, "t", 1, "p2", "http://b"), false), FollowOutcome::Followed);
}

#[test]
fn it_serves_with_a_quorum_that_knows_nothing_newer() {
    let own = life(2, "s", 1, "p", "http://a");
    let followed = |revision| answer(FollowOutcome::Followed, &own, revision);
    let of = |answers: Vec<(u64, FollowResponse)>| {
        verdict(&own, 100, None, &only(&[1, 2, 3]), &answers.into_iter().collect())
    };
    let Verdict::Wait(why) = of(vec![(1, followed(90))]) else { panic!("one of three is not enough") };
    assert!(why.contains("2 or 3"), "{why}");
    assert_eq!(of(vec![(1, followed(90)), (3, followed(100))]), Verdict::Serve);
    assert!(matches!(of(vec![(1, followed(101))]), Verdict::Behind(_)), "one that knows more is enough");
    let later = life(3, "t", 1, "q", "http://a");
    assert!(matches!(of(vec![(1, answer(FollowOutcome::Newer, &later, 5))]), Verdict::Behind(_)));
    let term = answer(FollowOutcome::Newer, &life(2, "s", 7, "q", "http://a"), 90);
    assert_eq!(of(vec![(1, followed(90)), (2, term)]), Verdict::Raise(7));
    assert!(matches!(of(vec![(1, followed(0)), (2, followed(90))]), Verdict::Wait(_)), "an unreadable copy");
    let seats = FollowResponse { topology_generation: 2, topology_revision: 101, ..followed(90) };
    assert!(matches!(of(vec![(1, seats)]), Verdict::Behind(_)), "a topology tells it as well");
}

#[test]
fn while_the_carriers_change_a_quorum_of_each_set_is_needed() {
    let own = life(2, "s", 1, "p", "http://a");
    let changing = Carriers { now: vec![1, 4, 3], before: vec![1, 2, 3] };
    let of = |servers: &[u64]| {
        let answers = servers.iter().map(|server| (*server, answer(FollowOutcome::Followed, &own, 100)));
        verdict(&own, 100, None, &changing, &answers.collect())
    };
    assert_eq!(of(&[1, 3]), Verdict::Serve);
    assert_eq!(of(&[1, 2, 4]), Verdict::Serve);
    let Verdict::Wait(why) = of(&[1, 4]) else { panic!("2 and 3 could follow another directory") };
    assert!(why.contains("server 2 or 3"), "{why}");
    assert!(matches!(of(&[2, 3]), Verdict::Wait(_)), "1 and 4 may know something newer");
}

#[test]
fn who_hears_another_directory_is_named_and_nothing_is_rebuilt() {
    let own = life(2, "s", 1, "p", "http://b");
    let held = answer(FollowOutcome::Held, &life(2, "s", 7, "q", "http://a:1"), 900);
    let Verdict::Wait(why) = verdict(&own, 100, None, &only(&[1]), &[(1, held)].into()) else {
        panic!("it must wait")
    };
    assert!(why.contains("http://a:1"), "{why}");
}

#[test]
fn a_rebuilt_store_does_not_begin_to_serve_when_the_one_before_went_on() {
    let own = life(2, "s", 1, "p", "http://a");
    let with_copy = |generation, durable_revision| FollowResponse {
        journals: vec![JournalCopy { generation, durable_revision, ..Default::default() }],
        ..answer(FollowOutcome::Followed, &own, 0)
    };
    let of = |base, copy| verdict(&own, 105, base, &only(&[1]), &[(1, copy)].into());
    assert_eq!(of(Some((1, 100)), with_copy(1, 100)), Verdict::Serve);
    assert!(matches!(of(Some((1, 100)), with_copy(1, 101)), Verdict::Behind(_)));
    assert_eq!(of(None, with_copy(1, 101)), Verdict::Serve, "it served: what was not shipped then is lost");
}

proptest! {
    /// Whatever two directories ask, in whatever order, with whatever pauses: never do both have a quorum.
    #[test]
    fn at_most_one_has_a_quorum(
        carriers in 1u64..5,
        same_store in any::<bool>(),
        steps in proptest::collection::vec((any::<bool>(), 0u64..5, 0u64..3, 0u64..8_000), 1..60),
    ) {
        let ids: Vec<u64> = (1..=carriers).collect();
        let mut asking = [life(2, "s", 1, "p", "http://a"), life(2, if same_store { "s" } else { "t" }, 1, "q", "http://b")];
        let mut known: BTreeMap<u64, (DirectoryLife, Option<u64>)> =
            ids.iter().map(|id| (*id, (DirectoryLife::default(), None))).collect();
        let mut now = 0;
        for (who, server, raise, pass) in steps {
            now += pass;
            let who = usize::from(who);
            asking[who].term += raise;
            if let Some((current, heard)) = known.get_mut(&(1 + server)) {
                let ago = heard.map(|at| now - at);
                if follow(current, ago, &asking[who], false) == FollowOutcome::Followed {
                    (*current, *heard) = (asking[who].clone(), Some(now));
                }
            }
            let quorum = |life: &DirectoryLife| {
                let of = known.iter().filter(|(_, (current, _))| current == life).map(|(id, _)| *id).collect();
                is_quorum(&ids, &of)
            };
            prop_assert!(!(quorum(&asking[0]) && quorum(&asking[1])));
        }
    }

    #[test]
    fn two_quorums_meet_and_every_shipped_change_is_seen(carriers in 1u64..6, one in any::<u8>(), other in any::<u8>()) {
        let ids: Vec<u64> = (1..=carriers).collect();
        let of = |mask: u8| ids.iter().copied().filter(|id| mask & (1 << id) != 0).collect::<BTreeSet<u64>>();
        let (one, other) = (of(one), of(other));
        if is_quorum(&ids, &one) {
            prop_assert!(!is_quorum(&ids, &other) || !one.is_disjoint(&other));
            prop_assert!(2 * other.len() <= ids.len() || !one.is_disjoint(&other), "majorities hold what was shipped");
        }
    }
}
