//! The checkers are checked: each bug that a promise is there to prevent is planted, one at a time, and the promise's
//! check must find it. Without the bug, through the same wrappers, it must pass.
//!
//! Bugs come in as wrappers of the seams that production code has anyway: disk, metadata store, chunk store, network.
//! The checks are those of the promise tests (`harness/checks`).

#[path = "planted/chunks.rs"]
mod chunks;
#[path = "planted/disk.rs"]
mod faulty_disk;
#[path = "planted/network.rs"]
mod network;
#[path = "planted/plant.rs"]
mod plant;
#[path = "planted/records.rs"]
mod records;
#[path = "planted/stores.rs"]
mod stores;

use cairn_tests::checks::{bounded, checked, durable, fenced, healed, linear, rebuilt, retry, whole};
use cluster::{Builder, Cluster, Role};
use faulty_disk::{CutLogs, Unsynced};
use plant::{Plant, pair};
use std::{path::Path, sync::Arc};

const SEED: u64 = 7;

fn is_file_server(role: Role) -> bool {
    matches!(role, Role::FileServer(_))
}

/// Whether it is a segment with records, not one that is being made ready.
fn is_segment(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.ends_with(".seg") && !name.starts_with("spare-")
}

/// A builder on whose disks some syncs do nothing.
fn unsynced(
    plant: Arc<Plant>,
    skipped: impl Fn(Role, &Path) -> bool + Clone + Send + Sync + 'static,
) -> Builder {
    Cluster::builder().disk_wrapper(move |role, disk| {
        let skipped = skipped.clone();
        Unsynced::over(disk, plant.clone()).files(move |path| skipped(role, path)).wrap()
    })
}

/// A builder on whose disks some names are never made durable.
fn unnamed(
    plant: Arc<Plant>,
    skipped: impl Fn(Role, &Path) -> bool + Clone + Send + Sync + 'static,
) -> Builder {
    Cluster::builder().disk_wrapper(move |role, disk| {
        let skipped = skipped.clone();
        Unsynced::over(disk, plant.clone()).directories(move |path| skipped(role, path)).wrap()
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn skipped_fsync_of_a_small_chunk() {
    let skipped = |role: Role, path: &Path| {
        role == Role::FileServer(1) && path.starts_with("chunks") && is_segment(path)
    };
    pair(|plant| unsynced(plant, skipped), async |builder| durable::power_loss(builder, SEED).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn skipped_fsync_of_a_large_chunk() {
    let skipped = |role: Role, path: &Path| role == Role::FileServer(1) && path.starts_with("chunks/files");
    pair(|plant| unsynced(plant, skipped), async |builder| durable::power_loss(builder, SEED).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn skipped_fsync_of_the_journal() {
    let skipped = |role: Role, path: &Path| role == Role::Directory && is_segment(path);
    pair(|plant| unsynced(plant, skipped), async |builder| durable::power_loss(builder, SEED).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn skipped_fsync_of_the_journal_s_copies() {
    let skipped =
        |role: Role, path: &Path| is_file_server(role) && path.starts_with("journal") && is_segment(path);
    pair(|plant| unsynced(plant, skipped), async |builder| rebuilt::lost_store_and_power(builder, 8).await)
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn acknowledged_before_the_second_copy() {
    pair(network::hollow_copies, async |builder| durable::power_loss(builder, SEED).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stale_token_accepted() {
    pair(records::stale_locks, async |builder| fenced::former_holder(builder, 2).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn served_without_verifying_the_checksum() {
    let build = |plant| chunks::unverified(plant, chunks::Sums::AsStored).memory(true);
    pair(build, async |builder| checked::flipped_bits(builder, SEED, 2).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn served_with_checksums_made_of_damaged_bytes() {
    let build = |plant| chunks::unverified(plant, chunks::Sums::OfWhatIsServed).memory(true);
    pair(build, async |builder| checked::flipped_bits(builder, SEED, 2).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn collected_from_an_open_grant() {
    pair(records::closed_grants, async |builder| durable::unfinished_write(builder, SEED).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn collected_under_a_reader() {
    pair(records::ancient_drops, async |builder| whole::opened_version(builder).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn copy_on_a_former_member_counted() {
    pair(records::lasting_members, async |builder| durable::former_member(builder, SEED).await).await;
}

/// A builder whose logs end at their first bad record, below a path on the disks of `role`'s kind.
fn cut(plant: Arc<Plant>, cuts: impl Fn(Role, &Path) -> bool + Clone + Send + Sync + 'static) -> Builder {
    let known = CutLogs::default();
    Cluster::builder().disk_wrapper(move |role, disk| {
        let cuts = cuts.clone();
        known.wrap(role, disk, plant.clone(), move |path| cuts(role, path))
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn segment_cut_at_its_first_bad_record() {
    let cuts = |role: Role, path: &Path| is_file_server(role) && path.starts_with("chunks/segments");
    pair(|plant| cut(plant, cuts), async |builder| checked::one_bad_record_each(builder, SEED).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn journal_cut_at_its_first_bad_record() {
    let cuts =
        |role: Role, path: &Path| role == Role::Directory && path.to_string_lossy().contains("journal");
    pair(|plant| cut(plant, cuts), async |builder| checked::bad_record_of_the_directory(builder).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_directory_entry_of_a_large_chunk() {
    let skipped = |role: Role, path: &Path| role == Role::FileServer(2) && path.starts_with("chunks/files");
    pair(|plant| unnamed(plant, skipped), async |builder| durable::power_loss(builder, SEED).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_directory_entry_of_a_segment() {
    let skipped =
        |role: Role, path: &Path| role == Role::FileServer(2) && path.starts_with("chunks/segments");
    pair(|plant| unnamed(plant, skipped), async |builder| durable::power_loss(builder, SEED).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_directory_entry_of_the_journal() {
    let skipped =
        |role: Role, path: &Path| role == Role::Directory && path.to_string_lossy().contains("journal");
    pair(|plant| unnamed(plant, skipped), async |builder| durable::power_loss(builder, SEED).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn deleted_file_brought_back_at_rebuild() {
    pair(network::forgotten_deletes, async |builder| rebuilt::lost_store(builder, 12).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_not_kept() {
    pair(records::lost_answers, async |builder| retry::first_answer(builder).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stale_read_served_after_a_commit() {
    pair(records::stale_lookups, async |builder| linear::histories(builder, SEED, 2, 30).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn healthy_reported_while_a_copy_is_missing() {
    pair(stores::borrowed_inventories, async |builder| healed::lost_copies(builder, SEED).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn queue_without_an_end() {
    pair(stores::endless_queues, async |builder| bounded::stalled_disks(builder).await).await;
}
