//! `Create`: an empty file or a directory.

use super::{
    held::{Held, inode_read},
    resolve::resolve,
    transact::{Operation, transact},
    view::View,
};
use crate::directory::Directory;
use async_trait::async_trait;
use cairn_core::{
    attributes::{attributes, check_condition, check_mode},
    namespace::create::{self, Create},
    plan::Plan,
};
use cairn_proto::{Error, Result, convert, id::InodeId, path::FilePath, v1};

struct CreateName<'a> {
    directory: &'a Directory,
    request: &'a v1::CreateRequest,
    path: FilePath,
    kind: v1::Kind,
    id: InodeId,
}

/// Makes an empty file or a directory.
///
/// # Errors
/// As the contract says.
pub async fn create(directory: &Directory, request: v1::CreateRequest) -> Result<v1::CreateResponse> {
    let path = FilePath::parse(&request.path)?;
    let kind = match request.kind() {
        v1::Kind::Unspecified => {
            return Err(Error::invalid("say whether to make a file or a directory").at(&request.path));
        }
        kind => kind,
    };
    convert::xattrs(&request.xattrs)?;
    check_mode(request.mode).map_err(|error| error.at(&request.path))?;
    let id = InodeId(directory.ids.next().await?);
    directory.cluster.pace().await;
    let operation = CreateName { directory, request: &request, path, kind, id };
    transact(&directory.store, request.request_id.as_ref(), &request, &operation).await
}

#[async_trait]
impl Operation for CreateName<'_> {
    type Response = v1::CreateResponse;

    async fn decide(&self, view: &View) -> Result<(Plan, Self::Response)> {
        let path = self.path.to_string();
        let resolved = resolve(view, &self.path).await?;
        let existing = resolved.found.as_ref().map(|found| &found.inode.record);
        check_condition(self.request.condition.as_ref(), &path, existing)?;
        if self.path.is_root() {
            return Err(Error::new(cairn_proto::Reason::AlreadyExists, "/: exists already").at("/"));
        }
        let (parent, name) = resolved.name()?;
        let held = Held::of_name(self.directory, view, parent.id, name, self.request.token).await?;
        let (mut plan, inode) = create::create(&Create {
            path: &path,
            parent: inode_read(parent),
            name,
            existing,
            reservation: held.guard(),
            kind: self.kind,
            id: self.id,
            mode: self.request.mode,
            replication: self.request.replication,
            xattrs: &self.request.xattrs,
            mtime_ns: self.request.mtime_ns,
            generation: self.directory.generation,
            now_ns: self.directory.host.clock.unix_ns(),
        })?;
        resolved.require_way(view, &mut plan).await?;
        let response = v1::CreateResponse { attributes: Some(attributes(self.id, &inode)), revision: 0 };
        Ok((plan, response))
    }
}
