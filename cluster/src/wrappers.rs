//! What a program puts between the services of an embedded cluster and their disks, networks and stores.

use cairn_proto::net::Connect;
use dir_service::store::{MetaStore, StoreWrapper};
use disk::Disk;
use file_service::chunks::ChunkStore;
use std::{fmt, sync::Arc};

/// Who has a disk or a network in an embedded cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// The directory; the first where several share a store.
    Directory,
    /// A further one of several that share a store, with its index, from 1.
    FurtherDirectory(usize),
    /// The file server with this index, from 0.
    FileServer(usize),
    /// A client; it has no disk.
    Client,
}

impl Role {
    /// The member's name, which is also that of its data folder.
    pub(crate) fn name(self) -> String {
        match self {
            Self::Directory => "directory".to_owned(),
            Self::FurtherDirectory(index) => format!("directory-{}", index + 1),
            Self::FileServer(index) => format!("file-server-{}", index + 1),
            Self::Client => "client".to_owned(),
        }
    }
}

type Wrap<W, T> = Arc<dyn Fn(W, Arc<T>) -> Arc<T> + Send + Sync>;

/// All wrappers of a cluster; what is not given stays as it is.
#[derive(Clone, Default)]
pub(crate) struct Wrappers {
    pub(crate) disk: Option<Wrap<Role, dyn Disk>>,
    pub(crate) network: Option<Wrap<Role, dyn Connect>>,
    pub(crate) chunk_store: Option<Wrap<usize, dyn ChunkStore>>,
    pub(crate) store: StoreWrapper,
    pub(crate) shared_store: Option<Wrap<usize, dyn MetaStore>>,
}

impl Wrappers {
    pub(crate) fn disk(&self, role: Role, disk: Arc<dyn Disk>) -> Arc<dyn Disk> {
        match &self.disk {
            Some(wrap) => wrap(role, disk),
            None => disk,
        }
    }

    pub(crate) fn network(&self, role: Role, network: Arc<dyn Connect>) -> Arc<dyn Connect> {
        match &self.network {
            Some(wrap) => wrap(role, network),
            None => network,
        }
    }

    pub(crate) fn chunk_store(&self, index: usize, store: Arc<dyn ChunkStore>) -> Arc<dyn ChunkStore> {
        match &self.chunk_store {
            Some(wrap) => wrap(index, store),
            None => store,
        }
    }

    /// The store that several directories share, as the one with this index sees it.
    pub(crate) fn shared_store(&self, index: usize, store: Arc<dyn MetaStore>) -> Arc<dyn MetaStore> {
        match &self.shared_store {
            Some(wrap) => wrap(index, store),
            None => store,
        }
    }

    /// The wrapper goes around what is there already.
    pub(crate) fn set_chunk_store(
        &mut self,
        wrap: impl Fn(usize, Arc<dyn ChunkStore>) -> Arc<dyn ChunkStore> + Send + Sync + 'static,
    ) {
        let within = self.chunk_store.take();
        self.chunk_store = Some(Arc::new(move |index, store| match &within {
            Some(within) => wrap(index, within(index, store)),
            None => wrap(index, store),
        }));
    }

    pub(crate) fn set_store(
        &mut self,
        wrap: impl Fn(Arc<dyn MetaStore>) -> Arc<dyn MetaStore> + Send + Sync + 'static,
    ) {
        self.store = StoreWrapper::new(wrap);
    }
}

impl fmt::Debug for Wrappers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wrappers")
            .field("disk", &self.disk.is_some())
            .field("network", &self.network.is_some())
            .field("chunk_store", &self.chunk_store.is_some())
            .field("store", &self.store)
            .field("shared_store", &self.shared_store.is_some())
            .finish()
    }
}
