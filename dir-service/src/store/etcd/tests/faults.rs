//! The store while etcd is restarted, killed, full, or wants to know who calls.

use super::*;
use std::{collections::BTreeMap, sync::atomic::AtomicBool, time::Instant};

/// Writers at the same time.
const WRITERS: usize = 16;
/// Longest that anything here may take to go on.
const GOES_ON_MAX: Duration = Duration::from_secs(30);

/// What became of each plan.
#[derive(Default)]
struct Outcomes {
    acknowledged: BTreeMap<String, Revision>,
    unknown: Vec<String>,
    refused: Vec<String>,
}

/// Writers, each creating one key after the other until told to stop.
async fn write_until(store: &Arc<EtcdStore>, stop: &Arc<AtomicBool>) -> Outcomes {
    let writer = |writer: usize| {
        let (store, stop) = (store.clone(), stop.clone());
        tokio::spawn(async move {
            let mut outcomes = Outcomes::default();
            for round in 0.. {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let name = format!("{writer:02}/{round:06}");
                let mut plan = Plan::new();
                plan.require(Precondition::Absent(key(&name))).put(key(&name), name.clone());
                match store.commit(plan).await {
                    Ok(revision) => drop(outcomes.acknowledged.insert(name, revision)),
                    Err(CommitError::Unknown(_)) => outcomes.unknown.push(name),
                    Err(CommitError::Refused(_)) => outcomes.refused.push(name),
                    Err(CommitError::Conflict) => panic!("nobody else creates {name}"),
                }
            }
            outcomes
        })
    };
    let mut all = Outcomes::default();
    for task in (0..WRITERS).map(writer).collect::<Vec<_>>() {
        let some = task.await.unwrap();
        all.acknowledged.extend(some.acknowledged);
        all.unknown.extend(some.unknown);
        all.refused.extend(some.refused);
    }
    all
}

/// Acknowledged plans are there at their revision, refused ones are not.
async fn check(store: &EtcdStore, outcomes: &Outcomes) {
    let all: Vec<(&String, &Revision)> = outcomes.acknowledged.iter().collect();
    for some in all.chunks(100) {
        let keys: Vec<Key> = some.iter().map(|(name, _)| key(name)).collect();
        let (_, values) = store.get(&keys, None).await.unwrap();
        for ((name, revision), value) in some.iter().zip(values) {
            assert_eq!(value.map(|value| value.revision), Some(**revision), "{name} was acknowledged");
        }
    }
    for name in &outcomes.refused {
        assert_eq!(value(store, name).await, None, "{name} was refused");
    }
    assert!(!outcomes.acknowledged.is_empty());
}

/// Commits until it works; how long that took.
async fn commit_again(store: &EtcdStore) -> Duration {
    let began = Instant::now();
    while let Err(error) = put(store, "again", "x").await {
        assert!(began.elapsed() < GOES_ON_MAX, "{error:?}");
    }
    began.elapsed()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_goes_on_when_etcd_was_restarted() {
    let Some(mut etcd) = Etcd::start().await else { return };
    let store = create(etcd.options("s")).await;
    let mut changes = store.watch(key("w/"), Revision(1)).await.unwrap();
    let mut expected = Vec::new();
    for round in 0..4 {
        for number in 0..5 {
            expected.push(put(&store, &format!("w/{round}/{number}"), "x").await.unwrap());
        }
        // In the first round everything was told before, later not.
        if round == 0 {
            for revision in &expected {
                assert_eq!(changes.next().await.unwrap().unwrap().revision, *revision);
            }
        }
        etcd.kill(0);
        etcd.restart(0);
        commit_again(&store).await;
    }
    for revision in &expected[5..] {
        let change = tokio::time::timeout(GOES_ON_MAX, changes.next()).await.expect("the watch goes on");
        assert_eq!(change.unwrap().unwrap().revision, *revision, "each once, in order");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_survives_kills_of_etcd() {
    let Some(mut etcd) = Etcd::start().await else { return };
    let store = create(etcd.options("s")).await;
    let stop = Arc::new(AtomicBool::new(false));
    let writing = tokio::spawn({
        let (store, stop) = (store.clone(), stop.clone());
        async move { write_until(&store, &stop).await }
    });
    for _ in 0..5 {
        tokio::time::sleep(Duration::from_millis(300)).await;
        etcd.kill(0);
        tokio::time::sleep(Duration::from_millis(50)).await;
        etcd.restart(0);
        commit_again(&store).await;
    }
    stop.store(true, Ordering::Relaxed);
    let outcomes = writing.await.unwrap();
    assert!(!outcomes.unknown.is_empty(), "plans were on their way when it was killed");
    check(&store, &outcomes).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn goes_on_when_the_leader_dies_and_stops_without_a_majority() {
    let Some(mut etcd) = Etcd::start_with(3, |_| Vec::new()).await else { return };
    let store = create(etcd.options("s")).await;
    let mut changes = store.watch(key("again"), Revision(1)).await.unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let writing = tokio::spawn({
        let (store, stop) = (store.clone(), stop.clone());
        async move { write_until(&store, &stop).await }
    });
    for _ in 0..2 {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let leader = leader(&etcd).await;
        etcd.kill(leader);
        let took = commit_again(&store).await;
        println!("the first change after the death of the leader took {took:?}");
        assert!(changes.next().await.unwrap().is_ok());
        etcd.restart(leader);
    }
    stop.store(true, Ordering::Relaxed);
    check(&store, &writing.await.unwrap()).await;

    put(&store, "k", "before").await.unwrap();
    etcd.kill(0);
    etcd.kill(1);
    let refused = put(&store, "k", "after").await.unwrap_err();
    let (CommitError::Refused(error) | CommitError::Unknown(error)) = &refused else { panic!("{refused:?}") };
    assert!(error.message().contains("etcd at 127.0.0.1:"), "{error}");
    assert_eq!(error.reason, Reason::Unavailable);
    let read = store.get(&[key("k")], None).await.unwrap_err();
    assert_eq!(read.reason, Reason::Unavailable, "no stale answer: {read}");
    etcd.restart(0);
    commit_again(&store).await;
    let now = value(&store, "k").await.unwrap();
    if matches!(refused, CommitError::Refused(_)) {
        assert_eq!(now, "before");
    }
}

/// Which member leads.
async fn leader(etcd: &Etcd) -> usize {
    for member in 0..3 {
        let address = format!("{SCHEME}{}", etcd.member(member)).parse().unwrap();
        let client = Client::new(EtcdOptions::new(address), network(), 0);
        let status = client.status().await.unwrap();
        if status.leader == status.header.unwrap().member_id {
            return member;
        }
    }
    panic!("nobody leads");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_database_refuses_and_says_what_to_do() {
    let quota = |_: &std::path::Path| vec!["--quota-backend-bytes=8388608".to_owned()];
    let Some(etcd) = Etcd::start_with(1, quota).await else { return };
    let store = create(etcd.options("s")).await;
    let mut last = String::new();
    let mut full = None;
    for round in 0..64 {
        let next = format!("{round:02}").repeat(256 * 1024);
        match put(&store, "k", &next).await {
            Ok(_) => last = next,
            Err(CommitError::Unknown(_)) => last = String::new(),
            Err(error) => {
                full = Some(error);
                break;
            }
        }
    }
    let Some(CommitError::Refused(error)) = full else { panic!("8 MiB hold 32: {full:?}") };
    assert_eq!(error.reason, Reason::NoSpace);
    assert!(error.message().contains("alarm disarm"), "{error}");
    let now = value(&store, "k").await.expect("reads go on");
    assert!(last.is_empty() || now == last, "what was refused was not applied");
    // What the message says.
    let revision = etcd.ctl(&["get", "/s/data/k", "--write-out=fields", "--keys-only"]);
    let revision = revision.lines().find_map(|line| line.strip_prefix("\"Revision\" : ")).unwrap().to_owned();
    etcd.ctl(&["compact", &revision]);
    etcd.ctl(&["defrag"]);
    etcd.ctl(&["alarm", "disarm"]);
    put(&store, "k", "small").await.unwrap();
    assert_eq!(value(&store, "k").await.unwrap(), "small");
}

#[tokio::test]
async fn revisions_that_somebody_else_compacted_are_told() {
    let Some(etcd) = Etcd::start().await else { return };
    let store = create(etcd.options("s")).await;
    let first = put(&store, "k", "1").await.unwrap();
    for _ in 0..5 {
        put(&store, "k", "2").await.unwrap();
    }
    let mut plan = Plan::new();
    plan.delete(key("k"));
    let deleted = store.commit(plan).await.unwrap();
    put(&store, "j", "3").await.unwrap();
    etcd.ctl(&["compact", &store.shared.layout.etcd(deleted).unwrap().to_string()]);
    let read = store.get(&[key("k")], Some(first)).await.unwrap_err();
    assert_eq!(read.reason, Reason::RevisionCompacted);
    let scan = store.scan(KeyRange::all(), 1, Some(first)).await.unwrap_err();
    assert_eq!(scan.reason, Reason::RevisionCompacted);
    // etcd keeps no removal at the very revision that it was compacted at.
    for from in [first, deleted] {
        let watch = store.watch(key("k"), from).await.err().expect("a removal would be missed");
        assert_eq!(watch.reason, Reason::RevisionCompacted);
    }
    assert_eq!(store.get(&[key("k")], Some(deleted)).await.unwrap().1, [None]);
    let mut changes = store.watch(key(""), Revision(deleted.0 + 1)).await.unwrap();
    assert_eq!(changes.next().await.unwrap().unwrap().revision, Revision(deleted.0 + 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_plans_are_told_whole() {
    let Some(etcd) = Etcd::start().await else { return };
    let store = create(etcd.options("s")).await;
    let value = "x".repeat(cairn_core::plan::PLAN_BYTES_MAX / 128 - 100);
    for _ in 0..20 {
        let mut plan = Plan::new();
        for number in 0..128 {
            plan.put(key(&number.to_string()), value.clone());
        }
        store.commit(plan).await.unwrap();
    }
    let mut changes = store.watch(key(""), Revision(1)).await.unwrap();
    for revision in 1..=20 {
        let change = changes.next().await.unwrap().unwrap();
        assert_eq!((change.revision, change.mutations.len()), (Revision(revision), 128));
    }
    assert!(changes.next().now_or_never().is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn users_and_passwords() {
    let Some(mut etcd) = Etcd::start().await else { return };
    etcd.ctl(&["user", "add", "root:secret"]);
    etcd.ctl(&["user", "grant-role", "root", "root"]);
    etcd.ctl(&["user", "add", "cairn:pass"]);
    etcd.ctl(&["role", "add", "cairn"]);
    etcd.ctl(&["role", "grant-permission", "cairn", "--prefix=true", "readwrite", "/s/"]);
    etcd.ctl(&["user", "grant-role", "cairn", "cairn"]);
    etcd.ctl(&["auth", "enable"]);
    let options = etcd.options("s");
    let of = |name: &str, password: &str, options: &EtcdOptions| EtcdOptions {
        user: Some(EtcdUser { name: name.into(), password: password.into() }),
        ..options.clone()
    };
    let nobody = EtcdStore::find(&options, &network()).await.unwrap_err();
    assert!(nobody.message().contains("--etcd-user"), "{nobody}");
    let wrong = EtcdStore::find(&of("cairn", "wrong", &options), &network()).await.unwrap_err();
    assert!(wrong.message().contains("password") && !wrong.message().contains("wrong"), "{wrong}");
    let store = create(of("cairn", "pass", &options)).await;
    let mut changes = store.watch(key(""), Revision(1)).await.unwrap();
    put(&store, "k", "v").await.unwrap();
    // Its prefix alone is open to it.
    let elsewhere = EtcdStore::find(&of("cairn", "pass", &etcd.options("t")), &network()).await.unwrap_err();
    assert!(elsewhere.message().contains("prefix"), "{elsewhere}");
    // Tokens do not outlive a member.
    etcd.kill(0);
    etcd.restart(0);
    commit_again(&store).await;
    assert_eq!(value(&store, "k").await.unwrap(), "v");
    for _ in 0..2 {
        assert!(changes.next().await.unwrap().is_ok());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_with_certificates() {
    let files: [(&str, &[u8]); 3] = [
        ("server.pem", include_bytes!("tls/server.pem")),
        ("server.key", include_bytes!("tls/server.key")),
        ("ca.pem", include_bytes!("tls/ca.pem")),
    ];
    let arguments = |folder: &std::path::Path| {
        for (name, content) in files {
            std::fs::write(folder.join(name), content).unwrap();
        }
        let file = |name: &str| folder.join(name).display().to_string();
        vec![
            format!("--cert-file={}", file("server.pem")),
            format!("--key-file={}", file("server.key")),
            format!("--trusted-ca-file={}", file("ca.pem")),
            "--client-cert-auth".to_owned(),
        ]
    };
    let Some(etcd) = Etcd::start_with(1, arguments).await else { return };
    let ca = Bytes::from_static(include_bytes!("tls/ca.pem"));
    let identity = (
        Bytes::from_static(include_bytes!("tls/client.pem")),
        Bytes::from_static(include_bytes!("tls/client.key")),
    );
    let with = |tls: Option<EtcdTls>| EtcdOptions { tls: tls.map(Arc::new), ..etcd.options("s") };
    let store = create(with(Some(EtcdTls { ca: ca.clone(), identity: Some(identity.clone()) }))).await;
    put(&store, "k", "v").await.unwrap();
    assert_eq!(value(&store, "k").await.unwrap(), "v");
    // Without a certificate, with an authority that did not sign the member's, and without TLS nothing comes through.
    let other = Bytes::from_static(include_bytes!("tls/client.pem"));
    for tls in
        [None, Some(EtcdTls { ca, identity: None }), Some(EtcdTls { ca: other, identity: Some(identity) })]
    {
        let error = EtcdStore::find(&with(tls), &network()).await.unwrap_err();
        assert!(error.message().contains("etcd at 127.0.0.1:"), "{error}");
    }
}
