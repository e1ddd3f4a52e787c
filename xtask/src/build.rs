//! Building: the BPF object first, because the daemon carries it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail};

use crate::{cargo, install, run, target::Target, workspace};

pub(crate) const BPF_TARGET: &str = "bpfel-unknown-none";

/// Compiles the BPF programs; the object lies where the daemon's build script looks for it.
pub(crate) fn ebpf() -> anyhow::Result<PathBuf> {
    let toolchain = install::bpf_toolchain()?;
    let linker = install::bpf_linker()?;
    let target = workspace()?.join("target/bpf");
    // debuginfo, for the kernel is told the maps' types by what is derived from it.
    let flags = [format!("-Clinker={}", linker.display()), "-Cdebuginfo=2".into(), "-Clink-arg=--btf".into()];
    let mut build = toolchain.cargo();
    build
        .args(["build", "--quiet", "--release", "--locked", "--target", BPF_TARGET, "--target-dir"])
        .arg(&target)
        .current_dir("metadata-proxy-ebpf")
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    run(&mut build)?;

    let object = target.join("metadata-proxy.o");
    let built =
        fs::read(target.join(BPF_TARGET).join("release/metadata-proxy")).context("the linker left no object")?;
    // Left alone when it is the same, lest the daemon be built again.
    if fs::read(&object).ok().as_ref() != Some(&built) {
        fs::write(&object, built).with_context(|| format!("cannot write {}", object.display()))?;
    }
    Ok(object)
}

/// Compiles the daemon around the BPF object.
pub(crate) fn daemon(release: bool) -> anyhow::Result<PathBuf> {
    ebpf()?;
    install::c_toolchain()?;
    run(&mut build(release))?;
    binary(profile(release), "metadata-proxy")
}

/// As [`daemon`], for any processor. The BPF object is the same for all of them.
pub(crate) fn daemon_for(target: Target, release: bool) -> anyhow::Result<PathBuf> {
    if target.is_native() {
        return daemon(release);
    }
    ebpf()?;
    install::c_toolchain()?;
    cross(build(release), target, profile(release), "metadata-proxy")
}

/// The stand-ins that run beside whole hosts, for any processor.
pub(crate) fn cloud_for(target: Target) -> anyhow::Result<PathBuf> {
    let mut build = cargo();
    build.args(["build", "--quiet", "--package", "metadata-proxy-tests", "--bin", "cloud"]);
    install::c_toolchain()?;
    if target.is_native() {
        run(&mut build)?;
        return binary(profile(false), "cloud");
    }
    cross(build, target, profile(false), "cloud")
}

fn cross(mut build: Command, target: Target, profile: &str, name: &str) -> anyhow::Result<PathBuf> {
    let compiler = install::cross_compiler(target)?;
    build.args(["--target", target.triple]);
    compiler.apply(&mut build);
    run(&mut build)?;
    binary(&format!("{}/{profile}", target.triple), name)
}

/// A copy of a program without debugging information.
pub(crate) fn strip(target: Target, program: &Path, slim: &Path) -> anyhow::Result<()> {
    let strip = if target.is_native() { "strip".to_owned() } else { format!("{}-strip", target.gnu) };
    install::quietly(Command::new(strip).arg("--strip-debug").arg("-o").arg(slim).arg(program))
}

fn build(release: bool) -> Command {
    let mut build = cargo();
    build.args(["build", "--quiet", "--package", "metadata-proxy"]).args(release.then_some("--release"));
    build
}

fn profile(release: bool) -> &'static str {
    if release { "release" } else { "debug" }
}

/// A program that cargo has built; `profile` is a folder of its target folder.
pub(crate) fn binary(profile: &str, name: &str) -> anyhow::Result<PathBuf> {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| Path::new("target").to_owned(), PathBuf::from);
    let path = workspace()?.join(target).join(profile).join(name);
    if !path.is_file() {
        bail!("cargo built no {}", path.display());
    }
    Ok(path)
}
