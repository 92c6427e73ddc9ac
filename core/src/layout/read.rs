//! Extents of a range, page by page, and the pages that a reaper walks.

use super::{Pages, Stop, check, covers};
use crate::record::{Extent, ExtentPage, Layout, PageRef, Trash};
use cairn_proto::{Error, Reason, id::InodeId};
use std::{fmt, str::FromStr};

/// Some extents of a range.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PageOfExtents {
    /// In order.
    pub extents: Vec<Extent>,
    /// Where to go on in the file; `None`: that were all.
    pub next: Option<u64>,
}

/// The extents that overlap `start..end`, whole, at most `limit` (at least 1).
///
/// # Errors
/// `NeedPages`; `INTERNAL` when the layout or a page is damaged.
pub fn extents_in(
    layout: &Layout,
    start: u64,
    end: u64,
    limit: usize,
    pages: &Pages,
) -> Result<PageOfExtents, Stop> {
    check::layout(layout)?;
    let mut walk = Walk {
        start,
        end,
        limit: limit.max(1),
        pages,
        found: Vec::new(),
        missing: Vec::new(),
        ahead: 0,
        damage: None,
    };
    walk.extents(&layout.extents);
    walk.refs(&layout.pages, layout.depth);
    if let Some(page) = walk.damage {
        return Err(Stop::Failed(check::damaged(page)));
    }
    if !walk.missing.is_empty() {
        return Err(Stop::NeedPages(walk.missing));
    }
    let more = walk.found.len() > walk.limit;
    walk.found.truncate(walk.limit);
    let next = if more { walk.found.last().map(Extent::end) } else { None };
    Ok(PageOfExtents { extents: walk.found, next })
}

struct Walk<'a> {
    start: u64,
    end: u64,
    limit: usize,
    pages: &'a Pages,
    found: Vec<Extent>,
    missing: Vec<u64>,
    /// Extents below missing pages: no more pages are asked for than an answer can need.
    ahead: u64,
    /// A page that cannot be what its reference says.
    damage: Option<u64>,
}

impl Walk<'_> {
    /// One more than the limit is looked for, to know whether there is more.
    fn is_done(&self) -> bool {
        (self.found.len() as u64).saturating_add(self.ahead) > self.limit as u64
    }

    fn extents(&mut self, extents: &[Extent]) {
        let first = extents.partition_point(|extent| extent.end() <= self.start);
        for extent in &extents[first..] {
            if extent.offset >= self.end || self.is_done() {
                return;
            }
            self.found.push(*extent);
        }
    }

    fn refs(&mut self, refs: &[PageRef], depth: u32) {
        let first = refs.partition_point(|reference| reference.end <= self.start);
        for reference in &refs[first..] {
            if !covers(reference, self.start, self.end) || self.is_done() {
                return;
            }
            match self.pages.get(&reference.page) {
                Some(page) if !check::is_page_of(page, reference) => {
                    self.damage = Some(reference.page);
                    return;
                }
                Some(page) if depth <= 1 => self.extents(&page.extents),
                Some(page) => self.refs(&page.pages, depth - 1),
                None => {
                    self.missing.push(reference.page);
                    // The first page may overlap the range by one extent only.
                    self.ahead += if reference.offset < self.start { 1 } else { reference.extents };
                }
            }
        }
    }
}

/// Replaces an inner page in trash by what it leads to: one step of working trash off.
pub fn trash_page(trash: &mut Trash, page: u64, depth: u32, content: &ExtentPage) {
    trash.bare_pages.push(page);
    for reference in &content.pages {
        super::tree::discard_page(trash, reference.page, depth);
    }
}

/// Where a paged lookup goes on: in one layout of one version. Its text form is a page token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cursor {
    /// The file.
    pub inode: InodeId,
    /// Its version.
    pub version: u64,
    /// Its layout.
    pub layout_version: u64,
    /// Position in the file.
    pub position: u64,
}

impl Cursor {
    /// Checks that the file still is what the pages before showed.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` for another inode; `VERSION_GONE` when its content or layout changed meanwhile.
    pub fn check(&self, inode: InodeId, version: u64, layout_version: u64) -> cairn_proto::Result<()> {
        if self.inode != inode {
            return Err(Error::invalid("the page token belongs to another file: begin without one"));
        }
        if (self.version, self.layout_version) != (version, layout_version) {
            let mut error = Error::new(
                Reason::VersionGone,
                format!(
                    "version {} of inode {inode} was replaced by {version} between two pages: begin again",
                    self.version
                ),
            );
            error.detail.current_version = version;
            return Err(error);
        }
        Ok(())
    }
}

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}-{:x}-{:x}-{:x}", self.inode.0, self.version, self.layout_version, self.position)
    }
}

impl FromStr for Cursor {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let numbers: Option<Vec<u64>> =
            text.split('-').map(|number| u64::from_str_radix(number, 16).ok()).collect();
        match numbers.as_deref() {
            Some([inode, version, layout_version, position]) => Ok(Self {
                inode: InodeId(*inode),
                version: *version,
                layout_version: *layout_version,
                position: *position,
            }),
            _ => Err(Error::invalid("this is not a page token of a lookup")),
        }
    }
}
