//! `get`: files out of Cairn.

use crate::{
    args::{Get, Shared, cairn_path},
    connect,
    failure::Failure,
    transfer::{
        Outcome, base_name, join,
        local::{self, NewFile},
        progress::Progress,
        report, run as run_jobs,
        watched::Watched,
    },
};
use cairn_proto::{Error, path::FileName, v1};
use client_lib::{Client, ListOptions};
use futures::StreamExt as _;
use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};
use tokio::fs;

struct Work {
    client: Client,
    recursive: bool,
    progress: Progress,
    /// Directories that get their permissions and time when all in them is there.
    folders: Mutex<Vec<(PathBuf, u32, u64)>>,
}

struct Job {
    remote: String,
    local: PathBuf,
    attributes: v1::Attributes,
}

/// Copies files out of Cairn.
pub async fn run(shared: &Shared, get: Get) -> Result<(), Failure> {
    let (sources, target) = (&get.sources, &get.target);
    let into = fs::metadata(target).await.is_ok_and(|there| there.is_dir());
    if !into && sources.len() > 1 {
        let target = target.display();
        return Err(Failure::usage(format!(
            "{target}: not a directory, and there are several files to copy"
        )));
    }
    let client = connect::plain(shared).await?;
    let slash = target.as_os_str().as_encoded_bytes().ends_with(b"/");
    let mut status = crate::failure::DONE;
    let mut jobs = Vec::new();
    for source in sources {
        let remote = cairn_path(source)?;
        // The whole tree goes into a directory as it is: the root has no name to give it.
        let local = match base_name(&remote) {
            Ok(name) if into => target.join(checked(name, &remote)?),
            _ => target.clone(),
        };
        match client.stat(&remote).await {
            Ok(attributes) if slash && !into && attributes.kind() == v1::Kind::File => {
                let error = std::io::Error::from(std::io::ErrorKind::NotADirectory);
                return Err(Failure::local(target)(error));
            }
            Ok(attributes) => jobs.push(Job { remote, local, attributes }),
            Err(error) => Failure::at(remote)(error).note(&mut status),
        }
    }
    let total = match jobs.as_slice() {
        [job] if job.attributes.kind() == v1::Kind::File => Some(job.attributes.size),
        _ => None,
    };
    let work = Arc::new(Work {
        client,
        recursive: get.recursive,
        progress: Progress::new(total),
        folders: Mutex::default(),
    });
    let (mut sum, failed) = run_jobs(jobs, &work.progress, |job| copy(work.clone(), job)).await;
    if status == crate::failure::DONE {
        status = failed;
    } else {
        sum.failed += 1;
    }
    let mut folders = std::mem::take(&mut *work.folders.lock().unwrap_or_else(PoisonError::into_inner));
    // Those below first: what is changed in a directory changes its time, and may need its permissions.
    folders.sort_by(|one, other| other.0.cmp(&one.0));
    for (folder, mode, mtime_ns) in folders {
        if let Err(failure) = local::set_attributes(&folder, mode, mtime_ns).await {
            failure.note(&mut status);
        }
    }
    work.progress.finish();
    report(shared, &sum, get.recursive)?;
    Failure::after(status)
}

/// A name from a server, before it becomes part of a local path.
fn checked<'a>(name: &'a str, path: &str) -> Result<&'a str, Failure> {
    FileName::new(name).map_err(Failure::at(path))?;
    Ok(name)
}

async fn copy(work: Arc<Work>, job: Job) -> Result<Outcome<Job>, Failure> {
    match job.attributes.kind() {
        v1::Kind::File => copy_file(&work, &job).await,
        v1::Kind::Directory if work.recursive => copy_folder(&work, &job).await,
        v1::Kind::Directory => Err(Failure::at(&job.remote)(Error::new(
            cairn_proto::Reason::IsADirectory,
            "is a directory; give -r to copy it",
        ))),
        v1::Kind::Unspecified => Err(Failure::at(&job.remote)(Error::new(
            cairn_proto::Reason::NotSupported,
            "is neither a file nor a directory, but something newer than this program",
        ))),
    }
}

async fn copy_folder(work: &Work, job: &Job) -> Result<Outcome<Job>, Failure> {
    match fs::create_dir(&job.local).await {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists && is_directory(&job.local).await => {
        }
        made => made.map_err(Failure::local(&job.local))?,
    }
    let mut outcome = Outcome::default();
    outcome.done.directories = 1;
    let mut entries = std::pin::pin!(work.client.list_with(&job.remote, ListOptions::new()));
    while let Some(entry) = entries.next().await {
        let entry = entry.map_err(Failure::at(&job.remote))?;
        let remote = join(&job.remote, &entry.name);
        let local = job.local.join(checked(&entry.name, &remote)?);
        let kind = entry.kind();
        let attributes =
            entry.attributes.unwrap_or_else(|| v1::Attributes { kind: kind as i32, ..Default::default() });
        outcome.next.push(Job { remote, local, attributes });
    }
    // The last one given is the first one done.
    outcome.next.reverse();
    let mut folders = work.folders.lock().unwrap_or_else(PoisonError::into_inner);
    folders.push((job.local.clone(), job.attributes.mode, job.attributes.mtime_ns));
    Ok(outcome)
}

async fn is_directory(path: &Path) -> bool {
    fs::metadata(path).await.is_ok_and(|there| there.is_dir())
}

async fn copy_file(work: &Work, job: &Job) -> Result<Outcome<Job>, Failure> {
    let mut new = NewFile::create(&job.local).await?;
    let shown = job.local.display().to_string();
    let mut file = Watched::new(&mut new.file, &shown, &work.progress);
    let got = work.client.get_writer(&job.remote, &mut file).await;
    let got = got.map_err(|error| file.failure(&job.remote, error))?;
    let bytes = file.bytes;
    new.finish(got.mode, got.mtime_ns).await?;
    Ok(Outcome::file(bytes))
}
