//! A connection to a member of etcd.

use super::{
    failure::Failure,
    options::{EtcdOptions, EtcdTls},
};
use cairn_proto::{
    Error,
    net::{CONNECT_TIMEOUT, Connect},
};
use hyper_util::rt::TokioIo;
use std::{sync::Arc, time::Duration};
use tokio::time::timeout;
use tonic::{
    Request,
    metadata::{Ascii, MetadataValue},
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};

/// A member is asked whether it lives when nothing arrived for so long while calls are under way. etcd closes
/// connections that ask more often than every 5 s.
const PING_INTERVAL: Duration = Duration::from_secs(6);
/// The connection is given up when the answer takes longer than this.
const PING_TIMEOUT: Duration = Duration::from_secs(3);
/// Receive window of one call: a page of a scan arrives without a pause.
const STREAM_WINDOW_BYTES: u32 = 2 * 1024 * 1024;
/// Receive window of the connection.
const CONNECTION_WINDOW_BYTES: u32 = 16 * 1024 * 1024;

/// A connection to a member. Clones are the same.
#[derive(Clone, Debug)]
pub(super) struct Link {
    /// Which of the client's connections.
    pub(super) number: u64,
    /// The member, as `host:port`.
    pub(super) member: String,
    pub(super) channel: Channel,
    /// Says who calls, where etcd wants to know.
    pub(super) token: Option<MetadataValue<Ascii>>,
}

impl Link {
    /// A call with what all calls carry; the member gives up with its caller.
    pub(super) fn request<T>(&self, message: T, within: Duration) -> Request<T> {
        let mut request = self.stream(message);
        request.set_timeout(within);
        request
    }

    /// As [`Link::request`], without an end.
    pub(super) fn stream<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let metadata = request.metadata_mut();
        metadata.insert("hasleader", MetadataValue::from_static("true"));
        if let Some(token) = &self.token {
            metadata.insert("token", token.clone());
        }
        request
    }
}

/// Connects; returns once the connection stands.
pub(super) async fn connect(
    options: &EtcdOptions,
    network: &Arc<dyn Connect>,
    member: &str,
    number: u64,
) -> Result<Link, Failure> {
    let unreachable = |why: String| {
        Failure::Elsewhere(Error::unavailable(format!("etcd at {member} cannot be reached: {why}")))
    };
    let bad = |error: tonic::transport::Error| {
        Failure::Refused(Error::invalid(format!("{member} is not an address of etcd: {error}")))
    };
    let scheme = if options.tls.is_some() { "https" } else { "http" };
    let mut endpoint = Endpoint::from_shared(format!("{scheme}://{member}"))
        .map_err(bad)?
        .http2_keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT)
        .keep_alive_while_idle(false)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES);
    if let Some(tls) = &options.tls {
        endpoint = endpoint.tls_config(config(tls)).map_err(|error| {
            let message = format!("the certificates for etcd cannot be used: {}", reason(&error));
            Failure::Refused(Error::invalid(message))
        })?;
    }
    let (network, uri) = (network.clone(), format!("http://{member}"));
    let connector = tower::service_fn(move |_| {
        let (network, uri) = (network.clone(), uri.clone());
        async move { network.connect(&uri).await.map(TokioIo::new) }
    });
    match timeout(CONNECT_TIMEOUT, endpoint.connect_with_connector(connector)).await {
        Ok(Ok(channel)) => Ok(Link { number, member: member.to_owned(), channel, token: None }),
        Ok(Err(error)) => Err(unreachable(reason(&error))),
        Err(_) => Err(unreachable(format!("no connection within {} ms", CONNECT_TIMEOUT.as_millis()))),
    }
}

fn config(tls: &EtcdTls) -> ClientTlsConfig {
    let config = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&tls.ca));
    match &tls.identity {
        Some((certificate, key)) => config.identity(Identity::from_pem(certificate, key)),
        None => config,
    }
}

/// The innermost reason of an error of the transport, which says nothing itself.
fn reason(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}
