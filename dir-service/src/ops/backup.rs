//! All records at one revision, for a copy outside of the cluster.

use crate::directory::Directory;
use cairn_proto::{Error, Reason, Result, checkpoint::EntrySum, limits::DATA_BYTES_MAX, v1};
use futures::{Stream, StreamExt as _};

/// When a caller comes back who found others backing up.
const RETRY_MS: u64 = 5_000;

/// Streams a backup, in messages of about [`DATA_BYTES_MAX`]. Commits go on; memory is a page of the index at a time.
///
/// # Errors
/// `RESOURCE_EXHAUSTED` while as many run as may, `NOT_SUPPORTED` for a store without checkpoints; those of the store
/// within the stream.
pub fn backup(
    directory: &Directory,
) -> Result<impl Stream<Item = Result<v1::BackupResponse>> + Send + use<>> {
    let permit = directory.backups.clone().try_acquire_owned().map_err(|_| {
        Error::new(Reason::Overloaded, "other backups run: try again when one has ended")
            .retry_after_ms(RETRY_MS)
    })?;
    let journal = directory.journal.get().ok_or_else(|| {
        Error::new(
            Reason::NotSupported,
            "this directory's store has no checkpoints: back up the engine it runs on",
        )
    })?;
    let mut checkpoint = journal.checkpoint()?;
    let mut message = v1::BackupResponse {
        cluster_id: directory.cluster_id.clone(),
        generation: directory.generation.0,
        revision: checkpoint.revision.0,
        carrier_ids: directory.cluster.state.lock().settings.carriers.clone(),
        ..Default::default()
    };
    tracing::info!(revision = checkpoint.revision.0, "a backup begins");
    Ok(async_stream::try_stream! {
        let _permit = permit;
        let (mut sum, mut bytes) = (EntrySum::default(), 0);
        while let Some(entry) = checkpoint.entries.next().await {
            let (key, value) = entry?;
            let entry = v1::CheckpointEntry { key, value: value.value, revision: value.revision.0 };
            bytes += entry.key.len() + entry.value.len() + 32;
            sum.add(&entry);
            message.entries.push(entry);
            if bytes >= DATA_BYTES_MAX {
                bytes = 0;
                yield std::mem::take(&mut message);
            }
        }
        message.entry_count = Some(sum.count());
        message.checksum = sum.checksum();
        yield message;
    })
}
