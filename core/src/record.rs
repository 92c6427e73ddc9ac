//! Records of the directory's store.
//!
//! On disk a record is one byte, its version, and a protobuf message. A version that this program does not know is an
//! error, never skipped; fields may be added to a message without a new version when leaving them out is right for
//! every older record.

use bytes::{BufMut, Bytes, BytesMut};
use cairn_proto::{
    Error, Result,
    id::{ChunkId, FencingToken, Generation, Revision},
};
use prost::Message;

/// A record with its version.
pub trait Record: Message + Default {
    /// The version that this program writes and reads.
    const VERSION: u8 = 1;
    /// What it is, for messages.
    const NAME: &'static str;

    /// The bytes to store.
    fn to_bytes(&self) -> Bytes {
        let mut bytes = BytesMut::with_capacity(1 + self.encoded_len());
        bytes.put_u8(Self::VERSION);
        bytes.put_slice(&self.encode_to_vec());
        bytes.freeze()
    }

    /// Reads stored bytes.
    ///
    /// # Errors
    /// `INTERNAL` for another version or damaged bytes.
    fn from_bytes(bytes: &[u8]) -> Result<Self> {
        match bytes.split_first() {
            Some((version, message)) if *version == Self::VERSION => Self::decode(message)
                .map_err(|error| Error::internal(format!("a stored {} is damaged: {error}", Self::NAME))),
            Some((version, _)) => Err(Error::internal(format!(
                "a stored {} has version {version}, this program knows {}: run the version that wrote it or newer",
                Self::NAME,
                Self::VERSION
            ))),
            None => Err(Error::internal(format!("a stored {} is empty", Self::NAME))),
        }
    }
}

macro_rules! record {
    ($name:ident, $text:literal) => {
        impl Record for $name {
            const NAME: &'static str = $text;
        }
    };
}

/// What a name leads to.
#[derive(Clone, PartialEq, Message)]
pub struct Dentry {
    /// The inode.
    #[prost(uint64, tag = "1")]
    pub inode: u64,
    /// `v1::Kind`, so that a list needs no inode.
    #[prost(int32, tag = "2")]
    pub kind: i32,
}
record!(Dentry, "directory entry");

/// A run of a file's bytes in a chunk. Holes are not stored: they are where no extent is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Message)]
pub struct Extent {
    /// Position in the file.
    #[prost(uint64, tag = "1")]
    pub offset: u64,
    /// Length of the run, at least 1.
    #[prost(uint64, tag = "2")]
    pub length: u64,
    /// The chunk's grant.
    #[prost(uint64, tag = "3")]
    pub grant: u64,
    /// The chunk's index.
    #[prost(uint32, tag = "4")]
    pub index: u32,
    /// Position in the chunk.
    #[prost(uint64, tag = "5")]
    pub chunk_offset: u64,
    /// The chunk's group.
    #[prost(uint64, tag = "6")]
    pub group: u64,
    /// Length of the whole chunk.
    #[prost(uint64, tag = "7")]
    pub chunk_length: u64,
    /// Checksum of the whole chunk.
    #[prost(fixed64, tag = "8")]
    pub chunk_checksum: u64,
}

impl Extent {
    /// The chunk.
    pub fn chunk(&self) -> ChunkId {
        ChunkId::new(self.grant, self.index)
    }

    /// The position behind the last byte.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.length)
    }
}

/// Where a page of extents (or of references to pages) is and what it covers.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct PageRef {
    /// The page's number within the inode, never reused.
    #[prost(uint64, tag = "1")]
    pub page: u64,
    /// Position in the file of its first extent.
    #[prost(uint64, tag = "2")]
    pub offset: u64,
    /// Position in the file behind its last extent.
    #[prost(uint64, tag = "3")]
    pub end: u64,
    /// Number of extents below it.
    #[prost(uint64, tag = "4")]
    pub extents: u64,
}

/// Where a file's bytes are: a few extents inline, or a tree of immutable pages.
#[derive(Clone, PartialEq, Message)]
pub struct Layout {
    /// Up to [`INLINE_EXTENTS_MAX`] extents, when there are no pages.
    #[prost(message, repeated, tag = "1")]
    pub extents: Vec<Extent>,
    /// The root's references, when there are more.
    #[prost(message, repeated, tag = "2")]
    pub pages: Vec<PageRef>,
    /// Levels of pages below the root's references: 1 when they lead to extents.
    #[prost(uint32, tag = "3")]
    pub depth: u32,
    /// The next unused page number.
    #[prost(uint64, tag = "4")]
    pub next_page: u64,
}

/// Extents that an inode's record holds by itself.
pub const INLINE_EXTENTS_MAX: usize = 16;

/// A page of a layout: extents, or references to pages. Immutable.
#[derive(Clone, PartialEq, Message)]
pub struct ExtentPage {
    /// Extents in order, in a leaf.
    #[prost(message, repeated, tag = "1")]
    pub extents: Vec<Extent>,
    /// References in order, in an inner page.
    #[prost(message, repeated, tag = "2")]
    pub pages: Vec<PageRef>,
}
record!(ExtentPage, "extent page");

/// A name-value pair kept with an inode.
#[derive(Clone, PartialEq, Message)]
pub struct Xattr {
    /// The name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// The value.
    #[prost(bytes = "bytes", tag = "2")]
    pub value: Bytes,
}

/// A file or directory.
#[derive(Clone, PartialEq, Message)]
pub struct Inode {
    /// `v1::Kind`.
    #[prost(int32, tag = "1")]
    pub kind: i32,
    /// Permission bits.
    #[prost(uint32, tag = "2")]
    pub mode: u32,
    /// Owner.
    #[prost(uint32, tag = "3")]
    pub uid: u32,
    /// Owning group.
    #[prost(uint32, tag = "4")]
    pub gid: u32,
    /// Last access, ns since 1970.
    #[prost(uint64, tag = "5")]
    pub atime_ns: u64,
    /// Last change of content.
    #[prost(uint64, tag = "6")]
    pub mtime_ns: u64,
    /// Last change of the inode; grows with every change.
    #[prost(uint64, tag = "7")]
    pub ctime_ns: u64,
    /// Number of names.
    #[prost(uint32, tag = "8")]
    pub nlink: u32,
    /// What one commit made of it; only grows. 1 for an empty file just made.
    #[prost(uint64, tag = "9")]
    pub version: u64,
    /// Grows with every change of the layout, also one that keeps the version (compaction of extents).
    #[prost(uint64, tag = "10")]
    pub layout_version: u64,
    /// Size of a file in bytes.
    #[prost(uint64, tag = "11")]
    pub size: u64,
    /// Where a file's bytes are.
    #[prost(message, optional, tag = "12")]
    pub layout: Option<Layout>,
    /// The directory that holds a directory; 0 for files and the root.
    #[prost(uint64, tag = "13")]
    pub parent: u64,
    /// User metadata, in order of names.
    #[prost(message, repeated, tag = "14")]
    pub xattrs: Vec<Xattr>,
    /// Changes with every version.
    #[prost(string, tag = "15")]
    pub etag: String,
    /// Reserved for quotas.
    #[prost(uint64, tag = "16")]
    pub project_id: u64,
    /// Replication factor of what is written here; 0: inherited.
    #[prost(uint32, tag = "17")]
    pub replication: u32,
    /// Copies that must be durable; 0: from the factor.
    #[prost(uint32, tag = "18")]
    pub min_copies: u32,
    /// Checksum of the content, where it is known.
    #[prost(fixed64, optional, tag = "19")]
    pub checksum: Option<u64>,
}
record!(Inode, "inode");

/// A committed chunk within a run.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct RunChunk {
    /// Length in bytes.
    #[prost(uint64, tag = "1")]
    pub length: u64,
    /// CRC-64/NVME of all bytes.
    #[prost(fixed64, tag = "2")]
    pub checksum: u64,
    /// Bytes that the current version refers to. 0: dropped (see the `dropped` record).
    #[prost(uint64, tag = "3")]
    pub live_bytes: u64,
    /// Reserved for snapshots and clones.
    #[prost(uint32, tag = "4")]
    pub references: u32,
}

/// Chunks with consecutive indexes that one commit made of one inode.
#[derive(Clone, PartialEq, Message)]
pub struct ChunkRun {
    /// The inode they belong to.
    #[prost(uint64, tag = "1")]
    pub inode: u64,
    /// Their group.
    #[prost(uint64, tag = "2")]
    pub group: u64,
    /// The chunks, from the index in the key on. At most [`crate::key::RUN_CHUNKS`].
    #[prost(message, repeated, tag = "3")]
    pub chunks: Vec<RunChunk>,
}
record!(ChunkRun, "chunk run");

/// A run of chunk ids given to one writer.
#[derive(Clone, PartialEq, Message)]
pub struct Grant {
    /// Where its chunks go.
    #[prost(uint64, tag = "1")]
    pub group: u64,
    /// The session that owns it.
    #[prost(uint64, tag = "2")]
    pub session: u64,
    /// The upload that owns it instead; reserved.
    #[prost(uint64, tag = "3")]
    pub upload: u64,
    /// Number of ids.
    #[prost(uint32, tag = "4")]
    pub count: u32,
    /// No commit may refer to it any more; what is garbage in it stays garbage.
    #[prost(bool, tag = "5")]
    pub closed: bool,
    /// It was open when the directory was rebuilt: chunks of it that no record knows may be of an acknowledged commit
    /// that was lost. They are kept and listed.
    #[prost(bool, tag = "6")]
    pub rebuilt: bool,
}
record!(Grant, "grant");

/// A chunk that no version refers to. The record's revision is that of the drop.
#[derive(Clone, PartialEq, Message)]
pub struct Dropped {
    /// Its group.
    #[prost(uint64, tag = "1")]
    pub group: u64,
    /// Its length in bytes.
    #[prost(uint64, tag = "2")]
    pub length: u64,
    /// Its checksum.
    #[prost(fixed64, tag = "3")]
    pub checksum: u64,
    /// Servers that are known to be rid of it.
    #[prost(uint64, repeated, tag = "4")]
    pub collected: Vec<u64>,
    /// Revision of the drop, once this record was written again since. 0: that of this very record.
    #[prost(uint64, tag = "5")]
    pub revision: u64,
}
record!(Dropped, "dropped chunk");

/// What a commit or delete took out of a version. Worked off in the background: live bytes of chunks sink, chunks
/// without any are dropped, pages are removed.
#[derive(Clone, PartialEq, Message)]
pub struct Trash {
    /// The inode it was taken from.
    #[prost(uint64, tag = "1")]
    pub inode: u64,
    /// Extents by themselves.
    #[prost(message, repeated, tag = "2")]
    pub extents: Vec<Extent>,
    /// Leaf pages whose extents are all trash, and which are to be removed.
    #[prost(uint64, repeated, tag = "3")]
    pub leaves: Vec<u64>,
    /// Pages to be removed whose extents live on elsewhere or are listed here.
    #[prost(uint64, repeated, tag = "4")]
    pub bare_pages: Vec<u64>,
    /// Inner pages whose whole subtree is trash: (page, depth) pairs flattened.
    #[prost(uint64, repeated, tag = "5")]
    pub subtrees: Vec<u64>,
}
record!(Trash, "trash");

/// One holder of a lock.
#[derive(Clone, PartialEq, Message)]
pub struct LockHolder {
    /// The session.
    #[prost(uint64, tag = "1")]
    pub session: u64,
    /// Generation of the token.
    #[prost(uint64, tag = "2")]
    pub generation: u64,
    /// Revision of the token. 0: that of this very record; whoever rewrites the record fills it in first
    /// ([`Lock::settle`]).
    #[prost(uint64, tag = "3")]
    pub revision: u64,
    /// The holder as it named itself.
    #[prost(string, tag = "4")]
    pub owner: String,
}

impl LockHolder {
    /// The token, of a lock record that was written at `written`.
    pub fn token(&self, written: Revision) -> FencingToken {
        let revision = if self.revision == 0 { written } else { Revision(self.revision) };
        FencingToken { generation: Generation(self.generation), revision }
    }
}

/// A lock on an inode, or on a name that does not exist yet. No record: nobody holds one.
#[derive(Clone, PartialEq, Message)]
pub struct Lock {
    /// `v1::LockMode`.
    #[prost(int32, tag = "1")]
    pub mode: i32,
    /// One holder when exclusive.
    #[prost(message, repeated, tag = "2")]
    pub holders: Vec<LockHolder>,
    /// The path by which it was taken, for messages.
    #[prost(string, tag = "3")]
    pub path: String,
}
record!(Lock, "lock");

impl Lock {
    /// Fills in the tokens that meant "the revision of this record", before the record is rewritten.
    pub fn settle(&mut self, written: Revision) {
        for holder in &mut self.holders {
            holder.revision = holder.token(written).revision.0;
        }
    }
}

/// A client's standing.
#[derive(Clone, PartialEq, Message)]
pub struct Session {
    /// Life without renewal.
    #[prost(uint64, tag = "1")]
    pub ttl_ms: u64,
    /// Who opened it.
    #[prost(string, tag = "2")]
    pub owner: String,
    /// It has ended: its locks and grants are being ended in steps, answers are kept for one more TTL.
    #[prost(bool, tag = "3")]
    pub ended: bool,
    /// It was opened by `Lock` and ends with its lock.
    #[prost(bool, tag = "4")]
    pub of_lock: bool,
    /// Reserved: who it is, when callers prove that.
    #[prost(string, tag = "5")]
    pub principal: String,
    /// Reserved: whose data it may see.
    #[prost(string, tag = "6")]
    pub tenant: String,
    /// Of several directories on one store, the one that renews and expires it ([`crate::cluster::directories`]).
    /// 0: the only one there is.
    #[prost(uint64, tag = "7")]
    pub home: u64,
}
record!(Session, "session");

/// The answer to a mutating request.
#[derive(Clone, PartialEq, Message)]
pub struct Answer {
    /// The request's sequence number in its session; 0 with a UUID.
    #[prost(uint64, tag = "1")]
    pub sequence: u64,
    /// Hash of the request, so that an id used for another request is noticed.
    #[prost(fixed64, tag = "2")]
    pub request_hash: u64,
    /// The encoded response. Where it has a `revision` field of 0, the record's own revision is meant.
    #[prost(bytes = "bytes", tag = "3")]
    pub response: Bytes,
}
record!(Answer, "answer");

/// A counter's next value.
#[derive(Clone, PartialEq, Message)]
pub struct Counter {
    /// The first value that nobody was given.
    #[prost(uint64, tag = "1")]
    pub next: u64,
}
record!(Counter, "counter");

/// One way to reach a server.
#[derive(Clone, PartialEq, Message)]
pub struct Endpoint {
    /// `http://host:port` or `unix:/path`.
    #[prost(string, tag = "1")]
    pub uri: String,
    /// `v1::EndpointScope`.
    #[prost(int32, tag = "2")]
    pub scope: i32,
}

/// A file server.
#[derive(Clone, PartialEq, Message)]
pub struct Server {
    /// Identity of its disk.
    #[prost(string, tag = "1")]
    pub disk_id: String,
    /// How to reach it.
    #[prost(message, repeated, tag = "2")]
    pub endpoints: Vec<Endpoint>,
    /// Its failure domain.
    #[prost(string, tag = "3")]
    pub zone: String,
    /// An operator asked to empty it.
    #[prost(bool, tag = "4")]
    pub draining: bool,
    /// It holds nothing any more and was released.
    #[prost(bool, tag = "5")]
    pub gone: bool,
    /// Size of its disk when it last registered.
    #[prost(uint64, tag = "6")]
    pub total_bytes: u64,
    /// The life of its process when it last registered.
    #[prost(string, tag = "7")]
    pub incarnation: String,
    /// How often it had been started on its disk when it last registered; 0 when it did not say.
    #[prost(uint64, tag = "8")]
    pub starts: u64,
}
record!(Server, "server");

/// A placement group. Seats are by number: `seats[n]` is seat n, 0 an empty one.
#[derive(Clone, PartialEq, Message)]
pub struct Group {
    /// Whole copies.
    #[prost(uint32, tag = "1")]
    pub replicas: u32,
    /// Copies that must be durable before an acknowledgement.
    #[prost(uint32, tag = "2")]
    pub min_copies: u32,
    /// Servers by seat number.
    #[prost(uint64, repeated, tag = "3")]
    pub seats: Vec<u64>,
    /// The member that takes writes.
    #[prost(uint64, tag = "4")]
    pub primary: u64,
    /// Grows with every change.
    #[prost(uint64, tag = "5")]
    pub epoch: u64,
    /// Servers that held a seat and whose copies are not yet known to be surplus.
    #[prost(uint64, repeated, tag = "6")]
    pub former: Vec<u64>,
    /// Reserved: schemes other than whole copies.
    #[prost(uint32, tag = "7")]
    pub scheme: u32,
    /// It was made for files that ask for fewer copies than the cluster's default: it is not raised with that.
    #[prost(bool, tag = "8")]
    pub fixed: bool,
}
record!(Group, "placement group");

/// Settings of the cluster.
#[derive(Clone, PartialEq, Message)]
pub struct Settings {
    /// Default replication factor; raised automatically, never lowered. 0: not yet decided.
    #[prost(uint32, tag = "1")]
    pub replication: u32,
    /// An operator's choice of copies that must be durable; 0: from the factor.
    #[prost(uint32, tag = "2")]
    pub min_copies: u32,
    /// Servers that carry the journal.
    #[prost(uint64, repeated, tag = "3")]
    pub carriers: Vec<u64>,
    /// An operator fixed the replication factor: it is not raised automatically.
    #[prost(bool, tag = "4")]
    pub replication_fixed: bool,
    /// The generation that the store was prepared for: after a rebuild, ids and epochs begin anew beyond what was lost.
    #[prost(uint64, tag = "5")]
    pub generation: u64,
    /// Made with each generation: two stores that were given the same number are told apart by it. Empty in stores made
    /// before there were such ids.
    #[prost(string, tag = "6")]
    pub store_id: String,
    /// Of a rebuilt store that has not served yet: the generation that it was made from; 0 otherwise.
    #[prost(uint64, tag = "7")]
    pub base_generation: u64,
    /// Of the same: the revision that it was made from.
    #[prost(uint64, tag = "8")]
    pub base_revision: u64,
    /// While the carriers change: those before, until enough of both know of the change
    /// ([`crate::cluster::carriers`]).
    #[prost(uint64, repeated, tag = "9")]
    pub carriers_before: Vec<u64>,
    /// The cluster's id, a UUID, of a store that several directories share; one that has its store to itself keeps the
    /// id beside it.
    #[prost(string, tag = "10")]
    pub cluster_id: String,
}
record!(Settings, "cluster settings");

mod directories;
pub use directories::{Beat, Directory, Lead};

#[cfg(test)]
mod hostile;
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_version_refuses_and_says_so() {
        let mut bytes = Dentry { inode: 5, kind: 1 }.to_bytes().to_vec();
        assert_eq!(Dentry::from_bytes(&bytes).unwrap().inode, 5);
        bytes[0] = 9;
        let error = Dentry::from_bytes(&bytes).unwrap_err();
        assert!(error.message().contains("version 9"), "{error}");
        assert!(Dentry::from_bytes(&[]).is_err());
    }

    #[test]
    fn a_token_is_the_revision_of_its_record_until_that_is_rewritten() {
        let holder = LockHolder { session: 1, generation: 2, revision: 0, owner: String::new() };
        let mut lock = Lock { mode: 2, holders: vec![holder], path: "/a".into() };
        assert_eq!(lock.holders[0].token(Revision(40)).revision, Revision(40));
        lock.settle(Revision(40));
        assert_eq!(lock.holders[0].token(Revision(41)).revision, Revision(40));
    }

    proptest::proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let _ = Inode::from_bytes(&bytes);
            let _ = ChunkRun::from_bytes(&bytes);
            let _ = Lock::from_bytes(&bytes);
            let _ = Group::from_bytes(&bytes);
        }
    }
}
