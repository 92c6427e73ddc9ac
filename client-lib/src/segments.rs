//! Bytes in several buffers, handed on without copying.

use bytes::{Buf as _, Bytes};
use std::collections::VecDeque;

/// Zeros of holes are handed out in pieces of this.
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// A run of bytes that arrived in several buffers.
#[derive(Clone, Debug, Default)]
pub(crate) struct Segments {
    parts: VecDeque<Bytes>,
    length: u64,
}

impl Segments {
    pub fn len(&self) -> u64 {
        self.length
    }

    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    pub fn push(&mut self, bytes: Bytes) {
        if !bytes.is_empty() {
            self.length += bytes.len() as u64;
            self.parts.push_back(bytes);
        }
    }

    pub fn push_zeros(&mut self, mut count: u64) {
        while count > 0 {
            let step = count.min(ZEROS.len() as u64);
            self.push(Bytes::from_static(&ZEROS[..step as usize]));
            count -= step;
        }
    }

    pub fn append(&mut self, other: Segments) {
        self.length += other.length;
        self.parts.extend(other.parts);
    }

    /// The first buffer.
    pub fn pop(&mut self) -> Option<Bytes> {
        let bytes = self.parts.pop_front()?;
        self.length -= bytes.len() as u64;
        Some(bytes)
    }

    /// Moves up to `buffer.len()` bytes from the front into `buffer`.
    pub fn read(&mut self, buffer: &mut [u8]) -> usize {
        let mut done = 0;
        while done < buffer.len() {
            let Some(front) = self.parts.front_mut() else { break };
            let step = front.len().min(buffer.len() - done);
            buffer[done..done + step].copy_from_slice(&front[..step]);
            front.advance(step);
            if front.is_empty() {
                self.parts.pop_front();
            }
            done += step;
        }
        self.length -= done as u64;
        done
    }

    /// All of it in one buffer; copies only when there are several.
    pub fn into_bytes(mut self) -> Bytes {
        if self.parts.len() <= 1 {
            return self.parts.pop_front().unwrap_or_default();
        }
        let mut joined = Vec::with_capacity(self.length as usize);
        for part in self.parts {
            joined.extend_from_slice(&part);
        }
        joined.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_out_in_order_and_are_counted() {
        let mut segments = Segments::default();
        segments.push(Bytes::from_static(b"ab"));
        segments.push_zeros(70_000);
        segments.push(Bytes::new());
        segments.push(Bytes::from_static(b"cd"));
        assert_eq!(segments.len(), 70_004);
        let mut begin = [9; 3];
        assert_eq!(segments.read(&mut begin), 3);
        assert_eq!(&begin, b"ab\0");
        let rest = segments.into_bytes();
        assert_eq!(rest.len(), 70_001);
        assert!(rest.ends_with(b"\0cd"));
    }
}
