//! What a container image of the daemon needs of Debian, for any processor.

use std::{fs, path::PathBuf};

use anyhow::Context as _;

use super::{Cache, announce, archive::Archive};
use crate::target::Target;

/// The libraries that a program of Rust is loaded with, and certificates.
const PACKAGES: [&str; 3] = ["libc6", "libgcc-s1", "ca-certificates"];

/// A folder with these packages of today unpacked, none of which is configured; with their licences.
pub(crate) fn image_system(target: Target) -> anyhow::Result<PathBuf> {
    let cache = Cache::open()?;
    let name = format!("image-system-{}", target.debian);
    // Not kept: an image is to have the security updates of the day.
    cache.discard(&name, &[])?;
    cache.folder(&name, &[], |folder| {
        announce(&format!("{} of {} for the image, into the cache only", PACKAGES.join(", "), target.debian));
        let archive = Archive::of_machine(&folder.join("apt"), target.debian)?;
        // Where the licence of libgcc is.
        let base = archive.dependencies("libgcc-s1")?.into_iter().filter(|package| package.starts_with("gcc-"));
        let packages: Vec<String> = PACKAGES.map(str::to_owned).into_iter().chain(base).collect();
        archive.unpack(&packages, folder)?;
        fs::remove_dir_all(folder.join("apt")).context("remove the lists of packages")
    })
}
