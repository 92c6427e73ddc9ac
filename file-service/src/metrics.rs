//! Figures for operators, in the text form of Prometheus / OpenMetrics.

use crate::node::Node;
use cairn_proto::{Error, Reason, Result};
use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::{Registry, Unit},
};
use std::{net::SocketAddr, sync::Arc};
use tokio_util::sync::CancellationToken;

/// Which call a figure is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Method {
    /// Service and method, such as `cairn.v1.FileService/Read`.
    pub method: String,
}

/// Why calls failed.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Failure {
    /// The reason's name.
    pub reason: String,
}

/// All figures of a server.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// Calls received.
    pub requests: Family<Method, Counter>,
    /// Calls that ended with an error.
    pub errors: Family<Failure, Counter>,
    /// Calls under way.
    pub requests_active: Gauge,
    /// Bytes of chunks read by others.
    pub bytes_read: Counter,
    /// Bytes of chunks made durable here.
    pub bytes_written: Counter,
    /// Times that a follower dropped out of a receipt for being silent.
    pub late_followers: Counter,
    /// Chunks that wait to be fetched.
    pub fetch_queue: Gauge,
    /// Chunks fetched from other servers.
    pub chunks_fetched: Counter,
    /// Copies found to be bad.
    pub chunks_bad: Counter,
    chunks: Gauge,
    chunk_bytes: Gauge,
    disk_total: Gauge,
    disk_free: Gauge,
    reclaimable: Gauge,
    journal_revision: Gauge,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut metrics = Self {
            registry: Registry::with_prefix("cairn_file"),
            requests: Family::default(),
            errors: Family::default(),
            requests_active: Gauge::default(),
            bytes_read: Counter::default(),
            bytes_written: Counter::default(),
            late_followers: Counter::default(),
            fetch_queue: Gauge::default(),
            chunks_fetched: Counter::default(),
            chunks_bad: Counter::default(),
            chunks: Gauge::default(),
            chunk_bytes: Gauge::default(),
            disk_total: Gauge::default(),
            disk_free: Gauge::default(),
            reclaimable: Gauge::default(),
            journal_revision: Gauge::default(),
        };
        let all = &mut metrics;
        let registry = &mut all.registry;
        registry.register("requests", "Calls received", all.requests.clone());
        registry.register("errors", "Calls that ended with an error", all.errors.clone());
        registry.register("requests_active", "Calls under way", all.requests_active.clone());
        let bytes = || Unit::Bytes;
        registry.register_with_unit("read", "Bytes of chunks sent", bytes(), all.bytes_read.clone());
        registry.register_with_unit("written", "Bytes of chunks stored", bytes(), all.bytes_written.clone());
        registry.register("late_followers", "Followers that became late", all.late_followers.clone());
        registry.register("fetch_queue", "Chunks that wait to be fetched", all.fetch_queue.clone());
        registry.register("chunks_fetched", "Chunks fetched from others", all.chunks_fetched.clone());
        registry.register("chunks_bad", "Copies found to be bad", all.chunks_bad.clone());
        registry.register("chunks", "Chunks held", all.chunks.clone());
        registry.register_with_unit("chunk", "Bytes of chunks held", bytes(), all.chunk_bytes.clone());
        registry.register_with_unit("disk_total", "Size of the disk", bytes(), all.disk_total.clone());
        registry.register_with_unit("disk_free", "Free on the disk", bytes(), all.disk_free.clone());
        registry.register_with_unit(
            "reclaimable",
            "Dropped, not yet freed",
            bytes(),
            all.reclaimable.clone(),
        );
        registry.register("journal_revision", "Last durable journal revision", all.journal_revision.clone());
        metrics
    }
}

impl Metrics {
    /// Counts a failed call.
    pub fn failed(&self, reason: Reason) {
        self.errors.get_or_create(&Failure { reason: reason.to_wire().as_str_name().to_owned() }).inc();
    }

    /// All figures as text.
    ///
    /// # Errors
    /// `INTERNAL` when they cannot be written down.
    pub fn render(&self, node: &Node) -> Result<String> {
        let usage = node.store.usage();
        let set = |gauge: &Gauge, value: u64| {
            gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        };
        set(&self.chunks, usage.chunks);
        set(&self.chunk_bytes, usage.used_bytes);
        set(&self.disk_total, usage.total_bytes);
        set(&self.disk_free, usage.free_bytes);
        set(&self.reclaimable, usage.reclaimable_bytes);
        set(&self.journal_revision, node.journals.revision());
        set(&self.fetch_queue, node.fetcher.len() as u64);
        let mut text = String::new();
        encode(&mut text, &self.registry).map_err(|error| Error::internal(format!("metrics: {error}")))?;
        Ok(text)
    }
}

/// Serves `/metrics` over HTTP until `shutdown`.
///
/// # Errors
/// `IO` when the address cannot be listened on.
pub async fn serve(address: SocketAddr, node: Arc<Node>, shutdown: CancellationToken) -> Result<()> {
    let listener = tokio::net::TcpListener::bind(address).await.map_err(|error| {
        Error::new(Reason::Io, format!("could not listen on {address} for metrics: {error}"))
    })?;
    let render = move || {
        let node = node.clone();
        async move {
            node.metrics
                .render(&node)
                .map_err(|error| (axum::http::StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))
        }
    };
    let router = axum::Router::new().route("/metrics", axum::routing::get(render));
    let served = axum::serve(listener, router).with_graceful_shutdown(shutdown.cancelled_owned()).await;
    Ok(served?)
}
