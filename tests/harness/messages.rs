//! Messages of the contract without its generated code: made up from descriptors, and sent as bytes.

use bytes::{Buf, BufMut as _, Bytes};
use prost_reflect::{DescriptorPool, DynamicMessage, Kind, MessageDescriptor, MethodDescriptor, Value};
use rand::{Rng as _, RngCore as _, rngs::SmallRng, seq::IndexedRandom as _};
use std::time::Duration;
use tonic::{
    Status,
    client::Grpc,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    transport::Channel,
};

/// The descriptors of `cairn.v1`.
///
/// # Panics
/// When the contract's own descriptors are broken.
pub fn pool() -> DescriptorPool {
    DescriptorPool::decode(cairn_proto::FILE_DESCRIPTOR_SET).unwrap()
}

/// All calls of all services.
pub fn methods() -> Vec<MethodDescriptor> {
    pool().services().flat_map(|service| service.methods().collect::<Vec<_>>()).collect()
}

/// A message with values that are often ordinary and sometimes at their bounds.
pub fn made_up(descriptor: &MessageDescriptor, random: &mut SmallRng, depth: u32) -> DynamicMessage {
    made_up_at(descriptor, random, depth, "http://127.0.0.1:1")
}

/// The same, with an address that leads somewhere.
pub fn made_up_at(
    descriptor: &MessageDescriptor,
    random: &mut SmallRng,
    depth: u32,
    uri: &str,
) -> DynamicMessage {
    let mut message = DynamicMessage::new(descriptor.clone());
    for field in descriptor.fields() {
        if random.random_range(0..4) == 0 || field.is_map() {
            continue;
        }
        let value = if field.is_list() {
            let count = *[0, 1, 2, 5].choose(random).unwrap_or(&1);
            Value::List(
                (0..count).filter_map(|_| value(&field.kind(), field.name(), random, depth, uri)).collect(),
            )
        } else {
            let Some(value) = value(&field.kind(), field.name(), random, depth, uri) else { continue };
            value
        };
        message.set_field(&field, value);
    }
    message
}

fn value(kind: &Kind, name: &str, random: &mut SmallRng, depth: u32, uri: &str) -> Option<Value> {
    let number = match random.random_range(0..8) {
        0 => 0,
        1 => u64::MAX,
        2 => u64::from(u32::MAX),
        3 => random.random(),
        4 => 1 << random.random_range(0..63),
        _ => random.random_range(0..20),
    };
    Some(match kind {
        Kind::Double => Value::F64(f64::from_bits(number)),
        Kind::Float => Value::F32(number as f32),
        Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => Value::I32(number as i32),
        Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => Value::I64(number as i64),
        Kind::Uint32 | Kind::Fixed32 => Value::U32(number as u32),
        Kind::Uint64 | Kind::Fixed64 => Value::U64(number),
        Kind::Bool => Value::Bool(number & 1 == 1),
        Kind::String if name == "uri" => Value::String(uri.to_owned()),
        Kind::String => Value::String(text(name, random)),
        Kind::Bytes => {
            let mut bytes = vec![0; random.random_range(0..200)];
            random.fill_bytes(&mut bytes);
            Value::Bytes(bytes.into())
        }
        Kind::Enum(descriptor) => {
            let known: Vec<i32> = descriptor.values().map(|value| value.number()).collect();
            Value::EnumNumber(if number == 0 { 99 } else { *known.choose(random)? })
        }
        Kind::Message(descriptor) if depth > 0 => {
            Value::Message(made_up_at(descriptor, random, depth - 1, uri))
        }
        Kind::Message(_) => return None,
    })
}

fn text(name: &str, random: &mut SmallRng) -> String {
    let usual = [
        "/",
        "/a",
        "/a/b",
        "/new file",
        "relative",
        "/../x",
        "",
        "a-1-2-3",
        "http://127.0.0.1:1",
        "\u{0}",
        "🦀",
    ];
    match random.random_range(0..6) {
        0 => "x".repeat(random.random_range(0..5_000)),
        1 => format!("/{}", random.random_range(0..20)),
        2 if !name.contains("path") => random.random::<u64>().to_string(),
        _ => (*usual.choose(random).unwrap_or(&"/")).to_owned(),
    }
}

/// Sends these bytes as the messages of a call, whatever they are. Answers how many messages came back and how the
/// call ended; an answer that does not end is left.
///
/// # Errors
/// The status that the call ended with.
pub async fn send(
    channel: &Channel,
    method: &MethodDescriptor,
    messages: Vec<Bytes>,
    limit: Duration,
) -> Result<usize, Status> {
    let path = format!("/{}/{}", method.parent_service().full_name(), method.name());
    let path = path.parse().map_err(|_| Status::internal("a path"))?;
    let mut grpc = Grpc::new(channel.clone());
    let call = async {
        grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
        let messages = tokio_stream::iter(messages);
        let mut answers = grpc.streaming(tonic::Request::new(messages), path, BytesCodec).await?.into_inner();
        let mut count = 0;
        while count < 4 && answers.message().await?.is_some() {
            count += 1;
        }
        Ok(count)
    };
    tokio::time::timeout(limit, call).await.unwrap_or(Ok(0))
}

/// Bytes as messages.
#[derive(Clone, Copy, Debug)]
pub struct BytesCodec;

impl Codec for BytesCodec {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        *self
    }

    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for BytesCodec {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, target: &mut EncodeBuf<'_>) -> Result<(), Status> {
        target.put(item);
        Ok(())
    }
}

impl Decoder for BytesCodec {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, source: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(source.copy_to_bytes(source.remaining())))
    }
}
