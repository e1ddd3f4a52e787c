//! Whole Debian systems, made from their packages into the cache: a disk, and the kernel to boot it with.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};

use super::{Cache, announce, apt, archive, ask, quietly};

/// What a system is made from.
pub(crate) struct Recipe<'a> {
    /// By which the cache knows it.
    pub(crate) name: &'a str,
    pub(crate) release: &'a str,
    /// As Debian names processors.
    pub(crate) architecture: &'a str,
    pub(crate) packages: &'a [&'a str],
    /// Path, and content: added to the packages' files.
    pub(crate) files: &'a [(&'a str, &'a str)],
    /// Those of the files that are units, and the targets that want them.
    pub(crate) wanted: &'a [(&'a str, &'a str)],
}

/// A system that can be booted. Whoever does leaves the disk as it is, and writes to an overlay.
pub(crate) struct System {
    pub(crate) disk: PathBuf,
    pub(crate) kernel: PathBuf,
    pub(crate) initrd: PathBuf,
}

/// Sparse, so that it takes what is written only.
const DISK_SIZE: &str = "6G";
const TOOLS: [&str; 4] = ["mmdebstrap", "e2fsprogs", "qemu-utils", "arch-test"];

/// The system of a recipe. Once it is in the cache it stays as it is, unless `renew` says otherwise.
pub(crate) fn debian(recipe: &Recipe<'_>, renew: bool) -> anyhow::Result<System> {
    apt::install("what makes disks of Debian systems", &TOOLS, apt::Removal::Never)?;
    let words = [recipe.release, recipe.architecture, DISK_SIZE];
    let added = recipe.files.iter().chain(recipe.wanted).flat_map(|(one, other)| [*one, *other]);
    let inputs: Vec<&[u8]> =
        words.into_iter().chain(recipe.packages.iter().copied()).chain(added).map(str::as_bytes).collect();
    let cache = Cache::open()?;
    let name = format!("system-{}", recipe.name);
    if renew {
        cache.discard(&name, &inputs)?;
    }
    let folder = cache.folder(&name, &inputs, |folder| make(recipe, folder))?;
    let file = |name: &str| folder.join(name);
    Ok(System { disk: file("disk"), kernel: file("kernel"), initrd: file("initrd") })
}

fn make(recipe: &Recipe<'_>, folder: &Path) -> anyhow::Result<()> {
    apt::root("make the disk of a system, whose files belong to root")?;
    runs(recipe.architecture)?;
    announce(&format!("a disk with Debian {} ({}), into the cache only", recipe.release, recipe.architecture));
    let root = folder.join("root");
    let mut bootstrap = Command::new("mmdebstrap");
    bootstrap.args(["--mode=root", "--format=directory", "--variant=minbase"]);
    bootstrap.arg(format!("--architectures={}", recipe.architecture));
    bootstrap.arg(format!("--include={}", recipe.packages.join(",")));
    // Nobody reads in there, and nobody minds if the power fails now.
    for option in ["path-exclude=/usr/share/doc/*", "path-exclude=/usr/share/man/*", "force-unsafe-io"] {
        bootstrap.arg(format!("--dpkgopt={option}"));
    }
    // A mirror may stand still for weeks, which only testing minds; what it has is signed all the same.
    bootstrap.arg("--aptopt=Acquire::Check-Valid-Until \"false\"");
    // For whoever looks at it by hand: root logs in without a password.
    bootstrap.arg("--customize-hook=chroot \"$1\" passwd --delete root");
    bootstrap.arg(recipe.release).arg(&root).arg(archive::mirror()?);
    quietly(&mut bootstrap)?;

    for (path, content) in recipe.files {
        write(&root.join(path.trim_start_matches('/')), content)?;
    }
    for (unit, target) in recipe.wanted {
        let wants = root.join(format!("etc/systemd/system/{target}.wants"));
        fs::create_dir_all(&wants).with_context(|| format!("create {}", wants.display()))?;
        let link = wants.join(unit);
        symlink(format!("/etc/systemd/system/{unit}"), &link).with_context(|| format!("link {}", link.display()))?;
    }
    for (begin, name) in [("vmlinuz-", "kernel"), ("initrd.img-", "initrd")] {
        let from = boot_file(&root, begin)?;
        fs::copy(&from, folder.join(name)).with_context(|| format!("copy {}", from.display()))?;
    }
    disk_of(&root, &folder.join("disk"), DISK_SIZE)?;
    fs::remove_dir_all(&root).with_context(|| format!("remove {}", root.display()))
}

/// The packages' scripts have to run here, on whatever processor they are for.
fn runs(architecture: &str) -> anyhow::Result<()> {
    if ask("arch-test", &[architecture]).is_some() {
        return Ok(());
    }
    apt::install(&format!("what runs programs of {architecture}"), &["qemu-user-static"], apt::Removal::Never)?;
    // As systemd-binfmt does, where there is one.
    let machine = if architecture == "arm64" { "aarch64" } else { "x86_64" };
    let format = format!("/usr/lib/binfmt.d/qemu-{machine}.conf");
    let misc = Path::new("/proc/sys/fs/binfmt_misc");
    if !misc.join("register").exists() {
        quietly(Command::new("mount").args(["-t", "binfmt_misc", "binfmt_misc"]).arg(misc))?;
    }
    let line = fs::read(&format).with_context(|| format!("read {format}"))?;
    fs::write(misc.join("register"), line).with_context(|| format!("tell the kernel of {format}"))?;
    if ask("arch-test", &[architecture]).is_none() {
        bail!("this machine does not run programs of {architecture}, although the kernel knows {format}");
    }
    Ok(())
}

/// A disk that has the files of a folder.
pub(crate) fn disk_of(folder: &Path, disk: &Path, size: &str) -> anyhow::Result<()> {
    File::create(disk).with_context(|| format!("create {}", disk.display()))?;
    let mut format = Command::new("/usr/sbin/mke2fs");
    format.args(["-q", "-F", "-t", "ext4", "-m", "0", "-d"]).arg(folder).arg(disk).arg(size);
    quietly(&mut format)
}

fn boot_file(root: &Path, begin: &str) -> anyhow::Result<PathBuf> {
    let boot = root.join("boot");
    for entry in fs::read_dir(&boot).with_context(|| format!("read {}", boot.display()))? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(begin) {
            return Ok(entry.path());
        }
    }
    bail!("the system's packages have left no {begin}* in /boot")
}

fn write(path: &Path, content: &str) -> anyhow::Result<()> {
    let put = || {
        path.parent().map_or(Ok(()), fs::create_dir_all)?;
        fs::write(path, content)?;
        // Scripts say so themselves.
        let mode = if content.starts_with("#!") { 0o755 } else { 0o644 };
        fs::set_permissions(path, Permissions::from_mode(mode))
    };
    put().with_context(|| format!("write {}", path.display()))
}
