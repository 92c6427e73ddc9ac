//! The store on etcd: etcd is the truth, replicated and durable by itself, and this talks to it.
//!
//! | module | what it holds |
//! | --- | --- |
//! | `options` | where etcd is, TLS, user, what is kept of the past |
//! | `link`, `client`, `failure` | connections, failover, what an error means |
//! | `layout`, `identity` | keys, revisions and plans as etcd's; whose store it is |
//! | `read`, `watch` | reads at one revision; changes |
//! | `compaction` | forgets the past |
//! | `fill` | makes a store from the records of another |
//!
//! * A plan is one transaction: its preconditions are comparisons, its mutations the operations. etcd takes 128 of each and 1.5 MiB;
//!   a plan is smaller. Many are on their way at a time, over one connection; etcd writes them to its log together.
//! * Reads are linearizable, and all of one operation at the revision that the first one fixed.
//! * A plan whose answer is lost counts as `Unknown`. Only what certainly had no effect is `Refused`: it was never sent, or etcd
//!   says so with an error that it gives before it applies anything (`failure.rs`).

use super::{Changes, CommitError, Found, KeyRange, MetaStore, Page, StoreIdentity};
use async_trait::async_trait;
use cairn_core::plan::{Key, Plan, Versioned};
use cairn_proto::{
    Error, Reason, Result,
    id::{Generation, Revision},
    net::Connect,
};
use rand::{RngCore as _, SeedableRng as _, rngs::StdRng};
use std::{
    fmt,
    sync::{Arc, atomic::AtomicI64},
};
use tokio::sync::Semaphore;
use tokio_util::task::AbortOnDropHandle;

mod api;
mod client;
mod compaction;
mod failure;
mod fill;
mod identity;
mod layout;
mod link;
mod options;
mod read;
#[cfg(any(test, feature = "contract"))]
pub mod testing;
#[cfg(test)]
mod tests;
mod watch;

pub use fill::EtcdFill;
pub use options::{
    ENDPOINTS_MAX, EtcdAddress, EtcdKeep, EtcdOptions, EtcdTls, EtcdUser, PREFIX_BYTES_MAX, SCHEME,
};

use api::{TxnRequest, response_op};
use client::{Client, malformed};
use failure::{Failure, OVERLOADED_RETRY_MS};
use identity::{Identity, State};
use layout::{Layout, Names, absent, all_absent, one, put};

/// Most plans that are on their way to etcd; more are refused as overload. etcd itself refuses at 5,000.
const COMMITS_MAX: usize = 1_024;
/// What others may write to the same etcd between a look at its revision and the record that rests on it: the store's
/// revisions leave out so many, so that those of older records stay positive.
const FOREIGN_REVISIONS_MAX: u64 = 1_000_000;
/// The oldest etcd that is spoken to, as major and minor version.
const VERSION_MIN: (u32, u32) = (3, 4);

/// A store whose truth is etcd.
pub struct EtcdStore {
    shared: Arc<Shared>,
    _compactor: AbortOnDropHandle<()>,
}

impl fmt::Debug for EtcdStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdStore")
            .field("address", &self.shared.options.address.to_string())
            .finish_non_exhaustive()
    }
}

/// What reads, commits, watches and the compactor share.
#[derive(Debug)]
struct Shared {
    options: EtcdOptions,
    client: Client,
    layout: Layout,
    identity: StoreIdentity,
    /// Revisions of etcd before this one are no longer kept, as far as is known here.
    compacted: AtomicI64,
    commits: Semaphore,
}

impl EtcdStore {
    /// What lives under the prefix.
    ///
    /// # Errors
    /// As etcd's; `IO` for a damaged record.
    pub async fn find(options: &EtcdOptions, network: &Arc<dyn Connect>) -> Result<Found> {
        let client = Client::new(options.clone(), network.clone(), 0);
        Ok(match stored(&client, &Names::under(&options.address.prefix)).await? {
            None => Found::Nothing,
            Some((identity, _)) if identity.state == State::Complete => Found::Store(identity.store),
            Some((identity, _)) => Found::Incomplete(identity.store),
        })
    }

    /// Opens the store under the prefix. `seed` chooses the member that is tried first.
    ///
    /// # Errors
    /// `NOT_FOUND` when there is none, or one that was not filled to its end; `NOT_SUPPORTED` for an etcd that is too old.
    pub async fn open(options: EtcdOptions, network: Arc<dyn Connect>, seed: u64) -> Result<Self> {
        let client = Client::new(options.clone(), network, seed);
        check_version(&client).await?;
        let names = Names::under(&options.address.prefix);
        match stored(&client, &names).await? {
            Some((identity, written)) if identity.state == State::Complete => {
                Ok(Self::start(options, client, names, identity, written))
            }
            found => Err(unfit(found.map(|(identity, _)| identity.state), &options)),
        }
    }

    /// Makes an empty store, at revision 0.
    ///
    /// # Errors
    /// `ALREADY_EXISTS` when there is something under the prefix; as etcd's.
    pub async fn create(
        options: EtcdOptions,
        network: Arc<dyn Connect>,
        seed: u64,
        identity: StoreIdentity,
    ) -> Result<Self> {
        let client = Client::new(options.clone(), network, seed);
        check_version(&client).await?;
        let names = Names::under(&options.address.prefix);
        let identity = Identity { store: identity, state: State::Complete, start: Revision(0) };
        identity.check()?;
        let txn = TxnRequest {
            compare: vec![absent(names.store.clone()), all_absent(names.prefix(&Key::new()))],
            success: vec![put(names.store.clone(), identity.encode())],
            failure: Vec::new(),
        };
        let before = client.seen();
        let answer = client.txn(txn).await.map_err(Failure::into_error)?;
        let written = client.revision(answer.header.as_ref(), before)?;
        if !answer.succeeded {
            let message = format!("there are records under {} already", options.address);
            return Err(Error::new(Reason::AlreadyExists, message));
        }
        Ok(Self::start(options, client, names, identity, written))
    }

    /// Opens the store under the prefix, or makes one of a new cluster where nothing is. `seed` chooses the member that is tried
    /// first, and the id.
    ///
    /// # Errors
    /// As [`EtcdStore::open`] and [`EtcdStore::create`].
    pub async fn open_or_create(options: EtcdOptions, network: Arc<dyn Connect>, seed: u64) -> Result<Self> {
        if Self::find(&options, &network).await? == Found::Nothing {
            let mut random = [0; 16];
            StdRng::seed_from_u64(seed).fill_bytes(&mut random);
            let cluster_id = uuid::Builder::from_random_bytes(random).into_uuid().to_string();
            let identity = StoreIdentity { cluster_id, generation: Generation(1) };
            match Self::create(options.clone(), network.clone(), seed, identity).await {
                // Another directory was faster.
                Err(error) if error.reason == Reason::AlreadyExists => {}
                created => return created,
            }
        }
        Self::open(options, network, seed).await
    }

    /// Opens the store for whoever moves it elsewhere, and closes it to directories: whoever runs on it neither reads nor changes
    /// anything any more. Whether it was open to them before is told too: it was not if an earlier move was interrupted.
    ///
    /// # Errors
    /// As [`EtcdStore::open`]; `CONFLICT` when it was moved already.
    pub async fn close_off(options: EtcdOptions, network: Arc<dyn Connect>) -> Result<(Self, bool)> {
        let client = Client::new(options.clone(), network.clone(), 0);
        let names = Names::under(&options.address.prefix);
        match stored(&client, &names).await? {
            Some((identity, written)) if identity.state == State::Moving => {
                Ok((Self::start(options, client, names, identity, written), false))
            }
            _ => {
                let store = Self::open(options, network, 0).await?;
                Ok((store.rewrite(State::Moving, store.shared.identity.generation).await?, true))
            }
        }
    }

    /// Leaves it closed, once it was moved. This handle sees nothing any more.
    ///
    /// # Errors
    /// As etcd's.
    pub async fn leave(&self) -> Result<()> {
        self.rewrite(State::Moved, self.shared.identity.generation).await.map(drop)
    }

    /// Opens it to directories again, when it was not moved after all. This handle sees nothing any more.
    ///
    /// # Errors
    /// As etcd's.
    pub async fn open_up(&self) -> Result<()> {
        self.rewrite(State::Complete, self.shared.identity.generation).await.map(drop)
    }

    /// Gives the store another, higher generation; this handle sees nothing any more. Nobody else may be running on it.
    ///
    /// # Errors
    /// `CONFLICT` when somebody did so before; as etcd's.
    pub async fn raise_generation(&self, generation: Generation) -> Result<Self> {
        let now = self.shared.identity.generation;
        if generation <= now {
            return Err(Error::invalid(format!("generation {generation} is not above {now}")));
        }
        self.rewrite(State::Complete, generation).await
    }

    /// Writes the record of the identity anew, which begins another life.
    async fn rewrite(&self, state: State, generation: Generation) -> Result<Self> {
        let shared = &self.shared;
        let store = StoreIdentity { generation, ..shared.identity.clone() };
        let revision = self.revision().await?;
        let before = shared.client.seen();
        let identity = Identity { store, state, start: Revision(revision.0 + FOREIGN_REVISIONS_MAX) };
        let txn = TxnRequest {
            compare: vec![shared.layout.lives()],
            success: vec![put(shared.layout.names.store.clone(), identity.encode())],
            failure: Vec::new(),
        };
        let answer = shared.client.txn(txn).await.map_err(Failure::into_error)?;
        let written = shared.client.revision(answer.header.as_ref(), before)?;
        if !answer.succeeded {
            return Err(shared.superseded());
        }
        let client = Client::new(shared.options.clone(), shared.client.network(), 0);
        Ok(Self::start(shared.options.clone(), client, shared.layout.names.clone(), identity, written))
    }

    /// Whose store it is, and which of its lives.
    pub fn identity(&self) -> &StoreIdentity {
        &self.shared.identity
    }

    fn start(options: EtcdOptions, client: Client, names: Names, identity: Identity, written: i64) -> Self {
        tracing::info!(
            store = %options.address, cluster = identity.store.cluster_id, generation = identity.store.generation.0,
            "opened the directory's store on etcd"
        );
        let layout = Layout { names, written, start: identity.start };
        let shared = Arc::new(Shared {
            options,
            client,
            layout,
            identity: identity.store,
            compacted: AtomicI64::new(0),
            commits: Semaphore::new(COMMITS_MAX),
        });
        let compactor = AbortOnDropHandle::new(tokio::spawn(compaction::run(shared.clone())));
        Self { shared, _compactor: compactor }
    }

    /// What a failed transaction means to whoever wanted the plan applied.
    async fn failed(&self, failure: Failure, written: &[Key], before: i64) -> CommitError {
        match failure {
            Failure::Refused(error) | Failure::Elsewhere(error) | Failure::Token(error) => {
                CommitError::Refused(error)
            }
            Failure::Full(error) => match self.is_unwritten(written, before).await {
                true => CommitError::Refused(error),
                false => CommitError::Unknown(error),
            },
            lost => CommitError::Unknown(lost.into_error()),
        }
    }

    /// Whether a plan whose transaction was answered is certainly not applied: a key that it writes has an older value. The
    /// answer came after the plan would have been applied.
    async fn is_unwritten(&self, written: &[Key], before: i64) -> bool {
        let Ok(before) = self.shared.layout.revision(before) else { return false };
        let Ok((_, values)) = self.shared.get(written, None).await else { return false };
        values.iter().flatten().any(|value| value.revision <= before)
    }
}

#[async_trait]
impl MetaStore for EtcdStore {
    async fn get(
        &self,
        keys: &[Key],
        at: Option<Revision>,
    ) -> Result<(Revision, Vec<Option<Versioned>>), Error> {
        self.shared.get(keys, at).await
    }

    async fn scan(
        &self,
        range: KeyRange,
        limit: usize,
        at: Option<Revision>,
    ) -> Result<(Revision, Page), Error> {
        self.shared.scan(range, limit, at).await
    }

    async fn commit(&self, plan: Plan) -> Result<Revision, CommitError> {
        plan.check().map_err(CommitError::Refused)?;
        let shared = &self.shared;
        let _place = shared.commits.try_acquire().map_err(|_| {
            let message = "too many changes are on their way to etcd: try again";
            CommitError::Refused(Error::new(Reason::Overloaded, message).retry_after_ms(OVERLOADED_RETRY_MS))
        })?;
        let written: Vec<Key> = plan
            .mutations
            .iter()
            .filter(|mutation| matches!(mutation, cairn_core::plan::Mutation::Put(..)))
            .map(|mutation| mutation.key().clone())
            .collect();
        let before = shared.client.seen();
        let answer = match shared.client.txn(shared.layout.txn(plan)).await {
            Ok(answer) => answer,
            Err(failure) => return Err(self.failed(failure, &written, before).await),
        };
        let revision = shared.client.revision(answer.header.as_ref(), before);
        let revision = revision.map_err(CommitError::Unknown)?;
        if answer.succeeded {
            return shared.layout.revision(revision).map_err(CommitError::Unknown);
        }
        let Some(response_op::Response::ResponseRange(found)) =
            answer.responses.into_iter().next().and_then(|response| response.response)
        else {
            return Err(CommitError::Refused(malformed("an answer to another transaction")));
        };
        match found.kvs.first() {
            Some(store) if store.mod_revision == shared.layout.written => Err(CommitError::Conflict),
            _ => Err(CommitError::Refused(shared.superseded())),
        }
    }

    async fn watch(&self, prefix: Key, from: Revision) -> Result<Changes, Error> {
        watch::watch(self.shared.clone(), prefix, from).await
    }

    async fn revision(&self) -> Result<Revision, Error> {
        Ok(self.shared.get(&[], None).await?.0)
    }
}

impl Shared {
    /// What is told to whoever still runs on a store that has another life by now.
    fn superseded(&self) -> Error {
        Error::unavailable(format!(
            "the store {} was moved away or got a higher generation: this directory must not go on with it; restart it",
            self.options.address
        ))
    }
}

/// Why no directory may serve what is there.
fn unfit(state: Option<State>, options: &EtcdOptions) -> Error {
    let address = &options.address;
    match state {
        None => Error::not_found(format!("there is no store at {address}")),
        Some(State::Filling) => Error::not_found(format!(
            "the store {address} was not filled to its end: repeat the migration that began it"
        )),
        Some(State::Moving) => {
            let message =
                format!("moving the store {address} was begun and did not end: repeat the migration");
            Error::new(Reason::Conflict, message)
        }
        Some(State::Moved | State::Complete) => {
            let message = format!("the store {address} was moved away: start the directory where it went");
            Error::new(Reason::Conflict, message)
        }
    }
}

/// The record of the identity, and when it was written.
async fn stored(client: &Client, names: &Names) -> Result<Option<(Identity, i64)>> {
    let before = client.seen();
    let read = read::range(client, one(names.store.clone())).await.map_err(Failure::into_error)?;
    client.revision(read.header.as_ref(), before)?;
    let Some(kv) = read.kvs.into_iter().next() else { return Ok(None) };
    let identity = Identity::read(&kv.value, &String::from_utf8_lossy(&names.store))?;
    Ok(Some((identity, kv.mod_revision)))
}

async fn check_version(client: &Client) -> Result<()> {
    let status = client.status().await.map_err(Failure::into_error)?;
    let mut parts = status.version.split('.').map(|part| part.parse::<u32>().unwrap_or_default());
    let version = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    if version < VERSION_MIN {
        return Err(Error::new(
            Reason::NotSupported,
            format!(
                "etcd has version '{}', at least {}.{} is needed: use a newer one",
                status.version, VERSION_MIN.0, VERSION_MIN.1
            ),
        ));
    }
    tracing::info!(
        version = status.version,
        database_bytes = status.db_size,
        in_use_bytes = status.db_size_in_use,
        "etcd answers"
    );
    Ok(())
}
