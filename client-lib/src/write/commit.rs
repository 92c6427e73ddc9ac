//! Receipts become a version. Chunks that too few current members hold are fetched by them first.

use crate::{client::Core, directory, write::store::Stored};
use cairn_proto::{Error, Reason, Result, id::ServerId, limits, v1};
use futures::{StreamExt as _, stream};
use std::{collections::BTreeMap, sync::Arc, time::Duration};

/// Longest that members may take to fetch what they miss.
const FETCH_PATIENCE: Duration = Duration::from_secs(20);

impl Core {
    /// Commits; when chunks are misplaced, has them fetched and commits again without sending bytes again. `receipts`
    /// are completed by the holders this adds.
    ///
    /// # Errors
    /// As `DirectoryService.Commit`; `LIMIT_EXCEEDED` for too many edits or receipts.
    pub async fn commit(self: &Arc<Self>, mut message: v1::CommitRequest) -> Result<v1::CommitResponse> {
        if message.edits.len() > limits::COMMIT_EDITS_MAX
            || message.receipts.len() > limits::COMMIT_RECEIPTS_MAX
        {
            return Err(Error::limit(format!(
                "a version of {} edits and {} chunks is more than one commit takes ({} and {}): commit in between",
                message.edits.len(),
                message.receipts.len(),
                limits::COMMIT_EDITS_MAX,
                limits::COMMIT_RECEIPTS_MAX
            ))
            .at(message.path));
        }
        let mut attempts = self.retry.start();
        loop {
            let answer = self
                .sessions
                .mutate(
                    Duration::ZERO,
                    |id, _| v1::CommitRequest { request_id: Some(id), ..message.clone() },
                    |channel, request| async move { directory::names(channel).commit(request).await },
                )
                .await;
            let error = match answer {
                Err(error) if error.reason == Reason::Misplaced => error,
                answer => return answer.map_err(|error| error.at(message.path)),
            };
            self.learn(&error.detail.groups, &error.detail.servers);
            let placed = self.place(&error.detail, &mut message.receipts).await;
            tracing::debug!(chunks = error.detail.chunks.len(), placed, "chunks were misplaced at commit");
            attempts.pause_after_any(error.at(message.path.as_str())).await?;
        }
    }

    /// Has current members fetch the chunks they miss; says how many copies this made.
    async fn place(&self, detail: &v1::ErrorDetail, receipts: &mut [v1::Receipt]) -> usize {
        let Ok(session) = self.sessions.get().await else { return 0 };
        // Which member is to fetch which chunks from whom.
        let mut orders: BTreeMap<(u64, u64, u64), Vec<v1::ChunkRef>> = BTreeMap::new();
        for chunk in &detail.chunks {
            let Some(receipt) = receipts.iter().find(|receipt| receipt.chunk == chunk.chunk) else {
                continue;
            };
            let Some(group) = self.groups.get(&receipt.group_id) else { continue };
            let source = receipt
                .holder_ids
                .iter()
                .copied()
                .find(|id| !self.servers.is_avoided(ServerId(*id)))
                .or(receipt.holder_ids.first().copied());
            let Some(source) = source else { continue };
            for seat in &group.seats {
                if seat.server_id != 0 && !receipt.holder_ids.contains(&seat.server_id) {
                    orders.entry((seat.server_id, group.id, source)).or_default().push(*chunk);
                }
            }
        }
        let cluster_id = session.cluster_id.as_str();
        let stored: Vec<(u64, v1::ChunkId)> = stream::iter(orders)
            .map(|((member, group_id, source), chunks)| async move {
                let order = tokio::time::timeout(
                    FETCH_PATIENCE,
                    self.order_fetch(cluster_id, member, group_id, source, chunks),
                );
                match order.await {
                    Ok(Ok(stored)) => stored.into_iter().map(|chunk| (member, chunk)).collect(),
                    Ok(Err(error)) => {
                        tracing::debug!(member, %error, "a member could not fetch what it misses");
                        Vec::new()
                    }
                    Err(_) => Vec::new(),
                }
            })
            .buffer_unordered(8)
            .concat()
            .await;
        for (member, chunk) in &stored {
            if let Some(receipt) = receipts.iter_mut().find(|receipt| receipt.chunk.as_ref() == Some(chunk)) {
                receipt.holder_ids.push(*member);
            }
        }
        stored.len()
    }

    async fn order_fetch(
        &self,
        cluster_id: &str,
        member: u64,
        group_id: u64,
        source: u64,
        chunks: Vec<v1::ChunkRef>,
    ) -> Result<Vec<v1::ChunkId>> {
        let unknown = |id: u64| Error::unavailable(format!("no endpoint of file server {id} is known"));
        let link = self.servers.get(ServerId(member)).ok_or_else(|| unknown(member))?;
        let source = self.servers.get(ServerId(source)).ok_or_else(|| unknown(source))?.server();
        let group = self.groups.get(&group_id).map(|group| (*group).clone());
        let mut stored = Vec::new();
        for part in chunks.chunks(limits::ORDER_CHUNKS_MAX) {
            let message = v1::FetchFromPrimaryRequest {
                cluster_id: cluster_id.to_owned(),
                group: group.clone(),
                source: Some((*source).clone()),
                chunks: part.to_vec(),
            };
            let failed = |status| link.judge(crate::retry::restore(status, &link.name()));
            let request = link.request(message);
            let mut answers = link.small()?.fetch_from_primary(request).await.map_err(failed)?.into_inner();
            while let Some(answer) = answers.message().await.map_err(failed)? {
                match answer.chunk {
                    Some(chunk) if answer.stored => stored.push(chunk),
                    _ => tracing::debug!(member, error = answer.error, "a chunk could not be fetched"),
                }
            }
        }
        Ok(stored)
    }
}

/// Edits that replace all content by `stored`.
pub(crate) fn replace_all(stored: Option<&Stored>) -> Vec<v1::Edit> {
    let truncate = v1::Edit { edit: Some(v1::edit::Edit::Truncate(v1::TruncateEdit { length: 0 })) };
    let write = stored.map(|stored| v1::Edit {
        edit: Some(v1::edit::Edit::Write(v1::WriteEdit {
            offset: 0,
            length: stored.receipt.length,
            receipt_index: 0,
            chunk_offset: 0,
        })),
    });
    std::iter::once(truncate).chain(write).collect()
}
