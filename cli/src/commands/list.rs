//! `ls`, `stat`.

use crate::{
    args::{Ls, Paths, Shared},
    connect,
    failure::{DONE, Failure},
    json::{self, Stat},
    output::{Out, name, size, table, time_short},
    transfer::join,
};
use cairn_proto::v1::{Attributes, Kind};
use client_lib::{Client, ListOptions};
use futures::StreamExt as _;

/// Lines that are aligned with each other; a directory of millions is not held in memory for its columns.
const ALIGNED_LINES: usize = 1_024;

/// Lists directories.
pub async fn ls(shared: &Shared, ls: Ls) -> Result<(), Failure> {
    let client = connect::plain(shared).await?;
    let mut listing = Listing { out: Out::new(), lines: Vec::new(), long: ls.long, json: None };
    if shared.json {
        listing.json = Some(Vec::new());
    }
    let headers = ls.recursive || ls.paths.len() > 1;
    let mut status = DONE;
    let mut first = true;
    for path in ls.paths {
        let attributes = match client.stat(&path).await {
            Ok(attributes) => attributes,
            Err(error) => {
                Failure::at(&path)(error).note(&mut status);
                continue;
            }
        };
        if attributes.kind() != Kind::Directory {
            listing.entry(path.clone(), &path, &attributes)?;
            listing.flush()?;
            first = false;
            continue;
        }
        let mut waiting = vec![path];
        while let Some(folder) = waiting.pop() {
            if headers {
                listing.header(&folder, first)?;
                first = false;
            }
            match listing.folder(&client, &folder).await {
                Ok(mut below) if ls.recursive => {
                    below.reverse();
                    waiting.extend(below);
                }
                Ok(_) => {}
                Err(failure @ Failure::Cairn { .. }) => failure.note(&mut status),
                Err(failure) => return Err(failure),
            }
        }
    }
    listing.finish()?;
    Failure::after(status)
}

struct Listing {
    out: Out,
    lines: Vec<Vec<String>>,
    long: bool,
    /// What is printed at the end, as one array.
    json: Option<Vec<Stat>>,
}

impl Listing {
    fn header(&mut self, folder: &str, first: bool) -> Result<(), Failure> {
        if self.json.is_some() {
            return Ok(());
        }
        if !first {
            self.out.line("")?;
        }
        self.out.line(&format!("{}:", name(folder)))
    }

    /// Prints a directory's entries; answers the directories among them.
    async fn folder(&mut self, client: &Client, folder: &str) -> Result<Vec<String>, Failure> {
        let mut options = ListOptions::new();
        if !self.long && self.json.is_none() {
            options = options.without_attributes();
        }
        let mut entries = std::pin::pin!(client.list_with(folder, options));
        let mut below = Vec::new();
        while let Some(entry) = entries.next().await {
            let entry = entry.map_err(Failure::at(folder))?;
            let path = join(folder, &entry.name);
            let kind = entry.kind();
            let attributes =
                entry.attributes.unwrap_or_else(|| Attributes { kind: kind as i32, ..Default::default() });
            if kind == Kind::Directory {
                below.push(path.clone());
            }
            self.entry(path, &entry.name, &attributes)?;
        }
        self.flush()?;
        Ok(below)
    }

    fn entry(&mut self, path: String, shown: &str, attributes: &Attributes) -> Result<(), Failure> {
        if let Some(list) = &mut self.json {
            list.push(Stat::new(path, attributes));
            return Ok(());
        }
        let slash = if attributes.kind() == Kind::Directory && shown != "/" { "/" } else { "" };
        let shown = format!("{}{slash}", name(shown));
        if !self.long {
            return self.out.line(&shown);
        }
        self.lines.push(vec![
            permissions(attributes),
            format!("v{}", attributes.version),
            if attributes.kind() == Kind::Directory { "-".to_owned() } else { attributes.size.to_string() },
            time_short(attributes.mtime_ns),
            shown,
        ]);
        if self.lines.len() >= ALIGNED_LINES { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), Failure> {
        for line in table(&std::mem::take(&mut self.lines), &[1, 2]) {
            self.out.line(&line)?;
        }
        Ok(())
    }

    fn finish(mut self) -> Result<(), Failure> {
        self.flush()?;
        if let Some(list) = self.json.take() {
            self.out.json(&list)?;
        }
        self.out.finish()
    }
}

/// As `ls` shows them: `drwxr-xr-x`.
fn permissions(attributes: &Attributes) -> String {
    let kind = if attributes.kind() == Kind::Directory { 'd' } else { '-' };
    let bits = (0..9).rev().map(|bit| {
        let letter = ['x', 'w', 'r'][bit % 3];
        if attributes.mode & (1 << bit) != 0 { letter } else { '-' }
    });
    std::iter::once(kind).chain(bits).collect()
}

/// Shows what is known of paths, with the servers that hold them.
pub async fn stat(shared: &Shared, paths: Paths) -> Result<(), Failure> {
    let client = connect::plain(shared).await?;
    let mut status = DONE;
    let mut stats = Vec::new();
    for path in &paths.paths {
        match stat_one(&client, path).await {
            Ok(stat) => stats.push(stat),
            Err(error) => Failure::at(path)(error).note(&mut status),
        }
    }
    let mut out = Out::new();
    if shared.json {
        match stats.as_slice() {
            [one] if paths.paths.len() == 1 => out.json(one)?,
            [] if paths.paths.len() == 1 => {}
            _ => out.json(&stats)?,
        }
    } else {
        for (i, stat) in stats.iter().enumerate() {
            if i > 0 {
                out.line("")?;
            }
            for line in lines(stat) {
                out.line(&line)?;
            }
        }
    }
    out.finish()?;
    Failure::after(status)
}

async fn stat_one(client: &Client, path: &str) -> cairn_proto::Result<Stat> {
    let attributes = client.stat(path).await?;
    let mut stat = Stat::new(path.to_owned(), &attributes);
    stat.copies = Some(Vec::new());
    stat.replication = Some(attributes.replication);
    if attributes.kind() == Kind::File {
        let explained = client.explain(path).await?;
        // The two questions may see two versions.
        let version = explained.attributes.as_ref().map(|attributes| attributes.version);
        if stat.checksum.is_none() && version == Some(stat.version) && explained.next_page_token.is_empty() {
            stat.checksum = json::combined_checksum(stat.size, &explained.chunks);
        }
        let chunks: Vec<_> = explained.chunks.into_iter().map(json::Chunk::from).collect();
        stat.copies = Some(json::copies(&chunks));
        stat.replication = Some(explained.replication);
    }
    Ok(stat)
}

fn lines(stat: &Stat) -> Vec<String> {
    let fact = |label: &str, fact: String| format!("{label:<12} {fact}");
    let replication = match stat.replication.unwrap_or(0) {
        0 => "inherited".to_owned(),
        copies => copies.to_string(),
    };
    let mut lines = vec![
        name(&stat.path),
        fact("kind", stat.kind.to_owned()),
        fact("size", format!("{} ({})", stat.size, size(stat.size))),
        fact("version", stat.version.to_string()),
        fact("replication", replication),
        fact("checksum", stat.checksum.clone().unwrap_or_else(|| "-".to_owned())),
        fact("modified", stat.modified.clone()),
    ];
    for copy in stat.copies.iter().flatten() {
        lines.push(fact("copy", format!("server {} at {}: {}", copy.server, copy.address, copy.state)));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permissions_look_as_everywhere() {
        let of =
            |kind: Kind, mode| permissions(&Attributes { kind: kind as i32, mode, ..Default::default() });
        assert_eq!(of(Kind::Directory, 0o755), "drwxr-xr-x");
        assert_eq!(of(Kind::File, 0o640), "-rw-r-----");
    }
}
