//! Debian's package archive for other releases or processors than this machine's, through an apt of its own:
//! sources and lists lie in the cache, and the system's apt never hears of them.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail, ensure};

use super::{apt, ask, find, quietly};

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The packages of some releases.
pub(super) struct Archive {
    root: PathBuf,
    /// The machine's packages count as installed.
    on_system: bool,
    /// Of the packages; none if it is the machine's.
    architecture: Option<&'static str>,
}

impl Archive {
    /// Fetches the lists of these releases, by their names or `testing`, into `root`.
    pub(super) fn open(root: &Path, releases: &[&str], on_system: bool) -> anyhow::Result<Self> {
        let all = sources()?;
        let main = all.iter().find(|source| source.label == MAIN);
        let main = main.context(NO_DEBIAN)?;
        // What serves the machine's own release serves the others.
        let sources = releases.iter().map(|release| Source { release: (*release).to_owned(), ..main.clone() });
        Self::fetch(Self { root: root.to_owned(), on_system, architecture: None }, sources.collect())
    }

    /// The packages of this machine's own release for any architecture, with the updates that the machine itself gets.
    pub(super) fn of_machine(root: &Path, architecture: &'static str) -> anyhow::Result<Self> {
        let archive = Self { root: root.to_owned(), on_system: false, architecture: Some(architecture) };
        Self::fetch(archive, sources()?)
    }

    fn fetch(self, sources: Vec<Source>) -> anyhow::Result<Self> {
        // Ordered, so that apt can make the last folder of each.
        for folder in ["lists/partial", "archives/partial"] {
            let folder = self.root.join(folder);
            fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
        }
        // Without the keyring apt looks for keys where the system's are.
        let key = if Path::new(KEYRING).exists() { format!("[signed-by={KEYRING}] ") } else { String::new() };
        let line = |source: Source| format!("deb {key}{} {} main\n", source.mirror, source.release);
        let file = self.root.join("sources.list");
        let sources: String = sources.into_iter().map(line).collect();
        fs::write(&file, sources).with_context(|| format!("write {}", file.display()))?;
        quietly(self.apt("apt-get").args(["--quiet", "update"]))?;
        Ok(self)
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
        if let Some(architecture) = self.architecture {
            option("APT::Architecture", architecture);
            option("APT::Architectures", architecture);
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

/// Where this machine's apt gets packages of Debian from.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Source {
    label: String,
    mirror: String,
    release: String,
}

const MAIN: &str = "Debian";
const SECURITY: &str = "Debian-Security";
const NO_DEBIAN: &str = "no source of this machine's apt is Debian's main archive; add one, or run this on Debian";

/// The mirror of Debian's main archive, which serves other releases than the machine's own, too.
pub(super) fn mirror() -> anyhow::Result<String> {
    let main = sources()?.into_iter().find(|source| source.label == MAIN);
    main.map(|source| source.mirror).context(NO_DEBIAN)
}

fn sources() -> anyhow::Result<Vec<Source>> {
    if find("apt-get").is_none() {
        bail!("there is no apt-get here: packages of Debian are fetched on Debian only");
    }
    let format = "$(LABEL)\t$(REPO_URI)\t$(RELEASE)\t$(COMPONENT)";
    let look = || ask("apt-get", &["indextargets", "--format", format, "Created-By: Packages"]).unwrap_or_default();
    let mut sources = debian(&look());
    if sources.is_empty() {
        // Labels are known from the lists only.
        apt::update().context("the machine's package lists are missing")?;
        sources = debian(&look());
    }
    ensure!(!sources.is_empty(), NO_DEBIAN);
    Ok(sources)
}

fn debian(targets: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    for target in targets.lines() {
        if let [label @ (MAIN | SECURITY), mirror, release, "main"] = target.split('\t').collect::<Vec<_>>()[..] {
            let source = Source { label: label.to_owned(), mirror: mirror.to_owned(), release: release.to_owned() };
            // A machine of several architectures names each source for each of them.
            if !sources.contains(&source) {
                sources.push(source);
            }
        }
    }
    sources
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debians_own_sources_are_told_from_the_others() {
        let targets = [
            "nodesource\thttps://x.test/node\tnodistro\tmain",
            "Debian-Security\thttps://x.test/debian-security/\tbookworm-security\tmain",
            "Debian\thttps://x.test/debian/\tbookworm\tmain",
            "Debian\thttps://x.test/debian/\tbookworm\tmain",
            "Debian\thttps://x.test/debian/\tbookworm\tcontrib",
            "Debian Backports\thttps://x.test/debian/\tbookworm-backports\tmain",
        ];
        let source = |label: &str, mirror: &str, release: &str| Source {
            label: label.into(),
            mirror: mirror.into(),
            release: release.into(),
        };
        let expected = [
            source(SECURITY, "https://x.test/debian-security/", "bookworm-security"),
            source(MAIN, "https://x.test/debian/", "bookworm"),
        ];
        assert_eq!(debian(&targets.join("\n")), expected);
        assert_eq!(debian("nodesource\thttps://x.test/node\tnodistro\tmain\n"), []);
    }
}
