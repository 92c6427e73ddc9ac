//! Chunk ids set aside for one long version.
//!
//! The directory keeps one record for up to [`limits::CHUNK_RUN`] chunks whose ids lie in a row, and a commit is one
//! plan of few records. When a long file and many small ones are written at the same time, as when a tree is copied,
//! its chunks would get ids here and there among those of the others, and need a record each. So it takes whole rows.

use crate::write::grants::{Held, IN_TURN, Slot};
use cairn_proto::id::{ChunkId, ServerId};
use parking_lot::Mutex;
use std::{collections::VecDeque, ops::Range, sync::Arc, time::Duration};

#[cfg(doc)]
use cairn_proto::limits;

/// Ids that were set aside are used for this long: longer than those of other chunks, since rows that are given up
/// early are records, but well below the age at which the directory closes a grant.
const ROW_AGE_MAX: Duration = Duration::from_secs(20 * 60);

/// The rows of one version in the making.
#[derive(Debug, Default)]
pub(crate) struct Rows {
    rows: Mutex<VecDeque<(Arc<Held>, Range<u32>)>>,
}

impl Rows {
    /// The next id of each row in turn; none while there are fewer rows than a long file should spread over.
    pub fn take(&self, avoided: impl Fn(ServerId) -> bool) -> Option<Slot> {
        if self.rows.lock().len() < IN_TURN {
            return None;
        }
        self.take_any(avoided)
    }

    /// The next id, leaving out primaries that are better avoided.
    pub fn take_any(&self, avoided: impl Fn(ServerId) -> bool) -> Option<Slot> {
        let mut rows = self.rows.lock();
        rows.retain(|(grant, row)| !row.is_empty() && grant.is_usable(ROW_AGE_MAX));
        for _ in 0..rows.len() {
            let (grant, mut row) = rows.pop_front()?;
            let index = if avoided(grant.primary()) { None } else { row.next() };
            rows.push_back((grant.clone(), row));
            if let Some(index) = index {
                return Some(Slot { chunk: ChunkId::new(grant.id, index), grant });
            }
        }
        None
    }

    /// Takes in a row that is not empty; answers its first id.
    pub fn add(&self, grant: Arc<Held>, mut row: Range<u32>) -> Slot {
        let index = row.next().unwrap_or(row.start);
        self.rows.lock().push_back((grant.clone(), row));
        Slot { chunk: ChunkId::new(grant.id, index), grant }
    }
}
