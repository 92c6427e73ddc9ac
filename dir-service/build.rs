//! Compiles the part of etcd's API that the store uses, with protox, so that no machine needs a system `protoc`.

use std::error::Error;

const FILES: [&str; 2] = ["etcd/kv.proto", "etcd/rpc.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    for file in FILES {
        println!("cargo:rerun-if-changed=proto/{file}");
    }
    let descriptors = protox::compile(FILES, ["proto"])?;
    tonic_prost_build::configure()
        // `bytes` fields share the buffer they arrived in.
        .bytes(".")
        .build_client(true)
        .build_server(false)
        .compile_fds(descriptors)?;
    Ok(())
}
