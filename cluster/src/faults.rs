//! What can be done to a running cluster: death, silence, forgetting.

use crate::{
    Cluster,
    member::{Member, Store},
};
use cairn_proto::{Error, Result};
use disk::{CrashKeep, SimDisk};
use std::path::PathBuf;

impl Cluster {
    /// Ends file server `i` as SIGKILL would: its connections break at once, nothing it still tries reaches its disk.
    /// Does nothing when it is dead already.
    pub async fn kill(&self, i: usize) {
        self.member(i).kill().await;
    }

    /// Ends file server `i` as SIGTERM would: it finishes what it does first.
    ///
    /// # Errors
    /// What the service ended with.
    pub async fn stop(&self, i: usize) -> Result<()> {
        self.member(i).stop().await
    }

    /// Starts file server `i` again, with its disk and at its address. Does nothing when it runs. See
    /// [`Cluster::wait_ready`] for when it takes part again.
    ///
    /// # Errors
    /// What the service says that cannot start.
    pub async fn restart(&self, i: usize) -> Result<()> {
        self.member(i).start().await
    }

    /// Cuts file server `i` off silently: what is sent to or from it neither arrives nor fails, until
    /// [`Cluster::heal`]. Holds across its death and restart.
    pub fn partition(&self, i: usize) {
        self.member(i).gate.cut();
    }

    /// Connects file server `i` again; what waited arrives.
    pub fn heal(&self, i: usize) {
        self.member(i).gate.heal();
    }

    /// Cuts the directory off silently, likewise.
    pub fn partition_directory(&self) {
        self.directories[0].gate.cut();
    }

    /// Connects the directory again.
    pub fn heal_directory(&self) {
        self.directories[0].gate.heal();
    }

    /// Ends the directory as SIGKILL would.
    pub async fn kill_directory(&self) {
        self.directories[0].kill().await;
    }

    /// Starts the directory again, with its store and at its address. Does nothing when it runs.
    ///
    /// # Errors
    /// What the service says that cannot start.
    pub async fn restart_directory(&self) -> Result<()> {
        self.directories[0].start().await
    }

    /// Ends the directory with this index, from 0, as SIGKILL would.
    pub async fn kill_directory_at(&self, directory: usize) {
        self.directories[directory].kill().await;
    }

    /// Ends it as SIGTERM would.
    ///
    /// # Errors
    /// What the service ended with.
    pub async fn stop_directory_at(&self, directory: usize) -> Result<()> {
        self.directories[directory].stop().await
    }

    /// Starts it again at its address. Does nothing when it runs.
    ///
    /// # Errors
    /// What the service says that cannot start.
    pub async fn restart_directory_at(&self, directory: usize) -> Result<()> {
        self.directories[directory].start().await
    }

    /// Cuts it off from clients and file servers silently.
    pub fn partition_directory_at(&self, directory: usize) {
        self.directories[directory].gate.cut();
    }

    /// Connects it again.
    pub fn heal_directory_at(&self, directory: usize) {
        self.directories[directory].gate.heal();
    }

    /// Cuts it off from the store that it shares: what it asks of that neither arrives nor fails, until
    /// [`Cluster::heal_store_of`]. What it asked arrives then, as of a process that was stopped for a while.
    pub fn cut_store_of(&self, directory: usize) {
        self.directories[directory].store_gate.cut();
    }

    /// Connects it to the store again.
    pub fn heal_store_of(&self, directory: usize) {
        self.directories[directory].store_gate.heal();
    }

    /// Deletes the directory's whole store. Kill it before.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` while the directory runs.
    pub async fn lose_directory_store(&self) -> Result<()> {
        self.directories[0].wipe().await
    }

    /// Deletes all that file server `i` stored. Kill it before.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` while it runs.
    pub async fn lose_file_store(&self, i: usize) -> Result<()> {
        self.member(i).wipe().await
    }

    /// Kills every service at once.
    pub async fn kill_all(&self) {
        let members = self.members();
        // All connections break before any service could notice another's death.
        for member in &members {
            member.gate.end_life();
        }
        futures::future::join_all(members.iter().map(|member| member.kill())).await;
    }

    /// Kills every service at once, and has each memory disk lose what was not synced, as `keep` says.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` for a cluster on real disks, which cannot be made to forget.
    pub async fn lose_power(&self, keep: CrashKeep) -> Result<()> {
        let members = self.members();
        let disks: Option<Vec<_>> = members.iter().map(|member| memory(member)).collect();
        let Some(disks) = disks else {
            return Err(Error::invalid("only a cluster on memory disks can lose power"));
        };
        self.kill_all().await;
        for disk in disks {
            disk.crash(keep);
        }
        Ok(())
    }

    /// Starts every service that does not run, and waits until all live.
    ///
    /// # Errors
    /// What a service says that cannot start; as [`Cluster::wait_ready`].
    pub async fn restart_all(&self) -> Result<()> {
        for member in self.members() {
            member.start().await?;
        }
        self.wait_ready().await
    }

    /// The memory disk of file server `i`, to make it fail, fill or flip; none on real disks.
    pub fn memory_disk(&self, i: usize) -> Option<SimDisk> {
        memory(&self.member(i))
    }

    /// The directory's memory disk.
    pub fn directory_memory_disk(&self) -> Option<SimDisk> {
        memory(&self.directories[0])
    }

    /// The data directory of file server `i`; none in memory.
    pub fn folder(&self, i: usize) -> Option<PathBuf> {
        folder(&self.member(i))
    }

    /// The directory's data directory; none in memory.
    pub fn directory_folder(&self) -> Option<PathBuf> {
        folder(&self.directories[0])
    }
}

fn memory(member: &Member) -> Option<SimDisk> {
    match &member.store {
        Store::Memory(sim) => Some(sim.clone()),
        Store::Folder(_) => None,
    }
}

fn folder(member: &Member) -> Option<PathBuf> {
    match &member.store {
        Store::Memory(_) => None,
        Store::Folder(folder) => Some(folder.clone()),
    }
}
