//! Programs that use Cairn, each readable in a minute: see the files beside `Cargo.toml`, and run one with
//! `cargo run -p examples --example quickstart`. Each asserts what it claims, and CI runs them all.
