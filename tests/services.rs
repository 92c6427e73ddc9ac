//! `dir-service` and `file-service` as operators meet them: flags and variables, signals, starts in any order, several
//! endpoints, reflection and health.

use cairn_tests::{
    processes::{Process, free_ports, program},
    reflect::GenericClient,
    services::{Cairn, Services, status},
};
use client_lib::Client;
use rand::{SeedableRng as _, rngs::StdRng, seq::SliceRandom as _};
use serde_json::json;
use std::{
    io::Read as _,
    net::{TcpListener, TcpStream},
    os::unix::process::ExitStatusExt as _,
    path::Path,
    time::{Duration, Instant},
};
use tonic_reflection::pb::v1alpha::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

const BOTH: [&str; 2] = ["dir-service", "file-service"];

/// Runs a service that is to end by itself; answers its status and what it said.
async fn ended(binary: &str, words: &[&str], variables: &[(&str, &str)], folder: &Path) -> (i32, String) {
    let name = format!("{binary}-{}", rand::random::<u32>());
    let mut process = Process::new(&name, program(binary), words, folder);
    for (variable, value) in variables {
        process = process.variable(variable, value);
    }
    process.start();
    let status = process.ended().await;
    let status = status.code().unwrap_or_else(|| -status.signal().unwrap_or(0));
    (status, process.output())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_bad_value_is_reported_at_once_and_nothing_is_started() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let data = data.to_str().unwrap();
    for binary in BOTH {
        let words = [
            "--listen",
            "nonsense",
            "--advertise",
            "ftp://a:1",
            "--metrics",
            "9500",
            "--log",
            "a=b=c",
            "--data",
            data,
        ];
        let (status, said) = ended(binary, &words, &[], folder.path()).await;
        assert_eq!(status, 64, "{binary}: {said}");
        for bad in ["nonsense", "ftp://a:1", "9500", "a=b=c"] {
            assert!(said.contains(bad), "{binary}: {bad} is missing in: {said}");
        }
        for flag in ["--listen", "--advertise", "--metrics", "--log"] {
            assert!(said.contains(flag), "{binary}: {flag} is not named in: {said}");
        }
        // The same from the environment.
        let variables =
            [("CAIRN_LISTEN", "nonsense"), ("CAIRN_ADVERTISE", "ftp://a:1"), ("CAIRN_DATA", data)];
        let (status, said) = ended(binary, &[], &variables, folder.path()).await;
        assert_eq!(status, 64, "{binary}: {said}");
        assert!(said.contains("nonsense") && said.contains("ftp://a:1"), "{binary}: {said}");

        let (status, said) = ended(binary, &["--no-such-flag"], &[], folder.path()).await;
        assert_eq!(status, 64, "{binary}: {said}");
        assert!(said.contains("--no-such-flag"), "{binary}: {said}");
        assert!(!Path::new(data).exists(), "{binary} made its folder although it never started");
        for words in ["--help", "--version"] {
            assert_eq!(ended(binary, &[words], &[], folder.path()).await.0, 0, "{binary} {words}");
        }
    }
    let words = ["--directory", "nowhere,https://b:2", "--data", data];
    let (status, said) = ended("file-service", &words, &[], folder.path()).await;
    assert_eq!(status, 64, "{said}");
    assert!(said.contains("nowhere") && said.contains("https://b:2"), "{said}");
    let words = ["--replication", "99", "--min-copies", "77", "--data", data];
    let (status, said) = ended("dir-service", &words, &[], folder.path()).await;
    assert_eq!(status, 64, "{said}");
    assert!(said.contains("99") && said.contains("77"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn other_machines_are_let_in_only_when_that_was_meant() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let data = data.to_str().unwrap();
    for binary in BOTH {
        for open in ["0.0.0.0:0", "[::]:0", "192.0.2.1:7400"] {
            let (status, said) = ended(binary, &["--listen", open, "--data", data], &[], folder.path()).await;
            assert_eq!(status, 64, "{binary} {open}: {said}");
            assert!(said.contains("--insecure") && said.contains(open), "{binary}: {said}");
        }
        let port = free_ports(1)[0];
        let (listen, advertise) = (format!("0.0.0.0:{port}"), format!("http://127.0.0.1:{port}"));
        let own = folder.path().join(format!("{binary}-open"));
        let words = ["--listen", &listen, "--advertise", &advertise, "--data", own.to_str().unwrap()];
        let mut process = Process::new(&format!("{binary}-open"), program(binary), &words, folder.path())
            .variable("CAIRN_INSECURE", "1")
            .variable("CAIRN_METRICS", "")
            .variable("CAIRN_DIRECTORY", "http://127.0.0.1:1");
        process.start();
        listens(&mut process, port).await;
        assert_eq!(process.terminate().await.code(), Some(0), "{}", process.output());
    }
}

async fn listens(process: &mut Process, port: u16) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        process.assert_running();
        assert!(Instant::now() < deadline, "{} does not listen on {port}", process.name);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_in_use_is_refused_with_its_name() {
    let mut services = Services::start(1).await;
    let folder = services.folder().to_owned();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    for binary in BOTH {
        let data = folder.join("unused");
        let words = ["--listen", &taken, "--data", data.to_str().unwrap()];
        let (status, said) = ended(binary, &words, &[], &folder).await;
        assert_eq!(status, 1, "{binary}: {said}");
        assert!(said.contains(&taken), "{binary}: {said}");
    }
    // Two processes on one folder would destroy it.
    for (binary, name) in [("dir-service", "directory"), ("file-service", "file-1")] {
        let data = services.data(name);
        let words = ["--listen", "127.0.0.1:0", "--data", data.to_str().unwrap()];
        let (status, said) = ended(binary, &words, &[], &folder).await;
        assert_eq!(status, 1, "{binary}: {said}");
        assert!(said.contains(data.to_str().unwrap()), "{binary}: {said}");
    }
    services.ready().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn variables_do_what_flags_do_and_flags_win() {
    let folder = tempfile::tempdir().unwrap();
    let ports = free_ports(3);
    let address = |index: usize| format!("127.0.0.1:{}", ports[index]);
    let uri = |index: usize| format!("http://{}", address(index));
    let data = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let mut directory = Process::new("directory", program("dir-service"), &[], folder.path())
        .variable("CAIRN_LISTEN", &address(0))
        .variable("CAIRN_DATA", &data("directory"));
    let words = ["--listen", &address(1), "--zone", "north"];
    let mut file = Process::new("file", program("file-service"), &words, folder.path())
        .variable("CAIRN_LISTEN", &address(2))
        .variable("CAIRN_ZONE", "south")
        .variable("CAIRN_DATA", &data("file"))
        .variable("CAIRN_DIRECTORY", &uri(0));
    directory.start();
    file.start();
    let deadline = Instant::now() + Duration::from_secs(60);
    let server = loop {
        if let Ok(status) = status(&uri(0)).await
            && let [server] = &status.file_servers[..]
        {
            break server.server.clone().unwrap();
        }
        assert!(Instant::now() < deadline, "it has not registered");
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    assert_eq!(server.zone, "north");
    assert_eq!(server.endpoints[0].uri, uri(1));
    assert!(TcpStream::connect(address(2)).is_err(), "the variable is overruled");
    assert!(Path::new(&data("directory")).is_dir() && Path::new(&data("file")).is_dir());
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_ends_each_service_with_0_and_its_data_safe() {
    let mut services = Services::start(3).await;
    let client = Client::connect(&[services.directory_uri()]).await.unwrap();
    // Clients stay connected, and one goes on writing: that keeps nobody from ending.
    let writing = client.clone();
    let writer = tokio::spawn(async move {
        let mut written = 0_u64;
        loop {
            writing.write(&format!("/file-{written}"), format!("content {written}")).await.unwrap();
            written += 1;
            if written >= 60 && written.is_multiple_of(20) {
                writing.write("/enough", written.to_string()).await.unwrap();
            }
        }
    });
    let waiting = Instant::now();
    while !client.exists("/enough").await.unwrap() {
        assert!(!writer.is_finished() && waiting.elapsed() < Duration::from_secs(60), "nothing is written");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    for i in 0..3 {
        let began = Instant::now();
        let ended = services.files[i].terminate().await;
        println!("file-{} ended after {:?}", i + 1, began.elapsed());
        assert_eq!(ended.code(), Some(0), "{}", services.files[i].output());
        services.start_all();
        services.healthy(Duration::from_secs(120)).await;
    }
    assert!(!writer.is_finished(), "the end of a file server reached the application");
    let began = Instant::now();
    assert_eq!(services.directory.terminate().await.code(), Some(0), "{}", services.directory.output());
    println!("directory ended after {:?}", began.elapsed());
    services.start_all();
    services.ready().await;
    writer.abort();
    assert!(writer.await.unwrap_err().is_cancelled(), "the end of the directory reached the application");

    let written: u64 =
        String::from_utf8(client.read("/enough").await.unwrap().to_vec()).unwrap().parse().unwrap();
    // All at once this time.
    for process in services.all() {
        assert_eq!(process.terminate().await.code(), Some(0), "{}", process.output());
    }
    services.start_all();
    services.ready().await;
    for process in services.all() {
        let log = process.output();
        assert!(log.contains("INFO") && !log.contains('\u{1b}'), "no colours in a file: {log}");
    }
    for number in 0..written {
        let bytes = client.read(&format!("/file-{number}")).await.unwrap();
        assert_eq!(bytes, format!("content {number}"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_takes_unix_sockets_away() {
    let folder = tempfile::tempdir().unwrap();
    for binary in BOTH {
        let (socket, data) = (folder.path().join(format!("{binary}.sock")), folder.path().join(binary));
        let listen = format!("unix:{}", socket.display());
        let words = ["--listen", &listen, "--data", data.to_str().unwrap()];
        let mut process = Process::new(binary, program(binary), &words, folder.path())
            .variable("CAIRN_DIRECTORY", "http://127.0.0.1:1");
        process.start();
        let deadline = Instant::now() + Duration::from_secs(60);
        while std::os::unix::net::UnixStream::connect(&socket).is_err() {
            process.assert_running();
            assert!(Instant::now() < deadline, "{binary} does not listen on its socket");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(process.terminate().await.code(), Some(0), "{}", process.output());
        assert!(!socket.exists(), "{binary} left its socket behind");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_waits_for_servers_says_so_and_no_longer_than_asked() {
    let mut services = Services::start(2).await;
    services.cairn().feed(&["write", "/there"], b"x").await.good();
    for file in &mut services.files {
        file.kill9();
    }
    for words in [&["--timeout", "3s", "cat", "/there"][..], &["--timeout", "3s", "write", "/new"]] {
        let ran = services.cairn().feed(words, b"new").await.failed(1, &["cairn: waiting: "]);
        assert!(ran.took < Duration::from_secs(20), "{words:?}: {:?}", ran.took);
        let last = ran.err.lines().last().unwrap();
        assert!(last.starts_with(&format!("cairn: {}: ", words[3])), "{}", ran.err);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn services_start_in_any_order() {
    let seed = rand::random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let mut services = Services::prepare(3, &[]);
    // The directory last, first at its very first start.
    let mut order: Vec<usize> = vec![1, 2, 3, 0];
    let mut client: Option<Client> = None;
    for round in 0..4 {
        for index in &order {
            let process = services.all().nth(*index).unwrap();
            process.start();
            // Long enough to have tried, and failed, to reach the others.
            tokio::time::sleep(Duration::from_millis(600)).await;
            process.assert_running();
        }
        services.ready().await;
        let client = client
            .get_or_insert_with(|| Client::builder().directory(services.directory_uri()).build().unwrap());
        client.write(&format!("/round-{round}"), format!("{order:?}")).await.unwrap();
        for earlier in 0..=round {
            client.read(&format!("/round-{earlier}")).await.unwrap();
        }
        services.kill_all();
        order.shuffle(&mut random);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn services_survive_each_others_restart_in_any_order() {
    let seed = rand::random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let mut services = Services::start(3).await;
    let client = Client::connect(&[services.directory_uri()]).await.unwrap();
    client.mkdir("/kept").await.unwrap();
    for round in 0..2 {
        let mut order: Vec<usize> = (0..4).collect();
        order.shuffle(&mut random);
        for index in order {
            let process = services.all().nth(index).unwrap();
            let path = format!("/kept/{round}-{}", process.name);
            if round == 0 {
                assert_eq!(process.terminate().await.code(), Some(0));
            } else {
                process.kill9();
            }
            process.start();
            client.write(&path, path.clone()).await.unwrap();
            services.ready().await;
            assert_eq!(client.read(&path).await.unwrap(), path);
        }
    }
    assert_eq!(services.healthy(Duration::from_secs(120)).await.files, 8);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_has_several_endpoints_and_clients_use_what_they_can_reach() {
    let folder = tempfile::tempdir().unwrap();
    let ports = free_ports(4);
    let socket = |name: &str| format!("unix:{}", folder.path().join(format!("{name}.socket")).display());
    let data = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let tcp = |index: usize| format!("http://127.0.0.1:{}", ports[index]);
    let listen = |index: usize| format!("127.0.0.1:{}", ports[index]);

    let words = ["--listen", &listen(0), "--listen", &socket("directory"), "--data", &data("directory")];
    let mut directory = Process::new("directory", program("dir-service"), &words, folder.path());
    directory.start();
    // Each is reached in another way; the first address of the last two leads nowhere, as a name of a private network
    // does for one outside of it.
    let nobody = "http://127.0.0.1:1";
    let advertised =
        [vec![socket("file-1")], vec![nobody.to_owned(), tcp(2)], vec![nobody.to_owned(), socket("file-3")]];
    let mut files = Vec::new();
    for (number, addresses) in (1..).zip(&advertised) {
        let name = format!("file-{number}");
        let (listen, data, found) = (listen(number), data(&name), socket(&name));
        let directories = format!("{nobody},{}", socket("directory"));
        let mut words =
            vec!["--listen", &listen, "--listen", &found, "--data", &data, "--directory", &directories];
        for address in addresses {
            words.extend(["--advertise", address]);
        }
        let mut file = Process::new(&name, program("file-service"), &words, folder.path());
        file.start();
        files.push(file);
    }
    for uri in [tcp(0), socket("directory"), format!("{nobody},{}", socket("directory"))] {
        let cairn = Cairn::new(&uri, folder.path());
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let ran = cairn.run(&["status", "--json"]).await;
            if ran.status == 0 {
                let status = ran.json();
                let servers = status["file_servers"].as_array().unwrap().clone();
                if servers.len() == 3 && servers.iter().all(|server| server["state"] == "live") {
                    break;
                }
            }
            assert!(Instant::now() < deadline, "{uri}: {}{}", ran.err, ran.text());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let bytes = vec![b'z'; 3_000_000];
        cairn.feed(&["write", "/file"], &bytes).await.good();
        assert!(cairn.run(&["cat", "/file"]).await.good().out == bytes);
        // All three have it: servers reach each other at what they advertise, too.
        let stat = cairn.json(&["stat", "--json", "/file"]).await;
        assert_eq!(stat["copies"].as_array().unwrap().len(), 3, "{stat}");
    }
    // The socket that a killed server left behind is no obstacle.
    directory.kill9();
    directory.start();
    let cairn = Cairn::new(&socket("directory"), folder.path());
    let deadline = Instant::now() + Duration::from_secs(60);
    while cairn.run(&["cat", "/file"]).await.status != 0 {
        directory.assert_running();
        assert!(Instant::now() < deadline, "not reached after a restart");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_server_answers_reflection_and_health() {
    let services = Services::start(1).await;
    let wanted: [(&str, &[&str]); 2] = [
        (services.directory_uri(), &["DirectoryService", "SessionService", "ClusterService"]),
        (services.file_uri(0), &["FileService", "ReplicaService"]),
    ];
    for (uri, names) in wanted {
        let client = GenericClient::connect(uri).await.unwrap();
        for name in names {
            assert!(client.services().contains(&format!("cairn.v1.{name}")), "{uri}: {name}");
        }
        let answer = client.unary("grpc.health.v1.Health/Check", json!({})).await.unwrap();
        assert_eq!(answer["status"], "SERVING", "{uri}");
        for name in names {
            let service = json!({ "service": format!("cairn.v1.{name}") });
            let answer = client.unary("grpc.health.v1.Health/Check", service).await.unwrap();
            assert_eq!(answer["status"], "SERVING", "{uri} {name}");
        }
        // The version of reflection that older tools speak.
        let channel =
            tonic::transport::Channel::from_shared(uri.to_owned()).unwrap().connect().await.unwrap();
        let request = ServerReflectionRequest {
            host: String::new(),
            message_request: Some(MessageRequest::ListServices(String::new())),
        };
        let mut answers = ServerReflectionClient::new(channel)
            .server_reflection_info(tokio_stream::iter([request]))
            .await
            .unwrap()
            .into_inner();
        let Some(MessageResponse::ListServicesResponse(list)) =
            answers.message().await.unwrap().unwrap().message_response
        else {
            panic!("no list of services")
        };
        assert!(list.service.iter().any(|service| service.name == format!("cairn.v1.{}", names[0])));
        services.cairn().run(&["health", uri]).await.good();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_are_served_where_asked() {
    let folder = tempfile::tempdir().unwrap();
    for binary in BOTH {
        let ports = free_ports(2);
        let (listen, metrics) = (format!("127.0.0.1:{}", ports[0]), format!("127.0.0.1:{}", ports[1]));
        let data = folder.path().join(binary);
        let words = ["--listen", &listen, "--metrics", &metrics, "--data", data.to_str().unwrap()];
        let mut process = Process::new(binary, program(binary), &words, folder.path());
        process.start();
        listens(&mut process, ports[1]).await;
        let answer = tokio::task::spawn_blocking(move || {
            let mut stream = TcpStream::connect(metrics).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            std::io::Write::write_all(&mut stream, b"GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n")
                .unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            answer
        })
        .await
        .unwrap();
        assert!(answer.starts_with("HTTP/1.0 200") || answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert!(answer.contains("# TYPE cairn_"), "{binary}: {answer}");
    }
}
