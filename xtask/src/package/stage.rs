//! The files that every package brings, where they belong on a host.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

use anyhow::{Context as _, ensure};

use super::{archive::gzip, licences};
use crate::{cargo, run, target::Target};

pub(super) const BINARY: &str = "usr/bin/metadata-proxy";
pub(super) const DOCUMENTS: &str = "usr/share/doc/metadata-proxy/";

const UNITS: [&str; 2] = ["metadata-proxy.service", "metadata-proxy-attach.service"];
/// For the engine's unit, which systemd reads beside it.
const DROP_IN: &str = "docker.service.d/metadata-proxy.conf";
const TEXTS: [&str; 5] = ["LICENSE-APACHE", "LICENSE-MIT", "README.md", "CHANGELOG.md", "SECURITY.md"];
const CONFIGURATION: &str = "etc/metadata-proxy/config.toml";
const COMPLETIONS: [(&str, &str); 3] = [
    ("metadata-proxy.bash", "usr/share/bash-completion/completions/metadata-proxy"),
    ("metadata-proxy.fish", "usr/share/fish/vendor_completions.d/metadata-proxy.fish"),
    ("_metadata-proxy", "usr/share/zsh/site-functions/_metadata-proxy"),
];

pub(super) struct File {
    /// Below the root.
    pub(super) path: String,
    pub(super) mode: u32,
    pub(super) content: Vec<u8>,
}

/// All of them; the manual is made in the folder `manual`, by the daemon's own command line.
pub(super) fn files(daemon: &Path, target: Target, manual: &Path) -> anyhow::Result<Vec<File>> {
    make_empty(manual)?;
    run(cargo().args(["run", "--quiet", "--package", "metadata-proxy", "--example", "manual", "--"]).arg(manual))?;
    let mut files = Vec::new();
    let mut add = |path: String, mode, content| files.push(File { path, mode, content });
    add(BINARY.into(), 0o755, read(daemon)?);
    for name in UNITS {
        let text = fs::read_to_string(Path::new("examples").join(name)).with_context(|| format!("read {name}"))?;
        add(format!("usr/lib/systemd/system/{name}"), 0o644, unit(name, &text)?.into_bytes());
    }
    let text = fs::read_to_string(Path::new("examples").join(DROP_IN)).with_context(|| format!("read {DROP_IN}"))?;
    add(format!("usr/lib/systemd/system/{DROP_IN}"), 0o644, packaged(DROP_IN, &text).into_bytes());
    // Roles and session policies are nobody else's business.
    add(CONFIGURATION.into(), 0o600, read(Path::new("examples/config.toml"))?);
    for (name, path) in COMPLETIONS {
        add(path.into(), 0o644, read(&manual.join(name))?);
    }
    for entry in fs::read_dir(manual).with_context(|| format!("read {}", manual.display()))? {
        let page = entry?.path();
        if page.extension().is_some_and(|section| section == "8") {
            let name = page.file_name().unwrap_or_default().display();
            add(format!("usr/share/man/man8/{name}.gz"), 0o644, gzip(&read(&page)?)?);
        }
    }
    for name in TEXTS {
        add(format!("{DOCUMENTS}{name}"), 0o644, read(Path::new(name))?);
    }
    add(format!("{DOCUMENTS}THIRD-PARTY"), 0o644, licences::text(target.triple)?.into_bytes());
    files.sort_by(|one, other| one.path.cmp(&other.path));
    Ok(files)
}

/// Writes them below a folder, from which others make packages of them.
pub(super) fn lay_out(files: &[File], root: &Path) -> anyhow::Result<()> {
    make_empty(root)?;
    for file in files {
        let path = root.join(&file.path);
        let folder = path.parent().unwrap_or(root);
        fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
        fs::write(&path, &file.content).with_context(|| format!("write {}", path.display()))?;
        let mode = fs::Permissions::from_mode(file.mode);
        fs::set_permissions(&path, mode).with_context(|| format!("set the mode of {}", path.display()))?;
    }
    Ok(())
}

/// As a package has it: the example is for a binary that somebody has put into /usr/local, without a configuration file.
fn unit(name: &str, example: &str) -> anyhow::Result<String> {
    const VARIABLE: &str = "Environment=METADATA_PROXY_CONFIG=";
    let text = packaged(name, example).replace(&format!("\n#{VARIABLE}"), &format!("\n{VARIABLE}"));
    let has = |start: &str| text.lines().any(|line| line.starts_with(start));
    ensure!(
        has(&format!("ExecStart=/{BINARY} ")),
        "examples/{name} starts no /{BINARY}: adapt xtask/src/package/stage.rs"
    );
    ensure!(
        has(&format!("{VARIABLE}/{CONFIGURATION}")),
        "examples/{name} does not read /{CONFIGURATION}, not even in a comment: adapt xtask/src/package/stage.rs"
    );
    Ok(text)
}

fn packaged(name: &str, example: &str) -> String {
    let text = example.strip_prefix(&format!("# /etc/systemd/system/{name}\n")).unwrap_or(example).trim_start();
    text.replace("/usr/local/bin/", "/usr/bin/")
}

/// A folder with nothing of an earlier run in it.
pub(super) fn make_empty(folder: &Path) -> anyhow::Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| format!("remove {}", folder.display()))?;
    }
    fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))
}

pub(super) fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("read {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_examples_become_units_of_a_package() {
        let service = unit(UNITS[0], include_str!("../../../examples/metadata-proxy.service")).unwrap();
        assert!(service.starts_with("[Unit]\n"), "{service}");
        assert!(!service.contains("/usr/local"), "{service}");
        unit(UNITS[1], include_str!("../../../examples/metadata-proxy-attach.service")).unwrap();
    }

    #[test]
    fn an_example_that_fits_no_package_is_an_error() {
        assert!(unit(UNITS[0], "[Service]\nExecStart=/opt/metadata-proxy run\n").is_err());
        assert!(unit(UNITS[0], "[Service]\nExecStart=/usr/local/bin/metadata-proxy run\n").is_err());
    }
}
