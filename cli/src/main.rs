//! `cairn`: Cairn for people and scripts. Thin over `client-lib`; each group of commands is a file in `commands/`.

mod args;
mod commands;
mod connect;
mod failure;
mod json;
mod output;
mod signals;
mod token;
mod transfer;

use args::{Cli, Command, Shared};
use failure::{Failure, say_lines};
use signals::Signals;
use std::{io::IsTerminal as _, process::ExitCode, time::Duration};

/// How long what was under way may take to put things back in order behind a signal.
const CLEANING: Duration = Duration::from_millis(500);

fn main() -> ExitCode {
    cairn_proto::host::few_arenas();
    let cli = match Cli::given() {
        Ok(cli) => cli,
        // Help and version are no mistakes.
        Err(wish) if !wish.use_stderr() => {
            let _ = wish.print();
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            match error.kind() {
                // Nothing was said at all: all that can be.
                clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => drop(error.print()),
                _ => say_lines(&args::complaint(error)),
            }
            return ExitCode::from(failure::USAGE);
        }
    };
    let done = log(&cli.shared, &cli.command).and_then(|()| {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .map_err(|error| Failure::Local { subject: "runtime".to_owned(), error })?;
        let done = runtime.block_on(run(cli));
        match done {
            // Half-written local files are removed by tasks that were dropped.
            Err(Failure::Ended(_)) => runtime.shutdown_timeout(CLEANING),
            // A read of standard input that nobody waits for any more must not hold the process.
            _ => runtime.shutdown_background(),
        }
        done
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            failure.report();
            failure.exit_code()
        }
    }
}

/// Runs a command to its end, or to that of the first signal; in any case the session is closed, so that nothing stays
/// locked behind it.
async fn run(cli: Cli) -> Result<(), Failure> {
    // These two have their own ways to end.
    if matches!(cli.command, Command::Up(_) | Command::Lock(_)) {
        let done = execute(cli).await;
        connect::close().await;
        return done;
    }
    let mut signals = Signals::watch()?;
    let done = tokio::select! {
        done = execute(cli) => done,
        signal = signals.next() => Err(Failure::Ended(signal)),
    };
    tokio::select! {
        () = connect::close() => {}
        // Asked again, it leaves the session to its TTL.
        signal = signals.next() => return Err(Failure::Ended(signal)),
    }
    done
}

async fn execute(cli: Cli) -> Result<(), Failure> {
    let shared = &cli.shared;
    match cli.command {
        Command::Up(up) => commands::up::run(shared, up).await,
        Command::Put(put) => transfer::put::run(shared, put).await,
        Command::Get(get) => transfer::get::run(shared, get).await,
        Command::Cat(cat) => commands::stream::cat(shared, cat).await,
        Command::Write(write) => commands::stream::write(shared, write).await,
        Command::Ls(ls) => commands::list::ls(shared, ls).await,
        Command::Stat(stat) => commands::list::stat(shared, stat).await,
        Command::Mkdir(mkdir) => commands::names::mkdir(shared, mkdir).await,
        Command::Set(set) => commands::names::set(shared, set).await,
        Command::Mv(mv) => commands::names::mv(shared, mv).await,
        Command::Rm(rm) => commands::names::rm(shared, rm).await,
        Command::Lock(lock) => commands::lock::lock(shared, lock).await,
        Command::Locks => commands::lock::locks(shared).await,
        Command::Unlock(unlock) => commands::lock::unlock(shared, unlock).await,
        Command::Status => commands::cluster::status(shared).await,
        Command::Explain(explain) => commands::cluster::explain(shared, explain).await,
        Command::Forget(forget) => commands::cluster::forget(shared, forget).await,
        Command::Drain(drain) => commands::cluster::drain(shared, drain).await,
        Command::Backup(backup) => commands::backup::backup(shared, backup).await,
        Command::Restore(restore) => commands::backup::restore(shared, restore).await,
        Command::Migrate(migrate) => commands::migrate::run(shared, migrate).await,
        Command::Bench(bench) => commands::bench::run(shared, bench).await,
        Command::Rebuild(_) => commands::cluster::rebuild(shared).await,
        Command::Health(health) => commands::health::run(shared, health).await,
    }
}

/// Logs to standard error: what `--log` asks for, warnings of a cluster in this process, and else nothing, since
/// errors are said in plain words anyway.
fn log(shared: &Shared, command: &Command) -> Result<(), Failure> {
    let default = if matches!(command, Command::Up(_)) { "warn" } else { "off" };
    let filter = shared.log.as_deref().unwrap_or(default);
    let filter = tracing_subscriber::EnvFilter::try_new(filter)
        .map_err(|error| Failure::usage(format!("--log {filter}: {error}")))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    Ok(())
}

/// Hostile bytes may cost only so much memory: see `fuzz`.
#[cfg(test)]
#[global_allocator]
static ALLOCATOR: fuzz::memory::Counting = fuzz::memory::Counting;
