//! gRPC unary calls that do nothing: the request says how long the answer is to be. Transport settings are Cairn's, one
//! thread serves at each end, and calls share four connections, which was the fastest.

use super::Machine;
use bench::usage::{Meter, Sample};
use bytes::Bytes;
use cairn_proto::net::{self, Connect, Room, SystemNetwork, Traffic};
use futures::future::{self, BoxFuture, Ready};
use std::{
    convert::Infallible,
    io,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};
use tonic::{Request, Response, Status, body::Body, client, server, transport::Channel};
use tonic_prost::ProstCodec;

const CHANNELS: usize = 4;
const PATH: &str = "/cairn.bench.Echo/Answer";
const ANSWER_BYTES_MAX: u32 = 1 << 20;

/// Serves on a thread of its own until the process ends; answers the port.
///
/// # Errors
/// When it cannot listen.
pub fn serve() -> io::Result<u16> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))?;
    let port = listener.local_addr()?.port();
    std::thread::spawn(move || {
        let server = net::server(Traffic::Small, Room::Roomy).add_service(Echo);
        let served = runtime.block_on(server.serve_with_incoming(net::accept_tcp(listener)));
        if let Err(error) = served {
            eprintln!("bench: the echo service ended: {error}");
        }
    });
    Ok(port)
}

#[derive(Clone, Copy, Debug)]
struct Echo;

impl server::NamedService for Echo {
    const NAME: &'static str = "cairn.bench.Echo";
}

impl tower::Service<http::Request<Body>> for Echo {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(async move {
            let codec = ProstCodec::<Bytes, Bytes>::default();
            Ok(server::Grpc::new(codec).unary(Answer, request).await)
        })
    }
}

struct Answer;

impl server::UnaryService<Bytes> for Answer {
    type Response = Bytes;
    type Future = Ready<Result<Response<Bytes>, Status>>;

    fn call(&mut self, request: Request<Bytes>) -> Self::Future {
        static ZEROS: [u8; ANSWER_BYTES_MAX as usize] = [0; ANSWER_BYTES_MAX as usize];
        let asked =
            request.get_ref().get(..4).and_then(|bytes| bytes.try_into().ok()).map(u32::from_le_bytes);
        future::ready(match asked.filter(|&length| length <= ANSWER_BYTES_MAX) {
            Some(length) => Ok(Response::new(Bytes::from_static(&ZEROS[..length as usize]))),
            None => Err(Status::invalid_argument("the request says no length")),
        })
    }
}

/// Calls with answers of `bytes`, some at a time.
///
/// # Errors
/// When the other end is gone.
pub fn measure(machine: &Machine, bytes: u32, in_flight: usize) -> io::Result<Sample> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let network: Arc<dyn Connect> = Arc::new(SystemNetwork);
        let uri = format!("http://127.0.0.1:{}", machine.echo_port);
        let mut channels = Vec::new();
        for _ in 0..CHANNELS.min(in_flight) {
            let channel = net::channel(&network, &uri, Traffic::Small).map_err(io::Error::other)?;
            call(channel.clone(), bytes).await?;
            channels.push(channel);
        }
        let servers = [machine.peer];
        let meter = Meter::start(&servers);
        let end = Instant::now() + machine.span;
        let workers: Vec<_> = (0..in_flight)
            .map(|number| {
                let channel = channels[number % channels.len()].clone();
                tokio::spawn(async move {
                    let mut times = Vec::new();
                    loop {
                        let begin = Instant::now();
                        if begin >= end {
                            return io::Result::Ok(times);
                        }
                        call(channel.clone(), bytes).await?;
                        times.push(u32::try_from(begin.elapsed().as_micros()).unwrap_or(u32::MAX));
                    }
                })
            })
            .collect();
        let mut times = Vec::new();
        for worker in workers {
            times.extend(worker.await.map_err(io::Error::other)??);
        }
        Ok(meter.stop(times.len() as u64, times.len() as u64 * u64::from(bytes), times))
    })
}

async fn call(channel: Channel, bytes: u32) -> io::Result<()> {
    let mut grpc = client::Grpc::new(channel);
    grpc.ready().await.map_err(io::Error::other)?;
    // 64 bytes, as a short path takes them.
    let mut question = vec![0; 64];
    question[..4].copy_from_slice(&bytes.to_le_bytes());
    let codec = ProstCodec::<Bytes, Bytes>::default();
    let path = http::uri::PathAndQuery::from_static(PATH);
    let answer = grpc.unary(Request::new(Bytes::from(question)), path, codec).await;
    let length = answer.map_err(io::Error::other)?.into_inner().len();
    if length == bytes as usize {
        Ok(())
    } else {
        Err(io::Error::other(format!("an echo of {length} bytes")))
    }
}
