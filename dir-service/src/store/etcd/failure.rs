//! What an error of etcd means: whether the call can have had an effect, and what a person can do.
//!
//! etcd tells errors by a gRPC code and a fixed sentence; the sentences are those of its `rpctypes/error.go`, 3.4 to 3.6. What is
//! not known here counts as the worst: it may have been applied.

use cairn_proto::{Error, Reason};
use std::error::Error as _;
use tonic::{Code, ConnectError, Status};

/// How a call ended that has no answer.
#[derive(Debug)]
pub(super) enum Failure {
    /// It had no effect; the same call may succeed at another member.
    Elsewhere(Error),
    /// It had no effect: the token is not, or no longer, good.
    Token(Error),
    /// It had no effect, and the same call will not do better now.
    Refused(Error),
    /// It had an effect or not: it was on its way.
    Lost(Error),
    /// etcd's database is full: the call had no effect if that was found before it was proposed, and had one if after.
    Full(Error),
    /// A read whose answer is larger than what is taken at a time.
    TooLarge(Error),
    /// The revision is no longer kept.
    Compacted,
    /// The revision is ahead of etcd.
    Future,
}

impl Failure {
    /// As an error for somebody who cannot act on the difference.
    pub(super) fn into_error(self) -> Error {
        match self {
            Self::Elsewhere(error)
            | Self::Token(error)
            | Self::Refused(error)
            | Self::Lost(error)
            | Self::Full(error)
            | Self::TooLarge(error) => error,
            Self::Compacted => {
                Error::new(Reason::RevisionCompacted, "the revision is no longer kept by etcd")
            }
            Self::Future => Error::invalid("the revision lies ahead of etcd"),
        }
    }
}

/// Reads a status of the member `endpoint`.
pub(super) fn of(status: &Status, endpoint: &str) -> Failure {
    let told = status.message();
    let says = |sentence: &str| told.contains(sentence);
    let error = |reason, what: &str| {
        let message = match what {
            "" => format!("etcd at {endpoint}: {told}"),
            what => format!("etcd at {endpoint}: {told}; {what}"),
        };
        Error::new(reason, message)
    };
    if never_sent(status) {
        let why = root(status);
        let message = format!("etcd at {endpoint} cannot be reached: {why}");
        return Failure::Elsewhere(Error::unavailable(message));
    }
    match status.code() {
        Code::OutOfRange if says("required revision has been compacted") => Failure::Compacted,
        Code::OutOfRange if says("required revision is a future revision") => Failure::Future,
        Code::OutOfRange if says("decoded message length too large") => {
            Failure::TooLarge(error(Reason::LimitExceeded, ""))
        }
        Code::ResourceExhausted if says("database space exceeded") => Failure::Full(error(
            Reason::NoSpace,
            "no change is possible until its operator compacts and defragments it or raises its \
             --quota-backend-bytes, and disarms the alarm (etcdctl alarm disarm)",
        )),
        Code::ResourceExhausted if says("too many requests") => {
            Failure::Refused(error(Reason::Overloaded, "").retry_after_ms(OVERLOADED_RETRY_MS))
        }
        Code::ResourceExhausted if says("received message larger than max") => Failure::Refused(error(
            Reason::LimitExceeded,
            "etcd is to be run with at least its default --max-request-bytes",
        )),
        Code::Unauthenticated => Failure::Token(error(
            Reason::Unavailable,
            "give the directory a user and a password that etcd knows",
        )),
        // The rights changed while the call was on its way to being applied, and it was not.
        Code::InvalidArgument if says("revision of auth store is old") => {
            Failure::Token(error(Reason::Unavailable, ""))
        }
        Code::InvalidArgument if says("user name is empty") => Failure::Refused(error(
            Reason::Unavailable,
            "etcd wants a user: give the directory one with --etcd-user",
        )),
        Code::InvalidArgument if says("authentication failed") => {
            Failure::Refused(error(Reason::Unavailable, "check the directory's user and password for etcd"))
        }
        Code::FailedPrecondition if says("authentication is not enabled") => Failure::Refused(error(
            Reason::Unavailable,
            "etcd knows no users: start the directory without --etcd-user, or enable its authentication",
        )),
        Code::PermissionDenied => Failure::Refused(error(
            Reason::Unavailable,
            "etcd's user of the directory needs the right to read and write all keys of its prefix",
        )),
        Code::InvalidArgument if says("request is too large") || says("too many operations") => {
            Failure::Refused(error(
                Reason::LimitExceeded,
                "etcd is to be run with at least its default --max-txn-ops and --max-request-bytes",
            ))
        }
        Code::InvalidArgument | Code::FailedPrecondition | Code::Unimplemented => {
            Failure::Refused(error(Reason::Internal, ""))
        }
        Code::DataLoss if says("corrupt cluster") => {
            Failure::Refused(error(Reason::Io, "a member of etcd found itself damaged: restore it"))
        }
        // Asked for with every call: it is told before anything is done with it.
        Code::Unavailable if told == "etcdserver: no leader" => Failure::Elsewhere(error(
            Reason::Unavailable,
            "this member hears no leader: more than half of the members have to live and reach each other",
        )),
        _ => Failure::Lost(error(Reason::Unavailable, "")),
    }
}

/// When a caller whom etcd refused as overload may come back.
pub(super) const OVERLOADED_RETRY_MS: u64 = 50;

/// Whether there was no connection to send it on.
fn never_sent(status: &Status) -> bool {
    let mut source = status.source();
    while let Some(error) = source {
        if error.is::<ConnectError>() {
            return true;
        }
        source = error.source();
    }
    false
}

fn root(status: &Status) -> String {
    let mut text = status.message().to_owned();
    let mut source = status.source();
    while let Some(error) = source {
        text = error.to_string();
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_certainly_had_no_effect_is_refused() {
        let lost = [
            Status::deadline_exceeded("context deadline exceeded"),
            Status::unavailable("etcdserver: leader changed"),
            Status::unavailable("etcdserver: request timed out"),
            Status::unavailable("etcdserver: request timed out, possibly due to previous leader failure"),
            Status::unavailable("etcdserver: server stopped"),
            Status::unavailable("connection reset"),
            Status::cancelled("Timeout expired"),
            Status::unknown("h2 protocol error"),
            Status::internal("something new"),
            Status::resource_exhausted("something new"),
        ];
        for status in lost {
            assert!(matches!(of(&status, "a:1"), Failure::Lost(_)), "{status:?}");
        }
        let refused = [
            Status::resource_exhausted("etcdserver: too many requests"),
            Status::invalid_argument("etcdserver: request is too large"),
            Status::invalid_argument("etcdserver: too many operations in txn request"),
            Status::permission_denied("etcdserver: permission denied"),
            Status::failed_precondition("etcdserver: authentication is not enabled"),
            Status::data_loss("etcdserver: corrupt cluster"),
        ];
        for status in refused {
            assert!(matches!(of(&status, "a:1"), Failure::Refused(_)), "{status:?}");
        }
        assert!(matches!(of(&Status::unavailable("etcdserver: no leader"), "a:1"), Failure::Elsewhere(_)));
        assert!(matches!(
            of(&Status::unauthenticated("etcdserver: invalid auth token"), "a"),
            Failure::Token(_)
        ));
    }

    #[test]
    fn errors_name_the_member_and_what_to_do() {
        let status = Status::resource_exhausted("etcdserver: mvcc: database space exceeded");
        let Failure::Full(error) = of(&status, "db1:2379") else { panic!("a full database") };
        assert_eq!(error.reason, Reason::NoSpace);
        assert!(error.message().contains("db1:2379") && error.message().contains("defragments"), "{error}");
    }

    #[test]
    fn the_end_of_a_stream_of_sources_is_the_reason() {
        let mut status = Status::unavailable("transport error");
        let refused = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
        status.set_source(std::sync::Arc::new(ConnectError(Box::new(refused))));
        let Failure::Elsewhere(error) = of(&status, "a:1") else { panic!("nothing was sent") };
        assert!(error.message().contains("cannot be reached"), "{error}");
    }
}
