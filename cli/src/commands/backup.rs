//! `backup` and `restore` of the directory's records.
//!
//! ```text
//! DIR/directory.backup      a whole, verified backup (the form is that of `cairn_proto::checkpoint`)
//! DIR/directory.backup.tmp  one that is arriving, or was interrupted: the next one begins anew
//! ```

use crate::{
    args::{Backup, Restore, Shared},
    connect,
    failure::Failure,
    json,
    output::{Out, size},
};
use cairn_proto::{
    Error, Reason,
    checkpoint::{self, EntrySum, FRAME_BYTES, Head, Part, Tail},
    v1,
};
use cluster::BACKUP_FILE;
use futures::{Stream, StreamExt as _};
use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::{
    fs,
    io::{AsyncReadExt as _, AsyncWriteExt as _, BufWriter},
};

/// Longest silence of a directory in the middle of a backup.
const SILENCE: Duration = Duration::from_secs(60);
const WRITE_BYTES: usize = 1024 * 1024;

/// Copies all records of the directory into a folder.
pub async fn backup(shared: &Shared, backup: Backup) -> Result<(), Failure> {
    let file = backup.folder.join(BACKUP_FILE);
    let temporary = backup.folder.join(format!("{BACKUP_FILE}.tmp"));
    let before = prepare(&backup.folder).await?;
    let client = connect::plain(shared).await?;
    let parts = client.backup().await.map_err(Failure::at(""))?;
    let (head, sum, bytes) = receive(parts, &temporary, before.as_ref()).await?;
    fs::rename(&temporary, &file).await.map_err(Failure::local(&file))?;
    sync_folder(&backup.folder).await?;
    let mut out = Out::new();
    let shown = json::Backup {
        cluster_id: head.cluster_id,
        generation: head.generation,
        revision: head.revision,
        records: sum.count(),
        bytes,
        file: file.display().to_string(),
    };
    if shared.json {
        out.json(&shown)?;
    } else {
        out.line(&format!(
            "backed up {} records at revision {} of generation {}: {} in {}",
            shown.records,
            shown.revision,
            shown.generation,
            size(shown.bytes),
            shown.file
        ))?;
    }
    out.finish()
}

/// Makes the folder, or checks that it holds nothing but backups; answers what the one in it is of.
async fn prepare(folder: &Path) -> Result<Option<Head>, Failure> {
    fs::create_dir_all(folder).await.map_err(Failure::local(folder))?;
    let mut entries = fs::read_dir(folder).await.map_err(Failure::local(folder))?;
    while let Some(entry) = entries.next_entry().await.map_err(Failure::local(folder))? {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name != BACKUP_FILE && name.strip_suffix(".tmp") != Some(BACKUP_FILE) {
            let why = format!("is not a folder of backups, it has '{name}': give an empty one");
            return Err(Failure::local(folder)(io::Error::other(why)));
        }
    }
    head(&folder.join(BACKUP_FILE)).await
}

/// What a backup is of; `None` when there is none. A damaged one may be replaced.
async fn head(file: &Path) -> Result<Option<Head>, Failure> {
    let mut opened = match fs::File::open(file).await {
        Ok(opened) => opened,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Failure::local(file)(error)),
    };
    let mut frame = [0; FRAME_BYTES];
    if opened.read_exact(&mut frame).await.is_err() {
        return Ok(None);
    }
    let Some(length) = checkpoint::payload_bytes(&frame) else { return Ok(None) };
    let mut payload = vec![0; length];
    if opened.read_exact(&mut payload).await.is_err() {
        return Ok(None);
    }
    match checkpoint::decode(&frame, payload.into()) {
        Ok(Some(Part::Head(head))) => Ok(Some(head)),
        _ => Ok(None),
    }
}

/// Writes what arrives, verified and durable.
async fn receive(
    parts: impl Stream<Item = Result<v1::BackupResponse, Error>>,
    path: &Path,
    before: Option<&Head>,
) -> Result<(Head, EntrySum, u64), Failure> {
    let mut parts = std::pin::pin!(parts);
    let mut file = Writer {
        file: BufWriter::with_capacity(WRITE_BYTES, create(path).await?),
        path: path.to_owned(),
        bytes: 0,
    };
    let mut head: Option<Head> = None;
    let mut sum = EntrySum::default();
    loop {
        let next = tokio::time::timeout(SILENCE, parts.next()).await;
        let silent = |_| Error::unavailable("the backup stopped arriving: begin it anew");
        let part = next.map_err(silent).map_err(Failure::at(""))?;
        let part = match part {
            Some(part) => part,
            None => Err(Error::unavailable("the backup ended before it was whole: begin it anew")),
        };
        let part = part.map_err(Failure::at(""))?;
        if head.is_none() {
            let first = Head {
                cluster_id: part.cluster_id.clone(),
                generation: part.generation,
                revision: part.revision,
                carrier_ids: part.carrier_ids.clone(),
                ..Head::default()
            };
            if let Some(before) = before.filter(|before| before.cluster_id != first.cluster_id) {
                return Err(Failure::usage(format!(
                    "the folder has a backup of cluster {}, this is cluster {}: give each its own",
                    before.cluster_id, first.cluster_id
                )));
            }
            file.part(Part::Head(first.clone())).await?;
            head = Some(first);
        }
        part.entries.iter().for_each(|entry| sum.add(entry));
        if !part.entries.is_empty() {
            file.part(Part::Entries(part.entries)).await?;
        }
        let Some(entry_count) = part.entry_count else { continue };
        let tail = Tail { entry_count, checksum: Some(part.checksum) };
        if !sum.is_of(&tail) {
            let why = "what arrived is not what the directory sent: begin the backup anew";
            return Err(Failure::at("")(Error::new(Reason::ChecksumMismatch, why)));
        }
        file.part(Part::Tail(tail)).await?;
        let bytes = file.finish().await?;
        return Ok((head.unwrap_or_default(), sum, bytes));
    }
}

async fn create(path: &Path) -> Result<fs::File, Failure> {
    fs::File::create(path).await.map_err(Failure::local(path))
}

struct Writer {
    file: BufWriter<fs::File>,
    path: PathBuf,
    bytes: u64,
}

impl Writer {
    async fn part(&mut self, part: Part) -> Result<(), Failure> {
        for bytes in checkpoint::encode(part).map_err(Failure::at(""))? {
            self.file.write_all(&bytes).await.map_err(Failure::local(&self.path))?;
            self.bytes += bytes.len() as u64;
        }
        Ok(())
    }

    async fn finish(mut self) -> Result<u64, Failure> {
        self.file.flush().await.map_err(Failure::local(&self.path))?;
        self.file.into_inner().sync_all().await.map_err(Failure::local(&self.path))?;
        Ok(self.bytes)
    }
}

async fn sync_folder(folder: &Path) -> Result<(), Failure> {
    let opened = fs::File::open(folder).await.map_err(Failure::local(folder))?;
    opened.sync_all().await.map_err(Failure::local(folder))
}

/// Makes a directory's data folder from a backup.
pub async fn restore(shared: &Shared, restore: Restore) -> Result<(), Failure> {
    let restored =
        cluster::restore(&restore.backup, &restore.data, restore.above).await.map_err(Failure::at(""))?;
    let mut out = Out::new();
    if shared.json {
        out.json(&json::Restored {
            cluster_id: restored.cluster_id,
            backup_generation: restored.backup_generation,
            revision: restored.revision,
            records: restored.entries,
            generation: restored.generation,
        })?;
        return out.finish();
    }
    out.line(&format!(
        "restored {} records of cluster {} at revision {} of generation {}, as generation {}",
        restored.entries,
        restored.cluster_id,
        restored.revision,
        restored.backup_generation,
        restored.generation
    ))?;
    out.line(&format!(
        "Start the directory on {} at its address. What was committed after the backup is not in it: its chunks are \
         kept on the file servers and listed as quarantined. `cairn status` tells what of the backup is gone since.",
        restore.data.display()
    ))?;
    out.finish()
}
