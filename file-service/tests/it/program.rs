//! The program itself: real ports, a real disk, real signals.

use crate::{directory::FakeDirectory, harness::*};
use cairn_proto::net::{Connect, SystemNetwork, Traffic, accept_tcp, channel};
use cairn_proto::v1::file_service_client::FileServiceClient;
use std::{
    process::{Command, Output, Stdio},
    sync::Arc,
    time::Duration,
};
use tonic_reflection::pb::{v1, v1alpha};

const PROGRAM: &str = env!("CARGO_BIN_EXE_file-service");

fn run(arguments: &[&str]) -> Output {
    Command::new(PROGRAM).args(arguments).env_clear().output().unwrap()
}

#[test]
fn bad_flags_are_all_named_and_exit_with_64() {
    let data = tempfile::tempdir().unwrap();
    let folder = data.path().join("never-made");
    let output = run(&[
        "--data",
        folder.to_str().unwrap(),
        "--listen",
        "0.0.0.0:0",
        "--directory",
        "nowhere",
        "--metrics",
        "x",
    ]);
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(64), "{message}");
    for part in ["--listen 0.0.0.0:0", "--insecure", "'nowhere'", "--metrics 'x'"] {
        assert!(message.contains(part), "{part} is missing in: {message}");
    }
    assert!(!folder.exists(), "nothing is made before all is checked");
    assert_eq!(run(&["--no-such-flag"]).status.code(), Some(64));
    assert_eq!(run(&["--help"]).status.code(), Some(0));
}

#[test]
fn variables_are_read_and_checked() {
    let output = Command::new(PROGRAM).env_clear().env("CAIRN_DIRECTORY", "ftp://x").output().unwrap();
    assert_eq!(output.status.code(), Some(64));
    assert!(String::from_utf8(output.stderr).unwrap().contains("'ftp://x'"));
    // With the network declared to be trusted, only the missing address to advertise is left to complain of.
    let mut open = Command::new(PROGRAM);
    open.env_clear().env("CAIRN_LISTEN", "0.0.0.0:0").env("CAIRN_INSECURE", "1");
    let message = String::from_utf8(open.output().unwrap().stderr).unwrap();
    assert!(message.contains("--advertise") && !message.contains("--insecure"), "{message}");
}

/// Waits in real time.
async fn soon(what: &str, mut holds: impl FnMut() -> bool) {
    let waiting = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), waiting).await.expect(what);
}

#[tokio::test]
async fn it_registers_serves_and_drains_at_sigterm() {
    let directory = FakeDirectory::new(CLUSTER);
    let mut alone = group(1, 1);
    alone.seats.truncate(1);
    alone.scheme.as_mut().unwrap().min_copies = 1;
    directory.change(|state| state.groups = vec![alone]);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(directory.clone().serve(accept_tcp(listener)));
    let data = tempfile::tempdir().unwrap();
    let socket = data.path().join("socket");
    let start = || {
        Command::new(PROGRAM)
            .env_clear()
            .args(["--listen", "127.0.0.1:0", "--listen", &format!("unix:{}", socket.display())])
            .args(["--zone", "1", "--log", "warn", "--directory", &format!("http://127.0.0.1:1,{address}")])
            .arg("--data")
            .arg(data.path().join("data"))
            .stdin(Stdio::null())
            .spawn()
            .unwrap()
    };
    let network: Arc<dyn Connect> = Arc::new(SystemNetwork);
    for life in 0..3u32 {
        let mut program = start();
        let registers = || directory.0.lock().registers.len() == life as usize + 1;
        soon("it registers", registers).await;
        let endpoints = directory.0.lock().registers.last().unwrap().endpoints.clone();
        assert_eq!(endpoints.len(), 2);
        let id = chunk(life);
        for (number, endpoint) in endpoints.iter().enumerate() {
            let mut client = FileServiceClient::new(channel(&network, &endpoint.uri, Traffic::Bulk).unwrap());
            let mut receipts = Vec::new();
            // Registered, but perhaps not serving for another moment.
            for _ in 0..1_000 {
                match write(&mut client, messages(id, &bytes(100_000))).await {
                    Ok(written) => receipts = written,
                    Err(error) => assert!(error.reason.is_transient(), "{error}"),
                }
                if !receipts.is_empty() {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            assert_eq!(receipts[0].holder_ids, [1], "over endpoint {number}");
            for earlier in 0..=life {
                assert_eq!(read(&mut client, chunk(earlier), 0, 0).await.unwrap().1, bytes(100_000));
            }
        }
        if life == 1 {
            // Also what a killed one left behind, its socket among it, is taken over by the next.
            program.kill().unwrap();
            program.wait().unwrap();
            continue;
        }
        let pid = program.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        let ended = tokio::task::spawn_blocking(move || program.wait().unwrap());
        let status = tokio::time::timeout(Duration::from_secs(20), ended).await.unwrap().unwrap();
        assert_eq!(status.code(), Some(0));
        let has_left = directory.0.lock().heartbeats.iter().any(|beat| beat.leaving);
        assert!(has_left, "the directory was told");
    }
}

#[tokio::test(start_paused = true)]
async fn reflection_knows_all_services() {
    let cluster = Cluster::start().await;
    let mut names = Vec::new();
    let mut client = v1::server_reflection_client::ServerReflectionClient::new(cluster.channel(1));
    let request = v1::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(v1::server_reflection_request::MessageRequest::ListServices(String::new())),
    };
    let mut answers =
        client.server_reflection_info(futures::stream::iter([request])).await.unwrap().into_inner();
    if let Some(v1::server_reflection_response::MessageResponse::ListServicesResponse(list)) =
        answers.message().await.unwrap().unwrap().message_response
    {
        names.extend(list.service.into_iter().map(|service| service.name));
    }
    for wanted in ["cairn.v1.FileService", "cairn.v1.ReplicaService", "grpc.health.v1.Health"] {
        assert!(names.iter().any(|name| name == wanted), "{wanted} is missing in {names:?}");
    }
    let mut client = v1alpha::server_reflection_client::ServerReflectionClient::new(cluster.channel(1));
    let request = v1alpha::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(v1alpha::server_reflection_request::MessageRequest::FileContainingSymbol(
            "cairn.v1.FileService".into(),
        )),
    };
    let mut answers =
        client.server_reflection_info(futures::stream::iter([request])).await.unwrap().into_inner();
    let answer = answers.message().await.unwrap().unwrap().message_response.unwrap();
    let found =
        v1alpha::server_reflection_response::MessageResponse::FileDescriptorResponse(Default::default());
    assert_eq!(std::mem::discriminant(&answer), std::mem::discriminant(&found));
}

#[tokio::test(start_paused = true)]
async fn metrics_count_what_happened() {
    let cluster = Cluster::start().await;
    cluster.write_to_all(chunk(1), &bytes(5_000)).await;
    let _ = read(&mut cluster.files(1), chunk(9), 0, 0).await.unwrap_err();
    let node = cluster.node(1);
    let text = node.metrics.render(&node).unwrap();
    for line in [
        "cairn_file_chunks 1",
        "cairn_file_written_bytes_total 5000",
        "cairn_file_requests_total{method=\"cairn.v1.FileService/Write\"} 1",
        "cairn_file_errors_total{reason=\"ERROR_REASON_CHUNK_NOT_FOUND\"} 1",
    ] {
        assert!(text.lines().any(|found| found == line), "'{line}' is missing in:\n{text}");
    }
}
