//! What the programs ask of the kernel that not every kernel in use has: asked of the kernel itself, because
//! distributions carry features back and configurations leave them out.

use anyhow::bail;
use aya::{
    maps::MapType,
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported, is_map_supported},
};

use crate::netns;

/// A helper function in programs of one type, and the first kernel that has it there.
type Helper = (ProgramType, BpfHelper, &'static str, &'static str);

const HELPERS: [Helper; 9] = [
    (
        ProgramType::CgroupSockAddr,
        BpfHelper::BPF_FUNC_get_current_ancestor_cgroup_id,
        "ids of a task's cgroups in connect programs",
        "5.7",
    ),
    (
        ProgramType::CgroupSockAddr,
        BpfHelper::BPF_FUNC_get_netns_cookie,
        "cookies of network namespaces in connect programs",
        "5.7",
    ),
    (ProgramType::CgroupSockAddr, BpfHelper::BPF_FUNC_setsockopt, "socket options in connect programs", "5.8"),
    (ProgramType::CgroupSockAddr, BpfHelper::BPF_FUNC_sk_storage_get, "socket storage in connect programs", "5.8"),
    (ProgramType::SockOps, BpfHelper::BPF_FUNC_sk_storage_get, "socket storage in sock_ops programs", "5.9"),
    (ProgramType::CgroupSkb, BpfHelper::BPF_FUNC_sk_storage_get, "socket storage in cgroup_skb programs", "5.2"),
    (ProgramType::CgroupSkb, BpfHelper::BPF_FUNC_sk_lookup_tcp, "lookup of sockets in cgroup_skb programs", "4.20"),
    (
        ProgramType::SockOps,
        BpfHelper::BPF_FUNC_get_netns_cookie,
        "cookies of network namespaces in sock_ops programs",
        "5.15",
    ),
    (
        ProgramType::TracePoint,
        BpfHelper::BPF_FUNC_get_current_ancestor_cgroup_id,
        "ids of a task's cgroups in trace programs",
        "5.14",
    ),
];

/// Names everything that is missing, each with the first kernel that has it.
pub(crate) fn require() -> anyhow::Result<()> {
    // The verifier would only say that a helper is unknown.
    let lockdown = std::fs::read_to_string("/sys/kernel/security/lockdown").unwrap_or_default();
    if lockdown.contains("[confidentiality]") {
        bail!(
            "the kernel is locked down for confidentiality (/sys/kernel/security/lockdown), so that no BPF program may read its memory, as those do that know containers' cgroups as they are made: boot with lockdown=integrity, or none"
        );
    }
    let mut missing = Vec::new();
    for (program, helper, feature, since) in HELPERS {
        // A question that the kernel does not understand is left to the verifier, who says more.
        if matches!(is_helper_supported(program, helper), Ok(false)) {
            missing.push(format!("{feature} (Linux {since})"));
        }
    }
    if matches!(is_map_supported(MapType::RingBuf), Ok(false)) {
        missing.push("ring buffers (Linux 5.8)".to_owned());
    }
    if netns::current_cookie().is_err() {
        missing.push("the socket option SO_NETNS_COOKIE (Linux 5.14)".to_owned());
    }
    if !missing.is_empty() {
        let name = rustix::system::uname();
        bail!(
            "kernel {} lacks what the interception is made of: {}. Boot Linux 5.15 or later",
            name.release().to_string_lossy(),
            missing.join(", ")
        );
    }
    Ok(())
}
