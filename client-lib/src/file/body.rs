//! What is behind a handle: the version it reads, its position, and what it has changed.

use crate::{
    client::Core,
    file::{
        overlay::{Run, Source},
        write::WriteSide,
    },
    read::{Sought, ahead::Ahead, plan::Layout},
    segments::Segments,
    session::Reader,
};
use cairn_proto::{Error, Reason, Result};
use std::sync::Arc;

/// A handle's state.
#[derive(Debug)]
pub(crate) struct Body {
    pub core: Arc<Core>,
    pub path: String,
    /// The version that was opened or committed last.
    pub base: Arc<Layout>,
    pub position: u64,
    pub write: Option<WriteSide>,
    pub readable: bool,
    pub ahead: Ahead,
    /// The extents of the base have yet to be looked up.
    pub without_extents: bool,
    /// Keeps the version readable.
    reader: Option<Reader>,
}

impl Body {
    pub fn new(
        core: Arc<Core>,
        path: String,
        base: Arc<Layout>,
        readable: bool,
        write: Option<WriteSide>,
    ) -> Self {
        let reader = Some(core.readers.open(base.revision));
        Self {
            core,
            path,
            base,
            position: 0,
            write,
            readable,
            ahead: Ahead::default(),
            without_extents: false,
            reader,
        }
    }

    /// Its length, with what is not committed.
    pub fn size(&self) -> u64 {
        self.write.as_ref().map_or(self.base.size(), |side| side.overlay.size())
    }

    /// # Errors
    /// `INVALID_ARGUMENT` when it was not opened to read.
    pub fn check_readable(&self) -> Result<()> {
        if self.readable {
            return Ok(());
        }
        Err(Error::invalid(format!("{} was not opened to read", self.path)).at(self.path.as_str()))
    }

    /// Another version is the base.
    pub fn rebase(&mut self, base: Arc<Layout>) {
        self.ahead.clear();
        self.reader = Some(self.core.readers.open(base.revision));
        self.base = base;
        self.without_extents = false;
    }

    /// What was fetched ahead is no longer what the handle reads.
    pub fn changed(&mut self) {
        self.ahead.clear();
    }

    fn is_clean(&self) -> bool {
        self.write.as_ref().is_none_or(|side| side.overlay.is_clean())
    }

    /// Makes bytes at the position ready for [`Body::take_ready`].
    ///
    /// # Errors
    /// As reading does.
    pub async fn fill(&mut self, wanted: usize) -> Result<()> {
        self.check_readable()?;
        if self.position >= self.size() {
            return Ok(());
        }
        if !self.is_clean() {
            // Changes that are not committed: what they consist of may be anywhere, and soon be elsewhere.
            let bytes = self.read_range(self.position, (wanted as u64).max(64 * 1024)).await?;
            self.ahead.set(self.position, bytes);
            return Ok(());
        }
        self.load_extents().await?;
        for again in [true, false] {
            match self.ahead.fill(&self.core, &self.base, self.position).await {
                Err(error) if again && self.is_moved(&error) => self.look_again(&error).await?,
                answer => return answer.map_err(|error| error.at(self.path.as_str())),
            }
        }
        Ok(())
    }

    /// Bytes that were made ready; nothing when there are none, or at the end.
    pub fn take_ready(&mut self, buffer: &mut [u8]) -> Option<usize> {
        if buffer.is_empty() || (self.readable && self.position >= self.size()) {
            return Some(0);
        }
        if !self.readable || !self.ahead.is_ready(self.position) {
            return None;
        }
        let count = self.ahead.read(buffer);
        self.position += count as u64;
        Some(count)
    }

    /// Reads a range as the handle sees it.
    ///
    /// # Errors
    /// As reading does.
    pub async fn read_range(&mut self, offset: u64, length: u64) -> Result<Segments> {
        self.load_extents().await?;
        for again in [true, false] {
            match self.read_range_once(offset, length).await {
                Err(error) if again && self.is_moved(&error) => self.look_again(&error).await?,
                answer => return answer.map_err(|error| error.at(self.path.as_str())),
            }
        }
        Ok(Segments::default())
    }

    async fn read_range_once(&mut self, offset: u64, length: u64) -> Result<Segments> {
        let Some(side) = self.write.as_mut().filter(|side| !side.overlay.is_clean()) else {
            return self.core.read_layout(&self.base, offset, length).await;
        };
        side.reap();
        let mut all = Segments::default();
        for run in side.overlay.runs(offset, length) {
            match run {
                Run::Base(at, count) => all.append(self.core.read_layout(&self.base, at, count).await?),
                Run::New(count, Source::Zeros) => all.push_zeros(count),
                Run::New(count, Source::Chunk(number, at)) => {
                    all.append(side.read(&self.core, number, at, count).await?);
                }
            }
        }
        Ok(all)
    }

    async fn load_extents(&mut self) -> Result<()> {
        if self.without_extents {
            self.look_again(&"another was committed").await?;
        }
        Ok(())
    }

    fn is_moved(&self, error: &Error) -> bool {
        error.reason == Reason::ChunkNotFound && self.base.attributes.inode != 0
    }

    /// The chunks of the version are elsewhere (its layout was changed), or gone with it.
    async fn look_again(&mut self, why: &(dyn std::fmt::Display + Sync)) -> Result<()> {
        let attributes = &self.base.attributes;
        let sought = Sought::Inode(attributes.inode, attributes.version);
        match self.core.layout(&sought, 0, 0).await {
            Ok(layout) => {
                self.rebase(layout);
                Ok(())
            }
            Err(found) if matches!(found.reason, Reason::VersionGone | Reason::NotFound) => Err(Error::new(
                Reason::VersionGone,
                format!("version {} of {} is no longer kept: {why}", attributes.version, self.path),
            )
            .at(self.path.as_str())),
            Err(other) => Err(other.at(self.path.as_str())),
        }
    }
}
