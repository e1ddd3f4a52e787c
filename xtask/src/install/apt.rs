//! Debian's packages.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, bail};

use super::{announce, ask, find, quietly};

/// Whether packages that are in the way may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Removal {
    Never,
    Allowed,
}

/// The package lists have been fetched by this process; more often is of no use.
static UPDATED: AtomicBool = AtomicBool::new(false);

/// Installs those of the packages that are missing; `what` they are needed for goes into the messages.
pub(super) fn install(what: &str, packages: &[&str], removal: Removal) -> anyhow::Result<()> {
    let missing: Vec<&str> = packages.iter().copied().filter(|package| !installed(package)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names = missing.join(" ");
    let by_hand = format!("apt-get install --no-install-recommends {names}");
    if find("apt-get").is_none() {
        bail!("{what} is missing, and there is no apt-get to install it; these are its Debian packages: {names}");
    }
    if !is_root() {
        bail!("{what} is missing, and only root can install it; run: {by_hand}");
    }
    announce(&format!("{what}: {names}"));
    let mut install = vec!["install", "--yes", "--no-install-recommends"];
    if removal == Removal::Never {
        install.push("--no-remove");
    }
    install.extend(&missing);
    let result = match apt(&install) {
        // The lists may be missing or old.
        Err(_) if !UPDATED.swap(true, Ordering::Relaxed) => apt(&["update"]).and_then(|()| apt(&install)),
        result => result,
    };
    result.with_context(|| format!("{what} is missing and could not be installed; see why with: {by_hand}"))
}

/// Fetches the machine's package lists.
pub(super) fn update() -> anyhow::Result<()> {
    if !is_root() {
        bail!("only root can fetch package lists; run: apt-get update");
    }
    UPDATED.store(true, Ordering::Relaxed);
    apt(&["update"])
}

/// Unpacks packages into a folder, and runs nothing of theirs.
pub(super) fn unpack(packages: &[&str], folder: &Path) -> anyhow::Result<()> {
    let download = || quietly(Command::new("apt-get").args(["--quiet", "download"]).args(packages).current_dir(folder));
    match download() {
        Err(_) if is_root() && !UPDATED.swap(true, Ordering::Relaxed) => {
            apt(&["update"]).and_then(|()| download())?;
        }
        result => result?,
    }
    for entry in std::fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))? {
        let package = entry?.path();
        if package.extension().is_some_and(|extension| extension == "deb") {
            quietly(Command::new("dpkg-deb").arg("--extract").arg(&package).arg(folder))?;
        }
    }
    Ok(())
}

fn apt(arguments: &[&str]) -> anyhow::Result<()> {
    // Waits for another apt rather than fail beside it.
    let common = ["--quiet", "-o", "DPkg::Lock::Timeout=300"];
    quietly(Command::new("apt-get").args(common).args(arguments).env("DEBIAN_FRONTEND", "noninteractive"))
}

fn installed(package: &str) -> bool {
    let status = ask("dpkg-query", &["--show", "--showformat=${db:Status-Status}", package]);
    status.is_some_and(|status| status == "installed")
}

/// Whether this process may do it.
pub(super) fn root(what: &str) -> anyhow::Result<()> {
    if !is_root() {
        bail!("only root can {what}");
    }
    Ok(())
}

fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_installed_is_left_alone() {
        if find("dpkg-query").is_none() {
            return;
        }
        assert!(installed("dpkg"));
        assert!(!installed("no-such-package"));
        install("nothing", &["dpkg"], Removal::Never).unwrap();
    }
}
