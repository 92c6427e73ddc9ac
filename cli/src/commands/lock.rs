//! `lock`, `locks`, `unlock`.

use crate::{
    args::{self, Lock, Shared, TOKEN_PATH_VARIABLE, TOKEN_VARIABLE, Unlock},
    connect,
    failure::{Failure, LOCKED, say},
    json,
    output::{Out, name, span, table},
    signals::{Signal, Signals},
};
use cairn_proto::Reason;
use client_lib::LockOptions;
use futures::TryStreamExt as _;
use std::{io, os::unix::process::ExitStatusExt as _, process::ExitStatus, time::Duration};
use tokio::process::{Child, Command};

/// Between asking a command to end and ending it.
const PATIENCE: Duration = Duration::from_secs(5);
/// What shells answer for a command that does not exist, and for one that cannot be run.
const NO_COMMAND: u8 = 127;
const CANNOT_RUN: u8 = 126;

/// Holds a lock while a command runs, and ends as the command does.
pub async fn lock(shared: &Shared, lock: Lock) -> Result<(), Failure> {
    let path = lock.path;
    let (program, rest) = lock.command.split_first().ok_or_else(|| Failure::usage("no command was given"))?;
    // From the beginning: one that arrives while it waits for the lock must not leave a lock behind.
    let mut signals = Signals::watch()?;
    let client = connect::with(shared, |builder| builder.session_ttl(lock.ttl)).await?;
    let mut options = LockOptions::new().wait(lock.wait.unwrap_or_default());
    if lock.shared {
        options = options.shared();
    }
    let held = tokio::select! {
        held = client.lock(&path, options) => held.map_err(Failure::at(&path))?,
        signal = signals.next() => return Err(Failure::Ended(signal)),
    };
    if shared.json {
        let mut out = Out::new();
        let mode = if lock.shared { "shared" } else { "exclusive" };
        out.json_line(&serde_json::json!({ "path": path, "mode": mode, "token": held.token().to_string() }))?;
        out.finish()?;
    }
    let child = Command::new(program)
        .args(rest)
        .env(TOKEN_VARIABLE, held.token().to_string())
        .env(TOKEN_PATH_VARIABLE, &path)
        .env("CAIRN_DIRECTORY", shared.directory.join(","))
        .kill_on_drop(true)
        .spawn();
    let mut child = match child {
        Ok(child) => child,
        Err(error) => {
            let status = if error.kind() == io::ErrorKind::NotFound { NO_COMMAND } else { CANNOT_RUN };
            Failure::local(program)(error).report();
            let _ = held.unlock().await;
            return Err(Failure::Said(status));
        }
    };
    let ended = loop {
        tokio::select! {
            ended = child.wait() => break ended.map_err(Failure::local(program))?,
            () = held.lost() => {
                say(&format!(
                    "{path}: the lock is lost, so {} is ended: what it writes under its token is refused",
                    program.to_string_lossy()
                ));
                end(&mut child).await;
                return Err(Failure::Said(LOCKED));
            }
            signal = signals.next() => match signal {
                // Ctrl-C at a terminal reaches the command by itself; this process stays to give the lock back.
                Signal::Interrupt => {}
                Signal::Terminate => send(&child, rustix::process::Signal::TERM),
                Signal::Hangup => send(&child, rustix::process::Signal::HUP),
            },
        }
    };
    match held.unlock().await {
        Err(error) if error.reason == Reason::LockLost => {
            say(&format!(
                "{path}: the lock was taken away or ended while {} ran, which may not have been alone",
                program.to_string_lossy()
            ));
            return Err(Failure::Said(LOCKED));
        }
        // The command has done its work; a lock that cannot be given back ends with its session.
        Err(error) => Failure::at(&path)(error).report(),
        Ok(()) => {}
    }
    match status(ended) {
        0 => Ok(()),
        status => Err(Failure::Said(status)),
    }
}

/// A command's status as shells show it.
fn status(ended: ExitStatus) -> u8 {
    let status = ended.code().or_else(|| ended.signal().map(|signal| 128 + signal)).unwrap_or(1);
    u8::try_from(status).unwrap_or(1)
}

fn send(child: &Child, signal: rustix::process::Signal) {
    let pid = child.id().and_then(|pid| i32::try_from(pid).ok()).and_then(rustix::process::Pid::from_raw);
    if let Some(pid) = pid {
        let _ = rustix::process::kill_process(pid, signal);
    }
}

async fn end(child: &mut Child) {
    send(child, rustix::process::Signal::TERM);
    if tokio::time::timeout(PATIENCE, child.wait()).await.is_err() {
        let _ = child.kill().await;
    }
}

/// Lists held locks.
pub async fn locks(shared: &Shared) -> Result<(), Failure> {
    let client = connect::plain(shared).await?;
    let locks: Vec<_> = client.locks().try_collect().await.map_err(Failure::at(""))?;
    let locks: Vec<json::Lock> = locks.into_iter().map(json::Lock::from).collect();
    let mut out = Out::new();
    if shared.json {
        out.json(&locks)?;
    } else {
        let rows: Vec<_> = locks
            .iter()
            .map(|lock| {
                vec![
                    lock.mode.to_owned(),
                    lock.token.clone(),
                    format!("ends in {}", span(lock.expires_in_ms)),
                    name(&lock.owner),
                    name(&lock.path),
                ]
            })
            .collect();
        for line in table(&rows, &[]) {
            out.line(&line)?;
        }
    }
    out.finish()
}

/// Takes a lock away.
pub async fn unlock(shared: &Shared, unlock: Unlock) -> Result<(), Failure> {
    let args::Unlock { path, force: _ } = unlock;
    let client = connect::plain(shared).await?;
    let ended = match client.unlock_force(&path).await {
        Ok(ended) => ended,
        Err(error) if error.reason == Reason::LockLost => 0,
        Err(error) => return Err(Failure::at(&path)(error)),
    };
    if ended == 0 {
        // Nothing to take away is as good as taken away; a name that leads nowhere is most likely a mistake.
        client.stat(&path).await.map_err(Failure::at(&path))?;
    }
    if shared.json {
        let mut out = Out::new();
        out.json(&json::Unlock { path, ended })?;
        return out.finish();
    }
    if ended == 0 {
        say(&format!("{path}: is not locked"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commands_end_becomes_a_status() {
        assert_eq!(status(ExitStatus::from_raw(0)), 0);
        assert_eq!(status(ExitStatus::from_raw(7 << 8)), 7);
        assert_eq!(status(ExitStatus::from_raw(15)), 143);
    }
}
