//! The second disk of a guest: the package, the one before it, and what the scenarios need.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, ensure};

use super::arch::Arch;
use crate::install::{ask, describe, disk_of, quietly};
use crate::{build, cargo, run, workspace};

const SCRIPTS: [(&str, &str); 5] = [
    ("agent.sh", include_str!("guest/agent.sh")),
    ("cloud.sh", include_str!("guest/cloud.sh")),
    ("lib.sh", include_str!("guest/lib.sh")),
    ("ask", include_str!("guest/ask.sh")),
    ("load", include_str!("guest/load.sh")),
];
/// Older than any that is released.
const BEFORE: &str = "0.0.1";

pub(super) fn make(package: Option<&Path>, arch: Arch, scratch: &Path) -> anyhow::Result<PathBuf> {
    let package = package.map_or_else(|| newest(arch), |path| Ok(path.to_owned()))?;
    fits(&package, arch)?;
    let folder = scratch.join("payload");
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
    for (name, content) in SCRIPTS {
        let path = folder.join(name);
        fs::write(&path, content).with_context(|| format!("write {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    }
    fs::copy(cloud(arch)?, folder.join("cloud")).context("copy the stand-ins")?;
    fs::copy(&package, folder.join("now.deb")).with_context(|| format!("copy {}", package.display()))?;
    earlier(&package, &folder.join("before.deb"), scratch)?;
    let disk = scratch.join("payload.disk");
    disk_of(&folder, &disk, "512M")?;
    Ok(disk)
}

/// The last package that `cargo xtask package` has made.
fn newest(arch: Arch) -> anyhow::Result<PathBuf> {
    let folder = workspace()?.join("target/package");
    let made = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("metadata-proxy_") && name.ends_with(&format!("_{}.deb", arch.debian()))
    };
    let files = fs::read_dir(&folder).into_iter().flatten().flatten().map(|entry| entry.path()).filter(made);
    let time = |path: &PathBuf| fs::metadata(path).and_then(|file| file.modified()).ok();
    files.max_by_key(time).with_context(|| {
        format!(
            "no package for {} in {}; make it with: cargo xtask package --target {}",
            arch.debian(),
            folder.display(),
            arch.target()
        )
    })
}

fn fits(package: &Path, arch: Arch) -> anyhow::Result<()> {
    let field = ask("dpkg-deb", &["--field", &package.to_string_lossy(), "Architecture"]);
    let field = field.with_context(|| format!("{} is no package of Debian", package.display()))?;
    let (field, guest) = (field.trim(), arch.debian());
    ensure!(field == guest, "{} is for {field}, and the guests are {guest}; see --arch", package.display());
    Ok(())
}

/// The stand-ins, for the guest's processor.
fn cloud(arch: Arch) -> anyhow::Result<PathBuf> {
    let mut build = cargo();
    build.args(["build", "--quiet", "--package", "metadata-proxy-tests", "--bin", "cloud"]);
    if arch.is_native() {
        run(&mut build)?;
        return build::binary("debug", "cloud");
    }
    build::binary(&format!("{}/debug", arch.target()), "cloud")
        .with_context(|| format!("build it with a compiler for {0}: {1} --target {0}", arch.target(), describe(&build)))
}

/// The same package by an older version's name, to upgrade from.
fn earlier(package: &Path, to: &Path, scratch: &Path) -> anyhow::Result<()> {
    let folder = scratch.join("before");
    let _ = fs::remove_dir_all(&folder);
    quietly(Command::new("dpkg-deb").arg("--raw-extract").arg(package).arg(&folder))?;
    let control = folder.join("DEBIAN/control");
    let text = fs::read_to_string(&control).with_context(|| format!("read {}", control.display()))?;
    let line =
        |line: &str| if line.starts_with("Version:") { format!("Version: {BEFORE}\n") } else { format!("{line}\n") };
    let text: String = text.lines().map(line).collect();
    fs::write(&control, text).with_context(|| format!("write {}", control.display()))?;
    quietly(Command::new("dpkg-deb").args(["-Znone", "--root-owner-group", "--build"]).arg(&folder).arg(to))
}
