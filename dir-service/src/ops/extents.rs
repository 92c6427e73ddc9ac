//! Extents for `Lookup`: pages of the layout are loaded as the rules ask for them.

use super::{resolve::Found, view::View};
use cairn_core::{
    key,
    layout::{self, Cursor, PageOfExtents, Pages, Stop},
    plan::Key,
    record::{Extent, ExtentPage, Layout, Record},
};
use cairn_proto::{Error, Result, id::InodeId, limits::PAGE_EXTENTS_MAX, v1};

/// Loads pages of a layout.
///
/// # Errors
/// As the store; `INTERNAL` when one is not there.
pub async fn load_pages(view: &View, inode: InodeId, numbers: &[u64], pages: &mut Pages) -> Result<()> {
    let keys: Vec<Key> = numbers.iter().map(|page| key::extent_page(inode, *page)).collect();
    for (page, value) in numbers.iter().zip(view.get_many(&keys).await?) {
        let versioned = value.ok_or_else(|| {
            Error::internal(format!("page {page} of inode {inode} is missing from the store"))
        })?;
        pages.insert(*page, ExtentPage::from_bytes(&versioned.value)?);
    }
    Ok(())
}

/// A page of a file's extents from `offset` on, `length` bytes (0: to the end), or from where a token says.
/// Answers the extents and the next token, empty at the end.
///
/// # Errors
/// `VERSION_GONE` when the file changed since the token was given; `INVALID_ARGUMENT` for a token that is none.
pub async fn page(
    view: &View,
    found: &Found,
    offset: u64,
    length: u64,
    token: &str,
) -> Result<(Vec<Extent>, String)> {
    let inode = &found.inode.record;
    let mut start = offset;
    if !token.is_empty() {
        let cursor: Cursor = token.parse()?;
        cursor.check(found.id, inode.version, inode.layout_version)?;
        start = cursor.position.max(offset);
    }
    let end = if length == 0 { u64::MAX } else { offset.saturating_add(length) };
    let empty = Layout::default();
    let layout = inode.layout.as_ref().unwrap_or(&empty);
    let mut pages = Pages::new();
    let PageOfExtents { extents, next } = loop {
        match layout::extents_in(layout, start, end, PAGE_EXTENTS_MAX, &pages) {
            Ok(page) => break page,
            Err(Stop::NeedPages(numbers)) => load_pages(view, found.id, &numbers, &mut pages).await?,
            Err(Stop::Failed(error)) => return Err(error),
        }
    };
    let next = next.map_or(String::new(), |position| {
        Cursor { inode: found.id, version: inode.version, layout_version: inode.layout_version, position }
            .to_string()
    });
    Ok((extents, next))
}

/// An extent as clients see it.
pub fn to_wire(extent: &Extent) -> v1::Extent {
    v1::Extent {
        offset: extent.offset,
        length: extent.length,
        chunk: Some(v1::ChunkRef {
            chunk: Some(extent.chunk().into()),
            length: extent.chunk_length,
            checksum: extent.chunk_checksum,
            group_id: extent.group,
        }),
        chunk_offset: extent.chunk_offset,
    }
}
