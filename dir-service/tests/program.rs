//! The program without a cluster. What it does among others is in the package `tests`, which starts the binary that
//! `cargo test` builds because this file is here.

use std::process::Command;

#[test]
fn bad_flags_end_it_with_64_before_anything_is_made() {
    let folder = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_dir-service"))
        .args(["--listen", "nonsense", "--data", "data"])
        .current_dir(folder.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(64), "{said}");
    assert!(said.contains("nonsense"), "{said}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}
