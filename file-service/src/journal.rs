//! Copies of the directory's journal: what a lost directory is rebuilt from.
//!
//! One copy for each generation of the directory's store. A newer generation begins a new copy; an older one stays
//! until the newer has a checkpoint of its own, because until then the older may be the only way back.

use cairn_proto::{
    Error, Reason, Result,
    id::{Generation, Revision},
    v1,
};
use disk::Disk;
use futures::{Stream, StreamExt as _};
use parking_lot::Mutex;
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};
use tonic::Status;

mod checkpoint;
mod copy;

use checkpoint::{Head, Reader};
use copy::{Copy, Install, LogReader, compacted, drop_others, remove_dir};

const DIR: &str = "journal";

/// All copies on this disk. Clones are the same copies.
#[derive(Clone, Debug)]
pub struct Journals {
    disk: Arc<dyn Disk>,
    state: Arc<tokio::sync::Mutex<State>>,
    /// Held by the one checkpoint that is arriving.
    installing: Arc<tokio::sync::Mutex<()>>,
    /// What [`Journals::copies`] answers, so that it never waits for a disk.
    shown: Arc<Mutex<Vec<v1::JournalCopy>>>,
}

#[derive(Debug, Default)]
struct State {
    /// By generation. All of one cluster.
    copies: BTreeMap<Generation, Slot>,
    /// Nothing is changed on the disk any more.
    is_closed: bool,
}

#[derive(Debug)]
enum Slot {
    Open(Copy),
    /// Damaged, or failed: kept on the disk until a new checkpoint replaces it, and not offered. Of this cluster.
    Bad(String),
}

impl Slot {
    fn open(&self) -> Option<&Copy> {
        match self {
            Self::Open(copy) => Some(copy),
            Self::Bad(_) => None,
        }
    }
}

impl Journals {
    /// Opens all copies of a cluster's journal. Damaged ones are reported in the log and not offered.
    ///
    /// # Errors
    /// `IO` when the disk cannot be read at all.
    pub async fn open(disk: Arc<dyn Disk>, cluster_id: &str) -> Result<Self> {
        disk.create_dir_all(Path::new(DIR)).await?;
        let mut copies = BTreeMap::new();
        for entry in disk.list(Path::new(DIR)).await? {
            let Some(generation) = generation_of(&entry.name).filter(|_| entry.is_dir) else { continue };
            let dir = Path::new(DIR).join(&entry.name);
            match Copy::open(disk.clone(), dir, cluster_id.to_owned(), generation).await {
                Ok(Some(copy)) => {
                    copies.insert(generation, Slot::Open(copy));
                }
                Ok(None) => {}
                Err(error) => {
                    tracing::error!(generation = generation.0, %error,
                        "a copy of the directory's journal is damaged: it is kept, but not offered for a rebuild");
                    copies.insert(generation, Slot::Bad(cluster_id.to_owned()));
                }
            }
        }
        let journals =
            Self { disk, state: Arc::default(), installing: Arc::default(), shown: Arc::default() };
        {
            let mut state = journals.state.lock().await;
            state.copies = copies;
            journals.show(&state);
        }
        Ok(journals)
    }

    /// The copies, for the directory. One that cannot be read is told by a durable revision of 0: what it held is not
    /// known, so a rebuild must not take this server for one that knows of nothing newer.
    pub fn copies(&self) -> Vec<v1::JournalCopy> {
        self.shown.lock().clone()
    }

    /// Last durable revision of the newest copy; 0 without one.
    pub fn revision(&self) -> u64 {
        self.shown.lock().last().map_or(0, |copy| copy.durable_revision)
    }

    /// Appends records durably. The caller has checked cluster and generation.
    ///
    /// # Errors
    /// `REVISION_COMPACTED` when a checkpoint is needed first, `STALE_EPOCH` for an older generation than that of a
    /// copy here, `NO_SPACE`, `IO`.
    pub async fn append(&self, request: v1::AppendJournalRequest) -> Result<Revision> {
        let generation = Generation(request.generation);
        let previous = Revision(request.previous_revision);
        let appended = {
            let mut state = self.state.clone().lock_owned().await;
            check_open(&state)?;
            refuse_older(&state, generation)?;
            let is_new = !state.copies.contains_key(&generation);
            if is_new {
                if previous != Revision(0) {
                    return Err(compacted(Revision(0)));
                }
                let (disk, cluster_id) = (self.disk.clone(), request.cluster_id.clone());
                state = whole(async move {
                    let copy = Copy::begin(disk, dir_of(generation), cluster_id, generation).await?;
                    state.copies.insert(generation, Slot::Open(copy));
                    Ok(state)
                })
                .await?;
            }
            match state.copies.get_mut(&generation) {
                Some(Slot::Open(copy)) if copy.is_of(&request.cluster_id) => {
                    copy.append(previous, request.records, request.carrier_ids).await?
                }
                _ => return Err(compacted(Revision(0))),
            }
        };
        // Others append while this waits: the log commits them together.
        let durable = appended.durable().await;
        let mut state = self.state.lock().await;
        if let Some(Slot::Open(copy)) = state.copies.get(&generation)
            && copy.is_failed()
        {
            tracing::error!(
                generation = generation.0,
                "the disk failed under a copy of the directory's journal"
            );
            let cluster_id = copy.cluster_id().to_owned();
            state.copies.insert(generation, Slot::Bad(cluster_id));
        }
        self.show(&state);
        let durable = durable?;
        // A checkpoint may have replaced the copy meanwhile: what counts is what a start would find now.
        let copy = state.copies.get(&generation).and_then(Slot::open);
        if copy.is_some_and(|copy| copy.durable() >= durable) {
            return Ok(durable);
        }
        refuse_older(&state, generation)?;
        Err(compacted(copy.map_or(Revision(0), Copy::durable)))
    }

    /// Receives a checkpoint and makes it, and what is held behind it, the copy of its generation. `first` is the
    /// first message, `rest` are those behind it. The caller has checked cluster and generation.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` when entries are missing; `STALE_EPOCH`, `NO_SPACE`, `IO`. Either nothing changes then, or the
    /// copy is not offered and takes nothing before another checkpoint arrived. A caller who goes away after the last
    /// message does not stop it.
    pub async fn install(
        &self,
        first: v1::InstallCheckpointRequest,
        mut rest: impl Stream<Item = Result<v1::InstallCheckpointRequest, Status>> + Unpin,
    ) -> Result<Revision> {
        let (generation, revision) = (Generation(first.generation), Revision(first.revision));
        let Ok(installing) = self.installing.clone().try_lock_owned() else {
            return Err(Error::new(Reason::Overloaded, "another checkpoint is arriving").retry_after_ms(500));
        };
        {
            let state = self.state.lock().await;
            check_open(&state)?;
            refuse_older(&state, generation)?;
            if let Some(durable) = covered(&state, generation, revision) {
                return Ok(durable);
            }
        }
        let head = Head {
            cluster_id: first.cluster_id.clone(),
            generation: generation.0,
            revision: revision.0,
            carrier_ids: first.carrier_ids.clone(),
            ..Head::default()
        };
        let disk = self.disk.clone();
        let begun = whole(async move {
            let install = Install::begin(disk, dir_of(generation), head).await?;
            Ok((installing, install))
        });
        let (installing, mut install) = begun.await?;
        let received = async {
            let mut message = Some(first);
            while let Some(part) = message.take() {
                install.entries(part.entries).await?;
                if let Some(count) = part.entry_count {
                    return Ok(count);
                }
                message = rest.next().await.transpose()?;
            }
            Err(Error::invalid("the checkpoint ended without its number of entries: send it again"))
        }
        .await;
        let count = match received {
            Ok(count) => count,
            Err(error) => {
                return whole(async move {
                    let _installing = installing;
                    install.abandon().await;
                    Err(error)
                })
                .await;
            }
        };
        let journals = self.clone();
        let done = whole(async move {
            let _installing = installing;
            journals.complete(install, count).await
        });
        let done = done.await;
        if done.is_err() {
            // It may have ended anywhere.
            self.show(&*self.state.lock().await);
        }
        done
    }

    async fn complete(&self, install: Install, count: u64) -> Result<Revision> {
        let (generation, revision) = install.place();
        // From here on nobody appends: what was appended so far is carried over.
        let mut state = self.state.lock().await;
        check_open(&state)?;
        refuse_older(&state, generation)?;
        if let Some(durable) = covered(&state, generation, revision) {
            install.abandon().await;
            return Ok(durable);
        }
        let ready = install.prepare(count, state.copies.get(&generation).and_then(Slot::open)).await?;
        // Which of the two copies a start would find is not known until the name is durable: neither is appended to.
        let old = state.copies.insert(generation, Slot::Bad(ready.cluster_id().to_owned()));
        let named = ready.name().await;
        let copy = match named {
            Ok(copy) => copy,
            Err(error) => {
                tracing::error!(generation = generation.0, revision = revision.0, %error,
                    "a journal checkpoint may or may not be installed: another is needed");
                self.show(&state);
                close_all(Vec::from_iter(old)).await;
                return Err(error);
            }
        };
        let durable = copy.durable();
        state.copies.insert(generation, Slot::Open(copy));
        let older: Vec<Generation> = state.copies.range(..generation).map(|(older, _)| *older).collect();
        let mut replaced = Vec::from_iter(old);
        for generation in &older {
            replaced.extend(state.copies.remove(generation));
        }
        close_all(replaced).await;
        self.show(&state);
        // Leftovers are also dropped at the next start.
        let dropped = async {
            drop_others(self.disk.as_ref(), &dir_of(generation), revision, true).await?;
            for older in older {
                remove_dir(self.disk.as_ref(), &dir_of(older)).await?;
            }
            Ok::<(), Error>(())
        };
        if let Err(error) = dropped.await {
            tracing::warn!(%error, "could not remove replaced journal files; they go at the next start");
        }
        tracing::info!(generation = generation.0, revision = revision.0, "journal checkpoint installed");
        Ok(durable)
    }

    /// Begins to read a copy: the checkpoint, then the records behind it.
    ///
    /// # Errors
    /// `NOT_FOUND` when there is no such copy, or it is damaged.
    pub async fn read(&self, cluster_id: &str, generation: Generation) -> Result<Reading> {
        let state = self.state.lock().await;
        let copy = state
            .copies
            .get(&generation)
            .and_then(Slot::open)
            .filter(|copy| copy.is_of(cluster_id))
            .ok_or_else(|| {
            Error::not_found(format!("no readable copy of the journal of generation {generation} is here"))
        })?;
        let (checkpoint, log) = copy.read().await?;
        Ok(Reading { checkpoint_revision: Some(copy.checkpoint), checkpoint, log })
    }

    /// Ends all logs.
    ///
    /// # Errors
    /// `IO`.
    pub async fn close(&self) -> Result<()> {
        let mut state = self.state.lock().await;
        state.is_closed = true;
        for copy in state.copies.values().filter_map(Slot::open) {
            copy.close().await?;
        }
        Ok(())
    }

    fn show(&self, state: &State) {
        *self.shown.lock() = state
            .copies
            .iter()
            .map(|(generation, slot)| match slot {
                Slot::Open(copy) => v1::JournalCopy {
                    cluster_id: copy.cluster_id().to_owned(),
                    generation: generation.0,
                    checkpoint_revision: copy.checkpoint.0,
                    durable_revision: copy.durable().0,
                    carrier_ids: copy.carriers.clone(),
                },
                Slot::Bad(cluster_id) => v1::JournalCopy {
                    cluster_id: cluster_id.clone(),
                    generation: generation.0,
                    ..Default::default()
                },
            })
            .collect();
    }
}

/// A copy that is being read.
#[derive(Debug)]
pub struct Reading {
    /// For the first message.
    checkpoint_revision: Option<Revision>,
    checkpoint: Option<Reader>,
    log: LogReader,
}

impl Reading {
    /// The next part; `None` at the end. There is at least one.
    ///
    /// # Errors
    /// `IO` when the copy turns out to be damaged: what was read so far must not be used alone.
    pub async fn next(&mut self) -> Result<Option<v1::ReadJournalResponse>> {
        let first = self.checkpoint_revision.take();
        if let Some(reader) = self.checkpoint.as_mut() {
            if let Some(entries) = reader.entries().await? {
                let checkpoint_revision = first.unwrap_or_default().0;
                return Ok(Some(v1::ReadJournalResponse {
                    checkpoint_revision,
                    entries,
                    records: Vec::new(),
                }));
            }
            self.checkpoint = None;
        }
        let records = self.log.records().await?;
        if records.is_empty() && first.is_none() {
            return Ok(None);
        }
        let checkpoint_revision = first.unwrap_or_default().0;
        Ok(Some(v1::ReadJournalResponse { checkpoint_revision, entries: Vec::new(), records }))
    }
}

/// Runs a change of files to its end, whatever becomes of the caller: half of one, or one under way while the next
/// begins, is nothing that memory knows of.
async fn whole<T: Send + 'static>(change: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
    match tokio::spawn(change).await {
        Ok(done) => done,
        Err(error) => {
            Err(Error::internal(format!("a change of a journal copy ended before its time: {error}")))
        }
    }
}

/// Ends the logs of copies that were replaced.
async fn close_all(slots: Vec<Slot>) {
    for slot in slots {
        if let Some(copy) = slot.open()
            && let Err(error) = copy.close().await
        {
            tracing::debug!(%error, "a replaced journal copy did not close cleanly");
        }
    }
}

fn check_open(state: &State) -> Result<()> {
    match state.is_closed {
        true => Err(Error::unavailable("the server is stopping: its journal copies are closed")),
        false => Ok(()),
    }
}

/// What is durable, when the copy covers a checkpoint of `revision` already.
fn covered(state: &State, generation: Generation, revision: Revision) -> Option<Revision> {
    let copy = state.copies.get(&generation).and_then(Slot::open)?;
    // Before revision 0 there is nothing, so a copy that began there needs no checkpoint of it.
    let is_covered = copy.checkpoint >= revision && (copy.is_installed || revision == Revision(0));
    is_covered.then(|| copy.durable())
}

fn refuse_older(state: &State, generation: Generation) -> Result<()> {
    match state.copies.keys().next_back() {
        Some(newest) if *newest > generation => Err(Error::new(
            Reason::StaleEpoch,
            format!("the journal is of generation {generation}, this server carries generation {newest}"),
        )),
        _ => Ok(()),
    }
}

fn dir_of(generation: Generation) -> PathBuf {
    Path::new(DIR).join(format!("{:016x}", generation.0))
}

fn generation_of(name: &str) -> Option<Generation> {
    u64::from_str_radix(name, 16).ok().filter(|_| name.len() == 16).map(Generation)
}

#[cfg(test)]
mod hostile;
#[cfg(test)]
mod tests;
