//! What can be said to `cairn`.

use crate::failure::Failure;
use cairn_proto::id::FencingToken;
use clap::{Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand, builder, error::ContextKind};
use std::{net::SocketAddr, path::PathBuf, time::Duration};

/// Where the directory is when nobody says.
pub const DIRECTORY_DEFAULT: &str = "http://127.0.0.1:7400";
/// How long to try to reach a directory when nobody says.
const REACH_DEFAULT: Duration = Duration::from_secs(5);
/// The environment variable that hands a lock's token from `cairn lock` to the commands that it runs.
pub const TOKEN_VARIABLE: &str = "CAIRN_LOCK_TOKEN";
/// The environment variable that says which path that lock is on: a token that is lost concerns no other.
pub const TOKEN_PATH_VARIABLE: &str = "CAIRN_LOCK_PATH";

/// Cairn: a replicated file system.
///
/// Exit status: 0 done, 1 failed, 2 wrong usage, 3 not found, 4 locked by another.
#[derive(Debug, Parser)]
#[command(name = "cairn", version, about, max_term_width = 100)]
pub struct Cli {
    #[command(flatten)]
    pub shared: Shared,
    #[command(subcommand)]
    pub command: Command,
}

/// Said before or behind any command.
#[derive(Clone, Debug, Args)]
pub struct Shared {
    /// Addresses of the directory, separated by commas
    #[arg(long, global = true, env = "CAIRN_DIRECTORY", value_delimiter = ',', default_value = DIRECTORY_DEFAULT, value_name = "URI")]
    pub directory: Vec<String>,
    /// Print facts as JSON
    #[arg(long, global = true)]
    pub json: bool,
    /// Longest wait for servers that do not answer or are too few [default: 5s to reach a directory at first, then 30s]
    #[arg(long, global = true, value_parser = span, value_name = "TIME")]
    pub timeout: Option<Duration>,
    /// Log what goes on to standard error, for example client_lib=debug
    #[arg(long, global = true, env = "CAIRN_LOG", value_name = "FILTER", hide_env_values = true)]
    pub log: Option<String>,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a whole cluster in this process: one directory and some file servers
    Up(Up),
    /// Copy local files into Cairn
    Put(Put),
    /// Copy files out of Cairn
    Get(Get),
    /// Write files to standard output
    Cat(Cat),
    /// Make standard input the content of a file
    Write(Write),
    /// List directories
    Ls(Ls),
    /// Show what is known of files
    Stat(Paths),
    /// Make directories
    Mkdir(Mkdir),
    /// Change how many copies of files are kept
    Set(Set),
    /// Rename a file or directory
    Mv(Mv),
    /// Remove files and directories
    Rm(Rm),
    /// Hold a file's lock while a command runs
    Lock(Lock),
    /// List held locks
    Locks,
    /// Take a lock away from its holder
    Unlock(Unlock),
    /// Show the health of everything
    Status,
    /// Show where each chunk of a file is, and why
    Explain(Explain),
    /// Empty a file server, so that it can be switched off
    Drain(Drain),
    /// Strike a file server from the records that is empty or dead and does not come back
    Forget(Forget),
    /// Copy all records of the directory, while it runs, into a folder
    Backup(Backup),
    /// Make the data folder of a directory that does not run from a backup
    Restore(Restore),
    /// Move the store of a directory that does not run to another engine
    Migrate(Migrate),
    /// Measure how fast the cluster is, in a folder of its own that is removed at the end
    Bench(Bench),
    /// Start rebuilding the directory although carriers of its journal are missing
    Rebuild(Rebuild),
    /// Ask a server whether it serves; for health checks of containers
    Health(Health),
}

#[derive(Debug, Args)]
pub struct Up {
    /// Where data is kept
    #[arg(long, env = "CAIRN_DATA", default_value = "./cairn-data", value_name = "DIR")]
    pub data: PathBuf,
    /// Number of file servers [default: 3, or as many as the data directory has]
    #[arg(long, value_name = "N")]
    pub file_servers: Option<usize>,
    /// Where the directory listens; file servers listen on the same address, from the port 100 higher on
    #[arg(long, env = "CAIRN_LISTEN", default_value = "127.0.0.1:7400", value_name = "ADDR")]
    pub listen: SocketAddr,
    /// Host name or address that others are told to connect to
    #[arg(long, value_name = "HOST")]
    pub advertise: Option<String>,
    /// Listen also where other machines can connect, although there is no encryption or authentication yet
    #[arg(long, env = "CAIRN_INSECURE", value_parser = builder::BoolishValueParser::new())]
    pub insecure: bool,
}

/// The lock under which something is changed.
#[derive(Clone, Debug, Args)]
pub struct Token {
    /// Token of a lock that is held on the file, as `cairn lock` hands it to its command
    #[arg(long, env = TOKEN_VARIABLE, value_name = "TOKEN")]
    pub token: Option<FencingToken>,
}

#[derive(Debug, Args)]
pub struct Put {
    /// Copy directories with all that is in them
    #[arg(short, long)]
    pub recursive: bool,
    /// Copy what symbolic links in directories lead to; without it each is named and left out
    #[arg(short = 'L', long)]
    pub dereference: bool,
    #[command(flatten)]
    pub token: Token,
    /// Local files and directories
    #[arg(required = true, value_name = "SRC")]
    pub sources: Vec<PathBuf>,
    /// Where in Cairn: into it if it is a directory, else by that name
    #[arg(value_name = "DST")]
    pub target: PathBuf,
}

#[derive(Debug, Args)]
pub struct Get {
    /// Copy directories with all that is in them
    #[arg(short, long)]
    pub recursive: bool,
    /// Files and directories in Cairn
    #[arg(required = true, value_name = "SRC")]
    pub sources: Vec<PathBuf>,
    /// Where on this machine: into it if it is a directory, else by that name
    #[arg(value_name = "DST")]
    pub target: PathBuf,
}

#[derive(Debug, Args)]
pub struct Cat {
    /// Files to write, one behind the other
    #[arg(required = true, value_parser = remote, value_name = "PATH")]
    pub paths: Vec<String>,
}

#[derive(Debug, Args)]
pub struct Write {
    /// Put the bytes at the end of what is there
    #[arg(long)]
    pub append: bool,
    #[command(flatten)]
    pub token: Token,
    /// The file; made if it does not exist
    #[arg(value_parser = remote)]
    pub path: String,
}

#[derive(Debug, Args)]
pub struct Ls {
    /// Kind and permissions, version, size, time and name
    #[arg(short)]
    pub long: bool,
    /// All directories below, too
    #[arg(short = 'R', long)]
    pub recursive: bool,
    /// What to list
    #[arg(default_value = "/", value_parser = remote, value_name = "PATH")]
    pub paths: Vec<String>,
}

#[derive(Debug, Args)]
pub struct Paths {
    /// What to show
    #[arg(required = true, value_parser = remote, value_name = "PATH")]
    pub paths: Vec<String>,
}

#[derive(Debug, Args)]
pub struct Mkdir {
    /// Make those above it too; an existing directory is fine
    #[arg(short, long)]
    pub parents: bool,
    /// Copies of each file in it, unless one says otherwise [default: as the directory above]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..), value_name = "N")]
    pub replication: Option<u32>,
    /// Directories to make
    #[arg(required = true, value_parser = remote, value_name = "PATH")]
    pub paths: Vec<String>,
}

#[derive(Debug, Args)]
pub struct Set {
    /// Copies of the file, or of each file in the directory that does not say otherwise; 0 for as the directory above
    #[arg(long, value_name = "N")]
    pub replication: u32,
    #[command(flatten)]
    pub token: Token,
    /// What to change
    #[arg(required = true, value_parser = remote, value_name = "PATH")]
    pub paths: Vec<String>,
}

#[derive(Debug, Args)]
pub struct Mv {
    /// Do not replace what is there
    #[arg(short, long)]
    pub no_clobber: bool,
    #[command(flatten)]
    pub token: Token,
    /// The name now
    #[arg(value_parser = remote, value_name = "SRC")]
    pub from: String,
    /// The name then; a directory that exists is moved into
    #[arg(value_parser = remote, value_name = "DST")]
    pub to: String,
}

#[derive(Debug, Args)]
pub struct Rm {
    /// Remove directories with all that is in them
    #[arg(short, long)]
    pub recursive: bool,
    /// Say nothing of what does not exist
    #[arg(short, long)]
    pub force: bool,
    /// Let `/` be given with -r: all of the file system
    #[arg(long)]
    pub no_preserve_root: bool,
    #[command(flatten)]
    pub token: Token,
    /// What to remove
    #[arg(required = true, value_parser = remote, value_name = "PATH")]
    pub paths: Vec<String>,
}

#[derive(Debug, Args)]
pub struct Lock {
    /// How long the lock outlives this process when it dies
    #[arg(long, value_parser = life, default_value = "10s", value_name = "TIME")]
    pub ttl: Duration,
    /// How long to wait for another holder; declined at once when not given
    #[arg(long, value_parser = span, value_name = "TIME")]
    pub wait: Option<Duration>,
    /// Share the lock with other readers; keeps writers away
    #[arg(long)]
    pub shared: bool,
    /// The file, which need not exist yet
    #[arg(value_parser = remote)]
    pub path: String,
    /// What to run while the lock is held; its token is in CAIRN_LOCK_TOKEN
    #[arg(last = true, required = true, value_name = "CMD")]
    pub command: Vec<std::ffi::OsString>,
}

#[derive(Debug, Args)]
pub struct Unlock {
    /// Really take it away: its holder's work under it is refused from then on
    #[arg(long, required = true)]
    pub force: bool,
    /// The locked file
    #[arg(value_parser = remote)]
    pub path: String,
}

#[derive(Debug, Args)]
pub struct Explain {
    /// The file
    #[arg(value_parser = remote)]
    pub path: String,
}

#[derive(Debug, Args)]
pub struct Drain {
    /// Take the order back
    #[arg(long)]
    pub cancel: bool,
    /// Wait until the server is empty
    #[arg(long)]
    pub wait: bool,
    /// Id of the file server, as `cairn status` shows it
    pub server: u64,
}

#[derive(Debug, Args)]
pub struct Forget {
    /// Id of the file server, as `cairn status` shows it
    pub server: u64,
}

#[derive(Debug, Args)]
pub struct Backup {
    /// Where the backup is kept: an empty folder, or one with an earlier backup, which is replaced once this is whole
    #[arg(value_name = "DIR")]
    pub folder: PathBuf,
}

#[derive(Debug, Args)]
pub struct Restore {
    /// The folder of the backup
    #[arg(value_name = "BACKUP")]
    pub backup: PathBuf,
    /// The data folder for the directory, which must be empty
    #[arg(long, value_name = "DIR")]
    pub data: PathBuf,
    /// Give the store a generation above this one: needed when the same backup was restored before
    #[arg(long, value_name = "GENERATION", default_value = "0")]
    pub above: u64,
}

#[derive(Debug, Args)]
pub struct Migrate {
    /// Where the store is: the data folder of a directory, or etcd://host1:2379,host2:2379/prefix
    #[arg(long, value_name = "STORE")]
    pub from: String,
    /// Where it is to go: an empty folder, or etcd://... with a prefix under which nothing is
    #[arg(long, value_name = "STORE")]
    pub to: String,
    /// How to talk to etcd; the same where both are on etcd
    #[command(flatten)]
    pub etcd: cluster::EtcdArgs,
}

#[derive(Debug, Args)]
pub struct Bench {
    /// Short runs with little data: a look instead of figures to keep
    #[arg(long)]
    pub quick: bool,
    /// Times that each workload is run
    #[arg(long, default_value = "3", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100))]
    pub rounds: u32,
    /// Parts of names of workloads, separated by commas; all by default
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    pub only: Vec<String>,
}

#[derive(Debug, Args)]
pub struct Rebuild {
    /// Really go on with the carriers that have reported: acknowledged changes that only others know are lost
    #[arg(long, required = true)]
    pub force: bool,
}

#[derive(Debug, Args)]
pub struct Health {
    /// Address of the server, http://host:port
    #[arg(default_value = DIRECTORY_DEFAULT)]
    pub uri: String,
}

impl Cli {
    /// What this process was started with. A variable that is set to nothing counts as not set.
    ///
    /// # Errors
    /// Wrong usage, or a wish for help or the version: see [`complaint`].
    pub fn given() -> Result<Self, clap::Error> {
        let matches = unset(Self::command()).try_get_matches()?;
        Self::from_arg_matches(&matches)
    }
}

impl Shared {
    /// How long to try to reach a directory at first.
    pub fn reach(&self) -> Duration {
        self.timeout.unwrap_or(REACH_DEFAULT)
    }
}

/// A program's arguments without the variables that are set to nothing.
fn unset(command: clap::Command) -> clap::Command {
    let is_empty = |name: &std::ffi::OsStr| std::env::var_os(name).is_some_and(|value| value.is_empty());
    command
        .mut_args(|arg| match arg.get_env() {
            Some(name) if is_empty(name) => arg.env(None::<&'static str>),
            _ => arg,
        })
        .mut_subcommands(unset)
}

/// What clap says of wrong usage, as this program says things: `cairn: ...`, and the usage as it is always, not with
/// the variables that happen to be set.
pub fn complaint(mut error: clap::Error) -> String {
    let mut command = Cli::command();
    command.build();
    let named = std::env::args_os().skip(1).find_map(|word| {
        let word = word.to_str()?.to_owned();
        command.find_subcommand(&word).is_some().then_some(word)
    });
    let usage = match named.and_then(|name| command.find_subcommand_mut(name)) {
        Some(command) => command.render_usage(),
        None => command.render_usage(),
    };
    if error.remove(ContextKind::Usage).is_some() {
        error.insert(ContextKind::Usage, clap::error::ContextValue::StyledStr(usage));
    }
    let text = error.render().to_string();
    text.strip_prefix("error: ").unwrap_or(&text).trim_end().to_owned()
}

/// A path in Cairn as a person may write it: absolute, whether it begins with a slash or not.
///
/// # Errors
/// Usage, when it is not UTF-8.
pub fn cairn_path(path: &std::path::Path) -> Result<String, Failure> {
    let text = path.to_str().ok_or_else(|| {
        Failure::usage(format!("{}: a path in Cairn is UTF-8, and this is not", path.display()))
    })?;
    remote(text).map_err(Failure::usage)
}

/// The same of text. An empty one is a mistake, most often a variable that is not set: not the root.
fn remote(path: &str) -> Result<String, String> {
    match path.chars().next() {
        None => Err("a path is not empty; the whole file system is /".to_owned()),
        Some('/') => Ok(path.to_owned()),
        Some(_) => Ok(format!("/{path}")),
    }
}

/// A span of time.
fn span(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text)
        .map_err(|_| "not a span of time: write a number with its unit, such as 500ms, 10s or 2m".to_owned())
}

/// The life of a session without renewal.
fn life(text: &str) -> Result<Duration, String> {
    let ttl = span(text)?;
    let (min, max) = (
        Duration::from_millis(cairn_proto::limits::SESSION_TTL_MS_MIN),
        Duration::from_millis(cairn_proto::limits::SESSION_TTL_MS_MAX),
    );
    if (min..=max).contains(&ttl) {
        return Ok(ttl);
    }
    let shown = humantime::format_duration;
    Err(format!("a lock outlives its holder by {} to {}", shown(min), shown(max)))
}

#[cfg(test)]
mod hostile;
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_commands_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn shared_flags_go_before_and_behind() {
        for words in [
            ["cairn", "--json", "--directory", "http://a:1,http://b:2", "status"],
            ["cairn", "status", "--json", "--directory", "http://a:1,http://b:2"],
        ] {
            let cli = Cli::try_parse_from(words).unwrap();
            assert!(cli.shared.json);
            assert_eq!(cli.shared.directory, ["http://a:1", "http://b:2"]);
        }
    }

    #[test]
    fn a_lock_needs_a_command_behind_dashes() {
        let cli =
            Cli::try_parse_from(["cairn", "lock", "/a", "--ttl", "30s", "--", "sh", "-c", "true"]).unwrap();
        let Command::Lock(lock) = cli.command else { panic!("not a lock") };
        assert_eq!(lock.command, ["sh", "-c", "true"]);
        assert_eq!(lock.ttl, Duration::from_secs(30));
        assert!(Cli::try_parse_from(["cairn", "lock", "/a"]).is_err());
        assert!(Cli::try_parse_from(["cairn", "unlock", "/a"]).is_err(), "only by force");
    }

    #[test]
    fn the_last_path_of_a_copy_is_its_destination() {
        let cli = Cli::try_parse_from(["cairn", "put", "-r", "a", "b c", "/d"]).unwrap();
        let Command::Put(put) = cli.command else { panic!("not a put") };
        assert_eq!(put.sources, [PathBuf::from("a"), PathBuf::from("b c")]);
        assert_eq!(put.target, PathBuf::from("/d"));
        assert!(Cli::try_parse_from(["cairn", "get", "/d"]).is_err());
    }

    #[test]
    fn a_token_is_checked_before_anything_is_done() {
        let words = |token| ["cairn", "rm", "--token", token, "/a"];
        assert!(Cli::try_parse_from(words("1.7")).is_ok());
        let error = Cli::try_parse_from(words("seven")).unwrap_err().to_string();
        assert!(error.contains("not a lock token"), "{error}");
    }

    #[test]
    fn paths_are_absolute_with_or_without_the_slash_and_never_empty() {
        assert_eq!(remote("a/b").unwrap(), "/a/b");
        assert_eq!(remote("/a/b").unwrap(), "/a/b");
        assert!(remote("").is_err());
        for words in [["rm", ""], ["ls", ""], ["stat", ""], ["cat", ""], ["mkdir", ""], ["write", ""]] {
            let words = ["cairn"].into_iter().chain(words);
            assert!(Cli::try_parse_from(words.clone()).is_err(), "{:?}", words.collect::<Vec<_>>());
        }
    }

    #[test]
    fn spans_of_time_are_explained() {
        assert_eq!(span("2m").unwrap(), Duration::from_secs(120));
        assert!(span("abc").unwrap_err().contains("10s"));
        assert!(life("1ms").unwrap_err().contains("1s to 10m"));
    }
}
