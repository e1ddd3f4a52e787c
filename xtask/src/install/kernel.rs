//! Debian's kernels, unpacked into the cache.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, bail, ensure};

use super::archive::Archive;
use super::{Cache, announce};

/// The ones for virtual machines: the same kernel with fewer modules, a third of the size.
const PACKAGE: &str = "linux-image-cloud-amd64";

/// A kernel that can be booted.
pub(crate) struct Kernel {
    /// As `uname -r` says it.
    pub(crate) release: String,
    pub(crate) image: PathBuf,
    modules: PathBuf,
}

/// The newest kernel of a Debian release, whose version has to begin with `line`.
///
/// Once it is in the cache it stays as it is, unless `renew` says otherwise.
pub(crate) fn kernel(debian: &str, line: &str, renew: bool) -> anyhow::Result<Kernel> {
    let cache = Cache::open()?;
    let inputs: [&[u8]; 2] = [debian.as_bytes(), PACKAGE.as_bytes()];
    let name = format!("kernel-{line}");
    if renew {
        cache.discard(&name, &inputs)?;
    }
    let folder = cache.folder(&name, &inputs, |folder| {
        let archive = Archive::open(&folder.join("apt"), &[debian], false)?;
        let depends = archive.dependencies(PACKAGE)?;
        let image = depends.iter().find(|package| package.starts_with("linux-image-"));
        let image = image.with_context(|| format!("{PACKAGE} of {debian} names no kernel"))?;
        announce(&format!("{image} of Debian's {debian}, into the cache only"));
        // Newer ones are in two packages, of which this is the sum.
        let parts = archive.dependencies(image)?.into_iter();
        let parts = parts.filter(|part| part.starts_with("linux-binary-") || part.starts_with("linux-modules-"));
        let packages: Vec<String> = [image.clone()].into_iter().chain(parts).collect();
        archive.unpack(&packages, folder)?;
        fs::remove_dir_all(folder.join("apt")).context("remove the lists of packages")
    })?;
    // The second is where the root of a system is merged into /usr.
    let modules = ["lib/modules", "usr/lib/modules"].map(|path| folder.join(path));
    let modules = modules.iter().find(|path| path.is_dir()).context("the kernel's package has no modules")?;
    let entry = fs::read_dir(modules)?.next().context("the kernel's package has no modules")??;
    let release = entry.file_name().to_string_lossy().into_owned();
    ensure!(
        release.strip_prefix(line).is_some_and(|rest| rest.starts_with('.')),
        "Debian's {debian} has kernel {release} instead of {line} now: adapt the table in xtask/src/vm.rs"
    );
    let images = [folder.join(format!("boot/vmlinuz-{release}")), entry.path().join("vmlinuz")];
    let image = images.into_iter().find(|path| path.is_file()).context("the kernel's package has no image")?;
    Ok(Kernel { release, image, modules: entry.path().join("kernel") })
}

impl Kernel {
    /// A module, ready to be inserted; none if the kernel has it built in.
    ///
    /// `path` is below the folder of modules and without its ending.
    pub(crate) fn module(&self, path: &str) -> anyhow::Result<Option<Vec<u8>>> {
        let plain = self.modules.join(format!("{path}.ko"));
        if plain.is_file() {
            return fs::read(&plain).map(Some).with_context(|| format!("read {}", plain.display()));
        }
        let packed = self.modules.join(format!("{path}.ko.xz"));
        if !packed.is_file() {
            return Ok(None);
        }
        let output = Command::new("busybox").args(["xz", "-dc"]).arg(&packed).output().context("cannot run busybox")?;
        if !output.status.success() {
            bail!("cannot unpack {}: {}", packed.display(), String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(Some(output.stdout))
    }
}
