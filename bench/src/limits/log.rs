//! Logs on preallocated segments that were written before, so that a sync has no journal of the file system to wait
//! for: one log with many writers, and several logs with one.

use super::{Machine, disk::pattern, repeat, threads};
use bench::usage::{Meter, Sample};
use std::{
    fs::File,
    io,
    os::unix::fs::FileExt as _,
    sync::{Arc, Condvar, Mutex, PoisonError, mpsc},
    thread,
};

const RECORD_BYTES: usize = 4_096;
const SEGMENT_BYTES: u64 = 32 << 20;
/// Most records of one sync.
const GROUP_MAX: usize = 256;

/// A segment, written once over its whole length and synced.
fn segment(machine: &Machine, number: usize) -> io::Result<File> {
    let path = machine.folder.join(format!("log-{number}"));
    if let Ok(file) = File::options().write(true).open(&path) {
        return Ok(file);
    }
    let file = File::create(&path)?;
    let zeros = vec![0; 1 << 20];
    for offset in (0..SEGMENT_BYTES).step_by(zeros.len()) {
        file.write_all_at(&zeros, offset)?;
    }
    file.sync_all()?;
    Ok(file)
}

#[derive(Default)]
struct Queue {
    /// Records put in, and records durable, since the beginning.
    put: u64,
    durable: u64,
    closed: bool,
    failed: bool,
}

/// Writers each wait for their record; one committer writes what has come together and syncs once.
///
/// # Errors
/// As the disk says.
pub fn group(machine: &Machine, writers: usize) -> io::Result<Sample> {
    let file = segment(machine, 0)?;
    let records = pattern(GROUP_MAX * RECORD_BYTES);
    let shared = Arc::new((Mutex::new(Queue::default()), Condvar::new(), Condvar::new()));
    let committer = {
        let shared = shared.clone();
        thread::spawn(move || {
            let mut offset = 0;
            let (queue, come, done) = &*shared;
            let mut state = queue.lock().unwrap_or_else(PoisonError::into_inner);
            loop {
                while state.put == state.durable && !state.closed {
                    state = come.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                if state.put == state.durable {
                    return;
                }
                let count = (state.put - state.durable).min(GROUP_MAX as u64);
                drop(state);
                let bytes = &records[..count as usize * RECORD_BYTES];
                if offset + bytes.len() as u64 > SEGMENT_BYTES {
                    offset = 0;
                }
                let written = file.write_all_at(bytes, offset).and_then(|()| file.sync_data());
                offset += bytes.len() as u64;
                state = queue.lock().unwrap_or_else(PoisonError::into_inner);
                state.durable += count;
                state.failed |= written.is_err();
                done.notify_all();
            }
        })
    };
    let meter = Meter::start(&[]);
    let result = threads(writers, |_| {
        let (queue, come, done) = &*shared;
        repeat(machine.span, |_| {
            let mut state = queue.lock().unwrap_or_else(PoisonError::into_inner);
            state.put += 1;
            let own = state.put;
            come.notify_one();
            while state.durable < own {
                state = done.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if state.failed { Err(io::Error::other("the log could not be synced")) } else { Ok(()) }
        })
    });
    let (queue, come, _) = &*shared;
    queue.lock().unwrap_or_else(PoisonError::into_inner).closed = true;
    come.notify_all();
    let ended = committer.join();
    let (operations, times) = result?;
    ended.map_err(|_| io::Error::other("the committer panicked"))?;
    Ok(meter.stop(operations, operations * RECORD_BYTES as u64, times))
}

/// One writer that puts a record into each of some logs at once and waits until all of them are durable.
///
/// # Errors
/// As the disk says.
pub fn together(machine: &Machine, logs: usize) -> io::Result<Sample> {
    let record = Arc::new(pattern(RECORD_BYTES));
    let (done, finished) = mpsc::channel();
    let mut orders = Vec::new();
    for number in 0..logs {
        let (order, next) = mpsc::channel::<u64>();
        let (file, record, done) = (segment(machine, number)?, record.clone(), done.clone());
        orders.push(order);
        thread::spawn(move || {
            for offset in next {
                let written = file.write_all_at(&record, offset).and_then(|()| file.sync_data());
                if done.send(written).is_err() {
                    return;
                }
            }
        });
    }
    let gone = |_| io::Error::other("a log's thread ended");
    let meter = Meter::start(&[]);
    let times = repeat(machine.span, |number| {
        let offset = number * RECORD_BYTES as u64 % SEGMENT_BYTES;
        for order in &orders {
            order.send(offset).map_err(|_| gone(()))?;
        }
        for _ in &orders {
            finished.recv().map_err(|_| gone(()))??;
        }
        Ok(())
    })?;
    let count = times.len() as u64;
    Ok(meter.stop(count, count * RECORD_BYTES as u64, times))
}
