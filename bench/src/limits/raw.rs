//! A page-cached file over raw sockets: pread and write at one end, read at the other.

use super::{Machine, repeat};
use crate::peer::SOCKET;
use bench::usage::{Meter, Sample};
use std::{
    io::{self, Read, Write},
    net::TcpStream,
    os::unix::net::UnixStream,
};

/// Fits the second-level cache: the best for copies.
const BUFFER_BYTES: usize = 256 << 10;

/// Over loopback TCP.
///
/// # Errors
/// When the other end is gone.
pub fn tcp(machine: &Machine) -> io::Result<Sample> {
    let stream = TcpStream::connect(("127.0.0.1", machine.raw_port))?;
    stream.set_nodelay(true)?;
    receive(machine, stream)
}

/// Over a Unix socket.
///
/// # Errors
/// When the other end is gone.
pub fn unix(machine: &Machine) -> io::Result<Sample> {
    receive(machine, UnixStream::connect(machine.folder.join(SOCKET))?)
}

fn receive(machine: &Machine, mut stream: impl Read + Write) -> io::Result<Sample> {
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut once = |_| {
        stream.write_all(&machine.large_bytes.to_le_bytes())?;
        let mut rest = machine.large_bytes as usize;
        while rest > 0 {
            let wanted = rest.min(BUFFER_BYTES);
            let count = stream.read(&mut buffer[..wanted])?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            rest -= count;
        }
        Ok(())
    };
    once(0)?;
    let servers = [machine.peer];
    let meter = Meter::start(&servers);
    let times = repeat(machine.span, once)?;
    let bytes = times.len() as u64 * machine.large_bytes;
    Ok(meter.stop(times.len() as u64, bytes, times))
}
