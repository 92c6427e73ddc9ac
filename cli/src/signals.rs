//! Signals that ask a command to end, so that it can give back what it holds: the session with its locks and grants.

use crate::failure::Failure;
use std::io;
use tokio::signal::unix::{self, SignalKind};

/// Ctrl-C, a request to end, and the end of the terminal.
pub struct Signals {
    interrupt: Option<unix::Signal>,
    terminate: Option<unix::Signal>,
    hangup: Option<unix::Signal>,
}

/// One that arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    Interrupt,
    Terminate,
    Hangup,
}

impl Signal {
    /// The exit status of a program that it ended, as shells show it.
    pub fn status(self) -> u8 {
        match self {
            Self::Hangup => 129,
            Self::Interrupt => 130,
            Self::Terminate => 143,
        }
    }
}

impl Signals {
    /// From here on they no longer end the process by themselves. One that whoever started the process had ignored, as
    /// `nohup` does, stays ignored.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn watch() -> Result<Self, Failure> {
        let ignored = ignored(&std::fs::read_to_string("/proc/self/status").unwrap_or_default());
        let watch = |kind: SignalKind| {
            let bit = 1_u64 << (kind.as_raw_value() - 1);
            if ignored & bit != 0 { Ok(None) } else { unix::signal(kind).map(Some) }
        };
        let all = || -> io::Result<Self> {
            Ok(Self {
                interrupt: watch(SignalKind::interrupt())?,
                terminate: watch(SignalKind::terminate())?,
                hangup: watch(SignalKind::hangup())?,
            })
        };
        all().map_err(|error| Failure::Local { subject: "signals".to_owned(), error })
    }

    /// Waits for the next one.
    pub async fn next(&mut self) -> Signal {
        tokio::select! {
            () = arrives(&mut self.interrupt) => Signal::Interrupt,
            () = arrives(&mut self.terminate) => Signal::Terminate,
            () = arrives(&mut self.hangup) => Signal::Hangup,
        }
    }
}

async fn arrives(signal: &mut Option<unix::Signal>) {
    match signal {
        Some(signal) => {
            signal.recv().await;
        }
        None => std::future::pending().await,
    }
}

/// The set of ignored signals in a process's status as Linux shows it, bit 0 for signal 1; none elsewhere.
fn ignored(status: &str) -> u64 {
    status
        .lines()
        .find_map(|line| u64::from_str_radix(line.strip_prefix("SigIgn:")?.trim(), 16).ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_ignored_is_read_from_the_status() {
        assert_eq!(ignored("Name:\tcairn\nSigIgn:\t0000000000001001\nSigCgt:\t0\n"), 0x1001);
        assert_eq!(ignored("SigIgn: no number"), 0);
        assert_eq!(ignored(""), 0);
    }
}
