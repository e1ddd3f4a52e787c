//! The emulators of `cargo xtask vm` and `cargo xtask host`, and what their guests take from this machine.

use std::path::Path;

use super::archive::Archive;
use super::{Cache, announce, apt, ask, find};

pub(crate) const QEMU: &str = "qemu-system-x86_64";
pub(crate) const QEMU_ARM: &str = "qemu-system-aarch64";

pub(crate) const CERTIFICATES: &str = "/etc/ssl/certs/ca-certificates.crt";

pub(crate) fn qemu() -> anyhow::Result<()> {
    if !Path::new(CERTIFICATES).exists() {
        apt::install("certificates for the guests", &["ca-certificates"], apt::Removal::Never)?;
    }
    emulator(QEMU)
}

/// One of the emulators above.
pub(crate) fn emulator(program: &str) -> anyhow::Result<()> {
    if find(program).is_some() {
        return Ok(());
    }
    let package = if program == QEMU_ARM { "qemu-system-arm" } else { "qemu-system-x86" };
    let Err(error) = apt::install("an emulator of machines", &[package], apt::Removal::Never) else {
        return Ok(());
    };
    // Where qemu's tools come from the backports, the release's own emulator does not fit to them.
    let Some(release) = ask("sh", &["-c", ". /etc/os-release && echo \"$VERSION_CODENAME\""]) else {
        return Err(error);
    };
    let (release, backports) = (release.trim(), format!("{}-backports", release.trim()));
    let cache = Cache::open()?;
    let Ok(archive) = Archive::open(&cache.root.join("apt-backports"), &[release, &backports], true) else {
        return Err(error);
    };
    announce(&format!("an emulator of machines from {backports}: {package}"));
    archive.install(&backports, &[package]).map_err(|second| error.context(second))
}
