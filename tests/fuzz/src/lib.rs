//! Hostile bytes for decoders, on stable Rust and in plain `cargo test`.
//!
//! A test names a [`Decoder`], gives it valid samples and runs it. What runs: every sample and every file of the
//! decoder's corpus (`tests/data/corpus/NAME/`), every cut of the short ones, then mutants of them. After a mutation a
//! checksum can be made right again ([`Decoder::repair`]), so that what lies behind it is reached too.
//!
//! What fails: a panic, a run of more than [`RUN_MAX`], and more memory than a stated multiple of the input, counted by
//! [`memory::Counting`], which the test binary makes its global allocator. A failure prints the variables that repeat
//! it and leaves the bytes in a file; put that file into the corpus.
//!
//! `CAIRN_FUZZ_RUNS` is the number of runs of each cheap decoder; a dear one makes a stated share of them.
//! `CAIRN_FUZZ_SEED` and `CAIRN_FUZZ_ONLY` repeat one run. `CAIRN_FUZZ_KEEP=1` writes the samples to the corpus.

use rand::{SeedableRng as _, rngs::SmallRng};
use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

pub mod memory;
mod mutate;

pub use mutate::mutate;

/// Runs of each cheap decoder when nobody says.
const RUNS_DEFAULT: u64 = 20_000;
/// Longest time of one run. Generous: a debug build on a busy machine.
pub const RUN_MAX: Duration = Duration::from_secs(20);
/// After this long a run is taken for one that never ends.
const HANG: Duration = Duration::from_secs(120);
/// Inputs up to this length are tried with every cut.
const CUTS_BYTES_MAX: usize = 400;
/// Bytes of a failing input that are shown.
const SHOWN_BYTES: usize = 400;

/// The runs that were asked for.
///
/// # Panics
/// When `CAIRN_FUZZ_RUNS` is not a number.
pub fn runs() -> u64 {
    number("CAIRN_FUZZ_RUNS").unwrap_or(RUNS_DEFAULT)
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} is not a number: {text}")))
}

/// A number that nobody can foresee.
fn chance() -> u64 {
    use std::hash::{BuildHasher as _, Hasher as _};
    std::hash::RandomState::new().build_hasher().finish()
}

type Repair = Box<dyn Fn(&mut Vec<u8>)>;

/// A decoder under test.
pub struct Decoder {
    name: &'static str,
    one_in: u64,
    multiple: usize,
    constant: usize,
    bytes_max: usize,
    samples: Vec<Vec<u8>>,
    repairs: Vec<Repair>,
}

impl Decoder {
    /// A decoder whose corpus is `tests/data/corpus/NAME`; it may use ten times its input and 64 KiB.
    pub fn new(name: &'static str) -> Self {
        Self {
            name,
            one_in: 1,
            multiple: 10,
            constant: 64 * 1024,
            bytes_max: 64 * 1024,
            samples: Vec::new(),
            repairs: Vec::new(),
        }
    }

    /// Makes one of so many runs, for a decoder that takes longer than some microseconds.
    #[must_use]
    pub fn one_in(mut self, runs: u64) -> Self {
        self.one_in = runs;
        self
    }

    /// What it may have allocated at a time: `multiple` times its input and `constant` bytes.
    #[must_use]
    pub fn memory(mut self, multiple: usize, constant: usize) -> Self {
        (self.multiple, self.constant) = (multiple, constant);
        self
    }

    /// Longest input. 64 KiB if not said.
    #[must_use]
    pub fn bytes_max(mut self, bytes: usize) -> Self {
        self.bytes_max = bytes;
        self
    }

    /// A valid input, from which mutants are made.
    #[must_use]
    pub fn sample(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.samples.push(bytes.into());
        self
    }

    /// Makes checksums right again after half of the mutations. Each repair that is given is used in its turn.
    #[must_use]
    pub fn repair(mut self, repair: impl Fn(&mut Vec<u8>) + 'static) -> Self {
        self.repairs.push(Box::new(repair));
        self
    }

    /// Runs it.
    ///
    /// # Panics
    /// When one of the runs failed, there is no corpus, or memory is not counted.
    pub fn run(mut self, mut decode: impl FnMut(&[u8])) {
        assert!(
            memory::is_counting(),
            "the test binary must make fuzz::memory::Counting its global allocator"
        );
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../data/corpus").join(self.name);
        if std::env::var_os("CAIRN_FUZZ_KEEP").is_some() {
            keep(&folder, &self.samples);
        }
        let kept = corpus(&folder);
        assert!(!kept.is_empty(), "{} is empty: run once with CAIRN_FUZZ_KEEP=1", folder.display());
        self.samples.extend(kept);
        self.samples.sort();
        self.samples.dedup();

        let seed = number("CAIRN_FUZZ_SEED").unwrap_or_else(chance);
        let only = number("CAIRN_FUZZ_ONLY");
        let began = Instant::now();
        let mut watched = Watched::begin(self.name, seed);
        let mut judge = Judge { decoder: &self, seed, only: 0, worst: (0, 0), slowest: Duration::ZERO };
        let mut runs = 0;
        if only.is_none() {
            for sample in self.samples.clone() {
                judge.judge(&sample, &mut decode);
                runs += 1;
                for cut in 0..sample.len().min(CUTS_BYTES_MAX) {
                    judge.judge(&sample[..cut], &mut decode);
                    runs += 1;
                }
            }
        }
        let wanted = (self::runs() / self.one_in).max(1);
        for run in only.map_or(0..wanted, |only| only..only + 1) {
            watched.progress(run);
            // Each run has a seed of its own, so that one can be repeated alone.
            let mut random = SmallRng::seed_from_u64(seed ^ run.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            let mut bytes = mutate(&self.samples, self.bytes_max, &mut random);
            if !self.repairs.is_empty() && run.is_multiple_of(2) {
                let repair = (run / 2) as usize % self.repairs.len();
                self.repairs[repair](&mut bytes);
            }
            judge.only = run;
            judge.judge(&bytes, &mut decode);
            runs += 1;
        }
        let (used, input) = judge.worst;
        println!(
            "fuzz {:<24} {runs:>9} runs {:>7.1} s, slowest {:?}, most memory {used} bytes for {input} of input",
            self.name,
            began.elapsed().as_secs_f64(),
            judge.slowest,
        );
        watched.end();
    }
}

/// Runs one input and judges it.
struct Judge<'a> {
    decoder: &'a Decoder,
    seed: u64,
    only: u64,
    /// Most memory of a run, and its input's length.
    worst: (usize, usize),
    slowest: Duration,
}

impl Judge<'_> {
    fn judge(&mut self, bytes: &[u8], decode: &mut impl FnMut(&[u8])) {
        let shown = Shown { name: self.decoder.name, seed: self.seed, only: self.only, bytes };
        let began = Instant::now();
        let used = memory::peak_of(|| decode(bytes));
        let took = began.elapsed();
        self.slowest = self.slowest.max(took);
        if used > self.worst.0 {
            self.worst = (used, bytes.len());
        }
        assert!(took < RUN_MAX, "{}: one run took {took:?}", self.decoder.name);
        let allowed = self.decoder.multiple * bytes.len() + self.decoder.constant;
        assert!(
            used <= allowed,
            "{}: {used} bytes of memory for {} of input, {allowed} are allowed",
            self.decoder.name,
            bytes.len()
        );
        std::mem::forget(shown);
    }
}

/// Dropped only while panicking: says what was run.
struct Shown<'a> {
    name: &'a str,
    seed: u64,
    only: u64,
    bytes: &'a [u8],
}

impl Drop for Shown<'_> {
    fn drop(&mut self) {
        let path = std::env::temp_dir().join(format!("cairn-fuzz-{}-{:016x}", self.name, hash(self.bytes)));
        let kept = fs::write(&path, self.bytes).is_ok();
        let mut hex = String::new();
        for byte in self.bytes.iter().take(SHOWN_BYTES) {
            let _ = write!(hex, "{byte:02x}");
        }
        eprintln!("--- {}: failed with {} bytes: {hex}", self.name, self.bytes.len());
        eprintln!("CAIRN_FUZZ_SEED={} CAIRN_FUZZ_ONLY={} repeats it", self.seed, self.only);
        if kept {
            eprintln!("the bytes are in {}: move it to tests/data/corpus/{}/", path.display(), self.name);
        }
    }
}

/// Ends the process when a run does not end: a panic elsewhere could not stop it.
struct Watched {
    at: Arc<AtomicU64>,
    ended: Arc<AtomicBool>,
}

impl Watched {
    fn begin(name: &'static str, seed: u64) -> Self {
        let watched = Self { at: Arc::default(), ended: Arc::default() };
        let (at, ended) = (watched.at.clone(), watched.ended.clone());
        std::thread::spawn(move || {
            let (mut last, mut since) = (0, Instant::now());
            while !ended.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(200));
                let now = at.load(Ordering::Relaxed);
                if now != last {
                    (last, since) = (now, Instant::now());
                }
                if since.elapsed() > HANG {
                    eprintln!(
                        "{name}: a run does not end: CAIRN_FUZZ_SEED={seed} CAIRN_FUZZ_ONLY={now} repeats it"
                    );
                    std::process::abort();
                }
            }
        });
        watched
    }

    fn progress(&mut self, run: u64) {
        self.at.store(run, Ordering::Relaxed);
    }

    fn end(self) {}
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
    }
}

fn corpus(folder: &Path) -> Vec<Vec<u8>> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

fn keep(folder: &Path, samples: &[Vec<u8>]) {
    fs::create_dir_all(folder).unwrap();
    for sample in samples {
        fs::write(folder.join(format!("sample-{:016x}", hash(sample))), sample).unwrap();
    }
}

/// FNV-1a: names a file by its content.
fn hash(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}
