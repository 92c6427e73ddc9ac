//! Hostile flags. A variable of the environment goes the same way as its flag.

use super::*;
use clap::Parser as _;
use fuzz::Decoder;

#[test]
fn hostile_flags_are_refused_or_read() {
    // One word a line. clap keeps the whole description of all flags: that is the constant.
    Decoder::new("file-args")
        .one_in(20)
        .memory(100, 8 << 20)
        .bytes_max(4_096)
        .sample("--listen\n127.0.0.1:7400\n--data\n/tmp/x")
        .sample("--advertise\nhttp://a:1,unix:/x\n--metrics\n127.0.0.1:9\n--insecure\n--log\ninfo,a=debug")
        .run(|bytes| {
            let text = String::from_utf8_lossy(bytes);
            let Ok(args) = Args::try_parse_from(std::iter::once("service").chain(text.split('\n'))) else {
                return;
            };
            if let Err(error) = args.check() {
                assert!(error.message().contains("--"), "it names no flag: {error}");
            }
        });
}
