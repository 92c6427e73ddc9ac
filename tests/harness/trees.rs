//! Trees of real files: gathered from this machine, topped up with names and sizes that are seldom met, compared byte
//! by byte.

use rand::{Rng as _, RngCore as _, SeedableRng as _, rngs::SmallRng};
use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{Read, Write as _},
    path::{Path, PathBuf},
};

/// Folders with many files of a usual system.
const SOURCES: [&str; 5] =
    ["/usr/include", "/usr/share/doc", "/usr/share/perl", "/usr/share/zoneinfo", "/usr/lib/python3"];
/// Larger files of the system are left out: there are enough bytes in the big file.
const FILE_BYTES_MAX: u64 = 1 << 20;
const BUFFER_BYTES: usize = 1 << 20;

/// What is in a tree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Files.
    pub files: usize,
    /// Directories, without the tree's own.
    pub folders: usize,
    /// Bytes in files.
    pub bytes: u64,
}

/// Makes a tree of at least `files` files: copies of this machine's, and generated ones.
pub fn make(root: &Path, files: usize) -> Totals {
    fs::create_dir_all(root).unwrap();
    peculiar(&root.join("peculiar names"));
    let mut count = walk(root).values().filter(|is_file| **is_file).count();
    for source in SOURCES {
        let target = root.join(source.trim_start_matches('/').replace('/', "-"));
        // A tenth is generated in any case, so that these are tried everywhere.
        copy_real(Path::new(source), &target, &mut count, files - files / 10);
    }
    let mut random = SmallRng::seed_from_u64(7);
    for number in count..files {
        let folder = root.join(format!("generated/{}/{}", number % 7, number % 31));
        fs::create_dir_all(&folder).unwrap();
        let length = random.random_range(0..20_000);
        fs::write(folder.join(format!("file {number}.txt")), bytes(number as u64, length)).unwrap();
    }
    totals(root)
}

/// Writes one file of so many random bytes.
pub fn make_big(path: &Path, length: u64) {
    let mut random = SmallRng::seed_from_u64(length);
    let mut file = File::create(path).unwrap();
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut left = length;
    while left > 0 {
        let count = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        random.fill_bytes(&mut buffer[..count]);
        file.write_all(&buffer[..count]).unwrap();
        left -= count as u64;
    }
}

/// Names and sizes that break programs.
fn peculiar(root: &Path) {
    fs::create_dir_all(root.join("an empty directory")).unwrap();
    let long = "n".repeat(255);
    for (number, name) in [
        " leading and trailing ",
        "two\nlines",
        "tab\there",
        "-r",
        "--force",
        "*",
        "back\\slash",
        "'quotes\"",
        "$(reboot)",
        "Grüße, 世界",
        "🦀",
        "e\u{301} is not \u{e9}",
        "\u{e9} is not e\u{301}",
        ".hidden",
        "...",
        "%2e%2e",
        "C:",
        long.as_str(),
    ]
    .into_iter()
    .enumerate()
    {
        fs::write(root.join(name), bytes(number as u64, number * 300)).unwrap();
    }
    // Around the sizes at which something is done in another way: blocks, messages, chunks.
    for size in [0, 1, 4_095, 4_096, 4_097, 65_536, 1_048_575, 1_048_576, 1_048_577, 8_388_608, 8_388_609] {
        fs::write(root.join(format!("{size} bytes")), bytes(size as u64, size)).unwrap();
    }
    let mut deep = root.to_owned();
    for level in 0..60 {
        deep.push(format!("level {level}"));
    }
    fs::create_dir_all(&deep).unwrap();
    fs::write(deep.join("at the bottom"), "found").unwrap();
    let crowded = root.join("a folder with many empty files");
    fs::create_dir(&crowded).unwrap();
    for number in 0..300 {
        File::create(crowded.join(format!("empty-{number}"))).unwrap();
    }
}

fn bytes(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    SmallRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    bytes
}

fn copy_real(source: &Path, target: &Path, count: &mut usize, files: usize) {
    let Ok(entries) = fs::read_dir(source) else { return };
    for entry in entries.filter_map(Result::ok) {
        if *count >= files {
            return;
        }
        // Names of other encodings can't be kept in Cairn; `cairn put` says so, which is tried elsewhere.
        let Some(name) = entry.file_name().to_str().map(str::to_owned) else { continue };
        let Ok(kind) = entry.file_type() else { continue };
        let target = target.join(name);
        if kind.is_dir() {
            copy_real(&entry.path(), &target, count, files);
        } else if kind.is_file() && entry.metadata().is_ok_and(|it| it.len() <= FILE_BYTES_MAX) {
            fs::create_dir_all(target.parent().unwrap()).unwrap();
            if fs::copy(entry.path(), &target).is_ok() {
                *count += 1;
            }
        }
    }
}

/// Copies all that is below `source`, as it is.
pub fn copy(source: &Path, target: &Path) {
    fs::create_dir_all(target).unwrap();
    for (path, is_file) in walk(source) {
        let (from, to) = (source.join(&path), target.join(&path));
        if is_file {
            fs::create_dir_all(to.parent().unwrap()).unwrap();
            fs::copy(from, to).unwrap();
        } else {
            fs::create_dir_all(to).unwrap();
        }
    }
}

/// All paths below, relative; true for files.
pub fn walk(root: &Path) -> BTreeMap<PathBuf, bool> {
    let mut found = BTreeMap::new();
    let mut waiting = vec![PathBuf::new()];
    while let Some(folder) = waiting.pop() {
        for entry in fs::read_dir(root.join(&folder)).unwrap() {
            let entry = entry.unwrap();
            let path = folder.join(entry.file_name());
            let is_file = entry.file_type().unwrap().is_file();
            if !is_file {
                waiting.push(path.clone());
            }
            found.insert(path, is_file);
        }
    }
    found
}

/// Counts what is below.
pub fn totals(root: &Path) -> Totals {
    let mut totals = Totals::default();
    for (path, is_file) in walk(root) {
        if is_file {
            totals.files += 1;
            totals.bytes += fs::metadata(root.join(path)).unwrap().len();
        } else {
            totals.folders += 1;
        }
    }
    totals
}

/// Counts files in a tree that somebody is changing meanwhile.
pub fn count_files(root: &Path) -> usize {
    let Ok(entries) = fs::read_dir(root) else { return 0 };
    let count = |entry: fs::DirEntry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => count_files(&entry.path()),
        Ok(_) => 1,
        Err(_) => 0,
    };
    entries.filter_map(Result::ok).map(count).sum()
}

/// Compares two trees by names, kinds and every byte. Answers all differences, in words.
pub fn differences(wanted: &Path, found: &Path) -> Vec<String> {
    let (mut differences, other) = (Vec::new(), walk(found));
    let one = walk(wanted);
    for (path, is_file) in &one {
        match other.get(path) {
            None => differences.push(format!("{path:?} is missing")),
            Some(kind) if kind != is_file => differences.push(format!("{path:?} is of another kind")),
            Some(_) if *is_file && !same_bytes(&wanted.join(path), &found.join(path)) => {
                differences.push(format!("{path:?} has other bytes"));
            }
            Some(_) => {}
        }
    }
    differences.extend(
        other.keys().filter(|path| !one.contains_key(*path)).map(|path| format!("{path:?} is extra")),
    );
    differences
}

/// Whether two files have the same bytes.
pub fn same_bytes(one: &Path, other: &Path) -> bool {
    let (mut one, mut other) = (File::open(one).unwrap(), File::open(other).unwrap());
    if one.metadata().unwrap().len() != other.metadata().unwrap().len() {
        return false;
    }
    let (mut left, mut right) = (vec![0; BUFFER_BYTES], vec![0; BUFFER_BYTES]);
    loop {
        let count = one.read(&mut left).unwrap();
        if count == 0 {
            return true;
        }
        other.read_exact(&mut right[..count]).unwrap();
        if left[..count] != right[..count] {
            return false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_found() {
        let folder = tempfile::tempdir().unwrap();
        let (one, other) = (folder.path().join("one"), folder.path().join("other"));
        let totals = make(&one, 400);
        assert!(totals.files >= 400 && totals.folders > 60, "{totals:?}");
        assert_eq!(make(&other, 400), totals);
        assert_eq!(differences(&one, &other), Vec::<String>::new());

        let peculiar = other.join("peculiar names");
        fs::remove_file(peculiar.join("🦀")).unwrap();
        fs::remove_dir(peculiar.join("an empty directory")).unwrap();
        fs::write(peculiar.join("stranger"), "").unwrap();
        let mut bytes = fs::read(peculiar.join("1048577 bytes")).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(peculiar.join("1048577 bytes"), bytes).unwrap();
        assert_eq!(differences(&one, &other).len(), 4);
    }
}
