//! Disks that fail, fill and rot.

use super::*;
use futures::future::join_all;

async fn try_put(store: &JournaledStore, at: &str, value: impl Into<Bytes>) -> Result<Revision, CommitError> {
    let mut plan = Plan::new();
    plan.put(key(at), value);
    store.commit(plan).await
}

fn is_refused(answer: &Result<Revision, CommitError>, reason: Reason) -> bool {
    matches!(answer, Err(CommitError::Refused(error)) if error.reason == reason)
}

#[tokio::test(start_paused = true)]
async fn durable_a_failed_sync_acknowledges_nothing() {
    for keep in [CrashKeep::Nothing, CrashKeep::Random, CrashKeep::Everything] {
        let disk = sim(7);
        let store = create(&disk, small()).await;
        put(&store, "z", "1").await;
        disk.fail_syncs(1);
        let answers =
            futures::join!(try_put(&store, "a", "x"), try_put(&store, "b", "x"), try_put(&store, "z", "2"));
        for answer in [answers.0, answers.1, answers.2] {
            assert!(matches!(answer, Err(CommitError::Unknown(_))), "{answer:?}");
        }
        // No later sync may make up for the failed one.
        let later = try_put(&store, "c", "x").await;
        assert!(is_refused(&later, Reason::Unavailable), "{later:?}");
        assert!(store.is_failed());
        // Reads go on with what was durable.
        let names = |entries: &[(Key, Versioned)]| {
            let text = |bytes: &Bytes| String::from_utf8(bytes.to_vec()).unwrap();
            entries
                .iter()
                .map(|(key, v)| format!("{}={}", text(key), text(&v.value)))
                .collect::<Vec<_>>()
                .join(" ")
        };
        let (revision, entries) = everything(&store).await;
        assert_eq!((revision, &*names(&entries)), (Revision(1), "z=1"));
        power_loss(store, &disk, keep).await;
        let store = open(&disk, small()).await.unwrap();
        // The first few of the unknown ones.
        let (revision, entries) = everything(&store).await;
        let expected = ["z=1", "a=x z=1", "a=x b=x z=1", "a=x b=x z=2"][revision.0 as usize - 1];
        assert_eq!(names(&entries), expected);
        put(&store, "again", "1").await;
    }
}

#[tokio::test(start_paused = true)]
async fn bounded_a_full_disk_refuses_and_recovers() {
    let disk = SimDisk::new(3, 24 << 20);
    let store = create(&disk, small()).await;
    let mut count = 0;
    let refused = loop {
        let answer = try_put(&store, &format!("{count:04}"), vec![1; 900_000]).await;
        if answer.is_err() {
            break answer;
        }
        count += 1;
    };
    assert!(count > 3);
    assert!(is_refused(&refused, Reason::NoSpace), "{refused:?}");
    assert!(!store.is_failed(), "a full disk is no broken one");
    assert_eq!(everything(&store).await.1.len(), count, "reads go on");
    disk.set_capacity(1 << 30);
    wait_for(async || try_put(&store, "more", vec![2; 900_000]).await.is_ok()).await;
    let before = everything(&store).await;
    assert_eq!(before.1.len(), count + 1);
    power_loss(store, &disk, CrashKeep::Nothing).await;
    assert_eq!(everything(&open(&disk, small()).await.unwrap()).await, before);
}

#[tokio::test(start_paused = true)]
async fn bounded_an_index_without_room_refuses_commits_before_memory_fills() {
    let config = JournaledConfig { index_reserve_bytes: 1 << 40, ..small() };
    let most = 2 * (config.keep_plans + config.apply_plans);
    let store = create(&sim(3), config).await;
    let mut count = 0;
    let refused = loop {
        let answer = try_put(&store, &count.to_string(), "x").await;
        if answer.is_err() {
            break answer;
        }
        count += 1;
        assert!(count <= most, "more plans in memory than allowed");
    };
    assert!(is_refused(&refused, Reason::NoSpace), "{refused:?}");
    assert_eq!(everything(&store).await.1.len(), count);
}

#[tokio::test(start_paused = true)]
async fn bounded_the_queue_refuses_what_it_cannot_hold() {
    for config in [
        JournaledConfig { queue_plans_max: 4, ..small() },
        JournaledConfig { queue_bytes_max: 4 * 1_010, ..small() },
    ] {
        let disk = sim(1);
        let store = create(&disk, config).await;
        disk.set_sync_latency(Duration::from_millis(50));
        let names: Vec<String> = (0..20).map(|number| number.to_string()).collect();
        let answers = join_all(names.iter().map(|name| try_put(&store, name, vec![0; 1_000]))).await;
        let refused = answers.iter().filter(|answer| is_refused(answer, Reason::Overloaded)).count();
        assert!((12..20).contains(&refused), "{refused} of 20");
        assert_eq!(answers.iter().filter(|answer| answer.is_ok()).count(), 20 - refused);
        assert_eq!(everything(&store).await.1.len(), 20 - refused);
        // And it empties again.
        put(&store, "later", "x").await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_damaged_journal_is_refused_with_its_place_and_what_to_do() {
    let disk = sim(5);
    let config = || JournaledConfig { keep_plans: 100, ..small() };
    let store = create(&disk, config()).await;
    for number in 0..30 {
        put(&store, &format!("{number:02}"), vec![number; 100]).await;
    }
    store.close().await.unwrap();
    power_loss(store, &disk, CrashKeep::Nothing).await;
    let segment = dir().join("journal").join("00000001.seg");
    // Records begin behind the header of 4,096 bytes and take more than 150 bytes each.
    for offset in (4_096..4_096 + 30 * 150).step_by(61) {
        let disk = disk.clone_disk();
        let bit = (offset % 8) as u8;
        disk.flip_bit(&segment, offset, bit).unwrap();
        let error = open(&disk, config()).await.unwrap_err();
        let message = error.message();
        assert!(
            message.contains("00000001.seg at byte") && message.contains("rebuild"),
            "{offset}: {message}"
        );
        // Refusing changed nothing: with the bit flipped back all is there.
        disk.flip_bit(&segment, offset, bit).unwrap();
        assert_eq!(everything(&open(&disk, config()).await.unwrap()).await.1.len(), 30);
    }
}

#[tokio::test(start_paused = true)]
async fn an_unreadable_journal_is_no_empty_one() {
    let disk = sim(5);
    let store = create(&disk, small()).await;
    put(&store, "a", "1").await;
    power_loss(store, &disk, CrashKeep::Nothing).await;
    disk.fail_reads(1_000);
    assert!(open(&disk, small()).await.is_err());
    disk.fail_reads(0);
    assert_eq!(everything(&open(&disk, small()).await.unwrap()).await.1.len(), 1);
}
