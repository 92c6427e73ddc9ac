//! Everything breaks, in every way that this machine can make, under load, and nothing acknowledged is lost.
//!
//! Real processes, each on a network and a disk of its own (as root; elsewhere the faults that need that are left out,
//! loudly). Clients keep a record of what they were told; beside them histories of concurrent clients are made and
//! checked. The schedule of faults depends on the seed alone.
//!
//! `CAIRN_NEMESIS_SECONDS` (default 60) says how long faults are made; each kind is made at least once in any case.
//! `CAIRN_SEED` repeats a schedule.

use cairn_tests::{
    amount,
    copies::Copies,
    damage::{self, Part},
    ground::Ground,
    histories::{self, Outcome},
    load::Load,
    network::Cut,
    seed,
    services::Services,
};
use client_lib::Client;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::SliceRandom as _};
use std::{
    collections::BTreeMap,
    fs,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};
use tokio::{
    sync::{Mutex, watch},
    task::JoinHandle,
};

const WORKERS: usize = 8;
const FILE_SERVERS: usize = 4;
/// A disk as large as its owner ever needs: it is filled up by a fault, not by the load.
const DISK_BYTES: u64 = 8 << 30;
/// Times that are shorter than the defaults, so that hours of a cluster's life go by in minutes: a death, the end of a
/// grace time, a comparison of all copies.
const TIMES: [&str; 6] = ["--dead-ms", "10000", "--grace-ms", "4000", "--compare-ms", "3000"];
/// Acknowledged operations a second before the first fault, without which a run shows nothing. A debug build on a
/// machine that does other things is slow: the best of some attempts counts, and less is asked.
const RATE_MIN: f64 = if cfg!(debug_assertions) { 10.0 } else { 100.0 };
/// Longest that the load may need to go on after a fault: starts, ends of leases, all in a debug build.
const RECOVERY_LIMIT: Duration = Duration::from_secs(120);
const HEALTHY_LIMIT: Duration = Duration::from_secs(180);
/// Everything is compared after so many faults.
const FAULTS_A_ROUND: usize = 8;
/// Bits that are flipped at a time.
const FLIPS: usize = 24;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    /// SIGKILL to every process at the same moment.
    KillAll,
    KillFileServer,
    /// SIGKILL to two file servers: some groups have fewer members than a write needs.
    KillTwo,
    KillDirectory,
    /// SIGSTOP, and SIGCONT later.
    PauseFileServer,
    PauseTwo,
    PauseDirectory,
    /// A file server's cable is pulled.
    CutFileServer,
    /// It is heard, and hears nothing.
    CutIncoming,
    /// It hears, and is not heard.
    CutOutgoing,
    /// Two file servers do not see each other; all others see both.
    CutPair,
    /// Nobody sees the directory.
    CutDirectory,
    /// The directory sees no file server; clients see all.
    CutDirectoryFromFileServers,
    /// Clients do not see one file server; all others do.
    CutClients,
    DiskFull,
    DirectoryDiskFull,
    /// Bits flip in chunks and the index of one file server.
    Damage,
    /// The directory's store is gone.
    LoseDirectory,
    /// A new file server.
    Join,
    /// A file server is emptied and switched off, a new one takes its place.
    Drain,
}

use Fault::*;

const ANYWHERE: [Fault; 11] = [
    KillAll,
    KillFileServer,
    KillTwo,
    KillDirectory,
    PauseFileServer,
    PauseTwo,
    PauseDirectory,
    Damage,
    LoseDirectory,
    Join,
    Drain,
];
/// These need root.
const APART: [Fault; 9] = [
    CutFileServer,
    CutIncoming,
    CutOutgoing,
    CutPair,
    CutDirectory,
    CutDirectoryFromFileServers,
    CutClients,
    DiskFull,
    DirectoryDiskFull,
];

/// What is going to happen: of the seed alone.
struct Schedule {
    dice: StdRng,
    kinds: Vec<Fault>,
    /// What is left of the shuffled kinds: each comes once before any comes again.
    left: Vec<Fault>,
}

#[derive(Clone, Copy, Debug)]
struct Step {
    fault: Fault,
    /// Load before it.
    before: Duration,
    /// How long it lasts, where it lasts.
    held: Duration,
    /// Chooses victims and places.
    dice: u64,
}

impl Schedule {
    fn next(&mut self) -> Step {
        if self.left.is_empty() {
            self.left.clone_from(&self.kinds);
            self.left.shuffle(&mut self.dice);
        }
        let fault = self.left.pop().unwrap();
        // Mostly shorter than a suspicion, now and then longer than a death.
        let held = match self.dice.random_range(0..20) {
            0 => self.dice.random_range(10_500..13_000),
            1..=5 => self.dice.random_range(3_000..6_000),
            _ => self.dice.random_range(0..1_500),
        };
        let before = Duration::from_millis(self.dice.random_range(50..800));
        Step { fault, before, held: Duration::from_millis(held), dice: self.dice.random() }
    }
}

/// Histories, one after the other, until told to end.
struct Histories {
    end: watch::Sender<bool>,
    /// Held while a history is made.
    making: Arc<Mutex<()>>,
    maker: JoinHandle<Result<Outcome, String>>,
}

impl Histories {
    fn start(directory_uri: &str, seed: u64) -> Self {
        let (end, ended) = watch::channel(false);
        let directory_uri = directory_uri.to_owned();
        let making = Arc::new(Mutex::new(()));
        let each = making.clone();
        let maker = tokio::spawn(async move {
            let mut clients = Vec::new();
            for _ in 0..histories::CLIENTS {
                clients.push(Client::connect(&[&directory_uri]).await.map_err(|error| error.to_string())?);
            }
            let mut outcome = Outcome::default();
            let mut number = 0u64;
            while !*ended.borrow() {
                let _making = each.lock().await;
                let made =
                    histories::history(&clients, &format!("/history-{number}"), seed ^ (number << 16)).await;
                outcome.add(&made.map_err(|why| format!("seed {seed}, history {number}: {why}"))?);
                number += 1;
            }
            Ok(outcome)
        });
        Self { end, making, maker }
    }

    async fn end(self) -> Outcome {
        // One that has ended already has an error to show.
        let _ = self.end.send(true);
        self.maker.await.unwrap().unwrap()
    }
}

struct Nemesis {
    services: Services,
    load: Load,
    /// See [`Histories::making`].
    making_history: Arc<Mutex<()>>,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn nothing_acknowledged_is_lost_whatever_breaks() {
    let seed = seed("CAIRN_SEED");
    let length = Duration::from_secs(amount("CAIRN_NEMESIS_SECONDS", 60));
    let mut kinds = ANYWHERE.to_vec();
    let ground = match Ground::apart(DISK_BYTES) {
        Ok(ground) => {
            kinds.extend(APART);
            ground
        }
        Err(why) => {
            println!("!!! SKIPPED: no cut cables and no full disks: {why}");
            Ground::default()
        }
    };
    let mut services = Services::prepare_on(ground, FILE_SERVERS, &TIMES);
    services.start_all();
    services.ready().await;
    let load = Load::start(services.directory_uri(), WORKERS, seed).await;
    let rate = load.baseline(RATE_MIN).await;
    println!("before the first fault: {rate:.0} acknowledged operations a second");
    assert!(rate >= RATE_MIN, "{rate:.0} operations a second are too few to show anything");

    let histories = Histories::start(services.directory_uri(), seed);
    let mut nemesis = Nemesis { services, load, making_history: histories.making.clone() };
    let mut schedule = Schedule { dice: StdRng::seed_from_u64(seed), left: Vec::new(), kinds: kinds.clone() };
    let mut fired: BTreeMap<Fault, u32> = BTreeMap::new();
    let (mut faults, mut compared) = (0usize, 0);
    let began = Instant::now();
    while began.elapsed() < length || fired.len() < kinds.len() {
        let step = schedule.next();
        tokio::time::sleep(step.before).await;
        let acknowledged = nemesis.load.acknowledged();
        println!("{:7.1} s, {acknowledged} acknowledged: {step:?}", began.elapsed().as_secs_f64());
        nemesis.make(step).await;
        nemesis.services.ready().await;
        nemesis.load.progress(WORKERS as u64, RECOVERY_LIMIT).await;
        *fired.entry(step.fault).or_default() += 1;
        faults += 1;
        if faults.is_multiple_of(FAULTS_A_ROUND) {
            compared += nemesis.compare(&format!("seed {seed}, after {faults} faults")).await;
        }
    }
    let outcome = histories.end().await;
    let lasted = began.elapsed();
    // Once more, from a cold start, with nothing under way.
    nemesis.services.kill_all();
    nemesis.services.start_all();
    nemesis.services.ready().await;
    compared += nemesis.compare(&format!("seed {seed}, at the end")).await;
    nemesis.services.healthy(HEALTHY_LIMIT).await;

    let acknowledged = nemesis.load.acknowledged();
    let unknown = nemesis.load.tally.unknown.load(Ordering::Relaxed);
    println!(
        "{acknowledged} operations acknowledged, {unknown} of unknown outcome, 0 lost; {faults} faults in {:.0} s; \
         {compared} names compared; histories: {outcome:?}; {}",
        lasted.as_secs_f64(),
        nemesis.services.memory_peaks().0
    );
    println!("{fired:?}");
    for reason in nemesis.load.tally.unknown_reasons() {
        println!("unknown: {reason}");
    }
    assert!(acknowledged * 4 > (acknowledged + unknown) * 3, "too many operations of unknown outcome");
    assert!(outcome.linearizable > 0, "no history could be checked: {outcome:?}");
}

impl Nemesis {
    async fn compare(&self, when: &str) -> usize {
        let (problems, names) = self.load.verify(self.services.directory_uri()).await;
        assert!(problems.is_empty(), "{when}:\n{}", problems.join("\n"));
        names
    }

    async fn make(&mut self, step: Step) {
        let mut dice = StdRng::seed_from_u64(step.dice);
        let count = self.services.files.len();
        let mut order: Vec<usize> = (0..count).collect();
        order.shuffle(&mut dice);
        let victim = order[0];
        match step.fault {
            KillAll => {
                self.services.kill_all();
                self.hold(step).await;
            }
            KillFileServer => {
                self.services.files[victim].kill9();
                self.hold(step).await;
            }
            KillTwo => {
                for victim in &order[..2] {
                    self.services.files[*victim].kill9();
                }
                self.hold(step).await;
            }
            KillDirectory => {
                self.services.directory.kill9();
                self.hold(step).await;
            }
            PauseFileServer => self.pause(&order[..1], step).await,
            PauseTwo => self.pause(&order[..2], step).await,
            PauseDirectory => {
                self.services.directory.pause();
                self.hold(step).await;
                self.services.directory.resume();
            }
            CutFileServer => self.cut(&self.name(victim), &self.others(victim, true), Cut::Both, step).await,
            CutIncoming => {
                self.cut(&self.name(victim), &self.others(victim, true), Cut::Incoming, step).await
            }
            CutOutgoing => {
                self.cut(&self.name(victim), &self.others(victim, true), Cut::Outgoing, step).await
            }
            CutPair => {
                self.cut(&self.name(victim), &[self.address(&self.name(order[1]))], Cut::Both, step).await
            }
            CutDirectory => self.cut("directory", &self.others(count, true), Cut::Both, step).await,
            CutDirectoryFromFileServers => {
                self.cut("directory", &self.others(count, false), Cut::Both, step).await;
            }
            CutClients => self.cut(&self.name(victim), &[self.clients()], Cut::Both, step).await,
            DiskFull => self.fill(&self.name(victim), step).await,
            DirectoryDiskFull => self.fill("directory", step).await,
            Damage => self.damage(victim, &mut dice).await,
            LoseDirectory => self.lose_directory().await,
            Join => self.join().await,
            Drain => self.drain(victim).await,
        }
        self.services.start_all();
    }

    async fn hold(&self, step: Step) {
        tokio::time::sleep(step.held).await;
    }

    async fn pause(&self, victims: &[usize], step: Step) {
        for victim in victims {
            self.services.files[*victim].pause();
        }
        self.hold(step).await;
        for victim in victims {
            self.services.files[*victim].resume();
        }
    }

    fn name(&self, i: usize) -> String {
        self.services.files[i].name.clone()
    }

    fn address(&self, name: &str) -> String {
        let ground = self.services.ground();
        ground.network().unwrap().address(ground.host(name))
    }

    fn clients(&self) -> String {
        self.services.ground().network().unwrap().own_address()
    }

    /// The addresses of everybody but one file server and the directory's own; `all`: also clients'.
    fn others(&self, i: usize, all: bool) -> Vec<String> {
        let names = (0..self.services.files.len()).filter(|other| *other != i).map(|other| self.name(other));
        let mut addresses: Vec<String> = names.map(|name| self.address(&name)).collect();
        if i < self.services.files.len() {
            addresses.push(self.address("directory"));
        }
        if all {
            addresses.push(self.clients());
        }
        addresses
    }

    async fn cut(&self, name: &str, peers: &[String], cut: Cut, step: Step) {
        let ground = self.services.ground();
        let (network, host) = (ground.network().unwrap(), ground.host(name));
        network.cut(host, peers, cut);
        self.hold(step).await;
        network.mend(host);
    }

    async fn fill(&self, name: &str, step: Step) {
        let disk = self.services.ground().disk(name).unwrap();
        disk.fill();
        self.hold(step).await;
        disk.empty();
    }

    /// Nothing is under way, and every chunk has all its copies: then rot in one of them may cost nothing at all.
    async fn damage(&mut self, victim: usize, dice: &mut StdRng) {
        {
            let (services, load) = (&mut self.services, &self.load);
            let _quiet = load.pause().await;
            services.healthy(HEALTHY_LIMIT).await;
            // Half of the time the server notices by itself when it starts and reads all, half of the time when asked.
            let at_rest = dice.random_bool(0.5);
            if at_rest {
                services.files[victim].kill9();
            }
            let data = services.data(&services.files[victim].name);
            let regions = damage::survey(&data);
            let parts = [Part::SmallData, Part::SmallTable, Part::LargeData, Part::LargeTable];
            let at_rest_parts = [Part::SmallHeader, Part::RecordHeader, Part::LargeHeader, Part::Index];
            let mut flips = Vec::new();
            for number in 0..FLIPS {
                let part = match at_rest && number % 2 == 1 {
                    true => at_rest_parts[dice.random_range(0..at_rest_parts.len())],
                    false => parts[dice.random_range(0..parts.len())],
                };
                if let Some((region, at)) = damage::choose(&regions, part, &flips, dice) {
                    flips.push(damage::flip(region, at, dice.random_range(0..8)));
                }
            }
            println!("          {} bits flipped", flips.len());
            if at_rest {
                let _ = fs::remove_file(data.join("chunks/index"));
                services.start_all();
            }
        }
        self.services.ready().await;
        self.load.progress(WORKERS as u64, RECOVERY_LIMIT).await;
        // No other fault before it is healed: a second one on another server could take the only good copies.
        let copies = Copies::at(self.services.file_uri(victim));
        let (mut noticed, mut bad) = (None, 0);
        let deadline = Instant::now() + HEALTHY_LIMIT;
        while noticed.is_none() {
            match copies.census().await {
                Ok(census) => {
                    assert!(census.wrong.is_empty(), "wrong bytes were given: {:?}", census.wrong);
                    (noticed, bad) = (Some(Instant::now()), census.bad.len());
                }
                Err(why) => {
                    assert!(Instant::now() < deadline, "no inventory within {HEALTHY_LIMIT:?}: {why}")
                }
            }
        }
        println!("          {bad} bad copies were found by reading all");
        let _quiet = self.load.pause().await;
        self.services.compared_since(victim, noticed.unwrap(), HEALTHY_LIMIT).await;
        self.services.healthy(HEALTHY_LIMIT).await;
    }

    /// The promise: what was acknowledged is there again once the journal's carriers had it, for which a second is
    /// allowed. So it is waited for.
    async fn lose_directory(&mut self) {
        // A rebuilt directory may lack what was acknowledged a moment before its store was lost (REBUILT): nothing is.
        let _between_histories = self.making_history.lock().await;
        let _quiet = self.load.pause().await;
        self.services.lose_directory(RECOVERY_LIMIT).await;
    }

    async fn join(&mut self) {
        self.services.add_file_server();
        self.services.start_all();
        self.services.ready().await;
        // There is an end to how many processes this machine can run.
        if self.services.files.len() > FILE_SERVERS + 1 {
            self.drain_away(0).await;
        }
    }

    async fn drain(&mut self, victim: usize) {
        self.services.add_file_server();
        self.services.start_all();
        self.services.ready().await;
        self.drain_away(victim).await;
    }

    async fn drain_away(&mut self, victim: usize) {
        self.services.drain(victim, HEALTHY_LIMIT).await;
        self.services.remove_file_server(victim);
    }
}
