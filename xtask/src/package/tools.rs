//! What programs of others make: the packages, from what `metadata-proxy/Cargo.toml` says of them, and the list of parts.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context as _;
use serde_json::Value;

use super::{VERSION, elf::Needs, stage::read};
use crate::{cargo, forget_ourselves, install, install::quietly, target::Target};

const PACKAGE: &str = "metadata-proxy";
const PARTS: &str = "metadata-proxy-parts";

pub(super) fn deb(output: &Path, target: Target, time: u64) -> anyhow::Result<PathBuf> {
    let file = output.join(format!("{PACKAGE}_{VERSION}-1_{}.deb", target.debian));
    let mut make = tool(&install::cargo_deb()?, time);
    make.args(["--quiet", "--no-build", "--no-strip", "--locked", "--package", PACKAGE, "--target", target.triple]);
    quietly(make.arg("--output").arg(&file))?;
    Ok(file)
}

pub(super) fn rpm(output: &Path, target: Target, needs: &Needs, time: u64) -> anyhow::Result<PathBuf> {
    let file = output.join(format!("{PACKAGE}-{VERSION}-1.{}.rpm", target.machine));
    let mut make = tool(&install::cargo_generate_rpm()?, time);
    make.args(["--package", PACKAGE, "--target", target.triple, "--set-metadata", &requires(needs)]);
    quietly(make.arg("--output").arg(&file))?;
    Ok(file)
}

/// By libraries and versions of their symbols, as rpmbuild does: these names are the same in every distribution.
fn requires(needs: &Needs) -> String {
    let libraries = needs.libraries.iter().map(|library| format!("{library}()(64bit)"));
    let versions = needs.versions.iter().map(|(library, version)| format!("{library}({version})(64bit)"));
    let names: Vec<String> = libraries.chain(versions).map(|name| format!("\"{name}\" = \"*\"")).collect();
    format!("requires = {{ {} }}", names.join(", "))
}

/// All crates that have gone into the daemon, with their versions and licences (CycloneDX).
pub(super) fn parts(target: Target, time: u64) -> anyhow::Result<Vec<u8>> {
    let mut make = tool(&install::cargo_cyclonedx()?, time);
    make.args(["cyclonedx", "--quiet", "--format", "json", "--spec-version", "1.5", "--target", target.triple]);
    quietly(make.args(["--override-filename", PARTS]))?;
    // It writes one for each crate of the workspace, beside its manifest.
    let mut parts = None;
    for (name, folder) in crates()? {
        let file = folder.join(format!("{PARTS}.json"));
        if name == PACKAGE {
            parts = Some(read(&file)?);
        }
        fs::remove_file(&file).with_context(|| format!("remove {}", file.display()))?;
    }
    parts.with_context(|| format!("the workspace has no crate {PACKAGE}"))
}

/// The crates of the workspace and their folders.
fn crates() -> anyhow::Result<Vec<(String, PathBuf)>> {
    let output = cargo().args(["metadata", "--no-deps", "--locked", "--format-version", "1"]).output();
    let output = output.context("cannot run cargo metadata")?;
    let metadata: Value = serde_json::from_slice(&output.stdout).context("read what cargo metadata says")?;
    let crates = metadata["packages"].as_array().context("cargo metadata names no crates")?.iter();
    let found = crates.map(|found| {
        let folder = Path::new(found["manifest_path"].as_str()?).parent()?;
        Some((found["name"].as_str()?.to_owned(), folder.to_owned()))
    });
    found.collect::<Option<_>>().context("cargo metadata names a crate without name or folder")
}

/// Which all know this variable for the time of what they make.
fn tool(program: &Path, time: u64) -> Command {
    let mut command = Command::new(program);
    command.env("SOURCE_DATE_EPOCH", time.to_string());
    forget_ourselves(&mut command);
    command
}
