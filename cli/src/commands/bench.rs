//! `bench`: the workloads of the `bench` package against the cluster that runs already.

use crate::{
    args::{Bench, Shared},
    connect,
    failure::Failure,
    output::Out,
};
use bench::{
    any::{self, Plan},
    report::{Series, figures},
    usage::Unit,
    workload::Scale,
};
use client_lib::Client;
use serde::Serialize;

/// What `--json` prints of a workload.
#[derive(Debug, Serialize)]
struct Measured<'a> {
    workload: &'a str,
    what: &'a str,
    /// Counted in `unit` a second.
    median: f64,
    min: f64,
    max: f64,
    unit: &'static str,
    /// Time of an operation, milliseconds; `null` where there are no single operations.
    p50_ms: Option<f64>,
    p99_ms: Option<f64>,
    /// Processor time of this process: microseconds an operation, or seconds a GiB.
    client_cost: f64,
    rounds: usize,
}

/// Measures, and prints a table.
pub async fn run(shared: &Shared, asked: Bench) -> Result<(), Failure> {
    let scale = if asked.quick { Scale::quick() } else { Scale::full() };
    let plan = Plan { scale, rounds: asked.rounds, only: asked.only };
    plan.workloads().map_err(|error| Failure::usage(error.to_string()))?;
    connect::plain(shared).await?;
    let directories = shared.directory.clone();
    let make =
        move || directories.iter().fold(Client::builder(), |builder, uri| builder.directory(uri)).build();
    let series = any::run(&plan, &make, |step| eprintln!("{step}")).await.map_err(Failure::at(""))?;
    let mut out = Out::new();
    if shared.json {
        out.json(&series.iter().map(measured).collect::<Vec<_>>())?;
    } else {
        for line in figures(&series, false).text().lines() {
            out.line(line)?;
        }
    }
    out.finish()
}

fn measured(series: &Series) -> Measured<'_> {
    let summary = series.summary();
    let time = |us: f64| (us > 0.0).then_some(us / 1_000.0);
    Measured {
        workload: &series.id,
        what: &series.what,
        median: summary.rate.median,
        min: summary.rate.min,
        max: summary.rate.max,
        unit: match series.unit {
            Unit::Operations => "operations",
            Unit::Mebibytes => "mebibytes",
            Unit::Entries => "entries",
        },
        p50_ms: time(summary.p50_us),
        p99_ms: time(summary.p99_us),
        client_cost: summary.client_cost,
        rounds: series.samples.len(),
    }
}
