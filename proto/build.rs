//! Compiles `cairn/v1/*.proto` with protox, so that no machine needs a system `protoc`.

use prost::Message as _;
use std::{env, error::Error, fs, path::PathBuf};

const FILES: [&str; 7] = [
    "cairn/v1/types.proto",
    "cairn/v1/errors.proto",
    "cairn/v1/directory_service.proto",
    "cairn/v1/session_service.proto",
    "cairn/v1/cluster_service.proto",
    "cairn/v1/file_service.proto",
    "cairn/v1/replica_service.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    for file in FILES {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(FILES, ["."])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    // The reflection service registers these bytes.
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        // `bytes` fields share the buffer they arrived in.
        .bytes(".")
        .client_mod_attribute(".", "#[cfg(feature = \"client\")]")
        .server_mod_attribute(".", "#[cfg(feature = \"server\")]")
        .build_client(true)
        .build_server(true)
        .compile_fds(descriptors)?;
    Ok(())
}
