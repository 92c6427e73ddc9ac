//! Receives a chunk: in memory while it is small, into a file of its own from then on.

use super::files::PartFile;
use super::format::{ChunkHeader, table_checksum};
use super::shared::Ticket;
use super::*;

#[derive(Debug)]
pub(super) struct DiskWriter {
    shared: Arc<Shared>,
    ticket: Ticket,
    group: GroupId,
    intake: Intake,
    room: Room,
}

/// Where the bytes go.
#[derive(Debug)]
enum Room {
    /// Held in memory, at most [`SMALL_BYTES_MAX`].
    Memory(Vec<Bytes>),
    File(PartFile),
}

/// The header of a chunk that has arrived.
pub(super) fn header(intake: &Intake, group: GroupId, checksum: u64, computed_here: bool) -> ChunkHeader {
    ChunkHeader {
        chunk: intake.chunk(),
        group,
        // At most 64 MiB: the intake took care.
        length: intake.length() as u32,
        checksum,
        computed_here,
        table_checksum: table_checksum(intake.blocks()),
    }
}

impl DiskWriter {
    pub(super) async fn begin(
        shared: Arc<Shared>,
        chunk: ChunkId,
        group: GroupId,
        length_hint: Option<u64>,
    ) -> Result<Self> {
        shared.check_open()?;
        let intake = Intake::new(chunk, length_hint)?;
        let ticket = shared.ticket(chunk);
        let large = length_hint.filter(|length| *length > SMALL_BYTES_MAX as u64);
        let room = match large {
            Some(length) => Room::File(create(&shared, chunk, Some(length as u32)).await?),
            None => Room::Memory(Vec::new()),
        };
        Ok(Self { shared, ticket, group, intake, room })
    }
}

async fn create(shared: &Shared, chunk: ChunkId, length: Option<u32>) -> Result<PartFile> {
    let space = shared.refresh_space().await.map_err(|error| shared.disk_error(error))?;
    let wanted = shared.config.reserve_bytes.saturating_add(length.map_or(0, u64::from));
    if space.free_bytes < wanted {
        let why = format!("{} bytes free, {wanted} wanted with the reserve", space.free_bytes);
        return Err(shared.no_space(&why));
    }
    shared.files.create(chunk, length).await.map_err(|error| shared.disk_error(error))
}

#[async_trait]
impl ChunkWriter for DiskWriter {
    async fn append(&mut self, data: Bytes, blocks: Vec<u64>) -> Result<()> {
        self.intake.take(&data, &blocks)?;
        let shared = &self.shared;
        match &mut self.room {
            Room::File(file) => file.append(vec![data]).await.map_err(|error| shared.disk_error(error)),
            Room::Memory(parts) if self.intake.length() <= SMALL_BYTES_MAX as u64 => {
                parts.push(data);
                Ok(())
            }
            Room::Memory(parts) => {
                parts.push(data);
                let mut file = create(shared, self.intake.chunk(), None).await?;
                file.append(std::mem::take(parts)).await.map_err(|error| shared.disk_error(error))?;
                self.room = Room::File(file);
                Ok(())
            }
        }
    }

    async fn seal(self: Box<Self>, length: u64, checksum: u64, computed_here: bool) -> Result<ChunkInfo> {
        let Self { shared, ticket, group, intake, room } = *self;
        intake.finish(length, checksum)?;
        shared.check_open()?;
        let header = header(&intake, group, checksum, computed_here);
        let blocks = intake.blocks().to_vec();
        match room {
            // Its length was overestimated; a kind of place for each length keeps a chunk from having two.
            Room::File(file) if length <= SMALL_BYTES_MAX as u64 => {
                let data = file.read_back().await.map_err(|error| shared.disk_error(error))?;
                shared.put_record(header, blocks, vec![data], Some(ticket)).await
            }
            Room::File(file) => shared.put_file(header, blocks, file, ticket).await,
            Room::Memory(parts) => shared.put_record(header, blocks, parts, Some(ticket)).await,
        }
    }
}
