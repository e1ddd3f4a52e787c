//! Following engines for as long as the daemon runs: a snapshot, events from then on, and again from the start when the
//! stream breaks. Each by itself: one that is away or hangs holds up no other.

use std::{convert::Infallible, pin::pin, sync::atomic::Ordering, time::Duration};

use futures_util::{StreamExt as _, future, stream};
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, info, warn};

use super::{Registry, description::Lookup, docker::Event, short};

/// At the engine at a time: one that hangs is not to hold up all others.
const LOOKS: usize = 8;
/// Between two attempts to follow the engine.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Events can be lost without the stream breaking; a full look puts that right.
const RESYNC: Duration = Duration::from_secs(60);

impl<W: Send + Sync + 'static> Registry<W> {
    /// Also engines that are not there yet.
    pub(crate) async fn follow(&self) -> Infallible {
        future::join_all((0..self.engines.len()).map(|engine| self.follow_one(engine))).await;
        // Without engines there is nothing to do.
        future::pending().await
    }

    async fn follow_one(&self, engine: usize) -> Infallible {
        let name = self.engine(engine).name();
        let mut pause = FIRST_PAUSE;
        let mut told = String::new();
        loop {
            let since = Instant::now();
            let followed = self.follow_stream(engine).await;
            self.followed(engine).in_sight.store(false, Ordering::Relaxed);
            let error = match followed {
                // An engine that is started when it is asked ends when nobody does.
                Ok(()) => None,
                Err(_) if self.engine(engine).is_absent() && !self.all_absent() => None,
                Err(error) => Some(format!("{error:#}")),
            };
            if since.elapsed() > Duration::from_secs(10) {
                (pause, told) = (FIRST_PAUSE, String::new());
            }
            match error {
                Some(error) if error != told => {
                    warn!("cannot follow the engine {name}: {error}; what is known stays in force, trying again");
                    told = error;
                }
                Some(_) => {}
                None => debug!("engine {name} is away, or its stream of events has ended; trying again"),
            }
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    pub(super) fn all_absent(&self) -> bool {
        self.engines.iter().all(|followed| followed.engine.is_absent())
    }

    async fn follow_stream(&self, engine: usize) -> anyhow::Result<()> {
        let earlier = self.engines.iter().take(engine).map(|followed| &followed.engine);
        self.engine(engine).check(earlier).await?;
        // Events from before the snapshot, so that none is missed between the two.
        let mut events = Box::pin(self.engine(engine).events().await?);
        self.resync(engine).await?;
        self.followed(engine).in_sight.store(true, Ordering::Relaxed);
        info!(running = self.of(engine).len(), "ready: following the containers of {}", self.engine(engine).host());
        let mut next_resync = Instant::now() + RESYNC;
        loop {
            match timeout(next_resync.saturating_duration_since(Instant::now()), events.next()).await {
                Ok(Some(event)) => self.apply(engine, event?).await,
                Ok(None) => return Ok(()),
                Err(_elapsed) => {
                    self.resync(engine).await?;
                    next_resync = Instant::now() + RESYNC;
                }
            }
        }
    }

    async fn apply(&self, engine: usize, event: Event) {
        // Also of a stop: it may run again by now, and be known already.
        let (Event::Started(id) | Event::Stopped(id) | Event::Renamed(id)) = event;
        match self.engine(engine).inspect(&id).await {
            Ok(Lookup::Running(description)) => self.admit(engine, *description),
            Ok(Lookup::Starting | Lookup::Unknown) => self.dismiss(engine, &id),
            // Podman tells so of a container that is just gone; when its process ends it is dismissed anyway.
            Err(error) if !self.read().contains_key(&id) => debug!(id = short(&id), "{error:#}"),
            Err(error) => warn!(id = short(&id), "{error:#}; looked at again when it asks, or within {RESYNC:?}"),
        }
    }

    /// Makes the registry what the engine says now.
    pub(super) async fn resync(&self, engine: usize) -> anyhow::Result<()> {
        let before = self.of(engine);
        let running = self.engine(engine).running().await?;
        let look = |id: String| async move {
            let seen = self.engine(engine).inspect(&id).await;
            (id, seen)
        };
        let mut looks = pin!(stream::iter(running.clone()).map(look).buffer_unordered(LOOKS));
        let mut failed = Vec::new();
        while let Some((id, seen)) = looks.next().await {
            match seen {
                Ok(Lookup::Running(description)) => self.admit(engine, *description),
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
            self.dismiss(engine, id);
        }
        Ok(())
    }

    /// The ids of an engine's containers.
    fn of(&self, engine: usize) -> Vec<String> {
        let entries = self.read();
        entries.iter().filter(|(_, entry)| entry.engine == engine).map(|(id, _)| id.clone()).collect()
    }
}
