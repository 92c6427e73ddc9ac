//! The way of a read: a path becomes extents, extents become pieces of chunks, pieces come from replicas.

pub(crate) mod ahead;
pub(crate) mod fetch;
pub(crate) mod hedge;
pub(crate) mod plan;
pub(crate) mod short;

use crate::{client::Core, pages::Pages, segments::Segments, task::Task};
use cairn_proto::{Error, Reason, Result, v1};
use plan::{Layout, Part};
use std::{collections::VecDeque, sync::Arc};

/// Largest part of a chunk fetched in one call. Chunks up to this size are verified as a whole too.
pub(crate) const PIECE_BYTES_MAX: u64 = cairn_proto::limits::CHUNK_BYTES_DEFAULT;
/// Most bytes that one call returns in memory.
pub const READ_BYTES_MAX: u64 = 4 * 1024 * 1024 * 1024;
/// Pieces of one read under way: at most 32 MiB.
pub(crate) const PIECES_AHEAD: usize = 4;
/// Times that a lookup begins again because the file changed between two of its pages.
const RELOOKUPS_MAX: u32 = 8;
/// Extents that a client loads for one file: beyond, ranges are read one by one.
const EXTENTS_MAX: usize = 262_144;

/// What a lookup is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Sought {
    Path(String),
    /// Of this version, no other.
    Inode(u64, u64),
}

impl Core {
    /// Takes in what an answer says of groups and servers.
    pub fn learn(&self, groups: &[v1::Group], servers: &[v1::Server]) {
        self.servers.learn(servers);
        for group in groups {
            let known = self.groups.get(&group.id);
            if known.is_none_or(|known| known.epoch <= group.epoch) {
                self.groups.insert(group.id, Arc::new(group.clone()));
            }
        }
    }

    /// The attributes and the extents of a range; `length` 0 means to the end.
    ///
    /// # Errors
    /// As `DirectoryService.Lookup`; `IS_A_DIRECTORY` for a directory; `LIMIT_EXCEEDED` for a range of too many
    /// extents.
    pub async fn layout(&self, sought: &Sought, offset: u64, length: u64) -> Result<Arc<Layout>> {
        let mut again = 0;
        loop {
            match self.layout_once(sought, offset, length).await {
                // A commit or compaction came between two pages: begin with what there is now.
                Err(error) if error.reason == Reason::Conflict && again < RELOOKUPS_MAX => again += 1,
                answer => return answer,
            }
        }
    }

    async fn layout_once(&self, sought: &Sought, offset: u64, length: u64) -> Result<Arc<Layout>> {
        let (path, inode, version) = match sought {
            Sought::Path(path) => (path.clone(), 0, 0),
            Sought::Inode(inode, version) => (String::new(), *inode, *version),
        };
        let mut message = v1::LookupRequest {
            path: path.clone(),
            inode,
            version,
            with_extents: true,
            offset,
            length,
            ..Default::default()
        };
        let mut layout = Layout::default();
        let mut key = None;
        let mut pages = Pages::default();
        loop {
            let found = self.directory.lookup(message.clone()).await.map_err(|mut error| {
                if error.reason == Reason::VersionGone && !message.page_token.is_empty() {
                    error.reason = Reason::Conflict;
                }
                error.at(path.as_str())
            })?;
            found.members.learn(|groups, servers| self.learn(groups, servers));
            let page = found.answer;
            let attributes = page.attributes.ok_or_else(|| {
                Error::internal("the directory answered a lookup without attributes").at(path.as_str())
            })?;
            if attributes.kind() == v1::Kind::Directory {
                return Err(Error::new(Reason::IsADirectory, format!("{path} is a directory")).at(path));
            }
            if key.is_none() {
                let first = (attributes.inode, attributes.version, page.layout_revision);
                key = Some(first);
                // The extents of a version in a layout never change; only that it is current has to be asked.
                if !page.next_page_token.is_empty()
                    && let Some(known) = self.layouts.get(&first)
                {
                    return Ok(Arc::new(Layout { revision: page.revision, ..(*known).clone() }));
                }
                layout.attributes = attributes;
                layout.revision = page.revision;
                layout.layout_revision = page.layout_revision;
            } else if attributes.version != layout.attributes.version {
                return Err(Error::new(Reason::Conflict, "the file changed during the lookup").at(path));
            }
            let found = page.extents.len();
            layout.extents.extend(page.extents);
            if layout.extents.len() > EXTENTS_MAX {
                return Err(Error::limit(format!(
                    "the range has more than {EXTENTS_MAX} extents: read it in smaller ranges"
                ))
                .at(path));
            }
            match pages.next(page.next_page_token, found).map_err(|error| error.at(path.as_str()))? {
                Some(token) => message.page_token = token,
                None => break,
            }
        }
        layout.extents.sort_by_key(|extent| extent.offset);
        layout.check().map_err(|error| error.at(path.as_str()))?;
        let layout = Arc::new(layout);
        // Small layouts come with the lookup anyway.
        if let Some(key) = key
            && offset == 0
            && length == 0
            && layout.extents.len() > cairn_proto::limits::PAGE_EXTENTS_MAX
        {
            self.layouts.insert(key, layout.clone());
        }
        Ok(layout)
    }

    /// Reads parts in order, several ahead.
    pub fn parts(self: &Arc<Self>, parts: Vec<Part>) -> Parts {
        Parts { core: self.clone(), parts: parts.into(), under_way: VecDeque::new() }
    }

    /// Reads a part.
    ///
    /// # Errors
    /// As [`Core::fetch`].
    pub async fn read_part(&self, part: &Part) -> Result<Segments> {
        match part {
            Part::Zeros(count) => {
                let mut zeros = Segments::default();
                zeros.push_zeros(*count);
                Ok(zeros)
            }
            Part::Bytes(piece) => self.fetch(piece).await,
        }
    }

    /// Reads a range of a layout into memory.
    ///
    /// # Errors
    /// As [`Core::fetch`].
    pub async fn read_layout(
        self: &Arc<Self>,
        layout: &Layout,
        offset: u64,
        length: u64,
    ) -> Result<Segments> {
        let parts = layout.parts(offset, length, PIECE_BYTES_MAX)?;
        self.parts(parts).all().await
    }

    /// The version that a path has now, read whole. When its chunks are gone or its layout changed meanwhile, it is
    /// looked up again.
    ///
    /// # Errors
    /// As [`Core::layout`] and [`Core::fetch`].
    pub async fn read_now(
        self: &Arc<Self>,
        path: &str,
        offset: u64,
        length: u64,
    ) -> Result<(v1::Attributes, Segments)> {
        let mut attempts = self.retry.start();
        loop {
            let layout = self.layout(&Sought::Path(path.to_owned()), offset, length).await?;
            let wanted = if length == 0 { u64::MAX } else { length };
            if layout.size().saturating_sub(offset).min(wanted) > READ_BYTES_MAX {
                return Err(Error::limit(format!(
                    "one read returns at most {READ_BYTES_MAX} bytes: open {path} or stream it"
                ))
                .at(path));
            }
            match self.read_layout(&layout, offset, wanted).await {
                Ok(segments) => return Ok((layout.attributes.clone(), segments)),
                Err(error) if matches!(error.reason, Reason::ChunkNotFound | Reason::VersionGone) => {
                    attempts.pause_after_any(error.at(path)).await?;
                }
                Err(error) => return Err(error.at(path)),
            }
        }
    }
}

/// Parts of a file on their way.
#[derive(Debug)]
pub(crate) struct Parts {
    core: Arc<Core>,
    parts: VecDeque<Part>,
    under_way: VecDeque<Task<Result<Segments>>>,
}

impl Parts {
    /// The next part; nothing at the end.
    ///
    /// # Errors
    /// As [`Core::fetch`].
    pub async fn next(&mut self) -> Result<Option<Segments>> {
        if self.under_way.is_empty() && self.parts.len() == 1 {
            // Alone it needs no task.
            return match self.next_part() {
                Some(part) => self.core.read_part(&part).await.map(Some),
                None => Ok(None),
            };
        }
        while self.under_way.len() < PIECES_AHEAD
            && let Some(part) = self.next_part()
        {
            let core = self.core.clone();
            self.under_way.push_back(Task::spawn(async move { core.read_part(&part).await }));
        }
        match self.under_way.pop_front() {
            Some(task) => task.await?.map(Some),
            None => Ok(None),
        }
    }

    /// Long holes come in pieces too.
    fn next_part(&mut self) -> Option<Part> {
        match self.parts.front_mut() {
            Some(Part::Zeros(count)) if *count > PIECE_BYTES_MAX => {
                *count -= PIECE_BYTES_MAX;
                Some(Part::Zeros(PIECE_BYTES_MAX))
            }
            _ => self.parts.pop_front(),
        }
    }

    /// All that is left.
    ///
    /// # Errors
    /// As [`Core::fetch`].
    pub async fn all(mut self) -> Result<Segments> {
        let mut all = Segments::default();
        while let Some(segments) = self.next().await? {
            all.append(segments);
        }
        Ok(all)
    }
}
