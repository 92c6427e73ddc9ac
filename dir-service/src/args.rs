//! Flags and environment of the `dir-service` program, checked as a whole before any port is bound.

use crate::{Config, Effort, Timing, store::EtcdOptions};
use cairn_proto::{Error, Result, limits::REPLICATION_MAX, listen::Listen, net::authority};
use clap::{CommandFactory as _, FromArgMatches as _};
use std::{net::SocketAddr, path::PathBuf};

pub mod etcd;

use etcd::{EMBEDDED, EtcdArgs};

/// The directory of Cairn: names, versions, locks and placement.
///
/// All values are read as text and checked together, so that every mistake is reported at once.
#[derive(Clone, Debug, clap::Parser)]
#[command(name = "dir-service", version, about)]
pub struct Args {
    /// Address to listen on, 127.0.0.1:7400 or unix:/path; may be repeated
    #[arg(long, env = "CAIRN_LISTEN", value_delimiter = ',', default_value = "127.0.0.1:7400")]
    pub listen: Vec<String>,
    /// Engine of the store: redb, in the folder of --data, or etcd://host1:2379,host2:2379/prefix
    #[arg(long, env = "CAIRN_STORE", default_value = EMBEDDED)]
    pub store: String,
    /// Where that is on etcd, how to talk to it
    #[command(flatten)]
    pub etcd: EtcdArgs,
    /// Folder for the store
    #[arg(long, env = "CAIRN_DATA", default_value = "cairn-directory-data")]
    pub data: PathBuf,
    /// Address by which others reach this directory, http://host:port or unix:/path; may be repeated, best first
    /// [default: the addresses it listens on]
    #[arg(long, env = "CAIRN_ADVERTISE", value_delimiter = ',')]
    pub advertise: Vec<String>,
    /// Copies of every chunk [default: 3, or as many as there are file servers]
    #[arg(long, env = "CAIRN_REPLICATION")]
    pub replication: Option<String>,
    /// Copies that are durable before a write is acknowledged [default: half of the copies, plus one]
    #[arg(long, env = "CAIRN_MIN_COPIES")]
    pub min_copies: Option<String>,
    /// Allow addresses that other machines can reach, although nothing is encrypted or authenticated yet
    #[arg(long, env = "CAIRN_INSECURE", value_parser = clap::builder::BoolishValueParser::new())]
    pub insecure: bool,
    /// Address for metrics in Prometheus form, such as 127.0.0.1:9400; none by default
    #[arg(long, env = "CAIRN_METRICS")]
    pub metrics: Option<String>,
    /// What to log, such as info or dir_service=debug
    #[arg(long, env = "CAIRN_LOG", default_value = "info")]
    pub log: String,
    /// MiB of memory for the store's index
    #[arg(long, env = "CAIRN_INDEX_CACHE_MIB", default_value = "256", hide_short_help = true)]
    pub index_cache_mib: String,
    /// Milliseconds between heartbeats of file servers
    #[arg(long, env = "CAIRN_HEARTBEAT_MS", default_value = "500", hide_short_help = true)]
    pub heartbeat_ms: String,
    /// Milliseconds of silence after which a file server gets no new grants
    #[arg(long, env = "CAIRN_SUSPECT_MS", default_value = "3000", hide_short_help = true)]
    pub suspect_ms: String,
    /// Milliseconds of silence after which a file server's seats go to others
    #[arg(long, env = "CAIRN_DEAD_MS", default_value = "30000", hide_short_help = true)]
    pub dead_ms: String,
    /// Milliseconds between the drop of a chunk and its removal
    #[arg(long, env = "CAIRN_GRACE_MS", default_value = "30000", hide_short_help = true)]
    pub grace_ms: String,
    /// Milliseconds between two comparisons of a file server's inventory
    #[arg(long, env = "CAIRN_COMPARE_MS", default_value = "60000", hide_short_help = true)]
    pub compare_ms: String,
    /// Milliseconds that an empty directory waits for file servers that know a cluster
    #[arg(long, env = "CAIRN_FORMING_WAIT_MS", default_value = "1000", hide_short_help = true)]
    pub forming_wait_ms: String,
    /// Milliseconds that a change may wait for its copies on file servers before commits slow down
    #[arg(long, env = "CAIRN_JOURNAL_LAG_MS", default_value = "1000", hide_short_help = true)]
    pub journal_lag_ms: String,
    /// MiB that repairs copy in a second at most, of the whole cluster; 0: no limit
    #[arg(long, env = "CAIRN_REPAIR_MIB", default_value = "128", hide_short_help = true)]
    pub repair_mib: String,
    /// Repair orders that a file server takes part in at a time
    #[arg(long, env = "CAIRN_REPAIR_ORDERS", default_value = "2", hide_short_help = true)]
    pub repair_orders: String,
    /// MiB by which the copies of two file servers may differ before seats move to the emptier one
    #[arg(long, env = "CAIRN_BALANCE_MIB", default_value = "64", hide_short_help = true)]
    pub balance_mib: String,
    /// MiB that merging the extents of fragmented files copies in a second at most; 0 switches it off
    #[arg(long, env = "CAIRN_MERGE_MIB", default_value = "16", hide_short_help = true)]
    pub merge_mib: String,
    /// Milliseconds that a session lives without renewal, unless it says otherwise
    #[arg(long, env = "CAIRN_SESSION_TTL_MS", default_value = "10000", hide_short_help = true)]
    pub session_ttl_ms: String,
}

/// Checked arguments.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where to listen.
    pub listen: Vec<Listen>,
    /// The engine of the store.
    pub store: StoreChoice,
    /// The folder for the store, where the engine wants one.
    pub data: PathBuf,
    /// Where to serve metrics.
    pub metrics: Option<SocketAddr>,
    /// For the service. `advertise` is empty when it is to be taken from the listeners.
    pub config: Config,
}

/// The engine of a directory's store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreChoice {
    /// A journal over a redb index, in the folder for data.
    Embedded,
    /// etcd.
    Etcd(EtcdOptions),
}

/// Longest time that can be given, one day: a larger one is a mistake in the unit.
const MS_MAX: u64 = 24 * 3_600 * 1_000;

impl Args {
    /// What this process was started with. A variable that is set to nothing counts as not set.
    ///
    /// # Errors
    /// An unknown flag or a missing value, or a wish for help or the version.
    pub fn given() -> Result<Self, clap::Error> {
        let is_empty = |name: &std::ffi::OsStr| std::env::var_os(name).is_some_and(|value| value.is_empty());
        let command = Self::command().mut_args(|arg| match arg.get_env() {
            Some(name) if is_empty(name) => arg.env(None::<&'static str>),
            _ => arg,
        });
        Self::from_arg_matches(&command.try_get_matches()?)
    }

    /// Checks all values.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` naming every bad value and what to write in its place.
    pub fn check(&self) -> Result<Settings> {
        let mut problems = Vec::new();
        let listen = self.check_listen(&mut problems);
        addresses("--advertise", &self.advertise, &mut problems);
        if self.data.as_os_str().is_empty() {
            problems.push("--data needs a folder".to_owned());
        }
        let store = self.check_store(&mut problems);
        let copies = |flag: &str, text: &Option<String>, problems: &mut Vec<String>| {
            text.as_ref()
                .and_then(|text| number(flag, text, 1, u64::from(REPLICATION_MAX), problems))
                .map(|n| n as u32)
        };
        let replication = copies("--replication", &self.replication, &mut problems);
        let min_copies = copies("--min-copies", &self.min_copies, &mut problems);
        if let (Some(min), Some(all)) = (min_copies, replication)
            && min > all
        {
            problems.push(format!("--min-copies {min} is more than --replication {all}"));
        }
        let cache = number("--index-cache-mib", &self.index_cache_mib, 1, 1 << 20, &mut problems);
        let timing = self.check_timing(&mut problems);
        let effort = self.check_effort(&mut problems);
        let metrics = self.check_metrics(&mut problems);
        if let Err(error) = tracing_subscriber::EnvFilter::try_new(&self.log) {
            problems.push(format!("--log '{}' is not a filter: {error}", self.log));
        }
        if !problems.is_empty() {
            return Err(Error::invalid(problems.join("\n")));
        }
        let config = Config {
            advertise: self.advertise.clone(),
            replication,
            min_copies,
            index_cache_bytes: cache.map(|mib| (mib as usize) << 20),
            timing,
            effort,
        };
        Ok(Settings { listen, store, data: self.data.clone(), metrics, config })
    }

    fn check_store(&self, problems: &mut Vec<String>) -> StoreChoice {
        if self.store == EMBEDDED {
            return StoreChoice::Embedded;
        }
        if !etcd::is_etcd(&self.store) {
            let store = &self.store;
            problems
                .push(format!("--store '{store}' is not an engine: write {EMBEDDED} or etcd://host:2379"));
            return StoreChoice::Embedded;
        }
        self.etcd.options("--store", &self.store, problems).map_or(StoreChoice::Embedded, StoreChoice::Etcd)
    }

    fn check_effort(&self, problems: &mut Vec<String>) -> Effort {
        let mut effort = Effort::default();
        let mut mib = |flag, text, field: &mut u64| {
            if let Some(mib) = number(flag, text, 0, 1 << 20, problems) {
                *field = mib << 20;
            }
        };
        mib("--repair-mib", &self.repair_mib, &mut effort.repair_bytes_per_second);
        mib("--balance-mib", &self.balance_mib, &mut effort.balance_ignored_bytes);
        mib("--merge-mib", &self.merge_mib, &mut effort.merge_bytes_per_second);
        if let Some(orders) = number("--repair-orders", &self.repair_orders, 1, 64, problems) {
            effort.repair_orders_per_server = orders as usize;
        }
        effort
    }

    fn check_timing(&self, problems: &mut Vec<String>) -> Timing {
        let mut timing = Timing::default();
        let fields = [
            ("--heartbeat-ms", &self.heartbeat_ms, &mut timing.heartbeat_interval_ms),
            ("--suspect-ms", &self.suspect_ms, &mut timing.suspect_ms),
            ("--dead-ms", &self.dead_ms, &mut timing.dead_ms),
            ("--grace-ms", &self.grace_ms, &mut timing.grace_ms),
            ("--compare-ms", &self.compare_ms, &mut timing.compare_interval_ms),
            ("--forming-wait-ms", &self.forming_wait_ms, &mut timing.forming_wait_ms),
            ("--journal-lag-ms", &self.journal_lag_ms, &mut timing.journal_lag_ms_max),
            ("--session-ttl-ms", &self.session_ttl_ms, &mut timing.session_ttl_ms),
        ];
        for (flag, text, field) in fields {
            if let Some(ms) = number(flag, text, 1, MS_MAX, problems) {
                *field = ms;
            }
        }
        if timing.suspect_ms <= timing.heartbeat_interval_ms || timing.dead_ms <= timing.suspect_ms {
            problems.push(format!(
                "--heartbeat-ms {}, --suspect-ms {} and --dead-ms {} must grow in this order",
                timing.heartbeat_interval_ms, timing.suspect_ms, timing.dead_ms
            ));
        }
        timing
    }

    fn check_listen(&self, problems: &mut Vec<String>) -> Vec<Listen> {
        let mut listen: Vec<Listen> = Vec::new();
        for text in &self.listen {
            match text.parse::<Listen>() {
                Ok(parsed) if !parsed.is_local() && !self.insecure => {
                    problems.push(not_local("--listen", text));
                }
                Ok(parsed) if listen.contains(&parsed) => {
                    problems.push(format!("--listen {text} is given twice"));
                }
                Ok(parsed) => listen.push(parsed),
                Err(problem) => problems.push(format!("--listen {problem}")),
            }
        }
        if self.listen.is_empty() {
            problems.push("--listen needs at least one address".to_owned());
        }
        listen
    }

    fn check_metrics(&self, problems: &mut Vec<String>) -> Option<SocketAddr> {
        let text = self.metrics.as_ref()?;
        match text.parse::<SocketAddr>() {
            Ok(address) if !address.ip().is_loopback() && !self.insecure => {
                problems.push(not_local("--metrics", text));
                None
            }
            Ok(address) => Some(address),
            Err(_) => {
                problems.push(format!("--metrics '{text}' is not an address: write 127.0.0.1:9400"));
                None
            }
        }
    }
}

fn number(flag: &str, text: &str, min: u64, max: u64, problems: &mut Vec<String>) -> Option<u64> {
    let number = text.parse::<u64>().ok().filter(|number| (min..=max).contains(number));
    if number.is_none() {
        problems.push(format!("{flag} '{text}' is not a number from {min} to {max}"));
    }
    number
}

fn not_local(flag: &str, address: &str) -> String {
    format!(
        "{flag} {address} can be reached from other machines, and there is no encryption or authentication yet: \
         whoever reaches it can read, change and delete everything; give --insecure if the network is trusted"
    )
}

fn addresses(flag: &str, uris: &[String], problems: &mut Vec<String>) {
    for uri in uris {
        let good = match uri.strip_prefix("unix:") {
            Some(path) => path.starts_with('/'),
            None => authority(uri).is_ok_and(|authority| {
                authority.rsplit_once(':').is_some_and(|(host, port)| {
                    !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port != 0)
                })
            }),
        };
        if !good {
            problems.push(format!("{flag} '{uri}' is not an address: write http://host:port or unix:/path"));
        }
    }
}

#[cfg(test)]
mod hostile;
#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    fn args(words: &[&str]) -> Args {
        Args::try_parse_from(["dir-service"].iter().chain(words)).unwrap()
    }

    #[test]
    fn defaults_are_good_and_those_of_the_contract() {
        let settings = args(&[]).check().unwrap();
        assert_eq!(settings.listen, [Listen::Tcp("127.0.0.1:7400".parse().unwrap())]);
        let (given, default) = (settings.config.timing, Timing::default());
        assert_eq!(format!("{given:?}"), format!("{default:?}"));
        assert_eq!((settings.config.replication, settings.config.min_copies), (None, None));
        assert_eq!(settings.config.effort, Effort::default());
    }

    #[test]
    fn every_bad_value_is_reported_at_once() {
        let words = [
            "--listen",
            "nonsense",
            "--listen",
            "unix:relative",
            "--advertise",
            "http://c:0",
            "--metrics",
            "9400",
            "--replication",
            "17",
            "--min-copies",
            "x",
            "--dead-ms",
            "5",
            "--log",
            "a=b=c",
        ];
        let error = args(&words).check().unwrap_err();
        for bad in
            ["'nonsense'", "'unix:relative'", "'http://c:0'", "'9400'", "'17'", "'x'", "must grow", "'a=b=c'"]
        {
            assert!(error.message().contains(bad), "{bad} is missing in: {error}");
        }
        let error = args(&["--replication", "2", "--min-copies", "3"]).check().unwrap_err();
        assert!(error.message().contains("more than"), "{error}");
    }

    #[test]
    fn the_engine_is_redb_unless_it_is_etcd() {
        assert_eq!(args(&[]).check().unwrap().store, StoreChoice::Embedded);
        let store = args(&["--store", "etcd://a:2379,b:2379/x"]).check().unwrap().store;
        let StoreChoice::Etcd(options) = store else { panic!("{store:?}") };
        assert_eq!(options.address.endpoints, ["a:2379", "b:2379"]);
        for bad in ["fjall", "etcd://a", "http://a:2379"] {
            let error = args(&["--store", bad]).check().unwrap_err();
            assert!(error.message().contains("--store"), "{error}");
        }
    }

    #[test]
    fn an_open_address_needs_insecure_and_an_address_to_advertise() {
        let error = args(&["--listen", "0.0.0.0:7400"]).check().unwrap_err();
        assert!(error.message().contains("--insecure"), "{error}");
        let words = ["--listen", "0.0.0.0:7400", "--insecure", "--advertise", "http://dir:7400"];
        assert_eq!(args(&words).check().unwrap().config.advertise, ["http://dir:7400"]);
    }
}
