//! Services of the host that have roles of their own, told by their cgroups: whose a process of the host is that the
//! kernel has sent here. What they get is decided as for containers.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    process,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use metadata_proxy_common::{Flow, HOST_ASKED, HOST_DENIED, HOST_SERVED};
use tracing::{info, warn};

use crate::{
    containers::{Container, Given, Registry, UserNamespace, cgroup},
    interceptor::Interceptor,
    wildcard,
    workload::Workload,
};

/// What the operator has said about processes of the host.
#[derive(Debug, Default)]
pub(crate) struct Settings {
    pub(crate) services: Vec<Service>,
    /// Whoever is not listed has nothing.
    pub(crate) deny: bool,
}

impl Settings {
    /// What the kernel is to do about them.
    pub(crate) fn host(&self) -> u32 {
        match self {
            Self { deny: true, .. } => HOST_DENIED,
            Self { services, .. } if !services.is_empty() => HOST_ASKED,
            _ => HOST_SERVED,
        }
    }
}

/// A `[[service]]`.
#[derive(Debug, Clone)]
pub(crate) struct Service {
    /// Where it stands in the file.
    pub(crate) place: String,
    pub(crate) at: At,
    /// What it is to have, in the words in which containers say it.
    pub(crate) labels: HashMap<String, String>,
}

/// Which cgroups are its.
#[derive(Debug, Clone)]
pub(crate) enum At {
    /// Of units of the system's manager with such names; `*` and `?` as in rules.
    Unit(String),
    /// The one at this path, and all below it.
    Cgroup(PathBuf),
}

impl Service {
    /// As a container that says of itself what the operator has said of it.
    pub(crate) fn container(&self, path: &Path, pid: u32, cgroup: u64) -> Container {
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        Container {
            id: format!("{cgroup:x}"),
            name,
            engine: ENGINE.to_owned(),
            service: true,
            of_user: None,
            pid,
            cgroup,
            image: String::new(),
            networks: vec!["host".to_owned()],
            user_namespace: UserNamespace::Host,
            from_image: Some(Given::default()),
            labels: self.labels.clone(),
            env: HashMap::new(),
            repeated: Vec::new(),
        }
    }

    /// The cgroup of it on the way to this one.
    fn on_the_way(&self, path: &Path) -> Option<PathBuf> {
        match &self.at {
            At::Cgroup(own) => path.starts_with(own).then(|| own.clone()),
            At::Unit(pattern) => {
                let mut on_the_way = PathBuf::new();
                for name in path {
                    on_the_way.push(name);
                    let name = name.to_str()?;
                    if wildcard::matches(pattern, name) {
                        return Some(on_the_way);
                    }
                    // What lies below a unit is called as that likes.
                    if !name.ends_with(SLICE) {
                        return None;
                    }
                }
                None
            }
        }
    }
}

/// What services are of, instead of an engine.
pub(crate) const ENGINE: &str = "systemd";
const SLICE: &str = ".slice";

/// Whose a flow is, as far as services go.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Whose {
    /// A process of the host's, of no service with a role.
    Host,
    /// The same, where those have nothing.
    Denied,
    /// It has ended, or moved, before anybody could look.
    Gone,
    /// A container's, or a service's that the registry knows by now.
    Workload,
}

pub(crate) struct Services {
    settings: Settings,
    /// Where we are attached, which paths start from.
    root: PathBuf,
    /// The same as processes have it in theirs.
    prefix: PathBuf,
    interceptor: Arc<Interceptor>,
    registry: Arc<Registry<Workload>>,
    /// The daemon's own, which is no service's.
    own: PathBuf,
    /// By the paths of their cgroups.
    known: Mutex<HashMap<PathBuf, u64>>,
}

impl Services {
    pub(crate) fn new(
        settings: Settings,
        cgroup2: &Path,
        root: PathBuf,
        interceptor: Arc<Interceptor>,
        registry: Arc<Registry<Workload>>,
    ) -> Self {
        let prefix = root.strip_prefix(cgroup2).unwrap_or(Path::new("")).to_owned();
        let own = below(process::id(), &prefix).unwrap_or_default();
        let services = Self { own, settings, root, prefix, interceptor, registry, known: Mutex::default() };
        services.look();
        services
    }

    pub(crate) fn whose(&self, flow: &Flow) -> Whose {
        if self.settings.host() == HOST_SERVED {
            return Whose::Workload;
        }
        let known = self.registry.find(flow);
        if known.as_ref().is_some_and(|known| !known.container.service || known.container.cgroup == flow.cgroup) {
            return Whose::Workload;
        }
        // Read of a process that may be another by now; its cgroup tells.
        let path = below(flow.pid, &self.prefix);
        let path = path.filter(|path| cgroup::id_at(&self.root, path).is_ok_and(|id| id == flow.cgroup));
        match path {
            // Of an engine that nobody follows, or that has not told yet: a service's containers are not the service.
            Some(path) if known.is_some() && cgroup::names_container(&path) => Whose::Denied,
            Some(_) if known.is_some() => Whose::Workload,
            None if known.is_some() => Whose::Gone,
            Some(path) if self.admit(&path, flow.pid) => Whose::Workload,
            _ if flow.host == 0 => Whose::Workload,
            Some(_) if self.settings.deny => Whose::Denied,
            Some(_) => {
                if let Err(error) = self.interceptor.leave_to_host(flow.cgroup) {
                    warn!("each connection of cgroup {} to the real service goes by us: {error}", flow.cgroup);
                }
                Whose::Host
            }
            None => Whose::Gone,
        }
    }

    /// Makes known what runs, ahead of its first question, and forgets what has ended.
    pub(crate) fn look(&self) {
        self.known().retain(|path, cgroup| {
            let runs = cgroup::id_at(&self.root, path).is_ok_and(|id| id == *cgroup);
            if !runs {
                self.registry.dismiss_service(*cgroup);
            }
            runs
        });
        if self.settings.services.is_empty() {
            return;
        }
        let mut slices = vec![PathBuf::new()];
        while let Some(slice) = slices.pop() {
            for entry in fs::read_dir(self.root.join(&slice)).into_iter().flatten().flatten() {
                let path = slice.join(entry.file_name());
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) && !self.runs(&path) && path_is_slice(&path) {
                    slices.push(path);
                }
            }
        }
        for service in &self.settings.services {
            if let At::Cgroup(path) = &service.at {
                self.runs(path);
            }
        }
    }

    /// Admits what is there. Where nothing runs, nothing is to be had.
    fn runs(&self, path: &Path) -> bool {
        let processes = fs::read_to_string(self.root.join(path).join("cgroup.procs")).unwrap_or_default();
        let pid = processes.lines().find_map(|line| line.parse().ok().filter(|pid| *pid != 0));
        self.admit(path, pid.unwrap_or_else(process::id))
    }

    /// Whether it is a service's, which it is as the first that matches says.
    fn admit(&self, path: &Path, pid: u32) -> bool {
        if cgroup::names_container(path) {
            return false;
        }
        let found = self.settings.services.iter().find_map(|service| Some((service, service.on_the_way(path)?)));
        let Some((service, own)) = found.filter(|(_, own)| !self.own.starts_with(own)) else { return false };
        let Ok(id) = cgroup::id_at(&self.root, &own) else { return false };
        // Locked until the registry has it: who else asks at the same time is not to find nothing there.
        let mut known = self.known();
        let before = known.insert(own.clone(), id);
        if before == Some(id) {
            return true;
        }
        // It has been started anew.
        if let Some(before) = before {
            self.registry.dismiss_service(before);
        }
        info!(cgroup = id, "{}: service {}", service.place, own.display());
        self.registry.admit_service(service.container(&own, pid, id));
        true
    }

    fn known(&self) -> MutexGuard<'_, HashMap<PathBuf, u64>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The path of a process's cgroup from there on.
fn below(pid: u32, prefix: &Path) -> Option<PathBuf> {
    cgroup::path_of(pid).ok()?.strip_prefix(prefix).ok().map(Path::to_owned)
}

fn path_is_slice(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "slice")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(at: At, path: &str) -> Option<String> {
        let service = Service { place: String::new(), at, labels: HashMap::new() };
        service.on_the_way(Path::new(path)).map(|path| path.display().to_string())
    }

    #[test]
    fn a_unit_is_told_by_its_own_name_and_not_by_what_it_calls_cgroups_below() {
        let unit = |pattern: &str, path: &str| own(At::Unit(pattern.into()), path);
        let backup = "system.slice/backup.service";
        assert_eq!(unit("backup.service", backup).as_deref(), Some(backup));
        assert_eq!(unit("backup.service", "system.slice/backup.service/worker").as_deref(), Some(backup));
        assert_eq!(
            unit("app@*.service", "a.slice/b.slice/app@1.service").as_deref(),
            Some("a.slice/b.slice/app@1.service")
        );
        assert_eq!(unit("batch.slice", "batch.slice/x.service").as_deref(), Some("batch.slice"));
        for path in [
            "system.slice/other.service/backup.service",
            "user.slice/user-1.slice/user@1.service/app.slice/backup.service",
            "",
        ] {
            assert_eq!(unit("backup.service", path), None, "{path}");
        }
    }

    #[test]
    fn a_cgroup_is_told_by_its_whole_path() {
        let cgroup = |path: &str| own(At::Cgroup("custom/app".into()), path);
        assert_eq!(cgroup("custom/app/deep").as_deref(), Some("custom/app"));
        assert_eq!(cgroup("custom/app2"), None);
        assert_eq!(cgroup("custom"), None);
    }
}
