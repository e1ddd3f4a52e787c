//! Programs that extend cargo: of one version each, compiled into the cache.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use super::{Cache, announce, quietly};

pub(super) fn cargo_tool(name: &str, version: &str) -> anyhow::Result<PathBuf> {
    let make = |folder: &Path| {
        announce(&format!("{name} {version}, which is compiled for a minute or two"));
        let mut install = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        install.args(["install", name, "--version", version, "--locked", "--root"]).arg(folder);
        quietly(install.env_remove("CARGO_TARGET_DIR"))
    };
    Ok(Cache::open()?.folder(name, &[version.as_bytes()], make)?.join("bin").join(name))
}
