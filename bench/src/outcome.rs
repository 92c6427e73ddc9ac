//! What came out of a run: for a terminal, as JSON, and as a part of a document.

use crate::goals::{Judged, Verdict};
use bench::{
    report::{Series, Table, figures},
    spread::number,
};
use serde::Serialize;
use std::{io, path::Path, time::SystemTime};

/// Where the part of a document that a run writes begins and ends.
const BEGIN: &str = "<!-- bench: begin, written by `make bench` -->";
const END: &str = "<!-- bench: end -->";

/// All of a run.
#[derive(Debug, Serialize)]
pub struct Outcome {
    /// The machine.
    pub hardware: Hardware,
    /// Whether it was only a look.
    pub quick: bool,
    /// Number of rounds.
    pub rounds: u32,
    /// The goals and what came of them.
    pub goals: Vec<Judged>,
    /// All measurements.
    pub series: Vec<Series>,
    /// Most memory of each process.
    pub memory: Vec<Observation>,
    /// What was seen once, at the end.
    pub observations: Vec<Observation>,
}

/// One figure that was seen once.
#[derive(Clone, Debug, Serialize)]
pub struct Observation {
    /// Its name.
    pub id: String,
    /// What it is, in words.
    pub what: String,
    /// The figure.
    pub value: f64,
    /// What it is counted in.
    pub unit: String,
}

impl Observation {
    /// An observation.
    pub fn new(id: &str, what: &str, value: f64, unit: &str) -> Self {
        Self { id: id.to_owned(), what: what.to_owned(), value, unit: unit.to_owned() }
    }
}

/// The machine and how busy it was.
#[derive(Clone, Debug, Serialize)]
pub struct Hardware {
    /// Name of the processor.
    pub processor: String,
    /// Number of processors.
    pub processors: usize,
    /// Memory, MiB.
    pub memory_mib: u64,
    /// Kernel release.
    pub kernel: String,
    /// File system of the data, and its device.
    pub disk: String,
    /// When the run ended, UTC.
    pub date: String,
    /// Load average of a minute when the run began: what others did.
    pub load_before: String,
}

impl Hardware {
    /// Looks around. What cannot be known is empty.
    pub fn look(data: &Path) -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, name: &str| {
            let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default();
            line.split_once(':').map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
        };
        let memory = field(&read("/proc/meminfo"), "MemTotal");
        let kib = memory.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok());
        Self {
            processor: field(&read("/proc/cpuinfo"), "model name"),
            processors: std::thread::available_parallelism().map_or(0, usize::from),
            memory_mib: kib.unwrap_or(0) / 1024,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            disk: disk(data, &read("/proc/mounts")),
            date: String::new(),
            load_before: read("/proc/loadavg").split_whitespace().next().unwrap_or_default().to_owned(),
        }
    }

    /// The run is over.
    pub fn done(mut self) -> Self {
        let text = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
        self.date = text.replace('T', " ").trim_end_matches('Z').to_owned();
        self
    }
}

/// The mount that a folder is on.
fn disk(folder: &Path, mounts: &str) -> String {
    let Ok(folder) = folder.canonicalize() else { return String::new() };
    let mounts = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ');
        Some((words.next()?, words.next()?, words.next()?))
    });
    mounts
        .filter(|(_, at, _)| folder.starts_with(at))
        .max_by_key(|(_, at, _)| at.len())
        .map(|(device, _, kind)| format!("{kind} on {device}"))
        .unwrap_or_default()
}

impl Outcome {
    /// A document of its own, where there is none yet.
    pub const DOCUMENT: &'static str =
        "# Performance\n\n<!-- bench: begin, written by `make bench` -->\n<!-- bench: end -->\n";

    /// For a terminal.
    pub fn text(&self) -> String {
        format!(
            "\n{}\n\n{}\n{}\n{}",
            self.about(),
            self.goals().text(),
            figures(&self.series, true).text(),
            self.memory().text()
        )
    }

    /// A document with this run in place of the one that it had.
    ///
    /// # Errors
    /// When it has no marks.
    pub fn insert(&self, document: &str) -> io::Result<String> {
        let parts = document
            .split_once(BEGIN)
            .and_then(|(before, rest)| rest.split_once(END).map(|(_, after)| (before, after)));
        let Some((before, after)) = parts else {
            return Err(io::Error::other(format!("the document has no place between {BEGIN} and {END}")));
        };
        let tables = format!(
            "{}\n\n## Goals\n\n{}\n## All figures\n\n{}\n## Memory\n\n{}",
            self.about(),
            self.goals().markdown(),
            figures(&self.series, true).markdown(),
            self.memory().markdown()
        );
        Ok(format!("{before}{BEGIN}\n\n{tables}\n{END}{after}"))
    }

    fn about(&self) -> String {
        let hardware = &self.hardware;
        format!(
            "{} UTC, {} rounds{}. {} processors ({}), {} MiB, {}, Linux {}. Load when it began: {}.",
            hardware.date,
            self.rounds,
            if self.quick { " of a quick run" } else { "" },
            hardware.processors,
            hardware.processor,
            hardware.memory_mib,
            hardware.disk,
            hardware.kernel,
            hardware.load_before
        )
    }

    fn goals(&self) -> Table {
        let mut table = Table::new(&[
            "what",
            "against",
            "minimum",
            "stretch",
            "measured",
            "limit",
            "ratio or figure",
            "goal",
        ]);
        for goal in &self.goals {
            let shown = |value: Option<f64>| value.map(number).unwrap_or_default();
            let value = match (goal.value, goal.verdict) {
                (None, _) if goal.note.is_empty() => "not run".to_owned(),
                (None, _) => goal.note.clone(),
                (Some(value), _) if goal.note.is_empty() => value.show(),
                (Some(value), _) => format!("{} ({})", number(value.median), goal.note),
            };
            let verdict = match goal.verdict {
                Verdict::Stretch => "stretch met",
                Verdict::Met => "met",
                Verdict::Near => "missed, best round meets it",
                Verdict::Missed => "missed",
                Verdict::NotRun => "",
            };
            table.row(vec![
                goal.what.clone(),
                goal.against.clone(),
                number(goal.minimum),
                number(goal.stretch),
                shown(goal.measured),
                shown(goal.limit),
                value,
                verdict.to_owned(),
            ]);
        }
        table
    }

    fn memory(&self) -> Table {
        let mut table = Table::new(&["process", "most memory"]);
        for seen in &self.memory {
            table.row(vec![seen.what.clone(), format!("{} {}", number(seen.value), seen.unit)]);
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::goals::judge;

    fn outcome() -> Outcome {
        Outcome {
            hardware: Hardware::look(Path::new("/")).done(),
            quick: true,
            rounds: 2,
            goals: judge(&[], &[]),
            series: Vec::new(),
            memory: vec![Observation::new("memory", "directory", 12.5, "MiB")],
            observations: Vec::new(),
        }
    }

    #[test]
    fn a_run_replaces_what_the_document_had_of_another() {
        let once = outcome().insert(&format!("# Title\n\nWords.\n\n{BEGIN}\nold\n{END}\n\nMore.\n")).unwrap();
        assert!(
            once.starts_with("# Title\n\nWords.\n") && once.ends_with("\nMore.\n") && !once.contains("old")
        );
        assert!(once.contains("| large read over TCP |") && once.contains("12.5 MiB"), "{once}");
        assert_eq!(outcome().insert(&once).unwrap().matches("| large read over TCP |").count(), 1);
        assert!(outcome().insert("no marks").is_err());
        assert!(outcome().insert(Outcome::DOCUMENT).is_ok());
    }

    #[test]
    fn the_nearest_mount_is_the_disk() {
        let mounts = "proc /proc proc rw 0 0\n/dev/vda / ext4 rw 0 0\n";
        assert_eq!(disk(Path::new("/"), mounts), "ext4 on /dev/vda");
    }

    #[test]
    fn the_machine_is_known() {
        let hardware = outcome().hardware;
        assert!(hardware.processors > 0 && hardware.memory_mib > 0 && !hardware.kernel.is_empty());
    }
}
