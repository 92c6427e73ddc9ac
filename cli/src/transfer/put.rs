//! `put`: local files into Cairn.

use crate::{
    args::{Put, Shared, cairn_path},
    connect,
    failure::Failure,
    token::Held,
    transfer::{
        Outcome, join,
        local::{self, Kind},
        must_be_a_directory,
        progress::Progress,
        report, run as run_jobs,
        watched::Watched,
    },
};
use cairn_proto::{Reason, v1};
use client_lib::{Client, SetAttributes, WriteOptions};
use std::{
    fs::Metadata,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};
use tokio::fs;

struct Work {
    client: Client,
    recursive: bool,
    dereference: bool,
    held: Held,
    progress: Progress,
    /// Directories whose time of last change is set when all in them is there.
    folders: Mutex<Vec<(String, u64)>>,
}

struct Job {
    local: PathBuf,
    remote: String,
    /// Named on the command line: a symbolic link is followed.
    named: bool,
    /// The directories that links are followed in.
    above: Option<Arc<Above>>,
}

/// A directory on the way to a file, to tell a link that leads back to it.
struct Above {
    device: u64,
    inode: u64,
    next: Option<Arc<Above>>,
}

impl Above {
    fn has(mut at: Option<&Arc<Self>>, metadata: &Metadata) -> bool {
        while let Some(above) = at {
            if (above.device, above.inode) == (metadata.dev(), metadata.ino()) {
                return true;
            }
            at = above.next.as_ref();
        }
        false
    }
}

/// Copies local files into Cairn.
pub async fn run(shared: &Shared, put: Put) -> Result<(), Failure> {
    let target = cairn_path(&put.target)?;
    let client = connect::plain(shared).await?;
    let held = Held::find(&client, put.token.token).await?;
    let jobs = targets(&client, &put.sources, &target).await?;
    let total = match jobs.as_slice() {
        [job] => fs::metadata(&job.local).await.ok().filter(Metadata::is_file).map(|file| file.len()),
        _ => None,
    };
    let work = Arc::new(Work {
        client,
        recursive: put.recursive,
        dereference: put.dereference,
        held,
        progress: Progress::new(total),
        folders: Mutex::default(),
    });
    let (sum, mut status) = run_jobs(jobs, &work.progress, |job| copy(work.clone(), job)).await;
    let mut folders = std::mem::take(&mut *work.folders.lock().unwrap_or_else(PoisonError::into_inner));
    // Those below first: what is changed in a directory changes its time.
    folders.sort_by(|one, other| other.0.cmp(&one.0));
    for (folder, mtime_ns) in folders {
        let change = SetAttributes::new().mtime_ns(mtime_ns);
        if let Err(error) = work.client.set_attributes(&folder, change).await {
            Failure::at(&folder)(error).note(&mut status);
        }
    }
    work.progress.finish();
    report(shared, &sum, put.recursive)?;
    Failure::after(status)
}

/// Where each source goes: into a directory that exists, else by that name.
async fn targets(client: &Client, sources: &[PathBuf], target: &str) -> Result<Vec<Job>, Failure> {
    let into = match client.stat(target).await {
        Ok(attributes) if attributes.kind() == v1::Kind::Directory => true,
        Ok(_) => false,
        Err(error) if error.reason == Reason::NotFound => false,
        Err(error) => return Err(Failure::at(target)(error)),
    };
    if !into && sources.len() > 1 {
        return Err(Failure::usage(format!(
            "{target}: not a directory, and there are several files to copy"
        )));
    }
    let job = |source: &PathBuf| {
        let name = if into { last_name(source)? } else { None };
        // Of one without a name, what is in it goes into the target, as `cp -r` does it.
        let remote = name.map_or_else(|| target.to_owned(), |name| join(target, &name));
        Ok(Job { local: source.clone(), remote, named: true, above: None })
    };
    sources.iter().map(job).collect()
}

/// The last name of a local path; none for one that ends in `.` or `..`, and for the root.
fn last_name(path: &Path) -> Result<Option<String>, Failure> {
    let text = path.to_str().ok_or_else(|| not_utf8(path))?;
    match text.trim_end_matches('/').rsplit('/').next() {
        None | Some("" | "." | "..") => Ok(None),
        Some(name) => Ok(Some(name.to_owned())),
    }
}

fn not_utf8(path: &Path) -> Failure {
    let error = std::io::Error::new(
        std::io::ErrorKind::InvalidData,
        "the name is not UTF-8, which names in Cairn are; rename it to copy it",
    );
    // Shown with escapes, so that the name can be told from others like it.
    Failure::Local { subject: path.as_os_str().as_encoded_bytes().escape_ascii().to_string(), error }
}

async fn copy(work: Arc<Work>, job: Job) -> Result<Outcome<Job>, Failure> {
    let follows = job.named || work.dereference;
    let metadata =
        if follows { fs::metadata(&job.local).await } else { fs::symlink_metadata(&job.local).await };
    let metadata = metadata.map_err(Failure::local(&job.local))?;
    match local::kind(&metadata) {
        // A slash behind the name of a file that is yet to be made, or of one that is there.
        Kind::File if job.named && job.remote.ends_with('/') => Err(must_be_a_directory(&job.remote)),
        Kind::File => copy_file(&work, &job, &metadata).await,
        Kind::Directory if work.recursive => copy_folder(&work, &job, &metadata).await,
        Kind::Directory => Err(Failure::local(&job.local)(std::io::Error::new(
            std::io::ErrorKind::IsADirectory,
            "is a directory; give -r to copy it",
        ))),
        // A pipe that was named is what somebody wants to read.
        Kind::Other(local::PIPE) if job.named => copy_file(&work, &job, &metadata).await,
        Kind::Other(what) => {
            let advice = if what == local::LINK { "; give -L to copy what it leads to" } else { "" };
            let note = format!("{}: skipped, since it is {what}{advice}", job.local.display());
            Ok(work.progress.suspend(|| Outcome::skipped(&note, job.named)))
        }
    }
}

async fn copy_folder(work: &Work, job: &Job, metadata: &Metadata) -> Result<Outcome<Job>, Failure> {
    if Above::has(job.above.as_ref(), metadata) {
        let error = std::io::Error::other("a symbolic link leads back to a directory above it");
        return Err(Failure::local(&job.local)(error));
    }
    let above = work
        .dereference
        .then(|| Arc::new(Above { device: metadata.dev(), inode: metadata.ino(), next: job.above.clone() }));
    let options = WriteOptions::new().mode(local::mode(metadata));
    match work.client.mkdir_with(&job.remote, options).await {
        Ok(_) => {}
        Err(error) if error.reason == Reason::AlreadyExists => {
            let there = work.client.stat(&job.remote).await.map_err(Failure::at(&job.remote))?;
            if there.kind() != v1::Kind::Directory {
                return Err(Failure::at(&job.remote)(error));
            }
        }
        Err(error) => return Err(Failure::at(&job.remote)(error)),
    }
    let mut outcome = Outcome::default();
    outcome.done.directories = 1;
    for name in local::names(&job.local).await? {
        let local = job.local.join(&name);
        match name.to_str() {
            Some(name) => {
                let (remote, above) = (join(&job.remote, name), above.clone());
                outcome.next.push(Job { remote, local, named: false, above });
            }
            None => outcome.failures.push(not_utf8(&local)),
        }
    }
    // The last one given is the first one done.
    outcome.next.reverse();
    let mut folders = work.folders.lock().unwrap_or_else(PoisonError::into_inner);
    folders.push((job.remote.clone(), local::mtime_ns(metadata)));
    Ok(outcome)
}

async fn copy_file(work: &Work, job: &Job, metadata: &Metadata) -> Result<Outcome<Job>, Failure> {
    let mut options = WriteOptions::new().mode(local::mode(metadata)).mtime_ns(local::mtime_ns(metadata));
    let token = work.held.of(&work.client, &job.remote).await?;
    if let Some(token) = token {
        options = options.token(token);
    }
    let file = fs::File::open(&job.local).await.map_err(Failure::local(&job.local))?;
    let shown = job.local.display().to_string();
    let mut file = Watched::new(file, &shown, &work.progress);
    let there = work.client.put_reader(&job.remote, &mut file, options).await;
    let there = there.map_err(|error| file.failure(&job.remote, error))?;
    // A file that was there before keeps its permissions in a write.
    if there.mode != local::mode(metadata) {
        let mut change = SetAttributes::new().mode(local::mode(metadata)).mtime_ns(local::mtime_ns(metadata));
        if let Some(token) = token {
            change = change.token(token);
        }
        work.client.set_attributes(&job.remote, change).await.map_err(Failure::at(&job.remote))?;
    }
    Ok(Outcome::file(file.bytes))
}
