//! Socket options that lead around the guard of the uplinks, refused to containers: by a program that changes what a
//! kernel function returns (`BPF_MODIFY_RETURN`, Linux 5.7), or, where the kernel takes none, at the hook of cgroups,
//! which costs every other option more, and which 32-bit programs pass.
//!
//! aya 0.14 does not know programs of the first kind. So it is relocated by aya's own parser, and loaded here.

use std::{
    collections::HashSet,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    path::Path,
};

use anyhow::{Context as _, bail};
use aya::{Ebpf, maps::Map};
use aya_obj::Object;
use tracing::{info, warn};

use super::{
    btf::Btf,
    link,
    object::{OBJECT, Pins},
    syscall,
};

const ANY: &str = "imds_setsockopt_any";
const OF_CGROUP: &str = "imds_setsockopt";
const FUNCTION: &str = "security_socket_setsockopt";
/// For a map that the program does not use: the kernel would refuse it.
const NO_MAP: i32 = -1;

/// What comes of it where it is not in force, or not for all.
const OPEN: &str = "containers that have CAP_NET_RAW and a network device of the host's can send frames past the guard of the uplinks (PACKET_QDISC_BYPASS, AF_XDP)";
const OPEN_TO_32_BIT: &str = "by 32-bit programs";

/// Attaches whichever the kernel takes. `any` is what `load` has made.
pub(super) fn attach(object: &mut Ebpf, any: anyhow::Result<OwnedFd>, pins: &Pins, cgroup: &Path) {
    let any = match any.and_then(|program| link::attach_any(&program, &pins.link(ANY))) {
        Ok(()) => return pins.forget_link(OF_CGROUP),
        Err(error) => error,
    };
    let loaded = link::load_all(object, [&OF_CGROUP]);
    match loaded.and_then(|()| link::attach_all(object, [&OF_CGROUP], pins, cgroup)) {
        Ok(()) => {
            info!("{OPEN} {OPEN_TO_32_BIT}: {any:#}");
            pins.forget_link(ANY);
        }
        Err(error) => warn!("{OPEN}: {any:#}; {error:#}"),
    }
}

/// For `check`: whether the kernel takes one of them.
pub(super) fn try_load(object: &mut Ebpf) -> anyhow::Result<String> {
    let Err(any) = load(object) else {
        return Ok("those that lead around the guard of the uplinks are refused to containers".to_owned());
    };
    link::load_all(object, [&OF_CGROUP]).with_context(|| format!("{OPEN}: {any:#}"))?;
    bail!("{OPEN} {OPEN_TO_32_BIT}: {any:#}")
}

/// Verified by the kernel; it works with the maps of the object, none of which has been taken out yet.
pub(super) fn load(loaded: &Ebpf) -> anyhow::Result<OwnedFd> {
    let function = Btf::of_kernel()?.function(FUNCTION);
    let function = function.with_context(|| format!("the kernel has no {FUNCTION} (CONFIG_SECURITY_NETWORK)"))?;
    let mut object = Object::parse(OBJECT)?;
    let sections: HashSet<usize> = object.functions.keys().map(|(section, _)| *section).collect();
    let maps = std::mem::take(&mut object.maps);
    let maps = maps.iter().map(|(name, map)| (name.as_str(), loaded.map(name).map_or(NO_MAP, descriptor), map));
    object.relocate_maps(maps, &sections)?;
    object.relocate_calls(&sections)?;
    let program = object.programs.get(ANY).context("this build is broken: it has no such program")?;
    let instructions = &object.functions[&program.function_key()].instructions;
    syscall::load_modify_return(instructions, &object.license, function)
        .context("the kernel does not take it (Linux 5.7 on x86-64, 6.4 on arm64)")
}

/// Of the kinds of maps that it uses.
fn descriptor(map: &Map) -> i32 {
    match map {
        Map::Array(map) | Map::HashMap(map) | Map::PerCpuArray(map) => map.fd().as_fd().as_raw_fd(),
        _ => NO_MAP,
    }
}
