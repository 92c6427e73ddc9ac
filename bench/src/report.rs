//! What was measured, as a table for people and as JSON.

use crate::{
    spread::{Spread, number},
    usage::{Sample, Unit},
};
use serde::Serialize;

/// All runs of one thing.
#[derive(Clone, Debug, Serialize)]
pub struct Series {
    /// Its name.
    pub id: String,
    /// What it is, in words.
    pub what: String,
    /// What its rate counts.
    pub unit: Unit,
    /// One for each round.
    pub samples: Vec<Sample>,
}

/// What is said of one thing.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Summary {
    /// A second, in the unit of the series.
    pub rate: Spread,
    /// Processor time of the client: microseconds an operation, or seconds a GiB.
    pub client_cost: f64,
    /// The same of all servers together.
    pub server_cost: f64,
    /// Time of an operation, microseconds: the median of the rounds' medians.
    pub p50_us: f64,
    /// The same of the 99th percentiles.
    pub p99_us: f64,
}

impl Series {
    /// A series without samples yet.
    pub fn new(id: &str, what: &str, unit: Unit) -> Self {
        Self { id: id.to_owned(), what: what.to_owned(), unit, samples: Vec::new() }
    }

    /// The figures of its samples; zeros when there are none.
    pub fn summary(&self) -> Summary {
        let of =
            |value: &dyn Fn(&Sample) -> f64| Spread::of(self.samples.iter().map(value)).unwrap_or_default();
        Summary {
            rate: of(&|sample| sample.rate(self.unit)),
            client_cost: of(&|sample| sample.cost(self.unit).0).median,
            server_cost: of(&|sample| sample.cost(self.unit).1).median,
            p50_us: of(&|sample| sample.p50_us).median,
            p99_us: of(&|sample| sample.p99_us).median,
        }
    }
}

/// Rows of cells; the first row has the names of the columns.
#[derive(Clone, Debug, Default)]
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these columns.
    pub fn new(columns: &[&str]) -> Self {
        Self { rows: vec![columns.iter().map(|&name| name.to_owned()).collect()] }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// For a terminal: columns as wide as their widest cell.
    pub fn text(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            self.rows
                .iter()
                .filter_map(|row| row.get(column))
                .map(|cell| cell.chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                line.push_str(&format!("{cell:<width$}  "));
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }

    /// For a document.
    pub fn markdown(&self) -> String {
        let mut text = String::new();
        for (i, row) in self.rows.iter().enumerate() {
            text.push_str(&format!("| {} |\n", row.join(" | ")));
            if i == 0 {
                text.push_str(&format!("|{}\n", " --- |".repeat(row.len())));
            }
        }
        text
    }
}

/// A table of series: rate, time and cost of each. `servers` says whether their cost is known.
pub fn figures(series: &[Series], servers: bool) -> Table {
    let mut columns = vec!["what", "unit", "rate: median [min-max]", "p50 ms", "p99 ms", "CPU client"];
    if servers {
        columns.push("CPU servers");
    }
    let mut table = Table::new(&columns);
    for series in series.iter().filter(|series| !series.samples.is_empty()) {
        let summary = series.summary();
        let time = |us: f64| if us > 0.0 { number(us / 1_000.0) } else { String::new() };
        let cost = |cost: f64| format!("{} {}", number(cost), series.unit.cost_name());
        let mut cells = vec![
            series.what.clone(),
            series.unit.rate_name().to_owned(),
            summary.rate.show(),
            time(summary.p50_us),
            time(summary.p99_us),
            cost(summary.client_cost),
        ];
        if servers {
            cells.push(cost(summary.server_cost));
        }
        table.row(cells);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_series_is_summed_up_by_its_medians() {
        let mut series = Series::new("a", "writing", Unit::Operations);
        assert_eq!(series.summary().rate, Spread::default());
        for operations in [100, 300, 200] {
            series.samples.push(Sample {
                operations,
                seconds: 1.0,
                client_seconds: 0.1,
                ..Sample::default()
            });
        }
        let summary = series.summary();
        assert_eq!((summary.rate.median, summary.rate.min, summary.rate.max), (200.0, 100.0, 300.0));
        assert!((summary.client_cost - 500.0).abs() < 1e-6, "{summary:?}");
    }

    #[test]
    fn tables_are_for_terminals_and_documents() {
        let mut table = Table::new(&["what", "rate"]);
        table.row(vec!["a long one".to_owned(), "1".to_owned()]);
        assert_eq!(table.text(), "what        rate\na long one  1\n");
        assert_eq!(table.markdown(), "| what | rate |\n| --- | --- |\n| a long one | 1 |\n");
    }

    #[test]
    fn what_was_not_run_has_no_row() {
        let series = [Series::new("a", "writing", Unit::Operations)];
        assert_eq!(figures(&series, true).text().lines().count(), 1);
    }
}
