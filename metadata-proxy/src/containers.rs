//! Which container a cgroup belongs to: the registry of running containers.
//!
//! It follows the engines (`follow`), and asks them when a cgroup is not known yet. It knows nothing of
//! roles: whoever builds it says what a running container becomes (`W`), and dropping that is all that
//! happens when the container stops.

pub(crate) mod cgroup;
mod description;
pub(crate) mod docker;
mod follow;
pub(crate) mod memory;
mod network;
mod on_disk;
mod service;
mod socket;

use std::{
    collections::HashMap,
    fmt::Display,
    io,
    os::fd::OwnedFd,
    path::PathBuf,
    sync::{
        Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{bail, ensure};
use futures_util::{StreamExt as _, future, stream::FuturesUnordered};
use metadata_proxy_common::Flow;
use serde::{Deserialize, Serialize};
use tokio::{
    sync::Mutex,
    time::{Instant, sleep},
};
use tracing::{debug, info, warn};

use crate::netns;
use description::{Description, Lookup};
use docker::Engine;
use memory::Memory;
use service::SERVICES;

/// A running container, as the engine describes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Container {
    pub(crate) id: String,
    pub(crate) name: String,
    /// The engine that has told of it, by the name that the operator has given it.
    pub(crate) engine: String,
    /// None, but a service of the host: the operator's own word, and no engine's.
    #[serde(default)]
    pub(crate) service: bool,
    /// The user whose engine that is; None: root's.
    pub(crate) of_user: Option<u32>,
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
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Given {
    pub(crate) labels: HashMap<String, String>,
    pub(crate) env: HashMap<String, String>,
    /// Of these variables programs take the first or the last, as they please.
    pub(crate) repeated: Vec<String>,
}

/// Of a container. What its process is in does not tell alone, for the process may have made itself another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum UserNamespace {
    /// The daemon's, so that root in the container is root on the host, less the capabilities that it lacks.
    Host,
    /// One of its own, of the engine's making (`userns-remap`).
    Own,
}

impl UserNamespace {
    fn of(pid: u32, remapped: bool) -> io::Result<Self> {
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
    engines: Vec<Followed>,
    cgroup2: PathBuf,
    admit: Box<Admit<W>>,
    entries: RwLock<HashMap<String, Entry<W>>>,
    /// Cgroup id -> container id.
    cgroups: RwLock<HashMap<u64, String>>,
    /// Containers that two engines have told of, which are nobody's, with their first processes.
    contested: RwLock<HashMap<String, u32>>,
    memory: Memory,
    own: Weak<Self>,
}

struct Followed {
    engine: Engine,
    /// Its events are read.
    in_sight: AtomicBool,
    /// For a cgroup of which nothing was known.
    last_look: Mutex<Option<Instant>>,
}

struct Entry<W> {
    /// Its place among the engines.
    engine: usize,
    pid: u32,
    cgroup: u64,
    name: String,
    /// The engine could tell what came with the image.
    complete: bool,
    workload: Arc<W>,
}

/// What an engine says of a container that is not known yet.
#[derive(PartialEq, Eq)]
enum Found {
    Running,
    Starting,
}

/// How long a container that the engine is just starting may take to appear. Its first request
/// waits for it; SDKs give up after a second.
const STARTING: Duration = Duration::from_millis(900);
/// What is known on the way from a task's own cgroup up.
fn on_the_way<'a>(flow: &Flow, cgroups: &'a HashMap<u64, String>) -> impl Iterator<Item = &'a String> {
    let path = std::iter::once(flow.cgroup).chain(flow.ancestors.into_iter().rev());
    path.filter_map(|cgroup| cgroups.get(&cgroup))
}

/// Between two looks at a container that is just starting.
const POLL: Duration = Duration::from_millis(5);
/// Between two full looks at the engine for strangers.
const BETWEEN_LOOKS: Duration = Duration::from_millis(200);

impl<W: Send + Sync + 'static> Registry<W> {
    pub(crate) fn new(
        engines: Vec<Engine>,
        cgroup2: PathBuf,
        memory: Memory,
        admit: impl Fn(Container, Option<&W>) -> W + Send + Sync + 'static,
    ) -> Arc<Self> {
        let followed = |engine| Followed { engine, in_sight: AtomicBool::default(), last_look: Mutex::default() };
        let engines = engines.into_iter().map(followed).collect();
        let (entries, cgroups, contested) = Default::default();
        let admit = Box::new(admit);
        Arc::new_cyclic(|own| Self {
            engines,
            cgroup2,
            admit,
            entries,
            cgroups,
            contested,
            memory,
            own: Weak::clone(own),
        })
    }

    /// The container of a flow, by the cgroup that the kernel saw. None: no container of these engines.
    pub(crate) async fn resolve(&self, flow: &Flow) -> Result<Option<Arc<W>>, EngineError> {
        if let Some(workload) = self.find(flow) {
            return Ok(Some(workload));
        }
        self.look_closer(flow).await.map_err(EngineError)
    }

    /// The name of each engine, how many containers of it are known, and whether it is followed.
    pub(crate) fn engines(&self) -> Vec<(&str, usize, bool)> {
        let entries = self.read();
        let count = |index| entries.values().filter(|entry| entry.engine == index).count();
        let all = self.engines.iter().enumerate();
        all.map(|(index, followed)| (followed.engine.name(), count(index), followed.in_sight.load(Ordering::Relaxed)))
            .collect()
    }

    pub(crate) fn all(&self) -> Vec<Arc<W>> {
        self.read().values().map(|entry| Arc::clone(&entry.workload)).collect()
    }

    /// The deepest known container on the way from the task's cgroup up: nested cgroups are their
    /// container's. None, too, where that is within a service: each would say that it is its own.
    pub(crate) fn find(&self, flow: &Flow) -> Option<Arc<W>> {
        let (entries, cgroups) = (self.read(), self.read_cgroups());
        let mut known = on_the_way(flow, &cgroups);
        let id = known.next()?;
        let is_service = |id: &String| entries.get(id).is_some_and(|entry| entry.engine == SERVICES);
        let contested = known.any(|above| above != id && is_service(above));
        entries.get(id).filter(|_| !contested).map(|entry| Arc::clone(&entry.workload))
    }

    /// A container that has just started is running before the engine says so.
    async fn look_closer(&self, flow: &Flow) -> anyhow::Result<Option<Arc<W>>> {
        // Known, and not found.
        let known = on_the_way(flow, &self.read_cgroups()).next().cloned();
        if let Some(id) = known {
            let new = self.contested.write().unwrap_or_else(PoisonError::into_inner).insert(id.clone(), flow.pid);
            if new.is_none() {
                warn!(id = short(&id), "a container within the cgroup of a [[service]]: it has no role");
            }
            return Ok(None);
        }
        if self.all_absent() {
            bail!("there is none yet ({})", self.hosts());
        }
        // Only a hint which container to ask for: what the engine says decides.
        let Some(id) = cgroup::container_hint(flow.pid, flow.cgroup, &self.cgroup2) else {
            let looks = future::join_all((0..self.engines.len()).map(|engine| self.resync_for_stranger(engine))).await;
            return match self.find(flow) {
                Some(workload) => Ok(Some(workload)),
                None => looks.into_iter().collect::<anyhow::Result<()>>().map(|()| None),
            };
        };
        let deadline = Instant::now() + STARTING;
        loop {
            let found = self.ask_all(&id).await;
            if let Some(workload) = self.find(flow) {
                return Ok(Some(workload));
            }
            let Some(found) = found? else { return Ok(None) };
            if Instant::now() >= deadline {
                // Not a stranger: to be told that there is no role, clients would believe.
                ensure!(found != Found::Starting, "container {} is still starting there", short(&id));
                debug!("container {id} does not appear at the engine");
                return Ok(None);
            }
            sleep(POLL).await;
        }
    }

    /// Asks the engines at the same time, and waits for no more of them than it takes to find one that has it. An error
    /// where nobody has it, and one could not be asked.
    async fn ask_all(&self, id: &str) -> anyhow::Result<Option<Found>> {
        let ask = |engine: usize| async move { (engine, self.ask(engine, id).await) };
        let mut answers: FuturesUnordered<_> = (0..self.engines.len()).map(ask).collect();
        let mut result = Ok(None);
        while let Some((engine, answer)) = answers.next().await {
            match answer {
                Ok(Lookup::Running(description)) => {
                    self.admit(engine, *description);
                    return Ok(Some(Found::Running));
                }
                Ok(Lookup::Starting) => result = Ok(Some(Found::Starting)),
                Ok(Lookup::Unknown) => {}
                Err(error) if matches!(result, Ok(None)) => result = Err(error),
                Err(_) => {}
            }
        }
        result
    }

    /// One look at an engine for all who ask at the same time, and not too often: who has no container
    /// may ask as often as it likes.
    async fn resync_for_stranger(&self, engine: usize) -> anyhow::Result<()> {
        let followed = self.followed(engine);
        if followed.engine.is_absent() {
            return Ok(());
        }
        let mut last = followed.last_look.lock().await;
        if last.is_none_or(|last| last.elapsed() >= BETWEEN_LOOKS) {
            self.resync(engine).await?;
            *last = Some(Instant::now());
        }
        Ok(())
    }

    /// By its place among them, which never changes.
    fn followed(&self, engine: usize) -> &Followed {
        &self.engines[engine]
    }

    fn engine(&self, engine: usize) -> &Engine {
        &self.followed(engine).engine
    }

    fn hosts(&self) -> String {
        self.engines.iter().map(|followed| followed.engine.host()).collect::<Vec<_>>().join(", ")
    }

    fn admit(&self, engine: usize, description: Description) {
        let (id, pid, source) = (description.id.clone(), description.pid, self.engine(engine).name());
        let gone = |error: &dyn Display| debug!("container {} is none, it may be gone: {error}", description.name);
        // Before its cgroup, which then shows that it was the container's process whose namespace that is.
        let process = netns::process(pid);
        let namespace = UserNamespace::of(pid, description.remapped)
            .and_then(|namespace| Ok((namespace, netns::user_namespace_owner(pid)?)));
        let (user_namespace, user) = match namespace {
            Ok(namespace) => namespace,
            Err(error) => return gone(&error),
        };
        let cgroup = match cgroup::of_container(pid, &id, &self.cgroup2) {
            Ok(cgroup) => cgroup,
            Err(error) => return gone(&format_args!("{error:#}")),
        };
        if let Some(owner) = description.of_user.filter(|owner| *owner != user) {
            warn!(
                id = short(&id),
                "engine {source} is user {owner}'s, and tells of a container of user {user}'s: it does not count"
            );
            return;
        }
        let mut entries = self.write();
        let mut contested = self.contested.write().unwrap_or_else(PoisonError::into_inner);
        if contested.get(&id) == Some(&pid) {
            return;
        }
        let complete = description.from_image.is_some();
        let known = |entry: &Entry<W>| {
            let same = entry.pid == pid && entry.cgroup == cgroup && entry.name == description.name;
            same && (entry.complete || !complete)
        };
        match entries.get(&id) {
            Some(entry) if entry.engine != engine && entry.pid == pid => {
                let other = self.engine(entry.engine).name();
                warn!(id = short(&id), "engines {other} and {source} both tell of this container: it has no role");
                self.write_cgroups().remove(&entry.cgroup);
                entries.remove(&id);
                contested.insert(id, pid);
                return;
            }
            Some(entry) if known(entry) => return,
            _ => {}
        }
        drop(contested);
        info!(container = description.name, id = short(&id), engine = source, pid, cgroup, "container started");
        let name = description.name.clone();
        let before = entries.get(&id).map(|entry| Arc::clone(&entry.workload));
        let container = description.at(cgroup, user_namespace, source);
        let workload = Arc::new((self.admit)(container, before.as_deref()));
        self.enter(&mut entries, id, Entry { engine, pid, cgroup, name, complete, workload }, process);
    }

    fn enter(
        &self,
        entries: &mut HashMap<String, Entry<W>>,
        id: String,
        entry: Entry<W>,
        process: io::Result<OwnedFd>,
    ) {
        let (pid, cgroup) = (entry.pid, entry.cgroup);
        let old = entries.insert(id.clone(), entry);
        let mut cgroups = self.write_cgroups();
        if let Some(old) = &old {
            cgroups.remove(&old.cgroup);
        }
        cgroups.insert(cgroup, id.clone());
        if old.is_none_or(|old| old.pid != pid) {
            tokio::spawn(Self::dismiss_at_end(Weak::clone(&self.own), id, pid, process));
        }
        self.memory.changed();
    }

    /// Whatever an engine says or fails to say: a container whose first process has ended is gone.
    async fn dismiss_at_end(own: Weak<Self>, id: String, pid: u32, process: io::Result<OwnedFd>) {
        netns::end_of(process).await;
        if let Some(registry) = own.upgrade() {
            registry
                .contested
                .write()
                .unwrap_or_else(PoisonError::into_inner)
                .retain(|other, of| *other != id || *of != pid);
            registry.dismiss_if(&id, |entry| entry.pid == pid);
        }
    }

    /// What this engine no longer has.
    fn dismiss(&self, engine: usize, id: &str) {
        self.dismiss_if(id, |entry| entry.engine == engine);
    }

    fn dismiss_if(&self, id: &str, meant: impl Fn(&Entry<W>) -> bool) {
        // Both under one lock, or an admission in between would lose its cgroup.
        let mut entries = self.write();
        if !entries.get(id).is_some_and(meant) {
            return;
        }
        let Some(entry) = entries.remove(id) else { return };
        self.write_cgroups().remove(&entry.cgroup);
        drop(entries);
        self.memory.changed();
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
