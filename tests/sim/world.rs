//! The world of one run: hosts with a runtime, a clock and a disk each, driven in steps of a millisecond by one thread.
//!
//! ```text
//!                 start                 pause
//!   down  <------------------>  running ------> paused     (SIGSTOP: its clock goes on, nothing else does)
//!     ^   crash, power loss        ^               |
//!     |                            +---------------+ resume
//! ```
//!
//! A step delivers what the network has due, and then lets each running host, one after the other, run until its clock
//! shows the new time. A host's clock is tokio's paused one, so waiting costs nothing. A crash drops the host's whole
//! runtime with every task in it, as the end of a process does.

use crate::{
    nature,
    network::{HostId, Network},
    trace::Trace,
};
use cairn_proto::{Result, host::WallClock, net::Connect};
use disk::{CrashKeep, Disk, SimDisk};
use futures::FutureExt as _;
use rand::{Rng as _, RngCore as _, SeedableRng as _, rngs::SmallRng};
use std::{sync::Arc, time::Duration};
use tokio::{
    runtime::{Builder, Runtime},
    task::JoinHandle,
    time::Instant,
};
use tokio_util::sync::CancellationToken;

/// What a host runs.
#[derive(Clone, Debug)]
pub enum Service {
    /// The directory.
    Directory(dir_service::Config),
    /// A file server.
    File(file_service::Config),
    /// Whatever is spawned on it.
    Clients,
}

/// How a host ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Death {
    /// The process is killed: its connections break, its disk keeps all.
    Killed,
    /// The machine loses power: silence, and the disk keeps what was synced and perhaps some of the rest.
    PowerLost(CrashKeep),
}

/// A machine.
#[derive(Debug)]
pub struct Host {
    /// For messages.
    pub name: String,
    /// Where it listens.
    pub uri: String,
    /// What it runs.
    pub service: Service,
    /// Its disk.
    pub disk: SimDisk,
    running: Option<Running>,
    /// Clock rate against the world's, parts in a million.
    drift_ppm: i64,
}

#[derive(Debug)]
struct Running {
    runtime: Runtime,
    main: Option<JoinHandle<Result<()>>>,
    began_ms: u64,
    began: Instant,
    /// Milliseconds that its own clock has run.
    ran_ms: u64,
    is_paused: bool,
}

/// Everything.
#[derive(Debug)]
pub struct World {
    /// All chance comes from here.
    pub dice: SmallRng,
    /// Between the hosts.
    pub network: Network,
    /// What happened.
    pub trace: Trace,
    /// All hosts.
    pub hosts: Vec<Host>,
    now_ms: u64,
}

/// Stamps files with simulated time.
#[derive(Debug)]
struct SimClock;

impl WallClock for SimClock {
    fn unix_ns(&self) -> u64 {
        nature::unix_ns()
    }
}

/// Room of a disk until a nemesis takes it.
pub const DISK_BYTES: u64 = 1 << 40;

impl World {
    /// An empty one. Call [`nature::begin`] on this thread before.
    pub fn new(seed: u64) -> Self {
        let mut dice = SmallRng::seed_from_u64(seed);
        let trace = Trace::new();
        let network = Network::new(dice.next_u64(), trace.clone());
        Self { dice, network, trace, hosts: Vec::new(), now_ms: 0 }
    }

    /// Simulated time since the beginning.
    pub fn now_ms(&self) -> u64 {
        self.now_ms
    }

    /// Adds a host, not yet running.
    pub fn add_host(&mut self, name: &str, service: impl FnOnce(&str) -> Service) -> HostId {
        let authority = format!("{name}:7400");
        let id = self.network.add_host(&authority);
        let uri = format!("http://{authority}");
        let disk = SimDisk::new(self.dice.next_u64(), DISK_BYTES);
        disk.set_sync_latency(Duration::from_millis(self.dice.random_range(1..=4)));
        let drift_ppm = self.dice.random_range(-200..=200);
        let service = service(&uri);
        self.hosts.push(Host { name: name.to_owned(), uri, service, disk, running: None, drift_ppm });
        id
    }

    /// Starts a host that is down.
    pub fn start(&mut self, id: HostId) {
        assert!(self.hosts[id].running.is_none(), "{} runs already", self.hosts[id].name);
        self.network.power_on(id);
        let seed = self.dice.next_u64();
        let runtime = Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        let host = &self.hosts[id];
        let main = match &host.service {
            Service::Clients => None,
            service => {
                let incoming = self.network.listen(id);
                let surroundings = cairn_proto::host::Host {
                    network: self.network.connector(id),
                    clock: Arc::new(SimClock),
                    seed,
                };
                let disk: Arc<dyn Disk> = Arc::new(host.disk.clone());
                let never = CancellationToken::new();
                Some(match service.clone() {
                    Service::Directory(config) => runtime.spawn(async move {
                        let app = dir_service::App::build(config, disk, surroundings).await?;
                        app.serve(vec![incoming], never).await
                    }),
                    Service::File(config) => runtime.spawn(async move {
                        let app = file_service::App::build(config, disk, surroundings).await?;
                        app.serve(vec![incoming], never).await
                    }),
                    Service::Clients => unreachable!("taken above"),
                })
            }
        };
        let began = runtime.block_on(async { Instant::now() });
        let (began_ms, ran_ms) = (self.now_ms, 0);
        self.hosts[id].running = Some(Running { runtime, main, began_ms, began, ran_ms, is_paused: false });
        self.trace.event("start", &[self.now_ms, id as u64], &[]);
        tracing::info!(host = self.hosts[id].name, "started");
    }

    /// Whether a host runs, paused or not.
    pub fn is_up(&self, id: HostId) -> bool {
        self.hosts[id].running.is_some()
    }

    /// Whether it is paused.
    pub fn is_paused(&self, id: HostId) -> bool {
        self.hosts[id].running.as_ref().is_some_and(|running| running.is_paused)
    }

    /// Ends a host.
    pub fn crash(&mut self, id: HostId, death: Death) {
        let Some(running) = self.hosts[id].running.take() else {
            // Already down: what its disk was still to meet is over.
            self.hosts[id].disk.crash(CrashKeep::Everything);
            return;
        };
        tracing::info!(host = self.hosts[id].name, ?death, "ends");
        self.trace.event("end", &[self.now_ms, id as u64], format!("{death:?}").as_bytes());
        let keep = match death {
            Death::Killed => CrashKeep::Everything,
            Death::PowerLost(keep) => {
                self.network.power_off(id);
                keep
            }
        };
        self.network.unlisten(id);
        drop(running);
        self.hosts[id].disk.crash(keep);
    }

    /// Puts an empty disk into a host that is down.
    pub fn replace_disk(&mut self, id: HostId) {
        assert!(!self.is_up(id), "{} runs", self.hosts[id].name);
        let disk = SimDisk::new(self.dice.next_u64(), DISK_BYTES);
        disk.set_sync_latency(Duration::from_millis(2));
        self.hosts[id].disk = disk;
    }

    /// Stops a host's execution; its clock goes on.
    pub fn pause(&mut self, id: HostId) {
        if let Some(running) = &mut self.hosts[id].running {
            running.is_paused = true;
            self.trace.event("pause", &[self.now_ms, id as u64], &[]);
        }
    }

    /// Lets it go on.
    pub fn resume(&mut self, id: HostId) {
        if let Some(running) = &mut self.hosts[id].running {
            running.is_paused = false;
            self.trace.event("resume", &[self.now_ms, id as u64], &[]);
        }
    }

    /// Lets a millisecond pass.
    pub fn step(&mut self) {
        self.now_ms += 1;
        nature::set_ms(self.now_ms);
        self.network.deliver(self.now_ms);
        for host in &mut self.hosts {
            let Some(running) = &mut host.running else { continue };
            if !running.is_paused {
                let world_ms = self.now_ms - running.began_ms;
                let own_ms = world_ms as i64 + world_ms as i64 * host.drift_ppm / 1_000_000;
                let span = tracing::error_span!("host", name = host.name);
                let _entered = span.enter();
                running.run_until(own_ms.max(0) as u64);
            }
        }
    }

    /// Tasks that live on a host.
    pub fn tasks(&self, id: HostId) -> usize {
        self.hosts[id].running.as_ref().map_or(0, |running| running.runtime.metrics().num_alive_tasks())
    }

    /// What ended the service of a host by itself, if anything did. The host is down then.
    pub fn ended(&mut self, id: HostId) -> Option<String> {
        let running = self.hosts[id].running.as_mut()?;
        let main = running.main.as_mut().filter(|main| main.is_finished())?;
        let why = match main.now_or_never() {
            Some(Ok(Ok(()))) => "it ended by itself".to_owned(),
            Some(Ok(Err(error))) => error.to_string(),
            Some(Err(error)) => format!("it failed: {error}"),
            None => return None,
        };
        self.crash(id, Death::Killed);
        Some(why)
    }

    /// Starts something on a running host. It ends with the host.
    pub fn spawn<F>(&self, id: HostId, future: F) -> JoinHandle<F::Output>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        self.hosts[id].running.as_ref().expect("the host runs").runtime.spawn(future)
    }

    /// The way to the others for clients on this host.
    pub fn connector(&self, id: HostId) -> Arc<dyn Connect> {
        self.network.connector(id)
    }
}

impl Running {
    fn run_until(&mut self, own_ms: u64) {
        let behind = own_ms.saturating_sub(self.ran_ms);
        if behind == 0 {
            return;
        }
        self.ran_ms = own_ms;
        let until = self.began + Duration::from_millis(own_ms);
        self.runtime.block_on(async {
            if behind > 2 {
                // It was paused: the time has passed all at once.
                tokio::time::advance(Duration::from_millis(behind - 1)).await;
            }
            tokio::time::sleep_until(until).await;
        });
    }
}
