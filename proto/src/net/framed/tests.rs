use super::{receive::Received, send::Sent, *};
use crate::{Error, Reason, limits::MESSAGE_BYTES_MAX, v1};
use bytes::{Bytes, BytesMut};
use http_body::{Body as _, Frame};
use proptest::prelude::*;
use prost::Message as _;
use std::collections::VecDeque;
use tonic::{
    Code,
    codec::{Codec as _, EncodeBody, SingleMessageCompressionOverride},
};
use tonic_prost::ProstCodec;

/// Frames as they come from a connection.
#[derive(Debug, Default)]
struct Frames(VecDeque<Result<Frame<Bytes>, Status>>);

impl http_body::Body for Frames {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        Poll::Ready(self.0.pop_front())
    }
}

/// All data of a body, its frames' lengths, and its trailers.
async fn drain(
    body: impl http_body::Body<Data = Bytes, Error = Status>,
) -> (Bytes, Vec<usize>, http::HeaderMap) {
    let mut body = std::pin::pin!(body);
    let (mut data, mut lengths, mut trailers) = (BytesMut::new(), Vec::new(), http::HeaderMap::new());
    while let Some(frame) = std::future::poll_fn(|cx| body.as_mut().poll_frame(cx)).await {
        match frame.unwrap().into_data() {
            Ok(bytes) => {
                lengths.push(bytes.len());
                data.extend_from_slice(&bytes);
            }
            Err(frame) => trailers = frame.into_trailers().unwrap(),
        }
    }
    assert!(body.is_end_stream());
    (data.freeze(), lengths, trailers)
}

fn sums(count: usize) -> Vec<u64> {
    (0..count as u64).map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15)).collect()
}

fn read_response(offset: u64, length: usize) -> v1::ReadResponse {
    v1::ReadResponse {
        offset,
        block_checksums: sums(length.div_ceil(4_096)),
        chunk_length: 1 << 22,
        chunk_checksum: 77,
        data: vec![7; length].into(),
    }
}

fn write_request(offset: u64, length: usize, finish: bool) -> v1::WriteRequest {
    v1::WriteRequest {
        chunk: (offset == 0).then_some(v1::ChunkId { grant_id: 3, index: 9 }),
        group_id: 1,
        epoch: 2,
        offset,
        block_checksums: sums(length.div_ceil(4_096)),
        finish: finish.then_some(v1::WriteFinish { length: 1, checksum: Some(0) }),
        data: vec![9; length].into(),
    }
}

/// What tonic makes of the same messages.
async fn by_tonic<M: Carrier>(items: Vec<Result<M, Status>>) -> (Bytes, http::HeaderMap) {
    let body = EncodeBody::new_server(
        ProstCodec::<M, M>::default().encoder(),
        tokio_stream::iter(items),
        None,
        SingleMessageCompressionOverride::default(),
        Some(MESSAGE_BYTES_MAX),
    );
    let (data, _, trailers) = drain(body).await;
    (data, trailers)
}

async fn same_as_tonic<M: Carrier + Clone + Sync>(items: Vec<Result<M, Status>>) {
    let (data, _, trailers) = drain(Sent::response(tokio_stream::iter(items.clone()))).await;
    let (expected, expected_trailers) = by_tonic(items.clone()).await;
    assert!(data == expected, "{} bytes, tonic makes {}", data.len(), expected.len());
    assert_eq!(trailers, expected_trailers);
    let sure: Vec<M> = items.into_iter().filter_map(Result::ok).collect();
    let (of_request, _, none) = drain(Sent::request(tokio_stream::iter(sure))).await;
    assert!(of_request == expected && none.is_empty());
}

fn cut(data: &Bytes, lengths: &[usize]) -> Vec<Result<Frame<Bytes>, Status>> {
    let mut left = data.clone();
    let mut frames = Vec::new();
    for &length in lengths.iter().cycle() {
        if left.is_empty() {
            break;
        }
        frames.push(Ok(Frame::data(left.split_to(length.min(left.len())))));
    }
    frames
}

async fn all<M: prost::Message + Default>(mut received: Received<M>) -> (Vec<M>, Result<(), Status>) {
    let mut messages = Vec::new();
    loop {
        match received.message().await {
            Ok(Some(message)) => messages.push(message),
            end => {
                assert!(received.message().await.unwrap().is_none(), "it stays ended");
                return (messages, end.map(drop));
            }
        }
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().build().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn bodies_are_those_of_tonic_and_are_read_however_they_are_cut(
        lengths in prop::collection::vec(prop_oneof![
            Just(0usize), 1usize..300, 4_000usize..20_000, Just(16_384), Just(16_385), 100_000usize..600_000,
        ], 0..7),
        frames in prop::collection::vec(prop_oneof![1usize..8, 20usize..5_000, 16_384usize..300_000], 1..6),
        fails in any::<bool>(),
    ) {
        runtime().block_on(async {
            let status = || {
                let mut error = Error::new(Reason::ChecksumMismatch, "block 7 – a bad \n copy").on("2");
                error.detail.chunks.push(v1::ChunkRef { group_id: 4, ..Default::default() });
                Status::from(error)
            };
            let end = |fails: bool| fails.then(|| Err(status()));
            let reads: Vec<_> = lengths.iter().enumerate()
                .map(|(n, &length)| Ok(read_response(n as u64 * 4_096, length))).chain(end(fails)).collect();
            same_as_tonic(reads.clone()).await;
            let together: Vec<_> = lengths.iter().zip(0u32..).flat_map(|(&length, index)| {
                let part = Some(read_response(4_096, length));
                let error = (index % 3 == 1).then(|| Error::not_found("no chunk").at("/a").to_wire());
                [
                    Ok(v1::ReadManyResponse { index, error, part }),
                    Ok(v1::ReadManyResponse { index, error: None, part: None }),
                ]
            }).collect();
            same_as_tonic(together).await;
            let writes: Vec<_> = lengths.iter().enumerate()
                .map(|(n, &length)| Ok(write_request(n as u64, length, n % 2 == 0))).collect();
            same_as_tonic(writes.clone()).await;
            let replicated = writes.iter().map(|write| {
                Ok(v1::ReplicateRequest { write: Some(write.clone().unwrap()) })
            });
            same_as_tonic(replicated.chain([Ok(v1::ReplicateRequest::default())]).collect()).await;

            let (data, trailers) = by_tonic(reads.clone()).await;
            let mut wire = cut(&data, &frames);
            wire.push(Ok(Frame::trailers(trailers)));
            let (messages, ended) = all(Received::<v1::ReadResponse>::response(Body::new(Frames(wire.into())))).await;
            let expected: Vec<_> = reads.into_iter().filter_map(Result::ok).collect();
            assert!(messages == expected);
            assert_eq!(ended.is_err(), fails);
            if let Err(got) = ended {
                assert_eq!((got.code(), got.message(), got.details()),
                    (status().code(), status().message(), status().details()));
            }
        });
    }

    #[test]
    fn hostile_bytes_are_messages_or_a_refusal(
        bytes in prop::collection::vec(any::<u8>(), 0..3_000),
        prefix in prop::option::of(0u32..3_000),
        frames in prop::collection::vec(1usize..700, 1..4),
    ) {
        let mut all_bytes = Vec::new();
        if let Some(length) = prefix {
            all_bytes.push(0);
            all_bytes.extend_from_slice(&length.to_be_bytes());
        }
        all_bytes.extend_from_slice(&bytes);
        let wire = cut(&all_bytes.clone().into(), &frames);
        let (messages, ended) = runtime()
            .block_on(all(Received::<v1::WriteRequest>::request(Body::new(Frames(wire.into())))));
        // Bytes that are all taken for messages carry no more than they are.
        let carried: usize = messages.iter().map(|message| message.data.len()).sum();
        assert!(carried <= all_bytes.len());
        if let Err(status) = ended {
            assert!(matches!(status.code(), Code::Internal | Code::OutOfRange), "{status}");
        }
    }
}

#[tokio::test]
async fn large_payloads_leave_as_they_are_and_are_not_copied_when_they_arrive() {
    let payload: Bytes = vec![1; 256 << 10].into();
    let at = payload.as_ptr();
    let message = v1::ReadResponse { data: payload, ..read_response(0, 256 << 10) };
    let mut body = Box::pin(Sent::response(tokio_stream::iter([Ok(message.clone())])));
    let mut frames = VecDeque::new();
    while let Some(frame) = std::future::poll_fn(|cx| body.as_mut().poll_frame(cx)).await {
        frames.push_back(frame);
    }
    let data: Vec<_> = frames.iter().filter_map(|frame| frame.as_ref().unwrap().data_ref()).collect();
    let (last, heads) = data.split_last().unwrap();
    assert_eq!((last.as_ptr(), last.len()), (at, 256 << 10));
    assert!(heads.iter().all(|head| head.len() < 256), "they leave with the payload, in one system call");
    let mut received = Received::<v1::ReadResponse>::response(Body::new(Frames(frames)));
    let got = received.message().await.unwrap().unwrap();
    assert_eq!(got.data.as_ptr(), at);
    assert!(got == message);
    assert!(received.message().await.unwrap().is_none());
}

#[tokio::test]
async fn a_payload_is_held_until_more_is_asked_for() {
    struct Owner(Vec<u8>, #[allow(dead_code)] std::sync::Arc<()>); // held, never looked at
    impl AsRef<[u8]> for Owner {
        fn as_ref(&self) -> &[u8] {
            &self.0
        }
    }
    for length in [4_096, 100_000] {
        let held = std::sync::Arc::new(());
        let data = Bytes::from_owner(Owner(vec![5; length], held.clone()));
        let messages = [v1::ReadResponse { data, ..Default::default() }];
        let endless = tokio_stream::StreamExt::chain(tokio_stream::iter(messages), tokio_stream::pending());
        let mut body = Box::pin(Sent::request(endless));
        let mut frames = Vec::new();
        while std::sync::Arc::strong_count(&held) > 1 && frames.len() < 3 {
            let mut cx = Context::from_waker(std::task::Waker::noop());
            match body.as_mut().poll_frame(&mut cx) {
                Poll::Ready(frame) => frames.push(frame.unwrap().unwrap().into_data().unwrap().len()),
                // Small ones are copied; large ones are the connection's now.
                Poll::Pending => break,
            }
        }
        assert_eq!(std::sync::Arc::strong_count(&held), 1, "{length}");
        assert_eq!(frames.iter().sum::<usize>() / 1_000, length / 1_000);
    }
}

#[tokio::test]
async fn what_is_too_long_compressed_or_cut_off_is_refused() {
    let framed = |flag: u8, length: u32, sent: usize| {
        let bytes = [&[flag][..], &length.to_be_bytes(), &vec![0; sent]].concat();
        Frames([Ok(Frame::data(Bytes::from(bytes)))].into())
    };
    for (frames, code) in [
        (framed(0, MESSAGE_BYTES_MAX as u32 + 1, 3), Code::OutOfRange),
        (framed(0, u32::MAX, 0), Code::OutOfRange),
        (framed(1, 4, 4), Code::Internal),
        (framed(9, 4, 4), Code::Internal),
        (framed(0, 100, 99), Code::Internal),
        (Frames([Ok(Frame::data(Bytes::from_static(&[0, 0])))].into()), Code::Internal),
        (Frames([Err(Status::unavailable("broken"))].into()), Code::Unavailable),
    ] {
        let (messages, ended) = all(Received::<v1::ReadResponse>::response(Body::new(frames))).await;
        assert!(messages.is_empty());
        assert_eq!(ended.unwrap_err().code(), code);
    }
    let too_long = v1::ReadResponse { data: vec![0; MESSAGE_BYTES_MAX].into(), ..Default::default() };
    let (data, _, trailers) = drain(Sent::response(tokio_stream::iter([Ok(too_long)]))).await;
    assert!(data.is_empty());
    assert_eq!(Status::from_header_map(&trailers).unwrap().code(), Code::OutOfRange);
}

#[tokio::test]
async fn a_caller_that_goes_away_is_the_end_of_its_request_and_an_error_of_an_answer() {
    let gone = || Body::new(Frames([Err(Status::cancelled("gone"))].into()));
    assert!(all(Received::<v1::WriteRequest>::request(gone())).await.1.is_ok());
    assert!(all(Received::<v1::WriteRequest>::response(gone())).await.1.is_err());
}

#[test]
fn bytes_that_come_one_by_one_do_not_hold_more_than_a_message() {
    let message = v1::ReadResponse { data: vec![3; 20_000].into(), ..Default::default() };
    let mut wire = vec![0];
    wire.extend_from_slice(&(message.encoded_len() as u32).to_be_bytes());
    wire.extend_from_slice(&message.encode_to_vec());
    // Each byte in a buffer of its own, of a page: 80 MB, if all of them were kept.
    let frames = wire.into_iter().map(|byte| {
        let mut page = BytesMut::with_capacity(4_096);
        page.extend_from_slice(&[byte]);
        page.freeze()
    });
    let received = Received::<v1::ReadResponse>::response(Body::new(LazyFrames(frames)));
    let peak = fuzz::memory::peak_of(|| {
        let (messages, ended) = runtime().block_on(all(received));
        assert!(ended.is_ok() && messages == [message]);
    });
    assert!(peak < 1 << 20, "{peak} bytes");
}

/// Frames that are made when they are asked for.
struct LazyFrames<I>(I);

impl<I: Iterator<Item = Bytes> + Unpin> http_body::Body for LazyFrames<I> {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        Poll::Ready(self.0.next().map(|bytes| Ok(Frame::data(bytes))))
    }
}
