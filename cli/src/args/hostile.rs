//! Hostile words. A variable of the environment goes the same way as its flag.

use super::*;
use fuzz::Decoder;

#[test]
fn hostile_words_are_refused_or_read() {
    // One word a line. clap keeps the whole description of all commands: that is the constant.
    Decoder::new("cairn-args")
        .one_in(40)
        .memory(100, 16 << 20)
        .bytes_max(4_096)
        .sample("put\n-r\na\nb c\n/d")
        .sample("lock\n/a\n--ttl\n30s\n--\nsh\n-c\ntrue")
        .sample("rm\n--token\n1.7\n--timeout\n5s\n--json\n/a")
        .sample("up\n--listen\n127.0.0.1:7400\n--file-servers\n3\n--data\nx")
        .run(|bytes| {
            let text = String::from_utf8_lossy(bytes);
            let _ = Cli::try_parse_from(std::iter::once("cairn").chain(text.split('\n')));
        });
}
