//! A tree of thousands of real files and one big file through the whole life of a cluster: put, listed, got back,
//! renamed, half deleted, with a file server killed meanwhile, after everything was killed, and after the directory
//! lost its store.
//!
//! `CAIRN_TREE_FILES` and `CAIRN_TREE_BIG_BYTES` choose the size; `make tree-full` runs it with 2 GiB in a release
//! build.

use cairn_tests::{
    services::{Cairn, Ran, Services},
    trees::{self, Totals},
};
use client_lib::Client;
use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

const FILES_DEFAULT: u64 = 10_000;
/// 2 GiB take minutes in a debug build, which checksums slowly; more than all caches and buffers is enough each time.
const BIG_BYTES_DEFAULT: u64 = if cfg!(debug_assertions) { 192 << 20 } else { 2 << 30 };
/// Longest run of one command.
const LIMIT: Duration = Duration::from_secs(900);
/// Most memory that a service or a command may ever use, whatever the size of files and trees.
const MEMORY_BYTES_MAX: u64 = 512 << 20;

fn from_environment(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().unwrap_or_else(|_| panic!("{name}={value}")))
}

/// The cluster, the command, and what is to be found.
struct Story {
    services: Services,
    cairn: Cairn,
    /// The same as in Cairn at `/tree`, on this machine.
    mirror: PathBuf,
    scratch: PathBuf,
    fetched: u32,
}

impl Story {
    async fn run(&self, words: &[&str]) -> Ran {
        let ran = self.cairn.run_within(words, b"", LIMIT).await.good();
        println!("{:7.2} s  {}", ran.took.as_secs_f64(), shortened(&ran.command));
        ran
    }

    /// Gets all of it and compares every byte.
    async fn compare(&mut self, when: &str) {
        self.fetched += 1;
        let target = self.scratch.join(format!("fetched-{}", self.fetched));
        self.run(&["get", "-r", "/tree", target.to_str().unwrap()]).await;
        let differences = trees::differences(&self.mirror, &target);
        assert!(
            differences.is_empty(),
            "{when}: {} differences: {:?}",
            differences.len(),
            first(&differences)
        );
        fs::remove_dir_all(target).unwrap();
        println!("           equal {when}");
    }

    async fn restart_everything(&mut self) {
        self.services.kill_all();
        let began = Instant::now();
        self.services.start_all();
        self.services.ready().await;
        println!("{:7.2} s  until all serve again", began.elapsed().as_secs_f64());
    }
}

fn first(differences: &[String]) -> &[String] {
    &differences[..differences.len().min(10)]
}

fn shortened(command: &str) -> String {
    if command.chars().count() <= 100 {
        command.to_owned()
    } else {
        command.chars().take(100).collect::<String>() + "..."
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tree_of_real_files_survives_all_of_it() {
    let services = Services::start(3).await;
    let scratch = services.folder().join("scratch");
    let mirror = scratch.join("mirror");
    let files = usize::try_from(from_environment("CAIRN_TREE_FILES", FILES_DEFAULT)).unwrap();
    let big = from_environment("CAIRN_TREE_BIG_BYTES", BIG_BYTES_DEFAULT);
    let began = Instant::now();
    trees::make(&mirror, files);
    trees::make_big(&mirror.join("big file"), big);
    let totals = trees::totals(&mirror);
    println!("{totals:?}, the big file has {big} bytes; made in {:.1} s", began.elapsed().as_secs_f64());
    assert!(totals.files > files);

    let cairn = services.cairn();
    let mut story = Story { services, cairn, mirror, scratch, fetched: 0 };
    put_list_and_compare(&mut story, totals).await;
    rename_and_delete_half(&mut story).await;
    one_file_server_dies_meanwhile(&mut story).await;

    story.restart_everything().await;
    story.compare("after everything was killed").await;

    the_directory_loses_its_store(&mut story).await;

    let (peaks, peak) = story.services.memory_peaks();
    println!("memory at most: {peaks}");
    assert!(peak <= MEMORY_BYTES_MAX, "{peaks}");
}

/// A commit is one plan of few records, however many chunks the version has and whatever else the client writes.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_file_is_committed_among_many_small_ones() {
    const CHUNKS: usize = 400;
    let services = Services::start(3).await;
    let client = Client::builder().directory(services.directory_uri()).chunk_bytes(64 << 10).build().unwrap();
    let long: Vec<u8> = (0..CHUNKS << 16).map(|at| (at / 11) as u8).collect();
    let done = AtomicBool::new(false);
    let small = async |writer: usize| {
        let mut written = 0;
        while !done.load(Ordering::Relaxed) {
            client.write(&format!("/small-{writer}-{written}"), vec![1; 5_000]).await.unwrap();
            written += 1;
        }
        written
    };
    let write_long = async {
        let written = client.write("/long", long.clone()).await;
        done.store(true, Ordering::Relaxed);
        written.unwrap();
    };
    let ((), one, two, three) = tokio::join!(write_long, small(1), small(2), small(3));
    println!("{} small files meanwhile", one + two + three);
    assert!(one + two + three >= 30, "too few to be in the way");
    assert!(client.read("/long").await.unwrap() == long);
}

async fn put_list_and_compare(story: &mut Story, totals: Totals) {
    let source = story.mirror.to_str().unwrap().to_owned();
    let began = Instant::now();
    let mut put = story.cairn.command(&["put", "-r", &source, "/tree"]).spawn().unwrap();
    let pid = put.id().unwrap();
    let mut peak = 0;
    let status = loop {
        if let Some(status) = put.try_wait().unwrap() {
            break status;
        }
        peak = peak.max(memory_peak(pid));
        assert!(began.elapsed() < LIMIT, "cairn put has not ended within {LIMIT:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    let output = put.wait_with_output().await.unwrap();
    assert!(status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let took = began.elapsed().as_secs_f64();
    println!(
        "{took:7.2} s  cairn put -r: {:.0} files/s, {:.0} MB/s, memory of the command at most {} MiB",
        totals.files as f64 / took,
        totals.bytes as f64 / took / 1e6,
        peak >> 20
    );
    assert!(peak <= MEMORY_BYTES_MAX, "cairn put used {peak} bytes");

    let status = story.cairn.json(&["status", "--json"]).await;
    assert_eq!(status["files"], totals.files, "{status}");
    assert_eq!(status["bytes"], totals.bytes, "{status}");
    let listed = story.run(&["ls", "-R", "--json", "/tree"]).await.json();
    let listed = listed.as_array().unwrap().iter().filter(|entry| entry["kind"] == "file").count();
    assert_eq!(listed, totals.files);
    story.compare("after put").await;
}

async fn rename_and_delete_half(story: &mut Story) {
    story.run(&["mv", "/tree/peculiar names", "/tree/renamed 🦀"]).await;
    fs::rename(story.mirror.join("peculiar names"), story.mirror.join("renamed 🦀")).unwrap();
    story.run(&["mv", "/tree/big file", "/tree/renamed 🦀/an empty directory/big"]).await;
    fs::rename(story.mirror.join("big file"), story.mirror.join("renamed 🦀/an empty directory/big"))
        .unwrap();

    // Whole folders where that is at most half, and files one by one for the rest.
    let before = trees::totals(&story.mirror).files;
    let mut doomed: Vec<PathBuf> = Vec::new();
    let mut left = before;
    let everything = trees::walk(&story.mirror);
    for wanted_file in [false, true] {
        for (path, is_file) in &everything {
            let path = story.mirror.join(path);
            let kept =
                path.ends_with("renamed 🦀") || path.ends_with("an empty directory") || path.ends_with("big");
            if *is_file != wanted_file || kept || doomed.iter().any(|folder| path.starts_with(folder)) {
                continue;
            }
            let count = if wanted_file { 1 } else { trees::totals(&path).files };
            if left - count >= before / 2 {
                left -= count;
                doomed.push(path);
            }
        }
    }
    // No longer than a command line may be.
    for batch in doomed.chunks(200) {
        let mut words = vec!["rm".to_owned(), "-r".to_owned(), "--".to_owned()];
        words.extend(batch.iter().map(|path| in_cairn(&story.mirror, path)));
        story.run(&words.iter().map(String::as_str).collect::<Vec<_>>()).await;
        for path in batch {
            if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }.unwrap();
        }
    }
    println!("{} files of {before} are left", trees::totals(&story.mirror).files);
    story.compare("after renames and deletes").await;
}

fn in_cairn(mirror: &Path, path: &Path) -> String {
    format!("/tree/{}", path.strip_prefix(mirror).unwrap().to_str().unwrap())
}

/// Writes and reads under way when one file server gets a SIGKILL do not fail.
async fn one_file_server_dies_meanwhile(story: &mut Story) {
    let more = story.scratch.join("more");
    trees::make(&more, 1_000);
    trees::make_big(&more.join("also big"), 64 << 20);
    let before = story.cairn.json(&["status", "--json"]).await["files"].as_u64().unwrap();

    let target = story.scratch.join("meanwhile");
    let words = ["get", "-r", "/tree", target.to_str().unwrap()];
    let get = story.cairn.run_within(&words, b"", LIMIT);
    let words = ["put", "-r", more.to_str().unwrap(), "/tree/more"];
    let put = story.cairn.run_within(&words, b"", LIMIT);
    let (services, cairn) = (&mut story.services, &story.cairn);
    let kill = async {
        // In the middle of both.
        let deadline = Instant::now() + LIMIT;
        loop {
            let written = cairn.json(&["status", "--json"]).await["files"].as_u64().unwrap() - before;
            let read = trees::count_files(&target);
            if written >= 100 && read >= 100 {
                services.files[0].kill9();
                println!("           file-1 killed after {written} files were written and {read} read");
                return;
            }
            assert!(Instant::now() < deadline, "written {written}, read {read} files after {LIMIT:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let (get, put, ()) = tokio::join!(get, put, kill);
    for ran in [get.good(), put.good()] {
        println!("{:7.2} s  {} while a file server dies", ran.took.as_secs_f64(), shortened(&ran.command));
    }
    let differences = trees::differences(&story.mirror, &target);
    // What the other command had put by then may be there too.
    let differences: Vec<_> = differences.into_iter().filter(|it| !it.starts_with("\"more")).collect();
    assert!(differences.is_empty(), "read while a file server died: {:?}", first(&differences));
    fs::rename(more, story.mirror.join("more")).unwrap();
    story.compare("with a file server dead").await;

    let missing = story.services.status().await.unwrap().chunks.unwrap().under_replicated;
    assert!(missing > 0, "a dead server's copies count as healthy");

    // It comes back and becomes complete: all that it missed is read from it alone.
    story.services.start_all();
    let began = Instant::now();
    story.services.healthy(Duration::from_secs(180)).await;
    println!(
        "{:7.2} s  until file-1 was complete again, of {missing} chunks with a copy less",
        began.elapsed().as_secs_f64()
    );
    for other in [1, 2] {
        story.services.files[other].kill9();
    }
    let target = story.scratch.join("from one");
    story.run(&["get", "-r", "/tree/more", target.to_str().unwrap()]).await;
    let differences = trees::differences(&story.mirror.join("more"), &target);
    assert!(differences.is_empty(), "read from file-1 alone: {:?}", first(&differences));
}

async fn the_directory_loses_its_store(story: &mut Story) {
    let deadline = Instant::now() + Duration::from_secs(60);
    let before = loop {
        let status = story.services.ready().await;
        let directory = status.directory.clone().unwrap();
        if directory.shipped_revision >= directory.revision {
            break status;
        }
        assert!(Instant::now() < deadline, "the journal is not shipped: {directory:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    story.services.directory.kill9();
    fs::remove_dir_all(story.services.data("directory")).unwrap();
    let began = Instant::now();
    story.services.directory.start();
    let after = story.services.ready().await;
    println!("{:7.2} s  until the directory was rebuilt", began.elapsed().as_secs_f64());
    let generation = |status: &cairn_proto::v1::StatusResponse| status.directory.clone().unwrap().generation;
    assert!(generation(&after) > generation(&before), "a rebuilt directory is a new life of the store");
    assert_eq!((after.files, after.bytes), (before.files, before.bytes));
    story.compare("after the directory was rebuilt").await;

    // And it is of use: what is written now is there after all are killed once more.
    fs::write(story.mirror.join("written after"), "the rebuild").unwrap();
    let written = story.mirror.join("written after");
    story.run(&["put", written.to_str().unwrap(), "/tree"]).await;
    story.restart_everything().await;
    story.compare("at the end").await;
}

fn memory_peak(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|rest| rest.trim().strip_suffix(" kB")?.parse::<u64>().ok()).unwrap_or(0) * 1024
}
