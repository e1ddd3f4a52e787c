//! Whole frames, given to an interface past the IP layer.

use std::os::fd::OwnedFd;
use std::{fs, net::Ipv4Addr};

use libc::{AF_PACKET, AF_XDP, SOCK_DGRAM, SOCK_RAW};

use crate::{
    Outcome, Tried, at,
    packets::{accepted, ip_packet, ip6_packet, raw_receiver},
    sys::{self, Address},
    tcp,
};

const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;

#[derive(Clone, Copy)]
pub(crate) enum Packet {
    V4,
    V6,
}

/// How PACKET_QDISC_BYPASS is set: then frames pass the queueing discipline, where tc looks at them.
#[derive(Clone, Copy)]
pub(crate) enum Bypass {
    No,
    Set,
    /// As a 32-bit program does.
    Set32,
}

impl Bypass {
    fn set(self, socket: &OwnedFd) -> Result<(), Outcome> {
        const PACKET_QDISC_BYPASS: libc::c_int = 20;
        let result = match self {
            Self::No => Ok(()),
            Self::Set => sys::set_number(socket, libc::SOL_PACKET, PACKET_QDISC_BYPASS, 1),
            Self::Set32 => sys::set_number_32(socket, libc::SOL_PACKET, PACKET_QDISC_BYPASS, 1),
        };
        result.map_err(at("PACKET_QDISC_BYPASS"))
    }
}

/// Only the option.
pub(crate) fn option(bypass: Bypass) -> Tried {
    bypass.set(&sys::socket(AF_PACKET, SOCK_DGRAM, 0).map_err(at("socket"))?)?;
    Ok(Outcome::Served { answer: "set".into(), peer: String::new() })
}

/// By AF_PACKET.
pub(crate) fn packet(interface: &str, packet: Packet, bypass: Bypass) -> Tried {
    let receiver = raw_receiver()?;
    let (protocol, packet) = match packet {
        Packet::V4 => (IPV4, ip_packet(tcp::own_address()?)),
        Packet::V6 => (IPV6, ip6_packet()),
    };
    let to = Address::link(protocol, index(interface)?, next_hop()?);
    let socket = sys::socket(AF_PACKET, SOCK_DGRAM, 0).map_err(at("socket"))?;
    bypass.set(&socket)?;
    sys::send(&socket, &packet, 0, Some(&to)).map_err(at("sendto"))?;
    accepted(&receiver)
}

/// By AF_PACKET to nobody's hardware address: whether the interface takes it is all there is to see.
pub(crate) fn blind(interface: &str) -> Tried {
    let to = Address::link(IPV4, index(interface)?, [2, 0, 0, 0, 0, 1]);
    let socket = sys::socket(AF_PACKET, SOCK_DGRAM, 0).map_err(at("socket"))?;
    sys::send(&socket, &ip_packet([10, 0, 0, 1]), 0, Some(&to)).map_err(at("sendto"))?;
    Ok(Outcome::Timeout("sent".into()))
}

fn index(interface: &str) -> Result<u32, Outcome> {
    sys::interface_index(interface).map_err(at("interface"))
}

/// The hardware address of the gateway.
fn next_hop() -> Result<[u8; 6], Outcome> {
    let gateway = tcp::gateway()?;
    // Makes the kernel ask for it.
    let socket = sys::socket(libc::AF_INET, SOCK_DGRAM, 0).map_err(at("socket"))?;
    sys::send(&socket, b"hello", 0, Some(&Address::v4(gateway, 9))).map_err(at("sendto the gateway"))?;
    let wanted = format!("{} ", Ipv4Addr::from(gateway));
    for _ in 0..200 {
        std::thread::sleep(std::time::Duration::from_millis(5));
        let table = fs::read_to_string("/proc/net/arp").map_err(at("/proc/net/arp"))?;
        let entry = table.lines().find(|line| line.starts_with(&wanted));
        let address = entry.and_then(|line| line.split_whitespace().nth(3)).and_then(hardware);
        if let Some(address) = address.filter(|address| *address != [0; 6]) {
            return Ok(address);
        }
    }
    Err(Outcome::Error("the gateway has no hardware address".into()))
}

fn hardware(text: &str) -> Option<[u8; 6]> {
    let bytes: Vec<u8> = text.trim().split(':').filter_map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    bytes.try_into().ok()
}

/// By AF_XDP, which needs no program to send.
pub(crate) fn xdp(interface: &str) -> Tried {
    const SOL_XDP: libc::c_int = 283;
    const MMAP_OFFSETS: libc::c_int = 1;
    const TX_RING: libc::c_int = 3;
    const MEMORY: libc::c_int = 4;
    const FILL_RING: libc::c_int = 5;
    const COMPLETION_RING: libc::c_int = 6;
    const AT_TX_RING: i64 = 0x8000_0000;
    const COPY: u16 = 2;
    const FRAME: usize = 4096;

    let receiver = raw_receiver()?;
    let mut frame = next_hop()?.to_vec();
    let own = fs::read_to_string(format!("/sys/class/net/{interface}/address")).map_err(at("own address"))?;
    frame.extend(hardware(&own).unwrap_or_default());
    frame.extend(IPV4.to_be_bytes());
    frame.extend(ip_packet(tcp::own_address()?));

    let socket = sys::socket(AF_XDP, SOCK_RAW, 0).map_err(at("socket"))?;
    let (start, memory) = sys::pages(4 * FRAME).map_err(at("mmap"))?;
    // `struct xdp_umem_reg`: start, length, size of a frame, no headroom.
    let region = [start.to_ne_bytes(), (4 * FRAME as u64).to_ne_bytes(), (FRAME as u64).to_ne_bytes()].concat();
    sys::set(&socket, SOL_XDP, MEMORY, &region).map_err(at("XDP_UMEM_REG"))?;
    for ring in [FILL_RING, COMPLETION_RING, TX_RING] {
        sys::set_number(&socket, SOL_XDP, ring, 4).map_err(at("ring"))?;
    }
    // `struct xdp_mmap_offsets`: of four rings four numbers each, the second ring is ours.
    let offsets = sys::get(&socket, SOL_XDP, MMAP_OFFSETS, 128).map_err(at("XDP_MMAP_OFFSETS"))?;
    let offset = |index: usize| {
        let bytes = offsets.get(index * 8..index * 8 + 8).and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(0, |bytes| u64::from_ne_bytes(bytes) as usize)
    };
    let (producer, descriptors) = (offset(4), offset(6));
    let ring = sys::Shared::map(&socket, AT_TX_RING, descriptors + 4 * 16).map_err(at("mmap"))?;
    sys::bind(&socket, &Address::xdp(COPY, index(interface)?)).map_err(at("bind"))?;

    memory.write_bytes(0, &frame);
    // The frame at the start of the memory, and its length.
    ring.write_bytes(descriptors, &[0_u64.to_ne_bytes(), (frame.len() as u64).to_ne_bytes()].concat());
    ring.write(producer, 1);
    sys::send(&socket, &[], libc::MSG_DONTWAIT, None).map_err(at("send"))?;
    accepted(&receiver)
}
