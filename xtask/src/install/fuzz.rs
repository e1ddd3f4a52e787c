//! The driver of the fuzzer.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use super::{Cache, announce, apt, find, quietly};

const VERSION: &str = "0.13.2";

/// libFuzzer comes as C++.
pub(crate) fn cpp_toolchain() -> anyhow::Result<()> {
    if find("c++").is_some() {
        return Ok(());
    }
    apt::install("a C++ compiler", &["g++"], apt::Removal::Never)
}

pub(crate) fn cargo_fuzz() -> anyhow::Result<PathBuf> {
    let make = |folder: &Path| {
        announce(&format!("cargo-fuzz {VERSION}, which is compiled for a minute or two"));
        let mut install = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        install.args(["install", "cargo-fuzz", "--version", VERSION, "--locked", "--root"]).arg(folder);
        quietly(install.env_remove("CARGO_TARGET_DIR"))
    };
    Ok(Cache::open()?.folder("cargo-fuzz", &[VERSION.as_bytes()], make)?.join("bin/cargo-fuzz"))
}
