//! What Docker keeps of its containers on disk. Its API answers only when it has started all `--restart always`
//! containers, some seconds after the first of them has asked; by then it has written down what that one is.
//!
//! The files are Docker's own and documented nowhere, but are what they were since Docker 1.10 (moby, `container.ToDisk`
//! and `image/fs.go`). Whatever is not as expected is no answer: the API is waited for, as it is without them.

use std::{
    collections::HashMap,
    fs::OpenOptions,
    io::Read as _,
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    pin::pin,
    sync::atomic::Ordering,
    time::Duration,
};

use bollard::models::{
    ContainerConfig, ContainerInspectResponse, ContainerState, EndpointSettings, HostConfig, ImageConfig, ImageInspect,
    ImageInspectRootFs, NetworkSettings,
};
use futures_util::future::{self, Either};
use serde::{Deserialize, de::DeserializeOwned};
use tokio::time::{Instant, sleep};

use super::{
    Followed, Given, POLL, Registry, STARTING, cgroup,
    description::{Lookup, lookup, settings_of},
    docker::Engine,
};

/// Where Docker has its files unless told otherwise.
const ROOT: &str = "/var/lib/docker";
/// Where that is said.
const SETTINGS: &str = "/etc/docker/daemon.json";
/// Where containerd has images, if Docker leaves them to it.
const CONTENT: &str = "/var/lib/containerd/io.containerd.content.v1.content/blobs/sha256";
/// A container's environment may have some hundred KB.
const LONGEST: u64 = 16 << 20;

/// For an engine that is followed to answer before its files are looked at; clients wait a second.
const AHEAD: Duration = Duration::from_millis(300);

/// Where an engine has its files.
#[derive(Clone)]
pub(super) struct OnDisk {
    root: PathBuf,
    /// The engine gives containers a user namespace of their own unless told otherwise.
    remaps: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Settings {
    data_root: Option<PathBuf>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Kept {
    #[serde(rename = "ID")]
    id: String,
    name: String,
    image: String,
    driver: String,
    image_manifest: Option<Descriptor>,
    state: State,
    config: Config,
    network_settings: Option<Connected>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct State {
    running: bool,
    pid: i64,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Config {
    image: Option<String>,
    labels: Option<HashMap<String, String>>,
    env: Option<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Connected {
    networks: Option<HashMap<String, Option<Network>>>,
}

#[derive(Deserialize)]
struct Network {
    #[serde(rename = "NetworkID")]
    id: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Host {
    network_mode: Option<String>,
    userns_mode: Option<String>,
}

/// As the image specification of the OCI has them.
#[derive(Deserialize)]
struct Descriptor {
    digest: String,
    platform: Option<Platform>,
}

#[derive(Deserialize)]
struct Platform {
    architecture: Option<String>,
}

#[derive(Deserialize)]
struct Manifest {
    config: Descriptor,
}

#[derive(Deserialize)]
struct Image {
    architecture: Option<String>,
    config: Option<Config>,
    rootfs: Option<Layers>,
}

#[derive(Deserialize)]
struct Layers {
    diff_ids: Option<Vec<String>>,
}

impl<W: Send + Sync + 'static> Registry<W> {
    /// What an engine says of a container; where it is slow to answer, or fails to, what its files say.
    pub(super) async fn ask(&self, engine: usize, id: &str) -> anyhow::Result<Lookup> {
        let Followed { engine, in_sight, .. } = self.followed(engine);
        let on_disk = async {
            if in_sight.load(Ordering::Relaxed) {
                sleep(AHEAD).await;
            }
            self.started_on_disk(engine, id).await
        };
        match future::select(pin!(engine.inspect(id)), pin!(on_disk)).await {
            Either::Left((Ok(lookup), _)) => Ok(lookup),
            Either::Left((Err(error), on_disk)) => on_disk.await.ok_or(error),
            Either::Right((Some(lookup), _)) => Ok(lookup),
            Either::Right((None, asked)) => asked.await,
        }
    }

    /// A container's process asks before the engine has written down that it runs. Where the host went down without an end,
    /// the files still say that it runs, in a process of before.
    async fn started_on_disk(&self, engine: &Engine, id: &str) -> Option<Lookup> {
        let deadline = Instant::now() + STARTING;
        loop {
            match engine.lookup_on_disk(id)? {
                Lookup::Running(container) if cgroup::of_container(container.pid, id, &self.cgroup2).is_ok() => {
                    return Some(Lookup::Running(container));
                }
                Lookup::Unknown => return None,
                _ if Instant::now() >= deadline => return Some(Lookup::Starting),
                _ => sleep(POLL).await,
            }
        }
    }
}

impl OnDisk {
    /// Of an engine that has said where.
    pub(super) fn at(root: PathBuf, remaps: bool) -> Self {
        Self { root, remaps }
    }

    /// Of the host's own Docker, before that has said anything. One that remaps users has them elsewhere.
    pub(super) fn of_the_host() -> Self {
        let told = read::<Settings>(Path::new(SETTINGS)).and_then(|settings| settings.data_root);
        Self::at(told.filter(|root| root.is_absolute()).unwrap_or_else(|| ROOT.into()), false)
    }

    /// None: it has no such container, or nothing of it that could be believed.
    pub(super) fn lookup(&self, id: &str, trust_images: bool) -> Option<Lookup> {
        let directory = self.root.join("containers").join(name(id)?);
        let kept: Kept = read(&directory.join("config.v2.json"))?;
        let host: Host = read(&directory.join("hostconfig.json"))?;
        if kept.id != id {
            return None;
        }
        let image = if trust_images { Given::default() } else { self.image(&kept)? };
        let Config { image: image_name, labels, env } = kept.config;
        let networks = kept.network_settings.and_then(|settings| settings.networks).map(|networks| {
            let endpoint = |network: Option<Network>| EndpointSettings {
                network_id: network.and_then(|network| network.id),
                ..Default::default()
            };
            networks.into_iter().map(|(name, network)| (name, endpoint(network))).collect()
        });
        let Host { network_mode, userns_mode } = host;
        let (running, pid) = (Some(kept.state.running), Some(kept.state.pid));
        let found = lookup(ContainerInspectResponse {
            id: Some(kept.id),
            name: Some(kept.name),
            image: Some(kept.image),
            state: Some(ContainerState { running, pid, ..Default::default() }),
            config: Some(ContainerConfig { image: image_name, labels, env, ..Default::default() }),
            host_config: Some(HostConfig { network_mode, userns_mode, ..Default::default() }),
            network_settings: Some(NetworkSettings { networks, ..Default::default() }),
            ..Default::default()
        });
        let Lookup::Running(mut description) = found else { return Some(found) };
        description.remapped &= self.remaps;
        description.from_image = Some(if trust_images { image } else { description.given.take_out(&image) });
        Some(Lookup::Running(description))
    }

    /// What the container's image brings.
    fn image(&self, kept: &Kept) -> Option<Given> {
        let (config, architecture) = match &kept.image_manifest {
            None => {
                let images = self.root.join("image").join(name(&kept.driver)?).join("imagedb/content/sha256");
                (images.join(digest(&kept.image)?), None)
            }
            Some(manifest) => {
                let architecture = manifest.platform.as_ref().and_then(|platform| platform.architecture.as_ref());
                let blob = |of: &Descriptor| Some(Path::new(CONTENT).join(digest(&of.digest)?));
                (blob(&read::<Manifest>(&blob(manifest)?)?.config)?, architecture)
            }
        };
        let Image { architecture: own, config, rootfs } = read(&config)?;
        let config = config.map(|Config { labels, env, .. }| ImageConfig { labels, env, ..Default::default() });
        let layers = rootfs.and_then(|layers| layers.diff_ids);
        let root_fs = Some(ImageInspectRootFs { layers, ..Default::default() });
        settings_of(ImageInspect { architecture: own, config, root_fs, ..Default::default() }, architecture)
    }
}

/// One that leads nowhere else.
fn name(text: &str) -> Option<&str> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
    (!text.is_empty() && text.bytes().all(plain)).then_some(text)
}

fn digest(text: &str) -> Option<&str> {
    text.strip_prefix("sha256:").filter(|digits| digits.len() == 64).and_then(name)
}

/// A file that nobody but root can have written.
fn read<T: DeserializeOwned>(path: &Path) -> Option<T> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(path).ok()?;
    let metadata = file.metadata().ok()?;
    if !metadata.is_file() || metadata.uid() != 0 || metadata.mode() & 0o022 != 0 {
        return None;
    }
    let mut text = Vec::new();
    file.take(LONGEST).read_to_end(&mut text).ok()?;
    serde_json::from_slice(&text).ok()
}
