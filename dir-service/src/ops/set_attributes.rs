//! `SetAttributes`: mode, owner, times, replication, user metadata.

use super::{
    held::Held,
    resolve::resolve,
    transact::{Operation, transact},
    view::View,
};
use crate::directory::Directory;
use async_trait::async_trait;
use cairn_core::{
    attributes::{attributes, change_xattrs, check_condition, check_mode, check_replication, next_ctime},
    key,
    plan::{Plan, Precondition},
    record::Record,
};
use cairn_proto::{Result, convert, path::FilePath, v1};

struct SetAttributes<'a> {
    directory: &'a Directory,
    request: &'a v1::SetAttributesRequest,
    path: FilePath,
}

/// Changes attributes.
///
/// # Errors
/// As the contract says.
pub async fn set_attributes(
    directory: &Directory,
    request: v1::SetAttributesRequest,
) -> Result<v1::SetAttributesResponse> {
    let path = FilePath::parse(&request.path)?;
    check_mode(request.mode.unwrap_or_default()).map_err(|error| error.at(&request.path))?;
    for change in &request.xattrs {
        convert::xattrs(std::slice::from_ref(change))?;
    }
    directory.cluster.pace().await;
    let operation = SetAttributes { directory, request: &request, path };
    transact(&directory.store, request.request_id.as_ref(), &request, &operation).await
}

#[async_trait]
impl Operation for SetAttributes<'_> {
    type Response = v1::SetAttributesResponse;

    async fn decide(&self, view: &View) -> Result<(Plan, Self::Response)> {
        let request = self.request;
        let path = self.path.to_string();
        let resolved = resolve(view, &self.path).await?;
        let found = resolved.existing()?;
        check_condition(request.condition.as_ref(), &path, Some(&found.inode.record))?;
        let held = Held::of_inode(self.directory, view, found.id, request.token).await?;
        held.guard().check(&path)?;

        let mut inode = found.inode.record.clone();
        if let Some(mode) = request.mode {
            inode.mode = mode;
        }
        if let Some(replication) = request.replication {
            inode.replication = check_replication(replication)?;
        }
        inode.uid = request.uid.unwrap_or(inode.uid);
        inode.gid = request.gid.unwrap_or(inode.gid);
        inode.atime_ns = request.atime_ns.unwrap_or(inode.atime_ns);
        inode.mtime_ns = request.mtime_ns.unwrap_or(inode.mtime_ns);
        change_xattrs(&mut inode, &request.xattrs)?;
        inode.ctime_ns = next_ctime(&inode, self.directory.host.clock.unix_ns());

        let mut plan = Plan::new();
        let inode_key = key::inode(found.id);
        plan.require(Precondition::Unchanged(inode_key.clone(), Some(found.inode.revision)));
        // The name must still lead there, else the change would go to a file that was just replaced.
        if let (Some(parent), Some(dentry), Some(name)) =
            (&resolved.parent, &resolved.dentry, self.path.file_name())
        {
            plan.require(Precondition::Unchanged(
                key::dentry(parent.id, name.as_str()),
                Some(dentry.revision),
            ));
        }
        resolved.require_way(view, &mut plan).await?;
        held.place().require(&mut plan);
        plan.put(inode_key, inode.to_bytes());
        let response =
            v1::SetAttributesResponse { attributes: Some(attributes(found.id, &inode)), revision: 0 };
        Ok((plan, response))
    }
}
