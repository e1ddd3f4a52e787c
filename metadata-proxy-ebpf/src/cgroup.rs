//! The kernel makes or removes a cgroup: containers are known before their first process runs.
//!
//! In a network namespace of its own a process is taken for a container's whoever it is. In the host's
//! namespace only its cgroup tells, and an engine says that a container runs only after it does.
//! Engines give the cgroup of a container its id as a name, 64 hexadecimal digits.

use aya_ebpf::{
    EbpfContext as _,
    helpers::{bpf_probe_read_kernel, generated::bpf_get_current_ancestor_cgroup_id},
    programs::TracePointContext,
};
use metadata_proxy_common::{CGROUP_CONTAINER, Counter};

use crate::maps::{CGROUPS, HOSTS, NESTED, cgroup_kind, count};

/// The fields of `cgroup:cgroup_mkdir` and `cgroup:cgroup_rmdir`, the same since Linux 5.9 (their
/// `format` in tracefs).
const HIERARCHY: usize = 8;
const ID: usize = 16;
const PATH: usize = 24;

const DIGITS: usize = 64;
/// After the digits where systemd manages the cgroups: `docker-<id>.scope`.
const SUFFIX: [u8; 6] = *b".scope";
const TAIL: usize = DIGITS + SUFFIX.len();
/// Deeper than any host process is.
const LEVELS: i32 = 32;

pub fn made(ctx: &TracePointContext) {
    let (Some(id), Some(tail)) = (id(ctx), tail(ctx)) else {
        return;
    };
    if !is_container(&tail) {
        return;
    }
    // A container makes as many as it likes, and they are to cost no other container its place.
    let map = if kind_of_current() == Some(CGROUP_CONTAINER) { &NESTED } else { &CGROUPS };
    if map.insert(id, CGROUP_CONTAINER, 0).is_err() {
        count(Counter::CgroupsLost);
    }
}

pub fn removed(ctx: &TracePointContext) {
    let Some(id) = id(ctx) else {
        return;
    };
    // Fails where it is not.
    let _ = HOSTS.remove(id);
    if cgroup_kind(id).is_some() {
        // Each fails where it is not.
        let _ = CGROUPS.remove(id);
        let _ = NESTED.remove(id);
    }
}

/// What the deepest known cgroup on the path of the current task is.
pub fn kind_of_current() -> Option<u32> {
    let mut kind = None;
    let mut level = 1;
    while level <= LEVELS {
        // SAFETY: a helper that takes no pointers.
        let cgroup = unsafe { bpf_get_current_ancestor_cgroup_id(level) };
        if cgroup == 0 {
            return kind;
        }
        kind = cgroup_kind(cgroup).or(kind);
        level += 1;
    }
    Some(CGROUP_CONTAINER)
}

/// The id of the cgroup, if it is in the cgroup2 hierarchy: those of version 1 count for themselves.
#[inline(always)]
fn id(ctx: &TracePointContext) -> Option<u64> {
    // SAFETY: fields of this event.
    unsafe {
        if ctx.read_at::<i32>(HIERARCHY).ok()? != 0 {
            return None;
        }
        ctx.read_at(ID).ok()
    }
}

/// The end of the path.
#[inline(always)]
fn tail(ctx: &TracePointContext) -> Option<[u8; TAIL]> {
    // SAFETY: a field of this event, and within it a string of the length told, its NUL included.
    unsafe {
        let location: u32 = ctx.read_at(PATH).ok()?;
        let (offset, length) = ((location & 0xffff) as usize, (location >> 16) as usize);
        if length < TAIL + 1 || length > 4096 {
            return None;
        }
        let start = ctx.as_ptr().cast::<u8>().add(offset + length - 1 - TAIL);
        bpf_probe_read_kernel(start.cast()).ok()
    }
}

#[inline(always)]
fn is_container(tail: &[u8; TAIL]) -> bool {
    let start = if tail[DIGITS..] == SUFFIX { 0 } else { SUFFIX.len() };
    let mut at = 0;
    while at < DIGITS {
        if !tail[start + at].is_ascii_hexdigit() {
            return false;
        }
        at += 1;
    }
    true
}
