//! Where the programs are attached and pinned: the part of the configuration that is needed when all else is wrong.

use std::{fmt::Display, fs, path::PathBuf};

use serde::Deserialize;

use super::{BadConfig, given_path};
use crate::cli::{self, ConfigFile};

const BPFFS: &str = "/sys/fs/bpf";

#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) cgroup: Option<PathBuf>,
    pub(crate) bpffs: PathBuf,
}

impl Place {
    /// Else for a part of it, such as a test has, whose namespaces may be other than the host's.
    pub(crate) fn is_whole_host(&self) -> bool {
        self.cgroup.is_none()
    }

    /// As far as the configuration can be read: whatever else is wrong with it does not matter here. Tells, too, why nothing
    /// of it could be read.
    pub(crate) fn read(config: ConfigFile, place: cli::Place) -> (Self, Option<BadConfig>) {
        /// Whatever else there is.
        #[derive(Default, Deserialize)]
        struct File {
            cgroup: Option<PathBuf>,
            bpffs: Option<PathBuf>,
        }
        let read = |path: PathBuf| {
            let bad = |why: &dyn Display| BadConfig(format!("{}: {why}", path.display()));
            let text = fs::read_to_string(&path).map_err(|error| bad(&error))?;
            toml::from_str(&text).map_err(|error: toml::de::Error| bad(&error.message()))
        };
        let read = given_path(config.file).map(read).transpose();
        let (file, bad) = read.map_or_else(|bad| (None, Some(bad)), |file| (file, None));
        let file: File = file.unwrap_or_default();
        (place.resolve(file.cgroup, file.bpffs), bad)
    }
}

impl cli::Place {
    /// With what stands in the file.
    pub(crate) fn resolve(self, cgroup: Option<PathBuf>, bpffs: Option<PathBuf>) -> Place {
        let bpffs = given_path(self.bpffs.path).or(bpffs);
        Place { cgroup: given_path(self.cgroup).or(cgroup), bpffs: given_path(bpffs).unwrap_or_else(|| BPFFS.into()) }
    }
}
