//! The two ways to compile for BPF, and the linker.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};

use super::{Cache, announce, apt, ask, find, quietly};

/// The bitcode of newer ones cannot be read by the linker; that of older ones can.
const LLVM: u32 = 22;
const LINKER_VERSION: &str = "0.13.0";
const LINKER_PACKAGES: [&str; 5] = ["llvm-22-dev", "libpolly-22-dev", "zlib1g-dev", "libzstd-dev", "libxml2-dev"];

/// Debian's toolchain, by full paths: it must not be confused with what rustup put into `PATH`.
const CARGO: &str = "/usr/bin/cargo";
pub(super) const RUSTC: &str = "/usr/bin/rustc";
const PACKAGES: [&str; 3] = ["rustc-web", "cargo-web", "libstd-rust-web-dev-bpf"];

/// What compiles for `bpfel-unknown-none`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Toolchain {
    /// rustup's nightly, which compiles `core` for BPF from rust-src.
    BuildStd,
    /// Debian's, which has a compiled `core` for BPF.
    Prebuilt,
}

impl Toolchain {
    /// Its cargo, to be given a subcommand; nothing of the toolchain that runs the xtask reaches it.
    pub(crate) fn cargo(self) -> Command {
        let mut command = match self {
            Self::BuildStd => {
                let mut command = Command::new("rustup");
                command.args(["run", "nightly", "cargo", "-Zbuild-std=core"]);
                command
            }
            Self::Prebuilt => {
                let mut command = Command::new(CARGO);
                // aya-ebpf uses one unstable feature.
                command.env("RUSTC", RUSTC).env("RUSTC_BOOTSTRAP", "1");
                command
            }
        };
        // What `cargo run` and rustup have set for the xtask; the last would be put before the
        // libraries of the other compiler.
        for variable in ["CARGO", "RUSTUP_TOOLCHAIN", "RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "LD_LIBRARY_PATH"] {
            command.env_remove(variable);
        }
        if self == Self::BuildStd {
            command.env_remove("RUSTC");
        }
        command
    }
}

/// Takes rustup's nightly if it can build `core`, else Debian's toolchain, which it installs.
pub(crate) fn bpf_toolchain() -> anyhow::Result<Toolchain> {
    if nightly_has_source() && nightly_suits_linker() {
        return Ok(Toolchain::BuildStd);
    }
    if !has_prebuilt_core() {
        apt::install("a Rust toolchain for BPF", &PACKAGES, apt::Removal::Never).context(
            "nothing here compiles for BPF; with rustup there is another way: \
             rustup toolchain install nightly --component rust-src",
        )?;
    }
    if !has_prebuilt_core() {
        bail!("{RUSTC} has no core for BPF although {} are installed; reinstall them", PACKAGES.join(", "));
    }
    Ok(Toolchain::Prebuilt)
}

fn nightly_has_source() -> bool {
    let arguments = ["component", "list", "--toolchain", "nightly", "--installed"];
    let components = ask("rustup", &arguments).unwrap_or_default();
    components.lines().any(|component| component.starts_with("rust-src"))
}

fn nightly_suits_linker() -> bool {
    let version = ask("rustup", &["run", "nightly", "rustc", "--version", "--verbose"]);
    version.as_deref().and_then(llvm_version).is_some_and(|llvm| llvm <= LLVM)
}

/// `LLVM version: 22.1.4` -> 22
fn llvm_version(verbose_version: &str) -> Option<u32> {
    let version = verbose_version.lines().find_map(|line| line.strip_prefix("LLVM version: "))?;
    version.split('.').next()?.parse().ok()
}

/// Asks the compiler where it would look, because only some of Debian's can be asked for this target at all.
fn has_prebuilt_core() -> bool {
    let libraries = ask(RUSTC, &["--print", "target-libdir", "--target", "bpfel-unknown-none"]).unwrap_or_default();
    let Ok(entries) = Path::new(libraries.trim()).read_dir() else {
        return false;
    };
    let core = entries.flatten().any(|entry| entry.file_name().to_string_lossy().starts_with("libcore-"));
    core && Path::new(CARGO).exists()
}

/// The bpf-linker, compiled against Debian's LLVM where it is not in the cache yet: a minute or two.
pub(crate) fn bpf_linker() -> anyhow::Result<PathBuf> {
    let cache = Cache::open()?;
    let root = cache.root.join(format!("bpf-linker-{LINKER_VERSION}-llvm-{LLVM}"));
    let linker = root.join("bin/bpf-linker");
    // The cache may have outlived the LLVM that the linker loads.
    if ask(&linker, &["--version"]).is_some() {
        return Ok(linker);
    }
    apt::install("LLVM for the BPF linker", &LINKER_PACKAGES, apt::Removal::Never)?;
    if ask(&linker, &["--version"]).is_some() {
        return Ok(linker);
    }
    announce(&format!("bpf-linker {LINKER_VERSION}, which is compiled for a minute or two"));
    let cargo =
        std::env::var_os("CARGO").map(PathBuf::from).or_else(|| find("cargo")).context("cargo is not in PATH")?;
    let mut install = Command::new(cargo);
    install.args(["install", "bpf-linker", "--version", LINKER_VERSION, "--locked", "--force"]);
    install.args(["--no-default-features", "--features", &format!("llvm-{LLVM}"), "--root"]).arg(&root);
    install.env("LLVM_PREFIX", format!("/usr/lib/llvm-{LLVM}")).env_remove("CARGO_TARGET_DIR");
    quietly(&mut install)?;
    if ask(&linker, &["--version"]).is_none() {
        bail!("{} was installed but does not run", linker.display());
    }
    Ok(linker)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_llvm_of_a_compiler_is_read() {
        assert_eq!(llvm_version("rustc 1.96.0\nhost: x\nLLVM version: 22.1.4\n"), Some(22));
        assert_eq!(llvm_version("rustc 1.96.0\n"), None);
    }
}
