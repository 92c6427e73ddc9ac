//! How etcd is talked to, with the flags of etcd's own clients.

use crate::store::etcd::{EtcdAddress, EtcdOptions, EtcdTls, EtcdUser, SCHEME};
use bytes::Bytes;
use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

/// The name of the engine that is used when nothing else is said.
pub const EMBEDDED: &str = "redb";
/// Largest file with certificates.
const PEM_BYTES_MAX: u64 = 1024 * 1024;

/// Flags for a store on etcd; without it they are not looked at.
#[derive(Clone, Default, clap::Args)]
pub struct EtcdArgs {
    /// File with the certificates of those who sign etcd's, in PEM; turns TLS on
    #[arg(long, env = "CAIRN_ETCD_CACERT")]
    pub etcd_cacert: Option<PathBuf>,
    /// File with the certificate that is shown to etcd, in PEM
    #[arg(long, env = "CAIRN_ETCD_CERT")]
    pub etcd_cert: Option<PathBuf>,
    /// File with the key of that certificate, in PEM
    #[arg(long, env = "CAIRN_ETCD_KEY")]
    pub etcd_key: Option<PathBuf>,
    /// User of etcd, as name or name:password
    #[arg(long, env = "CAIRN_ETCD_USER", hide_env_values = true)]
    pub etcd_user: Option<String>,
    /// Password of that user; the variable keeps it out of the list of processes
    #[arg(long, env = "CAIRN_ETCD_PASSWORD", hide_env_values = true)]
    pub etcd_password: Option<String>,
}

impl fmt::Debug for EtcdArgs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdArgs").field("etcd_cacert", &self.etcd_cacert).finish_non_exhaustive()
    }
}

impl EtcdArgs {
    /// Options for the store that `flag` names; problems are added to the others.
    pub fn options(&self, flag: &str, store: &str, problems: &mut Vec<String>) -> Option<EtcdOptions> {
        let before = problems.len();
        let address = store.parse::<EtcdAddress>();
        let address = address.map_err(|error| problems.push(format!("{flag} {}", error.message()))).ok();
        let tls = self.tls(problems);
        let user = self.user(problems);
        if problems.len() > before {
            return None;
        }
        Some(EtcdOptions { tls: tls.map(Arc::new), user, ..EtcdOptions::new(address?) })
    }

    fn tls(&self, problems: &mut Vec<String>) -> Option<EtcdTls> {
        let mut read = |flag, path: &Option<PathBuf>| path.as_ref().map(|path| pem(flag, path, problems));
        let ca = read("--etcd-cacert", &self.etcd_cacert);
        let identity = (read("--etcd-cert", &self.etcd_cert), read("--etcd-key", &self.etcd_key));
        let identity = match identity {
            (Some(certificate), Some(key)) => certificate.zip(key),
            (None, None) => None,
            _ => {
                problems.push("--etcd-cert and --etcd-key are given together".to_owned());
                None
            }
        };
        match ca {
            Some(ca) => Some(EtcdTls { ca: ca?, identity }),
            None if identity.is_some() => {
                problems.push("--etcd-cert needs --etcd-cacert: who signs etcd's certificates".to_owned());
                None
            }
            None => None,
        }
    }

    fn user(&self, problems: &mut Vec<String>) -> Option<EtcdUser> {
        let (name, inline) = match self.etcd_user.as_deref() {
            None => {
                if self.etcd_password.is_some() {
                    problems.push("--etcd-password needs --etcd-user".to_owned());
                }
                return None;
            }
            Some(user) => match user.split_once(':') {
                Some((name, password)) => (name, Some(password)),
                None => (user, None),
            },
        };
        let Some(password) = self.etcd_password.as_deref().or(inline) else {
            problems.push("--etcd-user needs a password: set CAIRN_ETCD_PASSWORD".to_owned());
            return None;
        };
        if name.is_empty() {
            problems.push("--etcd-user needs a name".to_owned());
        }
        Some(EtcdUser { name: name.to_owned(), password: password.to_owned() })
    }
}

/// Whether a store is one on etcd.
pub fn is_etcd(store: &str) -> bool {
    store.starts_with(SCHEME)
}

fn pem(flag: &str, path: &Path, problems: &mut Vec<String>) -> Option<Bytes> {
    let no_pem = || std::io::Error::other("it is no file in PEM");
    let file = std::fs::metadata(path).and_then(|file| match file.is_file() && file.len() <= PEM_BYTES_MAX {
        true => std::fs::read(path),
        false => Err(no_pem()),
    });
    let begin = b"-----BEGIN";
    let content = file.and_then(|content| match content.windows(begin.len()).any(|part| part == begin) {
        true => Ok(Bytes::from(content)),
        false => Err(no_pem()),
    });
    content.map_err(|error| problems.push(format!("{flag} {}: {error}", path.display()))).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(args: &EtcdArgs) -> Result<EtcdOptions, String> {
        let mut problems = Vec::new();
        let options = args.options("--store", "etcd://a:1", &mut problems);
        options.ok_or_else(|| problems.join("\n"))
    }

    #[test]
    fn users_are_read_as_etcdctl_does() {
        let user = |user: &str, password: Option<&str>| {
            let args = EtcdArgs {
                etcd_user: Some(user.into()),
                etcd_password: password.map(Into::into),
                ..EtcdArgs::default()
            };
            check(&args).map(|options| options.user.map(|user| (user.name, user.password)))
        };
        let expected = |name: &str, password: &str| Ok(Some((name.to_owned(), password.to_owned())));
        assert_eq!(user("a:b:c", None), expected("a", "b:c"));
        assert_eq!(user("a", Some("b")), expected("a", "b"));
        assert!(user("a", None).unwrap_err().contains("CAIRN_ETCD_PASSWORD"));
        assert!(user(":x", None).unwrap_err().contains("a name"));
        let password = EtcdArgs { etcd_password: Some("x".into()), ..EtcdArgs::default() };
        assert!(check(&password).unwrap_err().contains("--etcd-user"));
        assert_eq!(check(&EtcdArgs::default()).unwrap().user, None);
    }

    #[test]
    fn certificates_go_together_and_every_problem_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("x.pem");
        std::fs::write(&file, "-----BEGIN X-----").unwrap();
        let other = folder.path().join("other");
        std::fs::write(&other, "x").unwrap();
        let missing = folder.path().join("missing");
        let args = EtcdArgs {
            etcd_cacert: Some(missing),
            etcd_cert: Some(file.clone()),
            etcd_user: Some("a".into()),
            ..EtcdArgs::default()
        };
        let problems = check(&args).unwrap_err();
        for part in ["--etcd-cacert", "together", "CAIRN_ETCD_PASSWORD"] {
            assert!(problems.contains(part), "{part}: {problems}");
        }
        let pair =
            EtcdArgs { etcd_cert: Some(file.clone()), etcd_key: Some(file.clone()), ..EtcdArgs::default() };
        assert!(check(&pair).unwrap_err().contains("--etcd-cacert"));
        let other = EtcdArgs { etcd_cacert: Some(other), ..pair.clone() };
        assert!(check(&other).unwrap_err().contains("no file in PEM"));
        let all = EtcdArgs { etcd_cacert: Some(file), ..pair };
        assert!(check(&all).unwrap().tls.is_some_and(|tls| tls.identity.is_some()));
    }
}
