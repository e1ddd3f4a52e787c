//! The BPF object: loading it over the pinned maps, and what stands in bpffs.
//!
//! ```text
//! <bpffs>/metadata-proxy/v<layout>/maps/<MAP>
//! <bpffs>/metadata-proxy/v<layout>/links-<cgroup id>/<program>
//! <bpffs>/metadata-proxy/v<layout>/uplinks/<interface index>
//! <bpffs>/metadata-proxy/v<layout>/uplinks/<network namespace cookie>-<interface index>
//! ```

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use aya::{Ebpf, EbpfLoader};
use aya_log::{EbpfLogger, Level};
use tracing::{info, warn};

use super::{Error, maps, uplinks};

pub(super) static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("METADATA_PROXY_EBPF_OBJECT"));

/// Ours within the bpffs.
const DIRECTORY: &str = "metadata-proxy";

/// The maps that outlive the daemon. Not the log: its reader is gone with it.
const MAPS: [&str; 11] = [
    "SETTINGS",
    "CGROUPS",
    "NESTED",
    "HOSTS",
    "LISTENERS",
    "OURS",
    "FLOWS",
    "WANTED",
    "COUNTERS",
    "CLIENTS",
    "ACCEPTED",
];

/// The pins of one layout version and one attach point.
pub(super) struct Pins {
    root: PathBuf,
    version: PathBuf,
    links: PathBuf,
}

impl Pins {
    pub(super) fn create(bpffs: &Path, cgroup: &Path, layout: u32) -> Result<Self, Error> {
        let root = bpffs.join(DIRECTORY);
        let version = root.join(format!("v{layout}"));
        // A link stays with its cgroup: another --cgroup needs links of its own.
        let cgroup_id = fs::metadata(cgroup).map_err(pin_error(cgroup))?.ino();
        let links = version.join(format!("links-{cgroup_id}"));
        for directory in [&version.join("maps"), &version.join("uplinks"), &links] {
            fs::create_dir_all(directory).map_err(pin_error(directory))?;
        }
        Ok(Self { root, version, links })
    }

    pub(super) fn link(&self, program: &str) -> PathBuf {
        self.links.join(program)
    }

    /// Detaches what another program does now, whichever layout it is of.
    pub(super) fn forget_link(&self, program: &str) {
        for pin in [self.link(program)].into_iter().chain(self.earlier_link(program)) {
            // Mostly there is none.
            let _ = fs::remove_file(pin);
        }
    }

    /// Where a daemon with another layout has left a link to the same cgroup.
    pub(super) fn earlier_link(&self, program: &str) -> Option<PathBuf> {
        let links = self.links.file_name()?;
        self.others().into_iter().map(|version| version.join(links).join(program)).find(|pin| pin.exists())
    }

    /// Takes over the guards of interfaces that daemons with another layout have left, to exchange their programs:
    /// in containers' namespaces not before the engine has named the container.
    pub(super) fn adopt_uplinks(&self) {
        for pin in self.others().iter().flat_map(|version| list(&version.join("uplinks"))) {
            let Some(name) = pin.file_name() else { continue };
            let own = self.uplinks().join(name);
            if !own.exists()
                && let Err(error) = fs::rename(&pin, &own)
            {
                warn!("cannot keep {}: {error}", pin.display());
            }
        }
    }

    /// The directories of other layouts.
    fn others(&self) -> Vec<PathBuf> {
        list(&self.root).into_iter().filter(|version| *version != self.version).collect()
    }

    pub(super) fn uplinks(&self) -> PathBuf {
        self.version.join("uplinks")
    }

    fn map(&self, name: &str) -> PathBuf {
        self.version.join("maps").join(name)
    }

    /// Removes what other layouts and attach points have left, now that ours are in place.
    pub(super) fn remove_stale(&self) {
        let keep = [&self.links, &self.version.join("maps"), &self.uplinks()];
        let stale = list(&self.version).into_iter().filter(|path| !keep.contains(&path));
        for path in self.others().into_iter().chain(stale) {
            match fs::remove_dir_all(&path) {
                Ok(()) => info!("detached what an earlier version or --cgroup left in {}", path.display()),
                Err(error) => warn!("cannot remove {}: {error}", path.display()),
            }
        }
    }
}

pub(super) fn is_pinned(bpffs: &Path) -> bool {
    bpffs.join(DIRECTORY).exists()
}

/// What has been removed, and what could not be.
#[derive(Default)]
pub(crate) struct Detached {
    pub(crate) removed: Vec<String>,
    pub(crate) failed: Vec<anyhow::Error>,
}

/// Detaches and removes all that can be; nothing there is nothing to do.
pub(crate) async fn detach(bpffs: &Path) -> Detached {
    let mut done = Detached::default();
    uplinks::remove_filters(&mut done).await;
    let root = bpffs.join(DIRECTORY);
    if root.try_exists().unwrap_or(true) {
        done.remove_tree(&root);
    }
    done
}

impl Detached {
    fn remove_tree(&mut self, directory: &Path) {
        let mut inside = list(directory);
        // Links before maps, so that no program ever runs on half of its maps.
        inside.sort_by_key(|path| path.ends_with("maps"));
        for path in inside {
            if path.is_dir() {
                self.remove_tree(&path);
            } else if self.succeeds(&path, fs::remove_file(&path)) {
                self.removed.push(path.display().to_string());
            }
        }
        self.succeeds(directory, fs::remove_dir(directory));
    }

    fn succeeds(&mut self, path: &Path, result: io::Result<()>) -> bool {
        let failed = result.err().map(|error| anyhow::anyhow!("cannot remove {}: {error}", path.display()));
        let good = failed.is_none();
        self.failed.extend(failed);
        good
    }
}

/// What is there; nothing, where nothing can be seen.
fn list(directory: &Path) -> Vec<PathBuf> {
    fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

/// Without pins: nothing stays when it is dropped.
pub(super) fn load_unpinned() -> Result<Ebpf, Error> {
    EbpfLoader::new().load(OBJECT).map_err(|error| load_error(error.into()))
}

pub(super) fn load(pins: &Pins, debug: bool) -> Result<Ebpf, Error> {
    // With another level the verifier removes the log calls as dead code.
    let level = if debug { Level::Debug } else { Level::Warn } as u8;
    let mut loader = EbpfLoader::new();
    loader.override_global("AYA_LOG_LEVEL", &level, true);
    for map in MAPS {
        loader.map_pin_path(map, pins.map(map));
    }
    loader.load(OBJECT).map_err(|error| load_error(error.into()))
}

pub(super) fn load_error(source: anyhow::Error) -> Error {
    let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
    // The whole chain: the verifier's words are at its end.
    Error::Load { kernel, source: anyhow::anyhow!("{source:#}") }
}

/// Carries the programs' log lines into ours. Without it they run just as well.
pub(super) fn follow_log(object: &mut Ebpf) {
    let logger = EbpfLogger::init(object).map_err(anyhow::Error::from).and_then(|logger| Ok(maps::readable(logger)?));
    let mut logger = match logger {
        Ok(logger) => logger,
        Err(error) => return warn!("the BPF programs' log lines will be missing: {error}"),
    };
    tokio::spawn(async move {
        while let Ok(mut guard) = logger.readable_mut().await {
            guard.get_inner_mut().flush();
            guard.clear_ready();
        }
    });
}

fn pin_error(path: &Path) -> impl Fn(io::Error) -> Error {
    move |source| Error::Pin { path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use metadata_proxy_common::LAYOUT_VERSION;

    use super::*;

    /// A pinned map is taken as it is: nothing else tells that it is a daemon's with another layout.
    #[test]
    fn maps_change_only_with_the_layout_version() {
        // Name, type, size of the key and of the value in bytes, entries, flags.
        let of_version_4 = [
            ("SETTINGS", 2, 4, 56, 1, 0),
            ("CGROUPS", 1, 8, 4, 16384, 0),
            ("NESTED", 1, 8, 4, 4096, 0),
            ("HOSTS", 1, 8, 4, 8192, 0),
            ("LISTENERS", 1, 8, 4, 16384, 0),
            ("OURS", 24, 4, 4, 0, 1),
            ("FLOWS", 9, 24, 88, 16384, 0),
            ("WANTED", 27, 0, 0, 65536, 0),
            ("COUNTERS", 6, 4, 8, 10, 0),
            ("CLIENTS", 24, 4, 112, 0, 1),
            ("ACCEPTED", 24, 4, 88, 0, 1),
        ];
        let object = aya_obj::Object::parse(OBJECT).unwrap();
        let maps = MAPS.map(|name| {
            let map = &object.maps[name];
            (name, map.map_type(), map.key_size(), map.value_size(), map.max_entries(), map.map_flags())
        });
        assert_eq!((LAYOUT_VERSION, maps), (4, of_version_4), "the maps have changed: raise LAYOUT_VERSION");
    }
}
