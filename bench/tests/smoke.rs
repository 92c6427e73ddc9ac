//! Every workload does what it says against a whole cluster, for a moment.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a test may

use bench::{
    any::{Plan, run},
    workload::{ALL, Scale},
};
use cluster::Cluster;
use std::time::Duration;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_workload_runs_and_leaves_nothing() {
    let cluster = Cluster::builder().memory(true).build_and_start().await.unwrap();
    let scale = Scale {
        span: Duration::from_millis(20),
        small_files: 10,
        large_bytes: 9 << 20,
        table_bytes: 1 << 20,
        listed: 20,
    };
    let plan = Plan { scale, rounds: 1, only: Vec::new() };
    let series = run(&plan, &|| cluster.client_builder().build(), |_| ()).await.unwrap();
    assert_eq!(series.len(), ALL.len());
    for series in &series {
        let summary = series.summary();
        assert!(summary.rate.median > 0.0 && summary.client_cost > 0.0, "{}: {summary:?}", series.id);
    }
    let client = cluster.client().await.unwrap();
    let (left, _) = client.list_page("/", "", &client_lib::ListOptions::new()).await.unwrap();
    assert!(left.is_empty(), "{left:?}");
    client.close().await.unwrap();
    cluster.shutdown().await.unwrap();
}
