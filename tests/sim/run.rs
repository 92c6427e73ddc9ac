//! One run: a world from a seed, faults under load, then peace, and proof that nothing was lost.

use crate::{
    checkers, nature,
    nemesis::{Nemesis, Wish},
    network::{self, HostId},
    workload::{Shared, Team},
    world::{Death, Service, World},
};
use cairn_proto::v1::ServerState;
use client_lib::{Client, ClientBuilder, ServerId, StatusResponse};
use futures::FutureExt as _;
use rand::Rng as _;
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    time::Duration,
};

/// Longest simulated time from the end of all faults to a healthy cluster.
const HEAL_MS: u64 = 120_000;
/// Longest simulated time of one question in the end.
const ANSWER_MS: u64 = 60_000;

/// Longest simulated time of the proof, in which sessions of dead clients end.
const VERIFY_MS: u64 = 120_000;

/// Every copy is read once in this time.
const SCRUB_MS: u64 = 4_000;
/// What a lost store may take with it: the lag that the journal's copies may have, and the look that measures it.
const LAG_MS: u64 = 1_100;

/// Lives of sessions, one for each run. What a dead client held is free when its session has ended, and what a reader may
/// still open is kept until then.
const SESSION_TTLS_MS: [u64; 4] = [1_000, 3_000, 3_000, 30_000];

/// Most tasks of one host: a few for each connection, session and request.
const TASKS_MAX: usize = 2_000;
/// Most connections of a whole run.
const CONNECTIONS_MAX: usize = 1_000;

/// What a run was like.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Hash of all that happened.
    pub hash: u64,
    /// Simulated time.
    pub simulated_ms: u64,
    /// Operations that were acknowledged.
    pub acknowledged: u64,
    /// Operations that failed, by reason.
    pub failed: BTreeMap<String, u64>,
    /// Faults, by kind.
    pub faults: BTreeMap<String, u64>,
    /// Histories that were found linearizable.
    pub histories: u64,
    /// Losses of the directory's store.
    pub rebuilds: u64,
    /// Acknowledged operations that they undid, all within the allowed time.
    pub undone: u64,
    /// Most tasks of a host, and most connections at a time.
    pub most: (usize, usize),
    /// From the end of all faults to a healthy cluster.
    pub healed_ms: u64,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "hash={:016x} simulated_ms={} acknowledged={} histories={} rebuilds={} undone={} healed_ms={} most={:?} failed={:?} \
             faults={:?}",
            self.hash,
            self.simulated_ms,
            self.acknowledged,
            self.histories,
            self.rebuilds,
            self.undone,
            self.healed_ms,
            self.most,
            self.failed,
            self.faults
        )
    }
}

/// Runs a seed on this thread, which must be fresh.
///
/// # Errors
/// Every broken promise, in words.
pub fn run(seed: u64) -> Result<Outcome, String> {
    nature::begin(seed);
    Run::new(seed).all()
}

struct Run {
    world: World,
    directory: HostId,
    files: Vec<HostId>,
    clients: Vec<HostId>,
    observer: HostId,
    session_ttl: Duration,
    shared: Shared,
    team: Team,
    nemesis: Option<Nemesis>,
    figures: Figures,
}

/// What was checked.
#[derive(Clone, Copy, Debug, Default)]
struct Figures {
    rebuilds: u64,
    undone: u64,
    tasks_max: usize,
    connections_max: usize,
}

impl Run {
    fn new(seed: u64) -> Self {
        let mut world = World::new(seed);
        // In half of the runs seats also move for evenness, however little there is.
        let balances = world.dice.random_bool(0.5);
        let session_ttl =
            Duration::from_millis(SESSION_TTLS_MS[world.dice.random_range(0..SESSION_TTLS_MS.len())]);
        let directory =
            world.add_host("directory", |uri| Service::Directory(directory_config(uri, balances)));
        let directory_uri = world.hosts[directory].uri.clone();
        let count = world.dice.random_range(3..=5);
        let files = (1..=count)
            .map(|number| {
                world.add_host(&format!("file-{number}"), |uri| {
                    Service::File(file_config(uri, &directory_uri))
                })
            })
            .collect();
        let clients: Vec<_> =
            (1..=3).map(|number| world.add_host(&format!("client-{number}"), |_| Service::Clients)).collect();
        let observer = world.add_host("observer", |_| Service::Clients);
        let shared = Shared::new();
        let team = Team::new(clients.clone(), shared.clone());
        let figures = Figures::default();
        Self { world, directory, files, clients, observer, session_ttl, shared, team, nemesis: None, figures }
    }

    fn all(mut self) -> Result<Outcome, String> {
        for id in 0..self.world.hosts.len() {
            self.world.start(id);
        }
        self.wait_healthy(30_000).map_err(|why| format!("never began: {why}"))?;
        let team = self.team.clone();
        self.observe(ANSWER_MS, |client| team.prepare(client))?.map_err(|error| error.to_string())?;
        for host in self.clients.clone() {
            self.employ(host)?;
        }

        let began_ms = self.world.now_ms();
        let nemesis = Nemesis::new(&mut self.world, self.directory, self.files.clone(), self.clients.clone());
        self.nemesis = Some(nemesis);
        let length_ms = self.world.dice.random_range(5_000..18_000);
        while self.world.now_ms() < began_ms + length_ms {
            self.break_something()?;
            self.step()?;
        }

        self.mend()?;
        let ended_ms = self.world.now_ms();
        // Work goes on for a while: healing happens under load.
        while self.world.now_ms() < ended_ms + 2_000 {
            self.step()?;
        }
        self.rest()?;
        self.wait_healthy(HEAL_MS)?;
        let healed_ms = self.world.now_ms() - ended_ms;
        if self.nemesis.as_ref().is_some_and(Nemesis::has_rotted) {
            // Rot that nobody has read is found when every copy was read again, and mended then.
            let scrubbed_ms = self.world.now_ms() + 2 * SCRUB_MS;
            while self.world.now_ms() < scrubbed_ms {
                self.step()?;
            }
            self.wait_healthy(HEAL_MS)?;
        }
        let team = self.team.clone();
        let (histories, _) = self.observe(VERIFY_MS, |client| team.verify(client))??;
        let connector = self.world.connector(self.observer);
        self.observe(ANSWER_MS, |client| checkers::copies::differences(client, connector))??;
        let problems = self.shared.violations();
        if !problems.is_empty() {
            return Err(problems.join("\n"));
        }
        Ok(Outcome {
            hash: self.world.trace.hash(),
            simulated_ms: self.world.now_ms(),
            acknowledged: self.shared.count(),
            failed: self.shared.failures(),
            faults: self.nemesis.map(|nemesis| nemesis.fired).unwrap_or_default(),
            histories,
            rebuilds: self.figures.rebuilds,
            undone: self.figures.undone,
            most: (self.figures.tasks_max, self.figures.connections_max),
            healed_ms,
        })
    }

    fn employ(&mut self, host: HostId) -> Result<(), String> {
        let client = self.client(host).build().map_err(|error| error.to_string())?;
        self.team.clone().employ(&mut self.world, host, &client);
        Ok(())
    }

    fn step(&mut self) -> Result<(), String> {
        self.world.step();
        if self.world.now_ms().is_multiple_of(500) {
            self.bounded()?;
        }
        if let Some(nemesis) = &mut self.nemesis {
            nemesis.power(&mut self.world);
        }
        for id in [self.directory].into_iter().chain(self.files.clone()) {
            if let Some(why) = self.world.ended(id) {
                let expected = self.nemesis.as_mut().is_some_and(|it| it.ended(&mut self.world, id));
                if !expected {
                    let (now_ms, name) = (self.world.now_ms(), &self.world.hosts[id].name);
                    return Err(format!("at {now_ms} ms {name} ended: {why}"));
                }
            }
        }
        match self.shared.violations().first() {
            Some(first) => Err(first.clone()),
            None => Ok(()),
        }
    }

    /// Nothing grows without end: tasks of a host, connections, bytes under way.
    fn bounded(&mut self) -> Result<(), String> {
        for id in 0..self.world.hosts.len() {
            let tasks = self.world.tasks(id);
            self.figures.tasks_max = self.figures.tasks_max.max(tasks);
            if tasks > TASKS_MAX {
                return Err(format!("{} has {tasks} tasks", self.world.hosts[id].name));
            }
        }
        let (connections, bytes) = self.world.network.load();
        self.figures.connections_max = self.figures.connections_max.max(connections);
        if connections > CONNECTIONS_MAX || bytes > connections * network::BUFFER_BYTES {
            return Err(format!("{connections} connections with {bytes} bytes"));
        }
        Ok(())
    }

    fn break_something(&mut self) -> Result<(), String> {
        let Some(nemesis) = &mut self.nemesis else { return Ok(()) };
        let wishes = nemesis.act(&mut self.world);
        wishes.into_iter().try_for_each(|wish| self.grant(wish))
    }

    fn grant(&mut self, wish: Wish) -> Result<(), String> {
        match wish {
            Wish::ClientsBack(host) => self.employ(host),
            Wish::Join => {
                let directory_uri = self.world.hosts[self.directory].uri.clone();
                let name = format!("file-{}", self.files.len() + 1);
                let host = self.world.add_host(&name, |uri| Service::File(file_config(uri, &directory_uri)));
                self.world.start(host);
                self.files.push(host);
                if let Some(nemesis) = &mut self.nemesis {
                    nemesis.files.push(host);
                }
                Ok(())
            }
            Wish::Drain(host, begin) => {
                let uri = self.world.hosts[host].uri.clone();
                let client = self.client(self.observer).build().map_err(|error| error.to_string())?;
                // Whether it can be done now shows in the end.
                self.world.spawn(self.observer, async move { drain(&client, &uri, begin).await });
                Ok(())
            }
            Wish::LoseStore => self.lose_store(),
        }
    }

    /// Mends everything that is broken.
    fn mend(&mut self) -> Result<(), String> {
        let Some(nemesis) = &mut self.nemesis else { return Ok(()) };
        let wishes = nemesis.end(&mut self.world);
        wishes.into_iter().try_for_each(|wish| self.grant(wish))
    }

    /// Has everybody stop, each after what it does.
    fn rest(&mut self) -> Result<(), String> {
        self.shared.set_working(false);
        let until = self.world.now_ms() + ANSWER_MS;
        while self.shared.under_way() > 0 {
            self.step()?;
            if self.world.now_ms() > until {
                return Err(format!("{} operations never ended", self.shared.under_way()));
            }
        }
        Ok(())
    }

    /// The directory's disk is lost under load, a while after everything was well.
    fn lose_store(&mut self) -> Result<(), String> {
        self.mend()?;
        self.wait_healthy(HEAL_MS)?;
        let rest_ms = self.world.now_ms() + self.world.dice.random_range(500..2_000);
        while self.world.now_ms() < rest_ms {
            self.step()?;
        }
        let lost_ms = self.world.now_ms();
        self.shared.set_void(true);
        self.shared.set_working(false);
        self.world.crash(self.directory, Death::Killed);
        self.world.replace_disk(self.directory);
        let back_ms = lost_ms + self.world.dice.random_range(1..3_000);
        while self.world.now_ms() < back_ms {
            self.step()?;
        }
        self.world.start(self.directory);
        self.rest()?;
        self.wait_healthy(HEAL_MS)
            .map_err(|why| format!("after the loss of the directory's store: {why}"))?;
        let (team, now_ms) = (self.team.clone(), self.world.now_ms());
        let certain_ms = lost_ms.saturating_sub(LAG_MS);
        let undone = self.observe(ANSWER_MS, move |client| team.rebuilt(client, certain_ms, now_ms))?;
        let undone = undone.map_err(|why| format!("the store was lost at {lost_ms} ms: {why}"))?;
        self.figures.rebuilds += 1;
        self.figures.undone += undone;
        self.shared.set_void(false);
        self.shared.set_working(true);
        Ok(())
    }

    /// Asks something from a host, and lets time pass until it is answered.
    fn ask<F, T>(&mut self, host: HostId, limit_ms: u64, future: F) -> Result<T, String>
    where
        F: Future<Output = T> + Send + 'static,
        T: Send + 'static,
    {
        let until = self.world.now_ms() + limit_ms;
        let mut asked = self.world.spawn(host, future);
        loop {
            self.step()?;
            if asked.is_finished() {
                return match (&mut asked).now_or_never() {
                    Some(Ok(answer)) => Ok(answer),
                    Some(Err(error)) => Err(format!("a checker failed: {error}")),
                    None => Err("a task that is finished has no result".to_owned()),
                };
            }
            if self.world.now_ms() > until {
                return Err(format!("no answer within {limit_ms} ms of simulated time"));
            }
        }
    }

    fn client(&mut self, host: HostId) -> ClientBuilder {
        Client::builder()
            .directory(self.world.hosts[self.directory].uri.clone())
            .network(self.world.connector(host))
            .owner(self.world.hosts[host].name.clone())
            .session_ttl(self.session_ttl)
            .chunk_bytes(16 << 10)
            .deadline(Duration::from_millis(8_000))
            .seed(self.world.dice.random())
    }

    fn observe<T, F, Fut>(&mut self, limit_ms: u64, question: F) -> Result<T, String>
    where
        F: FnOnce(Client) -> Fut,
        Fut: Future<Output = T> + Send + 'static,
        T: Send + 'static,
    {
        let client = self.client(self.observer).deadline(Duration::from_secs(30)).build();
        let client = client.map_err(|error| error.to_string())?;
        let answer = question(client.clone());
        self.ask(self.observer, limit_ms, async move {
            let answer = answer.await;
            client.close().await.ok();
            answer
        })
    }

    fn wait_healthy(&mut self, limit_ms: u64) -> Result<StatusResponse, String> {
        let servers = self.files.len();
        let found = self.observe(limit_ms + 1_000, move |client| async move {
            let until = tokio::time::Instant::now() + Duration::from_millis(limit_ms);
            loop {
                let why = match client.status().await {
                    Ok(status) => match unhealthy(&status, servers) {
                        None => return Ok(status),
                        Some(why) => {
                            take_back(&client, &status).await;
                            why
                        }
                    },
                    Err(error) => error.to_string(),
                };
                if tokio::time::Instant::now() > until {
                    return Err(format!("not healthy after {limit_ms} ms without faults: {why}"));
                }
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        });
        found?
    }
}

/// Takes back every drain that was left.
async fn take_back(client: &Client, status: &StatusResponse) {
    for server in status.file_servers.iter().filter_map(|it| it.server.as_ref()) {
        if server.state() == ServerState::Draining {
            client.drain(ServerId(server.id), true).await.ok();
        }
    }
}

/// Has a server drained, or no more.
async fn drain(client: &Client, uri: &str, begin: bool) {
    let status = client.status().await;
    let servers = status.iter().flat_map(|status| &status.file_servers).filter_map(|it| it.server.as_ref());
    let wanted = servers.filter(|server| server.endpoints.iter().any(|endpoint| endpoint.uri == uri));
    for server in wanted {
        if let Err(error) = client.drain(ServerId(server.id), !begin).await {
            tracing::info!(%error, uri, begin, "could not drain");
        }
    }
    client.close().await.ok();
}

/// Why a cluster is not healthy yet.
fn unhealthy(status: &StatusResponse, servers: usize) -> Option<String> {
    let directory = status.directory.clone().unwrap_or_default();
    if directory.mode != "serving" {
        return Some(format!("the directory is {}: {}", directory.mode, directory.reason));
    }
    // One that was drained to the end is gone for good, though it still runs.
    let there = status.file_servers.iter().filter_map(|it| it.server.as_ref());
    let there = there.filter(|server| matches!(server.state(), ServerState::Live | ServerState::Gone));
    let uris: BTreeSet<&str> =
        there.filter_map(|server| server.endpoints.first()).map(|endpoint| endpoint.uri.as_str()).collect();
    if uris.len() < servers {
        return Some(format!("{} of {servers} servers live", uris.len()));
    }
    let chunks = status.chunks.unwrap_or_default();
    if !status.verified {
        return Some("not verified".to_owned());
    }
    let is_healthy = chunks.under_replicated == 0 && chunks.lost == 0 && chunks.healthy == chunks.total;
    (!is_healthy).then(|| format!("{chunks:?}, {:?}, quarantined {:?}", status.repairs, status.quarantined))
}

/// Times short enough that everything happens within a run.
fn directory_config(uri: &str, balances: bool) -> dir_service::Config {
    let mut config = dir_service::Config { advertise: vec![uri.to_owned()], ..Default::default() };
    if balances {
        config.effort.balance_ignored_bytes = 0;
    }
    config.timing.dead_ms = 5_000;
    config.timing.grace_ms = 4_000;
    config.timing.compare_interval_ms = 2_000;
    config.timing.forming_wait_ms = 300;
    config
}

fn file_config(uri: &str, directory: &str) -> file_service::Config {
    let mut config = file_service::Config {
        directory: vec![directory.to_owned()],
        advertise: vec![uri.to_owned()],
        ..Default::default()
    };
    config.timing.scrub_period_ms = SCRUB_MS;
    config.timing.compact_interval_ms = 3_000;
    config
}
