use super::*;
use cairn_proto::{Reason, limits::FILE_BYTES_MAX};
use proptest::prelude::*;

const SMALL: Shape = Shape { inline: 2, leaf: 4, inner: 3, root: 3 };

/// A byte of a file: a hole, or (grant, index, position in the chunk).
type Byte = Option<(u64, u32, u64)>;

/// A file whose pages are kept as the store would keep them, beside the plainest model of its content.
#[derive(Default)]
struct File {
    layout: Layout,
    size: u64,
    pages: Pages,
    bytes: Vec<Byte>,
    /// Live bytes by chunk.
    live: BTreeMap<ChunkId, u64>,
    next_chunk: u32,
    written: usize,
}

impl File {
    fn chunk(&mut self, length: u64) -> NewChunk {
        self.next_chunk += 1;
        NewChunk {
            id: ChunkId::new(9, self.next_chunk),
            group: GroupId(2),
            length,
            checksum: u64::from(self.next_chunk),
        }
    }

    fn commit(&mut self, shape: Shape, edits: &[Edit], chunks: &[NewChunk]) {
        let mut loaded = Pages::new();
        let mut rounds = 0;
        let spliced = loop {
            match splice_shaped(shape, &self.layout, self.size, edits, chunks, &loaded) {
                Ok(spliced) => break spliced,
                Err(Stop::NeedPages(missing)) => {
                    assert!(!missing.is_empty());
                    for page in missing {
                        let content = self.pages.get(&page).expect("only live pages are asked for").clone();
                        assert_eq!(loaded.insert(page, content), None, "each page is asked for once");
                    }
                }
                Err(Stop::Failed(error)) => panic!("{error}"),
            }
            rounds += 1;
            assert!(rounds < 64);
        };
        self.written = spliced.new_pages.len();
        for (chunk, live) in chunks.iter().zip(&spliced.live_bytes) {
            self.live.insert(chunk.id, *live);
        }
        let mut trash = spliced.trash;
        for (number, page) in spliced.new_pages {
            assert_eq!(self.pages.insert(number, page), None, "page numbers are never reused");
        }
        self.reap(&mut trash);
        self.layout = spliced.layout;
        self.size = spliced.size;
        for edit in edits {
            self.model(edit, chunks);
        }
    }

    /// Works trash off as the reaper does.
    fn reap(&mut self, trash: &mut Trash) {
        while let [.., page, depth] = trash.subtrees[..] {
            trash.subtrees.truncate(trash.subtrees.len() - 2);
            let content = self.pages[&page].clone();
            trash_page(trash, page, depth as u32, &content);
        }
        let mut extents = std::mem::take(&mut trash.extents);
        for leaf in &trash.leaves {
            extents.extend(self.pages.remove(leaf).expect("a leaf goes once").extents);
        }
        for page in &trash.bare_pages {
            self.pages.remove(page).expect("a page goes once");
        }
        for extent in extents {
            let live = self.live.get_mut(&extent.chunk()).unwrap();
            *live = live.checked_sub(extent.length).expect("bytes go once");
        }
    }

    fn model(&mut self, edit: &Edit, chunks: &[NewChunk]) {
        let bytes = &mut self.bytes;
        match *edit {
            Edit::Write { offset, length, chunk, chunk_offset } => {
                let end = (offset + length) as usize;
                if length > 0 && bytes.len() < end {
                    bytes.resize(end, None);
                }
                for n in 0..length {
                    let id = chunks[chunk].id;
                    bytes[(offset + n) as usize] = Some((id.grant.0, id.index, chunk_offset + n));
                }
            }
            Edit::Append { chunk } => {
                let id = chunks[chunk].id;
                bytes.extend((0..chunks[chunk].length).map(|n| Some((id.grant.0, id.index, n))));
            }
            Edit::Truncate { length } => bytes.resize(length as usize, None),
            Edit::Punch { offset, length } => {
                let len = bytes.len() as u64;
                let (start, end) = (offset.min(len), (offset + length).min(len));
                bytes[start as usize..end as usize].fill(None);
            }
        }
    }

    /// All extents, read in pages of `limit`.
    fn extents(&self, limit: usize) -> Vec<Extent> {
        let (mut all, mut position) = (Vec::new(), 0);
        loop {
            let mut loaded = Pages::new();
            let page = loop {
                match extents_in(&self.layout, position, u64::MAX, limit, &loaded) {
                    Ok(page) => break page,
                    Err(Stop::NeedPages(missing)) => {
                        for page in missing {
                            assert!(loaded.insert(page, self.pages[&page].clone()).is_none());
                        }
                    }
                    Err(Stop::Failed(error)) => panic!("{error}"),
                }
            };
            assert!(page.extents.len() <= limit);
            all.extend(page.extents);
            match page.next {
                Some(next) => position = next,
                None => return all,
            }
        }
    }

    /// Everything that must hold.
    fn check(&self, shape: Shape) {
        assert_eq!(self.size, self.bytes.len() as u64);
        let extents = self.extents(7);
        let mut bytes: Vec<Byte> = vec![None; self.bytes.len()];
        let mut live: BTreeMap<ChunkId, u64> = self.live.keys().map(|id| (*id, 0)).collect();
        let mut end = 0;
        for extent in &extents {
            assert!(extent.length > 0 && extent.offset >= end, "in order, apart");
            end = extent.end();
            *live.get_mut(&extent.chunk()).unwrap() += extent.length;
            for n in 0..extent.length {
                bytes[(extent.offset + n) as usize] =
                    Some((extent.grant, extent.index, extent.chunk_offset + n));
            }
        }
        assert!(bytes == self.bytes, "the content is that of the model");
        assert_eq!(live, self.live, "trash is exactly what is no longer referred to");
        if self.layout.pages.is_empty() {
            assert!(self.layout.extents.len() <= shape.inline && self.pages.is_empty());
            return;
        }
        assert!(self.layout.extents.is_empty() && self.layout.pages.len() <= shape.root);
        assert!(extents.len() > shape.inline);
        let mut seen = 0;
        self.check_refs(shape, &self.layout.pages, self.layout.depth, &mut seen);
        assert_eq!(seen, self.pages.len(), "no page is left behind");
    }

    fn check_refs(&self, shape: Shape, refs: &[PageRef], depth: u32, seen: &mut usize) {
        for reference in refs {
            *seen += 1;
            let page = &self.pages[&reference.page];
            assert!(reference.page < self.layout.next_page);
            if depth == 1 {
                assert!(
                    !page.extents.is_empty() && page.extents.len() <= shape.leaf && page.pages.is_empty()
                );
                assert_eq!(reference.offset, page.extents[0].offset);
                assert_eq!(reference.end, page.extents.last().unwrap().end());
                assert_eq!(reference.extents, page.extents.len() as u64);
            } else {
                assert!(!page.pages.is_empty() && page.pages.len() <= shape.inner && page.extents.is_empty());
                assert_eq!(reference.offset, page.pages[0].offset);
                assert_eq!(reference.end, page.pages.last().unwrap().end);
                assert_eq!(reference.extents, page.pages.iter().map(|r| r.extents).sum::<u64>());
                self.check_refs(shape, &page.pages, depth - 1, seen);
            }
        }
    }
}

/// An edit without its chunk.
#[derive(Clone, Debug)]
enum Draft {
    Write(u64, u64, u64),
    Append(u64),
    Truncate(u64),
    Punch(u64, u64),
}

fn draft() -> impl Strategy<Value = Draft> {
    prop_oneof![
        6 => (0..600u64, 1..12u64, 0..3u64).prop_map(|(offset, length, skip)| Draft::Write(offset, length, skip)),
        4 => (1..12u64).prop_map(Draft::Append),
        1 => (0..700u64).prop_map(Draft::Truncate),
        2 => (0..700u64, 0..80u64).prop_map(|(offset, length)| Draft::Punch(offset, length)),
        1 => (0..100u64, 100..500u64).prop_map(|(offset, length)| Draft::Write(offset, length, 0)),
    ]
}

fn apply(file: &mut File, shape: Shape, drafts: &[Draft]) {
    let mut chunks = Vec::new();
    let mut edits = Vec::new();
    for draft in drafts {
        let chunk = chunks.len();
        match *draft {
            Draft::Write(offset, length, chunk_offset) => {
                chunks.push(file.chunk(length + chunk_offset));
                edits.push(Edit::Write { offset, length, chunk, chunk_offset });
            }
            Draft::Append(length) => {
                chunks.push(file.chunk(length));
                edits.push(Edit::Append { chunk });
            }
            Draft::Truncate(length) => edits.push(Edit::Truncate { length }),
            Draft::Punch(offset, length) => edits.push(Edit::Punch { offset, length }),
        }
    }
    file.commit(shape, &edits, &chunks);
}

#[test]
fn one_commit_to_a_small_file_may_need_more_than_one_level() {
    let mut file = File::default();
    apply(&mut file, SMALL, &[Draft::Write(0, 600, 0)]);
    let drafts: Vec<Draft> = (0..60).map(|n| Draft::Write(n * 10, 1, 0)).collect();
    apply(&mut file, SMALL, &drafts);
    file.check(SMALL);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_of_commits_is_as_the_model(
        commits in prop::collection::vec(prop::collection::vec(draft(), 1..8), 1..60),
    ) {
        let mut file = File::default();
        for commit in &commits {
            apply(&mut file, SMALL, commit);
            file.check(SMALL);
        }
        let mut trash = discard(InodeId(5), &file.layout);
        file.reap(&mut trash);
        prop_assert!(file.pages.is_empty() && file.live.values().all(|live| *live == 0));
    }

    #[test]
    fn a_range_answers_what_overlaps_it(
        commits in prop::collection::vec(prop::collection::vec(draft(), 1..12), 1..8),
        start in 0..700u64,
        length in 1..300u64,
        limit in 1..20usize,
    ) {
        let mut file = File::default();
        commits.iter().for_each(|commit| apply(&mut file, SMALL, commit));
        let expected: Vec<Extent> = file
            .extents(1_000)
            .into_iter()
            .filter(|extent| extent.offset < start + length && start < extent.end())
            .collect();
        let found = extents_in(&file.layout, start, start + length, limit, &file.pages).unwrap();
        prop_assert_eq!(&found.extents[..], &expected[..expected.len().min(limit)]);
        prop_assert_eq!(found.next.is_some(), expected.len() > limit);
    }

    #[test]
    fn cursors_are_read_back(inode: u64, version: u64, layout_version: u64, position: u64, text: String) {
        let cursor = Cursor { inode: InodeId(inode), version, layout_version, position };
        prop_assert_eq!(cursor.to_string().parse::<Cursor>().unwrap(), cursor);
        let _ = text.parse::<Cursor>();
    }
}

#[test]
fn thousands_of_small_writes_in_real_pages_are_as_the_model() {
    // A fixed walk over the file, far enough from order to split pages everywhere.
    let mut file = File::default();
    let mut position = 0u64;
    for round in 0..900u64 {
        let mut drafts = Vec::new();
        for _ in 0..8 {
            position = (position * 48_271 + 11) % 65_521;
            drafts.push(Draft::Write(position, 1 + position % 5, 0));
        }
        if round % 50 == 49 {
            drafts.push(Draft::Punch(position, 3_000));
        }
        apply(&mut file, Shape::DEFAULT, &drafts);
        if round % 100 == 99 {
            file.check(Shape::DEFAULT);
        }
    }
    let extents = file.extents(1_000);
    assert!(extents.len() > 3_000, "{}", extents.len());
    let leaves = file.pages.values().filter(|page| page.pages.is_empty()).count();
    assert!(leaves < extents.len() / 64, "{leaves} leaves of {} extents are not crumbs", extents.len());
    apply(&mut file, Shape::DEFAULT, &[Draft::Truncate(10)]);
    file.check(Shape::DEFAULT);
    assert!(file.layout.pages.is_empty(), "few extents stand in the inode again");
}

#[test]
fn appending_fills_pages_and_rewrites_only_the_last() {
    let mut file = File::default();
    for _ in 0..2_000 {
        apply(&mut file, Shape::DEFAULT, &[Draft::Append(1), Draft::Punch(0, 0)]);
        assert!(file.written <= 2, "{} pages for one append", file.written);
    }
    file.check(Shape::DEFAULT);
    assert_eq!(file.pages.len(), 2_000usize.div_ceil(LEAF_EXTENTS_MAX));
}

#[test]
fn a_small_write_in_a_large_file_rewrites_one_leaf_and_the_way_to_it() {
    let mut file = File::default();
    let drafts: Vec<Draft> = (0..60_000).map(|_| Draft::Append(3)).collect();
    for some in drafts.chunks(4_000) {
        apply(&mut file, Shape::DEFAULT, some);
    }
    assert_eq!(file.layout.depth, 2);
    apply(&mut file, Shape::DEFAULT, &[Draft::Write(90_001, 1, 0)]);
    assert_eq!(file.written, 4, "a full leaf and its full parent become two each");
    apply(&mut file, Shape::DEFAULT, &[Draft::Write(90_011, 1, 0)]);
    assert_eq!(file.written, 2);
    file.check(Shape::DEFAULT);
}

#[test]
fn adjacent_extents_of_a_chunk_are_one() {
    let mut file = File::default();
    let chunk = file.chunk(100);
    let edit = |offset| Edit::Write { offset, length: 10, chunk: 0, chunk_offset: offset };
    file.commit(Shape::DEFAULT, &(0..10).map(|n| edit(n * 10)).collect::<Vec<_>>(), &[chunk]);
    assert_eq!(file.layout.extents.len(), 1);
    file.check(Shape::DEFAULT);
}

#[test]
fn impossible_edits_are_refused() {
    let chunk = NewChunk { id: ChunkId::new(1, 0), group: GroupId(1), length: 10, checksum: 0 };
    let reason = |edit: Edit| match splice(&Layout::default(), 5, &[edit], &[chunk], &Pages::new()) {
        Err(Stop::Failed(error)) => Some(error.reason),
        _ => None,
    };
    let write = |offset, length, chunk, chunk_offset| Edit::Write { offset, length, chunk, chunk_offset };
    assert_eq!(reason(write(0, 11, 0, 0)), Some(Reason::InvalidArgument));
    assert_eq!(reason(write(0, 10, 0, 1)), Some(Reason::InvalidArgument));
    assert_eq!(reason(write(0, u64::MAX, 0, 1)), Some(Reason::InvalidArgument));
    assert_eq!(reason(write(0, 1, 1, 0)), Some(Reason::InvalidArgument));
    assert_eq!(reason(Edit::Append { chunk: 1 }), Some(Reason::InvalidArgument));
    assert_eq!(reason(write(FILE_BYTES_MAX - 5, 10, 0, 0)), Some(Reason::LimitExceeded));
    assert_eq!(reason(write(u64::MAX, 10, 0, 0)), Some(Reason::LimitExceeded));
    assert_eq!(reason(Edit::Truncate { length: FILE_BYTES_MAX + 1 }), Some(Reason::LimitExceeded));
    assert_eq!(reason(Edit::Truncate { length: FILE_BYTES_MAX }), None);
    assert_eq!(reason(Edit::Punch { offset: u64::MAX, length: u64::MAX }), None);
}
