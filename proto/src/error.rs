//! The error vocabulary of Cairn and its one table to gRPC codes.
//!
//! An [`Error`] is what rules, services and clients pass around. On the wire it is a gRPC status whose details carry
//! an [`v1::ErrorDetail`]; `client-lib` restores the same `Error` from it.

use crate::v1;
use std::fmt;

/// A result with Cairn's error.
pub type Result<T, E = Error> = std::result::Result<T, E>;

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $wire:ident, $code:ident, $retry:ident;)*) => {
        /// Why a call failed: what a caller can act on.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Reason { $($(#[$doc])* $variant,)* }

        impl Reason {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The form on the wire.
            pub fn to_wire(self) -> v1::ErrorReason {
                match self { $(Self::$variant => v1::ErrorReason::$wire,)* }
            }

            /// From the form on the wire; a reason newer than this program reads as internal.
            pub fn from_wire(reason: v1::ErrorReason) -> Self {
                match reason {
                    $(v1::ErrorReason::$wire => Self::$variant,)*
                    v1::ErrorReason::Unspecified => Self::Internal,
                }
            }

            /// The gRPC code, by number.
            pub fn code(self) -> i32 {
                match self { $(Self::$variant => Code::$code as i32,)* }
            }

            /// Whether the same call (with the same request id) may succeed later without anybody changing it.
            pub fn is_transient(self) -> bool {
                match self { $(Self::$variant => Retry::$retry == Retry::Transient,)* }
            }
        }
    };
}

/// The numbers of gRPC, so that this module does without tonic.
#[derive(Clone, Copy)]
enum Code {
    InvalidArgument = 3,
    DeadlineExceeded = 4,
    NotFound = 5,
    AlreadyExists = 6,
    ResourceExhausted = 8,
    FailedPrecondition = 9,
    Aborted = 10,
    OutOfRange = 11,
    Unimplemented = 12,
    Internal = 13,
    Unavailable = 14,
    DataLoss = 15,
}

#[derive(PartialEq)]
enum Retry {
    Transient,
    Final,
}

reasons! {
    /// The request can never succeed as it stands.
    InvalidArgument = InvalidArgument, InvalidArgument, Final;
    /// No such path, inode, server or session.
    NotFound = NotFound, NotFound, Final;
    /// The name exists already.
    AlreadyExists = AlreadyExists, AlreadyExists, Final;
    /// A part of the path is not a directory.
    NotADirectory = NotADirectory, FailedPrecondition, Final;
    /// The call needs a file.
    IsADirectory = IsADirectory, FailedPrecondition, Final;
    /// The directory still has entries.
    NotEmpty = NotEmpty, FailedPrecondition, Final;
    /// Somebody else holds a lock.
    LockHeld = LockHeld, Aborted, Final;
    /// The token is no longer that of a held lock.
    LockLost = LockLost, FailedPrecondition, Final;
    /// The condition of the call does not hold.
    ConditionFailed = ConditionFailed, FailedPrecondition, Final;
    /// The version is no longer readable.
    VersionGone = VersionGone, Aborted, Final;
    /// The session has ended.
    SessionExpired = SessionExpired, FailedPrecondition, Final;
    /// The grant was closed.
    GrantClosed = GrantClosed, Aborted, Final;
    /// Too few current members hold the chunks.
    Misplaced = Misplaced, Aborted, Final;
    /// The chunk is sealed already with other content.
    ChunkExists = ChunkExists, AlreadyExists, Final;
    /// The server does not hold the chunk.
    ChunkNotFound = ChunkNotFound, NotFound, Final;
    /// Bytes do not match their checksum.
    ChecksumMismatch = ChecksumMismatch, DataLoss, Final;
    /// A named limit was exceeded.
    LimitExceeded = LimitExceeded, OutOfRange, Final;
    /// The server has too much to do.
    Overloaded = Overloaded, ResourceExhausted, Transient;
    /// A disk is full.
    NoSpace = NoSpace, ResourceExhausted, Final;
    /// The server cannot be reached or is stopping.
    Unavailable = Unavailable, Unavailable, Transient;
    /// The directory is rebuilding its records.
    Rebuilding = Rebuilding, Unavailable, Transient;
    /// Fewer file servers live than a write needs.
    TooFewServers = TooFewServers, Unavailable, Transient;
    /// It can no longer be known whether the request was applied.
    OutcomeUnknown = OutcomeUnknown, Aborted, Final;
    /// The caller knows an older epoch or generation.
    StaleEpoch = StaleEpoch, FailedPrecondition, Final;
    /// The other side belongs to another cluster.
    WrongCluster = WrongCluster, FailedPrecondition, Final;
    /// The asked revision is no longer kept.
    RevisionCompacted = RevisionCompacted, OutOfRange, Final;
    /// Concurrent changes prevented the call.
    Conflict = Conflict, Aborted, Transient;
    /// The deadline passed.
    DeadlineExceeded = DeadlineExceeded, DeadlineExceeded, Transient;
    /// A disk or network error at the server.
    Io = Io, Internal, Final;
    /// A fault in Cairn itself.
    Internal = Internal, Internal, Final;
    /// The server does not offer this.
    NotSupported = NotSupported, Unimplemented, Final;
}

/// What failed, on which path or server, and what to do.
#[derive(Clone, Debug, PartialEq)]
pub struct Error {
    /// What a caller can act on.
    pub reason: Reason,
    /// Everything else. `detail.reason` is filled in when the error is sent.
    pub detail: Box<v1::ErrorDetail>,
}

impl Error {
    /// An error with one sentence for a person, in lower case and without a full stop.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, detail: Box::new(v1::ErrorDetail { message: message.into(), ..Default::default() }) }
    }

    /// `INVALID_ARGUMENT`.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(Reason::InvalidArgument, message)
    }

    /// `LIMIT_EXCEEDED`.
    pub fn limit(message: impl Into<String>) -> Self {
        Self::new(Reason::LimitExceeded, message)
    }

    /// `NOT_FOUND`.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(Reason::NotFound, message)
    }

    /// `INTERNAL`.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Reason::Internal, message)
    }

    /// `UNAVAILABLE`.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(Reason::Unavailable, message)
    }

    /// Says which path it is about, unless that is said already.
    pub fn at(mut self, path: impl Into<String>) -> Self {
        if self.detail.path.is_empty() {
            self.detail.path = path.into();
        }
        self
    }

    /// Says which server it is about, unless that is said already.
    pub fn on(mut self, server: impl Into<String>) -> Self {
        if self.detail.server.is_empty() {
            self.detail.server = server.into();
        }
        self
    }

    /// Says when to try again.
    pub fn retry_after_ms(mut self, ms: u64) -> Self {
        self.detail.retry_after_ms = ms;
        self
    }

    /// As one of several answers of a call that itself went well.
    pub fn to_wire(&self) -> v1::ErrorDetail {
        v1::ErrorDetail { reason: self.reason.to_wire() as i32, ..(*self.detail).clone() }
    }

    /// From its form on the wire.
    pub fn from_wire(detail: v1::ErrorDetail) -> Self {
        Self { reason: Reason::from_wire(detail.reason()), detail: Box::new(detail) }
    }

    /// The sentence for a person.
    pub fn message(&self) -> &str {
        &self.detail.message
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let detail = &self.detail;
        if !detail.path.is_empty() && !detail.message.contains(detail.path.as_str()) {
            write!(f, "{}: ", detail.path)?;
        }
        if detail.message.is_empty() {
            write!(f, "{:?}", self.reason)?;
        } else {
            f.write_str(&detail.message)?;
        }
        if !detail.server.is_empty() && !detail.message.contains(detail.server.as_str()) {
            write!(f, " (server {})", detail.server)?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Self {
        let reason = match error.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => Reason::NoSpace,
            _ => Reason::Io,
        };
        Self::new(reason, error.to_string())
    }
}

#[cfg(any(feature = "client", feature = "server"))]
/// `google.rpc.Status`, the standard envelope of details in gRPC.
#[derive(Clone, PartialEq, prost::Message)]
struct RpcStatus {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
    #[prost(message, repeated, tag = "3")]
    details: Vec<prost_types::Any>,
}

#[cfg(any(feature = "client", feature = "server"))]
const DETAIL_TYPE: &str = "type.googleapis.com/cairn.v1.ErrorDetail";

#[cfg(any(feature = "client", feature = "server"))]
mod status {
    use super::*;
    use prost::Message as _;
    use tonic::{Code, Status};

    impl From<Error> for Status {
        fn from(error: Error) -> Self {
            let detail = error.to_wire();
            let code = error.reason.code();
            let message = error.to_string();
            let status = RpcStatus {
                code,
                message: message.clone(),
                details: vec![prost_types::Any {
                    type_url: DETAIL_TYPE.into(),
                    value: detail.encode_to_vec(),
                }],
            };
            Status::with_details(Code::from_i32(code), message, status.encode_to_vec().into())
        }
    }

    impl From<Status> for Error {
        fn from(status: Status) -> Self {
            let detail = RpcStatus::decode(status.details()).ok().and_then(|envelope| {
                let any = envelope.details.into_iter().find(|any| any.type_url == DETAIL_TYPE)?;
                v1::ErrorDetail::decode(any.value.as_slice()).ok()
            });
            if let Some(detail) = detail {
                return Self::from_wire(detail);
            }
            // Not from Cairn's own code: the transport, a proxy, or a limit of the gRPC library.
            let reason = match status.code() {
                Code::Unavailable | Code::Cancelled | Code::Unknown => Reason::Unavailable,
                Code::DeadlineExceeded => Reason::DeadlineExceeded,
                Code::ResourceExhausted => Reason::Overloaded,
                Code::OutOfRange => Reason::LimitExceeded,
                Code::InvalidArgument => Reason::InvalidArgument,
                Code::Unimplemented => Reason::NotSupported,
                Code::NotFound => Reason::NotFound,
                _ => Reason::Internal,
            };
            Self::new(reason, status.message().to_owned())
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn every_reason_goes_through_a_status_and_back() {
            for reason in Reason::ALL {
                let error = Error::new(*reason, "no such file").at("/a").on("3").retry_after_ms(7);
                let status = Status::from(error.clone());
                assert_ne!(status.code(), Code::Unknown, "{reason:?}");
                let mut back = Error::from(status);
                assert_eq!(back.detail.reason(), reason.to_wire());
                back.detail.reason = 0;
                assert_eq!(back, error);
            }
        }

        #[test]
        fn garbage_in_the_details_is_not_trusted() {
            let status = Status::with_details(Code::Unavailable, "gone", vec![0xff; 40].into());
            assert_eq!(Error::from(status).reason, Reason::Unavailable);
        }
    }
}
