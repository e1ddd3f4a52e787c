//! Finds the BPF object that the daemon carries.

use std::{env, path::PathBuf, process::exit};

fn main() {
    const VARIABLE: &str = "METADATA_PROXY_EBPF_OBJECT";
    println!("cargo:rerun-if-env-changed={VARIABLE}");
    let object = env::var_os(VARIABLE).map_or_else(
        || {
            let workspace = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
            workspace.join("../target/bpf/metadata-proxy.o")
        },
        PathBuf::from,
    );
    println!("cargo:rerun-if-changed={}", object.display());
    let Ok(object) = object.canonicalize() else {
        println!("cargo:warning=no BPF object at {}: build it with `cargo xtask build-ebpf`", object.display());
        exit(1);
    };
    println!("cargo:rustc-env={VARIABLE}={}", object.display());
}
