//! Reading in order: more and more is fetched before it is asked for, within a bound.

use crate::{
    client::Core,
    read::{PIECE_BYTES_MAX, plan::Layout},
    segments::Segments,
    task::Task,
};
use cairn_proto::Result;
use std::{collections::VecDeque, sync::Arc};

/// The first read fetches this much.
const WINDOW_MIN: u64 = 128 * 1024;
/// Most that is fetched ahead of a reader.
const WINDOW_MAX: u64 = 4 * PIECE_BYTES_MAX;

/// What was fetched ahead of a position.
#[derive(Debug)]
pub(crate) struct Ahead {
    /// Position in the file of the next byte handed out.
    position: u64,
    /// Position in the file behind all that is fetched or under way.
    end: u64,
    window: u64,
    ready: Segments,
    under_way: VecDeque<(u64, Task<Result<Segments>>)>,
}

impl Default for Ahead {
    fn default() -> Self {
        Self {
            position: 0,
            end: 0,
            window: WINDOW_MIN,
            ready: Segments::default(),
            under_way: VecDeque::new(),
        }
    }
}

impl Ahead {
    /// Forgets all that was fetched.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// Bytes that are at `position`, however they were had.
    pub fn set(&mut self, position: u64, ready: Segments) {
        self.clear();
        self.position = position;
        self.end = position + ready.len();
        self.ready = ready;
    }

    /// Whether a read at `position` needs no fetching.
    pub fn is_ready(&self, position: u64) -> bool {
        self.position == position && !self.ready.is_empty()
    }

    /// Hands out bytes that are there; call [`Self::fill`] first.
    pub fn read(&mut self, buffer: &mut [u8]) -> usize {
        let count = self.ready.read(buffer);
        self.position += count as u64;
        count
    }

    /// Makes bytes at `position` ready, if there are any before the end of the file. May be cancelled.
    ///
    /// # Errors
    /// As reading does; what was fetched ahead is forgotten then.
    pub async fn fill(&mut self, core: &Arc<Core>, layout: &Arc<Layout>, position: u64) -> Result<()> {
        if self.position != position {
            self.clear();
            self.position = position;
            self.end = position;
        }
        if !self.ready.is_empty() {
            return Ok(());
        }
        if self.end > self.position && self.under_way.len() <= 1 {
            // The reader came this far in order.
            self.window = (self.window * 2).min(WINDOW_MAX);
        }
        while self.end < layout.size() && self.end - self.position < self.window {
            let length = (self.window / 4).clamp(WINDOW_MIN, PIECE_BYTES_MAX).min(layout.size() - self.end);
            let (core, layout, begin) = (core.clone(), layout.clone(), self.end);
            let task = Task::spawn(async move { core.read_layout(&layout, begin, length).await });
            self.under_way.push_back((length, task));
            self.end += length;
        }
        let Some((length, task)) = self.under_way.front_mut() else { return Ok(()) };
        let result = task.await.and_then(|result| result);
        let length = *length;
        self.under_way.pop_front();
        match result {
            Ok(segments) if segments.len() == length => {
                self.ready = segments;
                self.window = (self.window * 2).min(WINDOW_MAX);
                Ok(())
            }
            Ok(_) => {
                self.clear();
                Err(cairn_proto::Error::internal("a read returned fewer bytes than the file has"))
            }
            Err(error) => {
                self.clear();
                Err(error)
            }
        }
    }
}
