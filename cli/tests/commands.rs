//! The program `cairn` as people run it, against a cluster in this process.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a test may

use cluster::Cluster;
use serde_json::Value;
use std::{
    fs,
    os::unix::{ffi::OsStrExt as _, fs::PermissionsExt as _},
    path::Path,
    process::{Output, Stdio},
    time::{Duration, Instant, UNIX_EPOCH},
};
use tokio::{io::AsyncWriteExt as _, process::Command};

struct Shell {
    cluster: Cluster,
    work: tempfile::TempDir,
}

impl Shell {
    async fn start() -> Self {
        let cluster = Cluster::builder().memory(true).build_and_start().await.unwrap();
        Self { cluster, work: tempfile::tempdir().unwrap() }
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = program();
        command
            .args(words)
            .env("CAIRN_DIRECTORY", self.cluster.directory_uri())
            .current_dir(self.work.path());
        command
    }

    async fn run(&self, words: &[&str]) -> Output {
        output(&mut self.command(words)).await
    }

    /// Runs what has to succeed; answers standard output.
    async fn ok(&self, words: &[&str]) -> String {
        let output = self.run(words).await;
        assert!(output.status.success(), "cairn {words:?}: {}", stderr(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    async fn json(&self, words: &[&str]) -> Value {
        serde_json::from_str(&self.ok(words).await).unwrap()
    }

    async fn write(&self, path: &str, bytes: &[u8]) -> Output {
        let mut child = self.command(&["write", path]).stdin(Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        // It may end before it has read all, when it is declined.
        let _ = stdin.write_all(bytes).await;
        drop(stdin);
        child.wait_with_output().await.unwrap()
    }

    fn shell(&self, script: &str) -> Command {
        let mut command = Command::new("sh");
        let program = Path::new(env!("CARGO_BIN_EXE_cairn")).parent().unwrap();
        let path = format!("{}:{}", program.display(), std::env::var("PATH").unwrap());
        command.args(["-c", script]).env("PATH", path).env("CAIRN_DIRECTORY", self.cluster.directory_uri());
        command.env_remove("CAIRN_LOCK_TOKEN").current_dir(self.work.path()).kill_on_drop(true);
        command
    }
}

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cairn"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    for variable in ["CAIRN_DIRECTORY", "CAIRN_LOCK_TOKEN", "CAIRN_DATA", "CAIRN_LISTEN", "CAIRN_LOG"] {
        command.env_remove(variable);
    }
    command
}

async fn output(command: &mut Command) -> Output {
    tokio::time::timeout(Duration::from_secs(60), command.output()).await.expect("it hangs").unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[tokio::test]
async fn a_files_life() {
    let shell = Shell::start().await;
    shell.ok(&["mkdir", "-p", "/a/b c"]).await;
    shell.ok(&["mkdir", "-p", "/a/b c"]).await;
    assert_eq!(shell.run(&["mkdir", "/a"]).await.status.code(), Some(1));
    assert!(shell.write("/a/b c/ä", b"hello").await.status.success());
    assert_eq!(shell.ok(&["cat", "/a/b c/ä"]).await, "hello");
    assert_eq!(shell.ok(&["ls", "/a"]).await, "b c/\n");
    assert!(shell.ok(&["ls", "-lR", "/"]).await.contains("ä"));

    let stat = shell.json(&["stat", "--json", "/a/b c/ä"]).await;
    assert_eq!((&stat["kind"], &stat["size"]), (&"file".into(), &5.into()));
    assert_eq!(stat["copies"].as_array().unwrap().len(), 3, "{stat}");
    assert_eq!(stat["replication"], 3, "{stat}");
    let explain = shell.json(&["explain", "--json", "/a/b c/ä"]).await;
    assert_eq!(explain["chunks"].as_array().unwrap().len(), 1, "{explain}");
    let status = shell.json(&["status", "--json"]).await;
    assert_eq!(status["file_servers"].as_array().unwrap().len(), 3, "{status}");
    assert_eq!((&status["files"], &status["bytes"]), (&1.into(), &5.into()), "{status}");

    shell.ok(&["mv", "/a/b c/ä", "/a"]).await;
    assert_eq!(shell.ok(&["cat", "a/ä"]).await, "hello");
    let output = shell.run(&["rm", "/a"]).await;
    assert_eq!(output.status.code(), Some(1), "not empty");
    assert!(stderr(&output).starts_with("cairn: /a: "), "{}", stderr(&output));
    shell.ok(&["rm", "-r", "/a"]).await;
    for words in [["cat", "/a/ä"], ["stat", "/a"], ["ls", "/a"], ["rm", "/a"]] {
        let output = shell.run(&words).await;
        assert_eq!(output.status.code(), Some(3), "{words:?}: {}", stderr(&output));
    }
    shell.ok(&["rm", "-f", "/a"]).await;
    shell.cluster.shutdown().await.unwrap();
}

#[tokio::test]
async fn appended_bytes_go_to_the_end() {
    let shell = Shell::start().await;
    let script = "printf one | cairn write /f && printf two | cairn write --append /f && cairn cat /f";
    let output = output(&mut shell.shell(script)).await;
    assert_eq!(String::from_utf8_lossy(&output.stdout), "onetwo", "{}", stderr(&output));
    shell.cluster.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_lock_is_held_while_a_command_runs() {
    let shell = Shell::start().await;
    // The command itself writes under the lock; another one, which does not know the token, is declined.
    let script = "cairn lock /f -- sh -c '
        echo mine | cairn write /f || exit 91
        echo also | cairn write /other || exit 92
        echo no | env -u CAIRN_LOCK_TOKEN cairn write /f; test $? = 4 || exit 93
        cairn locks | grep -q exclusive || exit 94
        exit 7'";
    let output = output(&mut shell.shell(script)).await;
    assert_eq!(output.status.code(), Some(7), "{}", stderr(&output));
    assert_eq!(shell.ok(&["cat", "/f"]).await, "mine\n");
    assert_eq!(shell.json(&["locks", "--json"]).await, serde_json::json!([]));
    assert_eq!(shell.run(&["lock", "/f", "--", "/no/such/program"]).await.status.code(), Some(127));
    assert_eq!(shell.json(&["locks", "--json"]).await, serde_json::json!([]));
    shell.cluster.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_lost_lock_ends_its_command() {
    let shell = Shell::start().await;
    let mut holder = shell.command(&["lock", "--ttl", "1s", "/f", "--", "sleep", "600"]).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while shell.json(&["locks", "--json"]).await.as_array().unwrap().is_empty() {
        assert!(Instant::now() < deadline, "the lock never showed");
    }
    shell.ok(&["unlock", "--force", "/f"]).await;
    let ended =
        tokio::time::timeout(Duration::from_secs(20), holder.wait()).await.expect("it goes on").unwrap();
    assert_eq!(ended.code(), Some(4));
    shell.cluster.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_tree_goes_in_and_comes_out_the_same() {
    let shell = Shell::start().await;
    let source = shell.work.path().join("in");
    fs::create_dir_all(source.join("deep/er and/ähnlich")).unwrap();
    fs::create_dir(source.join("nothing")).unwrap();
    fs::write(source.join("empty"), "").unwrap();
    fs::write(source.join("deep/er and/ähnlich/naïve name"), "x".repeat(100_000)).unwrap();
    let large: Vec<u8> = (0..20_000_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    fs::write(source.join("large"), &large).unwrap();
    fs::write(source.join("script"), "#!/bin/sh").unwrap();
    fs::set_permissions(source.join("script"), fs::Permissions::from_mode(0o750)).unwrap();
    let long_ago = UNIX_EPOCH + Duration::new(1_000_000_000, 123_456_789);
    fs::File::open(source.join("script")).unwrap().set_modified(long_ago).unwrap();
    std::os::unix::fs::symlink("script", source.join("link")).unwrap();

    let output = shell.run(&["put", "-r", "in", "/tree"]).await;
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("link: skipped, since it is a symbolic link"), "{}", stderr(&output));
    shell.ok(&["get", "-r", "/tree", "out"]).await;
    fs::remove_file(source.join("link")).unwrap();
    let differ = Command::new("diff").args(["-r", "in", "out"]).current_dir(shell.work.path()).output();
    let differ = differ.await.unwrap();
    assert!(differ.status.success(), "{}", String::from_utf8_lossy(&differ.stdout));
    let script = fs::metadata(shell.work.path().join("out/script")).unwrap();
    assert_eq!(script.permissions().mode() & 0o777, 0o750);
    assert_eq!(script.modified().unwrap(), long_ago);

    // Into a directory that exists, as cp does.
    shell.ok(&["put", "-r", "in", "/tree"]).await;
    assert!(shell.ok(&["ls", "/tree"]).await.contains("in/\n"));
    shell.ok(&["get", "/tree/large", "out"]).await;
    assert_eq!(fs::read(shell.work.path().join("out/large")).unwrap(), large);
    assert_eq!(
        shell.run(&["put", "in", "/elsewhere"]).await.status.code(),
        Some(1),
        "a directory without -r"
    );
    shell.cluster.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_name_that_is_not_utf8_is_named_and_the_rest_goes_on() {
    let shell = Shell::start().await;
    let source = shell.work.path().join("in");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("good"), "good").unwrap();
    fs::write(source.join(std::ffi::OsStr::from_bytes(b"b\xffd")), "bad").unwrap();
    let output = shell.run(&["put", "-r", "in", "/tree"]).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains(r"b\xffd: the name is not UTF-8"), "{}", stderr(&output));
    assert_eq!(shell.ok(&["ls", "/tree"]).await, "good\n");
    shell.cluster.shutdown().await.unwrap();
}

#[tokio::test]
async fn nobody_reading_is_no_error() {
    let shell = Shell::start().await;
    assert!(shell.write("/large", &vec![b'x'; 3_000_000]).await.status.success());
    let script = "{ cairn cat /large; echo $? >&2; } | head -c 10";
    let output = output(&mut shell.shell(script)).await;
    assert_eq!(stderr(&output), "0\n");
    assert_eq!(output.stdout, b"xxxxxxxxxx");
    shell.cluster.shutdown().await.unwrap();
}

#[tokio::test]
async fn without_a_directory_the_message_helps() {
    let unused = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let uri = format!("http://{}", unused.local_addr().unwrap());
    drop(unused);
    let began = Instant::now();
    let output = output(program().args(["--directory", &uri, "status"])).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(began.elapsed() < Duration::from_secs(5));
    let said = stderr(&output);
    assert!(said.contains(&uri) && said.contains("cairn up"), "{said}");
}

#[tokio::test]
async fn up_runs_stops_cleanly_and_keeps_data() {
    let work = tempfile::tempdir().unwrap();
    for round in 0..2 {
        let mut up = program().args(["up", "--listen", "127.0.0.1:0"]).current_dir(&work).spawn().unwrap();
        let mut lines =
            tokio::io::AsyncBufReadExt::lines(tokio::io::BufReader::new(up.stdout.take().unwrap()));
        let began = Instant::now();
        let first = tokio::time::timeout(Duration::from_secs(20), lines.next_line()).await.expect("it hangs");
        let first = first.unwrap().expect("it says where it listens");
        println!("ready after {:?}", began.elapsed());
        let uri = first.split_whitespace().last().unwrap().to_owned();
        let client = client_lib::Client::connect(&[uri]).await.unwrap();
        if round == 0 {
            client.write("/kept", "bytes").await.unwrap();
        } else {
            assert_eq!(client.read("/kept").await.unwrap(), "bytes");
        }
        client.close().await.unwrap();
        let pid = rustix::process::Pid::from_raw(up.id().unwrap() as i32).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let ended =
            tokio::time::timeout(Duration::from_secs(20), up.wait()).await.expect("it goes on").unwrap();
        assert_eq!(ended.code(), Some(0));
    }
    let fewer = output(program().args(["up", "--file-servers", "2"]).current_dir(&work)).await;
    assert_eq!(fewer.status.code(), Some(2));
    assert!(stderr(&fewer).contains("holds the data of 3 file servers"), "{}", stderr(&fewer));
}
