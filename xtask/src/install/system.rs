//! What a container image of the daemon needs of Debian, for any processor.

use std::{fs, path::Path};

use anyhow::Context as _;

use super::{announce, archive::Archive};
use crate::target::Target;

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
