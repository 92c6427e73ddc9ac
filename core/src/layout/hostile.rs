//! Hostile bytes in a file's layout and its extent pages.

use super::*;
use crate::record::Record as _;
use fuzz::Decoder;
use prost::Message as _;

/// What a store may hold of one file: a layout and pages 1, 2, 3, ..., each with its length before it.
fn encode(layout: &Layout, pages: &[ExtentPage]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut put = |part: &[u8]| {
        bytes.extend_from_slice(&(part.len() as u16).to_le_bytes());
        bytes.extend_from_slice(part);
    };
    put(&layout.encode_to_vec());
    pages.iter().for_each(|page| put(&page.to_bytes()));
    bytes
}

fn decode(mut bytes: &[u8]) -> Option<(Layout, Pages)> {
    let mut next = || {
        let (len, rest) = bytes.split_first_chunk::<2>()?;
        let len = usize::from(u16::from_le_bytes(*len)).min(rest.len());
        let (part, rest) = rest.split_at(len);
        bytes = rest;
        Some(part)
    };
    let layout = Layout::decode(next()?).ok()?;
    let mut pages = Pages::new();
    while let Some(part) = next() {
        if let Ok(page) = ExtentPage::from_bytes(part) {
            pages.insert(pages.len() as u64 + 1, page);
        }
    }
    Some((layout, pages))
}

fn extent(offset: u64, index: u32) -> Extent {
    Extent {
        offset,
        length: 10,
        grant: 1,
        index,
        group: 1,
        chunk_length: 10,
        chunk_checksum: 7,
        chunk_offset: 0,
    }
}

fn reference(page: u64, offset: u64, end: u64) -> PageRef {
    PageRef { page, offset, end, extents: 3 }
}

fn samples() -> Vec<Vec<u8>> {
    let extents = |from: u64| (0..3).map(|number| extent(from + number * 10, number as u32)).collect();
    let leaf = |from: u64| ExtentPage { extents: extents(from), pages: Vec::new() };
    let inner = |pages: Vec<PageRef>| ExtentPage { extents: Vec::new(), pages };
    let inline = Layout { extents: extents(0), next_page: 1, ..Layout::default() };
    let root = |pages, depth| Layout { extents: Vec::new(), pages, depth, next_page: 9 };
    let whole = root(vec![reference(1, 0, 30), reference(2, 40, 70)], 1);
    let deep = root(vec![reference(3, 0, 70)], 2);
    // A page that leads to itself, as deep as a number can say.
    let circle = root(vec![reference(1, 0, 70)], u32::MAX);
    vec![
        encode(&inline, &[]),
        encode(&whole, &[leaf(0), leaf(40)]),
        encode(&deep, &[leaf(0), leaf(40), inner(vec![reference(1, 0, 30), reference(2, 40, 70)])]),
        encode(&circle, &[inner(vec![reference(1, 0, 70)])]),
        encode(
            &Layout { depth: 8, ..circle },
            &[inner((0..64).map(|at| reference(1, at, at + 1)).collect())],
        ),
    ]
}

#[test]
fn hostile_extent_pages_end_every_walk() {
    let chunks = [NewChunk { id: ChunkId::new(5, 0), group: GroupId(1), length: 10, checksum: 1 }];
    let edits = [
        Edit::Punch { offset: 5, length: 20 },
        Edit::Write { offset: 12, length: 10, chunk: 0, chunk_offset: 0 },
        Edit::Truncate { length: 45 },
    ];
    let mut decoder = Decoder::new("extent-pages").memory(256, 64 * 1024);
    for sample in samples() {
        decoder = decoder.sample(sample);
    }
    let mut sound = 0;
    decoder.run(|bytes| {
        let Some((layout, pages)) = decode(bytes) else { return };
        for (start, end) in [(0, u64::MAX), (11, 45)] {
            if let Ok(found) = extents_in(&layout, start, end, 100, &pages) {
                sound += 1;
                assert!(found.extents.is_sorted_by(|one, other| one.end() <= other.offset), "{found:?}");
            }
        }
        let _ = splice(&layout, 70, &edits, &chunks, &pages);
        let trash = discard(InodeId(7), &layout);
        assert!(trash.subtrees.iter().skip(1).step_by(2).all(|depth| *depth <= u64::from(check::DEPTH_MAX)));
    });
    assert!(sound > 0, "no layout was sound: the samples are wrong");
}
