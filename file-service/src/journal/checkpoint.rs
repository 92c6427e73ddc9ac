//! A checkpoint of the directory's store as one file ([`cairn_proto::checkpoint`]), written and read in frames so that
//! memory stays bounded.

use cairn_proto::{
    Error, Reason, Result,
    checkpoint::{self, FRAME_BYTES, Part, Tail},
    v1,
};
use disk::{Disk, DiskFile, Open};
use std::{path::Path, sync::Arc};

pub(super) use cairn_proto::checkpoint::Head;

/// Writes a checkpoint under a temporary name. Nothing counts before [`Writer::finish`].
#[derive(Debug)]
pub(super) struct Writer {
    file: Arc<dyn DiskFile>,
    offset: u64,
    entry_count: u64,
}

impl Writer {
    pub(super) async fn create(disk: &dyn Disk, path: &Path, head: Head) -> Result<Self> {
        let file = disk.open(path, Open::Create).await?;
        file.set_len(0).await?;
        let mut writer = Self { file, offset: 0, entry_count: 0 };
        writer.frame(Part::Head(head)).await?;
        Ok(writer)
    }

    pub(super) async fn entries(&mut self, entries: Vec<v1::CheckpointEntry>) -> Result<()> {
        if entries.is_empty() {
            return Ok(());
        }
        self.entry_count += entries.len() as u64;
        self.frame(Part::Entries(entries)).await
    }

    /// Ends the file and makes its content durable; its name is the caller's.
    pub(super) async fn finish(mut self, entry_count: u64) -> Result<()> {
        if entry_count != self.entry_count {
            return Err(Error::invalid(format!(
                "{} entries of the checkpoint arrived, {entry_count} were announced: send it again",
                self.entry_count
            )));
        }
        self.frame(Part::Tail(Tail { entry_count, checksum: None })).await?;
        Ok(self.file.sync().await?)
    }

    async fn frame(&mut self, part: Part) -> Result<()> {
        let frame = checkpoint::encode(part)?;
        let bytes = frame.iter().map(|part| part.len() as u64).sum::<u64>();
        self.file.write_at(self.offset, frame.into()).await?;
        self.offset += bytes;
        Ok(())
    }
}

/// Reads a checkpoint frame by frame.
#[derive(Debug)]
pub(super) struct Reader {
    file: Arc<dyn DiskFile>,
    name: String,
    offset: u64,
    entry_count: u64,
}

impl Reader {
    /// Opens a checkpoint and reads its head.
    ///
    /// # Errors
    /// `IO` when it is damaged or of another version.
    pub(super) async fn open(disk: &dyn Disk, path: &Path) -> Result<(Self, Head)> {
        let file = disk.open(path, Open::Read).await?;
        let mut reader = Self { file, name: path.display().to_string(), offset: 0, entry_count: 0 };
        match reader.frame().await? {
            Part::Head(head) => Ok((reader, head)),
            _ => Err(reader.damaged()),
        }
    }

    /// The next entries; `None` behind the last ones.
    ///
    /// # Errors
    /// `IO` when the file is damaged.
    pub(super) async fn entries(&mut self) -> Result<Option<Vec<v1::CheckpointEntry>>> {
        match self.frame().await? {
            Part::Entries(entries) => {
                self.entry_count += entries.len() as u64;
                Ok(Some(entries))
            }
            Part::Tail(tail) if tail.entry_count == self.entry_count => Ok(None),
            Part::Head(_) | Part::Tail(_) => Err(self.damaged()),
        }
    }

    async fn frame(&mut self) -> Result<Part> {
        let head = self.file.read_at(self.offset, FRAME_BYTES).await?;
        let length = checkpoint::payload_bytes(&head).ok_or_else(|| self.damaged())?;
        let payload = self.file.read_at(self.offset + FRAME_BYTES as u64, length).await?;
        let part = checkpoint::decode(&head, payload)?.ok_or_else(|| self.damaged())?;
        self.offset += (FRAME_BYTES + length) as u64;
        Ok(part)
    }

    fn damaged(&self) -> Error {
        Error::new(Reason::Io, format!("the checkpoint '{}' is damaged near byte {}", self.name, self.offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use disk::SimDisk;

    #[tokio::test]
    async fn any_flipped_bit_and_any_cut_is_found() {
        let disk = SimDisk::new(1, 1 << 20);
        let path = Path::new("c");
        let head = Head { cluster_id: "x".into(), generation: 2, revision: 3, ..Default::default() };
        let mut writer = Writer::create(&disk, path, head.clone()).await.unwrap();
        let entry =
            |key: &'static str| v1::CheckpointEntry { key: key.into(), value: "v".into(), revision: 1 };
        writer.entries(vec![entry("a"), entry("b")]).await.unwrap();
        writer.entries(vec![entry("c")]).await.unwrap();
        writer.finish(3).await.unwrap();

        async fn read(disk: &SimDisk) -> Result<(Head, usize)> {
            let (mut reader, head) = Reader::open(disk, Path::new("c")).await?;
            let mut count = 0;
            while let Some(entries) = reader.entries().await? {
                count += entries.len();
            }
            Ok((head, count))
        }
        assert_eq!(read(&disk).await.unwrap(), (Head { version: checkpoint::VERSION, ..head }, 3));
        let length = disk.open(path, Open::Read).await.unwrap().len().await.unwrap();
        for bit in 0..length * 8 {
            let copy = disk.clone_disk();
            copy.flip_bit(path, bit / 8, (bit % 8) as u8).unwrap();
            assert!(read(&copy).await.is_err(), "bit {bit}");
        }
        for cut in 0..length {
            let copy = disk.clone_disk();
            copy.open(path, Open::ReadWrite).await.unwrap().set_len(cut).await.unwrap();
            assert!(read(&copy).await.is_err(), "cut at {cut}");
        }
    }

    #[tokio::test]
    async fn a_wrong_count_is_refused() {
        let disk = SimDisk::new(1, 1 << 20);
        let writer = Writer::create(&disk, Path::new("c"), Head::default()).await.unwrap();
        assert_eq!(writer.finish(1).await.unwrap_err().reason, Reason::InvalidArgument);
    }
}
