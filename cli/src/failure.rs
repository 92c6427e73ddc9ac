//! How a command ends: its exit status and what it says on standard error.

use crate::{output, signals::Signal};
use cairn_proto::{Error, Reason};
use std::{fmt, io, process::ExitCode};

/// Something failed; see [`Failure::report`].
#[derive(Debug)]
pub enum Failure {
    /// Cairn said no.
    Cairn {
        /// The path or server it is about, empty when it is about neither.
        subject: String,
        /// Why.
        error: Box<Error>,
    },
    /// This machine said no.
    Local {
        /// The local path, or what was tried.
        subject: String,
        /// Why.
        error: io::Error,
    },
    /// The command makes no sense.
    Usage(String),
    /// Everything has been said already; only the status is left.
    Said(u8),
    /// Nobody reads standard output any more.
    BrokenPipe,
    /// A signal asked it to end.
    Ended(Signal),
}

/// Done.
pub const DONE: u8 = 0;
/// Failed.
pub const FAILED: u8 = 1;
/// Wrong usage.
pub const USAGE: u8 = 2;
/// No such path.
pub const NOT_FOUND: u8 = 3;
/// Another holds the lock, or the lock given is lost.
pub const LOCKED: u8 = 4;

impl Failure {
    /// Cairn's answer about a path.
    pub fn at(path: impl Into<String>) -> impl FnOnce(Error) -> Self {
        let subject = path.into();
        move |error| Self::Cairn { subject, error: Box::new(error) }
    }

    /// This machine's answer about a local path.
    pub fn local(path: impl AsRef<std::path::Path>) -> impl FnOnce(io::Error) -> Self {
        let subject = path.as_ref().display().to_string();
        move |error| Self::Local { subject, error }
    }

    /// Wrong usage.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::Usage(message.into())
    }

    /// The same, with what to do about it when it failed for this reason.
    pub fn advise(mut self, reason: Reason, advice: &str) -> Self {
        if let Self::Cairn { error, .. } = &mut self
            && error.reason == reason
        {
            error.detail.message.push_str("; ");
            error.detail.message.push_str(advice);
        }
        self
    }

    /// The exit status.
    pub fn status(&self) -> u8 {
        match self {
            Self::Cairn { error, .. } => match error.reason {
                Reason::NotFound => NOT_FOUND,
                Reason::LockHeld | Reason::LockLost => LOCKED,
                _ => FAILED,
            },
            Self::Local { error, .. } if error.kind() == io::ErrorKind::NotFound => NOT_FOUND,
            Self::Local { .. } => FAILED,
            Self::Usage(_) => USAGE,
            Self::Said(status) => *status,
            Self::BrokenPipe => DONE,
            Self::Ended(signal) => signal.status(),
        }
    }

    /// Says it on standard error, once.
    pub fn report(&self) {
        if !matches!(self, Self::Said(_) | Self::BrokenPipe | Self::Ended(_)) {
            say(&self.to_string());
        }
    }

    /// Says it and goes on: the worst status so far is kept in `status`.
    pub fn note(&self, status: &mut u8) {
        self.report();
        // A first failure says what kind it was; several of different kinds are just failures.
        *status = match *status {
            DONE => self.status(),
            same if same == self.status() => same,
            _ => FAILED,
        };
    }

    /// The end of a command that went on after failures.
    pub fn after(status: u8) -> Result<(), Self> {
        if status == DONE { Ok(()) } else { Err(Self::Said(status)) }
    }

    /// For `main`.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.status())
    }
}

/// A message of this program on standard error. Does not mind when nobody reads. Names of files and of other clients
/// stand in it, so nothing in it may move the cursor of a terminal.
pub fn say(message: &str) {
    use io::Write as _;
    let _ = writeln!(io::stderr(), "cairn: {}", output::harmless(message));
}

/// A message of several lines.
pub fn say_lines(message: &str) {
    use io::Write as _;
    let lines: Vec<_> = message.lines().map(output::harmless).collect();
    let _ = writeln!(io::stderr(), "cairn: {}", lines.join("\n"));
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cairn { subject, error } => {
                let mut text = plain(&error.to_string());
                if let (Reason::LockHeld, Some(lock)) = (error.reason, &error.detail.lock) {
                    let path = &lock.path;
                    text.push_str(&format!(
                        "; `cairn lock --wait 1m {path} -- COMMAND` waits for it, `cairn unlock --force {path}` takes \
                         it away"
                    ));
                }
                // Most messages of Cairn name the path themselves.
                let rest = text.strip_prefix(subject.as_str());
                let rest = rest.and_then(|rest| rest.strip_prefix(": ").or_else(|| rest.strip_prefix(' ')));
                match rest {
                    _ if subject.is_empty() => f.write_str(&text),
                    Some(rest) => write!(f, "{subject}: {rest}"),
                    None => write!(f, "{subject}: {text}"),
                }
            }
            Self::Local { subject, error } if subject.is_empty() => write!(f, "{error}"),
            Self::Local { subject, error } => write!(f, "{subject}: {}", plain(&error.to_string())),
            Self::Usage(message) => f.write_str(message),
            Self::Said(status) => write!(f, "failed with status {status}"),
            Self::BrokenPipe => f.write_str("nobody reads the output"),
            Self::Ended(signal) => write!(f, "ended by {signal:?}"),
        }
    }
}

/// An error of the system without its number, which tells a person nothing.
pub fn plain(text: &str) -> String {
    let Some((before, number)) = text.split_once(" (os error ") else { return text.to_owned() };
    let after = number.split_once(')').map_or("", |(_, after)| after);
    // The system begins its sentences with a capital.
    let mut letters = before.chars();
    let first = letters.next().map(|first| first.to_ascii_lowercase());
    first.into_iter().chain(letters).chain(plain(after).chars()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_named_once() {
        let error = Error::not_found("/a/b: no such file or directory");
        assert_eq!(Failure::at("/a/b")(error).to_string(), "/a/b: no such file or directory");
        let error = Error::new(Reason::LockHeld, "/a/b is locked by 'x'").at("/a/b");
        assert_eq!(Failure::at("/a/b")(error).to_string(), "/a/b: is locked by 'x'");
        let error = Error::not_found("no such file or directory").at("/a/b");
        assert_eq!(Failure::at("/a/b")(error).to_string(), "/a/b: no such file or directory");
        let error = Error::not_found("no such file or directory");
        assert_eq!(Failure::at("/a/b")(error).to_string(), "/a/b: no such file or directory");
    }

    #[test]
    fn the_status_says_what_kind_of_failure_it_was() {
        let of = |reason| Failure::at("/a")(Error::new(reason, "x")).status();
        assert_eq!(of(Reason::NotFound), 3);
        assert_eq!(of(Reason::LockHeld), 4);
        assert_eq!(of(Reason::LockLost), 4);
        assert_eq!(of(Reason::Unavailable), 1);
        assert_eq!(Failure::usage("x").status(), 2);
        let missing = io::Error::from_raw_os_error(2);
        assert_eq!(Failure::local("a")(missing).status(), 3);
    }

    #[test]
    fn several_failures_of_one_kind_keep_its_status() {
        let not_found = || Failure::at("/a")(Error::not_found("x"));
        let mut status = DONE;
        not_found().note(&mut status);
        not_found().note(&mut status);
        assert_eq!(status, NOT_FOUND);
        Failure::at("/a")(Error::internal("x")).note(&mut status);
        assert_eq!(status, FAILED);
    }

    #[test]
    fn errors_of_the_system_read_well() {
        let failure = Failure::local("x y")(io::Error::from_raw_os_error(13));
        assert_eq!(failure.to_string(), "x y: permission denied");
        let error = Error::unavailable("http://a:1: Refused (os error 111); http://b:1: Gone (os error 3)!");
        let said = Failure::at("")(error).to_string();
        assert_eq!(said, "http://a:1: Refused; http://b:1: Gone!");
    }
}
