//! What happened in a run, as one number: two runs of a seed must agree in it.

use std::{
    fmt,
    io::Write as _,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// The hash of all events so far; clones share it. With `CAIRN_SIM_TRACE=FILE` every event is written to that file too:
/// the first line that differs between two runs is where they part.
#[derive(Clone)]
pub struct Trace {
    hash: Arc<AtomicU64>,
    file: Option<Arc<parking_lot::Mutex<std::io::BufWriter<std::fs::File>>>>,
}

impl Trace {
    /// An empty one.
    pub fn new() -> Self {
        let file = std::env::var_os("CAIRN_SIM_TRACE").map(|path| {
            let file = std::fs::File::create(path).expect("the trace file can be created");
            Arc::new(parking_lot::Mutex::new(std::io::BufWriter::new(file)))
        });
        Self { hash: Arc::default(), file }
    }

    /// Adds an event: numbers that name it, and bytes that it carries.
    pub fn event(&self, what: &str, numbers: &[u64], bytes: &[u8]) {
        let mut hash = xxh3_64_with_seed(what.as_bytes(), self.hash());
        for number in numbers {
            hash = xxh3_64_with_seed(&number.to_le_bytes(), hash);
        }
        hash = xxh3_64_with_seed(bytes, hash);
        self.hash.store(hash, Ordering::Relaxed);
        if let Some(file) = &self.file {
            let mut file = file.lock();
            writeln!(file, "{what} {numbers:?} {} bytes {hash:016x}", bytes.len())
                .expect("the trace file grows");
            file.flush().expect("the trace file grows");
        }
    }

    /// The hash so far.
    pub fn hash(&self) -> u64 {
        self.hash.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Trace({:016x})", self.hash())
    }
}
