//! Copying many files at a time: a bounded number of jobs under way, each of which may lead to more.

pub mod get;
mod local;
pub mod progress;
pub mod put;
pub mod watched;

use crate::{
    args::Shared,
    failure::{self, Failure},
    json::Done,
    output::{Out, size},
};
use cairn_proto::{Error, Reason};
use progress::Progress;
use std::{
    future::Future,
    io::{self, IsTerminal as _},
    sync::atomic::{AtomicU64, Ordering},
};
use tokio::task::JoinSet;

/// Jobs under way at a time. A job is one file or one directory; most files are small, and wait for disks far away.
pub const JOBS_MAX: usize = 16;

/// What a job did.
#[derive(Debug)]
pub struct Outcome<J> {
    /// What is to be done next because of it.
    pub next: Vec<J>,
    /// What it adds to the sum.
    pub done: Done,
    /// What went wrong with parts of it, which stops nothing else.
    pub failures: Vec<Failure>,
    /// Whether something that was asked for by name was left out.
    pub missing: bool,
}

impl<J> Default for Outcome<J> {
    fn default() -> Self {
        Self { next: Vec::new(), done: Done::default(), failures: Vec::new(), missing: false }
    }
}

impl<J> Outcome<J> {
    /// One file of so many bytes.
    pub fn file(bytes: u64) -> Self {
        Self { done: Done { files: 1, bytes, ..Done::default() }, ..Self::default() }
    }

    /// Left out, with a note. `missing` when it was asked for by name.
    pub fn skipped(note: &str, missing: bool) -> Self {
        failure::say(note);
        Self { done: Done { skipped: 1, ..Done::default() }, missing, ..Self::default() }
    }
}

/// Runs jobs, and those they lead to, until none is left. Failed ones are said and counted, and stop nothing.
///
/// The newest jobs go first, so that a tree is walked in depth and what waits stays little. Answers the sum, and the
/// exit status of what failed.
pub async fn run<J, F, Fut>(jobs: Vec<J>, progress: &Progress, work: F) -> (Done, u8)
where
    J: Send + 'static,
    F: Fn(J) -> Fut,
    Fut: Future<Output = Result<Outcome<J>, Failure>> + Send + 'static,
{
    let mut waiting = jobs;
    // The first given is the first done.
    waiting.reverse();
    let mut running = JoinSet::new();
    let (mut sum, mut status) = (Done::default(), failure::DONE);
    loop {
        while running.len() < JOBS_MAX
            && let Some(job) = waiting.pop()
        {
            running.spawn(work(job));
        }
        let outcome = match running.join_next().await {
            None => return (sum, status),
            Some(Ok(outcome)) => outcome,
            Some(Err(error)) => {
                Err(Failure::Local { subject: "copy".to_owned(), error: std::io::Error::other(error) })
            }
        };
        let outcome =
            outcome.unwrap_or_else(|failure| Outcome { failures: vec![failure], ..Outcome::default() });
        for failure in outcome.failures {
            sum.failed += 1;
            progress.suspend(|| failure.note(&mut status));
        }
        sum.files += outcome.done.files;
        sum.directories += outcome.done.directories;
        sum.bytes += outcome.done.bytes;
        sum.skipped += outcome.done.skipped;
        if outcome.missing {
            status = failure::FAILED;
        }
        progress.files(sum.files);
        waiting.extend(outcome.next);
    }
}

/// Says what was done: as JSON when asked, else in a sentence for a person who waited for many files.
pub fn report(shared: &Shared, done: &Done, many: bool) -> Result<(), Failure> {
    if shared.json {
        let mut out = Out::new();
        out.json(done)?;
        return out.finish();
    }
    if many && io::stderr().is_terminal() {
        let mut text =
            format!("{} files, {} directories, {}", done.files, done.directories, size(done.bytes));
        if done.failed > 0 {
            text.push_str(&format!("; {} failed", done.failed));
        }
        if done.skipped > 0 {
            text.push_str(&format!("; {} skipped", done.skipped));
        }
        eprintln!("{text}");
    }
    Ok(())
}

/// A name in a directory of Cairn.
pub fn join(folder: &str, name: &str) -> String {
    format!("{}/{name}", folder.trim_end_matches('/'))
}

/// The last name of a path.
///
/// # Errors
/// Usage, for the root.
pub fn base_name(path: &str) -> Result<&str, Failure> {
    let path = path.trim_end_matches('/');
    match path.rsplit('/').next() {
        Some(name) if !name.is_empty() => Ok(name),
        _ => Err(Failure::usage("/: the root has no name to copy or move it by")),
    }
}

/// A name that ends in a slash is that of a directory, and there is none.
pub fn must_be_a_directory(path: &str) -> Failure {
    let message =
        "is not a directory, so no file can be put there; leave the slash out, or make it with `cairn mkdir`";
    Failure::at(path)(Error::new(Reason::NotADirectory, message))
}

/// Numbers the temporary files of this process.
fn serial() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    #[tokio::test]
    async fn jobs_lead_to_jobs_and_never_are_too_many_at_a_time() {
        let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (done, status) = run(vec![3_u32], &Progress::hidden(), |depth| {
            let (now, most) = (now.clone(), most.clone());
            async move {
                let under_way = now.fetch_add(1, Ordering::SeqCst) + 1;
                most.fetch_max(under_way, Ordering::SeqCst);
                tokio::task::yield_now().await;
                now.fetch_sub(1, Ordering::SeqCst);
                let next = if depth == 0 { vec![] } else { vec![depth - 1; 10] };
                Ok(Outcome { next, ..Outcome::file(1) })
            }
        })
        .await;
        assert_eq!((done.files, done.bytes, status), (1_111, 1_111, 0));
        assert!(most.load(Ordering::SeqCst) <= JOBS_MAX);
        assert!(most.load(Ordering::SeqCst) > 1, "nothing ran in parallel");
    }

    #[tokio::test]
    async fn a_failed_job_stops_no_other() {
        let (done, status) = run(vec![0, 1, 2], &Progress::hidden(), |job| async move {
            if job == 1 { Err(Failure::usage("no")) } else { Ok(Outcome::file(5)) }
        })
        .await;
        assert_eq!((done.files, done.failed, status), (2, 1, failure::USAGE));
    }
}
