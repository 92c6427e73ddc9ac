//! The `bench` program: what services of its own do, beside what the machine can do, in one run.
//!
//! Every round runs each limit and each workload once, those that are compared next to each other, so that whatever
//! else the machine does meets both. Ratios are those of one round; their median decides. All limits that need two
//! ends run between two processes, as Cairn does.

mod goals;
mod limits;
mod outcome;
mod peer;
mod services;
mod suite;

use clap::Parser;
use outcome::Outcome;
use std::{
    io::{self, Write as _},
    path::PathBuf,
    process::ExitCode,
};

/// Measures Cairn beside the limits of this machine.
#[derive(Clone, Debug, Parser)]
#[command(name = "bench", version)]
struct Args {
    /// A look instead of figures to keep: two short rounds
    #[arg(long)]
    quick: bool,
    /// Rounds [default: 5, with --quick 2]
    #[arg(long, value_name = "N")]
    rounds: Option<u32>,
    /// Steps whose names contain any of these, and what they are compared with [default: all]
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    only: Vec<String>,
    /// Folder of the programs dir-service and file-service [default: that of this program]
    #[arg(long, value_name = "DIR")]
    services: Option<PathBuf>,
    /// Folder in which a folder for all data is made and removed; its disk is what is measured
    #[arg(long, default_value = ".", value_name = "DIR")]
    data: PathBuf,
    /// Leave the folder with the data and logs of the services
    #[arg(long)]
    keep: bool,
    /// Write everything as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the tables into a document, between its marks if it is there
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Be the other end of the limits; what is printed is where it listens
    #[arg(long, hide = true, value_name = "DIR")]
    peer: Option<PathBuf>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let done = match &args.peer {
        Some(folder) => peer::run(folder),
        None => run(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> io::Result<()> {
    let outcome = suite::run(args)?;
    print!("{}", outcome.text());
    io::stdout().flush()?;
    if let Some(path) = &args.json {
        let mut json = serde_json::to_vec_pretty(&outcome)?;
        json.push(b'\n');
        std::fs::write(path, json)?;
    }
    if let Some(path) = &args.markdown {
        let before = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Outcome::DOCUMENT.to_owned(),
            Err(error) => return Err(error),
        };
        std::fs::write(path, outcome.insert(&before)?)?;
    }
    Ok(())
}
