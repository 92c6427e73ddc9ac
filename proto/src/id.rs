//! Newtypes for what could be mixed up: ids, tokens, epochs.

use crate::v1;
use std::{fmt, str::FromStr};

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl From<u64> for $name {
            fn from(value: u64) -> Self {
                Self(value)
            }
        }
    };
}

id!(
    /// A file or directory; never changes, never reused.
    InodeId
);
id!(
    /// A file server, given by the directory.
    ServerId
);
id!(
    /// A placement group.
    GroupId
);
id!(
    /// A run of chunk ids given to one writer.
    GrantId
);
id!(
    /// A client's standing with the directory.
    SessionId
);
id!(
    /// The number of an applied plan.
    Revision
);
id!(
    /// The life of the directory's store.
    Generation
);
id!(
    /// Grows with every change of a group.
    Epoch
);
id!(
    /// What one commit made of a file.
    Version
);

/// The root directory.
pub const ROOT_INODE: InodeId = InodeId(1);

/// Names one immutable run of bytes: (grant, index).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkId {
    /// The grant that the id was taken from.
    pub grant: GrantId,
    /// The position within the grant.
    pub index: u32,
}

impl ChunkId {
    /// A chunk id from its parts.
    pub const fn new(grant: u64, index: u32) -> Self {
        Self { grant: GrantId(grant), index }
    }

    /// The 12 bytes that order as the id does (big endian).
    pub fn to_key(self) -> [u8; 12] {
        let mut key = [0; 12];
        key[..8].copy_from_slice(&self.grant.0.to_be_bytes());
        key[8..].copy_from_slice(&self.index.to_be_bytes());
        key
    }
}

impl fmt::Display for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.grant, self.index)
    }
}

impl From<ChunkId> for v1::ChunkId {
    fn from(id: ChunkId) -> Self {
        Self { grant_id: id.grant.0, index: id.index }
    }
}

impl From<&v1::ChunkId> for ChunkId {
    fn from(id: &v1::ChunkId) -> Self {
        Self::new(id.grant_id, id.index)
    }
}

impl From<v1::ChunkId> for ChunkId {
    fn from(id: v1::ChunkId) -> Self {
        Self::from(&id)
    }
}

/// Proves a lock's grant; of one inode or name they only grow, also across delete and re-create.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FencingToken {
    /// The life of the store that granted it.
    pub generation: Generation,
    /// The revision of the granting plan.
    pub revision: Revision,
}

impl fmt::Display for FencingToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.generation, self.revision)
    }
}

impl FromStr for FencingToken {
    type Err = crate::Error;

    /// Parses the form that `Display` writes: `generation.revision`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let (generation, revision) = text.split_once('.')?;
            Some(Self {
                generation: Generation(generation.parse().ok()?),
                revision: Revision(revision.parse().ok()?),
            })
        };
        parse().ok_or_else(|| {
            crate::Error::invalid(format!("'{text}' is not a lock token (generation.revision)"))
        })
    }
}

impl From<FencingToken> for v1::FencingToken {
    fn from(token: FencingToken) -> Self {
        Self { generation: token.generation.0, revision: token.revision.0 }
    }
}

impl From<v1::FencingToken> for FencingToken {
    fn from(token: v1::FencingToken) -> Self {
        Self { generation: Generation(token.generation), revision: Revision(token.revision) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_order_by_generation_then_revision_and_parse_back() {
        let old = FencingToken { generation: Generation(1), revision: Revision(900) };
        let new = FencingToken { generation: Generation(2), revision: Revision(3) };
        assert!(old < new);
        assert_eq!(old.to_string().parse::<FencingToken>().unwrap(), old);
        assert!("7".parse::<FencingToken>().is_err());
        assert!("1.x".parse::<FencingToken>().is_err());
    }

    #[test]
    fn chunk_keys_order_as_ids() {
        assert!(ChunkId::new(1, 300).to_key() < ChunkId::new(2, 0).to_key());
        assert!(ChunkId::new(2, 255).to_key() < ChunkId::new(2, 256).to_key());
    }
}
