//! Where the programs are attached and pinned: the part of the configuration that is needed when all else is wrong.

use std::{fs, path::PathBuf};

use serde::Deserialize;

use super::given_path;
use crate::cli::{self, Bpffs, Run};

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

    /// As far as a configuration can be read that is not right.
    pub(crate) fn of_wrong(run: Run) -> Self {
        /// Whatever else there is.
        #[derive(Default, Deserialize)]
        struct File {
            cgroup: Option<PathBuf>,
            bpffs: Option<PathBuf>,
        }
        let text = given_path(run.config).and_then(|path| fs::read_to_string(path).ok());
        let file: File = text.and_then(|text| toml::from_str(&text).ok()).unwrap_or_default();
        run.place.resolve(file.cgroup, file.bpffs)
    }
}

impl cli::Place {
    /// With what stands in the file.
    pub(crate) fn resolve(self, cgroup: Option<PathBuf>, bpffs: Option<PathBuf>) -> Place {
        let bpffs = given_path(self.bpffs.path).or(bpffs);
        Place { cgroup: given_path(self.cgroup).or(cgroup), bpffs: Bpffs { path: bpffs }.path() }
    }
}

impl Bpffs {
    pub(crate) fn path(self) -> PathBuf {
        given_path(self.path).unwrap_or_else(|| BPFFS.into())
    }
}
