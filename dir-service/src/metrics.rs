//! Figures for operators, in the text form of Prometheus / OpenMetrics.

use crate::{
    gate::{Gate, Mode},
    grpc::layer::Counts,
};
use axum::{Router, http::StatusCode, routing::get};
use cairn_proto::v1;
use prometheus_client::{encoding::text::encode, metrics::gauge::Gauge, registry::Registry};
use std::{
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// Serves `/metrics` until `shutdown`. A port that cannot be had is told in the log; the directory serves without.
pub async fn serve(address: SocketAddr, gate: Arc<Gate>, counts: Arc<Counts>, shutdown: CancellationToken) {
    let listener = match TcpListener::bind(address).await {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(%address, %error, "metrics are not served");
            return;
        }
    };
    let answer = move || {
        let (gate, counts) = (gate.clone(), counts.clone());
        async move { text(&gate, &counts).map_err(|_| StatusCode::INTERNAL_SERVER_ERROR) }
    };
    let router = Router::new().route("/metrics", get(answer));
    if let Err(error) = axum::serve(listener, router).with_graceful_shutdown(shutdown.cancelled_owned()).await
    {
        tracing::error!(%address, %error, "metrics are no longer served");
    }
}

/// All figures now.
///
/// # Errors
/// None in practice: writing to a string does not fail.
pub fn text(gate: &Gate, counts: &Counts) -> Result<String, std::fmt::Error> {
    let mut registry = Registry::with_prefix("cairn_directory");
    let mut add = |name: &str, help: &str, value: u64| {
        let gauge: Gauge = Gauge::default();
        gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        registry.register(name, help, gauge);
    };
    add("requests", "Requests since the start", counts.requests.load(Ordering::Relaxed));
    add("requests_refused", "Requests turned away as overload", counts.refused.load(Ordering::Relaxed));
    add("requests_under_way", "Requests being answered", counts.under_way.load(Ordering::Relaxed));
    let mode = gate.mode();
    add("serving", "1 while the directory serves", u64::from(matches!(mode, Mode::Serving(_))));
    if let Mode::Serving(directory) = mode {
        let status = directory.cluster.status();
        let live = status
            .file_servers
            .iter()
            .filter_map(|one| one.server.as_ref())
            .filter(|server| matches!(server.state(), v1::ServerState::Live | v1::ServerState::Joining));
        add("file_servers_live", "File servers whose heartbeats arrive", live.count() as u64);
        add("file_servers", "File servers known", status.file_servers.len() as u64);
        add("groups", "Placement groups", status.groups.len() as u64);
        add("files", "Files", status.files);
        add("directories", "Directories", status.directories);
        add("file_bytes", "Bytes in files", status.bytes);
        let chunks = status.chunks.unwrap_or_default();
        add("chunks", "Committed chunks", chunks.total);
        add("chunks_under_replicated", "Chunks with missing copies", chunks.under_replicated);
        add("chunks_lost", "Chunks without a reachable copy", chunks.lost);
        add("chunks_quarantined", "Copies that no record explains", chunks.quarantined);
        add("chunks_awaiting_collection", "Dropped chunks not yet collected", chunks.awaiting_collection);
        let repairs = status.repairs.unwrap_or_default();
        add("repairs_waiting", "Chunks that wait for a copy", repairs.chunks_waiting);
        add("copies_made", "Copies made by repair", repairs.copies_made);
        let shown = status.directory.unwrap_or_default();
        add("journal_lag_ms", "How long the oldest unshipped change has waited", shown.journal_lag_ms);
        add("journal_shipped_revision", "Revision that enough file servers carry", shown.shipped_revision);
    }
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_told_also_while_nothing_is_served() {
        let counts = Counts::default();
        counts.requests.store(7, Ordering::Relaxed);
        let text = text(&Gate::default(), &counts).unwrap();
        assert!(text.contains("cairn_directory_requests 7"), "{text}");
        assert!(text.contains("cairn_directory_serving 0"), "{text}");
    }
}
