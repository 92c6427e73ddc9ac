use super::*;
use disk::{CrashKeep, Open, SimDisk};

const CLUSTER: &str = "c";

fn disk() -> SimDisk {
    SimDisk::new(7, 1 << 30)
}

async fn open(disk: &SimDisk) -> Journals {
    Journals::open(Arc::new(disk.clone()), CLUSTER).await.unwrap()
}

fn append(
    generation: u64,
    previous: u64,
    revisions: std::ops::RangeInclusive<u64>,
) -> v1::AppendJournalRequest {
    v1::AppendJournalRequest {
        cluster_id: CLUSTER.into(),
        generation,
        previous_revision: previous,
        records: revisions
            .map(|revision| v1::JournalRecord { revision, plan: format!("plan {revision}").into() })
            .collect(),
        carrier_ids: vec![1, 2, 3],
    }
}

/// A checkpoint of `count` entries, a message each, and whether it is complete.
fn checkpoint(
    generation: u64,
    revision: u64,
    count: u64,
    is_complete: bool,
) -> (v1::InstallCheckpointRequest, impl Stream<Item = Result<v1::InstallCheckpointRequest, Status>> + Unpin)
{
    let mut messages: Vec<_> = (0..count)
        .map(|number| v1::InstallCheckpointRequest {
            entries: vec![v1::CheckpointEntry {
                key: format!("key {number}").into(),
                value: "value".into(),
                revision: number,
            }],
            ..Default::default()
        })
        .collect();
    messages[0].cluster_id = CLUSTER.into();
    messages[0].generation = generation;
    messages[0].revision = revision;
    messages[0].carrier_ids = vec![4];
    if is_complete {
        messages.last_mut().unwrap().entry_count = Some(count);
    }
    let first = messages.remove(0);
    (first, futures::stream::iter(messages.into_iter().map(Ok)))
}

async fn install(journals: &Journals, generation: u64, revision: u64, count: u64) -> Result<Revision> {
    let (first, rest) = checkpoint(generation, revision, count, true);
    journals.install(first, rest).await
}

/// (checkpoint revision, number of its entries, revisions behind it)
async fn read(journals: &Journals, generation: u64) -> Result<(u64, usize, Vec<u64>)> {
    let mut reading = journals.read(CLUSTER, Generation(generation)).await?;
    let first = reading.next().await?.expect("at least one part");
    let (checkpoint, mut entries) = (first.checkpoint_revision, first.entries.len());
    let mut revisions: Vec<u64> = first.records.iter().map(|record| record.revision).collect();
    while let Some(part) = reading.next().await? {
        assert!(part.entries.is_empty() || revisions.is_empty(), "the checkpoint comes first");
        entries += part.entries.len();
        for record in part.records {
            assert_eq!(record.plan, format!("plan {}", record.revision));
            revisions.push(record.revision);
        }
    }
    Ok((checkpoint, entries, revisions))
}

#[tokio::test]
async fn appended_records_survive_a_crash_and_read_back() {
    let disk = disk();
    let journals = open(&disk).await;
    assert_eq!(journals.append(append(1, 0, 1..=3)).await.unwrap(), Revision(3));
    assert_eq!(journals.append(append(1, 3, 4..=4)).await.unwrap(), Revision(4));
    drop(journals);
    disk.crash(CrashKeep::Nothing);
    let journals = open(&disk).await;
    assert_eq!(read(&journals, 1).await.unwrap(), (0, 0, vec![1, 2, 3, 4]));
    let copy = &journals.copies()[0];
    assert_eq!((copy.generation, copy.checkpoint_revision, copy.durable_revision), (1, 0, 4));
    assert_eq!(copy.carrier_ids, [1, 2, 3]);
    assert_eq!(journals.append(append(1, 4, 5..=5)).await.unwrap(), Revision(5));
}

#[tokio::test]
async fn a_gap_is_refused_and_a_repetition_is_passed_over() {
    let journals = open(&disk()).await;
    journals.append(append(1, 0, 1..=3)).await.unwrap();
    assert_eq!(journals.append(append(1, 4, 5..=6)).await.unwrap_err().reason, Reason::RevisionCompacted);
    assert_eq!(journals.append(append(1, 1, 2..=4)).await.unwrap(), Revision(4), "2 and 3 are here already");
    assert_eq!(journals.append(append(1, 0, 1..=4)).await.unwrap(), Revision(4));
    let mut disordered = append(1, 4, 5..=6);
    disordered.records.reverse();
    assert_eq!(journals.append(disordered).await.unwrap_err().reason, Reason::InvalidArgument);
    assert_eq!(read(&journals, 1).await.unwrap().2, [1, 2, 3, 4]);
    let other = open(&disk()).await;
    assert_eq!(other.append(append(1, 9, 10..=10)).await.unwrap_err().reason, Reason::RevisionCompacted);
    assert!(other.copies().is_empty(), "nothing is begun by a refused record");
}

#[tokio::test]
async fn a_checkpoint_replaces_what_it_covers_and_keeps_what_is_behind() {
    let disk = disk();
    let journals = open(&disk).await;
    journals.append(append(1, 0, 1..=9)).await.unwrap();
    assert_eq!(install(&journals, 1, 6, 3).await.unwrap(), Revision(9));
    assert_eq!(read(&journals, 1).await.unwrap(), (6, 3, vec![7, 8, 9]));
    assert_eq!(install(&journals, 1, 6, 3).await.unwrap(), Revision(9), "again is the same");
    assert_eq!(install(&journals, 1, 20, 5).await.unwrap(), Revision(20), "beyond the log");
    journals.append(append(1, 20, 21..=22)).await.unwrap();
    drop(journals);
    disk.crash(CrashKeep::Nothing);
    let journals = open(&disk).await;
    assert_eq!(read(&journals, 1).await.unwrap(), (20, 5, vec![21, 22]));
    assert_eq!(journals.copies()[0].carrier_ids, [1, 2, 3]);
    let names: Vec<_> = disk.list(&dir_of(Generation(1))).await.unwrap();
    assert_eq!(names.len(), 2, "one checkpoint and one log are left: {names:?}");
}

#[tokio::test]
async fn an_incomplete_checkpoint_changes_nothing() {
    let disk = disk();
    let journals = open(&disk).await;
    journals.append(append(1, 0, 1..=3)).await.unwrap();
    let (first, rest) = checkpoint(1, 9, 3, false);
    assert_eq!(journals.install(first, rest).await.unwrap_err().reason, Reason::InvalidArgument);
    let (mut first, rest) = checkpoint(1, 9, 1, false);
    first.entry_count = Some(2);
    assert_eq!(journals.install(first, rest).await.unwrap_err().reason, Reason::InvalidArgument);
    assert_eq!(read(&journals, 1).await.unwrap(), (0, 0, vec![1, 2, 3]));
}

#[tokio::test]
async fn a_crash_at_any_change_of_an_installation_leaves_the_old_or_the_new() {
    for changes in 0..60 {
        let disk = disk();
        let journals = open(&disk).await;
        journals.append(append(1, 0, 1..=5)).await.unwrap();
        disk.power_off_after(changes);
        let installed = install(&journals, 1, 4, 3).await;
        let is_done = !disk.is_off();
        drop(journals);
        disk.crash(CrashKeep::Random);
        let journals = open(&disk).await;
        let found = read(&journals, 1).await.unwrap();
        let new = (4, 3, vec![5]);
        if installed.is_ok() {
            assert_eq!(found, new, "after {changes} changes");
        } else {
            assert!(
                found == new || found == (0, 0, vec![1, 2, 3, 4, 5]),
                "after {changes} changes: {found:?}"
            );
        }
        assert_eq!(journals.append(append(1, 5, 6..=6)).await.unwrap(), Revision(6));
        if is_done {
            assert!(changes > 5, "the installation took changes");
            return;
        }
    }
    panic!("the installation never ended");
}

#[tokio::test]
async fn an_older_generation_is_kept_until_the_newer_has_a_checkpoint() {
    let disk = disk();
    let journals = open(&disk).await;
    journals.append(append(1, 0, 1..=3)).await.unwrap();
    journals.append(append(2, 0, 1..=1)).await.unwrap();
    assert_eq!(journals.append(append(1, 3, 4..=4)).await.unwrap_err().reason, Reason::StaleEpoch);
    assert_eq!(install(&journals, 1, 9, 1).await.unwrap_err().reason, Reason::StaleEpoch);
    drop(journals);
    disk.crash(CrashKeep::Nothing);
    let journals = open(&disk).await;
    assert_eq!(read(&journals, 1).await.unwrap().2, [1, 2, 3], "still readable");
    assert_eq!(journals.copies().len(), 2);
    install(&journals, 2, 5, 1).await.unwrap();
    assert_eq!(read(&journals, 1).await.unwrap_err().reason, Reason::NotFound);
    assert_eq!(journals.copies().len(), 1);
    drop(journals);
    assert_eq!(open(&disk).await.copies().len(), 1);
}

#[tokio::test]
async fn a_damaged_copy_is_not_offered_and_a_checkpoint_replaces_it() {
    for what in ["checkpoint", "log"] {
        let disk = disk();
        let journals = open(&disk).await;
        install(&journals, 1, 4, 3).await.unwrap();
        journals.append(append(1, 4, 5..=6)).await.unwrap();
        journals.close().await.unwrap();
        drop(journals);
        let dir = dir_of(Generation(1));
        match what {
            "checkpoint" => disk.flip_bit(&dir.join("checkpoint-0000000000000004"), 60, 1).unwrap(),
            _ => flip_plan(&disk, &dir.join("log-0000000000000004")).await,
        }
        let journals = open(&disk).await;
        assert!(journals.copies().iter().all(|copy| copy.durable_revision == 0), "{what}");
        assert_eq!(journals.copies().len(), 1, "{what}: it is told that there was one");
        assert_eq!(read(&journals, 1).await.unwrap_err().reason, Reason::NotFound, "{what}");
        let refused = journals.append(append(1, 6, 7..=7)).await.unwrap_err();
        assert_eq!(refused.reason, Reason::RevisionCompacted, "{what}");
        // The same revision too: what is there of it cannot be read.
        assert_eq!(install(&journals, 1, 4, 2).await.unwrap(), Revision(4), "{what}");
        assert_eq!(journals.append(append(1, 4, 5..=5)).await.unwrap(), Revision(5), "{what}");
        drop(journals);
        assert_eq!(read(&open(&disk).await, 1).await.unwrap(), (4, 2, vec![5]), "{what}");
    }
}

/// Flips a bit in a plan of the first segment that has one.
async fn flip_plan(disk: &SimDisk, dir: &Path) {
    for entry in disk.list(dir).await.unwrap() {
        let path = dir.join(entry.name);
        let bytes = disk.open(&path, Open::Read).await.unwrap().read_at(0, 1 << 20).await.unwrap();
        if let Some(at) = bytes.windows(6).position(|window| window == b"plan 5") {
            return disk.flip_bit(&path, at as u64, 0).unwrap();
        }
    }
    panic!("no plan in the log");
}

#[tokio::test]
async fn many_appends_at_once_are_all_durable_in_order() {
    let disk = disk();
    let journals = Arc::new(open(&disk).await);
    let mut tasks = tokio::task::JoinSet::new();
    for revision in 1..=50 {
        let journals = journals.clone();
        // Submitted in order, awaited together.
        tasks.spawn(async move { journals.append(append(1, revision - 1, revision..=revision)).await });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap().unwrap();
    }
    drop(journals);
    disk.crash(CrashKeep::Nothing);
    assert_eq!(read(&open(&disk).await, 1).await.unwrap().2, (1..=50).collect::<Vec<_>>());
}

/// Lets tasks that nobody waits for go on.
async fn settle() {
    for _ in 0..500 {
        tokio::task::yield_now().await;
    }
}

/// Every name under the journal's directory.
async fn names(disk: &SimDisk) -> Vec<String> {
    let entries = disk.list(&dir_of(Generation(1))).await.unwrap();
    entries.into_iter().map(|entry| entry.name).collect()
}

#[tokio::test]
async fn rebuilt_an_installation_whose_caller_goes_away_forgets_nothing() {
    for polls in 0..400 {
        let disk = disk();
        let journals = open(&disk).await;
        journals.append(append(1, 0, 1..=5)).await.unwrap();
        let mut is_done = false;
        {
            let mut installing = std::pin::pin!(install(&journals, 1, 4, 3));
            for _ in 0..polls {
                is_done = futures::poll!(installing.as_mut()).is_ready();
                if is_done {
                    break;
                }
                tokio::task::yield_now().await;
            }
        }
        let appended = journals.append(append(1, 5, 6..=6)).await;
        assert_eq!(appended.unwrap(), Revision(6), "after {polls} polls");
        settle().await;
        journals.close().await.unwrap();
        drop(journals);
        disk.crash(CrashKeep::Everything);
        let journals = open(&disk).await;
        assert_eq!(journals.revision(), 6, "acknowledged, and forgotten after {polls} polls");
        let (checkpoint, _, revisions) = read(&journals, 1).await.unwrap();
        assert!(matches!((checkpoint, &revisions[..]), (0, [1, 2, 3, 4, 5, 6]) | (4, [5, 6])));
        if is_done {
            assert!(polls > 5, "the installation took some time");
            return;
        }
    }
    panic!("the installation never ended");
}

#[tokio::test]
async fn a_copy_whose_beginning_was_given_up_begins() {
    for polls in 0..100 {
        let disk = disk();
        let journals = open(&disk).await;
        let mut is_done = false;
        {
            let mut appending = std::pin::pin!(journals.append(append(1, 0, 1..=2)));
            for _ in 0..polls {
                is_done = futures::poll!(appending.as_mut()).is_ready();
                if is_done {
                    break;
                }
                tokio::task::yield_now().await;
            }
        }
        settle().await;
        // Its log is that of a copy: no second one is begun in the same place.
        let is_begun = journals.state.lock().await.copies.contains_key(&Generation(1));
        assert_eq!(is_begun, polls > 0, "{polls} polls");
        assert_eq!(journals.append(append(1, 0, 1..=3)).await.unwrap(), Revision(3), "{polls} polls");
        drop(journals);
        disk.crash(CrashKeep::Nothing);
        assert_eq!(read(&open(&disk).await, 1).await.unwrap().2, [1, 2, 3], "{polls} polls");
        if is_done {
            return;
        }
    }
    panic!("the append never ended");
}

/// Installs a checkpoint of revision 4, and fails the next sync as soon as `is_time`.
async fn install_and_fail(
    disk: &SimDisk,
    journals: &Journals,
    revision: u64,
    is_time: impl Fn(&[String]) -> bool,
) -> Result<Revision> {
    let copies = journals.clone();
    let installing = tokio::spawn(async move { install(&copies, 1, revision, 3).await });
    while !is_time(&names(disk).await) {
        assert!(!installing.is_finished(), "it ended before the time came");
        tokio::task::yield_now().await;
    }
    disk.fail_syncs(1);
    installing.await.unwrap()
}

#[tokio::test]
async fn rebuilt_an_installation_that_fails_at_its_last_sync_forgets_nothing() {
    let disk = disk();
    let journals = open(&disk).await;
    journals.append(append(1, 0, 1..=5)).await.unwrap();
    let named = |names: &[String]| names.contains(&"checkpoint-0000000000000004".to_owned());
    let failed = install_and_fail(&disk, &journals, 4, named).await.unwrap_err();
    assert_eq!(failed.reason, Reason::Io);
    // Which copy a start would find is not known: neither takes anything.
    let refused = journals.append(append(1, 5, 6..=6)).await.unwrap_err();
    assert_eq!(refused.reason, Reason::RevisionCompacted);
    assert_eq!(journals.revision(), 0, "it is told that what is held is not known");
    // The directory sends another, of the same revision if nothing was committed meanwhile.
    assert_eq!(install(&journals, 1, 4, 2).await.unwrap(), Revision(4));
    assert_eq!(journals.append(append(1, 4, 5..=6)).await.unwrap(), Revision(6));
    drop(journals);
    settle().await;
    disk.crash(CrashKeep::Random);
    assert_eq!(read(&open(&disk).await, 1).await.unwrap(), (4, 2, vec![5, 6]));
}

/// A disk whose copy had acknowledged 6, and was then damaged behind its checkpoint of revision 4.
async fn damaged() -> SimDisk {
    let disk = disk();
    let journals = open(&disk).await;
    install(&journals, 1, 4, 3).await.unwrap();
    journals.append(append(1, 4, 5..=6)).await.unwrap();
    journals.close().await.unwrap();
    drop(journals);
    flip_plan(&disk, &dir_of(Generation(1)).join("log-0000000000000004")).await;
    disk
}

#[tokio::test]
async fn rebuilt_a_damaged_copy_never_passes_for_one_that_knows_nothing_newer() {
    let damaged = damaged().await;
    for changes in 0..100 {
        let disk = damaged.clone_disk();
        let journals = open(&disk).await;
        disk.power_off_after(changes);
        let installed = install(&journals, 1, 4, 2).await;
        let is_done = !disk.is_off();
        drop(journals);
        settle().await;
        disk.crash(CrashKeep::Random);
        let journals = open(&disk).await;
        match read(&journals, 1).await {
            Ok(found) => assert_eq!(found, (4, 2, vec![]), "after {changes} changes: only the new one"),
            Err(_) => {
                assert!(installed.is_err(), "after {changes} changes");
                let copies = journals.copies();
                assert_eq!(copies.len(), 1, "after {changes} changes: it is told that there was one");
                assert_eq!(copies[0].durable_revision, 0, "after {changes} changes");
            }
        }
        if is_done {
            return;
        }
    }
    panic!("the installation never ended");
}

#[tokio::test]
async fn a_checkpoint_takes_the_place_of_a_damaged_newer_one_for_good() {
    let disk = damaged().await;
    let journals = open(&disk).await;
    let newer_went = |names: &[String]| !names.contains(&"checkpoint-0000000000000004".to_owned());
    install_and_fail(&disk, &journals, 3, newer_went).await.unwrap_err();
    assert_eq!(install(&journals, 1, 3, 2).await.unwrap(), Revision(3));
    assert_eq!(journals.append(append(1, 3, 4..=5)).await.unwrap(), Revision(5));
    drop(journals);
    settle().await;
    disk.crash(CrashKeep::Nothing);
    assert_eq!(read(&open(&disk).await, 1).await.unwrap(), (3, 2, vec![4, 5]));
}

#[tokio::test]
async fn rebuilt_nothing_is_acknowledged_from_a_log_that_was_replaced() {
    let disk = disk();
    let journals = open(&disk).await;
    journals.append(append(1, 0, 1..=1)).await.unwrap();
    let mut first = std::pin::pin!(journals.append(append(1, 1, 2..=5)));
    assert!(futures::poll!(first.as_mut()).is_pending());
    settle().await;
    // Durable by now, but not answered when the log fails and a checkpoint of less replaces the copy.
    disk.fail_syncs(1);
    journals.append(append(1, 5, 6..=6)).await.unwrap_err();
    assert_eq!(install(&journals, 1, 4, 3).await.unwrap(), Revision(4));
    assert_eq!(first.await.unwrap_err().reason, Reason::RevisionCompacted, "5 is not held any more");
}

#[tokio::test]
async fn bounded_installations_that_break_off_leave_one_behind_at_most() {
    let disk = disk();
    let journals = open(&disk).await;
    journals.append(append(1, 0, 1..=30)).await.unwrap();
    for revision in 10..20 {
        let (first, rest) = checkpoint(1, revision, 3, false);
        // The caller goes away in the middle.
        let rest = rest.chain(futures::stream::pending());
        let mut installing = std::pin::pin!(journals.install(first, rest));
        for _ in 0..50 {
            assert!(futures::poll!(installing.as_mut()).is_pending());
            tokio::task::yield_now().await;
        }
    }
    for revision in 20..25 {
        // Room for the checkpoint, not for the records behind it.
        disk.set_capacity(disk.used_bytes() + (1 << 20));
        install(&journals, 1, revision, 3).await.unwrap_err();
        disk.set_capacity(1 << 30);
    }
    let left = names(&disk).await;
    assert!(left.len() <= 3, "{left:?}");
    assert_eq!(read(&journals, 1).await.unwrap(), (0, 0, (1..=30).collect()));
}
