//! The network devices of a namespace, and which of them are uplinks.

use std::collections::{HashMap, HashSet};

use anyhow::Context as _;
use futures_util::TryStreamExt as _;
use rtnetlink::{
    Handle, new_multicast_connection,
    packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkLayerType, LinkMessage},
};
use tokio_util::task::AbortOnDropHandle;

/// Device names by interface index.
pub(super) type Devices = HashMap<u32, String>;

/// The names of the host's, sorted.
pub(crate) async fn on_host() -> anyhow::Result<Vec<String>> {
    let (connection, handle, _) = new_multicast_connection(&[])?;
    let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
    let mut names: Vec<String> = list(&handle, true).await?.0.into_values().collect();
    names.sort();
    Ok(names)
}

/// The uplinks, and the indices of the other devices.
pub(super) async fn list(handle: &Handle, on_host: bool) -> anyhow::Result<(Devices, HashSet<u32>)> {
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
