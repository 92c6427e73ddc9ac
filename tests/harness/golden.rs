//! Data directories as earlier programs left them, small enough for the repository.
//!
//! A set is one file: every file of a cluster's data, without the blocks that are zero. Segments are preallocated, so
//! that is nearly all of them.
//!
//! ```text
//! magic "CAIRNGLD"; then for each file: length of its path u16, path, its length u64, number of pieces u32;
//! for each piece: offset u64, length u32, bytes. All numbers are little-endian.
//! ```

use std::{
    fs,
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
};

const MAGIC: &[u8; 8] = b"CAIRNGLD";
const BLOCK_BYTES: usize = 512;

/// Where the sets of all formats are, a folder each.
pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("data/golden")
}

/// Packs a folder into one file.
///
/// # Errors
/// Those of the disk.
pub fn pack(folder: &Path, set: &Path) -> io::Result<()> {
    let mut out = MAGIC.to_vec();
    let mut paths: Vec<PathBuf> = crate::trees::walk(folder)
        .into_iter()
        .filter(|(_, is_file)| *is_file)
        .map(|(path, _)| path)
        .collect();
    paths.sort();
    for path in paths {
        let name = path.to_str().ok_or(io::ErrorKind::InvalidData)?;
        let bytes = fs::read(folder.join(&path))?;
        let pieces = pieces(&bytes);
        out.extend_from_slice(&(name.len() as u16).to_le_bytes());
        out.extend_from_slice(name.as_bytes());
        out.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
        out.extend_from_slice(&(pieces.len() as u32).to_le_bytes());
        for (from, to) in pieces {
            out.extend_from_slice(&(from as u64).to_le_bytes());
            out.extend_from_slice(&((to - from) as u32).to_le_bytes());
            out.extend_from_slice(&bytes[from..to]);
        }
    }
    fs::create_dir_all(set.parent().ok_or(io::ErrorKind::InvalidInput)?)?;
    fs::write(set, out)
}

/// The stretches that are not zero, in whole blocks.
fn pieces(bytes: &[u8]) -> Vec<(usize, usize)> {
    let mut pieces: Vec<(usize, usize)> = Vec::new();
    for (number, block) in bytes.chunks(BLOCK_BYTES).enumerate() {
        if block.iter().all(|byte| *byte == 0) {
            continue;
        }
        let from = number * BLOCK_BYTES;
        match pieces.last_mut() {
            Some((_, end)) if *end == from => *end = from + block.len(),
            _ => pieces.push((from, from + block.len())),
        }
    }
    pieces
}

/// Unpacks a set into a folder.
///
/// # Errors
/// Those of the disk, and `InvalidData` for a file that is none.
pub fn unpack(set: &Path, folder: &Path) -> io::Result<()> {
    let mut packed = io::Cursor::new(fs::read(set)?);
    let mut magic = [0; 8];
    packed.read_exact(&mut magic)?;
    if &magic != MAGIC {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{} is no golden set", set.display()),
        ));
    }
    while packed.position() < packed.get_ref().len() as u64 {
        let length = number(&mut packed, 2)?;
        let name = String::from_utf8(take(&mut packed, length)?).map_err(io::Error::other)?;
        let path = folder.join(name);
        fs::create_dir_all(path.parent().ok_or(io::ErrorKind::InvalidData)?)?;
        let mut file = fs::File::create(&path)?;
        file.set_len(number(&mut packed, 8)?)?;
        for _ in 0..number(&mut packed, 4)? {
            file.seek(SeekFrom::Start(number(&mut packed, 8)?))?;
            let length = number(&mut packed, 4)?;
            file.write_all(&take(&mut packed, length)?)?;
        }
    }
    Ok(())
}

fn number(packed: &mut io::Cursor<Vec<u8>>, bytes: usize) -> io::Result<u64> {
    let mut number = [0; 8];
    packed.read_exact(&mut number[..bytes])?;
    Ok(u64::from_le_bytes(number))
}

fn take(packed: &mut io::Cursor<Vec<u8>>, length: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; length as usize];
    packed.read_exact(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packed_folder_comes_back() {
        let work = tempfile::tempdir().unwrap();
        let (one, set, other) =
            (work.path().join("one"), work.path().join("set/data"), work.path().join("other"));
        fs::create_dir_all(one.join("a/b")).unwrap();
        let mut bytes = vec![0; 100_000];
        bytes[5_000..5_100].fill(7);
        bytes[99_999] = 1;
        fs::write(one.join("a/b/sparse"), &bytes).unwrap();
        fs::write(one.join("empty"), "").unwrap();
        fs::write(one.join("zeros"), vec![0; 3_000]).unwrap();
        pack(&one, &set).unwrap();
        assert!(fs::metadata(&set).unwrap().len() < 2_500);
        unpack(&set, &other).unwrap();
        assert_eq!(crate::trees::differences(&one, &other), Vec::<String>::new());
    }
}
