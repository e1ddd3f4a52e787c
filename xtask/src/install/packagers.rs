//! What makes packages.

use std::path::PathBuf;

use super::tools::cargo_tool;

/// Packages of Debian's kind, without Debian's own tools.
pub(crate) fn cargo_deb() -> anyhow::Result<PathBuf> {
    cargo_tool("cargo-deb", "3.8.0")
}

/// Packages of Red Hat's kind, without rpmbuild.
pub(crate) fn cargo_generate_rpm() -> anyhow::Result<PathBuf> {
    cargo_tool("cargo-generate-rpm", "0.21.1")
}

/// The list of all that has gone into the daemon.
pub(crate) fn cargo_cyclonedx() -> anyhow::Result<PathBuf> {
    cargo_tool("cargo-cyclonedx", "0.5.9")
}
