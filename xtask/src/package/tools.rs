//! What programs of others make: the packages, from what `metadata-proxy/Cargo.toml` says of them, and the list of parts.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context as _;
use serde_json::Value;

use super::{VERSION, elf::Needs, stage::read};
use crate::{cargo, forget_ourselves, install, install::quietly, target::Target, workspace};

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

/// All crates that have gone into the one in this folder, with their versions and licences (CycloneDX).
pub(super) fn parts(folder: &str, triple: &str, time: u64) -> anyhow::Result<String> {
    let workspace = workspace()?;
    let folder = workspace.join(folder);
    let mut make = tool(&install::cargo_cyclonedx()?, time);
    make.args(["cyclonedx", "--quiet", "--format", "json", "--spec-version", "1.5", "--target", triple]);
    quietly(make.args(["--override-filename", PARTS]).current_dir(&folder))?;
    let name = format!("{PARTS}.json");
    let parts = read(&folder.join(&name))?;
    // It has written one for each crate of the workspace, beside its manifest.
    for member in crates(&folder)? {
        let file = member.join(&name);
        fs::remove_file(&file).with_context(|| format!("remove {}", file.display()))?;
    }
    // Where the workspace lies is nobody's business, and would make each list another.
    let parts = String::from_utf8(parts).context("read the list of parts")?;
    Ok(parts.replace(&format!("file://{}", workspace.display()), "file://"))
}

/// The folders of the crates of a workspace.
fn crates(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut ask = cargo();
    ask.args(["metadata", "--no-deps", "--locked", "--format-version", "1"]).current_dir(folder);
    let output = ask.output().context("cannot run cargo metadata")?;
    let metadata: Value = serde_json::from_slice(&output.stdout).context("read what cargo metadata says")?;
    let crates = metadata["packages"].as_array().context("cargo metadata names no crates")?.iter();
    let folder = |found: &Value| Some(Path::new(found["manifest_path"].as_str()?).parent()?.to_owned());
    crates.map(folder).collect::<Option<_>>().context("cargo metadata names a crate without a folder")
}

/// Which all know this variable for the time of what they make.
fn tool(program: &Path, time: u64) -> Command {
    let mut command = Command::new(program);
    command.env("SOURCE_DATE_EPOCH", time.to_string());
    forget_ourselves(&mut command);
    command
}
