//! What breaks, when, and for how long; drawn from the seed of the run.
//!
//! Each run has its own choice of kinds: one that has them all at once hides what two of them do to each other. Every
//! fault has an end, drawn when it begins. What cannot be mended (rot, a lost disk) befalls one file server a run, since
//! the promise is that of enough good copies.

use crate::{
    network::HostId,
    world::{DISK_BYTES, Death, World},
};
use disk::{CrashKeep, Disk, SimDisk};
use futures::FutureExt as _;
use rand::{Rng as _, seq::IndexedRandom as _};
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    path::PathBuf,
    time::Duration,
};

/// A kind of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A process is killed.
    Kill,
    /// A machine loses power.
    PowerLoss,
    /// A machine loses power in the middle of a write or sync.
    PowerLossInWrite,
    /// All machines lose power at once.
    Blackout,
    /// A process is stopped for a while.
    Pause,
    /// A machine is cut off, both ways.
    Isolate,
    /// One direction between two machines is cut.
    OneWay,
    /// Both directions between two machines are cut.
    Cut,
    /// Messages between two machines take long.
    Slow,
    /// Connections between two machines are reset.
    Reset,
    /// A machine of clients dies, and comes back with new clients.
    ClientDeath,
    /// A disk is full.
    Full,
    /// Syncs of a disk fail.
    SyncErrors,
    /// Reads of a disk fail.
    ReadErrors,
    /// Writes of a disk fail.
    WriteErrors,
    /// Syncs take long.
    SlowDisk,
    /// Bits of a file server's chunks flip.
    Rot,
    /// A file server comes back with an empty disk.
    LostDisk,
    /// A file server joins.
    Join,
    /// A file server is drained, and taken back after a while.
    Drain,
    /// The directory comes back without its store.
    LostStore,
}

const KINDS: [Kind; 21] = [
    Kind::Kill,
    Kind::PowerLoss,
    Kind::PowerLossInWrite,
    Kind::Blackout,
    Kind::Pause,
    Kind::Isolate,
    Kind::OneWay,
    Kind::Cut,
    Kind::Slow,
    Kind::Reset,
    Kind::ClientDeath,
    Kind::Full,
    Kind::SyncErrors,
    Kind::ReadErrors,
    Kind::WriteErrors,
    Kind::SlowDisk,
    Kind::Rot,
    Kind::LostDisk,
    Kind::Join,
    Kind::Drain,
    Kind::LostStore,
];

/// What the run has to do, since it takes more than breaking things.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// Start this client machine's work again: it is up.
    ClientsBack(HostId),
    /// Add a file server.
    Join,
    /// Drain this file server, or take that back.
    Drain(HostId, bool),
    /// Take the directory's store, and follow the rebuild.
    LoseStore,
}

/// Breaks things and mends them.
#[derive(Debug)]
pub struct Nemesis {
    directory: HostId,
    /// All file servers, also those that joined.
    pub files: Vec<HostId>,
    clients: Vec<HostId>,
    kinds: Vec<Kind>,
    /// The file server that rot or loss of its disk may befall.
    victim: HostId,
    /// Hosts whose disk was made to fail since they started: they may end by themselves.
    failing: BTreeSet<HostId>,
    /// Hosts whose disk is to lose power within its next changes.
    armed: BTreeSet<HostId>,
    drained: Option<HostId>,
    /// What will be undone, by time.
    due: BTreeMap<(u64, u64), Undo>,
    next: u64,
    next_ms: u64,
    /// Faults by kind.
    pub fired: BTreeMap<String, u64>,
}

#[derive(Clone, Debug)]
enum Undo {
    Start(HostId),
    Resume(HostId),
    Connect(Vec<(HostId, HostId)>),
    Hasten(HostId, HostId),
    Room(HostId),
    Restart(HostId),
    FastDisk(HostId, u64),
    Undrain(HostId),
}

impl Nemesis {
    /// One that begins some time after now.
    pub fn new(world: &mut World, directory: HostId, files: Vec<HostId>, clients: Vec<HostId>) -> Self {
        let many = world.dice.random_range(1..=8);
        let kinds: BTreeSet<Kind> =
            (0..many).map(|_| *KINDS.choose(&mut world.dice).unwrap_or(&Kind::Kill)).collect();
        let victim = *files.choose(&mut world.dice).unwrap_or(&directory);
        let next_ms = world.now_ms() + world.dice.random_range(500..2_500);
        Self {
            directory,
            files,
            clients,
            kinds: kinds.into_iter().collect(),
            victim,
            failing: BTreeSet::new(),
            armed: BTreeSet::new(),
            drained: None,
            due: BTreeMap::new(),
            next: 0,
            next_ms,
            fired: BTreeMap::new(),
        }
    }

    /// Does what is due; called at every step. Answers what the run has to do.
    pub fn act(&mut self, world: &mut World) -> Vec<Wish> {
        let mut wishes = Vec::new();
        while let Some(entry) = self.due.first_entry().filter(|entry| entry.key().0 <= world.now_ms()) {
            let undo = entry.remove();
            wishes.extend(self.undo(world, undo));
        }
        if world.now_ms() >= self.next_ms {
            self.next_ms = world.now_ms() + world.dice.random_range(100..4_000);
            wishes.extend(self.strike(world));
        }
        wishes
    }

    /// Ends those whose disk has lost power; called at every step, before anything else is made of their end.
    pub fn power(&mut self, world: &mut World) {
        for host in self.servers() {
            if world.is_up(host) && world.hosts[host].disk.is_off() {
                self.armed.remove(&host);
                world.crash(host, Death::PowerLost(CrashKeep::Random));
                self.later(world, 1..5_000, Undo::Start(host));
            }
        }
    }

    /// Whether bits of a copy have flipped.
    pub fn has_rotted(&self) -> bool {
        self.fired.contains_key("Rot")
    }

    /// A service ended by itself. Whether that was to be expected; it is started again then.
    pub fn ended(&mut self, world: &mut World, host: HostId) -> bool {
        let expected = self.failing.contains(&host);
        if expected {
            self.later(world, 100..3_000, Undo::Start(host));
        }
        expected
    }

    /// Mends everything.
    pub fn end(&mut self, world: &mut World) -> Vec<Wish> {
        let due = std::mem::take(&mut self.due);
        let mut wishes: Vec<Wish> = due.into_values().filter_map(|undo| self.undo(world, undo)).collect();
        world.network.heal();
        for host in std::mem::take(&mut self.armed) {
            world.crash(host, Death::PowerLost(CrashKeep::Random));
        }
        for host in self.servers() {
            // A disk that failed a sync is not trusted again by the process that saw it.
            if self.failing.contains(&host) {
                world.crash(host, Death::Killed);
            }
            if !world.is_up(host) {
                self.start(world, host);
            }
            world.resume(host);
        }
        wishes.dedup();
        wishes
    }

    fn servers(&self) -> Vec<HostId> {
        [self.directory].into_iter().chain(self.files.iter().copied()).collect()
    }

    fn later(&mut self, world: &mut World, after_ms: Range<u64>, undo: Undo) {
        let at = world.now_ms() + world.dice.random_range(after_ms);
        self.next += 1;
        self.due.insert((at, self.next), undo);
    }

    fn start(&mut self, world: &mut World, host: HostId) {
        self.failing.remove(&host);
        let disk = &world.hosts[host].disk;
        disk.set_capacity(DISK_BYTES);
        disk.fail_reads(0);
        disk.fail_syncs(0);
        disk.fail_writes(0);
        world.start(host);
    }

    fn server(&self, world: &mut World) -> HostId {
        match world.dice.random_range(0..3) {
            0 => self.directory,
            _ => self.file(world),
        }
    }

    fn file(&self, world: &mut World) -> HostId {
        *self.files.choose(&mut world.dice).unwrap_or(&self.directory)
    }

    fn any(&self, world: &mut World) -> HostId {
        match world.dice.random_range(0..4) {
            0 => *self.clients.choose(&mut world.dice).unwrap_or(&self.directory),
            _ => self.server(world),
        }
    }

    fn pair(&self, world: &mut World) -> (HostId, HostId) {
        loop {
            let (one, other) = (self.any(world), self.any(world));
            let is_clients = |host: &HostId| self.clients.contains(host);
            if one != other && !(is_clients(&one) && is_clients(&other)) {
                return (one, other);
            }
        }
    }

    fn strike(&mut self, world: &mut World) -> Option<Wish> {
        let kind = *self.kinds.choose(&mut world.dice)?;
        let wish = self.strike_with(world, kind)?;
        *self.fired.entry(format!("{kind:?}")).or_default() += 1;
        world.trace.event("fault", &[world.now_ms(), kind as u64], &[]);
        wish
    }

    /// Nothing when it cannot be now.
    fn strike_with(&mut self, world: &mut World, kind: Kind) -> Option<Option<Wish>> {
        let keeps = [CrashKeep::Nothing, CrashKeep::Random, CrashKeep::Everything];
        let keep = keeps[world.dice.random_range(0..3)];
        match kind {
            Kind::Kill | Kind::PowerLoss => {
                let host = self.server(world);
                if !world.is_up(host) {
                    return None;
                }
                world.crash(host, if kind == Kind::Kill { Death::Killed } else { Death::PowerLost(keep) });
                self.later(world, 1..6_000, Undo::Start(host));
            }
            Kind::PowerLossInWrite => {
                let host = self.server(world);
                let changes = world.dice.random_range(0..20);
                world.hosts[host].disk.power_off_after(changes);
                self.armed.insert(host);
            }
            Kind::Blackout => {
                for host in self.servers() {
                    if world.is_up(host) {
                        world.crash(host, Death::PowerLost(keep));
                        self.later(world, 1..3_000, Undo::Start(host));
                    }
                }
            }
            Kind::Pause => {
                let host = self.any(world);
                if !world.is_up(host) || world.is_paused(host) {
                    return None;
                }
                world.pause(host);
                self.later(world, 20..9_000, Undo::Resume(host));
            }
            Kind::Isolate => {
                let host = self.any(world);
                let others = (0..world.hosts.len()).filter(|other| *other != host);
                let links: Vec<_> = others.flat_map(|other| [(host, other), (other, host)]).collect();
                self.cut(world, links);
            }
            Kind::OneWay => {
                let pair = self.pair(world);
                self.cut(world, vec![pair]);
            }
            Kind::Cut => {
                let (one, other) = self.pair(world);
                self.cut(world, vec![(one, other), (other, one)]);
            }
            Kind::Slow => {
                let (one, other) = self.pair(world);
                let most = world.dice.random_range(10..600);
                for (from, to) in [(one, other), (other, one)] {
                    world.network.set_delay(from, to, Some(most / 4..=most));
                }
                self.later(world, 500..8_000, Undo::Hasten(one, other));
            }
            Kind::Reset => {
                let (one, other) = self.pair(world);
                if world.network.break_connections(one, other) == 0 {
                    return None;
                }
            }
            Kind::ClientDeath => {
                let host = *self.clients.choose(&mut world.dice)?;
                if !world.is_up(host) {
                    return None;
                }
                let silent = world.dice.random();
                world.crash(host, if silent { Death::PowerLost(keep) } else { Death::Killed });
                self.later(world, 1..5_000, Undo::Start(host));
            }
            Kind::Full => {
                let host = self.server(world);
                let disk = &world.hosts[host].disk;
                disk.set_capacity(disk.used_bytes() + world.dice.random_range(0..200_000));
                self.later(world, 500..8_000, Undo::Room(host));
            }
            Kind::SyncErrors | Kind::ReadErrors | Kind::WriteErrors => {
                let host = self.server(world);
                let (disk, count) = (&world.hosts[host].disk, world.dice.random_range(1..4));
                match kind {
                    Kind::SyncErrors => disk.fail_syncs(count),
                    Kind::ReadErrors => disk.fail_reads(count),
                    _ => disk.fail_writes(count),
                }
                self.failing.insert(host);
                self.later(world, 500..8_000, Undo::Restart(host));
            }
            Kind::SlowDisk => {
                let host = self.server(world);
                let usual = world.dice.random_range(1..=4);
                let slow = world.dice.random_range(30..500);
                world.hosts[host].disk.set_sync_latency(Duration::from_millis(slow));
                self.later(world, 500..10_000, Undo::FastDisk(host, usual));
            }
            Kind::Rot => {
                let disk = world.hosts[self.victim].disk.clone();
                let flips = world.dice.random_range(1..6);
                for _ in 0..flips {
                    self.flip(world, &disk)?;
                }
            }
            Kind::LostDisk => {
                let host = self.victim;
                if !world.is_up(host) {
                    return None;
                }
                world.crash(host, Death::Killed);
                world.replace_disk(host);
                self.later(world, 1..8_000, Undo::Start(host));
                // Once: until every copy is made again, the other servers may not lose theirs.
                self.kinds.retain(|kind| !matches!(kind, Kind::LostDisk | Kind::Rot));
            }
            Kind::Join => {
                if self.files.len() >= 7 {
                    return None;
                }
                return Some(Some(Wish::Join));
            }
            Kind::Drain => {
                if self.drained.is_some() || self.files.len() < 4 {
                    return None;
                }
                let host = self.file(world);
                self.drained = Some(host);
                self.later(world, 2_000..15_000, Undo::Undrain(host));
                return Some(Some(Wish::Drain(host, true)));
            }
            Kind::LostStore => return Some(Some(Wish::LoseStore)),
        }
        Some(None)
    }

    fn cut(&mut self, world: &mut World, links: Vec<(HostId, HostId)>) {
        for (from, to) in &links {
            world.network.set_cut(*from, *to, true);
        }
        self.later(world, 50..10_000, Undo::Connect(links));
    }

    /// Flips a bit of a random file with chunks.
    fn flip(&self, world: &mut World, disk: &SimDisk) -> Option<()> {
        let files = files_below(disk, "chunks");
        let (path, length) = files.choose(&mut world.dice)?.clone();
        let (offset, bit) = (world.dice.random_range(0..length), world.dice.random_range(0..8));
        disk.flip_bit(&path, offset, bit).ok()
    }

    fn undo(&mut self, world: &mut World, undo: Undo) -> Option<Wish> {
        match undo {
            Undo::Start(host) => {
                if !world.is_up(host) {
                    self.start(world, host);
                    if self.clients.contains(&host) {
                        return Some(Wish::ClientsBack(host));
                    }
                }
            }
            Undo::Resume(host) => world.resume(host),
            Undo::Connect(links) => {
                for (from, to) in links {
                    world.network.set_cut(from, to, false);
                }
            }
            Undo::Hasten(one, other) => {
                world.network.set_delay(one, other, None);
                world.network.set_delay(other, one, None);
            }
            Undo::Room(host) => world.hosts[host].disk.set_capacity(DISK_BYTES),
            Undo::Restart(host) => {
                if world.is_up(host) {
                    world.crash(host, Death::Killed);
                }
                if !self.due.values().any(|undo| matches!(undo, Undo::Start(other) if *other == host)) {
                    self.start(world, host);
                }
            }
            Undo::FastDisk(host, ms) => world.hosts[host].disk.set_sync_latency(Duration::from_millis(ms)),
            Undo::Undrain(host) => {
                self.drained = None;
                return Some(Wish::Drain(host, false));
            }
        }
        None
    }
}

/// Files that are not empty, below a folder.
fn files_below(disk: &SimDisk, folder: &str) -> Vec<(PathBuf, u64)> {
    let (mut files, mut folders) = (Vec::new(), vec![PathBuf::from(folder)]);
    while let Some(folder) = folders.pop() {
        // A simulated disk lists at once.
        for entry in disk.list(&folder).now_or_never().and_then(Result::ok).unwrap_or_default() {
            let path = folder.join(&entry.name);
            if entry.is_dir {
                folders.push(path);
            } else if entry.len > 0 {
                files.push((path, entry.len));
            }
        }
    }
    files
}
