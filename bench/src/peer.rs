//! The other end of the limits, a process of its own: it sends files over raw sockets and answers echo calls.
//!
//! It prints one line: the port of raw TCP and that of the echo service. Files are those of its folder by the number in
//! the first eight bytes of a connection; the next eight say how many bytes to send. It ends with its standard input.

use crate::limits::echo;
use std::{
    fs::File,
    io::{self, Read, Write},
    net::TcpListener,
    os::unix::{fs::FileExt as _, net::UnixListener},
    path::Path,
    sync::Arc,
};

/// Name of the file that is sent, in the peer's folder.
pub const FILE: &str = "sent";
/// Name of the Unix socket in the peer's folder.
pub const SOCKET: &str = "raw.sock";
/// Bytes of one read and write.
const BUFFER_BYTES: usize = 256 << 10;

/// Serves until standard input ends.
///
/// # Errors
/// When it cannot listen, or the file is missing.
pub fn run(folder: &Path) -> io::Result<()> {
    let file = Arc::new(File::open(folder.join(FILE))?);
    let tcp = TcpListener::bind("127.0.0.1:0")?;
    let unix = UnixListener::bind(folder.join(SOCKET))?;
    let (port, echo_port) = (tcp.local_addr()?.port(), echo::serve()?);
    let sent = file.clone();
    std::thread::spawn(move || {
        for stream in tcp.incoming().flatten() {
            let _ = stream.set_nodelay(true);
            let file = sent.clone();
            std::thread::spawn(move || send(stream, &file));
        }
    });
    std::thread::spawn(move || {
        for stream in unix.incoming().flatten() {
            let file = file.clone();
            std::thread::spawn(move || send(stream, &file));
        }
    });
    println!("{port} {echo_port}");
    io::stdout().flush()?;
    io::copy(&mut io::stdin(), &mut io::sink())?;
    Ok(())
}

/// Sends as many bytes of the file as are asked for, again and again, until the connection ends.
fn send(mut stream: impl Read + Write, file: &File) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut length = [0; 8];
    loop {
        stream.read_exact(&mut length)?;
        let (mut offset, end) = (0, u64::from_le_bytes(length));
        while offset < end {
            let wanted = (end - offset).min(BUFFER_BYTES as u64) as usize;
            let count = file.read_at(&mut buffer[..wanted], offset)?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            stream.write_all(&buffer[..count])?;
            offset += count as u64;
        }
    }
}
