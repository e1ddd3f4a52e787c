//! The container image, as one archive that is two: an OCI layout (image-spec, `image-layout.md`), and what `docker load` takes.
//!
//! It has the daemon, the libraries of Debian that it is loaded with, and certificates to know AWS by; no shell, nothing else.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, ensure};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::{
    VERSION,
    archive::{Archive, gzip},
    elf::Needs,
    stage::{BINARY, DOCUMENTS, File, make_empty, read},
    sum,
};
use crate::{install, install::CERTIFICATES, target::Target, workspace};

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// The image of these files; `time` is when all of it was made.
pub(super) fn make(files: &[File], needs: &Needs, target: Target, time: u64) -> anyhow::Result<Vec<u8>> {
    let system = workspace()?.join("target/image-system");
    make_empty(&system)?;
    install::image_system(target, &system)?;
    archive(&layer(files, needs, target, &system, time)?, target, time)
}

/// The root file system.
fn layer(files: &[File], needs: &Needs, target: Target, system: &Path, time: u64) -> anyhow::Result<Vec<u8>> {
    let mut layer = Archive::new(time);
    // Where others are mounted, also when the root cannot be written to.
    for (folder, mode) in
        [("dev", 0o755), ("proc", 0o755), ("run", 0o755), ("sys", 0o755), ("tmp", 0o1777), ("root", 0o700)]
    {
        layer.directory(folder, mode)?;
    }
    layer.directory("run/metadata-proxy", 0o700)?;
    layer.directory("var/log/metadata-proxy", 0o700)?;
    layer.link("var/run", "/run")?;
    layer.file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/sbin/nologin\n")?;
    layer.file("etc/group", 0o644, b"root:x:0:\n")?;
    layer.file("etc/nsswitch.conf", 0o644, b"passwd: files\ngroup: files\nhosts: files dns\n")?;
    layer.file(CERTIFICATES, 0o644, &certificates(system)?)?;
    for file in files.iter().filter(|file| file.path == BINARY || file.path.starts_with(DOCUMENTS)) {
        layer.file(&file.path, file.mode, &file.content)?;
    }
    for licence in licences(system)? {
        let path = licence.strip_prefix(system)?.to_string_lossy().into_owned();
        layer.file(&path, 0o644, &read(&licence)?)?;
    }
    let loader = needs.loader.as_deref().context("the daemon names no loader")?;
    for (name, library) in libraries(needs, target, system)? {
        // The loader has to be where the daemon says; the others, where the loader looks.
        let path = if loader.ends_with(&format!("/{name}")) {
            loader.into()
        } else {
            format!("usr/lib/{}/{name}", target.gnu)
        };
        layer.file(&path, 0o755, &read(&library)?)?;
    }
    layer.finish()
}

/// What the daemon is loaded with, and what that is loaded with: from file names to files.
fn libraries(needs: &Needs, target: Target, system: &Path) -> anyhow::Result<BTreeMap<String, PathBuf>> {
    let folders = ["lib", "usr/lib"].map(|folder| system.join(folder).join(target.gnu));
    let loader = needs.loader.iter().filter_map(|path| path.rsplit('/').next()).map(str::to_owned);
    let mut wanted: Vec<String> = needs.libraries.iter().cloned().chain(loader).collect();
    let mut found = BTreeMap::new();
    while let Some(name) = wanted.pop() {
        if found.contains_key(&name) {
            continue;
        }
        let library = folders.iter().map(|folder| folder.join(&name)).find(|path| path.is_file());
        let library = library.with_context(|| {
            format!("the daemon needs {name}, which none of the packages in xtask/src/install/system.rs has: add the one that does")
        })?;
        wanted.extend(Needs::of(&library)?.libraries);
        found.insert(name, library);
    }
    Ok(found)
}

/// Those that Debian trusts by default, one after the other.
fn certificates(system: &Path) -> anyhow::Result<Vec<u8>> {
    let folder = system.join("usr/share/ca-certificates/mozilla");
    let mut certificates = Vec::new();
    for file in list(&folder)? {
        certificates.extend(read(&file)?);
        certificates.push(b'\n');
    }
    ensure!(!certificates.is_empty(), "{} is empty", folder.display());
    Ok(certificates)
}

fn licences(system: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let packages = list(&system.join("usr/share/doc"))?.into_iter();
    // Some packages have but a link to another's.
    let licences = packages.filter(|folder| !folder.is_symlink()).map(|folder| folder.join("copyright"));
    Ok(licences.filter(|file| file.is_file()).collect())
}

fn list(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))?;
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<anyhow::Result<Vec<_>>>()?;
    paths.sort_unstable();
    Ok(paths)
}

fn archive(layer: &[u8], target: Target, time: u64) -> anyhow::Result<Vec<u8>> {
    let created = Timestamp::from_second(i64::try_from(time)?).context("the time of the image")?.to_string();
    let mut blobs = Blobs { archive: Archive::new(time) };
    let packed = blobs.add(LAYER, &gzip(layer)?)?;
    let config = json!({
        "created": created,
        "architecture": target.debian,
        "os": "linux",
        "config": {
            "Entrypoint": [format!("/{BINARY}")],
            "Cmd": ["run"],
            "Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
            "Labels": {
                "org.opencontainers.image.title": "metadata-proxy",
                "org.opencontainers.image.version": VERSION,
                "org.opencontainers.image.licenses": env!("CARGO_PKG_LICENSE"),
            },
        },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{}", sum(layer))] },
        "history": [{ "created": created, "created_by": "cargo xtask package" }],
    });
    let config = blobs.add(CONFIG, config.to_string().as_bytes())?;
    let docker = json!([{
        "Config": path(&config),
        "RepoTags": [format!("metadata-proxy:{VERSION}")],
        "Layers": [path(&packed)],
    }]);
    let manifest = json!({ "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [packed] });
    let mut manifest = blobs.add(MANIFEST, manifest.to_string().as_bytes())?;
    manifest["platform"] = json!({ "architecture": target.debian, "os": "linux" });
    manifest["annotations"] = json!({
        "org.opencontainers.image.ref.name": VERSION,
        // By this name containerd knows it.
        "io.containerd.image.name": format!("docker.io/library/metadata-proxy:{VERSION}"),
    });
    let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": [manifest] });
    let mut archive = blobs.archive;
    archive.file("oci-layout", 0o644, json!({ "imageLayoutVersion": "1.0.0" }).to_string().as_bytes())?;
    archive.file("index.json", 0o644, index.to_string().as_bytes())?;
    archive.file("manifest.json", 0o644, docker.to_string().as_bytes())?;
    archive.finish()
}

/// The parts of an image, named by their sums.
struct Blobs {
    archive: Archive,
}

impl Blobs {
    /// Tells how others refer to it.
    fn add(&mut self, kind: &str, content: &[u8]) -> anyhow::Result<Value> {
        let sum = sum(content);
        self.archive.file(&format!("blobs/sha256/{sum}"), 0o644, content)?;
        Ok(json!({ "mediaType": kind, "digest": format!("sha256:{sum}"), "size": content.len() }))
    }
}

/// Where a part lies.
fn path(reference: &Value) -> String {
    format!("blobs/{}", reference["digest"].as_str().unwrap_or_default().replace(':', "/"))
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    fn entries(archive: &[u8]) -> BTreeMap<String, Vec<u8>> {
        let mut archive = tar::Archive::new(archive);
        let read = archive.entries().unwrap().map(|entry| {
            let mut entry = entry.unwrap();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            (entry.path().unwrap().display().to_string(), content)
        });
        read.collect()
    }

    #[test]
    fn both_manifests_lead_to_the_same_parts() {
        let target = Target::named("aarch64-unknown-linux-gnu").unwrap();
        let entries = entries(&archive(b"layer", target, 86_400).unwrap());
        let json = |name: &str| -> Value { serde_json::from_slice(&entries[name]).unwrap() };

        let reference = &json("index.json")["manifests"][0];
        assert_eq!(reference["platform"]["architecture"], "arm64");
        let manifest = json(&path(reference));
        let docker = &json("manifest.json")[0];
        assert_eq!(docker["Config"], path(&manifest["config"]));
        assert_eq!(docker["Layers"], json!([path(&manifest["layers"][0])]));

        let config = json(&path(&manifest["config"]));
        assert_eq!(config["created"], "1970-01-02T00:00:00Z");
        assert_eq!(config["rootfs"]["diff_ids"], json!([format!("sha256:{}", sum(b"layer"))]));
        let mut layer = String::new();
        let packed = &entries[&path(&manifest["layers"][0])];
        flate2::read::GzDecoder::new(packed.as_slice()).read_to_string(&mut layer).unwrap();
        assert_eq!(layer, "layer");

        for (name, content) in
            entries.iter().filter_map(|(path, content)| Some((path.strip_prefix("blobs/sha256/")?, content)))
        {
            assert!(name.is_empty() || name == sum(content), "{name}");
        }
    }
}
