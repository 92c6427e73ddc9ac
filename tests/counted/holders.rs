//! FENCED: programs that hold a lock are paused past their lease, wake up, and go on writing.

use crate::ALONE;
use cairn_tests::{amount, eventually::eventually, services::Services};
use client_lib::{Client, Reason};
use futures::StreamExt as _;
use rustix::process::{Pid, Signal, kill_process};
use std::{process::ExitStatus, time::Duration};
use tokio::{io::AsyncWriteExt as _, process::Child};

/// Paused at the same time.
const AT_ONCE: u64 = 25;
/// What most of them write: one chunk, sent when they wake up.
const SHORT_BYTES: usize = 100_000;
/// What some of them write: chunks that are sent and durable before they are paused.
const LONG_BYTES: usize = 10 << 20;
const LONG_EVERY: u64 = 10;
/// Generous: a lease is 10 s, and a debug build on a busy machine is slow.
const LIMIT: Duration = Duration::from_secs(120);
const STALE: &[u8; 16] = b"of a late holder";

/// A `cairn write` that holds the lock of a file.
struct Holder {
    path: String,
    child: Child,
    /// Whether another writer comes after its lease.
    replaced: bool,
}

/// `CAIRN_HOLDERS` (default 6) says how many.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn fenced_holders_that_are_paused_past_their_lease_never_commit() {
    let _alone = ALONE.lock().await;
    let wanted = amount("CAIRN_HOLDERS", 6);
    let mut services = Services::start(3).await;
    let admin = Client::connect(&[services.directory_uri()]).await.unwrap();
    let mut refused = 0;
    while refused < wanted {
        let mut holders = Vec::new();
        for number in refused..wanted.min(refused + AT_ONCE) {
            holders.push(Holder::start(&services, &admin, number).await);
        }
        for holder in &holders {
            holder.signal(Signal::STOP);
        }
        for holder in holders {
            holder.wake_up_late(&admin).await;
            refused += 1;
        }
    }
    println!("{refused} of {wanted} late commits refused");
    for round in ["before a rebuild", "after a rebuild"] {
        let reader = Client::connect(&[services.directory_uri()]).await.unwrap();
        let names: Vec<_> = reader.list("/").collect().await;
        assert_eq!(names.len() as u64, wanted, "{round}: nothing else is there");
        for number in 0..wanted {
            let found = reader.read(&path(number)).await.unwrap();
            assert_eq!(found, content(number), "{round}: {}", path(number));
        }
        services.lose_directory(LIMIT).await;
    }
}

fn path(number: u64) -> String {
    format!("/held-{number}")
}

/// Half of the files are written by another after the lease, half are left as they were.
fn is_replaced(number: u64) -> bool {
    number.is_multiple_of(2)
}

fn content(number: u64) -> String {
    if is_replaced(number) {
        format!("written after the lease, {number}")
    } else {
        format!("before, {number}")
    }
}

impl Holder {
    async fn start(services: &Services, admin: &Client, number: u64) -> Self {
        let path = path(number);
        admin.write(&path, format!("before, {number}")).await.unwrap();
        let long = number % LONG_EVERY == LONG_EVERY - 1;
        let mut words = vec!["write", &path];
        if !long {
            // Takes the lock when it opens the file; one that replaces all of it does so when it has a chunk.
            words.push("--append");
        }
        let mut child = services.cairn().command(&words).spawn().unwrap();
        let bytes: Vec<u8> = STALE.repeat((if long { LONG_BYTES } else { SHORT_BYTES }) / STALE.len());
        child.stdin.as_mut().unwrap().write_all(&bytes).await.unwrap();
        eventually("the holder has its lock", LIMIT, || async {
            let explained = admin.explain(&path).await.map_err(|error| error.to_string())?;
            if explained.locks.is_empty() { Err("no lock yet".to_owned()) } else { Ok(()) }
        })
        .await;
        Self { path, child, replaced: is_replaced(number) }
    }

    fn signal(&self, signal: Signal) {
        let id = i32::try_from(self.child.id().unwrap()).unwrap();
        kill_process(Pid::from_raw(id).unwrap(), signal).unwrap();
    }

    /// Waits for the end of its lease, lets another write, wakes it up, and sees it fail.
    async fn wake_up_late(mut self, admin: &Client) {
        let number = self.path.rsplit('-').next().unwrap().parse().unwrap();
        eventually("the lease ends", LIMIT, || async {
            if self.replaced {
                return admin
                    .write(&self.path, content(number))
                    .await
                    .map(drop)
                    .map_err(|error| error.to_string());
            }
            let explained = admin.explain(&self.path).await.map_err(|error| error.to_string())?;
            if explained.locks.is_empty() { Ok(()) } else { Err("still locked".to_owned()) }
        })
        .await;
        self.signal(Signal::CONT);
        // All is said: now it commits.
        drop(self.child.stdin.take());
        let ended = tokio::time::timeout(LIMIT, self.child.wait_with_output()).await;
        let output =
            ended.unwrap_or_else(|_| panic!("{} has not ended within {LIMIT:?}", self.path)).unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(refused(output.status), "{}: a late commit was taken: {said}", self.path);
        assert_eq!(admin.read(&self.path).await.unwrap(), content(number), "{}: {said}", self.path);
    }
}

/// It said that it failed, and did not just break.
fn refused(status: ExitStatus) -> bool {
    matches!(status.code(), Some(1 | 3 | 4))
}

/// The same test would notice a commit that is taken: a holder that is not paused for long.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn fenced_a_holder_that_wakes_up_in_time_commits() {
    let _alone = ALONE.lock().await;
    let services = Services::start(3).await;
    let admin = Client::connect(&[services.directory_uri()]).await.unwrap();
    let mut holder = Holder::start(&services, &admin, 1).await;
    holder.signal(Signal::STOP);
    assert_eq!(admin.write(&holder.path, "no").await.unwrap_err().reason, Reason::LockHeld);
    holder.signal(Signal::CONT);
    drop(holder.child.stdin.take());
    let output = holder.child.wait_with_output().await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(admin.read(&holder.path).await.unwrap().ends_with(STALE));
}
