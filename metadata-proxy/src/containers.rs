//! Which container a cgroup belongs to: the registry of running containers.
//!
//! It follows the engine (snapshot, events, and again from the start when the stream breaks), and
//! asks it when a cgroup is not known yet. It knows nothing of roles: whoever builds it says what a
//! running container becomes (`W`), and dropping that is all that happens when the container stops.

pub(crate) mod cgroup;
pub(crate) mod docker;
mod network;

use std::{
    collections::HashMap,
    convert::Infallible,
    path::PathBuf,
    pin::pin,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::Duration,
};

use anyhow::ensure;
use futures_util::{StreamExt as _, stream};
use metadata_proxy_common::Flow;
use tokio::{
    sync::Mutex,
    time::{Instant, sleep, timeout},
};
use tracing::{debug, info, warn};

use docker::{Engine, Event, Lookup};

/// A running container, as the engine describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Container {
    pub(crate) id: String,
    pub(crate) name: String,
    /// Its first process, in the initial pid namespace.
    pub(crate) pid: u32,
    /// The container's own cgroup; what its processes create lies below.
    pub(crate) cgroup: u64,
    /// As whoever started the container has named it.
    pub(crate) image: String,
    /// `bridge`, `host`, `none`, `container:ID` or the name of a network; several of a Swarm service only.
    pub(crate) networks: Vec<String>,
    pub(crate) user_namespace: UserNamespace,
    /// What the image has in the same words, so that nobody can tell whether its starter has said it, too; it is not among
    /// the labels and variables below. None: nobody can tell whose any of them are.
    pub(crate) from_image: Option<Given>,
    pub(crate) labels: HashMap<String, String>,
    pub(crate) env: HashMap<String, String>,
    /// Variables that are there more than once, and so not among these.
    pub(crate) repeated: Vec<String>,
}

impl Container {
    pub(crate) fn repeats(&self, variable: &str) -> bool {
        self.repeated.iter().any(|repeated| repeated == variable)
    }
}

/// What containers and images are given by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Given {
    pub(crate) labels: HashMap<String, String>,
    pub(crate) env: HashMap<String, String>,
    /// Of these variables programs take the first or the last, as they please.
    pub(crate) repeated: Vec<String>,
}

/// Of a container. What its process is in does not tell alone, for the process may have made itself another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum UserNamespace {
    /// The daemon's, so that root in the container is root on the host, less the capabilities that it lacks.
    Host,
    /// One of its own, of the engine's making (`userns-remap`).
    Own,
}

impl UserNamespace {
    fn of(pid: u32, remapped: bool) -> std::io::Result<Self> {
        let of = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/user"));
        Ok(if remapped && of(&pid.to_string())? != of("self")? { Self::Own } else { Self::Host })
    }
}

/// The engine could not be asked, so nothing is known about the asker either way.
#[derive(Debug, thiserror::Error)]
#[error("the container engine does not tell: {0:#}")]
pub(crate) struct EngineError(anyhow::Error);

/// Of the container, and of what it was before, if anything.
type Admit<W> = dyn Fn(Container, Option<&W>) -> W + Send + Sync;

pub(crate) struct Registry<W> {
    engine: Engine,
    cgroup2: PathBuf,
    admit: Box<Admit<W>>,
    entries: RwLock<HashMap<String, Entry<W>>>,
    /// Cgroup id -> container id.
    cgroups: RwLock<HashMap<u64, String>>,
    /// For a cgroup of which nothing was known.
    last_look: Mutex<Option<Instant>>,
}

struct Entry<W> {
    pid: u32,
    cgroup: u64,
    name: String,
    /// The engine could tell what came with the image.
    complete: bool,
    workload: Arc<W>,
}

/// How long a container that the engine is just starting may take to appear. Its first request
/// waits for it; SDKs give up after a second.
const STARTING: Duration = Duration::from_millis(900);
/// Between two looks at a container that is just starting.
const POLL: Duration = Duration::from_millis(5);
/// Between two full looks at the engine for strangers.
const BETWEEN_LOOKS: Duration = Duration::from_millis(200);
/// At the engine at a time: one that hangs is not to hold up all others.
const LOOKS: usize = 8;
/// Between two attempts to follow the engine.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Events can be lost without the stream breaking; a full look puts that right.
const RESYNC: Duration = Duration::from_secs(60);

impl<W: Send + Sync + 'static> Registry<W> {
    pub(crate) fn new(
        engine: Engine,
        cgroup2: PathBuf,
        admit: impl Fn(Container, Option<&W>) -> W + Send + Sync + 'static,
    ) -> Self {
        let (entries, cgroups, last_look) = Default::default();
        Self { engine, cgroup2, admit: Box::new(admit), entries, cgroups, last_look }
    }

    /// The container of a flow, by the cgroup that the kernel saw. None: no container of this engine.
    pub(crate) async fn resolve(&self, flow: &Flow) -> Result<Option<Arc<W>>, EngineError> {
        if let Some(workload) = self.find(flow) {
            return Ok(Some(workload));
        }
        self.look_closer(flow).await.map_err(EngineError)
    }

    pub(crate) fn all(&self) -> Vec<Arc<W>> {
        self.read().values().map(|entry| Arc::clone(&entry.workload)).collect()
    }

    /// The deepest known container on the way from the task's cgroup up: nested cgroups are their
    /// container's.
    pub(crate) fn find(&self, flow: &Flow) -> Option<Arc<W>> {
        let cgroups = self.read_cgroups();
        let path = std::iter::once(flow.cgroup).chain(flow.ancestors.into_iter().rev());
        let id = path.filter_map(|cgroup| cgroups.get(&cgroup)).next()?.clone();
        drop(cgroups);
        self.read().get(&id).map(|entry| Arc::clone(&entry.workload))
    }

    /// A container that has just started is running before the engine says so.
    async fn look_closer(&self, flow: &Flow) -> anyhow::Result<Option<Arc<W>>> {
        // Only a hint which container to ask for: what the engine says decides.
        let Some(id) = cgroup::container_hint(flow.pid, flow.cgroup, &self.cgroup2) else {
            self.resync_for_stranger().await?;
            return Ok(self.find(flow));
        };
        let deadline = Instant::now() + STARTING;
        loop {
            let found = self.engine.inspect(&id).await?;
            let starting = matches!(found, Lookup::Starting);
            match found {
                Lookup::Running(description) => self.admit(*description),
                Lookup::Starting => {}
                Lookup::Unknown => return Ok(None),
            }
            if let Some(workload) = self.find(flow) {
                return Ok(Some(workload));
            }
            if Instant::now() >= deadline {
                // Not a stranger: to be told that there is no role, clients would believe.
                ensure!(!starting, "container {} is still starting there", short(&id));
                debug!("container {id} does not appear at the engine");
                return Ok(None);
            }
            sleep(POLL).await;
        }
    }

    /// One look at the engine for all who ask at the same time, and not too often: who has no container
    /// may ask as often as it likes.
    async fn resync_for_stranger(&self) -> anyhow::Result<()> {
        let mut last = self.last_look.lock().await;
        if last.is_none_or(|last| last.elapsed() >= BETWEEN_LOOKS) {
            self.resync().await?;
            *last = Some(Instant::now());
        }
        Ok(())
    }

    /// Follows the engine for as long as the daemon runs, also when it is not there yet.
    pub(crate) async fn follow(&self) -> Infallible {
        let mut pause = FIRST_PAUSE;
        let mut told = String::new();
        loop {
            let since = Instant::now();
            let error = match self.follow_stream().await {
                Ok(()) => "its stream of events ended".to_owned(),
                Err(error) => format!("{error:#}"),
            };
            if since.elapsed() > Duration::from_secs(10) {
                (pause, told) = (FIRST_PAUSE, String::new());
            }
            if error != told {
                warn!("cannot follow the engine: {error}; what is known stays in force, trying again");
                told = error;
            }
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn follow_stream(&self) -> anyhow::Result<()> {
        // Events from before the snapshot, so that none is missed between the two.
        let mut events = Box::pin(self.engine.events().await?);
        self.resync().await?;
        info!(running = self.read().len(), "ready: following the containers of {}", self.engine.host());
        let mut next_resync = Instant::now() + RESYNC;
        loop {
            match timeout(next_resync.saturating_duration_since(Instant::now()), events.next()).await {
                Ok(Some(event)) => self.apply(event?).await,
                Ok(None) => return Ok(()),
                Err(_elapsed) => {
                    self.resync().await?;
                    next_resync = Instant::now() + RESYNC;
                }
            }
        }
    }

    async fn apply(&self, event: Event) {
        // Also of a stop: it may run again by now, and be known already.
        let (Event::Started(id) | Event::Stopped(id) | Event::Renamed(id)) = event;
        match self.engine.inspect(&id).await {
            Ok(Lookup::Running(description)) => self.admit(*description),
            Ok(Lookup::Starting | Lookup::Unknown) => self.dismiss(&id),
            Err(error) => warn!(id = short(&id), "{error:#}; looked at again when it asks, or within {RESYNC:?}"),
        }
    }

    /// Makes the registry what the engine says now.
    async fn resync(&self) -> anyhow::Result<()> {
        let before: Vec<String> = self.read().keys().cloned().collect();
        let running = self.engine.running().await?;
        let look = |id: String| async move {
            let seen = self.engine.inspect(&id).await;
            (id, seen)
        };
        let mut looks = pin!(stream::iter(running.clone()).map(look).buffer_unordered(LOOKS));
        let mut failed = Vec::new();
        while let Some((id, seen)) = looks.next().await {
            match seen {
                Ok(Lookup::Running(description)) => self.admit(*description),
                Ok(Lookup::Starting | Lookup::Unknown) => {}
                Err(error) => failed.push((id, error)),
            }
        }
        // One that the engine cannot describe is no trouble of the others.
        if failed.len() == running.len()
            && let Some((_, error)) = failed.pop()
        {
            return Err(error);
        }
        for (id, error) in failed {
            warn!(id = short(&id), "{error:#}; what was known of this container stays in force");
        }
        // Not those admitted meanwhile, which the list cannot have.
        for id in before.iter().filter(|id| !running.contains(id)) {
            self.dismiss(id);
        }
        Ok(())
    }

    fn admit(&self, description: docker::Description) {
        let (id, pid) = (description.id.clone(), description.pid);
        // Before its cgroup, which then shows that it was the container's process whose namespace that is.
        let user_namespace = match UserNamespace::of(pid, description.remapped) {
            Ok(namespace) => namespace,
            Err(error) => return debug!("container {} has no process, it may be gone: {error}", description.name),
        };
        let cgroup = match cgroup::of_container(pid, &id, &self.cgroup2) {
            Ok(cgroup) => cgroup,
            Err(error) => return debug!("container {} has no cgroup, it may be gone: {error:#}", description.name),
        };
        let mut entries = self.write();
        let complete = description.from_image.is_some();
        let known = |entry: &Entry<W>| {
            let same = entry.pid == pid && entry.cgroup == cgroup && entry.name == description.name;
            same && (entry.complete || !complete)
        };
        if entries.get(&id).is_some_and(known) {
            return;
        }
        info!(container = description.name, id = short(&id), pid, cgroup, "container started");
        let name = description.name.clone();
        let before = entries.get(&id).map(|entry| Arc::clone(&entry.workload));
        let workload = Arc::new((self.admit)(description.at(cgroup, user_namespace), before.as_deref()));
        let old = entries.insert(id.clone(), Entry { pid, cgroup, name, complete, workload });
        let mut cgroups = self.write_cgroups();
        if let Some(old) = &old {
            cgroups.remove(&old.cgroup);
        }
        cgroups.insert(cgroup, id);
    }

    fn dismiss(&self, id: &str) {
        // Both under one lock, or an admission in between would lose its cgroup.
        let mut entries = self.write();
        let Some(entry) = entries.remove(id) else { return };
        self.write_cgroups().remove(&entry.cgroup);
        drop(entries);
        info!(id = short(id), cgroup = entry.cgroup, "container stopped");
    }

    fn read(&self) -> RwLockReadGuard<'_, HashMap<String, Entry<W>>> {
        self.entries.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, HashMap<String, Entry<W>>> {
        self.entries.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_cgroups(&self) -> RwLockReadGuard<'_, HashMap<u64, String>> {
        self.cgroups.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_cgroups(&self) -> RwLockWriteGuard<'_, HashMap<u64, String>> {
        self.cgroups.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// As `docker ps` shows it.
pub(crate) fn short(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}
