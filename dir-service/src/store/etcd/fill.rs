//! Filling a new store on etcd with the records of another one.

use super::{
    EtcdStore, FOREIGN_REVISIONS_MAX, Failure,
    api::{Compare, DeleteRangeRequest, RangeRequest, RequestOp, TxnRequest, request_op},
    check_version,
    client::Client,
    identity::{Identity, State},
    layout::{Names, TXN_OPS_MAX, absent, all_absent, one, put, written_at},
    options::EtcdOptions,
    read::range,
    stored,
};
use crate::store::{MetaStore, StoreIdentity};
use bytes::Bytes;
use cairn_core::plan::{Key, PLAN_BYTES_MAX};
use cairn_proto::{Error, Reason, Result, id::Revision, net::Connect};
use futures::{FutureExt as _, StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use std::{fmt, sync::Arc};

/// Transactions on their way at a time.
const LOADS_MAX: usize = 8;
/// Attempts of each where the outcome of one is not known: it writes the same again.
const LOAD_ATTEMPTS: usize = 5;
/// Records of an interrupted filling that are removed at a time.
const CLEAR_KEYS: i64 = 1_000;

/// A store that is being filled; until [`EtcdFill::finish`] no directory opens it, and filling begins again.
pub struct EtcdFill {
    client: Arc<Client>,
    names: Names,
    options: EtcdOptions,
    network: Arc<dyn Connect>,
    identity: StoreIdentity,
    /// etcd's revision of the record of the incomplete store.
    written: i64,
    batch: Vec<RequestOp>,
    bytes: usize,
    loading: FuturesUnordered<BoxFuture<'static, Result<()>>>,
}

impl fmt::Debug for EtcdFill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdFill").field("address", &self.options.address.to_string()).finish_non_exhaustive()
    }
}

impl EtcdFill {
    /// Begins a store under the prefix, where nothing is yet but what an interrupted filling left.
    ///
    /// # Errors
    /// `ALREADY_EXISTS` when a store or something else is there; as etcd's.
    pub async fn begin(
        options: EtcdOptions,
        network: Arc<dyn Connect>,
        identity: StoreIdentity,
    ) -> Result<Self> {
        let client = Arc::new(Client::new(options.clone(), network.clone(), 0));
        check_version(&client).await?;
        let names = Names::under(&options.address.prefix);
        let unfinished = Identity { store: identity.clone(), state: State::Filling, start: Revision(0) };
        unfinished.check()?;
        let occupied = |what: &str| {
            Error::new(
                Reason::AlreadyExists,
                format!("{} has {what} already: name another prefix", options.address),
            )
        };
        let compare = match stored(&client, &names).await? {
            Some((found, _)) if found.state != State::Filling => {
                let whose = format!("a store of cluster {}", found.store.cluster_id);
                return Err(occupied(&whose));
            }
            Some((_, written)) => vec![written_at(names.store.clone(), written)],
            None => vec![absent(names.store.clone()), all_absent(names.prefix(&Key::new()))],
        };
        let write = vec![put(names.store.clone(), unfinished.encode())];
        let written = apply(&client, compare, write).await?.ok_or_else(|| occupied("something"))?;
        let (batch, loading) = (Vec::new(), FuturesUnordered::new());
        let filling = Self { client, names, options, network, identity, written, batch, bytes: 0, loading };
        filling.clear().await?;
        Ok(filling)
    }

    /// Adds a record.
    ///
    /// # Errors
    /// As etcd's; `CONFLICT` when somebody else fills the same store.
    pub async fn load(&mut self, key: &[u8], value: Bytes) -> Result<()> {
        let bytes = self.names.data.len() + key.len() + value.len();
        if self.batch.len() == TXN_OPS_MAX || self.bytes + bytes > PLAN_BYTES_MAX {
            self.flush().await?;
        }
        self.bytes += bytes;
        self.batch.push(put(self.names.record(key), value));
        Ok(())
    }

    /// What was loaded, to be looked at and made fit before [`EtcdFill::finish`]. Its revisions are not those that it has then.
    ///
    /// # Errors
    /// As [`EtcdFill::load`].
    pub async fn view(&mut self) -> Result<Arc<dyn MetaStore>> {
        self.drain().await?;
        let client = Client::new(self.options.clone(), self.network.clone(), 0);
        let identity = Identity { store: self.identity.clone(), state: State::Filling, start: Revision(0) };
        let (options, names) = (self.options.clone(), self.names.clone());
        Ok(Arc::new(EtcdStore::start(options, client, names, identity, self.written)))
    }

    /// Makes it a whole store, whose revisions go on behind `behind`.
    ///
    /// # Errors
    /// As [`EtcdFill::load`].
    pub async fn finish(mut self, behind: Revision) -> Result<()> {
        self.drain().await?;
        // Every record gets a revision behind those of where it came from, and before the start: as many as were written here.
        let request = RangeRequest { count_only: true, ..one(self.names.store.clone()) };
        let now = range(&self.client, request).await.map_err(Failure::into_error)?;
        self.client.revision(now.header.as_ref(), self.client.seen())?;
        let took = u64::try_from(self.client.seen() - self.written).unwrap_or_default();
        let start = Revision(behind.0.saturating_add(took).saturating_add(FOREIGN_REVISIONS_MAX));
        let identity = Identity { store: self.identity, state: State::Complete, start };
        let compare = vec![written_at(self.names.store.clone(), self.written)];
        let write = vec![put(self.names.store.clone(), identity.encode())];
        if apply(&self.client, compare, write).await?.is_some() {
            return Ok(());
        }
        // An attempt whose answer was lost may have done it.
        match stored(&self.client, &self.names).await? {
            Some((found, _)) if found == identity => Ok(()),
            _ => Err(elsewhere(&self.options)),
        }
    }

    /// Removes what an interrupted filling left, in steps.
    async fn clear(&self) -> Result<()> {
        let (start, end) = self.names.prefix(&Key::new());
        loop {
            let request = RangeRequest {
                key: start.clone(),
                range_end: end.clone(),
                limit: CLEAR_KEYS,
                keys_only: true,
                ..Default::default()
            };
            let found = range(&self.client, request).await.map_err(Failure::into_error)?;
            let Some(last) = found.kvs.last() else { return Ok(()) };
            let remove = DeleteRangeRequest {
                key: start.clone(),
                range_end: [&last.key[..], &[0]].concat().into(),
                ..Default::default()
            };
            let remove = RequestOp { request: Some(request_op::Request::RequestDeleteRange(remove)) };
            self.step(vec![remove]).await?;
        }
    }

    /// Waits until everything is there.
    async fn drain(&mut self) -> Result<()> {
        self.flush().await?;
        while let Some(done) = self.loading.next().await {
            done?;
        }
        Ok(())
    }

    async fn flush(&mut self) -> Result<()> {
        while self.loading.len() >= LOADS_MAX {
            if let Some(done) = self.loading.next().await {
                done?;
            }
        }
        self.bytes = 0;
        let batch = std::mem::take(&mut self.batch);
        if !batch.is_empty() {
            self.loading.push(self.step(batch).boxed());
        }
        Ok(())
    }

    /// One transaction on the incomplete store, which may be repeated.
    fn step(&self, operations: Vec<RequestOp>) -> impl Future<Output = Result<()>> + Send + use<> {
        let (client, options) = (self.client.clone(), self.options.clone());
        let compare = vec![written_at(self.names.store.clone(), self.written)];
        async move { apply(&client, compare, operations).await?.ok_or_else(|| elsewhere(&options)).map(drop) }
    }
}

fn elsewhere(options: &EtcdOptions) -> Error {
    Error::new(Reason::Conflict, format!("somebody else fills the store {}", options.address))
}

/// Applies operations if the comparisons hold, again where it is not known whether they were; etcd's revision then.
async fn apply(client: &Client, compare: Vec<Compare>, success: Vec<RequestOp>) -> Result<Option<i64>> {
    let txn = TxnRequest { compare, success, failure: Vec::new() };
    let mut attempts = 0;
    loop {
        let before = client.seen();
        match client.txn(txn.clone()).await {
            Ok(answer) => {
                let revision = client.revision(answer.header.as_ref(), before)?;
                return Ok(answer.succeeded.then_some(revision));
            }
            Err(Failure::Lost(error)) if attempts < LOAD_ATTEMPTS => {
                tracing::debug!(%error, "writing to etcd again");
                attempts += 1;
            }
            Err(failure) => return Err(failure.into_error()),
        }
    }
}
