//! `Rename`: another name.

use super::{
    held::{Held, ancestors, children, inode_read},
    resolve::resolve,
    transact::{Operation, transact},
    view::View,
};
use crate::directory::Directory;
use async_trait::async_trait;
use cairn_core::{
    attributes::{attributes, check_condition},
    key,
    namespace::{
        remove::Children,
        rename::{self, Rename, Replaced},
    },
    plan::Plan,
};
use cairn_proto::{Error, Result, path::FilePath, v1};

struct RenameName<'a> {
    directory: &'a Directory,
    request: &'a v1::RenameRequest,
    from: FilePath,
    to: FilePath,
    trash_id: u64,
}

/// Gives a file or directory another name.
///
/// # Errors
/// As the contract says.
pub async fn rename(directory: &Directory, request: v1::RenameRequest) -> Result<v1::RenameResponse> {
    let from = FilePath::parse(&request.from)?;
    let to = FilePath::parse(&request.to)?;
    let trash_id = directory.ids.next().await?;
    directory.cluster.pace().await;
    let operation = RenameName { directory, request: &request, from, to, trash_id };
    transact(&directory.store, request.request_id.as_ref(), &request, &operation).await
}

#[async_trait]
impl Operation for RenameName<'_> {
    type Response = v1::RenameResponse;

    async fn decide(&self, view: &View) -> Result<(Plan, Self::Response)> {
        let (from_path, to_path) = (self.from.to_string(), self.to.to_string());
        let from = resolve(view, &self.from).await?;
        let source = from.existing()?;
        let (from_parent, from_name) = from.name()?;
        check_condition(self.request.source_condition.as_ref(), &from_path, Some(&source.inode.record))?;

        if self.to != self.from && self.to.starts_with(&self.from) {
            return Err(
                Error::invalid(format!("{from_path}: cannot be moved into itself ({to_path})")).at(from_path)
            );
        }
        let to = resolve(view, &self.to).await?;
        let (to_parent, to_name) = to.name()?;
        if self.to != self.from {
            check_condition(
                self.request.condition.as_ref(),
                &to_path,
                to.found.as_ref().map(|found| &found.inode.record),
            )?;
        }

        let source_lock = Held::of_inode(self.directory, view, source.id, self.request.token).await?;
        let reservation =
            Held::of_name(self.directory, view, to_parent.id, to_name, self.request.replaced_token).await?;
        let replaced_lock = match &to.found {
            Some(found) => {
                Some(Held::of_inode(self.directory, view, found.id, self.request.replaced_token).await?)
            }
            None => None,
        };
        let replaced_children = match &to.found {
            Some(found) => children(view, found).await?,
            None => Children::default(),
        };
        let replaced = match (&to.dentry, &to.found, &replaced_lock) {
            (Some(dentry), Some(found), Some(lock)) => Some(Replaced {
                dentry_revision: dentry.revision,
                inode: inode_read(found),
                lock: lock.guard(),
                children: replaced_children,
            }),
            _ => None,
        };
        let (above, tree_epoch) = if source.is_directory() {
            let epoch = view.get(&key::tree_epoch()).await?.map(|versioned| versioned.revision);
            (ancestors(view, to_parent).await?, epoch)
        } else {
            (Vec::new(), None)
        };
        let from_revision = from.dentry.as_ref().map(|dentry| dentry.revision).unwrap_or_default();
        let (mut plan, inode) = rename::rename(&Rename {
            from_path: &from_path,
            to_path: &to_path,
            from_parent: from_parent.id,
            from_name,
            from_revision,
            source: inode_read(source),
            source_lock: source_lock.guard(),
            to_parent: to_parent.id,
            to_name,
            replaced,
            reservation: reservation.guard(),
            ancestors: &above,
            tree_epoch,
            trash_id: self.trash_id,
            now_ns: self.directory.host.clock.unix_ns(),
        })?;
        if !plan.mutations.is_empty() {
            from.require_way(view, &mut plan).await?;
            to.require_way(view, &mut plan).await?;
        }
        let response = v1::RenameResponse { attributes: Some(attributes(source.id, &inode)), revision: 0 };
        Ok((plan, response))
    }
}
