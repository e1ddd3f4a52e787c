//! Other cgroups and other namespaces than the container was given.

use std::{
    fs::{self, File},
    os::fd::AsRawFd as _,
    path::Path,
};

use crate::{
    Outcome, Tried, at, sys,
    tcp::{self, IMDS_V4},
};

/// A network namespace of one's own, with nothing but a loopback.
pub(crate) fn fresh_network(namespaces: libc::c_int) -> Tried {
    sys::unshare(namespaces).map_err(at("unshare"))?;
    sys::set_up("lo", true).map_err(at("lo up"))?;
    tcp::to(IMDS_V4, 80)
}

pub(crate) fn network_of(pid: &str) -> Tried {
    let namespace = File::open(format!("/proc/{pid}/ns/net")).map_err(at("open"))?;
    sys::enter_network(&namespace).map_err(at("setns"))?;
    tcp::to(IMDS_V4, 80)
}

pub(crate) fn without_loopback() -> Tried {
    sys::set_up("lo", false).map_err(at("lo down"))?;
    let tried = tcp::to(IMDS_V4, 80);
    sys::set_up("lo", true).map_err(at("lo up"))?;
    tried
}

/// Moves below the container's own cgroup, which is the root of what it sees.
fn enter_cgroup(name: &str) -> Result<(), Outcome> {
    // A mount of one's own: the engine's may be read-only, or not cgroup2 at all.
    let root = Path::new("/tmp/cgroup2");
    if fs::create_dir(root).is_ok() {
        sys::mount_cgroup2("/tmp/cgroup2").map_err(at("mount cgroup2"))?;
    }
    let own = root.join(name);
    fs::create_dir_all(&own).map_err(at("mkdir cgroup"))?;
    fs::write(own.join("cgroup.procs"), "0").map_err(at("enter cgroup"))
}

pub(crate) fn nested_cgroup(name: &str) -> Tried {
    enter_cgroup(name)?;
    tcp::to(IMDS_V4, 80)
}

/// What an engine inside this container would make of a container of its own.
pub(crate) fn nested_engine(name: &str) -> Tried {
    enter_cgroup(name)?;
    fresh_network(libc::CLONE_NEWNET)
}

/// Takes off every link that is attached to this cgroup, and to no other, by bpf(2); then connects.
pub(crate) fn detach_links(cgroup: u64) -> Tried {
    const LINK_GET_FD_BY_ID: libc::c_int = 30;
    const LINK_GET_NEXT_ID: libc::c_int = 31;
    const LINK_DETACH: libc::c_int = 34;
    const OF_CGROUP: u32 = 3;
    let mut id = 0;
    loop {
        let mut next = [id, 0, 0];
        if sys::bpf(LINK_GET_NEXT_ID, &mut next).is_err() {
            break;
        }
        id = next[1];
        let Ok(link) = sys::bpf(LINK_GET_FD_BY_ID, &mut [id, 0, 0]).and_then(sys::own) else {
            continue; // somebody else's, and gone by now
        };
        let info = sys::bpf_link_info(link.as_raw_fd()).map_err(at("bpf link info"))?;
        if info[0] as u32 == OF_CGROUP && info[2] == cgroup {
            sys::bpf(LINK_DETACH, &mut [link.as_raw_fd() as u32, 0]).map_err(at("BPF_LINK_DETACH"))?;
        }
    }
    tcp::to(IMDS_V4, 80)
}
