//! What the BPF programs and the daemon must agree on: map layouts, addresses, names.
//!
//! Every struct here is a map key or value: `repr(C)`, no implicit padding (the kernel hashes keys
//! byte by byte), and byte order said where a field is not in host order.

#![no_std]

/// Raised whenever a layout in this file changes. Pinned maps live in a directory of this version,
/// because nothing checks the layout of a map that is opened by its pin.
pub const LAYOUT_VERSION: u32 = 4;

/// The IPv4 address of IMDS, 169.254.169.254, as it stands in a packet.
pub const IMDS_V4: u32 = u32::from_ne_bytes([169, 254, 169, 254]);
/// The IPv6 address of IMDS, `fd00:ec2::254`, as it stands in a packet.
pub const IMDS_V6: [u32; 4] =
    [u32::from_ne_bytes([0xfd, 0x00, 0x0e, 0xc2]), 0, 0, u32::from_ne_bytes([0, 0, 0x02, 0x54])];
/// The port of IMDS, in host order.
pub const IMDS_PORT: u16 = 80;

/// The loopback address that the daemon's listeners take in every network namespace,
/// 127.169.254.169, as it stands in a packet. Not 127.0.0.1, where a container's own servers live.
pub const LISTENER_V4: u32 = u32::from_ne_bytes([127, 169, 254, 169]);
/// The same address in the order in which it is read.
pub const LISTENER_OCTETS: [u8; 4] = [127, 169, 254, 169];
/// The port a listener takes unless something squats on it.
pub const LISTENER_PORT: u16 = 16925;

/// How many levels of cgroup ancestors a flow remembers, from the root's children down.
/// Engines put containers at level 2 to 4; deeper levels are the containers' own.
pub const CGROUP_LEVELS: usize = 8;

/// What the daemon tells the programs once, at start.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Cookie of the network namespace in which the host's own processes live.
    pub host_netns: u64,
    /// Id of the cgroup that the programs are attached to, for the one that runs for all cgroups.
    pub cgroup: u64,
    /// Its level below the root, which has 0.
    pub cgroup_level: u32,
    /// First SYN timeout of an intercepted connection, in jiffies.
    pub syn_timeout: u32,
    /// `TCP_SYNCNT` of an intercepted connection: how often it retries while it is held.
    pub syn_retries: u32,
    pub task: TaskLayout,
    /// One of the `HOST_*` values: what processes of the host have.
    pub host: u32,
    pub pad: u32,
}

/// The real service, without being asked for.
pub const HOST_SERVED: u32 = 0;
/// The real service, unless their cgroup is that of a service with a role of its own: those that are not known to be of
/// none are intercepted, so that the daemon looks.
pub const HOST_ASKED: u32 = 1;
/// Nothing, unless their cgroup is exempt or a service's.
pub const HOST_DENIED: u32 = 2;

/// Where the running kernel keeps what tells how deep a task's namespaces are: offsets in bytes, which differ from
/// build to build.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TaskLayout {
    /// `task_struct.thread_pid`, a pointer to a `pid`; 0 if none of this is known.
    pub thread_pid: u32,
    /// `pid.level`: how many PID namespaces there are above the task's own.
    pub pid_level: u32,
    /// `task_struct.cred`, a pointer to a `cred`.
    pub cred: u32,
    /// `cred.user_ns`, a pointer to a `user_namespace`.
    pub user_ns: u32,
    /// `user_namespace.level`: how many user namespaces there are above it.
    pub user_level: u32,
}

/// Who opened an intercepted connection, as the kernel saw it at connect time.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Cgroup id of the connecting task.
    pub cgroup: u64,
    /// Ids of its ancestors at level 1, 2, ... (itself included); 0 where the path has ended.
    pub ancestors: [u64; CGROUP_LEVELS],
    /// Cookie of the socket's network namespace.
    pub netns: u64,
    /// Process id of the connecting task, in the initial pid namespace.
    pub pid: u32,
    /// 1: of a process of the host's, intercepted only because it may be a service's.
    pub host: u32,
}

/// Kept in the storage of each client socket that asked for an IMDS address, so that it lives and
/// dies with the socket and nobody else can evict it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Client {
    pub flow: Flow,
    /// One of the `VERDICT_*` values.
    pub verdict: u32,
    /// The port asked for, in network order, in the lower half.
    pub port: u32,
    /// The address asked for, network order; an IPv4 one stands in the last word.
    pub address: [u32; 4],
}

/// The socket belongs to a container: redirected, and never let through to the real service.
pub const VERDICT_REDIRECTED: u32 = 1;
/// The socket belongs to a host process: the real service is its own.
pub const VERDICT_APPROVED: u32 = 2;

/// Finds the flow of a connection between its SYN and its acceptance.
///
/// Two sockets in a network namespace that containers share can have the same port for a while: the kernel lets one that
/// is bound to a device have that of another. But each chooses a sequence number, which both ends of a connection know.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowKey {
    pub netns: u64,
    /// Source address, network order.
    pub address: u32,
    /// Source port, host order.
    pub port: u32,
    /// Of its SYN.
    pub sequence: u32,
    pub pad: u32,
}

/// A container wants to talk and its network namespace has no listener yet.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    pub netns: u64,
    /// A process in that namespace, in the initial pid namespace.
    pub pid: u32,
    pub pad: u32,
}

/// What the `CGROUPS` map says of a cgroup and all below it; the deepest entry on a task's path counts.
/// The processes of a container, intercepted in every network namespace.
pub const CGROUP_CONTAINER: u32 = 1;
/// Exempt by the operator: the real service is theirs. By its path, which the next daemon is given, too.
pub const CGROUP_EXEMPT: u32 = 2;
/// The same by what the engine has told of the container. The next daemon leaves it so until it is told anew.
pub const CGROUP_INSTANCE: u32 = 3;

/// Indices of the `COUNTERS` map.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// Connections of containers redirected to a listener.
    Redirected,
    /// Connections of host processes left alone.
    Approved,
    /// Connection attempts straight to a listener's address, refused.
    Direct,
    /// SYNs held back because their namespace has no listener yet.
    Held,
    /// Packets to an IMDS address from a socket that is not approved, dropped.
    Guarded,
    /// Accepted connections that were handed their flow.
    Accepted,
    /// Accepted connections without a recorded flow; the daemon closes them.
    Unknown,
    /// Requests for a listener that found the ring buffer full; the next SYN repeats them.
    WantedLost,
    /// Cgroups named like containers' that found their map full. Those that the host has made are, in the
    /// host's network namespace, not intercepted until the daemon knows them.
    CgroupsLost,
    /// Socket options refused to containers, because what the socket sends would pass the guard.
    OptionsRefused,
}

impl Counter {
    pub const ALL: [Self; 10] = [
        Self::Redirected,
        Self::Approved,
        Self::Direct,
        Self::Held,
        Self::Guarded,
        Self::Accepted,
        Self::Unknown,
        Self::WantedLost,
        Self::CgroupsLost,
        Self::OptionsRefused,
    ];
}

#[cfg(feature = "user")]
mod pod {
    use super::{Flow, Settings};

    // SAFETY: `repr(C)`, integers only, no padding: any bytes are a value and every byte is one.
    unsafe impl aya::Pod for Settings {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Flow {}
}
