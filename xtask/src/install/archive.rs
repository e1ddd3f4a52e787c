//! Debian's package archive for other releases than this machine's, through an apt of its own: sources
//! and lists lie in the cache, and the system's apt never hears of them.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};

use super::{apt, ask, find, quietly};

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The packages of some releases.
pub(super) struct Archive {
    root: PathBuf,
    /// The machine's packages count as installed.
    on_system: bool,
}

impl Archive {
    /// Fetches the lists of these releases, by their names or `testing`, into `root`.
    pub(super) fn open(root: &Path, releases: &[&str], on_system: bool) -> anyhow::Result<Self> {
        if find("apt-get").is_none() {
            bail!("there is no apt-get here: packages of Debian are fetched on Debian only");
        }
        let mirror = mirror()?;
        // Ordered, so that apt can make the last folder of each.
        for folder in ["lists/partial", "archives/partial"] {
            let folder = root.join(folder);
            fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
        }
        // Without the keyring apt looks for keys where the system's are.
        let key = if Path::new(KEYRING).exists() { format!("[signed-by={KEYRING}] ") } else { String::new() };
        let sources: String = releases.iter().map(|release| format!("deb {key}{mirror} {release} main\n")).collect();
        let file = root.join("sources.list");
        fs::write(&file, sources).with_context(|| format!("write {}", file.display()))?;
        let archive = Self { root: root.to_owned(), on_system };
        quietly(archive.apt("apt-get").args(["--quiet", "update"]))?;
        Ok(archive)
    }

    fn apt(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let mut option = |name: &str, value: &str| {
            command.arg("-o").arg(format!("{name}={value}"));
        };
        for (name, path) in [
            ("Dir::State::lists", "lists"),
            ("Dir::Cache::archives", "archives"),
            ("Dir::Cache::pkgcache", "pkgcache.bin"),
            ("Dir::Cache::srcpkgcache", "srcpkgcache.bin"),
            ("Dir::Etc::sourcelist", "sources.list"),
        ] {
            option(name, &self.root.join(path).to_string_lossy());
        }
        option("Dir::Etc::sourceparts", "-");
        option("Dir::Etc::preferencesparts", "-");
        option("Acquire::Languages", "none");
        // The cache belongs to whoever runs this, and apt's own user cannot write there.
        option("APT::Sandbox::User", "root");
        if !self.on_system {
            option("Dir::State::status", "/dev/null");
        }
        command
    }

    /// What a package depends on.
    pub(super) fn dependencies(&self, package: &str) -> anyhow::Result<Vec<String>> {
        let output = self.apt("apt-cache").args(["depends", package]).output().context("cannot run apt-cache")?;
        if !output.status.success() {
            bail!("the archive has no package {package}");
        }
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(text.lines().filter_map(|line| line.trim().strip_prefix("Depends: ")).map(str::to_owned).collect())
    }

    /// Unpacks packages into a folder; none of their scripts runs.
    pub(super) fn unpack(&self, packages: &[String], into: &Path) -> anyhow::Result<()> {
        let folder = into.join("packages");
        fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
        quietly(self.apt("apt-get").args(["--quiet", "download"]).args(packages).current_dir(&folder))?;
        for package in fs::read_dir(&folder)? {
            quietly(Command::new("dpkg-deb").arg("--extract").arg(package?.path()).arg(into))?;
        }
        fs::remove_dir_all(&folder).with_context(|| format!("remove {}", folder.display()))
    }

    /// Unpacks packages and all that they depend on into a folder, so that it is a root of its own: with links where
    /// Debian has merged the root into `/usr`. Tells what each package's file was called, which has its version.
    pub(super) fn unpack_whole(&self, packages: &[&str], into: &Path) -> anyhow::Result<Vec<String>> {
        for merged in ["bin", "lib", "lib64", "sbin"] {
            fs::create_dir_all(into.join("usr").join(merged)).context("create a root's folders")?;
            symlink(Path::new("usr").join(merged), into.join(merged)).context("create a root's links")?;
        }
        let mut fetch = self.apt("apt-get");
        fetch.args(["--quiet", "install", "--yes", "--no-install-recommends", "--download-only"]).args(packages);
        quietly(&mut fetch)?;
        let mut names = Vec::new();
        let extract = r#"dpkg-deb --fsys-tarfile "$1" | tar --extract --keep-directory-symlink --directory "$2""#;
        for package in fs::read_dir(self.root.join("archives"))? {
            let package = package?.path();
            if package.extension().is_some_and(|extension| extension == "deb") {
                quietly(Command::new("sh").args(["-c", extract, "sh"]).arg(&package).arg(into))?;
                names.extend(package.file_name().map(|name| name.to_string_lossy().into_owned()));
            }
        }
        Ok(names)
    }

    /// Forgets the packages' files that were fetched.
    pub(super) fn clear(&self) -> anyhow::Result<()> {
        quietly(self.apt("apt-get").arg("clean"))
    }

    /// Installs packages of one of the releases into this machine, where nothing has to go for them.
    pub(super) fn install(&self, release: &str, packages: &[&str]) -> anyhow::Result<()> {
        let mut install = self.apt("apt-get");
        install.args(["--quiet", "-o", "DPkg::Lock::Timeout=300", "install", "--yes", "--no-install-recommends"]);
        install.args(["--no-remove", "--target-release", release]).args(packages);
        quietly(install.env("DEBIAN_FRONTEND", "noninteractive"))
    }
}

/// Where this machine's apt gets Debian from: what serves its own release serves the others.
pub(super) fn mirror() -> anyhow::Result<String> {
    let look = || {
        let targets = ask("apt-get", &["indextargets", "--format", "$(LABEL) $(REPO_URI)", "Created-By: Packages"])?;
        debian(&targets).map(str::to_owned)
    };
    if let Some(mirror) = look() {
        return Ok(mirror);
    }
    // Labels are known from the lists only.
    apt::update().context("the machine's package lists are missing")?;
    look().context("no source of this machine's apt is Debian's main archive; add one, or run this on Debian")
}

fn debian(targets: &str) -> Option<&str> {
    targets.lines().find_map(|line| line.strip_prefix("Debian "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_main_archive_is_told_from_the_others() {
        let targets = "Debian-Security https://x.test/debian-security/\nDebian https://x.test/debian/\n";
        assert_eq!(debian(targets), Some("https://x.test/debian/"));
        assert_eq!(debian("nodesource https://x.test/node\n"), None);
    }
}
