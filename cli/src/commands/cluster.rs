//! `status`, `explain`, `drain`, `forget`, `rebuild`.

use crate::{
    args::{Drain, Explain, Forget, Shared},
    connect,
    failure::{Failure, say},
    json,
    output::{Out, name, size, span, table},
};
use cairn_proto::{Error, Reason, id::ServerId, v1};
use std::time::Duration;

/// Between two looks at a server that is being emptied.
const DRAIN_POLL: Duration = Duration::from_millis(500);

/// Shows the health of everything.
pub async fn status(shared: &Shared) -> Result<(), Failure> {
    let client = connect::plain(shared).await?;
    let status = json::Status::from(client.status().await.map_err(Failure::at(""))?);
    let mut out = Out::new();
    if shared.json {
        out.json(&status)?;
    } else {
        for line in status_lines(&status) {
            out.line(&line)?;
        }
    }
    out.finish()
}

fn status_lines(status: &json::Status) -> Vec<String> {
    let directory = &status.directory;
    let mut lines = vec![format!(
        "directory     {}, generation {}, revision {}, journal {} behind",
        directory.mode,
        directory.generation,
        directory.revision,
        span(directory.journal_lag_ms)
    )];
    if !directory.reason.is_empty() {
        lines.push(format!("              {}", directory.reason));
    }
    lines.push(format!(
        "names         {} files, {} directories, {}; {} locks, {} sessions",
        status.files,
        status.directories,
        size(status.bytes),
        status.locks,
        status.sessions
    ));
    let chunks = &status.chunks;
    let known = if status.verified { "" } else { " (not all servers are compared yet)" };
    lines.push(format!(
        "chunks        {} of {} healthy, {} under-replicated, {} lost{known}",
        chunks.healthy, chunks.total, chunks.under_replicated, chunks.lost
    ));
    if chunks.quarantined > 0 {
        lines.push(format!("              {} quarantined: no record explains them", chunks.quarantined));
    }
    let repairs = &status.repairs;
    if repairs.copies_missing > 0 {
        let left = repairs
            .time_left_ms
            .map_or("nothing moves".to_owned(), |left_ms| format!("{} left", span(left_ms)));
        lines.push(format!(
            "repairs       {} copies missing ({}), {} being made ({}), {} a second, {left}",
            repairs.copies_missing,
            size(repairs.bytes_missing),
            repairs.copies_running,
            size(repairs.bytes_running),
            size(repairs.bytes_per_second),
        ));
    }
    for obstacle in &status.repairs.obstacles {
        lines.push(format!("              {obstacle}"));
    }
    lines.push(format!(
        "space         {} reclaimable, {} dropped chunks wait for collection",
        size(status.reclaimable_bytes),
        chunks.awaiting_collection
    ));
    if status.extents.files_waiting > 0 {
        lines.push(format!(
            "extents       {} fragmented files wait to be merged",
            status.extents.files_waiting
        ));
    }
    for one in &status.balance.moves {
        let how = match one.to {
            Some(to) => format!("goes to server {to}, {} copies to make", one.copies_missing),
            None => "has gone to another, its copies are being removed".to_owned(),
        };
        lines.push(format!("balance       the seat of server {} in group {} {how}", one.from, one.group));
    }
    for server in status.file_servers.iter().filter(|server| !server.drain_waits_for.is_empty()) {
        lines.push(format!("drain         server {}: {}", server.id, server.drain_waits_for));
    }
    lines.push(String::new());
    let head = ["server", "state", "zone", "used", "free", "chunks", "missing", "re-read", "address"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    rows.extend(status.file_servers.iter().map(|server| {
        let state = if server.drained { "drained" } else { server.state };
        vec![
            server.id.to_string(),
            state.to_owned(),
            if server.zone.is_empty() { "-".to_owned() } else { name(&server.zone) },
            server.used_bytes.map_or_else(|| "?".to_owned(), size),
            server.free_bytes.map_or_else(|| "?".to_owned(), size),
            server.chunks.map_or_else(|| "?".to_owned(), |chunks| chunks.to_string()),
            server.missing_chunks.to_string(),
            scrubbed(&server.scrub),
            name(&server.address),
        ]
    }));
    lines.extend(table(&rows, &[0, 3, 4, 5, 6]));
    let noted = status.file_servers.iter().filter(|server| !server.notice.is_empty());
    lines.extend(noted.map(|server| format!("server {}: {}", server.id, server.notice)));
    lines
}

/// When all copies were last re-read, or how far the first pass is.
fn scrubbed(scrub: &json::Scrub) -> String {
    match scrub.last_pass_ago_ms {
        Some(ago_ms) => format!("{} ago", span(ago_ms)),
        None if scrub.period_ms == 0 => "off".to_owned(),
        None => format!("{} %", (scrub.bytes_done * 100).checked_div(scrub.bytes_total).unwrap_or(0)),
    }
}

/// Shows where each chunk of a file is.
pub async fn explain(shared: &Shared, explain: Explain) -> Result<(), Failure> {
    let path = explain.path;
    let client = connect::plain(shared).await?;
    let explained = client.explain(&path).await.map_err(Failure::at(&path))?;
    let attributes = explained.attributes.unwrap_or_default();
    if attributes.kind() == v1::Kind::Directory {
        let message = "is a directory, which has no chunks; explain a file in it";
        return Err(Failure::at(&path)(Error::new(Reason::IsADirectory, message)));
    }
    let explained = json::Explain {
        path,
        size: attributes.size,
        version: attributes.version,
        replication: explained.replication,
        chunks: explained.chunks.into_iter().map(json::Chunk::from).collect(),
        locks: explained.locks.into_iter().map(json::Lock::from).collect(),
    };
    let mut out = Out::new();
    if shared.json {
        out.json(&explained)?;
    } else {
        for line in explain_lines(&explained) {
            out.line(&line)?;
        }
    }
    out.finish()
}

fn explain_lines(explained: &json::Explain) -> Vec<String> {
    let mut lines = vec![format!(
        "{}: version {}, {}, replication {}",
        name(&explained.path),
        explained.version,
        size(explained.size),
        explained.replication
    )];
    for lock in &explained.locks {
        lines.push(format!(
            "locked ({}) by {}, for {} more unless renewed",
            lock.mode,
            name(&lock.owner),
            span(lock.expires_in_ms)
        ));
    }
    for chunk in &explained.chunks {
        let Some(id) = &chunk.chunk else {
            lines.push(format!("{} + {}: a hole, zeros without a chunk", chunk.offset, chunk.length));
            continue;
        };
        lines.push(format!(
            "{} + {}: chunk {id} in group {}, epoch {}, primary {}",
            chunk.offset, chunk.length, chunk.group, chunk.epoch, chunk.primary
        ));
        for copy in &chunk.copies {
            let when = match copy.state.as_str() {
                "verified" => format!(" {} ago", span(copy.verified_ago_ms)),
                _ => String::new(),
            };
            let primary = if copy.primary { ", primary" } else { "" };
            lines.push(format!(
                "  server {} at {}: {}{when}{primary}",
                copy.server,
                name(&copy.address),
                copy.state
            ));
        }
        if !chunk.reason.is_empty() {
            lines.push(format!("  why there: {}", chunk.reason));
        }
        if !chunk.next_repair.is_empty() {
            lines.push(format!("  next: {}", chunk.next_repair));
        }
    }
    if explained.chunks.is_empty() {
        lines.push("no chunks: the file is empty".to_owned());
    }
    lines
}

/// Empties a file server.
pub async fn drain(shared: &Shared, drain: Drain) -> Result<(), Failure> {
    let client = connect::plain(shared).await?;
    let subject = format!("server {}", drain.server);
    let mut waits = Waits::default();
    loop {
        let answer =
            client.drain(ServerId(drain.server), drain.cancel).await.map_err(Failure::at(&subject))?;
        if drain.wait && !drain.cancel && !answer.drained {
            let repairs = client.status().await.map_err(Failure::at(&subject))?.repairs.unwrap_or_default();
            let mut obstacles = repairs.obstacles;
            if obstacles.is_empty() && !answer.waits_for.is_empty() {
                obstacles.push(answer.waits_for);
            }
            waits.tell(&subject, answer.seats_left, obstacles);
            tokio::time::sleep(DRAIN_POLL).await;
            continue;
        }
        let mut out = Out::new();
        if shared.json {
            let (seats_left, drained) = (answer.seats_left, answer.drained);
            let waits_for = answer.waits_for;
            out.json(&json::Drain { server: drain.server, seats_left, drained, waits_for })?;
        } else if drain.cancel {
            out.line(&format!("{subject} stays"))?;
        } else if answer.drained {
            out.line(&format!("{subject} is empty and may be switched off"))?;
        } else {
            out.line(&format!(
                "{subject} is not empty yet: {}; `cairn drain --wait` says how it goes and when it is empty",
                answer.waits_for
            ))?;
        }
        return out.finish();
    }
}

/// What a person was told while a server is being emptied.
#[derive(Default)]
struct Waits {
    told: Option<(u64, Vec<String>)>,
}

impl Waits {
    /// Says how it stands, when that changed: seats that are left, and what keeps them from going elsewhere.
    fn tell(&mut self, subject: &str, seats_left: u64, obstacles: Vec<String>) {
        let now = (seats_left, obstacles);
        if self.told.as_ref() == Some(&now) {
            return;
        }
        say(&format!("{subject}: {seats_left} seats to go"));
        for obstacle in &now.1 {
            if self.told.as_ref().is_none_or(|(_, told)| !told.contains(obstacle)) {
                say(&format!("{subject}: waiting: {obstacle}"));
            }
        }
        self.told = Some(now);
    }
}

/// Strikes a file server from the records.
pub async fn forget(shared: &Shared, forget: Forget) -> Result<(), Failure> {
    let client = connect::plain(shared).await?;
    let subject = format!("server {}", forget.server);
    client.forget(ServerId(forget.server)).await.map_err(Failure::at(&subject))?;
    let mut out = Out::new();
    if shared.json {
        out.json(&json::Forget { server: forget.server })?;
    } else {
        out.line(&format!("{subject} is forgotten; should it return, it joins as a new one"))?;
    }
    out.finish()
}

/// Starts a rebuild that waits for carriers of the journal.
pub async fn rebuild(shared: &Shared) -> Result<(), Failure> {
    let client = connect::plain(shared).await?;
    let revision = client.force_rebuild().await.map_err(Failure::at(""))?;
    let mut out = Out::new();
    if shared.json {
        out.json(&json::Rebuild { revision })?;
    } else {
        out.line(&format!("rebuilding from what is known up to revision {revision}"))?;
    }
    out.finish()
}
