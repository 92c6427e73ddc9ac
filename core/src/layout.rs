//! Where a file's bytes are: extents, and the tree of pages that holds many of them.
//!
//! ```text
//!   inode record                       extent pages, immutable, numbered within the inode
//!   +---------------------+
//!   | up to 16 extents    |   or, with more:
//!   +---------------------+
//!   | root: up to 64 refs |---> inner page: up to 128 refs ---> leaf page: up to 256 extents
//!   +---------------------+
//! ```
//!
//! Extents are in order and do not overlap; a hole is where none is. A change writes new pages for what it touches and
//! for the way there, and hands the old ones over as trash: pages are never rewritten, so that a reader of an older
//! revision finds its tree whole.
//!
//! All functions are pure. They take the pages that were loaded so far, and when one is missing they answer
//! [`Stop::NeedPages`]; the caller loads these and calls again. Few rounds are needed, one for each level of the tree.
//!
//! **Bound of one change:** it writes about one page for each 256 extents it adds and one for each page it touches,
//! and one plan holds them all ([`crate::plan::PLAN_MUTATIONS_MAX`], [`crate::plan::PLAN_BYTES_MAX`]). 4,096 chunks
//! in a row always fit. Changes scattered over a file of many thousand extents may not: `LIMIT_EXCEEDED`, commit
//! fewer at a time.

use crate::record::{Extent, ExtentPage, INLINE_EXTENTS_MAX, Layout, PageRef, Trash};
use cairn_proto::{
    Error,
    id::{ChunkId, GroupId, InodeId},
};
use std::collections::BTreeMap;

mod check;
mod overlay;
mod read;
mod tree;

#[cfg(test)]
mod hostile;
#[cfg(test)]
mod tests;

pub use read::{Cursor, PageOfExtents, extents_in, trash_page};

/// Most extents of a leaf page.
pub const LEAF_EXTENTS_MAX: usize = 256;
/// Most references of an inner page.
pub const INNER_REFS_MAX: usize = 128;
/// Most references of the root, which stands in the inode's record.
pub const ROOT_REFS_MAX: usize = 64;

/// Loaded pages by number.
pub type Pages = BTreeMap<u64, ExtentPage>;

/// Why a function could not finish.
#[derive(Clone, Debug, PartialEq)]
pub enum Stop {
    /// These pages are needed: load them and call again.
    NeedPages(Vec<u64>),
    /// It never can.
    Failed(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// A chunk that a change brings in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewChunk {
    /// Its id.
    pub id: ChunkId,
    /// Its group.
    pub group: GroupId,
    /// Its length in bytes.
    pub length: u64,
    /// CRC-64/NVME of all its bytes.
    pub checksum: u64,
}

/// One change of content. Chunks are named by their position in the list of new chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Edit {
    /// Bytes of a chunk at a position of the file.
    Write {
        /// Position in the file.
        offset: u64,
        /// Number of bytes; 0 changes nothing.
        length: u64,
        /// Which chunk.
        chunk: usize,
        /// Position in the chunk.
        chunk_offset: u64,
    },
    /// A whole chunk at the end of the file.
    Append {
        /// Which chunk.
        chunk: usize,
    },
    /// Another length; a longer file ends in a hole.
    Truncate {
        /// The new length.
        length: u64,
    },
    /// A hole; what lies past the end is left out.
    Punch {
        /// Position in the file.
        offset: u64,
        /// Number of bytes.
        length: u64,
    },
}

/// A file's content after a change.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Spliced {
    /// The new layout.
    pub layout: Layout,
    /// The new size.
    pub size: u64,
    /// Pages to write.
    pub new_pages: Vec<(u64, ExtentPage)>,
    /// What the file does not refer to any more; the inode is left for the caller to fill in.
    pub trash: Trash,
    /// Bytes that the new layout refers to, of each new chunk.
    pub live_bytes: Vec<u64>,
}

/// Applies edits in order.
///
/// # Errors
/// `NeedPages`; `INVALID_ARGUMENT` for an edit outside of its chunk or one that names no chunk; `LIMIT_EXCEEDED` when
/// the file would become too large.
pub fn splice(
    layout: &Layout,
    size: u64,
    edits: &[Edit],
    chunks: &[NewChunk],
    pages: &Pages,
) -> Result<Spliced, Stop> {
    splice_shaped(Shape::DEFAULT, layout, size, edits, chunks, pages)
}

/// All that a file refers to, when it goes as a whole.
pub fn discard(inode: InodeId, layout: &Layout) -> Trash {
    let mut trash = Trash { inode: inode.0, extents: layout.extents.clone(), ..Trash::default() };
    for reference in &layout.pages {
        tree::discard_page(&mut trash, reference.page, layout.depth);
    }
    trash
}

/// Whether trash is empty.
pub fn is_empty(trash: &Trash) -> bool {
    trash.extents.is_empty()
        && trash.leaves.is_empty()
        && trash.bare_pages.is_empty()
        && trash.subtrees.is_empty()
}

/// Sizes of the tree's parts; tests make small ones, to have deep trees of few extents.
#[derive(Clone, Copy, Debug)]
struct Shape {
    inline: usize,
    leaf: usize,
    inner: usize,
    root: usize,
}

impl Shape {
    const DEFAULT: Self = Self {
        inline: INLINE_EXTENTS_MAX,
        leaf: LEAF_EXTENTS_MAX,
        inner: INNER_REFS_MAX,
        root: ROOT_REFS_MAX,
    };
}

fn splice_shaped(
    shape: Shape,
    layout: &Layout,
    size: u64,
    edits: &[Edit],
    chunks: &[NewChunk],
    pages: &Pages,
) -> Result<Spliced, Stop> {
    check::layout(layout)?;
    let change = overlay::resolve(size, edits, chunks)?;
    let (layout, new_pages, trash) = tree::apply(shape, layout, &change, pages)?;
    Ok(Spliced { layout, size: change.size, new_pages, trash, live_bytes: change.live_bytes })
}

/// Appends an extent, as one with the last where that goes on in the same chunk.
fn push_merged(extents: &mut Vec<Extent>, extent: Extent) {
    if let Some(last) = extents.last_mut()
        && last.end() == extent.offset
        && last.chunk() == extent.chunk()
        && last.chunk_offset + last.length == extent.chunk_offset
    {
        last.length += extent.length;
    } else {
        extents.push(extent);
    }
}

fn covers(reference: &PageRef, start: u64, end: u64) -> bool {
    reference.offset < end && start < reference.end
}
