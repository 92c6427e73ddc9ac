//! The file that says what a store is: written durably, whole, and seldom.
//!
//! ```text
//! magic          8 bytes "CAIRNDIR"
//! version        u8, 1; any other is refused
//! state          u8: 0 incomplete, 1 complete
//! generation     u64 little endian
//! journal after  u64 little endian: the journal holds every plan behind this revision
//! cluster id     u16 little endian length, UTF-8
//! checksum       u64 little endian, CRC-64/NVME of everything before
//! ```

use bytes::{Buf, BufMut, Bytes};
use cairn_proto::{
    Error, Reason, Result,
    checksum::crc64,
    id::{Generation, Revision},
};
use disk::{Disk, durable};
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 8] = b"CAIRNDIR";
const VERSION: u8 = 1;
const FILE_BYTES_MAX: usize = 4_096;
/// Longest name of a cluster.
pub const CLUSTER_ID_BYTES_MAX: usize = 255;

/// Whose store it is, and which of its lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreIdentity {
    /// Names the cluster, for good; at most [`CLUSTER_ID_BYTES_MAX`] bytes.
    pub cluster_id: String,
    /// Grows with each rebuild, restore or migration.
    pub generation: Generation,
}

impl StoreIdentity {
    /// Names the index of this store.
    pub(super) fn label(&self) -> Bytes {
        let mut label = self.generation.0.to_le_bytes().to_vec();
        label.extend_from_slice(self.cluster_id.as_bytes());
        label.into()
    }

    /// Names the journal of this store.
    pub(super) fn log_id(&self) -> u128 {
        u128::from(crc64(self.cluster_id.as_bytes())) << 64 | u128::from(self.generation.0)
    }
}

/// What the file says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Meta {
    pub(super) identity: StoreIdentity,
    /// Whether it was filled to its end.
    pub(super) complete: bool,
    /// The journal holds every plan behind this revision.
    pub(super) journal_after: Revision,
}

pub(super) fn path(dir: &Path) -> PathBuf {
    dir.join("store.meta")
}

impl Meta {
    /// What the file of a directory says; `None` when there is none.
    pub(super) async fn read(disk: &dyn Disk, dir: &Path) -> Result<Option<Self>> {
        let path = path(dir);
        let bytes = match durable::read_file(disk, &path, FILE_BYTES_MAX).await {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return Ok(None),
            Err(error) if error.kind() == std::io::ErrorKind::InvalidData => return Err(damaged(&path)),
            Err(error) => return Err(error.into()),
        };
        if bytes.len() > MAGIC.len() && bytes.starts_with(MAGIC) && bytes[MAGIC.len()] != VERSION {
            return Err(Error::new(
                Reason::NotSupported,
                format!(
                    "{} has version {}, this program knows {VERSION}: use a newer one",
                    path.display(),
                    bytes[MAGIC.len()]
                ),
            ));
        }
        Self::decode(bytes).ok_or_else(|| damaged(&path)).map(Some)
    }

    /// Makes it what the file says.
    pub(super) async fn write(&self, disk: &dyn Disk, dir: &Path) -> Result<()> {
        Ok(durable::write_file_durable(disk, &path(dir), self.encode()).await?)
    }

    fn encode(&self) -> Bytes {
        let mut out = Vec::new();
        out.put_slice(MAGIC);
        out.put_u8(VERSION);
        out.put_u8(u8::from(self.complete));
        out.put_u64_le(self.identity.generation.0);
        out.put_u64_le(self.journal_after.0);
        out.put_u16_le(self.identity.cluster_id.len() as u16);
        out.put_slice(self.identity.cluster_id.as_bytes());
        let checksum = crc64(&out);
        out.put_u64_le(checksum);
        out.into()
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
        let state = rest.try_get_u8().ok()?;
        let generation = Generation(rest.try_get_u64_le().ok()?);
        let journal_after = Revision(rest.try_get_u64_le().ok()?);
        let length = rest.try_get_u16_le().ok()?;
        if state > 1 || rest.len() != usize::from(length) {
            return None;
        }
        let cluster_id = String::from_utf8(rest.to_vec()).ok()?;
        Some(Self { identity: StoreIdentity { cluster_id, generation }, complete: state == 1, journal_after })
    }
}

fn damaged(path: &Path) -> Error {
    Error::new(
        Reason::Io,
        format!(
            "{} is damaged: restore the directory's store from a backup, or move it away and rebuild it from the \
             file servers",
            path.display()
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn meta() -> Meta {
        let identity = StoreIdentity { cluster_id: "c1".into(), generation: Generation(3) };
        Meta { identity, complete: true, journal_after: Revision(77) }
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let bytes = meta().encode();
        assert_eq!(Meta::decode(bytes.clone()), Some(meta()));
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.to_vec();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Meta::decode(damaged.into()), None, "bit {bit}");
        }
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let mut body = [&MAGIC[..], &bytes].concat();
            let checksum = crc64(&body);
            body.put_u64_le(checksum);
            let _ = Meta::decode(bytes.into());
            let _ = Meta::decode(body.into());
        }
    }
}
