//! A change applied to the tree of pages, touching only the pages that it must.

use super::{Pages, Shape, Stop, check, overlay::Change, push_merged};
use crate::record::{Extent, ExtentPage, Layout, PageRef, Trash};

/// The new layout, the pages to write, and what is referred to no more.
pub(super) type Applied = (Layout, Vec<(u64, ExtentPage)>, Trash);

/// Applies a change.
pub(super) fn apply(shape: Shape, layout: &Layout, change: &Change, pages: &Pages) -> Result<Applied, Stop> {
    let mut work = Work {
        shape,
        pages,
        next_page: layout.next_page,
        written: Vec::new(),
        trash: Trash::default(),
        missing: Vec::new(),
        damage: None,
    };
    let root = if layout.pages.is_empty() {
        let extents = work.edit(&layout.extents, &change.cleared, &change.inserted);
        if extents.len() <= shape.inline {
            Root::Inline(extents)
        } else {
            let refs = work.write_pages(&extents, true);
            work.settle_root(refs, 1)
        }
    } else {
        let refs = work.rewrite(&layout.pages, layout.depth, &change.cleared, &change.inserted, true);
        work.settle_root(refs, layout.depth)
    };
    if let Some(page) = work.damage {
        return Err(Stop::Failed(check::damaged(page)));
    }
    if !work.missing.is_empty() {
        work.missing.sort_unstable();
        work.missing.dedup();
        return Err(Stop::NeedPages(work.missing));
    }
    let layout = match root {
        Root::Inline(extents) => Layout { extents, pages: Vec::new(), depth: 0, next_page: work.next_page },
        Root::Pages(pages, depth) => Layout { extents: Vec::new(), pages, depth, next_page: work.next_page },
    };
    Ok((layout, work.written, work.trash))
}

/// Notes that a page goes with all below it; `depth` is 1 for a leaf.
pub(super) fn discard_page(trash: &mut Trash, page: u64, depth: u32) {
    let depth = depth.min(check::DEPTH_MAX);
    if depth <= 1 {
        trash.leaves.push(page);
    } else {
        trash.subtrees.extend([page, u64::from(depth - 1)]);
    }
}

enum Root {
    Inline(Vec<Extent>),
    Pages(Vec<PageRef>, u32),
}

/// What a page holds: extents in a leaf, references in an inner page.
trait Entry: Copy + 'static {
    fn start(&self) -> u64;
    fn end(&self) -> u64;
    fn extents(&self) -> u64;
    fn page(entries: &[Self]) -> ExtentPage;
    fn of(page: &ExtentPage) -> &[Self];
    fn most(shape: Shape) -> usize;
}

impl Entry for Extent {
    fn start(&self) -> u64 {
        self.offset
    }
    fn end(&self) -> u64 {
        Extent::end(self)
    }
    fn extents(&self) -> u64 {
        1
    }
    fn page(entries: &[Self]) -> ExtentPage {
        ExtentPage { extents: entries.to_vec(), pages: Vec::new() }
    }
    fn of(page: &ExtentPage) -> &[Self] {
        &page.extents
    }
    fn most(shape: Shape) -> usize {
        shape.leaf
    }
}

impl Entry for PageRef {
    fn start(&self) -> u64 {
        self.offset
    }
    fn end(&self) -> u64 {
        self.end
    }
    fn extents(&self) -> u64 {
        self.extents
    }
    fn page(entries: &[Self]) -> ExtentPage {
        ExtentPage { extents: Vec::new(), pages: entries.to_vec() }
    }
    fn of(page: &ExtentPage) -> &[Self] {
        &page.pages
    }
    fn most(shape: Shape) -> usize {
        shape.inner
    }
}

/// A stretch of pages below one parent: one that stays, or entries that go to new pages.
enum Part<E> {
    Keep(PageRef),
    Fresh(Vec<E>),
}

struct Work<'a> {
    shape: Shape,
    pages: &'a Pages,
    next_page: u64,
    written: Vec<(u64, ExtentPage)>,
    trash: Trash,
    missing: Vec<u64>,
    damage: Option<u64>,
}

impl<'a> Work<'a> {
    /// Rewrites what a change touches below references of a level (1: they lead to leaves), and answers the
    /// references afterwards. `tail`: nothing of the file follows.
    fn rewrite(
        &mut self,
        refs: &[PageRef],
        level: u32,
        cleared: &[(u64, u64)],
        inserted: &[Extent],
        tail: bool,
    ) -> Vec<PageRef> {
        if level <= 1 {
            self.rewrite_level(refs, level, cleared, inserted, tail, |work, page: &[Extent], part| {
                work.edit(page, part.cleared, part.inserted)
            })
        } else {
            self.rewrite_level(refs, level, cleared, inserted, tail, |work, page: &[PageRef], part| {
                if page.is_empty() {
                    work.build(part.inserted, level - 1, part.tail)
                } else {
                    work.rewrite(page, level - 1, part.cleared, part.inserted, part.tail)
                }
            })
        }
    }

    fn rewrite_level<E: Entry>(
        &mut self,
        refs: &[PageRef],
        level: u32,
        cleared: &[(u64, u64)],
        mut inserted: &[Extent],
        tail: bool,
        change: impl Fn(&mut Self, &[E], Share<'_>) -> Vec<E>,
    ) -> Vec<PageRef> {
        let mut parts: Vec<Part<E>> = Vec::with_capacity(refs.len());
        for (position, reference) in refs.iter().enumerate() {
            // What comes in belongs to the page before it, or to the first.
            let next = refs.get(position + 1);
            let count = next.map_or(inserted.len(), |next| {
                inserted.partition_point(|extent| extent.offset < next.offset)
            });
            let (mine, rest) = inserted.split_at(count);
            inserted = rest;
            let first = cleared.partition_point(|(_, end)| *end <= reference.offset);
            let count = cleared[first..].partition_point(|(start, _)| *start < reference.end);
            let cleared = &cleared[first..first + count];
            let share = Share { cleared, inserted: mine, tail: tail && next.is_none() };
            let gone = cleared
                .first()
                .is_some_and(|(start, end)| *start <= reference.offset && reference.end <= *end);
            if gone {
                discard_page(&mut self.trash, reference.page, level);
                push_fresh(&mut parts, change(self, &[], Share { cleared: &[], ..share }));
            } else if cleared.is_empty() && mine.is_empty() {
                parts.push(Part::Keep(*reference));
            } else if let Some(entries) = self.open::<E>(reference.page) {
                self.trash.bare_pages.push(reference.page);
                push_fresh(&mut parts, change(self, entries, share));
            }
        }
        self.absorb(&mut parts, tail);
        let count = parts.len();
        let mut refs = Vec::new();
        for (position, part) in parts.into_iter().enumerate() {
            match part {
                Part::Keep(reference) => refs.push(reference),
                Part::Fresh(entries) => {
                    refs.extend(self.write_pages(&entries, tail && position + 1 == count));
                }
            }
        }
        refs
    }

    /// Joins stretches that would make nearly empty pages with a neighbour, so that many small changes do not leave
    /// a tree of crumbs. The last page of the file may be small: appends fill it.
    fn absorb<E: Entry>(&mut self, parts: &mut Vec<Part<E>>, tail: bool) {
        let few = E::most(self.shape) / 4;
        let mut position = 0;
        while position < parts.len() {
            let last = tail && position + 1 == parts.len();
            let small = !last && matches!(&parts[position], Part::Fresh(entries) if entries.len() < few);
            let neighbour = match (position.checked_sub(1), parts.get(position + 1)) {
                _ if !small => None,
                (_, Some(Part::Keep(_))) => Some(position + 1),
                (Some(before), _) if matches!(parts[before], Part::Keep(_)) => Some(before),
                _ => None,
            };
            let Some(neighbour) = neighbour else {
                position += 1;
                continue;
            };
            let Part::Keep(reference) = parts[neighbour] else { break };
            let Some(entries) = self.open::<E>(reference.page) else {
                position += 1;
                continue;
            };
            self.trash.bare_pages.push(reference.page);
            parts[neighbour] = Part::Fresh(entries.to_vec());
            // Neighbouring stretches become one.
            let joined: Vec<Part<E>> = std::mem::take(parts);
            for part in joined {
                match part {
                    Part::Keep(reference) => parts.push(Part::Keep(reference)),
                    Part::Fresh(entries) => push_fresh(parts, entries),
                }
            }
            position = position.min(neighbour);
        }
    }

    /// The entries of a loaded page; noted as missing otherwise.
    fn open<E: Entry>(&mut self, page: u64) -> Option<&'a [E]> {
        let Some(loaded) = self.pages.get(&page) else {
            self.missing.push(page);
            return None;
        };
        let entries = E::of(loaded);
        if entries.is_empty() || !check::is_page(loaded) {
            self.damage = Some(page);
            return None;
        }
        Some(entries)
    }

    /// Cuts cleared ranges out of extents and puts new ones in; the pieces cut out are trash.
    fn edit(&mut self, old: &[Extent], cleared: &[(u64, u64)], inserted: &[Extent]) -> Vec<Extent> {
        let mut kept = Vec::with_capacity(old.len() + inserted.len());
        for extent in old {
            let mut at = extent.offset;
            let first = cleared.partition_point(|(_, end)| *end <= extent.offset);
            for (start, end) in cleared[first..].iter().take_while(|(start, _)| *start < extent.end()) {
                let (start, end) = ((*start).max(at), (*end).min(extent.end()));
                if at < start {
                    kept.push(piece(extent, at, start));
                }
                push_merged(&mut self.trash.extents, piece(extent, start, end));
                at = end;
            }
            if at < extent.end() {
                kept.push(piece(extent, at, extent.end()));
            }
        }
        let mut merged = Vec::with_capacity(kept.len() + inserted.len());
        let mut inserted = inserted.iter().copied().peekable();
        for extent in kept {
            while let Some(new) = inserted.next_if(|new| new.offset < extent.offset) {
                push_merged(&mut merged, new);
            }
            push_merged(&mut merged, extent);
        }
        inserted.for_each(|new| push_merged(&mut merged, new));
        merged
    }

    /// Writes entries to as few new pages as they need, evenly; at the file's tail all but the last are full, so
    /// that appending fills pages up.
    fn write_pages<E: Entry>(&mut self, entries: &[E], tail: bool) -> Vec<PageRef> {
        let most = E::most(self.shape);
        let count = entries.len().div_ceil(most);
        let mut refs = Vec::with_capacity(count);
        let mut rest = entries;
        for left in (1..=count).rev() {
            let share = if tail { most.min(rest.len()) } else { rest.len().div_ceil(left) };
            let (page, behind) = rest.split_at(share);
            rest = behind;
            if let (Some(first), Some(last)) = (page.first(), page.last()) {
                refs.push(PageRef {
                    page: self.next_page,
                    offset: first.start(),
                    end: last.end(),
                    extents: page.iter().map(Entry::extents).sum(),
                });
                self.written.push((self.next_page, E::page(page)));
                self.next_page += 1;
            }
        }
        refs
    }

    /// Pages for extents, as references of a level.
    fn build(&mut self, extents: &[Extent], level: u32, tail: bool) -> Vec<PageRef> {
        let mut refs = self.write_pages(extents, tail);
        for _ in 1..level {
            refs = self.write_pages(&refs, tail);
        }
        refs
    }

    /// Makes the root fit: higher where it has too many references, lower where one would do, none where the extents
    /// fit the inode's record.
    fn settle_root(&mut self, mut refs: Vec<PageRef>, mut depth: u32) -> Root {
        let extents: u64 = refs.iter().map(|reference| reference.extents).sum();
        if extents <= self.shape.inline as u64 {
            for _ in 1..depth {
                let page = refs.first().map(|reference| reference.page);
                refs = refs.iter().flat_map(|reference| self.dissolve::<PageRef>(reference.page)).collect();
                // Each leads to an extent at least: pages that lead to each other would multiply.
                if refs.len() as u64 > extents {
                    self.damage = page;
                    return Root::Inline(Vec::new());
                }
            }
            let mut inline = Vec::with_capacity(extents as usize);
            for reference in refs {
                for extent in self.dissolve::<Extent>(reference.page) {
                    push_merged(&mut inline, extent);
                }
            }
            return Root::Inline(inline);
        }
        while depth > 1 && refs.len() == 1 {
            refs = self.dissolve::<PageRef>(refs[0].page);
            depth -= 1;
        }
        while refs.len() > self.shape.root {
            refs = self.write_pages(&refs, true);
            depth += 1;
        }
        Root::Pages(refs, depth)
    }

    /// Takes a page's entries out of it: it goes, they stay.
    fn dissolve<E: Entry>(&mut self, page: u64) -> Vec<E> {
        if let Some(position) = self.written.iter().position(|(number, _)| *number == page) {
            let (_, written) = self.written.swap_remove(position);
            return E::of(&written).to_vec();
        }
        let Some(entries) = self.open::<E>(page) else { return Vec::new() };
        self.trash.bare_pages.push(page);
        entries.to_vec()
    }
}

/// A page's share of a change.
struct Share<'c> {
    cleared: &'c [(u64, u64)],
    inserted: &'c [Extent],
    tail: bool,
}

fn piece(extent: &Extent, start: u64, end: u64) -> Extent {
    Extent {
        offset: start,
        length: end - start,
        chunk_offset: extent.chunk_offset + (start - extent.offset),
        ..*extent
    }
}

/// Appends entries to the stretch before, where that is fresh too.
fn push_fresh<E: Entry>(parts: &mut Vec<Part<E>>, entries: Vec<E>) {
    if entries.is_empty() {
        return;
    }
    match parts.last_mut() {
        Some(Part::Fresh(before)) => before.extend(entries),
        _ => parts.push(Part::Fresh(entries)),
    }
}
