//! The record that says whose store lives under a prefix, and which of its lives.
//!
//! ```text
//! magic       8 bytes "CAIRNETC"
//! version     u8, 1; any other is refused
//! state       u8: 0 is being filled, 1 complete, 2 being moved away, 3 moved away
//! generation  u64 little endian
//! start       u64 little endian: the store's revision when this record was written
//! cluster id  u16 little endian length, UTF-8
//! checksum    u64 little endian, CRC-64/NVME of everything before
//! ```

use crate::store::{CLUSTER_ID_BYTES_MAX, StoreIdentity};
use bytes::{Buf, BufMut, Bytes};
use cairn_proto::{
    Error, Reason, Result,
    checksum::crc64,
    id::{Generation, Revision},
};

const MAGIC: &[u8; 8] = b"CAIRNETC";
const VERSION: u8 = 1;

/// What may be done with a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// It was not filled to its end.
    Filling,
    /// A directory may serve it.
    Complete,
    /// Moving it elsewhere was begun.
    Moving,
    /// It was moved elsewhere.
    Moved,
}

/// What the record says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) store: StoreIdentity,
    pub(super) state: State,
    /// The store's revision when the record was written.
    pub(super) start: Revision,
}

impl Identity {
    /// Checks what a caller wants to write.
    pub(super) fn check(&self) -> Result<()> {
        match self.store.cluster_id.len() {
            1..=CLUSTER_ID_BYTES_MAX => Ok(()),
            _ => Err(Error::invalid(format!("a cluster's id has 1 to {CLUSTER_ID_BYTES_MAX} bytes"))),
        }
    }

    pub(super) fn encode(&self) -> Bytes {
        let mut out = Vec::new();
        out.put_slice(MAGIC);
        out.put_u8(VERSION);
        out.put_u8(match self.state {
            State::Filling => 0,
            State::Complete => 1,
            State::Moving => 2,
            State::Moved => 3,
        });
        out.put_u64_le(self.store.generation.0);
        out.put_u64_le(self.start.0);
        out.put_u16_le(self.store.cluster_id.len() as u16);
        out.put_slice(self.store.cluster_id.as_bytes());
        let checksum = crc64(&out);
        out.put_u64_le(checksum);
        out.into()
    }

    /// Reads the record at `key`.
    pub(super) fn read(bytes: &Bytes, key: &str) -> Result<Self> {
        if bytes.len() > MAGIC.len() && bytes.starts_with(MAGIC) && bytes[MAGIC.len()] != VERSION {
            let version = bytes[MAGIC.len()];
            return Err(Error::new(
                Reason::NotSupported,
                format!(
                    "the record {key} in etcd has version {version}, this program knows {VERSION}: use a newer one"
                ),
            ));
        }
        Self::decode(bytes.clone()).ok_or_else(|| {
            let what = "restore etcd from a snapshot, or use another prefix";
            Error::new(
                Reason::Io,
                format!("the record {key} in etcd is damaged, or another program's: {what}"),
            )
        })
    }

    fn decode(bytes: Bytes) -> Option<Self> {
        let body = bytes.len().checked_sub(8)?;
        let checksum = u64::from_le_bytes(bytes[body..].try_into().ok()?);
        let mut rest = bytes.slice(..body);
        if crc64(&rest) != checksum || !rest.starts_with(MAGIC) {
            return None;
        }
        rest.advance(MAGIC.len());
        if rest.try_get_u8().ok()? != VERSION {
            return None;
        }
        let state = match rest.try_get_u8().ok()? {
            0 => State::Filling,
            1 => State::Complete,
            2 => State::Moving,
            3 => State::Moved,
            _ => return None,
        };
        let generation = Generation(rest.try_get_u64_le().ok()?);
        let start = Revision(rest.try_get_u64_le().ok()?);
        let length = rest.try_get_u16_le().ok()?;
        // Revisions are etcd's, shifted by this: both fit into its signed ones.
        if rest.len() != usize::from(length) || start.0 > i64::MAX as u64 / 2 {
            return None;
        }
        let cluster_id = String::from_utf8(rest.to_vec()).ok()?;
        Some(Self { store: StoreIdentity { cluster_id, generation }, state, start })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn identity() -> Identity {
        let store = StoreIdentity { cluster_id: "c1".into(), generation: Generation(3) };
        Identity { store, state: State::Complete, start: Revision(77) }
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let bytes = identity().encode();
        assert_eq!(Identity::read(&bytes, "k").unwrap(), identity());
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.to_vec();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(Identity::read(&damaged.into(), "k").is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_newer_version_is_told_from_damage() {
        let mut bytes = identity().encode().to_vec();
        bytes[MAGIC.len()] = VERSION + 1;
        assert_eq!(Identity::read(&bytes.into(), "k").unwrap_err().reason, Reason::NotSupported);
        assert_eq!(Identity::read(&Bytes::new(), "k").unwrap_err().reason, Reason::Io);
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let mut body = [&MAGIC[..], &bytes].concat();
            let checksum = crc64(&body);
            body.put_u64_le(checksum);
            let _ = Identity::read(&bytes.into(), "k");
            let _ = Identity::read(&body.into(), "k");
        }
    }
}
