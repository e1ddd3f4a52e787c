//! The AWS clients that the tests run inside containers. The AWS SDK for Rust needs no installing.
//!
//! They run there over a read-only view of this machine's `/usr`, so the interpreters have to be the
//! ones below `/usr`: not pyenv's, not nvm's.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;

use super::{Cache, announce, apt, ask, find, quietly};

const PYTHON: &str = "/usr/bin/python3";
const NODES: [&str; 2] = ["/usr/bin/node", "/usr/local/bin/node"];
/// The oldest that the SDK in `package.json` runs on.
const OLDEST_NODE: u32 = 18;

/// A virtual environment with boto3, the AWS CLI and moto's server.
pub(crate) fn python_clients() -> anyhow::Result<PathBuf> {
    if ask(PYTHON, &["-c", "import ensurepip, venv"]).is_none() {
        apt::install("Python for the AWS clients", &["python3", "python3-venv"], apt::Removal::Never)?;
    }
    let requirements = sources().join("requirements.txt");
    let pins = read(&requirements)?;
    // A virtual environment belongs to one Python.
    let version = ask(PYTHON, &["--version"]).with_context(|| format!("{PYTHON} does not run"))?;
    Cache::open()?.folder("python-clients", &[&pins, version.as_bytes()], |folder| {
        announce("boto3, the AWS CLI and moto");
        quietly(Command::new(PYTHON).args(["-m", "venv"]).arg(folder))?;
        let mut pip = Command::new(folder.join("bin/pip"));
        pip.args(["install", "--quiet", "--disable-pip-version-check", "--requirement"]).arg(&requirements);
        quietly(&mut pip)
    })
}

/// A folder whose `node_modules` has the AWS SDK for JavaScript v3.
pub(crate) fn js_clients() -> anyhow::Result<PathBuf> {
    if !NODES.iter().any(|node| ask(node, &["--version"]).is_some_and(|version| is_new_enough(&version))) {
        apt::install("Node.js for the AWS clients", &["nodejs"], apt::Removal::Never)?;
    }
    let files = ["package.json", "package-lock.json"].map(|name| sources().join(name));
    let [package, lock] = [read(&files[0])?, read(&files[1])?];
    Cache::open()?.folder("js-clients", &[&package, &lock], |folder| {
        // Only to install with, so where it comes from does not matter.
        if find("npm").is_none() {
            apt::install("npm for the AWS clients", &["npm"], apt::Removal::Never)?;
        }
        announce("the AWS SDK for JavaScript");
        for (name, text) in [("package.json", &package), ("package-lock.json", &lock)] {
            std::fs::write(folder.join(name), text)
                .with_context(|| format!("write {name} into {}", folder.display()))?;
        }
        let options = ["ci", "--omit=dev", "--ignore-scripts", "--no-audit", "--no-fund"];
        quietly(Command::new("npm").args(options).current_dir(folder))
    })
}

/// The folder of cloud-init's modules. They are unpacked only: installed, cloud-init would take over this machine at its
/// next start. They run in the environment of [`python_clients`], which has what else they import.
pub(crate) fn cloud_init() -> anyhow::Result<PathBuf> {
    const PACKAGES: [&str; 3] = ["cloud-init", "python3-configobj", "python3-six"];
    let folder = Cache::open()?.folder("cloud-init", &[PACKAGES.concat().as_bytes()], |folder| {
        announce("cloud-init's modules");
        apt::unpack(&PACKAGES, folder)
    })?;
    Ok(folder.join("usr/lib/python3/dist-packages"))
}

pub(super) fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("tests").join("clients")
}

pub(super) fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("read {}", path.display()))
}

/// `v20.20.2`
fn is_new_enough(version: &str) -> bool {
    let major = version.trim().trim_start_matches('v').split('.').next();
    major.and_then(|major| major.parse().ok()).is_some_and(|major: u32| major >= OLDEST_NODE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_node_are_compared_as_numbers() {
        assert!(is_new_enough("v20.20.2\n") && is_new_enough("v18.0.0") && is_new_enough("v100.0.0"));
        assert!(!is_new_enough("v9.11.2") && !is_new_enough("unknown"));
    }
}
