//! Hostile bytes in the values and keys of the directory's store.

use super::*;
use crate::{key, layout};
use cairn_proto::id::{GrantId, InodeId, SessionId};
use fuzz::Decoder;

/// Reads bytes as one kind of record; what is read must come back the same from its own bytes.
fn read<R: Record + Clone + PartialEq + std::fmt::Debug>(bytes: &[u8]) {
    if let Ok(record) = R::from_bytes(bytes) {
        assert_eq!(R::from_bytes(&record.to_bytes()).expect("own bytes"), record);
    }
}

/// All kinds of values, in one place, so that a new one is not forgotten.
const KINDS: [fn(&[u8]); 14] = [
    read::<Dentry>,
    read::<ExtentPage>,
    read::<Inode>,
    read::<ChunkRun>,
    read::<Grant>,
    read::<Dropped>,
    read::<Trash>,
    read::<Lock>,
    read::<Session>,
    read::<Answer>,
    read::<Counter>,
    read::<Server>,
    read::<Group>,
    read::<Settings>,
];

fn samples() -> Vec<Bytes> {
    let extent = Extent { offset: 1, length: 2, grant: 3, index: 4, chunk_checksum: 5, ..Extent::default() };
    let inline = Layout { extents: vec![extent; 3], next_page: 2, ..Layout::default() };
    vec![
        Dentry { inode: 9, kind: 1 }.to_bytes(),
        ExtentPage {
            extents: vec![extent; 5],
            pages: vec![PageRef { page: 1, offset: 2, end: 3, extents: 4 }],
        }
        .to_bytes(),
        Inode {
            layout: Some(inline),
            xattrs: vec![Xattr { name: "user.a".into(), value: "b".into() }],
            ..Inode::default()
        }
        .to_bytes(),
        ChunkRun { chunks: vec![RunChunk::default(); 3], ..ChunkRun::default() }.to_bytes(),
        Grant::default().to_bytes(),
        Dropped::default().to_bytes(),
        Trash { extents: vec![extent; 2], subtrees: vec![1, 2], leaves: vec![3], ..Trash::default() }
            .to_bytes(),
        Lock { holders: vec![LockHolder::default(); 2], ..Lock::default() }.to_bytes(),
        Session::default().to_bytes(),
        Answer::default().to_bytes(),
        Counter::default().to_bytes(),
        Server { endpoints: vec![Endpoint::default(); 2], ..Server::default() }.to_bytes(),
        Group::default().to_bytes(),
        Settings::default().to_bytes(),
    ]
}

#[test]
fn hostile_records_are_refused_or_read() {
    // A field without content takes two bytes and becomes a struct: that is the multiple. Here the bytes are read as
    // each kind in turn, and written again.
    let mut decoder = Decoder::new("store-records").memory(256, 16 * 1024);
    for sample in samples() {
        decoder = decoder.sample(sample);
    }
    decoder.run(|bytes| KINDS.iter().for_each(|kind| kind(bytes)));
}

#[test]
fn records_of_another_version_are_refused_by_name() {
    for mut bytes in samples().into_iter().map(|bytes| bytes.to_vec()) {
        bytes[0] = 9;
        let error = Inode::from_bytes(&bytes).expect_err("a newer version");
        assert!(error.message().contains("version 9") && error.message().contains("knows 1"), "{error}");
    }
}

#[test]
fn hostile_keys_and_page_tokens_are_refused_or_read() {
    Decoder::new("store-keys")
        .sample(key::dentry(InodeId(7), "name"))
        .sample(key::chunk_run(ChunkId::new(3, 64)))
        .sample(key::session_grant(SessionId(1), GrantId(2)))
        .sample("1-2-3f-400")
        .run(|bytes| {
            if let Some((parent, name)) = key::split_name(bytes) {
                assert!(bytes.ends_with(name.as_bytes()) && bytes[5..13] == parent.0.to_be_bytes());
            }
            assert_eq!(key::last_u64(bytes).is_some(), bytes.len() >= 8);
            assert_eq!(key::last_chunk(bytes).is_some(), bytes.len() >= 12);
            assert!(key::prefix_end(bytes).is_none_or(|end| end[..] > *bytes));
            if let Ok(text) = std::str::from_utf8(bytes)
                && let Ok(cursor) = text.parse::<layout::Cursor>()
            {
                assert_eq!(cursor.to_string().parse::<layout::Cursor>().expect("own text"), cursor);
            }
        });
}
