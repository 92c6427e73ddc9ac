use super::*;

fn report(
    cluster: &str,
    server: u64,
    generation: u64,
    copy: Option<(u64, u64, &[u64])>,
) -> v1::RegisterRequest {
    v1::RegisterRequest {
        cluster_id: cluster.into(),
        server_id: server,
        disk_id: format!("disk-{server}"),
        generation,
        journals: copy
            .map(|(generation, durable_revision, carriers)| v1::JournalCopy {
                cluster_id: cluster.into(),
                generation,
                checkpoint_revision: 0,
                durable_revision,
                carrier_ids: carriers.to_vec(),
            })
            .into_iter()
            .collect(),
        ..Default::default()
    }
}

fn reports(list: Vec<v1::RegisterRequest>) -> BTreeMap<String, v1::RegisterRequest> {
    list.into_iter().map(|report| (report.disk_id.clone(), report)).collect()
}

fn blank(number: u64) -> v1::RegisterRequest {
    v1::RegisterRequest { server_id: 0, disk_id: format!("blank-{number}"), ..Default::default() }
}

#[test]
fn blank_servers_form_a_cluster_after_a_while_and_nobody_forms_none() {
    assert!(matches!(decide(&reports(vec![]), None, 1_000, None, false), Decision::AwaitAny(_)));
    let blanks = reports(vec![blank(1), blank(2)]);
    assert!(matches!(decide(&blanks, Some(999), 1_000, None, false), Decision::AwaitAny(_)));
    assert_eq!(decide(&blanks, Some(1_000), 1_000, None, false), Decision::Form);
}

#[test]
fn a_single_server_that_knows_a_cluster_forbids_a_new_one() {
    let mixed = reports(vec![blank(1), blank(2), report("c", 3, 1, None)]);
    for forced in [false, true] {
        assert!(matches!(decide(&mixed, Some(60_000), 1_000, None, forced), Decision::AwaitCarriers(_)));
    }
}

#[test]
fn enough_carriers_must_report_and_the_newest_copy_wins() {
    let carriers = [1, 2, 3];
    let one = report("c", 1, 1, Some((1, 90, &carriers)));
    let two = report("c", 2, 1, Some((1, 100, &carriers)));
    let Decision::AwaitCarriers(why) = decide(&reports(vec![one.clone()]), Some(9_999), 10, None, false)
    else {
        panic!("one of three carriers is not enough");
    };
    assert!(why.contains("2 or 3"), "{why}");
    let Decision::Rebuild(source) = decide(&reports(vec![one.clone(), two]), Some(0), 10, None, false) else {
        panic!("two of three contain one that holds the newest change");
    };
    assert_eq!((source.disk_id.as_str(), source.revision, source.next_generation), ("disk-2", 100, 2));
    let Decision::Rebuild(forced) = decide(&reports(vec![one]), Some(0), 10, None, true) else {
        panic!("an operator goes on with what is there");
    };
    assert_eq!(forced.revision, 90);
}

#[test]
fn a_carrier_without_a_copy_counts_as_having_nothing_newer() {
    let carriers = [1, 2, 3];
    let list = vec![report("c", 1, 1, Some((1, 90, &carriers))), report("c", 3, 1, None)];
    assert!(matches!(decide(&reports(list), Some(0), 10, None, false), Decision::Rebuild(_)));
}

#[test]
fn the_newest_copy_says_who_the_carriers_are() {
    // Server 3 died and server 4 took its place; 3 comes back with an old copy.
    let old = report("c", 3, 1, Some((1, 50, &[1, 2, 3])));
    let new = report("c", 2, 1, Some((1, 90, &[1, 2, 4])));
    let list = reports(vec![old, new]);
    assert!(matches!(decide(&list, Some(0), 10, None, false), Decision::AwaitCarriers(_)));
}

#[test]
fn a_later_generation_that_left_no_copy_is_waited_for() {
    let carriers = [1, 2, 3];
    let mut list =
        vec![report("c", 1, 1, Some((1, 90, &carriers))), report("c", 2, 2, Some((1, 90, &carriers)))];
    assert!(matches!(decide(&reports(list.clone()), Some(0), 10, None, false), Decision::AwaitCarriers(_)));
    list.push(report("c", 3, 1, Some((1, 80, &carriers))));
    let Decision::Rebuild(source) = decide(&reports(list), Some(0), 10, None, false) else {
        panic!("all carriers are there");
    };
    assert_eq!(source.next_generation, 3);
}

#[test]
fn clusters_are_never_mixed() {
    let list = reports(vec![report("a", 1, 1, Some((1, 5, &[1]))), report("b", 2, 1, Some((1, 9, &[2])))]);
    assert!(matches!(decide(&list, Some(0), 10, None, true), Decision::AwaitCarriers(_)));
    let Decision::Rebuild(source) = decide(&list, Some(0), 10, Some(("a", 4)), false) else {
        panic!("the store that is here says which cluster");
    };
    assert_eq!((source.cluster_id.as_str(), source.next_generation), ("a", 5));
}

#[tokio::test(start_paused = true)]
async fn a_copy_that_cannot_be_read_is_asked_again_and_forms_no_new_cluster() {
    let lobby = Lobby::new(Config::default());
    {
        let mut state = lobby.state.lock();
        state.by_disk = reports(vec![blank(1), report("c", 2, 1, Some((1, 90, &[2])))]);
        state.first = Some(Instant::now());
    }
    tokio::time::advance(Duration::from_secs(60)).await;
    for _ in 0..3 {
        let Decision::Rebuild(source) = lobby.decided(|_| {}).await else {
            panic!("a server knows a cluster");
        };
        assert_eq!(source.disk_id, "disk-2");
        lobby.rebuilt(&source, &Err(Error::unavailable("it stopped arriving")));
    }
}

#[test]
fn a_carrier_whose_copy_cannot_be_read_is_none_that_knows_of_nothing_newer() {
    let carriers = [1, 2, 3];
    let list = || vec![report("c", 1, 1, Some((1, 90, &carriers))), report("c", 3, 1, Some((1, 0, &[])))];
    assert!(matches!(decide(&reports(list()), Some(0), 10, None, false), Decision::AwaitCarriers(_)));
    let mut all = list();
    all.push(report("c", 2, 1, Some((1, 100, &carriers))));
    let Decision::Rebuild(source) = decide(&reports(all), Some(0), 10, None, false) else {
        panic!("two of three copies can be read");
    };
    assert_eq!(source.revision, 100);
}
