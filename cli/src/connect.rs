//! A client for one command, or a message that helps.

use crate::{
    args::Shared,
    failure::{Failure, say},
};
use cairn_proto::{
    Error,
    net::{Connect as _, SystemNetwork},
};
use client_lib::{Client, ClientBuilder};
use futures::{StreamExt as _, stream::FuturesUnordered};
use std::{
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

/// The client of the one command that this process runs.
static CLIENT: OnceLock<Client> = OnceLock::new();
/// Longest wait for the end of the session at the end of a command.
const CLOSING: Duration = Duration::from_secs(2);
/// Waiting for servers is said after this time, and again whenever as much more has passed.
const SAID_AFTER: Duration = Duration::from_secs(2);
const SAID_EVERY: Duration = Duration::from_secs(10);

/// A client with the defaults.
pub async fn plain(shared: &Shared) -> Result<Client, Failure> {
    with(shared, |builder| builder).await
}

/// A client with settings of the caller's.
pub async fn with(
    shared: &Shared,
    settings: impl FnOnce(ClientBuilder) -> ClientBuilder,
) -> Result<Client, Failure> {
    let builder = shared.directory.iter().fold(Client::builder(), |builder, uri| builder.directory(uri));
    let builder = match shared.timeout {
        Some(timeout) => builder.deadline(timeout),
        None => builder,
    };
    let client =
        settings(builder.on_retry(waiting)).build().map_err(|error| Failure::usage(error.to_string()))?;
    reachable(shared).await?;
    let _ = CLIENT.set(client.clone());
    Ok(client)
}

/// Ends the session of the command, if it has one, with its locks and grants.
pub async fn close() {
    if let Some(client) = CLIENT.get() {
        // Otherwise it ends after its TTL.
        let _ = tokio::time::timeout(CLOSING, client.close()).await;
    }
}

/// Tells a person why nothing happens.
fn waiting(why: &Error, since: Duration) {
    /// Milliseconds of waiting at which it is said next. One line for all that wait at a time.
    static NEXT_MS: AtomicU64 = AtomicU64::new(SAID_AFTER.as_millis() as u64);
    let next = NEXT_MS.load(Ordering::Relaxed);
    if since.as_millis() as u64 >= next {
        let later = next + SAID_EVERY.as_millis() as u64;
        if NEXT_MS.compare_exchange(next, later, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            say(&format!("waiting: {}", crate::failure::plain(&why.to_string())));
        }
    }
}

/// Whether anybody listens. A client would go on trying, as it should for a program that runs for days; a person wants
/// to know at once that the address is wrong.
async fn reachable(shared: &Shared) -> Result<(), Failure> {
    let mut attempts: FuturesUnordered<_> = shared
        .directory
        .iter()
        .map(|uri| async move { SystemNetwork.connect(uri).await.map_err(|error| format!("{uri}: {error}")) })
        .collect();
    let mut errors = Vec::new();
    let first = async {
        while let Some(attempt) = attempts.next().await {
            match attempt {
                Ok(_) => return true,
                Err(error) => errors.push(error),
            }
        }
        false
    };
    let why = match tokio::time::timeout(shared.reach(), first).await {
        Ok(true) => return Ok(()),
        Ok(false) => errors.join("; "),
        Err(_) => {
            let within = humantime::format_duration(shared.reach());
            format!("{}: nothing answered within {within}", shared.directory.join(", "))
        }
    };
    let message = format!(
        "{why}: no directory can be reached there; start a cluster with `cairn up`, or say where one is with \
         --directory or CAIRN_DIRECTORY"
    );
    Err(Failure::at("")(Error::unavailable(message)))
}
