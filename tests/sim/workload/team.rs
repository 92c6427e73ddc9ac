//! All clients of a run, and the proof in the end that what they were told is true.

use super::{
    Shared,
    appender::{self, Appends},
    blocks::{self, Blocks},
    counter::{self, Counter},
    impatient,
    ledger::Ledger,
    private,
    shared_names::{self, Histories},
};
use crate::{network::HostId, world::World};
use client_lib::Client;
use parking_lot::Mutex;
use rand::Rng as _;
use std::sync::Arc;

/// Folders that one client works in alone.
const PRIVATE: usize = 4;
const COUNTER: &str = "/counter";
const LOGS: &str = "/logs";
const BLOCKS: &str = "/blocks";

/// What everybody was told.
#[derive(Clone, Debug)]
pub struct Team {
    /// Machines that clients run on.
    hosts: Vec<HostId>,
    ledgers: Vec<Arc<Mutex<Ledger>>>,
    histories: Arc<Mutex<Histories>>,
    counter: Arc<Mutex<Counter>>,
    appends: Arc<Mutex<Appends>>,
    blocks: Arc<Mutex<Blocks>>,
    shared: Shared,
}

impl Team {
    /// Nobody works yet.
    pub fn new(hosts: Vec<HostId>, shared: Shared) -> Self {
        let ledgers =
            (0..PRIVATE).map(|number| Arc::new(Mutex::new(Ledger::new(&format!("/private-{number}")))));
        Self {
            hosts,
            ledgers: ledgers.collect(),
            histories: Arc::default(),
            counter: Arc::new(Mutex::new(Counter::new(COUNTER))),
            appends: Arc::new(Mutex::new(Appends::new(LOGS))),
            blocks: Arc::new(Mutex::new(Blocks::new(BLOCKS))),
            shared,
        }
    }

    /// Makes what everybody works with.
    ///
    /// # Errors
    /// As the directory says.
    pub async fn prepare(self, client: Client) -> client_lib::Result<()> {
        for number in 0..PRIVATE {
            client.mkdir(&format!("/private-{number}")).await?;
        }
        client.mkdir(LOGS).await?;
        client.mkdir(impatient::FOLDER).await?;
        client.write(BLOCKS, blocks::first()).await?;
        Ok(())
    }

    /// Sets everybody to work who belongs on a machine.
    pub fn employ(&self, world: &mut World, host: HostId, client: &Client) {
        let place = self.hosts.iter().position(|it| *it == host).unwrap_or(0);
        for ledger in self.ledgers.iter().skip(place).step_by(self.hosts.len()) {
            // Whoever worked here before died over it.
            ledger.lock().doubtful("the client died");
            let seed = world.dice.random();
            world.spawn(host, private::run(client.clone(), ledger.clone(), self.shared.clone(), seed));
        }
        for _ in 0..2 {
            let (number, seed) = (world.dice.random_range(1..1 << 30), world.dice.random());
            let histories = self.histories.clone();
            world
                .spawn(host, shared_names::run(client.clone(), number, histories, self.shared.clone(), seed));
        }
        let seed = world.dice.random();
        world.spawn(host, counter::run(client.clone(), self.counter.clone(), self.shared.clone(), seed));
        let seed = world.dice.random();
        world.spawn(host, appender::run(client.clone(), self.appends.clone(), self.shared.clone(), seed));
        let seed = world.dice.random();
        world.spawn(host, blocks::run(client.clone(), self.blocks.clone(), self.shared.clone(), seed));
        let seed = world.dice.random();
        world.spawn(host, impatient::run(client.clone(), self.shared.clone(), seed));
    }

    /// The directory's store was lost at some time and rebuilt: what was acknowledged from `certain_ms` on may be gone,
    /// the latest first. Call it while nobody works.
    ///
    /// # Errors
    /// What is gone that may not, in words.
    pub async fn rebuilt(self, client: Client, certain_ms: u64, now_ms: u64) -> Result<u64, String> {
        self.counter.lock().rebuilt(certain_ms);
        self.appends.lock().rebuilt(certain_ms);
        self.blocks.lock().rebuilt(certain_ms);
        self.histories.lock().rebuilt(now_ms);
        let mut undone = 0;
        for ledger in &self.ledgers {
            ledger.lock().doubtful("the client died");
            let mut owned = std::mem::replace(&mut *ledger.lock(), Ledger::new(""));
            let found = owned.rebuilt(&client, certain_ms).await;
            undone += found.map_err(|why| format!("{}: {why}", owned.folder))?;
            *ledger.lock() = owned;
        }
        Ok(undone)
    }

    /// Compares everything that is there with everything that was acknowledged. Answers what was checked, for a run's
    /// figures: histories, and increments.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub async fn verify(self, client: Client) -> Result<(u64, u64), String> {
        for ledger in &self.ledgers {
            ledger.lock().doubtful("the client died");
            let mut owned = std::mem::replace(&mut *ledger.lock(), Ledger::new(""));
            let problems = owned.verify(&client).await;
            let problems =
                problems.map_err(|why| format!("{} could not be verified: {why}", owned.folder))?;
            if !problems.is_empty() {
                return Err(format!("{}: {}", owned.folder, problems.join("\n")));
            }
        }
        let unread = |why: String| format!("what was acknowledged could not be verified: {why}");
        let found = [
            Counter::verify(&self.counter, &client).await.map_err(unread)?,
            Appends::verify(&self.appends, &client).await.map_err(unread)?,
            blocks::verify(&self.blocks, &client).await.map_err(unread)?,
            impatient::verify(&client).await.map_err(unread)?,
        ];
        if let Some(problem) = found.into_iter().flatten().next() {
            return Err(problem);
        }
        let (judged, _undecided) = self.histories.lock().judge()?;
        Ok((judged, self.counter.lock().count))
    }
}
