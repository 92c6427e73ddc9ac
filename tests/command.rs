//! The `cairn` command as people and scripts meet it: real process, real exit statuses, real messages.

use cairn_tests::{
    processes::program,
    services::{Cairn, Up},
    trees,
};
use serde_json::Value;
use std::{
    fs,
    os::unix::{ffi::OsStrExt as _, fs::PermissionsExt as _},
    path::Path,
    time::{Duration, Instant},
};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};

/// Promised: ready in under two seconds. A debug build on a busy machine may need more.
const READY_LIMIT: Duration = Duration::from_secs(if cfg!(debug_assertions) { 10 } else { 2 });

fn has_fields(value: &Value, fields: &str) {
    for field in fields.split_whitespace() {
        assert!(value.get(field).is_some(), "'{field}' is missing in {value}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn up_says_what_listens_where_and_commands_that_work_and_keeps_its_data() {
    let mut up = Up::prepare();
    let took = up.start().await;
    println!("cairn up: ready after {took:?}");
    assert!(took < READY_LIMIT, "{took:?}");
    let said = up.process.output();
    assert!(said.contains(up.directory_uri()), "{said}");
    let port: u16 = up.directory_uri().rsplit_once(':').unwrap().1.parse().unwrap();
    for above in 100..103 {
        assert!(said.contains(&format!("http://127.0.0.1:{}", port + above)), "{said}");
    }

    // The three commands, exactly as printed, in a shell that finds `cairn`.
    let commands: Vec<&str> = said.lines().filter(|line| line.starts_with("  ")).map(str::trim).collect();
    assert_eq!(commands.len(), 3, "{said}");
    let path = format!("{}:{}", program("cairn").parent().unwrap().display(), std::env::var("PATH").unwrap());
    let mut outputs = Vec::new();
    for command in commands {
        let ran = tokio::process::Command::new("sh")
            .args(["-c", command])
            .env("PATH", &path)
            .env_remove("CAIRN_DIRECTORY")
            .output()
            .await
            .unwrap();
        assert!(ran.status.success(), "{command}: {}", String::from_utf8_lossy(&ran.stderr));
        outputs.push(String::from_utf8(ran.stdout).unwrap());
    }
    assert_eq!(outputs[1], "hello\n");
    assert!(outputs[2].contains("serving"), "{}", outputs[2]);

    assert_eq!(up.process.interrupt().await.code(), Some(0), "Ctrl-C stops cleanly");
    up.start().await;
    assert_eq!(up.cairn().run(&["cat", "/hello"]).await.good().text(), "hello\n");
    up.process.kill9();
    up.start().await;
    assert_eq!(up.cairn().run(&["cat", "/hello"]).await.good().text(), "hello\n");
    assert_eq!(up.process.terminate().await.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn up_refuses_what_makes_no_sense() {
    let folder = tempfile::tempdir().unwrap();
    let cairn = Cairn::new("http://127.0.0.1:1", folder.path());
    cairn.run(&["up", "--listen", "0.0.0.0:0"]).await.failed(2, &["cairn: ", "--insecure"]);
    cairn.run(&["up", "--file-servers", "0"]).await.failed(2, &["at least one"]);
    cairn.run(&["up", "--listen", "here"]).await.failed(2, &["here"]);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "nothing was made");

    // Two on one folder would destroy it.
    let up = Up::started().await;
    let data = up.folder().join("data");
    let second = up.cairn().run(&["up", "--listen", "127.0.0.1:0", "--data", data.to_str().unwrap()]).await;
    assert_eq!(second.status, 1, "{}{}", second.err, second.text());
    up.cairn().feed(&["write", "/still"], b"here").await.good();
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_usage_is_status_2_and_names_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let cairn = Cairn::new("http://127.0.0.1:1", folder.path());
    for (words, said) in [
        (vec![], "Usage"),
        (vec!["frobnicate"], "frobnicate"),
        (vec!["cat"], "PATH"),
        (vec!["put", "one"], "DST"),
        (vec!["get", "one"], "DST"),
        (vec!["ls", "--colour"], "--colour"),
        (vec!["mv", "/one"], "DST"),
        (vec!["stat"], "PATH"),
        (vec!["mkdir"], "PATH"),
        (vec!["rm"], "PATH"),
        (vec!["write"], "PATH"),
        (vec!["explain"], "PATH"),
        (vec!["lock", "/a"], "CMD"),
        (vec!["lock", "/a", "--ttl", "soon", "--", "true"], "soon"),
        (vec!["unlock", "/a"], "--force"),
        (vec!["rm", "--token", "seven", "/a"], "seven"),
    ] {
        cairn.run(&words).await.failed(2, &[said]);
    }
    let version = cairn.run(&["--version"]).await.good().text();
    assert!(version.starts_with("cairn "), "{version}");
    let help = cairn.run(&["--help"]).await.good().text();
    for command in
        "up put get cat write ls stat mkdir mv rm lock locks unlock status explain".split_whitespace()
    {
        assert!(help.contains(&format!("  {command} ")), "{command} is not in the help");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_does_not_answer_is_said_soon() {
    let folder = tempfile::tempdir().unwrap();
    let cairn = Cairn::new("http://127.0.0.1:1", folder.path());
    for command in ["ls", "status", "locks"] {
        let ran = cairn.run(&["--timeout", "2s", command]).await;
        assert!(ran.took < Duration::from_secs(10), "{command} took {:?}", ran.took);
        ran.failed(1, &["cairn: ", "http://127.0.0.1:1", "cairn up"]);
    }
    cairn.run(&["--timeout", "2s", "health", "http://127.0.0.1:1"]).await.failed(1, &["http://127.0.0.1:1"]);
    cairn.run(&["--directory", "nonsense", "ls"]).await.failed(2, &["nonsense"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn files_are_written_read_listed_moved_and_removed() {
    let up = Up::started().await;
    let cairn = up.cairn();

    cairn.feed(&["write", "/a"], b"one\n").await.good();
    cairn.feed(&["write", "--append", "/a"], b"two\n").await.good();
    assert_eq!(cairn.run(&["cat", "/a"]).await.good().text(), "one\ntwo\n");
    // The slash in front may be left out, and no bytes are bytes too.
    cairn.feed(&["write", "empty"], b"").await.good();
    assert_eq!(cairn.run(&["cat", "empty", "/a", "/a"]).await.good().text(), "one\ntwo\none\ntwo\n");
    let binary: Vec<u8> = (0..3_000_000_u32).map(|at| (at * 7 / 3) as u8).collect();
    cairn.feed(&["write", "/binary"], &binary).await.good();
    assert!(cairn.run(&["cat", "/binary"]).await.good().out == binary);

    cairn.run(&["mkdir", "/d"]).await.good();
    cairn.run(&["mkdir", "/d"]).await.failed(1, &["cairn: /d: "]);
    cairn.run(&["mkdir", "/x/y/z"]).await.failed(3, &["cairn: /x/y/z: "]);
    cairn.run(&["mkdir", "-p", "/x/y/z"]).await.good();
    cairn.run(&["mkdir", "-p", "/x/y/z"]).await.good();
    cairn.run(&["mkdir", "/a/below"]).await.failed(1, &["cairn: /a/below: "]);

    assert_eq!(cairn.run(&["ls"]).await.good().text(), "a\nbinary\nd/\nempty\nx/\n");
    assert_eq!(cairn.run(&["ls", "/d"]).await.good().text(), "");
    assert_eq!(cairn.run(&["ls", "/a"]).await.good().text(), "/a\n");
    let long = cairn.run(&["ls", "-l"]).await.good().text();
    assert!(
        long.lines()
            .any(|line| line.starts_with("-rw-r--r--") && line.contains(" 8 ") && line.ends_with(" a")),
        "{long}"
    );
    assert!(long.lines().any(|line| line.starts_with("drwxr-xr-x") && line.ends_with(" d/")), "{long}");
    assert_eq!(cairn.run(&["ls", "-R", "/x"]).await.good().text(), "/x:\ny/\n\n/x/y:\nz/\n\n/x/y/z:\n");

    cairn.run(&["mv", "/a", "/b"]).await.good();
    cairn.run(&["mv", "/b", "/d"]).await.good();
    assert_eq!(cairn.run(&["cat", "/d/b"]).await.good().text(), "one\ntwo\n");
    cairn.run(&["mv", "-n", "/empty", "/binary"]).await.failed(1, &["cairn: "]);
    cairn.run(&["mv", "/empty", "/binary"]).await.good();
    assert_eq!(cairn.run(&["cat", "/binary"]).await.good().text(), "");
    cairn.run(&["mv", "/x", "/x/y"]).await.failed(1, &["cairn: /x: "]);

    cairn.run(&["rm", "/d"]).await.failed(1, &["cairn: /d: "]);
    cairn.run(&["rm", "-r", "/d", "/x"]).await.good();
    cairn.run(&["rm", "/binary"]).await.good();
    assert_eq!(cairn.run(&["ls", "--json"]).await.good().json(), serde_json::json!([]));

    // What is not there is status 3, and named; what comes after it is done all the same.
    cairn.feed(&["write", "/there"], b"there").await.good();
    for words in [
        vec!["cat", "/gone"],
        vec!["ls", "/gone"],
        vec!["stat", "/gone"],
        vec!["rm", "/gone"],
        vec!["rm", "-r", "/gone"],
        vec!["mv", "/gone", "/other"],
        vec!["explain", "/gone"],
        vec!["get", "/gone", "."],
    ] {
        let ran = cairn.run(&words).await.failed(3, &["cairn: /gone: "]);
        assert_eq!(ran.err.lines().count(), 1, "{words:?}: one message: {}", ran.err);
    }
    cairn.run(&["put", "gone", "/other"]).await.failed(3, &["cairn: gone: "]);
    assert_eq!(cairn.run(&["cat", "/gone", "/there"]).await.failed(3, &["/gone"]).text(), "there");
    cairn.run(&["rm", "-f", "/gone"]).await.good();
    cairn.run(&["cat", "/"]).await.failed(1, &["cairn: /: "]);
    cairn.feed(&["write", "/there/below"], b"x").await.failed(1, &["cairn: /there/below: "]);
    let name = "n".repeat(256);
    cairn.feed(&["write", &name], b"x").await.failed(1, &["255"]);
    cairn.feed(&["write", "/a/../b"], b"x").await.failed(1, &["cairn: "]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_copied_lands_where_cp_would_put_it() {
    let up = Up::started().await;
    let cairn = up.cairn();
    let here = up.folder();
    let tree = here.join("tree");
    trees::make(&tree, 400);
    fs::set_permissions(tree.join("peculiar names/.hidden"), fs::Permissions::from_mode(0o640)).unwrap();
    let out = |name: &str| here.join(name);

    // By that name when it does not exist; inside when it does.
    cairn.run(&["put", "-r", "tree", "/copy"]).await.good();
    cairn.run(&["mkdir", "/into"]).await.good();
    cairn.run(&["put", "-r", "tree", "/into"]).await.good();
    cairn.run(&["put", "-r", "tree/", "/into/"]).await.good();
    for (source, target) in [("/copy", "one"), ("/into/tree", "two")] {
        cairn.run(&["get", "-r", source, target]).await.good();
        assert_eq!(trees::differences(&tree, &out(target)), Vec::<String>::new(), "{source}");
    }
    fs::create_dir(out("three")).unwrap();
    cairn.run(&["get", "-r", "/copy", "three"]).await.good();
    assert_eq!(trees::differences(&tree, &out("three/copy")), Vec::<String>::new());
    cairn.run(&["get", "-r", "/into/.", "three"]).await.failed(1, &["cairn: "]);

    // Times and permissions come along.
    let (was, is) = (tree.join("peculiar names/.hidden"), out("one/peculiar names/.hidden"));
    let (was, is) = (fs::metadata(was).unwrap(), fs::metadata(is).unwrap());
    assert_eq!(is.permissions().mode() & 0o777, 0o640);
    assert_eq!(is.modified().unwrap(), was.modified().unwrap());

    // Several files go into a directory only.
    fs::write(out("f"), "f").unwrap();
    fs::write(out("g"), "g").unwrap();
    cairn.run(&["put", "f", "g", "/into"]).await.good();
    assert_eq!(cairn.run(&["cat", "/into/f", "/into/g"]).await.good().text(), "fg");
    cairn.run(&["put", "f", "g", "/nowhere"]).await.failed(2, &["/nowhere"]);
    cairn.run(&["get", "/into/f", "/into/g", "nowhere"]).await.failed(2, &["nowhere"]);
    // Directories need -r; over what is there, the new one wins.
    cairn.run(&["put", "tree", "/no"]).await.failed(1, &["cairn: tree: ", "-r"]);
    cairn.run(&["get", "/copy", "no"]).await.failed(1, &["cairn: /copy: ", "-r"]);
    fs::write(out("f"), "newer").unwrap();
    cairn.run(&["put", "f", "/into"]).await.good();
    cairn.run(&["get", "/into/f", "g"]).await.good();
    assert_eq!(fs::read_to_string(out("g")).unwrap(), "newer");
    cairn.run(&["put", "f", "/missing/f"]).await.failed(3, &["cairn: /missing/f: "]);

    // What cannot be kept is named, and stops nothing else.
    let odd = out("odd");
    fs::create_dir(&odd).unwrap();
    fs::write(odd.join("good"), "good").unwrap();
    fs::write(odd.join(std::ffi::OsStr::from_bytes(b"bad \xff name")), "bad").unwrap();
    std::os::unix::fs::symlink("good", odd.join("link")).unwrap();
    let ran = cairn.run(&["put", "-r", "--json", "odd", "/odd"]).await;
    assert!(ran.err.contains("\\xff") && ran.err.contains("UTF-8"), "{}", ran.err);
    assert!(ran.err.contains("link"), "{}", ran.err);
    assert_eq!(ran.status, 1);
    let done = ran.json();
    assert_eq!(
        (done["files"].as_u64(), done["failed"].as_u64(), done["skipped"].as_u64()),
        (Some(1), Some(1), Some(1))
    );
    assert_eq!(cairn.run(&["ls", "/odd"]).await.good().text(), "good\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn facts_are_json_with_the_promised_names() {
    let up = Up::started().await;
    let cairn = up.cairn();
    cairn.feed(&["write", "/d.txt"], b"some bytes").await.good();
    cairn.run(&["mkdir", "/folder"]).await.good();

    let stat = cairn.json(&["stat", "--json", "/d.txt"]).await;
    has_fields(&stat, "path kind size version replication checksum modified copies");
    assert_eq!(stat["path"], "/d.txt");
    assert_eq!(stat["kind"], "file");
    assert_eq!(stat["size"], 10);
    assert_eq!(stat["replication"], 3);
    let copies = stat["copies"].as_array().unwrap();
    assert_eq!(copies.len(), 3, "{stat}");
    for copy in copies {
        has_fields(copy, "server address state");
        assert!(copy["address"].as_str().unwrap().starts_with("http://127.0.0.1:"), "{copy}");
    }
    let checksum = stat["checksum"].as_str().unwrap().to_owned();
    cairn.feed(&["write", "/same"], b"some bytes").await.good();
    cairn.feed(&["write", "/other"], b"some Bytes").await.good();
    assert_eq!(
        cairn.json(&["stat", "--json", "/same"]).await["checksum"],
        checksum,
        "equal bytes, equal sums"
    );
    assert_ne!(cairn.json(&["stat", "--json", "/other"]).await["checksum"], checksum);
    let version = stat["version"].as_u64().unwrap();
    cairn.feed(&["write", "/d.txt"], b"more bytes than before").await.good();
    assert!(cairn.json(&["stat", "--json", "/d.txt"]).await["version"].as_u64().unwrap() > version);
    let several = cairn.json(&["stat", "--json", "/d.txt", "/folder"]).await;
    assert_eq!(several[1]["kind"], "directory");

    let status = cairn.json(&["status", "--json"]).await;
    has_fields(&status, "file_servers chunks locks files bytes");
    assert_eq!(status["files"], 3);
    assert_eq!(status["bytes"], 22 + 10 + 10);
    assert_eq!(status["locks"], 0);
    has_fields(&status["chunks"], "total healthy under_replicated lost");
    let servers = status["file_servers"].as_array().unwrap();
    assert_eq!(servers.len(), 3);
    for server in servers {
        has_fields(server, "id address zone state used_bytes free_bytes chunks");
        assert_eq!(server["state"], "live");
        assert!(server["free_bytes"].as_u64().unwrap() > 0);
    }
    // In plain words, too.
    let words = cairn.run(&["status"]).await.good().text();
    assert!(words.contains("live") && words.contains("3 files"), "{words}");

    let explained = cairn.json(&["explain", "--json", "/d.txt"]).await;
    let chunk = &explained["chunks"][0];
    has_fields(chunk, "group epoch primary members copies reason next_repair");
    assert_eq!(chunk["members"].as_array().unwrap().len(), 3);
    assert_eq!(chunk["copies"].as_array().unwrap().len(), 3);
    assert_ne!(chunk["reason"], "", "why these servers");
    let words = cairn.run(&["explain", "/d.txt"]).await.good().text();
    assert!(words.contains("group") && words.contains("epoch"), "{words}");

    let listed = cairn.json(&["ls", "--json", "/"]).await;
    let paths: Vec<_> = listed.as_array().unwrap().iter().map(|entry| entry["path"].clone()).collect();
    assert_eq!(paths, ["/d.txt", "/folder", "/other", "/same"]);
    assert_eq!(cairn.json(&["locks", "--json"]).await, serde_json::json!([]));
    let health = cairn.json(&["health", "--json", up.directory_uri()]).await;
    assert_eq!(health["serving"], true);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_is_held_while_a_command_runs() {
    let up = Up::started().await;
    let cairn = up.cairn();
    cairn.feed(&["write", "/locked"], b"before").await.good();

    // It says its token and waits for its input to end.
    let script = "echo $CAIRN_LOCK_TOKEN; cat > /dev/null; exit 7";
    let mut holder =
        cairn.command(&["lock", "/locked", "--ttl", "5s", "--", "sh", "-c", script]).spawn().unwrap();
    let mut lines = BufReader::new(holder.stdout.take().unwrap()).lines();
    let token = lines.next_line().await.unwrap().unwrap();
    assert!(token.contains('.'), "{token}");

    let locks = cairn.json(&["locks", "--json"]).await;
    assert_eq!(locks.as_array().unwrap().len(), 1);
    assert_eq!(locks[0]["path"], "/locked");
    assert_eq!(locks[0]["mode"], "exclusive");
    assert_eq!(locks[0]["token"], token.as_str());
    let owner = locks[0]["owner"].as_str().unwrap().to_owned();
    assert_eq!(cairn.json(&["status", "--json"]).await["locks"], 1);

    // Everybody else is declined at once, and told by whom it is held.
    fs::write(up.folder().join("f"), "f").unwrap();
    for words in [
        vec!["write", "/locked"],
        vec!["write", "--append", "/locked"],
        vec!["rm", "/locked"],
        vec!["mv", "/locked", "/elsewhere"],
        vec!["mv", "/free", "/locked"],
        vec!["put", "f", "/locked"],
        vec!["lock", "/locked", "--", "true"],
        vec!["lock", "--shared", "/locked", "--", "true"],
    ] {
        cairn.feed(&["write", "/free"], b"free").await.good();
        let ran = cairn.feed(&words, b"after").await;
        assert!(ran.took < Duration::from_secs(10), "{words:?}: {:?}", ran.took);
        ran.failed(4, &["cairn: ", "/locked", &owner]);
    }
    cairn.run(&["rm", "-r", "/locked"]).await.failed(4, &["/locked"]);
    assert_eq!(cairn.run(&["cat", "/locked"]).await.good().text(), "before", "reading is free");
    // The holder's token lets its own commands in.
    cairn.feed(&["write", "--token", &token, "/locked"], b"by the holder").await.good();

    // One that waits gets it when the holder's command ends, whose status is handed on.
    let waiting = cairn.run(&["lock", "/locked", "--wait", "30s", "--", "echo", "mine"]);
    let ending = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        drop(holder.stdin.take());
        holder.wait().await.unwrap()
    };
    let (waited, ended) = tokio::join!(waiting, ending);
    assert_eq!(ended.code(), Some(7));
    assert_eq!(waited.good().text(), "mine\n");
    cairn.feed(&["write", "/locked"], b"free again").await.good();
    assert_eq!(cairn.json(&["locks", "--json"]).await, serde_json::json!([]));
    // A token of the past opens nothing.
    cairn.feed(&["write", "--token", &token, "/locked"], b"late").await.failed(4, &[token.as_str()]);
    assert_eq!(cairn.run(&["cat", "/locked"]).await.good().text(), "free again");
    cairn.run(&["lock", "/locked", "--", "no-such-program"]).await.failed(127, &["no-such-program"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commands_own_changes_under_its_lock_need_no_flag() {
    let up = Up::started().await;
    let cairn = up.cairn();
    let path = format!("{}:{}", program("cairn").parent().unwrap().display(), std::env::var("PATH").unwrap());
    // The name does not exist before; other files may be changed as well.
    let script =
        "echo one | cairn write /new && echo two | cairn write --append /new && echo x | cairn write /other";
    let mut locked = cairn.command(&["lock", "/new", "--", "sh", "-c", script]);
    let output = locked.env("PATH", path).stdin(std::process::Stdio::null()).output().await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(cairn.run(&["cat", "/new", "/other"]).await.good().text(), "one\ntwo\nx\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_ends_with_its_dead_holder_or_by_force() {
    let up = Up::started().await;
    let cairn = up.cairn();
    cairn.feed(&["write", "/locked"], b"before").await.good();
    let script = "echo $CAIRN_LOCK_TOKEN; exec sleep 600";
    let hold = async |ttl: &str| {
        let words = ["lock", "/locked", "--ttl", ttl, "--wait", "60s", "--", "sh", "-c", script];
        let mut holder = cairn.command(&words).spawn().unwrap();
        let mut lines = BufReader::new(holder.stdout.take().unwrap()).lines();
        let token = lines.next_line().await.unwrap().unwrap();
        (holder, token)
    };

    // Killed: the lease ends by itself. Its command is another process, which is fenced.
    let (mut holder, token) = hold("2s").await;
    holder.kill().await.unwrap();
    let killed = Instant::now();
    cairn.run(&["lock", "/locked", "--wait", "60s", "--", "true"]).await.good();
    let freed = killed.elapsed();
    println!("a lock of 2 s was free {freed:?} after its holder's death");
    assert!(freed < Duration::from_secs(20), "{freed:?}");
    cairn.feed(&["write", "--token", &token, "/locked"], b"late").await.failed(4, &[]);

    // By force: its holder is told, and ends its command.
    let (mut holder, _) = hold("6s").await;
    cairn.run(&["unlock", "--force", "/locked"]).await.good();
    cairn.feed(&["write", "/locked"], b"after").await.good();
    let ended =
        tokio::time::timeout(Duration::from_secs(60), holder.wait()).await.expect("it is told").unwrap();
    assert_eq!(ended.code(), Some(4));
    let mut said = String::new();
    holder.stderr.take().unwrap().read_to_string(&mut said).await.unwrap();
    assert!(said.contains("/locked"), "{said}");
    // Nothing to take away is as good as taken away, and said; a name that leads nowhere is a mistake.
    let ran =
        cairn.run(&["unlock", "--force", "/locked"]).await.failed(0, &["cairn: /locked: is not locked"]);
    assert_eq!(ran.text(), "");
    let ended = cairn.json(&["unlock", "--force", "--json", "/locked"]).await;
    assert_eq!((ended["path"].as_str(), ended["ended"].as_u64()), (Some("/locked"), Some(0)));
    cairn.run(&["unlock", "--force", "/nowhere"]).await.failed(3, &["cairn: /nowhere: "]);
}

/// A command in which scripts find `cairn`.
fn with_path(mut command: tokio::process::Command) -> tokio::process::Command {
    let here = program("cairn");
    let path = format!("{}:{}", here.parent().unwrap().display(), std::env::var("PATH").unwrap());
    command.env("PATH", path).stdin(std::process::Stdio::null());
    command
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_that_was_lost_is_told_from_one_that_was_used_up() {
    let up = Up::started().await;
    let cairn = up.cairn();
    cairn.run(&["mkdir", "/q"]).await.good();
    let run = async |path: &str, script: &str| {
        let output = with_path(cairn.command(&["lock", "--ttl", "600s", path, "--", "sh", "-c", script]))
            .output()
            .await
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code().unwrap(), said, String::from_utf8_lossy(&output.stdout).into_owned())
    };
    // Taken away while the command ran, which ended well: the work may not have been alone.
    for (path, exists) in [("/q/there", true), ("/q/absent", false)] {
        if exists {
            cairn.feed(&["write", path], b"x").await.good();
        }
        let (status, said, _) = run(path, &format!("cairn unlock --force {path}")).await;
        assert_eq!(status, 4, "{path}: {said}");
        assert!(said.contains(path) && said.contains("taken away"), "{said}");
    }
    // The command's own changes under its token are what the lock was for.
    for script in
        ["cairn mv /q/f /q/g", "cairn rm /q/f", "cairn write /q/new </dev/null && cairn mv /q/new /q/f"]
    {
        cairn.feed(&["write", "/q/f"], b"x").await.good();
        let (status, said, _) = run("/q/f", script).await;
        assert_eq!((status, said.as_str()), (0, ""), "{script}");
    }
    // Used up or lost, the token matters for its own path alone.
    cairn.feed(&["write", "/q/f"], b"x").await.good();
    let (status, said, _) = run("/q/f", "cairn rm /q/f && echo y | cairn write /q/other").await;
    assert_eq!((status, said.as_str()), (0, ""));
    let script =
        "cairn unlock --force /q/other; echo z | cairn write /q/free; echo z | cairn write /q/other; echo $?";
    let (status, said, wrote) = run("/q/other", script).await;
    assert_eq!((status, wrote.as_str()), (4, "4\n"), "{said}");
    assert_eq!(cairn.run(&["cat", "/q/free", "/q/other"]).await.good().text(), "z\ny\n");

    // A locked directory is removed by the holder of its lock, with all that is in it.
    cairn.run(&["mkdir", "/q/d"]).await.good();
    cairn.feed(&["write", "/q/d/f"], b"x").await.good();
    cairn.run(&["rm", "/q/d"]).await.failed(1, &["not empty", "-r"]);
    let (status, said, _) = run("/q/d", "cairn rm -r /q/d").await;
    assert_eq!((status, said.as_str()), (0, ""));
    cairn.run(&["stat", "/q/d"]).await.failed(3, &["/q/d"]);
    locks(&cairn, 0).await;
}

fn signal(child: &tokio::process::Child, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(child.id().unwrap() as i32).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

async fn locks(cairn: &Cairn, count: usize) {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let locks = cairn.json(&["locks", "--json"]).await;
        if locks.as_array().unwrap().len() == count {
            return;
        }
        assert!(Instant::now() < deadline, "not {count} locks: {locks}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_leaves_no_lock_behind() {
    use rustix::process::Signal;
    // The command leaves a signal ignored that whoever started it had ignored, such as `nohup` around these tests.
    // SAFETY: no handler runs, and what it replaces is the same or "ignore".
    for ignored in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        unsafe { libc::signal(ignored, libc::SIG_DFL) };
    }
    let up = Up::started().await;
    let cairn = up.cairn();
    cairn.feed(&["write", "/kept"], b"before").await.good();
    for (with, status) in [(Signal::INT, 130), (Signal::TERM, 143), (Signal::HUP, 129)] {
        let mut write = cairn.command(&["write", "/kept"]).spawn().unwrap();
        let mut input = write.stdin.take().unwrap();
        // More than a chunk: it locks the file, and waits for more.
        tokio::io::AsyncWriteExt::write_all(&mut input, &vec![b'y'; 10 << 20]).await.unwrap();
        locks(&cairn, 1).await;
        signal(&write, with);
        let ended = tokio::time::timeout(Duration::from_secs(60), write.wait()).await.unwrap().unwrap();
        assert_eq!(ended.code(), Some(status));
        // Not after ten seconds, when the session would have ended by itself.
        cairn.feed(&["write", "/kept"], b"again").await.good();
    }
    assert_eq!(cairn.run(&["cat", "/kept"]).await.good().text(), "again");

    // A holder hands the end of the terminal on to its command, and gives the lock back.
    let script = "trap 'exit 9' HUP; echo ready; while :; do sleep 0.05; done";
    let mut holder =
        cairn.command(&["lock", "--ttl", "600s", "/kept", "--", "sh", "-c", script]).spawn().unwrap();
    let mut lines = BufReader::new(holder.stdout.take().unwrap()).lines();
    assert_eq!(lines.next_line().await.unwrap().unwrap(), "ready");
    signal(&holder, Signal::HUP);
    let ended = tokio::time::timeout(Duration::from_secs(60), holder.wait()).await.unwrap().unwrap();
    assert_eq!(ended.code(), Some(9));
    cairn.feed(&["write", "/kept"], b"free").await.good();
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_removed_or_made_by_an_empty_variable_or_a_slash() {
    let up = Up::started().await;
    let cairn = up.cairn();
    cairn.feed(&["write", "/kept"], b"x").await.good();
    cairn.run(&["mkdir", "/d"]).await.good();
    for words in [
        vec!["rm", "-r", ""],
        vec!["rm", "-r", "/kept", ""],
        vec!["ls", ""],
        vec!["stat", ""],
        vec!["cat", ""],
        vec!["explain", ""],
        vec!["mv", "/kept", ""],
        vec!["unlock", "--force", ""],
    ] {
        cairn.run(&words).await.failed(2, &["cairn: ", "empty"]);
    }
    for root in ["/", "//"] {
        cairn.run(&["rm", "-r", "/kept", root]).await.failed(2, &["cairn: /: ", "--no-preserve-root"]);
    }
    cairn.run(&["mv", "/d", "/"]).await.failed(1, &["cairn: /d: "]);
    cairn.run(&["mv", "/kept", "/new/"]).await.failed(1, &["cairn: /new/: ", "not a directory"]);
    cairn.run(&["mv", "/d", "/new/"]).await.good();
    cairn.feed(&["write", "/made/"], b"x").await.failed(1, &["cairn: /made/: ", "not a directory"]);
    fs::write(up.folder().join("f"), "f").unwrap();
    cairn.run(&["put", "f", "/made/"]).await.failed(1, &["cairn: /made/: ", "not a directory"]);
    cairn.run(&["get", "/kept", "made/"]).await.failed(1, &["cairn: made/: ", "not a directory"]);
    assert!(!up.folder().join("made").exists());
    assert_eq!(cairn.run(&["ls"]).await.good().text(), "kept\nnew/\n");
    cairn.run(&["rm", "-r", "--no-preserve-root", "/"]).await.good();
    assert_eq!(cairn.run(&["ls"]).await.good().text(), "");
    // A variable that is set to nothing is not set.
    let mut write = cairn.command(&["write", "/kept"]);
    write.env("CAIRN_LOCK_TOKEN", "").env("CAIRN_LOG", "").stdin(std::process::Stdio::null());
    let output = write.output().await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_copied_is_no_success() {
    let up = Up::started().await;
    let cairn = up.cairn();
    let here = up.folder();
    cairn.run(&["put", "/dev/null", "/x"]).await.failed(1, &["cairn: /dev/null: skipped"]);
    // What a pipe gives is streamed.
    cairn.feed(&["put", "/dev/stdin", "/piped"], b"through a pipe").await.good();
    assert_eq!(cairn.run(&["cat", "/piped"]).await.good().text(), "through a pipe");

    // The content of a directory goes into one that exists, as with `cp -r src/. dst`.
    fs::create_dir_all(here.join("src/below")).unwrap();
    fs::write(here.join("src/below/f"), "f").unwrap();
    cairn.run(&["mkdir", "/dst"]).await.good();
    cairn.run(&["put", "-r", "src/.", "/dst"]).await.good();
    assert_eq!(cairn.run(&["ls", "-R", "/dst"]).await.good().text(), "/dst:\nbelow/\n\n/dst/below:\nf\n");

    // Links are named, or followed where that is asked for and ends.
    std::os::unix::fs::symlink("below/f", here.join("src/link")).unwrap();
    let ran = cairn.run(&["put", "-r", "--json", "src", "/plain"]).await;
    assert!(ran.err.contains("src/link: skipped") && ran.err.contains("-L"), "{}", ran.err);
    assert_eq!(ran.status, 0, "as rsync: what was said is no failure");
    let done = ran.json();
    assert_eq!((done["files"].as_u64(), done["skipped"].as_u64()), (Some(1), Some(1)));
    cairn.run(&["put", "-rL", "src", "/followed"]).await.good();
    assert_eq!(cairn.run(&["cat", "/followed/link"]).await.good().text(), "f");
    std::os::unix::fs::symlink("..", here.join("src/below/back")).unwrap();
    cairn.run(&["put", "-rL", "src", "/endless"]).await.failed(1, &["src/below/back: ", "leads back"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_changes_something_gives_its_facts_too() {
    let up = Up::started().await;
    let cairn = up.cairn();
    let made = cairn.json(&["mkdir", "--json", "-p", "--replication", "2", "/a/b"]).await;
    assert_eq!((made["path"].as_str(), made["kind"].as_str()), (Some("/a/b"), Some("directory")));
    assert_eq!(cairn.json(&["stat", "--json", "/a/b"]).await["replication"], 2);
    assert_eq!(cairn.json(&["mkdir", "--json", "/c", "/d"]).await[1]["path"], "/d");

    // A content of several chunks and a hole has its checksum in `stat`.
    let content: Vec<u8> = (0..20_000_000_u32).map(|at| (at * 7 / 3) as u8).collect();
    let written = cairn.feed(&["write", "--json", "/a/b/f"], &content).await.good().json();
    assert_eq!((written["path"].as_str(), written["size"].as_u64()), (Some("/a/b/f"), Some(20_000_000)));
    assert!(written["version"].as_u64() > Some(0));
    let stat = cairn.json(&["stat", "--json", "/a/b/f"]).await;
    assert_eq!(stat["version"], written["version"]);
    assert_eq!(stat["replication"], 2);
    assert_eq!(stat["checksum"], format!("{:016x}", cairn_proto::checksum::crc64(&content)));

    let moved = cairn.json(&["mv", "--json", "/a/b/f", "/c"]).await;
    assert_eq!(
        (moved["path"].as_str(), moved["version"].as_u64()),
        (Some("/c/f"), written["version"].as_u64())
    );
    assert_eq!(cairn.json(&["set", "--json", "--replication", "1", "/c/f"]).await["replication"], 1);
    let locked =
        cairn.run(&["lock", "--json", "/c/f", "--", "printenv", "CAIRN_LOCK_TOKEN"]).await.good().text();
    let (facts, token) = locked.split_once('\n').unwrap();
    let facts: Value = serde_json::from_str(facts).unwrap();
    assert_eq!((facts["path"].as_str(), facts["token"].as_str()), (Some("/c/f"), Some(token.trim())));
    cairn.run(&["cat", "--json", "/c/f"]).await.failed(2, &["--json"]);
    cairn.run(&["explain", "/c"]).await.failed(1, &["cairn: /c: ", "directory"]);
    cairn.run(&["rebuild"]).await.failed(2, &["--force"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_are_the_programs_own_harmless_and_say_what_to_do() {
    let up = Up::started().await;
    let cairn = up.cairn();
    let ran = cairn.run(&["cat", "/a\u{1b}]0;title\u{7}\u{202e}"]).await.failed(3, &["cairn: /a\\u{1b}"]);
    assert!(
        !ran.err.trim_end().contains(|letter: char| letter.is_control() || letter == '\u{202e}'),
        "{}",
        ran.err
    );
    cairn.run(&["mkdir", "/x/y"]).await.failed(3, &["cairn: /x/y: ", "-p"]);
    for (words, said) in [
        (vec!["ls", "--colour"], "--colour"),
        (vec!["lock", "--ttl", "1ms", "/a", "--", "true"], "1s to 10m"),
        (vec!["lock", "--wait", "abc", "/a", "--", "true"], "10s"),
        (vec!["mv", "/one"], "Usage: cairn mv [OPTIONS] <SRC> <DST>"),
    ] {
        let ran = cairn.run(&words).await.failed(2, &[said]);
        assert!(ran.err.starts_with("cairn: "), "{}", ran.err);
        assert!(!ran.err.contains("--directory"), "{}", ran.err);
    }
    // Names of others too.
    let mut holder = cairn.command(&["lock", "/b", "--", "sh", "-c", "echo held; exec sleep 600"]);
    let mut holder = holder.env("USER", "\u{1b}[31mred").spawn().unwrap();
    let mut lines = BufReader::new(holder.stdout.take().unwrap()).lines();
    assert_eq!(lines.next_line().await.unwrap().unwrap(), "held");
    let ran =
        cairn.feed(&["write", "/b"], b"x").await.failed(4, &["\\u{1b}[31mred", "unlock --force", "--wait"]);
    assert!(!ran.err.contains('\u{1b}'), "{}", ran.err);
    signal(&holder, rustix::process::Signal::TERM);
    holder.wait().await.unwrap();

    let listen = up.directory_uri().trim_start_matches("http://");
    let second = cairn.run(&["up", "--listen", listen, "--data", "other"]).await;
    second.failed(1, &[listen, "another --listen"]);
    cairn.run(&["up", "--listen", "127.0.0.1:65500"]).await.failed(2, &["65500", "65433"]);
    fs::create_dir_all(up.folder().join("photos/2026")).unwrap();
    cairn.run(&["up", "--data", "photos"]).await.failed(2, &["photos", "2026"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn output_that_nobody_reads_on_is_no_failure() {
    let up = Up::started().await;
    let cairn = up.cairn();
    cairn.feed(&["write", "/long"], &vec![b'x'; 4_000_000]).await.good();
    let mut cat = cairn.command(&["cat", "/long"]).spawn().unwrap();
    let mut first = [0; 10];
    let mut out = cat.stdout.take().unwrap();
    out.read_exact(&mut first).await.unwrap();
    drop(out);
    let ended = tokio::time::timeout(Duration::from_secs(60), cat.wait()).await.expect("it ends").unwrap();
    assert_eq!(ended.code(), Some(0));
    let mut said = String::new();
    cat.stderr.take().unwrap().read_to_string(&mut said).await.unwrap();
    assert_eq!(said, "");
}

/// A transfer that is ended leaves what was there, here and in Cairn.
#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_write_changes_nothing() {
    let up = Up::started().await;
    let cairn = up.cairn();
    cairn.feed(&["write", "/kept"], b"before").await.good();
    let mut write = cairn.command(&["write", "/kept"]).spawn().unwrap();
    let mut input = write.stdin.take().unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut input, &vec![b'y'; 2_000_000]).await.unwrap();
    write.kill().await.unwrap();
    assert_eq!(cairn.run(&["cat", "/kept"]).await.good().text(), "before");
    assert!(Path::new(up.folder()).is_dir());
}
