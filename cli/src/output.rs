//! Standard output: lines for a person, JSON for a program, and quiet when nobody reads on.

use crate::failure::Failure;
use serde::Serialize;
use std::{
    io::{self, BufWriter, StdoutLock, Write},
    time::{Duration, UNIX_EPOCH},
};

/// Standard output of this process, buffered. What is written appears at [`Out::finish`] at the latest.
pub struct Out {
    inner: BufWriter<StdoutLock<'static>>,
}

impl Out {
    /// Takes standard output.
    pub fn new() -> Self {
        Self { inner: BufWriter::with_capacity(64 * 1024, io::stdout().lock()) }
    }

    /// One line.
    pub fn line(&mut self, text: &str) -> Result<(), Failure> {
        self.inner.write_all(text.as_bytes()).and_then(|()| self.inner.write_all(b"\n")).map_err(broken)
    }

    /// One JSON document in readable form.
    pub fn json(&mut self, value: &impl Serialize) -> Result<(), Failure> {
        serde_json::to_writer_pretty(&mut self.inner, value).map_err(|error| broken(error.into()))?;
        self.line("")
    }

    /// One JSON document in one line, for output that goes on.
    pub fn json_line(&mut self, value: &impl Serialize) -> Result<(), Failure> {
        serde_json::to_writer(&mut self.inner, value).map_err(|error| broken(error.into()))?;
        self.line("")
    }

    /// What was written so far appears now.
    pub fn finish(mut self) -> Result<(), Failure> {
        self.inner.flush().map_err(broken)
    }
}

fn broken(error: io::Error) -> Failure {
    if error.kind() == io::ErrorKind::BrokenPipe {
        Failure::BrokenPipe
    } else {
        Failure::Local { subject: "standard output".to_owned(), error }
    }
}

/// A table with columns as wide as their widest cell; the last one is not padded.
pub fn table(rows: &[Vec<String>], right: &[usize]) -> Vec<String> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    rows.iter()
        .map(|row| {
            let cells = row.iter().enumerate().map(|(column, cell)| {
                if right.contains(&column) {
                    format!("{cell:>width$}", width = widths[column])
                } else if column + 1 == row.len() {
                    cell.clone()
                } else {
                    format!("{cell:<width$}", width = widths[column])
                }
            });
            cells.collect::<Vec<_>>().join("  ")
        })
        .collect()
}

/// Bytes as a person reads them: `0 B`, `1.5 KiB`, `12 GiB`.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = bytes as f64;
    let mut unit = "B";
    for next in UNITS {
        if value < 1023.5 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    if unit == "B" || value >= 9.95 { format!("{value:.0} {unit}") } else { format!("{value:.1} {unit}") }
}

/// Nanoseconds since 1970 as `2026-01-31T12:00:00.123456789Z`.
pub fn time(ns: u64) -> String {
    humantime::format_rfc3339_nanos(UNIX_EPOCH + Duration::from_nanos(ns)).to_string()
}

/// The same to the second, for a person.
pub fn time_short(ns: u64) -> String {
    let text = humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_nanos(ns)).to_string();
    text.replace('T', " ").trim_end_matches('Z').to_owned()
}

/// A time span as a person reads it: `1s 200ms`, `3m 12s`.
pub fn span(ms: u64) -> String {
    let rounded = if ms >= 10_000 { ms / 1_000 * 1_000 } else { ms };
    humantime::format_duration(Duration::from_millis(rounded)).to_string()
}

/// A name that cannot move the cursor of a terminal: control characters are written as escapes.
pub fn name(text: &str) -> String {
    if text.chars().any(is_harmful) { text.escape_debug().to_string() } else { text.to_owned() }
}

/// A sentence with names in it, as harmless as [`name`].
pub fn harmless(text: &str) -> String {
    let mut harmless = String::with_capacity(text.len());
    for letter in text.chars() {
        if is_harmful(letter) {
            harmless.extend(letter.escape_default());
        } else {
            harmless.push(letter);
        }
    }
    harmless
}

/// Control characters, and those that change the order in which a terminal shows others.
fn is_harmful(letter: char) -> bool {
    letter.is_control()
        || matches!(letter, '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_well() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            (10 * 1024, "10 KiB"),
            (1024 * 1024 - 1, "1.0 MiB"),
            (8 << 30, "8.0 GiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(size(bytes), text, "{bytes}");
        }
    }

    #[test]
    fn tables_align_and_count_characters_not_bytes() {
        let row = |a: &str, b: &str| vec![a.to_owned(), b.to_owned()];
        assert_eq!(table(&[row("é", "1"), row("abc", "22")], &[1]), ["é     1", "abc  22"]);
        assert_eq!(table(&[], &[]), Vec::<String>::new());
    }

    #[test]
    fn times_are_utc() {
        assert_eq!(time(1_700_000_000_000_000_001), "2023-11-14T22:13:20.000000001Z");
        assert_eq!(time_short(1_700_000_000_000_000_001), "2023-11-14 22:13:20");
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        assert_eq!(name("a\u{1b}[2J"), "a\\u{1b}[2J");
        assert_eq!(name("naïve name"), "naïve name");
        assert_eq!(harmless("'naïve' \u{1b}]0;x\u{7}\u{202e}\n"), "'naïve' \\u{1b}]0;x\\u{7}\\u{202e}\\n");
    }
}
