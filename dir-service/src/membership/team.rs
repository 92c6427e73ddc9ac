//! All directories of a store, as it has them at one revision.

use crate::{
    ops::view::{View, stored},
    store::{KeyRange, MetaStore},
};
use cairn_core::{
    cluster::directories,
    key,
    record::{Beat, Directory, Lead},
};
use cairn_proto::{Result, id::Revision, v1};
use std::{collections::BTreeMap, ops::Bound, sync::Arc};

/// Records about directories read at a time: all there can be but for some dead ones.
const PAGE: usize = 256;

/// A directory as another one sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct Seen {
    /// Its record.
    pub record: Directory,
    /// The plan that wrote it.
    pub revision: Revision,
    /// Its last beat, with the plan that wrote it.
    pub beat: Option<(Beat, Revision)>,
}

impl Seen {
    pub(super) fn to_wire(&self, id: u64) -> v1::DirectoryAddress {
        v1::DirectoryAddress { id, addresses: self.record.addresses.clone() }
    }
}

/// All directories and the lead, at one revision of the store.
#[derive(Clone, Debug, Default)]
pub struct Team {
    /// The directories by id, dead ones with sessions too.
    pub directories: BTreeMap<u64, Seen>,
    /// Who leads, with the plan that wrote it.
    pub lead: Option<(Lead, Revision)>,
    /// The revision.
    pub revision: Revision,
}

impl Team {
    /// Reads them.
    ///
    /// # Errors
    /// As the store, and for a damaged record.
    pub async fn read(store: &Arc<dyn MetaStore>) -> Result<Self> {
        let view = View::new(store.clone());
        let mut team = Self::default();
        // Beats, directories and the lead lie side by side.
        let end = key::prefix_end(&key::lead()).map_or(Bound::Unbounded, Bound::Excluded);
        let mut range = KeyRange { start: Bound::Included(key::beats()), end };
        let mut beats = BTreeMap::new();
        loop {
            let page = view.scan_range(range.clone(), PAGE).await?;
            for (key, value) in &page.entries {
                let id = key::last_u64(key).unwrap_or_default();
                if key.starts_with(&key::beats()) {
                    let beat = stored::<Beat>(value)?;
                    beats.insert(id, (beat.record, beat.revision));
                } else if key.starts_with(&key::directories()) {
                    let directory = stored::<Directory>(value)?;
                    let (record, revision) = (directory.record, directory.revision);
                    let beat = beats.remove(&id);
                    team.directories.insert(id, Seen { record, revision, beat });
                } else if *key == key::lead() {
                    let lead = stored::<Lead>(value)?;
                    team.lead = Some((lead.record, lead.revision));
                }
            }
            match page.entries.last() {
                Some((last, _)) if page.more => range = range.behind(last.clone()),
                _ => break,
            }
        }
        team.revision = view.revision().unwrap_or_default();
        Ok(team)
    }

    /// Those that live.
    pub fn living(&self) -> impl Iterator<Item = (u64, &Seen)> + Clone {
        self.directories.iter().filter(|(_, seen)| !seen.record.dead).map(|(id, seen)| (*id, seen))
    }

    /// Whether a home lives; a number that no directory has is none.
    pub fn is_living(&self, home: u64) -> bool {
        self.directories.get(&home).is_some_and(|seen| !seen.record.dead)
    }

    /// Drops up to this revision are needed by no session.
    pub fn unread(&self) -> Option<Revision> {
        directories::unread(
            self.directories.values().map(|seen| (&seen.record, seen.beat.as_ref().map(|(beat, _)| beat))),
        )
    }
}
