//! Small records that a server keeps about itself: one file each, replaced whole, versioned and checksummed.
//!
//! ```text
//! bytes  0..8   magic, says which record it is
//! bytes  8..12  version of the layout of the payload, little endian
//! bytes 12..16  length of the payload, little endian
//! bytes 16..24  CRC-64/NVME of bytes 0..16 and the payload, little endian
//! bytes 24..    payload, protobuf
//! ```

use bytes::{Bytes, BytesMut};
use cairn_proto::{Error, Reason, Result, checksum::ChunkChecksum};
use disk::{Disk, durable};
use prost::Message;
use std::path::Path;

/// Which record a file holds, and where.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    /// Path below the disk's root.
    pub path: &'static str,
    /// First bytes of the file.
    pub magic: &'static [u8; 8],
    /// The only version that is understood; another one refuses to start.
    pub version: u32,
    /// Longest payload in bytes.
    pub payload_bytes_max: usize,
}

const HEADER_BYTES: usize = 24;

/// Reads a record; `None` when the file does not exist.
///
/// # Errors
/// `IO` when the file cannot be read, is damaged, or has another version: it names the file and what to do.
pub async fn read<M: Message + Default>(disk: &dyn Disk, kind: Kind) -> Result<Option<M>> {
    let bytes = durable::read_file(disk, Path::new(kind.path), HEADER_BYTES + kind.payload_bytes_max).await?;
    bytes.map(|bytes| decode(&bytes, kind)).transpose()
}

/// Replaces a record, durably.
///
/// # Errors
/// `LIMIT_EXCEEDED` beyond the record's longest payload, `NO_SPACE` or `IO`.
pub async fn write<M: Message>(disk: &dyn Disk, kind: Kind, record: &M) -> Result<()> {
    let bytes = encode(record, kind)?;
    Ok(durable::write_file_durable(disk, Path::new(kind.path), bytes).await?)
}

fn encode<M: Message>(record: &M, kind: Kind) -> Result<Bytes> {
    let payload = record.encode_to_vec();
    let length = u32::try_from(payload.len()).ok().filter(|_| payload.len() <= kind.payload_bytes_max);
    let Some(length) = length else {
        return Err(Error::limit(format!(
            "the file '{}' would have {} bytes, at most {} are allowed",
            kind.path,
            payload.len(),
            kind.payload_bytes_max
        )));
    };
    let mut bytes = BytesMut::with_capacity(HEADER_BYTES + payload.len());
    bytes.extend_from_slice(kind.magic);
    bytes.extend_from_slice(&kind.version.to_le_bytes());
    bytes.extend_from_slice(&length.to_le_bytes());
    let mut sum = ChunkChecksum::default();
    sum.update(&bytes);
    sum.update(&payload);
    bytes.extend_from_slice(&sum.value().to_le_bytes());
    bytes.extend_from_slice(&payload);
    Ok(bytes.freeze())
}

fn decode<M: Message + Default>(bytes: &[u8], kind: Kind) -> Result<M> {
    let damaged = |what: &str| {
        Error::new(
            Reason::Io,
            format!("the file '{}' {what}; restore it, or give this server a blank disk", kind.path),
        )
    };
    if bytes.len() < HEADER_BYTES || &bytes[..8] != kind.magic {
        return Err(damaged("is not what its name says"));
    }
    let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    if word(8) != kind.version {
        return Err(Error::new(
            Reason::Io,
            format!(
                "the file '{}' has version {}, this program knows {}: start the program that wrote it",
                kind.path,
                word(8),
                kind.version
            ),
        ));
    }
    let payload = &bytes[HEADER_BYTES..];
    let mut sum = ChunkChecksum::default();
    sum.update(&bytes[..16]);
    sum.update(payload);
    if word(12) as usize != payload.len() || sum.value().to_le_bytes() != bytes[16..24] {
        return Err(damaged("is damaged"));
    }
    M::decode(payload).map_err(|error| damaged(&format!("cannot be decoded ({error})")))
}

#[cfg(test)]
mod hostile;
#[cfg(test)]
mod tests {
    use super::*;
    use cairn_proto::v1;

    const KIND: Kind = Kind { path: "test", magic: b"CAIRNtst", version: 3, payload_bytes_max: 100 };

    #[test]
    fn a_record_survives_and_any_flipped_bit_is_found() {
        let record = v1::ChunkId { grant_id: 7, index: 9 };
        let bytes = encode(&record, KIND).unwrap();
        assert_eq!(decode::<v1::ChunkId>(&bytes, KIND).unwrap(), record);
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.to_vec();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(decode::<v1::ChunkId>(&flipped, KIND).is_err(), "bit {bit}");
        }
        assert!(decode::<v1::ChunkId>(&bytes[..bytes.len() - 1], KIND).is_err());
    }

    #[test]
    fn another_version_is_refused_by_name() {
        let bytes = encode(&v1::ChunkId::default(), KIND).unwrap();
        let error = decode::<v1::ChunkId>(&bytes, Kind { version: 4, ..KIND }).unwrap_err();
        assert!(error.message().contains("has version 3"), "{error}");
    }
}
