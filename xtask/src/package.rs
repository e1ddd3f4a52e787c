//! `cargo xtask package`: what is handed out, in `target/package`. Debian's and Red Hat's packages, an archive for other
//! systems, a container image, lists of what has gone into the daemon and its BPF programs, and the sums of all these.
//!
//! Made twice of one commit they are the same: their files are of the time of the commit, or of `SOURCE_DATE_EPOCH`.
#![expect(clippy::print_stdout, reason = "the table is its standard output")]

mod archive;
mod elf;
mod image;
mod licences;
mod stage;
mod tools;

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, ensure};
use sha2::{Digest as _, Sha256};

use self::{archive::Archive, elf::Needs};
use crate::{build, install::ask, target::Target, workspace};

const VERSION: &str = env!("CARGO_PKG_VERSION");
const SUMS: &str = "SHA256SUMS";

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Which processor: x86_64-unknown-linux-gnu or aarch64-unknown-linux-gnu [default: this machine's]
    #[arg(long, value_name = "TRIPLE", value_parser = Target::named)]
    target: Option<Target>,
}

pub(crate) fn all(options: &Options) -> anyhow::Result<()> {
    for_target(options.target.map_or_else(Target::native, Ok)?)
}

/// Debian's package alone, of the daemon as the tests have it: made in seconds where they have run, to be tried and not to be
/// handed out.
pub(crate) fn unoptimised(target: Target) -> anyhow::Result<PathBuf> {
    let daemon = build::daemon_for(target, false)?;
    let output = workspace()?.join("target/unoptimised");
    stage::make_empty(&output)?;
    // Most of the file is debugging information.
    let slim = output.join("metadata-proxy");
    build::strip(target, &daemon, &slim)?;
    let files = stage::files(&slim, target, &workspace()?.join("target/manual"))?;
    stage::lay_out(&files, &workspace()?.join("target/stage"))?;
    tools::deb(&output, target, time()?)
}

pub(crate) fn for_target(target: Target) -> anyhow::Result<()> {
    let daemon = build::daemon_for(target, true)?;
    let needs = Needs::of(&daemon)?;
    ensure!(needs.machine == target.machine, "{} is for {}, not {}", daemon.display(), needs.machine, target.machine);
    let glibc = needs.check()?;
    let time = time()?;
    let output = workspace()?.join("target/package");
    fs::create_dir_all(&output).with_context(|| format!("create {}", output.display()))?;

    let files = stage::files(&daemon, target, &workspace()?.join("target/manual"))?;
    stage::lay_out(&files, &workspace()?.join("target/stage"))?;
    let write = |name: String, content: &[u8]| {
        let path = output.join(name);
        fs::write(&path, content).with_context(|| format!("write {}", path.display())).map(|()| path)
    };
    let stem = format!("metadata-proxy-{VERSION}-{}", target.machine);
    let crates = tools::parts("metadata-proxy", target.triple, time)?;
    let bpf_crates = tools::parts("metadata-proxy-ebpf", build::BPF_TARGET, time)?;
    let made = [
        tools::deb(&output, target, time)?,
        tools::rpm(&output, target, &needs, time)?,
        write(format!("{stem}.tar.gz"), &plain(&files, &stem, time)?)?,
        write(format!("{stem}.image.tar"), &image::make(&files, &needs, target, time)?)?,
        write(format!("{stem}.cdx.json"), crates.as_bytes())?,
        // Of the same programs for all processors.
        write(format!("metadata-proxy-ebpf-{VERSION}.cdx.json"), bpf_crates.as_bytes())?,
    ];
    write_sums(&output)?;

    println!("{:<48} {:>9}  {:<12} processor", "file", "size", "needs glibc");
    for file in &made {
        let size = fs::metadata(file).with_context(|| format!("look at {}", file.display()))?.len();
        let name = file.file_name().unwrap_or_default().display();
        println!("{name:<48} {:>6} kB  {:<12} {}", size / 1000, needs_by(file, glibc), target.machine);
    }
    println!("They are in {}, with their sums in {SUMS}.", output.display());
    Ok(())
}

/// An image brings its own, and a list is no program.
fn needs_by(file: &Path, glibc: elf::Glibc) -> String {
    match file.extension().and_then(|ending| ending.to_str()) {
        Some("tar") => "its own".into(),
        Some("json") => "-".into(),
        _ => glibc.to_string(),
    }
}

/// Seconds since 1970.
fn time() -> anyhow::Result<u64> {
    const VARIABLE: &str = "SOURCE_DATE_EPOCH";
    let given = env::var(VARIABLE).ok().or_else(|| ask("git", &["log", "-1", "--format=%ct"]));
    let given =
        given.with_context(|| format!("no git tells the time of the commit: set {VARIABLE}, seconds since 1970"))?;
    given.trim().parse().with_context(|| format!("{VARIABLE} is no number of seconds: {given:?}"))
}

/// For systems with other packages: to be unpacked at `/` without its first folder.
fn plain(files: &[stage::File], stem: &str, time: u64) -> anyhow::Result<Vec<u8>> {
    let mut archive = Archive::new(time);
    for file in files {
        archive.file(&format!("{stem}/{}", file.path), file.mode, &file.content)?;
    }
    archive::gzip(&archive.finish()?)
}

/// Of everything of this version, whichever processor it is for; `sha256sum --check` reads it.
fn write_sums(folder: &Path) -> anyhow::Result<()> {
    let files = fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))?;
    let mut files = files.map(|entry| Ok(entry?.path())).collect::<anyhow::Result<Vec<PathBuf>>>()?;
    files.sort_unstable();
    let mut sums = String::new();
    for file in files {
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.contains(VERSION) {
            sums += &format!("{}  {name}\n", sum(&stage::read(&file)?));
        }
    }
    fs::write(folder.join(SUMS), sums).with_context(|| format!("write {SUMS}"))
}

fn sum(content: &[u8]) -> String {
    Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_those_of_sha256() {
        assert_eq!(sum(b"abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }

    #[test]
    fn an_image_needs_no_glibc_of_its_host() {
        assert_eq!(needs_by(Path::new("a.image.tar"), elf::OLDEST), "its own");
        assert_eq!(needs_by(Path::new("a.tar.gz"), elf::OLDEST), "2.34");
    }
}
