//! `cat`, `write`: files as streams of bytes.

use crate::{
    args::{Cat, Shared, Write},
    connect,
    failure::{DONE, Failure},
    json::Stat,
    output::Out,
    token::Held,
    transfer::{must_be_a_directory, progress::Progress, watched::Watched},
};
use bytes::BytesMut;
use cairn_proto::v1::Attributes;
use client_lib::{Client, WriteOptions};
use tokio::io::{AsyncRead, AsyncReadExt as _};

/// What is read of standard input at a time.
const PIECE_BYTES: usize = 256 * 1024;

/// Writes files to standard output.
pub async fn cat(shared: &Shared, cat: Cat) -> Result<(), Failure> {
    if shared.json {
        return Err(Failure::usage(
            "--json: cat writes the bytes of files and knows no facts; see `cairn stat`",
        ));
    }
    let client = connect::plain(shared).await?;
    let mut status = DONE;
    // No line of progress: it would be in the middle of what is shown.
    let progress = Progress::hidden();
    for path in &cat.paths {
        let mut out = Watched::new(tokio::io::stdout(), "standard output", &progress);
        let done = client.get_writer(path, &mut out).await;
        match done.map_err(|error| out.failure(path, error)) {
            Ok(_) => {}
            Err(failure @ Failure::Cairn { .. }) => failure.note(&mut status),
            Err(failure) => return Err(failure),
        }
    }
    Failure::after(status)
}

/// Makes standard input the content of a file.
pub async fn write(shared: &Shared, write: Write) -> Result<(), Failure> {
    let path = write.path;
    if path.ends_with('/') {
        return Err(must_be_a_directory(&path));
    }
    let client = connect::plain(shared).await?;
    let mut options = WriteOptions::new();
    let held = Held::find(&client, write.token.token).await?;
    if let Some(token) = held.of(&client, &path).await? {
        options = options.token(token);
    }
    let progress = Progress::new(None);
    let mut input = Watched::new(tokio::io::stdin(), "standard input", &progress);
    let written = if write.append {
        append(&client, &path, &mut input, options).await
    } else {
        client.put_reader(&path, &mut input, options).await
    };
    progress.finish();
    let written = written.map_err(|error| input.failure(&path, error))?;
    if shared.json {
        let mut out = Out::new();
        out.json(&Stat::new(path, &written))?;
        out.finish()?;
    }
    Ok(())
}

/// Puts all that `input` gives at the end of a file, as one new version.
async fn append(
    client: &Client,
    path: &str,
    mut input: impl AsyncRead + Unpin,
    options: WriteOptions,
) -> cairn_proto::Result<Attributes> {
    let mut file = client.open_options().append(true).create(true).options(options).open(path).await?;
    loop {
        let mut piece = BytesMut::with_capacity(PIECE_BYTES);
        match input.read_buf(&mut piece).await {
            Ok(0) => return file.close().await,
            Ok(_) => file.append(piece.freeze()).await?,
            Err(error) => {
                file.abort().await;
                return Err(error.into());
            }
        }
    }
}
