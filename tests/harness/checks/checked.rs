//! CHECKED: damage is noticed, never served, and mended; and one bad record hides nothing but itself.

use super::{Verdict, WORK_LIMIT, bytes, failed, quick, start};
use crate::{
    eventually::eventually,
    healthy,
    raw::{addresses, read_copy},
};
use bytes::Bytes;
use cairn_proto::id::ChunkId;
use cluster::{Builder, Cluster};
use disk::{Disk as _, Open, SimDisk};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

/// Bytes that are looked for on disks: enough to be found nowhere by chance.
const NEEDLE: usize = 16;

/// A disk beneath a service, in memory or in a folder, to look at and to damage.
#[derive(Clone, Debug)]
pub enum Platter {
    /// A simulated disk.
    Memory(SimDisk),
    /// A folder of the file system.
    Folder(PathBuf),
}

impl Platter {
    /// That of a file server.
    ///
    /// # Panics
    /// When there is no such server.
    pub fn of(cluster: &Cluster, server: usize) -> Self {
        let memory = cluster.memory_disk(server).map(Self::Memory);
        memory.or_else(|| cluster.folder(server).map(Self::Folder)).expect("a server has a disk")
    }

    /// That of the directory.
    ///
    /// # Panics
    /// Never: it has one.
    pub fn of_directory(cluster: &Cluster) -> Self {
        let memory = cluster.directory_memory_disk().map(Self::Memory);
        memory.or_else(|| cluster.directory_folder().map(Self::Folder)).expect("the directory has a disk")
    }

    /// All files, in order of names.
    async fn files(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut folders = vec![PathBuf::new()];
        while let Some(folder) = folders.pop() {
            let entries: Vec<(PathBuf, bool)> = match self {
                // Servers make and remove files while this looks.
                Self::Memory(sim) => sim
                    .list(&folder)
                    .await
                    .unwrap_or_default()
                    .into_iter()
                    .map(|entry| (folder.join(entry.name), entry.is_dir))
                    .collect(),
                Self::Folder(root) => fs::read_dir(root.join(&folder))
                    .into_iter()
                    .flatten()
                    .flatten()
                    .map(|entry| (folder.join(entry.file_name()), entry.path().is_dir()))
                    .collect(),
            };
            for (path, is_dir) in entries {
                if is_dir { folders.push(path) } else { found.push(path) }
            }
        }
        found.sort();
        found
    }

    async fn read(&self, path: &Path) -> Bytes {
        match self {
            Self::Memory(sim) => {
                let Ok(file) = sim.open(path, Open::Read).await else { return Bytes::new() };
                let len = file.len().await.unwrap_or_default() as usize;
                file.read_at(0, len).await.unwrap_or_default()
            }
            Self::Folder(root) => fs::read(root.join(path)).unwrap_or_default().into(),
        }
    }

    /// Every place at which `needle` begins.
    pub async fn places(&self, needle: &[u8]) -> Vec<(PathBuf, u64)> {
        let mut found = Vec::new();
        for path in self.files().await {
            let bytes = self.read(&path).await;
            let mut from = 0;
            while let Some(at) = position(&bytes[from..], needle) {
                found.push((path.clone(), (from + at) as u64));
                from += at + needle.len();
            }
        }
        found
    }

    /// Flips a bit (0 to 7) of a byte.
    ///
    /// # Panics
    /// When there is no such byte.
    pub fn flip(&self, path: &Path, offset: u64, bit: u8) {
        match self {
            Self::Memory(sim) => sim.flip_bit(path, offset, bit).expect("a byte to flip"),
            Self::Folder(root) => {
                use std::os::unix::fs::FileExt as _;
                let file =
                    fs::OpenOptions::new().read(true).write(true).open(root.join(path)).expect("a file");
                let mut byte = [0];
                file.read_exact_at(&mut byte, offset).expect("a byte");
                file.write_all_at(&[byte[0] ^ (1 << bit)], offset).expect("a byte to flip");
            }
        }
    }
}

/// Where `needle` begins. Segments are mostly zeros, which a debug build must not compare one by one.
fn position(bytes: &[u8], needle: &[u8]) -> Option<usize> {
    const PAGE: usize = 4_096;
    static ZEROS: [u8; PAGE] = [0; PAGE];
    let mut page = 0;
    while page < bytes.len() {
        let end = (page + PAGE).min(bytes.len());
        if bytes[page..end] != ZEROS[..end - page] {
            // May begin in this page and end in the next.
            let reach = (end + needle.len() - 1).min(bytes.len());
            if let Some(at) = bytes[page..reach].windows(needle.len()).position(|window| window == needle) {
                return Some(page + at);
            }
        }
        page = end;
    }
    None
}

/// Bits flip on the disk of one server after the other. Whichever copy an application reads, it never sees a wrong byte
/// and never an error; asked directly, a server serves no damaged block either; and the copy is replaced.
///
/// # Errors
/// What was served.
///
/// # Panics
/// When there is no cluster to begin with, or damage stays.
pub async fn flipped_bits(builder: Builder, seed: u64, rounds: usize) -> Verdict {
    let mut dice = StdRng::seed_from_u64(seed);
    let cluster = start(builder.file_servers(3).directory_config(quick)).await;
    let client = cluster.client_builder().chunk_bytes(256 * 1024).build().expect("a client");
    // One small file (in a segment) and one of several chunks (files of their own), with bytes to be found again.
    let (small, large) = (bytes(&mut dice, 3_000), bytes(&mut dice, 700_000));
    client.write("/small", small.clone()).await.expect("a write");
    client.write("/large", large.clone()).await.expect("a write");
    healthy(&cluster, WORK_LIMIT).await;

    for round in 0..rounds {
        let server = round % 3;
        let (content, path) = if round % 2 == 0 { (&small, "/small") } else { (&large, "/large") };
        let at = dice.random_range(0..content.len() - NEEDLE);
        let needle = &content[at..at + NEEDLE];
        let platter = Platter::of(&cluster, server);
        let places = platter.places(needle).await;
        assert!(!places.is_empty(), "round {round}: the bytes of {path} are not on server {server}");
        for (file, offset) in &places {
            platter.flip(file, *offset, dice.random_range(0..8));
        }
        // Whoever meets the damage first has it replaced: in turn a server that is asked directly, and applications.
        if round / 2 % 2 == 0 {
            serves_no_damage(&cluster, path, content).await.map_err(failed(format!("round {round}")))?;
        }
        for _ in 0..4 {
            let reader = cluster.client_builder().seed(dice.random()).build().expect("a client");
            let read = reader.read(path).await.map_err(failed(format!("round {round}: {path}")))?;
            if read != *content {
                return Err(format!("round {round}: an application read wrong bytes of {path}"));
            }
            reader.close().await.ok();
        }
        // Asked directly, a server finds the damage, says so, and has it replaced.
        let deadline = tokio::time::Instant::now() + WORK_LIMIT;
        loop {
            let all =
                serves_no_damage(&cluster, path, content).await.map_err(failed(format!("round {round}")))?;
            // The next damage waits until all copies serve: that the bytes are on the disk again is not all of it.
            if all && !platter.places(needle).await.is_empty() {
                break;
            }
            assert!(
                tokio::time::Instant::now() < deadline,
                "round {round}: the flipped bytes are not replaced"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    healthy(&cluster, WORK_LIMIT).await;
    cluster.shutdown().await.expect("a clean end");
    Ok(())
}

/// Every server that has a copy of a file's chunks serves the true bytes with the checksums of these, or an error.
/// Answers whether three copies of each serve.
async fn serves_no_damage(cluster: &Cluster, path: &str, content: &[u8]) -> Result<bool, String> {
    let client = cluster.client().await.expect("a client");
    let explained = client.explain(path).await.expect("the directory explains the file");
    client.close().await.ok();
    let addresses = addresses(cluster).await;
    let mut all = true;
    for status in explained.chunks {
        let Some(extent) = status.extent else { continue };
        let Some(chunk) = extent.chunk.and_then(|chunk| chunk.chunk).map(ChunkId::from) else { continue };
        let mut serving = 0;
        for copy in status.copies {
            let Some(uri) = copy.server.and_then(|server| addresses.get(&server.id)) else { continue };
            let Ok(served) = read_copy(cluster, uri, chunk).await else { continue };
            if let Some(block) = served.bad_block {
                return Err(format!(
                    "{uri} served block {block} of chunk {chunk} of {path} without verifying it"
                ));
            }
            let from = extent.offset as usize;
            let wanted = &content[from..from + extent.length as usize];
            if served.bytes != wanted {
                return Err(format!("{uri} served wrong bytes of chunk {chunk} of {path} as good"));
            }
            serving += 1;
        }
        all &= serving == 3;
    }
    Ok(all)
}

/// One record goes bad on each file server's disk, each of another file. Nothing else is lost: what lies behind a bad
/// record is still there, so every file is read from the other copies, and the bad ones are replaced.
///
/// # Errors
/// What was lost.
///
/// # Panics
/// When there is no cluster to begin with, or damage stays.
pub async fn one_bad_record_each(builder: Builder, seed: u64) -> Verdict {
    let mut dice = StdRng::seed_from_u64(seed);
    let cluster = start(builder.file_servers(3).memory(true).directory_config(quick)).await;
    let client = cluster.client().await.expect("a client");
    let mut files = Vec::new();
    for number in 0..10 {
        let (path, content) = (format!("/file-{number}"), bytes(&mut dice, 5_000));
        client.write(&path, content.clone()).await.expect("a write");
        files.push((path, content));
    }
    healthy(&cluster, WORK_LIMIT).await;
    drop(client);
    cluster.kill_all().await;
    let mut damaged = Vec::new();
    for (server, (name, content)) in files.iter().enumerate().take(3) {
        // The first records of each log: what a log loses that is cut there is all the rest.
        let needle = content[100..100 + NEEDLE].to_vec();
        let platter = Platter::of(&cluster, server);
        let places = platter.places(&needle).await;
        assert!(!places.is_empty(), "the bytes of {name} are not on server {server}");
        for (path, offset) in places {
            platter.flip(&path, offset, 0);
        }
        damaged.push((platter, needle));
    }
    cluster.restart_all().await.map_err(failed("no start with a bad record"))?;
    let client = cluster.client_builder().deadline(Duration::from_secs(10)).build().expect("a client");
    for (path, content) in &files {
        let read = client.read(path).await.map_err(failed(format!("{path} was lost")))?;
        if read != *content {
            return Err(format!("{path} has other bytes"));
        }
    }
    for (platter, needle) in damaged {
        eventually("a bad record is replaced", WORK_LIMIT, || async {
            if platter.places(&needle).await.is_empty() { Err("still damaged") } else { Ok(()) }
        })
        .await;
    }
    healthy(&cluster, WORK_LIMIT).await;
    cluster.shutdown().await.expect("a clean end");
    Ok(())
}

/// A record of the directory's journal goes bad. The directory refuses to start, rather than begin with what lies before
/// the damage, and says what to do; rebuilt, it knows everything again.
///
/// # Errors
/// When it started, or something is missing afterwards.
///
/// # Panics
/// When there is no cluster to begin with.
pub async fn bad_record_of_the_directory(builder: Builder) -> Verdict {
    let cluster = start(builder.file_servers(3).memory(true).directory_config(quick)).await;
    let client = cluster.client().await.expect("a client");
    let names: Vec<String> = (0..10).map(|number| format!("/a name that is found again {number}")).collect();
    for name in &names {
        client.mkdir(name).await.expect("a folder");
    }
    crate::shipped(&cluster).await;
    cluster.kill_directory().await;
    let platter = Platter::of_directory(&cluster);
    let places = platter.places(&names[1].as_bytes()[1..]).await;
    let journal = places.iter().find(|(path, _)| path.to_string_lossy().contains("journal"));
    let (path, offset) = journal.expect("the name is in the journal");
    platter.flip(path, *offset, 0);
    match cluster.restart_directory().await {
        Ok(()) => return Err("the directory started on a damaged journal".to_owned()),
        Err(error) if error.to_string().contains("rebuild") => {}
        Err(error) => return Err(format!("the directory does not say what to do: {error}")),
    }
    cluster.lose_directory_store().await.expect("its store is taken away");
    cluster.restart_directory().await.map_err(failed("the rebuilt directory"))?;
    cluster.wait_ready().await.map_err(failed("the rebuilt directory"))?;
    let client = cluster.client().await.expect("a client");
    for name in &names {
        client.stat(name).await.map_err(failed("after the rebuild"))?;
    }
    cluster.shutdown().await.expect("a clean end");
    Ok(())
}
