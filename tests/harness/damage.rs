//! Rot on a file server's disk: which bytes mean what, flipping some, and seeing whether they were replaced.
//!
//! The layouts are read here by code of their own, from what `disk/src/log.rs` and `file-service/src/chunks/disk.rs`
//! draw, so that a mistake there is not repeated here.

use cairn_proto::checksum::crc64;
use rand::{Rng as _, rngs::StdRng, seq::IndexedRandom as _};
use std::{
    collections::BTreeMap,
    fs,
    ops::Range,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

const SEGMENT_HEADER_BYTES: usize = 4_096;
const RECORD_HEADER_BYTES: usize = 72;
const RECORD_MAGIC: &[u8] = b"CRec";
const CHUNK_HEADER_BYTES: usize = 64;
const CHUNK_MAGIC: &[u8] = b"CChk";
const BLOCK_BYTES: usize = 4_096;

/// What a byte on a file server's disk is part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// The bytes of a small chunk.
    SmallData,
    /// The checksums of a small chunk's blocks.
    SmallTable,
    /// What a small chunk says of itself.
    SmallHeader,
    /// What the log says of a record that holds a small chunk.
    RecordHeader,
    /// The bytes of a large chunk.
    LargeData,
    /// The checksums of a large chunk's blocks.
    LargeTable,
    /// What a large chunk says of itself.
    LargeHeader,
    /// The snapshot of the index.
    Index,
    /// The copy of the directory's journal.
    Journal,
    /// The server's own small records: who it is, and what it knows of the cluster.
    Record,
}

impl Part {
    /// Whether it is noticed when a chunk is read, without a start of the server.
    pub fn is_read_with_chunk(self) -> bool {
        matches!(self, Self::SmallData | Self::SmallTable | Self::LargeData | Self::LargeTable)
    }

    /// Whether it belongs to one chunk's copy.
    pub fn is_of_chunk(self) -> bool {
        !matches!(self, Self::Index | Self::Journal | Self::Record)
    }
}

/// A grant and an index.
pub type Chunk = (u64, u32);

/// A run of bytes of one meaning.
#[derive(Clone, Debug)]
pub struct Region {
    /// Their meaning.
    pub part: Part,
    /// Their file.
    pub path: PathBuf,
    /// Where in it.
    pub range: Range<usize>,
    /// Whose copy.
    pub chunk: Option<Chunk>,
    /// Where that copy's record begins; 0 for a file of its own.
    pub start: usize,
    /// The number of the change that made it: the highest counts.
    sequence: u64,
}

/// A flipped bit.
#[derive(Clone, Debug)]
pub struct Flip {
    /// Where.
    pub region: Region,
    /// The byte's position in the file.
    pub at: usize,
    /// The byte as it was.
    pub before: u8,
}

/// Everything on a disk that can rot and matters.
pub fn survey(data: &Path) -> Vec<Region> {
    let mut regions = Vec::new();
    for path in files(&data.join("chunks/segments")) {
        if !is_segment(&path) {
            continue;
        }
        for Record { start, sequence, payload: bytes } in records(&path) {
            let payload = start + RECORD_HEADER_BYTES;
            if bytes.len() < CHUNK_HEADER_BYTES
                || !bytes.starts_with(CHUNK_MAGIC)
                || crc64(&bytes[..56]) != u64_at(&bytes, 56)
            {
                continue;
            }
            let chunk = Some((u64_at(&bytes, 8), u32_at(&bytes, 16)));
            let data_bytes = u32_at(&bytes, 20) as usize;
            let table = payload + CHUNK_HEADER_BYTES;
            let data = table + data_bytes.div_ceil(BLOCK_BYTES) * 8;
            for (part, range) in [
                (Part::RecordHeader, start..start + 64),
                (Part::SmallHeader, payload..table),
                (Part::SmallTable, table..data),
                (Part::SmallData, data..data + data_bytes),
            ] {
                regions.push(Region { part, path: path.clone(), range, chunk, start, sequence });
            }
        }
    }
    for path in files(&data.join("chunks/files")) {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let Some((grant, index)) = name.strip_suffix(".chunk").and_then(|name| name.split_once('-')) else {
            continue;
        };
        let chunk = (u64::from_str_radix(grant, 16), u32::from_str_radix(index, 16));
        let (Ok(grant), Ok(index)) = chunk else { continue };
        let Ok(length) = fs::metadata(&path).map(|it| it.len() as usize) else { continue };
        let header = length - CHUNK_HEADER_BYTES;
        // Data, 8 bytes for each of its blocks, header.
        let blocks = header.div_ceil(BLOCK_BYTES + 8);
        let table = header - blocks * 8;
        for (part, range) in [
            (Part::LargeData, 0..table),
            (Part::LargeTable, table..header),
            (Part::LargeHeader, header..length),
        ] {
            let chunk = Some((grant, index));
            regions.push(Region { part, path: path.clone(), range, chunk, start: 0, sequence: u64::MAX });
        }
    }
    for path in files(&data.join("journal")) {
        if !is_segment(&path) {
            continue;
        }
        let records = records(&path);
        // The last ones may be taken for torn, which costs nothing: the directory sends them again.
        for Record { start, payload, .. } in records.iter().rev().skip(5) {
            let (path, start) = (path.clone(), *start);
            let range = start..start + RECORD_HEADER_BYTES + payload.len();
            regions.push(Region { part: Part::Journal, path, range, chunk: None, start, sequence: 0 });
        }
    }
    for (part, name) in
        [(Part::Index, "chunks/index"), (Part::Record, "identity"), (Part::Record, "topology")]
    {
        let path = data.join(name);
        if let Ok(length) = fs::metadata(&path).map(|it| it.len() as usize) {
            regions.push(Region { part, path, range: 0..length, chunk: None, start: 0, sequence: 0 });
        }
    }
    // What a later copy of the same chunk replaced is garbage.
    let mut newest: BTreeMap<Chunk, (u64, PathBuf, usize)> = BTreeMap::new();
    for region in &regions {
        let Some(chunk) = region.chunk else { continue };
        let place = (region.sequence, region.path.clone(), region.start);
        let known = newest.entry(chunk).or_insert_with(|| place.clone());
        *known = place.max(known.clone());
    }
    let counts = |region: &Region| {
        let place = (region.sequence, region.path.clone(), region.start);
        region.chunk.is_none_or(|chunk| newest.get(&chunk) == Some(&place))
    };
    regions.retain(|region| !region.range.is_empty() && counts(region));
    regions
}

/// Chooses a place of one meaning, none of them of a chunk that was hit already.
pub fn choose(regions: &[Region], part: Part, hit: &[Flip], dice: &mut StdRng) -> Option<(Region, usize)> {
    let fresh: Vec<&Region> = regions
        .iter()
        .filter(|region| region.part == part)
        .filter(|region| !hit.iter().any(|flip| flip.region.chunk == region.chunk && region.chunk.is_some()))
        .collect();
    let region = (*fresh.choose(dice)?).clone();
    let at = dice.random_range(region.range.clone());
    Some((region, at))
}

/// Flips one bit.
///
/// # Panics
/// When the file cannot be changed.
pub fn flip(region: Region, at: usize, bit: u8) -> Flip {
    let file = fs::OpenOptions::new().read(true).write(true).open(&region.path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at as u64).unwrap();
    file.write_all_at(&[byte[0] ^ (1 << bit)], at as u64).unwrap();
    Flip { region, at, before: byte[0] }
}

impl Flip {
    /// Puts the byte back.
    ///
    /// # Panics
    /// When the file cannot be changed.
    pub fn undo(&self) {
        let file = fs::OpenOptions::new().write(true).open(&self.region.path).unwrap();
        file.write_all_at(&[self.before], self.at as u64).unwrap();
    }
}

/// Of the flips in chunks, those that were not replaced: the copy lies where it lay, with the byte as it was flipped,
/// or there is no living copy at all.
pub fn not_replaced<'a>(data: &Path, flips: &'a [Flip]) -> Vec<&'a Flip> {
    let mut living: BTreeMap<Chunk, Vec<(PathBuf, usize)>> = BTreeMap::new();
    for region in survey(data) {
        if let (Some(chunk), Part::SmallData | Part::LargeData) = (region.chunk, region.part) {
            living.entry(chunk).or_default().push((region.path, region.start));
        }
    }
    let is_replaced = |flip: &&Flip| {
        let Some(places) = flip.region.chunk.and_then(|chunk| living.get(&chunk)) else { return false };
        places.iter().any(|(path, start)| {
            let is_same_place = *path == flip.region.path && *start == flip.region.start;
            // A file of its own is replaced under its name.
            !is_same_place || byte(path, flip.at) == Some(flip.before)
        })
    };
    flips.iter().filter(|flip| flip.region.part.is_of_chunk()).filter(|flip| !is_replaced(flip)).collect()
}

/// An intact header of a living record, and the payload as it is.
struct Record {
    start: usize,
    sequence: u64,
    payload: Vec<u8>,
}

/// The living records of a log's segment.
fn records(path: &Path) -> Vec<Record> {
    let Ok(bytes) = fs::read(path) else { return Vec::new() };
    let mut found = Vec::new();
    if bytes.len() < SEGMENT_HEADER_BYTES {
        return found;
    }
    let (log_id, life) = (&bytes[16..32], u64_at(&bytes, 32));
    let mut start = SEGMENT_HEADER_BYTES;
    while start + RECORD_HEADER_BYTES <= bytes.len() {
        let header = &bytes[start..start + RECORD_HEADER_BYTES];
        let end = start + RECORD_HEADER_BYTES + u32_at(header, 4) as usize;
        let is_record = &header[..4] == RECORD_MAGIC
            && u32_at(header, 24) as usize == start
            && u64_at(header, 16) == life
            && end <= bytes.len()
            && crc64(&[log_id, &header[..56]].concat()) == u64_at(header, 56);
        if !is_record {
            start += 8;
            continue;
        }
        let (is_alive, is_internal) = (u64_at(header, 64) == 0, header[9] & 1 == 1);
        if is_alive && !is_internal {
            let payload = bytes[start + RECORD_HEADER_BYTES..end].to_vec();
            found.push(Record { start, sequence: u64_at(header, 40), payload });
        }
        start = end.next_multiple_of(8);
    }
    found
}

fn is_segment(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.ends_with(".seg") && !name.starts_with("spare")
}

/// All files below a folder, in order of names.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = fs::read_dir(folder) else { continue };
        for entry in entries.filter_map(Result::ok) {
            let path = entry.path();
            if path.is_dir() { folders.push(path) } else { found.push(path) }
        }
    }
    found.sort();
    found
}

fn byte(path: &Path, at: usize) -> Option<u8> {
    let mut byte = [0];
    fs::File::open(path).ok()?.read_exact_at(&mut byte, at as u64).ok()?;
    Some(byte[0])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}
