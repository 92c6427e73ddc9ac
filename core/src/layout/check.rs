//! Whether a layout or a page that was read from a store can be one: what the rules rely on, and nothing else.
//!
//! A record that passed its checksum can still be wrong, by a fault of a disk, a program or a person. The rules walk
//! pages and add positions; here is made sure that every walk ends and no sum overflows.

use super::Stop;
use crate::record::{Extent, ExtentPage, Layout, PageRef};
use cairn_proto::{Error, limits::FILE_BYTES_MAX};

/// Levels of pages that a layout can have: six levels of 128 references hold more extents than a file has bytes.
pub(super) const DEPTH_MAX: u32 = 8;
/// Pages and extents that are counted, far more than there can be.
const COUNT_MAX: u64 = 1 << 40;

/// Checks what stands in the inode's record.
pub(super) fn layout(layout: &Layout) -> Result<(), Stop> {
    let good = layout.depth <= DEPTH_MAX
        && is_of_one_kind(layout.extents.len(), layout.pages.len())
        && layout.next_page <= COUNT_MAX
        && extents(&layout.extents, 0, FILE_BYTES_MAX)
        && refs(&layout.pages, 0, FILE_BYTES_MAX);
    if good { Ok(()) } else { Err(Stop::Failed(Error::internal("a stored layout of a file is damaged"))) }
}

/// Whether a page can be the one that a reference leads to: what it holds lies within, so a page cannot hold itself
/// over and over.
pub(super) fn is_page_of(page: &ExtentPage, reference: &PageRef) -> bool {
    is_of_one_kind(page.extents.len(), page.pages.len())
        && extents(&page.extents, reference.offset, reference.end)
        && refs(&page.pages, reference.offset, reference.end)
}

/// Whether entries of a page are in order and small enough to be counted with.
pub(super) fn is_page(page: &ExtentPage) -> bool {
    is_of_one_kind(page.extents.len(), page.pages.len())
        && extents(&page.extents, 0, FILE_BYTES_MAX)
        && refs(&page.pages, 0, FILE_BYTES_MAX)
}

/// Whether there are extents or references and not both, which could overlap.
fn is_of_one_kind(extents: usize, refs: usize) -> bool {
    extents == 0 || refs == 0
}

/// What the damage of a page is called.
pub(super) fn damaged(page: u64) -> Error {
    Error::internal(format!("extent page {page} is damaged or of the wrong kind"))
}

fn extents(extents: &[Extent], from: u64, to: u64) -> bool {
    let mut at = from;
    extents.iter().all(|extent| {
        let end = extent.offset.checked_add(extent.length);
        let good = extent.offset >= at
            && end.is_some_and(|end| end > extent.offset && end <= to)
            && extent.chunk_offset.checked_add(extent.length).is_some_and(|end| end <= FILE_BYTES_MAX);
        at = end.unwrap_or(u64::MAX);
        good
    })
}

fn refs(refs: &[PageRef], from: u64, to: u64) -> bool {
    let mut at = from;
    refs.iter().all(|reference| {
        let good = reference.offset >= at
            && reference.end > reference.offset
            && reference.end <= to
            && reference.page <= COUNT_MAX
            && reference.extents <= COUNT_MAX;
        at = reference.end;
        good
    })
}
