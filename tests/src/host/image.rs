//! Images made here and now: a test host has no registry to pull from.

use std::{path::Path, process::Command};

use anyhow::{Context as _, Result};
use bollard::{Docker, body_full, query_parameters::CreateImageOptionsBuilder};
use futures_util::TryStreamExt as _;
use tar::{Builder, EntryType, Header};

use super::machine::find_program;

/// Debian's static busybox with all of its applets. (Its wget crashes with `-T`; use `timeout`.)
pub const BUSYBOX: &str = "mp/busybox";
/// An empty root, started over a read-only view of the machine's `/usr`: Python, Node, Java and curl without copying any.
pub const HOST: &str = "mp/host";

pub(super) async fn import_all(docker: &Docker) -> Result<()> {
    tokio::try_join!(import(docker, BUSYBOX, busybox_root()?), import(docker, HOST, host_root()?))?;
    Ok(())
}

async fn import(docker: &Docker, name: &str, root: Vec<u8>) -> Result<()> {
    let options = CreateImageOptionsBuilder::new().from_src("-").repo(name).tag("latest").build();
    docker
        .create_image(Some(options), Some(body_full(root.into())), None)
        .try_for_each(|_| async { Ok(()) })
        .await
        .with_context(|| format!("importing the image {name}"))
}

/// What a read-only bind of the machine, or of another root, gives to a container of [`HOST`].
pub(super) fn host_binds(root: &Path) -> Vec<String> {
    let mut paths = vec!["usr".to_owned()];
    // Programs in /usr lead to these: certificates, alternatives, the linker's cache, Java's settings.
    let settings = std::fs::read_dir(root.join("etc")).into_iter().flatten().flatten();
    paths.extend(settings.filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        let wanted = matches!(name.as_str(), "ssl" | "alternatives" | "ld.so.cache") || name.starts_with("java-");
        wanted.then(|| format!("etc/{name}"))
    }));
    paths.iter().map(|path| format!("{}:/{path}:ro", root.join(path).display())).collect()
}

fn busybox_root() -> Result<Vec<u8>> {
    let busybox = find_program("busybox", "busybox-static")?;
    let binary = std::fs::read(&busybox).with_context(|| format!("reading {}", busybox.display()))?;
    let applets = Command::new(&busybox).arg("--list").output().context("running busybox --list")?;
    let mut root = Root::with_settings()?;
    root.directory("bin", 0o755)?;
    root.file("bin/busybox", 0o755, &binary)?;
    for applet in String::from_utf8_lossy(&applets.stdout).lines().filter(|name| *name != "busybox") {
        root.link(&format!("bin/{applet}"), "busybox")?;
    }
    root.finish()
}

fn host_root() -> Result<Vec<u8>> {
    let mut root = Root::with_settings()?;
    for directory in ["usr", "opt"] {
        root.directory(directory, 0o755)?;
    }
    for merged in ["bin", "sbin", "lib", "lib64"] {
        root.link(merged, &format!("usr/{merged}"))?;
    }
    root.finish()
}

/// A root file system as a tar archive in memory.
struct Root(Builder<Vec<u8>>);

impl Root {
    /// With what every image needs.
    fn with_settings() -> Result<Self> {
        let mut root = Self(Builder::new(Vec::new()));
        for (directory, mode) in
            [("etc", 0o755), ("proc", 0o755), ("sys", 0o755), ("dev", 0o755), ("root", 0o700), ("tmp", 0o1777)]
        {
            root.directory(directory, mode)?;
        }
        root.file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")?;
        root.file("etc/group", 0o644, b"root:x:0:\nnogroup:x:65534:\n")?;
        root.file("etc/hosts", 0o644, b"127.0.0.1 localhost\n::1 localhost\n")?;
        root.file("etc/nsswitch.conf", 0o644, b"passwd: files\ngroup: files\nhosts: files dns\n")?;
        Ok(root)
    }

    fn directory(&mut self, path: &str, mode: u32) -> Result<()> {
        let mut header = header(EntryType::Directory, mode, 0);
        Ok(self.0.append_data(&mut header, path, [].as_slice())?)
    }

    fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        let mut header = header(EntryType::Regular, mode, content.len() as u64);
        Ok(self.0.append_data(&mut header, path, content)?)
    }

    fn link(&mut self, path: &str, target: &str) -> Result<()> {
        let mut header = header(EntryType::Symlink, 0o777, 0);
        Ok(self.0.append_link(&mut header, path, target)?)
    }

    fn finish(self) -> Result<Vec<u8>> {
        Ok(self.0.into_inner()?)
    }
}

fn header(kind: EntryType, mode: u32, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size);
    header
}
