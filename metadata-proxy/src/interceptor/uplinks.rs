//! The guard on the host's uplinks, which follows network devices as they come and go.
//!
//! Linux 6.6 and later: tcx links, pinned by interface index. Before: clsact filters, which stay by
//! themselves and have to be removed by hand.

use std::{collections::HashMap, convert::Infallible, fs, os::fd::AsFd as _, path::PathBuf, time::Duration};

use anyhow::Context as _;
use aya::{
    Ebpf,
    programs::{
        SchedClassifier, TcAttachType,
        links::FdLink,
        tc::{qdisc_add_clsact, qdisc_detach_program},
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
use tracing::{debug, info, warn};

use super::syscall;

pub(super) const PROGRAM: &str = "imds_uplink";
/// A container's start brings several changes at once, and none of them an uplink.
const SETTLE: Duration = Duration::from_millis(20);

type Message = (NetlinkMessage<RouteNetlinkMessage>, SocketAddr);

pub(crate) struct Uplinks {
    object: Ebpf,
    pins: PathBuf,
    /// Interface index -> name.
    attached: HashMap<u32, String>,
}

impl Uplinks {
    pub(super) fn new(object: Ebpf, pins: PathBuf) -> Self {
        Self { object, pins, attached: HashMap::new() }
    }

    /// Attaches to the uplinks that are there; the future goes on with those that come and go.
    pub(crate) async fn start(mut self) -> anyhow::Result<impl Future<Output = ()> + Send> {
        let (connection, handle, changes) = new_multicast_connection(&[MulticastGroup::Link])?;
        tokio::spawn(connection);
        let troubled = self.attach_all(&list(&handle).await?, false);
        Ok(async move {
            let Err(error) = self.follow(&handle, changes, troubled).await;
            warn!("packet sockets can reach the real service by new devices, which cannot be followed: {error:#}");
        })
    }

    async fn follow(
        &mut self,
        handle: &Handle,
        mut changes: impl Stream<Item = Message> + Unpin,
        mut troubled: bool,
    ) -> anyhow::Result<Infallible> {
        loop {
            // What has changed, the next look tells; and a device with which there was trouble gets a
            // second one, for it may have been about to go.
            let patience = if troubled { SETTLE } else { Duration::MAX };
            if let Ok(change) = timeout(patience, changes.next()).await {
                change.context("the kernel's notifications ended")?;
                sleep(SETTLE).await;
                while let Ok(Some(_)) = timeout(Duration::ZERO, changes.next()).await {}
                troubled = false;
            }
            troubled = self.attach_all(&list(handle).await?, troubled);
        }
    }

    /// Whether there was trouble; on a second look it is told.
    fn attach_all(&mut self, uplinks: &HashMap<u32, String>, second: bool) -> bool {
        let mut troubled = false;
        self.attached.retain(|index, _| uplinks.contains_key(index));
        self.remove_stale(uplinks);
        for (&index, name) in uplinks {
            if self.attached.get(&index) == Some(name) {
                continue;
            }
            match self.attach(index, name) {
                Ok(()) => {
                    info!("guarding uplink {name}");
                    self.attached.insert(index, name.clone());
                }
                Err(error) if second => warn!("packet sockets can reach the real service through {name}: {error:#}"),
                Err(error) => {
                    debug!("cannot guard {name}: {error:#}");
                    troubled = true;
                }
            }
        }
        troubled
    }

    fn attach(&mut self, index: u32, name: &str) -> anyhow::Result<()> {
        let pin = self.pins.join(index.to_string());
        let program = self.object.program_mut(PROGRAM).context("this build has no uplink program")?;
        let program: &mut SchedClassifier = program.try_into()?;
        if pin.exists() {
            let link = syscall::open_pin(&pin).context("cannot open the pinned link")?;
            match syscall::update_link(link.as_fd(), program.fd()?.as_fd()) {
                Ok(()) => return Ok(()),
                // The index has gone to another device.
                Err(error) => debug!("{}: {error}", pin.display()),
            }
            fs::remove_file(&pin).context("cannot remove the pin of a device that is gone")?;
        }
        let id = match program.attach(name, TcAttachType::Egress) {
            Ok(id) => id,
            // No tcx: then there must be a clsact qdisc, and no filter of a daemon before us.
            Err(_) => {
                let _ = qdisc_add_clsact(name);
                let _ = qdisc_detach_program(name, TcAttachType::Egress, PROGRAM);
                program.attach(name, TcAttachType::Egress)?
            }
        };
        let link = program.take_link(id)?;
        match FdLink::try_from(link) {
            Ok(link) => drop(link.pin(&pin).context("cannot pin the link")?),
            Err(error) => debug!("{name}: a clsact filter, which has no link to pin ({error})"),
        }
        Ok(())
    }

    fn remove_stale(&self, uplinks: &HashMap<u32, String>) {
        for entry in fs::read_dir(&self.pins).into_iter().flatten().flatten() {
            let index = entry.file_name().to_str().and_then(|name| name.parse().ok());
            if index.is_some_and(|index: u32| !uplinks.contains_key(&index)) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

/// Removes the filters that have no link; where there are none, there is nothing to do.
pub(super) async fn remove_filters() -> anyhow::Result<()> {
    let (connection, handle, _) = new_multicast_connection(&[])?;
    tokio::spawn(connection);
    for name in list(&handle).await?.values() {
        let _ = qdisc_detach_program(name, TcAttachType::Egress, PROGRAM);
    }
    Ok(())
}

async fn list(handle: &Handle) -> anyhow::Result<HashMap<u32, String>> {
    let links: Vec<LinkMessage> =
        handle.link().get().execute().try_collect().await.context("cannot list network devices")?;
    Ok(links.iter().filter_map(uplink).collect())
}

/// Ethernet devices by which frames can leave the host. Not bridges and the virtual devices on them,
/// such as the containers' ends: what goes there has not left, and comes by here if it does.
fn uplink(link: &LinkMessage) -> Option<(u32, String)> {
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
    let inside = match kind {
        Some(InfoKind::Bridge) => true,
        Some(_) => on_bridge,
        // Hardware, also where it is a bridge's way out.
        None => false,
    };
    (link.header.link_layer_type == LinkLayerType::Ether && !inside).then_some((link.header.index, name?))
}
