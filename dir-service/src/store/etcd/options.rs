//! Where an etcd is, how it is talked to, and under which prefix the store lives.

use bytes::Bytes;
use cairn_proto::{Error, Result};
use std::{fmt, str::FromStr, sync::Arc, time::Duration};

/// Most members that can be named.
pub const ENDPOINTS_MAX: usize = 16;
/// Longest prefix, slashes included: each key of a plan carries it, and the largest plan fits into a transaction.
pub const PREFIX_BYTES_MAX: usize = 64;
/// What the name of a store on etcd begins with.
pub const SCHEME: &str = "etcd://";
/// The prefix of a store that names none.
const PREFIX_DEFAULT: &str = "cairn";

/// Where a store on etcd is: `etcd://host1:2379,host2:2379/prefix`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EtcdAddress {
    /// The members, as `host:port`.
    pub endpoints: Vec<String>,
    /// What all keys of the store begin with; begins and ends with a slash.
    pub prefix: String,
}

impl FromStr for EtcdAddress {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let bad = |why: String| {
            Error::invalid(format!(
                "'{text}' is not a store on etcd: {why}; write {SCHEME}host1:2379,host2:2379/prefix"
            ))
        };
        let rest =
            text.strip_prefix(SCHEME).ok_or_else(|| bad(format!("it does not begin with {SCHEME}")))?;
        let (members, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let mut endpoints: Vec<String> = Vec::new();
        for member in members.split(',') {
            let port = member.rsplit_once(':').filter(|(host, _)| !host.is_empty());
            let port = port.and_then(|(_, port)| port.parse::<u16>().ok()).filter(|port| *port != 0);
            let plain = member.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_:[]%".contains(&byte));
            if port.is_none() || !plain {
                return Err(bad(format!("'{member}' is not host:port")));
            }
            if endpoints.iter().any(|other| other == member) {
                return Err(bad(format!("{member} is named twice")));
            }
            endpoints.push(member.to_owned());
        }
        if endpoints.len() > ENDPOINTS_MAX {
            return Err(bad(format!("at most {ENDPOINTS_MAX} members can be named")));
        }
        let name = prefix.trim_end_matches('/');
        let name = if name.is_empty() { PREFIX_DEFAULT } else { name };
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b".-_/".contains(&byte);
        if !name.bytes().all(plain) || name.contains("//") || name.starts_with('/') {
            return Err(bad(format!(
                "the prefix '{prefix}' has something other than letters, digits and ._-/"
            )));
        }
        let prefix = format!("/{name}/");
        if prefix.len() > PREFIX_BYTES_MAX {
            return Err(bad(format!("the prefix has more than {PREFIX_BYTES_MAX} bytes")));
        }
        Ok(Self { endpoints, prefix })
    }
}

impl fmt::Display for EtcdAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let prefix = self.prefix.trim_end_matches('/');
        write!(f, "{SCHEME}{}{prefix}", self.endpoints.join(","))
    }
}

/// How a store on etcd is reached and kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EtcdOptions {
    /// Where it is.
    pub address: EtcdAddress,
    /// Keys and certificates, where the members want TLS.
    pub tls: Option<Arc<EtcdTls>>,
    /// Who it is used as, where the members want to know.
    pub user: Option<EtcdUser>,
    /// What is kept of the past.
    pub keep: EtcdKeep,
}

impl EtcdOptions {
    /// With neither TLS nor user.
    pub fn new(address: EtcdAddress) -> Self {
        Self { address, tls: None, user: None, keep: EtcdKeep::default() }
    }
}

/// What etcd's own clients take as `--cacert`, `--cert` and `--key`: the content of those files, in PEM.
#[derive(Clone, PartialEq, Eq)]
pub struct EtcdTls {
    /// Who signs the members' certificates.
    pub ca: Bytes,
    /// The certificate and key of this client, where the members ask for one.
    pub identity: Option<(Bytes, Bytes)>,
}

impl fmt::Debug for EtcdTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdTls").field("identity", &self.identity.is_some()).finish_non_exhaustive()
    }
}

/// A user of etcd.
#[derive(Clone, PartialEq, Eq)]
pub struct EtcdUser {
    /// The name.
    pub name: String,
    /// The password; no log shows it.
    pub password: String,
}

impl fmt::Debug for EtcdUser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdUser").field("name", &self.name).finish_non_exhaustive()
    }
}

/// How much of the past stays readable. The store compacts what is older, for the whole etcd: its history is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EtcdKeep {
    /// Revisions younger than this stay. One minute.
    pub age: Duration,
    /// So many stay at least, whatever their age. 10,000.
    pub revisions_min: u64,
    /// So many stay at most, however young: etcd's database grows by them. 100,000.
    pub revisions_max: u64,
    /// Between two looks. 5 s.
    pub look: Duration,
}

impl Default for EtcdKeep {
    fn default() -> Self {
        Self {
            age: Duration::from_secs(60),
            revisions_min: 10_000,
            revisions_max: 100_000,
            look: Duration::from_secs(5),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_shown() {
        let address: EtcdAddress = "etcd://a:2379,10.0.0.1:2380,[::1]:1/x/y/".parse().unwrap();
        assert_eq!(address.endpoints, ["a:2379", "10.0.0.1:2380", "[::1]:1"]);
        assert_eq!(address.prefix, "/x/y/");
        assert_eq!(address.to_string(), "etcd://a:2379,10.0.0.1:2380,[::1]:1/x/y");
        assert_eq!("etcd://a:1".parse::<EtcdAddress>().unwrap().prefix, "/cairn/");
        assert_eq!("etcd://a:1/".parse::<EtcdAddress>().unwrap().prefix, "/cairn/");
    }

    #[test]
    fn other_texts_are_refused_and_say_why() {
        let long = format!("etcd://a:1/{}", "x".repeat(PREFIX_BYTES_MAX));
        let many = format!(
            "etcd://{}",
            (0..=ENDPOINTS_MAX).map(|n| format!("h{n}:1")).collect::<Vec<_>>().join(",")
        );
        for bad in [
            "",
            "a:1",
            "etcd://",
            "etcd://a",
            "etcd://a:0",
            "etcd://a:x",
            "etcd://a:99999",
            "etcd://:1",
            "etcd://a:1,",
            "etcd://a:1,a:1",
            "etcd://a:1/x y",
            "etcd://a:1//x",
            "etcd://u@a:1",
            &long,
            &many,
        ] {
            let error = bad.parse::<EtcdAddress>().unwrap_err();
            assert!(error.message().contains("host1:2379"), "{error}");
        }
    }

    #[test]
    fn secrets_are_not_shown() {
        let user = EtcdUser { name: "root".into(), password: "hidden".into() };
        let identity = Some((Bytes::from_static(b"hidden"), Bytes::from_static(b"hidden")));
        let tls = EtcdTls { ca: Bytes::from_static(b"hidden"), identity };
        assert!(!format!("{user:?} {tls:?}").contains("hidden"));
    }
}
