//! Buffers that large reads share: memory that is fresh for each read costs more than the copy into it (page faults,
//! clearing, giving it back), and a buffer that was just used is still in the processor's cache.

use bytes::Bytes;
use parking_lot::Mutex;
use std::sync::{Arc, Weak};

/// Size of a buffer: what fits the second level of a processor's cache.
pub(super) const BUFFER_BYTES: usize = 256 * 1024;
/// Buffers that wait for their next use: at most 8 MiB. More are given back.
const IDLE_MAX: usize = 32;

/// Buffers of [`BUFFER_BYTES`]. How many are in use, those who read bound.
#[derive(Debug, Default)]
pub(super) struct Pool {
    idle: Mutex<Vec<Vec<u8>>>,
}

impl Pool {
    /// A buffer for a read of `len` bytes, if it is as long as one: who reads less counts on holding no more.
    pub(super) fn take(self: &Arc<Self>, len: usize) -> Option<Buffer> {
        if len != BUFFER_BYTES {
            return None;
        }
        let bytes = self.idle.lock().pop().unwrap_or_else(|| vec![0; BUFFER_BYTES]);
        Some(Buffer { bytes, len, pool: Arc::downgrade(self) })
    }

    #[cfg(test)]
    fn idle(&self) -> usize {
        self.idle.lock().len()
    }
}

/// A buffer in use. Its bytes are those of an earlier read until they are overwritten. Dropping it gives it back.
#[derive(Debug)]
pub(super) struct Buffer {
    bytes: Vec<u8>,
    len: usize,
    pool: Weak<Pool>,
}

impl Buffer {
    /// The part that is read into.
    pub(super) fn space(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.len]
    }

    /// The first `got` bytes, which were read.
    pub(super) fn filled(mut self, got: usize) -> Bytes {
        self.len = self.len.min(got);
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let Some(pool) = self.pool.upgrade() else { return };
        let mut idle = pool.idle.lock();
        if idle.len() < IDLE_MAX {
            idle.push(std::mem::take(&mut self.bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_used_again_when_nobody_holds_a_part_of_them() {
        let pool = Arc::new(Pool::default());
        let mut buffer = pool.take(BUFFER_BYTES).unwrap();
        buffer.space().fill(7);
        let at = buffer.space().as_ptr();
        let bytes = buffer.filled(90_000);
        assert_eq!((bytes.len(), bytes.as_ptr()), (90_000, at), "what was read, where it was read");
        let part = bytes.slice(80_000..);
        drop(bytes);
        assert_eq!(pool.idle(), 0, "a part is held");
        let mut other = pool.take(BUFFER_BYTES).unwrap();
        other.space().fill(8);
        assert!(part.iter().all(|&byte| byte == 7));
        drop(part);
        assert_eq!(pool.idle(), 1);
        assert_eq!(pool.take(BUFFER_BYTES).unwrap().space().as_ptr(), at);
    }

    #[test]
    fn few_buffers_wait_and_other_sizes_are_left_to_the_allocator() {
        let pool = Arc::new(Pool::default());
        let all: Vec<_> = (0..IDLE_MAX + 5).map(|_| pool.take(BUFFER_BYTES).unwrap()).collect();
        drop(all);
        assert_eq!(pool.idle(), IDLE_MAX);
        assert!(pool.take(BUFFER_BYTES - 1).is_none() && pool.take(BUFFER_BYTES + 1).is_none());
        let last = pool.take(BUFFER_BYTES).unwrap().filled(3);
        drop(pool);
        assert_eq!(last.len(), 3, "bytes outlive the pool");
    }
}
