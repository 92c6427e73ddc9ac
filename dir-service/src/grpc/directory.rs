//! `DirectoryService`: names, versions and locks.

use crate::{
    gate::Gate,
    ops::{commit, create, delete, list, lock, lookup, rename, set_attributes, watch},
};
use cairn_proto::v1::{self, directory_service_server::DirectoryService};
use futures::{StreamExt, stream::BoxStream};
use std::sync::Arc;
use tonic::{Request, Response, Status};

/// Serves the namespace while the gate is open.
#[derive(Debug)]
pub struct DirectoryHandler {
    gate: Arc<Gate>,
}

impl DirectoryHandler {
    /// Behind a gate.
    pub fn new(gate: Arc<Gate>) -> Self {
        Self { gate }
    }
}

macro_rules! unary {
    ($($method:ident($request:ident) -> $response:ident = $operation:path;)*) => {
        #[tonic::async_trait]
        impl DirectoryService for DirectoryHandler {
            type WatchStream = BoxStream<'static, Result<v1::WatchResponse, Status>>;

            $(
                async fn $method(
                    &self,
                    request: Request<v1::$request>,
                ) -> Result<Response<v1::$response>, Status> {
                    let directory = self.gate.directory()?;
                    Ok(Response::new($operation(&directory, request.into_inner()).await?))
                }
            )*

            async fn watch(
                &self,
                request: Request<v1::WatchRequest>,
            ) -> Result<Response<Self::WatchStream>, Status> {
                let directory = self.gate.directory()?;
                let changes = watch::watch(&directory, request.into_inner()).await?;
                Ok(Response::new(changes.map(|change| change.map_err(Status::from)).boxed()))
            }
        }
    };
}

unary! {
    lookup(LookupRequest) -> LookupResponse = lookup::lookup;
    lookup_many(LookupManyRequest) -> LookupManyResponse = lookup::lookup_many;
    list(ListRequest) -> ListResponse = list::list;
    lock(LockRequest) -> LockResponse = lock::lock;
    renew_lock(RenewLockRequest) -> RenewLockResponse = lock::renew_lock;
    unlock(UnlockRequest) -> UnlockResponse = lock::unlock;
    list_locks(ListLocksRequest) -> ListLocksResponse = lock::list_locks;
    commit(CommitRequest) -> CommitResponse = commit::commit;
    create(CreateRequest) -> CreateResponse = create::create;
    delete(DeleteRequest) -> DeleteResponse = delete::delete;
    rename(RenameRequest) -> RenameResponse = rename::rename;
    set_attributes(SetAttributesRequest) -> SetAttributesResponse = set_attributes::set_attributes;
}
