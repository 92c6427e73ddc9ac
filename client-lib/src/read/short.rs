//! Short ranges of chunks: many that are read from one file server at a time go in one call.

use crate::{
    retry::{named, restore},
    servers::ServerLink,
    together::{Asked, Together},
};
use cairn_proto::{Error, Reason, Result, net::framed, v1};
use futures::future::join_all;
use std::{sync::Arc, time::Duration};

/// Parts of a short range at most: it may lie across the bound of two.
const PARTS_MAX: usize = 2;
/// A call for short ranges that takes longer is given up. Who waits has asked another replica long before.
const PATIENCE: Duration = Duration::from_secs(5);

type Parts = Vec<v1::ReadResponse>;

/// The short reads from one file server.
pub(crate) type ShortReads = Together<v1::ReadRequest, Parts>;

impl ServerLink {
    /// The parts of a range of at most [`cairn_proto::limits::SHORT_READ_BYTES_MAX`], not verified yet. With other such
    /// reads under way it goes with them.
    ///
    /// # Errors
    /// As `FileService.Read`.
    pub async fn read_short(&self, read: v1::ReadRequest) -> Result<Parts> {
        let Some(link) = self.shared_link() else {
            return Err(Error::internal("a file server's link is used while it is dropped"));
        };
        self.reads.ask(read, move |asked| answer(link.clone(), asked)).await
    }
}

/// Makes one call for some reads, and answers them.
async fn answer(link: Arc<ServerLink>, asked: Vec<Asked<v1::ReadRequest, Parts>>) {
    let alone = match asked.len() {
        1 => asked,
        _ => {
            let mut call = Call::new(asked);
            let done = tokio::time::timeout(PATIENCE, call.run(&link)).await;
            let error = match done.unwrap_or_else(|_| Err(silent(&link))) {
                Ok(()) => Error::unavailable(format!("file server {} ended short reads early", link.name())),
                Err(error) => error,
            };
            let left = call.left();
            if error.reason != Reason::NotSupported {
                left.into_iter().for_each(|asked| asked.answer(Err(error.clone())));
                return;
            }
            // An older server.
            left
        }
    };
    join_all(alone.into_iter().map(|asked| async {
        let parts = tokio::time::timeout(PATIENCE, read_one(&link, asked.question)).await;
        asked.answer(parts.unwrap_or_else(|_| Err(silent(&link))));
    }))
    .await;
}

async fn read_one(link: &ServerLink, read: v1::ReadRequest) -> Result<Parts> {
    let failed = |status| restore(status, &link.name());
    let (mut client, _under_way) = link.shared()?;
    let request = framed::expecting(link.request(read));
    let mut answers = framed::incoming(client.read(request).await.map_err(failed)?);
    let mut parts = Vec::with_capacity(1);
    while !is_whole(&read, &parts)
        && let Some(part) = answers.message().await.map_err(failed)?
    {
        if parts.len() == PARTS_MAX {
            return Err(too_much(link));
        }
        parts.push(part);
    }
    Ok(parts)
}

/// Whether parts in order reach the end of what was asked for, or of the chunk. What they hold is verified later.
fn is_whole(read: &v1::ReadRequest, parts: &[v1::ReadResponse]) -> bool {
    parts.last().is_some_and(|part| {
        let reached = part.offset.saturating_add(part.data.len() as u64);
        reached >= read.offset.saturating_add(read.length).min(part.chunk_length)
    })
}

/// Several reads in one call: which are not answered yet, and what came of them.
struct Call(Vec<Option<(Asked<v1::ReadRequest, Parts>, Parts)>>);

impl Call {
    fn new(asked: Vec<Asked<v1::ReadRequest, Parts>>) -> Self {
        Self(asked.into_iter().map(|asked| Some((asked, Vec::with_capacity(1)))).collect())
    }

    fn left(self) -> Vec<Asked<v1::ReadRequest, Parts>> {
        self.0.into_iter().flatten().map(|(asked, _)| asked).collect()
    }

    /// Answers each read as soon as all of its parts are there.
    async fn run(&mut self, link: &ServerLink) -> Result<()> {
        let failed = |status| restore(status, &link.name());
        let (mut client, _under_way) = link.shared()?;
        let reads = self.0.iter().flatten().map(|(asked, _)| asked.question).collect();
        let request = framed::expecting(link.request(v1::ReadManyRequest { reads }));
        let mut answers = framed::incoming(client.read_many(request).await.map_err(failed)?);
        while let Some(answer) = answers.message().await.map_err(failed)? {
            self.take(link, answer);
        }
        Ok(())
    }

    fn take(&mut self, link: &ServerLink, answer: v1::ReadManyResponse) {
        let Some(slot) = self.0.get_mut(answer.index as usize) else { return };
        let Some((asked, mut parts)) = slot.take() else { return };
        if let Some(error) = answer.error {
            return asked.answer(Err(named(Error::from_wire(error), &link.name())));
        }
        if parts.len() == PARTS_MAX {
            return asked.answer(Err(too_much(link)));
        }
        parts.extend(answer.part);
        if is_whole(&asked.question, &parts) {
            return asked.answer(Ok(parts));
        }
        *slot = Some((asked, parts));
    }
}

fn silent(link: &ServerLink) -> Error {
    let why = format!("file server {} did not answer in {} ms", link.name(), PATIENCE.as_millis());
    Error::new(Reason::DeadlineExceeded, why).on(link.name())
}

fn too_much(link: &ServerLink) -> Error {
    Error::internal(format!("file server {} sends more than was asked for", link.name())).on(link.name())
}
