//! Several directories over one store: homes of sessions, what they read, who leads. Time is virtual.

use super::*;
use crate::{
    cluster::change::Change,
    config::Config,
    membership::Team,
    ops::{self, session},
    store::{MemoryStore, MetaStore},
};
use cairn_core::{
    key,
    plan::Plan,
    record::{Record as _, Session},
};
use cairn_proto::{
    Reason,
    host::Host,
    id::{Revision, SessionId},
};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

/// A directory with the loops that keep sessions.
struct One {
    directory: Arc<Directory>,
    beating: Option<AbortOnDropHandle<()>>,
    others: Vec<AbortOnDropHandle<()>>,
    stop: CancellationToken,
}

impl One {
    async fn join(store: &MemoryStore) -> Self {
        let shared: Arc<dyn MetaStore> = Arc::new(store.clone());
        let config = Config { advertise: vec!["http://127.0.0.1:7400".into()], ..Config::default() };
        let directory = Directory::open_shared(shared, None, config, Host::system(3)).await.unwrap();
        let directory = Arc::new(directory);
        let stop = CancellationToken::new();
        let others = vec![
            AbortOnDropHandle::new(tokio::spawn(background::sessions::run(directory.clone(), stop.clone()))),
            AbortOnDropHandle::new(tokio::spawn(background::homes::run(directory.clone()))),
            AbortOnDropHandle::new(tokio::spawn(background::follow::run(directory.clone()))),
        ];
        let mut one = Self { directory, beating: None, others, stop };
        one.beat();
        one
    }

    fn beat(&mut self) {
        let directory = self.directory.clone();
        self.beating = Some(AbortOnDropHandle::new(tokio::spawn(async move {
            directory.membership.as_ref().unwrap().run(&directory.sessions).await;
        })));
    }

    fn fall_silent(&mut self) {
        self.beating = None;
    }

    fn kill(&mut self) {
        self.fall_silent();
        self.others.clear();
        self.stop.cancel();
    }

    fn id(&self) -> u64 {
        self.directory.membership.as_ref().unwrap().me().id
    }

    fn leads(&self) -> bool {
        self.directory.leads()
    }

    async fn open(&self, ttl_ms: u64) -> SessionId {
        let request = v1::OpenRequest { ttl_ms, owner: "tester".into(), ..Default::default() };
        SessionId(session::open(&self.directory, request).await.unwrap().session_id)
    }

    async fn renew(&self, id: SessionId, oldest: Option<u64>) -> Result<u64> {
        ops::renew::renew(&self.directory, id, oldest.map(Revision)).await
    }
}

async fn record(store: &MemoryStore, id: SessionId) -> Option<Session> {
    let (_, values) = store.get(&[key::session(id)], None).await.unwrap();
    values[0].as_ref().map(|value| Session::from_bytes(&value.value).unwrap())
}

async fn lives(store: &MemoryStore, id: SessionId) -> bool {
    record(store, id).await.is_some_and(|session| !session.ended)
}

/// Drops up to this revision may go.
async fn unread(store: &MemoryStore) -> u64 {
    let store: Arc<dyn MetaStore> = Arc::new(store.clone());
    Team::read(&store).await.unwrap().unread().unwrap().0
}

async fn leading<'a>(ones: &[&'a One]) -> &'a One {
    until("somebody leads", || async { ones.iter().any(|one| one.leads()) }).await;
    ones.iter().find(|one| one.leads()).unwrap()
}

async fn pass(seconds: u64) {
    tokio::time::sleep(Duration::from_secs(seconds)).await;
}

#[tokio::test(start_paused = true)]
async fn all_of_them_are_one_cluster_and_one_leads() {
    let store = MemoryStore::new();
    let (a, b, c) = tokio::join!(One::join(&store), One::join(&store), One::join(&store));
    let ones = [&a, &b, &c];
    assert!(ones.iter().all(|one| one.directory.cluster_id == a.directory.cluster_id));
    let term = leading(&ones).await.directory.membership.as_ref().unwrap().leads();
    pass(60).await;
    assert_eq!(ones.iter().filter(|one| one.leads()).count(), 1);
    assert_eq!(leading(&ones).await.directory.membership.as_ref().unwrap().leads(), term);
    assert_eq!(a.directory.cluster.status().sharing.len(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_renewal_elsewhere_moves_the_home_and_only_that_ends_the_session() {
    let store = MemoryStore::new();
    let (a, b) = (One::join(&store).await, One::join(&store).await);
    let id = a.open(3_000).await;
    assert_eq!(record(&store, id).await.unwrap().home, a.id());
    for _ in 0..10 {
        assert_eq!(b.renew(id, Some(0)).await.unwrap(), 3_000);
        pass(2).await;
    }
    assert_eq!(record(&store, id).await.unwrap().home, b.id());
    assert!(!a.directory.sessions.knows(id) && b.directory.sessions.knows(id));
    assert!(lives(&store, id).await);
    // And back, at once and then in silence: the home before may have confirmed one more renewal.
    a.renew(id, Some(0)).await.unwrap();
    let moved = Instant::now();
    until("it ends", || async { !lives(&store, id).await }).await;
    assert!(moved.elapsed() >= Duration::from_secs(8), "{:?}", moved.elapsed());
    assert!(moved.elapsed() < Duration::from_secs(12), "{:?}", moved.elapsed());
    for one in [&a, &b] {
        assert_eq!(one.renew(id, None).await.unwrap_err().reason, Reason::SessionExpired);
    }
    until("nothing is left of it", || async { record(&store, id).await.is_none() }).await;
}

#[tokio::test(start_paused = true)]
async fn fenced_a_lock_outlives_the_home_of_its_session() {
    let store = MemoryStore::new();
    let (mut a, b) = (One::join(&store).await, One::join(&store).await);
    let (living, dead) = (a.open(3_000).await, a.open(3_000).await);
    for (id, path) in [(living, "/kept"), (dead, "/left")] {
        ops::lock::lock(&a.directory, exclusive(path, id.0)).await.unwrap();
    }
    a.kill();
    let died = Instant::now();
    until("whoever renews no more loses its lock", || async {
        b.renew(living, Some(0)).await.unwrap();
        ops::lock::lock(&b.directory, exclusive("/left", living.0)).await.is_ok()
    })
    .await;
    assert!(died.elapsed() >= Duration::from_secs(8), "{:?}", died.elapsed());
    assert!(died.elapsed() < Duration::from_secs(15), "{:?}", died.elapsed());
    assert!(lives(&store, living).await && !lives(&store, dead).await);
    let team = Team::read(&(Arc::new(store.clone()) as Arc<dyn MetaStore>)).await.unwrap();
    assert_eq!(team.directories.keys().copied().collect::<Vec<_>>(), [b.id()], "the dead one is forgotten");
}

#[tokio::test(start_paused = true)]
async fn one_that_is_not_sure_of_its_standing_confirms_nothing_and_joins_again() {
    let store = MemoryStore::new();
    let (mut a, b) = (One::join(&store).await, One::join(&store).await);
    let id = a.open(10_000).await;
    let before = a.id();
    a.fall_silent();
    pass(3).await;
    a.renew(id, Some(0)).await.unwrap();
    pass(2).await;
    assert_eq!(a.renew(id, Some(0)).await.unwrap_err().reason, Reason::Unavailable);
    assert!(!a.leads());
    until("the other one leads and has the session", || async {
        b.leads() && record(&store, id).await.unwrap().home == b.id()
    })
    .await;
    a.beat();
    until("it joins again", || async { a.id() != before }).await;
    assert!(!a.directory.sessions.knows(id));
    until("it keeps sessions", || async { a.renew(id, Some(0)).await.is_ok() }).await;
    assert_eq!(record(&store, id).await.unwrap().home, a.id());
    assert!(b.leads() && !a.leads());
}

#[tokio::test(start_paused = true)]
async fn what_a_session_reads_is_covered_wherever_its_home_is() {
    let store = MemoryStore::new();
    let (mut a, b) = (One::join(&store).await, One::join(&store).await);
    let id = a.open(30_000).await;
    let mark = store.revision().await.unwrap().0;
    a.renew(id, Some(mark)).await.unwrap();
    for _ in 0..20 {
        // What changes meanwhile moves the floors of directories without readers on.
        let mut plan = Plan::new();
        plan.put(key::counter("test"), Vec::new());
        store.commit(plan).await.unwrap();
        pass(1).await;
        assert!(unread(&store).await <= mark);
    }
    let one_more = a.open(30_000).await;
    b.renew(one_more, Some(mark - 1)).await.unwrap();
    assert!(unread(&store).await < mark, "it is confirmed once others know");
    b.renew(one_more, Some(0)).await.unwrap();
    until("it reads nothing any more", || async { unread(&store).await == mark }).await;
    b.renew(id, Some(mark)).await.unwrap();
    assert_eq!(record(&store, id).await.unwrap().home, b.id());
    pass(5).await;
    assert_eq!(unread(&store).await, mark, "at its new home");
    a.renew(id, None).await.unwrap();
    assert_eq!(unread(&store).await, 0, "it did not tell what it reads");
    a.renew(id, Some(mark)).await.unwrap();
    until("it told", || async { unread(&store).await == mark }).await;
    a.kill();
    let died = Instant::now();
    while died.elapsed() < Duration::from_secs(25) {
        assert!(unread(&store).await <= mark);
        pass(1).await;
    }
    assert_eq!(record(&store, id).await.unwrap().home, b.id());
    assert_eq!(unread(&store).await, 0, "its new home does not know");
    b.renew(id, Some(0)).await.unwrap();
    until("nothing is read", || async { unread(&store).await > mark }).await;
}

#[tokio::test(start_paused = true)]
async fn a_session_that_another_directory_ended_is_forgotten_by_its_home() {
    let store = MemoryStore::new();
    let (a, b) = (One::join(&store).await, One::join(&store).await);
    let held = ops::lock::lock(&a.directory, exclusive("/f", 0)).await.unwrap();
    let closed = a.open(3_000).await;
    let unlock = v1::UnlockRequest { path: "/f".into(), token: held.token, ..Default::default() };
    ops::lock::unlock(&b.directory, unlock).await.unwrap();
    session::close(&b.directory, v1::CloseRequest { session_id: closed.0 }).await.unwrap();
    for id in [SessionId(held.session_id), closed] {
        assert!(!lives(&store, id).await);
        until("its home knows", || async {
            let renewed = a.renew(id, None).await;
            renewed.is_err_and(|error| error.reason == Reason::SessionExpired)
        })
        .await;
        until("nothing is left of it", || async { record(&store, id).await.is_none() }).await;
    }
    until("nothing is left to tell", || async {
        let notices = crate::store::KeyRange::prefix(key::notices(a.id()));
        store.scan(notices, 1, None).await.unwrap().1.entries.is_empty()
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_session_without_a_home_is_taken_in() {
    let store = MemoryStore::new();
    let (living, ended) = (SessionId(77), SessionId(78));
    let mut plan = Plan::new();
    plan.put(key::session(living), Session { ttl_ms: 3_000, ..Session::default() }.to_bytes());
    let gone = Session { ttl_ms: 3_000, ended: true, home: 9, ..Session::default() };
    plan.put(key::session(ended), gone.to_bytes());
    store.commit(plan).await.unwrap();
    let began = Instant::now();
    let a = One::join(&store).await;
    assert!(!a.directory.membership.as_ref().unwrap().knows_readers());
    until("it has a home", || async {
        record(&store, living).await.is_none_or(|session| session.home == a.id())
    })
    .await;
    assert!(lives(&store, living).await);
    until("it knows of all", || async { a.directory.membership.as_ref().unwrap().knows_readers() }).await;
    assert_eq!(unread(&store).await, 0, "it may read anything");
    until("both end", || async {
        record(&store, living).await.is_none() && record(&store, ended).await.is_none()
    })
    .await;
    assert!(began.elapsed() >= Duration::from_secs(6), "a TTL, and one more for its answers");
}

/// Found by a collector that stood still: whoever leads waited for a floor that no session asked for.
#[tokio::test(start_paused = true)]
async fn sessions_that_have_ended_are_taken_in_without_a_wait() {
    let store = MemoryStore::new();
    let ended = SessionId(78);
    let mut plan = Plan::new();
    let gone = Session { ttl_ms: 3_000, ended: true, home: 9, ..Session::default() };
    plan.put(key::session(ended), gone.to_bytes());
    store.commit(plan).await.unwrap();
    let began = Instant::now();
    let a = One::join(&store).await;
    until("it knows of all", || async { a.directory.membership.as_ref().unwrap().knows_readers() }).await;
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    until("it is forgotten", || async { record(&store, ended).await.is_none() }).await;
}

#[tokio::test(start_paused = true)]
async fn what_a_leader_decides_ends_with_its_lead() {
    let store = MemoryStore::new();
    let (mut a, mut b) = (One::join(&store).await, One::join(&store).await);
    let first_is_a = std::ptr::eq(leading(&[&a, &b]).await, &a);
    let (first, second) = if first_is_a { (&mut a, &mut b) } else { (&mut b, &mut a) };
    let settings = |one: &One| {
        let settings = one.directory.cluster.state.lock().settings.clone();
        Change { settings: Some(settings), led: true, ..Change::default() }
    };
    first.directory.cluster.apply(settings(first)).await.unwrap();
    assert!(second.directory.cluster.apply(settings(second)).await.is_err());
    // Its plan is on its way when it falls silent, and arrives when another one leads.
    let mut late = Plan::new();
    first.directory.membership.as_ref().unwrap().require_lead(&mut late).unwrap();
    late.put(key::counter("late"), Vec::new());
    first.fall_silent();
    until("the other one leads", || async { second.leads() }).await;
    assert!(store.commit(late).await.is_err());
    assert!(first.directory.cluster.apply(settings(first)).await.is_err());
    second.directory.cluster.apply(settings(second)).await.unwrap();
    first.beat();
    pass(20).await;
    assert!(second.leads() && !first.leads());
}

#[tokio::test(start_paused = true)]
async fn one_that_leaves_is_missed_at_once() {
    let store = MemoryStore::new();
    let (mut a, b) = (One::join(&store).await, One::join(&store).await);
    until("a leads", || async { a.leads() || b.leads() }).await;
    let id = a.open(10_000).await;
    a.fall_silent();
    a.directory.membership.as_ref().unwrap().leave().await.unwrap();
    assert_eq!(a.renew(id, None).await.unwrap_err().reason, Reason::Unavailable);
    let left = Instant::now();
    until("the other one leads and has its session", || async {
        b.leads() && record(&store, id).await.unwrap().home == b.id()
    })
    .await;
    assert!(left.elapsed() <= Duration::from_secs(3), "{:?}", left.elapsed());
}

#[tokio::test(start_paused = true)]
async fn each_knows_what_another_registered_or_made() {
    let store = MemoryStore::new();
    let (a, b) = (One::join(&store).await, One::join(&store).await);
    until("they know each other", || async {
        [&a, &b].iter().all(|one| one.directory.cluster.directories().len() == 2)
    })
    .await;
    let request = |number: u64, server_id| v1::RegisterRequest {
        cluster_id: if server_id == 0 { String::new() } else { a.directory.cluster_id.clone() },
        server_id,
        disk_id: format!("disk-{number}"),
        incarnation: format!("life-{number}"),
        endpoints: vec![v1::Endpoint { uri: format!("http://127.0.0.1:{}", 7_500 + number), scope: 1 }],
        usage: Some(v1::Usage { total_bytes: 1 << 40, free_bytes: 1 << 40, ..Default::default() }),
        ..Default::default()
    };
    let mut ids = Vec::new();
    for number in 1..=3 {
        // A blank disk whose first answer was lost asks another one.
        let (first, second) = tokio::join!(
            a.directory.cluster.register(request(number, 0)),
            b.directory.cluster.register(request(number, 0))
        );
        let first = first.unwrap();
        assert_eq!(first.server_id, second.unwrap().server_id, "one disk is one server");
        assert!(!first.directories.is_empty());
        ids.push(first.server_id);
    }
    let session = a.open(10_000).await;
    let grant = v1::GrantRequest { session_id: session.0, ..Default::default() };
    let (here, there) = tokio::join!(
        ops::grant::grant(&a.directory, grant.clone()),
        ops::grant::grant(&b.directory, grant.clone())
    );
    for granted in [here, there] {
        let group = granted.unwrap().grant.unwrap().group.unwrap();
        until("both know the group", || async {
            [&a, &b]
                .iter()
                .all(|one| one.directory.cluster.group(cairn_proto::id::GroupId(group.id)).is_some())
        })
        .await;
    }
    let topology = |one: &One| one.directory.cluster.topology(0);
    until("they show the same", || async { topology(&a).revision == topology(&b).revision }).await;
    assert_eq!(topology(&a).groups, topology(&b).groups);
    let shown = topology(&a).servers.iter().map(|server| server.id).collect::<Vec<_>>();
    ids.sort_unstable();
    assert_eq!(shown, ids);
}
