//! What a guest boots from: one archive in memory, with the container engine of this machine and what we have built.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};

use super::cpio::Archive;
use crate::build;
use crate::install::{CERTIFICATES, Kernel, ask, find, quietly};

const INIT: &str = include_str!("init.sh");
const ENGINE: [&str; 4] = ["dockerd", "containerd", "containerd-shim-runc-v2", "runc"];
/// Shows the filters on a device, which busybox does not.
const TC: &str = "tc";
const OURS: [&str; 4] = ["metadata-proxy", "guest", "aws-config-client", "probe"];

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

/// The programs, the same for every kernel.
pub(super) fn programs(scratch: &Path) -> anyhow::Result<Vec<u8>> {
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
    let busybox = find("busybox").context("busybox is not installed")?;
    archive.file("usr/bin/busybox", 0o755, &read(&busybox)?);
    archive.link("usr/bin/sh", "busybox");

    let mut libraries = BTreeSet::new();
    for name in ENGINE.into_iter().chain([TC]) {
        let program = find(name).with_context(|| format!("{name} is not installed"))?;
        libraries.extend(libraries_of(&program));
        archive.file(&format!("usr/bin/{name}"), 0o755, &read(&program)?);
    }
    for name in OURS {
        let program = build::binary("debug", name)?;
        libraries.extend(libraries_of(&program));
        archive.file(&format!("metadata-proxy/{name}"), 0o755, &read(&slim(&program, scratch)?)?);
    }
    for library in libraries {
        archive.file(&below_usr(&library)?, 0o755, &read(&library)?);
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

/// A copy without debugging information, which is most of the file.
fn slim(program: &Path, scratch: &Path) -> anyhow::Result<PathBuf> {
    let slim = scratch.join(program.file_name().context("a program has no name")?);
    quietly(Command::new("strip").arg("--strip-debug").arg("-o").arg(&slim).arg(program))?;
    Ok(slim)
}

/// Every file that the program is loaded with; a static one has none.
fn libraries_of(program: &Path) -> Vec<PathBuf> {
    let text = ask("ldd", &[&program.to_string_lossy()]).unwrap_or_default();
    text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect()
}

/// Where a library lies once `/lib` is a link to `/usr/lib`; by the name that programs ask for.
fn below_usr(library: &Path) -> anyhow::Result<String> {
    let (Some(folder), Some(name)) = (library.parent(), library.file_name()) else {
        bail!("{} is no library", library.display());
    };
    let folder = folder.canonicalize().with_context(|| format!("find {}", folder.display()))?;
    let folder = if folder.starts_with("/usr") { folder } else { Path::new("/usr").join(folder.strip_prefix("/")?) };
    Ok(folder.join(name).to_string_lossy().into_owned())
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("read {}", path.display()))
}
