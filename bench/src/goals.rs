//! What is to be reached, as ratios to what the machine did in the same round.

use crate::outcome::Observation;
use bench::{report::Series, spread::Spread, usage::Sample};
use serde::Serialize;

/// What a figure is compared with.
#[derive(Clone, Copy, Debug)]
pub enum Against {
    /// The rate of a step.
    Rate(&'static str),
    /// The lower one of the rates of two steps.
    Lower(&'static str, &'static str),
    /// One operation after the other: three unary round trips, a sync of three logs at once and a sync of one.
    RoundTripsAndSyncs,
    /// The processor time of both ends for a GiB; less is better.
    Cost(&'static str),
    /// Nothing: the rate itself.
    Rates,
    /// Nothing: an observation itself; less is better.
    Observed(&'static str),
    /// What has to be built first, and whether something else says how it stands.
    Missing(&'static str),
}

impl Against {
    /// The steps that it needs.
    pub fn steps(&self) -> Vec<&'static str> {
        match *self {
            Self::Rate(id) | Self::Cost(id) => vec![id],
            Self::Lower(a, b) => vec![a, b],
            Self::RoundTripsAndSyncs => vec!["echo_4k_1", "log_sync_1", "log_sync_3"],
            Self::Rates | Self::Observed(_) | Self::Missing(_) => vec![],
        }
    }

    fn less_is_better(&self) -> bool {
        matches!(self, Self::Cost(_) | Self::Observed(_))
    }
}

/// One row of the table of goals.
#[derive(Clone, Copy, Debug)]
pub struct Goal {
    /// What is measured.
    pub what: &'static str,
    /// What it is compared with, in words.
    pub limit: &'static str,
    /// The step that is measured.
    pub measured: Option<&'static str>,
    /// What it is compared with.
    pub against: Against,
    /// What must be met.
    pub minimum: f64,
    /// What is wanted.
    pub stretch: f64,
}

const fn goal(
    what: &'static str,
    limit: &'static str,
    measured: &'static str,
    against: Against,
    minimum: f64,
    stretch: f64,
) -> Goal {
    Goal { what, limit, measured: Some(measured), against, minimum, stretch }
}

const fn other(
    what: &'static str,
    limit: &'static str,
    against: Against,
    minimum: f64,
    stretch: f64,
) -> Goal {
    Goal { what, limit, measured: None, against, minimum, stretch }
}

const SMALL: &str = "1 / (3 unary round trips + sync of 3 logs at once + 1 sync)";
const CREATE: &str = "ext4 create + fsync, 16 threads";
const ECHO: &str = "unary echo of 4 KiB, 64 in flight";
const COMMIT: &str = "the lower of unary echo and group-commit log";
const ONES: &str = "-";

/// All goals.
pub const GOALS: [Goal; 24] = [
    goal("large read over TCP", "raw TCP, same bytes", "large_read", Against::Rate("raw_tcp"), 0.75, 0.95),
    goal(
        "large read, Unix socket",
        "raw Unix socket",
        "large_read_unix",
        Against::Rate("raw_unix"),
        0.7,
        0.95,
    ),
    other("large read, passed descriptor", "local open + pread", Against::Missing("not built"), 0.9, 0.97),
    goal(
        "large durable write, 1 copy",
        "local write of one file",
        "large_write_one_copy",
        Against::Rate("local_write_1"),
        0.4,
        0.6,
    ),
    goal(
        "large durable write, 3 copies on one disk",
        "local write of 3 files at once",
        "large_write",
        Against::Rate("local_write_3"),
        0.6,
        0.85,
    ),
    goal("CPU per GiB read, both ends", "raw TCP", "large_read", Against::Cost("raw_tcp"), 1.7, 1.2),
    goal(
        "small file durable write, 1 client, 3 copies",
        SMALL,
        "small_write_1",
        Against::RoundTripsAndSyncs,
        0.5,
        0.85,
    ),
    goal(
        "the same, 64 clients, 1 copy",
        CREATE,
        "small_write_64_one_copy",
        Against::Rate("create_sync_16"),
        0.7,
        1.2,
    ),
    goal(
        "the same, 64 clients, 3 copies",
        CREATE,
        "small_write_64",
        Against::Rate("create_sync_16"),
        0.4,
        0.7,
    ),
    goal("small file writes a second, 1 client", ONES, "small_write_1", Against::Rates, 700.0, 1_200.0),
    goal("small file writes a second, 16 clients", ONES, "small_write_16", Against::Rates, 2_000.0, 5_000.0),
    goal("small file read, 64 in flight", ECHO, "small_read_64", Against::Rate("echo_4k_64"), 0.6, 0.85),
    other(
        "small file read, cached descriptor",
        "local open + pread + close",
        Against::Missing("not built"),
        0.8,
        2.0,
    ),
    goal(
        "lookup, 64 in flight",
        "unary echo of 64 bytes, 64 in flight",
        "lookup_64",
        Against::Rate("echo_64_64"),
        0.7,
        0.9,
    ),
    goal(
        "durable mkdir, 64 clients",
        COMMIT,
        "mkdir_64",
        Against::Lower("echo_64_64", "group_log_64"),
        0.3,
        0.6,
    ),
    goal(
        "durable rename, 64 clients",
        COMMIT,
        "rename_64",
        Against::Lower("echo_64_64", "group_log_64"),
        0.3,
        0.6,
    ),
    goal(
        "overwrite of 4 KiB in a large file, 1 client",
        SMALL,
        "overwrite_1",
        Against::RoundTripsAndSyncs,
        0.5,
        0.85,
    ),
    goal("the same, 16 clients", CREATE, "overwrite_16", Against::Rate("create_sync_16"), 0.5, 0.85),
    goal(
        "random 4 KiB reads in a large file, 64 in flight",
        ECHO,
        "random_read_64",
        Against::Rate("echo_4k_64"),
        0.5,
        0.8,
    ),
    goal("list of a large directory, entries a second", ONES, "list", Against::Rates, 200_000.0, 600_000.0),
    other(
        "directory memory, MiB (256 of cache + 100)",
        ONES,
        Against::Observed("directory_memory"),
        356.0,
        306.0,
    ),
    other("directory restart after kill -9, s", ONES, Against::Observed("directory_restart"), 1.0, 0.3),
    other("file server restart after kill -9, s", ONES, Against::Observed("file_restart"), 2.0, 0.5),
    other("file server memory per chunk, bytes", ONES, Against::Missing("needs 10^6 chunks"), 40.0, 24.0),
];

/// How far a goal was reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The stretch.
    Stretch,
    /// The minimum.
    Met,
    /// Not by the median, but the best round would do.
    Near,
    /// Not the minimum.
    Missed,
    /// Not measured in this run.
    NotRun,
}

/// A goal and what came of it.
#[derive(Clone, Debug, Serialize)]
pub struct Judged {
    /// What is measured.
    pub what: String,
    /// What it is compared with.
    pub against: String,
    /// What must be met.
    pub minimum: f64,
    /// What is wanted.
    pub stretch: f64,
    /// The ratio, or the figure where there is nothing to compare with.
    pub value: Option<Spread>,
    /// The median of what was measured.
    pub measured: Option<f64>,
    /// The median of what it is compared with.
    pub limit: Option<f64>,
    /// What it means.
    pub verdict: Verdict,
    /// Why there is no figure, or what it was measured on.
    pub note: String,
}

/// Compares what was measured with all goals.
pub fn judge(series: &[Series], observations: &[Observation]) -> Vec<Judged> {
    GOALS.iter().map(|goal| one(goal, series, observations)).collect()
}

fn one(goal: &Goal, series: &[Series], observations: &[Observation]) -> Judged {
    let mut judged = Judged {
        what: goal.what.to_owned(),
        against: goal.limit.to_owned(),
        minimum: goal.minimum,
        stretch: goal.stretch,
        value: None,
        measured: None,
        limit: None,
        verdict: Verdict::NotRun,
        note: String::new(),
    };
    match goal.against {
        Against::Missing(why) => why.clone_into(&mut judged.note),
        Against::Observed(id) => {
            if let Some(seen) = observations.iter().find(|seen| seen.id == id) {
                judged.value = Spread::of([seen.value]);
                judged.note.clone_from(&seen.what);
            }
        }
        _ => {
            let pairs = pairs(goal, series);
            judged.measured = Spread::of(pairs.iter().map(|pair| pair.0)).map(|spread| spread.median);
            judged.value = Spread::of(pairs.iter().map(|(measured, limit)| measured / limit));
            if !matches!(goal.against, Against::Rates) {
                judged.limit = Spread::of(pairs.iter().map(|pair| pair.1)).map(|spread| spread.median);
            }
        }
    }
    if let Some(value) = judged.value {
        judged.verdict = verdict(goal, value);
    }
    judged
}

fn verdict(goal: &Goal, value: Spread) -> Verdict {
    let less = goal.against.less_is_better();
    let reaches = |value: f64, bound: f64| if less { value <= bound } else { value >= bound };
    if reaches(value.median, goal.stretch) {
        Verdict::Stretch
    } else if reaches(value.median, goal.minimum) {
        Verdict::Met
    } else if reaches(if less { value.min } else { value.max }, goal.minimum) {
        Verdict::Near
    } else {
        Verdict::Missed
    }
}

/// For each round what was measured, and what it is compared with.
fn pairs(goal: &Goal, series: &[Series]) -> Vec<(f64, f64)> {
    let find = |id: &str| series.iter().find(|series| series.id == id);
    let Some(measured) = goal.measured.and_then(find) else { return Vec::new() };
    let rate = |id: &str, round: usize| -> Option<f64> {
        let series = find(id)?;
        series.samples.get(round).map(|sample| sample.rate(series.unit))
    };
    let both_ends = |series: &Series, sample: &Sample| {
        let (client, server) = sample.cost(series.unit);
        client + server
    };
    let pair = |round: usize, sample: &Sample| -> Option<(f64, f64)> {
        let own = sample.rate(measured.unit);
        Some(match goal.against {
            Against::Rate(id) => (own, rate(id, round)?),
            Against::Lower(a, b) => (own, rate(a, round)?.min(rate(b, round)?)),
            Against::RoundTripsAndSyncs => {
                let seconds = 3.0 / rate("echo_4k_1", round)?
                    + 1.0 / rate("log_sync_3", round)?
                    + 1.0 / rate("log_sync_1", round)?;
                (own, 1.0 / seconds)
            }
            Against::Cost(id) => {
                let limit = find(id)?;
                (both_ends(measured, sample), both_ends(limit, limit.samples.get(round)?))
            }
            Against::Rates => (own, 1.0),
            Against::Observed(_) | Against::Missing(_) => return None,
        })
    };
    measured.samples.iter().enumerate().filter_map(|(round, sample)| pair(round, sample)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::suite::STEPS;
    use bench::usage::Unit;

    fn series(id: &str, unit: Unit, rates: &[u64]) -> Series {
        let mut series = Series::new(id, id, unit);
        series.samples = rates
            .iter()
            .map(|&rate| Sample {
                operations: rate,
                bytes: rate << 20,
                seconds: 1.0,
                client_seconds: 0.5,
                ..Sample::default()
            })
            .collect();
        series
    }

    fn judged(what: &str, series: &[Series], observations: &[Observation]) -> Judged {
        judge(series, observations).into_iter().find(|judged| judged.what == what).unwrap()
    }

    #[test]
    fn goals_name_steps_that_exist() {
        for goal in &GOALS {
            for id in goal.against.steps().into_iter().chain(goal.measured) {
                assert!(STEPS.iter().any(|step| step.id == id), "{id} of {} is no step", goal.what);
            }
            let order = if goal.against.less_is_better() || goal.what.contains("per chunk") {
                goal.stretch < goal.minimum
            } else {
                goal.stretch > goal.minimum
            };
            assert!(order, "{}", goal.what);
        }
    }

    #[test]
    fn ratios_are_taken_round_by_round() {
        let all = [
            series("lookup_64", Unit::Operations, &[50, 400, 72]),
            series("echo_64_64", Unit::Operations, &[100, 1_000, 100]),
        ];
        let lookup = judged("lookup, 64 in flight", &all, &[]);
        assert_eq!(lookup.value, Some(Spread { median: 0.5, min: 0.4, max: 0.72 }));
        assert_eq!((lookup.verdict, lookup.measured, lookup.limit), (Verdict::Near, Some(72.0), Some(100.0)));
    }

    #[test]
    fn what_is_not_there_is_not_judged() {
        for judged in judge(&[], &[]) {
            assert_eq!(judged.verdict, Verdict::NotRun, "{}", judged.what);
        }
    }

    #[test]
    fn of_costs_and_times_less_is_better() {
        let all =
            [series("large_read", Unit::Mebibytes, &[1_000]), series("raw_tcp", Unit::Mebibytes, &[1_000])];
        assert_eq!(judged("CPU per GiB read, both ends", &all, &[]).verdict, Verdict::Stretch);
        for (seconds, verdict) in [(0.2, Verdict::Stretch), (0.8, Verdict::Met), (1.2, Verdict::Missed)] {
            let seen = [Observation::new("directory_restart", "restart", seconds, "s")];
            assert_eq!(judged("directory restart after kill -9, s", &[], &seen).verdict, verdict);
        }
    }

    #[test]
    fn round_trips_and_syncs_add_up() {
        let all = [
            series("small_write_1", Unit::Operations, &[500]),
            series("echo_4k_1", Unit::Operations, &[6_000]),
            series("log_sync_1", Unit::Operations, &[4_000]),
            series("log_sync_3", Unit::Operations, &[4_000]),
        ];
        // 0.5 ms of round trips and twice 0.25 ms of syncs.
        let limit = judged("small file durable write, 1 client, 3 copies", &all, &[]).limit.unwrap();
        assert!((limit - 1_000.0).abs() < 1e-6, "{limit}");
    }
}
