//! `mkdir`, `set`, `mv`, `rm`.

use crate::{
    args::{Mkdir, Mv, Rm, Set, Shared},
    connect,
    failure::{DONE, Failure, LOCKED, say},
    json::{Done, Stat},
    output::{Out, span},
    token::{Held, is_same},
    transfer::{base_name, join, must_be_a_directory},
};
use cairn_proto::{Error, Reason, v1::Kind};
use client_lib::{Client, Condition, DeleteOptions, RenameOptions, SetAttributes, WriteOptions};

/// Makes directories.
pub async fn mkdir(shared: &Shared, mkdir: Mkdir) -> Result<(), Failure> {
    let client = connect::plain(shared).await?;
    let mut status = DONE;
    let mut made = Vec::new();
    for path in &mkdir.paths {
        match make(&client, path, &mkdir).await {
            Ok(stat) => made.push(stat),
            Err(failure) => failure.note(&mut status),
        }
    }
    facts(shared, &made, mkdir.paths.len())?;
    Failure::after(status)
}

async fn make(client: &Client, path: &str, mkdir: &Mkdir) -> Result<Stat, Failure> {
    let options = match mkdir.replication {
        Some(copies) => WriteOptions::new().replication(copies),
        None => WriteOptions::new(),
    };
    let made = match client.mkdir_with(path, options).await {
        // What is missing is made first. The directory itself, as said.
        Err(error) if mkdir.parents && error.reason == Reason::NotFound => {
            let made = client.mkdir_all(path).await;
            match (made, mkdir.replication) {
                (Ok(_), Some(copies)) => {
                    client.set_attributes(path, SetAttributes::new().replication(copies)).await
                }
                (made, _) => made,
            }
        }
        // It is fine when it is a directory.
        Err(error) if mkdir.parents && error.reason == Reason::AlreadyExists => client.mkdir_all(path).await,
        made => made,
    };
    let made = made.map_err(|error| {
        Failure::at(path)(error).advise(Reason::NotFound, "give -p to make the directories above it")
    })?;
    Ok(Stat::new(path.to_owned(), &made))
}

/// Changes how many copies are kept.
pub async fn set(shared: &Shared, set: Set) -> Result<(), Failure> {
    let client = connect::plain(shared).await?;
    let held = Held::find(&client, set.token.token).await?;
    let mut status = DONE;
    let mut changed = Vec::new();
    for path in &set.paths {
        let mut change = SetAttributes::new().replication(set.replication);
        if let Some(token) = held.of(&client, path).await? {
            change = change.token(token);
        }
        match client.set_attributes(path, change).await {
            Ok(attributes) => {
                let mut stat = Stat::new(path.clone(), &attributes);
                stat.replication = Some(attributes.replication);
                changed.push(stat);
            }
            Err(error) => Failure::at(path)(error).note(&mut status),
        }
    }
    facts(shared, &changed, set.paths.len())?;
    Failure::after(status)
}

/// What was made or changed, when that was asked for: one object for one path, an array for several.
fn facts(shared: &Shared, stats: &[Stat], asked: usize) -> Result<(), Failure> {
    if !shared.json {
        return Ok(());
    }
    let mut out = Out::new();
    match stats {
        [one] if asked == 1 => out.json(one)?,
        [] if asked == 1 => {}
        several => out.json(&several)?,
    }
    out.finish()
}

/// Renames.
pub async fn mv(shared: &Shared, mv: Mv) -> Result<(), Failure> {
    let client = connect::plain(shared).await?;
    let (from, mut to) = (mv.from, mv.to);
    if is_directory(&client, &to).await? {
        to = join(&to, base_name(&from)?);
    } else if to.ends_with('/') && !is_directory(&client, &from).await? {
        // Only a directory may be given such a name.
        return Err(must_be_a_directory(&to));
    }
    if is_same(&from, &to) {
        client.stat(&from).await.map_err(Failure::at(&from))?;
        let error = Error::invalid(format!("is {to} already, so there is nothing to move"));
        return Err(Failure::at(&from)(error));
    }
    let mut options = RenameOptions::new();
    if mv.no_clobber {
        options = options.condition(Condition::Absent);
    }
    let held = Held::find(&client, mv.token.token).await?;
    if let Some(token) = held.of(&client, &from).await? {
        options = options.token(token);
    }
    if let Some(token) = held.of(&client, &to).await? {
        options = options.replaced_token(token);
    }
    let moved = client.rename_with(&from, &to, options).await.map_err(Failure::at(&from))?;
    facts(shared, &[Stat::new(to, &moved)], 1)
}

async fn is_directory(client: &Client, path: &str) -> Result<bool, Failure> {
    match client.stat(path).await {
        Ok(attributes) => Ok(attributes.kind() == Kind::Directory),
        Err(error) if error.reason == Reason::NotFound => Ok(false),
        Err(error) => Err(Failure::at(path)(error)),
    }
}

/// Removes.
pub async fn rm(shared: &Shared, rm: Rm) -> Result<(), Failure> {
    // Before anything is removed: most likely a variable was empty.
    if !rm.no_preserve_root && rm.paths.iter().any(|path| is_same(path, "/")) {
        return Err(Failure::usage(
            "/: is the whole file system, nothing was removed; give --no-preserve-root if all of it shall go",
        ));
    }
    let client = connect::plain(shared).await?;
    let held = Held::find(&client, rm.token.token).await?;
    let mut status = DONE;
    let mut done = Done::default();
    for path in &rm.paths {
        match remove(&client, path, &rm, &held, &mut done).await {
            Ok(()) => {}
            Err(Failure::Cairn { error, .. }) if rm.force && error.reason == Reason::NotFound => {}
            Err(failure) => {
                done.failed += 1;
                failure.note(&mut status);
            }
        }
    }
    if shared.json {
        let mut out = Out::new();
        out.json(&serde_json::json!({ "removed": done.files, "failed": done.failed }))?;
        out.finish()?;
    }
    Failure::after(status)
}

async fn remove(client: &Client, path: &str, rm: &Rm, held: &Held, done: &mut Done) -> Result<(), Failure> {
    let mut options = DeleteOptions::new();
    if let Some(token) = held.of(client, path).await? {
        options = options.token(token);
    }
    if !rm.recursive {
        client.delete_with(path, options).await.map_err(|error| {
            Failure::at(path)(error).advise(Reason::NotEmpty, "give -r to remove it with all that is in it")
        })?;
        done.files += 1;
        return Ok(());
    }
    let removed = client.delete_recursive_with(path, options).await.map_err(Failure::at(path))?;
    done.files += removed.removed;
    for lock in &removed.kept {
        say(&format!(
            "{}: stays, since {} holds a lock on it that ends in {} unless renewed",
            lock.path,
            lock.owner,
            span(lock.expires_in_ms)
        ));
    }
    let unnamed = removed.kept_count.saturating_sub(removed.kept.len() as u64);
    if unnamed > 0 {
        say(&format!("{path}: {unnamed} more locked files stay"));
    }
    if removed.kept_count == 0 { Ok(()) } else { Err(Failure::Said(LOCKED)) }
}
