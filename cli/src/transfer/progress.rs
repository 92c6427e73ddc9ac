//! A line of progress, on a terminal only, and only for what takes long enough to wonder.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::{
    io::IsTerminal as _,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

/// What is over by then needs no bar.
const PATIENCE: Duration = Duration::from_millis(500);

/// The progress of one command.
pub struct Progress {
    bar: ProgressBar,
    began: Instant,
    shown: AtomicBool,
    terminal: bool,
}

impl Progress {
    /// Of a transfer of so many bytes, if that is known.
    pub fn new(bytes: Option<u64>) -> Self {
        let bar = ProgressBar::with_draw_target(bytes, ProgressDrawTarget::hidden());
        let template = match bytes {
            Some(_) => "{wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}",
            None => "{spinner} {msg} {bytes} {bytes_per_sec}",
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        let terminal = std::io::stderr().is_terminal();
        Self { bar, began: Instant::now(), shown: AtomicBool::new(false), terminal }
    }

    /// One that is never shown.
    pub fn hidden() -> Self {
        Self { terminal: false, ..Self::new(None) }
    }

    /// So many more bytes are there.
    pub fn add(&self, bytes: u64) {
        self.bar.inc(bytes);
        self.show();
    }

    /// So many files are there.
    pub fn files(&self, files: u64) {
        if self.terminal {
            self.bar.set_message(format!("{files} files"));
            self.show();
        }
    }

    /// Runs what writes to the terminal, without the line in its way.
    pub fn suspend<T>(&self, write: impl FnOnce() -> T) -> T {
        self.bar.suspend(write)
    }

    /// Takes the line away.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }

    fn show(&self) {
        if self.terminal && self.began.elapsed() > PATIENCE && !self.shown.swap(true, Ordering::Relaxed) {
            self.bar.set_draw_target(ProgressDrawTarget::stderr_with_hz(10));
        }
    }
}
