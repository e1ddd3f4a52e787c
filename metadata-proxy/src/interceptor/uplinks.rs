//! The guard on uplinks, which follows network devices as they come and go: the host's, and those that
//! lie in a container's own network namespace, such as the network interface of an ECS task.
//!
//! Linux 6.6 and later: tcx links, pinned by interface index. Before: clsact filters, which stay by
//! themselves and have to be removed by hand.

use std::{
    collections::{HashMap, HashSet},
    convert::Infallible,
    fmt,
    fs::{self, File},
    io,
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::Path,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::Context as _;
use aya::{
    Ebpf,
    programs::{
        LinkOrder, ProgramError, SchedClassifier, TcAttachType,
        links::FdLink,
        tc::{
            NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle, qdisc_add_clsact, qdisc_detach_program,
        },
    },
};
use futures_util::{Stream, StreamExt as _, TryStreamExt as _};
use rtnetlink::{
    Handle, MulticastGroup, new_multicast_connection,
    packet_core::NetlinkMessage,
    packet_route::RouteNetlinkMessage,
    packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkLayerType, LinkMessage},
    sys::SocketAddr,
};
use tokio::time::{sleep, timeout};
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, info, warn};

use super::{
    object::{Detached, Pins},
    syscall,
};
use crate::netns;

pub(super) const PROGRAM: &str = "imds_uplink";
/// A container's start brings several changes at once, and none of them an uplink.
const SETTLE: Duration = Duration::from_millis(20);
/// Before all is looked at anew, when the kernel's notifications have failed.
const AGAIN: Duration = Duration::from_secs(1);
/// The place of our filter among those of others: before them, for one that accepts ends the chain. By it
/// the next daemon finds the filter to exchange its program.
const PRIORITY: u16 = 1;
const HANDLE: TcHandle = TcHandle::new(0, 0x6d70);

/// Not a fault of a host that has none, but no protection of one whose uplink is of another kind.
pub(crate) const NONE: &str =
    "no uplink found (an Ethernet device that is no bridge): frames of packet sockets are stopped nowhere";

type Message = (NetlinkMessage<RouteNetlinkMessage>, SocketAddr);
/// Device names by interface index.
type Devices = HashMap<u32, String>;

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

    /// On a thread that is in the device's namespace.
    fn attach(&self, name: &str, pin: &str) -> anyhow::Result<()> {
        let pin = self.pins.uplinks().join(pin);
        let mut object = self.object.lock().unwrap_or_else(PoisonError::into_inner);
        let program = object.program_mut(PROGRAM).context("this build has no uplink program")?;
        let program: &mut SchedClassifier = program.try_into()?;
        if !self.tcx {
            return attach_filter(program, name);
        }
        if pin.exists() {
            let link = syscall::open_pin(&pin).context("cannot open the pinned link")?;
            match syscall::update_link(link.as_fd(), program.fd()?.as_fd()) {
                Ok(()) if is_on(name, program)? => return Ok(()),
                // The device has gone to another namespace with its link, and its index here to another device.
                Ok(()) => keep_aside(&pin).context("cannot rename the pin of a device that has moved")?,
                Err(error) => {
                    debug!("{}: {error}", pin.display());
                    fs::remove_file(&pin).context("cannot remove the pin of a device that is gone")?;
                }
            }
        }
        let options = TcAttachOptions::TcxOrder(LinkOrder::default());
        let id = match program.attach_with_options(name, TcAttachType::Egress, options) {
            Ok(id) => id,
            // This very program has come with the device, by the link from when it was in another namespace.
            Err(ProgramError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::AlreadyExists => {
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        };
        FdLink::try_from(program.take_link(id)?)?.pin(&pin).context("cannot pin the link")?;
        Ok(())
    }

    /// Removes the pins of devices that are gone, and of those that are `others` in the namespace of this prefix.
    fn remove_stale(&self, prefix: &str, others: &HashSet<u32>) {
        for entry in fs::read_dir(self.pins.uplinks()).into_iter().flatten().flatten() {
            let (pin, name) = (entry.path(), entry.file_name());
            let index = name.to_str().and_then(|name| name.strip_prefix(prefix)?.parse().ok());
            let dead = || syscall::open_pin(&pin).and_then(|link| syscall::is_dead(link.as_fd()));
            if index.is_some_and(|index| others.contains(&index)) || dead().is_ok_and(|dead| dead) {
                let _ = fs::remove_file(pin);
            }
        }
    }
}

/// Whether the program runs on this device.
fn is_on(name: &str, program: &SchedClassifier) -> anyhow::Result<bool> {
    let own = program.info()?.id();
    let (_, programs) = SchedClassifier::query_tcx(name, TcAttachType::Egress)?;
    Ok(programs.iter().any(|program| program.id() == own))
}

/// By a name that is no device's; it goes when its device does.
fn keep_aside(pin: &Path) -> io::Result<()> {
    let mut aside = pin.as_os_str().to_owned();
    while Path::new(&aside).exists() {
        aside.push("_moved");
    }
    fs::rename(pin, aside)
}

/// Exchanges the program of a filter that is there, or adds one, which has no link to pin.
fn attach_filter(program: &mut SchedClassifier, name: &str) -> anyhow::Result<()> {
    let egress = TcAttachType::Egress;
    let _ = qdisc_add_clsact(name); // else it is there
    let old = SchedClassifierLink::attached(name, egress, PRIORITY, HANDLE, None).context("no such device")?;
    let id = match program.attach_to_link(old) {
        Ok(id) => id,
        Err(_) => {
            let options = NlOptions { priority: PRIORITY, handle: HANDLE, classid: None };
            program.attach_with_options(name, egress, TcAttachOptions::Netlink(options))?
        }
    };
    // Dropping it would detach the filter.
    std::mem::forget(program.take_link(id)?);
    Ok(())
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
        let (uplinks, others) = list(handle, self.namespace.is_none()).await?;
        let mut troubled = false;
        self.attached.retain(|index, _| uplinks.contains_key(index));
        self.uplinks.remove_stale(&self.prefix(), &others);
        for (index, name) in uplinks {
            if self.attached.get(&index) == Some(&name) {
                continue;
            }
            match self.attach(index, name.clone()).await {
                Ok(()) => {
                    info!("guarding uplink {name}{self}");
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

/// The names of the host's, sorted.
pub(crate) async fn on_host() -> anyhow::Result<Vec<String>> {
    let (connection, handle, _) = new_multicast_connection(&[])?;
    let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
    let mut names: Vec<String> = list(&handle, true).await?.0.into_values().collect();
    names.sort();
    Ok(names)
}

/// Removes the filters that have no link, wherever they are; where there are none, there is nothing to do.
pub(super) async fn remove_filters(done: &mut Detached) {
    let worker = match netns::Worker::start() {
        Ok(worker) => worker,
        Err(error) => return done.failed.push(error),
    };
    for namespace in netns::all() {
        if let Err(error) = remove_filters_in(Arc::new(namespace), &worker, done).await {
            done.failed.push(error.context("cannot look for filters in a network namespace"));
        }
    }
}

async fn remove_filters_in(namespace: Arc<File>, worker: &netns::Worker, done: &mut Detached) -> anyhow::Result<()> {
    let inode = namespace.metadata()?.ino();
    let connect = || new_multicast_connection(&[]);
    let (connection, handle, _) = worker.run_in(Some(Arc::clone(&namespace)), connect).await??;
    let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
    for name in list(&handle, true).await?.0.into_values() {
        let filter = format!("the filter on {name} in network namespace {inode}");
        let remove = move || qdisc_detach_program(&name, TcAttachType::Egress, PROGRAM);
        match worker.run_in(Some(Arc::clone(&namespace)), remove).await? {
            Ok(()) => done.removed.push(filter),
            // Most have none; and some go meanwhile, with theirs.
            Err(TcError::IoError(error))
                if error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV) => {}
            Err(error) => done.failed.push(anyhow::Error::from(error).context(format!("cannot remove {filter}"))),
        }
    }
    Ok(())
}

/// The uplinks, and the indices of the other devices.
async fn list(handle: &Handle, on_host: bool) -> anyhow::Result<(Devices, HashSet<u32>)> {
    let links: Vec<LinkMessage> =
        handle.link().get().execute().try_collect().await.context("cannot list network devices")?;
    let uplinks: Devices = links.iter().filter_map(|link| uplink(link, on_host)).collect();
    let indices = links.iter().map(|link| link.header.index);
    let others = indices.filter(|index| !uplinks.contains_key(index)).collect();
    Ok((uplinks, others))
}

/// Ethernet devices by which frames can leave the host.
///
/// Not bridges and the virtual devices on them, such as the host's ends of the containers' links: what goes
/// there has not left, and comes by here if it does. For the same reason in a container's namespace only
/// hardware, and what a program of the host reads from.
fn uplink(link: &LinkMessage, on_host: bool) -> Option<(u32, String)> {
    let mut name = None;
    let mut kind = None;
    let mut on_bridge = false;
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(value) => name = Some(value.clone()),
            LinkAttribute::Controller(_) => on_bridge = true,
            LinkAttribute::LinkInfo(infos) => {
                kind = infos.iter().find_map(|info| if let LinkInfo::Kind(kind) = info { Some(kind) } else { None });
            }
            _ => {}
        }
    }
    let leads_out = match kind {
        // Hardware, also where it is a bridge's way out.
        None => true,
        Some(InfoKind::Tun) => !on_bridge,
        Some(InfoKind::Bridge) => false,
        Some(_) => on_host && !on_bridge,
    };
    (link.header.link_layer_type == LinkLayerType::Ether && leads_out).then_some((link.header.index, name?))
}
