//! The guard on uplinks, which follows network devices as they come and go: the host's, and those that
//! lie in a container's own network namespace, such as the network interface of an ECS task.

mod attach;
mod devices;

use std::{
    convert::Infallible,
    fmt,
    fs::File,
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::Context as _;
use aya::{
    Ebpf,
    programs::{SchedClassifier, TcAttachType},
};
use futures_util::{Stream, StreamExt as _};
use rtnetlink::{
    Handle, MulticastGroup, new_multicast_connection, packet_core::NetlinkMessage, packet_route::RouteNetlinkMessage,
    sys::SocketAddr,
};
use tokio::time::{sleep, timeout};
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, info, warn};

use super::object::Pins;
use crate::netns;
pub(super) use attach::remove_filters;
use devices::Devices;
pub(crate) use devices::on_host;

pub(super) const PROGRAM: &str = "imds_uplink";
/// A container's start brings several changes at once, and none of them an uplink.
const SETTLE: Duration = Duration::from_millis(20);
/// Before all is looked at anew, when the kernel's notifications have failed.
const AGAIN: Duration = Duration::from_secs(1);
/// Not a fault of a host that has none, but no protection of one whose uplink is of another kind.
pub(crate) const NONE: &str =
    "no uplink found (an Ethernet device that is no bridge): frames of packet sockets are stopped nowhere";

type Message = (NetlinkMessage<RouteNetlinkMessage>, SocketAddr);

pub(crate) struct Uplinks {
    object: Mutex<Ebpf>,
    pins: Pins,
    worker: netns::Worker,
    tcx: bool,
}

impl Uplinks {
    pub(super) fn new(object: Ebpf, pins: Pins, worker: netns::Worker) -> Self {
        // Asked of a device that is everywhere; a kernel without tcx does not know the question.
        let tcx = SchedClassifier::query_tcx("lo", TcAttachType::Egress).is_ok();
        let how = if tcx { "tcx links" } else { "clsact filters, for the kernel has no tcx (Linux 6.6)" };
        info!("uplinks are guarded by {how}");
        Self { object: Mutex::new(object), pins, worker, tcx }
    }

    /// Guards the host's uplinks; the future goes on with those that come and go.
    pub(crate) async fn guard_host(self: &Arc<Self>) -> anyhow::Result<impl Future<Output = Infallible> + use<>> {
        let mut place = Place { uplinks: Arc::clone(self), namespace: None, attached: Devices::new() };
        self.pins.adopt_uplinks();
        let watch = place.watch().await?;
        if place.attached.is_empty() && !watch.troubled {
            warn!("{NONE}; one that comes is guarded");
        }
        // Now that no uplink depends on it.
        self.pins.remove_stale();
        Ok(async move { place.follow(Some(watch)).await })
    }

    /// Guards those in another network namespace.
    pub(crate) async fn guard_in(self: Arc<Self>, namespace: Arc<File>, cookie: u64) -> Infallible {
        Place { uplinks: self, namespace: Some((namespace, cookie)), attached: Devices::new() }.follow(None).await
    }
}

/// A network namespace and its uplinks that are guarded.
struct Place {
    uplinks: Arc<Uplinks>,
    /// None: the host's.
    namespace: Option<(Arc<File>, u64)>,
    attached: Devices,
}

/// A look at the devices, and the changes since.
struct Watch {
    handle: Handle,
    changes: Pin<Box<dyn Stream<Item = Message> + Send>>,
    _connection: AbortOnDropHandle<()>,
    troubled: bool,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.namespace {
            None => Ok(()),
            Some((_, cookie)) => write!(f, " in network namespace {cookie}"),
        }
    }
}

impl Place {
    async fn follow(&mut self, mut watch: Option<Watch>) -> Infallible {
        loop {
            let Err(error) = self.keep(watch.take()).await;
            warn!(
                "cannot follow the network devices{self}, whose new uplinks are not guarded: {error:#}; trying again"
            );
            sleep(AGAIN).await;
        }
    }

    async fn watch(&mut self) -> anyhow::Result<Watch> {
        let connect = || new_multicast_connection(&[MulticastGroup::Link]);
        let (connection, handle, changes) =
            self.run(connect).await?.context("cannot ask the kernel for its network devices")?;
        let connection = AbortOnDropHandle::new(tokio::spawn(connection));
        let mut watch = Watch { handle, changes: Box::pin(changes), _connection: connection, troubled: false };
        watch.troubled = self.attach_all(&watch.handle, false).await?;
        Ok(watch)
    }

    async fn keep(&mut self, watch: Option<Watch>) -> anyhow::Result<Infallible> {
        let mut watch = match watch {
            Some(watch) => watch,
            None => self.watch().await?,
        };
        loop {
            // What has changed, the next look tells; and a device with which there was trouble gets a
            // second one, for it may have been about to go.
            let patience = if watch.troubled { SETTLE } else { Duration::MAX };
            if let Ok(change) = timeout(patience, watch.changes.next()).await {
                change.context("the kernel's notifications ended")?;
                sleep(SETTLE).await;
                while let Ok(Some(_)) = timeout(Duration::ZERO, watch.changes.next()).await {}
                watch.troubled = false;
            }
            watch.troubled = self.attach_all(&watch.handle, watch.troubled).await?;
        }
    }

    /// Whether there was trouble; on a second look it is told.
    async fn attach_all(&mut self, handle: &Handle, second: bool) -> anyhow::Result<bool> {
        let (uplinks, others) = devices::list(handle, self.namespace.is_none()).await?;
        let mut troubled = false;
        self.attached.retain(|index, _| uplinks.contains_key(index));
        self.uplinks.remove_stale(&self.prefix(), &others);
        for (index, name) in uplinks {
            if self.attached.get(&index) == Some(&name) {
                continue;
            }
            match self.attach(index, name.clone()).await {
                Ok(()) => {
                    // A container's start brings such, for moments, at each of its links.
                    match name.starts_with("veth") {
                        true => debug!("guarding {name}{self}, until it is on a bridge"),
                        false => info!("guarding uplink {name}{self}"),
                    }
                    self.attached.insert(index, name);
                }
                Err(error) if second => {
                    warn!("packet sockets can reach the real service through {name}{self}: {error:#}");
                }
                Err(error) => {
                    debug!("cannot guard {name}{self}: {error:#}");
                    troubled = true;
                }
            }
        }
        Ok(troubled)
    }

    async fn attach(&self, index: u32, name: String) -> anyhow::Result<()> {
        let pin = format!("{}{index}", self.prefix());
        let uplinks = Arc::clone(&self.uplinks);
        self.run(move || uplinks.attach(&name, &pin)).await?
    }

    /// Of the names of its pins.
    fn prefix(&self) -> String {
        self.namespace.as_ref().map_or_else(String::new, |(_, cookie)| format!("{cookie}-"))
    }

    async fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> anyhow::Result<T> {
        let namespace = self.namespace.as_ref().map(|(namespace, _)| Arc::clone(namespace));
        self.uplinks.worker.run_in(namespace, job).await
    }
}
