//! Where each chunk of a file is, and why.

use crate::{
    cluster::status::copies_of,
    directory::Directory,
    ops::{lookup, view::View},
    store::KeyRange,
};
use cairn_core::{
    key::{self, RUN_CHUNKS},
    record::{ChunkRun, Inode, Lock, Record},
};
use cairn_proto::{
    Result,
    convert::required,
    id::{ChunkId, GroupId, InodeId, Revision},
    v1,
};
use std::{collections::BTreeMap, ops::Bound};

/// Explains a file, a page of its chunks at a time.
///
/// # Errors
/// As `Lookup`.
pub async fn explain(directory: &Directory, request: v1::ExplainRequest) -> Result<v1::ExplainResponse> {
    let found = lookup::lookup(
        directory,
        v1::LookupRequest {
            path: request.path.clone(),
            page_token: request.page_token,
            with_extents: true,
            ..Default::default()
        },
    )
    .await?;
    let attributes = required(found.attributes, "attributes")?;
    let inode = InodeId(attributes.inode);
    let ids = found.extents.iter().filter_map(|extent| extent.chunk?.chunk.map(ChunkId::from));
    let written = written(directory, ids).await?;
    let chunks = found
        .extents
        .into_iter()
        .filter_map(|extent| {
            let chunk = extent.chunk?;
            let id = ChunkId::from(chunk.chunk?);
            let explained =
                copies_of(&directory.cluster, id, GroupId(chunk.group_id), written.get(&id).copied());
            Some(v1::ChunkStatus {
                extent: Some(extent),
                group: explained.group,
                copies: explained.copies,
                reason: explained.reason,
                next_repair: explained.next_repair,
            })
        })
        .collect();
    let (_, values) = directory.store.get(&[key::lock(inode), key::inode(inode)], None).await?;
    let mut locks = Vec::new();
    if let Some(Some(value)) = values.first() {
        let lock = Lock::from_bytes(&value.value)?;
        locks = lock
            .holders
            .iter()
            .map(|holder| v1::LockInfo {
                path: lock.path.clone(),
                inode: inode.0,
                mode: lock.mode,
                token: Some(holder.token(value.revision).into()),
                session_id: holder.session,
                owner: holder.owner.clone(),
                expires_in_ms: directory.sessions.expires_in_ms(cairn_proto::id::SessionId(holder.session)),
            })
            .collect();
    }
    let replication = replication(directory, &request.path, values.get(1).and_then(Option::as_ref)).await?;
    Ok(v1::ExplainResponse {
        attributes: Some(attributes),
        chunks,
        next_page_token: found.next_page_token,
        locks,
        replication,
    })
}

/// When the records of chunks were written.
async fn written(
    directory: &Directory,
    chunks: impl Iterator<Item = ChunkId>,
) -> Result<BTreeMap<ChunkId, Revision>> {
    let view = View::new(directory.store.clone());
    let mut written = BTreeMap::new();
    for chunk in chunks {
        if written.contains_key(&chunk) {
            continue;
        }
        for (first, run, revision) in runs_near(&view, chunk).await? {
            let indexes = (first.index..).take(run.chunks.len());
            written.extend(indexes.map(|index| (ChunkId::new(chunk.grant.0, index), revision)));
        }
    }
    Ok(written)
}

/// All runs that could hold a chunk: they begin in the same [`RUN_CHUNKS`] indexes, and none crosses them.
///
/// # Errors
/// As the store.
pub(crate) async fn runs_near(view: &View, chunk: ChunkId) -> Result<Vec<(ChunkId, ChunkRun, Revision)>> {
    let first = chunk.index / RUN_CHUNKS * RUN_CHUNKS;
    let range = KeyRange {
        start: Bound::Included(key::chunk_run(ChunkId::new(chunk.grant.0, first))),
        end: Bound::Included(key::chunk_run(ChunkId::new(chunk.grant.0, first + (RUN_CHUNKS - 1)))),
    };
    let page = view.scan_range(range, RUN_CHUNKS as usize).await?;
    let mut runs = Vec::new();
    for (key, value) in &page.entries {
        if let Some(first) = key::last_chunk(key) {
            runs.push((first, ChunkRun::from_bytes(&value.value)?, value.revision));
        }
    }
    Ok(runs)
}

/// The factor for new bytes: the file's own, else that of the nearest directory above it, else the cluster's.
async fn replication(
    directory: &Directory,
    path: &str,
    inode: Option<&cairn_core::plan::Versioned>,
) -> Result<u32> {
    if let Some(value) = inode {
        let own = Inode::from_bytes(&value.value)?.replication;
        if own != 0 {
            return Ok(own);
        }
    }
    let mut above = path.trim_end_matches('/');
    while let Some((parent, _)) = above.rsplit_once('/') {
        above = parent;
        let path = if parent.is_empty() { "/" } else { parent };
        let found =
            lookup::lookup(directory, v1::LookupRequest { path: path.into(), ..Default::default() }).await?;
        if let Some(attributes) = found.attributes
            && attributes.replication != 0
        {
            return Ok(attributes.replication);
        }
    }
    Ok(directory.cluster.replication_default())
}
