//! The container engine of the test host, and what the test host itself calls.

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use anyhow::Context as _;

use super::{apt, find};

const PROGRAMS: [(&str, &str); 12] = [
    ("dockerd", "docker.io"),
    ("containerd", "containerd"),
    ("runc", "runc"),
    ("ip", "iproute2"),
    ("nsenter", "util-linux"),
    // Other engines, and what the networks of rootless ones end at.
    ("newuidmap", "uidmap"),
    ("pasta", "passt"),
    ("podman", "podman"),
    ("crun", "crun"),
    ("systemd-nspawn", "systemd-container"),
    ("rootlesskit", "rootlesskit"),
    ("slirp4netns", "slirp4netns"),
];

const POLICY: &str = "/usr/sbin/policy-rc.d";

/// dockerd with what it needs, the tools for namespaces, and a static busybox for images.
///
/// The test host starts an engine of its own; the system's is not started.
pub(crate) fn docker_engine() -> anyhow::Result<()> {
    let missing: Vec<&str> =
        PROGRAMS.into_iter().filter(|(program, _)| find(program).is_none()).map(|(_, package)| package).collect();
    if !missing.is_empty() {
        let _policy = NoServices::begin()?;
        apt::install("the container engine of the tests", &missing, apt::Removal::Never)?;
    }
    if !find("busybox").is_some_and(|busybox| is_static(&busybox)) {
        apt::install("a busybox for images", &["busybox-static"], apt::Removal::Allowed)?;
    }
    Ok(())
}

/// An image made of the program alone has no dynamic loader, which is what `PT_INTERP` asks for.
fn is_static(program: &Path) -> bool {
    let Ok(elf) = std::fs::read(program) else {
        return false;
    };
    let number = |at: usize, bytes: usize| -> Option<usize> {
        let field = elf.get(at..at.checked_add(bytes)?)?;
        Some(field.iter().rev().fold(0, |value, byte| value << 8 | usize::from(*byte)))
    };
    // A 64-bit little-endian one; on other machines the package says the same, if less directly.
    if elf.get(..6) != Some(b"\x7fELF\x02\x01") {
        return false;
    }
    let (Some(table), Some(size), Some(count)) = (number(32, 8), number(54, 2), number(56, 2)) else {
        return false;
    };
    const PT_INTERP: usize = 3;
    (0..count).all(|index| number(table.saturating_add(index * size), 4).is_some_and(|kind| kind != PT_INTERP))
}

/// Keeps packages from starting their services while it lives: Debian asks this script before each.
struct NoServices {
    ours: bool,
}

impl NoServices {
    fn begin() -> anyhow::Result<Self> {
        let mut options = std::fs::OpenOptions::new();
        options.write(true).create_new(true).mode(0o755);
        let mut script = match options.open(POLICY) {
            Ok(script) => script,
            // The machine has a policy of its own, as most images do; or apt is about to say who may do this.
            Err(error)
                if matches!(error.kind(), std::io::ErrorKind::AlreadyExists | std::io::ErrorKind::PermissionDenied) =>
            {
                return Ok(Self { ours: false });
            }
            Err(error) => return Err(error).with_context(|| format!("create {POLICY}")),
        };
        let guard = Self { ours: true };
        // Where this process is killed before it can clean up, the script does so when it is next asked.
        let text = format!(
            "#!/bin/sh\n# Made by metadata-proxy's xtask for the time of one installation.\n\
             [ -d /proc/{} ] && exit 101\nrm -f \"$0\"\nexit 0\n",
            std::process::id()
        );
        script.write_all(text.as_bytes()).with_context(|| format!("write {POLICY}"))?;
        Ok(guard)
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if self.ours
            && let Err(error) = std::fs::remove_file(POLICY)
        {
            eprintln!("cannot remove {POLICY}, which keeps services from starting: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dynamic_program_is_not_static() {
        assert!(!is_static(&std::env::current_exe().unwrap()));
        assert!(!is_static(Path::new("/etc/hostname")));
    }
}
