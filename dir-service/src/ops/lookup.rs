//! `Lookup`: attributes, extents and who has them, all at one revision.

use super::{
    extents,
    list::{shown, shown_attributes},
    resolve::existing,
    view::View,
};
use crate::directory::Directory;
use cairn_proto::{
    Error, Reason, Result, convert,
    limits::{PAGE_BYTES_MAX, PAGE_EXTENTS_MAX, QUESTIONS_MAX},
    v1::{self, lookup_answer::Outcome},
};
use prost::Message as _;
use std::collections::BTreeSet;

/// Looks a path or inode up.
///
/// # Errors
/// As the contract says.
pub async fn lookup(directory: &Directory, request: v1::LookupRequest) -> Result<v1::LookupResponse> {
    let (mut response, groups) = find(directory, request).await?;
    response.groups = members(directory, groups);
    response.servers = directory.cluster.members(&response.groups);
    Ok(response)
}

fn members(directory: &Directory, groups: BTreeSet<u64>) -> Vec<v1::Group> {
    groups.into_iter().filter_map(|group| directory.cluster.group(group.into())).collect()
}

/// All of an answer but groups and servers, and which groups those are.
async fn find(
    directory: &Directory,
    request: v1::LookupRequest,
) -> Result<(v1::LookupResponse, BTreeSet<u64>)> {
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
    let mut groups = BTreeSet::new();
    if request.with_extents && !found.is_directory() {
        let (extents, next_page_token) =
            extents::page(&view, &found, request.offset, request.length, &request.page_token).await?;
        groups = extents.iter().map(|extent| extent.group).collect();
        directory.cluster.know(&groups).await?;
        response.extents = extents.iter().map(extents::to_wire).collect();
        response.next_page_token = next_page_token;
    }
    response.revision = view.revision().unwrap_or_default().0;
    Ok((response, groups))
}

/// Looks several paths or inodes up, each as [`lookup`] does, until the answer is large enough.
///
/// # Errors
/// `LIMIT_EXCEEDED` for too many at once, `INVALID_ARGUMENT` for none. What is wrong with one is its answer.
pub async fn lookup_many(
    directory: &Directory,
    request: v1::LookupManyRequest,
) -> Result<v1::LookupManyResponse> {
    let count = request.lookups.len();
    if count > QUESTIONS_MAX {
        return Err(Error::limit(format!(
            "{count} lookups in one call, at most {QUESTIONS_MAX} are allowed"
        )));
    }
    if count == 0 {
        return Err(Error::invalid("a call for several lookups has none"));
    }
    let mut response = v1::LookupManyResponse::default();
    let mut bytes = 0;
    let mut all = BTreeSet::new();
    for request in request.lookups {
        let (outcome, groups) = match find(directory, request).await {
            Ok((found, groups)) => (Outcome::Found(found), groups),
            Err(error) => (Outcome::Error(error.to_wire()), BTreeSet::new()),
        };
        let answer = v1::LookupAnswer { outcome: Some(outcome) };
        bytes += answer.encoded_len();
        all.extend(groups);
        let is_full = bytes > PAGE_BYTES_MAX || all.len() > PAGE_EXTENTS_MAX;
        if is_full && !response.answers.is_empty() {
            break;
        }
        response.answers.push(answer);
    }
    response.groups = members(directory, all);
    response.servers = directory.cluster.members(&response.groups);
    Ok(response)
}
