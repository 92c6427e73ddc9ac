//! Time and chance of the whole program, taken from the machine and given to the simulation.
//!
//! The standard library and the dependencies ask the operating system for the time (`Date` headers, expiry of streams)
//! and for random bytes (the order of hash maps, the choices of `select!`). Neither may differ between two runs of a
//! seed, so this binary, and no other, defines the C functions that they end in. On a thread that has not called
//! [`begin`] they ask the machine as ever.

use rand::{RngCore as _, SeedableRng as _, rngs::SmallRng};
use std::cell::{Cell, RefCell};

/// The simulated time of day at the beginning of a run: an arbitrary, fixed moment.
const EPOCH_NS: u64 = 1_700_000_000_000_000_000;

thread_local! {
    static NOW_NS: Cell<Option<u64>> = const { Cell::new(None) };
    static DICE: RefCell<Option<SmallRng>> = const { RefCell::new(None) };
}

/// From here on, all time and chance on this thread is simulated. Call it first on a fresh thread: a hash map made
/// before has its order from the machine.
pub fn begin(seed: u64) {
    NOW_NS.set(Some(EPOCH_NS));
    DICE.with_borrow_mut(|dice| *dice = Some(SmallRng::seed_from_u64(seed)));
}

/// Sets the time, in milliseconds since the beginning of the run.
pub fn set_ms(ms: u64) {
    NOW_NS.set(Some(EPOCH_NS + ms * 1_000_000));
}

/// The simulated time of day, nanoseconds since 1970.
pub fn unix_ns() -> u64 {
    NOW_NS.get().unwrap_or(EPOCH_NS)
}

/// Milliseconds since the beginning of the run.
pub fn now_ms() -> u64 {
    (unix_ns() - EPOCH_NS) / 1_000_000
}

/// # Safety
/// As the C function: `time` points to a `timespec`, or is null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn clock_gettime(clock: libc::clockid_t, time: *mut libc::timespec) -> libc::c_int {
    // A thread whose locals are gone already is no simulation's.
    match NOW_NS.try_with(Cell::get).ok().flatten() {
        Some(ns) if !time.is_null() => {
            let seconds = (ns / 1_000_000_000) as libc::time_t;
            let rest = (ns % 1_000_000_000) as libc::c_long;
            // SAFETY: not null, and the caller owns it.
            unsafe { time.write(libc::timespec { tv_sec: seconds, tv_nsec: rest }) };
            0
        }
        // SAFETY: the arguments are passed on as they came.
        _ => unsafe { libc::syscall(libc::SYS_clock_gettime, clock, time) as libc::c_int },
    }
}

/// # Safety
/// As the C function: `buffer` points to `length` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn getrandom(
    buffer: *mut libc::c_void,
    length: libc::size_t,
    flags: libc::c_uint,
) -> libc::ssize_t {
    let simulated = DICE.try_with(|dice| {
        let mut dice = dice.try_borrow_mut().ok()?;
        // SAFETY: the caller owns these bytes.
        let bytes = unsafe { std::slice::from_raw_parts_mut(buffer.cast::<u8>(), length) };
        dice.as_mut()?.fill_bytes(bytes);
        Some(length as libc::ssize_t)
    });
    match simulated.ok().flatten() {
        Some(filled) => filled,
        // SAFETY: the arguments are passed on as they came.
        None => unsafe { libc::syscall(libc::SYS_getrandom, buffer, length, flags) as libc::ssize_t },
    }
}
