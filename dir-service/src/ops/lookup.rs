//! `Lookup`: attributes, extents and who has them, all at one revision.

use super::{
    extents,
    list::{shown, shown_attributes},
    resolve::existing,
    view::View,
};
use crate::directory::Directory;
use cairn_proto::{Error, Reason, Result, convert, v1};
use std::collections::BTreeSet;

/// Looks a path or inode up.
///
/// # Errors
/// As the contract says.
pub async fn lookup(directory: &Directory, request: v1::LookupRequest) -> Result<v1::LookupResponse> {
    let target = convert::target(&request.path, request.inode)?;
    let view = View::new(directory.store.clone());
    let found = existing(&view, &target).await?;
    let inode = &found.inode.record;
    if request.version != 0 && request.version != inode.version {
        let shown = shown(&target);
        let mut error = Error::new(
            Reason::VersionGone,
            format!("{shown}: version {} is gone, {} is current", request.version, inode.version),
        )
        .at(shown);
        error.detail.current_version = inode.version;
        return Err(error);
    }
    let mut response = v1::LookupResponse {
        attributes: Some(shown_attributes(&view, &found).await?),
        layout_revision: found.inode.revision.0,
        ..Default::default()
    };
    if request.with_extents && !found.is_directory() {
        let (extents, next_page_token) =
            extents::page(&view, &found, request.offset, request.length, &request.page_token).await?;
        let groups: BTreeSet<u64> = extents.iter().map(|extent| extent.group).collect();
        response.groups =
            groups.into_iter().filter_map(|group| directory.cluster.group(group.into())).collect();
        response.servers = directory.cluster.members(&response.groups);
        response.extents = extents.iter().map(extents::to_wire).collect();
        response.next_page_token = next_page_token;
    }
    response.revision = view.revision().unwrap_or_default().0;
    Ok(response)
}
