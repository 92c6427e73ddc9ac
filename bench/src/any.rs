//! Workloads against any cluster that runs already: `cairn bench`.

use crate::{
    report::Series,
    workload::{ALL, Bench, Connector, Scale, Workload},
};
use client_lib::{Error, Result};
use std::time::{SystemTime, UNIX_EPOCH};

/// What to run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// How much each workload does.
    pub scale: Scale,
    /// Times that each workload is run, in turn with the others.
    pub rounds: u32,
    /// Workloads whose names contain any of these; all when empty.
    pub only: Vec<String>,
}

impl Plan {
    /// The workloads that were chosen.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` when a name fits none.
    pub fn workloads(&self) -> Result<Vec<&'static Workload>> {
        for name in &self.only {
            if !ALL.iter().any(|workload| workload.id.contains(name.as_str())) {
                let known: Vec<_> = ALL.iter().map(|workload| workload.id).collect();
                return Err(Error::invalid(format!(
                    "no workload is called {name}; there are {}",
                    known.join(", ")
                )));
            }
        }
        let chosen = |workload: &&Workload| {
            self.only.is_empty() || self.only.iter().any(|name| workload.id.contains(name.as_str()))
        };
        Ok(ALL.iter().filter(chosen).collect())
    }
}

/// Runs a plan in a folder of its own below the root, which it removes at the end, also after a failure. `progress` is
/// told what begins.
///
/// # Errors
/// The first failure of any operation.
pub async fn run(plan: &Plan, connect: Connector<'_>, mut progress: impl FnMut(&str)) -> Result<Vec<Series>> {
    let workloads = plan.workloads()?;
    let nanos = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
    let folder = format!("/cairn-bench-{nanos:x}");
    let mut bench = Bench::new(connect()?, &folder, plan.scale.clone(), Vec::new()).await?;
    let mut series: Vec<Series> =
        workloads.iter().map(|workload| Series::new(workload.id, workload.what, workload.unit)).collect();
    let mut done = Ok(());
    'rounds: for round in 1..=plan.rounds {
        for (workload, series) in workloads.iter().zip(&mut series) {
            progress(&format!("round {round} of {}: {}", plan.rounds, workload.id));
            match bench.run(workload, connect).await {
                Ok(sample) => series.samples.push(sample),
                Err(error) => {
                    done = Err(error);
                    break 'rounds;
                }
            }
        }
    }
    progress("removing what was written");
    let cleaned = bench.clean_up().await;
    done.and(cleaned)?;
    Ok(series)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_names_choose_and_unknown_ones_are_refused() {
        let plan = |only: &[&str]| Plan {
            scale: Scale::quick(),
            rounds: 1,
            only: only.iter().map(|&name| name.to_owned()).collect(),
        };
        assert_eq!(plan(&[]).workloads().unwrap().len(), ALL.len());
        let chosen = plan(&["lookup", "mkdir_64"]).workloads().unwrap();
        assert_eq!(
            chosen.iter().map(|workload| workload.id).collect::<Vec<_>>(),
            ["lookup_1", "lookup_64", "mkdir_64"]
        );
        assert!(plan(&["flight"]).workloads().unwrap_err().message().contains("small_read_64"));
    }
}
