use super::*;
use proptest::prelude::*;

fn set(ids: &[u64]) -> BTreeSet<u64> {
    ids.iter().copied().collect()
}

fn held(list: &[(u64, u64)]) -> BTreeMap<u64, Revision> {
    list.iter().map(|(id, revision)| (*id, Revision(*revision))).collect()
}

fn only(now: &[u64]) -> Carriers {
    Carriers { now: now.to_vec(), before: Vec::new() }
}

fn change(before: &[u64], now: &[u64]) -> Carriers {
    Carriers { now: now.to_vec(), before: before.to_vec() }
}

const UP: Server =
    Server { able: true, answers: true, lost: false, leaves: false, given_up: false, free_bytes: 1 };
const SILENT: Server = Server { able: false, answers: false, ..UP };
const DEAD: Server = Server { lost: true, ..SILENT };
const DRAINING: Server = Server { able: false, lost: true, leaves: true, ..UP };
const GIVEN_UP: Server = Server { given_up: true, leaves: true, ..DEAD };

fn servers(list: &[Server]) -> BTreeMap<u64, Server> {
    (1..).zip(list.iter().copied()).collect()
}

#[test]
fn a_change_is_carried_when_a_majority_holds_it() {
    let of = |carriers: &Carriers, list: &[(u64, u64)]| carriers.carried(&held(list), &BTreeSet::new()).0;
    assert_eq!(of(&only(&[1, 2, 3]), &[(1, 9), (2, 5), (3, 2)]), 5);
    assert_eq!(of(&only(&[1, 2, 3]), &[(1, 9)]), 0);
    assert_eq!(of(&only(&[1, 2]), &[(1, 9), (2, 5)]), 5);
    assert_eq!(of(&only(&[1]), &[(1, 9)]), 9);
    assert_eq!(of(&only(&[1]), &[(2, 9)]), 0, "it is no carrier");
    assert_eq!(of(&only(&[]), &[]), 0);
}

#[test]
fn while_they_change_a_majority_of_both_is_needed() {
    // 2 and 3 lost power together and hold 100; 4 takes the place of 2.
    let changing = change(&[1, 2, 3], &[1, 4, 3]);
    let of = |list: &[(u64, u64)], given_up: &[u64]| changing.carried(&held(list), &set(given_up)).0;
    assert_eq!(of(&[(1, 900), (4, 900), (2, 100), (3, 100)], &[]), 100, "2 and 3 would be believed");
    assert_eq!(of(&[(1, 900), (4, 900), (2, 100), (3, 300)], &[]), 300);
    assert_eq!(of(&[(1, 900), (2, 900), (3, 100)], &[]), 100, "a majority of those that follow as well");
    assert_eq!(of(&[(1, 900), (4, 900), (3, 100)], &[2]), 900, "an operator gave 2 up");
    assert_eq!(of(&[(1, 900), (3, 100)], &[2, 4]), 100, "nobody is given up in the set that follows");
}

#[test]
fn the_first_are_those_with_most_room() {
    let three = servers(&[UP, Server { free_bytes: 9, ..UP }, SILENT, UP, UP]);
    assert_eq!(Carriers::default().next(&three, false), Some(only(&[2, 1, 4])));
    assert_eq!(Carriers::default().next(&servers(&[SILENT, DEAD]), false), None);
    assert_eq!(Carriers::default().next(&servers(&[UP]), false), Some(only(&[1])));
}

#[test]
fn a_dead_one_is_replaced_while_most_answer_and_the_set_before_goes_once_both_know() {
    let now = servers(&[UP, DEAD, UP, UP]);
    let begun = only(&[1, 2, 3]).next(&now, true).unwrap();
    assert_eq!(begun, change(&[1, 2, 3], &[1, 4, 3]));
    assert_eq!(begun.next(&now, false), None, "not before its record is carried");
    assert_eq!(begun.next(&now, true), Some(only(&[1, 4, 3])));
    assert_eq!(only(&[1, 4, 3]).next(&now, true), None);
}

#[test]
fn without_most_of_them_none_is_replaced_until_an_operator_gives_one_up() {
    let three = only(&[1, 2, 3]);
    assert_eq!(three.next(&servers(&[UP, DEAD, SILENT, UP]), true), None);
    assert_eq!(three.next(&servers(&[UP, DEAD, DEAD, UP, UP]), true), None);
    let given_up = servers(&[UP, GIVEN_UP, SILENT, UP]);
    assert_eq!(three.next(&given_up, true), Some(change(&[1, 2, 3], &[1, 4, 3])));
    // All of them: those that are there carry on, all at once.
    let all = servers(&[GIVEN_UP, GIVEN_UP, GIVEN_UP, UP, UP]);
    assert_eq!(three.next(&all, true), Some(change(&[1, 2, 3], &[4, 5])));
}

#[test]
fn of_two_both_must_know() {
    let two = only(&[1, 2]);
    for place in [0, 1] {
        let mut list = [UP; 3];
        list[place] = DEAD;
        assert_eq!(two.next(&servers(&list), true), None);
        list[place] = GIVEN_UP;
        assert!(two.next(&servers(&list), true).unwrap().now.contains(&3));
        assert_eq!(two.next(&servers(&list[..2]), true), Some(change(&[1, 2], &[2 - place as u64])));
    }
    assert_eq!(two.next(&servers(&[UP, UP, UP]), true), Some(change(&[1, 2], &[1, 2, 3])));
}

#[test]
fn one_grows_to_three_and_waits_for_none_that_does_not_come_back() {
    let one = only(&[1]);
    let begun = one.next(&servers(&[UP, UP, UP]), true).unwrap();
    assert_eq!(begun, change(&[1], &[1, 2, 3]));
    assert_eq!(begun.next(&servers(&[UP, SILENT, UP]), false), None, "most of the new ones answer");
    assert_eq!(begun.next(&servers(&[UP, SILENT, SILENT]), false), Some(one.clone()), "it carries alone");
    let other = servers(&[UP, DEAD, SILENT, UP]);
    assert_eq!(begun.next(&other, false), Some(change(&[1], &[1, 4])), "the set before stays");
    assert_eq!(begun.next(&servers(&[SILENT, SILENT, SILENT]), false), None, "nobody is there");
}

#[test]
fn one_that_is_emptied_makes_place_for_another_or_for_nobody() {
    let three = only(&[1, 2, 3]);
    assert_eq!(three.next(&servers(&[UP, DRAINING, UP, UP]), true).unwrap().now, [1, 4, 3]);
    assert_eq!(three.next(&servers(&[UP, DRAINING, UP]), true).unwrap().now, [1, 3]);
    assert_eq!(only(&[1]).next(&servers(&[DRAINING]), true), None, "somebody has to");
    assert_eq!(three.next(&servers(&[UP, UP]), true).unwrap().now, [1, 2], "3 is not known any more");
}

/// What happens to a cluster.
#[derive(Clone, Debug)]
enum Event {
    Write,
    /// A server takes the journal, up to a share of what it lacks.
    Take(u64, u64),
    /// A server falls silent, dies, or is back.
    Fare(u64, u8),
    /// The directory looks at its carriers.
    Look,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        2 => Just(Event::Write),
        4 => (1u64..=5, 0u64..=4).prop_map(|(server, share)| Event::Take(server, share)),
        2 => (1u64..=5, 0u8..3).prop_map(|(server, how)| Event::Fare(server, how)),
        4 => Just(Event::Look),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    /// However carriers come, fall silent, die and return: a store that lacks something which was carried (an older one,
    /// or one rebuilt from copies) has no quorum of servers that know of nothing newer.
    #[test]
    fn no_store_that_lacks_what_was_carried_is_confirmed(events in proptest::collection::vec(event(), 1..80)) {
        let mut servers = servers(&[UP; 5]);
        let mut durable: BTreeMap<u64, Revision> = BTreeMap::new();
        let (mut last, mut changed, mut carried) = (0, 0, 0);
        let mut carriers = only(&[1, 2, 3]);
        let mut named = BTreeMap::from([(0, carriers.clone())]);
        for event in events {
            match event {
                Event::Write => last += 1,
                Event::Take(server, share) => {
                    if carriers.names(server) && servers[&server].answers {
                        let held = durable.entry(server).or_default();
                        held.0 += (last - held.0) * share / 4;
                    }
                }
                Event::Fare(server, how) => {
                    servers.insert(server, [UP, SILENT, DEAD][usize::from(how)]);
                }
                Event::Look => {
                    let mut held = durable.clone();
                    held.retain(|server, _| carriers.names(*server));
                    let now = carriers.carried(&held, &BTreeSet::new()).0;
                    carried = carried.max(now);
                    if let Some(next) = carriers.next(&servers, now >= changed) {
                        last += 1;
                        changed = last;
                        named.insert(last, next.clone());
                        carriers = next;
                    }
                }
            }
        }
        for mask in 0u32..32 {
            let of: BTreeSet<u64> = (1..=5).filter(|server| mask & (1 << (server - 1)) != 0).collect();
            let newest = of.iter().filter_map(|server| durable.get(server)).max().map_or(0, |newest| newest.0);
            // Each older store of which these know nothing newer.
            for revision in newest..carried {
                let (_, names) = named.range(..=revision).next_back().unwrap();
                prop_assert!(!names.is_quorum(&of), "{of:?} confirm {revision} of {carried}, carriers {named:?}");
            }
        }
    }
}
