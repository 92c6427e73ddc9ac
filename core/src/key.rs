//! Keys of the directory's store.
//!
//! ```text
//! +----------------+---------+---------------------------------------------+
//! | volume, u32 BE | table   | the rest, all numbers big endian            |
//! +----------------+---------+---------------------------------------------+
//! | 1              | d       | dentry: parent inode u64, name bytes        |
//! | 1              | i       | inode: id u64                               |
//! | 1              | h       | children stamp of a directory: inode u64    |
//! | 1              | x       | extent page: inode u64, page u64            |
//! | 1              | c       | chunk run: grant u64, first index u32       |
//! | 1              | g       | grant: id u64                               |
//! | 1              | o       | dropped chunk: grant u64, index u32         |
//! | 1              | t       | trash: id u64                               |
//! | 1              | l       | lock: inode u64                             |
//! | 1              | r       | reservation: parent inode u64, name bytes   |
//! | 1              | e       | tree epoch                                  |
//! | 1              | O, U    | reserved: orphans, uploads                  |
//! | 0              | s       | server: id u64                              |
//! | 0              | p       | placement group: id u64                     |
//! | 0              | S       | session: id u64                             |
//! | 0              | L       | lock held by a session: session u64, lock key |
//! | 0              | G       | open grant of a session: session u64, grant u64 |
//! | 0              | q       | answer: session u64, slot u16               |
//! | 0              | u       | answer: UUID, 16 bytes                      |
//! | 0              | n       | counter: name                               |
//! | 0              | C       | cluster settings                            |
//! | 0              | D       | directory on a shared store: id u64         |
//! | 0              | B       | its beat: id u64                            |
//! | 0              | H       | notice to a home: directory u64, session u64 |
//! | 0              | E       | who leads the directories                   |
//! +----------------+---------+---------------------------------------------+
//! ```
//!
//! Volume 0 is the cluster itself. Names and inodes live in volume 1; more volumes are room for later.

use crate::plan::Key;
use bytes::{BufMut, BytesMut};
use cairn_proto::id::{ChunkId, GrantId, GroupId, InodeId, ServerId, SessionId};

/// The volume of all names.
pub const VOLUME: u32 = 1;
/// The volume of what concerns the whole cluster.
pub const CLUSTER: u32 = 0;

/// Indexes of a grant that share a chunk run: a run begins at a multiple of this or later and never crosses one.
pub const RUN_CHUNKS: u32 = cairn_proto::limits::CHUNK_RUN;

fn key(volume: u32, table: u8, rest: &[&[u8]]) -> Key {
    let mut bytes = BytesMut::with_capacity(5 + rest.iter().map(|part| part.len()).sum::<usize>());
    bytes.put_u32(volume);
    bytes.put_u8(table);
    for part in rest {
        bytes.put_slice(part);
    }
    bytes.freeze()
}

/// A name in a directory.
pub fn dentry(parent: InodeId, name: &str) -> Key {
    key(VOLUME, b'd', &[&parent.0.to_be_bytes(), name.as_bytes()])
}

/// Prefix of all names in a directory.
pub fn dentries(parent: InodeId) -> Key {
    key(VOLUME, b'd', &[&parent.0.to_be_bytes()])
}

/// The parent and name of a dentry's or reservation's key; `None` for any other key.
pub fn split_name(key: &[u8]) -> Option<(InodeId, &str)> {
    let table = *key.get(4)?;
    if table != b'd' && table != b'r' {
        return None;
    }
    let parent = u64::from_be_bytes(key.get(5..13)?.try_into().ok()?);
    Some((InodeId(parent), std::str::from_utf8(key.get(13..)?).ok()?))
}

/// An inode.
pub fn inode(id: InodeId) -> Key {
    key(VOLUME, b'i', &[&id.0.to_be_bytes()])
}

/// Prefix of all inodes.
pub fn inodes() -> Key {
    key(VOLUME, b'i', &[])
}

/// What every change of a directory's entries stamps.
pub fn children(id: InodeId) -> Key {
    key(VOLUME, b'h', &[&id.0.to_be_bytes()])
}

/// A page of extents.
pub fn extent_page(inode: InodeId, page: u64) -> Key {
    key(VOLUME, b'x', &[&inode.0.to_be_bytes(), &page.to_be_bytes()])
}

/// A run of committed chunks that begins at this chunk.
pub fn chunk_run(first: ChunkId) -> Key {
    key(VOLUME, b'c', &[&first.to_key()])
}

/// Prefix of all chunk runs.
pub fn chunk_runs() -> Key {
    key(VOLUME, b'c', &[])
}

/// Prefix of the chunk runs of a grant.
pub fn chunk_runs_of(grant: GrantId) -> Key {
    key(VOLUME, b'c', &[&grant.0.to_be_bytes()])
}

/// A grant.
pub fn grant(id: GrantId) -> Key {
    key(VOLUME, b'g', &[&id.0.to_be_bytes()])
}

/// Prefix of all grants.
pub fn grants() -> Key {
    key(VOLUME, b'g', &[])
}

/// A dropped chunk that waits for collection.
pub fn dropped(chunk: ChunkId) -> Key {
    key(VOLUME, b'o', &[&chunk.to_key()])
}

/// Prefix of the dropped chunks of a grant.
pub fn dropped_in(grant: GrantId) -> Key {
    key(VOLUME, b'o', &[&grant.0.to_be_bytes()])
}

/// Prefix of all dropped chunks.
pub fn all_dropped() -> Key {
    key(VOLUME, b'o', &[])
}

/// Extents that no version refers to any more, to be accounted for.
pub fn trash(id: u64) -> Key {
    key(VOLUME, b't', &[&id.to_be_bytes()])
}

/// Prefix of all trash.
pub fn all_trash() -> Key {
    key(VOLUME, b't', &[])
}

/// The lock on an inode.
pub fn lock(inode: InodeId) -> Key {
    key(VOLUME, b'l', &[&inode.0.to_be_bytes()])
}

/// Prefix of all locks on inodes.
pub fn locks() -> Key {
    key(VOLUME, b'l', &[])
}

/// The lock on a name that does not exist yet.
pub fn reservation(parent: InodeId, name: &str) -> Key {
    key(VOLUME, b'r', &[&parent.0.to_be_bytes(), name.as_bytes()])
}

/// Prefix of all reservations.
pub fn reservations() -> Key {
    key(VOLUME, b'r', &[])
}

/// Prefix of the reservations in a directory.
pub fn reservations_in(parent: InodeId) -> Key {
    key(VOLUME, b'r', &[&parent.0.to_be_bytes()])
}

/// What renames of directories between parents share, so that two cannot make a cycle together.
pub fn tree_epoch() -> Key {
    key(VOLUME, b'e', &[])
}

/// A file server.
pub fn server(id: ServerId) -> Key {
    key(CLUSTER, b's', &[&id.0.to_be_bytes()])
}

/// Prefix of all file servers.
pub fn servers() -> Key {
    key(CLUSTER, b's', &[])
}

/// A placement group.
pub fn group(id: GroupId) -> Key {
    key(CLUSTER, b'p', &[&id.0.to_be_bytes()])
}

/// Prefix of all placement groups.
pub fn groups() -> Key {
    key(CLUSTER, b'p', &[])
}

/// A session.
pub fn session(id: SessionId) -> Key {
    key(CLUSTER, b'S', &[&id.0.to_be_bytes()])
}

/// Prefix of all sessions.
pub fn sessions() -> Key {
    key(CLUSTER, b'S', &[])
}

/// That a session holds a lock or reservation, by the key of that.
pub fn session_lock(session: SessionId, lock: &Key) -> Key {
    key(CLUSTER, b'L', &[&session.0.to_be_bytes(), lock])
}

/// Prefix of all locks of a session.
pub fn session_locks(session: SessionId) -> Key {
    key(CLUSTER, b'L', &[&session.0.to_be_bytes()])
}

/// That a session owns an open grant.
pub fn session_grant(session: SessionId, grant: GrantId) -> Key {
    key(CLUSTER, b'G', &[&session.0.to_be_bytes(), &grant.0.to_be_bytes()])
}

/// Prefix of the open grants of all sessions.
pub fn all_session_grants() -> Key {
    key(CLUSTER, b'G', &[])
}

/// Prefix of all open grants of a session.
pub fn session_grants(session: SessionId) -> Key {
    key(CLUSTER, b'G', &[&session.0.to_be_bytes()])
}

/// The answer to a session's request; sequences share slots, so that a session keeps a bounded number.
pub fn answer(session: SessionId, sequence: u64) -> Key {
    let slot = (sequence % cairn_proto::limits::ANSWERS_PER_SESSION) as u16;
    key(CLUSTER, b'q', &[&session.0.to_be_bytes(), &slot.to_be_bytes()])
}

/// Prefix of all answers of a session.
pub fn answers(session: SessionId) -> Key {
    key(CLUSTER, b'q', &[&session.0.to_be_bytes()])
}

/// The answer to a request named by a UUID.
pub fn answer_uuid(uuid: [u8; 16]) -> Key {
    key(CLUSTER, b'u', &[&uuid])
}

/// Prefix of all answers to requests named by a UUID.
pub fn answer_uuids() -> Key {
    key(CLUSTER, b'u', &[])
}

/// A counter.
pub fn counter(name: &str) -> Key {
    key(CLUSTER, b'n', &[name.as_bytes()])
}

/// Settings of the cluster.
pub fn settings() -> Key {
    key(CLUSTER, b'C', &[])
}

/// A directory that shares its store with others.
pub fn directory(id: u64) -> Key {
    key(CLUSTER, b'D', &[&id.to_be_bytes()])
}

/// Prefix of all directories that share the store.
pub fn directories() -> Key {
    key(CLUSTER, b'D', &[])
}

/// A directory's sign of life.
pub fn beat(directory: u64) -> Key {
    key(CLUSTER, b'B', &[&directory.to_be_bytes()])
}

/// Prefix of the signs of life of all directories.
pub fn beats() -> Key {
    key(CLUSTER, b'B', &[])
}

/// That another directory took a session over from its home, or ended it.
pub fn notice(home: u64, session: SessionId) -> Key {
    key(CLUSTER, b'H', &[&home.to_be_bytes(), &session.0.to_be_bytes()])
}

/// Prefix of all notices to a home.
pub fn notices(home: u64) -> Key {
    key(CLUSTER, b'H', &[&home.to_be_bytes()])
}

/// Which directory does the background work.
pub fn lead() -> Key {
    key(CLUSTER, b'E', &[])
}

/// The number at the end of a key whose last 8 bytes are one.
pub fn last_u64(key: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(key.get(key.len().checked_sub(8)?..)?.try_into().ok()?))
}

/// The chunk id at the end of a key whose last 12 bytes are one.
pub fn last_chunk(key: &[u8]) -> Option<ChunkId> {
    let tail = key.get(key.len().checked_sub(12)?..)?;
    let grant = u64::from_be_bytes(tail[..8].try_into().ok()?);
    let index = u32::from_be_bytes(tail[8..].try_into().ok()?);
    Some(ChunkId::new(grant, index))
}

/// The first key behind all keys with a prefix; `None` when there is none.
pub fn prefix_end(prefix: &[u8]) -> Option<Key> {
    let keep = prefix.iter().rposition(|byte| *byte != 0xff)?;
    let mut end = BytesMut::from(&prefix[..=keep]);
    end[keep] += 1;
    Some(end.freeze())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_a_directory_are_together_and_in_order() {
        let (a, b) = (dentry(InodeId(7), "a"), dentry(InodeId(7), "b"));
        assert!(a < b && a.starts_with(&dentries(InodeId(7))));
        assert!(b < dentry(InodeId(8), ""));
        assert_eq!(split_name(&b), Some((InodeId(7), "b")));
        assert_eq!(split_name(&inode(InodeId(7))), None);
    }

    #[test]
    fn the_end_of_a_prefix_is_behind_all_its_keys() {
        let end = prefix_end(&dentries(InodeId(7))).unwrap();
        assert!(dentry(InodeId(7), "\u{10ffff}") < end && end <= dentries(InodeId(8)));
        assert_eq!(prefix_end(&[0xff, 0xff]), None);
        assert_eq!(prefix_end(&[1, 0xff]).as_deref(), Some(&[2u8][..]));
    }

    #[test]
    fn ids_are_read_back_from_keys() {
        assert_eq!(last_u64(&grant(GrantId(9))), Some(9));
        assert_eq!(last_chunk(&dropped(ChunkId::new(3, 4))), Some(ChunkId::new(3, 4)));
        assert_eq!(last_u64(b"short"), None);
    }
}
