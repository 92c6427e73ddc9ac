use super::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
use tonic::{body::Body, service::Routes};
use tower::ServiceExt as _;

#[test]
fn addresses_are_checked_before_anything_connects() {
    let network: Arc<dyn Connect> = Arc::new(SystemNetwork);
    for bad in ["", "localhost", "127.0.0.1:7400", "https://a:1", "http://a", "http://a:1/x"] {
        assert!(channel(&network, bad, Traffic::Small).is_err(), "{bad:?}");
    }
}

#[tokio::test]
async fn good_addresses_make_lazy_channels() {
    let network: Arc<dyn Connect> = Arc::new(SystemNetwork);
    for good in ["http://127.0.0.1:1", "http://dir:7400/", "unix:/tmp/x.sock"] {
        assert!(channel(&network, good, Traffic::Bulk).is_ok(), "{good:?}");
    }
}

#[test]
fn windows_and_frames_are_large_enough_for_bulk_and_fit_the_memory_bound() {
    // A small window with many small DATA frames would have h2 close the connection, and frames of 16 KiB
    // halve the throughput.
    const { assert!(BULK_FRAME_BYTES as usize >= limits::DATA_BYTES_MAX) };
    const { assert!(BULK_CONNECTION_WINDOW_BYTES >= 4 * BULK_FRAME_BYTES) };
    const { assert!(BULK_STREAM_WINDOW_BYTES <= BULK_CONNECTION_WINDOW_BYTES) };
}

/// What an end of a connection says it takes.
#[derive(Debug, Default, PartialEq)]
struct Takes {
    stream_window: u32,
    connection_window: u32,
    frame: u32,
}

impl Takes {
    /// From the first frames of HTTP/2, as they stand on the wire.
    async fn said_by(io: &mut DuplexStream) -> Self {
        const SETTINGS: u8 = 4;
        const WINDOW_UPDATE: u8 = 8;
        let mut takes = Self::default();
        while takes.stream_window == 0 || takes.connection_window == 0 {
            let mut head = [0; 9];
            io.read_exact(&mut head).await.unwrap();
            let mut content = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
            io.read_exact(&mut content).await.unwrap();
            let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
            match head[3] {
                SETTINGS => {
                    for setting in content.chunks(6) {
                        let value = u32::from_be_bytes([setting[2], setting[3], setting[4], setting[5]]);
                        match setting[1] {
                            4 => takes.stream_window = value,
                            5 => takes.frame = value,
                            _ => {}
                        }
                    }
                }
                // Every connection begins with 65,535.
                WINDOW_UPDATE if stream == 0 => {
                    let more = u32::from_be_bytes([content[0], content[1], content[2], content[3]]);
                    takes.connection_window = 65_535 + more;
                }
                _ => {}
            }
        }
        takes
    }

    fn expected(traffic: Traffic) -> Self {
        let [stream_window, connection_window, frame] = match traffic {
            Traffic::Small => [SMALL_STREAM_WINDOW_BYTES, SMALL_CONNECTION_WINDOW_BYTES, SMALL_FRAME_BYTES],
            Traffic::Bulk => [BULK_STREAM_WINDOW_BYTES, BULK_CONNECTION_WINDOW_BYTES, BULK_FRAME_BYTES],
        };
        Self { stream_window, connection_window, frame }
    }
}

const GREETING: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// One connection that is there already.
#[derive(Debug)]
struct There(std::sync::Mutex<Option<DuplexStream>>);

#[async_trait]
impl Connect for There {
    async fn connect(&self, _: &str) -> io::Result<Box<dyn Io>> {
        let there = self.0.lock().unwrap().take();
        there.map(|io| Box::new(io) as Box<dyn Io>).ok_or_else(|| io::ErrorKind::ConnectionRefused.into())
    }
}

#[tokio::test]
async fn clients_say_on_the_wire_what_their_traffic_needs() {
    for traffic in [Traffic::Small, Traffic::Bulk] {
        let (near, mut far) = duplex(64 * 1024);
        let network: Arc<dyn Connect> = Arc::new(There(std::sync::Mutex::new(Some(near))));
        let channel = channel(&network, "http://there:1", traffic).unwrap();
        let request = http::Request::builder().uri("http://there:1/a").body(Body::empty()).unwrap();
        let call = tokio::spawn(channel.oneshot(request));
        let mut greeting = [0; 24];
        far.read_exact(&mut greeting).await.unwrap();
        assert_eq!(&greeting, GREETING);
        assert_eq!(Takes::said_by(&mut far).await, Takes::expected(traffic), "{traffic:?}");
        call.abort();
    }
}

#[tokio::test]
async fn servers_say_on_the_wire_what_their_traffic_needs() {
    for traffic in [Traffic::Small, Traffic::Bulk] {
        let (mut near, far) = duplex(64 * 1024);
        let incoming = tonic::codegen::tokio_stream::once(io::Result::Ok(Wire::new(far)));
        let serving = tokio::spawn(
            server(traffic, Room::Roomy).add_routes(Routes::default()).serve_with_incoming(incoming),
        );
        // The greeting, and settings without any.
        near.write_all(GREETING).await.unwrap();
        near.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
        assert_eq!(Takes::said_by(&mut near).await, Takes::expected(traffic), "{traffic:?}");
        serving.abort();
    }
}
