//! The id that ties together what all services log for one operation of a caller.
//!
//! A client gives each operation an id ([`scope`]); every call that is made on its behalf carries it in the metadata key
//! [`REQUEST_HEADER`], a server takes it over for the calls that it makes itself, and errors name it. It is for people who
//! read logs: nothing is decided by it, and it is not the request id by which a repeated change is recognised.

use crate::net::REQUEST_HEADER;
use std::sync::Arc;
use tokio::task::futures::TaskLocalFuture;
use tonic::{Request, metadata::MetadataValue};

/// Longest id that a server takes over from a caller, in bytes.
pub const REQUEST_ID_BYTES_MAX: usize = 128;

tokio::task_local! {
    static CURRENT: Arc<str>;
}

/// Runs `future` as part of the operation `id`.
pub fn scope<F: Future>(id: &str, future: F) -> TaskLocalFuture<Arc<str>, F> {
    CURRENT.scope(id.into(), future)
}

/// The operation that this task works for, if it is known.
pub fn current() -> Option<Arc<str>> {
    CURRENT.try_with(Arc::clone).ok()
}

/// Makes `future` part of the operation that this task works for, also where it is spawned as a task of its own.
pub fn carried<F: Future>(future: F) -> impl Future<Output = F::Output> {
    let id = current();
    async move {
        match id {
            Some(id) => scope(&id, future).await,
            None => future.await,
        }
    }
}

/// Writes the current operation's id, or else `fallback`, into the metadata of a call.
pub fn stamp<T>(request: &mut Request<T>, fallback: Option<&str>) {
    let current = current();
    if let Some(value) = current.as_deref().or(fallback).and_then(|id| MetadataValue::try_from(id).ok()) {
        request.metadata_mut().insert(REQUEST_HEADER, value);
    }
}

/// The id that a caller's headers bring, if it is one that may be taken over.
pub fn given(headers: &http::HeaderMap) -> Option<&str> {
    headers
        .get(REQUEST_HEADER)
        .and_then(|id| id.to_str().ok())
        .filter(|id| !id.is_empty() && id.len() <= REQUEST_ID_BYTES_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_call_carries_the_id_of_its_operation_also_from_a_spawned_task() {
        let stamped = |fallback| {
            let mut request = Request::new(());
            stamp(&mut request, fallback);
            request.metadata().get(REQUEST_HEADER).map(|id| id.to_str().unwrap().to_owned())
        };
        assert_eq!(stamped(None), None);
        assert_eq!(stamped(Some("else")).as_deref(), Some("else"));
        scope("one", async {
            assert_eq!(stamped(Some("else")).as_deref(), Some("one"));
            let inner = tokio::spawn(carried(async { current() })).await.unwrap();
            assert_eq!(inner.as_deref(), Some("one"));
            assert_eq!(tokio::spawn(async { current() }).await.unwrap(), None);
        })
        .await;
    }

    #[test]
    fn only_short_ids_are_taken_over() {
        let with = |id: &str| {
            let mut headers = http::HeaderMap::new();
            headers.insert(REQUEST_HEADER, id.parse().unwrap());
            given(&headers).map(str::to_owned)
        };
        assert_eq!(with("mine").as_deref(), Some("mine"));
        assert_eq!(with(""), None);
        assert_eq!(with(&"x".repeat(REQUEST_ID_BYTES_MAX + 1)), None);
    }
}
