//! `migrate`: a directory's store on another engine.

use crate::{
    args::{Migrate, Shared},
    failure::Failure,
    json,
    output::Out,
};
use cluster::Place;

/// Moves the store of a directory that does not run.
pub async fn run(shared: &Shared, migrate: Migrate) -> Result<(), Failure> {
    let place = |flag, text: &str| {
        Place::read(flag, text, &migrate.etcd).map_err(|error| Failure::usage(error.message().to_owned()))
    };
    let (from, to) = (place("--from", &migrate.from)?, place("--to", &migrate.to)?);
    let moved = cluster::migrate(&from, &to).await.map_err(Failure::at(""))?;
    let mut out = Out::new();
    if shared.json {
        out.json(&json::Migrated {
            cluster_id: moved.cluster_id,
            revision: moved.revision,
            records: moved.records,
            from_generation: moved.from_generation,
            generation: moved.generation,
        })?;
        return out.finish();
    }
    out.line(&format!(
        "moved {} records of cluster {} at revision {}, each read again and the same, as generation {} after {}",
        moved.records, moved.cluster_id, moved.revision, moved.generation, moved.from_generation
    ))?;
    let start = match &to {
        Place::Folder(folder) => format!("--data {}", folder.display()),
        Place::Etcd(options) => format!("--store {}", options.address),
    };
    out.line(&format!(
        "Start the directory with {start}. {from} is left as it was; no directory starts on it any more."
    ))?;
    out.finish()
}
