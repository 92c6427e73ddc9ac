//! Flags and environment of the `file-service` program, checked as a whole before any port is bound.

use crate::{Config, Timing};
use cairn_proto::{Error, Result, listen::Listen, net::authority};
use clap::{CommandFactory as _, FromArgMatches as _};
use std::{net::SocketAddr, path::PathBuf};

/// A file server of Cairn: stores and serves chunks.
///
/// All values are read as text and checked together, so that every mistake is reported at once.
#[derive(Clone, Debug, clap::Parser)]
#[command(name = "file-service", version, about)]
pub struct Args {
    /// Address to listen on, 127.0.0.1:7500 or unix:/path; may be repeated
    #[arg(long, env = "CAIRN_LISTEN", value_delimiter = ',', default_value = "127.0.0.1:7500")]
    pub listen: Vec<String>,
    /// Folder for chunks and records
    #[arg(long, env = "CAIRN_DATA", default_value = "cairn-file-data")]
    pub data: PathBuf,
    /// Addresses of the directory, separated by commas
    #[arg(long, env = "CAIRN_DIRECTORY", value_delimiter = ',', default_value = "http://127.0.0.1:7400")]
    pub directory: Vec<String>,
    /// Address by which others reach this server, http://host:port or unix:/path; may be repeated, best first
    /// [default: the addresses it listens on]
    #[arg(long, env = "CAIRN_ADVERTISE", value_delimiter = ',')]
    pub advertise: Vec<String>,
    /// Failure domain, such as a rack or a building
    #[arg(long, env = "CAIRN_ZONE", default_value = "")]
    pub zone: String,
    /// Days in which every copy is re-read and compared with its checksums once; 0 switches it off
    #[arg(long, env = "CAIRN_SCRUB_DAYS", default_value = "14")]
    pub scrub_days: String,
    /// MiB that re-reading may take from the disk in a second at most
    #[arg(long, env = "CAIRN_SCRUB_MIB", default_value = "32", hide_short_help = true)]
    pub scrub_mib: String,
    /// Allow addresses that other machines can reach, although nothing is encrypted or authenticated yet
    #[arg(long, env = "CAIRN_INSECURE", value_parser = clap::builder::BoolishValueParser::new())]
    pub insecure: bool,
    /// Address for metrics in Prometheus form, such as 127.0.0.1:9500; none by default
    #[arg(long, env = "CAIRN_METRICS")]
    pub metrics: Option<String>,
    /// What to log, such as info or file_service=debug
    #[arg(long, env = "CAIRN_LOG", default_value = "info")]
    pub log: String,
}

/// Checked arguments.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where to listen.
    pub listen: Vec<Listen>,
    /// The folder for chunks and records.
    pub data: PathBuf,
    /// Where to serve metrics.
    pub metrics: Option<SocketAddr>,
    /// For the service. `advertise` is empty when it is to be taken from the listeners.
    pub config: Config,
}

/// Longest period of re-reading that can be asked for: ten years.
const SCRUB_DAYS_MAX: u64 = 3_650;
/// Longest name of a zone, in bytes.
pub const ZONE_BYTES_MAX: usize = 255;

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
        if self.advertise.is_empty()
            && let Some(open) = listen.iter().find(|listen| !listen.is_specific())
        {
            problems.push(format!(
                "--listen {open} is no address that others can connect to: say with --advertise which one they can"
            ));
        }
        addresses("--directory", &self.directory, &mut problems);
        addresses("--advertise", &self.advertise, &mut problems);
        if self.directory.is_empty() {
            problems.push("--directory needs at least one address".to_owned());
        }
        if self.data.as_os_str().is_empty() {
            problems.push("--data needs a folder".to_owned());
        }
        if self.zone.len() > ZONE_BYTES_MAX {
            problems
                .push(format!("--zone has {} bytes, at most {ZONE_BYTES_MAX} are allowed", self.zone.len()));
        }
        let mut timing = Timing::default();
        if let Some(days) = number("--scrub-days", &self.scrub_days, 0, SCRUB_DAYS_MAX, &mut problems) {
            timing.scrub_period_ms = days * 24 * 3_600_000;
        }
        if let Some(mib) = number("--scrub-mib", &self.scrub_mib, 1, 1 << 20, &mut problems) {
            timing.scrub_bytes_per_second = mib << 20;
        }
        let metrics = self.check_metrics(&mut problems);
        if let Err(error) = tracing_subscriber::EnvFilter::try_new(&self.log) {
            problems.push(format!("--log '{}' is not a filter: {error}", self.log));
        }
        if !problems.is_empty() {
            return Err(Error::invalid(problems.join("\n")));
        }
        let config = Config {
            directory: self.directory.clone(),
            advertise: self.advertise.clone(),
            zone: self.zone.clone(),
            timing,
        };
        Ok(Settings { listen, data: self.data.clone(), metrics, config })
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
                problems.push(format!("--metrics '{text}' is not an address: write 127.0.0.1:9500"));
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
        Args::try_parse_from(["file-service"].iter().chain(words)).unwrap()
    }

    #[test]
    fn defaults_are_good() {
        let settings = args(&[]).check().unwrap();
        assert_eq!(settings.listen, [Listen::Tcp("127.0.0.1:7500".parse().unwrap())]);
        assert_eq!(settings.config.directory, ["http://127.0.0.1:7400"]);
        assert!(settings.config.advertise.is_empty());
        assert_eq!(settings.config.timing, Timing::default());
        assert_eq!(args(&["--scrub-days", "0"]).check().unwrap().config.timing.scrub_period_ms, 0);
    }

    #[test]
    fn every_bad_value_is_reported_at_once() {
        let error = args(&[
            "--listen",
            "nonsense",
            "--listen",
            "unix:relative",
            "--directory",
            "https://a:1,http://b:2",
            "--advertise",
            "http://c:0",
            "--metrics",
            "9500",
            "--scrub-days",
            "4000",
            "--log",
            "a=b=c",
        ])
        .check()
        .unwrap_err();
        for bad in
            ["'nonsense'", "'unix:relative'", "'https://a:1'", "'http://c:0'", "'9500'", "'a=b=c'", "'4000'"]
        {
            assert!(error.message().contains(bad), "{bad} is missing in: {error}");
        }
        assert!(!error.message().contains("http://b:2"), "{error}");
    }

    #[test]
    fn an_open_address_needs_insecure_and_an_address_to_advertise() {
        let error = args(&["--listen", "0.0.0.0:7500"]).check().unwrap_err();
        assert!(error.message().contains("--insecure"), "{error}");
        let error = args(&["--listen", "0.0.0.0:7500", "--insecure"]).check().unwrap_err();
        assert!(error.message().contains("--advertise"), "{error}");
        let words = ["--listen", "0.0.0.0:7500", "--insecure", "--advertise", "http://file-1:7500"];
        assert_eq!(args(&words).check().unwrap().config.advertise, ["http://file-1:7500"]);
    }
}
