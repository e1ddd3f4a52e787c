//! Installs what building and testing needs and this machine does not have.
//!
//! Each function looks first and is silent when all is there. What it installs it names in one line;
//! what it cannot install is an error that names the command. Nothing of the user's is removed, except
//! that Debian's `busybox` makes way for `busybox-static`, its twin.

mod apt;
mod archive;
mod bpf;
mod clients;
mod cross;
mod debian;
mod docker;
mod further;
mod fuzz;
mod kernel;
mod packagers;
mod qemu;
mod system;
mod tools;

use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};

pub(crate) use self::bpf::{bpf_linker, bpf_toolchain};
pub(crate) use self::clients::{cloud_init, js_clients, python_clients};
pub(crate) use self::cross::cross_compiler;
pub(crate) use self::debian::{Recipe, System, debian, disk_of};
pub(crate) use self::docker::docker_engine;
pub(crate) use self::further::further_clients;
pub(crate) use self::fuzz::{cargo_fuzz, cpp_toolchain};
pub(crate) use self::kernel::{Kernel, kernel};
pub(crate) use self::packagers::{cargo_cyclonedx, cargo_deb, cargo_generate_rpm};
pub(crate) use self::qemu::{CERTIFICATES, QEMU, QEMU_ARM, emulator, qemu};
pub(crate) use self::system::image_system;

/// A C compiler, for the crates that bring C along (the TLS of the AWS SDK). Rust itself links with
/// it, so it is missing only where another linker has been set up.
pub(crate) fn c_toolchain() -> anyhow::Result<()> {
    if find("cc").is_some() {
        return Ok(());
    }
    apt::install("a C compiler", &["gcc", "libc6-dev"], apt::Removal::Never)
}

/// The folder where all checkouts share what takes long to make, held for one process at a time.
struct Cache {
    root: PathBuf,
    _lock: File,
}

impl Cache {
    fn open() -> anyhow::Result<Self> {
        let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|base| base.is_absolute());
        let base = base.or_else(|| std::env::home_dir().map(|home| home.join(".cache")));
        let base = base.context("no folder for caches: neither XDG_CACHE_HOME nor HOME is set")?;
        let root = base.join("metadata-proxy");
        std::fs::create_dir_all(&root).with_context(|| format!("create {}", root.display()))?;
        let lock = File::create(root.join(".lock")).with_context(|| format!("create a lock in {}", root.display()))?;
        lock.lock().with_context(|| format!("lock {}", root.display()))?;
        Ok(Self { root, _lock: lock })
    }

    fn path(&self, name: &str, inputs: &[&[u8]]) -> PathBuf {
        self.root.join(format!("{name}-{:016x}", fingerprint(inputs)))
    }

    /// Throws such a folder away, to have it made anew.
    fn discard(&self, name: &str, inputs: &[&[u8]]) -> anyhow::Result<()> {
        let folder = self.path(name, inputs);
        match std::fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("remove {}", folder.display()))
            }
            _ => Ok(()),
        }
    }

    /// The folder for something that is made from `inputs`, and so is made again when they change.
    ///
    /// `make` fills it; a folder that was left half filled is thrown away.
    fn folder(
        &self,
        name: &str,
        inputs: &[&[u8]],
        make: impl FnOnce(&Path) -> anyhow::Result<()>,
    ) -> anyhow::Result<PathBuf> {
        let folder = self.path(name, inputs);
        let complete = folder.join(".complete");
        if complete.exists() {
            return Ok(folder);
        }
        if folder.exists() {
            std::fs::remove_dir_all(&folder).with_context(|| format!("remove {}", folder.display()))?;
        }
        std::fs::create_dir(&folder).with_context(|| format!("create {}", folder.display()))?;
        make(&folder)?;
        File::create(&complete).with_context(|| format!("create {}", complete.display()))?;
        Ok(folder)
    }
}

/// FNV-1a. The standard library's hashers may change with the compiler, and the folders' names with them.
fn fingerprint(inputs: &[&[u8]]) -> u64 {
    let bytes = inputs.iter().flat_map(|input| input.iter().chain(&[0xff]));
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

/// The one line that says what is being installed.
fn announce(what: &str) {
    eprintln!("installing {what}");
}

/// Looks where root's programs are, too: `PATH` of a user's shell leaves those folders out.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from));
    folders.map(|folder| folder.join(program)).find(|candidate| candidate.is_file())
}

/// Runs a program that has nothing to say unless it fails.
pub(crate) fn quietly(command: &mut Command) -> anyhow::Result<()> {
    let line = describe(command);
    let output = command.output().with_context(|| format!("cannot run `{line}`"))?;
    if output.status.success() {
        return Ok(());
    }
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    // The reason is at the end.
    let lines: Vec<&str> = text.trim_end().lines().collect();
    let tail = lines[lines.len().saturating_sub(20)..].join("\n");
    bail!("`{line}` failed ({}):\n{tail}", output.status);
}

/// What a program prints, if there is such a program and it succeeds.
pub(crate) fn ask(program: impl AsRef<OsStr>, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The command as one would type it.
pub(crate) fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fingerprint_tells_inputs_and_their_borders_apart() {
        assert_eq!(fingerprint(&[b"a", b"b"]), fingerprint(&[b"a", b"b"]));
        assert_ne!(fingerprint(&[b"a", b"b"]), fingerprint(&[b"ab"]));
        assert_ne!(fingerprint(&[b"a", b"b"]), fingerprint(&[b"b", b"a"]));
    }

    #[test]
    fn a_failing_program_is_quoted() {
        let error = quietly(Command::new("sh").args(["-c", "echo why >&2; exit 7"])).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("exit status: 7") && text.ends_with("why"), "{text}");
        assert!(ask("sh", &["-c", "exit 1"]).is_none());
        assert!(find("sh").is_some());
    }
}
