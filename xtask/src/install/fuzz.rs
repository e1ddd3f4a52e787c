//! The driver of the fuzzer.

use std::path::PathBuf;

use super::{apt, find, tools::cargo_tool};

/// libFuzzer comes as C++.
pub(crate) fn cpp_toolchain() -> anyhow::Result<()> {
    if find("c++").is_some() {
        return Ok(());
    }
    apt::install("a C++ compiler", &["g++"], apt::Removal::Never)
}

pub(crate) fn cargo_fuzz() -> anyhow::Result<PathBuf> {
    cargo_tool("cargo-fuzz", "0.13.2")
}
