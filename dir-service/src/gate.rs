//! Between the gRPC handlers and the directory: it opens when there is a directory that may answer.
//!
//! ```text
//!   forming ---> confirming ---> serving ---> stopped
//!      |          ^    |  ^         |
//!      v          |    v  +---------+
//!   rebuilding ---+  rebuilding
//!
//!   joining ---> serving ---> stopped         on a store that several directories share
//! ```

use crate::directory::Directory;
use cairn_proto::{Error, Reason, Result};
use std::sync::Arc;
use tokio::sync::watch;

/// When a caller that found the gate closed should come back.
const RETRY_MS: u64 = 200;

/// What the directory is doing.
#[derive(Clone, Debug)]
pub enum Mode {
    /// The store is empty; file servers are awaited to tell whether there is a cluster already.
    Forming {
        /// What it waits for.
        reason: String,
    },
    /// A cluster exists and its records are being rebuilt from the file servers.
    Rebuilding {
        /// Why, and what it waits for.
        reason: String,
    },
    /// There is a store, and file servers are asked whether it is the newest.
    Confirming {
        /// What it waits for.
        reason: String,
    },
    /// It shares a store with others, and is about to join them.
    Joining {
        /// What it waits for.
        reason: String,
    },
    /// It answers.
    Serving(Arc<Directory>),
    /// It will not answer any more.
    Stopped,
}

impl Mode {
    /// As `Status` shows it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Forming { .. } => "forming",
            Self::Rebuilding { .. } => "rebuilding",
            Self::Confirming { .. } => "confirming",
            Self::Joining { .. } => "joining",
            Self::Serving(_) => "serving",
            Self::Stopped => "stopping",
        }
    }
}

/// Holds the mode. Handlers take the directory from here with every request.
#[derive(Debug)]
pub struct Gate {
    mode: watch::Sender<Mode>,
}

impl Default for Gate {
    fn default() -> Self {
        Self { mode: watch::Sender::new(Mode::Forming { reason: "the directory is starting".into() }) }
    }
}

impl Gate {
    /// The directory, when it serves.
    ///
    /// # Errors
    /// `REBUILDING` or `UNAVAILABLE` with the reason otherwise; both pass.
    pub fn directory(&self) -> Result<Arc<Directory>> {
        match &*self.mode.borrow() {
            Mode::Serving(directory) => Ok(directory.clone()),
            Mode::Rebuilding { reason } => Err(Error::new(
                Reason::Rebuilding,
                format!("the directory is rebuilding its records from the file servers: {reason}"),
            )
            .retry_after_ms(RETRY_MS)),
            Mode::Forming { reason } => {
                Err(Error::unavailable(format!("the directory has no cluster yet: {reason}"))
                    .retry_after_ms(RETRY_MS))
            }
            Mode::Confirming { reason } => Err(Error::unavailable(format!(
                "the directory asks the file servers whether its store is the newest: {reason}"
            ))
            .retry_after_ms(RETRY_MS)),
            Mode::Joining { reason } => Err(Error::unavailable(format!(
                "the directory is about to join those that share its store: {reason}"
            ))
            .retry_after_ms(RETRY_MS)),
            Mode::Stopped => Err(Error::unavailable("the directory is stopping: try another, or again")),
        }
    }

    /// The mode now.
    pub fn mode(&self) -> Mode {
        self.mode.borrow().clone()
    }

    /// Changes the mode; whoever waits sees it.
    pub fn set(&self, mode: Mode) {
        match &mode {
            Mode::Forming { reason } => tracing::info!(%reason, "forming"),
            Mode::Rebuilding { reason } => tracing::warn!(%reason, "rebuilding"),
            Mode::Confirming { reason } => tracing::info!(%reason, "confirming"),
            Mode::Joining { reason } => tracing::info!(%reason, "joining"),
            Mode::Serving(directory) => tracing::info!(
                cluster = %directory.cluster_id,
                generation = directory.generation.0,
                "serving"
            ),
            Mode::Stopped => tracing::info!("stopped"),
        }
        self.mode.send_replace(mode);
    }

    /// Follows the mode.
    pub fn watch(&self) -> watch::Receiver<Mode> {
        self.mode.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closed_gate_says_why_and_that_it_passes() {
        let gate = Gate::default();
        assert_eq!(gate.directory().unwrap_err().reason, Reason::Unavailable);
        gate.set(Mode::Rebuilding { reason: "server 3 has not reported".into() });
        let error = gate.directory().unwrap_err();
        assert_eq!(error.reason, Reason::Rebuilding);
        assert!(error.message().contains("server 3") && error.reason.is_transient());
        gate.set(Mode::Stopped);
        assert_eq!(gate.directory().unwrap_err().reason, Reason::Unavailable);
    }
}
