//! One listener in each network namespace that needs one, on a loopback address there.
//!
//! Opened ahead when a container starts, or on demand when the kernel holds a connection; closed
//! when its containers are gone, because a listener keeps its namespace (and the interfaces in it)
//! alive. Closing is always safe: a connection that comes later is held and asks for it again.

mod socket;

use std::{
    collections::{HashMap, HashSet},
    convert::Infallible,
    fs::File,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use metadata_proxy_common::Flow;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::mpsc,
};
use tokio_util::{
    sync::CancellationToken,
    task::{AbortOnDropHandle, TaskTracker},
};
use tracing::{debug, info, warn};

use crate::{
    interceptor::{Interceptor, WantedEvents},
    log_limit::LogLimit,
    netns,
};
use socket::{Opened, Taken};

/// Ends with being dropped.
pub(crate) type Guard = AbortOnDropHandle<Infallible>;

/// An accepted connection and who opened it.
pub(crate) type Connection = (TcpStream, Flow);

pub(crate) struct Listeners {
    interceptor: Arc<Interceptor>,
    worker: netns::Worker,
    /// Has the devices of a namespace guarded for as long as we listen there.
    guard: Box<dyn Fn(Arc<File>, u64) -> Option<Guard> + Send + Sync>,
    taken: Arc<Taken>,
    open: Mutex<HashMap<u64, Open>>,
    /// Namespaces for which the kernel has asked and that are being seen to.
    opening: Mutex<HashSet<u64>>,
    /// What the daemon before us has published, until whoever needs it has got ours. Connections that have been held
    /// since it ended wait for its very ports.
    inherited: Arc<Mutex<HashMap<u64, u16>>>,
    /// How many had to make room.
    evicted: AtomicU64,
    connections: mpsc::Sender<Connection>,
    tasks: TaskTracker,
    /// Of connections that come to nothing.
    log: LogLimit,
}

struct Open {
    port: u16,
    close: CancellationToken,
    /// How many running containers want it kept.
    holds: usize,
    last_used: Instant,
}

/// Listeners that the kernel asked for and no container holds. Whoever can make namespaces could ask
/// for any number, so the one that was used longest ago makes room; it is opened again if it is asked for.
const STRANGERS: usize = 1024;
/// How long the closing of all listeners may take.
const CLOSED: Duration = Duration::from_secs(1);
/// How long to wait for a listener that is just being closed.
const CLOSING: (u32, Duration) = (50, Duration::from_millis(5));

/// Between the last SYN that was let through and the last connection that there is to accept.
const SETTLE: Duration = Duration::from_millis(50);

impl Listeners {
    pub(crate) fn new(
        interceptor: Arc<Interceptor>,
        worker: netns::Worker,
        guard: impl Fn(Arc<File>, u64) -> Option<Guard> + Send + Sync + 'static,
        connections: mpsc::Sender<Connection>,
    ) -> Arc<Self> {
        let inherited = Arc::new(Mutex::new(interceptor.listeners()));
        let (open, opening, evicted, taken, tasks, log) = Default::default();
        let guard = Box::new(guard);
        Arc::new(Self { interceptor, worker, guard, taken, open, opening, inherited, evicted, connections, tasks, log })
    }

    /// Opens listeners as the kernel asks for them, until the ring buffer fails.
    pub(crate) async fn serve_wanted(self: Arc<Self>, mut wanted: WantedEvents) -> std::io::Result<Infallible> {
        loop {
            let (netns, pid) = wanted.next().await?;
            if self.publish(netns) {
                continue; // opened since; the connection's next SYN gets through
            }
            // One attempt at a time for each namespace: a held connection asks again with each SYN.
            if !self.opening().insert(netns) {
                continue;
            }
            self.make_room();
            let listeners = Arc::clone(&self);
            self.tasks.spawn(async move {
                if let Err(error) = listeners.ensure(pid).await {
                    // The process may simply be gone.
                    debug!("no listener in the network namespace {netns} of process {pid}: {error:#}");
                }
                listeners.opening().remove(&netns);
            });
        }
    }

    /// Opens the listener of this process's network namespace unless it is there; its cookie.
    async fn ensure(self: &Arc<Self>, pid: u32) -> anyhow::Result<u64> {
        for _ in 0..CLOSING.0 {
            let namespace = Arc::new(netns::of_process(pid)?);
            match self.open_in(Arc::clone(&namespace)).await? {
                Opened::New { listener, netns, port } => {
                    self.add(listener, netns, port, namespace).inspect_err(|_| self.taken.closed(netns))?;
                    return Ok(netns);
                }
                Opened::Already { netns } if self.publish(netns) => return Ok(netns),
                Opened::Already { .. } => tokio::time::sleep(CLOSING.1).await,
            }
        }
        bail!("its old listener does not close");
    }

    async fn open_in(&self, namespace: Arc<File>) -> anyhow::Result<Opened> {
        let (taken, inherited, interceptor) =
            (Arc::clone(&self.taken), Arc::clone(&self.inherited), Arc::clone(&self.interceptor));
        let port = move |netns| inherited.lock().unwrap_or_else(PoisonError::into_inner).get(&netns).copied();
        self.worker.run_in(Some(namespace), move || taken.open(port, &interceptor)).await?
    }

    fn add(
        self: &Arc<Self>,
        listener: std::net::TcpListener,
        netns: u64,
        port: u16,
        namespace: Arc<File>,
    ) -> anyhow::Result<()> {
        let listener = TcpListener::from_std(listener).context("cannot poll the listener")?;
        let close = CancellationToken::new();
        let entry = Open { port, close: close.clone(), holds: 0, last_used: Instant::now() };
        self.lock().insert(netns, entry);
        let guard = (self.guard)(namespace, netns);
        self.tasks.spawn(Arc::clone(self).accept(listener, netns, close, guard));
        if !self.publish(netns) {
            self.close(netns);
            bail!("the kernel does not take its port");
        }
        debug!("listening in network namespace {netns} on port {port}");
        Ok(())
    }

    /// Tells the kernel where we listen in this namespace; false if we do not.
    fn publish(&self, netns: u64) -> bool {
        let Some(port) = self.lock().get(&netns).map(|open| open.port) else { return false };
        match self.interceptor.set_listener(netns, port) {
            Ok(()) => true,
            Err(error) => {
                warn!("network namespace {netns}: {error}");
                false
            }
        }
    }

    async fn accept(
        self: Arc<Self>,
        listener: TcpListener,
        netns: u64,
        close: CancellationToken,
        guard: Option<Guard>,
    ) {
        loop {
            let accepted = tokio::select! {
                () = close.cancelled() => break,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((connection, _)) => self.hand_over(connection, netns).await,
                Err(error) => {
                    // Out of descriptors, or a connection gone before we took it. Neither may spin.
                    if let Some(line) = self.log.line() {
                        warn!(unsaid = line.unsaid, "accept in network namespace {netns}: {error}");
                    }
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
        // First the kernel, so that it holds what comes from now on; then those whose handshake was
        // under way, which on loopback is over in microseconds, if the machine has them.
        self.interceptor.unmark_listener(&listener);
        tokio::time::sleep(SETTLE).await;
        while let Ok(Ok((connection, _))) = tokio::time::timeout(Duration::ZERO, listener.accept()).await {
            self.hand_over(connection, netns).await;
        }
        drop((listener, guard));
        self.taken.closed(netns);
    }

    async fn hand_over(&self, connection: TcpStream, netns: u64) {
        if let Some(open) = self.lock().get_mut(&netns) {
            open.last_used = Instant::now();
        }
        match self.interceptor.flow_of(&connection) {
            // Fails only when the server is gone, and then nobody is there to care.
            Some(flow) if flow.netns == netns => drop(self.connections.send((connection, flow)).await),
            // Closed by dropping it: who it is nobody can tell.
            _ => {
                if let Some(line) = self.log.line() {
                    let unsaid = line.unsaid;
                    warn!(unsaid, "closed a connection without a recorded flow in network namespace {netns}");
                }
            }
        }
    }

    /// Opens the listener of this process's namespace and keeps it open for a running container, until
    /// [`Self::release`]; its cookie.
    pub(crate) async fn hold(self: &Arc<Self>, pid: u32) -> anyhow::Result<u64> {
        loop {
            let netns = self.ensure(pid).await?;
            // Another container's end may have closed it in between.
            if let Some(open) = self.lock().get_mut(&netns) {
                open.holds += 1;
                return Ok(netns);
            }
        }
    }

    /// The container is gone; with the last one goes the listener.
    pub(crate) fn release(&self, netns: u64) {
        let unused = match self.lock().get_mut(&netns) {
            Some(open) => {
                open.holds = open.holds.saturating_sub(1);
                open.holds == 0
            }
            None => false,
        };
        if unused {
            self.close(netns);
        }
    }

    fn opening(&self) -> MutexGuard<'_, HashSet<u64>> {
        self.opening.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn make_room(&self) {
        let open = self.lock();
        let unheld = || open.iter().filter(|(_, open)| open.holds == 0);
        if unheld().count() < STRANGERS {
            return;
        }
        let oldest = unheld().min_by_key(|(_, open)| open.last_used).map(|(netns, _)| *netns);
        drop(open);
        oldest.into_iter().for_each(|netns| self.close(netns));
        self.evicted.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn evicted(&self) -> u64 {
        self.evicted.load(Ordering::Relaxed)
    }

    pub(crate) fn count(&self) -> usize {
        self.lock().len()
    }

    /// Closes the listeners that no container holds and nobody has used for this long: namespaces
    /// of processes that no engine told us about.
    pub(crate) fn close_idle(&self, idle: Duration) {
        let unused = |open: &Open| open.holds == 0 && open.last_used.elapsed() >= idle;
        let idle: Vec<u64> = self.lock().iter().filter(|(_, open)| unused(open)).map(|(netns, _)| *netns).collect();
        for netns in idle {
            self.close(netns);
        }
        // By now whoever still needs one has got ours.
        for (netns, port) in std::mem::take(&mut *self.inherited.lock().unwrap_or_else(PoisonError::into_inner)) {
            if !self.lock().contains_key(&netns) {
                self.interceptor.forget_listener(netns, port);
            }
        }
    }

    fn close(&self, netns: u64) {
        if let Some(open) = self.lock().remove(&netns) {
            debug!("closing the listener in network namespace {netns}");
            self.interceptor.forget_listener(netns, open.port);
            open.close.cancel();
        }
    }

    /// Holds new connections and closes all listeners, for the end of the daemon. The kernel keeps their ports, for these
    /// are what the connections wait for.
    pub(crate) async fn shut_down(&self) {
        let open = std::mem::take(&mut *self.lock());
        info!("closing {} listeners; new connections wait for the next daemon", open.len());
        open.values().for_each(|open| open.close.cancel());
        self.tasks.close();
        // One that was being opened just now may stay; it ends with the process.
        if tokio::time::timeout(CLOSED, self.tasks.wait()).await.is_err() {
            debug!("a listener was opened while the others were closed");
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
