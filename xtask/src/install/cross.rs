//! The compiler for other processors, all of it Debian's.
//!
//! Its Rust is the one that compiles for BPF. The standard library is a package of the other architecture, which lies in the
//! cache: installing it would make this machine one of both architectures.

use std::{ffi::OsString, fs, path::PathBuf, process::Command};

use anyhow::Context as _;

use super::{Cache, announce, apt, archive::Archive, ask, bpf::RUSTC};
use crate::target::Target;

const RUST: &str = "rustc-web";
const STANDARD_LIBRARY: &str = "libstd-rust-web-dev";

pub(crate) struct CrossCompiler {
    target: Target,
    /// Where the standard library lies.
    sysroot: PathBuf,
}

pub(crate) fn cross_compiler(target: Target) -> anyhow::Result<CrossCompiler> {
    // Names of packages have no underscores.
    let c = format!("gcc-{}", target.gnu.replace('_', "-"));
    let libc = format!("libc6-dev-{}-cross", target.debian);
    apt::install(&format!("a compiler for {}", target.machine), &[RUST, &c, &libc], apt::Removal::Never)?;
    let version = ask("dpkg-query", &["--show", "--showformat=${Version}", RUST]);
    let version = version.with_context(|| format!("{RUST} was installed, but dpkg-query does not know it"))?;
    let package = format!("{STANDARD_LIBRARY}={version}");
    let cache = Cache::open()?;
    let folder = cache.folder(&format!("rust-std-{}", target.debian), &[package.as_bytes()], |folder| {
        announce(&format!("{package} of {}, into the cache only", target.debian));
        let archive = Archive::of_machine(&folder.join("apt"), target.debian)?;
        archive.unpack(std::slice::from_ref(&package), folder)?;
        fs::remove_dir_all(folder.join("apt")).context("remove the lists of packages")
    })?;
    Ok(CrossCompiler { target, sysroot: folder.join("usr") })
}

impl CrossCompiler {
    /// Has cargo compile with it; what runs while compiling stays this machine's.
    pub(crate) fn apply(&self, cargo: &mut Command) {
        // What `cargo run` and rustup have set for the xtask; the last would be put before the libraries of the other compiler.
        for variable in ["RUSTUP_TOOLCHAIN", "RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "LD_LIBRARY_PATH"] {
            cargo.env_remove(variable);
        }
        let mut flags = OsString::from("--sysroot=");
        flags.push(&self.sysroot);
        let name = self.target.triple.replace('-', "_");
        let linker = format!("{}-gcc", self.target.gnu);
        cargo.env("RUSTC", RUSTC).env(format!("CC_{name}"), &linker);
        let name = name.to_uppercase();
        cargo.env(format!("CARGO_TARGET_{name}_LINKER"), linker).env(format!("CARGO_TARGET_{name}_RUSTFLAGS"), flags);
    }
}
