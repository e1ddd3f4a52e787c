//! Sees every packet to the metadata service arrive beyond the host, whatever protocol it is of.

use std::{collections::BTreeMap, net::Ipv6Addr, os::fd::OwnedFd};

use anyhow::{Context as _, Result};
use rustix::net::{AddressFamily, Protocol, RecvFlags, SocketFlags, SocketType, recv, socket_with};

use crate::cloud::Cloud;
use crate::host::METADATA_V6;

const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const SERVICE_V4: [u8; 4] = [169, 254, 169, 254];

/// Two packet sockets at the far end of the uplink. Each is of one protocol, and so hears of
/// packets that arrive, once each, and not of those that leave.
pub(super) struct Witness([OwnedFd; 2]);

impl Witness {
    pub(super) fn start(cloud: &Cloud) -> Result<Self> {
        let open = |protocol: u16| {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let raw = std::num::NonZeroU32::new(u32::from(protocol.to_be())).map(Protocol::from_raw);
            socket_with(AddressFamily::PACKET, SocketType::DGRAM, flags, raw)
        };
        let sockets = cloud.inside(|| Ok::<_, rustix::io::Errno>([open(IPV4)?, open(IPV6)?]))?;
        Ok(Self(sockets.context("opening a packet socket")?))
    }

    /// The packets since the last call: what they were and from where, with their number.
    pub(super) fn take(&self) -> BTreeMap<String, usize> {
        let mut seen = BTreeMap::new();
        let mut buffer = [0; 128];
        for socket in &self.0 {
            while let Ok((_, length)) = recv(socket, &mut buffer[..], RecvFlags::TRUNC) {
                if let Some(packet) = describe(&buffer[..length.min(buffer.len())]) {
                    *seen.entry(packet).or_default() += 1;
                }
            }
        }
        seen
    }
}

/// None: it is not for the metadata service.
fn describe(packet: &[u8]) -> Option<String> {
    let first = packet.first()?;
    match first >> 4 {
        4 if packet.get(16..20)? == SERVICE_V4 => {
            let payload = packet.get(usize::from(first & 15) * 4..).unwrap_or_default();
            protocol(*packet.get(9)?, payload, "")
        }
        6 => {
            let destination: [u8; 16] = packet.get(24..40)?.try_into().ok()?;
            let service: Ipv6Addr = METADATA_V6.parse().ok()?;
            (Ipv6Addr::from(destination) == service).then_some(())?;
            let payload = packet.get(40..).unwrap_or_default();
            protocol(*packet.get(6)?, payload, "6")
        }
        _ => None,
    }
}

fn protocol(number: u8, payload: &[u8], version: &str) -> Option<String> {
    const RST: u8 = 0x04;
    Some(match number {
        1 | 58 => format!("ICMP{version}"),
        // The kernel's own answer to what nobody waits for, such as the end of a connection from
        // before. It carries nothing; and its socket is the kernel's, outside of the test's cgroup.
        6 if payload.get(13)? & RST != 0 => return None,
        6 => format!("TCP{version}"),
        17 => format!("UDP{version}"),
        other => format!("protocol {other}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_packets_to_the_service_count() {
        let mut packet = vec![0x45, 0, 0, 40, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 169, 254, 169, 254];
        assert_eq!(describe(&packet).as_deref(), Some("UDP"));
        packet[19] = 253;
        assert_eq!(describe(&packet), None);
        let mut packet = vec![0x60, 0, 0, 0, 0, 20, 6, 64];
        packet.extend([0; 16]);
        packet.extend([0xfd, 0, 0x0e, 0xc2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x02, 0x54]);
        packet.extend([0, 1, 0, 80, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x02]);
        assert_eq!(describe(&packet).as_deref(), Some("TCP6"));
        assert_eq!(describe(&packet[..30]), None);
        packet[53] = 0x14;
        assert_eq!(describe(&packet), None);
        assert_eq!(describe(&[]), None);
    }
}
