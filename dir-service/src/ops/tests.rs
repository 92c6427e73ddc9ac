//! Locks, sessions and commits as clients see them, over a store in memory. Time is virtual.

mod arguments;
mod commits;
mod locks;
mod overtaken;
mod sessions;
mod several;

use crate::{background, directory::Directory, testing::Bench};
use cairn_proto::{Result, v1};
use std::{sync::Arc, time::Duration};
use tokio_util::sync::CancellationToken;

/// An exclusive lock of a session (0: one of its own).
fn exclusive(path: &str, session_id: u64) -> v1::LockRequest {
    v1::LockRequest {
        path: path.into(),
        mode: v1::LockMode::Exclusive as i32,
        session_id,
        owner: format!("owner {session_id}"),
        ..Default::default()
    }
}

async fn lock(bench: &Bench, request: v1::LockRequest) -> Result<v1::LockResponse> {
    super::lock::lock(&bench.directory, request).await
}

/// A commit that appends some chunks of a grant.
fn append(path: &str, grant: &v1::Grant, indexes: std::ops::Range<u32>, length: u64) -> v1::CommitRequest {
    let receipts: Vec<_> = indexes.map(|index| Bench::receipt(grant, index, length)).collect();
    let edit =
        |receipt_index| v1::Edit { edit: Some(v1::edit::Edit::Append(v1::AppendEdit { receipt_index })) };
    v1::CommitRequest {
        path: path.into(),
        edits: (0..receipts.len() as u32).map(edit).collect(),
        receipts,
        ..Default::default()
    }
}

async fn commit(bench: &Bench, request: v1::CommitRequest) -> Result<v1::CommitResponse> {
    super::commit::commit(&bench.directory, request).await
}

async fn create(bench: &Bench, path: &str) -> v1::Attributes {
    let request = v1::CreateRequest { path: path.into(), kind: v1::Kind::File as i32, ..Default::default() };
    super::create::create(&bench.directory, request).await.unwrap().attributes.unwrap()
}

async fn delete(bench: &Bench, path: &str, token: Option<v1::FencingToken>) -> Result<v1::DeleteResponse> {
    let request = v1::DeleteRequest { path: path.into(), token, ..Default::default() };
    super::delete::delete(&bench.directory, request).await
}

fn in_session(session_id: u64, sequence: u64) -> Option<v1::RequestId> {
    Some(v1::RequestId { session_id, sequence, uuid: String::new() })
}

/// Background loops, ended when dropped.
struct Loops(CancellationToken);

impl Loops {
    fn start(directory: &Arc<Directory>) -> Self {
        let stop = CancellationToken::new();
        tokio::spawn(background::sessions::run(directory.clone(), stop.clone()));
        tokio::spawn(background::trash::run(directory.clone(), stop.clone()));
        tokio::spawn(background::answers::run(directory.clone(), stop.clone()));
        Self(stop)
    }
}

impl Drop for Loops {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

/// Waits, in virtual time, until something holds.
async fn until<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) {
    let waiting = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(7_200), waiting).await.is_ok(), "never: {what}");
}
