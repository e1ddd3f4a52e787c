//! Further clients than the tests at large need, each for its row of `cargo xtask clients`.
//!
//! They come with a root file system of Debian's, which containers are started over: it belongs to them and not to this
//! machine, whatever release or Python that has. Nothing of it is installed here.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;

use super::archive::Archive;
use super::clients::{python_clients, read, sources};
use super::{Cache, announce, apt, find, quietly};

const RELEASE: &str = "trixie";
/// The Python of that release.
const PYTHON: &str = "3.13";
const PACKAGES: [&str; 18] = [
    "awscli", // version 2, on Debian's build of the CRT
    "coreutils",
    "curl",
    "dash",
    // So that VM::EC2 can ask an STS of today who it is.
    "libaws-signature4-perl",
    "libfaketime", // shortens the clock where a client will not believe in short-lived credentials
    "libvm-ec2-security-credentialcache-perl",
    "nodejs",
    "openjdk-21-jre-headless",
    "php-async-aws-core",
    "php-cli",
    "php-curl",
    "php-xml",
    "ruby-aws-sdk-core",
    "ruby-fog-aws",
    "s3cmd",
    "sed",
    "python3",
];
const GO_PACKAGES: [&str; 4] = [
    "golang-github-aws-aws-sdk-go-dev",
    "golang-github-aws-aws-sdk-go-v2-dev",
    "golang-github-minio-minio-go-v7-dev",
    "golang-go",
];
const GO_PROGRAMS: [&str; 3] = ["v1", "v2", "minio"];

/// A folder with `root`, `python`, `node_modules`, `go` and `clock`: a root file system, packages of PyPI and npm, Go's
/// programs, and what makes clocks run fast.
pub(crate) fn further_clients() -> anyhow::Result<PathBuf> {
    let pip = python_clients()?.join("bin/pip");
    let requirements = sources().join("further-requirements.txt");
    let js = ["package.json", "package-lock.json"].map(|name| sources().join("further-js").join(name));
    let go = sources().join("go");
    let program = |name: &str| go.join(name).join("main.go");
    let mut inputs = vec![RELEASE.as_bytes().to_vec(), PACKAGES.concat().into_bytes(), read(&requirements)?];
    for path in js.iter().cloned().chain([go.join("client/client.go")]).chain(GO_PROGRAMS.map(program)) {
        inputs.push(read(&path)?);
    }
    let inputs: Vec<&[u8]> = inputs.iter().map(Vec::as_slice).collect();
    Cache::open()?.folder("further-clients", &inputs, |folder| {
        announce("further AWS clients of Debian, PyPI and npm, into the cache only");
        let archive = Archive::open(&folder.join("apt"), &[RELEASE], false)?;
        let names = archive.unpack_whole(&PACKAGES, &folder.join("root"))?;
        make_root(&folder.join("root"), &names)?;

        let mut install = Command::new(&pip);
        install.args(["install", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]);
        // Not the Python that pip runs under.
        install.args(["--ignore-requires-python", "--python-version", PYTHON, "--target"]).arg(folder.join("python"));
        quietly(install.arg("--requirement").arg(&requirements))?;

        if find("npm").is_none() {
            apt::install("npm for the AWS clients", &["npm"], apt::Removal::Never)?;
        }
        for file in &js {
            let name = file.file_name().context("a file has a name")?;
            fs::copy(file, folder.join(name)).with_context(|| format!("copy {}", file.display()))?;
        }
        let options = ["ci", "--omit=dev", "--ignore-scripts", "--no-audit", "--no-fund"];
        quietly(Command::new("npm").args(options).current_dir(folder))?;

        // The same library for this machine's own programs: the daemon, and clients over this machine's `/usr`.
        let clock = folder.join("clock");
        fs::create_dir(&clock).context("create a folder")?;
        apt::unpack(&["libfaketime"], &clock)?;

        build_go(&archive, &go, folder)?;
        fs::remove_dir_all(folder.join("apt")).context("remove the lists of packages")
    })
}

/// What no client reads goes; which versions there are stays, for clients that do not tell their own.
fn make_root(root: &Path, packages: &[String]) -> anyhow::Result<()> {
    for unread in ["doc", "locale", "man"] {
        fs::remove_dir_all(root.join("usr/share").join(unread)).with_context(|| format!("remove {unread}"))?;
    }
    // Else each run of the AWS CLI would compile itself.
    let compile = ["/usr/bin/python3", "-m", "compileall", "-q", "/usr/lib/python3/dist-packages"];
    quietly(Command::new("chroot").arg(root).args(compile))?;
    let versions: String =
        packages.iter().filter_map(|name| name.rsplit_once('_')).map(|(name, _)| format!("{name}\n")).collect();
    fs::write(root.join("usr/share/packages"), versions).context("write the list of packages")
}

/// Go's programs are whole in themselves, so that neither Go nor the libraries are needed afterwards.
fn build_go(archive: &Archive, sources: &Path, folder: &Path) -> anyhow::Result<()> {
    let tools = folder.join("tools");
    archive.clear()?;
    let names = archive.unpack_whole(&GO_PACKAGES, &tools)?;
    let minio =
        names.iter().find_map(|name| name.strip_prefix("golang-github-minio-minio-go-v7-dev_")?.split('-').next());
    let flags = format!("-ldflags=-X main.version={}", minio.context("Debian's MinIO has no version")?);
    let versions = fs::read_dir(tools.join("usr/lib"))?.flatten().map(|entry| entry.path());
    let name = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("go-"));
    let go_root = versions.into_iter().find(name).context("Debian's package of Go has no Go")?;
    for program in GO_PROGRAMS {
        let mut build = Command::new(go_root.join("bin/go"));
        build.args(["build", "-trimpath", &flags, "-o"]).arg(folder.join("go").join(program)).arg(".");
        build.current_dir(sources.join(program));
        build.env("GOROOT", &go_root).env("GOPATH", tools.join("usr/share/gocode")).env("GOCACHE", tools.join("cache"));
        quietly(build.env("GO111MODULE", "off").env("CGO_ENABLED", "0").env("GOFLAGS", ""))?;
    }
    fs::remove_dir_all(&tools).context("remove Go")
}
