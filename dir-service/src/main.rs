//! The `dir-service` program.

use cairn_proto::{Error, Result, host::Host};
use dir_service::{
    App,
    args::{Args, Settings, StoreChoice},
    store::{EtcdOptions, EtcdStore, StoreWrapper},
};
use disk::RealDisk;
use rand::{TryRngCore as _, rngs::OsRng};
use std::{io::IsTerminal as _, process::ExitCode, sync::Arc};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// Exit status for bad flags or variables (`EX_USAGE` of sysexits.h).
const EXIT_USAGE: u8 = 64;

fn main() -> ExitCode {
    cairn_proto::host::few_arenas();
    start()
}

#[tokio::main]
async fn start() -> ExitCode {
    let args = match Args::given() {
        Ok(args) => args,
        Err(error) => {
            // Help and version are no mistakes.
            let code = if error.use_stderr() { ExitCode::from(EXIT_USAGE) } else { ExitCode::SUCCESS };
            let _ = error.print();
            return code;
        }
    };
    let settings = match args.check() {
        Ok(settings) => settings,
        Err(error) => {
            eprintln!("dir-service: {}", error.message().replace('\n', "\ndir-service: "));
            return ExitCode::from(EXIT_USAGE);
        }
    };
    let filter = EnvFilter::try_new(&args.log).unwrap_or_default();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    match run(settings).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("dir-service: {error}");
            ExitCode::FAILURE
        }
    }
}

enum Engine {
    Disk(Arc<RealDisk>),
    Etcd(EtcdOptions),
}

async fn run(settings: Settings) -> Result<()> {
    let Settings { listen, store, data, metrics, mut config } = settings;
    // Signals first: from here on none of them kills the process in the middle of something.
    let shutdown = CancellationToken::new();
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stopped = shutdown.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        stopped.cancel();
    });
    // The one place that chooses the engine. A folder is taken before any port is.
    let engine = match store {
        StoreChoice::Embedded => Engine::Disk(
            RealDisk::open(&data).map_err(|error| Error::from(error).at(data.display().to_string()))?,
        ),
        StoreChoice::Etcd(options) => Engine::Etcd(options),
    };
    let mut incoming = Vec::new();
    let mut addresses = Vec::new();
    for listen in &listen {
        let (connections, address) = listen.bind().await?;
        incoming.push(connections);
        addresses.push(address);
    }
    if config.advertise.is_empty() {
        config.advertise.clone_from(&addresses);
    }
    let seed = OsRng
        .try_next_u64()
        .map_err(|error| Error::internal(format!("the system gives no random numbers: {error}")))?;
    let host = Host::system(seed);
    let app = match engine {
        Engine::Disk(disk) => {
            tracing::info!(listen = ?addresses, data = %data.display(), "directory listens");
            App::build(config, disk, host).await?
        }
        Engine::Etcd(options) => {
            tracing::info!(listen = ?addresses, store = %options.address, "directory listens");
            let store = EtcdStore::open_or_create(options, host.network.clone(), seed).await?;
            let identity = store.identity().clone();
            App::build_shared(config, Arc::new(store), Some(identity), host, StoreWrapper::default())
        }
    };
    let app = app.with_metrics(metrics);
    let served = app.serve(incoming, shutdown).await;
    for listen in &listen {
        listen.leave();
    }
    served
}
