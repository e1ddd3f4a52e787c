//! TCP in every guise that connect(2) and its relatives give it.

use std::{
    fs,
    net::{Ipv4Addr, Ipv6Addr},
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use libc::{AF_INET, AF_INET6, IPPROTO_IP, IPPROTO_IPV6, IPPROTO_TCP, SOCK_STREAM, SOL_SOCKET};

use crate::{
    Outcome, Tried, at,
    sys::{self, Address},
};

pub(crate) const IMDS_V4: [u8; 4] = [169, 254, 169, 254];
pub(crate) const IMDS_V6: [u8; 16] = [0xfd, 0, 0x0e, 0xc2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x02, 0x54];
pub(crate) const LISTENER: [u8; 4] = [127, 169, 254, 169];
pub(crate) const LISTENER_PORT: u16 = 16925;
/// The stand-in for STS, which every container with a route reaches: "elsewhere".
pub(crate) const ELSEWHERE: [u8; 4] = [192, 0, 2, 1];
const ELSEWHERE_PORT: u16 = 4566;

pub(crate) const REQUEST: &[u8] =
    b"GET /latest/meta-data/iam/security-credentials/ HTTP/1.1\r\nHost: 169.254.169.254\r\nConnection: close\r\n\r\n";
/// Longer than a connection is held for, and than a role takes to be assumed.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

pub(crate) fn imds() -> Address {
    Address::v4(IMDS_V4, 80)
}

pub(crate) fn mapped(address: [u8; 4], port: u16) -> Address {
    Address::v6(Ipv4Addr::from(address).to_ipv6_mapped().octets(), port)
}

pub(crate) fn tcp(family: libc::c_int) -> Result<OwnedFd, Outcome> {
    let socket = sys::socket(family, SOCK_STREAM, 0).map_err(at("socket"))?;
    be_impatient(&socket)?;
    Ok(socket)
}

/// The kernel by itself would try to connect for two minutes.
pub(crate) fn be_impatient(socket: &OwnedFd) -> Result<(), Outcome> {
    let limit = [ANSWER_LIMIT.as_secs().to_ne_bytes(), [0; 8]].concat();
    sys::set(socket, SOL_SOCKET, libc::SO_SNDTIMEO, &limit).map_err(at("SO_SNDTIMEO"))
}

/// Asks for the role on a connected socket.
pub(crate) fn ask(socket: &OwnedFd) -> Tried {
    sys::send(socket, REQUEST, 0, None).map_err(at("send"))?;
    answer(socket)
}

/// Reads the whole answer to [`REQUEST`].
pub(crate) fn answer(socket: &OwnedFd) -> Tried {
    let peer = sys::peer_name(socket).map_or_else(|error| error.to_string(), |name| text(&name));
    let deadline = Instant::now() + ANSWER_LIMIT;
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if !sys::poll(socket, libc::POLLIN, left).map_err(at("poll"))? {
            return Err(Outcome::Timeout("connected, no answer".into()));
        }
        match sys::recv(socket, &mut buffer).map_err(at("recv"))? {
            0 => break,
            length => answer.extend_from_slice(&buffer[..length]),
        }
    }
    let answer = String::from_utf8_lossy(&answer);
    let Some((head, body)) = answer.split_once("\r\n\r\n") else {
        return Err(Outcome::Refused("closed without an answer".into()));
    };
    let status = head.split(' ').nth(1).unwrap_or_default();
    let answer = if status == "200" { body.trim().to_owned() } else { format!("HTTP {status}") };
    Ok(Outcome::Served { answer, peer })
}

fn connect_and_ask(socket: &OwnedFd, to: &Address) -> Tried {
    sys::connect(socket, to).map_err(at("connect"))?;
    ask(socket)
}

pub(crate) fn text(name: &[u8]) -> String {
    match *name {
        [2, 0, p, q, a, b, c, d, ..] => format!("{}.{}.{}.{}:{}", a, b, c, d, u16::from_be_bytes([p, q])),
        [10, 0, p, q, _, _, _, _, ref rest @ ..] if rest.len() >= 16 => {
            let address: [u8; 16] = rest[..16].try_into().unwrap_or_default();
            format!("[{}]:{}", Ipv6Addr::from(address), u16::from_be_bytes([p, q]))
        }
        _ => format!("{name:?}"),
    }
}

pub(crate) fn to(address: [u8; 4], port: u16) -> Tried {
    connect_and_ask(&tcp(AF_INET)?, &Address::v4(address, port))
}

pub(crate) fn v4_mapped() -> Tried {
    connect_and_ask(&tcp(AF_INET6)?, &mapped(IMDS_V4, 80))
}

pub(crate) fn v6(only: bool) -> Tried {
    let socket = tcp(AF_INET6)?;
    sys::set_number(&socket, IPPROTO_IPV6, libc::IPV6_V6ONLY, i32::from(only)).map_err(at("IPV6_V6ONLY"))?;
    connect_and_ask(&socket, &Address::v6(IMDS_V6, 80))
}

/// An IPv6 socket that becomes an IPv4 one while it is connected.
pub(crate) fn addrform() -> Tried {
    const IPV6_ADDRFORM: libc::c_int = 1;
    let socket = tcp(AF_INET6)?;
    sys::connect(&socket, &mapped(IMDS_V4, 80)).map_err(at("connect"))?;
    sys::set_number(&socket, IPPROTO_IPV6, IPV6_ADDRFORM, AF_INET).map_err(at("IPV6_ADDRFORM"))?;
    ask(&socket)
}

pub(crate) fn direct_mapped() -> Tried {
    connect_and_ask(&tcp(AF_INET6)?, &mapped(LISTENER, LISTENER_PORT))
}

pub(crate) fn fastopen_sendto() -> Tried {
    let socket = tcp(AF_INET)?;
    sys::send(&socket, REQUEST, libc::MSG_FASTOPEN, Some(&imds())).map_err(at("sendto"))?;
    answer(&socket)
}

pub(crate) fn fastopen_connect() -> Tried {
    let socket = tcp(AF_INET)?;
    sys::set_number(&socket, IPPROTO_TCP, libc::TCP_FASTOPEN_CONNECT, 1).map_err(at("TCP_FASTOPEN_CONNECT"))?;
    connect_and_ask(&socket, &imds())
}

pub(crate) fn mptcp() -> Tried {
    let socket = sys::socket(AF_INET, SOCK_STREAM, libc::IPPROTO_MPTCP).map_err(at("socket"))?;
    be_impatient(&socket)?;
    connect_and_ask(&socket, &imds())
}

pub(crate) fn nonblocking() -> Tried {
    let socket = sys::socket(AF_INET, SOCK_STREAM | libc::SOCK_NONBLOCK, 0).map_err(at("socket"))?;
    match sys::connect(&socket, &imds()) {
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
        other => other.map_err(at("connect"))?,
    }
    if !sys::poll(&socket, libc::POLLOUT, ANSWER_LIMIT).map_err(at("poll"))? {
        return Err(Outcome::Timeout("poll".into()));
    }
    sys::take_error(&socket).map_err(at("connect"))?;
    ask(&socket)
}

/// The address that the default route leaves from.
pub(crate) fn own_address() -> Result<[u8; 4], Outcome> {
    let socket = sys::socket(AF_INET, libc::SOCK_DGRAM, 0).map_err(at("socket"))?;
    sys::connect(&socket, &Address::v4(ELSEWHERE, 9)).map_err(at("route"))?;
    match sys::own_name(&socket).map_err(at("getsockname"))?[..] {
        [_, _, _, _, a, b, c, d, ..] => Ok([a, b, c, d]),
        _ => Err(Outcome::Error("getsockname".into())),
    }
}

pub(crate) fn bound_to_own_address() -> Tried {
    let socket = tcp(AF_INET)?;
    sys::bind(&socket, &Address::v4(own_address()?, 0)).map_err(at("bind"))?;
    connect_and_ask(&socket, &imds())
}

pub(crate) fn bound_to_listener() -> Tried {
    let socket = tcp(AF_INET)?;
    sys::bind(&socket, &Address::v4(LISTENER, 0)).map_err(at("bind"))?;
    connect_and_ask(&socket, &imds())
}

pub(crate) fn bound_to_device() -> Tried {
    let socket = tcp(AF_INET)?;
    sys::set(&socket, SOL_SOCKET, libc::SO_BINDTODEVICE, b"eth0").map_err(at("SO_BINDTODEVICE"))?;
    connect_and_ask(&socket, &imds())
}

pub(crate) fn marked() -> Tried {
    let socket = tcp(AF_INET)?;
    sys::set_number(&socket, SOL_SOCKET, libc::SO_MARK, 0x1234).map_err(at("SO_MARK"))?;
    connect_and_ask(&socket, &imds())
}

/// A socket in repair mode is connected without a handshake.
pub(crate) fn repaired() -> Tried {
    let socket = tcp(AF_INET)?;
    sys::set_number(&socket, IPPROTO_TCP, libc::TCP_REPAIR, 1).map_err(at("TCP_REPAIR"))?;
    sys::connect(&socket, &imds()).map_err(at("connect"))?;
    sys::set_number(&socket, IPPROTO_TCP, libc::TCP_REPAIR, 0).map_err(at("TCP_REPAIR"))?;
    ask(&socket)
}

pub(crate) fn disconnected_first() -> Tried {
    let socket = tcp(AF_INET)?;
    sys::connect(&socket, &Address::v4(ELSEWHERE, ELSEWHERE_PORT)).map_err(at("connect elsewhere"))?;
    sys::connect(&socket, &Address::nobody()).map_err(at("disconnect"))?;
    connect_and_ask(&socket, &imds())
}

pub(crate) fn disconnected_between() -> Tried {
    let socket = tcp(AF_INET)?;
    sys::connect(&socket, &imds()).map_err(at("connect"))?;
    sys::connect(&socket, &Address::nobody()).map_err(at("disconnect"))?;
    connect_and_ask(&socket, &imds())
}

/// "Record route", with room for three hops: on the way the header is longer than usual.
pub(crate) fn with_options() -> Tried {
    let socket = tcp(AF_INET)?;
    let mut record = [0_u8; 16];
    record[..3].copy_from_slice(&[7, 15, 4]);
    sys::set(&socket, IPPROTO_IP, libc::IP_OPTIONS, &record).map_err(at("IP_OPTIONS"))?;
    connect_and_ask(&socket, &imds())
}

/// "Loose source route" by the gateway: the header's address is then the gateway's.
pub(crate) fn source_routed() -> Tried {
    let socket = tcp(AF_INET)?;
    let mut route = vec![131, 7, 4];
    route.extend(gateway()?);
    route.push(0);
    sys::set(&socket, IPPROTO_IP, libc::IP_OPTIONS, &route).map_err(at("IP_OPTIONS"))?;
    connect_and_ask(&socket, &imds())
}

/// The next hop on the way out.
pub(crate) fn gateway() -> Result<[u8; 4], Outcome> {
    let table = fs::read_to_string("/proc/net/route").map_err(at("/proc/net/route"))?;
    let gateways = table.lines().skip(1).filter_map(|line| line.split_whitespace().nth(2));
    let mut gateways = gateways.filter_map(|word| u32::from_str_radix(word, 16).ok());
    let gateway = gateways.find(|gateway| *gateway != 0).map(u32::to_ne_bytes);
    gateway.ok_or_else(|| Outcome::Error("no gateway".into()))
}

/// Takes every port that a connection could come from.
pub(crate) fn exhausted() -> Tried {
    let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").map_err(at("port range"))?;
    let mut bounds = range.split_whitespace().filter_map(|word| word.parse::<u16>().ok());
    let (Some(first), Some(last)) = (bounds.next(), bounds.next()) else {
        return Err(Outcome::Error(range));
    };
    let mut held = Vec::new();
    for port in first..=last {
        let socket = tcp(AF_INET)?;
        sys::bind(&socket, &Address::v4([0; 4], port)).map_err(at("bind"))?;
        sys::listen(&socket).map_err(at("listen"))?;
        held.push(socket);
    }
    to(IMDS_V4, 80)
}

/// Holds the listener's address for as long as it lives, and says so when a connection comes in.
pub(crate) fn squat(address: [u8; 4], port: u16) -> Tried {
    let socket = tcp(AF_INET)?;
    sys::set_number(&socket, SOL_SOCKET, libc::SO_REUSEADDR, 1).map_err(at("SO_REUSEADDR"))?;
    sys::bind(&socket, &Address::v4(address, port)).map_err(at("bind"))?;
    sys::listen(&socket).map_err(at("listen"))?;
    sys::poll(&socket, libc::POLLIN, Duration::from_secs(600)).map_err(at("poll"))?;
    Ok(Outcome::Served { answer: "the squatter got a connection".into(), peer: String::new() })
}

/// Asks without pause for so many milliseconds; every answer must be the same, and none may fail.
pub(crate) fn hammer(ms: u64) -> Tried {
    let end = Instant::now() + Duration::from_millis(ms);
    let mut answers = Vec::<String>::new();
    while Instant::now() < end {
        match to(IMDS_V4, 80) {
            Ok(Outcome::Served { answer, .. }) if answers.contains(&answer) => {}
            Ok(Outcome::Served { answer, .. }) => answers.push(answer),
            Ok(Outcome::Refused(why) | Outcome::Timeout(why) | Outcome::Error(why))
            | Err(Outcome::Refused(why) | Outcome::Timeout(why) | Outcome::Error(why)) => {
                return Err(Outcome::Refused(format!("once: {why}, and before: {}", answers.join(" and "))));
            }
            Err(Outcome::Served { .. }) => {}
        }
    }
    Ok(Outcome::Served { answer: answers.join(" and "), peer: String::new() })
}
