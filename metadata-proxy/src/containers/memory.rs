//! What is known of containers, kept for the daemon after this one: it may start while the engine is away, and the
//! containers run on (`live-restore`). In a tmpfs, for the environment may have secrets; of that only what decisions look
//! at is kept.

use std::{convert::Infallible, io, path::PathBuf, sync::Arc, time::Duration};

use futures_util::FutureExt as _;
use tokio::{sync::Notify, time::sleep};
use tracing::{debug, info, warn};

use super::{Container, Entry, Registry, cgroup, short};
use crate::{netns, volatile};

/// Between two times that it is written.
const PAUSE: Duration = Duration::from_millis(200);

type Keeps = dyn Fn(&str, &Container) -> bool + Send + Sync;

pub(crate) struct Memory {
    file: PathBuf,
    changed: Notify,
    /// Whether a variable of a container is worth keeping.
    keeps: Box<Keeps>,
}

impl Memory {
    pub(crate) fn new(keeps: impl Fn(&str, &Container) -> bool + Send + Sync + 'static) -> Self {
        Self { file: volatile::path("containers.json"), changed: Notify::new(), keeps: Box::new(keeps) }
    }

    pub(super) fn changed(&self) {
        self.changed.notify_one();
    }

    fn reduced(&self, container: &Container) -> Container {
        let mut kept = container.clone();
        kept.env.retain(|name, _| (self.keeps)(name, container));
        if let Some(image) = &mut kept.from_image {
            image.env.retain(|name, _| (self.keeps)(name, container));
        }
        kept
    }

    fn read(&self) -> Vec<Container> {
        let read = volatile::read(&self.file).and_then(|text| serde_json::from_slice(&text).map_err(Into::into));
        read.unwrap_or_else(|error| {
            debug!("nothing is known from an earlier daemon: {}: {error}", self.file.display());
            Vec::new()
        })
    }
}

impl<W: AsRef<Container> + Send + Sync + 'static> Registry<W> {
    /// Takes over what is still as an earlier daemon has known it: the same process in the same cgroup. The engine tells
    /// the rest when it is there.
    pub(crate) fn recall(&self) {
        let mut recalled = 0;
        for container in self.memory.read() {
            let Some(engine) = self.engines.iter().position(|one| one.engine.name() == container.engine) else {
                continue;
            };
            let Container { id, pid, cgroup, .. } = container.clone();
            let process = netns::process(pid);
            if cgroup::of_container(pid, &id, &self.cgroup2).is_ok_and(|now| now == cgroup) {
                debug!(container = container.name, id = short(&id), "known from an earlier daemon");
                let name = container.name.clone();
                let workload = Arc::new((self.admit)(container, None));
                let entry = Entry { engine, pid, cgroup, name, complete: false, workload };
                self.enter(&mut self.write(), id, entry, process);
                recalled += 1;
            }
        }
        if recalled > 0 {
            info!(containers = recalled, "known from an earlier daemon, until the engine tells");
        }
    }

    /// Keeps what is known for as long as the daemon runs.
    pub(crate) async fn remember(&self) -> Infallible {
        let mut told = false;
        loop {
            self.memory.changed.notified().await;
            if let Err(error) = self.keep()
                && !std::mem::replace(&mut told, true)
            {
                warn!("a daemon that starts while the engine is away will know no containers: {error}");
            }
            sleep(PAUSE).await;
        }
    }

    /// Keeps what came within the last pause, once the daemon ends.
    pub(crate) fn remember_last(&self) {
        if self.memory.changed.notified().now_or_never().is_some()
            && let Err(error) = self.keep()
        {
            debug!("the last changes are not kept for the next daemon: {error}");
        }
    }

    fn keep(&self) -> io::Result<()> {
        let all = self.all();
        let containers = all.iter().map(|workload| (**workload).as_ref()).filter(|container| !container.service);
        let all: Vec<_> = containers.map(|container| self.memory.reduced(container)).collect();
        volatile::replace(&self.memory.file, &serde_json::to_vec(&all)?)
    }
}
