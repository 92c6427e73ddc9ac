//! What services answer that are up to no good.

use cairn_proto::v1;
use futures::stream::BoxStream;
use std::{fmt, sync::Arc};
use tonic::Status;

/// Changes an answer.
pub type Lie<T> = Option<Arc<dyn Fn(&mut T) + Send + Sync>>;

/// Answers of a call that streams, made of the honest ones.
pub type Told<T> = BoxStream<'static, Result<T, Status>>;
pub type StreamLie<T> = Option<Arc<dyn Fn(Vec<T>) -> Told<T> + Send + Sync>>;

/// The lies that are told; none at first.
#[derive(Clone, Default)]
pub struct Lies {
    pub lookup: Lie<v1::LookupResponse>,
    pub list: Lie<v1::ListResponse>,
    pub list_locks: Lie<v1::ListLocksResponse>,
    pub explain: Lie<v1::ExplainResponse>,
    pub open: Lie<v1::OpenResponse>,
    pub grant: Lie<v1::Grant>,
    pub commit: Lie<v1::CommitResponse>,
    pub receipt: Lie<v1::Receipt>,
    pub read: StreamLie<v1::ReadResponse>,
    /// Instead of every answer to a lookup.
    pub refusal: Option<Status>,
}

impl fmt::Debug for Lies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lies").finish_non_exhaustive()
    }
}

/// An answer as it is told.
pub fn told<T>(lie: &Lie<T>, mut answer: T) -> T {
    if let Some(lie) = lie {
        lie(&mut answer);
    }
    answer
}

/// A lie.
pub fn lie<T>(change: impl Fn(&mut T) + Send + Sync + 'static) -> Lie<T> {
    Some(Arc::new(change))
}
