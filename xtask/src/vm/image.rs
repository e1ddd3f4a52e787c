//! What a guest boots from: one archive in memory, with a container engine of Debian and what we have built.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;

use super::cpio::Archive;
use crate::build;
use crate::elf::Needs;
use crate::install::{CERTIFICATES, Kernel};
use crate::target::Target;

const INIT: &str = include_str!("init.sh");
const ENGINE: [&str; 4] = ["dockerd", "containerd", "containerd-shim-runc-v2", "runc"];
/// Shows the filters on a device, which busybox does not.
const TC: &str = "tc";
const DAEMON: &str = "metadata-proxy";
const OURS: [&str; 4] = [DAEMON, "guest", "aws-config-client", "probe"];

/// In the order of their dependencies. No device: the guest's world is its memory.
const MODULES: [&str; 7] = [
    "fs/overlayfs/overlay",
    "net/llc/llc",
    "net/802/stp",
    "net/bridge/bridge",
    "drivers/net/veth",
    // The guard on the uplinks before Linux 6.6. On a host they are loaded on demand.
    "net/sched/sch_ingress",
    "net/sched/cls_bpf",
];

/// The programs, the same for every kernel; those that are not ours are of the system at `root`.
pub(super) fn programs(target: Target, root: &Path, scratch: &Path) -> anyhow::Result<Vec<u8>> {
    let mut archive = Archive::default();
    for directory in ["dev", "etc", "opt", "proc", "root", "run", "sys", "tmp", "var/lib", "usr/local/bin"] {
        archive.directory(directory);
    }
    for merged in ["bin", "sbin", "lib", "lib64"] {
        archive.directory(&format!("usr/{merged}"));
        archive.link(merged, &format!("usr/{merged}"));
    }
    archive.link("var/run", "/run");
    archive.file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\n");
    archive.file("etc/group", 0o644, b"root:x:0:\n");
    archive.file("etc/hosts", 0o644, b"127.0.0.1 localhost\n");
    archive.file("etc/nsswitch.conf", 0o644, b"passwd: files\ngroup: files\nhosts: files\n");
    // No client of TLS can be made without any, even if it is never to use TLS.
    archive.file(CERTIFICATES, 0o644, &read(Path::new(CERTIFICATES))?);
    archive.file("init", 0o755, INIT.as_bytes());
    // A shell and everything else that a machine's own programs are.
    archive.file("usr/bin/busybox", 0o755, &read(&program(root, "busybox")?)?);
    archive.link("usr/bin/sh", "busybox");

    let mut libraries = BTreeMap::new();
    for name in ENGINE.into_iter().chain([TC]) {
        let program = program(root, name)?;
        libraries.extend(Needs::of(&program)?.libraries_in(target, root)?);
        archive.file(&format!("usr/bin/{name}"), 0o755, &read(&program)?);
    }
    for name in OURS {
        let program = if name == DAEMON { build::daemon_for(target, false)? } else { build::of_tests(target, name)? };
        libraries.extend(Needs::of(&program)?.libraries_in(target, root)?);
        // Without debugging information, which is most of the file.
        let slim = scratch.join(name);
        build::strip(target, &program, &slim)?;
        archive.file(&format!("metadata-proxy/{name}"), 0o755, &read(&slim)?);
    }
    for (path, library) in libraries {
        // `/lib` is a link.
        let path = if path.starts_with("usr/") { path } else { format!("usr/{path}") };
        archive.file(&path, 0o755, &read(&library)?);
    }
    Ok(archive.finish())
}

/// What is different from one boot to the next; the kernel unpacks it over the programs.
pub(super) fn kernel(kernel: &Kernel, arguments: &[&str]) -> anyhow::Result<Vec<u8>> {
    let mut archive = Archive::default();
    for (number, path) in MODULES.iter().enumerate() {
        if let Some(module) = kernel.module(path)? {
            let name = path.rsplit('/').next().unwrap_or(path);
            archive.file(&format!("modules/{number}-{name}.ko"), 0o644, &module);
        }
    }
    let words: Vec<String> = arguments.iter().map(|word| format!("'{word}'")).collect();
    archive.file("metadata-proxy/arguments", 0o644, format!("set -- {}\n", words.join(" ")).as_bytes());
    Ok(archive.finish())
}

/// A program of the system.
fn program(root: &Path, name: &str) -> anyhow::Result<PathBuf> {
    let folders = ["usr/local/bin", "usr/sbin", "usr/bin", "sbin", "bin"].into_iter();
    let found = folders.map(|folder| root.join(folder).join(name)).find(|path| path.is_file());
    found.with_context(|| format!("{name} is not installed below {}", root.display()))
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("read {}", path.display()))
}
