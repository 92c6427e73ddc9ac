//! SIGKILL of a process that writes to a real disk with redb: nothing acknowledged is lost.

use super::*;
use std::{
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
};

const CHILD: &str = "CAIRN_TEST_STORE";
const KEYS: u64 = 500;

fn config() -> JournaledConfig {
    JournaledConfig { checkpoint_plans: 300, keep_plans: 50, apply_plans: 50, ..small() }
}

/// Runs in a process of its own: each plan writes its revision to a key by turns and to `last`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn child_that_writes_until_it_is_killed() {
    let Ok(path) = std::env::var(CHILD) else { return };
    let store = real(Path::new(&path), config()).await;
    loop {
        let next = store.durable_revision().0 + 1;
        let plans = (next..next + 8).map(|revision| {
            let mut plan = Plan::new();
            plan.put(key(&format!("{:03}", revision % KEYS)), revision.to_string());
            plan.put(key("last"), revision.to_string());
            store.commit(plan)
        });
        for revision in futures::future::try_join_all(plans).await.unwrap() {
            println!("acknowledged {revision}");
        }
    }
}

#[tokio::test]
async fn durable_a_killed_process_loses_nothing_acknowledged() {
    let path = tempfile::tempdir().unwrap();
    let mut acknowledged = 0;
    for (round, kill_after) in [1, 900, 40, 2_000, 300].into_iter().enumerate() {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "--nocapture",
                "store::journaled::tests::kill::child_that_writes_until_it_is_killed",
            ])
            .env(CHILD, path.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut seen = 0;
        for line in BufReader::new(child.stdout.take().unwrap()).lines() {
            let line = line.unwrap();
            // The first one shares its line with the test harness.
            let Some((_, revision)) = line.split_once("acknowledged ") else { continue };
            acknowledged = revision.parse().unwrap();
            seen += 1;
            if seen == kill_after {
                child.kill().unwrap();
            }
        }
        child.wait().unwrap();
        assert!(seen >= kill_after, "round {round}: the child ended by itself");
        let store = real(path.path(), config()).await;
        let (revision, entries) = everything(&store).await;
        assert!(
            revision.0 >= acknowledged,
            "round {round}: {acknowledged} was acknowledged, {revision} is there"
        );
        for (key, value) in &entries {
            let written: u64 = std::str::from_utf8(&value.value).unwrap().parse().unwrap();
            assert_eq!(value.revision, Revision(written));
            if key == "last" {
                assert_eq!(written, revision.0);
            } else {
                assert!(written + KEYS > revision.0, "round {round}: an older value of {key:?}");
            }
        }
        assert_eq!(entries.len() as u64, 1 + revision.0.min(KEYS));
        store.close().await.unwrap();
    }
}
