//! The rules of a stream of [`v1::WriteRequest`]: what may follow what. Values in, decision out; no IO.
//!
//! ```text
//!            first part                 parts, offsets without gaps
//!   idle ----------------> receiving -------------------------------+
//!    ^                        |  ^                                  |
//!    |         finish         |  +----------------------------------+
//!    +------------------------+
//! ```
//!
//! Whether bytes match their checksums is for the chunk store to say; here they are only counted, and computed for
//! writers that leave them out.

use bytes::Bytes;
use cairn_proto::{
    Error, Result,
    checksum::{ChunkChecksum, block_checksums},
    convert::{chunk_id, chunk_length},
    id::{ChunkId, Epoch, GroupId},
    limits::{BLOCK_BYTES, CHUNK_BYTES_MAX, DATA_BYTES_MAX},
    v1,
};

/// A chunk that begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Begin {
    /// The chunk.
    pub chunk: ChunkId,
    /// Its group.
    pub group: GroupId,
    /// The group's epoch as the writer knows it.
    pub epoch: Epoch,
}

/// The end of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finish {
    /// Its length.
    pub length: u64,
    /// CRC-64/NVME of all its bytes.
    pub checksum: u64,
    /// The checksums were computed here, because the writer sent none.
    pub computed_here: bool,
}

/// One message, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The chunk.
    pub chunk: ChunkId,
    /// Set for the first part of a chunk.
    pub begin: Option<Begin>,
    /// Position in the chunk.
    pub offset: u64,
    /// The bytes; may be empty with `finish`.
    pub data: Bytes,
    /// One salted checksum for each block of `data`.
    pub blocks: Vec<u64>,
    /// Set for the last part of a chunk.
    pub finish: Option<Finish>,
}

impl Part {
    /// The message for a follower: all checksums filled in.
    pub fn to_wire(&self) -> v1::WriteRequest {
        let begin = self.begin;
        v1::WriteRequest {
            chunk: begin.map(|begin| begin.chunk.into()),
            group_id: begin.map_or(0, |begin| begin.group.0),
            epoch: begin.map_or(0, |begin| begin.epoch.0),
            offset: self.offset,
            block_checksums: self.blocks.clone(),
            finish: self
                .finish
                .map(|finish| v1::WriteFinish { length: finish.length, checksum: Some(finish.checksum) }),
            data: self.data.clone(),
        }
    }
}

/// Who sends a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sender {
    /// A client: finishes what it begins, may leave checksums out.
    Client,
    /// A primary: gives a chunk up by beginning another; always sends checksums.
    Primary,
}

/// Where a stream stands.
#[derive(Debug)]
pub struct Ingest {
    sender: Sender,
    current: Option<Current>,
}

#[derive(Debug)]
struct Current {
    begin: Begin,
    next: u64,
    /// Of a writer that leaves checksums out.
    computed: Option<ChunkChecksum>,
}

impl Ingest {
    /// A stream from its beginning.
    pub fn new(sender: Sender) -> Self {
        Self { sender, current: None }
    }

    /// Whether no chunk is under way.
    pub fn is_idle(&self) -> bool {
        self.current.is_none()
    }

    /// Gives up the chunk under way.
    pub fn reset(&mut self) {
        self.current = None;
    }

    /// Takes the next message. After an error the chunk under way is given up.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` for messages that do not fit together, `LIMIT_EXCEEDED` for too many bytes.
    pub fn take(&mut self, message: v1::WriteRequest) -> Result<Part> {
        let taken = self.take_unguarded(message);
        if taken.is_err() {
            self.reset();
        }
        taken
    }

    fn take_unguarded(&mut self, message: v1::WriteRequest) -> Result<Part> {
        let length = message.data.len() as u64;
        if message.data.len() > DATA_BYTES_MAX {
            return Err(Error::limit(format!(
                "a message has {length} bytes of data, at most {DATA_BYTES_MAX} are allowed"
            )));
        }
        let begin = self.begins(&message)?;
        if let Some(begin) = begin {
            let computed = (self.sender == Sender::Client && message.block_checksums.is_empty())
                .then(ChunkChecksum::default);
            self.current = Some(Current { begin, next: 0, computed });
        }
        let Some(current) = self.current.as_mut() else {
            return Err(Error::invalid(
                "a chunk's first message names the chunk, its group and the group's epoch",
            ));
        };
        let chunk = current.begin.chunk;
        let block = BLOCK_BYTES as u64;
        if message.offset != current.next {
            return Err(Error::invalid(format!(
                "chunk {chunk}: the message is for offset {}, the next byte is {}",
                message.offset, current.next
            )));
        }
        if length == 0 && message.finish.is_none() {
            return Err(Error::invalid(format!("chunk {chunk}: a message without data and without finish")));
        }
        if length > 0 && !message.offset.is_multiple_of(block) {
            return Err(Error::invalid(format!(
                "chunk {chunk}: data at {}, which is no multiple of {block}: only the last block may be shorter",
                message.offset
            )));
        }
        if current.next + length > CHUNK_BYTES_MAX {
            return Err(Error::limit(format!("chunk {chunk} is longer than {CHUNK_BYTES_MAX} bytes")));
        }
        let blocks = match current.computed.as_mut() {
            Some(sum) if message.block_checksums.is_empty() => {
                sum.update(&message.data);
                block_checksums(chunk, (message.offset / block) as u32, &message.data)
            }
            Some(_) => {
                return Err(Error::invalid(format!(
                    "chunk {chunk}: block checksums after messages without: send them with all or with none"
                )));
            }
            None if message.block_checksums.len() as u64 != length.div_ceil(block) => {
                return Err(Error::invalid(format!(
                    "chunk {chunk}: {} checksums for {} blocks",
                    message.block_checksums.len(),
                    length.div_ceil(block)
                )));
            }
            None => message.block_checksums,
        };
        current.next += length;
        let finish = message.finish.map(|finish| current.finish(finish)).transpose()?;
        if finish.is_some() {
            self.reset();
        }
        Ok(Part { chunk, begin, offset: message.offset, data: message.data, blocks, finish })
    }

    /// Whether the message begins a chunk, and which.
    fn begins(&self, message: &v1::WriteRequest) -> Result<Option<Begin>> {
        let Some(wire) = message.chunk.as_ref() else { return Ok(None) };
        let chunk = chunk_id(Some(wire))?;
        match (&self.current, self.sender) {
            // Naming the chunk again in later messages is fine for a client that always fills it in.
            (Some(current), Sender::Client) if current.begin.chunk == chunk => return Ok(None),
            (Some(current), Sender::Client) => {
                return Err(Error::invalid(format!(
                    "chunk {chunk} begins before chunk {} was finished",
                    current.begin.chunk
                )));
            }
            _ => {}
        }
        if message.group_id == 0 || message.epoch == 0 {
            return Err(Error::invalid(format!("chunk {chunk}: its first message lacks group_id or epoch")));
        }
        Ok(Some(Begin { chunk, group: GroupId(message.group_id), epoch: Epoch(message.epoch) }))
    }
}

impl Current {
    fn finish(&self, finish: v1::WriteFinish) -> Result<Finish> {
        let chunk = self.begin.chunk;
        chunk_length(finish.length)?;
        if finish.length != self.next {
            return Err(Error::invalid(format!(
                "chunk {chunk}: {} bytes arrived, its finish says {}",
                self.next, finish.length
            )));
        }
        let checksum = match (finish.checksum, self.computed.as_ref()) {
            (Some(checksum), _) => checksum,
            (None, Some(computed)) => computed.value(),
            (None, None) => {
                return Err(Error::invalid(format!(
                    "chunk {chunk}: its finish lacks the checksum, which only writers without block checksums may \
                     leave out"
                )));
            }
        };
        Ok(Finish { length: finish.length, checksum, computed_here: self.computed.is_some() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_proto::{Reason, checksum::crc64};

    fn first(data: &[u8], sums: bool) -> v1::WriteRequest {
        let chunk = ChunkId::new(1, 2);
        v1::WriteRequest {
            chunk: Some(chunk.into()),
            group_id: 3,
            epoch: 4,
            block_checksums: if sums { block_checksums(chunk, 0, data) } else { vec![] },
            data: Bytes::copy_from_slice(data),
            ..Default::default()
        }
    }

    fn next(offset: u64, data: &[u8]) -> v1::WriteRequest {
        let chunk = ChunkId::new(1, 2);
        let block_checksums = block_checksums(chunk, (offset / 4096) as u32, data);
        v1::WriteRequest { offset, block_checksums, data: Bytes::copy_from_slice(data), ..Default::default() }
    }

    fn finish(length: u64, checksum: Option<u64>) -> Option<v1::WriteFinish> {
        Some(v1::WriteFinish { length, checksum })
    }

    #[test]
    fn several_chunks_follow_each_other() {
        let mut ingest = Ingest::new(Sender::Client);
        for _ in 0..2 {
            let part = ingest.take(first(&[1; 4096], true)).unwrap();
            assert_eq!(part.begin.unwrap().epoch, Epoch(4));
            let last = v1::WriteRequest { finish: finish(4100, Some(9)), ..next(4096, &[2; 4]) };
            let part = ingest.take(last).unwrap();
            assert_eq!(part.finish.unwrap(), Finish { length: 4100, checksum: 9, computed_here: false });
            assert!(ingest.is_idle());
        }
    }

    #[test]
    fn checksums_that_are_left_out_are_computed() {
        let mut ingest = Ingest::new(Sender::Client);
        let message = v1::WriteRequest { finish: finish(5, None), ..first(b"hello", false) };
        let part = ingest.take(message.clone()).unwrap();
        assert_eq!(part.blocks, block_checksums(ChunkId::new(1, 2), 0, b"hello"));
        assert_eq!(
            part.finish.unwrap(),
            Finish { length: 5, checksum: crc64(b"hello"), computed_here: true }
        );
        assert_eq!(Ingest::new(Sender::Primary).take(message).unwrap_err().reason, Reason::InvalidArgument);
    }

    #[test]
    fn what_does_not_fit_is_refused_and_given_up() {
        let whole = [7; 8192];
        let cases: Vec<(&str, v1::WriteRequest, Reason)> = vec![
            ("gap", next(12288, &[1]), Reason::InvalidArgument),
            ("again", next(0, &[1]), Reason::InvalidArgument),
            ("nothing", next(8192, &[]), Reason::InvalidArgument),
            ("too much", next(8192, &vec![0; DATA_BYTES_MAX + 1]), Reason::LimitExceeded),
            (
                "fewer checksums",
                v1::WriteRequest { block_checksums: vec![], ..next(8192, &[1]) },
                Reason::InvalidArgument,
            ),
            (
                "length",
                v1::WriteRequest { finish: finish(8192, Some(1)), ..next(8192, &[1]) },
                Reason::InvalidArgument,
            ),
            (
                "no checksum",
                v1::WriteRequest { finish: finish(8193, None), ..next(8192, &[1]) },
                Reason::InvalidArgument,
            ),
            (
                "another",
                v1::WriteRequest { chunk: Some(ChunkId::new(1, 3).into()), ..first(&[1], true) },
                Reason::InvalidArgument,
            ),
        ];
        for (name, message, reason) in cases {
            let mut ingest = Ingest::new(Sender::Client);
            ingest.take(first(&whole, true)).unwrap();
            assert_eq!(ingest.take(message).unwrap_err().reason, reason, "{name}");
            assert!(ingest.is_idle(), "{name}");
        }
    }

    #[test]
    fn nothing_follows_a_short_block_and_no_chunk_is_empty() {
        let mut ingest = Ingest::new(Sender::Client);
        ingest.take(first(&[1; 5], true)).unwrap();
        assert_eq!(ingest.take(next(5, &[1])).unwrap_err().reason, Reason::InvalidArgument);
        let empty = v1::WriteRequest { finish: finish(0, Some(0)), ..first(&[], true) };
        assert_eq!(ingest.take(empty).unwrap_err().reason, Reason::LimitExceeded);
        let nameless = v1::WriteRequest { epoch: 0, ..first(&[1], true) };
        assert_eq!(ingest.take(nameless).unwrap_err().reason, Reason::InvalidArgument);
    }

    #[test]
    fn a_chunk_ends_at_its_limit() {
        let mut ingest = Ingest::new(Sender::Client);
        let data = vec![0; DATA_BYTES_MAX];
        ingest.take(first(&data, false)).unwrap();
        let mut offset = DATA_BYTES_MAX as u64;
        let message = |offset| v1::WriteRequest { offset, data: data.clone().into(), ..Default::default() };
        while offset < CHUNK_BYTES_MAX {
            ingest.take(message(offset)).unwrap();
            offset += DATA_BYTES_MAX as u64;
        }
        assert_eq!(ingest.take(message(offset)).unwrap_err().reason, Reason::LimitExceeded);
    }

    #[test]
    fn a_primary_gives_up_by_beginning_anew() {
        let mut ingest = Ingest::new(Sender::Primary);
        ingest.take(first(&[1; 4096], true)).unwrap();
        assert!(ingest.take(first(&[1; 4096], true)).unwrap().begin.is_some());
        let part = ingest.take(v1::WriteRequest {
            finish: finish(4096, Some(1)),
            offset: 4096,
            ..Default::default()
        });
        assert!(part.unwrap().data.is_empty());
    }
}
