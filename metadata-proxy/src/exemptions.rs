//! The cgroups that keep the real service: those at the operator's paths, and our own.
//!
//! A cgroup goes with its service and comes back as another one at the same path, so the paths are looked
//! at again and again. Until then what comes back is refused, or a host process as any other.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{PoisonError, RwLock},
};

use tracing::{info, warn};

use crate::{containers::cgroup, interceptor::Interceptor};

pub(crate) struct Exemptions {
    cgroup2: PathBuf,
    paths: Vec<PathBuf>,
    /// Else we would ask ourselves for what the real service is to say.
    own: Option<u64>,
    /// By path, where there is a cgroup.
    known: RwLock<HashMap<PathBuf, u64>>,
}

impl Exemptions {
    pub(crate) fn new(paths: Vec<PathBuf>, cgroup2: PathBuf) -> Self {
        let own = cgroup::of_our_container(&cgroup2);
        Self { cgroup2, paths, own, known: RwLock::default() }
    }

    pub(crate) fn contains(&self, cgroup: u64) -> bool {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        self.own == Some(cgroup) || known.values().any(|known| *known == cgroup)
    }

    /// At the start: all that there are.
    pub(crate) fn enact(&self, interceptor: &Interceptor) {
        if let Some(own) = self.own {
            exempt(interceptor, own);
        }
        for path in self.look(interceptor) {
            warn!("--exempt-cgroup {}: no such cgroup; it is exempt when it comes", path.display());
        }
    }

    /// Exempts what has come since the last look; the paths where nothing is.
    pub(crate) fn look(&self, interceptor: &Interceptor) -> Vec<&Path> {
        let mut missing = Vec::new();
        for path in &self.paths {
            let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
            match cgroup::id_at(&self.cgroup2, path) {
                Ok(cgroup) if known.get(path) == Some(&cgroup) => {}
                Ok(cgroup) => {
                    info!(cgroup, "exempt: {}", path.display());
                    exempt(interceptor, cgroup);
                    known.insert(path.clone(), cgroup);
                }
                Err(_) => {
                    known.remove(path);
                    missing.push(path.as_path());
                }
            }
        }
        missing
    }
}

fn exempt(interceptor: &Interceptor, cgroup: u64) {
    if let Err(error) = interceptor.exempt(cgroup) {
        warn!("cannot exempt cgroup {cgroup}: {error}");
    }
}
