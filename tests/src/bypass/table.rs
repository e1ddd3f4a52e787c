//! The ways that one process goes by itself, each in a container that fits.

use super::Expect::{self, Ours, Refused, RefusedIfThere};

/// A container that the table's ways are tried in. Its role has its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// The engine's default bridge, default capabilities.
    Plain,
    /// The same with seccomp switched off, for what Docker's filter stops by itself.
    Unconfined,
    NetAdmin,
    Privileged,
    /// The host's network.
    Host,
    HostPrivileged,
    /// A bridge with IPv6.
    V6,
    /// On the uplink itself, past the host's bridges.
    Macvlan,
    /// No network but a loopback.
    None,
    /// Two in the network namespace of a third.
    Pod,
    Side,
    PidHost,
    UsernsHost,
    CgroupnsHost,
    /// With four ports to connect from.
    FewPorts,
}

impl Place {
    pub(super) const ALL: [Self; 15] = [
        Self::Plain,
        Self::Unconfined,
        Self::NetAdmin,
        Self::Privileged,
        Self::Host,
        Self::HostPrivileged,
        Self::V6,
        Self::Macvlan,
        Self::None,
        Self::Pod,
        Self::Side,
        Self::PidHost,
        Self::UsernsHost,
        Self::CgroupnsHost,
        Self::FewPorts,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Unconfined => "unconfined",
            Self::NetAdmin => "net-admin",
            Self::Privileged => "privileged",
            Self::Host => "host",
            Self::HostPrivileged => "host-privileged",
            Self::V6 => "ipv6",
            Self::Macvlan => "macvlan",
            Self::None => "none",
            Self::Pod => "pod",
            Self::Side => "side",
            Self::PidHost => "pid-host",
            Self::UsernsHost => "userns-host",
            Self::CgroupnsHost => "cgroupns-host",
            Self::FewPorts => "few-ports",
        }
    }
}

pub(super) struct Way {
    /// The probe's words.
    pub(super) words: &'static str,
    pub(super) place: Place,
    pub(super) expect: Expect,
    /// Whether it must arrive when the daemon is not there; else the row would prove nothing.
    pub(super) leads_there: bool,
    /// It waits as long as connections are held, so it is tried together with others of the kind.
    pub(super) held: bool,
}

const fn way(words: &'static str, place: Place, expect: Expect) -> Way {
    Way { words, place, expect, leads_there: true, held: false }
}

/// One that arrives nowhere on this host even without us, and must not with us.
const fn vain(words: &'static str, place: Place, expect: Expect) -> Way {
    Way { words, place, expect, leads_there: false, held: false }
}

const fn held(way: Way) -> Way {
    Way { held: true, ..way }
}

pub(super) const TABLE: &[Way] = &[
    // Connections, which are redirected.
    way("connect", Place::Plain, Ours("plain")),
    way("v4-mapped", Place::Plain, Ours("plain")),
    vain("v6", Place::Plain, Ours("plain")), // this bridge has no IPv6
    way("v6", Place::V6, Ours("ipv6")),
    way("connect", Place::V6, Ours("ipv6")),
    way("v6only", Place::V6, Refused), // it would have to be sent to ::1
    way("addrform", Place::Plain, Ours("plain")),
    way("fastopen-sendto", Place::Plain, Ours("plain")),
    way("fastopen-connect", Place::Plain, Ours("plain")),
    way("mptcp", Place::Plain, Ours("plain")),
    way("nonblocking", Place::Plain, Ours("plain")),
    way("io-uring", Place::Plain, Ours("plain")),
    way("io-uring", Place::Unconfined, Ours("unconfined")),
    way("io-uring-polled", Place::Unconfined, Ours("unconfined")),
    way("disconnect-first", Place::Plain, Ours("plain")),
    way("disconnect-between", Place::Plain, Ours("plain")),
    way("bind-own", Place::Plain, Ours("plain")),
    held(vain("bind-listener", Place::Plain, Refused)), // our own rule for that address stops the answers
    held(way("bind-device", Place::Plain, Refused)),    // no way to the loopback by eth0
    way("mark", Place::NetAdmin, Ours("net-admin")),
    way("repair", Place::NetAdmin, Refused),
    held(way("options", Place::Plain, Refused)), // our egress program takes plain headers only
    held(vain("source-route", Place::Plain, Refused)),
    vain("smc", Place::Plain, RefusedIfThere),
    // In other surroundings.
    way("connect", Place::Unconfined, Ours("unconfined")),
    way("connect", Place::Privileged, Ours("privileged")),
    way("connect", Place::Host, Ours("host")),
    way("v4-mapped", Place::Host, Ours("host")),
    way("v6", Place::Host, Ours("host")),
    way("mptcp", Place::Host, Ours("host")),
    way("connect", Place::HostPrivileged, Ours("host-privileged")),
    way("connect", Place::Macvlan, Ours("macvlan")),
    vain("connect", Place::None, Ours("none")),
    way("connect", Place::Pod, Ours("pod")),
    way("connect", Place::Side, Ours("side")),
    way("connect", Place::PidHost, Ours("pid-host")),
    way("connect", Place::UsernsHost, Ours("userns-host")),
    way("connect", Place::CgroupnsHost, Ours("cgroupns-host")),
    way("nested-cgroup inner", Place::Privileged, Ours("privileged")),
    vain(
        "nested-engine 0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
        Place::Privileged,
        Ours("privileged"),
    ),
    way("nested-cgroup a/b/c/d/e/f/g/h/i/j", Place::HostPrivileged, Ours("host-privileged")),
    way(
        "nested-cgroup fedcba9876543210fedcba9876543210fedcba9876543210fedcba9876543210",
        Place::HostPrivileged,
        Ours("host-privileged"),
    ),
    vain("nested-netns", Place::Privileged, Ours("privileged")),
    vain("user-netns", Place::Unconfined, Ours("unconfined")),
    vain("user-netns", Place::Plain, Refused), // Docker's seccomp filter
    held(way("lo-down", Place::FewPorts, Refused)),
    vain("exhausted", Place::FewPorts, Refused),
    // To the listener, past the redirection.
    vain("direct", Place::Plain, Refused),
    vain("direct", Place::Side, Refused),
    vain("direct", Place::Host, Refused),
    vain("direct-mapped", Place::Plain, Refused),
    vain("raw-after-refused", Place::Plain, Refused),
    vain("raw-after-refused", Place::Side, Refused),
    // What is not the service: dropped.
    way("port 8080", Place::Plain, Refused),
    way("port 443", Place::Host, Refused),
    way("udp 80", Place::Plain, Refused),
    way("udp 53", Place::Plain, Refused),
    way("udp-connected 80", Place::Plain, Refused),
    way("udp-connected 53", Place::Plain, Refused),
    way("udp 80", Place::Host, Refused),
    way("udp6", Place::V6, Refused),
    way("ping", Place::Plain, Refused),
    way("ping-raw", Place::Plain, Refused),
    way("ping-raw", Place::Host, Refused),
    vain("stream 132", Place::Plain, RefusedIfThere), // SCTP
    vain("stream 33", Place::Plain, RefusedIfThere),  // DCCP
    way("raw-tcp", Place::Plain, Refused),
    way("raw-tcp-connected", Place::Plain, Refused),
    way("raw-tcp", Place::Host, Refused),
    way("raw-tcp", Place::Macvlan, Refused),
    way("raw-header", Place::Plain, Refused),
    way("raw-header", Place::Host, Refused),
    vain("raw-source-route", Place::Plain, Refused), // hosts ignore source routes unless told otherwise
    way("raw6", Place::V6, Refused),
    way("raw6-header", Place::V6, Refused),
    // Frames.
    way("frame eth0", Place::Plain, Refused),
    way("frame-direct eth0", Place::Plain, Refused),
    way("frame-xdp eth0", Place::Plain, Refused),
    way("frame eth0", Place::Macvlan, Refused),
    way("frame6 eth0", Place::Macvlan, Refused),
    way("frame-direct eth0", Place::Macvlan, Refused),
    way("frame up0", Place::Host, Refused),
    way("frame6 up0", Place::Host, Refused),
    way("frame-direct up0", Place::Host, Refused),
    way("frame-xdp up0", Place::Host, Refused),
    vain("option", Place::Host, Refused),
    vain("option", Place::Privileged, Refused),
];
