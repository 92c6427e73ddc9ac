//! Workers at work, for a time or until all is done.

use crate::usage::{Meter, Sample};
use bytes::Bytes;
use client_lib::{Client, Error, Reason, Result};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use std::time::{Duration, Instant};

/// Runs one worker for each state, each on a task of its own, until `span` is over. An operation gets the state and
/// its number, and answers the state and the bytes it moved.
///
/// # Errors
/// The first failure of any operation.
pub async fn timed<S, F, Fut>(states: Vec<S>, servers: &[u32], span: Duration, operation: F) -> Result<Sample>
where
    S: Send + 'static,
    F: Fn(S, u64) -> Fut + Clone + Send + 'static,
    Fut: Future<Output = Result<(S, u64)>> + Send,
{
    let meter = Meter::start(servers);
    let end = Instant::now() + span;
    let workers: Vec<_> = states
        .into_iter()
        .map(|mut state| {
            let operation = operation.clone();
            tokio::spawn(async move {
                let (mut bytes, mut times) = (0, Vec::new());
                loop {
                    let begin = Instant::now();
                    if begin >= end && !times.is_empty() {
                        return Ok::<(u64, Vec<u32>), Error>((bytes, times));
                    }
                    let moved;
                    (state, moved) = operation(state, times.len() as u64).await?;
                    bytes += moved;
                    times.push(u32::try_from(begin.elapsed().as_micros()).unwrap_or(u32::MAX));
                }
            })
        })
        .collect();
    let (mut bytes, mut times) = (0, Vec::new());
    for worker in workers {
        let (moved, took): (u64, Vec<u32>) =
            worker.await.map_err(|error| Error::internal(error.to_string()))??;
        bytes += moved;
        times.extend(took);
    }
    Ok(meter.stop(times.len() as u64, bytes, times))
}

/// Does `count` things, some at a time.
///
/// # Errors
/// The first failure.
pub async fn all<T, F, Fut>(at_once: usize, count: u64, operation: F) -> Result<()>
where
    F: Fn(u64) -> Fut,
    Fut: Future<Output = Result<T>>,
{
    stream::iter(0..count)
        .map(|number| {
            let work = operation(number);
            async move { work.await.map(|_| ()) }
        })
        .buffer_unordered(at_once)
        .try_collect()
        .await
}

/// Bytes that nothing compresses, the same for the same seed.
pub fn content(seed: u64, length: usize) -> Bytes {
    let mut random = Random::new(seed);
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        bytes.extend_from_slice(&random.next().to_le_bytes());
    }
    bytes.truncate(length);
    bytes.into()
}

/// Numbers that look random, for choosing files and places: cheap, since it runs inside of what is measured.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The sequence of this seed.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// The next one.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// One below `end`, which is not 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

/// Checks what a read returned; its checksums were verified by the client already.
///
/// # Errors
/// `INTERNAL` when there are too few or too many bytes.
pub fn expect_length(bytes: u64, expected: u64) -> Result<u64> {
    if bytes == expected {
        return Ok(bytes);
    }
    Err(Error::new(Reason::Internal, format!("{bytes} bytes were read and {expected} written")))
}

/// Ends sessions of clients that are of no more use.
pub async fn close(clients: Vec<Client>) -> Result<()> {
    all(16, clients.len() as u64, |i| {
        let client = clients[i as usize].clone();
        async move { client.close().await }
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_have_their_length_and_repeat() {
        for length in [0, 1, 8, 4_095, 4_096] {
            assert_eq!(content(7, length).len(), length);
        }
        assert_eq!(content(7, 100), content(7, 100));
        assert_ne!(content(7, 100), content(8, 100));
    }

    #[test]
    fn random_numbers_reach_everything_below() {
        let mut random = Random::new(3);
        let mut seen = [false; 10];
        for _ in 0..1_000 {
            seen[random.below(10) as usize] = true;
        }
        assert!(seen.iter().all(|&seen| seen));
    }

    #[tokio::test]
    async fn every_worker_works_and_failures_are_told() {
        let sample = timed(vec![(); 3], &[], Duration::ZERO, |(), _| async { Ok(((), 5)) }).await.unwrap();
        assert_eq!((sample.operations, sample.bytes), (3, 15), "at least once each");
        let failed = timed(vec![()], &[], Duration::from_secs(60), |(), number| async move {
            if number < 2 { Ok(((), 1)) } else { Err(Error::internal("broken")) }
        });
        assert_eq!(failed.await.unwrap_err().message(), "broken");
    }
}
