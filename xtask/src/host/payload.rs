//! The second disk of a guest: the package, the one before it, and what the scenarios need.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, ensure};

use crate::install::{ask, disk_of, quietly};
use crate::target::Target;
use crate::{build, package, workspace};

const SCRIPTS: [(&str, &str); 7] = [
    ("agent.sh", include_str!("guest/agent.sh")),
    ("cloud.sh", include_str!("guest/cloud.sh")),
    ("lib.sh", include_str!("guest/lib.sh")),
    ("lease.service", include_str!("guest/lease.service")),
    ("plain.service", include_str!("guest/plain.service")),
    ("ask", include_str!("guest/ask.sh")),
    ("load", include_str!("guest/load.sh")),
];
/// Older than any that is released.
const BEFORE: &str = "0.0.1";

/// The disk for guests of this processor; with the container image that lies beside the package, if that is needed.
pub(super) fn make(package: &Path, image: bool, target: Target, scratch: &Path) -> anyhow::Result<PathBuf> {
    let folder = scratch.join("payload");
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
    for (name, content) in SCRIPTS {
        let path = folder.join(name);
        fs::write(&path, content).with_context(|| format!("write {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    }
    fs::copy(build::cloud_for(target)?, folder.join("cloud")).context("copy the stand-ins")?;
    fs::copy(package, folder.join("now.deb")).with_context(|| format!("copy {}", package.display()))?;
    if image {
        fs::copy(image_of(package, target), folder.join("image.tar"))
            .context("copy the container image, which `cargo xtask package` makes beside the package")?;
    }
    earlier(package, &folder.join("before.deb"), scratch)?;
    let disk = scratch.join("payload.disk");
    // Another run's guests keep theirs.
    let _ = fs::remove_file(&disk);
    disk_of(&folder, &disk, "512M")?;
    Ok(disk)
}

/// The last package that `cargo xtask package` has made; the first, where it has made none.
pub(super) fn newest(target: Target) -> anyhow::Result<PathBuf> {
    let folder = workspace()?.join("target/package");
    let made = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("metadata-proxy_") && name.ends_with(&format!("_{}.deb", target.debian))
    };
    let files = || fs::read_dir(&folder).into_iter().flatten().flatten().map(|entry| entry.path()).filter(made);
    let time = |path: &PathBuf| fs::metadata(path).and_then(|file| file.modified()).ok();
    if files().next().is_none() {
        package::for_target(target)?;
    }
    files().max_by_key(time).with_context(|| format!("no package for {} in {}", target.debian, folder.display()))
}

/// The container image that was made together with a package.
fn image_of(package: &Path, target: Target) -> PathBuf {
    package.with_file_name(format!("metadata-proxy-{}-{}.image.tar", env!("CARGO_PKG_VERSION"), target.machine))
}

/// Whether a package is for this processor.
pub(super) fn check(package: &Path, target: Target) -> anyhow::Result<()> {
    let field = ask("dpkg-deb", &["--field", &package.to_string_lossy(), "Architecture"]);
    let field = field.with_context(|| format!("{} is no package of Debian", package.display()))?;
    let (field, guest) = (field.trim(), target.debian);
    ensure!(field == guest, "{} is for {field}, and the guests are {guest}; see --arch", package.display());
    Ok(())
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
