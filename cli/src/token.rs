//! Which changes of a command a lock's token is for.
//!
//! `cairn lock` hands its token to all commands below it, which may change other files as well. So a token is sent
//! with the change of the file that it locks, and with no other. One that is no longer held is sent with the change of
//! the path that it was for, so that the directory refuses it: its owner believes to be alone there and is not.

use crate::{
    args::{TOKEN_PATH_VARIABLE, TOKEN_VARIABLE},
    failure::Failure,
};
use cairn_proto::{Error, Reason, id::FencingToken, v1::LockInfo};
use client_lib::Client;
use futures::TryStreamExt as _;

/// The lock of a token that was given, as it is at the start of the command; the directory checks again at each change.
#[derive(Clone, Debug)]
pub enum Held {
    /// No token was given.
    Nothing,
    /// It is held.
    Lock(FencingToken, Box<LockInfo>),
    /// It was for this path, and is not held any more.
    Lost(FencingToken, String),
}

impl Held {
    /// Looks up what a token locks.
    ///
    /// # Errors
    /// `LOCK_LOST` when no lock with this token is held and nobody knows which path it was for.
    pub async fn find(client: &Client, token: Option<FencingToken>) -> Result<Self, Failure> {
        let Some(token) = token else { return Ok(Self::Nothing) };
        let mut locks = client.locks();
        while let Some(lock) = locks.try_next().await.map_err(Failure::at(""))? {
            if lock.token.map(FencingToken::from) == Some(token) {
                return Ok(Self::Lock(token, Box::new(lock)));
            }
        }
        match handed_on(token) {
            Some(path) => Ok(Self::Lost(token, path)),
            None => {
                let message = "it is no longer held: the lock ended or was taken away, lock again";
                Err(Failure::at(format!("token {token}"))(Error::new(Reason::LockLost, message)))
            }
        }
    }

    /// The token, when it is for this path.
    pub async fn of(&self, client: &Client, path: &str) -> Result<Option<FencingToken>, Failure> {
        let (token, lock) = match self {
            Self::Nothing => return Ok(None),
            Self::Lost(token, lost) => return Ok(is_same(lost, path).then_some(*token)),
            Self::Lock(token, lock) => (token, lock),
        };
        // Where the locked file leads now counts, not where it was: it or a directory above may have been renamed.
        if lock.inode == 0 {
            return Ok(is_same(&lock.path, path).then_some(*token));
        }
        match client.stat(path).await {
            Ok(there) => Ok((there.inode == lock.inode).then_some(*token)),
            Err(error) if matches!(error.reason, Reason::NotFound | Reason::NotADirectory) => Ok(None),
            Err(error) => Err(Failure::at(path)(error)),
        }
    }
}

/// The path that came with the token from `cairn lock`.
fn handed_on(token: FencingToken) -> Option<String> {
    let handed: FencingToken = std::env::var(TOKEN_VARIABLE).ok()?.parse().ok()?;
    std::env::var(TOKEN_PATH_VARIABLE).ok().filter(|path| handed == token && !path.is_empty())
}

/// Whether two ways of writing a path are the same path.
pub fn is_same(one: &str, other: &str) -> bool {
    fn names(path: &str) -> impl Iterator<Item = &str> {
        path.split('/').filter(|name| !name.is_empty())
    }
    names(one).eq(names(other))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slashes_make_no_other_path() {
        assert!(is_same("/a//b/", "a/b"));
        assert!(is_same("/", "//"));
        assert!(!is_same("/a", "/a/b"));
    }
}
