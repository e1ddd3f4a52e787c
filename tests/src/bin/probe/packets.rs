//! What is not a TCP connection of the kernel's making: UDP, ICMP, other protocols, raw IP.

use std::{
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use libc::{
    AF_INET, AF_INET6, IPPROTO_ICMP, IPPROTO_IPV6, IPPROTO_RAW, IPPROTO_TCP, SOCK_DGRAM, SOCK_RAW, SOCK_STREAM,
};

use crate::{
    Outcome, Tried, at,
    sys::{self, Address},
    tcp::{self, IMDS_V4, IMDS_V6, LISTENER, LISTENER_PORT},
};

/// On one machine an answer comes within microseconds.
const ANSWER_LIMIT: Duration = Duration::from_millis(150);
/// Where hand-made connections come from.
const SOURCE_PORT: u16 = 40_025;
const SYN: u8 = 0x02;
const SYN_ACK: u8 = 0x12;

pub(crate) fn udp(port: u16, connected: bool) -> Tried {
    let socket = sys::socket(AF_INET, SOCK_DGRAM, 0).map_err(at("socket"))?;
    let to = Address::v4(IMDS_V4, port);
    if connected {
        sys::connect(&socket, &to).map_err(at("connect"))?;
        sys::send(&socket, b"hello", 0, None).map_err(at("send"))?;
    } else {
        // Lets an unconnected socket hear of errors.
        sys::set_number(&socket, libc::IPPROTO_IP, libc::IP_RECVERR, 1).map_err(at("IP_RECVERR"))?;
        sys::send(&socket, b"hello", 0, Some(&to)).map_err(at("sendto"))?;
    }
    answered(&socket, "datagram", |_| true)
}

pub(crate) fn udp6() -> Tried {
    let socket = sys::socket(AF_INET6, SOCK_DGRAM, 0).map_err(at("socket"))?;
    sys::send(&socket, b"hello", 0, Some(&Address::v6(IMDS_V6, 80))).map_err(at("sendto"))?;
    answered(&socket, "datagram", |_| true)
}

/// SCTP and others that connect.
pub(crate) fn stream(protocol: libc::c_int) -> Tried {
    let socket = sys::socket(AF_INET, SOCK_STREAM, protocol).map_err(at("socket"))?;
    tcp::be_impatient(&socket)?;
    sys::connect(&socket, &tcp::imds()).map_err(at("connect"))?;
    tcp::ask(&socket)
}

/// Shared memory communications, which fall back to a TCP connection that the kernel makes.
pub(crate) fn smc() -> Tried {
    const AF_SMC: libc::c_int = 43;
    let socket = sys::socket(AF_SMC, SOCK_STREAM, 0).map_err(at("socket"))?;
    tcp::be_impatient(&socket)?;
    sys::connect(&socket, &tcp::imds()).map_err(at("connect"))?;
    tcp::ask(&socket)
}

pub(crate) fn ping(kind: libc::c_int) -> Tried {
    let socket = sys::socket(AF_INET, kind, IPPROTO_ICMP).map_err(at("socket"))?;
    let mut request = vec![8, 0, 0, 0, 0, 1, 0, 1];
    let sum = checksum(&request);
    request[2..4].copy_from_slice(&sum.to_be_bytes());
    sys::send(&socket, &request, 0, Some(&Address::v4(IMDS_V4, 0))).map_err(at("sendto"))?;
    let start = if kind == SOCK_RAW { 20 } else { 0 };
    answered(&socket, "echo reply", |packet| packet.get(start) == Some(&0))
}

/// A TCP connection begun by hand; the kernel makes the IP header.
pub(crate) fn raw_tcp(connected: bool) -> Tried {
    let socket = sys::socket(AF_INET, SOCK_RAW, IPPROTO_TCP).map_err(at("socket"))?;
    let syn = syn(&tcp::own_address()?, &IMDS_V4, 80);
    let to = Address::v4(IMDS_V4, 0);
    if connected {
        sys::connect(&socket, &to).map_err(at("connect"))?;
    }
    sys::send(&socket, &syn, 0, (!connected).then_some(&to)).map_err(at("sendto"))?;
    accepted(&socket)
}

/// To our own listener, past the redirection that tells who it is.
pub(crate) fn raw_to_listener() -> Tried {
    let socket = sys::socket(AF_INET, SOCK_RAW, IPPROTO_TCP).map_err(at("socket"))?;
    // May leave a mark on the socket or be refused; either way it must not help.
    let _ = sys::connect(&socket, &Address::v4(IMDS_V4, 80));
    let syn = syn(&LISTENER, &LISTENER, LISTENER_PORT);
    sys::send(&socket, &syn, 0, Some(&Address::v4(LISTENER, 0))).map_err(at("sendto"))?;
    accepted(&socket)
}

/// The IP header made by hand too; on request with a source route by the gateway.
pub(crate) fn raw_header(routed: bool) -> Tried {
    let receiver = raw_receiver()?;
    let socket = sys::socket(AF_INET, SOCK_RAW, IPPROTO_RAW).map_err(at("socket"))?;
    let next = if routed { tcp::gateway()? } else { IMDS_V4 };
    let mut packet = ip_packet(tcp::own_address()?);
    if routed {
        packet[16..20].copy_from_slice(&next);
        let [a, b, c, d] = IMDS_V4;
        packet.splice(20..20, [131, 7, 4, a, b, c, d, 0]);
        packet[0] = 0x47;
        let length = packet.len() as u16;
        packet[2..4].copy_from_slice(&length.to_be_bytes());
    }
    sys::send(&socket, &packet, 0, Some(&Address::v4(next, 0))).map_err(at("sendto"))?;
    accepted(&receiver)
}

pub(crate) fn raw6(header: bool) -> Tried {
    const IPV6_HDRINCL: libc::c_int = 36;
    let syn = syn(&[0; 16], &IMDS_V6, 80);
    let to = Address::v6(IMDS_V6, 0);
    let receiver = sys::socket(AF_INET6, SOCK_RAW, IPPROTO_TCP).map_err(at("socket"))?;
    if header {
        let socket = sys::socket(AF_INET6, SOCK_RAW, IPPROTO_RAW).map_err(at("socket"))?;
        sys::set_number(&socket, IPPROTO_IPV6, IPV6_HDRINCL, 1).map_err(at("IPV6_HDRINCL"))?;
        sys::send(&socket, &ip6_packet(), 0, Some(&to)).map_err(at("sendto"))?;
    } else {
        sys::set_number(&receiver, IPPROTO_IPV6, libc::IPV6_CHECKSUM, 16).map_err(at("IPV6_CHECKSUM"))?;
        sys::send(&receiver, &syn, 0, Some(&to)).map_err(at("sendto"))?;
    }
    answered(&receiver, "SYN/ACK", |packet| packet.get(13) == Some(&SYN_ACK))
}

pub(crate) fn raw_receiver() -> Result<OwnedFd, Outcome> {
    sys::socket(AF_INET, SOCK_RAW, IPPROTO_TCP).map_err(at("socket"))
}

/// Waits for a server to accept the connection that was begun by hand.
pub(crate) fn accepted(socket: &OwnedFd) -> Tried {
    answered(socket, "SYN/ACK", |packet| {
        let start = packet.first().map_or(0, |first| usize::from(first & 15) * 4);
        let port = packet.get(start + 2..start + 4);
        port == Some(SOURCE_PORT.to_be_bytes().as_slice()) && packet.get(start + 13) == Some(&SYN_ACK)
    })
}

fn answered(socket: &OwnedFd, what: &str, is_it: impl Fn(&[u8]) -> bool) -> Tried {
    let deadline = Instant::now() + ANSWER_LIMIT;
    let mut buffer = [0; 2048];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if !sys::poll(socket, libc::POLLIN, left).map_err(at("poll"))? {
            return Err(Outcome::Timeout(format!("no {what}")));
        }
        let length = sys::recv(socket, &mut buffer).map_err(at("recv"))?;
        if is_it(&buffer[..length]) {
            return Ok(Outcome::Served { answer: what.to_owned(), peer: String::new() });
        }
    }
}

/// The TCP header that begins a connection. Addresses of 4 or 16 bytes; with the latter the kernel
/// or nobody completes the checksum.
fn syn(source: &[u8], destination: &[u8], port: u16) -> Vec<u8> {
    let mut header = Vec::from(SOURCE_PORT.to_be_bytes());
    header.extend(port.to_be_bytes());
    header.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, SYN, 0xff, 0xff, 0, 0, 0, 0]);
    let mut pseudo = [source, destination, &[0, 6, 0, 20]].concat();
    pseudo.extend(&header);
    let sum = checksum(&pseudo);
    header[16..18].copy_from_slice(&sum.to_be_bytes());
    header
}

/// The same as a whole IPv4 packet.
pub(crate) fn ip_packet(source: [u8; 4]) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 40, 0, 1, 0, 0, 64, 6, 0, 0];
    packet.extend(source);
    packet.extend(IMDS_V4);
    let sum = checksum(&packet);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(syn(&source, &IMDS_V4, 80));
    packet
}

/// As IPv6, from nowhere: it is enough that it would arrive.
pub(crate) fn ip6_packet() -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0, 0, 20, 6, 64];
    packet.extend([0xfd, 0, 0x77, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9]);
    packet.extend(IMDS_V6);
    packet.extend(syn(&[0; 16], &IMDS_V6, 80));
    packet
}

/// The internet checksum, RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u32::from(*low)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
