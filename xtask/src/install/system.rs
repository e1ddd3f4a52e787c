//! What a container image of the daemon needs of Debian, and what guests that are no whole Debian do, for any processor.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context as _;

use super::{Cache, announce, archive::Archive, docker_engine};
use crate::target::Target;

/// The container engine of a guest, and the tools that its tests call.
const GUEST_PACKAGES: [&str; 5] = ["docker.io", "containerd", "runc", "iproute2", "busybox-static"];

/// The libraries that a program of Rust is loaded with, and certificates.
const PACKAGES: [&str; 3] = ["libc6", "libgcc-s1", "ca-certificates"];

/// Unpacks these packages into an empty folder, and runs nothing of theirs. They are those of today and not of a cache: an
/// image is to have the security updates.
pub(crate) fn image_system(target: Target, folder: &Path) -> anyhow::Result<()> {
    announce(&format!("{} of {} for the image, below target only", PACKAGES.join(", "), target.debian));
    let archive = Archive::of_machine(&folder.join("apt"), target.debian)?;
    // Where the licence of libgcc is.
    let base = archive.dependencies("libgcc-s1")?.into_iter().filter(|package| package.starts_with("gcc-"));
    let packages: Vec<String> = PACKAGES.map(str::to_owned).into_iter().chain(base).collect();
    archive.unpack(&packages, folder)?;
    fs::remove_dir_all(folder.join("apt")).context("remove the lists of packages")
}

/// A root whose programs guests with this processor run: this machine's own where it can be, else one in the cache.
pub(crate) fn guest_system(target: Target) -> anyhow::Result<PathBuf> {
    if target.is_native() {
        docker_engine()?;
        return Ok(PathBuf::from("/"));
    }
    let inputs: Vec<&[u8]> = GUEST_PACKAGES.iter().map(|package| package.as_bytes()).collect();
    let name = format!("guest-{}", target.debian);
    let folder = Cache::open()?.folder(&name, &inputs, |folder| {
        announce(&format!("{} of {}, into the cache only", GUEST_PACKAGES.join(", "), target.debian));
        let archive = Archive::of_machine(&folder.join("apt"), target.debian)?;
        archive.unpack_whole(&GUEST_PACKAGES, &folder.join("root"))?;
        fs::remove_dir_all(folder.join("apt")).context("remove the lists of packages")
    })?;
    Ok(folder.join("root"))
}
