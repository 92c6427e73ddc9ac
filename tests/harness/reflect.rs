//! A gRPC client that knows nothing but what reflection tells it, as grpcurl is: requests and answers are JSON.

use anyhow::{Context, Result, anyhow, bail};
use bytes::{Buf, BufMut};
use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor, MethodDescriptor, SerializeOptions};
use serde_json::Value;
use std::collections::{BTreeMap, VecDeque};
use tokio_stream::StreamExt;
use tonic::{
    Status,
    client::Grpc,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    transport::Channel,
};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

/// A client without a proto file.
pub struct GenericClient {
    channel: Channel,
    pool: DescriptorPool,
}

/// How a call failed: before it was made, or with a status.
#[derive(Debug)]
pub enum CallError {
    /// The method or the request's JSON does not fit what reflection says.
    Local(anyhow::Error),
    /// The server's answer.
    Status(Status),
}

impl GenericClient {
    /// Connects and asks the server for the descriptors of all its services.
    pub async fn connect(uri: &str) -> Result<Self> {
        let channel = Channel::from_shared(uri.to_owned())?.connect().await?;
        let services = list_services(&channel).await?;
        let mut files = BTreeMap::new();
        for service in services {
            fetch(&channel, MessageRequest::FileContainingSymbol(service), &mut files).await?;
        }
        // Imports that came along with no service.
        let mut missing: VecDeque<String> = files
            .values()
            .flat_map(|file: &prost_types::FileDescriptorProto| file.dependency.clone())
            .collect();
        while let Some(name) = missing.pop_front() {
            if !files.contains_key(&name) {
                fetch(&channel, MessageRequest::FileByFilename(name.clone()), &mut files).await?;
                let file = files.get(&name).with_context(|| format!("reflection does not know {name}"))?;
                missing.extend(file.dependency.clone());
            }
        }
        let mut pool = DescriptorPool::new();
        pool.add_file_descriptor_protos(files.into_values())?;
        Ok(Self { channel, pool })
    }

    /// The services that reflection names.
    pub fn services(&self) -> Vec<String> {
        self.pool.services().map(|service| service.full_name().to_owned()).collect()
    }

    /// Calls `package.Service/Method` with one JSON request, and answers all messages of the response.
    pub async fn call(&self, method: &str, request: Value) -> Result<Vec<Value>, CallError> {
        let (descriptor, message) = self.prepare(method, &request).map_err(CallError::Local)?;
        let path = format!("/{}/{}", descriptor.parent_service().full_name(), descriptor.name());
        let path: tonic::codegen::http::uri::PathAndQuery =
            path.parse().map_err(|error| CallError::Local(anyhow!("{path}: {error}")))?;
        let mut grpc = Grpc::new(self.channel.clone());
        grpc.ready().await.map_err(|error| CallError::Status(Status::unavailable(error.to_string())))?;
        let codec = DynamicCodec { output: descriptor.output() };
        let response = grpc
            .streaming(tonic::Request::new(tokio_stream::once(message)), path, codec)
            .await
            .map_err(CallError::Status)?;
        let mut messages = response.into_inner();
        let mut answers = Vec::new();
        while let Some(answer) = messages.next().await {
            answers.push(to_json(&answer.map_err(CallError::Status)?).map_err(CallError::Local)?);
        }
        Ok(answers)
    }

    /// The same for a method with one answer.
    pub async fn unary(&self, method: &str, request: Value) -> Result<Value, CallError> {
        let mut answers = self.call(method, request).await?;
        match (answers.pop(), answers.is_empty()) {
            (Some(answer), true) => Ok(answer),
            _ => Err(CallError::Local(anyhow!("{method} did not answer exactly one message"))),
        }
    }

    fn prepare(&self, method: &str, request: &Value) -> Result<(MethodDescriptor, DynamicMessage)> {
        let Some((service, name)) = method.split_once('/') else { bail!("{method} is not service/method") };
        let service =
            self.pool.get_service_by_name(service).with_context(|| format!("no service {service}"))?;
        let descriptor = service
            .methods()
            .find(|known| known.name() == name)
            .with_context(|| format!("no method {method}"))?;
        let message = DynamicMessage::deserialize(descriptor.input(), request)
            .with_context(|| format!("the request does not fit {}", descriptor.input().full_name()))?;
        Ok((descriptor, message))
    }
}

fn to_json(message: &DynamicMessage) -> Result<Value> {
    let options = SerializeOptions::new().use_proto_field_name(true).skip_default_fields(true);
    Ok(message.serialize_with_options(serde_json::value::Serializer, &options)?)
}

async fn ask(channel: &Channel, request: MessageRequest) -> Result<MessageResponse> {
    let request = ServerReflectionRequest { host: String::new(), message_request: Some(request) };
    let mut answers = ServerReflectionClient::new(channel.clone())
        .server_reflection_info(tokio_stream::once(request))
        .await?
        .into_inner();
    let answer = answers.next().await.context("reflection did not answer")??;
    answer.message_response.context("reflection answered nothing")
}

async fn list_services(channel: &Channel) -> Result<Vec<String>> {
    match ask(channel, MessageRequest::ListServices(String::new())).await? {
        MessageResponse::ListServicesResponse(list) => {
            Ok(list.service.into_iter().map(|service| service.name).collect())
        }
        other => bail!("reflection does not list services: {other:?}"),
    }
}

async fn fetch(
    channel: &Channel,
    request: MessageRequest,
    files: &mut BTreeMap<String, prost_types::FileDescriptorProto>,
) -> Result<()> {
    match ask(channel, request).await? {
        MessageResponse::FileDescriptorResponse(response) => {
            for bytes in response.file_descriptor_proto {
                let file = prost_types::FileDescriptorProto::decode(bytes.as_slice())?;
                files.insert(file.name().to_owned(), file);
            }
            Ok(())
        }
        other => bail!("reflection does not describe this: {other:?}"),
    }
}

struct DynamicCodec {
    output: MessageDescriptor,
}

impl Codec for DynamicCodec {
    type Encode = DynamicMessage;
    type Decode = DynamicMessage;
    type Encoder = DynamicEncoder;
    type Decoder = DynamicDecoder;

    fn encoder(&mut self) -> Self::Encoder {
        DynamicEncoder
    }

    fn decoder(&mut self) -> Self::Decoder {
        DynamicDecoder(self.output.clone())
    }
}

struct DynamicEncoder;

impl Encoder for DynamicEncoder {
    type Item = DynamicMessage;
    type Error = Status;

    fn encode(&mut self, item: Self::Item, target: &mut EncodeBuf<'_>) -> Result<(), Status> {
        target.put_slice(&item.encode_to_vec());
        Ok(())
    }
}

struct DynamicDecoder(MessageDescriptor);

impl Decoder for DynamicDecoder {
    type Item = DynamicMessage;
    type Error = Status;

    fn decode(&mut self, source: &mut DecodeBuf<'_>) -> Result<Option<Self::Item>, Status> {
        let bytes = source.copy_to_bytes(source.remaining());
        DynamicMessage::decode(self.0.clone(), bytes)
            .map(Some)
            .map_err(|error| Status::internal(format!("an answer could not be decoded: {error}")))
    }
}
