//! One chunk to safety: tried again elsewhere, under a new id, until there is a receipt.

use crate::{
    client::Core,
    write::{
        chunk::Sealed,
        grants::{Held, Placement},
        rows::Rows,
    },
};
use cairn_proto::{Error, Reason, Result, id::ServerId, v1};
use std::sync::Arc;

/// Servers that one write goes around; beyond that the oldest is tried again.
const AVOID_MAX: usize = 16;

/// A chunk that is durable, not yet committed.
#[derive(Clone, Debug)]
pub(crate) struct Stored {
    pub receipt: v1::Receipt,
    pub grant: Arc<Held>,
}

impl Stored {
    /// How the directory will name it.
    pub fn chunk_ref(&self) -> v1::ChunkRef {
        v1::ChunkRef {
            chunk: self.receipt.chunk,
            length: self.receipt.length,
            checksum: self.receipt.checksum,
            group_id: self.receipt.group_id,
        }
    }
}

impl Core {
    /// Writes a chunk durably. The bytes stay in memory until there is a receipt, so that the death of a server costs
    /// another attempt and not an error. Chunks of one long version share `rows`.
    ///
    /// # Errors
    /// The last failure when the deadline is over; at once what no other server would do better.
    pub async fn store(
        self: &Arc<Self>,
        sealed: &Sealed,
        placement: &Placement,
        rows: Option<&Rows>,
    ) -> Result<Stored> {
        let mut attempts = self.retry.start();
        let mut avoid: Vec<u64> = Vec::new();
        loop {
            let error = match self.store_once(sealed, placement, rows, &avoid, attempts.failures()).await {
                Ok(stored) => return Ok(stored),
                Err(error) => error,
            };
            let (server, error) = error;
            tracing::debug!(%error, failures = attempts.failures(), "a chunk is written again elsewhere");
            match error.reason {
                Reason::InvalidArgument | Reason::LimitExceeded | Reason::WrongCluster | Reason::NotFound => {
                    return Err(error);
                }
                // The id or the grant was the trouble, not the server.
                Reason::StaleEpoch | Reason::GrantClosed | Reason::ChunkExists | Reason::SessionExpired => {}
                Reason::Overloaded => {}
                _ => {
                    if let Some(server) = server.filter(|server| !avoid.contains(&server.0)) {
                        avoid.truncate(AVOID_MAX - 1);
                        avoid.insert(0, server.0);
                    }
                }
            }
            // The directory's own refusals passed its retries already.
            if server.is_none() && error.reason != Reason::SessionExpired {
                return Err(error);
            }
            if attempts.failures() < 2 && error.reason != Reason::Overloaded {
                attempts.elsewhere(error)?;
            } else {
                // Everybody was tried: start over, with pauses.
                avoid.clear();
                attempts.pause_after_any(error).await?;
            }
        }
    }

    async fn store_once(
        self: &Arc<Self>,
        sealed: &Sealed,
        placement: &Placement,
        rows: Option<&Rows>,
        avoid: &[u64],
        attempt: u32,
    ) -> Result<Stored, (Option<ServerId>, Error)> {
        let slot = self.slot(placement, avoid, rows).await.map_err(|error| (None, error))?;
        let primary = slot.grant.primary();
        let outcome = match self.servers.get(primary) {
            Some(link) => link.write(&slot, sealed, attempt).await,
            None => Err(Error::unavailable(format!("no endpoint of file server {primary} is known"))),
        };
        outcome.map(|receipt| Stored { receipt, grant: slot.grant.clone() }).map_err(|error| {
            self.learn(&error.detail.groups, &error.detail.servers);
            // A grant of a group that moved on, or is full, or whose primary is gone: another one knows better.
            if !matches!(
                error.reason,
                Reason::ChunkExists
                    | Reason::ChecksumMismatch
                    | Reason::Overloaded
                    | Reason::DeadlineExceeded
            ) {
                slot.grant.spoil();
            }
            (Some(primary), error)
        })
    }
}
