//! `cairn up`: a whole cluster in this process.

use crate::{
    args::{Shared, Up},
    failure::Failure,
    json,
    output::Out,
};
use cairn_proto::Error;
use cluster::Cluster;
use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
};
use tokio::signal::unix::{SignalKind, signal};

/// File servers of a new cluster when nobody says.
const FILE_SERVERS_DEFAULT: usize = 3;
/// File servers listen from this many ports above the directory on: 7500 for 7400.
const FILE_PORTS_ABOVE: u16 = 100;

/// Starts a cluster and runs it until the process is told to end.
pub async fn run(shared: &Shared, up: Up) -> Result<(), Failure> {
    if !up.listen.ip().is_loopback() && !up.insecure {
        return Err(Failure::usage(format!(
            "--listen {}: other machines can connect there, and there is no encryption or authentication yet; \
             if that is meant, give --insecure",
            up.listen
        )));
    }
    let file_servers = file_servers(&up.data, up.file_servers)?;
    let file_port = file_port(up.listen, file_servers)?;
    // Before anything starts, so that no signal is missed.
    let mut interrupted = signal(SignalKind::interrupt()).map_err(signals)?;
    let mut terminated = signal(SignalKind::terminate()).map_err(signals)?;

    let mut builder = Cluster::builder()
        .file_servers(file_servers)
        .data(&up.data)
        .listen(up.listen)
        .seed(seed())
        .file_ports_from(file_port);
    if let Some(host) = up.advertise {
        builder = builder.advertise_host(host);
    }
    let starting = builder.build_and_start();
    let cluster = tokio::select! {
        started = starting => started.map_err(cannot_start)?,
        _ = interrupted.recv() => return Ok(()),
        _ = terminated.recv() => return Ok(()),
    };
    if shared.json {
        facts(&cluster, &up.data)?;
    } else {
        greet(&cluster, &up.data)?;
    }

    let failed = tokio::select! {
        _ = interrupted.recv() => None,
        _ = terminated.recv() => None,
        error = cluster.failed() => Some(error),
    };
    eprintln!("stopping");
    // A second signal means now: the data is as safe as after a crash.
    tokio::select! {
        stopped = cluster.shutdown() => stopped.map_err(Failure::at(""))?,
        _ = interrupted.recv() => return Err(Failure::Said(crate::failure::FAILED)),
    }
    failed.map_or(Ok(()), |error| Err(Failure::at("")(error)))
}

/// An address that is in use can be chosen otherwise.
fn cannot_start(mut error: Error) -> Failure {
    if error.message().contains("Address already in use") {
        error.detail.message.push_str("; another program listens there, choose another --listen");
    }
    Failure::at("")(error)
}

fn shown(data: &Path) -> String {
    fs::canonicalize(data).unwrap_or_else(|_| data.to_owned()).display().to_string()
}

fn facts(cluster: &Cluster, data: &Path) -> Result<(), Failure> {
    let mut out = Out::new();
    out.json(&json::Up {
        directory: cluster.directory_uri(),
        file_servers: (0..cluster.file_servers()).map(|i| cluster.file_server_uri(i)).collect(),
        data: shown(data),
    })?;
    match out.finish() {
        Err(Failure::BrokenPipe) => Ok(()),
        finished => finished,
    }
}

fn greet(cluster: &Cluster, data: &Path) -> Result<(), Failure> {
    let mut out = Out::new();
    let directory = cluster.directory_uri();
    out.line(&format!("directory      {directory}"))?;
    for i in 0..cluster.file_servers() {
        out.line(&format!("file server {}  {}", i + 1, cluster.file_server_uri(i)))?;
    }
    out.line(&format!("data           {}", shown(data)))?;
    out.line("")?;
    out.line("Try, in another terminal:")?;
    let cairn = if directory == crate::args::DIRECTORY_DEFAULT {
        "cairn".to_owned()
    } else {
        format!("cairn --directory {directory}")
    };
    out.line(&format!("  echo hello | {cairn} write /hello"))?;
    out.line(&format!("  {cairn} cat /hello"))?;
    out.line(&format!("  {cairn} status"))?;
    out.line("")?;
    out.line("Ctrl-C stops it; the data stays.")?;
    match out.finish() {
        // Whoever started it need not read what it says.
        Err(Failure::BrokenPipe) => Ok(()),
        finished => finished,
    }
}

/// How many file servers to run: as many as the data directory has, and more only when asked for.
fn file_servers(data: &Path, asked: Option<usize>) -> Result<usize, Failure> {
    if let Some(stranger) = stranger(data) {
        return Err(Failure::usage(format!(
            "--data {}: holds other things than the data of a cluster, such as {stranger:?}; name a new or empty directory",
            data.display()
        )));
    }
    let there = (1..=cluster::FILE_SERVERS_MAX).take_while(|n| folder(data, *n).is_dir()).count();
    match asked {
        Some(0) => Err(Failure::usage("--file-servers 0: a cluster needs at least one")),
        Some(asked) if asked > cluster::FILE_SERVERS_MAX => Err(Failure::usage(format!(
            "--file-servers {asked}: at most {} run in one process",
            cluster::FILE_SERVERS_MAX
        ))),
        Some(asked) if asked < there => Err(Failure::usage(format!(
            "--file-servers {asked}: {} holds the data of {there} file servers, and without some of them files \
             would lack copies; leave the number out, or name another --data directory",
            data.display()
        ))),
        Some(asked) => Ok(asked),
        None if there > 0 => Ok(there),
        None => Ok(FILE_SERVERS_DEFAULT),
    }
}

/// Something in a folder without a cluster's data. What it cannot read, the start will name.
fn stranger(data: &Path) -> Option<std::ffi::OsString> {
    if data.join("directory").is_dir() || folder(data, 1).is_dir() {
        return None;
    }
    // A file system of its own has this from the beginning.
    let mut names = fs::read_dir(data).ok()?.filter_map(|entry| Some(entry.ok()?.file_name()));
    names.find(|name| name != "lost+found")
}

/// The first port of the file servers; 0, any free ones, when the directory takes any.
fn file_port(listen: SocketAddr, file_servers: usize) -> Result<u16, Failure> {
    let above = FILE_PORTS_ABOVE as usize + file_servers - 1;
    match listen.port() {
        0 => Ok(0),
        port if port as usize + above <= u16::MAX as usize => Ok(port + FILE_PORTS_ABOVE),
        port => Err(Failure::usage(format!(
            "--listen {listen}: {file_servers} file servers listen from port {} on, and {} is the last there is; \
             choose a port up to {}",
            port as usize + FILE_PORTS_ABOVE as usize,
            u16::MAX,
            u16::MAX as usize - above
        ))),
    }
}

fn folder(data: &Path, number: usize) -> PathBuf {
    data.join(format!("file-server-{number}"))
}

fn signals(error: io::Error) -> Failure {
    Failure::Local { subject: "signals".to_owned(), error }
}

/// Different at each start, as random as the standard library is.
fn seed() -> u64 {
    use std::hash::{BuildHasher as _, Hasher as _};
    std::hash::RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_servers_need_ports_above_the_directorys() {
        let at = |port| SocketAddr::from(([127, 0, 0, 1], port));
        assert_eq!(file_port(at(7400), 3).unwrap(), 7500);
        assert_eq!(file_port(at(0), 3).unwrap(), 0);
        assert_eq!(file_port(at(65_433), 3).unwrap(), 65_533);
        assert!(file_port(at(65_434), 3).unwrap_err().to_string().contains("65433"));
    }

    #[test]
    fn a_folder_with_other_things_is_not_taken_for_data() {
        let data = tempfile::tempdir().unwrap();
        fs::create_dir(data.path().join("lost+found")).unwrap();
        assert!(file_servers(data.path(), None).is_ok());
        fs::create_dir(data.path().join("photos")).unwrap();
        let message = file_servers(data.path(), None).unwrap_err().to_string();
        assert!(message.contains("photos"), "{message}");
        fs::create_dir(data.path().join("directory")).unwrap();
        assert!(file_servers(data.path(), None).is_ok(), "a cluster's, with something beside it");
    }

    #[test]
    fn a_data_directory_keeps_its_number_of_file_servers() {
        let data = tempfile::tempdir().unwrap();
        assert_eq!(file_servers(data.path(), None).unwrap(), 3);
        assert_eq!(file_servers(data.path(), Some(1)).unwrap(), 1);
        assert!(file_servers(data.path(), Some(0)).is_err());
        for number in 1..=4 {
            fs::create_dir(folder(data.path(), number)).unwrap();
        }
        assert_eq!(file_servers(data.path(), None).unwrap(), 4);
        assert_eq!(file_servers(data.path(), Some(5)).unwrap(), 5);
        let message = file_servers(data.path(), Some(3)).unwrap_err().to_string();
        assert!(message.contains("holds the data of 4 file servers"), "{message}");
    }
}
