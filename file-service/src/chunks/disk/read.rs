//! Reading and verifying.

use super::format::{
    ChunkHeader, Decoded, HEADER_BYTES, block_count, decode_table, payload_bytes, table_bytes, table_checksum,
};
use super::index::{Held, Place};
use super::*;
use cairn_proto::{checksum::crc64, limits::BLOCK_BYTES};
use std::io;

impl Shared {
    /// See [`ChunkStore::read`]. No lock is held while the disk works, so a copy may be moved, replaced or removed
    /// meanwhile: a failure only counts if the copy is still where it was read.
    pub(super) async fn read(&self, chunk: ChunkId, offset: u64, len: usize) -> Result<Part> {
        loop {
            let held = self.state.lock().index.get(chunk).ok_or_else(|| not_found(chunk))?;
            if held.length == 0 {
                return Err(bad_copy(chunk, "nothing but its id is readable"));
            }
            let (offset, len, first) = read_range(chunk, u64::from(held.length), offset, len)?;
            let why = match self.fetch(&held, offset, len).await {
                Ok((data, blocks)) => match verify_blocks(chunk, first, &data, &blocks) {
                    None if data.len() == len => {
                        if len == held.length as usize {
                            let now = Some(self.verified_now());
                            self.state.lock().index.judge(chunk, held.place, held.corrupt, now);
                        }
                        return Ok(Part { offset, data, blocks, info: self.info(&held) });
                    }
                    bad => format!("block {}", bad.unwrap_or(first)),
                },
                Err(error) if is_bad_copy(&error) => error.to_string(),
                Err(error) => return Err(self.disk_error(error)),
            };
            if self.condemn(&held)? {
                tracing::warn!(store = %self.config.name, %chunk, %why, "a copy is corrupt");
                return Err(bad_copy(chunk, &why));
            }
        }
    }

    /// Marks a copy corrupt; false if it is not where it was any more, so that another look is worth it.
    fn condemn(&self, held: &Held) -> Result<bool> {
        let mut state = self.state.lock();
        let now = state.index.get(held.chunk).ok_or_else(|| not_found(held.chunk))?;
        state.index.judge(held.chunk, held.place, true, None);
        Ok(now.place == held.place)
    }

    /// Bytes and their block checksums, unchecked.
    async fn fetch(&self, held: &Held, offset: u64, len: usize) -> io::Result<(Bytes, Vec<u64>)> {
        match held.place {
            Place::File(number) => self.files.read(held.chunk, number, held.length, offset, len).await,
            Place::Record(position) => {
                let data_at = HEADER_BYTES + table_bytes(held.length);
                if len == held.length as usize {
                    let payload = self.log.read(position, 0, payload_bytes(held.length) as u32).await?;
                    return Ok((payload.slice(data_at..), decode_table(&payload[HEADER_BYTES..data_at])));
                }
                let first = offset as usize / BLOCK_BYTES;
                let (table_at, table_len) = (HEADER_BYTES + first * 8, len.div_ceil(BLOCK_BYTES) * 8);
                let table = self.log.read(position, table_at as u32, table_len as u32).await?;
                let data = self.log.read(position, data_at as u32 + offset as u32, len as u32).await?;
                Ok((data, decode_table(&table)))
            }
        }
    }

    /// See [`ChunkStore::verify`].
    pub(super) async fn verify(&self, chunk: ChunkId) -> Result<bool> {
        loop {
            let held = self.state.lock().index.get(chunk).ok_or_else(|| not_found(chunk))?;
            let found = match held.place {
                Place::File(number) => self.files.verify(chunk, number).await,
                Place::Record(position) => match self.log.read_record(position).await {
                    Ok(record) => Ok(check_payload(&record.payload)),
                    Err(error) => Err(error),
                },
            };
            let header = match found {
                Ok(header) => header,
                Err(error) if is_bad_copy(&error) => None,
                Err(error) => return Err(self.disk_error(error)),
            };
            let good = header.is_some_and(|header| {
                (header.chunk, header.length, header.checksum) == (chunk, held.length, held.checksum)
            });
            if good {
                let now = Some(self.verified_now());
                self.state.lock().index.judge(chunk, held.place, false, now);
                return Ok(true);
            }
            if self.condemn(&held)? {
                tracing::warn!(store = %self.config.name, %chunk, "a copy did not pass its verification");
                return Ok(false);
            }
        }
    }
}

/// Compares everything in a small chunk's record; its header if all is well.
pub(super) fn check_payload(payload: &[u8]) -> Option<ChunkHeader> {
    let Decoded::Header(header) = ChunkHeader::decode(payload) else { return None };
    if payload.len() != payload_bytes(header.length) {
        return None;
    }
    let (table, data) = payload[HEADER_BYTES..].split_at(table_bytes(header.length));
    let blocks = decode_table(table);
    let good = blocks.len() == block_count(header.length)
        && table_checksum(&blocks) == header.table_checksum
        && verify_blocks(header.chunk, 0, data, &blocks).is_none()
        && crc64(data) == header.checksum;
    good.then_some(header)
}

/// Whether an error is about this one copy, not about the disk or this process.
fn is_bad_copy(error: &io::Error) -> bool {
    const EIO: i32 = 5;
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof
    ) || disk::os_error(error) == Some(EIO)
}
