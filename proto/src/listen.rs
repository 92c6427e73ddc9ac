//! Where a server listens: TCP addresses and Unix sockets.

use crate::{
    Error, Reason, Result,
    net::{Incoming, accept_tcp, accept_unix},
};
use std::{fmt, io, net::SocketAddr, path::PathBuf, str::FromStr};
use tokio::net::{TcpListener, UnixListener, UnixStream};

/// One address to listen on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// `address:port`; port 0 takes a free one.
    Tcp(SocketAddr),
    /// `unix:/path`.
    Unix(PathBuf),
}

impl Listen {
    /// Whether only programs of this machine can connect.
    pub fn is_local(&self) -> bool {
        match self {
            Self::Tcp(address) => address.ip().is_loopback(),
            Self::Unix(_) => true,
        }
    }

    /// Whether others can connect to the address as it stands; `0.0.0.0` is none that one can connect to.
    pub fn is_specific(&self) -> bool {
        match self {
            Self::Tcp(address) => !address.ip().is_unspecified(),
            Self::Unix(_) => true,
        }
    }

    /// Starts to listen. Answers the connections and the address by which others reach it (with the port that was
    /// taken for port 0).
    ///
    /// # Errors
    /// `IO` naming the address, such as one that is in use.
    pub async fn bind(&self) -> Result<(Incoming, String)> {
        let at = |error: io::Error| {
            Error::new(Reason::Io, format!("could not listen on {self}: {error}; choose another --listen"))
        };
        match self {
            Self::Tcp(address) => {
                let listener = TcpListener::bind(address).await.map_err(at)?;
                let uri = format!("http://{}", listener.local_addr().map_err(at)?);
                Ok((accept_tcp(listener), uri))
            }
            Self::Unix(path) => {
                // A socket that a killed server left behind refuses connections; one that answers is in use.
                let dead = matches!(UnixStream::connect(path).await,
                    Err(error) if error.kind() == io::ErrorKind::ConnectionRefused);
                if dead {
                    tokio::fs::remove_file(path).await.map_err(at)?;
                }
                let listener = UnixListener::bind(path).map_err(at)?;
                Ok((accept_unix(listener), format!("unix:{}", path.display())))
            }
        }
    }

    /// Takes a Unix socket away behind the server that listened on it. Nobody else can have taken its place: that one
    /// answered until now.
    pub fn leave(&self) {
        if let Self::Unix(path) = self
            && let Err(error) = std::fs::remove_file(path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %path.display(), %error, "the socket stays behind");
        }
    }
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            let path = PathBuf::from(path);
            return if path.is_absolute() {
                Ok(Self::Unix(path))
            } else {
                Err(format!("'{text}' has no absolute path: write unix:/path"))
            };
        }
        text.parse().map(Self::Tcp).map_err(|_| {
            format!("'{text}' is not an address to listen on: write address:port, as 127.0.0.1:7400, or unix:/path")
        })
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}
